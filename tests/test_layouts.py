"""The same run on any layout of ranks: one process, DDP, FSDP2, tensor and pipeline parallelism.

Rows are the same everywhere, losses to 1e-5, and on one layout every bit. Runs change their layout
at a restart, are told to stop, lose a rank, and find no room on the disk. Ranks are started one by
one, with their output apart, where nothing else is said; tests/soak_rank.py kills at random.
"""
# ruff: noqa: F811 (fixtures)

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import analyze
import train
from conftest import REPO
from model import Transformer, shapes_of
from nano360 import checkpoints
from nano360.config import Stop, run
from nano360.hf_folders import read_config
from nano360.place import owned
from nano360.scale import parallel
from ranks import ended, environs, free_port, start, trains
from soak_kill import checkpoints as checkpoint_folders, text_of
from test_damage import flip, no_large_files
from test_incidents import (  # noqa: F401
    check_documents, go, in_a_room, incidents, numbers_of, rows_of, state_of)
from test_resume import at_step, slow_script, started
from test_train import hashes, loopback, metrics, prepared, room  # noqa: F401

OUT = Path("out/tiny")
PLAIN = ("--dtype=float32", "--device=cpu", "--log_every=1000")
LAYOUTS = {  # ranks, and what is said of them; 4 rows at a time, where a pipeline wants two of them
    "one": (1, ()), "ddp2": (2, ("--dp_shard=1",)), "fsdp2": (2, ("--dp_shard=2",)),
    "fsdp4": (4, ("--dp_shard=4",)), "hsdp4": (4, ("--dp_shard=2",)), "tp2": (2, ("--tp=2",)),
    "pp2": (2, ("--pp=2", "--micro_batch_size=4")),
    "tp2pp2": (4, ("--tp=2", "--pp=2", "--micro_batch_size=4"))}
CRYSTAL = ("--norm=layer --norm_eps=1e-5 --bias=true --n_kv_head=none --rotary_dim=4 "
           "--rope_interleaved=true --tie=true --mup_base_width=8 --mup_emb_mult=4 "
           "--mup_alpha=2").split()
SOON = 0.2  # --timeout, in minutes; a step on a busy machine may take seconds
LATE = 10  # seconds after it in which the last of the ranks has ended
pytestmark = pytest.mark.skipif(not loopback(), reason="no loopback interface: ranks cannot talk")


# ---- ranks ---------------------------------------------------------------------------------------

def begin(server, layout: str, *argv: str, before: Callable[[], None] | None = None) -> list:
    """Start the ranks of a layout."""
    world, more = LAYOUTS[layout]
    return start(server, trains, ["tiny.py", *PLAIN, *more, *argv], world, before)


def launch(server, layout: str, *argv: str, before: Callable[[], None] | None = None) -> list[int]:
    """The exit codes of the ranks of a layout."""
    return ended(begin(server, layout, *argv, before=before))


def trained(server, layout: str, *argv: str, **more) -> None:
    """A run on a layout, which ends well; the ranks but the first say nothing, and none warns."""
    if layout == "one":
        assert go(*PLAIN, *argv) == 0
        return
    codes = launch(server, layout, *argv, **more)
    said = {path.name: path.read_text() for path in Path(".").glob("[eo][ru][rt].*")}
    assert codes == [0] * LAYOUTS[layout][0], (layout, codes, said)
    assert not any(text for name, text in said.items() if name != "out.0"), said


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


HELD = []  # what is not to end before a process does


def at(where: int | None, step: int, first: int, number: int) -> None:
    """A signal comes to a rank, or to all, in a step of a launch whose first one is `first`."""
    if where in (None, rank()):
        HELD.append(at_step(step, first, lambda: os.kill(os.getpid(), number)))
        HELD[-1].__enter__()


def keep_masters() -> None:
    """Every save leaves what the ranks hold whole in masters.RANK.safetensors, too."""
    take = checkpoints.Saver.take

    def noted(self, name, model, *rest):
        found = {k: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
                 for k, p in owned(model, self.place).items()}
        save_file({k: t.clone().contiguous() for k, t in found.items()},
                  f"masters.{self.place.rank}.safetensors")
        take(self, name, model, *rest)
    checkpoints.Saver.take = noted


# ---- what a run has left -------------------------------------------------------------------------

def moments(folder: Path) -> dict[str, torch.Tensor]:
    """AdamW's moments by name, put together by hand from what the files say of their places."""
    whole, filled = {}, {}
    for path in sorted((folder / "optimizer").glob("*.safetensors")):
        if path.stem == "random":
            continue
        with safe_open(path, framework="pt") as tensors:
            said = (tensors.metadata() or {}).get("DCP_SHARDING_INFO", "{}")
            where = json.loads(said)
            for name in tensors.keys():
                part = tensors.get_tensor(name)
                offsets = where[name]["saved_offsets"] if where else [0] * part.dim()
                whole.setdefault(name, []).append((offsets, part))
    for name, parts in whole.items():
        shape = [max(offsets[i] + part.shape[i] for offsets, part in parts)
                 for i in range(parts[0][1].dim())]
        tensor, seen = torch.full(shape, torch.nan), torch.zeros(shape)
        for offsets, part in parts:
            place = tuple(slice(a, a + n) for a, n in zip(offsets, part.shape, strict=True))
            tensor[place], seen[place] = part, seen[place] + 1
        assert (seen == 1).all(), f"{name} has places that no file has, or two"
        filled[name] = tensor
    return filled


def assert_follows(out: Path, straight: Path, last: int) -> None:
    """Rows, rates and tokens of the undisturbed run, its losses to 1e-5, up to a step."""
    ours, theirs = metrics(out), metrics(straight)[:last]
    assert [line["step"] for line in ours] == list(range(1, last + 1))
    for x, y in zip(ours, theirs, strict=True):
        assert all(x[k] == y[k] for k in ("visit", "chunk", "rows", "tokens", "lr")), (x, y)
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5), (x, y)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4), (x, y)
    ours, theirs = ([line for line in metrics(one, "valid") if line["step"] % 4 == 0
                     and line["step"] <= last] for one in (out, straight))
    for x, y in zip(ours, theirs, strict=True):
        assert x == y | {k: pytest.approx(y[k], rel=1e-5) for k in ("loss", "bits_per_byte")}


def assert_close(folder: Path, other: Path, far: float = 1e-4) -> None:
    """Weights, and moments against the largest of their tensor."""
    a, b = Transformer.from_pretrained(folder), Transformer.from_pretrained(other)
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (x - y).abs().max() < far, name
    a, b = moments(folder), moments(other)
    assert a.keys() == b.keys() and len(a) == 2 * len(shapes_of(read_config(folder)))
    for name in a:
        assert (a[name] - b[name]).abs().max() <= far * b[name].abs().max() + 1e-12, name


def assert_same_bits(out: Path, straight: Path, *names: str) -> None:
    """Every file of these checkpoints, and every line of metrics up to the last of them."""
    for name in names:
        assert hashes(out / name) == hashes(straight / name) != {}, name
    assert metrics(out) == metrics(straight) and metrics(out, "valid") == metrics(straight, "valid")


@pytest.fixture(scope="session")
def one(prepared, tmp_path_factory) -> Path:
    """The run that nobody disturbs, of one process."""
    return in_a_room(prepared, tmp_path_factory.mktemp("one"), lambda: go(*PLAIN)) / "out/tiny"


def straight(server, prepared, root: Path, layout: str) -> Path:
    """Two visits on a layout, with what the ranks held in the end."""
    return in_a_room(prepared, root, lambda: trained(
        server, layout, "--max_steps=8", before=keep_masters) or 0) / "out/tiny"


@pytest.fixture(scope="session")
def fsdp2(server, prepared, tmp_path_factory) -> Path:
    return straight(server, prepared, tmp_path_factory.mktemp("fsdp2"), "fsdp2")


@pytest.fixture(scope="session")
def pp2(server, prepared, tmp_path_factory) -> Path:
    return straight(server, prepared, tmp_path_factory.mktemp("pp2"), "pp2")


# ---- from layout to layout -----------------------------------------------------------------------

@pytest.mark.numeric
def test_one_four_two_one(room, server, one):
    """Stopped by max_steps, by SIGTERM to the third of four ranks, and by SIGTERM to torchrun."""
    assert go(*PLAIN, "--max_steps=3") == 0
    told = functools.partial(at, 2, 6, 4, signal.SIGTERM)
    assert launch(server, "fsdp4", before=told) == 4 * [143], text_of(Path("err.0"))
    assert state_of(OUT / "last")["step"] == 6
    child = started(["-m", "torch.distributed.run", "--nproc_per_node=2",
                     f"--master_port={free_port()}", "--", str(slow_script(room, 4, 0.5)),
                     "tiny.py", *PLAIN, "--tp=2"], 9)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    step = state_of(OUT / "last")["step"]
    assert child.returncode != 0 and step in (9, 10, 11), err
    assert f"SIGTERM came: out/tiny/last holds step {step}" in err
    assert go(*PLAIN) == 0
    assert_follows(OUT, one, 16)
    assert_close(OUT / "ckpt_003", one / "ckpt_003", 1e-3)
    launches = json.loads((OUT / "run.json").read_text())["launches"]
    assert [launch["from_step"] for launch in launches] == [0, 3, 6, step]


@pytest.mark.numeric
@pytest.mark.parametrize("layouts, switches", [
    (("fsdp4", "one"), ()), (("ddp2", "tp2"), ()), (("pp2", "ddp2"), ()), (("hsdp4", "pp2"), ()),
    (("tp2pp2", "fsdp2", "one"), CRYSTAL)], ids=lambda one: "-".join(one)[:20])
def test_a_checkpoint_of_one_layout_on_another(room, server, one, layouts, switches):
    """Losses as of the undisturbed process; weights and moments by name as its, too."""
    straight = one
    if switches:
        assert go(*PLAIN, *switches, "--run=one", "--max_steps=12") == 0
        straight = Path("out/one")
    for layout, step in zip(layouts, (6, 8, 12) if len(layouts) == 3 else (6, 12), strict=True):
        trained(server, layout, *switches, f"--max_steps={step}")
    assert_follows(OUT, straight, 12)
    for name in ("ckpt_000", "ckpt_001", "ckpt_002"):
        assert_close(OUT / name, straight / name)


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_the_same_layout_is_the_same_bits(room, server, layout, request):
    """A run that was stopped inside a visit, and one that was not: two launches, two folders, every
    byte of them but for their time the same, state.json too."""
    straight = request.getfixturevalue(layout)
    trained(server, layout, "--max_steps=6")
    trained(server, layout, "--max_steps=8")
    assert_same_bits(OUT, straight, "ckpt_000", "ckpt_001")
    files = list((OUT / "ckpt_001/optimizer").glob("shard-*"))
    assert len(files) == 4  # of two ranks, and two kinds of moments


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_the_folder_of_a_sharded_run(layout, request):
    """transformers reads from it the bits that the ranks held; of the shards on their way to it
    nothing is left."""
    from transformers import AutoModelForCausalLM
    out = request.getfixturevalue(layout)
    theirs = AutoModelForCausalLM.from_pretrained(out / "ckpt_001", dtype=torch.float32)
    masters = {}
    for path in out.parent.parent.glob("masters.*"):
        masters |= load_file(path)
    theirs = dict(theirs.named_parameters())
    assert theirs.keys() == masters.keys()
    for name, tensor in masters.items():
        assert torch.equal(theirs[name], tensor), name
    assert sorted(hashes(out / "ckpt_001")) == [
        "config.json", "model.safetensors", "optimizer/random.safetensors", *(
            f"optimizer/shard-0000{r}-model-0000{k}-of-00003.safetensors"
            for r in (1, 2) for k in (2, 3)),
        "state.json", "state.json.sha256", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json"]


def small_files(limit: float) -> None:
    """Weights go into files of so many GB; notes the bytes that are read for each of them."""
    write_folder, sizes = checkpoints.write_folder, []

    def measured(part, model, shapes, read, tokens, dtype, max_shard_gb):
        def counted(names):
            found = read(names)
            sizes.append(sum(tensor.nbytes for tensor in found.values()))
            Path("sizes.json").write_text(json.dumps(sizes))
            return found
        write_folder(part, model, shapes, counted, tokens, dtype, limit)
    checkpoints.write_folder = measured


def test_one_file_at_a_time(room, server, fsdp2):
    """Rank 0 reads of all weights what goes into one file; the folder is gone on from."""
    trained(server, "fsdp2", "--max_steps=4", before=functools.partial(small_files, 4e-5))
    sizes = json.loads(Path("sizes.json").read_text())
    files = sorted((OUT / "ckpt_000").glob("model-*.safetensors"))
    whole, straight = {}, load_file(fsdp2 / "ckpt_000/model.safetensors")
    for path in files:
        whole |= load_file(path)
    assert len(sizes) == len(files) > 3 and max(sizes) <= 40_000
    assert whole.keys() == straight.keys() and sum(sizes) == sum(t.nbytes for t in whole.values())
    assert all(torch.equal(whole[name], straight[name]) for name in whole)
    trained(server, "fsdp2", "--max_steps=8")
    assert hashes(OUT / "ckpt_001/optimizer") == hashes(fsdp2 / "ckpt_001/optimizer")


# ---- ranks that are gone -------------------------------------------------------------------------

@pytest.mark.numeric
@pytest.mark.parametrize("layout, number, lost", [
    ("ddp2", signal.SIGKILL, 1), ("fsdp2", signal.SIGKILL, 0), ("pp2", signal.SIGKILL, 1),
    ("fsdp2", signal.SIGSTOP, 1), ("pp2", signal.SIGSTOP, 0)])
def test_a_rank_that_is_lost(room, server, one, layout, number, lost):
    """It is killed, or it stands still: the other one ends in time, and its last line says who it
    is, and when it was; a pipeline's run goes on, to the losses of one process."""
    # Who is killed is missed at once, whatever the timeout, which a slow step must not reach.
    processes = begin(server, layout, f"--timeout={SOON if number == signal.SIGSTOP else 1}",
                      before=functools.partial(at, lost, 7, 1, number))
    other = 1 - lost
    while text_of(OUT / "metrics.jsonl").count('"kind": "train"') < 6:
        assert processes[other].is_alive(), text_of(Path(f"err.{other}"))
        time.sleep(0.01)
    began = time.monotonic()
    processes[other].join(60 * SOON + LATE + 5)
    took, code = time.monotonic() - began, processes[other].exitcode
    codes = ended(processes, 0)  # what stands still does not end by itself
    assert code == 6 and took < 60 * SOON + LATE, (code, took, text_of(Path(f"err.{other}")))
    assert codes[lost] == -signal.SIGKILL
    *before, line = text_of(Path(f"err.{other}")).splitlines()
    assert not before, before
    assert line.startswith(f"[rank {other}] error: ") and re.search(r"\bstep [67]\b", line), line
    assert "the same command goes on" in line
    if number == signal.SIGSTOP:
        assert f"step 7 has waited {SOON} minutes" in line and took > 60 * SOON - 2, (line, took)
    if layout == "pp2":  # shards go on in the tests of saves
        trained(server, "pp2", "--max_steps=8")
        assert_follows(OUT, one, 8)


# ---- saves that are not finished -----------------------------------------------------------------

def dies(where: int, stage: str) -> None:
    """A rank is killed at a stage of the save of ckpt_001."""
    if rank() != where:
        return
    owner, name, fits = {
        "shards are written": (checkpoints, "write", lambda out, name, *_: name == "ckpt_001"),
        "before the rename": (Path, "rename", lambda path, _: path.name == "ckpt_001.part"),
        "in its shard": (checkpoints.dcp.HuggingFaceStorageWriter, "write_data",
                         lambda writer, *_: "ckpt_001" in str(writer.path))}[stage]
    real = getattr(owner, name)

    def dying(*args, **named):
        if fits(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    setattr(owner, name, dying)


@pytest.mark.parametrize("where, stage, stop", [
    (0, "shards are written", 12), (0, "before the rename", 8), (1, "in its shard", 12)])
def test_a_kill_inside_a_sharded_save(room, server, fsdp2, where, stage, stop):
    """The checkpoint before it is whole and is gone on from, to the undisturbed bits; the other
    rank ends, too, and not well, though nothing but the save were left to do; nothing unfinished
    is left."""
    codes = launch(server, "fsdp2", f"--max_steps={stop}",
                   before=functools.partial(dies, where, stage))
    assert codes[where] == -signal.SIGKILL and codes[1 - where] == 6, (
        codes, text_of(Path(f"err.{1 - where}")))
    assert [folder.name for folder in checkpoint_folders(OUT)] == ["ckpt_000"]
    trained(server, "fsdp2", "--max_steps=8")
    assert "going on from out/tiny/ckpt_000, step 4" in text_of(Path("out.0"))
    assert_same_bits(OUT, fsdp2, "ckpt_000", "ckpt_001")
    assert {path.name for path in OUT.iterdir()} == {
        "ckpt_000", "ckpt_001", "run.json", "metrics.jsonl", "incidents.jsonl"}


@pytest.fixture
def halted(room, fsdp2) -> Path:
    """A copy of the run on two shards, as out/tiny."""
    shutil.copytree(fsdp2, OUT)
    return OUT


def test_a_flipped_bit_in_a_shard(halted, server, fsdp2):
    """The file is named, the checkpoint before is taken, and the bits are the same again."""
    path = halted / "ckpt_001/optimizer/shard-00001-model-00002-of-00003.safetensors"
    flip(path, random.Random(1))
    assert launch(server, "fsdp2", "--max_steps=8") == [0, 0]
    said = text_of(Path("out.0"))
    assert f"{path} was changed" in said and "going on from out/tiny/ckpt_000, step 4" in said
    assert_same_bits(halted, fsdp2, "ckpt_000", "ckpt_001")


def full_disk(where: int | None) -> None:
    if where in (None, rank()):
        no_large_files(60_000)


@pytest.mark.parametrize("where", [None, 1], ids=["all", "rank 1"])
def test_a_full_disk_under_a_sharded_save(halted, server, fsdp2, where):
    """Exit code 4 of both and a line of each at most; what was there loads, and is gone on from."""
    shutil.rmtree(halted / "ckpt_001")
    before = hashes(halted / "ckpt_000")
    codes = launch(server, "fsdp2", "--max_steps=8", before=functools.partial(full_disk, where))
    told = [text_of(Path(f"err.{r}")).splitlines() for r in (0, 1)]
    assert codes == [4, 4] and max(map(len, told)) == 1, (codes, told)
    assert any("out/tiny/ckpt_001 could not be written" in line for line in told[0] + told[1])
    assert hashes(halted / "ckpt_000") == before
    assert [folder.name for folder in checkpoint_folders(halted)] == ["ckpt_000"]
    Transformer.from_pretrained(halted / "ckpt_000")
    trained(server, "fsdp2", "--max_steps=8")
    assert_same_bits(halted, fsdp2, "ckpt_000", "ckpt_001")


# ---- what is said --------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["ddp2", "pp2"])  # the others: see trained()
def test_one_rank_speaks(room, layout):
    """In processes of their own, as torchrun starts them, until they are gone: no warning, no line
    of a second rank."""
    argv = [sys.executable, str(REPO / "train.py"), "tiny.py", *PLAIN, *LAYOUTS[layout][1],
            "--max_steps=4"]
    children = [subprocess.Popen(argv, env=os.environ | one, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE) for one in environs(2)]
    told = [child.communicate(timeout=100) for child in children]
    assert [child.returncode for child in children] == [0, 0], told
    assert "finished: out/tiny" in told[0][0] and told[1][0] == "", told
    assert [err for _, err in told] == ["", ""], told


@pytest.mark.parametrize("world, argv, parts", [
    (3, [], ["batch_size = 8", "3 data-parallel", "6 or 9", "2 or 4"]),
    (4, ["--tp=2", "--batch_size=5"], ["batch_size = 5", "4 or 6", "2 or 10"]),
    (3, ["--tp=3"], ["tp = 3", "n_head = 4", "--tp=2"]),
    (4, ["--tp=3"], ["tp x pp = 3 x 1", "4 ranks", "3 or 6"]),
    (4, ["--pp=4", "--micro_batch_size=2"], ["4 stages", "the model has 2"]),
    (2, ["--pp=2"], ["2 pipeline stages", "--micro_batch_size=4"]),
    (4, ["--dp_shard=3"], ["dp_shard = 3", "4 data-parallel", "--dp_shard=2 or 4"]),
    (2, ["--pp_stages=2"], ["pp_stages = 2", "--pp"])], ids=str)
def test_layouts_that_cannot_be(room, monkeypatch, capsys, world, argv, parts):
    """One line, exit code 2, nothing written, nobody waited for."""
    for name, value in environs(world)[0].items():
        monkeypatch.setenv(name, value)
    assert go(*PLAIN, *argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in parts), err
    assert not Path("out").exists()


# ---- steps that are not taken --------------------------------------------------------------------

def poison(texts: set[bytes], whole: bool) -> None:
    """Rows with these targets have a loss that is no number: of a pipeline in its last stage, else
    in what the loop calls, in which a rank has the rows of its share."""
    row_nats, loss_of = parallel.row_nats, train.loss_of

    def spoiled(nats, targets):
        bad = [one.numpy().tobytes() in texts for one in targets]
        return nats * torch.where(torch.tensor(bad), torch.nan, 1.0)
    if whole:
        parallel.row_nats = lambda x, w, targets: spoiled(row_nats(x, w, targets), targets)
    else:
        train.loss_of = lambda model, rows, place: spoiled(
            loss_of(model, rows, place), torch.from_numpy(rows[:, 1:].astype(np.int64)))


@pytest.mark.numeric
@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_a_loss_that_is_no_number_on_one_rank(room, server, layout):
    """Two rows of the second rank, in step 7: no rank takes it, and both rows are named with their
    documents; losses behind it are those of a process that skips it."""
    bad = numbers_of(7, 1)[5:7]
    texts = {row[1:].tobytes() for row in rows_of(1, bad)}
    trained(server, layout, "--max_steps=12",
            before=functools.partial(poison, texts, layout == "pp2"))
    [told] = incidents(OUT)
    assert (told["step"], told["action"], told["rows"]) == (7, "skip", bad)
    check_documents(told)
    assert [state_of(OUT / f"ckpt_{v:03d}")["skipped"] for v in range(3)] == [[], [7], [7]]
    assert all(t.isfinite().all() for t in load_file(OUT / "ckpt_002/model.safetensors").values())
    assert all(t.isfinite().all() for t in moments(OUT / "ckpt_002").values())
    assert go(*PLAIN, "--run=alone", "--max_steps=12", nan="7") == 0
    for x, y in zip(metrics(OUT), metrics(Path("out/alone")), strict=True):
        assert x["rows"] == y["rows"] and (x["loss"] is None) == (x["step"] == 7)
        assert x["loss"] == (y["loss"] and pytest.approx(y["loss"], rel=1e-5))


@pytest.mark.parametrize("layout", ["fsdp2", "pp2"])
def test_a_skipped_step_is_saved(room, server, layout):
    """In bfloat16: a look at single rows gathers embedding and head, and no backward pass follows
    that would let them go; what is saved are the masters all the same."""
    texts = {row[1:].tobytes() for row in rows_of(1, numbers_of(7, 1)[5:7])}
    trained(server, layout, "--dtype=bfloat16", "--save_steps=1", "--max_steps=8",
            before=functools.partial(poison, texts, layout == "pp2"))
    assert [told["step"] for told in incidents(OUT)] == [7]
    trained(server, layout, "--dtype=bfloat16", "--run=alone", "--max_steps=6")
    assert len(load_file(OUT / "ckpt_001/model.safetensors")) > 10
    assert metrics(OUT)[:6] == metrics(Path("out/alone"))


def test_a_shard_that_is_not_there(halted):
    """Of any rank, the first one's too, which torch would not miss: the tensor is named."""
    folder, wanted = halted / "ckpt_001/optimizer", {}
    with safe_open(next(folder.glob("shard-00001-*00002-of*")), framework="pt") as file:
        name = sorted(file.keys())[0]
        shape = file.get_slice(name).get_shape()
    wanted[name] = torch.zeros(2 * shape[0], *shape[1:])
    checkpoints.read_shards(folder, wanted)
    assert (wanted[name] != 0).any()
    for r in (1, 2):
        [path] = folder.glob(f"shard-0000{r}-*00002-of*")
        path.rename(halted / "aside")
        with pytest.raises(Stop, match=f"of {name}'s"):
            checkpoints.read_shards(folder, wanted)
        (halted / "aside").rename(path)


def test_a_visit_is_trained_again(halted, server):
    """analyze.py replay on the same ranks finds every tensor as it was."""
    argv = ["replay", "out/tiny", "--visit=1"]
    codes = ended(start(server, functools.partial(run, analyze.main, "", []), argv, world=2))
    said = text_of(Path("out.0"))
    assert codes == [0, 0] and "visit 1: identical, " in said, (
        codes, said, text_of(Path("err.0")), text_of(Path("err.1")))
    assert not Path("out/tiny.replay").exists() and text_of(Path("err.0")) == ""
