"""Two small recipes, a LLaMA-like and a CrystalCoder-like one, and a release of ready rows, with
text that is made here: what test_golden.py, against.py and bench.py prepare, train and score.

    write_inputs(folder)    # run files and text; then, in that folder:
    python prepare.py llama.py;  python train.py llama.py --max_steps=6

Both runs have two steps a chunk, two chunks and two epochs; six steps are three visits. The text
follows from Python's random.random(), which is specified, and so is the same everywhere.
"""

import json
import random
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE / "old" / "tokenizer.model"  # 380 pieces and the four marks of FIM

COMMON = """
vocab_size = 384
seq_len = 32
tokenizer = "tokenizer.model"
n_chunks = 2
rows_per_chunk = 32
valid_share = 0.1
valid_rows = 12
n_layer = 2
n_head = 2
n_embd = 16
n_inner = 32
init_std = 0.3
lr = 1e-2
min_lr = 1e-3
warmup_steps = 3
batch_size = 16
epochs = 2
dtype = "float32"
device = "cpu"
log_every = 1
workers = 1
"""
# Documents are held out by hash in "prose", single rows in "poem", which is one document and is
# repeated.
# With an eps of 1e-8 a gradient that is rounding alone moves a weight by a whole step of AdamW, and
# other kinds of CPU would round further apart than test_golden.py allows.
LLAMA = COMMON + """
n_kv_head = 1
eps = 1e-5
sources = [dict(name="prose", path="prose.jsonl", weight=0.7, licence="CC0-1.0"),
           dict(name="poem", path="poem.txt", weight=0.3)]
"""
# m = 16 / 8 = 2. "code" is rewritten to be filled in the middle, another way in its second epoch.
CRYSTAL = COMMON + """
norm = "layer"
norm_eps = 1e-5
bias = True
rotary_dim = 4
rope_interleaved = True
tie = True
mup_base_width = 8
mup_emb_mult = 3.0
mup_alpha = 2.0
schedule = "linear"
eps = 1e-9
sources = [dict(name="prose", path="prose.jsonl", weight=0.4),
           dict(name="code", path="code.jsonl", weight=0.6, fim_rate=0.9)]
bos = True
overlap = True
"""
RELEASE = COMMON + """
sources = [dict(name="released", path="released", rows=True)]
"""
RUN_FILES = {"llama": LLAMA, "crystal": CRYSTAL, "release": RELEASE}
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]  # 60
SIGNS = [".", ",", "(", ")", ":", "=", "+", "\n"]


def word(i: int) -> str:
    """Word i of 600: a sign, or one to three syllables, the more frequent the shorter."""
    if i < len(SIGNS):
        return SIGNS[i]
    syllables = [SYLLABLES[i * 7 % 60], SYLLABLES[i * 11 % 60], SYLLABLES[i // 10]]
    return "".join(syllables[:1 if i < 40 else 2 if i < 200 else 3])


def words(n: int, seed: int) -> str:
    """n words, of which few are frequent and many rare."""
    draw, found = random.Random(seed), []
    for _ in range(n):
        x = draw.random()
        found.append(word(int(600 * x * x * x)))
    return " ".join(found)


def write_jsonl(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def question(i: int) -> dict:
    """A row of ARC's, with four choices."""
    choices = [words(2 + j % 3, 4000 + 10 * i + j) for j in range(4)]
    return {"question": words(4, 3000 + i) + "?", "answerKey": "ABCD"[i % 4],
            "choices": {"label": list("ABCD"), "text": choices}}


def write_inputs(folder: Path) -> None:
    """Fill an empty folder with run files, text, released rows, questions and the tokenizer."""
    for name, text in RUN_FILES.items():
        (folder / f"{name}.py").write_text(text)
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    write_jsonl(folder / "prose.jsonl", [{"text": words(20 + i % 30, i)} for i in range(120)])
    write_jsonl(folder / "code.jsonl", [{"text": words(2 + i % 3, 500 + i)} for i in range(90)])
    (folder / "poem.txt").write_text(words(250, 1000), encoding="utf-8")
    (folder / "released").mkdir()
    draw = random.Random(2000)
    for k in range(2):
        rows = [[int(draw.random() * 300) for _ in range(33)] for _ in range(60)]
        write_jsonl(folder / "released" / f"part_{k}.jsonl", [
            {"token_ids": row, "source": ("arxiv", "book")[i % 3 == 0]}
            for i, row in enumerate(rows)])
    tasks = folder / "eval" / "arc_challenge"
    tasks.mkdir(parents=True)
    write_jsonl(tasks / "test.jsonl", [question(i) for i in range(3)])
    write_jsonl(tasks / "train.jsonl", [question(10 + i) for i in range(4)])  # solved examples
