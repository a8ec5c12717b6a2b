"""Documents -> tokens on disk: what prepare.py's worker processes do, and what they leave.

    stream = tokenize(corpus, epoch, work)
    for first, rows in rows_of(segments(stream, held=False), work): ...

A source is read in stretches: spans of its files, half a MB to 64. A worker writes the tokens of
one, a table of its documents and, last, what it found: a stretch that has all three is finished,
and no kill makes it be done again. Stretches in their order are the source's stream of tokens,
whatever worker wrote which. Documents are rewritten here to be filled in the middle (FIM).
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nano360.config import DATA, Config, DataConfig, Source, Stop
from nano360.files import sha256_file, sync, write_atomic
from nano360.rows import FORMAT, data_hash, open_tokens
from nano360.sources import (Corpus, Span, at_hand, cut, documents, is_remote, no_documents)
from nano360.tokenizers import Tokenizer, blocks, fim_ids, read_tokenizer

BATCH = 1 << 16  # tokens a worker collects before it writes them
BLOCK = 1 << 24  # tokens read at once when rows are dealt
STRETCH = 1 << 19, 1 << 26  # bytes of text in a stretch: at least, at most
IS_HELD, GOES_ON = 1, 2  # flags of a document: held out; began in an earlier stretch


# ---- what a worker does --------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A stretch of a source that one worker reads, and the file, without suffix, that it writes."""
    source: Source
    data: DataConfig
    kind: str
    epoch: int
    spans: tuple[Span, ...]
    numbers: tuple[int, ...]  # of their files
    tokenizer: str  # its file, and json of what that cannot say
    spec: str
    row: int  # tokens of a row, for rows that are ready
    dtype: str
    out: str


def leave_with_parent() -> None:
    """End this worker when the process that it works for was killed."""
    def wait() -> None:
        parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def fill_in_the_middle(coder: Tokenizer, text: str, rate: float, place: str) -> list[int]:
    """A document's ids, its text rewritten at this rate to end with its middle (2207.14255).

    Cut at two characters, before packing: nothing is padded, cut off or masked. CrystalCoder's own
    code rewrote packed rows, so that marks and padding pushed text out of them, and its pieces
    were encoded as texts of their own, each with a blank in front: "retu rn". Here only what the
    document begins with has one. All that is drawn follows from `place`, which names the document.
    """
    draws = hashlib.sha256(f"fim/{place}".encode()).digest()
    chance, form, a, b = (int.from_bytes(draws[i:i + 8], "big") for i in (0, 8, 16, 24))
    if chance >= rate * 2**64:
        return coder.encode(text)
    start, end = sorted(draw * (len(text) + 1) >> 64 for draw in (a, b))
    parts = [text[:start], text[start:end], text[end:]]
    opening = next((i for i, part in enumerate(parts) if part), 0)
    prefix, middle, suffix = (coder.encode(part, i == opening) for i, part in enumerate(parts))
    PRE, SUF, MID = fim_ids(coder)
    if form < 2**63:
        return [PRE, *prefix, SUF, *suffix, MID, *middle]  # PSM
    return [PRE, SUF, *suffix, MID, *prefix, *middle]  # SPM


def encode_document(coder: Tokenizer, job: Job, place: str, begins: bool, ends: bool,
                    texts: Iterator[str]) -> Iterator[tuple[list[int], int]]:
    """(ids, bytes of text) of a document, piece by piece; nothing of one of blanks alone."""
    bos, eos = [coder.bos] * (job.data.bos and begins), [coder.eos] * ends
    if job.source.fim_rate:
        text = "".join(texts)
        if text.strip():
            ids = fill_in_the_middle(coder, text, job.source.fim_rate, place)
            yield bos + ids + eos, len(text.encode())
        return
    cuts = blocks(texts, coder.block)
    text, following = next(cuts, ""), next(cuts, None)
    if begins and ends and following is None and not text.strip():
        return
    while text is not None:
        end = eos if following is None else []
        yield bos + coder.encode_piece(text, begins) + end, len(text.encode())
        text, following, begins, bos = following, next(cuts, None), False, []


def is_held_out(data: DataConfig, source: str, file: str, line: int) -> bool:
    """By the hash of where a document came from: nothing else in the set moves it."""
    digest = hashlib.sha256(f"{data.seed}/{source}/{file}:{line}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < data.valid_share * 2**64


class Writer:
    """The two files of a job: tokens, and a table (n, 5) int64 of first token, number of the span,
    line, flags and bytes of every document."""

    def __init__(self, out: str, dtype: str):
        self.out, self.files = out, [open(f"{out}{end}", "wb") for end in (".tokens", ".docs")]
        self.dtype, self.ids, self.docs, self.at = dtype, [], [], 0

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        self.at += len(ids)
        if len(self.ids) >= BATCH:
            self.flush()

    def flush(self) -> None:
        self.files[0].write(np.array(self.ids, self.dtype).tobytes())  # raises on an id too large
        self.files[1].write(np.array(self.docs, np.int64).tobytes())
        self.ids, self.docs = [], []

    def close(self, notes: dict, labels: Iterable[str] = ()) -> dict:
        """Finish, and write beside the two what intact() compares them with."""
        self.flush()
        for file in self.files:
            file.close()
        found = dict(count(read_table(self.out), self.at), notes=notes, labels=list(labels),
                     sha256=hashes(self.out))
        write_atomic(Path(f"{self.out}.json"), json.dumps(found))
        return found


def read_table(out: str) -> np.ndarray:
    """The table of a job's documents, (n, 5) int64: see Writer."""
    return np.fromfile(f"{out}.docs", np.int64).reshape(-1, 5)


def hashes(out: str) -> list[str]:
    paths = [Path(f"{out}{end}") for end in (".tokens", ".docs")]
    return [sha256_file(path) if path.is_file() else "" for path in paths]


def intact(out: str) -> dict | None:
    """What a job that was finished before found, if its files are as it left them."""
    if not (facts := Path(f"{out}.json")).is_file():
        return None
    found = json.loads(facts.read_text(encoding="utf-8"))
    return found if found["sha256"] == hashes(out) else None


def count(table: np.ndarray, tokens: int) -> dict[str, int]:
    """What is in a stretch, by the table of its documents and its number of tokens."""
    sizes, flags = np.diff(np.append(table[:, 0], tokens)), table[:, 3]
    held, begins = flags & IS_HELD > 0, flags & GOES_ON == 0
    return dict(documents=int(begins.sum()), held=int((begins & held).sum()), tokens=tokens,
                held_tokens=int(sizes[held].sum()), bytes=int(table[:, 4].sum()))


def tokenize_job(job: Job) -> dict:
    """Write the tokens of a stretch of a source; returns what was found in it."""
    if found := intact(job.out):
        return found
    coder, notes = read_tokenizer(job.tokenizer, job.spec), collections.Counter()
    writer, specials = Writer(job.out, job.dtype), list(coder.special_tokens)
    for number, span in enumerate(job.spans):
        for line, begins, ends, texts in documents(span, job.kind, job.source, job.data, specials,
                                                   notes):
            start, size = writer.at, 0
            place = f"{job.data.seed}/{job.source.name}/{job.epoch}/{span.name}:{line}"
            for ids, n_bytes in encode_document(coder, job, place, begins, ends, texts):
                writer.add(ids)
                size += n_bytes
            if writer.at == start:
                notes["blank"] += 1
                continue
            held = is_held_out(job.data, job.source.name, span.name, line)
            writer.docs += [start, number, line, IS_HELD * held | GOES_ON * (not begins), size]
    return writer.close(notes)


# ---- tokens on disk ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Work:
    """What the steps of a preparation share."""
    config: Config
    folder: Path  # data/<dataset>.part
    tokenizer: Tokenizer
    file: Path  # of the tokenizer
    dtype: str
    pool: Executor | None  # none: this process alone
    workers: int

    @property
    def row(self) -> int:  # tokens of a row
        return self.config.model.seq_len + 1

    @property
    def stride(self) -> int:  # from where a row begins to where the next does
        return self.row - self.config.data.overlap


@dataclass
class Stretch:
    """What a job wrote, as far as it is used."""
    out: str
    numbers: tuple[int, ...]  # of the spans' files
    tokens: int
    table: np.ndarray | None = None  # where it is cut short; else it is on disk


@dataclass
class Stream:
    """The tokens of a source in one epoch, in the order of its documents."""
    dtype: str
    stretches: list[Stretch] = dataclasses.field(default_factory=list)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def ordered(pool: Executor | None, work: Callable, jobs: Iterator, ahead: int) -> Iterator:
    """(job, work(job)) in the order of the jobs, at most `ahead` of them under way."""
    if pool is None:
        yield from ((job, work(job)) for job in jobs)
        return
    waiting: collections.deque = collections.deque()
    for job in itertools.chain(jobs, [None] * ahead):
        if job is not None:
            waiting.append((job, pool.submit(work, job)))
        if waiting and (len(waiting) > ahead or job is None):
            done, future = waiting.popleft()
            yield done, future.result()


def jobs_of(corpus: Corpus, numbers: Iterable[int], epoch: int, work: Work) -> Iterator[Job]:
    """Files of a source in stretches of about one size: large ones in spans, small ones together.

    All that its tokens follow from names a stretch, so that another recipe finds what it shares.
    """
    source, data, spec = corpus.source, work.config.data, json.dumps(work.tokenizer.spec())
    follows = [source.name, source.where, source.text_key or data.text_key, source.fim_rate, epoch,
               source.rows, corpus.kind, data.encoding, data.valid_share, data.seed, data.bos,
               work.dtype, work.row * source.rows, spec]
    size = min(max(STRETCH[0], sum(f.size or 0 for f in corpus.files) // 256), STRETCH[1])

    def job(spans: list[tuple[int, str, Span]]) -> Job:
        places = [(sha256, span.name, span.start, span.end) for _, sha256, span in spans]
        name = hashlib.sha256(json.dumps([follows, places]).encode()).hexdigest()[:32]
        return Job(source, data, corpus.kind, epoch, tuple(span for _, _, span in spans),
                   tuple(number for number, _, _ in spans), str(work.file), spec, work.row,
                   work.dtype, str(work.folder / "work" / name))

    waiting: list = []
    for number in numbers:
        if (file := at_hand(corpus, number, data, fetched=False)) is None:
            continue
        spans = [(number, file.sha256, span) for span in cut(file, corpus, size)]
        if not file.path.is_file() and all(intact(job([one]).out) for one in spans):
            yield from (job([one]) for one in spans)  # read before, and let go
            continue
        at_hand(corpus, number, data)
        for one in spans:
            waiting.append(one)
            if is_remote(source) or sum(s.end - s.start for _, _, s in waiting) >= size:
                yield job(waiting)
                waiting = []
    if waiting:
        yield job(waiting)


def tokenize(corpus: Corpus, epoch: int, work: Work) -> Stream:
    """Turn a source into tokens, up to its max_tokens; stretches that are finished stay."""
    stream, data, limit = Stream(work.dtype), work.config.data, corpus.source.max_tokens
    sizes = [file.size for file in corpus.files]
    with tqdm(desc=f"tokenize {corpus.source.name}", unit="B", unit_scale=True, disable=None,
              total=None if None in sizes or limit else sum(sizes)) as bar:
        jobs = jobs_of(corpus, range(len(corpus.files)), epoch, work)
        for job, found in ordered(work.pool, tokenize_job, jobs, 2 * work.workers):
            stretch = Stretch(job.out, job.numbers, found["tokens"])
            if limit is not None and (room := limit - stream.counts["tokens"]) <= stretch.tokens:
                table = read_table(job.out)  # of what begins where the limit is reached: nothing
                over = np.flatnonzero((table[:, 0] >= room) & (table[:, 3] & GOES_ON == 0))
                if len(over):
                    stretch.table, stretch.tokens = table[:over[0]], int(table[over[0], 0])
                    found = found | count(stretch.table, stretch.tokens)
            stream.stretches.append(stretch)
            stream.counts.update({k: v for k, v in found.items() if isinstance(v, int)})
            corpus.notes.update(found["notes"] if epoch == 0 else {})
            bar.update(sum(span.end - span.start for span in job.spans))
            for span in job.spans if is_remote(corpus.source) and not data.keep_downloads else ():
                if span.end == span.size:  # the file's last: it was read
                    Path(span.path).unlink(missing_ok=True)
            if stretch.table is not None:
                break
    check_bad(corpus, data)
    if not stream.counts["documents"]:
        raise no_documents(corpus)
    return stream


def check_bad(corpus: Corpus, data: DataConfig) -> None:
    """What one stretch may have, all of them may have together."""
    if (bad := corpus.notes["bad"]) > data.max_bad_documents:
        raise Stop(DATA, f"source {corpus.source.name}: {bad} documents cannot be read, "
                   f"--max_bad_documents is {data.max_bad_documents}")


def tables(stream: Stream) -> Iterator[tuple[Stretch, np.ndarray]]:
    for stretch in stream.stretches:
        yield stretch, read_table(stretch.out) if stretch.table is None else stretch.table


def on_side(table: np.ndarray, held: bool | None) -> np.ndarray:
    """Which documents are held out, or are not; none: all are meant."""
    return np.full(len(table), True) if held is None else (table[:, 3] & IS_HELD > 0) == held


def segments(stream: Stream, held: bool | None) -> Iterator[np.ndarray]:
    """The tokens of a stream, or of its documents that are held out or not, in bounded arrays."""
    for stretch, table in tables(stream):
        tokens, mine = open_tokens(f"{stretch.out}.tokens", stream.dtype), on_side(table, held)
        edges = np.append(table[:, 0], stretch.tokens)
        turns = [0, *(np.flatnonzero(np.diff(mine)) + 1), len(table)]
        for a, b in itertools.pairwise(turns):
            for at in range(edges[a], edges[b], BLOCK) if a < b and mine[a] else ():
                yield tokens[at:min(at + BLOCK, edges[b])]


def n_rows(tokens: int, work: Work) -> int:
    return max(0, (tokens - work.row) // work.stride + 1)


def rows_of(found: Iterable[np.ndarray], work: Work, first: int = 0
            ) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first, rows (n, seq_len + 1)) of a stream, from row `first` on, in blocks."""
    skip, waiting, size = first * work.stride, [], 0
    for tokens in itertools.chain(found, [None]):
        if tokens is not None:
            skipped = min(skip, len(tokens))
            waiting.append(tokens[skipped:])
            skip, size = skip - skipped, size + len(tokens) - skipped
        if waiting and (tokens is None or size >= BLOCK):
            whole = np.concatenate(waiting)
            if n := n_rows(len(whole), work):
                views = np.lib.stride_tricks.sliding_window_view(whole, work.row)
                yield first, views[::work.stride][:n]
            first, waiting = first + n, [whole[n * work.stride:].copy()]  # lets the rest go
            size = len(waiting[0])


def write_documents(path: Path, stream: Stream, held: bool | None) -> None:
    """The table of a stream's documents, (n, 3) int64: first token, number of the file, line."""
    n, n_held = stream.counts["documents"], stream.counts["held"]
    shape, at = ({None: n, True: n_held, False: n - n_held}[held], 3), 0
    with open(path, "wb") as file:  # not mapped: on a full disk that ends in no error but a signal
        np.lib.format.write_array_header_1_0(
            file, dict(descr="<i8", fortran_order=False, shape=shape))
        for stretch, table in tables(stream):
            sizes, numbers = np.diff(np.append(table[:, 0], stretch.tokens)), table[:, 1]
            mine = on_side(table, held)
            starts = at + np.cumsum(sizes * mine) - sizes
            at += int(sizes[mine].sum())
            mine &= table[:, 3] & GOES_ON == 0
            rows = np.stack([starts, np.array(stretch.numbers, int)[numbers], table[:, 2]], axis=1)
            file.write(rows[mine].astype("<i8").tobytes())


# ---- a set that is whole -------------------------------------------------------------------------

def manifest_of(recipe: dict, work: Work, rows_per_chunk: int, sources: list[dict]) -> dict:
    """The manifest of a set, without its files."""
    spec, data = work.tokenizer.spec(), work.config.data
    return dict(format=FORMAT, recipe=recipe, data_hash=data_hash(recipe, spec["sha256"]),
                tokenizer=spec, seq_len=work.row - 1, dtype=work.dtype, seed=data.seed,
                n_chunks=data.n_chunks, rows_per_chunk=rows_per_chunk, sources=sources, files={})


def file_facts(folder: Path, work: Work, names: Iterable[str] = ()) -> dict[str, dict]:
    """For the manifest: sha256 and, of those with rows, how many, of some or all files of a set."""
    names = [*names] or sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")
                               if p.is_file() and not p.name.startswith("manifest.json"))
    width = work.row * np.dtype(work.dtype).itemsize
    with ThreadPoolExecutor() as pool:  # hashing lets the other threads run
        hashes = pool.map(lambda name: sha256_file(folder / name), names)
        return {name: dict(sha256=sha256) | (
            dict(rows=(folder / name).stat().st_size // width) if name.endswith(".bin") else {})
            for name, sha256 in zip(names, hashes, strict=True)}


def publish(out: Path, folder: Path) -> None:
    """Give a finished set its name."""
    for path in out.rglob("*"):
        sync(path)
    out.rename(folder)
    sync(folder.parent)
