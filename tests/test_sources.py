"""Where text and rows come from: every format, FIM, how rows are cut, releases, what is elsewhere.

    pytest tests/test_sources.py

What is right is worked out here once more: by sentencepiece alone, from pieces back to text, with
packers and orders in plain Python.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import evaluate
import prepare
import train
from conftest import REPO
from nano360 import rows, sources
from nano360.config import DATA, ENVIRONMENT, SECTIONS, USAGE, Stop, run
from nano360.hub import fetch as net, release as release_rows
from nano360.rows import open_rows, read_manifest
from nano360.sources import Remote

BOS, EOS = 1, 2
HELD_OUT, HELD_ORDER, FILE_ORDER = -1, 2**32 - 2, 2**32 - 1
MARKS = ("<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|filename|> <|gh_stars|> "
         "<|issue_start|> <|issue_comment|> <|issue_closed|> <|jupyter_start|> <|jupyter_text|> "
         "<|jupyter_code|> <|jupyter_output|> <|empty_output|> <|commit_before|> <|commit_msg|> "
         "<|commit_after|> <|reponame|> <|im_start|> <|im_end|> <|sys_start|> <|sys_end|>").split()
RUN = dict(n_layer=1, n_head=2, n_embd=16, n_inner=32, vocab_size=430, seq_len=7, n_chunks=1,
           valid_share=0.0, workers=1, lr=1e-2, batch_size=4)


# ---- what the tests are made with ----------------------------------------------------------------

def story(words: int, seed: int) -> str:
    """Words with blanks, indents, line breaks and characters of one to four bytes."""
    dice = random.Random(seed)
    starts, ends = ("ba", "do", "ki", "(x", "re", "zö", "漢", "🙂"), ("", "n", "st")
    parts = [a + b for a in starts for b in ends]
    gaps = [" "] * 12 + ["\n", "  ", "\n    ", ", "]
    return "".join("".join(dice.choices(parts, k=dice.randint(1, 3))) + dice.choice(gaps)
                   for _ in range(words))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A sentencepiece model of 400 pieces."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(prepare.train_tokenizer(iter([story(5000, 7)]), 400))
    return path


@pytest.fixture
def room(tmp_path, monkeypatch, model_file) -> Path:
    """An empty folder to work in, with the model in it."""
    monkeypatch.chdir(tmp_path)
    Path("small.model").symlink_to(model_file)
    return tmp_path


def prepare_here(parts: list[dict] | dict, *words: str, **keys) -> int:
    """prepare.py's exit code for a run file of these sources; the set is data/run."""
    parts = [dict(name="text") | one for one in ([parts] if isinstance(parts, dict) else parts)]
    given = RUN | dict(tokenizer="small.model", sources=parts) | keys
    Path("run.py").write_text("".join(f"{k} = {v!r}\n" for k, v in given.items()))
    return run(prepare.main, prepare.__doc__, [prepare.PrepareOptions, *SECTIONS.values()],
                       ["run.py", *words])


def made(*args, **keys) -> Path:
    assert prepare_here(*args, **keys) == 0
    return Path("data") / keys.get("dataset", "run")


def refused(capfd, code: int, *args, **keys) -> str:
    """Why, in one line; no set is left behind."""
    capfd.readouterr()
    assert prepare_here(*args, **keys) == code
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert not Path("data/run").exists()
    return err


def files_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines_of(texts: list, **more) -> str:
    return "".join(json.dumps(dict(text=text, **more), ensure_ascii=i % 2 > 0) + "\n"
                   for i, text in enumerate(texts))


def rows_in(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a file and the origin of each, read without prepare.py."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = np.fromfile(folder / name, manifest["dtype"]).reshape(-1, manifest["seq_len"] + 1)
    origin = np.load(folder / "provenance" / f"{name}.npy")
    assert len(rows) == len(origin) == manifest["files"][name]["rows"]
    return rows, origin


def stream_of(folder: Path, name: str = "text", epoch: int = 0) -> list[int]:
    """The tokens of a source in an epoch, by its rows laid end to end."""
    recipe, found = json.loads((folder / "manifest.json").read_text())["recipe"], {}
    number = [one["name"] for one in recipe["sources"]].index(name)
    for path in folder.glob("train_*.bin"):
        for row, (s, e, i) in zip(*rows_in(folder, path.name), strict=True):
            if (s, e) == (number, epoch):
                assert found.setdefault(int(i), row) is row
    assert sorted(found) == [*range(len(found))]
    tokens = found[0].tolist()
    for i in range(1, len(found)):
        assert not recipe["overlap"] or found[i][0] == tokens[-1]
        tokens += found[i].tolist()[recipe["overlap"]:]
    return tokens


def documents_of(folder: Path, name: str = "text", epoch: int = 0
                 ) -> list[tuple[str, int, list[int]]]:
    """(file, line, ids) of every document that a source's tables name; the last may be cut."""
    files = json.loads((folder / f"provenance/{name}_files.json").read_text())
    table = np.load(folder / f"provenance/{name}_epoch_{epoch}.npy").tolist()
    tokens = stream_of(folder, name, epoch)
    ends = [start for start, _, _ in table[1:]] + [len(tokens)]
    return [(files[f], line, tokens[start:end])
            for (start, f, line), end in zip(table, ends, strict=True)]


def check_documents(folder: Path, texts: dict[tuple[str, int], str], model: Path, name: str = "text"
                    ) -> None:
    """Every document once, its ids those of sentencepiece and EOS; only the tail may be missing."""
    coder, found = sentencepiece.SentencePieceProcessor(model_file=str(model)), documents_of(
        folder, name)
    assert sorted((file, line) for file, line, _ in found) == sorted(texts)
    missing = 0
    for file, line, ids in found:
        should = coder.encode(texts[file, line]) + [EOS]
        assert ids == should[:len(ids)], (file, line)
        missing += len(should) - len(ids)
    seq_len = read_manifest(folder)["seq_len"]
    assert 0 <= missing <= seq_len and len(found) == read_manifest(folder)["sources"][0][
        "documents"]


# ---- formats -------------------------------------------------------------------------------------

TEXTS = [story(20 + 5 * (i % 9), i) for i in range(40)] + [
    " begins with a blank", "f(x)", "\n\n  def g():\n\treturn 1\n", "a\r\nb\r\n", "\ufeffbom",
    "x\0y", "</s> <s> <|fim_prefix|>", "é" * 300, "nowhere" * 900]


def cleaned(text: str) -> str:
    """What is documented to happen to a text."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard, for .zst, is not installed")
    return zstandard.ZstdCompressor().compress(content)


def parquet(path: Path, columns: dict[str, list], **options) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow, for .parquet, is not installed")
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_lines_and_columns(ending, room, model_file):
    """Number n of a file is its n-th line, blank ones counted, or row."""
    half, places = len(TEXTS) // 2, {}
    for name, texts in (("b/one", TEXTS[:half]), ("two", TEXTS[half:])):
        content = lines_of(texts).encode()
        if ending == "parquet":
            parquet(Path(f"in/{name}.parquet"), dict(id=[*range(len(texts))], text=texts),
                    row_group_size=7)
            skipped = 0
        else:
            content = b"\n" + content.replace(b"}\n", b"}\r\n", 3)  # a blank line; some end in CRLF
            packed = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zst}[ending](content)
            write(Path("in"), {f"{name}.{ending}": packed})
            skipped = 1
        places |= {(f"{name}.{ending}", i + 1 + skipped): cleaned(text)
                   for i, text in enumerate(texts)}
    folder = made(dict(path="in"))
    check_documents(folder, places, model_file)
    one, = read_manifest(folder)["sources"]
    assert one["notes"] == dict(bom=1, crlf=2, nul=1, special_text=2)
    assert one["bytes"] == sum(len(text.encode()) for text in places.values())


def test_members_of_a_packed_file_are_one(room, model_file):
    """gzip and zstd files may be several laid end to end, as parallel packers write them."""
    parts = [lines_of([text]).encode() for text in TEXTS[:6]]
    write(Path("in"), {"a.jsonl.gz": b"".join(map(gzip.compress, parts)),
                       "b.jsonl.zst": b"".join(map(zst, parts))})
    check_documents(made(dict(path="in")), {(name, i + 1): cleaned(text) for i, text in
                    enumerate(TEXTS[:6]) for name in ("a.jsonl.gz", "b.jsonl.zst")}, model_file)


@pytest.mark.parametrize("ending", ["txt.gz", "txt.zst", "plain"])
def test_files_that_are_documents(ending, room, model_file):
    """A tree of texts and programs; what is hidden or of no known kind is passed over."""
    kinds = ["c", "rs", "py", "md"] if ending == "plain" else [ending]
    pack = {"txt.gz": gzip.compress, "txt.zst": zst, "plain": bytes}[ending]
    files = {f"{'lib/deep/' * (i % 3)}{i}.{kinds[i % len(kinds)]}": text
             for i, text in enumerate(TEXTS)}
    write(Path("in"), {name: pack(text.encode()) for name, text in files.items()} | {
        ".git/config.py": "hidden", "lib/.hidden.c": "hidden", "lib/.d/x/y.c": "hidden",
        "lib/logo.png": b"\x89PNG", "Makefile": "all:", "x.bin.gz": b"no"})
    check_documents(made(dict(path="in")), {(name, 1): cleaned(text) for name, text in
                                            files.items()}, model_file)


def test_a_long_packed_text_is_one_document(room, model_file, monkeypatch):
    """Read in parts whose edges fall into characters and line ends."""
    monkeypatch.setattr(sources, "PART", 11)
    text = "zö\r\n漢🙂 x\r\n" * 400
    write(Path("in"), {"a.txt.gz": gzip.compress(text.encode()), "b.txt": text})
    check_documents(made(dict(path="in")), {(name, 1): cleaned(text) for name in
                                            ("a.txt.gz", "b.txt")}, model_file)


@pytest.mark.parametrize("where, wanted", [
    ("meta.set=Book", lambda i: i % 3 == 0), ("meta.set=a=b", lambda i: i % 3 == 1),
    ("year=2001", lambda i: i % 2), ("meta.on=true", lambda i: i % 5 == 0)])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_where(where, wanted, ending, room, model_file):
    """Only the documents that have a value somewhere inside; the others are counted."""
    rows = [dict(text=text, year=2000 + i % 2, meta=dict(set=("Book", "a=b", "Books")[i % 3],
                                                         on=i % 5 == 0))
            for i, text in enumerate(TEXTS[:30])]
    if ending == "parquet":
        parquet(Path("in/x.parquet"), {k: [row[k] for row in rows] for k in rows[0]})
        odd = 0
    else:  # what has no such key, or something else there, has not the value either
        odd = ['{"text": "x"}', '{"text": "x", "meta": 5}', '{"text": "x", "meta": {"set": {}}}']
        write(Path("in"), {"x.jsonl": "\n".join([json.dumps(row) for row in rows] + odd)})
        odd = len(odd)
    folder = made(dict(path="in", where=where))
    places = {(f"x.{ending}", i + 1): cleaned(row["text"]) for i, row in enumerate(rows)
              if wanted(i)}
    check_documents(folder, places, model_file)
    assert read_manifest(folder)["sources"][0]["notes"]["passed_over"] == 30 - len(places) + odd


def test_each_source_has_its_own_key_and_files(room, model_file):
    write(Path("in"), {"a/1.jsonl": lines_of(["by text " * 9]),
                       "b/2.jsonl": json.dumps(dict(content="by content " * 9, text="no")),
                       "b/deep/3.jsonl": json.dumps(dict(content="deep " * 9)),
                       "b/4.json": json.dumps(dict(content="not a known kind")),
                       "c.weird": "as a text " * 9})
    folder = made([dict(name="a", path="in/a"), dict(name="c", path="in", files="*.weird"),
                   dict(name="b", path="in", files="b/*.jsonl", text_key="content")])
    coder = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for name, should in (("a", {"1.jsonl": "by text " * 9}), ("c", {"c.weird": "as a text " * 9}),
                         ("b", {"b/2.jsonl": "by content " * 9, "b/deep/3.jsonl": "deep " * 9})):
        found = documents_of(folder, name)
        assert {file for file, _, _ in found} == should.keys()
        for file, _, ids in found:
            assert ids == (coder.encode(should[file]) + [EOS])[:len(ids)] and len(ids) > 5


@pytest.mark.parametrize("subset", ["all", "even", "odd", "tenth"])
def test_subset(subset, room, model_file):
    """By place among the names that the pattern leaves, in their order."""
    names = [f"{i:02d}.txt" for i in range(23)]
    write(Path("in"), {name: f"{name} " * 20 for name in names} | {"0.csv": "x", "00.md": "x"})
    taken = [n for i, n in enumerate(names)
             if dict(all=True, even=i % 2 == 0, odd=i % 2 == 1, tenth=i < 2)[subset]]
    folder = made(dict(path="in", files="*.txt", subset=subset))
    check_documents(folder, {(name, 1): f"{name} " * 20 for name in taken}, model_file)


def test_subsets_that_are_empty(room, capfd):
    write(Path("in"), {f"{i}.txt": "some words " * 20 for i in range(9)})
    said = refused(capfd, DATA, dict(path="in", subset="tenth"))
    assert "tenth of 9 files" in said and "10" in said
    said = refused(capfd, DATA, dict(path="in", files="3.*", subset="odd"))
    assert "3.txt" in said
    said = refused(capfd, DATA, dict(path="in", files="*.gone"))
    assert "*.gone" in said and "0.txt" in said


@pytest.mark.parametrize("package, ending", [("pyarrow", "jsonl.zst"), ("pyarrow", "parquet")])
def test_a_package_that_is_missing(package, ending, room, capfd, monkeypatch):
    write(Path("in"), {f"a.{ending}": b"anything"})
    monkeypatch.setitem(sys.modules, package, None)
    said = refused(capfd, ENVIRONMENT, dict(path="in"))
    assert f"pip install {package}" in said and f"a.{ending}" in said and "nano360[data]" in said


def halved(content: bytes) -> bytes:
    return content[:len(content) // 2]


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1:]


LONG = [story(300, i) for i in range(60)]


@pytest.mark.parametrize("damage", [halved, flipped, lambda b: b[:-1], lambda b: b[:1] + b"x"],
                         ids=["halved", "flipped", "a byte less", "none"])
@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "txt.gz", "txt.zst", "parquet"])
def test_damaged_files_are_refused(damage, ending, room, capfd):
    """Nothing is lost in silence, wherever the file breaks off."""
    content = (lines_of(LONG) if ending.startswith("jsonl") else "\n".join(LONG)).encode()
    if ending == "parquet":
        parquet(Path("x.parquet"), dict(text=LONG), write_page_checksum=True)
        packed = Path("x.parquet").read_bytes()
    elif ending.endswith("zst"):
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    else:
        packed = gzip.compress(content)
    write(Path("in"), {f"a.{ending}": damage(packed), "b.txt": "some words " * 99})
    said = refused(capfd, DATA, dict(path="in"))
    assert f"a.{ending}" in said and ("damaged" in said or "broken" in said)


def test_a_column_that_is_no_text(room, capfd):
    """Without checksums parquet says nothing of a string that is no UTF-8: reading it does."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, for .parquet, is not installed")
    parts = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary()).buffers()
    parquet(Path("in/a.parquet"), dict(text=pyarrow.Array.from_buffers(pyarrow.string(), 2, parts)))
    assert "a.parquet is broken after row 0" in refused(capfd, DATA, dict(path="in"))


def test_a_line_that_is_a_bomb(room, capfd, monkeypatch, model_file):
    """A line of zeros packs a thousandfold: it is not read as one; the next has its number."""
    monkeypatch.setattr(sources, "LONGEST", 5000)
    bomb = '{"text": "' + "0" * 10**6 + '"}\n'
    lines = [lines_of(["first " * 9]), bomb, lines_of(["third " * 9])]
    write(Path("in"), {"a.jsonl.gz": gzip.compress("".join(lines).encode())})
    said = refused(capfd, DATA, dict(path="in"))
    assert "a.jsonl.gz:2: " in said and "5000" in said and len(said) < 500
    folder = made(dict(path="in"), max_bad_documents=1)
    assert read_manifest(folder)["sources"][0]["notes"] == dict(bad=1)
    check_documents(folder, {("a.jsonl.gz", 1): "first " * 9, ("a.jsonl.gz", 3): "third " * 9},
                    model_file)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst"])
def test_a_packed_line_that_is_no_text(ending, room, capfd, model_file):
    lines = [lines_of(["first " * 9]).encode(), b'{"text": "caf\xe9"}\n',
             lines_of(["third " * 9]).encode()]
    pack = gzip.compress if ending.endswith("gz") else zst
    write(Path("in"), {f"a.{ending}": pack(b"\xef\xbb\xbf" + b"".join(lines))})
    said = refused(capfd, DATA, dict(path="in"))
    assert f"a.{ending}:2: " in said and "not utf-8" in said
    folder = made(dict(path="in"), max_bad_documents=1)
    assert read_manifest(folder)["sources"][0]["notes"] == dict(bad=1, bom=1)
    check_documents(folder, {(f"a.{ending}", 1): "first " * 9, (f"a.{ending}", 3): "third " * 9},
                    model_file)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_no_text_under_the_key(ending, room, capfd):
    """A column that is not there, one of numbers, a null: the place and what there is instead."""
    for column in ([1, 2], [None, None]) if ending == "parquet" else ([1, 2], [["x"], None]):
        if ending == "parquet":
            parquet(Path("in/a.parquet"), dict(body=["x", "y"], text=column))
        else:
            write(Path("in"), {"a.jsonl": "".join(json.dumps(dict(body="x", text=one)) + "\n"
                                                  for one in column)})
        said = refused(capfd, DATA, dict(path="in"))
        assert f"a.{ending}:1: no text under 'text'" in said and "--text_key" in said
    said = refused(capfd, DATA, dict(path="in", text_key="gone"))
    assert "under 'gone'" in said and "body, text" in said
    write(Path("in"), {"a.jsonl": "[1, 2]\n"}) if ending == "jsonl" else None
    assert ending == "parquet" or "the line has list" in refused(capfd, DATA, dict(path="in"))


def test_bad_lines_are_counted_over_all_files(room, capfd):
    """Each file has one more than all may have together."""
    write(Path("in"), {f"{i}.jsonl": lines_of(["words " * 50]) + "{\n" for i in range(3)})
    write(Path("in"), {f"{i}.txt": "words " * 99_999 for i in range(3)})  # each its own stretch
    for limit in (0, 1, 2):
        assert refused(capfd, DATA, dict(path="in"), max_bad_documents=limit)
    folder = made(dict(path="in"), max_bad_documents=3)
    assert read_manifest(folder)["sources"][0]["notes"] == dict(bad=3)


# ---- how rows are cut ----------------------------------------------------------------------------

def pack(documents: list[list[int]], seq_len: int, bos: bool, overlap: bool) -> list[list[int]]:
    """All whole rows of documents in this order: the recipe of either model, one row at a time."""
    stream = []
    for ids in documents:
        stream += [BOS] * bos + ids + [EOS]
    rows, at = [], 0
    while at + seq_len + 1 <= len(stream):
        rows.append(stream[at:at + seq_len + 1])
        at += seq_len if overlap else seq_len + 1
    return rows


@pytest.mark.parametrize("seq_len, n_chunks", [(2048, 2), (31, 3)])
@pytest.mark.parametrize("bos, overlap", [(False, False), (True, True), (True, False),
                                          (False, True)],
                         ids=["amber", "crystalcoder", "bos alone", "overlap alone"])
def test_rows_are_packed_as_the_recipe_says(bos, overlap, seq_len, n_chunks, room, model_file):
    """Against a packer in plain Python, held-out rows too; every row leads to files and lines."""
    coder = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    texts = {(f"{i % 4}.jsonl", i // 4 + 1): story(400, i) for i in range(60)}
    write(Path("in"), {f"{k}.jsonl": lines_of([text for (name, _), text in texts.items()
                                               if name == f"{k}.jsonl"]) for k in range(4)})
    folder = made(dict(path="in"), bos=bos, overlap=overlap, seq_len=seq_len, n_chunks=n_chunks,
                  valid_share=0.2, valid_rows=5)
    files = json.loads((folder / "provenance/text_files.json").read_text())
    table = np.load(folder / "provenance/text_epoch_0.npy").tolist()
    order = [(files[f], line) for _, f, line in table]
    assert sorted(order) == sorted(texts)
    coded = [coder.encode(texts[place]) for place in order]
    rows, seen, T1 = pack(coded, seq_len, bos, overlap), [], seq_len + 1
    assert len(rows) > 12 and [start for start, _, _ in table] == np.cumsum(
        [0] + [len(ids) + 1 + bos for ids in coded[:-1]]).tolist()
    for name in [f"train_{k:03d}.bin" for k in range(n_chunks)] + ["valid_text.bin"]:
        found, origin = rows_in(folder, name)
        for row, (source, epoch, i) in zip(found.tolist(), origin.tolist(), strict=True):
            assert row == rows[i] and source == 0
            assert epoch == (HELD_OUT if name.startswith("valid") else 0)
            begin = i * (seq_len if overlap else T1)  # the way back, by the tables alone
            at = int(np.searchsorted([start for start, _, _ in table], begin, side="right")) - 1
            inner = begin - table[at][0]
            whole = [BOS] * bos + coder.encode(texts[order[at]]) + [EOS]
            assert whole[inner:inner + T1] == row[:len(whole) - inner]
            seen.append(i)
    assert len(set(seen)) == len(seen) and len(rows) - len(seen) < n_chunks
    if overlap:  # each token but the first is a target once
        assert all(a[-1] == b[0] for a, b in zip(rows[:-1], rows[1:], strict=True))


def test_it_ends_with_the_document_that_reaches_max_tokens(room, model_file):
    texts = [story(30, i) for i in range(200)]
    write(Path("in"), {"a.jsonl": lines_of(texts)})
    coder = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ends = np.cumsum([len(coder.encode(text)) + 1 for text in texts]).tolist()
    for limit in (ends[49] - 1, ends[49], ends[49] + 1):
        n = next(i for i, end in enumerate(ends) if end >= limit) + 1
        folder = made(dict(path="in", max_tokens=limit), dataset=f"to_{limit}")
        assert read_manifest(folder)["sources"][0]["all_tokens"] == ends[n - 1]
        check_documents(folder, {("a.jsonl", i + 1): text for i, text in enumerate(texts[:n])},
                        model_file)


# ---- filling in the middle -----------------------------------------------------------------------

def fim_texts() -> list[str]:
    """2,000 documents: of one character to a few hundred, with what a cut could harm."""
    dice, texts = random.Random(5), []
    for i in range(2000):
        kind = i % 10
        texts.append("aé漢🙂(x"[i // 10 % 6] if kind == 0 else
                     dice.choice(["ab", " b", "é\n", "漢字", "x  ", "\n.", "\t1"]) if kind == 1 else
                     "  " * (i % 4) + "def f(x):\n    return f(x)\n" * (1 + i % 3) if kind == 2 else
                     "<|fim_prefix|>a<|fim_suffix|> b</s><s><|fim_middle|>" + story(5, i)
                     if kind == 3 else story(10 + i % 60, i))
    return texts


HUGE = story(30_000, 77) + "ba" * 600_000  # more than BLOCK characters, without a blank too
FIM_TEXTS = fim_texts()


def spelled(ids: list[int], piece) -> bytes:
    """The bytes that ids stand for, by their names alone."""
    names = map(piece, ids)
    return b"".join(bytes([int(name[3:5], 16)]) if re.fullmatch("<0x..>", name) else
                    name.replace("▁", " ").encode() for name in names)


def unpermuted(ids: list[int], piece, bos: bool = False) -> tuple[str, str, int, int]:
    """(text, form, first, last cut in characters) of a document; where a cut is not known: -1.

    prefix + middle + suffix are the text, in either form, if what follows the middle's mark stands
    in front of the suffix. The blank that the tokenizer begins a text with is taken away.
    """
    names = [piece(i) for i in ids]
    assert names.count("</s>") == 1 and names[-1] == "</s>" and names[:bos] == ["<s>"] * bos
    ids, names = ids[bos:-1], names[bos:-1]
    assert "<s>" not in names and not set(MARKS[3:]) & {*names}
    marks = [i for i, name in enumerate(names) if name in MARKS]
    if not marks:
        return spelled(ids, piece).decode()[1:], "", -1, -1
    assert [names[i] for i in marks] == [MARKS[0], MARKS[2], MARKS[1]] and marks[0] == 0
    prefix, suffix, rest = (spelled(part, piece).decode() for part in (
        ids[1:marks[1]], ids[marks[1] + 1:marks[2]], ids[marks[2] + 1:]))
    text = prefix + rest + suffix
    assert text[0] == " "
    form, end = "PSM" if prefix else "SPM", len(text) - 1 - len(suffix)
    return text[1:], form, len(prefix) - 1 if prefix else -1, max(0, end)


@pytest.fixture(scope="module")
def fim_sets(tmp_path_factory, model_file) -> dict[float, Path]:
    """rate -> a set of the documents at that rate; two epochs of the first."""
    root, found = tmp_path_factory.mktemp("fim"), {}
    write(root / "in", {f"{k}.jsonl": lines_of(FIM_TEXTS[k * 500:(k + 1) * 500]) for k in range(4)}
          | {"huge.c": HUGE})
    (root / "small.model").symlink_to(model_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for rate in (0.9, 0.3):
            found[rate] = root / made(dict(path="in", fim_rate=rate, epochs=2 if rate > 0.5 else 1),
                                      dataset=f"fim_{rate}", special_tokens=" ".join(MARKS))
    return found


@functools.cache
def fim_documents(folder: Path, epoch: int) -> list[tuple[str, int, list[int]]]:
    return documents_of(folder, epoch=epoch)


def fim_text(file: str, line: int) -> str:
    return HUGE if file == "huge.c" else FIM_TEXTS[int(file[0]) * 500 + line - 1]


def piece_of(folder: Path):
    coder = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return coder.id_to_piece


@pytest.mark.parametrize("rate, epoch", [(0.9, 0), (0.9, 1), (0.3, 0)])
def test_fim_rewrites_as_often_as_said_and_loses_nothing(rate, epoch, fim_sets):
    """Each text comes back to the letter; shares and cuts are within three standard errors."""
    piece, folder = piece_of(fim_sets[rate]), fim_sets[rate]
    found = fim_documents(folder, epoch)
    assert len(found) == 2001
    rewritten = spm = 0
    expected = variance = 0.0
    lefts, rights = [], []
    for file, line, ids in found[:-1]:  # of the last one the tail is cut off
        text, form, start, end = unpermuted(ids, piece)
        same = text == fim_text(file, line)
        assert same, (file, line)
        rewritten += form != ""
        if form and len(text) >= 60:
            n = len(text)
            seems = 1 / 2 + (1 - (n / (n + 1)) ** 2) / 2  # PSM of an empty prefix looks the same
            spm += form == "SPM"
            expected, variance = expected + seems, variance + seems * (1 - seems)
            rights.append((end / n) ** 2)  # uniform, as that of the larger of two draws
            if form == "PSM":
                lefts.append(1 - (1 - start / n) ** 2)
    n = len(found) - 1
    assert abs(rewritten - n * rate) <= 3 * math.sqrt(n * rate * (1 - rate))
    assert abs(spm - expected) <= 3 * math.sqrt(variance)
    for draws in (lefts, rights):
        assert len(draws) > 150
        assert abs(np.mean(draws) - 1 / 2) <= 3 * math.sqrt(1 / 12 / len(draws))
        counts = np.histogram(draws, 10, (0, 1))[0]
        assert ((counts - len(draws) / 10) ** 2).sum() / (len(draws) / 10) < 27.9  # chi2, 0.1 %


def test_fim_cuts_anywhere(fim_sets):
    """Each part of a short text may be empty, all may be; and the huge one has its marks."""
    piece, kinds = piece_of(fim_sets[0.9]), set()
    for epoch in (0, 1):
        for file, line, ids in fim_documents(fim_sets[0.9], epoch)[:-1]:
            names = [piece(i) for i in ids]
            if names[0] == MARKS[0] and len(fim_text(file, line)) <= 3:
                a, b = names.index(MARKS[2]), names.index(MARKS[1])
                kinds.add((a > 1, b > a + 1, len(names) - 1 > b + 1))
    assert len(kinds) == 7  # all but that nothing is anywhere
    huge = [ids for epoch in (0, 1) for file, _, ids in fim_documents(fim_sets[0.9], epoch)
            if file == "huge.c"]
    assert any(piece(ids[0]) == MARKS[0] and len(ids) > 10_000 for ids in huge)


def test_fim_is_drawn_anew_in_each_epoch(fim_sets):
    first, second = ({(file, line): ids for file, line, ids in fim_documents(
        fim_sets[0.9], epoch)[:-1]} for epoch in (0, 1))
    long = [place for place in first.keys() & second if len(fim_text(*place)) > 60]
    same = sum(first[place] == second[place] for place in long)
    assert 1000 < len(long) and same < 0.03 * len(long)  # 0.1 x 0.1 are left alone twice


def test_fim_of_two_processes_is_the_same(room, fim_sets, model_file):
    write(Path("in"), {f"{k}.jsonl": lines_of(FIM_TEXTS[k * 500:(k + 1) * 500]) for k in range(4)}
          | {"huge.c": HUGE})
    folder = made(dict(path="in", fim_rate=0.9, epochs=2), dataset="fim_0.9", workers=2,
                  special_tokens=" ".join(MARKS))
    mine, theirs = files_of(folder), files_of(fim_sets[0.9])
    assert mine == theirs


def test_fim_draws_hang_on_nothing_but_the_document(room, fim_sets):
    """Other files before and after it, the order of files: its ids stay."""
    write(Path("in"), {"0.jsonl": lines_of(FIM_TEXTS[:500]), "2.jsonl": lines_of(
        FIM_TEXTS[1000:1500]), "00.txt": "another\n" * 50, "zz.jsonl": lines_of(["more"] * 9)})
    folder = made(dict(path="in", fim_rate=0.9), special_tokens=" ".join(MARKS))
    before = {(file, line): ids for file, line, ids in fim_documents(fim_sets[0.9], 0)[:-1]}
    found = {(file, line): ids for file, line, ids in documents_of(folder)[:-1]}
    assert len(found.keys() & before) >= 999
    assert all(before[place] == found[place] for place in found.keys() & before)
    orders = [json.loads((one / "provenance/text_files.json").read_text())
              for one in (folder, fim_sets[0.9])]
    assert orders[0] != orders[1] and len({*orders[0]} & {*orders[1]}) == 2


def test_fim_puts_no_blank_at_a_cut(room):
    """"f(x)" and "return" at every cut: a middle or suffix begins with what is in the text."""
    texts = ["f(x)", "return"] * 200
    write(Path("in"), {"a.jsonl": lines_of(texts)})
    folder = made(dict(path="in", fim_rate=1.0), special_tokens=" ".join(MARKS), bos=True)
    piece, cuts = piece_of(folder), set()
    for (_, line, ids) in documents_of(folder)[:-1]:
        text, form, start, end = unpermuted(ids, piece, bos=True)
        assert text == texts[line - 1] and form
        names = [piece(i) for i in ids]
        blanks = sum(name.count("▁") for name in names)
        assert blanks == 1 and names[0] == "<s>"
        cuts.add((text, form, start, end))
    assert len(cuts) > 40


@pytest.mark.parametrize("kind", ["llama", "crystalcoder"])
def test_fim_with_the_published_tokenizers(kind, room, shared):
    """LLaMA's model with 22 tokens more, and CrystalCoder's own file: the ids of 3.3, no blank."""
    if kind == "llama":
        path = shared / "tokenizer/llama_tokenizer.model"
        options = dict(special_tokens=" ".join(MARKS))
    else:
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
        path, options = shared / "tokenizer/crystalcoder_tokenizer.json", {}
    if not path.is_file():
        pytest.skip(f"no {path.name} in ../shared/data/tokenizer")
    texts = FIM_TEXTS[:300] + ["def f(x):\n    return x\n"] * 50
    write(Path("in"), {"a.jsonl": lines_of(texts)})
    folder = made(dict(path="in", fim_rate=0.9), tokenizer=str(path), vocab_size=32032, bos=True,
                  overlap=True, **options)
    about = read_manifest(folder)["tokenizer"]
    assert [about["special_tokens"][name] for name in MARKS] == [*range(32000, 32022)]
    assert (about["bos"], about["eos"], about["vocab_size"]) == (1, 2, 32022)
    if kind == "llama":
        piece = piece_of(folder)
    else:
        import tokenizers as hf
        piece = hf.Tokenizer.from_file(str(path)).id_to_token
    forms = []
    for _, line, ids in documents_of(folder)[:-1]:
        text, form, _, _ = unpermuted(ids, piece, bos=True)
        assert text == texts[line - 1]
        forms.append(form)
    assert {*forms} == {"", "PSM", "SPM"} and forms.count("") < len(forms) / 5


def test_both_published_tokenizers_give_the_same_rows(room, shared):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = shared / "tokenizer"
    if not (folder / "llama_tokenizer.model").is_file():
        pytest.skip("no llama_tokenizer.model in ../shared/data/tokenizer")
    write(Path("in"), {"a.jsonl": lines_of(FIM_TEXTS[:400])})
    streams = [stream_of(made(dict(path="in", fim_rate=0.5), vocab_size=32032, dataset=name,
                              tokenizer=str(folder / file), **more))
               for name, file, more in (
                   ("a", "llama_tokenizer.model", dict(special_tokens=" ".join(MARKS))),
                   ("b", "crystalcoder_tokenizer.json", {}))]
    assert streams[0] == streams[1] and 32000 in streams[0]


def test_fim_wants_its_marks(room, capfd):
    write(Path("in"), {"a.txt": "some words " * 99})
    assert "<|fim_prefix|>" in refused(capfd, USAGE, dict(path="in", fim_rate=0.5))


# ---- releases ------------------------------------------------------------------------------------

T = 16
BLOCKS = [("arxiv", 10), ("book", 7), ("c4", 40)]


def release(k: int, blocks: list = BLOCKS, row: int = T + 1) -> list[dict]:
    """The lines of a file as AmberDatasets has them: blocks of one source."""
    dice = np.random.default_rng(k)
    return [dict(token_ids=dice.integers(0, 400, row).tolist(), source=name)
            for name, n in blocks for _ in range(n)]


def write_release(root: Path, files: list[list[dict]]) -> None:
    write(root, {f"train_{k:03d}.jsonl": "".join(json.dumps(line) + "\n" for line in lines)
                 for k, lines in enumerate(files)})


ROWS = dict(path="in", rows=True, name="amber", licence="odc-by")
LIKE = dict(seq_len=T, n_chunks=3, valid_rows=3)


def order(n: int, seed: int, epoch: int, chunk: int) -> list[int]:
    words = np.random.Philox(key=seed << 64 | epoch << 32 | chunk).random_raw(n).tolist()
    return sorted(range(n), key=words.__getitem__)


def expected(lines: list[dict], k: int, size: int | None, valid_rows: int, seed: int = 1337
             ) -> tuple[list[int], dict[str, list[int]]]:
    """The numbers, from 0, of the lines that are trained on, and held out per source."""
    shuffled, held = order(len(lines), seed, HELD_ORDER, k), {}
    for name in dict.fromkeys(line["source"] for line in lines) if k == 0 else ():
        mine = [i for i in shuffled if lines[i]["source"] == name]
        held[name] = sorted(mine[:valid_rows])
    taken = {i for found in held.values() for i in found}
    free = [i for i in shuffled if i not in taken]
    return sorted(free[len(free) - (len(free) if size is None else size):]), held


def check_release(folder: Path, files: list[list[dict]], size: int | None, valid_rows: int = 3,
                  chunks: tuple[int, ...] | None = None) -> None:
    """Chunk k is file k without what was set aside, in its order; every row has its line."""
    names = [one["name"] for one in read_manifest(folder)["sources"]]
    for k in range(len(files)) if chunks is None else chunks:
        used, held = expected(files[k], k, size, valid_rows)
        size = len(used) if size is None else size
        assert len(used) == size
        places = {f"train_{k:03d}.bin": (used, 0)} | {
            f"valid_{name}.bin": (found, HELD_OUT) for name, found in held.items()}
        for name, (numbers, epoch) in places.items():
            rows, origin = rows_in(folder, name)
            assert rows.tolist() == [files[k][i]["token_ids"] for i in numbers], name
            assert origin.tolist() == [[names.index(files[k][i]["source"]), epoch, i + 1]
                                       for i in numbers]
        assert not {*used} & {i for found in held.values() for i in found}


@pytest.mark.parametrize("size", [None, 40, 12])
def test_chunks_are_the_files_of_the_release(size, room):
    files = [release(k) for k in range(3)]
    write_release(Path("in"), files)
    folder = made(ROWS, rows_per_chunk=size, **LIKE)
    check_release(folder, files, size)
    manifest = read_manifest(folder)
    per_chunk = size or sum(n for _, n in BLOCKS) - 9
    assert manifest["rows_per_chunk"] == per_chunk and manifest["n_chunks"] == 3
    assert [(one["name"], one["valid_rows"]) for one in manifest["sources"]] == [
        ("arxiv", 3), ("book", 3), ("c4", 3)]
    assert sum(one["rows"] for one in manifest["sources"]) == 3 * per_chunk
    assert [one["rows"] + one["rows_left_out"] for one in manifest["sources"]] == [
        3 * n for _, n in BLOCKS]
    listed = json.loads((folder / "provenance" / f"{ROWS['name']}_files.json").read_text())
    assert listed == [f"train_{k:03d}.jsonl" for k in range(3)]
    assert sorted(p.name for p in Path("data").iterdir()) == ["run"]


def test_a_release_by_two_processes_is_the_same(room):
    write_release(Path("in"), [release(k) for k in range(3)])
    one, two = (made(ROWS, dataset=f"by_{n}", workers=n, **LIKE) for n in (1, 2))
    assert files_of(one) == files_of(two)


def test_rows_without_a_source_are_of_the_source(room):
    files = [[line if i % 3 else {"token_ids": line["token_ids"]} for i, line in
              enumerate(release(k))] for k in range(2)]
    write_release(Path("in"), files)
    folder = made(ROWS, **LIKE | dict(n_chunks=2))
    files = [[dict(source="amber") | line for line in lines] for lines in files]
    check_release(folder, files, None)
    assert "amber" in [one["name"] for one in read_manifest(folder)["sources"]]


def test_chunks_may_be_made_one_after_the_other(room):
    """Each command adds to one manifest; what was there stays, and all of it is as at once."""
    files = [release(k) for k in range(3)]
    write_release(Path("in"), files)
    folder = made(ROWS, "--chunks=0", **LIKE)
    first, kept = read_manifest(folder), files_of(folder)
    assert not (folder / "train_001.bin").exists()
    check_release(folder, files, None, chunks=(0,))
    made(ROWS, "--chunks=1-2", **LIKE)
    second = read_manifest(folder)
    assert second["data_hash"] == first["data_hash"] and second["recipe"] == first["recipe"]
    assert {k: second["files"][k] for k in first["files"]} == first["files"]
    assert all(content == kept[name] for name, content in files_of(folder).items()
               if name in kept and not name.startswith("manifest.json"))
    check_release(folder, files, None)
    whole = made(ROWS, dataset="whole", **LIKE)
    assert files_of(whole) == files_of(folder)
    assert prepare_here(ROWS, "--verify", **LIKE) == 0


def test_a_later_chunk_brings_the_first_along(room):
    files = [release(k) for k in range(3)]
    write_release(Path("in"), files)
    folder = made(ROWS, "--chunks=2", **LIKE)
    check_release(folder, files, None, chunks=(0, 2))
    assert not (folder / "train_001.bin").exists()


@pytest.mark.parametrize("k", [0, 1])
def test_a_chunk_that_was_let_go(k, room, capfd):
    """It is missed by nobody but its readers, and is made again, the same, when it is asked for."""
    write_release(Path("in"), [release(k) for k in range(3)])
    folder = made(ROWS, **LIKE)
    before, name = files_of(folder), f"train_{k:03d}.bin"
    (folder / name).unlink()
    for words in ((), ("--chunks=2",)):
        made(ROWS, *words, **LIKE)
        assert files_of(folder) == {k: v for k, v in before.items() if k != name}
    capfd.readouterr()
    assert prepare_here(ROWS, "--verify", **LIKE) == 0
    out = capfd.readouterr().out
    assert "1 chunks were let go" in out and name in out
    with pytest.raises(Stop, match="is missing; make it"):
        open_rows(folder, read_manifest(folder), name)
    made(ROWS, f"--chunks={k}", **LIKE)
    assert files_of(folder) == before  # the manifest too: nothing is counted twice


def test_a_chunk_that_would_be_another_is_refused(room, capfd):
    """The files of a release are what they were: any change in them is another data set."""
    files = [release(k) for k in range(3)]
    write_release(Path("in"), files)
    folder = made(ROWS, "--chunks=0", **LIKE)
    before = files_of(folder)
    files[1][0]["token_ids"][0] ^= 1
    write_release(Path("in"), files)
    capfd.readouterr()
    assert prepare_here(ROWS, "--chunks=1", **LIKE) == DATA
    assert "another data set" in capfd.readouterr().err and files_of(folder) == before


def test_numbers_of_chunks_that_are_not_there(room, capfd):
    write_release(Path("in"), [release(k) for k in range(3)])
    for words, keys in ((("--chunks=3",), {}), (("--chunks=2-1",), {}), ((), dict(n_chunks=4))):
        assert "3 files" in refused(capfd, USAGE, ROWS, *words, **LIKE | keys)
    for word in ("--chunks=x", "--chunks=-1", "--chunks=1-", "--chunks="):
        refused(capfd, USAGE, ROWS, word, **LIKE)


def test_a_file_that_has_too_few_rows(room, capfd):
    """The first sets the size of all; of one that is all held out nothing is left to train."""
    write_release(Path("in"), [release(0), release(1), release(2, [("c4", 20)])])
    assert "train_000.jsonl has 57 rows" in refused(capfd, DATA, ROWS, rows_per_chunk=49, **LIKE)
    assert "train_000.jsonl" in refused(capfd, DATA, ROWS, **LIKE | dict(valid_rows=40))
    assert prepare_here(ROWS, **LIKE) == DATA
    err = capfd.readouterr().err
    assert "train_002.jsonl has 20 rows" in err and "--rows_per_chunk" in err
    assert (Path("data/run/train_001.bin")).is_file()


BAD_ROWS = {"short": [1] * T, "long": [1] * (T + 2), "too large": [400] * (T + 1),
            "negative": [0] * T + [-1], "float": [0] * T + [1.0], "text": [0] * T + ["1"],
            "bool": [0] * T + [True], "null": [0] * T + [None], "nested": [[0]] * (T + 1),
            "no list": "1" * (T + 1), "nothing": None, "empty": [], "huge": [2**70] * (T + 1)}


@pytest.mark.parametrize("name", [*BAD_ROWS, "no object", "no key", "source is a path",
                                  "source is a number", "broken"])
def test_a_row_that_is_none(name, room, capfd):
    """Refused with its file and line; or skipped, and counted."""
    lines = [json.dumps(line) for line in release(0)]
    row = dict(token_ids=BAD_ROWS.get(name, [0] * (T + 1)), source="c4")
    lines.insert(20, {"no object": "[1, 2]", "no key": "{}", "broken": '{"token_ids": [1, 2',
                      "source is a path": json.dumps(row | dict(source="../c4")),
                      "source is a number": json.dumps(row | dict(source=4))}.get(
                          name, json.dumps(row)))
    write(Path("in"), {"train_000.jsonl": "\n".join(lines) + "\n"})
    said = refused(capfd, DATA, ROWS, **LIKE | dict(n_chunks=1))
    assert "train_000.jsonl:21: " in said
    folder = made(ROWS, max_bad_documents=1, **LIKE | dict(n_chunks=1))
    rows, origin = rows_in(folder, "train_000.bin")
    assert all(row.tolist() == json.loads(lines[i - 1])["token_ids"]
               for row, (_, _, i) in zip(rows, origin.tolist(), strict=True))
    assert {one["notes"].get("bad") for one in read_manifest(folder)["sources"]} == {1}


def test_bad_rows_are_counted_over_the_whole_command(room, capfd):
    """A file of several stretches, with a broken line at either end of it, and two such files."""
    def lines(k: int) -> list[dict]:
        return release(k, [("c4", 600)], 1025)
    for k in (0, 1):
        content = [json.dumps(line) for line in lines(k)]
        content[3] = content[-3] = "{"
        write(Path("in"), {f"train_{k:03d}.jsonl": "\n".join(content) + "\n"})
    assert Path("in/train_000.jsonl").stat().st_size > 5 << 19  # a stretch is 1 MB or more
    keys = dict(seq_len=1024, valid_rows=3)
    assert refused(capfd, DATA, ROWS, n_chunks=1, max_bad_documents=1, **keys)
    folder = made(ROWS, "--chunks=0", n_chunks=2, max_bad_documents=2, **keys)
    rows, origin = rows_in(folder, "train_000.bin")
    should = lines(0)
    assert len(rows) == 595 and all(row.tolist() == should[i - 1]["token_ids"] for row, (_, _, i)
                                    in zip(rows, origin.tolist(), strict=True))
    assert read_manifest(folder)["sources"][0]["notes"] == dict(bad=2)


def test_a_later_chunk_may_bring_a_new_source(room):
    """It has no held-out rows, and no reader asks for them."""
    files = [release(0), release(1, [("book", 30), ("web", 30)])]
    write_release(Path("in"), files)
    folder = made(ROWS, **LIKE | dict(n_chunks=2))
    check_release(folder, files, None)
    assert {one["name"]: one["valid_rows"] for one in read_manifest(folder)["sources"]} == dict(
        arxiv=3, book=3, c4=3, web=0)
    train.main(["run.py", "--device=cpu", "--dtype=float32"])
    lines = [json.loads(line) for line in Path("out/run/metrics.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines if line["kind"] == "valid"} == {"arxiv", "book", "c4"}


def test_the_released_samples(room, shared, capfd):
    """Lines of AmberDatasets themselves: ten of which three are broken, and nine good ones."""
    folder = shared / "amber"
    llama = dict(tokenizer=str(shared / "tokenizer/llama_tokenizer.model"), vocab_size=32000,
                 seq_len=2048, valid_rows=2)
    for name in ("bad_sample.jsonl", "good_sample.jsonl"):
        if not (folder / name).is_file() or not Path(llama["tokenizer"]).is_file():
            pytest.skip("no samples in ../shared/data/amber")
        write(Path("in"), {name: (folder / name).read_bytes()})
    bad, good = (ROWS | dict(path=f"in/{name}_sample.jsonl") for name in ("bad", "good"))
    lines = (folder / "bad_sample.jsonl").read_text().splitlines()
    for limit, line, why in ((0, 4, "broken json"), (1, 9, "2050 ids, expected 2049"),
                             (2, 10, "broken json")):
        said = refused(capfd, DATA, bad, max_bad_documents=limit, **llama)
        assert f"bad_sample.jsonl:{line}: {why}" in said
    made(bad, max_bad_documents=3, **llama, dataset="bad")
    assert read_manifest(Path("data/bad"))["sources"][0]["notes"]["bad"] == 3
    made(good, **llama, dataset="good")
    for name, source, expect in (("bad", "amber", {1, 2, 3, 5, 6, 7, 8}),
                                 ("good", "c4", {*range(1, 10)})):
        lines, seen = (folder / f"{name}_sample.jsonl").read_text().splitlines(), set()
        for file in ("train_000.bin", f"valid_{source}.bin"):
            rows, origin = rows_in(Path("data") / name, file)
            for row, (_, _, i) in zip(rows.tolist(), origin.tolist(), strict=True):
                assert row == json.loads(lines[i - 1])["token_ids"] and len(row) == 2049
                seen.add(i)
        assert seen == expect


@pytest.mark.parametrize("let_go", [False, True])
def test_a_chunk_that_is_being_made_is_waited_for(let_go, room, monkeypatch, capsys):
    """While prepare.py holds the folder its reader waits; after that it says what is missing."""
    files = [release(k) for k in range(3)]
    write_release(Path("in"), files)
    folder = made(ROWS, f"--chunks=0-{int(let_go)}", **LIKE)
    (folder / "train_001.bin").unlink(missing_ok=True)
    monkeypatch.setattr(rows, "PATIENCE", 0.02)
    old, found = read_manifest(folder), []
    with pytest.raises(Stop, match="train_001.bin is missing"):  # nobody is at work
        open_rows(folder, old, "train_001.bin")
    going, done = threading.Event(), release_rows.make_chunk

    def slow(*args):
        going.set()
        time.sleep(0.3)
        assert not found
        done(*args)
    monkeypatch.setattr(release_rows, "make_chunk", slow)

    def read():
        going.wait(10)
        try:
            found.append(open_rows(folder, old, "train_001.bin"))
            found.append(open_rows(folder, old, "train_002.bin"))
        except Stop as stop:
            found.append(stop)
    reader = threading.Thread(target=read)
    reader.start()
    made(ROWS, "--chunks=1", **LIKE)
    reader.join(10)
    assert not reader.is_alive()
    used, _ = expected(files[1], 1, old["rows_per_chunk"], 3)
    assert found[0].tolist() == [files[1][i]["token_ids"] for i in used]
    assert isinstance(found[1], Stop) and "train_002.bin is missing" in str(found[1])
    assert "waiting for" in capsys.readouterr().out


def test_a_release_is_trained_and_scored(room):
    """Rows, as released, go through train.py and evaluate.py."""
    write_release(Path("in"), [release(k) for k in range(2)])
    made(ROWS, **LIKE | dict(n_chunks=2))
    train.main(["run.py", "--device=cpu", "--dtype=float32"])
    state = json.loads(Path("out/run/ckpt_001/state.json").read_text())
    assert state["consumed"] == [[0, 0], [0, 1]] and state["step"] == 2 * (48 // 4)
    evaluate.main(["out/run/ckpt_001", "--tasks=valid", "--output=scores.json", "--device=cpu"])
    text = Path("scores.json").read_text()
    assert all(f"valid/{name}" in text for name, _ in BLOCKS)


# ---- what is elsewhere ---------------------------------------------------------------------------

class Elsewhere:
    """A hub and a host of files, in the place of nano360/hub/fetch.py; what they were asked for."""

    def __init__(self, files: dict[str, str]):
        self.files, self.commit, self.calls, self.broken, self.there = files, "c" * 40, [], "", []

    def remote(self, name: str) -> Remote:
        content = self.files[name].encode()
        return Remote(name, f"https://host/{name}", len(content),
                      hashlib.sha256(content).hexdigest(), etag='"1"')

    def list_hub(self, repo, revision, pattern):
        self.calls.append(("list_hub", repo, revision, pattern))
        return self.commit, [self.remote(name) for name in self.files
                             if not pattern or Path(name).match(pattern)]

    def list_urls(self, url, pattern):
        self.calls.append(("list_urls", url, pattern))
        return [self.remote(name) for name in self.files]

    def ask(self, url):
        self.calls.append(("ask", url))
        return self.remote(url.rpartition("/")[2])

    def fetch(self, remote, path, limit=None):
        if path.exists():
            return
        self.calls.append(("fetch", remote.name))
        self.there.append(len([p for p in Path("data/downloads").rglob("*.jsonl")]))
        if remote.name == self.broken:
            raise Stop(DATA, f"{remote.url} broke off")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.files[remote.name])

    def fetched(self) -> list[str]:
        return [call[1] for call in self.calls if call[0] == "fetch"]


@pytest.fixture
def elsewhere(room, monkeypatch, model_file) -> Elsewhere:
    there = Elsewhere({f"data/{i}.jsonl": lines_of([story(30, 10 * i + j) for j in range(8)])
                       for i in range(6)})
    for name in ("fetch", "list_hub", "list_urls", "ask"):
        monkeypatch.setattr(net, name, getattr(there, name))
    return there


def texts_of(files: dict[str, str]) -> dict[tuple[str, int], str]:
    return {(name, i + 1): json.loads(line)["text"] for name, content in files.items()
            for i, line in enumerate(content.splitlines())}


HUB = dict(path="hf:datasets/o/n")


@pytest.mark.parametrize("path", ["hf:datasets/o/n", "hf:datasets/o/n@main", "list:https://h/u.txt"])
def test_what_is_elsewhere_is_read_as_what_is_here(path, elsewhere, model_file):
    folder = made(dict(path=path, files="*.jsonl"))
    check_documents(folder, texts_of(elsewhere.files), model_file)
    call = elsewhere.calls[0]
    assert call == (("list_urls", "https://h/u.txt", "*.jsonl") if path.startswith("list") else
                    ("list_hub", "datasets/o/n", "main" if "@" in path else "", "*.jsonl"))
    assert sorted(elsewhere.fetched()) == sorted(elsewhere.files)
    one, = read_manifest(folder)["recipe"]["sources"]
    assert one["origin"] == path and (one["revision"] == elsewhere.commit) == (path[:3] == "hf:")
    write(Path("in"), elsewhere.files)
    here = made(dict(path="in"), dataset="here")
    assert np.array_equal(rows_in(here, "train_000.bin")[0], rows_in(folder, "train_000.bin")[0])


def test_one_url_is_a_source(elsewhere, model_file):
    elsewhere.files = {"x.jsonl": elsewhere.files["data/0.jsonl"]}
    folder = made(dict(path="https://host/a/x.jsonl"))
    check_documents(folder, texts_of(elsewhere.files), model_file)
    assert elsewhere.calls[0] == ("ask", "https://host/a/x.jsonl")


def test_a_finished_set_asks_nobody(elsewhere, capfd):
    made(HUB)
    before = files_of(Path("data/run"))
    elsewhere.calls, elsewhere.commit = [], "d" * 40
    elsewhere.files = {"data/0.jsonl": lines_of(["another " * 99])}
    capfd.readouterr()
    assert prepare_here(HUB) == 0 and "prepared already" in capfd.readouterr().out
    assert elsewhere.calls == [] and files_of(Path("data/run")) == before
    assert prepare_here(HUB, keep_downloads=False, max_bad_documents=3) == 0  # none of its bytes
    assert elsewhere.calls == [] and files_of(Path("data/run")) == before


@pytest.mark.parametrize("change", [dict(path="hf:datasets/o/n@" + "d" * 40), dict(subset="even"),
                                    dict(files="data/[0-4]*")])
def test_another_revision_is_another_set(change, elsewhere, capfd):
    made(HUB)
    before = files_of(Path("data/run"))
    elsewhere.calls = []
    capfd.readouterr()
    assert prepare_here(HUB | change) == DATA
    said = capfd.readouterr().err
    assert "holds another data set (other sources)" in said and len(said.splitlines()) == 1
    assert elsewhere.calls == [] and files_of(Path("data/run")) == before


@pytest.mark.parametrize("keep", [True, False])
def test_a_preparation_that_broke_off_goes_on(keep, elsewhere, model_file):
    """At the revision it began with; what was read is not fetched again; letting go, one by one."""
    first = dict(elsewhere.files)
    elsewhere.broken = f"data/{order(6, 1337, FILE_ORDER, 0)[3]}.jsonl"  # the fourth to be read
    assert prepare_here(HUB, keep_downloads=keep) == DATA
    done = [name for name in elsewhere.fetched() if name != elsewhere.broken]
    assert len(done) == 3
    assert not Path("data/run").exists()
    elsewhere.broken, elsewhere.calls, elsewhere.commit = "", [], "d" * 40  # the branch moved
    folder = made(HUB, keep_downloads=keep)
    assert not [call for call in elsewhere.calls if call[0] != "fetch"]
    assert sorted(elsewhere.fetched() + done) == sorted(first)
    assert read_manifest(folder)["recipe"]["sources"][0]["revision"] == "c" * 40
    check_documents(folder, texts_of(first), model_file)
    left = [*Path("data/downloads").rglob("*.jsonl")]
    assert len(left) == (6 if keep else 0)
    assert keep or max(elsewhere.there) == 0  # never two at a time
    assert [p.name for p in Path("data").iterdir() if p.suffix == ".part"] == []


def test_two_epochs_of_what_is_let_go(elsewhere, model_file):
    """FIM reads the files again for the second epoch, and so fetches them again."""
    folder = made(HUB | dict(fim_rate=0.5, epochs=2), keep_downloads=False,
                  special_tokens=" ".join(MARKS))
    assert sorted(elsewhere.fetched()) == sorted([*elsewhere.files] * 2)
    texts, piece = texts_of(elsewhere.files), piece_of(folder)
    for epoch in (0, 1):
        assert all(unpermuted(ids, piece)[0] == texts[file, line]
                   for file, line, ids in documents_of(folder, epoch=epoch)[:-2])


def test_a_release_elsewhere_is_fetched_chunk_by_chunk(elsewhere):
    """Each file goes when its rows are written; a kill in between costs the chunk at hand."""
    files = [release(k) for k in range(3)]
    elsewhere.files = {f"train/train_{k:03d}.jsonl": "".join(
        json.dumps(line) + "\n" for line in one) for k, one in enumerate(files)}
    elsewhere.broken = "train/train_002.jsonl"
    hub = ROWS | HUB | dict(files="train/*.jsonl")
    assert prepare_here(hub, keep_downloads=False, **LIKE) == DATA
    folder = Path("data/run")
    check_release(folder, files, None, chunks=(0, 1))
    assert not [*Path("data/downloads").rglob("*.jsonl")]
    elsewhere.broken, elsewhere.calls, elsewhere.commit = "", [], "d" * 40
    assert prepare_here(hub, keep_downloads=False, **LIKE) == 0
    assert elsewhere.calls == [("fetch", "train/train_002.jsonl")]
    check_release(folder, files, None)
    (folder / "train_001.bin").unlink()
    before = files_of(folder)
    made(hub, "--chunks=1", keep_downloads=False, **LIKE)
    assert elsewhere.calls[1:] == [("fetch", "train/train_001.jsonl")]
    check_release(folder, files, None)
    assert {k: v for k, v in files_of(folder).items() if k != "train_001.bin"} == before
    assert max(elsewhere.there) == 0


@pytest.mark.parametrize("name", ["../x.jsonl", "data/../../x.jsonl", "/x.jsonl", "C:x.jsonl",
                                  "a\\..\\..\\x.jsonl", "data/./x.jsonl"])
@pytest.mark.parametrize("path", ["hf:datasets/o/n", "list:https://h/u.txt"])
def test_a_listing_that_leads_out_of_its_folder(name, path, elsewhere, capfd, tmp_path):
    elsewhere.files[name] = lines_of(["evil " * 99])
    said = refused(capfd, DATA, dict(path=path))
    assert "is no name for a file" in said and not elsewhere.fetched()
    assert not [p for p in tmp_path.rglob("*.jsonl")]


def test_a_tokenizer_from_the_hub(elsewhere, model_file, monkeypatch, capfd):
    """Fetched once, and checked against the sha256 of the run file."""
    write(Path("in"), {"a.jsonl": lines_of(TEXTS)})
    calls = []

    def list_hub(repo, revision, pattern):
        calls.append((repo, revision, pattern))
        return "c" * 40, [Remote(pattern, "https://host/t", None)]
    monkeypatch.setattr(net, "list_hub", list_hub)
    monkeypatch.setattr(net, "fetch", lambda remote, path: (
        path.parent.mkdir(parents=True, exist_ok=True), path.write_bytes(model_file.read_bytes())))
    digest = hashlib.sha256(model_file.read_bytes()).hexdigest()
    folder = made(dict(path="in"), tokenizer="hf:o/n/sub/t.model", tokenizer_sha256=digest)
    assert calls == [("o/n", "", "sub/t.model")]
    assert (folder / "tokenizer.model").read_bytes() == model_file.read_bytes()
    made(dict(path="in"), tokenizer="hf:o/n/sub/t.model", dataset="again")
    assert len(calls) == 1 and files_of(Path("data/again/provenance")) == files_of(
        folder / "provenance")
    made(dict(path="in"), tokenizer="hf:o/n@v1/t.model", dataset="pinned")
    assert calls[1:] == [("o/n", "v1", "t.model")]
    assert prepare_here(dict(path="in"), tokenizer="hf:o/n@v1/t.model", dataset="other",
                        tokenizer_sha256="12ab" * 16) == DATA
    assert "12ab" * 16 in capfd.readouterr().err


# ---- memory --------------------------------------------------------------------------------------

PEAK = """
import resource, runpy, sys
from pathlib import Path
import nano360.tokens
sys.argv, nano360.tokens.BLOCK = ["prepare.py", *sys.argv[1:]], 1 << 20
try:
    runpy.run_path({path!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
own = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print("PEAK", own["VmHWM"].split()[0])  # its own ru_maxrss is that of its parent
print("PEAK", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_text(room):
    """Four times as much text, by two processes: the peak of neither grows by much."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc, which knows how much memory a process had")
    peaks = []
    for size in (10, 40):
        text = story(4000, size)
        line = json.dumps(dict(text=text), ensure_ascii=False) + "\n"
        write(Path(f"in_{size}"), {"a.jsonl": line * (size * 10**6 // len(line.encode()))})
        Path("run.py").write_text("".join(f"{k} = {v!r}\n" for k, v in (RUN | dict(
            sources=[dict(name="text", path=f"in_{size}")], tokenizer="small.model", seq_len=255,
            n_chunks=4, workers=2)).items()))
        Path("peak.py").write_text(PEAK.format(path=str(REPO / "prepare.py")))
        done = subprocess.run([sys.executable, "peak.py", "run.py", f"--dataset=set_{size}"],
                              capture_output=True, text=True, env=os.environ | {
                                  "PYTHONPATH": str(REPO)})
        assert done.returncode == 0, done.stderr
        peaks.append([int(line.split()[1]) / 1024 for line in done.stdout.splitlines()
                      if line.startswith("PEAK")])
    assert len(peaks[0]) == 2 and min(peaks[0]) > 30
    assert all(large - small < 40 for small, large in zip(*peaks, strict=True)), peaks


# ---- what a careful user runs into ---------------------------------------------------------------

def test_a_licence_is_no_part_of_the_bytes(room, capfd):
    write(Path("in"), {"a.txt": story(900, 1)})
    before = files_of(made(dict(path="in", licence="unknown")))
    assert prepare_here(dict(path="in", licence="mit")) == 0
    assert "prepared already" in capfd.readouterr().out and files_of(Path("data/run")) == before


def test_nothing_is_what_was_asked_for(room, capfd):
    write(Path("in"), {"a.jsonl": lines_of(TEXTS[:5])})
    said = refused(capfd, DATA, dict(path="in", where="meta.set=Boook"))
    assert "none has meta.set=Boook" in said


def test_a_token_that_is_there_already(room, capfd):
    write(Path("in"), {"a.txt": story(900, 1)})
    for names in ("</s>", "<a> <b> <a>"):
        said = refused(capfd, USAGE, dict(path="in"), special_tokens=names, vocab_size=500)
        assert "special_tokens" in said and names.split()[-1] in said and "defined" in said


def test_chunks_are_of_a_release(room, capfd):
    write(Path("in"), {"a.txt": story(900, 1)})
    assert prepare_here(dict(path="in"), "--chunks=0-1") == USAGE
    assert "--chunks" in capfd.readouterr().err and not Path("data").exists()


@pytest.mark.parametrize("passes", [1, 2])
def test_files_that_several_sources_read_are_in_the_bill_once(passes, room, monkeypatch, capfd):
    """And their tokens go to the sources by weight; the guess is worked out here again."""
    write(Path("in"), {"a.jsonl": lines_of(TEXTS[:40], set="x") + lines_of(TEXTS[:40], set="y")})
    size = Path("in/a.jsonl").stat().st_size
    parts = [dict(name=one, path="in", where=f"set={one}", weight=w)
             for one, w in (("x", 3.0), ("y", 1.0))][:passes]
    made(parts)
    rows = size / 2.5 * 2  # bytes of uint16, once through the file
    said = capfd.readouterr().out.splitlines()[0]
    assert f"reads {size / 1000:.3g}" in said and "in 1 file;" in said
    assert f"{rows / 1000:.3g}kB of rows, needs {2 * rows / 1000:.3g}kB of disk" in said, said


def test_a_bad_remote_file_is_bad_again(elsewhere, capfd):
    """What one run was told to skip is not skipped by the next without a word."""
    elsewhere.files = {"data/0.txt": "words of it " * 99, "data/1.txt": "\xe9" * 99}
    source = dict(path="hf:datasets/o/n", files="data/*")
    assert prepare_here(source, max_bad_documents=1, dataset="one", encoding="ascii") == 0
    assert "byte 0 is not ascii" in refused(capfd, DATA, source, encoding="ascii")


def test_epochs_of_fim_are_as_many_as_were_asked_for(room):
    """Epochs differ by some rows: that is no reason for another pass over the source."""
    write(Path("in"), {"a.jsonl": lines_of(TEXTS[:200])})
    for seed in range(6):
        folder = made(dict(path="in", fim_rate=0.9, epochs=2), seed=seed, dataset=f"s{seed}",
                      rows_per_chunk=None, vocab_size=500,
                      special_tokens="<|fim_prefix|> <|fim_middle|> <|fim_suffix|>")
        source, = json.loads((folder / "manifest.json").read_text())["sources"]
        assert 1.9 < source["epochs"] <= 2
        rows = [tuple(row) for path in sorted(folder.glob("provenance/train_*.bin.npy"))
                for row in np.load(path).tolist()]
        assert len(set(rows)) == len(rows)
        tables = {e: (folder / f"provenance/text_epoch_{e}.npy").read_bytes() for e in (0, 1)}
        assert tables[0] != tables[1]
    more = made(dict(path="in", fim_rate=0.9, epochs=3), seed=5, dataset="more", vocab_size=500,
                rows_per_chunk=2 * source["rows"] + 1,
                special_tokens="<|fim_prefix|> <|fim_middle|> <|fim_suffix|>")
    tables = [(more / f"provenance/text_epoch_{e}.npy").read_bytes() for e in range(3)]
    assert tables[2] == tables[0] != tables[1]  # one row more: the first is there once more
