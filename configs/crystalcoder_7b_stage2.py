"""CrystalCoder-7B, stage 2 of 3: the other half of SlimPajama and two epochs of StarCoder, 927B.

From pretrain/params/phase2/params.yaml. The original went on from the weights of stage 1; train.py
cannot yet, and starts from random ones. After a new warm-up of 86 steps its peak is where the line
of stage 1 would be about step 79,830 (stage 1 ended at 0.0087869), and it ends on that line too.
"""

from configs.crystalcoder_7b_stage1 import *

# data: 142 chunks of 1,500 steps and 1,387 steps of the 143rd. The site announces 143 checkpoints.
n_chunks = 143
sources = [  # the odd-numbered half of SlimPajama, 344.9B tokens, and StarCoder, 582.5B
    dict(name="arxiv", path="SlimPajama/ArXiv", weight=0.016083857723861224),
    dict(name="book", path="SlimPajama/Book", weight=0.015358576352403003),
    dict(name="c4", path="SlimPajama/C4", weight=0.09909981505117808),
    dict(name="commoncrawl", path="SlimPajama/CommonCrawl", weight=0.1983897689052003),
    dict(name="github", path="SlimPajama/Github", weight=0.018454606218343703),
    dict(name="stackexchange", path="SlimPajama/StackExchange", weight=0.011784941022274698),
    dict(name="wikipedia", path="SlimPajama/Wikipedia", weight=0.012710859995188247),
    dict(name="starcoder", path="StarCoder", weight=0.6281175747315507),  # 0.9 of it by FIM
]

lr = 0.0087825
min_lr = 0.00013679
warmup_steps = 86
decay_steps = 214_387  # 86 + 214,301: the end of the stage
max_steps = 214_387  # 927.3B tokens
