"""CrystalCoder-7B, stage 3 of 3: web languages and Python, a tenth of the rest: 120B tokens.

From pretrain/params/phase3/params.yaml. It starts from the weights of stage 2 alone, with a new
optimizer. Card and paper say 110B tokens (100 + 10); steps x batch and the weights of the mix say
119.9B (96 + 20 + 4). The file that ran is followed.
"""

from configs.crystalcoder_7b_stage2 import *
from configs.crystalcoder_7b_stage2 import sources as _before

# data: a chunk is 1,000 steps x 2,112 rows, as the checkpoints were; 27 of them and 728 steps
n_chunks = 28
rows_per_chunk = 2_112_000
_web = {  # folders of StarCoder, 95.9B tokens
    "css": 0.08792775542527535,
    "javascript": 0.18370762129027085,
    "html": 0.18536747298179254,
    "python": 0.34270089587947816,
}
_slimpajama = {  # 20.0B tokens of the first tenth of all of it; no GitHub
    "arxiv": 0.016663255966286664,
    "book": 0.00831444671835677,
    "c4": 0.01685693658811707,
    "commoncrawl": 0.058282893778895735,
    "stackexchange": 0.008379821974060706,
    "wikipedia": 0.05835852419497722,
}
*_half, _starcoder = _before
sources = [
    # 0.3 of the documents by FIM, in three epochs, each with its own cuts
    _starcoder | dict(name=name, files=f"{name}/*.parquet", weight=weight, fim_rate=0.3, epochs=3)
    for name, weight in _web.items()
] + [
    one | dict(subset="tenth", weight=_slimpajama[one["name"]])
    for one in _half if one["name"] in _slimpajama
] + [
    # 4.0B tokens of a tenth, 0.9 by FIM as before. The original's was the first tenth of packed
    # rows, shuffled. Of the files here, by name, that would be ada to c: instead every tenth of
    # each language, those whose number ends in 0.
    _starcoder | dict(files="*0-of-*.parquet", weight=0.0334403752024888, epochs=1),
]

# Stage 2 stops inside its 143rd chunk. is_pretrained_checkpoint: true, so weights alone.
init_from = "out/crystalcoder_7b_stage2/last"
init_optimizer = False
lr = 0.002
min_lr = 0.0002
warmup_steps = 276  # 1 % of the steps; the card says 176, the file that ran is followed
decay_steps = 27_728  # 276 + 27,452
max_steps = 27_728  # 119.9B tokens
