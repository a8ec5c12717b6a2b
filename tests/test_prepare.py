"""prepare.py: rows lead back to their text, the bytes follow from the recipe alone, and what is
wrong with an input or a prepared set is said in one line.

Where a test needs to know what is right, it works that out its own way: with sentencepiece and
tiktoken themselves, with ast, with Philox from its paper.
"""

import ast
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nano360.files
import prepare
import soak_prepare
from nano360 import sources, tokenizers, tokens
from nano360.config import CHECKPOINT, DATA, SECTIONS, USAGE, DataConfig, Source, Stop, run
from nano360.files import is_locked, sha256_file, write_sealed
from nano360.rows import open_rows, permutation, read_manifest
from nano360.tokenizer_json import tokenizer_files
from nano360.tokenizers import Tokenizer, load_tokenizer
from nano360.tokens import Writer

REPO = Path(prepare.__file__).parent
DEMO = REPO / "configs" / "demo.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
HELD_OUT = -1
SMALL = dict(vocab_size=300, seq_len=16, n_chunks=2, rows_per_chunk="none", workers=1)
EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True,
                    suppress_health_check=list(HealthCheck))


# ---- what the tests are made with ----------------------------------------------------------------

def prepare_here(run_file: Path = DEMO, **options) -> int:
    """prepare.py's exit code in the folder we are in, for a small set unless told otherwise."""
    argv = [str(run_file)] + [f"--{k}={v}" for k, v in (SMALL | options).items()]
    return run(prepare.main, prepare.__doc__, [prepare.PrepareOptions, *SECTIONS.values()],
                       argv)


def files_of(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder: name -> content, None for a folder."""
    return {p.relative_to(root).as_posix(): None if p.is_dir() else p.read_bytes()
            for p in sorted(root.rglob("*"))}


def write(root: Path, files: dict[str, bytes | str]) -> None:
    """Write files below a folder that this makes."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def story(words: int, seed: int) -> str:
    """Text of words with blanks, indents and line breaks between them."""
    dice = random.Random(seed)
    parts = [a + b for a in ("ba", "do", "ki", "mu", "re", "zö") for b in ("", "n", "st", "l")]
    gaps = [" "] * 12 + ["\n", "  ", "\n    ", ", "]
    return "".join("".join(dice.choices(parts, k=dice.randint(1, 3))) + dice.choice(gaps)
                   for _ in range(words))


def make_text(root: Path, documents: int) -> None:
    """A folder of .jsonl, .txt and .md files with so many documents, blank ones not counted."""
    lines = [json.dumps(dict(id=i, text=story(40 + 9 * (i % 7), i)), ensure_ascii=i % 2 > 0)
             for i in range(documents - 3)]
    lines[5:5] = ["", json.dumps(dict(text=" \n "))]  # no line, and a blank document
    half = len(lines) // 2
    write(root, {"b/first.jsonl": "\n".join(lines[:half]), "a.txt": story(90, 1001),
                 "second.jsonl": "\n".join(lines[half:]) + "\n", "b/long.md": story(4000, 1002),
                 "z.txt": "\n\n    " + story(50, 1003), "blank.txt": " \n", "not_ours.csv": "x,y"})


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A sentencepiece model of 300 pieces."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(prepare.train_tokenizer(iter([story(5000, 7)]), 300))
    return path


def ranks(merges: list[bytes]) -> bytes:
    """A .tiktoken file: the 256 bytes, then the merges."""
    tokens = [bytes([i]) for i in range(256)] + merges
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))


MERGES = [b"th", b"the", b"12", b"34", b"1234", b"  ", b"    ", b" t", b" the", b" a", b"in",
          b"ing", "é".encode(), b"aa", b"aaa", b"aaaa", b"\n\n", b"</", b"s>", b"\r\n", b".\n"]


@pytest.fixture(scope="module")
def ranks_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "made.tiktoken"
    path.write_bytes(ranks(MERGES))
    return path


@pytest.fixture(scope="module")
def many_ranks_file(tmp_path_factory) -> Path:
    """66,000 ranks: all bytes, all pairs of them, and some threes, "ban" the very last."""
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    threes = [b"ba" + bytes([i]) for i in range(256) if i != ord("n")][:207] + [b"ban"]
    path = tmp_path_factory.mktemp("ranks") / "many.tiktoken"
    path.write_bytes(ranks(pairs + threes))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A small prepared set of 130 documents; copy it before changing it."""
    root = tmp_path_factory.mktemp("small")
    make_text(root / "text", 130)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert prepare_here(input="text", dataset="small") == 0
    return root / "data" / "small"


@pytest.fixture
def copied(small, tmp_path, monkeypatch) -> Path:
    """A copy of the small set to be changed: data/small in the folder we are in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small, "data/small")
    return Path("data/small")


@pytest.fixture(scope="module")
def llama(shared) -> Tokenizer:
    """LLaMA's own tokenizer."""
    path = shared / "tokenizer" / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip("no llama_tokenizer.model in ../shared/data/tokenizer")
    return load_tokenizer(path)


# ---- order ---------------------------------------------------------------------------------------

def philox(n: int, seed: int, epoch: int, chunk: int) -> list[int]:
    """n words of Philox4x64-10 as its paper says (Salmon et al. 2011), counted from 1."""
    mask, words = 2**64 - 1, []
    for count in range(1, -(-n // 4) + 1):
        c, k = [count, 0, 0, 0], [epoch << 32 | chunk, seed]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [b >> 64 ^ c[1] ^ k[0], b & mask, a >> 64 ^ c[3] ^ k[1], a & mask]
            k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
        words += c
    return words[:n]


def order(n: int, seed: int, epoch: int, chunk: int) -> list[int]:
    """permutation() without numpy."""
    words = philox(n, seed, epoch, chunk)
    return sorted(range(n), key=words.__getitem__)


@pytest.mark.parametrize("n, seed, epoch, chunk", [
    (0, 0, 0, 0), (1, 1, 2, 3), (10, 1337, 0, 0), (1025, 11111, 3, 359), (7, 2**32 - 1, 1, 2),
    (257, 1337, 2**32 - 1, 0), (257, 1337, 2**32 - 2, 1), (64, 5, 0, 2**32 - 1)])
def test_permutation_is_philox_and_argsort(n, seed, epoch, chunk):
    found = permutation(n, seed, epoch, chunk)
    assert found.dtype == np.int64 and found.tolist() == order(n, seed, epoch, chunk)
    assert sorted(found.tolist()) == list(range(n))


def test_permutation_never_changes():
    """Written down, so that a library that changes is noticed: runs could not be repeated."""
    assert permutation(10, 1337, 0, 0).tolist() == [0, 6, 7, 9, 3, 2, 8, 5, 4, 1]
    assert permutation(10, 1337, 0, 1).tolist() == [2, 9, 5, 0, 4, 7, 6, 8, 1, 3]


def test_permutation_differs_by_seed_epoch_and_chunk():
    keys = [(s, e, c) for s in (0, 1, 2**32 - 1) for e in (0, 1, 2**32 - 1)
            for c in (0, 1, 2**32 - 1)]
    assert len({tuple(permutation(50, *key).tolist()) for key in keys}) == len(keys)


# ---- the demo, row by row ------------------------------------------------------------------------

def is_prose(name: str) -> bool:
    """Which half of the standard library a file is in."""
    odd = hashlib.sha256(name.encode()).hexdigest()[1] in "13579bdf"
    return odd or name == "pydoc_data/topics.py"


def docstrings(node: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of the docstrings in a tree, in the order of their lines."""
    body, found = getattr(node, "body", []), []
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
        text = getattr(getattr(body[0], "value", None), "value", None)
        if isinstance(body[0], ast.Expr) and isinstance(text, str) and inspect.cleandoc(text):
            found = [(body[0].lineno, inspect.cleandoc(text))]
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        found += [one for child in getattr(node, block, []) for one in docstrings(child)]
    return found


def is_utf8(text: str) -> bool:
    """No lone surrogates in it."""
    return text.encode(errors="ignore").decode() == text


@functools.cache
def library(name: str) -> dict[int, str]:
    """The documents of a file of the standard library: line -> text."""
    text = (STDLIB / name).read_bytes().decode()
    if not is_prose(name):
        found = {1: text.removeprefix("\ufeff")}
    elif name == "pydoc_data/topics.py":
        from pydoc_data.topics import topics
        entries = next(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Dict))
        found = {value.lineno: topics[entry.value]
                 for entry, value in zip(entries.keys, entries.values, strict=True)}
    else:
        docs = docstrings(ast.parse(text))
        found = {docs[0][0]: "\n\n".join(doc for _, doc in docs)} if docs else {}
    return {line: doc.replace("\r\n", "\n") if is_utf8(doc) else "".join(
                c if is_utf8(c) else "\ufffd" for c in doc.replace("\r\n", "\n"))
            for line, doc in found.items() if doc.strip()}


@dataclasses.dataclass
class Stream:
    """What a source's tokens should be in one epoch, or held out."""
    docs: list[tuple[str, int]]  # file, line
    starts: np.ndarray
    tokens: np.ndarray

    def row(self, i: int | slice) -> np.ndarray:
        return self.tokens[:len(self.tokens) // 257 * 257].reshape(-1, 257)[i]


@pytest.fixture(scope="module")
def truth(demo) -> dict[tuple[int, int], Stream]:
    """(source, epoch) -> the stream, from the provenance tables and the files they name."""
    coder = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    streams = {}
    for s, name in enumerate(("code", "prose")):
        files = json.loads((demo / f"provenance/{name}_files.json").read_text())
        tables = {int(p.stem.rpartition("_")[2]): np.load(p)
                  for p in (demo / "provenance").glob(f"{name}_epoch_*.npy")}
        tables[HELD_OUT] = np.load(demo / f"provenance/{name}_held_out.npy")
        places = sorted({(files[f], int(line)) for t in tables.values() for _, f, line in t})
        texts = [library(file)[line] for file, line in places]
        coded = [np.array(ids + [2], np.uint16) for ids in coder.encode(texts, num_threads=2)]
        ids = dict(zip(places, coded, strict=True))
        for epoch, table in tables.items():
            docs = [(files[f], int(line)) for _, f, line in table]
            sizes = [len(ids[doc]) for doc in docs]
            streams[s, epoch] = Stream(docs, np.cumsum([0] + sizes[:-1]),
                                       np.concatenate([ids[doc] for doc in docs]))
            assert np.array_equal(table[:, 0], streams[s, epoch].starts)
    return streams


def bins(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, rows, origin of each row) of every file of rows, read without prepare.py."""
    names = sorted(p.name for p in folder.glob("*.bin"))
    T1 = json.loads((folder / "manifest.json").read_text())["seq_len"] + 1
    return [(name, np.fromfile(folder / name, np.uint16).reshape(-1, T1),
             np.load(folder / "provenance" / f"{name}.npy")) for name in names]


def test_every_row_of_the_demo_is_where_it_says(demo, truth):
    found = bins(demo)
    assert [name for name, _, _ in found] == [f"train_00{k}.bin" for k in range(8)] + [
        "valid_code.bin", "valid_prose.bin"]
    for name, rows, origin in found:
        assert rows.shape[1] == 257 and len(rows) == len(origin)
        assert len(rows) == 1024 or name.startswith("valid")
        for (s, epoch), stream in truth.items():
            mine = (origin[:, 0] == s) & (origin[:, 1] == epoch)
            assert np.array_equal(rows[mine], stream.row(origin[mine, 2]))
        assert {tuple(key) for key in origin[:, :2].tolist()} <= truth.keys()


def test_every_row_of_the_demo_decodes_to_its_text(demo, truth):
    """Between two ends of text, what our tokenizer decodes stands in the document named."""
    tokenizer = load_tokenizer(demo)
    coder = sentencepiece.SentencePieceProcessor(model_file=str(demo / "tokenizer.model"))
    seen = 0
    for _, rows, origin in bins(demo):
        whole = coder.decode(rows.tolist())
        for row, (s, epoch, i), text in zip(rows, origin.tolist(), whole, strict=True):
            stream = truth[s, epoch]
            assert tokenizer.decode(row) == text == coder.decode(stream.row(i).tolist())
            at = int(np.searchsorted(stream.starts, i * 257, side="right")) - 1
            for k, ids in enumerate(np.split(row, np.flatnonzero(row == 2))):
                file, line = stream.docs[min(at + k, len(stream.docs) - 1)]
                part = tokenizer.decode(ids).strip("\ufffd")  # characters cut by the row's ends
                assert part in library(file)[line].replace("▁", " "), (file, line)
                seen += len(part)
    assert seen > 5_000_000  # it is text that was compared


def test_rows_of_the_demo_are_dealt_and_counted(demo, truth):
    """Row i of a source is row i % n of epoch i // n, in chunk i % 8; 1024 rows go 70 : 30."""
    manifest = json.loads((demo / "manifest.json").read_text())
    chunks = [origin for name, _, origin in bins(demo) if name.startswith("train")]
    assert [one["rows_per_chunk"] for one in manifest["sources"]] == [717, 307]
    assert manifest["rows_per_chunk"] == 1024 == 717 + 307
    for s, one in enumerate(manifest["sources"]):
        n, used = len(truth[s, 0].tokens) // 257, 8 * one["rows_per_chunk"]
        for k, origin in enumerate(chunks):
            dealt = [(i // n, i % n) for i in range(k, used, 8)]
            assert origin[origin[:, 0] == s, 1:].tolist() == [list(pair) for pair in dealt]
        rows = [tuple(row) for origin in chunks for row in origin[origin[:, 0] == s, 1:].tolist()]
        assert len(set(rows)) == len(rows) == used  # each at most once per epoch
        epochs = {epoch for epoch, _ in rows}
        assert epochs == set(range(math.ceil(used / n))) == {e for i, e in truth if i == s} - {-1}
        assert one["epochs"] == round(used / n, 4)
        assert (one["rows"], one["tokens"]) == (n, len(truth[s, 0].tokens))
        assert one["rows_left_out"] == max(0, n - used)
        held = truth[s, HELD_OUT]
        assert one["all_tokens"] == one["tokens"] + len(held.tokens)
        assert one["valid_rows"] == min(128, len(held.tokens) // 257)
        docs = truth[s, 0].docs + held.docs
        assert one["documents"] == len(docs)
        assert one["bytes"] == sum(len(library(file)[line].encode()) for file, line in docs)
    assert any(epoch > 0 for _, epoch in truth)  # its prose is repeated


def test_no_held_out_document_of_the_demo_is_trained_on(truth):
    for s, source in enumerate(("code", "prose")):
        held = set(truth[s, HELD_OUT].docs)
        for (i, epoch), stream in truth.items():
            assert len(set(stream.docs)) == len(stream.docs)
            if i == s and epoch != HELD_OUT:
                assert not held & set(stream.docs)
        for docs, side in ((truth[s, 0].docs, False), (held, True)):
            for file, line in docs:  # by the hash of the place, which nothing else moves
                digest = hashlib.sha256(f"1337/{source}/{file}:{line}".encode()).hexdigest()
                assert (int(digest[:16], 16) / 2**64 < 0.05) == side


def test_the_demo_is_the_whole_library_and_no_file_gives_twice(demo, truth):
    code, prose = ({file for (i, _), stream in truth.items() if i == s for file, _ in stream.docs}
                   for s in (0, 1))
    assert not code & prose
    there = {p.relative_to(STDLIB).as_posix() for p in STDLIB.rglob("*.py")
             if not {"site-packages", "dist-packages", "__pycache__"} & set(p.parts)}
    silent = 0
    for name in sorted(there - code - prose):  # gave nothing: not UTF-8, not Python, or no text
        try:
            silent += not library(name)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            silent += 1
    assert silent == len(there - code - prose) < len(there) / 2
    for s, names in enumerate((code, prose)):
        docs = {doc for (i, _), stream in truth.items() if i == s for doc in stream.docs}
        assert docs == {(name, line) for name in names for line in library(name)}


def test_the_demo_names_no_place_of_this_machine(demo):
    """It may be published as it is."""
    for path in sorted(demo.rglob("*.json*")):
        text = path.read_text()
        assert str(demo.parents[1]) not in text and str(STDLIB) not in text
        assert str(REPO) not in text and str(Path.home()) + "/" not in text


# ---- dealing, on made text -----------------------------------------------------------------------

def documents_of(root: Path, index: int) -> list[tuple[str, str]]:
    """(FILE:LINE, text) of every document of a folder, in the order of its stream."""
    names, docs = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.*")
                         if p.suffix in (".txt", ".md", ".jsonl")), []
    for name in [names[i] for i in order(len(names), 1337, 2**32 - 1, index)]:
        text = (root / name).read_text(encoding="utf-8")
        lines = text.split("\n") if name.endswith(".jsonl") else [json.dumps({"text": text})]
        docs += [(f"{name}:{number}", json.loads(line)["text"])
                 for number, line in enumerate(lines, 1) if line]
    return [(place, text) for place, text in docs if text.strip()]


def is_held(place: str) -> bool:
    digest = hashlib.sha256(f"1337/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < 0.05


def check_tables(coder, docs: list, name: str, made: Path, epochs: int = 1) -> None:
    """The documents of a prepared source are where its tables say, to the byte."""
    files = json.loads((made / f"provenance/{name}_files.json").read_text())
    for side in ("held_out", *(f"epoch_{e}" for e in range(epochs))):
        at, rows = 0, []
        for place, text in docs:
            if len(docs) < 100 or is_held(f"{name}/{place}") == (side == "held_out"):
                file, line = place.rsplit(":", 1)
                rows.append([at, files.index(file), int(line)])
                at += len(coder.encode(text)) + 1
        should = io.BytesIO()
        np.save(should, np.array(rows, np.int64).reshape(-1, 3))
        assert (made / f"provenance/{name}_{side}.npy").read_bytes() == should.getvalue(), side


def packer(coder, docs: list, name: str, index: int, T: int, overlap: bool = False
           ) -> tuple[list, list]:
    """The training and held-out rows that preparing a source should give, in the plainest way."""
    streams = [], []
    for place, text in docs:
        streams[len(docs) >= 100 and is_held(f"{name}/{place}")].extend(
            coder.encode(text) + [coder.eos_id()])
    train, valid = ([s[i:i + T + 1] for i in range(0, len(s) - T, T + 1 - overlap)]
                    for s in streams)
    if len(docs) < 100:
        held = order(len(train), 1337, 2**32 - 2, index)[:min(128, math.ceil(len(train) * 0.05))]
        valid = [train[i] for i in sorted(held)]
        train = [row for i, row in enumerate(train) if i not in held]
    return train, valid[:128]


def chunks_of(trains: list[list], per_chunk: list[int], n_chunks: int) -> list[list]:
    """The rows of every chunk: dealt in turn, the next epoch where one ends."""
    return [[rows[i % len(rows)] for rows, n in zip(trains, per_chunk, strict=True)
             for i in range(k, n * n_chunks, n_chunks)] for k in range(n_chunks)]


def take_small_steps(patch: pytest.MonkeyPatch) -> None:
    """Small stretches, parts of files and blocks of rows."""
    patch.setattr(sources, "PART", 1000)
    patch.setattr(tokens, "STRETCH", (3000, 1 << 26))
    patch.setattr(tokens, "BATCH", 500)
    patch.setattr(tokens, "BLOCK", 1000)


@pytest.fixture
def small_steps(monkeypatch) -> list[int]:
    """So that small texts are many pieces of work; in how many spans their files were cut."""
    take_small_steps(monkeypatch)
    cut, spans = tokens.cut, []

    def counted(*args):
        found = cut(*args)
        spans.append(len(found))
        return found
    monkeypatch.setattr(tokens, "cut", counted)
    return spans


@pytest.mark.parametrize("documents, overlap, by", [
    (40, False, (1, 2)), (130, False, (1, 2, 3, 1)), (40, True, (1, 1)), (130, True, (1, 1))])
def test_an_independent_packer_gives_the_same_bytes(documents, overlap, by, tmp_path, monkeypatch,
                                                    capsys, small_steps):
    """By 1, 2 and 3 workers, in small stretches, parts of files and blocks of rows; and again."""
    make_text(tmp_path / "text", documents)
    sets = []
    for workers in by:
        root = tmp_path / str(len(sets))
        root.mkdir()
        monkeypatch.chdir(root)
        assert prepare_here(input="../text", dataset="set", workers=workers, n_chunks=3,
                            overlap=str(overlap).lower()) == 0
        sets.append(files_of(root / "data"))
    assert all(one == sets[0] for one in sets)
    assert max(small_steps) >= 5  # one .md was read in so many spans, each a stretch of its own
    made = Path("data/set")
    coder = sentencepiece.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    docs = documents_of(tmp_path / "text", 0)
    check_tables(coder, docs, "text", made)
    train, valid = packer(coder, docs, "text", 0, 16, overlap)
    expected = {f"train_00{k}.bin": rows
                for k, rows in enumerate(chunks_of([train], [len(train) // 3], 3))}
    expected["valid_text.bin"] = valid
    assert sorted(expected) == sorted(p.name for p in made.glob("*.bin"))
    for file, rows in expected.items():
        assert sets[0][f"set/{file}"] == np.array(rows, "<u2").tobytes(), file
        assert rows, file
    one, = json.loads((made / "manifest.json").read_text())["sources"]
    assert (one["documents"], one["notes"]) == (documents, {"blank": 2})
    assert sorted(sets[0]) == sorted(["set", "set/manifest.json", "set/manifest.json.sha256",
                                      "set/provenance", *(f"set/{name}" for name in
                                                          read_manifest(made)["files"])])
    capsys.readouterr()


def mix_file(options: str = "", **mix: dict) -> Path:
    """A run file with these sources, folders where we are unless a path is given."""
    listed = ", ".join(f"dict(name={name!r}, path={keys.get('path', name)!r}, "
                       + ", ".join(f"{k}={v!r}" for k, v in keys.items() if k != "path") + ")"
                       for name, keys in mix.items())
    Path("mix.py").write_text(f"{DEMO.read_text()}\nsources = [{listed}]\n{options}\n")
    return Path("mix.py")


def test_a_mix_by_llamas_tokenizer_is_the_same_by_any_number_of_workers(
        tmp_path, monkeypatch, llama, shared, small_steps):
    """A source of many documents, repeated, and one of few, partly used, against the packer."""
    monkeypatch.setattr(sources, "PART", 30_000)
    monkeypatch.setattr(tokens, "STRETCH", (50_000, 1 << 26))
    monkeypatch.setattr(tokens, "BLOCK", 20_000)
    wiki = (shared / "text/wikitext2_valid.txt").read_text(encoding="utf-8")[:300_000]
    plays = (shared / "text/tinyshakespeare.txt").read_text(encoding="utf-8")[:250_000]
    parts = [part for part in wiki[:200_000].split("\n") if part.strip()]
    write(tmp_path / "wiki", {"a.jsonl": "".join(json.dumps(dict(text=t)) + "\n" for t in parts),
                              "rest.txt": wiki[200_000:]})
    write(tmp_path / "plays", {"one.txt": plays[:200_000], "two.md": plays[200_000:]})
    sets, coder = [], sentencepiece.SentencePieceProcessor(model_proto=llama.data)
    (tmp_path / "llama.model").write_bytes(llama.data)
    for workers in (1, 2, 3, 1):
        root = tmp_path / str(len(sets))
        root.mkdir()
        monkeypatch.chdir(root)
        run_file = mix_file(wiki=dict(path="../wiki", weight=2), plays=dict(path="../plays"))
        assert prepare_here(run_file, dataset="set", workers=workers, tokenizer="../llama.model",
                            vocab_size=32000, seq_len=64, n_chunks=3, rows_per_chunk=1000) == 0
        sets.append(files_of(root / "data"))
    assert sets[0] == sets[1] == sets[2] == sets[3] and max(small_steps) >= 4
    made = [packer(coder, documents_of(tmp_path / name, s), name, s, 64)
            for s, name in enumerate(("wiki", "plays"))]
    manifest, per_chunk = json.loads(sets[0]["set/manifest.json"]), [667, 333]
    assert [one["rows_per_chunk"] for one in manifest["sources"]] == per_chunk
    for k, rows in enumerate(chunks_of([train for train, _ in made], per_chunk, 3)):
        assert sets[0][f"set/train_00{k}.bin"] == np.array(rows, "<u2").tobytes()
        origin = np.load(f"data/set/provenance/train_00{k}.bin.npy")
        assert np.bincount(origin[:, 0]).tolist() == per_chunk
    for name, (train, valid), one in zip(("wiki", "plays"), made, manifest["sources"], strict=True):
        assert sets[0][f"set/valid_{name}.bin"] == np.array(valid, "<u2").tobytes()
        assert len(valid) > 5 and one["rows"] == len(train)
    assert manifest["sources"][0]["epochs"] > 1 > manifest["sources"][1]["epochs"]
    assert len(parts) > 100  # so that documents are held out of the one, rows of the other


def test_fewer_than_100_documents_hold_out_rows_and_100_hold_out_documents(
        tmp_path, monkeypatch, model_file):
    """Rows of the one stream below 100 documents, streams of their own from 100 on."""
    monkeypatch.chdir(tmp_path)
    for documents in (99, 100):
        make_text(Path(f"text_{documents}"), documents)
        assert prepare_here(input=f"text_{documents}", dataset=f"d{documents}",
                            tokenizer=model_file) == 0
        way = Path(f"data/d{documents}/provenance")
        source = f"text_{documents}"
        train = {tuple(doc) for doc in np.load(way / f"{source}_epoch_0.npy")[:, 1:].tolist()}
        held = {tuple(doc) for doc in np.load(way / f"{source}_held_out.npy")[:, 1:].tolist()}
        rows = [np.load(way / f"train_00{k}.bin.npy")[:, 2].tolist() for k in (0, 1)]
        valid = np.load(way / f"valid_{source}.bin.npy")
        assert valid[:, 1].tolist() == [HELD_OUT] * len(valid) and len(valid) > 0
        if documents == 99:
            assert train == held and len(train) == 99
            n = json.loads(Path("data/d99/manifest.json").read_text())["sources"][0]["tokens"] // 17
            assert len(valid) == math.ceil(n * 0.05)
            assert not {*rows[0], *rows[1]} & set(valid[:, 2].tolist())
            assert len({*rows[0], *rows[1]}) + len(valid) >= n - 1  # one may be left undealt
        else:
            assert not train & held and len(train) + len(held) == 100 and held
            assert sorted(rows[0] + rows[1]) == list(range(len(rows[0]) * 2))


def test_two_sources_are_mixed_by_weight_and_repeated(tmp_path, monkeypatch, model_file):
    """7 rows a chunk as 5 : 1 are 6 and 1; the smaller source is gone through several times."""
    monkeypatch.chdir(tmp_path)
    write(Path("big"), {"a.txt": story(3000, 1)})
    write(Path("few"), {"a.txt": story(20, 2)})
    Path("mix.py").write_text(DEMO.read_text() + "sources = [\n"
                              "    dict(name='big', path='big', weight=5),\n"
                              "    dict(name='few', path='few', weight=1)]\n")
    assert prepare_here(Path("mix.py"), n_chunks=20, rows_per_chunk=7, tokenizer=model_file,
                        dataset="mix") == 0
    manifest = read_manifest(Path("data/mix"))
    big, few = manifest["sources"]
    assert (big["rows_per_chunk"], few["rows_per_chunk"]) == (6, 1)
    n = few["rows"]
    assert 2 <= n < 10 and few["epochs"] == round(20 / n, 4)
    origins = [np.load(f"data/mix/provenance/train_0{k:02}.bin.npy") for k in range(20)]
    for k, origin in enumerate(origins):
        assert origin[:, 0].tolist() == [0] * 6 + [1]
        assert origin[6, 1] == k // n  # every row of an epoch before the next begins
    used = np.concatenate([origin[origin[:, 0] == 1] for origin in origins])
    for epoch in range(20 // n):
        assert len(set(used[used[:, 1] == epoch, 2])) == n
        assert Path(f"data/mix/provenance/few_epoch_{epoch}.npy").is_file()


@pytest.mark.numeric
@pytest.mark.parametrize("seed", range(6))
def test_the_realised_shares_are_those_asked_for(seed, tmp_path, monkeypatch, model_file):
    """Within half a percent in every chunk, and every epoch of a source is gone through whole."""
    monkeypatch.chdir(tmp_path)
    dice, n_chunks = random.Random(seed), 2
    mix = {f"s{i}": dict(weight=round(math.exp(dice.uniform(0, 4)), 3))
           for i in range(dice.randint(2, 6))}
    for i, name in enumerate(mix):
        write(Path(name), {"a.txt": story(dice.randint(60, 900), i)})
    assert prepare_here(mix_file(**mix), seq_len=4, rows_per_chunk=500, tokenizer=model_file,
                        dataset="mix") == 0
    manifest, total = read_manifest(Path("data/mix")), sum(one["weight"] for one in mix.values())
    origins = [np.load(f"data/mix/provenance/train_00{k}.bin.npy") for k in range(n_chunks)]
    for s, one in enumerate(mix.values()):
        found = [int((origin[:, 0] == s).sum()) for origin in origins]
        assert found == [manifest["sources"][s]["rows_per_chunk"]] * n_chunks
        assert abs(found[0] / 500 - one["weight"] / total) < 0.005
        used = np.concatenate([origin[origin[:, 0] == s] for origin in origins])
        epochs = np.bincount(used[:, 1])
        assert set(epochs[:-1]) <= {manifest["sources"][s]["rows"]} and epochs[-1] <= max(epochs)
        assert len(np.unique(used, axis=0)) == len(used)
    assert [len(origin) for origin in origins] == [500, 500]


def test_how_often_a_source_may_be_repeated(tmp_path, monkeypatch, model_file, capsys):
    """Up to its epochs, or 100 times; by one row more it is refused, with what was asked for."""
    monkeypatch.chdir(tmp_path)
    write(Path("few"), {"a.txt": story(300, 3)})
    options = dict(tokenizer=model_file, n_chunks=1)
    assert prepare_here(mix_file(few={}), dataset="once", **options) == 0
    n = read_manifest(Path("data/once"))["sources"][0]["rows"]
    for epochs, limit in ((2, 2), (None, 100)):
        run_file = mix_file(few=dict(epochs=epochs))
        name = f"up_to_{limit}"
        assert prepare_here(run_file, rows_per_chunk=n * limit, dataset=name, **options) == 0
        assert read_manifest(Path(f"data/{name}"))["sources"][0]["epochs"] == limit
        shutil.rmtree(f"data/{name}")
        capsys.readouterr()
        for rows in (n * limit + 1, n * limit * 12 + 3):
            assert prepare_here(run_file, rows_per_chunk=rows, dataset=name, **options) == DATA
            err = capsys.readouterr().err
            assert f"source few has {n} rows and would be repeated {rows / n:,.2f} times" in err
            assert f"the limit is {limit};" in err and len(err.splitlines()) == 1
            assert not Path(f"data/{name}").exists()


@pytest.mark.parametrize("documents", [40, 130])
def test_two_epochs_are_the_same_rows_twice(documents, tmp_path, monkeypatch, model_file,
                                            small_steps):
    """Where no rows_per_chunk is asked for, a source gives its epochs; no rewriting, one stream."""
    monkeypatch.chdir(tmp_path)
    make_text(Path("text"), documents)
    assert prepare_here(mix_file(text=dict(epochs=2)), tokenizer=model_file, dataset="demo") == 0
    one, = read_manifest(Path("data/demo"))["sources"]
    assert (one["epochs"], one["rows_per_chunk"], one["rows_left_out"]) == (2, one["rows"], 0)
    coder = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    train, valid = packer(coder, documents_of(Path("text"), 0), "text", 0, 16)
    chunks = chunks_of([train], [len(train)], 2)
    for k, rows in enumerate(chunks):
        assert np.array_equal(np.fromfile(f"data/demo/train_00{k}.bin", "<u2"), np.ravel(rows))
    assert sorted(chunks[0] + chunks[1]) == sorted(train * 2)
    assert np.array_equal(np.fromfile("data/demo/valid_text.bin", "<u2"), np.ravel(valid))
    check_tables(coder, documents_of(Path("text"), 0), "text", Path("data/demo"), 2)
    assert not Path("data/demo/provenance/text_epoch_2.npy").exists()


@pytest.fixture
def jobs_done(monkeypatch) -> list[str]:
    """The stretches that this process made, none that it found finished."""
    done, read = [], tokens.read_tokenizer

    def counted(*args):
        done.append(args[0])
        return read(*args)
    monkeypatch.setattr(tokens, "read_tokenizer", counted)
    return done


def test_a_source_ends_with_the_document_that_reaches_its_max_tokens(
        tmp_path, monkeypatch, model_file, small_steps, jobs_done):
    """Its documents are in rows and tables, none after it is, and no more text is read."""
    monkeypatch.chdir(tmp_path)
    make_text(Path("text"), 130)
    coder, docs = sentencepiece.SentencePieceProcessor(model_file=str(model_file)), documents_of(
        Path("text"), 0)
    ends = np.cumsum([len(coder.encode(text)) + 1 for _, text in docs]).tolist()
    limits, read = [ends[0], ends[0] + 1, ends[9], ends[60] - 1, ends[60], ends[60] + 1,
                    ends[-2], ends[-2] + 1, ends[-1], 10**9], []
    for limit in limits:
        jobs_done.clear()
        assert prepare_here(mix_file(text=dict(max_tokens=limit)), tokenizer=model_file, seq_len=3,
                            n_chunks=1, dataset=f"d{limit}") == 0
        n = min(int(np.searchsorted(ends, limit)) + 1, len(docs))
        made = Path(f"data/d{limit}")
        one, = read_manifest(made)["sources"]
        assert (one["documents"], one["all_tokens"]) == (n, ends[n - 1])
        assert one["bytes"] == sum(len(text.encode()) for _, text in docs[:n])
        train, valid = packer(coder, docs[:n], "text", 0, 3)
        for file, rows in (("train_000.bin", train), ("valid_text.bin", valid)):
            assert np.fromfile(made / file, "<u2").reshape(-1, 4).tolist() == rows
        check_tables(coder, docs[:n], "text", made)
        read.append(len(jobs_done))
    assert read == sorted(read) and read[0] < read[4] < read[-1] and read[-1] > 10


def test_a_weight_too_small_for_one_row_is_named(tmp_path, monkeypatch, capsys, model_file):
    monkeypatch.chdir(tmp_path)
    for name in ("big", "tiny"):
        write(Path(name), {"a.txt": story(3000, 1)})
    Path("mix.py").write_text(DEMO.read_text() + "sources = [dict(name='big', path='big'),\n"
                              "    dict(name='tiny', path='tiny', weight=0.001)]\n")
    assert prepare_here(Path("mix.py"), rows_per_chunk=10, tokenizer=model_file) == DATA
    err = capsys.readouterr().err
    assert "tiny" in err and "weight" in err


def test_preparing_again_changes_nothing(copied, small, capsys):
    shutil.copytree(small.parents[1] / "text", "text")
    before = files_of(Path("."))
    times = {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")}
    assert prepare_here(input="text", dataset="small") == 0
    out, err = capsys.readouterr()
    assert f"{copied} is prepared already" in out and err == ""
    assert files_of(Path(".")) == before
    assert {p: p.stat().st_mtime_ns for p in Path("data").rglob("*")} == times


@pytest.mark.parametrize("changed, said", [
    (dict(seq_len=32), "seq_len"), (dict(seed=1), "seed"), (dict(n_chunks=3), "n_chunks"),
    (dict(vocab_size=310), "vocab_size"), (dict(valid_rows=3), "valid_rows"),
    (dict(valid_share=0.2), "valid_share"), (dict(rows_per_chunk=3), "rows_per_chunk"),
    (dict(text_key="id"), "text_key"), (dict(encoding="latin-1"), "encoding"),
    (dict(seed=1, seq_len=32), "seq_len, seed"), ("text", "sources"), ("file name", "sources"),
    ("tokenizer", "tokenizer")])
def test_another_recipe_is_refused(copied, small, capsys, changed, said, model_file):
    shutil.copytree(small.parents[1] / "text", "text")
    options = {}
    if changed == "text":
        Path("text/a.txt").write_text(Path("text/a.txt").read_text() + "x")
    elif changed == "file name":
        Path("text/a.txt").rename("text/a1.txt")
    elif changed == "tokenizer":
        options = dict(tokenizer=model_file)
    else:
        options = changed
    before = files_of(Path("."))
    assert prepare_here(input="text", **(dict(dataset="small") | options)) == DATA
    err = capsys.readouterr().err
    assert f"{copied} holds another data set (other {said})" in err
    assert "nothing was changed" in err and "--dataset=" in err and len(err.splitlines()) == 1
    assert files_of(Path(".")) == before


def test_what_changes_no_row_is_not_in_the_recipe(copied, small):
    shutil.copytree(small.parents[1] / "text", "text")
    before = files_of(Path("."))
    assert prepare_here(input="text", dataset="small", workers=2, max_bad_documents=5, lr=1) == 0
    assert files_of(Path(".")) == before


def test_stats_and_verify_write_nothing(copied, capsys):
    for option in ("stats", "verify"):
        before = files_of(Path("."))
        assert prepare_here(dataset="small", **{option: "true"}) == 0
        out = capsys.readouterr().out
        assert "130" in out if option == "stats" else "files are as the manifest says" in out
        assert files_of(Path(".")) == before


# ---- tokenizers ----------------------------------------------------------------------------------

def texts(pieces: list[str], least: int, most: int) -> st.SearchStrategy[str]:
    """Texts made of so many of the pieces."""
    return st.lists(st.sampled_from(pieces), min_size=least, max_size=most).map("".join)


# Many blanks of all kinds, and in every 20 characters a place to cut, behind the "x".
SPACED = st.text("    \n\t\u3000abdeknst</>.09\0\x1béß中🎉", min_size=60, max_size=200).map(
    lambda text: re.sub("(.{17})", r"\1x y", text, flags=re.DOTALL))
# Blanks wherever they may be, the names of special tokens, and any other text. U+2581 is left out:
# it is sentencepiece's mark of a blank, and comes back as one.
ODD = texts([*"at 19.\n\t\0é中🎉\ufffd\ufeff", "  ", "    ", "</s>", "<s>", "<unk>", "<0x0A>",
             "<|endoftext|>", "ing", " the", "ba"], 0, 40)
ANY = ODD | st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=30)


def pair(tokenizer: Tokenizer):
    """The library's own encoder of the same file."""
    if tokenizer.kind == "tiktoken":
        return tokenizer.coder.encode_ordinary
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.data).encode


@pytest.fixture(scope="module", params=["small", "made", "llama"])
def tokenizer(request, model_file, ranks_file) -> Tokenizer:
    """A trained sentencepiece model, a made .tiktoken, and LLaMA's own tokenizer."""
    if request.param == "llama":
        return request.getfixturevalue("llama")
    return load_tokenizer(model_file if request.param == "small" else ranks_file)


def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizers, "BLOCK", 40)  # every half of it holds a place to cut
    monkeypatch.setattr(tokenizer, "block", 20)
    whole, cuts = pair(tokenizer), []

    @EXAMPLES
    @given(SPACED)
    def check(text):
        pieces = list(tokenizers.blocks([text], 20))
        assert "".join(pieces) == text and all(0 < len(piece) <= 40 for piece in pieces)
        assert tokenizer.encode(text) == whole(text)
        cuts.append(max(0, len(pieces) - 1))
    check()
    assert sum(cuts) > 400  # it was cut


@pytest.mark.parametrize("size", [7, 40])
def test_pieces_do_not_depend_on_how_the_text_arrives(size, monkeypatch):
    monkeypatch.setattr(tokenizers, "BLOCK", 40)

    @EXAMPLES
    @given(st.lists(ANY, max_size=12))
    def check(parts):
        pieces = list(tokenizers.blocks(parts, size))
        assert pieces == list(tokenizers.blocks(["".join(parts)], size)) and "" not in pieces
        assert "".join(pieces) == "".join(parts) and all(len(p) <= 40 for p in pieces)
    check()


def test_a_file_in_spans_has_the_ids_of_the_whole(tokenizer, tmp_path, monkeypatch):
    """Whatever parts of it are looked at, a text is cut only where no token crosses."""
    whole, spans, path = pair(tokenizer), [], tmp_path / "a.txt"
    source, data = Source(name="a", path="a.txt"), DataConfig(
        dataset="a", n_chunks=1)
    corpus = sources.Corpus(source, [], "text", "", collections.Counter())
    job = types.SimpleNamespace(source=source, data=data)

    @EXAMPLES
    @given(SPACED, st.integers(4, 40), st.integers(4, 40))
    def check(text, part, size):
        monkeypatch.setattr(sources, "PART", part)
        text = text.replace("\n", "\r\n") if part % 2 else text
        path.write_bytes(text.encode())
        file, wrong = sources.look(sources.File("a.txt", path, None, ""), "text", data)
        cut, ids = sources.cut(file, corpus, size), []
        assert not wrong and [s.start for s in cut[1:]] == [s.end for s in cut[:-1]]
        for span in cut:
            (line, begins, ends, texts), = sources.documents(span, "text", source, data, [],
                                                             collections.Counter())
            assert (line, begins, ends) == (1, span is cut[0], span is cut[-1])
            ids += [i for part, _ in tokens.encode_document(tokenizer, job, "", begins, ends, texts)
                    for i in part]
        assert ids == whole(text.replace("\r\n", "\n")) + [tokenizer.eos]
        spans.append(len(cut))
    check()
    assert sum(spans) > 2 * len(spans)  # it was cut


@pytest.mark.parametrize("size", [1, 60, 5000])
def test_lines_of_a_file_in_spans_keep_their_numbers(size, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", 50)
    lines = [json.dumps(dict(text=story(1 + i % 9, i))) if i % 5 else "" for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    source, data = Source(name="a", path="a"), DataConfig(dataset="a", n_chunks=1)
    corpus = sources.Corpus(source, [], "text", "", collections.Counter())
    file, _ = sources.look(sources.File("a.jsonl", tmp_path / "a.jsonl", None, ""), "text", data)
    cut = sources.cut(file, corpus, size)
    found = [(line, "".join(texts)) for span in cut for line, begins, ends, texts in
             sources.documents(span, "text", source, data, [], collections.Counter())
             if begins and ends]
    assert found == [(n, json.loads(line)["text"]) for n, line in enumerate(lines, 1) if line]
    assert (len(cut) > 20) == (size < 100)


def test_no_cut_between_a_blank_and_its_mark(model_file, monkeypatch):
    monkeypatch.setattr(tokenizers, "BLOCK", 60)
    tokenizer, text = load_tokenizer(model_file), "a" * 38 + "▁ b" + " b" * 30
    monkeypatch.setattr(tokenizer, "block", 38)
    assert len(list(tokenizers.blocks([text], 38))) == 3
    assert tokenizer.encode(text) == pair(tokenizer)(text)


def test_text_comes_back(tokenizer):
    @EXAMPLES
    @given(ANY)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(np.array(ids, np.uint16)) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())
    check()


@pytest.mark.parametrize("char", ["a", " ", "é", "🎉"])
def test_a_long_run_of_one_character_finishes(tokenizer, char):
    """More than a block with nowhere to cut; tiktoken once took the square of its length."""
    text = char * (1_500_000 if char == "a" else 300_000)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.piece_bytes()[ids].sum()) == len(text.encode()) + (
        tokenizer.kind == "sentencepiece")


def test_special_text_stays_text(tokenizer):
    for text in ("</s>", "a</s> b", "<s>", "<unk>", "<|endoftext|>", "<0x0A>"):
        ids = tokenizer.encode(text)
        assert tokenizer.eos not in ids and tokenizer.decode(ids) == text and len(ids) > 1


def test_piece_bytes_count_the_text(tokenizer):
    """The blank that sentencepiece puts in front is a byte too many, and the only one."""
    sizes, extra = tokenizer.piece_bytes(), tokenizer.kind == "sentencepiece"
    assert sizes.shape == (tokenizer.vocab_size,) and sizes.dtype == np.int64
    assert sizes[tokenizer.eos] == 0
    if tokenizer.bos is not None:
        assert sizes[tokenizer.bos] == 0

    @EXAMPLES
    @given(ANY.filter(bool))
    def check(text):
        assert int(sizes[tokenizer.encode(text)].sum()) == len(text.encode()) + extra
    check()


def test_a_trained_tokenizer_is_like_llamas(model_file, llama):
    ours = load_tokenizer(model_file)
    assert (ours.bos, ours.eos, ours.special_tokens) == (1, 2, {"<s>": 1, "</s>": 2})
    assert (llama.bos, llama.eos, llama.special_tokens) == (1, 2, {"<s>": 1, "</s>": 2})
    assert llama.vocab_size == 32000 and ours.vocab_size == 300
    for tokenizer in (ours, llama):  # byte fallback, digits apart, blanks only in front of pieces
        pieces = [tokenizer.coder.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        assert pieces[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and pieces[258] == "<0xFF>"
        assert not [p for p in pieces if "▁" in p.lstrip("▁")]
        assert not [p for p in pieces[259:] if len(p) > 1 and set("0123456789") & set(p)]
        assert not [p for p in pieces if "\n" in p]
    assert llama.encode("Hello world") == [15043, 3186]  # as published


def test_tiktoken_ranks_come_back(ranks_file, many_ranks_file):
    tokenizer = load_tokenizer(ranks_file)
    assert tokenizer.encode("the theing") == [
        256 + MERGES.index(token) for token in (b"the", b" the", b"ing")]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (None, 277, 278)
    assert tokenizer.spec()["sha256"] == hashlib.sha256(ranks_file.read_bytes()).hexdigest()
    own = {base64.b64decode(a): int(b) for a, b in
           (line.split() for line in ranks_file.read_bytes().splitlines())}
    coder = tiktoken.Encoding("own", pat_str=tokenizers.PATTERN, mergeable_ranks=own,
                              special_tokens={"<|endoftext|>": 277})

    @EXAMPLES
    @given(ANY)
    def check(text):
        assert tokenizer.encode(text) == coder.encode(text, disallowed_special=())
    check()
    many = load_tokenizer(many_ranks_file)
    assert (many.vocab_size, many.eos) == (66001, 66000)
    assert many.encode("ban") == [65999] and many.decode([65999]) == "ban"


def test_the_spec_of_a_manifest_gives_the_same_tokenizer(ranks_file, tmp_path):
    """What the ranks do not say, pattern and special tokens, comes from the manifest."""
    data = ranks_file.read_bytes()
    spec = dict(pattern=r"\S+|\s+", special_tokens={"<|endoftext|>": 278, "<|pad|>": 277})
    first = Tokenizer("tiktoken", data, spec)
    (tmp_path / first.file).write_bytes(data)
    (tmp_path / "manifest.json").write_text(json.dumps(dict(tokenizer=first.spec())))
    again = load_tokenizer(tmp_path)
    assert again.spec() == first.spec() and again.eos == 278 and again.vocab_size == 279
    (tmp_path / "manifest.json").unlink()
    assert load_tokenizer(tmp_path).eos == 277  # without it: the defaults
    for name, content in tokenizer_files(first).items():
        (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).spec() == first.spec()


def test_ids_without_a_token(ranks_file):
    """cl100k_base has 16 of them between its ranks and its special tokens."""
    spec = dict(special_tokens={"<|endoftext|>": 277, "<|last|>": 290})
    tokenizer = Tokenizer("tiktoken", ranks_file.read_bytes(), spec)
    assert tokenizer.vocab_size == 291 and len(tokenizer.piece_bytes()) == 291
    assert tokenizer.piece_bytes()[277:].sum() == 0
    assert json.loads(tokenizer_files(tokenizer)["tokenizer.json"])["model"]["vocab"]


@pytest.mark.parametrize("config, bos", [
    (None, False), ({}, False), (dict(add_bos_token=True), True),
    (dict(tokenizer_class="LlamaTokenizer"), True),
    (dict(tokenizer_class="LlamaTokenizerFast", add_bos_token=False), False)])
def test_whether_bos_is_put_in_front_is_the_folders_word(model_file, tmp_path, config, bos):
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).add_bos == bos
    assert load_tokenizer(tmp_path / "tokenizer.model").add_bos is False


def unloadable(path: Path, sha256: str = "") -> str:
    """Why a tokenizer cannot be loaded, in one line."""
    with pytest.raises(Stop) as stop:
        load_tokenizer(path, sha256)
    assert stop.value.code == DATA
    return str(stop.value)


def test_tokenizers_that_cannot_be_loaded(tmp_path, model_file, ranks_file):
    good = model_file.read_bytes()
    cases = {"gone.model": None, "half.model": good[:len(good) // 2], "cut.model": good[:-1],
             "empty.model": b"", "other.model": ranks_file.read_bytes(), "empty.tiktoken": b"",
             "other.tiktoken": good, "cut.tiktoken": ranks_file.read_bytes()[:-4],
             "text.json": b"{}", "text.txt": b"{}", "words.tiktoken": b"the quick\nbrown fox\n"}
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        said = unloadable(path)
        assert str(path) in said, name
        if content is None or path.suffix == ".txt":
            assert "sentencepiece model, tiktoken ranks" in said and "--tokenizer=FILE" in said
            assert ("not found" in said) == (content is None)
        else:
            assert "truncated or of another kind" in said, name
    (tmp_path / "folder").mkdir()
    assert "has no tokenizer.model, .tiktoken, .json" in unloadable(tmp_path / "folder")


def test_a_tokenizer_with_another_hash_is_refused(tmp_path, model_file):
    digest = hashlib.sha256(model_file.read_bytes()).hexdigest()
    assert load_tokenizer(model_file, digest).vocab_size == 300
    said = unloadable(model_file, "0" * 64)
    assert all(part in said for part in (str(model_file), digest, "0" * 64))
    assert "0" * 64 in unloadable(tmp_path / "gone.model", "0" * 64)


def test_a_tokenizer_that_was_replaced_is_read_again(tmp_path):
    path = tmp_path / "mine.tiktoken"
    for content in (ranks(MERGES), ranks(MERGES[:5])):
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        assert load_tokenizer(path, digest).spec()["sha256"] == digest


@pytest.mark.parametrize("content", [
    ranks(MERGES)[:-2], ranks([])[:2000].rpartition(b"\n")[0], b"IQ== -1\n", b"IQ== 0\nIg== 0\n"],
    ids=["last number cut", "bytes missing", "below 0", "one number twice"])
def test_ranks_with_holes_cannot_be_loaded(tmp_path, capfd, content):
    (tmp_path / "bad.tiktoken").write_bytes(content)
    assert "truncated" in unloadable(tmp_path / "bad.tiktoken")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_tokenizer_config_is_named(tmp_path, model_file, content):
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in unloadable(tmp_path)


# ---- tokenizer.json, for other people's programs -------------------------------------------------

@pytest.fixture(scope="module")
def hugging(tokenizer, tmp_path_factory):
    """transformers' tokenizer of a folder with the files that a checkpoint gets."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_hugging_face_gives_our_ids_and_text(tokenizer, hugging):
    """Leading and repeated blanks, special text, emoji, NUL. Digits in ranks: the test below."""
    own = pair(tokenizer)

    @EXAMPLES
    @given(ANY)
    def check(text):
        if tokenizer.kind == "tiktoken":
            text = "".join("x" if c.isnumeric() else c for c in text)
        ids = own(text)
        assert hugging.encode(text, add_special_tokens=False) == ids == hugging.encode(text)
        assert hugging.decode(ids) == text
    check()
    for text in (" a", "   a  b", "\n\n    x", "🎉\0</s><s>", "    ", "a" * 300, " " * 300):
        assert hugging.encode(text) == own(text) and hugging.decode(own(text)) == text


def test_hugging_face_knows_the_special_tokens(tokenizer, hugging):
    assert (hugging.eos_token_id, hugging.bos_token_id) == (tokenizer.eos, tokenizer.bos)
    assert len(hugging) == tokenizer.vocab_size


def test_hugging_face_cuts_digits_as_tiktoken_does(ranks_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(ranks_file)
    for name, content in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    hugging = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("1234", "the 1234 thing", "12 34", "9123412345"):
        assert hugging.encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize("which", ["demo", "llama"])
def test_hugging_face_gives_our_ids_on_the_demo(which, demo, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(demo) if which == "demo" else request.getfixturevalue("llama")
    for name, content in tokenizer_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    hugging, own, checked = transformers.AutoTokenizer.from_pretrained(tmp_path), pair(tokenizer), 0
    for source in ("code", "prose"):
        files = json.loads((demo / f"provenance/{source}_files.json").read_text())
        for _, number, line in np.load(demo / f"provenance/{source}_epoch_0.npy")[:100].tolist():
            text = library(files[number])[line][:5000]
            ids = own(text)
            assert hugging.encode(text) == ids == tokenizer.encode(text), (files[number], line)
            assert hugging.decode(ids) == text.replace("▁", " ")
            checked += 1
    assert checked == 200


# ---- bad inputs ----------------------------------------------------------------------------------

GOOD = story(400, 5)
LINES = [json.dumps(dict(text=story(30, i))) for i in range(30)]
BROKEN = '{"text": "so far so good' + "x" * 90


@dataclasses.dataclass
class Case:
    """An input, and what preparing it should end in."""
    name: str
    files: dict[str, bytes | str] = dataclasses.field(default_factory=dict)
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    code: int = DATA
    said: tuple[str, ...] = ()  # in the one line on stderr
    notes: dict[str, int] = dataclasses.field(default_factory=dict)  # of the manifest, if code is 0


CASES = [  # users.md, section 5
    # 10: source missing, empty folder, no matching files
    Case("missing", options=dict(input="nowhere"), said=("nowhere", "not found", ".txt .md .py")),
    Case("empty", said=("source text", "an empty folder", ".jsonl .parquet .txt .md .py")),
    Case("no match", {"a.csv": "x", "b/c.pdf": "y"}, said=("a.csv", "c.pdf", ".jsonl")),
    Case("file of no kind", {"a.csv": "x"}, dict(input="text/a.csv"), said=("a.csv", ".jsonl")),
    # 11: nothing in it
    Case("no bytes", {"a.txt": b""}, dict(tokenizer="MODEL"),
         said=("0 documents in text", "1 files", "blanks")),
    Case("blank", {"a.txt": " \n\t ", "b.jsonl": '{"text": " "}\n\n'}, dict(tokenizer="MODEL"),
         said=("0 documents in text", "2 files", "blanks")),
    Case("no bytes, bpe", {"a.txt": b""}, said=("0 documents in text",)),
    Case("blank, bpe", {"a.txt": " \n"}, said=("0 documents in text",)),
    # 12: not UTF-8
    Case("not utf-8", {"a.txt": b"abc\xffdef", "b.txt": GOOD},
         said=("a.txt: byte 3 ", "utf-8", "--encoding", "--max_bad_documents")),
    Case("cut character", {"a.txt": "abcé".encode()[:-1]}, said=("a.txt: byte 3 ",)),
    Case("not utf-8, jsonl", {"a.jsonl": LINES[0].encode() + b"\n\xe9\n"},
         said=(f"a.jsonl: byte {len(LINES[0]) + 1} ",)),
    Case("not utf-8, late", {"a.txt": "é".encode() * 800_000 + b"\xff"},
         said=("a.txt: byte 1600000 ",)),
    Case("another encoding", {"a.txt": "naïve café ".encode("latin-1") * 60 + GOOD.encode(
         "latin-1", "replace")}, dict(encoding="latin-1"), code=0),
    Case("no encoding", {"a.txt": GOOD}, dict(encoding="utf-9"), code=USAGE,
         said=("--encoding", "utf-9", "latin-1")),
    Case("not utf-8, skipped", {"a.txt": b"abc\xffdef", "b.txt": GOOD},
         dict(max_bad_documents=1), code=0, notes=dict(bad=1)),
    Case("not utf-8, too many",  # the second in order is named, the first to be seen or not
         {"a.txt": b"abc " * 500_000 + b"\xff", "b.txt": GOOD, "c.txt": b"\x80"},
         dict(max_bad_documents=1), said=("c.txt: byte 0 ",)),
    # 13: a broken line of json
    Case("broken json", {"a.jsonl": f"{LINES[0]}\n{BROKEN}\n{LINES[1]}\n"},
         said=("a.jsonl:2: ", BROKEN[:80], "--max_bad_documents")),
    Case("broken json, short", {"a.jsonl": f"{LINES[0]}\n\n[1\n"}, said=("a.jsonl:3: ", ": [1 ")),
    Case("broken json, skipped", {"a.jsonl": "\n".join(["{", *LINES, "}"])},
         dict(max_bad_documents=2), code=0, notes=dict(bad=2)),
    Case("deep json", {"a.jsonl": "[" * 100_000 + "]" * 100_000}, said=("a.jsonl:1: ",)),
    # 14: json without the text
    Case("no text", {"a.jsonl": '{"content": "x", "title": "y"}\n'},
         said=("a.jsonl:1: ", "'text'", "content, title", "--text_key")),
    Case("text is a number", {"a.jsonl": '{"text": 3}'}, said=("a.jsonl:1: ", "'text'")),
    Case("a list", {"a.jsonl": '["x"]'}, said=("a.jsonl:1: ", "list")),
    Case("other key", {"a.jsonl": "\n".join(LINES).replace('"text"', '"content"')},
         dict(text_key="content"), code=0),
    Case("other key, wrong", {"a.jsonl": LINES[0]}, dict(text_key="body"),
         said=("'body'", "has text")),
    # 15: what is kept or changed, and counted
    Case("odd characters", {
        "a.txt": "\ufeffone\r\ntwo\r\n\0\0 \r" + GOOD,
        "b.jsonl": '{"text": "x\\ud800y \\ud83d\\ude00 \\udc00"}\n{"text": "a\\r\\nb\\u0000"}'},
        code=0, notes=dict(bom=1, crlf=3, nul=3, surrogates=2)),
    # 16: one document of a single character
    Case("one character", {"a.txt": "a" * 2_500_000, "b.txt": GOOD}, code=0),
    Case("one character, model", {"a.jsonl": json.dumps(dict(text="é" * 1_500_000))},
         dict(tokenizer="MODEL"), code=0),
    # 17: the names of special tokens
    Case("special text", {"a.txt": "</s> a </s><s>" + GOOD}, dict(tokenizer="MODEL"), code=0,
         notes=dict(special_text=3)),
    Case("special text, ranks", {"a.txt": "</s><|endoftext|>" + GOOD}, dict(tokenizer="RANKS"),
         code=0, notes=dict(special_text=1)),
    # 18: the tokenizer's file
    Case("no tokenizer", {"a.txt": GOOD}, dict(tokenizer="gone.model"),
         said=("gone.model", "not found", "--tokenizer=FILE")),
    Case("no tokenizer, hash", {"a.txt": GOOD},
         dict(tokenizer="gone.model", tokenizer_sha256="12ab" * 16),
         said=("gone.model", "not found", "12ab" * 16)),
    Case("half a tokenizer", {"a.txt": GOOD, "half.model": b"\n\x0e\n\x05<unk>"},
         dict(tokenizer="text/half.model"), said=("half.model", "truncated or of another kind")),
    Case("not a tokenizer", {"a.txt": GOOD, "x.bin": "{}"}, dict(tokenizer="text/x.bin"),
         said=("x.bin", "none of .model, .tiktoken, .json", "--tokenizer=FILE")),
    Case("not a tokenizer.json", {"a.txt": GOOD, "x.json": "{}"}, dict(tokenizer="text/x.json"),
         said=("x.json", "truncated or of another kind")),
    Case("tokenizer with another hash", {"a.txt": GOOD},
         dict(tokenizer="MODEL", tokenizer_sha256="12ab" * 16),
         said=("small.model", "12ab" * 16, "HASH")),
    Case("no such encoding of tiktoken", {"a.txt": GOOD}, dict(tokenizer="tiktoken:gpt9"),
         said=("tiktoken:gpt9", ".tiktoken file")),
    Case("tokenizer too big", {"a.txt": GOOD}, dict(tokenizer="MODEL", vocab_size=299),
         said=("small.model", "300", "299", "--vocab_size=300")),
    Case("too little text for a tokenizer", {"a.txt": GOOD}, dict(vocab_size=4096),
         said=("4096", "--vocab_size")),
    Case("no room for bytes", {"a.txt": GOOD}, dict(vocab_size=200), said=("200", "vocab")),
    # 19: more ids than 16 bits hold
    Case("wide ids", {"a.txt": GOOD}, dict(tokenizer="MANY", vocab_size=66_001), code=0),
    # 25: fewer tokens than rows
    Case("too little text", {"a.txt": "ban do ki"}, dict(tokenizer="MODEL"),
         said=("source text", "0 rows of 17", "2 chunks", "--n_chunks", "--seq_len")),
    # 24: far more rows than there are
    Case("repeated too often", {"a.txt": GOOD}, dict(tokenizer="MODEL", rows_per_chunk=100_000),
         said=("source text has ", "limit is 100", "--rows_per_chunk")),
    Case("one empty file", {"a.txt": GOOD, "b.txt": b""}, code=0, notes=dict(blank=1)),
]


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_bad_inputs(case, tmp_path, monkeypatch, capfd, model_file, ranks_file, many_ranks_file):
    """Said in one line that names the place and the way out, and nothing is written; or counted."""
    monkeypatch.chdir(tmp_path)
    write(Path("text"), case.files)
    files = dict(MODEL=model_file, RANKS=ranks_file, MANY=many_ranks_file)
    options = dict(input="text") | case.options
    options = {k: files.get(v, v) for k, v in options.items()}
    before = files_of(Path("."))
    capfd.readouterr()
    code = prepare_here(**options)
    out, err = capfd.readouterr()
    after = {k: v for k, v in files_of(Path(".")).items() if k.partition("/")[0] != "data"}
    assert code == case.code, err
    assert after == before
    if code:
        digest = hashlib.sha256(model_file.read_bytes()).hexdigest()
        assert len(err.splitlines()) == 1 and err.startswith("error: ") and "Traceback" not in out
        for part in case.said:
            assert part.replace("HASH", digest) in err
        assert not Path("data/demo").exists()
    else:
        manifest = read_manifest(Path("data/demo"))
        one, = manifest["sources"]
        assert err == "" and one["notes"] == case.notes
        prepare.verify(Path("data/demo"), manifest)
        assert [path.name for path in Path("data").iterdir()] == ["demo"]


@pytest.mark.parametrize("files, options, stretches", [
    ({"a.txt": "ban do ki"}, dict(tokenizer="MODEL"), 1), ({"a.jsonl": "[1"}, {}, 0),
    ({"a.jsonl": "[1"}, dict(tokenizer="MODEL"), 0), ({"a.txt": GOOD}, dict(vocab_size=4096), 0),
    ({"a.txt": GOOD, "b.txt": b"\xff"}, dict(tokenizer="MODEL"), 0)],
    ids=["too little text", "broken json, bpe", "broken json", "vocab", "not utf-8"])
def test_an_error_leaves_finished_stretches_or_nothing(
        files, options, stretches, tmp_path, monkeypatch, model_file):
    monkeypatch.chdir(tmp_path)
    write(Path("text"), files)
    Path("data").mkdir()
    before = files_of(Path("."))
    options = {k: model_file if v == "MODEL" else v for k, v in options.items()}
    assert prepare_here(input="text", **options) == DATA
    after = files_of(Path("."))
    part = [name for name in after if name.startswith("data/demo.part")]
    assert sum(Path(name).match("work/*.json") for name in part) == stretches
    assert bool(part) == (stretches > 0)
    assert {k: v for k, v in after.items() if k not in part} == before  # no lock, no data/demo


def prepared_text(files: dict, monkeypatch, root: Path, **options) -> tuple[str, dict]:
    """All training and held-out text of one document's file, and the manifest."""
    monkeypatch.chdir(root)
    write(Path("text"), files)
    assert prepare_here(input="text", seq_len=1, n_chunks=1, **options) == 0
    manifest = read_manifest(Path("data/demo"))
    rows = {}
    for name in ("train_000.bin", "valid_text.bin"):
        origin = np.load(f"data/demo/provenance/{name}.npy")[:, 2].tolist()
        rows |= dict(zip(origin, open_rows(Path("data/demo"), manifest, name).tolist(),
                         strict=True))
    ids = [i for _, row in sorted(rows.items()) for i in row]
    return load_tokenizer(Path("data/demo")).decode(ids), manifest


def test_odd_characters_are_normalised_as_documented(tmp_path, monkeypatch, model_file):
    """The byte order mark goes, CRLF becomes LF, a lone surrogate U+FFFD; NUL and CR stay."""
    files = {"a.jsonl": json.dumps(dict(text="\ufeffx\r\ny\rz\0 \ud800 </s> \ufeff.")) + "\n"}
    text, manifest = prepared_text(files, monkeypatch, tmp_path, tokenizer=model_file)
    assert "x\ny\rz\0 \ufffd </s> \ufeff.".startswith(text) and len(text) > 12
    assert manifest["sources"][0]["notes"] == dict(bom=1, crlf=1, surrogates=1, nul=1,
                                                   special_text=1)


def test_a_line_break_on_the_edge_of_a_part_is_one(tmp_path, monkeypatch, model_file):
    """CR and LF that fall into two reads are still CRLF."""
    monkeypatch.setattr(sources, "PART", 8)
    text, manifest = prepared_text({"a.txt": "1234567\r\nab\r\nc\r\nd"}, monkeypatch, tmp_path,
                                   tokenizer=model_file)
    assert "1234567\nab\nc\nd".startswith(text) and len(text) > 12
    assert manifest["sources"][0]["notes"] == dict(crlf=3)


def test_the_byte_that_is_not_text_is_found_in_any_part(tmp_path, monkeypatch):
    """Whatever the parts a file is read in, the offset is that of Python's own decoder."""
    path = tmp_path / "a.txt"

    @EXAMPLES
    @given(st.binary(max_size=12) | st.text(max_size=8).map(lambda t: t.encode("utf-8", "replace")),
           st.binary(max_size=6), st.integers(1, 9))
    def check(start, end, part):
        monkeypatch.setattr(sources, "PART", part)
        path.write_bytes(start + end)
        try:
            (start + end).decode()
            bad = None
        except UnicodeDecodeError as error:
            bad = error.start
        found = sources.scan(path, "utf-8")
        assert found[:2] == (hashlib.sha256(start + end).hexdigest(), bad)
    check()


def test_wide_ids_do_not_wrap(tmp_path, monkeypatch, many_ranks_file):
    monkeypatch.chdir(tmp_path)
    write(Path("text"), {"a.txt": "ban " * 100})
    assert prepare_here(input="text", tokenizer=many_ranks_file, vocab_size=66_001) == 0
    manifest = read_manifest(Path("data/demo"))
    assert manifest["dtype"] == "uint32" and manifest["tokenizer"]["eos"] == 66_000
    rows = np.fromfile("data/demo/train_000.bin", "<u4").reshape(-1, 17)
    assert np.array_equal(rows, open_rows(Path("data/demo"), manifest, "train_000.bin"))
    coder = load_tokenizer(many_ranks_file).coder
    whole = coder.encode_ordinary("ban " * 100) + [66_000]
    origin = np.load("data/demo/provenance/train_000.bin.npy")[:, 2]
    assert [whole[i * 17:i * 17 + 17] for i in origin] == rows.tolist() and rows.max() > 65_535


def test_no_sources_and_no_input(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bare.py").write_text(DEMO.read_text() + "sources = []\n")
    assert prepare_here(Path("bare.py")) == USAGE
    err = capsys.readouterr().err
    assert "bare.py" in err and "--input=PATH" in err and sorted(files_of(Path("."))) == ["bare.py"]


def test_what_a_killed_preparation_left_is_no_obstacle(tmp_path, monkeypatch, model_file):
    monkeypatch.chdir(tmp_path)
    write(Path("text"), {"a.txt": GOOD})
    write(Path("data/demo.part"), {"train_007.bin": b"rest", "provenance/x.npy": b"rest"})
    assert prepare_here(input="text", tokenizer=model_file) == 0
    assert [p.name for p in Path("data").iterdir()] == ["demo"]
    assert not [name for name in files_of(Path("data/demo")) if name.endswith(("x.npy", "7.bin"))]


# ---- kills, full disks, two at once -------------------------------------------------------------

MIX = dict(rows_per_chunk=900, n_chunks=3, vocab_size=300)


def make_mix(root: Path) -> Path:
    """A run file of two sources, one with documents held out, one with rows and many epochs."""
    make_text(root / "many", 130)
    write(root / "few", {"a.txt": story(150, 3), "b.md": story(150, 4)})
    return mix_file(few=dict(path=str(root / "few")), many=dict(path=str(root / "many"), weight=3))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, dict[str, bytes | None], int]:
    """The folder of the mix's text, data/ as it should be, and the number of stretches."""
    root, done = tmp_path_factory.mktemp("mix"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        take_small_steps(patch)
        patch.setattr(tokens, "Writer", lambda *args: done.append(args) or Writer(*args))
        assert prepare_here(make_mix(root), dataset="set", **MIX) == 0
    few, many = read_manifest(root / "data/set")["sources"]
    assert few["epochs"] > 3 and few["valid_rows"] > 0 and many["rows_left_out"] > 300
    coder = sentencepiece.SentencePieceProcessor(model_file=str(root / "data/set/tokenizer.model"))
    trains = [packer(coder, documents_of(root / name, s), name, s, 16)[0]
              for s, name in enumerate(("few", "many"))]
    for k, rows in enumerate(chunks_of(trains, [225, 675], 3)):
        found = np.fromfile(root / f"data/set/train_00{k}.bin", "<u2")
        assert np.array_equal(found, np.ravel(rows))
    return root, files_of(root / "data"), len(done)


def forked(go_wrong: Callable[[], object], **options) -> int:
    """The process id of a prepare.py in which something goes wrong; `said` gets its stderr."""
    if pid := os.fork():
        return pid
    try:
        sys.stderr = open("said", "w", buffering=1)
        go_wrong()
        os._exit(prepare_here(Path("mix.py"), **(MIX | dict(dataset="set") | options)))
    finally:
        os._exit(1)


def ended(pid: int) -> tuple[int, str]:
    """The exit code of a process and what it said, its file removed."""
    code, said = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), Path("said").read_text()
    Path("said").unlink()
    return code, said


def die_at(place: object, name: str, end: str, number: int, after: bool) -> None:
    """End this process, as a kill does, in a call of a function whose first argument ends so."""
    old, seen = getattr(place, name), []

    def new(*args, **keys):
        seen.append(str(args[0]).endswith(end))
        last = seen[-1] and sum(seen) == number
        if last and not after:
            os._exit(9)
        found = old(*args, **keys)
        if last:
            os._exit(9)
        return found
    setattr(place, name, new)


POINTS = [  # the function, what its first argument ends in, the how manyth call, after it?
    (prepare, "write_atomic", ".tokenizer", 1, False),
    (prepare, "write_atomic", ".tokenizer", 1, True),
    (tokens, "write_atomic", ".json", 1, False), (tokens, "write_atomic", ".json", 7, False),
    (tokens, "write_atomic", ".json", 7, True),
    (prepare, "write_atomic", "dealt.json", 1, False),
    (prepare, "write_atomic", "dealt.json", 5, False),
    (prepare, "write_atomic", "dealt.json", 20, True), (prepare, "write_origins", "", 1, False),
    (np, "save", "train_001.bin.npy", 1, False), (prepare, "file_facts", "", 1, True),
    (nano360.files, "write_atomic", "manifest.json", 1, False),
    (nano360.files, "write_atomic", "manifest.json", 1, True),
    (nano360.files, "write_atomic", "manifest.json.sha256", 1, True),
    (tokens, "sync", "manifest.json", 1, True), (tokens, "sync", "data", 1, False),
    (shutil, "rmtree", "set.part", 1, False)]


@pytest.mark.parametrize("point", POINTS, ids=lambda p: " ".join(map(str, [*p[1:4], p[4] * "after"])
                                                                 ).strip())
def test_killed_anywhere_a_preparation_goes_on(point, undisturbed, tmp_path, monkeypatch,
                                               small_steps, jobs_done):
    """To the same bytes, and without doing a finished stretch again."""
    root, should, stretches = undisturbed
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    monkeypatch.setattr(prepare, "SYNC_EVERY", 1)
    code, said = ended(forked(lambda: die_at(*point)))
    assert code == 9, said
    left = files_of(Path("data"))
    assert "set.lock" in left and ("set" in left or "set.part" in left)
    names = {name.partition(".json")[0] for name in left if name.endswith(".json")}
    finished = [name for name in names if f"{name}.tokens" in left]
    assert prepare_here(Path("mix.py"), dataset="set", **MIX) == 0
    assert files_of(Path("data")) == should  # and neither a lock nor a .part
    made = "set" in left or any(name.endswith("manifest.json.sha256") for name in left)
    assert len(jobs_done) == (0 if made else stretches - len(finished))


def test_a_stretch_that_was_damaged_is_made_again(undisturbed, tmp_path, monkeypatch, small_steps,
                                                  jobs_done):
    """Finished ones are compared with their hash; another recipe takes what is the same in both."""
    root, should, stretches = undisturbed
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "deal", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_here(Path("mix.py"), dataset="set", **MIX)
        assert len(jobs_done) == stretches
        with pytest.raises(ZeroDivisionError):  # the same stretches, another way to deal them
            prepare_here(Path("mix.py"), dataset="set", **(MIX | dict(n_chunks=2)))
        assert len(jobs_done) == stretches
    found = sorted(Path("data/set.part/work").glob("*.tokens"))
    for path, change in zip(found[::3], itertools.cycle((
            lambda b: b[:-2], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: None)), strict=False):
        if (content := change(path.read_bytes())) is None:
            path.unlink()
        else:
            path.write_bytes(content)
    found[1].with_suffix(".docs").write_bytes(b"")
    jobs_done.clear()
    assert prepare_here(Path("mix.py"), dataset="set", **MIX) == 0
    assert len(jobs_done) == len(found[::3]) + 1 and files_of(Path("data")) == should


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_dealing_goes_on_where_it_was_noted(overlap, undisturbed, tmp_path, monkeypatch,
                                            small_steps):
    """At every note, with all that was written after the one before it lost."""
    root, should, _ = undisturbed
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    monkeypatch.setattr(prepare, "SYNC_EVERY", 3000)
    options = MIX | dict(dataset="set", overlap=str(overlap).lower())
    if overlap:
        assert prepare_here(Path("mix.py"), **options) == 0
        should = files_of(Path("data"))
        shutil.rmtree("data")
    note, saved, notes = prepare.write_atomic, {}, []

    def killed(path, text):
        """The disk has what was there at the last note; the machine dies at the next but one."""
        if path.name != "dealt.json":
            return note(path, text)
        notes.append(json.loads(text))
        chunks = sorted(path.parent.glob("train_*.bin"))
        if len(notes) % 3 == 0:
            for chunk in chunks:
                chunk.write_bytes(saved[chunk])
            raise KeyboardInterrupt
        note(path, text)
        saved.update({chunk: chunk.read_bytes() for chunk in chunks})
    monkeypatch.setattr(prepare, "write_atomic", killed)
    assert prepare_here(Path("mix.py"), **(options | dict(n_chunks=2))) == 130
    codes = notes.clear() or []  # that was another set, in the same place: its note holds for none
    while 0 not in codes:
        codes.append(prepare_here(Path("mix.py"), **options))
    assert set(codes) == {130, 0} and len(codes) > 8
    assert files_of(Path("data")) == should
    assert len(set(notes)) > 8 and notes == sorted(notes)
    assert len(notes) == len(set(notes)) + len(codes) - 1  # made again, in place


def test_killed_at_any_moment_a_preparation_goes_on(tmp_path):
    """As a user runs it, with two workers, which do not outlive it."""
    make_text(tmp_path / "many", 2000)
    (tmp_path / "mix.py").write_text(
        DEMO.read_text() + "sources = [dict(name='many', path='many')]\nworkers = 2\n"
        "vocab_size = 300\nseq_len = 16\nn_chunks = 3\nrows_per_chunk = 10_000\n")
    argv = ("mix.py", "--dataset=set")
    began = time.perf_counter()
    soak_prepare.finish(soak_prepare.start(tmp_path, *argv))
    whole = time.perf_counter() - began
    should = files_of(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    for share in (0.5, 0.7, 0.85, 0.95):
        with soak_prepare.start(tmp_path, *argv) as killed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                killed.wait(whole * share)
            killed.kill()
        soak_prepare.wait_for_workers(tmp_path)
    soak_prepare.finish(soak_prepare.start(tmp_path, *argv))
    assert files_of(tmp_path / "data") == should


def test_two_at_once_are_refused_and_a_lock_of_the_dead_is_not(undisturbed, tmp_path, monkeypatch,
                                                               capsys, small_steps):
    root, should, _ = undisturbed
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    other = forked(lambda: setattr(prepare, "make", lambda *_: (
        Path("data/here").touch(), time.sleep(60))))
    try:
        while not Path("data/here").exists():
            assert os.waitpid(other, os.WNOHANG)[0] == 0, Path("said").read_text()
            time.sleep(0.01)
        Path("data/here").unlink()
        before = files_of(Path("."))
        assert prepare_here(Path("mix.py"), dataset="set", **MIX) == CHECKPOINT
        err = capsys.readouterr().err
        assert f"data/set is in the hands of process {other} on " in err
        assert len(err.splitlines()) == 1 and files_of(Path(".")) == before
        assert is_locked(Path("data/set"))
        assert prepare_here(Path("mix.py"), dataset="another", **MIX) == 0  # in other hands
    finally:
        os.kill(other, signal.SIGKILL)
    assert ended(other)[0] == -signal.SIGKILL
    assert Path("data/set.lock").is_file() and not is_locked(Path("data/set"))
    shutil.rmtree("data/another")
    assert prepare_here(Path("mix.py"), dataset="set", **MIX) == 0
    assert files_of(Path("data")) == should and not is_locked(Path("data/set"))


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
        undisturbed, tmp_path, monkeypatch, capsys, small_steps):
    root, should, _ = undisturbed
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    Path("data").mkdir()
    usage = types.SimpleNamespace(free=1000)
    for finished in (False, True):
        if finished:  # what an earlier attempt left
            with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
                patch.setattr(prepare, "deal", lambda *_: 1 / 0)
                prepare_here(Path("mix.py"), dataset="set", **MIX)
        before = files_of(Path("."))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            capsys.readouterr()
            assert prepare_here(Path("mix.py"), dataset="set", **MIX) == CHECKPOINT
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and re.search("data has 1.00 ?kB free", err)
        assert re.search("about [0-9.]+ ?kB are needed", err) and "what is finished stays" in err
        assert files_of(Path(".")) == before
    assert prepare_here(Path("mix.py"), dataset="set", **MIX) == 0
    assert files_of(Path("data")) == should


@pytest.mark.parametrize("limit, workers, at", [
    (8_000, 1, "*.tokens"), (30_000, 2, "*.docs"), (30_000, 1, "train_000.bin")])
def test_a_disk_that_fills_up_is_one_line_and_the_rest_is_made_later(
        limit, workers, at, undisturbed, tmp_path, monkeypatch, small_steps):
    """No file may grow beyond the limit: a stretch cannot be written, or a chunk."""
    root, should, _ = undisturbed
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    shutil.copy(root / "mix.py", "mix.py")
    code, err = ended(forked(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
                             workers=workers))
    assert code == CHECKPOINT and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and "File too large" in err
    assert list(Path("data/set.part").rglob(at))
    assert not Path("data/set").exists() and not Path("data/set.lock").exists()
    assert prepare_here(Path("mix.py"), dataset="set", **MIX) == 0
    assert files_of(Path("data")) == should


def test_words_beside_hub_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for argv in (["--hub=a/b", "--to=x", "configs/demo.py"], ["demo.py", "--hub=a/b"],
                 ["--hub=a/b"], ["--hub=a/b", "--to="], ["--hub=a/b", "--to=x", "--seq_len=3"]):
        assert run(prepare.main, "", [prepare.HubOptions], argv) == USAGE
    err = capsys.readouterr().err.splitlines()
    assert "expected --hub=REPO --to=DIR alone, got 'configs/demo.py'" in err[0]
    assert "'demo.py'" in err[1] and "'to'" in err[2] and "--to" in err[3] and "seq_len" in err[4]
    assert not files_of(Path("."))


# ---- what its readers check ----------------------------------------------------------------------

def unreadable(folder: Path, name: str = "train_001.bin") -> str:
    """Why rows cannot be opened, in one line."""
    with pytest.raises(Stop) as stop:
        open_rows(folder, read_manifest(folder), name)
    assert stop.value.code == DATA and len(str(stop.value).splitlines()) == 1
    return str(stop.value)


def test_rows_are_opened_as_they_were_written(copied):
    manifest = read_manifest(copied)
    for name, rows, _ in bins(copied):
        opened = open_rows(copied, manifest, name)
        assert opened.shape == (manifest["files"][name]["rows"], 17) and opened.dtype == "uint16"
        assert np.array_equal(opened, rows)
    with pytest.raises(ValueError):
        opened[0, 0] = 1  # mapped for reading


@pytest.mark.parametrize("change, found", [
    (lambda b: b[:-1], -1), (lambda b: b[:-34], -34), (lambda b: b"", None),
    (lambda b: b + b"\0" * 34, 34), (lambda b: b + b"\0", 1)],
    ids=["truncated", "row less", "empty", "row more", "odd byte"])
def test_rows_of_another_size_are_refused(copied, change, found):
    path = copied / "train_001.bin"
    good = path.read_bytes()
    path.write_bytes(change(good))
    size = 0 if found is None else len(good) + found
    said = unreadable(copied)
    assert f"{path} has {size} bytes, expected {len(good)} " in said and "of 17 uint16" in said


def test_changed_rows_are_refused(copied):
    """Any one bit, and two files that changed places."""
    path, manifest = copied / "train_001.bin", read_manifest(copied)
    good, dice = path.read_bytes(), random.Random(1)
    for _ in range(20):
        at = dice.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << dice.randrange(8)]) + good[at + 1:])
        said = unreadable(copied)
        assert f"{path} was changed" in said and sha256_file(path) in said
        assert manifest["files"]["train_001.bin"]["sha256"] in said
    shutil.copy(copied / "train_000.bin", path)
    assert f"{path} was changed" in unreadable(copied)
    path.unlink()
    assert f"{path} is missing" in unreadable(copied)
    assert "train_999.bin is missing" in unreadable(copied, "train_999.bin")


@pytest.mark.parametrize("bad", [300, 65_535])
def test_an_id_that_the_tokenizer_has_not_is_refused(copied, bad):
    """Even under a correct hash: it would end in the embedding, far from its cause."""
    path, manifest = copied / "train_001.bin", read_manifest(copied)
    rows = np.fromfile(path, np.uint16).reshape(-1, 17)
    for value in (299, bad):
        rows[2, 5] = value
        rows.tofile(path)
        manifest["files"][path.name]["sha256"] = sha256_file(path)
        write_sealed(copied / "manifest.json", manifest)
        if value == 299:  # the last that it has
            assert open_rows(copied, read_manifest(copied), path.name)[2, 5] == 299
    said = unreadable(copied)
    assert f"{path}: id {bad} at row 2, token 5 (byte {(2 * 17 + 5) * 2})" in said and "300" in said


def test_verify_finds_what_changed_and_changes_nothing(copied, capfd):
    """Each file of the set in turn: a bit, and the whole file."""
    names = [name for name, content in files_of(copied).items() if content is not None]
    assert {"manifest.json", "manifest.json.sha256", "tokenizer.model", "train_000.bin",
            "provenance/text_files.json", "provenance/train_000.bin.npy"} <= set(names)
    manifest = read_manifest(copied)
    assert set(names) == {*manifest["files"], "manifest.json", "manifest.json.sha256"}
    for name in names:
        path = copied / name
        good = path.read_bytes()
        for bad in (good[:-1] + bytes([good[-1] ^ 1]) if name != "manifest.json.sha256"
                    else b"0" + good, None):
            path.unlink() if bad is None else path.write_bytes(bad)
            before = files_of(Path("."))
            capfd.readouterr()
            assert prepare_here(dataset="small", verify="true") == DATA, name
            out, err = capfd.readouterr()
            assert str(path) in err or path.name in err
            assert len(err.splitlines()) == 1 and "as the manifest says" not in out
            assert files_of(Path(".")) == before
        path.write_bytes(good)
    assert prepare_here(dataset="small", verify="true") == 0


def test_a_set_that_is_not_there_or_of_another_format(copied, capsys):
    assert prepare_here(dataset="gone", verify="true") == DATA
    assert "gone not found" in (err := capsys.readouterr().err) and "prepare.py" in err
    manifest = read_manifest(copied)
    write_sealed(copied / "manifest.json", manifest | dict(format=99))
    for option in ("verify", "stats"):
        assert prepare_here(dataset="small", **{option: "true"}) == DATA
        err = capsys.readouterr().err
        assert "has format 99" in err and f"reads {prepare.FORMAT}" in err
