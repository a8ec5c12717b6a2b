"""CrystalCoder in small, stage 3 of 3: code, of which 0.3 is to be filled in, and some English.

It starts from the weights of stage 2 alone, with a new optimizer, and a peak and a line of its own.
"""

from configs.crystal_mini_stage2 import *
from configs.crystal_mini_stage2 import sources as _before

# data: a chunk is 60 steps x 8 rows. 40 of them hold four fifths of the code, dealt to them row by
# row, and two are trained, 0.25M tokens: some rows of every file, where two chunks alone would be
# 47 files, all known from stage 2. It has a tenth of the steps before it, as in the original.
n_chunks = 40
rows_per_chunk = 480
_prose, _code = _before
sources = [  # the original's English, without the code in it, was 0.167
    _prose | dict(weight=0.17),
    _code | dict(weight=0.83, fim_rate=0.3),
]

init_from = "out/crystal_mini_stage2/ckpt_005"
init_optimizer = False
lr = 0.002  # this and its end are the original's
min_lr = 0.0002
warmup_steps = 12  # the original's 1 % would be one step
decay_steps = 120
max_steps = 120
