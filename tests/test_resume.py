"""A run that is stopped, told to stop or killed anywhere ends with the bits of one that was not.

What is compared is every file of every checkpoint (weights, optimizer state, random state,
state.json) and every line of metrics.jsonl but for timings. tests/soak_kill.py kills at random;
here every stage of a save has its turn.
"""
# ruff: noqa: F811 (fixtures)

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import model
import nano360.files
import prepare
import train
from conftest import REPO
from nano360 import checkpoints, hf_folders, records
from nano360.config import run
from nano360.place import GRACE
from ranks import ended, free_port, start, trains
from soak_kill import checkpoints as checkpoint_folders, faults, steps_of, text_of
from test_train import TIMINGS, TINY, hashes, loopback, words

# 12 visits x 4 steps, of small checkpoints; on a CPU, where the same work gives the same bits.
RUN = TINY.replace("n_layer = 2", "n_layer = 1") + """
valid_rows = 8
epochs = 3
device = "cpu"
log_every = 100
"""
STEPS, PER_VISIT = 48, 4
THIN = ("--epochs=1", "--save_steps=1", "--keep_optimizer=2")

alone = pytest.mark.skipif(not loopback(), reason="no loopback interface: processes cannot talk")


# ---- helpers -------------------------------------------------------------------------------------

@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with tiny.py, its data and out/tiny, trained straight."""
    root = tmp_path_factory.mktemp("small")
    (root / "tiny.py").write_text(RUN)
    rows = [json.dumps({"text": words(40 + i, i)}) for i in range(150)]
    (root / "a.jsonl").write_text("\n".join(rows))
    (root / "b.txt").write_text(words(4000, 999))
    with inside(root):
        prepare.main(["tiny.py", "--workers=1"])
        train.main(["tiny.py"])
    return root


@pytest.fixture
def room(small, tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with the data in reach."""
    (tmp_path / "data").symlink_to(small / "data")
    (tmp_path / "tiny.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go(*argv: str) -> int:
    """train.py in this process -> its exit code."""
    return run(train.main, "", [], ["tiny.py", *argv])


def lines(out: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock, in its order."""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS}
            for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out: Path, straight: Path) -> None:
    """The same names, the same bits in every checkpoint, the same metrics; nothing is left over."""
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in straight.iterdir())
    assert lines(out) == lines(straight)
    ours, theirs = ({name: sha for name, sha in hashes(one).items() if "/" in name}
                    for one in (out, straight))
    assert [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)] == []


@contextlib.contextmanager
def at_step(step: int, first: int, act: Callable[[], object]) -> Iterator[None]:
    """Something happens while this step of a launch that begins with step `first` is computed."""
    real, now = train.forward_backward, [first - 1]

    def forward_backward(*args):
        now[0] += 1
        if now[0] == step:
            act()
        return real(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "forward_backward", forward_backward)
        yield


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def step_of(folder: Path) -> int:
    return json.loads((folder / "state.json").read_text())["step"]


# ---- stopped -------------------------------------------------------------------------------------

def test_stop_after_each_step(room, small, capsys):
    """Steps 1 to 40, by max_steps and by a signal in turn: 0 differences, whether it was the end of
    a chunk or not."""
    for step in range(1, 41):
        by_signal = step % 3 == 0
        with at_step(step, 1, tell) if by_signal else contextlib.nullcontext():
            code = go() if by_signal else go(f"--max_steps={step}")
        assert code == (143 if by_signal else 0)
        name = "last" if step % PER_VISIT else f"ckpt_{step // PER_VISIT - 1:03d}"
        assert step_of(Path("out/tiny") / name) == step
        assert go() == 0
        assert f"going on from out/tiny/{name}, step {step} of 48" in capsys.readouterr().out
        assert_same(Path("out/tiny"), small / "out/tiny")
        shutil.rmtree("out")


def test_ten_stops(room, small):
    """At ten steps drawn at random, with last/ saved every third step besides."""
    step, stops = 0, sorted(random.Random(1).sample(range(1, STEPS), 10))
    for stop in stops:
        with at_step(stop, step + 1, lambda: tell(signal.SIGINT)):
            assert go("--save_steps=3") == 130
        step = stop
    assert go("--save_steps=3") == 0
    assert_same(Path("out/tiny"), small / "out/tiny")


@pytest.mark.parametrize("step", [4, 5, 6, 8])
def test_a_stop_while_a_save_is_under_way(room, small, monkeypatch, step):
    """The signal comes while ckpt_000 is being written, one and two steps after it; or, at a
    chunk's end, the save it asks for is the checkpoint's own."""
    out, write, seen = Path("out/tiny"), checkpoints.write, []

    def slowly(*args):
        time.sleep(0.3)
        write(*args)

    def look_and_tell():
        seen.append((out / "ckpt_000").exists())
        tell()
    with monkeypatch.context() as patch, at_step(step, 1, look_and_tell):
        patch.setattr(checkpoints, "write", slowly)
        assert go() == 143
    assert seen == [False]
    assert step_of(out / ("last" if step % 4 else f"ckpt_{step // 4 - 1:03d}")) == step
    assert go() == 0
    assert_same(out, small / "out/tiny")


PLAIN = model.Block.forward


def drops(always: bool) -> Callable:
    """A block with dropout, as a fork may add it; `always`: a fork that forgets model.eval()."""
    def forward(self, *args, **more):
        return torch.nn.functional.dropout(PLAIN(self, *args, **more), 0.1, always or self.training)
    return forward


@pytest.mark.parametrize("always", [False, True], ids=["dropout", "dropout in validation, too"])
def test_a_model_that_draws(room, small, monkeypatch, always):
    """With dropout a stopped run still has the straight one's bits, and held-out rows cost no draw:
    without them the weights are the same. Not so if the random state is not put back."""
    monkeypatch.setattr(model.Block, "forward", drops(always))
    few = "--max_steps=14"
    assert go("--run=straight", few) == 0
    for step in (3, 4, 6):
        assert go(f"--max_steps={step}") == 0
    assert go(few) == 0
    assert_same(Path("out/tiny"), Path("out/straight"))
    weights = hashes(Path("out/straight/ckpt_002"))["model.safetensors"]
    assert weights != hashes(small / "out/tiny/ckpt_002")["model.safetensors"]  # it does draw
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", lambda *_: iter(()))
        assert go("--run=blind", few) == 0
    assert hashes(Path("out/blind/ckpt_002"))["model.safetensors"] == weights
    if not always:  # it is off while held-out rows are scored: their losses are those without it
        with monkeypatch.context() as patch:
            patch.setattr(model.Block, "forward", PLAIN)
            assert go("--run=blind", few) == 0
        assert lines(Path("out/blind"))[-2:] == lines(Path("out/straight"))[-2:]
    with monkeypatch.context() as patch:
        patch.setattr(train, "set_random_states", lambda *_: None)
        assert go("--run=forgot", "--max_steps=6") == 0
        assert go("--run=forgot", few) == 0
    assert hashes(Path("out/forgot/ckpt_002"))["model.safetensors"] != weights


def test_the_loop_waits_for_the_copy_alone(room, small, monkeypatch):
    """The steps after a save go on while it writes, and the next save waits for it: a write here
    ends well after the last step before the next save has begun (or a minute later, without)."""
    write, events, steps = checkpoints.write, [], []

    def slowly(*args):
        events.append("begins")
        deadline, wanted = time.monotonic() + 60, min(8 + 4 * events.count("ends"), 12)
        while len(steps) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        events.append(len(steps))
        time.sleep(1.5)
        write(*args)
        events.append("ends")
    real = train.forward_backward
    monkeypatch.setattr(checkpoints, "write", slowly)
    monkeypatch.setattr(train, "forward_backward",
                        lambda *args: (steps.append(None), real(*args))[1])
    assert go("--max_steps=12") == 0
    assert events == ["begins", 8, "ends", "begins", 12, "ends", "begins", 12, "ends"]
    waits = [json.loads(line)["time_save"] for line in Path(
        "out/tiny/metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert waits[3] < 1 and waits[7] > 1 and max(waits[4:7]) < 1
    assert hashes(Path("out/tiny/ckpt_002")) == hashes(small / "out/tiny/ckpt_002")


# ---- told ----------------------------------------------------------------------------------------

def slow_script(room: Path, step: int, seconds: float, save: float = 0.0) -> Path:
    """train.py, started as a script, whose steps take so long from this one of a launch on; and so
    do its saves of last/."""
    path = room / "slow.py"
    path.write_text(f"""
import sys, time
sys.path.insert(0, {str(REPO)!r})
import train
from nano360.config import run
from nano360 import checkpoints
real, write, now = train.forward_backward, checkpoints.write, [0]
def forward_backward(*args):
    now[0] += 1
    time.sleep({seconds} * (now[0] >= {step}))
    return real(*args)
def slow_write(out, name, *args):
    time.sleep({save} * (name == "last"))
    write(out, name, *args)
train.forward_backward, checkpoints.write = forward_backward, slow_write
sys.exit(run(train.main, "", [], sys.argv[1:]))
""")
    return path


def started(command: list[str], steps: int) -> subprocess.Popen:
    """A process, once out/tiny has the lines of so many steps."""
    child = subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    path, until = Path("out/tiny/metrics.jsonl"), time.monotonic() + 60
    while not path.is_file() or path.read_text().count('"kind": "train"') < steps:
        if child.poll() is not None or time.monotonic() > until:
            child.kill()
            raise AssertionError(child.communicate())
        time.sleep(0.01)
    return child


@pytest.mark.parametrize("number, code, times", [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 1)])
def test_signals(room, small, number, code, times):
    """The step is finished, last/ saved, one line says which signal came; a second one at once is
    an echo of the first."""
    child = started([str(slow_script(room, 6, 0.3)), "tiny.py"], 6)
    for _ in range(times):
        child.send_signal(number)
        time.sleep(0.05)
    out, err = child.communicate(timeout=60)
    assert child.returncode == code
    step = step_of(Path("out/tiny/last"))
    assert err.splitlines() == [f"{number.name} came: out/tiny/last holds step {step}, the same "
                                "command goes on from there"]
    assert len([line for line in lines(Path("out/tiny")) if line["kind"] == "train"]) == step
    assert step in (6, 7) and "saved out/tiny/last" in out
    assert not Path("out/tiny.lock").exists()
    assert go() == 0
    assert_same(Path("out/tiny"), small / "out/tiny")


def test_a_second_signal(room, small):
    """More than a second later it ends a process that does not come to the end of its step."""
    child = started([str(slow_script(room, 6, 30)), "tiny.py"], 5)
    child.send_signal(signal.SIGTERM)
    time.sleep(GRACE + 0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM
    child.communicate()
    assert steps_of(Path("out/tiny")) == {"ckpt_000": 4}
    assert go() == 0
    assert_same(Path("out/tiny"), small / "out/tiny")


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


# ---- several processes ---------------------------------------------------------------------------

def launch(server, *argv: str, before: Callable[[], None] | None = None, ranks: int = 1
           ) -> list[int]:
    """Exit codes of train.py in processes of their own."""
    return ended(start(server, trains, ["tiny.py", *argv], ranks, before))


HELD = contextlib.ExitStack()  # until a process ends


def drop(told: bool) -> None:
    """This process has dropout and, perhaps, hears SIGINT in its sixth step."""
    model.Block.forward = drops(False)
    if told:
        HELD.enter_context(at_step(6, 1, lambda: tell(signal.SIGINT)))


@alone
def test_ranks_that_draw(room, server):
    """Each of two ranks has a random state of its own, and gets its own back after Ctrl-C, which
    both of them hear."""
    def two(*argv: str, told: bool = False) -> list[int]:
        before = functools.partial(drop, told)
        return launch(server, "--max_steps=10", *argv, before=before, ranks=2)
    assert two("--run=straight") == [0, 0]
    assert two(told=True) == [130, 130] and "SIGINT came" in Path("err.0").read_text()
    assert step_of(Path("out/tiny/last")) == 6
    assert two() == [0, 0]
    assert_same(Path("out/tiny"), Path("out/straight"))
    states = load_file("out/tiny/last/optimizer/random.safetensors")
    assert not torch.equal(states["cpu.0"], states["cpu.1"])


def rank_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next((word[5:] for word in words if word.startswith("RANK=")), "")


@alone
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_one_rank_is_told(room, server):
    """Under torchrun SIGTERM comes to the second of two ranks alone: both end after the same step,
    with one last/ of it, and the run goes on to the bits of two undisturbed ranks. The second does
    not leave before last/ is there: torchrun ends all others soon after the first that ends."""
    assert launch(server, "--run=straight", "--max_steps=12", ranks=2) == [0, 0]
    child = started(["-m", "torch.distributed.run", "--nproc_per_node=2",
                     f"--master_port={free_port()}", "--", str(slow_script(room, 6, 0.5, 2.0)),
                     "tiny.py", "--max_steps=12"], 6)
    [second] = [pid for pid in children_of(child.pid) if rank_of(pid) == "1"]
    os.kill(second, signal.SIGTERM)
    while not Path("out/tiny/last").is_dir():
        fields = Path(f"/proc/{second}/stat").read_text().rpartition(")")[2].split()
        assert fields[0] != "Z" and child.poll() is None
        time.sleep(0.02)
    out, err = child.communicate(timeout=60)
    assert child.returncode != 0  # torchrun's own
    told = re.findall(r"^\[rank (\d)\] SIGTERM came: out/tiny/last holds step (\d+), .*$", err,
                      re.MULTILINE)
    assert {rank for rank, _ in told} <= {"0", "1"} and len(told) == 2, err
    step = step_of(Path("out/tiny/last"))
    assert {its for _, its in told} == {str(step)} and out.count("saved out/tiny/last") == 1
    assert steps_of(Path("out/tiny")) == {"ckpt_000": 4, "last": step} and step in (6, 7)
    assert launch(server, "--max_steps=12", ranks=2) == [0, 0]
    assert_same(Path("out/tiny"), Path("out/straight"))


# ---- killed --------------------------------------------------------------------------------------

def named(*names: str, is_dir: bool = True) -> Callable:
    """Whether the first argument is the folder, or file, of one of these names."""
    return lambda path, *_, **__: path.name in names and path.is_dir() == is_dir


STAGES = {  # step of the save; what dies before, half-way through or after which call
    "weights half written": (8, "half", hf_folders, "save_file", lambda *_, **__: True),
    "before the optimizer": (8, "before", checkpoints, "save_file", lambda *_: True),
    "optimizer half written": (8, "half", checkpoints, "save_file", lambda *_: True),
    "before hashing": (8, "before", checkpoints, "sha256_file", lambda *_: True),
    "before syncing": (8, "before", checkpoints, "sync", lambda *_: True),
    "before state.json": (8, "before", checkpoints, "write_sealed", lambda *_: True),
    "between state.json and its seal": (
        8, "before", nano360.files, "write_atomic", named("state.json.sha256", is_dir=False)),
    "before the rename": (8, "before", Path, "rename", named("ckpt_001.part")),
    "after the rename": (8, "after", Path, "rename", named("ckpt_001.part")),
    "between two renames": (6, "after", Path, "rename", named("last")),
    "before the old last/ goes": (6, "before", checkpoints, "discard", named("last.old")),
    "old last/ half gone": (6, "removing", shutil, "rmtree", named("last.old.gone")),
    "before last/ goes": (8, "before", checkpoints, "discard", named("last")),
    "last/ half gone": (8, "removing", shutil, "rmtree", named("last.gone")),
    "before the old ckpt_003 goes": (16, "before", checkpoints, "discard", named("ckpt_003.old")),
    "before the thinning": (12, "before", checkpoints, "discard", named("optimizer")),
    "half thinned": (12, "removing", shutil, "rmtree", named("optimizer.gone")),
    "before validation": (8, "before", train, "validate", lambda *_: True),
    "held-out lines half written": (8, "half", records, "append", lambda *_: True),
    "half a line": (7, "half", records, "append", lambda *_: True),
    "at the end, before last/ goes": (16, "before", checkpoints, "discard", named("last")),
    "at the end, last/ half gone": (16, "removing", shutil, "rmtree", named("last.gone")),
    "at the end, before the thinning": (16, "before", checkpoints, "discard", named("optimizer")),
}


def plant(stage: str) -> None:
    """Let this process die at a stage of a save."""
    step, when, owner, name, fits = STAGES[stage]
    log, work, real = Path("out/tiny/metrics.jsonl"), checkpoints.Saver.work, getattr(owner, name)
    began, done = [], []

    def noted(self, name, state):
        began.append(state["step"])
        work(self, name, state)
        done.append(state["step"])

    def size(args: tuple) -> int:
        return sum(arg.stat().st_size for arg in args if isinstance(arg, Path) and arg.is_file())

    def dying(*args, **more):
        beside = owner in (train, records)  # in the loop's own thread, while a save may go on
        now = text_of(log).count('"train"') == step if beside else step in began
        if not now or not fits(*args, **more):
            return real(*args, **more)
        if beside:
            until(lambda: step in done)
        if step == 16:  # the last one: all but this is done
            until(lambda: text_of(log).count('"valid"') == 8)
        if when == "removing":
            next(file for file in sorted(args[0].rglob("*")) if file.is_file()).unlink()
        if when in ("half", "after"):
            before = size(args)
            real(*args, **more)
        if when == "half":
            [path] = [arg for arg in args if isinstance(arg, Path)]
            os.truncate(path, (before + size(args)) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.Saver.work = noted
    setattr(owner, name, dying)


def until(fits: Callable[[], bool]) -> None:
    while not fits():
        time.sleep(0.01)


@pytest.fixture(scope="session")
def thinned(small) -> Path:
    """A run of 16 steps that is saved after each, and keeps two optimizer states."""
    with inside(small):
        assert go("--run=thinned", *THIN) == 0
    return small / "out/thinned"


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "ckpt_003" not in stage])
def test_a_kill_at_each_stage_of_a_save(room, thinned, server, stage):
    """No checkpoint is lost but the one that was being written; the same command ends with the
    undisturbed bits, and nothing unfinished or half removed is left."""
    step, out = STAGES[stage][0], Path("out/tiny")
    assert launch(server, *THIN, before=functools.partial(plant, stage)) == [-signal.SIGKILL], (
        Path("err.0").read_text())
    there = {folder.name: step_of(folder) for folder in checkpoint_folders(out)}
    assert max(there.values()) in (step - 1, step)
    want = {f"ckpt_{v:03d}": 4 * v + 4 for v in range(4) if 4 * v + 4 < step}
    assert want.items() <= there.items()
    two = sorted(there, key=lambda name: there[name])[-2:]
    for name in there:
        wrong = faults(out / name)
        assert not wrong or name not in two and all("/optimizer/" in one for one in wrong)
    assert launch(server, *THIN) == [0], Path("err.0").read_text()
    assert re.search(rf"\b(going on from|holds)\b.* step {max(there.values())}\b",
                     Path("out.0").read_text())
    assert_same(out, thinned)


def test_a_kill_while_a_damaged_checkpoint_is_trained_again(room, thinned, server):
    """What was damaged makes room only when its successor is whole, and then nothing is left."""
    shutil.copytree(thinned, "out/tiny")
    record = Path("out/tiny/run.json")
    record.write_text(record.read_text().replace('"run": "thinned"', '"run": "tiny"'))
    path = Path("out/tiny/ckpt_003/model.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    before = functools.partial(plant, "before the old ckpt_003 goes")
    assert launch(server, *THIN, before=before) == [-signal.SIGKILL]
    assert Path("out/tiny/ckpt_003.old").is_dir() and faults(Path("out/tiny/ckpt_003")) == []
    assert launch(server, *THIN) == [0]
    assert_same(Path("out/tiny"), thinned)
