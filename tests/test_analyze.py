"""analyze.py: a visit that is trained again gives the same bits, and the check can tell."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import analyze
import train
from nano360.config import run
from nano360.files import sha256_file, write_sealed
from test_train import hashes, loopback, prepared, room, torchrun  # noqa: F401


def replay(*argv: str) -> int:
    return run(analyze.main, "", [], ["replay", *argv])


def plant(monkeypatch, bad: set[int], chunk: int | None = None) -> list[int]:
    """Make the loss no number at the steps `bad`, once each, of one chunk or of any."""
    batches, loss_of, now, hit = train.batches, train.loss_of, [0, 0], []

    def noted(config, plan, *rest):
        for step, numbers, rows in batches(config, plan, *rest):
            now[:] = step, plan.queue[plan.visit_of(step)][1]
            yield step, numbers, rows

    def broken(model, rows, place):
        loss = loss_of(model, rows, place)
        if now[0] in bad and chunk in (None, now[1]) and torch.is_grad_enabled():
            bad.remove(now[0])
            hit.append(now[0])
            return loss * float("nan")
        return loss
    monkeypatch.setattr(train, "batches", noted)
    monkeypatch.setattr(train, "loss_of", broken)
    return hit


def change(folder: Path, name: str, index: int) -> None:
    """Another value in one place of one tensor, in a checkpoint whose hashes are right again."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[index] += 0.5
    save_file(weights, path, metadata={"format": "pt"})
    state = json.loads((folder / "state.json").read_text())
    state["files"]["model.safetensors"] = sha256_file(path)
    write_sealed(folder / "state.json", state)


def test_every_visit_is_identical(room, capsys):  # noqa: F811
    """Both epochs of a run that was stopped twice; the run is left as it is, nothing else stays."""
    for stop in ("--max_steps=6", "--max_steps=13", "--log_every=8"):
        train.main(["tiny.py", "--epochs=2", stop])
    before = hashes(Path("out/tiny"))
    capsys.readouterr()
    assert replay("out/tiny") == 0
    said = capsys.readouterr().out
    n = sum(len(load_file(path)) for path in Path("out/tiny/ckpt_000").rglob("*.safetensors"))
    for v in range(8):
        assert f"visit {v}: identical, {n} tensors\n" in said
    assert "from the initial weights" in said and "from out/tiny/ckpt_006" in said
    assert hashes(Path("out/tiny")) == before
    assert [path.name for path in Path("out").iterdir()] == ["tiny"]


def test_skipped_steps_and_deferred_chunks(room, monkeypatch, capsys):  # noqa: F811
    """What was left out is left out again, though this time nothing is wrong with it."""
    with monkeypatch.context() as patch:
        hit = plant(patch, {6, 11})
        train.main(["tiny.py"])
        assert hit == [6, 11]
    with monkeypatch.context() as patch:
        hit = plant(patch, {6}, chunk=1)
        train.main(["tiny.py", "--run=late", "--on_nonfinite=defer"])
        assert hit == [6]
    assert json.loads(Path("out/late/run.json").read_text())["queue"] == [
        [0, 0], [0, 2], [0, 3], [0, 1]]
    capsys.readouterr()
    for name in ("tiny", "late"):
        assert replay(f"out/{name}") == 0
        said = capsys.readouterr().out
        assert all(f"visit {v}: identical" in said for v in range(4))
    assert "visits 3 to 3 again, chunks 001 of epoch 0" in said
    state = json.loads(Path("out/tiny/ckpt_003/state.json").read_text())
    assert state["skipped"] == [6, 11] and state["updates"] == 14


def test_a_changed_weight_is_named(room, capsys):  # noqa: F811
    """The tensor, how many values and how far; both checkpoints are kept; the exit code is 4."""
    train.main(["tiny.py"])
    change(Path("out/tiny/ckpt_003"), "model.layers.1.mlp.up_proj.weight", 77)
    before = hashes(Path("out/tiny"))
    assert replay("out/tiny", "--visit=2") == 0
    capsys.readouterr()
    assert replay("out/tiny", "--visit=3") == 4
    said = capsys.readouterr().err
    assert "visit 3 is not out/tiny/ckpt_003" in said and "(1 differ in all)" in said
    assert "model.safetensors:model.layers.1.mlp.up_proj.weight differs in 1 of 2,048" in said
    assert "by at most 0.5" in said and "out/tiny.replay" in said
    assert hashes(Path("out/tiny")) == before
    assert Path("out/tiny.replay/ckpt_003/state.json").is_file()


@pytest.mark.parametrize("what", ["lr_at", "permutation", "optimizer"])
def test_the_check_can_fail(what, room, monkeypatch, capsys):  # noqa: F811
    """Another rate, another order, or moments of another run: each is seen."""
    train.main(["tiny.py"])
    if what == "lr_at":
        monkeypatch.setattr(train, "lr_at", lambda *rest: 0.009)
    elif what == "permutation":
        monkeypatch.setattr(train, "permutation", lambda n, *rest: np.arange(n))
    else:
        path = Path("out/tiny/ckpt_001/optimizer/adamw.safetensors")
        moments = load_file(path)
        moments["exp_avg_sq.lm_head.weight"] *= 1.01
        save_file(moments, path)
        state = json.loads(Path("out/tiny/ckpt_001/state.json").read_text())
        state["files"]["optimizer/adamw.safetensors"] = sha256_file(path)
        write_sealed(Path("out/tiny/ckpt_001/state.json"), state)
    assert replay("out/tiny", "--visit=2") == 4
    assert "visit 2 is not out/tiny/ckpt_002" in capsys.readouterr().err


def test_from_the_nearest_full_state(room, capsys):  # noqa: F811
    """Where optimizer states were thinned or damaged, it starts earlier, says so, and compares all
    visits from there."""
    train.main(["tiny.py", "--keep_optimizer=2"])
    assert [p.parent.name for p in sorted(Path("out/tiny").glob("*/optimizer"))] == [
        "ckpt_002", "ckpt_003"]
    capsys.readouterr()
    assert replay("out/tiny", "--visit=1") == 0
    said = capsys.readouterr().out
    assert "out/tiny/ckpt_000 is not there or has no optimizer state" in said
    for v in range(2):
        assert f"visit {v}: identical, 21 tensors of the weights" in said
    (path := Path("out/tiny/ckpt_002/model.safetensors")).write_bytes(b"")
    assert replay("out/tiny", "--visit=3") == 4
    said = capsys.readouterr()
    assert f"{path} was changed" in said.out and "from the initial weights" in said.out
    assert f"{path} is no whole file" in said.err


def test_bad_input(room, capsys):  # noqa: F811
    """One line each, with the exit code; nothing is written."""
    train.main(["tiny.py", "--max_steps=4"])
    train.main(["tiny.py", "--run=child", "--max_steps=4", "--init_from=out/tiny/ckpt_000"])
    before = hashes(Path("out"))
    capsys.readouterr()
    for argv, code, parts in (
            ([], 2, ["expected memorization, trace, batch, replay and a run"]),
            (["report", "out/tiny"], 2, ["'report'"]),
            (["replay"], 2, ["expected a run"]),
            (["replay", "out"], 2, ["out/run.json is missing"]),
            (["replay", "out/tiny", "--visit=1"], 2, ["no checkpoint 1", "it has 0"]),
            (["replay", "out/tiny", "--visit=-1"], 2, ["--visit"])):
        assert run(analyze.main, "", [], argv) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(part in said for part in parts), said
    assert hashes(Path("out")) == before
    change(Path("out/tiny/ckpt_000"), "lm_head.weight", 5)
    assert replay("out/child") == 4
    assert "out/tiny/ckpt_000 is not what out/child began with" in capsys.readouterr().err
    shutil.copytree("data/tiny", "copy")
    Path("data").unlink()
    Path("copy").rename("data_copy")
    Path("data").mkdir()
    Path("data_copy").rename("data/tiny")
    manifest = json.loads(Path("data/tiny/manifest.json").read_text())
    write_sealed(Path("data/tiny/manifest.json"), manifest | {"data_hash": "f" * 64})
    assert replay("out/tiny") == 3
    assert "f" * 64 in capsys.readouterr().err


@pytest.mark.skipif(not loopback(), reason="no loopback interface: processes cannot talk")
def test_two_ranks_again(room):  # noqa: F811
    """A run of two processes, trained again by two, is the same bits; by one, it says what differs
    in the machine."""
    assert torchrun(2, "tiny.py", "--max_steps=8").returncode == 0
    two = torchrun(2, "replay", "out/tiny", "--visit=1", script="analyze.py")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("visit 1: identical") == 1

