"""What can go wrong in a run, planted from outside: losses that are no numbers, deferred chunks,
spikes, ranks that die or never come, logs that are sent elsewhere. tests/fault.py plants."""
# ruff: noqa: F811 (fixtures of test_train.py)

import collections
import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import analyze
import nano360.place
import train
from fault import Faults, faulty, planted
from model import Transformer
from nano360.analysis.provenance import documents_of
from nano360.config import run
from nano360.files import sha256_file
from nano360.rows import chunk_name, read_manifest
from ranks import GOOD, ended, free_port, in_child, start, trains
from test_train import (TIMINGS, TINY, config_of, hashes, loopback, metrics,  # noqa: F401
                        prepared, room, torchrun)

EOS = 2
SMALL = ["--n_layer=1", "--dtype=float32", "--log_every=1000"]  # where there are many steps
SHORT = "--timeout=0.001"  # minutes: for those who wait for nobody
PATIENCE = 40  # seconds in which a rank has to notice that another one is gone
alone = pytest.mark.skipif(not loopback(), reason="no loopback interface: processes cannot talk")


# ---- helpers -------------------------------------------------------------------------------------

@pytest.fixture(scope="module", autouse=True)
def frozen():
    """A deferral collects garbage: not among all that is imported, which takes most of a second."""
    import transformers  # noqa: F401
    gc.freeze()
    yield
    gc.unfreeze()


def go(*argv: str, **faults) -> int:
    """A run of train.py in this process, with faults -> its exit code."""
    with planted(Faults(**faults)):
        return run(train.main, "", [], ["tiny.py", *argv])


def in_a_room(prepared: Path, root: Path, work: Callable[[], int]) -> Path:
    """A folder like the fixture `room`, in which work was done that several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("data").symlink_to(prepared / "data")
        Path("tiny.py").write_text(TINY)
        assert work() == 0
    return root


def lines_of(path: Path, kind: str) -> list[dict]:
    """The lines of a kind, with all that stands in them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def incidents(out: Path, kind: str = "nonfinite") -> list[dict]:
    return lines_of(out / "incidents.jsonl", kind)


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def bits(folder: Path) -> tuple[str, str]:
    """What the next step depends on: the weights and the optimizer's state."""
    return tuple(sha256_file(folder / name)
                 for name in ("model.safetensors", "optimizer/adamw.safetensors"))


def numbers_of(step: int, chunk: int, epoch: int = 0, batch: int = 8) -> list[int]:
    """The rows of a step, worked out by hand from the Philox keys."""
    key, b = 1337 << 64 | epoch << 32 | chunk, (step - 1) % (33 // batch)
    order = np.argsort(np.random.Philox(key=key).random_raw(33), kind="stable")
    return order[batch * b:batch * (b + 1)].tolist()


def rows_of(chunk: int, numbers: list[int]) -> np.ndarray:
    rows = np.fromfile(f"data/tiny/train_{chunk:03d}.bin", np.uint16).reshape(33, 33)
    return rows[numbers].astype(np.int64)


def loss_and_norm(folder: Path, rows: np.ndarray) -> tuple[float, float]:
    """Mean loss and global gradient norm of a checkpoint on rows, by transformers and torch."""
    from transformers import AutoModelForCausalLM
    model, x = AutoModelForCausalLM.from_pretrained(folder), torch.from_numpy(rows)
    logits = model(x[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    squares = sum(p.grad.double().square().sum() for p in model.parameters())
    return loss.item(), math.sqrt(squares)


def lr_by_hand(step: int, last: int = 16) -> float:
    """The schedule of TINY: three steps of warm-up, then a cosine from 1e-2 to 1e-3."""
    if step < 3:
        return 1e-2 * step / 3
    return 1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / (last - 3)))


def places(where: list[int], piece: list[int], begins: bool, ends: bool) -> bool:
    """Whether a document, ids and EOS, holds a piece: at its begin, at its end, or anywhere."""
    n, m = len(where), len(piece)
    at = [0] if begins else range(n - m + 1)
    return any(where[i:i + m] == piece for i in at if not ends or i + m == n)


def documents_behind(row: list[int]) -> list[set[tuple]]:
    """For each piece of a row, cut behind every EOS: all documents, (source, file, line), that hold
    it. Every text is tokenized and searched; no table of prepare.py is read."""
    import sentencepiece
    coder = sentencepiece.SentencePieceProcessor(model_file="data/tiny/tokenizer.model")
    root = Path("data").resolve().parent
    texts = {("a", "a.jsonl", i): json.loads(line)["text"]
             for i, line in enumerate((root / "a.jsonl").read_text().splitlines(), 1)}
    texts["b", "b.txt", 1] = (root / "b.txt").read_text()
    ids = {name: [*coder.encode(text), EOS] for name, text in texts.items()}
    edges = [0, *(i + 1 for i, one in enumerate(row) if one == EOS), len(row)]
    pieces = [row[a:b] for a, b in zip(edges, edges[1:], strict=False) if b > a]
    return [{name for name, its in ids.items() if places(its, piece, i > 0, piece[-1] == EOS)}
            for i, piece in enumerate(pieces)]


def check_documents(incident: dict) -> None:
    """The documents of an incident are those that a search of the sources finds."""
    folder, certain = Path("data/tiny"), 0
    assert incident["documents"] is None  # analyze.py looks them up
    documents = documents_of(folder, read_manifest(folder), chunk_name(incident["chunk"]),
                             incident["rows"])
    for number, row in zip(incident["rows"], rows_of(incident["chunk"], incident["rows"]).tolist(),
                           strict=True):
        named = [(one["source"], one["file"], one["line"]) for one in documents
                 if one["row"] == number]
        found = documents_behind(row)
        assert len(named) == len(found) and all(
            one in where for one, where in zip(named, found, strict=True)), (number, named, found)
        certain += sum(len(where) == 1 for where in found)
    assert certain >= len(incident["rows"])  # a piece of two words may be in many
    assert {one["row"] for one in documents} == set(incident["rows"])


def planted_queue(monkeypatch, queue: list[list[int]], *argv: str) -> Path:
    """A run without a fault that never had another queue, with the schedule of the whole one."""
    made = train.make_plan

    def make_plan(config, manifest, *_):
        plan = made(config, manifest)
        return dataclasses.replace(plan, queue=queue, stop=len(queue) * plan.steps_per_visit)
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_plan", make_plan)
        assert go("--run=planted", *argv) == 0
    return Path("out/planted")


# ---- several processes ---------------------------------------------------------------------------

@pytest.fixture(scope="session")
def two(prepared, tmp_path_factory) -> Path:
    """A run of two ranks under torchrun, with a loss that is NaN on rank 1 at step 5."""
    def under_torchrun() -> int:
        done = torchrun(2, "--nan=5", "--rank=1", "--hashes=weights", "--", "tiny.py",
                        "--dtype=float32", script="tests/fault.py")
        print(done.stderr)
        return done.returncode
    return in_a_room(prepared, tmp_path_factory.mktemp("two"), under_torchrun)


@pytest.mark.numeric
@alone
def test_two_ranks_skip_what_one_cannot_take(two, monkeypatch):
    """Both leave out the step and end with the same weights; the incident names what a person has
    to look at: the rank, its rows, and the documents that a search of the sources finds too."""
    monkeypatch.chdir(two)
    out = Path("out/tiny")
    [one] = incidents(out)
    mine = numbers_of(5, 1)
    assert (one["step"], one["visit"], one["epoch"], one["chunk"]) == (5, 1, 0, 1)
    assert one["action"] == "skip" and one["launch"] == 0
    assert one["lr"] == pytest.approx(lr_by_hand(5))
    assert one["loss"][1] == "nan" and len(one["loss"]) == 2
    theirs = loss_and_norm(out / "ckpt_000", rows_of(1, mine[:4]))[0]
    assert float(one["loss"][0]) == pytest.approx(theirs, abs=2e-5)
    assert one["grad_norm"] == ["nan", "nan"]  # the gradient is everybody's
    assert one["rows"] == mine[4:]
    check_documents(one)
    digests = [Path(f"weights.{rank}").read_text() for rank in range(2)]
    weights = load_file(out / "ckpt_003/model.safetensors")
    assert digests[0] == digests[1] and len(digests[0]) == 64
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.numeric
@alone
def test_a_skipped_step_in_the_books(two):
    """Its line has no loss and no norm, no token is counted, and step 6 is the one it was."""
    out = two / "out/tiny"
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, 17))
    assert [line["step"] for line in lines if line["loss"] is None] == [5]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [5]
    assert [line["tokens"] for line in lines] == [256 * (s - (s >= 5)) for s in range(1, 17)]
    assert [line["lr"] for line in lines] == [pytest.approx(lr_by_hand(s)) for s in range(1, 17)]
    for visit in range(4):
        state = state_of(out / f"ckpt_{visit:03d}")
        assert state["skipped"] == ([5] if visit else [])
        assert state["updates"] == state["step"] - len(state["skipped"])
        assert state["tokens"] == 256 * state["updates"]


@pytest.mark.numeric
@alone
def test_the_numbers_of_two_ranks_are_of_the_whole_batch(two, monkeypatch):
    """Loss and norm of the steps behind checkpoints, against one process of transformers that has
    all rows; the ranks' own means differ."""
    monkeypatch.chdir(two)
    lines = metrics(Path("out/tiny"))
    for visit in (1, 2):
        step, folder = 4 * visit + 5, Path(f"out/tiny/ckpt_{visit:03d}")
        rows = rows_of(visit + 1, numbers_of(step, visit + 1))
        loss, norm = loss_and_norm(folder, rows)
        assert lines[step - 1]["loss"] == pytest.approx(loss, abs=2e-5)
        assert lines[step - 1]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        parts = [loss_and_norm(folder, half) for half in (rows[:4], rows[4:])]
        assert abs(parts[0][0] - parts[1][0]) > 1e-2 and abs(parts[0][0] - loss) > 5e-3
        assert all(abs(its - norm) > 1e-3 for _, its in parts)


@pytest.mark.numeric
@alone
def test_two_ranks_defer_together(room, server):
    """One rank's trouble takes the chunk from both; both go on with the same queue and weights."""
    argv = ["tiny.py", "--dtype=float32", "--on_nonfinite=defer"]
    words = ["--chunk=1", "--rank=1", "--hashes=w", "--", *argv]
    assert ended(start(server, faulty, words, world=2)) == [0, 0]
    assert Path("w.0").read_text() == Path("w.1").read_text()
    record = json.loads(Path("out/tiny/run.json").read_text())
    assert record["queue"] == [[0, 0], [0, 2], [0, 3]]
    assert record["deferred"] == record["dropped"] == [[0, 1]]
    told = [(one["step"], one["action"], one["loss"][1]) for one in incidents(Path("out/tiny"))]
    assert told == [(5, "defer", "nan"), (13, "drop", "nan")]
    assert go(*argv[1:], "--run=one", chunk="1") == 0
    both = [metrics(Path(f"out/{name}")) for name in ("one", "tiny")]
    for x, y in zip(*both, strict=True):
        assert (x["step"], x["chunk"], x["rows"], x["lr"]) == (
            y["step"], y["chunk"], y["rows"], y["lr"])
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4)


# ---- steps that are not taken --------------------------------------------------------------------

@pytest.fixture(scope="session")
def straight(prepared, tmp_path_factory) -> Path:
    """An undisturbed run."""
    return in_a_room(prepared, tmp_path_factory.mktemp("straight"), go) / "out/tiny"


def test_a_skipped_step_changes_nothing_but_its_number(room, straight):
    """Weights and moments behind it are those before it. What follows does not depend on why it
    was skipped, and is not the undisturbed run."""
    assert go("--max_steps=5", nan="5") == 0
    assert bits(Path("out/tiny/last")) == bits(Path("out/tiny/ckpt_000"))
    assert bits(Path("out/tiny/ckpt_000")) == bits(straight / "ckpt_000")
    state = state_of(Path("out/tiny/last"))
    assert (state["step"], state["updates"], state["skipped"]) == (5, 4, [5])
    assert go() == 0
    assert go("--run=inf", inf_gradient="5") == 0
    assert bits(Path("out/tiny/ckpt_003")) == bits(Path("out/inf/ckpt_003"))
    assert bits(Path("out/tiny/ckpt_003")) != bits(straight / "ckpt_003")
    assert metrics(Path("out/tiny")) == metrics(Path("out/inf"))


def test_a_gradient_that_overflows(room):
    """The loss is a number, the gradient is none: the step is not taken, every row may be it."""
    assert go("--dtype=float32", inf_gradient="6") == 0
    [one] = incidents(Path("out/tiny"))
    assert one["step"] == 6 and math.isfinite(float(one["loss"][0]))
    assert not math.isfinite(float(one["grad_norm"][0]))
    assert one["rows"] == numbers_of(6, 1)
    check_documents(one)
    line = metrics(Path("out/tiny"))[5]
    assert line["loss"] is None and line["grad_norm"] is None
    assert state_of(Path("out/tiny/ckpt_003"))["skipped"] == [6]


@pytest.mark.parametrize("micro", [4, 8])
def test_the_rows_that_are_to_blame(room, monkeypatch, micro):
    """Of a batch with two bad rows these two are named, in whatever micro-batches they came."""
    bad, loss_of = set(numbers_of(7, 1)[1:7:4]), train.loss_of
    texts = {rows_of(1, [number]).tobytes() for number in bad}

    def poisoned(model, rows, place):
        hit = [row.astype(np.int64).tobytes() in texts for row in rows]
        return loss_of(model, rows, place) * torch.where(torch.tensor(hit), math.nan, 1.0)
    monkeypatch.setattr(train, "loss_of", poisoned)
    assert go(f"--micro_batch_size={micro}") == 0
    [one] = incidents(Path("out/tiny"))
    assert one["step"] == 7 and set(one["rows"]) == bad and len(bad) == 2
    check_documents(one)


def stopped(capsys, step: int, *argv: str, **faults) -> None:
    """The run ends with 5 in this step, and one line says where, how fast, and what to try."""
    capsys.readouterr()
    assert go(*argv, **faults) == 5
    err = capsys.readouterr().err
    rows = str(numbers_of(step, (step - 1) // 4))[1:-1]
    assert err.count("\n") == 1 and err.startswith("error: ")
    kind = str(train.choose_place(config_of()).dtype).removeprefix("torch.")
    assert all(part in err for part in (
        f"step {step}:", "loss nan", f"lr is {lr_by_hand(step):g}", kind, f"rows {rows}",
        f"chunk {(step - 1) // 4},", "--lr", "--warmup_steps", "incidents.jsonl")), err
    out = Path("out/tiny")
    assert [line["step"] for line in metrics(out)] == list(range(1, step))
    assert incidents(out)[-1]["action"] == "stop" and incidents(out)[-1]["step"] == step


def test_three_in_a_row_stop_the_run(room, straight, capsys):
    """The checkpoint before them is whole, and without the fault the same command ends like a run
    that never had it, to the bit."""
    stopped(capsys, 7, nan="5,6,7")
    assert [one["action"] for one in incidents(Path("out/tiny"))] == ["skip", "skip", "stop"]
    Transformer.from_pretrained(Path("out/tiny/ckpt_000"))
    assert not Path("out/tiny/last").exists()
    assert go() == 0
    for visit in range(4):
        assert hashes(Path(f"out/tiny/ckpt_{visit:03d}")) == hashes(straight / f"ckpt_{visit:03d}")
    assert metrics(Path("out/tiny")) == metrics(straight)
    assert metrics(Path("out/tiny"), "valid") == metrics(straight, "valid")


def test_two_in_a_row_twice_do_not(room):
    assert go(nan="5,6,8,9") == 0
    state = state_of(Path("out/tiny/ckpt_003"))
    assert state["skipped"] == [5, 6, 8, 9] and state["updates"] == 12
    assert go("--run=more", "--max_skips=4", nan="5,6,7") == 0


@pytest.mark.parametrize("before, limit, bad, step, more", [
    ("", 0, "5", 5, ["--max_skips=1"]),
    ("", 0, "1", 1, []),
    ("", 0, "1", 1, ["--max_skips=9"]),  # nothing would be left to skip to
    ("", 0, "9", 9, ["--on_nonfinite=stop"]),
    ("5,6", 6, "7", 7, []),  # stopped between the second and the third
    ("7,8", 8, "9", 9, []),  # at the end of a visit
    ("6", 6, "7,8", 8, ["--save_steps=1"]),
])
def test_when_a_run_stops(room, capsys, before, limit, bad, step, more):
    """At the first step, at the first or the n-th failure, and counted over a stop."""
    if limit:
        assert go(f"--max_steps={limit}", nan=before) == 0
    stopped(capsys, step, *more, nan=bad)
    assert len(list(Path("out/tiny").glob("ckpt_*"))) == (step - 1) // 4


# ---- chunks that are deferred --------------------------------------------------------------------

def of_epoch(*chunks: int, epoch: int = 0) -> list[list[int]]:
    return [[epoch, chunk] for chunk in chunks]


TWICE = ["--epochs=2"]
QUEUES = [  # faults, argv, the queue in the end, deferred, dropped
    ({"chunk": "1"}, [], of_epoch(0, 2, 3), of_epoch(1), of_epoch(1)),
    ({"chunk": "1", "once": True}, [], of_epoch(0, 2, 3, 1), of_epoch(1), []),
    ({"chunk": "1", "begin": 3}, ["--save_steps=1"], of_epoch(0, 2, 3), of_epoch(1), of_epoch(1)),
    ({"chunk": "0"}, [], of_epoch(1, 2, 3), of_epoch(0), of_epoch(0)),
    ({"chunk": "0", "once": True}, [], of_epoch(1, 2, 3, 0), of_epoch(0), []),
    ({"chunk": "3"}, [], of_epoch(0, 1, 2), of_epoch(3), of_epoch(3)),
    ({"chunk": "3", "once": True}, [], of_epoch(0, 1, 2, 3), of_epoch(3), []),
    ({"chunk": "1,2"}, [], of_epoch(0, 3), of_epoch(1, 2), of_epoch(1, 2)),
    ({"chunk": "2", "begin": 4}, TWICE, of_epoch(0, 1, 3) + of_epoch(0, 1, 3, epoch=1),
     [[0, 2], [1, 2]], [[0, 2], [1, 2]]),
    ({"chunk": "2", "once": True}, TWICE,
     of_epoch(0, 1, 3) + of_epoch(0, 1, 3, epoch=1) + [[0, 2], [1, 2]], [[0, 2], [1, 2]], []),
]


@pytest.mark.parametrize("faults, argv, queue, deferred, dropped", QUEUES, ids=[
    " ".join([*(f"{k}={v}" for k, v in faults.items()), *argv]) for faults, argv, *_ in QUEUES])
def test_a_chunk_that_fails_waits(room, monkeypatch, capsys, faults, argv, queue, deferred,
                                  dropped):
    """It goes to the end of the queue, and out of it if it fails again. The run is, to the bit, one
    that had this queue from the start; its books have nothing of the failed visits but incidents;
    and when it is finished it stays so."""
    argv = ["--on_nonfinite=defer", *argv]
    assert go(*argv, **faults) == 0
    said, out = capsys.readouterr().out, Path("out/tiny")
    record = json.loads((out / "run.json").read_text())
    assert (record["queue"], record["deferred"], record["dropped"]) == (queue, deferred, dropped)
    assert len(record["launches"]) == 1
    other, n = planted_queue(monkeypatch, queue, *argv), len(queue)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["run.json", "metrics.jsonl", "incidents.jsonl", *(f"ckpt_{v:03d}" for v in range(n))])
    for v in range(n):
        folder = out / f"ckpt_{v:03d}"
        assert bits(folder) == bits(other / folder.name)
        state = state_of(folder)
        assert [state["epoch"], state["chunk"]] == queue[v] and state["visit"] == v
        assert state["consumed"] == state["queue"][:v + 1] == queue[:v + 1]
        # what was known when it was written
        late = [one for one in incidents(out) if one["visit"] <= v]
        known = {action: [[one["epoch"], one["chunk"]] for one in late if one["action"] == action]
                 for action in ("defer", "drop")}
        assert state["deferred"] == known["defer"] and state["dropped"] == known["drop"]
        assert sorted(state["queue"] + state["dropped"]) == sorted(queue + dropped)
        assert state["parent"] == (sha256_file(out / f"ckpt_{v - 1:03d}/state.json") if v else None)
    assert metrics(out) == metrics(other) and metrics(out, "valid") == metrics(other, "valid")
    assert [line["step"] for line in metrics(out)] == list(range(1, 4 * n + 1))
    failed = [([one["epoch"], one["chunk"]], one["action"]) for one in incidents(out)]
    assert sorted(failed) == sorted([(one, "defer") for one in deferred] +
                                    [(one, "drop") for one in dropped])
    assert ("dropped" in said) == bool(dropped)
    before = hashes(Path("out"))
    assert go(*argv, **faults) == 0
    assert "out/tiny is finished" in capsys.readouterr().out and hashes(Path("out")) == before


@pytest.mark.numeric
def test_the_schedule_of_a_shorter_queue(room):
    """A chunk that is dropped while another one waits: the rate stays that of the whole queue."""
    with planted(Faults(chunk="2", once=True)):
        assert go("--on_nonfinite=defer", chunk="1") == 0
    record = json.loads(Path("out/tiny/run.json").read_text())
    assert record["queue"] == of_epoch(0, 3, 2) and record["dropped"] == of_epoch(1)
    lines = metrics(Path("out/tiny"))
    assert [line["chunk"] for line in lines] == 4 * [0] + 4 * [3] + 4 * [2]
    assert [line["lr"] for line in lines] == [pytest.approx(lr_by_hand(s)) for s in range(1, 13)]


def test_the_incidents_of_a_deferred_chunk(room):
    """Both attempts, with rows and documents; the numbers of the steps are the queue's."""
    assert go("--on_nonfinite=defer", chunk="1", begin=2) == 0
    both = incidents(Path("out/tiny"))
    assert [(one["step"], one["visit"], one["action"]) for one in both] == [
        (6, 1, "defer"), (14, 3, "drop")]
    for one in both:
        assert one["rows"] == numbers_of(6, 1)
        check_documents(one)


def test_batch_names_the_documents_of_an_incident(room, capsys):
    """Those of the chunk that failed: the step of its number trains another chunk now."""
    assert go("--on_nonfinite=defer", chunk="1", begin=2) == 0
    [one, _] = incidents(Path("out/tiny"))
    capsys.readouterr()
    assert run(analyze.main, "", [], ["batch", "out/tiny", "--step=6"]) == 0
    now, said = capsys.readouterr().out.split("nonfinite in launch 0: chunk 001 of epoch 0, ")
    assert "chunk 002" in now and said.startswith("loss nan; defer\n")
    folder = Path("data/tiny")
    documents = documents_of(folder, read_manifest(folder), "train_001.bin", one["rows"])
    lines = [line.split() for line in said.splitlines()[2:]]
    assert [int(row) for row, *_ in lines] == one["rows"]
    for row, source, *names in lines:
        theirs = [d for d in documents if d["row"] == int(row)]
        assert [name.rstrip(",") for name in names] == [f"{d['file']}:{d['line']}" for d in theirs]
        assert source == theirs[0]["source"]
    Path("out/tiny/incidents.jsonl").write_text('{"kind": "nonfinite", "step": 6}\n[]\n')
    assert run(analyze.main, "", [], ["batch", "out/tiny", "--step=6"]) == 4
    assert "incidents.jsonl holds a line that is none of ours" in capsys.readouterr().err


def test_no_chunk_is_left(room, capsys):
    """Every chunk fails twice: the run says so, again and again, and leaves no checkpoint and no
    step, but the incidents."""
    for _ in range(2):
        assert go("--on_nonfinite=defer", chunk="0,1,2,3", begin=3) == 5
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "every chunk was dropped" in err and "--lr" in err
        assert not list(Path("out/tiny").glob("ckpt_*")) and metrics(Path("out/tiny")) == []
    assert len(incidents(Path("out/tiny"))) == 8


def test_a_deferral_over_stops(room, monkeypatch):
    """The queue is the run's, not the launch's: max_steps in between changes nothing."""
    argv = ["--on_nonfinite=defer", "--save_steps=1"]
    for stop in (3, 6, 9, 12, 16):
        assert go(*argv, f"--max_steps={stop}", chunk="1", begin=2) == 0
    other = planted_queue(monkeypatch, of_epoch(0, 2, 3), *argv)
    for v in range(3):
        assert bits(Path(f"out/tiny/ckpt_{v:03d}")) == bits(other / f"ckpt_{v:03d}")
    assert metrics(Path("out/tiny")) == metrics(other)
    record = json.loads(Path("out/tiny/run.json").read_text())
    assert record["deferred"] == record["dropped"] == of_epoch(1)


FAILS_LATE = {"chunk": "1", "begin": 3}  # when last/ has the first half of the visit
SAVES = ["--on_nonfinite=defer", "--save_steps=1"]


@pytest.fixture(scope="session")
def dropped(prepared, tmp_path_factory) -> Path:
    """A run that nobody killed, of which chunk 1 was deferred and dropped."""
    return in_a_room(prepared, tmp_path_factory.mktemp("dropped"),
                     lambda: go(*SAVES, **FAILS_LATE)) / "out/tiny"


@pytest.mark.parametrize("at", ["discard:1", "save_run:1", "found:2", "discard:3", "save_run:2"])
def test_a_kill_while_a_chunk_is_deferred(room, server, dropped, at):
    """Before the new queue is noted, before what is left of the failed visit is gone, after both,
    and the same when it is dropped: the run ends as if nobody had killed it."""
    words = [f"--{k}={v}" for k, v in FAILS_LATE.items()]
    started = start(server, faulty, [*words, f"--kill_at={at}", "--", "tiny.py", *SAVES])
    assert ended(started) == [-signal.SIGKILL]
    assert go(*SAVES, **FAILS_LATE) == 0
    killed = Path("out/tiny")
    assert {path.name for path in killed.iterdir()} == {path.name for path in dropped.iterdir()}
    for v in range(3):
        assert hashes(killed / f"ckpt_{v:03d}") == hashes(dropped / f"ckpt_{v:03d}")
    for kind in ("train", "valid"):
        assert metrics(killed, kind) == metrics(dropped, kind)
    for out in (killed, dropped):
        record = json.loads((out / "run.json").read_text())
        assert record["queue"] == of_epoch(0, 2, 3)
        assert record["deferred"] == record["dropped"] == of_epoch(1)


# ---- spikes --------------------------------------------------------------------------------------

def deviations(lines: list[dict], step: int) -> float | None:
    """By hand: how far a loss lies above the 128 before it, in robust standard deviations."""
    before = [line["loss"] for line in lines[:step - 1] if line["loss"] is not None][-128:]
    if len(before) < 64:
        return None
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(np.array(before) - middle))
    return (lines[step - 1]["loss"] - middle) / max(spread, 1e-3 * abs(middle))


@pytest.mark.numeric
def test_a_quiet_run_has_no_spike(room, monkeypatch):
    """More than a thousand steps of one row each, of which losses are all but smooth."""
    monkeypatch.setattr(train, "validate", lambda *_: iter(()))  # to save time
    assert go("--batch_size=1", "--epochs=8", *SMALL) == 0
    lines = metrics(Path("out/tiny"))
    assert len(lines) == 1056 and incidents(Path("out/tiny"), "spike") == []
    highest = max(deviations(lines, step) for step in range(65, 1057))
    assert 1 < highest < 6


@pytest.mark.numeric
@pytest.mark.parametrize("stop", [96, 99])  # at the end of a visit, and inside one
def test_a_spike_is_found_where_it_was_planted(room, stop):
    """At this step and no other, as high as worked out by hand; a step that was not taken is not
    in the window, and a run that goes on just before has the same one. Few losses tell nothing."""
    argv, at = ["--epochs=4", "--batch_size=4", *SMALL], stop + 1
    faults = {"nan": "80,81,90", "spike": f"40,{at}"}
    assert go(*argv, **faults) == 0
    lines = metrics(Path("out/tiny"))
    [one] = incidents(Path("out/tiny"), "spike")
    assert one["step"] == at and one["loss"] == lines[at - 1]["loss"]
    assert one["deviations"] == pytest.approx(deviations(lines, at)) and one["deviations"] > 6
    visit = (at - 1) // 8
    assert (one["visit"], one["epoch"], one["chunk"]) == (visit, visit // 4, visit % 4)
    assert one["rows"] == numbers_of(at, visit % 4, visit // 4, batch=4)
    assert [line["step"] for line in lines if line["loss"] is None] == [80, 81, 90]
    assert go(*argv, "--run=parts", f"--max_steps={stop}", **faults) == 0
    assert incidents(Path("out/parts"), "spike") == []
    assert go(*argv, "--run=parts", **faults) == 0
    [again] = incidents(Path("out/parts"), "spike")
    assert again == one | {"launch": 1}
    assert metrics(Path("out/parts")) == lines


@pytest.mark.numeric
def test_a_loss_that_is_low_is_no_spike():
    """Of the numbers 1 to 101, the median is 51 and the deviation 1.4826 x 25."""
    losses = collections.deque(map(float, range(1, 102)))
    for loss in (0.0, 51.0, 400.0):
        assert train.spike(losses, loss) == pytest.approx((loss - 51) / (1.4826 * 25))


@pytest.mark.parametrize("n, per_visit, sources, bad", [
    (128, 4, 2, 0), (128, 1, 2, 0), (128, 1, 22, 0), (128, 2, 7, 3), (200, 5, 1, 2), (16, 1, 3, 0)])
def test_the_window_of_a_run_that_goes_on(tmp_path, n, per_visit, sources, bad):
    """It is that of the run that was not stopped, however many lines there are of other kinds."""
    text, losses = [], []
    for step in range(1, 301):
        loss = None if bad and step % bad == 0 else 5 - step / 100
        losses += [loss] if loss is not None else []
        text += [json.dumps({"kind": "train", "step": step, "loss": loss, "lr": 1e-3})]
        text += [json.dumps({"kind": "valid", "step": step, "source": str(i), "loss": 9.0})
                 for i in range(sources) if step % per_visit == 0]
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    assert nano360.records.recent_losses(tmp_path / "metrics.jsonl", n) == losses[-n:]


# ---- the processes themselves --------------------------------------------------------------------

@pytest.mark.parametrize("changes, parts", [
    ({"WORLD_SIZE": None}, ["RANK", "WORLD_SIZE is not"]),
    ({"MASTER_ADDR": None, "MASTER_PORT": None}, ["MASTER_ADDR, MASTER_PORT is not"]),
    ({"RANK": None}, ["RANK is not"]),
    ({"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2"]),
    ({"RANK": "one"}, ["RANK=one"]),
    ({"RANK": "-1"}, ["RANK=-1"]),
    ({"WORLD_SIZE": "0"}, ["WORLD_SIZE=0"]),
    ({"MASTER_PORT": "http"}, ["MASTER_PORT=http"]),
    ({"MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
    ({"MASTER_PORT": "busy"}, ["MASTER_PORT", "port taken"]),
])
def test_variables_that_cannot_be(room, monkeypatch, capsys, changes, parts):
    """One line names the variable and shows how to start; nothing is written."""
    with contextlib.ExitStack() as stack:
        if changes.get("MASTER_PORT") == "busy":
            if not loopback():
                pytest.skip("no loopback interface")
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            changes = {"MASTER_PORT": str(taken.getsockname()[1])}
            parts = [*parts, f"127.0.0.1:{changes['MASTER_PORT']}"]
        for name, value in (GOOD | changes).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert go(SHORT) == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "error: " in err and "torchrun --" in err, err
    assert all(part in err for part in parts), err
    assert not Path("out").exists() or not hashes(Path("out"))


@alone
def test_a_rank_that_never_comes(room, server):
    """Two are to be, one is started: it does not wait for ever, and says whom it waited for."""
    environ = GOOD | {"MASTER_PORT": free_port()}
    (process := server.Process(target=in_child, args=(
        str(room), environ, None, trains, ["tiny.py", SHORT]))).start()
    assert ended([process], PATIENCE) == [6]
    err = Path("err.0").read_text()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert all(part in lines[0] for part in (
        "rank 0", "WORLD_SIZE=2", f"127.0.0.1:{environ['MASTER_PORT']}", "torchrun"))


@alone
def test_a_rank_that_dies(room, server, capsys):
    """The other one ends soon, and its last line says who and when; the run can go on."""
    began = time.monotonic()
    started = start(server, faulty, ["--kill=7", "--rank=1", "--", "tiny.py"], world=2)
    codes = ended(started, PATIENCE)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None, -signal.SIGKILL), codes
    assert time.monotonic() - began < PATIENCE
    last = Path("err.0").read_text().splitlines()[-1]
    assert "rank 0" in last and "step 6" in last and "Traceback" not in last, last
    assert codes[0] == 6
    capsys.readouterr()
    assert go() == 0
    assert "going on from out/tiny/ckpt_000, step 4" in capsys.readouterr().out


@alone
def test_a_rank_that_dies_under_torchrun(room):
    """torchrun ends in time, too, and not with 0."""
    began = time.monotonic()
    done = torchrun(2, "--kill=6", "--rank=1", "--", "tiny.py", script="tests/fault.py")
    assert done.returncode != 0 and time.monotonic() - began < PATIENCE
    assert "step 6/" not in done.stdout and Path("out/tiny/ckpt_000/state.json").is_file()


# ---- metrics, here and elsewhere -----------------------------------------------------------------

@pytest.mark.numeric
def test_where_the_time_goes(room, monkeypatch):
    """By a clock that only moves where a part of a step is at work: every part has its own time, to
    the microsecond, and together they are all of it but for validation."""
    now, took = [0.0], {"data": 1, "forward": 2, "backward": 4, "optimizer": 8, "save": 16}

    def work(part, function):
        def working(*args, **named):
            now[0] += took.get(part, 1000)
            return function(*args, **named)
        return working
    batches, loss_of = train.batches, train.loss_of

    def slow_batches(*args):
        for one in batches(*args):
            now[0] += took["data"]
            yield one

    def slow_loss(model, rows, place):
        loss = loss_of(model, rows, place)
        if loss.requires_grad:
            now[0] += took["forward"]
            loss.register_hook(work("backward", lambda gradient: gradient))
        return loss
    monkeypatch.setattr(nano360.place, "time", types.SimpleNamespace(
        perf_counter=lambda: now[0], monotonic=time.monotonic))
    monkeypatch.setattr(train, "batches", slow_batches)
    monkeypatch.setattr(train, "loss_of", slow_loss)
    monkeypatch.setattr(train.Saver, "take", work("save", train.Saver.take))
    monkeypatch.setattr(train, "validate", work("validate", train.validate))
    monkeypatch.setattr(torch.optim.AdamW, "step", work("optimizer", torch.optim.AdamW.step))
    train.main(["tiny.py", "--max_steps=5", "--micro_batch_size=4", "--save_steps=2"])
    lines = lines_of(Path("out/tiny/metrics.jsonl"), "train")
    for line in lines:
        spent = {name.removeprefix("time_"): line[name] for name in line if "time_" in name}
        assert spent == {"data": 1, "forward": 4, "backward": 8, "optimizer": 8,
                         "save": 16 * (line["step"] in (2, 4, 5))}
        assert line["tok_per_s"] == pytest.approx(256 / 21)
    assert len(lines) == 5 and now[0] == 5 * 21 + 3 * 16 + 2 * 1000


def test_the_parts_are_the_wall_time(room):
    """By the clock on the wall: no part is negative, and they are not more than there was."""
    began = time.perf_counter()
    train.main(["tiny.py"])
    wall, whole = time.perf_counter() - began, 0.0
    for line in lines_of(Path("out/tiny/metrics.jsonl"), "train"):
        spent = [line[name] for name in TIMINGS if name.startswith("time_")]
        assert min(spent) >= 0
        whole += sum(spent)
    assert wall / 10 < whole < wall


def sent_lines(out: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> every number of metrics.jsonl, as it is to be sent."""
    found = {}
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        front = f"valid/{line['source']}" if line["kind"] == "valid" else "train"
        found |= {(f"{front}/{k}", line["step"]): v for k, v in line.items()
                  if k not in ("step", "visit", "chunk") and isinstance(v, (int, float))}
    return found


def lasting(sent: dict[tuple[str, int], float], out: Path) -> dict[tuple[str, int], float]:
    """Without what metrics.jsonl forgets and nobody can call back: the held-out rows of a stop
    inside a visit, and the steps of a chunk that was dropped at the end of the queue."""
    last = metrics(out)[-1]["step"]
    return {(name, step): value for (name, step), value in sent.items()
            if step <= last and (not name.startswith("valid/") or step % 4 == 0)}


class Board:
    """tensorboard's SummaryWriter: what a new writer purges, from its step on, is not shown, and
    what a writer holds back when the process ends is lost."""
    shown: dict = {}
    folders: list = []

    def __init__(self, log_dir, purge_step=None):
        self.folders.append(log_dir)
        self.held = {}
        for one in [one for one in self.shown if purge_step is not None and one[1] >= purge_step]:
            del self.shown[one]

    def add_scalar(self, name, value, step):
        assert (name, step) not in self.shown | self.held, f"{name} of step {step} twice"
        self.held[name, step] = value

    def flush(self):
        self.shown.update(self.held)

    close = flush


class Wand:
    """wandb: init gives the run that is open, if one is; a run takes no step before its last."""
    shown: dict = {}
    given: list = []
    open = None

    def __init__(self):
        self.last = -1

    @classmethod
    def init(cls, **named):
        cls.given.append(named)
        cls.open = cls.open or cls()
        return cls.open

    def log(self, values, step):
        if step >= self.last:
            self.shown.update({(name, step): value for name, value in values.items()})
            self.last = step

    def finish(self):
        type(self).open = None


@pytest.fixture
def stand_in(monkeypatch):
    """Modules in the place of wandb and tensorboard; what they were told."""
    for kind in (Board, Wand):
        for name in ("shown", "folders", "given", "open"):
            if hasattr(kind, name):
                monkeypatch.setattr(kind, name, type(getattr(kind, name))() if name != "open"
                                    else None)
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Board
    wand = types.ModuleType("wandb")
    wand.init, wand.finish = Wand.init, lambda *_, **__: Wand.finish(Wand.open)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wand)
    return {"tensorboard": Board, "wandb": Wand}


@pytest.mark.parametrize("faults, stops", [
    ({"nan": "6"}, []), ({}, [6]), ({"chunk": "1", "begin": 3}, []),
    ({"chunk": "2", "begin": 2, "once": True}, [6, 11])], ids=str)
@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_what_is_sent_is_what_is_written(room, stand_in, kind, faults, stops):
    """The numbers that stand in metrics.jsonl in the end, each under its step: with a skipped step,
    after a stop, and with a chunk that was deferred. The run's folder names no machine."""
    for stop in [*stops, 16]:
        if kind == "wandb":
            Wand.open = None  # another process
        assert go(f"--log_to={kind}", f"--max_steps={stop}",
                  f"--on_nonfinite={'defer' if 'chunk' in faults else 'skip'}", **faults) == 0
    assert lasting(stand_in[kind].shown, Path("out/tiny")) == sent_lines(Path("out/tiny"))
    assert (kind == "wandb") == bool(Wand.given) and (kind == "tensorboard") == bool(Board.folders)
    for one in Wand.given:
        assert one["mode"] == "offline" and one["name"] == "tiny" and one["dir"] == "logs/tiny"
        assert one["config"]["optim"]["lr"] == 1e-2
    assert set(Board.folders) <= {"logs/tiny"}
    name = rf"\b{re.escape(socket.gethostname())}\b"
    for path in Path("out").rglob("*"):
        assert not re.search(name, path.name)
        if path.is_file() and path.suffix not in (".safetensors", ".model"):  # bytes, not words
            assert not re.search(name, path.read_text()), path


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_not_here(room, monkeypatch, capsys, kind):
    """One line says what to install; a run that needs none of it goes on."""
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert go(f"--log_to={kind}") == 6
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"--log_to={kind}" in err and f"pip install {kind}" in err
    assert not list(Path("out").rglob("ckpt_*"))
    assert go("--max_steps=2") == 0


def modules_of_a_run(folder: str) -> None:
    """What test_no_package_unless_it_is_asked_for runs in a process of its own."""
    os.chdir(folder)
    train.main(["tiny.py", "--max_steps=1"])
    Path("modules").write_text("\n".join(sys.modules))


def test_no_package_unless_it_is_asked_for(room, server):
    """A run in a process of its own imports neither, nor does it write to logs/."""
    (process := server.Process(target=modules_of_a_run, args=(str(room),))).start()
    assert ended([process]) == [0]
    found = Path("modules").read_text().splitlines()
    assert "train" in found and "torch" in found
    assert not {"wandb", "tensorboard", "torch.utils.tensorboard"} & set(found)
    assert not Path("logs").exists()


@pytest.mark.numeric
@pytest.mark.parametrize("faults, stops", [({}, [6]), ({"chunk": "1", "begin": 3}, [])], ids=str)
def test_tensorboard_reads_it(room, faults, stops):
    """The package's own reader finds every number when the run has ended, and no others."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for stop in [*stops, 16]:
        assert go("--log_to=tensorboard", "--on_nonfinite=defer", f"--max_steps={stop}",
                  **faults) == 0
    board = EventAccumulator("logs/tiny", size_guidance={"scalars": 0})
    board.Reload()
    read = lasting({(name, one.step): one.value for name in board.Tags()["scalars"]
                    for one in board.Scalars(name)}, Path("out/tiny"))
    wanted = sent_lines(Path("out/tiny"))
    assert read.keys() == wanted.keys()
    for one, value in wanted.items():
        assert read[one] == pytest.approx(value, rel=1e-6), one
