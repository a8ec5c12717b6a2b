"""Amber in small: the whole pipeline on two plain CPU cores in five minutes.

The text is what every Python brings along, its own standard library: half of the files give their
code, the others their docstrings. 1.6M parameters, 1.1M tokens, eight chunks, eight checkpoints.
"""

# data: 8 chunks x 512 rows x 257 tokens = 1.05M tokens
sources = [
    dict(name="code", path="stdlib:code", weight=0.7, licence="PSF-2.0"),
    dict(name="prose", path="stdlib:prose", weight=0.3, licence="PSF-2.0"),
]
tokenizer = "bpe"  # trained on the text itself
vocab_size = 4096
seq_len = 256
n_chunks = 8
rows_per_chunk = 512
valid_share = 0.05
valid_rows = 128

# model: Amber's shape, its width divided by 32 and its depth by 10
n_layer = 3
n_head = 4  # heads of 32
n_embd = 128
n_inner = 344  # 8/3 of n_embd, as a multiple of 8
init_std = 0.06  # Amber's 0.02 is for a width of 4096; a narrow model learns faster from more

# optimizer: Amber's, with the larger rate that so small a model bears
lr = 6e-3
min_lr = 6e-4  # a tenth of lr
warmup_steps = 32
batch_size = 8  # rows of 256 = 2,048 tokens; 64 steps a chunk, 512 in all
log_every = 32
