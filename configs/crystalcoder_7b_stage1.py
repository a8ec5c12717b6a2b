"""CrystalCoder-7B, stage 1 of 3, as LLM360 published it: English, half of SlimPajama, 345B tokens.

Numbers are from LLM360/crystalcoder-train, pretrain/params/phase1/params.yaml, which drove Cerebras
modelzoo 1.9.1, unless said otherwise. Where sources disagree the comment says which is followed.
The stages after this one start from its lines. It fixes the model for all three.
"""

# model: 6,575,278,720 parameters by the published shapes, to the byte of the published index. The
# 6,583,754,752 in a comment of phase3/params.yaml counts a position table that is not there.
n_layer = 32
n_head = 32  # heads of 128
n_embd = 4096
n_inner = 10922  # int(8/3 x 4096)
vocab_size = 32032  # LLaMA's 32,000 + 22 special tokens + 10 unused
seq_len = 2048
norm = "layer"
norm_eps = 1e-5
bias = True  # every linear layer of the blocks; the head has none
rotary_dim = 32  # of a head's 128
rope_interleaved = True  # modeling_crystalcoder.py
rope_theta = 10000.0  # not in config.json: fixed in modeling_crystalcoder.py
tie = True

# muP: tuned at width 256, so m = 4096 / 256 = 16, the 0.0625 of the published files its inverse
mup_base_width = 256
mup_emb_mult = 14.6
mup_alpha = 2.22  # logits x 2.22 / 16 = 0.13875
init_std = 0.073  # inside / sqrt(16) = 0.01825, into the residual / sqrt(2 x 32) more = 0.00228125
# The gate's bias began as U(-1/64, 1/64), torch's default that modelzoo left there; here it is 0.

# data: a chunk is what lay between two checkpoints, 1,500 steps x 2,112 rows. 53 whole chunks and
# 221 steps of the 54th are 79,721 steps; weights of the mix are the shares of rows.
tokenizer = "tokenizer.model"  # LLaMA's, which gives the 32,000 ids that text can have
tokenizer_sha256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
n_chunks = 54
rows_per_chunk = 3_168_000
seed = 1
sources = [  # SlimPajama-627B, the even-numbered half of its packed files
    dict(name="arxiv", path="SlimPajama/ArXiv", weight=0.043251179622600486),
    dict(name="book", path="SlimPajama/Book", weight=0.0413121881861869),
    dict(name="c4", path="SlimPajama/C4", weight=0.2665010054745754),
    dict(name="commoncrawl", path="SlimPajama/CommonCrawl", weight=0.5334581653397988),
    dict(name="github", path="SlimPajama/Github", weight=0.04962588209760537),
    dict(name="stackexchange", path="SlimPajama/StackExchange", weight=0.03168034115317788),
    dict(name="wikipedia", path="SlimPajama/Wikipedia", weight=0.03417123812605512),
]

# optimizer: AdamW. The seven matrices of a block learn at lr / 16 (decoder_kernel: 0.0625), biases
# at lr, as modelzoo and the published get_mup_param_groups do; the Megatron port for CrystalChat
# scales biases too, the card says that all but embedding and norms is scaled: not followed.
lr = 0.012
min_lr = 0.00012408
schedule = "linear"
warmup_steps = 86
decay_steps = 294_423  # 86 + 294,337: stages 1 and 2 lie on this line and end 315 steps before it
max_steps = 79_721  # stopped on the way down, at lr 0.00879; 344.8B tokens
batch_size = 2112  # rows of 2048 = 4.33M tokens; 66 rows x 16 CS-2 x 2 accumulation steps
micro_batch_size = 66
weight_decay = 0.1  # not on norms and biases; on matrices it falls with their rate
grad_clip = 1.0
beta1 = 0.9
beta2 = 0.95
eps = 1e-9  # hidden gradients shrink with width: under muP it has to stay small
