"""Stage 1: text -> tokens -> rows -> chunks, with a manifest and the way back.

    python prepare.py configs/demo.py                      # the text that every Python brings along
    python prepare.py configs/demo.py --input=novels/      # your own .txt .md .py .jsonl
    python prepare.py configs/demo.py --verify             # check every file against its hash
    python prepare.py configs/demo.py --stats              # what is in a prepared set

Documents are tokenized and end in EOS; each source is one long stream of tokens, cut into rows of
seq_len + 1. Some documents are held out. The rows of every source are dealt round-robin to n_chunks
chunks, so that all chunks have the same mix. Whatever the number of worker processes, the bytes are
the same. Reads the sources of the run file; writes data/<dataset>/, whole or not at all:

    manifest.json       what went in and what came out: tokenizer, sources, files with their sha256
    tokenizer.model     (or .tiktoken, .json) what the rows were made with
    train_000.bin ...   rows of seq_len + 1 token ids, uint16 or uint32, C order, no header
    valid_<source>.bin  held-out rows
    provenance/         the way back. <chunk>.npy: (source, epoch, row of its stream) of every row;
                        <source>_epoch_<e>.npy, <source>_held_out.npy (epoch -1): (first token of a
                        document in the stream, number of its file, line); <source>_files.json
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs import (DATA, SECTIONS, USAGE, Config, Source, Stop, key, load,
                     read_sealed, run, say, sha256_file, sync, write_sealed)
from extras.sources import (Corpus, blocks, is_held_out, no_documents, open_corpus, pieces,
                            sample_text)
from extras.tokenizer_json import JsonTokenizer

FORMAT = 1  # of data/<dataset>/: readers refuse another
BATCH = 1 << 20  # characters sent to a worker at once
MAX_EPOCHS = 100  # a source repeated more often than this is a mistake in the numbers
HELD_OUT = -1  # the "epoch" of held-out rows in the provenance tables
FILE_ORDER, HELD_ORDER = 2**32 - 1, 2**32 - 2  # permutations that are no epoch's
EOT = "<|endoftext|>"  # what tiktoken calls EOS
KINDS = {".model": "sentencepiece", ".tiktoken": "tiktoken", ".json": JsonTokenizer.kind}
# How tiktoken cuts text before merging: the pattern of cl100k_base, for ranks that come as a file.
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    input: str | None = key("your own text instead of the sources: a file or folder of "
                            ".txt .md .py .jsonl", None, pattern=".+")
    verify: bool = key("check a prepared set instead of making one", False)
    stats: bool = key("show what is in a prepared set instead of making one", False)


def permutation(n: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """The order (n,) int64 of n things: a pure function that no library release changes.

    Philox is specified to the bit (Salmon et al. 2011) and a stable argsort leaves no choice.
    """
    bits = np.random.Philox(key=seed << 64 | epoch << 32 | chunk)
    return np.argsort(bits.random_raw(n), kind="stable")


# ---- tokenizers ----------------------------------------------------------------------------------

class Tokenizer:
    """Text <-> token ids, by sentencepiece (.model) or tiktoken (.tiktoken, a file of ranks).

    Text is only ever text: "</s>" inside a document becomes ordinary pieces, not the end of it.
    """

    def __init__(self, kind: str, data: bytes, spec: dict):
        self.kind, self.data = kind, data
        self.file = "tokenizer.tiktoken" if kind == "tiktoken" else "tokenizer.model"
        self.add_bos = False
        if kind == "tiktoken":
            import tiktoken
            pairs = [line.split() for line in data.splitlines() if line]
            ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            if [*ranks.values()] != [*range(len(pairs))] or not {bytes([b]) for b in range(256)
                                                                 } <= ranks.keys():
                raise ValueError("its ranks do not count from 0, or lack some single bytes")
            self.ranks = ranks  # token -> id, in the order of the ids
            self.pattern = spec.get("pattern", PATTERN)
            self.special_tokens = spec.get("special_tokens", {EOT: len(ranks)})
            self.bos, self.eos = None, self.special_tokens[EOT]
            self.coder = tiktoken.Encoding("ranks", pat_str=self.pattern, mergeable_ranks=ranks,
                                           special_tokens=self.special_tokens)
            self.vocab_size = self.coder.n_vocab
        else:
            import sentencepiece
            self.coder = sentencepiece.SentencePieceProcessor(model_proto=data)
            # The same model without the blank in front of each text, for the later pieces of a long
            # one. A second normalizer_spec (field 3) with add_dummy_prefix = 0 (its field 3): a
            # reader of protocol buffers merges the two, and the last value holds.
            self.later = sentencepiece.SentencePieceProcessor(
                model_proto=data + b"\x1a\x02\x18\x00")
            self.vocab_size = self.coder.vocab_size()
            self.bos, self.eos = (i if i >= 0 else None
                                  for i in (self.coder.bos_id(), self.coder.eos_id()))
            self.special_tokens = {self.coder.id_to_piece(i): i for i in range(self.vocab_size)
                                   if self.coder.is_control(i)}
        if self.eos is None:
            raise ValueError("it has no end-of-text token")

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, with neither BOS nor EOS."""
        return [i for n, part in enumerate(blocks([text]))
                for i in self.encode_piece(part, first=n == 0)]

    def encode_piece(self, text: str, first: bool) -> list[int]:
        """The ids of a piece of a document, which is its first one or follows another."""
        if self.kind == "tiktoken":
            return self.coder.encode_ordinary(text)
        return (self.coder if first else self.later).encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; what is no UTF-8 becomes U+FFFD."""
        return self.coder.decode([int(i) for i in ids])

    def piece_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, (vocab_size,) int64, for bits per byte.

        A leading blank (the mark of sentencepiece) is one byte, a byte piece is one, EOS none.
        """
        sizes = np.zeros(self.vocab_size, np.int64)
        if self.kind == "tiktoken":
            sizes[:len(self.ranks)] = [len(token) for token in self.ranks]
            return sizes
        for i in range(self.vocab_size):
            if self.coder.is_byte(i):
                sizes[i] = 1
            elif not self.coder.is_control(i) and not self.coder.is_unknown(i):
                sizes[i] = len(self.coder.id_to_piece(i).replace("▁", " ").encode())
        return sizes

    def spec(self) -> dict:
        """What the manifest says of it."""
        spec = {name: getattr(self, name) for name in
                ("kind", "file", "vocab_size", "bos", "eos", "special_tokens")}
        spec["sha256"] = hashlib.sha256(self.data).hexdigest()
        return spec | ({"pattern": self.pattern} if self.kind == "tiktoken" else {})

    def name_of(self, special: int | None) -> str | None:
        """The text of a special token's id."""
        return next((text for text, i in self.special_tokens.items() if i == special), None)


@functools.lru_cache(maxsize=4)
def build_tokenizer(kind: str, data: bytes, spec: str) -> Tokenizer | JsonTokenizer:
    return (JsonTokenizer(data, json.loads(spec)) if kind == JsonTokenizer.kind
            else Tokenizer(kind, data, json.loads(spec)))


def read_tokenizer(file: str, spec: str) -> Tokenizer | JsonTokenizer:
    """The tokenizer of a file; `spec` is json of what the file cannot say. Raises Stop(DATA)."""
    try:
        return build_tokenizer(KINDS[Path(file).suffix], Path(file).read_bytes(), spec)
    except (ValueError, RuntimeError, KeyError) as error:  # base64, int(), sentencepiece
        raise Stop(DATA, f"tokenizer {file} is truncated or of another kind: {error}") from error


def load_tokenizer(path: str | Path, sha256: str = "") -> Tokenizer | JsonTokenizer:
    """The tokenizer of a file, or of a data set's or checkpoint's folder. Raises Stop(DATA).

    In a folder, tokenizer_config.json says whether BOS is put in front, as in Hugging Face's.
    """
    file, config, spec = Path(path), {}, {}
    if file.is_dir():
        if (file / "tokenizer_config.json").is_file():
            try:
                config = json.loads((file / "tokenizer_config.json").read_text(encoding="utf-8"))
                spec = config.get("nano360", {}) | config
            except (ValueError, AttributeError, TypeError) as error:
                raise Stop(DATA, f"{file}/tokenizer_config.json is broken: {error}") from error
        elif (file / "manifest.json").is_file():
            spec = json.loads((file / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
        names = [n for n in map("tokenizer{}".format, KINDS) if (file / n).is_file()]
        if not names:
            raise Stop(DATA, f"{path} has no tokenizer{', '.join(KINDS)}: give --tokenizer=FILE")
        file = file / names[0]
    if not file.is_file() or file.suffix not in KINDS:
        what = f"is none of {', '.join(KINDS)}" if file.is_file() else "not found"
        expected = f" with sha256 {sha256}" if sha256 else ""
        raise Stop(DATA, f"tokenizer {path} {what}; expected a sentencepiece model, tiktoken "
                   f"ranks or a tokenizer.json{expected}; a published checkpoint of the family has "
                   "it as tokenizer.model or tokenizer.json: give --tokenizer=FILE")
    if sha256 and sha256_file(file) != sha256:
        raise Stop(DATA, f"tokenizer {file} is another than was named: its sha256 is "
                   f"{sha256_file(file)}, expected {sha256}")
    tokenizer = copy(read_tokenizer(str(file), json.dumps(spec)))
    if file.suffix != ".json":  # which says itself whether, unless the spec does
        llama = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
        tokenizer.add_bos = tokenizer.bos is not None and bool(config.get("add_bos_token", llama))
    return tokenizer


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


# ---- documents -> rows -> chunks -----------------------------------------------------------------

def batches(found: Iterator[tuple]) -> Iterator[list[tuple]]:
    """Pieces of documents in batches that are worth sending to a worker."""
    batch, size = [], 0
    for piece in found:
        batch.append(piece)
        size += len(piece[2])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(file: str, spec: str, dtype: str,
                 batch: list[tuple]) -> tuple[bytes, list[int]]:
    """What a worker does: the token ids of a batch as bytes, and how many ids each piece gave."""
    coder, ids, counts = read_tokenizer(file, spec), [], []
    for _, _, text, first, last in batch:
        ids += (new := coder.encode_piece(text, first) + [coder.eos] * last)
        counts.append(len(new))
    return np.array(ids, dtype).tobytes(), counts  # an id too large for dtype raises


def ordered(pool: ProcessPoolExecutor, work: Callable, jobs: Iterator, ahead: int) -> Iterator:
    """(job, work(job)) in the order of the jobs, at most `ahead` of them under way."""
    waiting: collections.deque = collections.deque()
    for job in itertools.chain(jobs, [None] * ahead):
        if job is not None:
            waiting.append((job, pool.submit(work, job)))
        if waiting and (len(waiting) > ahead or job is None):
            done, future = waiting.popleft()
            yield done, future.result()


def tokenize(corpus: Corpus, config: Config, tokenizer: Tokenizer, dtype: str, stream: Path,
             pool: ProcessPoolExecutor, workers: int) -> np.ndarray:
    """Write a source's tokens to the file `stream`; return the table of its documents.

    The table is (documents, 3) int64: first token in the stream, number of the file, line.
    """
    file, spec = stream.parent / tokenizer.file, tokenizer.spec()
    work = functools.partial(encode_batch, str(file), json.dumps(spec), dtype)
    table, at = [], 0
    with open(stream, "wb") as out, tqdm(desc=f"tokenize {corpus.source.name}", unit="B",
                                         unit_scale=True, disable=None) as bar:
        jobs = batches(pieces(corpus, config.data, list(tokenizer.special_tokens)))
        for batch, (ids, counts) in ordered(pool, work, jobs, 2 * workers):
            out.write(ids)
            for (number, line, text, first, _), count in zip(batch, counts, strict=True):
                if first:
                    table.append((at, number, line))
                at += count
                bar.update(len(text))
    if not table:
        raise no_documents(corpus)
    return np.array(table, np.int64)


def open_tokens(path: Path, dtype: str) -> np.ndarray:
    """The tokens of a stream's file, (tokens,); mapped, not read."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@dataclass
class Part:
    """A stream of tokens, its documents, and those of its rows that are used."""
    tokens: np.ndarray  # (tokens,)
    docs: np.ndarray  # (documents, 3): first token, number of the file, line
    rows: np.ndarray  # (rows,) int64


def hold_out(corpus: Corpus, index: int, config: Config, stream: Path, dtype: str,
             docs: np.ndarray) -> tuple[Part, Part]:
    """Part a source's stream into training and held-out rows.

    Whole documents where there are 100 or more; else single rows of the one stream.
    """
    data, T1, name = config.data, config.model.seq_len + 1, corpus.source.name
    tokens = open_tokens(stream, dtype)
    if len(docs) < 100:
        n = len(tokens) // T1
        n_valid = min(data.valid_rows, int(np.ceil(n * data.valid_share)), n - 1)
        shuffled = permutation(n, data.seed, HELD_ORDER, index)
        return (Part(tokens, docs, np.sort(shuffled[max(0, n_valid):])),
                Part(tokens, docs, np.sort(shuffled[:max(0, n_valid)])))
    held = np.array([is_held_out(data, name, corpus.files[number][0], line)
                     for _, number, line in docs])
    ends, parts = np.append(docs[1:, 0], len(tokens)), []
    for side, chosen in (("train", ~held), ("valid", held)):
        table, path, at = docs[chosen], stream.with_suffix(f".{side}.stream"), 0
        with open(path, "wb") as out:
            for i, (start, end) in enumerate(zip(docs[chosen, 0], ends[chosen], strict=True)):
                out.write(tokens[start:end].tobytes())
                table[i, 0], at = at, at + end - start
        parts.append(Part(open_tokens(path, dtype), table, np.arange(at // T1)))
    parts[1].rows = parts[1].rows[:data.valid_rows]
    return parts[0], parts[1]


def shares(config: Config, available: list[int]) -> list[int]:
    """Rows per chunk of every source: by weight if the chunk's size is given, else one pass."""
    data = config.data
    if data.rows_per_chunk is None:
        return [n // data.n_chunks for n in available]
    weights = np.array([source.weight for source in data.sources])
    exact = data.rows_per_chunk * weights / weights.sum()
    rows = np.floor(exact).astype(int)  # the largest remainders get the rows that are left
    rows[np.argsort(rows - exact, kind="stable")[:data.rows_per_chunk - rows.sum()]] += 1
    return rows.tolist()


def write_rows(path: Path, picks: list[tuple[Part, np.ndarray]], T1: int, dtype: str) -> None:
    """Write rows of T1 tokens, those of one part after those of the other."""
    with open(path, "wb") as out:
        for part, rows in picks:
            grid = part.tokens[:len(part.tokens) // T1 * T1].reshape(-1, T1)
            for at in range(0, len(rows), 4096):  # in bounded memory
                out.write(np.ascontiguousarray(grid[rows[at:at + 4096]], dtype).tobytes())


def deal(config: Config, folder: Path, parts: list[tuple[Part, Part]], dtype: str) -> list[dict]:
    """Write the chunks, the held-out rows and their provenance -> per source, what became of it.

    Training row i of a source is row i % n of its stream in epoch i // n, and goes to chunk i % N.
    """
    data, T1 = config.data, config.model.seq_len + 1
    per_chunk = shares(config, [len(train.rows) for train, _ in parts])
    for source, (train, _), n in zip(data.sources, parts, per_chunk, strict=True):
        if not n and len(train.rows) >= data.n_chunks:
            raise Stop(DATA, f"source {source.name} gets 0 of {data.rows_per_chunk} rows a chunk "
                       f"by its weight {source.weight:g}; give it more, or raise --rows_per_chunk")
        if not n or not len(train.rows):
            raise Stop(DATA, f"source {source.name} has {len(train.tokens)} tokens, "
                       f"{len(train.rows)} rows of {T1}: too few for {data.n_chunks} chunks; give "
                       "more text, or a smaller --n_chunks or --seq_len")
        if (epochs := n * data.n_chunks / len(train.rows)) > MAX_EPOCHS:
            raise Stop(DATA, f"source {source.name} has {len(train.rows)} rows and would be "
                       f"repeated {epochs:,.0f} times, the limit is {MAX_EPOCHS}; give more text "
                       "or a smaller --rows_per_chunk")
    way = folder / "provenance"
    for k in tqdm(range(data.n_chunks), desc="chunks", disable=None):
        picks, origin = [], []
        for s, ((train, _), n) in enumerate(zip(parts, per_chunk, strict=True)):
            i = np.arange(n) * data.n_chunks + k
            rows = train.rows[i % len(train.rows)]
            picks.append((train, rows))
            origin.append(np.stack([np.full(n, s), i // len(train.rows), rows], axis=1))
        write_rows(folder / chunk_name(k), picks, T1, dtype)
        np.save(way / f"{chunk_name(k)}.npy", np.concatenate(origin))
    facts = []
    for s, (source, (train, valid)) in enumerate(zip(data.sources, parts, strict=True)):
        write_rows(folder / valid_name(source.name), [(valid, valid.rows)], T1, dtype)
        origin = [np.full(len(valid.rows), s), np.full(len(valid.rows), HELD_OUT), valid.rows]
        np.save(way / f"{valid_name(source.name)}.npy", np.stack(origin, axis=1))
        used, n_rows = per_chunk[s] * data.n_chunks, len(train.rows)
        for epoch in range(-(-used // n_rows)):
            np.save(way / f"{source.name}_epoch_{epoch}.npy", train.docs)
        np.save(way / f"{source.name}_held_out.npy", valid.docs)
        facts.append(dict(tokens=len(train.tokens), rows=n_rows, rows_per_chunk=per_chunk[s],
                          epochs=round(used / n_rows, 4), valid_rows=len(valid.rows),
                          rows_left_out=max(0, n_rows - used)))
    return facts


# ---- the data set as its readers see it ----------------------------------------------------------

def chunk_name(k: int) -> str:
    return f"train_{k:03d}.bin"


def valid_name(source: str) -> str:
    return f"valid_{source}.bin"


def read_manifest(folder: Path) -> dict:
    """The manifest of a prepared set, its seal checked. Raises Stop(DATA) if there is none."""
    if not folder.is_dir():
        raise Stop(DATA, f"{folder} not found here; make it first: python prepare.py CONFIG "
                   f"--dataset={folder.name}, or run in the folder that holds data/")
    manifest = read_sealed(folder / "manifest.json", DATA)
    if manifest["format"] != FORMAT:
        raise Stop(DATA, f"{folder} has format {manifest['format']}, this code reads {FORMAT}")
    return manifest


def open_rows(folder: Path, manifest: dict, name: str) -> np.ndarray:
    """The rows of a chunk, (rows, seq_len + 1), mapped from the file after it was checked.

    Checked are size, sha256, and that every id is one of the tokenizer's: a wrong id would
    otherwise end in the embedding, far from its cause. Raises Stop(DATA).
    """
    path, entry = folder / name, manifest["files"].get(name)
    if entry is None or not path.is_file():
        raise Stop(DATA, f"{path} is missing; make it: python prepare.py CONFIG "
                   f"--dataset={folder.name}")
    dtype, T1 = np.dtype(manifest["dtype"]), manifest["seq_len"] + 1
    size, expected = path.stat().st_size, entry["rows"] * T1 * dtype.itemsize
    if size != expected:
        raise Stop(DATA, f"{path} has {size} bytes, expected {expected} ({entry['rows']} rows of "
                   f"{T1} {dtype}); prepare it again")
    if (digest := sha256_file(path)) != entry["sha256"]:
        raise Stop(DATA, f"{path} was changed: its sha256 is {digest}, the manifest says "
                   f"{entry['sha256']}; see python prepare.py CONFIG --verify")
    rows = open_tokens(path, dtype).reshape(-1, T1)
    limit = manifest["tokenizer"]["vocab_size"]
    if rows.size and (top := int(rows.max())) >= limit:
        at = int(rows.argmax())
        raise Stop(DATA, f"{path}: id {top} at row {at // T1}, token {at % T1} (byte "
                   f"{at * dtype.itemsize}), but the tokenizer has {limit} ids; prepare it again")
    return rows


def show(folder: Path, manifest: dict) -> None:
    """Print what is in a prepared set."""
    print(f"{folder}: {manifest['n_chunks']} chunks of {manifest['rows_per_chunk']} rows of "
          f"{manifest['seq_len'] + 1} tokens, {manifest['dtype']}, "
          f"tokenizer of {manifest['tokenizer']['vocab_size']}")
    print(f"{'source':<12} {'documents':>9} {'MB':>7} {'tokens':>11} {'B/token':>7} "
          f"{'rows/chunk':>10} {'share':>6} {'epochs':>6} {'valid rows':>10}  licence")
    for one in manifest["sources"]:
        share = one["rows_per_chunk"] / manifest["rows_per_chunk"]
        print(f"{one['name']:<12} {one['documents']:>9,} {one['bytes'] / 1e6:>7.2f} "
              f"{one['all_tokens']:>11,} {one['bytes'] / one['all_tokens']:>7.2f} "
              f"{one['rows_per_chunk']:>10,} {share:>6.1%} {one['epochs']:>6.2f} "
              f"{one['valid_rows']:>10}  {one['licence']}")
        if one["notes"]:
            print(" " * 12, "noticed:", ", ".join(f"{k} {v:,}" for k, v in one["notes"].items()))


def verify(folder: Path, manifest: dict) -> None:
    """Compare every file with its hash and size. Raises Stop(DATA) at the first that differs."""
    for name in tqdm(manifest["files"], desc="verify", disable=None):
        if name.endswith(".bin"):
            open_rows(folder, manifest, name)
        elif not (folder / name).is_file() or (
                sha256_file(folder / name) != manifest["files"][name]["sha256"]):
            raise Stop(DATA, f"{folder / name} is missing or was changed; prepare it again")
    print(f"{folder}: all {len(manifest['files'])} files are as the manifest says")


# ---- making one ----------------------------------------------------------------------------------

def choose_tokenizer(config: Config, corpora: list[Corpus]) -> Tokenizer:
    """The tokenizer the run file asks for: trained here, tiktoken's by name, or a file."""
    data, name = config.data, config.data.tokenizer
    if name == "bpe":
        say(f"training a tokenizer of {config.model.vocab_size} pieces")
        texts = (t for corpus in corpora for t in sample_text(corpus, data))
        return Tokenizer("sentencepiece", train_tokenizer(texts, config.model.vocab_size), {})
    if name.startswith("tiktoken:"):
        import tiktoken
        try:
            coder = tiktoken.get_encoding(name.removeprefix("tiktoken:"))
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise Stop(DATA, f"--tokenizer={name}: {reason}; give a .tiktoken file") from error
        ranks = b"".join(base64.b64encode(token) + b" %d\n" % rank
                         for token, rank in coder._mergeable_ranks.items())
        spec = dict(pattern=coder._pat_str, special_tokens=coder._special_tokens)
        return Tokenizer("tiktoken", ranks, spec)
    return load_tokenizer(name, data.tokenizer_sha256)


def recipe_of(config: Config, corpora: list[Corpus]) -> dict:
    """All that the bytes of a data set follow from; its hash is the data hash."""
    data, name = config.data, config.data.tokenizer
    known = name == "bpe" or name.startswith("tiktoken:")
    sources = [dict(name=c.source.name, weight=c.source.weight, revision=c.revision,
                    origin=c.source.path if c.kind != "text" else Path(c.source.path).name)
               for c in corpora]
    keys = ("n_chunks", "rows_per_chunk", "valid_share", "valid_rows", "seed", "text_key",
            "encoding")
    return dict(format=FORMAT, sources=sources, seq_len=config.model.seq_len,
                vocab_size=config.model.vocab_size,
                tokenizer=name if known else load_tokenizer(
                    name, data.tokenizer_sha256).spec()["sha256"],
                **{k: getattr(data, k) for k in keys})


def make(config: Config, corpora: list[Corpus], recipe: dict, folder: Path) -> dict:
    """Fill an empty folder with the data set; return its manifest."""
    data, tokenizer = config.data, choose_tokenizer(config, corpora)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise Stop(DATA, f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, vocab_size "
                   f"is {config.model.vocab_size}: give --vocab_size={tokenizer.vocab_size}")
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    (folder / tokenizer.file).write_bytes(tokenizer.data)
    (folder / "provenance").mkdir()
    workers, parts, sources = data.workers or os.cpu_count() or 1, [], []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for index, corpus in enumerate(corpora):
            name = corpus.source.name
            stream = folder / f"{index}.stream"
            docs = tokenize(corpus, config, tokenizer, dtype, stream, pool, workers)
            parts.append(hold_out(corpus, index, config, stream, dtype, docs))
            (folder / "provenance" / f"{name}_files.json").write_text(
                json.dumps([file for file, _ in corpus.files]), encoding="utf-8")
            sources.append(recipe["sources"][index] | dict(
                licence=corpus.source.licence, documents=len(docs),
                bytes=corpus.notes.pop("bytes"), notes=dict(corpus.notes), fim_rate=0.0,
                all_tokens=len(open_tokens(stream, dtype))))
    sources = [one | fact for one, fact in
               zip(sources, deal(config, folder, parts, dtype), strict=True)]
    for stream in folder.glob("*.stream"):
        stream.unlink()
    row_bytes = (config.model.seq_len + 1) * np.dtype(dtype).itemsize
    files = {path.relative_to(folder).as_posix(): dict(sha256=sha256_file(path)) | (
        dict(rows=path.stat().st_size // row_bytes) if path.suffix == ".bin" else {})
        for path in sorted(folder.rglob("*")) if path.is_file()}
    # Another release of sentencepiece may train another tokenizer from the same recipe.
    whole = json.dumps(recipe | {"sha256": tokenizer.spec()["sha256"]}, sort_keys=True)
    return dict(
        format=FORMAT, data_hash=hashlib.sha256(whole.encode()).hexdigest(), recipe=recipe,
        tokenizer=tokenizer.spec(), seq_len=config.model.seq_len, dtype=dtype, seed=data.seed,
        n_chunks=data.n_chunks, rows_per_chunk=sum(one["rows_per_chunk"] for one in sources),
        sources=sources, files=files)


def main(argv: list[str]) -> None:
    config, options = load(argv, PrepareOptions)
    folder = Path("data") / config.data.dataset
    if options.verify or options.stats:
        manifest = read_manifest(folder)
        return verify(folder, manifest) if options.verify else show(folder, manifest)
    if options.input is not None:
        name = re.sub("[^A-Za-z0-9_]+", "_", Path(options.input).stem).strip("_") or "text"
        own = Source(name=name, path=options.input, licence="your own")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(own,)))
    if not config.data.sources:
        raise Stop(USAGE, f"{argv[0]} names no sources; give your own text: --input=PATH")
    corpora = [open_corpus(source, config.data) for source in config.data.sources]
    for index, corpus in enumerate(corpora):
        order = permutation(len(corpus.files), config.data.seed, FILE_ORDER, index)
        corpus.files = [corpus.files[i] for i in order]
    recipe = recipe_of(config, corpora)
    if folder.exists():
        manifest = read_manifest(folder)
        differs = [k for k in recipe if manifest["recipe"].get(k) != recipe[k]]
        if differs:
            raise Stop(DATA, f"{folder} holds another data set (other {', '.join(differs)}); "
                       "nothing was changed: give --dataset=NAME, here and to train.py, or remove "
                       f"{folder}")
        say(f"{folder} is prepared already")
        return show(folder, manifest)
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed preparation left
    part.mkdir(parents=True)
    try:
        manifest = make(config, corpora, recipe, part)
        write_sealed(part / "manifest.json", manifest)
        for path in part.rglob("*"):
            sync(path)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(folder.parent)
    show(folder, manifest)


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [PrepareOptions, *SECTIONS.values()]))
