"""CrystalCoder in small, stage 2 of 3: English and code, nine documents of ten to be filled in.

Goes on from the weights and the optimizer of stage 1, on its line of learning rates, to its end.
"""

from configs.crystal_mini_stage1 import *
from configs.crystal_mini_stage1 import sources as _english

# data: 6 chunks of 150 steps. The original read the other half of its English here; of this English
# there is too little, and all of it is read again: 1.3 passes in stage 1, 1.5 here.
n_chunks = 6
_prose, _code = _english
sources = [
    _prose | dict(weight=0.37),  # the original's shares: 0.372 and 0.628
    _code | dict(weight=0.63, fim_rate=0.9),  # about a quarter of the code is read
]

# tokens: stage 1's file, which has the special tokens; none is added
tokenizer = "data/crystal_mini_stage1/tokenizer.model"
special_tokens = ""

# training: a new warm-up to where the line of stage 1 is 12 steps after its end, 0.012 - 300 x
# 0.00001. From there it is that line: (0.009 - 0.00012) / (900 - 12) = 0.00001 a step.
init_from = "out/crystal_mini_stage1/ckpt_001"
init_optimizer = True
lr = 0.009
warmup_steps = 12
decay_steps = 900
max_steps = 900
