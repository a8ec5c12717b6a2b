"""Stage 1: text -> tokens -> rows -> chunks, with a manifest and the way back.

    python prepare.py configs/demo.py                      # the text that every Python brings along
    python prepare.py configs/demo.py --input=novels/      # your own .txt .md .py .jsonl .parquet
    python prepare.py configs/demo.py --verify             # or --stats: what is in a prepared set
    python prepare.py configs/amber_7b.py --chunks=0-3     # released rows, fetched chunk by chunk
    python prepare.py --hub=LLM360/Amber@ckpt_100 --to=DIR # a published model, fetched once

Documents are tokenized and end in EOS; each source is one long stream of tokens, cut into rows of
seq_len + 1. Some documents are held out. The rows of every source are dealt round-robin to n_chunks
chunks, so that all chunks have the same mix. Whatever the number of worker processes, the bytes are
the same. Reads the sources of the run file; writes data/<dataset>/, whole or not at all:

    manifest.json       what went in and what came out: tokenizer, sources, files with their sha256
    tokenizer.model     (or .tiktoken, .json) what the rows were made with; checkpoints copy it,
                        tokenizer.json and tokenizer_config.json, which say it to transformers
    piece_bytes.npy     how many bytes of text each id stands for
    train_000.bin ...   rows of seq_len + 1 token ids, uint16 or uint32, C order, no header
    valid_<source>.bin  held-out rows
    canaries.json       strings planted in the rows, if any are: nano360/analysis/canaries.py
    provenance/         the way back. <chunk>.npy: (source, epoch, row of its stream) of every row;
                        <source>_epoch_<e>.npy, <source>_held_out.npy (epoch -1): (first token of a
                        document in the stream, number of its file, line); <source>_files.json.
                        Row r begins at token r (seq_len + 1), or r seq_len where rows overlap

Until then all is in data/<dataset>.part/, and the same command goes on after a kill.
"""

import base64
import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import get_type_hints

import numpy as np
from tqdm import tqdm

from nano360.bill import bill
from nano360.config import (DATA, ENVIRONMENT, SECTIONS, USAGE, Config, DataConfig, Source, Stop,
                            columns, fill, key, load, run, say, split_words)
from nano360.files import hash_json, locked, sha256_file, sync, write_atomic, write_sealed
from nano360.rows import (FILE_ORDER, FORMAT, HELD_ORDER, HELD_OUT, PIECE_BYTES, chunk_name,
                          open_rows, permutation, read_manifest, valid_name)
from nano360.sources import (DOWNLOADS, Corpus, Span, at_hand, cut, documents, is_remote,
                             no_documents, open_corpus, shown)
from nano360.tokenizer_json import tokenizer_files
from nano360.tokenizers import Tokenizer, fim_ids, load_tokenizer, with_special
from nano360.tokens import (Stream, Work, file_facts, is_held_out, leave_with_parent, manifest_of,
                            n_rows, publish, rows_of, segments, tokenize, write_documents)

SAMPLE = 8_000_000  # characters a new tokenizer is trained on
MAX_EPOCHS = 100  # a source repeated more often than this is a mistake in the numbers
SYNC_EVERY = 1 << 30  # bytes dealt to the chunks between two notes of how far it went


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    input: str | None = key("your own text, a file, a folder or a URL, instead of the sources",
                            None, pattern=".+")
    chunks: str | None = key("of a release: which chunks to make, as in 0-3; none: all", None,
                             pattern="[0-9]+(-[0-9]+)?")
    verify: bool = key("check a prepared set instead of making one", False)
    stats: bool = key("show what is in a prepared set instead of making one", False)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    hub: str = key("what to fetch: OWNER/NAME[@REVISION], or datasets/OWNER/NAME[@REVISION]")
    to: str = key("the folder it is fetched to", pattern=".+")
    files: str = key("which of its files, as in data/*.parquet; empty: those of a model", "")


# ---- the tokenizer -------------------------------------------------------------------------------

def corpus_documents(corpus: Corpus, data: DataConfig) -> Iterator[tuple[Span, int, Iterator[str]]]:
    """(file as one span, line, text in parts) of every document of a source, in order."""
    notes = collections.Counter()  # of what is odd: tokenizing counts it again
    for number in range(len(corpus.files)):
        file = at_hand(corpus, number, data)
        if file is None:
            continue
        for span in cut(file, corpus, file.size + 1):
            for line, _, _, parts in documents(span, corpus.kind, corpus.source, data, [], notes):
                yield span, line, parts


def sample_text(corpus: Corpus, data: DataConfig) -> list[str]:
    """Text to train a tokenizer on: a source's first documents, without those it will hold out."""
    limit = SAMPLE * corpus.source.weight / sum(source.weight for source in data.sources)
    texts, size = [], 0  # (held out, text)
    for span, line, parts in corpus_documents(corpus, data):
        text = next(parts, "")[:1 << 20]  # enough of a long document
        texts.append((is_held_out(data, corpus.source.name, span.name, line), text))
        size += len(text)
        if size > limit:
            break
    if not any(text.strip() for _, text in texts):
        raise no_documents(corpus)
    trained = [text for held_out, text in texts if not held_out]
    return trained or [text for _, text in texts]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> bytes:
    """A sentencepiece BPE model as LLaMA's: byte fallback, no normalization, digits apart.

    Trained on lines, as LLaMA's was, so that a line break stays a byte of its own. The blank that
    sentencepiece puts in front of a line takes the place of the line's first one.
    """
    import sentencepiece
    lines = (line[1:] if line.startswith(" ") else line for t in texts for line in t.split("\n"))
    out = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in lines if line), model_writer=out, model_type="bpe",
            vocab_size=vocab_size, byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=0.9995,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, max_sentence_length=1 << 20,
            num_threads=4, minloglevel=2)
    except RuntimeError as error:
        reason = str(error).split("] ")[-1].strip()
        raise Stop(DATA, f"no tokenizer of {vocab_size} pieces can be made of this text: {reason}; "
                   "give a smaller --vocab_size or more text") from error
    return out.getvalue()


def tiktoken_ranks(name: str) -> Tokenizer:
    """The tokenizer that tiktoken knows by this name. Raises Stop(DATA)."""
    import tiktoken
    try:
        coder = tiktoken.get_encoding(name)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Stop(DATA, f"--tokenizer=tiktoken:{name}: {reason}; give a .tiktoken file") from error
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank
                     for token, rank in coder._mergeable_ranks.items())
    spec = dict(pattern=coder._pat_str, special_tokens=coder._special_tokens)
    return Tokenizer("tiktoken", ranks, spec)


def tokenizer_file(data: DataConfig) -> str:
    """The tokenizer's file, fetched from the hub if it is named so."""
    named = re.fullmatch("hf:([^/]+/[^/@]+)(?:@([^/]+))?/(.+)", data.tokenizer)
    if not named:
        return data.tokenizer
    repo, revision, name = named.groups("")
    path = DOWNLOADS / re.sub("[^A-Za-z0-9._-]+", "_", f"{repo}@{revision}") / Path(name).name
    if not path.is_file():
        from nano360.hub.fetch import fetch, list_hub
        _, remotes = list_hub(repo, revision, name)
        fetch(remotes[0], path)
    return str(path)


def choose_tokenizer(config: Config, corpora: list[Corpus], kept: Path) -> Tokenizer:
    """The tokenizer that the run file asks for: trained here, tiktoken's by name, or a file.

    A tokenizer that is trained is `kept`: a preparation that goes on goes on with it.
    """
    data, name = config.data, config.data.tokenizer
    special = data.special_tokens.split()
    if name == "bpe":
        size = config.model.vocab_size - len(special)
        if not kept.is_file():
            say(f"training a tokenizer of {size} pieces")
            texts = (text for corpus in corpora for text in sample_text(corpus, data))
            write_atomic(kept, base64.b64encode(train_tokenizer(texts, size)).decode())
        tokenizer = Tokenizer("sentencepiece", base64.b64decode(kept.read_text()), {})
    elif name.startswith("tiktoken:"):
        tokenizer = tiktoken_ranks(name.removeprefix("tiktoken:"))
    else:
        tokenizer = load_tokenizer(tokenizer_file(data), data.tokenizer_sha256)
    if special:
        if tokenizer.kind != "sentencepiece":
            raise Stop(USAGE, "special_tokens can be added to a sentencepiece model only, the "
                       f"tokenizer is {tokenizer.kind}")
        try:
            tokenizer = Tokenizer("sentencepiece", with_special(tokenizer.data, special), {})
        except RuntimeError as error:
            raise Stop(USAGE, f"special_tokens: {str(error).partition(': ')[2]}") from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise Stop(DATA, f"tokenizer {name} has {tokenizer.vocab_size} ids, vocab_size "
                   f"is {config.model.vocab_size}: give --vocab_size={tokenizer.vocab_size}")
    if data.bos and tokenizer.bos is None:
        raise Stop(USAGE, f"bos = true, but tokenizer {name} has no BOS")
    if any(source.fim_rate for source in data.sources):
        fim_ids(tokenizer)
    return tokenizer


# ---- rows -> chunks ------------------------------------------------------------------------------

@dataclass
class Streams:
    """A source's streams, one for all epochs or, rewritten to be filled in the middle, one each."""
    corpus: Corpus
    streams: list[Stream]
    held_rows: np.ndarray | None  # where a source has too few documents to hold out whole ones

    def stream(self, epoch: int) -> Stream:
        return self.streams[epoch % len(self.streams)]

    def side(self, held: bool) -> bool | None:
        """Whose documents the rows are cut from; none: all."""
        return held if self.held_rows is None else None

    def rows(self, epoch: int, work: Work) -> int:
        """Training rows of an epoch."""
        counts = self.stream(epoch).counts
        if self.held_rows is None:
            return n_rows(counts["tokens"] - counts["held_tokens"], work)
        return n_rows(counts["tokens"], work) - len(self.held_rows)

    def training(self, used: int, start: int, work: Work) -> Iterator[tuple[int, np.ndarray]]:
        """(i, rows) of training rows start to `used`, counted over all epochs; i is the first's."""
        i = epoch = 0
        while i < used:
            n, at = self.rows(epoch, work), i
            if start < i + n:
                if start > i and self.held_rows is None:  # numbers are those of the stream
                    at = start
                for _, rows in self.blocks(epoch, False, work, at - i):
                    ahead = max(0, start - at)
                    if len(mine := rows[ahead:used - at]):
                        yield at + ahead, mine
                    if (at := at + len(rows)) >= used:  # the rest of the epoch is left out
                        return
            i, epoch = i + n, epoch + 1

    def blocks(self, epoch: int, held: bool, work: Work, first: int = 0
               ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers in the stream, rows) of the training or the held-out rows, in blocks."""
        for at, rows in rows_of(segments(self.stream(epoch), self.side(held)), work, first):
            numbers = np.arange(at, at + len(rows))
            mine = np.full(len(rows), True) if self.held_rows is None else (
                np.isin(numbers, self.held_rows) == held)
            yield numbers[mine], rows[mine]


def hold_out(corpus: Corpus, index: int, work: Work) -> Streams:
    """Tokenize a source, and say which of its rows are held out.

    Whole documents by hash where there are 100 or more, or where every epoch rewrites them, so that
    a row of one is in none of another; else single rows of the one stream.
    """
    data, stream, held_rows = work.config.data, tokenize(corpus, 0, work), None
    if stream.counts["documents"] < 100 and not corpus.source.fim_rate:
        n = n_rows(stream.counts["tokens"], work)
        n_valid = max(0, min(data.valid_rows, int(np.ceil(n * data.valid_share)), n - 1))
        held_rows = np.sort(permutation(n, data.seed, HELD_ORDER, index)[:n_valid])
    return Streams(corpus, [stream], held_rows)


def shares(config: Config, available: list[int]) -> list[int]:
    """Rows per chunk of every source: by weight if the chunk's size is given, else one pass."""
    data = config.data
    if data.rows_per_chunk is None:
        return [n * (source.epochs or 1) // data.n_chunks
                for n, source in zip(available, data.sources, strict=True)]
    weights = np.array([source.weight for source in data.sources])
    exact = data.rows_per_chunk * weights / weights.sum()
    rows = np.floor(exact).astype(int)  # the largest remainders get the rows that are left
    rows[np.argsort(rows - exact, kind="stable")[:data.rows_per_chunk - rows.sum()]] += 1
    return rows.tolist()


def check_shares(parts: list[Streams], per_chunk: list[int], work: Work) -> None:
    """Refuse a mix that a source is too small for. Raises Stop(DATA)."""
    data = work.config.data
    for part, n in zip(parts, per_chunk, strict=True):
        source, rows = part.corpus.source, part.rows(0, work)
        if not n and rows >= data.n_chunks:
            raise Stop(DATA, f"source {source.name} gets 0 of {data.rows_per_chunk} rows a chunk "
                       f"by its weight {source.weight:g}; give it more, or raise --rows_per_chunk")
        if not n or not rows:
            raise Stop(DATA, f"source {source.name} has {part.stream(0).counts['tokens']} tokens, "
                       f"{rows} rows of {work.row}: too few for {data.n_chunks} chunks; give more "
                       "text, or a smaller --n_chunks or --seq_len")
        if (epochs := n * data.n_chunks / rows) > (limit := source.epochs or MAX_EPOCHS):
            raise Stop(DATA, f"source {source.name} has {rows} rows and would be repeated "
                       f"{epochs:,.2f} times, the limit is {limit}; give more text, its epochs, a "
                       "smaller weight or a smaller --rows_per_chunk")


def deal(parts: list[Streams], per_chunk: list[int], work: Work, out: Path) -> None:
    """Write the chunks: training row i of a source goes to chunk i % N, there i // N of its rows.

    How far it went is noted from time to time; what is written after that is written again.
    """
    N, width = work.config.data.n_chunks, work.row * np.dtype(work.dtype).itemsize
    note = out / "dealt.json"  # beside what it vouches for
    done = json.loads(note.read_text()) if note.is_file() else 0  # rows, over all sources
    for k in range(N):
        (out / chunk_name(k)).touch()
    bar, unsynced = tqdm(desc="deal", total=sum(per_chunk) * N * width, unit="B", unit_scale=True,
                         disable=None), 0
    for s, (part, n) in enumerate(zip(parts, per_chunk, strict=True)):
        before = sum(per_chunk[:s]) * N
        for i, rows in part.training(n * N, max(0, done - before), work):
            for k in range(N):
                first = (k - i) % N
                if first < len(rows):
                    with open(out / chunk_name(k), "r+b") as file:
                        file.seek((before + i + first) // N * width)
                        file.write(np.ascontiguousarray(rows[first::N], work.dtype))
            bar.update(len(rows) * width)
            unsynced += len(rows) * width
            if unsynced >= SYNC_EVERY:
                for k in range(N):
                    sync(out / chunk_name(k))
                write_atomic(note, json.dumps(before + i + len(rows)))
                unsynced = 0
    bar.close()
    note.unlink(missing_ok=True)


def write_held_out(s: int, part: Streams, work: Work, out: Path) -> int:
    """Write a source's held-out rows and where they come from; how many there are."""
    name, limit, found, numbers = part.corpus.source.name, work.config.data.valid_rows, [], []
    for at, rows in part.blocks(0, True, work):
        room = limit - len(numbers)
        found, numbers = found + [rows[:room].astype(work.dtype)], numbers + at[:room].tolist()
        if room <= len(rows) and part.held_rows is None:
            break
    (out / valid_name(name)).write_bytes(b"".join(found))
    origin = np.array([(s, HELD_OUT, number) for number in numbers], np.int64).reshape(-1, 3)
    np.save(out / "provenance" / f"{valid_name(name)}.npy", origin)
    write_documents(out / "provenance" / f"{name}_held_out.npy", part.stream(0), part.side(True))
    return len(numbers)


def write_origins(parts: list[Streams], per_chunk: list[int], work: Work, out: Path) -> None:
    """Write where every training row comes from: its source, epoch and row of the stream."""
    way, N, starts = out / "provenance", work.config.data.n_chunks, []
    for part, n in zip(parts, per_chunk, strict=True):
        edges = [0]
        while edges[-1] < n * N:
            epoch = len(edges) - 1
            edges.append(edges[-1] + part.rows(epoch, work))
            write_documents(way / f"{part.corpus.source.name}_epoch_{epoch}.npy",
                            part.stream(epoch), part.side(False))
        starts.append(np.array(edges))
        (way / f"{part.corpus.source.name}_files.json").write_text(
            json.dumps([file.name for file in part.corpus.files]), encoding="utf-8")
    for k in range(N):
        found = []
        for s, (part, n) in enumerate(zip(parts, per_chunk, strict=True)):
            i = np.arange(n) * N + k
            epoch = np.searchsorted(starts[s], i, side="right") - 1
            rows = i - starts[s][epoch]
            if part.held_rows is not None:  # the others, in their order
                rows += np.searchsorted(part.held_rows - np.arange(len(part.held_rows)), rows,
                                        side="right")
            found.append(np.stack([np.full(n, s), epoch, rows], axis=1))
        np.save(way / f"{chunk_name(k)}.npy", np.concatenate(found))


# ---- what is in a set --------------------------------------------------------------------------

def show(folder: Path, manifest: dict) -> None:
    """Print what is in a prepared set, source by source."""
    print(f"{folder}: {manifest['n_chunks']} chunks of {manifest['rows_per_chunk']} rows of "
          f"{manifest['seq_len'] + 1} tokens, {manifest['dtype']}, "
          f"tokenizer of {manifest['tokenizer']['vocab_size']}")
    lines, keys = [], ("documents", "bytes", "all_tokens", "rows_per_chunk", "valid_rows")
    total = dict(name="total", epochs="", licence="", notes={}, **{
        k: sum(one[k] for one in manifest["sources"]) for k in keys})
    for one in [*manifest["sources"], *[total] * (len(manifest["sources"]) > 1)]:
        share, tokens = one["rows_per_chunk"] / manifest["rows_per_chunk"], one["all_tokens"]
        lines.append([one["name"], f"{one['documents']:,}", f"{one['bytes'] / 1e6:,.2f}",
                      f"{tokens:,}", f"{one['bytes'] / tokens:.2f}", f"{one['rows_per_chunk']:,}",
                      f"{share:.2%}", f"{one['epochs']}", f"{one['valid_rows']:,}", one["licence"]])
    lines.insert(0, ["source", "documents", "MB", "tokens", "B/token", "rows/chunk", "share",
                     "epochs", "valid rows", "licence"])
    print("\n".join(columns(lines)))
    for one in manifest["sources"]:
        if notes := ", ".join(f"{k} {v:,}" for k, v in one["notes"].items()):
            print(f"noticed in {one['name']}: {notes}")
    if n := manifest["recipe"].get("canaries"):
        from nano360.analysis.canaries import TIMES
        print(f"planted: {n * len(TIMES)} canaries, {n * sum(TIMES):,} times")


def verify(folder: Path, manifest: dict) -> None:
    """Compare every file with its hash and size. Raises Stop(DATA) at the first that differs."""
    gone = [name for name in manifest["files"] if manifest["recipe"]["sources"][0]["rows"]
            and name.startswith("train_") and not (folder / name).exists()]  # made, and let go
    for name in tqdm(manifest["files"].keys() - gone, desc="verify", disable=None):
        if name.endswith(".bin"):
            open_rows(folder, manifest, name)
        elif not (folder / name).is_file() or (
                sha256_file(folder / name) != manifest["files"][name]["sha256"]):
            raise Stop(DATA, f"{folder / name} is missing or was changed; prepare it again")
    print(f"{folder}: all {len(manifest['files']) - len(gone)} files are as the manifest says"
          + f"; {len(gone)} chunks were let go: {', '.join(gone)}" * bool(gone))


# ---- making one ----------------------------------------------------------------------------------

def recipe_of(config: Config, corpora: list[Corpus]) -> dict:
    """All that the bytes of a data set follow from; its hash is the data hash."""
    data, name = config.data, config.data.tokenizer
    known = name == "bpe" or name.startswith("tiktoken:")
    sources = []
    for c in corpora:
        facts = dataclasses.asdict(c.source)
        del facts["licence"]  # of which no byte follows
        there, path = is_remote(c.source) or c.kind != "text", facts.pop("path")
        sources.append(facts | dict(origin=shown(path) if there else Path(path).name,
                                    revision=c.revision))
    keys = ("n_chunks", "rows_per_chunk", "valid_share", "valid_rows", "seed", "text_key",
            "encoding", "special_tokens", "bos", "overlap")
    keys += ("canaries",) * (data.canaries > 0)  # a set without has the hash that it always had
    return dict(format=FORMAT, sources=sources, seq_len=config.model.seq_len,
                vocab_size=config.model.vocab_size,
                tokenizer=name if known else load_tokenizer(
                    tokenizer_file(data), data.tokenizer_sha256).spec()["sha256"],
                **{k: getattr(data, k) for k in keys})


def make(corpora: list[Corpus], recipe: dict, work: Work, out: Path) -> dict:
    """Fill a folder with the data set; return its manifest."""
    config, data = work.config, work.config.data
    parts = [hold_out(corpus, index, work) for index, corpus in enumerate(corpora)]
    per_chunk = shares(config, [part.rows(0, work) for part in parts])
    check_shares(parts, per_chunk, work)
    for part, n in zip(parts, per_chunk, strict=True):
        # FIM is drawn anew in each epoch. Epochs differ by some rows: no new one for a hundredth.
        epochs = n * data.n_chunks / part.rows(0, work)
        for epoch in range(1, int(np.ceil(epochs - 0.01)) if part.corpus.source.fim_rate else 1):
            part.streams.append(tokenize(part.corpus, epoch, work))
    if data.canaries:
        from nano360.analysis.canaries import lay_out, plant
        laid = lay_out(work, sum(per_chunk))  # or refused, before all rows are dealt
    deal(parts, per_chunk, work, out)
    if data.canaries:
        plant(laid, work, out, [chunk_name(k) for k in range(data.n_chunks)])
    write_origins(parts, per_chunk, work, out)
    sources = []
    for s, (part, n) in enumerate(zip(parts, per_chunk, strict=True)):
        counts, rows, used = part.stream(0).counts, part.rows(0, work), n * data.n_chunks
        sources.append(recipe["sources"][s] | dict(
            licence=part.corpus.source.licence, notes=dict(part.corpus.notes), rows=rows,
            rows_per_chunk=n, documents=counts["documents"], bytes=counts["bytes"],
            all_tokens=counts["tokens"],
            tokens=counts["tokens"] - counts["held_tokens"] * (part.held_rows is None),
            epochs=round(used / rows, 4), valid_rows=write_held_out(s, part, work, out),
            rows_left_out=max(0, rows - used)))
    return manifest_of(recipe, work, sum(per_chunk), sources) | dict(files=file_facts(out, work))


def prepare(config: Config, options: PrepareOptions, folder: Path) -> None:
    """Make a data set, or what it still lacks."""
    data, made, part = config.data, folder.exists(), Path(f"{folder}.part")
    listings = folder / "provenance" if made else part / "work"
    corpora = [open_corpus(source, data, listings / f"{source.name}_listing.json", made)
               for source in data.sources]
    for s, corpus in enumerate(corpora):
        if not corpus.source.rows:
            order = permutation(len(corpus.files), data.seed, FILE_ORDER, s)
            corpus.files = [corpus.files[i] for i in order]
    recipe = recipe_of(config, corpora)
    digest = hash_json(recipe)[:16]
    if made:
        was = read_manifest(folder)["recipe"]
        if differs := [k for k in was | recipe if was.get(k) != recipe.get(k)]:
            raise Stop(DATA, f"{folder} holds another data set (other {', '.join(differs)}); "
                       "nothing was changed: give --dataset=NAME, here and to train.py, or remove "
                       f"{folder}")
        if not corpora[0].source.rows:
            shutil.rmtree(part, ignore_errors=True)
            say(f"{folder} is prepared already")
            return
    (work_folder := part / "work").mkdir(parents=True, exist_ok=True)
    try:
        todo = list(range(data.n_chunks))
        if corpora[0].source.rows:
            from nano360.hub.release import release, to_make
            todo = to_make(corpora[0], data.n_chunks, folder, options.chunks)
        bill(config, corpora, part, len(todo))
        tokenizer = choose_tokenizer(config, corpora, work_folder / f"{digest}.tokenizer")
        out, workers = part / digest, data.workers or os.cpu_count() or 1
        (out / "provenance").mkdir(parents=True, exist_ok=True)
        for name, content in tokenizer_files(tokenizer).items():
            (out / name).write_bytes(content)
        np.save(out / PIECE_BYTES, tokenizer.piece_bytes())
        for source in [] if made else filter(is_remote, data.sources):
            name = f"{source.name}_listing.json"
            kept = json.loads((work_folder / name).read_text(encoding="utf-8"))
            kept["files"] = [one | {"url": shown(one["url"])} for one in kept["files"]]
            write_atomic(out / "provenance" / name, json.dumps(kept))
        with (ProcessPoolExecutor(workers, get_context("spawn"), leave_with_parent)
              if workers > 1 else contextlib.nullcontext()) as pool:
            work = Work(config, part, tokenizer, out / tokenizer.file, "uint16" if
                        tokenizer.vocab_size <= 2**16 else "uint32", pool, workers)
            if corpora[0].source.rows:
                release(corpora[0], recipe, work, out, folder, todo)
            else:
                if not (out / "manifest.json.sha256").is_file():
                    write_sealed(out / "manifest.json", make(corpora, recipe, work, out))
                publish(out, folder)
    except BrokenProcessPool as error:
        raise Stop(ENVIRONMENT, "a worker was killed, perhaps for want of memory: give fewer "
                   "--workers; what is finished stays") from error
    except BaseException:
        if not any(work_folder.glob("*.json")):
            shutil.rmtree(part)
        raise
    shutil.rmtree(part)


def fetch_command(argv: list[str]) -> None:
    """--hub=REPO[@REVISION] --to=DIR [--files=PATTERN]: the one command without a run file."""
    from nano360.hub.fetch import fetch_repo
    words, given = split_words(argv, get_type_hints(HubOptions))
    if words:
        raise Stop(USAGE, f"expected --hub=REPO --to=DIR alone, got {' '.join(words)!r}")
    options = fill([HubOptions], given)[0]
    fetch_repo(options.hub, options.files, Path(options.to))


def main(argv: list[str]) -> None:
    if any(word.startswith("--hub") for word in argv):
        return fetch_command(argv)
    config, options = load(argv, PrepareOptions)
    folder = Path("data") / config.data.dataset
    if options.verify or options.stats:
        return (verify if options.verify else show)(folder, read_manifest(folder))
    if options.input is not None:
        name = re.sub("[^A-Za-z0-9_]+", "_", Path(options.input).stem).strip("_") or "text"
        own = Source(name=name, path=options.input, licence="your own")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(own,)))
    if not config.data.sources:
        raise Stop(USAGE, f"{argv[0]} names no sources; give your own text: --input=PATH")
    if options.chunks and not config.data.sources[0].rows:
        raise Stop(USAGE, f"--chunks is for a release of ready rows, {argv[0]} is none")
    with locked(folder):
        prepare(config, options, folder)
    show(folder, read_manifest(folder))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [PrepareOptions, HubOptions, *SECTIONS.values(), Source]))
