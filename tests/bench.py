"""How fast, and how large: generation against transformers', scoring against the reference harness,
tokenizing, the drawing of a 7B's weights, what train.py's saves and 10,000 steps cost, the search
for a text in chunks.

    python tests/bench.py sample          # generation against transformers' generate
    python tests/bench.py score           # 40 questions of 4 choices against lm_eval's model
    python tests/bench.py tokenize        # text to rows, against the way of amber-data-prep
    python tests/bench.py long            # one huge document, against sentencepiece alone
    python tests/bench.py init            # seconds of one core to draw the weights of a 7B
    python tests/bench.py saving          # the demo's first chunk with and without its save
    python tests/bench.py memory          # train.py from step 1,000 to 10,000, saved each 100
    python tests/bench.py search          # a text in 2 GB of chunks, as analyze.py trace seeks it
    python tests/bench.py old COMMIT      # that commit against the working tree, stage by stage

All but init, memory, search and old run all programs in one process, on the same input, in turn,
so that a busy machine slows all, and compare medians; --pairs=N takes N of each. The first three
need transformers, score lm_eval too. Leaves nothing behind.
"""

import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import evaluate  # noqa: E402
import harness  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from against import checkout  # noqa: E402
from model import Transformer, class_of, draw, init_weights, tensor_classes  # noqa: E402
from nano360.analysis.provenance import Part  # noqa: E402
from nano360.analysis.search import find_text  # noqa: E402
from nano360.checkpoints import Saver  # noqa: E402
from nano360.config import NUMERICAL, USAGE, ModelConfig, Stop, load, run  # noqa: E402
from nano360.place import Place  # noqa: E402
from nano360.sources import open_corpus  # noqa: E402
from nano360.tokenizer_json import tokenizer_files  # noqa: E402
from nano360.tokenizers import Tokenizer, load_tokenizer  # noqa: E402
from nano360.tokens import Work, leave_with_parent  # noqa: E402
from prepare import make, recipe_of, train_tokenizer  # noqa: E402

PROMPT, NEW, TOP_K = 32, 256, 50
STEPS = 64  # in a chunk of configs/demo.py
SHAPES = [  # vocabulary, batch, type, the ratio that is asked for
    (32000, 1, torch.float32, 1.15), (32000, 1, torch.bfloat16, 1.25),
    (4096, 16, torch.float32, 1.25), (32000, 16, torch.float32, None),
]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sample_pair(V: int, B: int, dtype: torch.dtype, pairs: int) -> tuple[list[float], list[float]]:
    """Tokens a second of ours and of transformers, one of each per pair."""
    from transformers import AutoModelForCausalLM
    config = ModelConfig(n_layer=6, n_head=6, n_embd=384, n_inner=1024, vocab_size=V, seq_len=512)
    model = Transformer(config)
    init_weights(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = Transformer.from_pretrained(folder, dtype=dtype).eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    idx = torch.randint(V, (B, PROMPT), generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(idx)

    def us() -> torch.Tensor:
        return ours.generate(idx, NEW, top_k=TOP_K)

    def them() -> torch.Tensor:
        return theirs.generate(idx, attention_mask=there, max_new_tokens=NEW, do_sample=True,
                               top_k=TOP_K, eos_token_id=None, pad_token_id=0)

    assert us().shape == them().shape == (B, PROMPT + NEW)  # and both are warm
    times = [(seconds(us), seconds(them)) for _ in range(pairs)]
    return tuple([B * NEW / t for t in one] for one in zip(*times, strict=True))


def sample(pairs: int) -> None:
    print(f"d 384, 6 layers, prompt {PROMPT} + {NEW} new, top_k {TOP_K}, "
          f"{torch.get_num_threads()} threads, median of {pairs} alternating pairs")
    print(f"{'vocab':>6} {'batch':>5} {'type':>9} {'ours tok/s':>11} {'theirs':>8} {'ratio':>6}")
    for V, B, dtype, least in SHAPES:
        ours, theirs = sample_pair(V, B, dtype, pairs)
        ratio = statistics.median(ours) / statistics.median(theirs)
        wanted = "" if least is None else f"  (at least {least} wanted)"
        print(f"{V:>6} {B:>5} {str(dtype).removeprefix('torch.'):>9} "
              f"{statistics.median(ours):>11,.0f} {statistics.median(theirs):>8,.0f} "
              f"{ratio:>6.2f}{wanted}", flush=True)


def made_questions(n: int) -> list[dict]:
    """Rows of HellaSwag's form: some 75 tokens of context and 25 of each ending, give or take."""
    rng = random.Random(0)
    return [dict(activity_label="Tea", ctx_a=harness.sentence(rng, rng.randint(42, 78)), ctx_b="",
                 endings=[harness.sentence(rng, rng.randint(13, 28)) for _ in range(4)], label=0)
            for _ in range(n)]


def score(pairs: int) -> None:
    """Questions in, log-likelihoods out, both with what reads text into ids."""
    from lm_eval.api.instance import Instance
    lm_eval = harness.import_harness()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "hellaswag", "validation.jsonl")
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in made_questions(40)))
        tokenizer = load_tokenizer(tokenizer_of_32000(Path(name)))
        folder = harness.save_llama(Path(name, "llama"), tokenizer, False, ModelConfig(
            n_layer=6, n_head=6, n_embd=384, n_inner=1024, vocab_size=32032, seq_len=512))
        options = evaluate.EvaluateOptions(tasks="hellaswag", data_dir=name)
        asked = evaluate.read_questions(options, "hellaswag", 0)
        theirs = harness.harness_model(lm_eval, folder, 1)
        ours = Transformer.from_pretrained(folder).eval()
    requests = [Instance("loglikelihood", {}, (context, f" {choice}"), i) for i, one in
                enumerate(asked) for context, choice in zip(one.contexts, one.choices, strict=True)]
    place = Place(0, 1, torch.device("cpu"), torch.float32, compile=False)
    n_ids = [len(tokenizer.encode("".join(one.args))) for one in requests]

    def us(B: int) -> list[float]:
        job = evaluate.Job("hellaswag", 0, {}, asked)  # a new one has nothing encoded
        ckpt = evaluate.Checkpoint(folder, ours, tokenizer, False, 512,
                                   replace(options, batch_size=B), place)
        return [ll for item in evaluate.score_choices(ckpt, job)[1]
                for ll in item["lls"]]

    def them(B: int) -> list[float]:
        theirs.batch_size_per_gpu = B
        return [ll for ll, _ in theirs.loglikelihood(requests, disable_tqdm=True)]

    ways = {("ours", options.batch_size): us} | {("lm_eval", B): them for B in (4, 8, 16, 32)}
    first, *others = [torch.tensor(work(B)) for (_, B), work in ways.items()]  # and all are warm
    worst = max((first - one).abs().max().item() for one in others)
    if any(abs(a - b) > harness.tolerance(b) for one in others
           for a, b in zip(first.tolist(), one.tolist(), strict=True)):
        raise Stop(NUMERICAL, f"the two score apart, by up to {worst:.1e} nats")
    rates = {way: [] for way in ways}
    for _ in range(pairs):
        for way, work in ways.items():
            rates[way].append(len(requests) / seconds(lambda work=work, way=way: work(way[1])))
    print(f"40 questions x 4 choices, {sum(n_ids) / len(n_ids):.0f} tokens each with its context, "
          f"vocabulary 32032, d 384, 6 layers, {torch.get_num_threads()} threads, median of "
          f"{pairs} alternating runs; largest difference {worst:.1e} nats")
    ours_is, *theirs_are = [statistics.median(rate) for rate in rates.values()]
    for (who, B), rate in zip(ways, (ours_is, *theirs_are), strict=True):
        print(f"{who:<8} batch size {B:>2}: {rate:6.1f} requests/s")
    print(f"ours at its default / lm_eval at its best: {ours_is / max(theirs_are):.2f} "
          "(at least 2.7 wanted)")


def library(size: int) -> list[str]:
    """Documents of at most 8,000 characters, `size` characters in all, of the standard library."""
    root, found, total = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        found += [part for at in range(0, len(text), 8000) if (part := text[at:at + 8000]).strip()]
        total += len(text)
    if total < size:
        raise Stop(USAGE, f"this Python's library has {total / 1e6:.1f} MB, expected {size / 1e6}")
    chosen, total = [], 0
    for text in found[::2] + found[1::2]:
        chosen.append(text)
        if (total := total + len(text)) >= size:
            return chosen
    return chosen


def tokenizer_of_32000(folder: Path) -> Path:
    """LLaMA's tokenizer, which developers have, or one of its size and settings."""
    llama = REPO.parent / "shared" / "data" / "tokenizer" / "llama_tokenizer.model"
    if llama.is_file():
        return llama
    (folder / "made.model").write_bytes(train_tokenizer(iter(library(12_000_000)), 32000))
    return folder / "made.model"


def amber_way(texts: list[str], coder: Callable, eos: int, out: Path) -> None:
    """What amber-data-prep does with one worker: a text at a time through a fast tokenizer of
    transformers, lists that are joined, rows as lines of json."""
    buffer: list[int] = []
    with open(out, "w") as file:
        for text in texts:
            buffer = buffer + coder(text, add_special_tokens=False)["input_ids"] + [eos]
            while len(buffer) >= 2049:
                file.write(json.dumps({"token_ids": buffer[:2049], "source": "text"}) + "\n")
                buffer = buffer[2049:]


def our_way(argv: list[str], folder: Path, tokenizer: Tokenizer, pool: ProcessPoolExecutor) -> dict:
    """All that prepare.py does, from the file of documents to rows, provenance and hashes."""
    config = load(argv)[0]
    with tempfile.TemporaryDirectory(dir=folder) as name:
        part, out = Path(name), Path(name) / "set"
        (part / "work").mkdir()
        (out / "provenance").mkdir(parents=True)
        (out / tokenizer.file).write_bytes(tokenizer.data)
        corpora = [open_corpus(source, config.data, part / "listing", False)
                   for source in config.data.sources]
        work = Work(config, part, tokenizer, out / tokenizer.file, "uint16", pool, 2)
        return make(corpora, recipe_of(config, corpora), work, out)


def run_file(folder: Path, tokenizer: Path, text: str) -> list[str]:
    """The command line of a preparation of a file in the folder with this tokenizer."""
    (folder / f"{text}.py").write_text(
        (REPO / "configs/demo.py").read_text() + "n_chunks = 4\nrows_per_chunk = None\n"
        f"seq_len = 2048\nvocab_size = 32000\ntokenizer = {str(tokenizer)!r}\n"
        f"sources = [dict(name='text', path={str(folder / text)!r})]\n")
    return [str(folder / f"{text}.py")]


def long(pairs: int) -> None:
    texts = "".join(library(12_000_000))
    documents = {"5 MB of text": texts[:5_000_000],
                 "2 MB without a blank": "".join(texts.split())[:2_000_000]}
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(
            2, get_context("spawn"), leave_with_parent) as pool:
        folder = Path(name)
        file = tokenizer_of_32000(folder)
        tokenizer = load_tokenizer(file)
        for what, text in documents.items():
            (folder / "one.txt").write_text(text)
            argv = run_file(folder, file, "one.txt")
            ours, theirs = [], []
            our_way(argv, folder, tokenizer, pool)  # warm
            for _ in range(pairs):
                ours.append(seconds(lambda argv=argv: our_way(argv, folder, tokenizer, pool)))
                theirs.append(seconds(lambda text=text: tokenizer.coder.encode(text)))
            a, b = statistics.median(ours), statistics.median(theirs)
            print(f"{what:<22} ours, 2 processes {a:5.2f} s   sentencepiece alone {b:5.2f} s   "
                  f"ours / it {a / b:.2f} (at most 1.2 wanted)")


def tokenize(pairs: int) -> None:
    from transformers import PreTrainedTokenizerFast
    texts = library(12_000_000)
    n_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        file = tokenizer_of_32000(folder)
        tokenizer = load_tokenizer(file)
        (folder / "tokenizer.json").write_bytes(tokenizer_files(tokenizer)["tokenizer.json"])
        fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        raw, argv = tokenizer.coder, run_file(folder, file, "text.jsonl")
        with ProcessPoolExecutor(2, get_context("spawn"), leave_with_parent) as pool:
            ways = {"ours, 2 processes": lambda: our_way(argv, folder, tokenizer, pool),
                    "amber-data-prep's way": lambda: amber_way(texts, fast, 2, folder / "rows"),
                    "sentencepiece alone, 2 threads": lambda: raw.encode(texts, num_threads=2)}
            n_tokens = ways["ours, 2 processes"]()["sources"][0]["all_tokens"]  # and it is warm
            assert n_tokens == sum(map(len, raw.encode(texts))) + len(texts)
            rates = {way: [] for way in ways}
            for _ in range(pairs):
                for way, work in ways.items():
                    rates[way].append(n_bytes / 1e6 / seconds(work))
    print(f"{len(texts):,} documents, {n_bytes / 1e6:.1f} MB, {n_tokens:,} tokens of {file.name}, "
          f"{os.cpu_count()} cores, median of {pairs} alternating runs")
    ours = statistics.median(rates["ours, 2 processes"])
    wanted = {"amber-data-prep's way": 2.4, "sentencepiece alone, 2 threads": 0.8}
    print(f"{'ours, 2 processes':<32} {ours:6.2f} MB/s")
    for way, least in wanted.items():
        rate = statistics.median(rates[way])
        print(f"{way:<32} {rate:6.2f} MB/s  ours / it: {ours / rate:.2f} (at least {least} wanted)")


def init(pairs: int) -> None:
    """Every draw of a 7B, each tensor let go after it: 27 GB need not fit."""
    torch.set_num_threads(1)
    for name in ("amber_7b", "crystalcoder_7b_stage1"):
        config = load([str(REPO / f"configs/{name}.py")])[0].model
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in Transformer(config).named_parameters()}
        classes, mup = tensor_classes(config), config.mup_base_width is not None
        took = 0.0
        for one, shape in shapes.items():
            if std := classes[class_of(one)].std:
                p, generator = torch.empty(shape), torch.Generator().manual_seed(0)
                began = time.process_time()  # of one thread: what a busy machine does not change
                draw(p, std, mup, generator)
                took += time.process_time() - began
        total = sum(shape.numel() for shape in shapes.values())
        print(f"{name}: {total:,} parameters in {took:.1f} s of one core")


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder to run stages in, which goes with all that they made."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def other_saves(work: Callable | None) -> Iterator[None]:
    """With another Saver.work, or as train.py would be if it saved nothing: no copy is made."""
    kept = Saver.work, Saver.save, Saver.take
    if work:
        Saver.work = work
    else:
        Saver.save = Saver.take = lambda *_: None
    try:
        yield
    finally:
        Saver.work, Saver.save, Saver.take = kept


def saving(pairs: int) -> None:
    """Where other work shares the cores, the difference of two runs says little: a bound is told,
    too, the time of the save in its own thread and the loop's wait for it, as if nothing of it were
    beside the loop."""
    argv, work, beside = [str(REPO / "configs/demo.py"), "--log_every=1000"], Saver.work, []

    def timed(*args) -> None:
        beside.append(seconds(lambda: work(*args)))
    with workplace() as folder, open(os.devnull, "w") as quiet:
        with contextlib.redirect_stdout(quiet):
            prepare.main(argv[:1])
            train.main([*argv, "--max_steps=8", "--run=warm"])
        took, waits = {"with": [], "without": []}, []
        for i in range(pairs):
            for way in sorted(took, reverse=i % 2 == 1):  # each is first in turn
                began = time.process_time()
                words = [*argv, f"--max_steps={STEPS}", f"--run={way}_{i}"]
                with other_saves(timed if way == "with" else None), (
                        contextlib.redirect_stdout(quiet)):
                    wall = seconds(lambda words=words: train.main(words))
                took[way].append((wall, time.process_time() - began))
            lines = (folder / f"out/with_{i}/metrics.jsonl").read_text().splitlines()
            waits.append(sum(json.loads(line).get("time_save", 0) for line in lines))
        size = sum(p.stat().st_size for p in (folder / "out/with_0/ckpt_000").rglob("*"))
    (a, a_cpu), (b, b_cpu) = ([statistics.median(one) for one in zip(*times, strict=True)]
                              for times in took.values())
    save, wait = statistics.median(beside), statistics.median(waits)
    print(f"a chunk of the demo, {STEPS} steps, and its checkpoint of {size / 1e6:.1f} MB, "
          f"{torch.get_num_threads()} threads, median of {pairs} alternating pairs")
    print(f"with the save {a:.2f} s ({a_cpu:.2f} s of CPU), without {b:.2f} s ({b_cpu:.2f} s): "
          f"{a / b - 1:+.1%} ({a_cpu / b_cpu - 1:+.1%})")
    print(f"the save takes {save:.3f} s beside the loop, which waits {wait:.3f} s for the copy: "
          f"at most {(save + wait) / a:.2%} of the time (at most 5% wanted)")


LONG = """
sources = [dict(name="text", path="text.txt")]
vocab_size = 1024
seq_len = 32
n_chunks = 2
rows_per_chunk = 2000
n_layer = 1
n_head = 4
n_embd = 32
n_inner = 64
lr = 1e-3
batch_size = 4
epochs = 11
save_steps = 100
log_every = 1000
workers = 1
"""


def memory(pairs: int) -> None:
    """From outside, by what /proc says of the process once step 1,000 is logged, and at 10,000."""
    with workplace() as folder:
        (folder / "long.py").write_text(LONG)
        (folder / "text.txt").write_text("".join(library(2_000_000)))
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            prepare.main(["long.py"])
        child = subprocess.Popen([sys.executable, str(REPO / "train.py"), "long.py",
                                  "--max_steps=10100"], stdout=subprocess.DEVNULL)
        log, there, found = folder / "out/long/metrics.jsonl", Path(f"/proc/{child.pid}"), {}
        while child.poll() is None:
            time.sleep(0.05)
            step = log.read_bytes().count(b'"kind": "train"') if log.is_file() else 0
            if step >= 1000:
                status = (there / "status").read_text()
                if size := re.search(r"VmRSS:\s+(\d+) kB", status):  # else it is just ending
                    found[step] = int(size[1]) * 1024 / 1e6, len(list((there / "fd").iterdir()))
        first, last = min(found), max(step for step in found if step <= 10_050)
        if child.returncode or last < 10_000:
            raise Stop(NUMERICAL, f"train.py ended with {child.returncode} after step {last}")
    (a, files), (b, more) = found[first], found[last]
    top = max(size for size, _ in found.values())
    print(f"train.py, {last // 100} saves of last/ and checkpoints: step {first:,} {a:.1f} MB, "
          f"step {last:,} {b:.1f} MB, {b - a:+.1f} MB (at most 50 wanted), at most {top:.1f} MB in "
          f"between; {files} open files, then {more}")


def search(pairs: int) -> None:
    """2 GB of rows of random ids, in each chunk the text in the middle of a row and over the end of
    another; a short text and a long one, that is with a pair of anchors and with eight."""
    text = "".join(library(2_000_000))
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        tokenizer = load_tokenizer(tokenizer_of_32000(folder))
        texts = {"a short text": text[5000:5120], "a long text": text[9000:13000]}
        ids = {what: np.array(tokenizer.encode(one)) for what, one in texts.items()}
        n, T1, n_chunks, planted = 61_000, 2049, 8, {what: [] for what in texts}
        manifest = dict(seq_len=T1 - 1, dtype="uint16", sources=[dict(name="made")],
                        files={f"train_{k:03d}.bin": dict(rows=n) for k in range(n_chunks)},
                        recipe=dict(overlap=False, sources=[dict(name="made", rows=True)]))
        for file in manifest["files"]:
            rows = rng.integers(3, tokenizer.vocab_size, (n, T1), np.uint16)
            for i, (what, one) in enumerate(ids.items()):
                row, most = int(rng.integers(1000)) + 2000 * i, len(one) * 3 // 4
                rows[row, 300:300 + len(one)] = one
                rows[row + 9000, -most:] = one[:most]  # the rest of it is not there
                planted[what] += [Part(file, row, 300, 300 + len(one)),
                                  Part(file, row + 9000, T1 - most, T1)]
            rows.tofile(folder / file)
        size = n * T1 * 2 * n_chunks
        for what, one in texts.items():
            found = find_text(folder, manifest, tokenizer, one)  # and all is in the page cache
            if found != sorted(planted[what]):
                raise Stop(NUMERICAL, f"{what}: found in {len(found)} rows, not in the "
                           f"{len(planted[what])} it was put in")
            rate = size / 1e6 / statistics.median(seconds(
                lambda one=one: find_text(folder, manifest, tokenizer, one)) for _ in range(pairs))
            print(f"{what} of {len(ids[what])} ids in {size / 1e9:.2f} GB, {os.cpu_count()} cores, "
                  f"median of {pairs}: {rate:,.0f} MB/s (at least 500 wanted)")
            if rate < 500:
                raise Stop(NUMERICAL, f"{what}: {rate:.0f} MB/s, expected 500 or more")


OLD = """
sources = [dict(name="text", path="text.jsonl")]
tokenizer = "tokenizer.model"
vocab_size = 4096
seq_len = 256
n_chunks = 2
rows_per_chunk = 256
valid_rows = 8
n_layer = 4
n_head = 6
n_embd = 192
n_inner = 512
lr = 1e-3
batch_size = 8
log_every = 1000
workers = 1
"""
LARGE = ["--n_layer=12", "--n_head=8", "--n_embd=512", "--n_inner=1365"]  # 42M parameters


def old_works() -> dict[str, tuple[str, list[str], list[str]]]:
    """What is timed: a name -> stage, command line, and the folders of the round before. Later ones
    read what earlier ones wrote."""
    demo, large = "out/demo/ckpt_000", "out/large/last"
    return {
        "tokenize": ("prepare", ["old.py"], ["data/old"]),
        "train": ("train", ["old.py", "--max_steps=32", "--run=demo"], ["out/demo"]),
        "save": ("train", ["old.py", *LARGE, "--batch_size=1", "--max_steps=3", "--save_steps=1",
                           "--warmup_steps=1", "--run=large"], ["out/large"]),
        "load": ("sample", [large, "--prompt=def", "--max_new_tokens=1"], []),
        "sample": ("sample", [demo, "--prompt=def", "--max_new_tokens=250", "--num_samples=3",
                              "--temperature=1"], []),
        "score": ("evaluate", [large, "--tasks=hellaswag", "--data_dir=eval"], []),
        "memorization": ("analyze", ["memorization", "out/demo", "--rows=100"], [])}


def fill(folder: Path, tokenizer: bytes, texts: list[str]) -> None:
    """Make a folder with all that the stages read."""
    (folder / "eval" / "hellaswag").mkdir(parents=True)
    (folder / "old.py").write_text(OLD)
    (folder / "tokenizer.model").write_bytes(tokenizer)
    for name, rows in (("text.jsonl", [{"text": text} for text in texts]),
                       ("eval/hellaswag/validation.jsonl", made_questions(20))):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def serve(code: Path, folder: Path) -> subprocess.Popen:
    """A process with the stages of a checkout, in a folder."""
    with open(folder / "errors", "w") as errors:
        return subprocess.Popen([sys.executable, str(REPO / "tests/stage_server.py"), str(code)],
                                cwd=folder, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=errors)


def ask(server: subprocess.Popen, folder: Path, stage: str, argv: list[str], remove: list[str]
        ) -> float:
    """The seconds of a stage. Raises Stop(NUMERICAL) with its last error if it failed."""
    server.stdin.write(json.dumps(dict(stage=stage, argv=argv, remove=remove)) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        said = (folder / "errors").read_text().strip().splitlines() or [""]
        raise Stop(NUMERICAL, f"{stage}.py {' '.join(argv)} of {folder.name} failed: {said[-1]}")
    return float(answer)


def old(commit: str, rounds: int) -> None:
    """Old and new in turn, each first in every second round; a ratio above 1: the new is faster."""
    texts = library(4_000_000)
    tokenizer = train_tokenizer(iter(texts), 4096)
    with tempfile.TemporaryDirectory() as name:
        root, ratios, times = Path(name), {}, {}
        checkout(commit, root / "code")
        for side in ("old", "new"):
            fill(root / side, tokenizer, texts)
        for i in range(rounds + 1):
            # New processes in each round: two of the same code can differ by some percent.
            with serve(root / "code", root / "old") as a, serve(REPO, root / "new") as b:
                servers = [("old", a), ("new", b)]
                if i % 2:
                    servers.reverse()
                for work, (stage, argv, remove) in old_works().items():
                    took = {side: ask(server, root / side, stage, argv, remove)
                            for side, server in servers}
                    if i:  # the first round was to warm up
                        ratios.setdefault(work, []).append(took["old"] / took["new"])
                        times.setdefault(work, []).append(took["new"])
    print(f"{commit} against the working tree, {torch.get_num_threads()} threads, {rounds} rounds; "
          "seconds of old / seconds of new")
    print(f"{'':<13} {'new s':>7} {'25 %':>6} {'median':>7} {'75 %':>6}")
    for work, found in ratios.items():
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
        print(f"{work:<13} {statistics.median(times[work]):>7.2f} {low:>6.3f} {middle:>7.3f} "
              f"{high:>6.3f}")


def main(argv: list[str]) -> None:
    works = {"sample": sample, "tokenize": tokenize, "long": long, "init": init, "saving": saving,
             "memory": memory, "score": score, "search": search}
    pairs = 5
    if argv and (given := re.fullmatch("--pairs=([1-9][0-9]*)", argv[-1])):
        argv, pairs = argv[:-1], int(given[1])
    if len(argv) == 1 and argv[0] in works:
        works[argv[0]](pairs)
    elif len(argv) == 2 and argv[0] == "old":
        old(argv[1], pairs)
    else:
        raise Stop(USAGE, f"expected one of {', '.join(works)}, or old COMMIT, and, if you like, "
                   "--pairs=N")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
