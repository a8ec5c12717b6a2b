"""CrystalCoder in small, stage 2 of 3: English and code, of which 0.9 is to be filled in.

It goes on from stage 1, weights and optimizer. After a new warm-up of 12 steps its peak is where
the line of stage 1 would be at step 312, and it follows that line to its end.
"""

from configs.crystal_mini_stage1 import *
from configs.crystal_mini_stage1 import sources as _before

# data: 6 chunks of 150 steps, 1.8M tokens. The original read the other half of its English; of this
# there is too little to halve, and all is read again, 1.5 times. The code: a quarter of it.
n_chunks = 6
_prose, _code = _before
sources = [  # the original's shares are 0.372 and 0.628
    _prose | dict(weight=0.37),
    # Of the documents 0.9 are rewritten. They are whole files, six of seven longer than a context:
    # 448 of the 7,200 rows hold one of the marks, 55 all three. The way of the tokens is that of
    # the original; to fill in a middle is more than a model can learn from so few.
    _code | dict(weight=0.63, fim_rate=0.9),
]

# tokens: those of stage 1; its file has the special tokens already
tokenizer = "data/crystal_mini_stage1/tokenizer.model"
special_tokens = ""

init_from = "out/crystal_mini_stage1/ckpt_001"
init_optimizer = True  # one line, and so one run: the moments, and how many steps they have seen
lr = 0.009  # 0.012 - 300 x 0.00001, on the line of stage 1
warmup_steps = 12
decay_steps = 900  # 1,200 - 300: the end of the line; (0.009 - 0.00012) / 888 = 0.00001 a step
max_steps = 900
