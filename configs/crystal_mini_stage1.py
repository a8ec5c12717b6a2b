"""CrystalCoder in small, stage 1 of 3: English, on two CPU cores in a minute and a half.

The text is the standard library of the Python that runs, as in demo.py: what half of its files say
in docstrings is the English here, the other half of the files the code. The stages after this one
start from its lines and its tokenizer. It fixes the model for all three.
"""

# model: 2.57M parameters with every switch of CrystalCoder's; its width divided by 21, its depth by
# 8, as in demo.py
n_layer = 4
n_head = 6  # heads of 32
n_embd = 192
n_inner = 512  # 8/3 of n_embd
vocab_size = 4096  # 4,092 pieces + 4 special tokens
seq_len = 256
norm = "layer"
norm_eps = 1e-5
bias = True
rotary_dim = 8  # a quarter of a head, as 32 of 128 are
rope_interleaved = True
tie = True

# muP: the base is a quarter of CrystalCoder's 256, the std twice as large and the factor half, so
# that what leaves the embedding is as large: 0.146 x 7.3 = 0.073 x 14.6. m = 192 / 64 = 3.
mup_base_width = 64
mup_emb_mult = 7.3
mup_alpha = 2.22  # logits x 2.22 / 3 = 0.74
init_std = 0.146

# data: a chunk is what lies between two checkpoints, 150 steps x 8 rows; 2 of them are 300 steps.
# The original's English had code in it too: 5.0 % of it was GitHub.
n_chunks = 2
rows_per_chunk = 1200
sources = [
    dict(name="prose", path="stdlib:prose", weight=0.95, licence="PSF-2.0"),
    dict(name="code", path="stdlib:code", weight=0.05, licence="PSF-2.0"),
]
valid_share = 0.05
valid_rows = 128

# tokens: trained here, on all of the English and, by the weights, 5 % of SAMPLE of the code
tokenizer = "bpe"
special_tokens = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>"

# rows: as the original's
bos = True
overlap = True

# optimizer: CrystalCoder's, its rate as it was found at the base width
lr = 0.012
min_lr = 0.00012
schedule = "linear"
warmup_steps = 12
decay_steps = 1200
max_steps = 300
batch_size = 8
weight_decay = 0.1
grad_clip = 1.0
beta1 = 0.9
beta2 = 0.95
eps = 1e-9
log_every = 30
