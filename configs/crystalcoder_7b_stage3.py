"""CrystalCoder-7B, stage 3 of 3: web languages and Python, a tenth of the rest: 120B tokens.

From pretrain/params/phase3/params.yaml. The original started from the weights of stage 2 alone,
with a new optimizer; train.py cannot yet. Card and paper say 110B tokens (100 + 10); steps x
batch and the weights of the mix say 119.9B (96 + 20 + 4). The file that ran is followed.
"""

from configs.crystalcoder_7b_stage2 import *

# data: a chunk is 1,000 steps x 2,112 rows, as the checkpoints were; 27 of them and 728 steps
n_chunks = 28
rows_per_chunk = 2_112_000
sources = [  # of what is no web language and not Python, the first tenth; no GitHub
    dict(name="css", path="StarCoder/css", weight=0.08792775542527535),
    dict(name="javascript", path="StarCoder/javascript", weight=0.18370762129027085),
    dict(name="html", path="StarCoder/html", weight=0.18536747298179254),
    dict(name="python", path="StarCoder/python", weight=0.34270089587947816),  # 0.3 of the 4: FIM
    dict(name="arxiv", path="SlimPajama/ArXiv", weight=0.016663255966286664),
    dict(name="book", path="SlimPajama/Book", weight=0.00831444671835677),
    dict(name="c4", path="SlimPajama/C4", weight=0.01685693658811707),
    dict(name="commoncrawl", path="SlimPajama/CommonCrawl", weight=0.058282893778895735),
    dict(name="stackexchange", path="SlimPajama/StackExchange", weight=0.008379821974060706),
    dict(name="wikipedia", path="SlimPajama/Wikipedia", weight=0.05835852419497722),
    dict(name="starcoder", path="StarCoder", weight=0.0334403752024888),  # 0.9 by FIM
]

lr = 0.002
min_lr = 0.0002
warmup_steps = 276  # 1 % of the steps; the card says 176, the file that ran is followed
decay_steps = 27_728  # 276 + 27,452
max_steps = 27_728  # 119.9B tokens
