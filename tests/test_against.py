"""tests/against.py: what its comparison sees, and what it leaves out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import against
from test_golden import HERE

METRICS, RUN = "out/llama/metrics.jsonl", "out/llama/run.json"
WEIGHTS = "out/llama/ckpt_000/model.safetensors"


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    """Two folders with the same run."""
    for side in ("old", "new"):
        shutil.copytree(HERE / "old" / "runs" / "llama", tmp_path / side / "out" / "llama")
    return tmp_path / "old", tmp_path / "new"


def change(path: Path, line: int, *keys: str | int, to: object) -> None:
    """Set one value in a json file, or in a line of a .jsonl."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    whole = value = json.loads(lines[line])
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = to
    lines[line] = json.dumps(whole)
    path.write_text("\n".join(lines) + "\n")


def test_the_same_is_the_same(sides):
    assert against.compare(*sides) == (21, [])


def test_one_bit_of_one_weight_is_seen(sides):
    path = sides[1] / WEIGHTS
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name].view(torch.int32)[3, 5] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    count, (line,) = against.compare(*sides)
    assert count == 21 and line == f"{WEIGHTS}: 1 tensors, first {name}"


@pytest.mark.parametrize("file, line, keys, to, seen", [
    (METRICS, 1, ["tok_per_s"], 1.0, False), (METRICS, 1, ["time_data"], 1.0, False),
    (METRICS, 1, ["memory"], 1, False), (METRICS, 1, ["loss"], 1.0, True),
    (METRICS, 2, ["bytes"], 1, True), (METRICS, 1, ["new"], 1, True),
    (RUN, 0, ["launches", 0, "git", "clean"], False, False),
    (RUN, 0, ["launches", 0, "versions", "numpy"], "3", False),
    (RUN, 0, ["launches", 0, "command"], [], False),
    (RUN, 0, ["launches", 0, "exact", "threads"], 2, False),
    (RUN, 0, ["launches", 0, "exact", "world"], 2, True),
    (RUN, 0, ["launches", 0, "from_step"], 2, True), (RUN, 0, ["git"], {}, True),
    (RUN, 0, ["config", "optim", "lr"], 0.02, True),
    ("out/llama/ckpt_000/state.json", 0, ["tokens"], 1, True)])
def test_fields(file, line, keys, to, seen, sides):
    change(sides[1] / file, line, *keys, to=to)
    _, lines = against.compare(*sides)
    assert [line.startswith(f"{file}: ") for line in lines] == [True] * seen


def test_a_file_on_one_side(sides, monkeypatch):
    (sides[0] / RUN).unlink()
    (sides[1] / "out/llama/more.json").write_text("{}")
    gone = f"{RUN} is only new"
    assert against.compare(*sides) == (22, ["out/llama/more.json is only new", gone])
    monkeypatch.setattr(against, "ALLOWED", [("out/*/more.json", "", 1, "")])
    assert against.compare(*sides) == (21, [gone])


def test_lines_are_compared_in_order(sides):
    """Left out is a field, not the order of the others, and a line that is missing is seen."""
    path = sides[1] / METRICS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert len(against.compare(*sides)[1]) == 1
    backwards = json.dumps(dict(reversed(json.loads(lines[0]).items())))
    path.write_text("".join([f"{backwards}\n", *lines[1:]]))
    assert len(against.compare(*sides)[1]) == 1
