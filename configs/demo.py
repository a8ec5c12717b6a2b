"""Amber in small: the whole pipeline on two plain CPU cores in five minutes.

The text is what every Python brings along, its own standard library: half of the files give their
code, the others their docstrings. 3.3M parameters, 0.7M tokens, eight chunks, eight checkpoints.
"""

# data: 8 chunks x 352 rows x 257 tokens = 0.72M tokens
sources = [
    dict(name="code", path="stdlib:code", weight=0.7, licence="PSF-2.0"),
    dict(name="prose", path="stdlib:prose", weight=0.3, licence="PSF-2.0"),
]
tokenizer = "bpe"  # trained on the text itself
vocab_size = 4096
seq_len = 256
n_chunks = 8
rows_per_chunk = 352
valid_share = 0.05
valid_rows = 128

# model: Amber's shape, its width divided by 21 and its depth by 8
n_layer = 4
n_head = 6  # heads of 32
n_embd = 192
n_inner = 512  # 8/3 of n_embd
init_std = 0.06  # Amber's 0.02 is for a width of 4096; a narrow model learns faster from more

# optimizer: Amber's, with the larger rate that so small a model bears
lr = 6e-3
min_lr = 6e-4  # a tenth of lr
warmup_steps = 32
batch_size = 8  # rows of 256 = 2,048 tokens; 44 steps a chunk, 352 in all
log_every = 22
