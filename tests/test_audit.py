"""replay --verify: a run as it was made is whole, every tampering is named where it was done."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import train
from nano360.files import sha256_file, write_sealed
from nano360.rows import data_hash
from test_analyze import change, plant, replay
from test_train import TINY, hashes, prepared  # noqa: F401

OUT, DATA = Path("out/tiny"), Path("data/tiny")
METRICS, INCIDENTS = OUT / "metrics.jsonl", OUT / "incidents.jsonl"


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with four runs: tiny, stopped three times, with two skipped steps; late, with a
    chunk put off; child of tiny, thinned, stopped inside a visit; short, killed after its end."""
    root = tmp_path_factory.mktemp("audit")
    shutil.copytree(prepared / "data", root / "data")
    (root / "tiny.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with pytest.MonkeyPatch.context() as broken:
            plant(broken, {6, 11})
            for stop in ("--max_steps=5", "--max_steps=8", "--max_steps=13", "--log_every=8"):
                train.main(["tiny.py", stop])
        with pytest.MonkeyPatch.context() as broken:
            plant(broken, {6}, chunk=1)
            train.main(["tiny.py", "--run=late", "--on_nonfinite=defer", "--epochs=2"])
        train.main(["tiny.py", "--run=child", "--init_from=out/tiny/ckpt_003", "--max_steps=14",
                    "--init_optimizer=true", "--keep_optimizer=2"])
    return root


@pytest.fixture
def world(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to tamper with."""
    shutil.copytree(made, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def verify(name: str, capsys) -> tuple[int, str]:
    """The exit code and all that is said of a run. A traceback fails the test by itself."""
    capsys.readouterr()
    code = replay(f"out/{name}", "--verify")
    said = capsys.readouterr()
    return code, said.out + said.err


def edit(path: Path, key: str, value: object, sealed: bool = True) -> None:
    """Another value of a key, a|b for one inside of another, in a json file, sealed again."""
    content = json.loads(path.read_text())
    *outer, last = key.split("|")
    inner = content
    for one in outer:
        inner = inner[one]
    inner[last] = value(inner[last]) if callable(value) else value
    if sealed and Path(f"{path}.sha256").exists():
        write_sealed(path, content)
    else:
        path.write_text(json.dumps(content, indent=1) + "\n")


def edit_line(path: Path, n: int, key: str, value: object) -> None:
    """Another value in line n, counted from 1."""
    lines = path.read_text().splitlines()
    lines[n - 1] = json.dumps(json.loads(lines[n - 1]) | {key: value})
    path.write_text("\n".join(lines) + "\n")


def line_of(step: int) -> int:
    """The line of metrics.jsonl that a step has."""
    for n, text in enumerate(METRICS.read_text().splitlines(), 1):
        if (line := json.loads(text))["kind"] == "train" and line["step"] == step:
            return n
    raise LookupError(step)


# ---- runs as they were made ----------------------------------------------------------------------

def test_nothing_is_wrong(world, capsys):
    """With skipped steps, a chunk put off, two epochs, a parent, thinned checkpoints and last/."""
    before = hashes(Path("."))
    for name, parts in {
            "tiny": ["4 chunks, 16 steps, 4 checkpoints, 4 parents"],
            "late": ["4 chunks, 32 steps, 8 checkpoints, 8 parents",
                     "    7    001      0  29-32"],
            "child": ["14 steps, 3 checkpoints and last/, 4 parents", "thinned: 0",
                      "last     003      0  13-14",
                      "0        000      0    1-4  ok    ok       - thinned  ok"]}.items():
        code, said = verify(name, capsys)
        assert code == 0, said
        assert f"out/{name}: nothing is wrong: " in said and "BAD" not in said
        assert all(part in said for part in parts), said
    assert hashes(Path(".")) == before


def test_what_is_no_error(world, capsys):
    """A run of before these seals; chunks of a release that were let go; what a kill left."""
    manifest = DATA / "manifest.json"
    edit(manifest, "recipe|sources", lambda ones: [one | {"rows": True} for one in ones])
    made = json.loads(manifest.read_text())
    digest = data_hash(made["recipe"], made["tokenizer"]["sha256"])
    for path in (manifest, OUT / "run.json"):
        edit(path, "data_hash", digest)
    (DATA / "train_002.bin").unlink()
    for v in range(4):
        path = OUT / f"ckpt_{v:03d}" / "state.json"
        state = json.loads(path.read_text())
        del state["chunk_sha256"], state["metrics_sha256"]
        state["data_hash"] = digest
        if v:
            state["parent"] = sha256_file(OUT / f"ckpt_{v - 1:03d}" / "state.json")
        write_sealed(path, state)
    shutil.rmtree(OUT / "ckpt_003")
    (OUT / "ckpt_003.part").mkdir()
    with open(METRICS, "a") as file:
        file.write('{"kind": "tra')
    code, said = verify("tiny", capsys)
    assert code == 0 and "not sealed: 0, 1, 2\n" in said, said
    assert "not checked: steps 13 to 16, which" in said
    assert "data/tiny: ok; chunks that were made and let go: 1\n" in said


# ---- tampering -----------------------------------------------------------------------------------

def weight() -> None:
    path = OUT / "ckpt_001/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def moment() -> None:
    path = OUT / "ckpt_002/optimizer/adamw.safetensors"
    moments = load_file(path)
    moments["exp_avg.lm_head.weight"] *= 1.01
    save_file(moments, path)


def token() -> None:
    path = DATA / "train_001.bin"
    rows = np.fromfile(path, np.uint16)
    rows[40] = (rows[40] + 1) % 300
    rows.tofile(path)


def swapped() -> None:
    """Two rows of a chunk, and the manifest made right again."""
    path = DATA / "train_001.bin"
    rows = np.fromfile(path, np.uint16).reshape(33, 33)
    rows[[3, 8]] = rows[[8, 3]]
    rows.tofile(path)
    edit(DATA / "manifest.json", "files|train_001.bin|sha256", sha256_file(path))


def removed() -> None:
    lines = METRICS.read_text().splitlines(keepends=True)
    del lines[line_of(7) - 1]
    METRICS.write_text("".join(lines))


def doubled() -> None:
    lines = METRICS.read_text().splitlines(keepends=True)
    lines.insert(line_of(7), lines[line_of(7) - 1])
    METRICS.write_text("".join(lines))


def copied() -> None:
    shutil.rmtree(OUT / "ckpt_002")
    shutil.copytree(OUT / "ckpt_001", OUT / "ckpt_002")


def add_byte(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"x")


def unsealed() -> None:
    path = OUT / "ckpt_002/state.json"
    path.write_text(path.read_text().replace('"tokens": ', '"tokens": 1'))


def forget(step: int) -> None:
    lines = INCIDENTS.read_text().splitlines(keepends=True)
    INCIDENTS.write_text("".join(line for line in lines if f'"step": {step},' not in line))


def state(v: int) -> Path:
    return OUT / f"ckpt_{v:03d}/state.json"


# name -> what is done, the exit code, and what must be said
TAMPERED = {
    "weight": (weight, 4, ["ckpt_001/model.safetensors was changed", "1 thing is wrong"]),
    "weight, resealed": (lambda: change(OUT / "ckpt_001", "lm_head.weight", 5), 4, [
        "out/tiny/ckpt_002/state.json: parent is", "the sha256 of out/tiny/ckpt_001/state.json"]),
    "moment": (moment, 4, ["ckpt_002/optimizer/adamw.safetensors was changed"]),
    "token": (token, 3, ["data/tiny/train_001.bin was changed", "data/tiny: BAD"]),
    "token too large": (lambda: (DATA / "train_002.bin").write_bytes(
        b"\xff" * 2178), 3, ["data/tiny/train_002.bin was changed"]),
    "rows swapped": (swapped, 4, ["ckpt_001/state.json: chunk_sha256 is",
                                  "that of train_001.bin in data/tiny/manifest.json"]),
    "rows hash": (lambda: edit_line(METRICS, line_of(9), "rows", "0" * 16), 4, [
        "step 9: rows is '0000000000000000', expected '", "ckpt_002/state.json: metrics_sha256"]),
    "loss": (lambda: edit_line(METRICS, line_of(10), "loss", 1.5), 4, [
        "ckpt_002/state.json: metrics_sha256 is", "that of visit 2 in out/tiny/metrics.jsonl"]),
    "rate": (lambda: edit_line(METRICS, line_of(10), "lr", 0.5), 4, ["step 10: lr is 0.5, exp"]),
    "loss of a skipped step": (lambda: edit_line(METRICS, line_of(6), "loss", 1.5), 4, [
        "step 6: loss is 1.5, expected null"]),
    "line removed": (removed, 4, ["metrics.jsonl: no line of steps 7 to 7, visit 1"]),
    "line doubled": (doubled, 4, ["step 7 comes after step 7"]),
    "line broken": (lambda: METRICS.write_text(METRICS.read_text().replace('"step"', "[", 1)), 4, [
        "out/tiny/metrics.jsonl line 1 is none of this run's", "no line of steps 1 to 1"]),
    "parent": (lambda: edit(state(2), "parent", "0" * 64), 4, [
        "ckpt_002/state.json: parent is '000", "ckpt_003/state.json: parent is"]),
    "first parent": (lambda: edit(state(0), "parent", "0" * 64), 4, [
        "ckpt_000/state.json: parent is '000", "parent of out/tiny/run.json"]),
    "queue": (lambda: edit(OUT / "run.json", "queue", lambda q: q[::-1]), 4, [
        "out/tiny/run.json: queue[0:] is [[0, 3], ", "1 thing is wrong"]),
    "deferred": (lambda: edit(OUT / "run.json", "deferred", [[0, 1]]), 4, [
        "run.json: queue[1:] is [[0, 1], ", "ckpt_001/state.json: chunk is 1, expected 2"]),
    "seed": (lambda: edit(OUT / "run.json", "config|data|seed", 7), 4, [
        "ckpt_000/state.json: seed is 1337, expected 7", "step 1: rows is"]),
    "another depth": (lambda: edit(OUT / "run.json", "config|model|n_layer", 3), 4, [
        "ckpt_000 holds another model than this run's (n_layer 2, here 3)"]),
    "another encoding": (lambda: edit(OUT / "run.json", "config|data|encoding", "latin-1"), 4, [
        "out/tiny/run.json: encoding is 'latin-1', expected 'utf-8'", "1 thing is wrong"]),
    "first launch": (lambda: edit(OUT / "run.json", "launches", lambda ones: [
        ones[0] | {"from_step": 2}, *ones[1:]]), 4, [
        "from_step of its first launch is 2, expected 0"]),
    "code added": (lambda: (OUT / "ckpt_003/modeling_llama.py").write_text(""), 4, [
        "ckpt_003/modeling_llama.py is none of the files"]),
    "rate of the run": (lambda: edit(OUT / "run.json", "config|optim|lr", 0.02), 4, [
        "step 4: lr is"]),
    "checkpoint removed": (lambda: shutil.rmtree(OUT / "ckpt_001"), 4, [
        "out/tiny/ckpt_001 is missing"]),
    "last checkpoint removed": (lambda: shutil.rmtree(OUT / "ckpt_003"), 4, [
        "out/tiny/ckpt_003 is missing"]),
    "checkpoint copied": (copied, 4, ["ckpt_002/state.json: visit is 1, expected 2",
                                      "ckpt_002/state.json: step is 8, expected 12"]),
    "file removed": (lambda: (OUT / "ckpt_003/config.json").unlink(), 4, [
        "out/tiny/ckpt_003/config.json is missing"]),
    "file added": (lambda: (OUT / "ckpt_003/model.safetensors.index.json").write_text("{}"), 4, [
        "ckpt_003/model.safetensors.index.json is none of the files"]),
    "file named outside": (lambda: edit(state(3), "files", lambda f: f | {"../run.json": ""}), 4, [
        "ckpt_003 is said to have a file '../run.json'"]),
    "tokenizer": (lambda: add_byte(DATA / "tokenizer.model"), 3, [
        "data/tiny/tokenizer.model was changed"]),
    "provenance": (lambda: add_byte(DATA / "provenance/train_002.bin.npy"), 3, [
        "data/tiny/provenance/train_002.bin.npy was changed"]),
    "held-out rows removed": (lambda: (DATA / "valid_a.bin").unlink(), 3, ["valid_a.bin is miss"]),
    "recipe": (lambda: edit(DATA / "manifest.json", "recipe|text_key", "body"), 3, [
        "data/tiny/manifest.json: data_hash is", "1 thing is wrong"]),
    "manifest unsealed": (lambda: edit(DATA / "manifest.json", "seed", 5, sealed=False), 3, [
        "data/tiny/manifest.json was changed"]),
    "state unsealed": (unsealed, 4, ["ckpt_002/state.json was changed: its sha256 is"]),
    "skipped": (lambda: edit(state(3), "skipped", [6]), 4, ["step 11: loss is None, expected a"]),
    "incident": (lambda: forget(6), 4, ["out/tiny/incidents.jsonl: step 6 of chunk 1 was skipped"]),
    "restart": (lambda: edit(OUT / "run.json", "launches", lambda ones: ones[:2]), 4, [
        "out/tiny/incidents.jsonl line "]),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampering_is_named(what, world, capsys):
    """The file, step or line, and what it should be; the exit code; nothing is changed."""
    do, code, parts = TAMPERED[what]
    do()
    before = hashes(Path("."))
    found, said = verify("tiny", capsys)
    assert found == code and "nothing is wrong" not in said, said
    for part in parts:
        assert part in said, said
    assert hashes(Path(".")) == before


def test_all_at_once(world, capsys):
    """One that is wrong hides no other; of a child, also what became of its parent."""
    weight()
    token()
    forget(11)
    edit_line(METRICS, line_of(16), "loss", 1.5)
    code, said = verify("tiny", capsys)
    assert code == 4 and "out/tiny: 4 things are wrong: data/tiny/train_001.bin was" in said, said
    change(OUT / "ckpt_003", "lm_head.weight", 5)
    edit(Path("out/child/last/state.json"), "metrics_sha256", "0" * 64)
    code, said = verify("child", capsys)
    assert code == 4 and "out/child/run.json: sha256 of its parent is" in said, said
    assert "out/child/last/state.json: metrics_sha256 is '000" in said


@pytest.mark.parametrize("path", [
    OUT / "run.json", DATA / "manifest.json", METRICS, INCIDENTS, OUT / "ckpt_001/state.json",
    OUT / "ckpt_003/state.json"], ids=str)
def test_no_traceback(path, world, capsys):
    """Whatever a file is: no json, another type, deep, empty; each key of another type."""
    text, lines = path.read_bytes(), path.suffix == ".jsonl"
    for odd in (b"", b"\n", b"{", b"[]\n", b"7\n", b"\xff\xfe\n", b"[" * 9999 + b"\n", b"{}\n"):
        path.write_bytes(odd)
        if Path(f"{path}.sha256").exists():
            Path(f"{path}.sha256").write_text(f"{sha256_file(path)}  {path.name}\n")
        code, said = verify("tiny", capsys)
        assert code == (3 if path.parent == DATA else 4) and path.name in said, said
    path.write_bytes(text)
    content = json.loads(text.splitlines()[0] if lines else text)
    keys = [*content, *(f"{a}|{b}" for a in content if isinstance(content[a], dict)
                        for b in content[a])]
    for name in keys:
        for value in ("x", None, {"a": []}, 10**30):
            if lines:
                edit_line(path, 1, name, value)
            else:
                edit(path, name, value)
            assert verify("tiny", capsys)[0] in (0, 3, 4), (name, value)
            path.write_bytes(text)
