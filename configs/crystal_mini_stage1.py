"""CrystalCoder in small, stage 1 of 3: English. `make crystal-mini` runs all three.

The text is the standard library of the Python that runs, as in demo.py: half of the files give
their docstrings, which is the English here, the others their code. The stages after this one start
from its lines. It fixes the model and the tokenizer for all three.
"""

# model: 1,119,486 parameters. CrystalCoder's shape with all its switches, its width divided by 32
# and its depth by 10, as in demo.py
n_layer = 3
n_head = 4  # heads of 32
n_embd = 128
n_inner = 341  # 8/3 of n_embd, rounded down, as the original's 10,922
vocab_size = 4096  # 4,092 pieces + 4 special tokens
seq_len = 256
norm = "layer"
norm_eps = 1e-5
bias = True
rotary_dim = 8  # a quarter of a head, as 32 of 128
rope_interleaved = True
tie = True

# muP: the rates and stds are those of width 64, so m = 128 / 64 = 2. CrystalCoder's width is 256,
# its std 0.073 and its factor 14.6: with a quarter of the width the std is twice as large, and the
# factor half, which leaves the product: 0.146 x 7.3 = 0.073 x 14.6.
mup_base_width = 64
mup_emb_mult = 7.3
mup_alpha = 2.22  # logits x 2.22 / 2 = 1.11
init_std = 0.146

# data: a chunk is 150 steps x 8 rows = 1,200 rows; two of them are 300 steps, 0.6M tokens, 1.3
# passes through the English. The original's, too, had some code in it: 5.0 % of it was GitHub.
n_chunks = 2
rows_per_chunk = 1200
sources = [
    dict(name="prose", path="stdlib:prose", weight=0.95, licence="PSF-2.0"),
    dict(name="code", path="stdlib:code", weight=0.05, licence="PSF-2.0"),
]
valid_share = 0.05  # by file, and so the same files in all three stages
valid_rows = 128

# tokens: a tokenizer is trained here for all three stages, on all of the English, 1.6 MB, and, by
# the weights, 0.4 MB of code: that is enough for 2.86 bytes a token of code, where the demo's has
# 2.99. The special tokens follow, spelt as in the released tokenizer; <|fim_pad|> is not used.
tokenizer = "bpe"
special_tokens = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"

# rows: as the original's, <s> text </s>, each token a target once
bos = True
overlap = True

# optimizer: CrystalCoder's, its rate too, which muP keeps. One line falls by (0.012 - 0.00012) /
# (1200 - 12) = 0.00001 a step over stages 1 and 2. The original's had 294,423 steps, of which
# stage 1 was 79,721, 27 %; here it is 300 of 1,200.
lr = 0.012
min_lr = 0.00012  # a hundredth of lr
schedule = "linear"
warmup_steps = 12  # 1 % of the line
decay_steps = 1200
max_steps = 300  # stopped on the way down, at lr 0.012 - 288 x 0.00001 = 0.00912
batch_size = 8  # rows of 256 = 2,048 tokens
weight_decay = 0.1
grad_clip = 1.0
beta1 = 0.9
beta2 = 0.95
eps = 1e-9
log_every = 30
