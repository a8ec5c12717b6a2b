"""analyze.py trace and batch against a search by brute force, which reads no provenance/."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import analyze
import prepare
import train
from conftest import REPO
from nano360.analysis.runs import open_run
from nano360.analysis.search import find_text, plain, read_wanted, seek, spell
from nano360.config import Stop, load, run
from nano360.files import write_sealed
from nano360.tokenizers import load_tokenizer
from test_analyze import plant
from test_prepare import library
from test_train import hashes, metrics, prepared, room  # noqa: F401

SMALL = """
n_layer = 1
n_head = 2
n_embd = 16
n_inner = 16
vocab_size = 420
special_tokens = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|>"
seq_len = 32
overlap = True
bos = True
sources = [dict(name="a", path="a.jsonl", epochs=2, fim_rate=0.5, weight=0.7),
           dict(name="b", path="b.jsonl", epochs=2, weight=0.3)]
n_chunks = 2
rows_per_chunk = None
valid_share = 0.1
lr = 1e-3
batch_size = 8
warmup_steps = 1
epochs = 2
"""
STOP = b"\xff"  # for what spells no text


@dataclasses.dataclass
class Stream:
    """Tokens as they were cut into rows, and where in the files each of them lies."""
    source: str
    ids: list[int]
    pieces: list[bytes]
    places: list[list[tuple[str, int, int]]]  # of a token: file, row, token of the row

    @functools.cached_property
    def edges(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.pieces)])

    @functools.cached_property
    def text(self) -> bytes:
        return b"".join(self.pieces)

    def parts(self, first: int, end: int) -> set[tuple]:
        """(file, row, first, end) of the rows that hold any of these tokens."""
        found = {}
        for name, row, token in (place for one in self.places[first:end] for place in one):
            found.setdefault((name, row), []).append(token)
        return {(*one, min(tokens), max(tokens) + 1) for one, tokens in found.items()}

    def find(self, text: bytes, ids: list[int]) -> set[tuple]:
        """Where a text stands, made of these ids but for its ends: filling in the middle cuts words
        into other pieces."""
        found, at = set(), self.text.find(text)
        while at >= 0:
            first = np.searchsorted(self.edges, at, side="right") - 1
            end = np.searchsorted(self.edges, at + len(text))
            if any(self.ids[i:i + len(ids)] == ids for i in range(first, end - len(ids) + 1)):
                found |= self.parts(first, end)
            at = self.text.find(text, at + 1)
        return found


def streams_of(folder: Path) -> list[Stream]:
    """Every epoch of every source, and what is held out, by the rule of dealing: training row i of
    a source is in chunk i % N, there at i // N of its rows."""
    manifest, coder, found, before = prepare.read_manifest(folder), load_tokenizer(folder), [], 0
    N, overlap = manifest["n_chunks"], manifest["recipe"]["overlap"]
    pieces = [spell(coder, i) or STOP for i in range(coder.vocab_size)]
    rows = {path.name: np.fromfile(path, manifest["dtype"]).reshape(-1, manifest["seq_len"] + 1)
            for path in folder.glob("*.bin")}
    for s, one in enumerate(manifest["sources"]):
        dealt = [(f"train_{i % N:03d}.bin", before + i // N)
                 for i in range(one["rows_per_chunk"] * N)]
        valid = [(f"valid_{one['name']}.bin", i) for i in range(one["valid_rows"])]
        before, epochs = before + one["rows_per_chunk"], []
        for i, (name, row) in enumerate(dealt):
            last = dealt[i - 1]
            if not i or (rows[name][row][0] != rows[last[0]][last[1]][-1] if one["fim_rate"]
                         else i % one["rows"] == 0):  # with FIM each epoch has its own number
                epochs.append([])
            epochs[-1].append((name, row))
        if one["documents"] < 100:  # single rows, which go back to where they were
            n = one["rows"] + len(valid)
            for at, row in zip(sorted(prepare.permutation(n, 1337, 2**32 - 2, s)[:len(valid)]),
                               valid, strict=True):
                for epoch in epochs:
                    epoch.insert(at, row)
        for epoch in [*epochs, *[valid] * (one["documents"] >= 100)]:
            stream = Stream(one["name"], [], [], [])
            for n, (name, row) in enumerate(epoch):
                ids = rows[name][row].tolist()
                if shared := int(bool(overlap and n)):
                    assert ids[0] == stream.ids[-1]
                    stream.places[-1].append((name, row, 0))
                stream.ids += ids[shared:]
                stream.pieces += [pieces[i] for i in ids[shared:]]
                stream.places += [[(name, row, i)] for i in range(shared, len(ids))]
            found.append(stream)
    return found


def documents_in(stream: Stream, coder) -> list[tuple[bytes | None, int, int]]:
    """(text, first, end) of the documents of a stream, cut at EOS and the middle put back; of the
    last, which may be cut short, no text."""
    PRE, MID, SUF = (coder.special_tokens.get(f"<|fim_{one}|>", -1)
                     for one in ("prefix", "middle", "suffix"))
    found, first = [], 0
    for end in [i + 1 for i, one in enumerate(stream.ids) if one == coder.eos]:
        start = first + (stream.ids[first] == coder.bos)
        ids, pieces = stream.ids[start:end - 1], stream.pieces[start:end - 1]
        if ids[:1] == [PRE]:
            suf, mid = ids.index(SUF), ids.index(MID)
            pieces = pieces[1:suf] + pieces[mid + 1:] + pieces[suf + 1:mid]
        found.append((b"".join(pieces).removeprefix(b" "), first, end))
        first = end
    return [*found, *[(None, first, len(stream.ids))] * (first < len(stream.ids))]


def steps_of(folder: Path, argv: list[str]) -> tuple[dict, dict]:
    """(chunk, row) -> {visit: step} of the whole queue, as batches() deals it out, and the visits
    of every chunk."""
    config, manifest, found, visits = load(argv)[0], prepare.read_manifest(folder), {}, {}
    plan = train.make_plan(config, manifest)
    plan = dataclasses.replace(plan, stop=plan.steps_per_visit * len(plan.queue))
    for step, numbers, _ in train.batches(config, plan, manifest, folder, 1):
        visit = plan.visit_of(step)
        name = f"train_{plan.queue[visit][1]:03d}.bin"
        visits.setdefault(name, {})[visit] = True
        for row in numbers.tolist():
            found.setdefault((name, row), {})[visit] = step
    return found, visits


def traced(capsys, *argv: str) -> set[tuple]:
    """(file, row, first, end, visit, step) of every line that trace prints."""
    capsys.readouterr()
    assert run(analyze.main, "", [], ["trace", *argv]) == 0
    lines, found = capsys.readouterr().out.splitlines(), set()
    for line in lines[1:-1]:
        chunk, row, tokens, *_, visit, step, _ = re.split(" {2,}", line.strip())
        name = f"train_{chunk}.bin" if chunk.isdecimal() else f"{chunk}.bin"
        found.add((name, int(row), *map(int, tokens.split("-")), visit, step))
    assert len(found) == max(0, len(lines) - 2)
    assert lines[-1].startswith(f"rows {len({one[:4] for one in found})}, ")
    return found


def with_steps(parts: set[tuple], steps: dict, visits: dict) -> set[tuple]:
    """The lines that are to be printed of these parts."""
    found = set()
    for part in parts:
        trained = steps.get(part[:2], {})
        for visit in visits.get(part[0], ["-"]):
            step = "-" if visit == "-" else str(trained.get(visit, "left out"))
            found.add((*part, str(visit), "skipped" if step in ("5", "7") else step))
    return found


def finish(out: Path) -> None:
    """As if a run of one step had come to its end and skipped two: so says its state.json."""
    plan, path = open_run(str(out)).plan, out / "last/state.json"
    write_sealed(path, json.loads(path.read_text()) | {
        "step": plan.steps_per_visit * len(plan.queue), "skipped": [5, 7]})


def check_documents(data: Path, argv: list[str], texts: dict[tuple[str, str], bytes], n: int,
                    capsys) -> int:
    """trace n documents, (source, FILE:LINE) -> text; how many it finds somewhere. Whose the last
    one of a stream is, brute force cannot say: no two documents may claim it."""
    out, coder, streams = f"out/{Path(argv[0]).stem}", load_tokenizer(data), streams_of(data)
    steps, visits = steps_of(data, argv)
    whole, cut_short, found = {}, [], 0
    for stream in streams:
        for text, first, end in documents_in(stream, coder):
            parts = stream.parts(first, end)
            if text is None:
                cut_short.append((stream.source, parts))
            else:
                whole.setdefault((stream.source, text), set()).update(parts)
    said = collections.Counter((source, text) for (source, _), text in texts.items())
    some = [key for key in texts if said[key[0], texts[key]] == 1]
    for i in np.random.default_rng(1).permutation(len(some))[:n]:
        source, place = some[i]
        should = whole.get((source, texts[some[i]]), set())
        got = traced(capsys, out, f"--document={source}/{place}")
        for one in [one for one in cut_short if one[0] == source
                    and one[1] <= {line[:4] for line in got} - should]:
            should |= one[1]
            cut_short.remove(one)
        assert got == with_steps(should, steps, visits), some[i]
        found += bool(got)
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Two sources with few words, all of which are said often; trained for a step."""
    root, rng, before = tmp_path_factory.mktemp("small"), np.random.default_rng(3), Path.cwd()
    words = ["red", "green,", "naïve", "日本", "\n", "x=1", "tree", "(sea)", "one", "\n\n", "of 42"]
    words += ["".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(2, 9, 60)]
    for name, n in (("a", 130), ("b", 12)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(
            [str(i), *rng.choice(words, rng.integers(5, 120))])}) + "\n" for i in range(n)))
    (root / "small.py").write_text(SMALL)
    os.chdir(root)
    try:
        prepare.main(["small.py", "--workers=1"])
        train.main(["small.py", "--max_steps=1"])
        finish(Path("out/small"))
    finally:
        os.chdir(before)
    return root


def texts_of(root: Path) -> dict[tuple[str, str], bytes]:
    return {(name, f"{name}.jsonl:{i}"): json.loads(line)["text"].encode() for name in "ab"
            for i, line in enumerate((root / f"{name}.jsonl").read_text().splitlines(), 1)}


def test_documents_of_the_small_set(small, monkeypatch, capsys):
    """All of them: two epochs and the start of a third, rewritten, in rows that overlap, held out
    whole or row by row."""
    monkeypatch.chdir(small)
    manifest = prepare.read_manifest(Path("data/small"))
    assert [one["documents"] for one in manifest["sources"]] == [130, 12]
    assert all(one["valid_rows"] for one in manifest["sources"])
    assert check_documents(Path("data/small"), ["small.py"], texts_of(small), 142, capsys) > 130


@pytest.fixture
def demo_run(demo, tmp_path, monkeypatch, capsys) -> list[str]:
    """A folder with a run of one step on the demo's data; returns its command line."""
    (tmp_path / "data").symlink_to(demo.parent)
    monkeypatch.chdir(tmp_path)
    argv = [str(REPO / "configs/demo.py"), "--n_layer=1", "--n_head=2", "--n_embd=16",
            "--n_inner=16"]
    train.main([*argv, "--max_steps=1", "--warmup_steps=0"])
    return argv


def test_documents_and_texts_of_the_demo(demo_run, capsys):
    """200 documents at random; texts of the library, one of them over many rows."""
    data, texts, rng = Path("data/demo"), {}, np.random.default_rng(2)
    finish(Path("out/demo"))
    for source in ("code", "prose"):
        files = json.loads((data / f"provenance/{source}_files.json").read_text())
        for file in rng.permutation(files)[:400]:
            with contextlib.suppress(SyntaxError):  # it tests the parser
                texts |= {(source, f"{file}:{line}"): text.encode()
                          for line, text in library(file).items()}
    assert check_documents(data, demo_run, texts, 200, capsys) > 60
    streams, manifest, coder = streams_of(data), prepare.read_manifest(data), load_tokenizer(data)
    found = []
    for stream in streams:
        for _ in range(12):
            at, size = rng.integers(len(stream.text)), int(rng.choice([60, 400, 6000]))
            text = stream.text[at:at + size].split(STOP)[0].decode(errors="ignore")
            if len(text) >= 60:
                found.append(check_text(data, manifest, coder, streams, text))
    assert len(found) > 25 and max(found) > 5 and min(found) == 1


def check_text(data: Path, manifest: dict, coder, streams: list[Stream], text: str) -> int:
    """find_text against all places of its bytes; how many rows. What is found beside them stands
    where a row ends and the next one was left out."""
    ids = read_wanted(coder, text).ids.tolist()
    should = set().union(*(stream.find(text.encode(), ids) for stream in streams))
    got = find_text(data, manifest, coder, text)
    found = {dataclasses.astuple(part) for part in got}
    assert should <= found, text
    for part in found - should:
        row = np.fromfile(data / part[0], manifest["dtype"]).reshape(-1, manifest["seq_len"] + 1)
        held = b"".join(spell(coder, i) for i in row[part[1]][part[2]:part[3]].tolist())
        assert 0 in part[2:] or part[3] == manifest["seq_len"] + 1
        assert (held in text.encode() or text.encode().startswith(held.lstrip())
                or any(held.endswith(text.encode()[:i]) for i in range(4, len(held)))), (part, text)
    return len(should)


def test_texts_of_the_small_set(small, monkeypatch, capsys):
    """Cut out anywhere: in a row, over one row's end or over many, said twice, at the ends of
    documents; in rows that overlap and where the next row is held out."""
    monkeypatch.chdir(small)
    data, rng, counts = Path("data/small"), np.random.default_rng(4), collections.Counter()
    streams, manifest, coder = streams_of(data), prepare.read_manifest(data), load_tokenizer(data)
    for _ in range(400):
        stream = streams[rng.integers(len(streams))]
        at = rng.integers(len(stream.text))
        text = stream.text[at:at + int(rng.integers(20, 300))].split(STOP)[0]
        text = text.decode(errors="ignore")
        try:
            counts[check_text(data, manifest, coder, streams, text)] += 1
        except Stop as error:
            assert "too short" in str(error) and len(text) < 40
            counts["short"] += 1
    assert counts[1] and counts[2] and max(n for n in counts if n != "short") > 8
    assert counts["short"] < 100 and counts[0] < 80  # rewritten just there
    text = next(text for text in texts_of(small).values() if text.count(b"\n") > 5)
    Path("t.txt").write_bytes(text.replace(b"\n", b"\r\n"))
    assert {one[:4] for one in traced(capsys, "out/small", "--file=t.txt")} >= set().union(
        *(stream.find(text, read_wanted(coder, text.decode()).ids.tolist()) for stream in streams))
    assert not traced(capsys, "out/small", "--text=these words were never said in any of them")
    for dtype in (np.uint16, np.uint32):  # at multiples of the item size alone
        rows = np.array([[0x0101, 0x0203, 0x0102, 0x0302, 0x0101, 0x0203, 0x0102]], dtype)
        assert seek(np.array([0x0101, 0x0203]), {"x": rows}) == [("x", 0, 0), ("x", 0, 4)]
        assert seek(np.array([0x0301, 0x0201]), {"x": rows}) == []


def rows_and_hash(capsys, *argv: str) -> tuple[list[int], str, str]:
    capsys.readouterr()
    assert run(analyze.main, "", [], ["batch", *argv]) == 0
    said = capsys.readouterr().out
    table = said.partition("nonfinite in launch")[0].splitlines()[3:]
    rows = [int(line.split()[0]) for line in table if not line.startswith("    ")]
    return rows, re.search("rows ([0-9a-f]{16})", said)[1], said


def test_batch(room, monkeypatch, capsys):  # noqa: F811
    """The rows that training logged, of every step, after a skipped one and a chunk put off too."""
    with monkeypatch.context() as patch:
        plant(patch, {6})
        train.main(["tiny.py"])
    with monkeypatch.context() as patch:
        plant(patch, {6}, chunk=1)
        train.main(["tiny.py", "--run=late", "--on_nonfinite=defer", "--max_steps=14"])
    for name in ("tiny", "late"):
        logged = {line["step"]: line["rows"] for line in metrics(Path("out") / name)}
        for step in range(1, 17):
            rows, digest, said = rows_and_hash(capsys, f"out/{name}", f"--step={step}")
            assert hashlib.sha256(np.array(rows, "<i8").tobytes()).hexdigest()[:16] == digest
            assert digest == logged.get(step, digest) and len(rows) == 8
            assert ("no line of it yet" in said) == (step not in logged)
            assert ("skipped" in said) == ((name, step) == ("tiny", 6))
    assert logged.keys() == {*range(1, 15)}
    assert "visit 3, epoch 0, chunk 001, ends in out/late/ckpt_003 (not here)" in said
    first = rows_and_hash(capsys, "out/tiny", "--step=1", "--show_text")[2]
    assert any(word in first for word in ("green", "tree")) and first.count("a.jsonl:") > 4
    (path := Path("out/tiny/metrics.jsonl")).write_text(
        path.read_text().replace(metrics(Path("out/tiny"))[2]["rows"], "0" * 16))
    assert run(analyze.main, "", [], ["batch", "out/tiny", "--step=3"]) == 3
    assert "0000000000000000 at step 3" in capsys.readouterr().err


def test_checkpoints_and_what_was_not_trained(room, capsys):  # noqa: F811
    """Not yet, left out, held out; one checkpoint alone; a release, whose steps are not known."""
    train.main(["tiny.py", "--max_steps=9"])
    capsys.readouterr()
    for word, seen in (("out/tiny", "ckpt_000 and 1 later"), ("out/tiny/ckpt_001", "ckpt_001")):
        run(analyze.main, "", [], ["trace", word, "--document=b/b.txt:1"])
        said = capsys.readouterr().out
        lines = [re.split(" {2,}", line.strip()) for line in said.splitlines()[1:-1]]
        steps = {line[6] for line in lines}
        assert {line[-1] for line in lines if line[5] == "0" and line[6].isdecimal()} == {seen}
        assert {"not yet", "9", "1"} & steps and {line[7] for line in lines if line[5] == "3"} == {
            "none"}
        assert "valid_b" in said and "held out: no checkpoint has seen it" in said
    (bare := Path("out/bare")).mkdir()
    for name in ("ckpt_000", "ckpt_001"):
        (Path("out/tiny") / name).rename(bare / name)
    run(analyze.main, "", [], ["trace", "out/bare", "--data=data/tiny", "--document=b/b.txt:1"])
    said = capsys.readouterr().out
    assert said.count("not released") > 3 and "ckpt_000 and 1 later" in said


def test_bad_input_and_no_text(room, small, monkeypatch, capsys):  # noqa: F811
    """One line each, with the exit code; and training text is never shown unasked."""
    train.main(["tiny.py", "--max_steps=1"])
    Path("out/bare").mkdir()
    Path("out/last").mkdir()
    Path("out/tiny/last").rename("out/bare/ckpt_000")
    for argv, code, part in (
            (["trace", "out/tiny"], 2, "one of --text"), (["trace"], 2, "expected a run"),
            (["trace", "out/tiny", "--text=a", "--document=b"], 2, "one of --text"),
            (["trace", "out/tiny", "--text=red"], 2, "too short"),
            (["trace", "out/tiny", "--text="], 2, "too short"),
            (["trace", "out/tiny", "--file=none.txt"], 2, "none.txt cannot be read"),
            (["trace", "out/tiny", "--document=a"], 2, "expected SOURCE/FILE:LINE"),
            (["trace", "out/tiny", "--document=c/a.jsonl:1"], 2, "no source 'c'"),
            (["trace", "out/tiny", "--document=a/a.json:1"], 2, "nearest names are a.jsonl"),
            (["trace", "out/tiny", "--document=a/a.jsonl:777"], 2, "begin at 148, 149, 150"),
            (["trace", "out/none", "--text=a"], 2, "out/none is no run"),
            (["trace", "out/bare", "--text=a"], 3, "give --data=DIR"),
            (["batch", "out/tiny", "--step=17"], 2, "its steps are 1 to 16"),
            (["batch", "out/tiny", "--step=0"], 2, "its steps are 1 to 16"),
            (["batch", "out/tiny"], 2, "missing key 'step'"),
            (["batch", "out/bare", "--step=1"], 2, "is a release")):
        capsys.readouterr()
        assert run(analyze.main, "", [], argv) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and part in said, said
    before = hashes(Path("out"))
    argv = ["trace", "out/tiny", "--document=a/a.jsonl:17"]
    for words in (argv, ["batch", "out/tiny", "--step=2"]):
        for show in ([], ["--show_text"]):
            assert run(analyze.main, "", [], [*words, *show]) == 0
            said = capsys.readouterr().out
            assert ("green" in said) == bool(show)
    assert plain("a\x1b[2J\n\u202eb é日") == "a\\x1b[2J\\n\\u202eb é日"
    assert hashes(Path("out")) == before


def test_a_release(small, tmp_path, monkeypatch, capsys):
    """A document is a line; a row stands alone; a chunk that was let go is named."""
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    ids = np.fromfile(small / "data/small/train_000.bin", np.uint16).reshape(-1, 33)
    for k in range(2):
        Path(f"rows/{k}.jsonl").write_text("".join(json.dumps(
            {"token_ids": row.tolist(), "source": "xy"[i % 2]}) + "\n"
            for i, row in enumerate(ids[25 * k:25 * k + 25])))
    Path("rel.py").write_text(re.sub(
        "(?s)special.*rows_per", f"tokenizer = '{small}/data/small/tokenizer.model'\nseq_len = 32\n"
        "n_chunks = 2\nsources = [dict(name='rel', path='rows', rows=True)]\nrows_per",
        SMALL.replace("None", "16")))
    prepare.main(["rel.py", "--workers=1", "--valid_rows=2"])
    coder, seen = load_tokenizer("data/rel"), set()
    train.main(["rel.py", "--epochs=1"])
    for k in range(2):
        for i, row in enumerate(ids[25 * k:25 * k + 25]):
            for label in ("rel", "xy"[i % 2]):
                found = traced(capsys, "out/rel", f"--document={label}/{k}.jsonl:{i + 1}")
                for name, at, first, end, *_ in found:
                    mine = np.fromfile(f"data/rel/{name}", np.uint16).reshape(-1, 33)[at]
                    assert np.array_equal(mine, row) and (first, end) == (0, 33)
                    seen.add((name, at))
    assert len(seen) == 36 and not traced(capsys, "out/rel", "--document=y/1.jsonl:1")
    row = np.fromfile("data/rel/train_001.bin", np.uint16).reshape(-1, 33)[3]
    Path("t.txt").write_text(coder.decode(row[4:]) + " and more")
    Path("out/rel/run.json").unlink()
    assert ("train_001.bin", 3) in {one[:2] for one in traced(capsys, "out/rel", "--file=t.txt")}
    Path("data/rel/train_001.bin").unlink()
    assert run(analyze.main, "", [], ["trace", "out/rel", "--file=t.txt"]) == 0
    assert "data/rel/train_001.bin is not here" in capsys.readouterr().out
