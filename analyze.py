"""Stage 5, ANALYSIS360: checkpoints against the run and the data that made them.

    python analyze.py memorization out/demo --rows=100 --plot   # what does each say again?
    python analyze.py trace out/demo --text="def read(self, n=-1):"   # in which rows, trained when?
    python analyze.py trace out/demo --document=code/ast.py:1
    python analyze.py batch out/demo --step=500       # and back: the rows and documents of a step
    python analyze.py replay out/demo --visit=3       # train visit 3 again: is it checkpoint 3?
    python analyze.py replay out/demo --verify        # or check every file, and train nothing
    torchrun --nproc_per_node=8 analyze.py memorization out/amber_7b --chunks=100 --dtype=bfloat16

A RUN is a run's folder, one of its checkpoints, or a release: a folder of fetched checkpoints,
ckpt_000, ckpt_001, ..., of which visit k trained chunk k; its data set has its name, or is --data.

memorization gives a checkpoint the first k ids of a row; the score is the share of the next l that
its greedy continuation has in the same places (LLM360's paper). Rows are drawn by seed from every
chunk; canaries, if any were planted, are asked too. RUN/memorization.jsonl has a line for each row
{kind: row, visit, chunk, row, source, k, l, score, seen: how often it was trained, ...} and canary
{kind: canary, visit, canary, planted, seen, nats, rank, extracted, ...}; what stands there is not
scored again. --plot draws RUN/memorization.png.

replay starts from checkpoint v - 1, or the nearest one before it that has its optimizer state, and
trains the same rows in the same order, without the steps that the run skipped. Then it compares the
sha256 of every tensor: weights, both moments, random states. The bits are the same on the same kind
of CPU, with the same torch, threads, processes and layout; a line says what is not as it was. It
works in out/<run>.replay/, which stays if a tensor differs; the exit code is 4 then.

Reads RUN and data/<dataset>/. Text of training data is printed with --show_text alone.
"""

import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model import IGNORE, Transformer, align
from nano360.analysis.audit import audit
from nano360.analysis.canaries import read_canaries
from nano360.analysis.figures import load_matplotlib, plot, show
from nano360.analysis.follow import (excerpt, logged_rows, print_documents, print_incidents,
                                     print_memorized, print_parts)
from nano360.analysis.provenance import find_document, sources_of
from nano360.analysis.runs import Run, open_run, read_record
from nano360.analysis.samples import Asked, draw, read_sample
from nano360.analysis.search import find_text, open_files, plain
from nano360.checkpoints import check_space, check_types, checkpoints_of
from nano360.config import CHECKPOINT, DATA, USAGE, Config, Stop, key, load_options, run, say
from nano360.files import locked, read_sealed
from nano360.hf_folders import checkpoint_hash, read_config, verify, weight_files
from nano360.place import Place, choose_place, exchange, explain, explain_reading, meet
from nano360.records import append, differing, exact_facts, mend, parent_of, say_inexact
from nano360.rows import chunk_name, open_rows, read_manifest
from nano360.tokenizers import load_tokenizer
from train import check, make_plan, start, train

DATA_MEANING = "the folder of the data set; none: the run's own"
NUMBERS = "[0-9]{1,12}(-[0-9]{1,12})?(,[0-9]{1,12}(-[0-9]{1,12})?)*"


@dataclass(frozen=True, kw_only=True)
class MemorizationOptions:
    k: str = key("how many ids of a row the model is given; several with commas", "32",
                 pattern="[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*")
    l: int = key("ids after them that it has to say again", 32, low=1)
    rows: int = key("rows of a chunk that are asked for, drawn by seed", 1000, low=1)
    seed: int = key("seed of the draw; 42 draws the rows that Analysis360 published", 42, low=0)
    checkpoints: str | None = key("which, as in 0-3,7; none: all", None, pattern=NUMBERS)
    chunks: str | None = key("which, as in 0-3,7; none: all that are there", None, pattern=NUMBERS)
    row: str | None = key("these rows alone, as CHUNK:ROW with commas: what trace has found", None,
                          pattern="[0-9]{1,9}:[0-9]{1,12}(,[0-9]{1,9}:[0-9]{1,12})*")
    sample: str | None = key("files of rows instead of chunks, with commas: lines of prompt, "
                             "continuation, source as Analysis360's, or token_ids, source", None)
    data: str | None = key(DATA_MEANING, None, pattern=".+")
    batch_size: int = key("rows continued at once", 64, low=1)
    plot: bool = key("draw the figures: RUN/memorization.png; needs matplotlib", False)
    show_text: bool = key("print text of training data: what was said again", False)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("where to compute", "auto")
    dtype: Literal["float32", "bfloat16"] = key("type of the weights in memory", "float32")


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    text: str | None = key("the text to look for", None)
    file: str | None = key("a UTF-8 file with the text to look for", None, pattern=".+")
    document: str | None = key("a document as SOURCE/FILE:LINE", None, pattern=".+")
    data: str | None = key(DATA_MEANING, None, pattern=".+")
    show_text: bool = key("show the text in each row, and 60 characters before and after", False)


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    step: int = key("the step whose rows are asked for")
    data: str | None = key(DATA_MEANING, None, pattern=".+")
    show_text: bool = key("show the text of every row", False)


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    visit: int | None = key("the visit to train again; none: every one", None, low=0)
    init_from: str | None = key("where the checkpoint lies now that the run started from; none: "
                                "where it lay then", None, pattern=".+")
    verify: bool = key("check the whole run instead of training it again", False)


# ---- memorization: what is said again ------------------------------------------------------------

def prompts(options: MemorizationOptions) -> list[int]:
    """The lengths k of the prompts."""
    return sorted({int(k) for k in options.k.split(",")})


def chosen(word: str | None, have: Iterable[int], what: str) -> list[int]:
    """Of the numbers there are, those that a word as 0-3,7 names; None: all. Raises Stop(USAGE)."""
    have, found = sorted(have), []
    there = f"there are {', '.join(map(str, have[:20])) or 'none'}{', ...' * (len(have) > 20)}"
    for part in word.split(",") if word else ():
        first, last = int(part.split("-")[0]), int(part.split("-")[-1])
        if first > last or last not in have or (missing := {*range(first, last)} - {*have}):
            one = min(missing) if first <= last in have else last
            raise Stop(USAGE, f"{what} {one} of {part} is not there; {there}")
        found += range(first, last + 1)
    if not have:
        raise Stop(USAGE, f"{what} is not there; {there}")
    return sorted({*found}) if word else have


def read_asked(run: Run, ks: list[int], options: MemorizationOptions) -> Iterator[Asked]:
    """All rows that are asked for, from chunks that are verified, or from files."""
    if options.sample:
        for name in options.sample.split(","):
            yield read_sample(Path(name), ks, options.l, options.rows, options.seed)
        return
    have = [k for k in range(run.manifest["n_chunks"]) if (run.data / chunk_name(k)).is_file()]
    named: dict[int, set[int]] = {}
    for word in options.row.split(",") if options.row else ():
        chunk, row = map(int, word.split(":"))
        named.setdefault(chunk, set()).add(row)
    which = ",".join(map(str, named)) or options.chunks
    for chunk in chosen(which, have, f"{run.data}: chunk"):
        rows = open_rows(run.data, run.manifest, name := chunk_name(chunk))
        mine = (np.array([*sorted(named[chunk])]) if named else
                draw(len(rows), options.rows, options.seed))
        if mine.max() >= len(rows):
            raise Stop(USAGE, f"--row={chunk}:{mine.max()} is not there: chunk {chunk} has "
                       f"{len(rows)} rows, counted from 0")
        yield Asked(chunk, mine, rows[mine, :max(ks) + options.l].astype(np.int64),
                    sources_of(run.data, run.manifest, name, mine.tolist()),
                    run.manifest["files"][name]["sha256"][:16])


def said_again(model: Transformer, ids: np.ndarray, k: int, options: MemorizationOptions,
               place: Place, bar: tqdm) -> np.ndarray:
    """The share (n,) of the l ids after the first k of rows (n, k + l or more) that the model says
    again. Greedy: each id follows from those it said before; EOS does not stop it (Analysis360).

    Under torchrun a rank continues its share of the rows.
    """
    l, hits = options.l, torch.zeros(len(ids), dtype=torch.int64)
    for at in range(place.rank, len(ids), place.world * options.batch_size):
        mine = np.arange(at, len(ids), place.world)[:options.batch_size]
        rows = torch.from_numpy(ids[mine]).to(place.device)
        said = model.generate(rows[:, :k], l, temperature=0)[:, k:]  # no id stops it
        hits[mine] = (said == rows[:, k:k + l]).sum(dim=1).cpu()
        bar.update(len(mine) * place.world)
    if place.world > 1:
        dist.all_reduce(hits := hits.to(place.device))
    return hits.cpu().numpy() / l


@torch.inference_mode()
def say_secrets(model: Transformer, canaries: list[dict], options: MemorizationOptions,
                place: Place) -> Iterator[tuple[float, bool]]:
    """Of every canary (nats of its secret, whether it is said again), after its prefix alone. They
    are few: under torchrun every rank asks about all of them."""
    for at in range(0, len(canaries), options.batch_size):
        batch = [(one["ids"][:one["n_prefix"]], one["ids"][one["n_prefix"]:-1])  # the last is EOS
                 for one in canaries[at:at + options.batch_size]]
        T = max(len(prefix) + len(secret) for prefix, secret in batch)
        rows = torch.tensor([(prefix + secret + [0] * T)[:T] for prefix, secret in batch],
                            device=place.device)  # (n, T), padded where no target counts
        targets = rows[:, 1:].clone()
        for i, (prefix, secret) in enumerate(batch):
            targets[i, :len(prefix) - 1] = targets[i, len(prefix) + len(secret) - 1:] = IGNORE
        nats = model(rows[:, :-1], targets, per_row=True).tolist()
        idx, lengths = align([prefix for prefix, _ in batch])
        n = max(len(secret) for _, secret in batch)
        said = model.generate(idx.to(place.device), n, temperature=0, lengths=lengths)
        yield from ((one, again[:len(secret)] == secret) for one, again, (_, secret)
                    in zip(nats, said[:, idx.size(1):].tolist(), batch, strict=True))


# What a score is a score of: a line of memorization.jsonl that has all this is not made again.
IDENTITY = ("kind", "visit", "chunk", "row", "canary", "k", "l", "weights", "data", "dtype")


def identity(line: dict) -> tuple:
    return tuple(line.get(name) for name in IDENTITY)


def lines_of_rows(run: Run, visit: int | None, weights: str, one: Asked, k: int,
                  options: MemorizationOptions) -> list[dict]:
    """The lines of a checkpoint on rows of a chunk; their score is yet to be found. `seen`: how
    often it was trained on the row. A sample's lines are no rows of a run of ours."""
    ours = not options.sample or run.plan is None
    trained = run.seen(visit, one.chunk if ours else None, one.rows)
    return [dict(kind="row", visit=visit, chunk=one.chunk, row=int(row), source=source, k=k,
                 l=options.l, score=None, seen=seen, weights=weights, data=one.data,
                 dtype=options.dtype)
            for row, source, seen in zip(one.rows, one.sources, trained, strict=True)]


def lines_of_canaries(run: Run, visit: int | None, weights: str, canaries: list[dict],
                      options: MemorizationOptions) -> list[dict]:
    """The same of canaries and controls."""
    rows, trained = {}, {}
    for chunk, row, *_ in (place for one in canaries for place in one["places"]):
        rows.setdefault(chunk, []).append(row)
    for chunk, mine in rows.items():  # one canary to a row
        trained |= zip(((chunk, row) for row in mine), run.seen(visit, chunk, np.array(mine)),
                       strict=True)
    times = [[trained[chunk, row] for chunk, row, *_ in one["places"]] for one in canaries]
    return [dict(kind="canary", visit=visit, canary=one["number"], planted=one["times"],
                 seen=None if None in mine else sum(mine), nats=None, rank=None, extracted=None,
                 weights=weights, dtype=options.dtype,
                 data=run.manifest["files"]["canaries.json"]["sha256"][:16])
            for one, mine in zip(canaries, times, strict=True)]


def read_known(log: Path) -> dict[tuple, dict]:
    """The lines of a memorization.jsonl by what they are scores of. Raises Stop(CHECKPOINT)."""
    mend(log)
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        return {identity(line): line for line in lines
                if (line["nats"] if line["kind"] == "canary" else line["score"]) is not None}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{log} has a line that is no score ({type(error).__name__}); move "
                   "the file away to score all again") from error


def score_checkpoint(run: Run, visit: int | None, asked: list[Asked], canaries: list[dict],
                     known: dict[tuple, dict], options: MemorizationOptions, place: Place,
                     log: Path) -> Iterator[dict]:
    """All lines of a checkpoint: those that are known, and the others, which go to the log chunk by
    chunk. Where nothing is new no weights are read."""
    folder = run.checkpoints[visit]
    weights = "" if place.rank else checkpoint_hash(folder)[:16]  # rank 0 writes results
    cells = [(one, k, lines_of_rows(run, visit, weights, one, k, options))
             for one in asked for k in prompts(options)]
    secrets = lines_of_canaries(run, visit, weights, canaries, options) if canaries else []
    # A flag for each line of a row, in order; the last is for all canaries together.
    new = torch.tensor([identity(line) not in known for *_, cell in cells for line in cell]
                       + [any(identity(line) not in known for line in secrets)])
    if place.world > 1:  # what rank 0 has read counts
        dist.broadcast(new := new.to(place.device), 0)
    new, at, model = new.cpu().numpy(), 0, None
    if new.any():
        model = Transformer.from_pretrained(folder, place.device, place.dtype).eval()
    with tqdm(total=int(new[:-1].sum()), desc=folder.name, unit="row",
              disable=place.rank > 0 or None) as bar:
        for one, k, cell in cells:
            mine = np.flatnonzero(new[at:at + len(cell)])
            at += len(cell)
            if len(mine):
                for i, score in zip(mine, said_again(model, one.ids[mine], k, options, place, bar),
                                    strict=True):
                    cell[i]["score"] = float(score)
                if not place.rank:
                    append(log, [cell[i] for i in mine])
            yield from (known.get(identity(line), line) for line in cell)
    if new[-1]:
        for line, found in zip(secrets, say_secrets(model, canaries, options, place), strict=True):
            line["nats"], line["extracted"] = found
        controls = [line["nats"] for line in secrets if not line["planted"]]
        for line in secrets:  # 1: lower than all controls
            line["rank"] = 1 + sum(nats < line["nats"] for nats in controls) if (
                line["planted"]) else None
        if not place.rank:
            append(log, [line for line in secrets if identity(line) not in known])
    yield from (known.get(identity(line), line) for line in secrets)


def check_memorization(run: Run, visits: list[int | None], options: MemorizationOptions) -> None:
    """What options, folders and manifests tell before weights and rows are read. Raises Stop."""
    longest = max(prompts(options)) + options.l
    if sum(one is not None for one in (options.sample, options.row, options.chunks)) > 1:
        raise Stop(USAGE, "expected one of --chunks, --row and --sample")
    if not options.sample and run.manifest is None:
        raise Stop(DATA, f"{run.folder} does not say what it was trained on: give the data set by "
                   "--data=DIR, or rows by --sample=FILE")
    if not options.sample and longest > run.manifest["seq_len"] + 1:
        raise Stop(USAGE, f"k + l = {longest}, rows of {run.data} have "
                   f"{run.manifest['seq_len'] + 1} ids: give a smaller --k or --l")
    for folder in (run.checkpoints[visit] for visit in visits):
        config = read_config(folder)
        if longest > config.seq_len + 1:
            raise Stop(USAGE, f"k + l = {longest}, the context of {folder} is {config.seq_len}: "
                       "give a smaller --k or --l")
        if not options.sample and run.manifest["tokenizer"]["vocab_size"] > config.vocab_size:
            raise Stop(DATA, f"{run.data} has {run.manifest['tokenizer']['vocab_size']} ids, "
                       f"{folder} {config.vocab_size}: they do not belong together")
    if options.plot:
        load_matplotlib()


def memorization_command(argv: list[str]) -> None:
    """analyze.py memorization RUN [--checkpoints=0-3,7 --chunks=0-3 --k=32,64,96 --plot ...]"""
    word, options = load_options(argv, MemorizationOptions, "a run such as out/demo")
    run = open_run(word, options.data)
    visits = [None] if None in run.checkpoints else chosen(
        options.checkpoints, run.checkpoints, f"{run.folder}: checkpoint")
    check_memorization(run, visits, options)
    place, log = meet(options.device, options.dtype), run.folder / "memorization.jsonl"
    asked = [*read_asked(run, prompts(options), options)]
    top = max(int(one.ids.max()) for one in asked)
    for visit in visits:
        if top >= (size := read_config(run.checkpoints[visit]).vocab_size):
            raise Stop(DATA, f"id {top} is asked for, {run.checkpoints[visit]} has {size}")
    canaries = [] if options.sample else read_canaries(run.data)
    try:
        with locked(log) if not place.rank else contextlib.nullcontext():
            known = {} if place.rank else read_known(log)
            lines = [line for visit in visits for line in score_checkpoint(
                run, visit, asked, canaries, known, options, place, log)]
    except RuntimeError as error:
        raise explain_reading(error, options.batch_size, place) or error from error
    if not place.rank:
        show(lines)
        if options.show_text:
            tokenizer = load_tokenizer(run.checkpoints[visits[-1]])
            print_memorized(tokenizer, asked, lines, visits[-1])
        if options.plot:
            plot(lines, run.folder / "memorization.png")
            print(f"\n{run.folder / 'memorization.png'} is drawn")
    if place.world > 1:
        dist.destroy_process_group()


# ---- trace: from a text to its rows, their steps, and who has seen them --------------------------

def text_of(options: TraceOptions) -> str | None:
    """The text to look for; none: it is a document. Raises Stop."""
    given = [options.text, options.file, options.document]
    if sum(one is not None for one in given) != 1:
        raise Stop(USAGE, "expected one of --text=TEXT, --file=PATH, --document=SOURCE/FILE:LINE")
    if options.file is None:
        return options.text
    try:
        return Path(options.file).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise Stop(USAGE, f"--file={options.file} cannot be read: {error}") from error


def trace_command(argv: list[str]) -> None:
    """analyze.py trace RUN --text=TEXT: every row that holds any of it, and when it was trained."""
    word, options = load_options(argv, TraceOptions, "a run such as out/demo")
    text, run = text_of(options), open_run(word, options.data)
    if run.manifest is None:
        raise Stop(DATA, f"{run.data}, what {word} was trained on, is not here: give --data=DIR")
    tokenizer = load_tokenizer(run.data, run.manifest["tokenizer"]["sha256"])
    parts = (find_document(run.data, run.manifest, options.document) if text is None else
             find_text(run.data, run.manifest, tokenizer, text))
    texts = [""] * len(parts)
    if options.show_text:
        files = open_files(run.data, run.manifest)
        texts = [excerpt(tokenizer, files[part.name][part.row], part)
                 if part.name in files else "" for part in parts]
    print_parts(run, parts, texts)


# ---- batch: from a step to its rows and their documents ------------------------------------------

def batch_command(argv: list[str]) -> None:
    """analyze.py batch RUN --step=N: its rows in their order, and those of its incidents. Raises
    Stop(DATA) if others were trained."""
    word, options = load_options(argv, BatchOptions, "a run such as out/demo")
    run, step = open_run(word, options.data), options.step
    if run.plan is None:
        raise Stop(USAGE, f"{word} is a release: the order of its rows, and so what a step "
                   "trained, was not released; trace tells the visit of a row")
    per_visit, B = run.plan.steps_per_visit, run.config.optim.batch_size
    last = per_visit * len(run.plan.queue)
    if not 1 <= step <= last:
        raise Stop(USAGE, f"{run.folder} has no step {step}: its steps are 1 to {last}")
    visit = run.plan.visit_of(step)
    epoch, chunk = run.plan.queue[visit]
    name, ends = chunk_name(chunk), run.folder / f"ckpt_{visit:03d}"
    at = (step - 1) % per_visit * B
    order = run.order(visit)[at:at + B]
    ours = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16]
    logged = logged_rows(run.folder / "metrics.jsonl", step)
    if logged not in (None, ours):
        raise Stop(DATA, f"{run.folder}/metrics.jsonl has rows {logged} at step {step}, the run's "
                   f"order gives {ours}: the log or the queue was changed; compare with a copy")
    here = "" if ends.is_dir() else " (not here)"
    skipped = "; skipped: it was not taken" if step in run.skipped else ""
    print(f"step {step}: visit {visit}, epoch {epoch}, chunk {chunk:03d}, ends in {ends}{here}")
    print(f"rows {ours}, metrics.jsonl "
          f"{'has no line of it yet' if logged is None else 'has the same'}{skipped}")
    texts = [""] * B
    if options.show_text:
        tokenizer = load_tokenizer(run.data, run.manifest["tokenizer"]["sha256"])
        texts = [f"    {plain(tokenizer.decode(row))}"
                 for row in open_rows(run.data, run.manifest, name)[order]]
    print_documents(run, name, order.tolist(), texts)
    print_incidents(run, step)


# ---- replay --------------------------------------------------------------------------------------

def base_of(folder: Path, visit: int) -> tuple[Path, dict] | None:
    """The nearest checkpoint before a visit that can be trained on; none: the initial weights."""
    for v in range(visit - 1, -1, -1):
        base = folder / f"ckpt_{v:03d}"
        if not (base / "optimizer").is_dir():
            say(f"{base} is not there or has no optimizer state: starting earlier")
            continue
        try:
            state = read_sealed(base / "state.json", CHECKPOINT)
            verify(base)
            verify(base, "optimizer")
            check_types(base, state)
            return base, state
        except (Stop, OSError) as error:
            say(f"{error}; starting earlier")
    return None


def tensors_of(folder: Path) -> dict[str, tuple[Path, str]]:
    """file:name -> (file, name) of all tensors of a checkpoint, weights first. Raises Stop."""
    found = {}
    for file in [*weight_files(folder), *sorted((folder / "optimizer").glob("*.safetensors"))]:
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {f"{file.relative_to(folder)}:{name}": (file, name)
                          for name in sorted(tensors.keys())}
        except SafetensorError as error:
            raise Stop(CHECKPOINT, f"{file} is no whole file of tensors: {error}") from error
    return found


def read(file: Path, name: str) -> tuple[torch.Tensor, str]:
    """A tensor and the sha256 of its bytes."""
    with safe_open(file, framework="pt") as tensors:
        tensor = tensors.get_tensor(name)
    return tensor, hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def compare(again: Path, before: Path) -> tuple[int, str]:
    """How many tensors a checkpoint has, and "" if they are the same bits as in the one that was
    made again; else the first that differs, and how far. A thinned one has its weights alone."""
    ours, theirs, first, count = tensors_of(again), tensors_of(before), "", 0
    if not (before / "optimizer").is_dir():
        ours = {k: v for k, v in ours.items() if not k.startswith("optimizer/")}
    for one in [*theirs, *(ours.keys() - theirs.keys())]:
        if one not in ours or one not in theirs:
            said = f"{one} is only in {before if one in theirs else again}"
        else:
            (now, now_hash), (was, was_hash) = read(*ours[one]), read(*theirs[one])
            if now_hash == was_hash and now.shape == was.shape:
                continue
            said = f"{one} is {tuple(was.shape)}, trained again {tuple(now.shape)}"
            if now.shape == was.shape:
                off = (now.double() - was.double()).abs().max()
                said = (f"{one} differs in {int((now != was).sum()):,} of {was.numel():,} values, "
                        f"by at most {off:.3g}")
        first, count = first or said, count + 1
    return len(theirs), f"{first} ({count} differ in all)" if first else ""


def as_trained(record: dict, visit: int, per_visit: int, config: Config, place: Place
               ) -> tuple[Config, Place]:
    """Micro-batch, recompute, type and compile as when a visit was trained; says what is not so."""
    launches, first = record["launches"], visit * per_visit
    begun = max(i for i, one in enumerate(launches) if one["from_step"] <= first)
    facts = [one["exact"] for one in launches[begun:] if one["from_step"] < first + per_visit]
    if any(differing(one, other) for one in facts for other in facts):
        say(f"visit {visit} was trained in parts, on other machines or in other ways: it cannot be "
            "made again bit for bit")
    was = facts[0]
    config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, micro_batch_size=was["micro_batch_size"]),
        train=dataclasses.replace(config.train, recompute=was.get("recompute", "none")))
    place = dataclasses.replace(place, dtype=getattr(torch, was["dtype"]), compile=was["compile"])
    say_inexact(was, exact_facts(config, place))
    return config, place


def replay(folder: Path, visit: int, config: Config, record: dict, manifest: dict, place: Place,
           scratch: Path) -> tuple[range, str]:
    """Train a visit again, and those before it that its base is short of. Returns which they are,
    and what differs in the first that is not the same."""
    target = read_sealed(folder / f"ckpt_{visit:03d}" / "state.json", CHECKPOINT)
    base = base_of(folder, visit)
    plan = make_plan(config, manifest, target["queue"])
    plan = dataclasses.replace(plan, stop=(visit + 1) * plan.steps_per_visit)
    config, place = as_trained(record, visit, plan.steps_per_visit, config, place)
    parent = None if base else parent_of(config)
    if parent and parent["sha256"] != record["parent"]["sha256"]:
        raise Stop(CHECKPOINT, f"{parent['checkpoint']} is not what {folder} began with: its "
                   f"weights have sha256 {parent['sha256']}, not {record['parent']['sha256']}")
    model, runner, optimizer, state = start(config, place, plan, base, parent)
    visits = range(state["step"] // plan.steps_per_visit, visit + 1)
    check_space(scratch, config.model, len(visits))
    state |= {k: target[k] for k in ("queue", "deferred", "dropped", "skipped")}
    chunks = ", ".join(f"{chunk:03d} of epoch {epoch}" for epoch, chunk in
                       (plan.queue[v] for v in visits))
    say(f"visits {visits[0]} to {visit} again, chunks {chunks}, steps {state['step'] + 1} to "
        f"{plan.stop}, from {base[0] if base else 'the initial weights'}")
    train(config, manifest, place, plan, scratch, record, model, runner, optimizer, state,
          validating=False)
    for v in visits if place.rank == 0 else ():
        name = f"ckpt_{v:03d}"
        if not (folder / name).is_dir():
            say(f"visit {v}: {folder / name} is not there, nothing to compare with")
            continue
        n, differs = compare(scratch / name, folder / name)
        if differs:
            return visits, f"visit {v} is not {folder / name}: {differs}"
        bare = "" if (folder / name / "optimizer").is_dir() else (
            " of the weights; the optimizer's were not kept")
        say(f"visit {v}: identical, {n} tensors{bare}")
    return visits, ""


def replay_command(argv: list[str]) -> None:
    """analyze.py replay RUN [--visit=V | --verify]. Raises Stop(CHECKPOINT) if a tensor differs."""
    word, options = load_options(argv, ReplayOptions, "a run such as out/demo")
    if options.verify:
        if options.visit is not None:
            raise Stop(USAGE, "--verify checks the whole run: give no --visit with it")
        return audit(Path(word), options.init_from)
    folder, scratch = Path(word), Path(f"{word.rstrip('/')}.replay")
    config, record = read_record(folder)
    manifest = read_manifest(Path("data") / config.data.dataset)
    if record["data_hash"] != manifest["data_hash"]:
        raise Stop(DATA, f"data/{config.data.dataset} is not what {folder} was trained on: data "
                   f"hash {manifest['data_hash']}, the run has {record['data_hash']}")
    have = checkpoints_of(folder)
    if not have or options.visit not in (None, *have):
        raise Stop(USAGE, f"{folder} has no checkpoint {options.visit or 0}; it has "
                   f"{', '.join(map(str, have)) or 'none'}")
    if (scratch / "run.json").exists():
        raise Stop(USAGE, f"{scratch}, where visits are trained again, is a run itself: rename it")
    config = dataclasses.replace(config, train=dataclasses.replace(
        config.train, save_steps=None, save_minutes=None, log_to="none", on_nonfinite="stop",
        keep_optimizer=None, init_from=options.init_from or config.train.init_from))
    place = choose_place(config)
    check(config, manifest)
    # From the last visit down: where optimizer states are thinned, one way compares many.
    todo = sorted(have, reverse=True) if options.visit is None else [options.visit]
    with locked(scratch) if place.rank == 0 else contextlib.nullcontext():
        while todo:
            if place.rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            try:
                visits, differs = replay(folder, todo[0], config, record, manifest, place, scratch)
                if exchange([bool(differs)], place).any():
                    differs = differs or f"visit {todo[0]} differs, rank 0 says where"
                    raise Stop(CHECKPOINT, f"{differs}; the other one is kept in {scratch}")
            except RuntimeError as error:
                raise explain(error, config, place, 0) or error from error
            todo = [visit for visit in todo if visit not in visits]
            gc.collect()  # compiled blocks hold themselves
        if place.rank == 0:
            shutil.rmtree(scratch)
    if place.world > 1:
        dist.destroy_process_group()


def main(argv: list[str]) -> None:
    commands = dict(memorization=memorization_command, trace=trace_command, batch=batch_command,
                    replay=replay_command)
    if not argv or argv[0] not in commands:
        raise Stop(USAGE, f"expected {', '.join(commands)} and a run, got "
                   f"{' '.join(argv[:1]) or 'nothing'!r} (--help)")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every character
        sys.stdout.reconfigure(errors="backslashreplace")
    commands[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [MemorizationOptions, TraceOptions, BatchOptions, ReplayOptions]))
