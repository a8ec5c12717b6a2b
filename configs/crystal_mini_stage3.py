"""CrystalCoder in small, stage 3 of 3: code, three documents of ten to be filled in the middle.

Starts from the weights of stage 2 alone, with a new optimizer, a peak and a decay of its own.
"""

from configs.crystal_mini_stage2 import *
from configs.crystal_mini_stage2 import sources as _before

# data: 2 chunks of 60 steps x 8 rows. One row in six is English, as in the original. Of the code
# that stage 2 read, this is the beginning once more, most of it now left as it was written.
n_chunks = 2
rows_per_chunk = 480
_prose, _code = _before
sources = [_prose | dict(weight=0.17), _code | dict(weight=0.83, fim_rate=0.3)]

# training: the original's peak and end; a warm-up of its 1 % would be one step
init_from = "out/crystal_mini_stage2/ckpt_005"
init_optimizer = False
lr = 0.002
min_lr = 0.0002
warmup_steps = 12
decay_steps = 120
max_steps = 120
