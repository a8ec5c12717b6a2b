"""Stage 4: score a checkpoint, or every checkpoint of a run.

    python evaluate.py out/demo --tasks=valid                        # held-out rows of its data
    python evaluate.py CKPT --tasks=hellaswag,piqa --num_fewshot=10 --fetch
    python evaluate.py CKPT --tasks=leaderboard --convention=legacy  # what LLM360's tables show
    torchrun --nproc_per_node=8 evaluate.py out/amber_7b --tasks=leaderboard --every=10

A benchmark's score here is that of lm-evaluation-harness: prompts, draws of solved examples and all
else that moves a number follow its version 0.4.13 (`current`) or its commit b281b09 of June 2023
(`legacy`), which the Open LLM Leaderboard and LLM360's paper used. Reads a checkpoint of ours or a
Hugging Face LLaMA or CrystalCoder, and for each task:

    valid        out/<run>/run.json, data/<dataset>/valid_<source>.bin
    text:FILE    the file, UTF-8
    the others   <data_dir>/<task>/<split>.jsonl, fields named as on the hub; --fetch gets them once

Prints a table; --output=FILE writes json: {"runs": [{task, num_fewshot, limit, add_bos, metrics, n,
items: [{doc_id, lls}], settings}]} with the log-likelihoods of every item, in nats. Of a run, each
score is also a line of out/<run>/evals.jsonl, and what stands there is not scored again.
"""

import itertools
import json
import math
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import Transformer, align, row_nats
from nano360.checkpoints import checkpoints_of
from nano360.config import CHECKPOINT, DATA, NUMERICAL, USAGE, Stop, key, load_options, run
from nano360.files import locked, sha256_file, write_atomic
from nano360.hf_folders import checkpoint_hash, read_config
from nano360.place import Place, explain_reading, meet
from nano360.records import append, check_output, mend, trained_on
from nano360.rows import open_rows, read_manifest, valid_name
from nano360.tasks import (LEGACY, TASKS, Example, Task, detokenize, draw, over_subjects,
                           read_examples, read_pages, read_text, stderr)
from nano360.tokenizers import Tokenizer, load_tokenizer

SEED = {"current": 1234, "legacy": 42}  # of the harness' draws
# Ids (T + 1,) int32 of which the last K are scored, and K. The model reads all but the last id.
Request = tuple[np.ndarray, int]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    tasks: str = key("what to score, separated by commas: valid, text:FILE, wikitext, a benchmark, "
                     "or leaderboard: arc_challenge, hellaswag, mmlu, truthfulqa_mc1 and _mc2")
    num_fewshot: int | None = key("solved examples in front of a question; none: 0, and for "
                                  "leaderboard 25, 10, 5, 0", None, low=0)
    convention: Literal["current", "legacy"] = key("whose rules: the harness' of today or of 2023",
                                                   "current")
    fewshot_split: str | None = key("where solved examples come from; none: as the task says", None,
                                    pattern="[a-z]+")
    add_bos: bool | None = key("BOS in front of a text; none: as the tokenizer's folder says, and "
                               "by legacy never", None)
    max_length: int | None = key("ids that the model reads at most; none: its context", None, low=1)
    data_dir: str = key("where the benchmarks lie: DIR/<task>/<split>.jsonl", "data/eval")
    fetch: bool = key("fetch the benchmarks that do not lie there", False)
    limit: int | None = key("questions of a task or subject, rows of a source; none: all", None,
                            low=1)
    every: int = key("of a run, each so many-th checkpoint, and the last", 1, low=1)
    batch_size: int = key("sequences per forward pass", 16, low=1)
    output: str | None = key("json file for metrics and the log-likelihoods of every item; all is "
                             "scored for it, whatever evals.jsonl has", None)
    tokenizer: str | None = key("tokenizer file; none: the one in the checkpoint's folder", None)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("where to compute", "auto")
    dtype: Literal["float32", "bfloat16"] = key("type of the weights in memory", "float32")


@dataclass(frozen=True)
class Job:
    """What every checkpoint is asked."""
    name: str
    shots: int
    data: dict[str, str]  # what was read, named without folder -> its hash
    asked: list[Example] | list[str] | np.ndarray  # questions, whole texts, or rows
    encoded: dict = field(default_factory=dict)  # questions as ids, once for all checkpoints


# ---- rows -> questions ---------------------------------------------------------------------------

def tasks_of(options: EvaluateOptions) -> dict[str, Task]:
    return TASKS | LEGACY if options.convention == "legacy" else TASKS


def rows_path(options: EvaluateOptions, name: str, split: str) -> Path:
    return Path(options.data_dir) / (tasks_of(options)[name].folder or name) / f"{split}.jsonl"


def draws_extra(options: EvaluateOptions, task: Task) -> bool:
    if options.convention == "legacy":
        return (options.fewshot_split or task.pool) in ("validation", "test")
    # The current harness compares two entries of a task's file: the split of the examples, which
    # none of ours has, and that of the tests. Where neither is there, they are equal. Where they
    # are not, a question from the pool may be its own solved example, as there.
    return options.fewshot_split == ("test" if task.split == "test" else None)


def read_questions(options: EvaluateOptions, name: str, n: int) -> list[Example]:
    """A task's questions, n solved examples in front of each context. Raises Stop(DATA)."""
    task, legacy, questions = tasks_of(options)[name], options.convention == "legacy", []
    pool_path = rows_path(options, name, options.fewshot_split or task.pool)
    pools, extra = read_examples(pool_path, task) if n else {}, draws_extra(options, task)
    for subject, examples in read_examples(rows_path(options, name, task.split), task).items():
        pool, rng = pools.get(subject, []), random.Random(SEED[options.convention])
        if len(pool) < (needs := n + (n > 0 and extra)):  # one more, to leave out the question
            raise Stop(DATA, f"{name}: --num_fewshot={n} needs {needs} rows{' of ' * bool(subject)}"
                       f"{subject}, {pool_path} has {len(pool)}; give fewer, or the whole file")
        if legacy:
            rng.shuffle(examples)
        for one in examples[:options.limit]:  # one rng: each draw depends on those before it
            shots = ([s for s in pool if not extra or s != one][:n] if subject else
                     draw(rng, pool, n, extra, one) if n else [])
            front = task.subjects.format(subject.replace("_", " ")) + "".join(
                f"{s.contexts[s.gold]}{task.blank}{s.choices[s.gold]}\n\n" for s in shots)
            whole = {text: front + text for text in one.contexts}  # most often there is one
            questions.append(replace(one, contexts=[whole[text] for text in one.contexts]))
    return questions


# ---- log-likelihoods -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: Transformer
    tokenizer: Tokenizer
    add_bos: bool
    max_length: int
    options: EvaluateOptions
    place: Place

    @property
    def prefix(self) -> int:
        """What stands in front of a text that has nothing in front of it."""
        bos = self.tokenizer.bos if self.options.convention == "current" else None
        return self.tokenizer.eos if bos is None else bos

    def encode(self, text: str) -> list[int]:
        return [self.tokenizer.bos] * self.add_bos + self.tokenizer.encode(text)


def in_common(group: list[Request]) -> int:
    """How many ids all inputs of a group begin with; of a single one, which shares nothing, 0."""
    first, n = group[0][0], min(len(ids) - 1 for ids, _ in group)
    for ids, _ in group[1:]:
        differ = np.flatnonzero(ids[:n] != first[:n])
        n = int(differ[0]) if len(differ) else n
    return n if len(group) > 1 else 0


def batches(shapes: list[tuple[int, int]], mine: list[int], B: int, T: int) -> Iterator[list[int]]:
    """At most B groups, of (ids in common, ids of the longest rest), that fit into T together."""
    batch, front, rest = [], 0, 0
    for g in mine:
        n, own = shapes[g]
        if batch and (len(batch) == B or max(front, n) + max(rest, own) > T):
            yield batch
            batch, front, rest = [], 0, 0
        batch.append(g)
        front, rest = max(front, n), max(rest, own)
    if batch:
        yield batch


def add(sums: torch.Tensor, model: Transformer, x: torch.Tensor,
        scored: list[tuple[int, int, int, int]]) -> None:
    """For each (row and column of x (B, T, C), next id, request): add log p(next id) to the sum of
    the request. The head runs on these alone."""
    if scored:
        row, column, target, request = torch.tensor(scored).T
        nats = row_nats(x[row, column][:, None], model.head_weight, target[:, None].to(x.device))
        sums.index_add_(0, request, -nats.cpu().double())  # MPS has no float64


def score_batch(ckpt: Checkpoint, batch: list[tuple[list[Request], int]]) -> Iterator[torch.Tensor]:
    """Groups of requests and what is common to each -> each group's log-likelihoods, in nats.

    Common ids are run once, at the right end of a row, into a cache from which each of the
    group's requests goes on. At most 2 B sequences of keys and values are in memory.
    """
    model, place, B = ckpt.model, ckpt.place, ckpt.options.batch_size
    # of each request: its number, its group, the ids in common, its ids, the first input scored
    requests = [(b, n, ids.tolist(), len(ids) - 1 - K)
                for b, (group, n) in enumerate(batch) for ids, K in group]
    rows = [(r, *request) for r, request in enumerate(requests)]
    sums, P = torch.zeros(len(rows), dtype=torch.float64), max(n for _, n in batch)
    pads = torch.tensor([P - n for _, n in batch], device=place.device)
    pads, cache, own = pads if pads.any() else None, None, None
    rest = [row for row in rows if len(row[3]) - 1 > row[2]]  # has ids of its own to be read
    rest.sort(key=lambda row: row[2] - len(row[3]))  # the longest first
    if P:
        if rest:
            cache = model.new_cache(len(batch), place.dtype, P + len(rest[0][3]) - 1 - rest[0][2])
        fronts, _ = align([group[0][0][:n].tolist() for group, n in batch])
        x = model.hidden(fronts.to(place.device), cache, 0, pads)
        add(sums, model, x, [(b, P - n + t, ids[t + 1], r) for r, b, n, ids, first in rows
                             for t in range(first, n)])
    for part in (rest[i:i + B] for i in range(0, len(rest), B)):
        # Padding stands on the right, where causal attention keeps it from all that is scored.
        T = max(len(ids) - 1 - n for _, _, n, ids, _ in part)
        idx = torch.tensor([(ids[n:-1] + [0] * T)[:T] for _, _, n, ids, _ in part])
        whose = torch.tensor([b for _, b, *_ in part], device=place.device)
        if cache:
            own = None  # frees the last part's first
            own = [(k[whose], v[whose]) for k, v in cache]
        x = model.hidden(idx.to(place.device), own, P, None if pads is None else pads[whose])
        add(sums, model, x, [(i, t - n, ids[t + 1], r) for i, (r, _, n, ids, first)
                             in enumerate(part) for t in range(max(first, n), len(ids) - 1)])
    return iter(sums.split([len(group) for group, _ in batch]))


@torch.inference_mode()
def score(ckpt: Checkpoint, groups: list[list[Request]], label: str) -> list[list[float]]:
    """The log-likelihood of each request's last K ids, summed, in nats. Raises Stop(NUMERICAL)."""
    place, sizes = ckpt.place, [len(group) for group in groups]
    shapes = [(n, max(len(ids) for ids, _ in group) - 1 - n)
              for group in groups for n in [in_common(group)]]
    # Neighbours of one length need little padding; the longest first, so that want of memory shows.
    order = sorted(range(len(groups)), key=lambda g: shapes[g], reverse=True)
    found = [torch.zeros(n, dtype=torch.float64) for n in sizes]
    mine = order[place.rank::place.world]
    with tqdm(total=sum(sizes[g] for g in mine), desc=label, disable=place.rank > 0 or None) as bar:
        for batch in batches(shapes, mine, ckpt.options.batch_size, ckpt.model.config.seq_len):
            lls = score_batch(ckpt, [(groups[g], shapes[g][0]) for g in batch])
            for g, one in zip(batch, lls, strict=True):
                found[g] = one
                bar.update(len(one))
    sums = torch.cat(found)
    if place.world > 1:  # each rank has scored its share, what others scored is 0
        dist.all_reduce(sums := sums.to(place.device))
    if not sums.isfinite().all():
        raise Stop(NUMERICAL, f"{ckpt.folder.name}: a log-likelihood of {label} is not finite; the "
                   "weights are broken: choose another checkpoint")
    return [one.tolist() for one in sums.cpu().split(sizes)]


def encode_pair(ckpt: Checkpoint, head: list[int], context: str, continuation: str
                ) -> tuple[list[int], int]:
    """Context and continuation -> ids, and how many of them are the continuation's.

    A continuation encoded alone would begin with a piece that it does not have in the text. So both
    are encoded and as many ids cut off as `head` has: those of the context without its last blanks,
    which so go to the continuation.
    """
    if not context.strip():  # the first id needs one before it
        ids = ckpt.tokenizer.encode(context + continuation)
        return [ckpt.prefix, *ids], len(ids)
    whole = ckpt.encode(context + continuation)
    return head + whole[len(head):], len(whole) - len(head)


def windows(ids: list[int], T: int) -> list[Request]:
    """Cut a text so that every id but the first is predicted once, from at most T ids before it.

    As in the harness, a window begins with the last id that the one before it predicted, and only
    the last, which is shorter, reaches further back: it has as much context as there is room for.
    """
    ends = [*range(T + 1, len(ids), T), len(ids)]
    return [(np.array(ids[max(0, end - T - 1):end], np.int32), end - start)
            for start, end in itertools.pairwise([1, *ends])]


# ---- scores: metrics and, for every item, its log-likelihoods ------------------------------------

Scores = tuple[dict[str, float | int | None], list[dict]]


def encode_questions(ckpt: Checkpoint, job: Job) -> tuple[list[list[Request]], int]:
    """Each question's choices, and how many questions were longer than fits. Raises Stop(DATA)."""
    task, T, groups, truncated = tasks_of(ckpt.options)[job.name], ckpt.max_length, [], 0
    for one in job.asked:
        groups.append(group := [])
        heads = {context: ckpt.encode(context.rstrip()) for context in one.contexts}
        for context, choice in zip(one.contexts, one.choices, strict=True):
            ids, K = encode_pair(ckpt, heads[context], context, f"{task.blank}{choice}")
            if not 0 < K <= T:
                raise Stop(DATA, f"{job.name}, row {one.doc_id}{' of ' * bool(one.subject)}"
                           f"{one.subject} of {task.split}.jsonl: a choice has {K} tokens, "
                           f"expected 1 to {T}: leave out the task, or give --max_length={K}")
            group.append((np.array(ids, np.int32), K))
        truncated += any(len(ids) > T + 1 for ids, _ in group)
        # What is furthest away is lost, BOS too. The last id is predicted and never read.
        group[:] = [(ids[-(T + 1):], K) for ids, K in group]
    return groups, truncated


def score_choices(ckpt: Checkpoint, job: Job) -> Scores:
    """The metrics of a benchmark; `truncated` counts questions that did not fit the context."""
    task, how = tasks_of(ckpt.options)[job.name], (ckpt.tokenizer.data, ckpt.add_bos,
                                                   ckpt.max_length)
    if how not in job.encoded:
        job.encoded[how] = encode_questions(ckpt, job)
    groups, truncated = job.encoded[how]
    lls, metrics = score(ckpt, groups, job.name), {}
    for metric, measure in task.metrics.items():
        values: dict[str, list[float]] = {}
        for one, numbers in zip(job.asked, lls, strict=True):
            values.setdefault(one.subject, []).append(measure(numbers, one))
        if task.subjects:
            metrics |= over_subjects(metric, values, ckpt.options.convention == "legacy")
        else:
            metrics |= {metric: fmean(values[""]), f"{metric}_stderr": stderr(values[""])}
    return metrics | {"truncated": truncated}, [
        dict(doc_id=one.doc_id) | (dict(subject=one.subject) if one.subject else {})
        | dict(lls=numbers) for one, numbers in zip(job.asked, lls, strict=True)]


def per_token(nats: float, tokens: int, n_bytes: int) -> dict[str, float | int]:
    return dict(nats_per_token=nats / tokens, tokens=tokens, bytes=n_bytes,
                bits_per_byte=nats / math.log(2) / n_bytes)


def score_texts(ckpt: Checkpoint, job: Job) -> Scores:
    """Perplexity of whole texts over the words and bytes of what they were made from.

    Each follows BOS, or EOS by legacy and where there is no BOS. The BOS that add_bos puts in front
    of every text comes after that one and is scored: so does the harness.
    """
    texts = map(detokenize, job.asked) if job.name == "wikitext" else job.asked
    cut = [windows([ckpt.prefix, *ckpt.encode(text)], ckpt.max_length) for text in texts]
    lls = iter(score(ckpt, [[one] for group in cut for one in group], job.name))
    sums = [math.fsum(next(lls)[0] for _ in group) for group in cut]
    nats, words = -math.fsum(sums), sum(len(re.split(r"\s+", text)) for text in job.asked)
    metrics = per_token(nats, sum(K for group in cut for _, K in group),
                        sum(len(text.encode()) for text in job.asked)) | dict(words=words)
    for each, n in (("byte", metrics["bytes"]), ("word", words)):
        if nats / n < 709:  # of words in a text with few blanks, as in Chinese, exp() may overflow
            metrics[f"{each}_perplexity"] = math.exp(nats / n)
    return metrics, [dict(doc_id=i, lls=[ll]) for i, ll in enumerate(sums)]


def score_rows(ckpt: Checkpoint, job: Job) -> Scores:
    """Held-out rows: each id predicted from those before it in its row."""
    rows = job.asked.astype(np.int32)
    lls = score(ckpt, [[(row, rows.shape[1] - 1)] for row in rows], job.name)
    n_bytes = int(ckpt.tokenizer.piece_bytes()[rows[:, 1:]].sum())  # by id: rows cut documents
    nats = -math.fsum(ll for one in lls for ll in one)
    return (per_token(nats, rows[:, 1:].size, n_bytes),
            [dict(doc_id=i, lls=one) for i, one in enumerate(lls)])


# ---- the whole -----------------------------------------------------------------------------------

MEASURED = ("metrics", "n", "items")  # the entries of a score that are no setting
MAIN = ("acc_norm", "acc", "pct_stereotype", "bits_per_byte")  # of a task's metrics, for the curve
ROUNDING = ("batch_size", "device", "torch")  # settings that change no more than that


def shots_of(options: EvaluateOptions) -> dict[str, int]:
    """Each task that is named -> its solved examples. Raises Stop(USAGE)."""
    shots, tasks = {}, tasks_of(options)
    for name in options.tasks.split(","):
        if name == "leaderboard":
            if options.num_fewshot is not None:
                raise Stop(USAGE, "leaderboard has shots of its own; leave out --num_fewshot, or "
                           "name the tasks")
            shots |= {k: task.shots for k, task in tasks.items() if task.shots is not None}
        elif name in tasks:
            shots.setdefault(name, (options.num_fewshot or 0) if tasks[name].pool else 0)
        elif name in ("valid", "wikitext") or name.startswith("text:"):
            shots[name] = 0
        else:
            raise Stop(USAGE, f"unknown task {name!r}; expected some of valid, text:FILE, "
                       f"leaderboard, wikitext, {', '.join(tasks)}, separated by commas")
    texts = [Path(name.removeprefix("text:")).name for name in shots if name.startswith("text:")]
    if double := [name for i, name in enumerate(texts) if name in texts[:i]]:
        raise Stop(USAGE, f"a second text is called {double[0]}; rename it: only names are kept")
    return shots


def chosen(folder: Path, every: int) -> list[Path]:
    """The checkpoints to score, in the order of training. Raises Stop(CHECKPOINT)."""
    if (folder / "config.json").is_file():
        return [folder]
    found = {v: path for v, path in checkpoints_of(folder).items()
             if (path / "config.json").is_file()}
    if not found:
        raise Stop(CHECKPOINT, f"no checkpoint at {folder}; expected a folder with a config.json, "
                   "such as out/demo/ckpt_007, or a run's folder with ckpt_000, ckpt_001, ...")
    return [path for v, path in found.items() if (v + 1) % every == 0 or v == max(found)]


def data_of(folder: Path) -> tuple[Path, dict]:
    """The data set a checkpoint was trained on, and its manifest. Raises Stop(DATA)."""
    data, data_hash = trained_on(folder)
    if (manifest := read_manifest(data))["data_hash"] != data_hash:
        raise Stop(DATA, f"{data} is not what {folder} was trained on; prepare that again")
    return data, manifest


def check(checkpoints: list[Path], shots: dict[str, int], options: EvaluateOptions) -> None:
    """What options, folders and tokenizers tell before weights and rows are read. Raises Stop."""
    if options.output:
        check_output(Path(options.output), b'{"runs"')
    for folder in checkpoints:
        config, tokenizer = read_config(folder), load_tokenizer(options.tokenizer or folder)
        if options.add_bos and tokenizer.bos is None:
            raise Stop(USAGE, f"{folder}: its tokenizer has no BOS; give --add_bos=false")
        if tokenizer.vocab_size > config.vocab_size:
            raise Stop(DATA, f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                       f"{config.vocab_size}; give the model's own by --tokenizer=FILE")
        if (options.max_length or 1) > config.seq_len:
            raise Stop(USAGE, f"--max_length={options.max_length}, but the context of {folder} is "
                       f"{config.seq_len}; give no more")
        if "valid" not in shots:
            continue
        data, manifest = data_of(folder)
        if tokenizer.spec()["sha256"] != manifest["tokenizer"]["sha256"]:
            raise Stop(DATA, f"{data} was made with another tokenizer than {folder}'s; give the "
                       "run's own by --tokenizer=FILE")
        if manifest["seq_len"] > (options.max_length or config.seq_len):
            raise Stop(USAGE, f"held-out rows are scored whole, those of {data} have "
                       f"{manifest['seq_len']} tokens, more than the context or --max_length")
        if not any(source["valid_rows"] for source in manifest["sources"]):
            raise Stop(DATA, f"{data} has no held-out rows; prepare it with --valid_rows=128")


def read_jobs(shots: dict[str, int], folder: Path, options: EvaluateOptions) -> Iterator[Job]:
    """All that is asked, which is the same for each checkpoint of a run. Raises Stop(DATA)."""
    for name, n in shots.items():
        if name == "valid":
            data, manifest = data_of(folder)
            for one in (source["name"] for source in manifest["sources"] if source["valid_rows"]):
                yield Job(f"valid/{one}", 0, {data.name: manifest["data_hash"]},
                          open_rows(data, manifest, valid_name(one))[:options.limit])
        elif name.startswith("text:"):  # its name without folder: a result tells of no machine
            path = Path(name.removeprefix("text:"))
            text = read_text(path)
            yield Job(f"text:{path.name}", 0, {path.name: sha256_file(path)}, [text])
        elif name == "wikitext":
            path = Path(options.data_dir) / "wikitext" / "test.jsonl"
            pages = read_pages(path)[:options.limit]
            yield Job(name, 0, {path.name: sha256_file(path)}, pages)
        else:
            task, questions = tasks_of(options)[name], read_questions(options, name, n)
            splits = [task.split, *([options.fewshot_split or task.pool] if n else [])]
            yield Job(name, n, {f"{split}.jsonl": sha256_file(rows_path(options, name, split))
                                for split in splits}, questions)


def entries_of(folder: Path, jobs: list[Job], options: EvaluateOptions, place: Place) -> list[dict]:
    """What is known of each score before it is measured; metrics, n and items are still empty."""
    config, tokenizer = read_config(folder), load_tokenizer(options.tokenizer or folder)
    add_bos = tokenizer.add_bos and options.convention == "current"
    settings = dict(
        checkpoint=Path(os.path.abspath(folder)).name,  # of a link, its own name
        checkpoint_hash=None if place.rank else checkpoint_hash(folder),  # rank 0 writes results
        tokenizer_sha256=tokenizer.spec()["sha256"], convention=options.convention,
        max_length=options.max_length or config.seq_len, dtype=options.dtype,
        batch_size=options.batch_size, device=place.device.type, torch=torch.__version__)
    return [dict(task=job.name, num_fewshot=job.shots, limit=options.limit,
                 add_bos=add_bos if options.add_bos is None else options.add_bos, metrics={}, n=0,
                 items=[], settings=settings | dict(
                     fewshot_split=options.fewshot_split if job.shots else None, data=job.data))
            for job in jobs]


def identity(entry: dict) -> dict:
    """What makes two entries the same score: all but what was measured and what only rounds."""
    settings = {k: v for k, v in entry["settings"].items() if k not in ROUNDING}
    return {k: v for k, v in entry.items() if k not in MEASURED} | dict(settings=settings)


def score_checkpoint(folder: Path, jobs: list[Job], entries: list[dict], options: EvaluateOptions,
                     place: Place) -> Iterator[dict]:
    """Yield the entries, filled. Where nothing is new, nothing is asked and no weights are read."""
    model = Transformer.from_pretrained(folder, place.device, place.dtype).eval()
    tokenizer = load_tokenizer(options.tokenizer or folder)
    for job, entry in zip(jobs, entries, strict=True):
        ckpt = Checkpoint(folder, model, tokenizer, entry["add_bos"],
                          entry["settings"]["max_length"], options, place)
        measure = (score_choices if job.name in TASKS else
                   score_rows if job.name.startswith("valid/") else score_texts)
        metrics, items = measure(ckpt, job)
        yield entry | dict(metrics=metrics, n=len(items), items=items)


def show(entry: dict) -> None:
    for name, value in entry["metrics"].items():
        if not name.endswith("_stderr") and "/" not in name:  # subjects: in the json
            error = entry["metrics"].get(f"{name}_stderr")
            number = f"{value:12,}" if isinstance(value, int) else f"{value:12.4f}"
            number += "" if error is None else f" {error:8.4f}"
            print(f"{entry['settings']['checkpoint']:<12} {entry['task']:<20} "
                  f"{entry['num_fewshot']:>5} {'yes' if entry['add_bos'] else 'no':>3} "
                  f"{entry['n']:>6} {name:<15} {number}", flush=True)


def show_curve(entries: list[dict]) -> None:
    """A line for each checkpoint, a column for each task."""
    lines: dict[str, dict[str, str]] = {}
    for entry in entries:
        metric = next(k for k in (*MAIN, *entry["metrics"]) if k in entry["metrics"])
        line = lines.setdefault(entry["settings"]["checkpoint"], {})
        line[f"{entry['task']} {metric}"] = f"{entry['metrics'][metric]:.4f}"
    print("\n" + " ".join(["checkpoint  ", *next(iter(lines.values()))]))
    for name, line in lines.items():
        print(f"{name:<12} " + " ".join(f"{value:>{len(k)}}" for k, value in line.items()))


def read_log(log: Path) -> list[dict]:
    """The lines of an evals.jsonl, but for one that a kill cut short. Raises Stop(CHECKPOINT)."""
    try:
        mend(log)
        done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        [(identity(one), one["metrics"], one["n"]) for one in done]  # raises
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Stop(CHECKPOINT, f"{log} has a line that is no score ({error!r}); move the file away "
                   "to score all again") from error
    return done


def score_all(checkpoints: list[Path], jobs: list[Job], options: EvaluateOptions, place: Place,
              log: Path | None) -> None:
    """Show all entries, in order; those that the log has come from there, the others go there."""
    entries, done = [], read_log(log) if log and not place.rank else []
    if not place.rank:
        print(f"{'checkpoint':<12} {'task':<20} shots BOS  items {'metric':<15} {'value':>12}   "
              "stderr")
    for folder in checkpoints:
        new = entries_of(folder, jobs, options, place)
        known = [next((line for line in done if identity(line) == identity(one)), None)
                 for one in new]
        todo = torch.tensor([one is None or bool(options.output) for one in known])
        if place.world > 1:  # what rank 0 has read counts
            dist.broadcast(todo := todo.to(place.device), 0)
        todo = todo.tolist()
        scores = score_checkpoint(folder, [*itertools.compress(jobs, todo)],
                                  [*itertools.compress(new, todo)], options, place)
        for is_new, one in zip(todo, known, strict=True):
            entries.append(entry := next(scores) if is_new else one)
            if place.rank:
                continue
            if log and one is None:
                append(log, [{k: v for k, v in entry.items() if k != "items"}])
            show(entry)
        if options.output and not place.rank:  # whole after each checkpoint, and begun anew by each
            write_atomic(Path(options.output), json.dumps({"runs": entries}) + "\n")
    if log and not place.rank:
        show_curve(entries)


def main(argv: list[str]) -> None:
    word, options = load_options(argv, EvaluateOptions, "a checkpoint or a run, such as "
                                 "out/demo/ckpt_007 or out/demo")
    shots, checkpoints = shots_of(options), chosen(Path(word), options.every)
    check(checkpoints, shots, options)
    place = meet(options.device, options.dtype)
    try:
        if options.fetch and not place.rank:
            from nano360.hub.benchmarks import fetch_benchmarks
            with locked(Path(options.data_dir)):
                fetch_benchmarks([(TASKS[name].folder if name in TASKS else "") or name
                                  for name in shots], Path(options.data_dir))
        if place.world > 1:
            dist.barrier()
        jobs = [*read_jobs(shots, checkpoints[0], options)]
        log = None if checkpoints == [Path(word)] else Path(word) / "evals.jsonl"
        with locked(log) if log and not place.rank else nullcontext():
            score_all(checkpoints, jobs, options, place, log)
    except RuntimeError as error:
        raise explain_reading(error, options.batch_size, place) or error from error
    if place.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [EvaluateOptions]))
