"""What a kill costs train.py: nothing but time.

    python tests/soak_kill.py                 # 100 kills, less than ten minutes
    python tests/soak_kill.py --kills=20

Trains once undisturbed, a few seconds with many saves, and then kills the same command (SIGKILL):
half of the times at moments drawn uniformly over what it has before it, half of the times inside a
save, at a random moment after its folder has appeared. What is killed is started again; what ended
before its kill is compared and removed, and all begins anew. Two things have to hold:

1) At every kill, every folder that has a checkpoint's name is whole, by the hashes in its
   state.json, which are compared here and not by what wrote them; and none that was whole before
   is gone, unless a newer state is there.
2) Every run that is finished has, byte for byte, the undisturbed one's checkpoints (weights,
   optimizer state, random state, state.json), the same metrics but for timings, and nothing else.

Prints what each kill came into; leaves nothing behind.
"""

import collections
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from nano360.config import CHECKPOINT, DATA, USAGE, Stop, run  # noqa: E402

POLL = 0.002  # seconds between two looks at a run's folder
RUN = """
dataset = run = "soak"
sources = [dict(name="text", path="text.txt")]
vocab_size = 1024
seq_len = 32
n_chunks = 12
rows_per_chunk = 40
valid_rows = 16
n_layer = 2
n_head = 4
n_embd = 128
n_inner = 344
lr = 1e-3
warmup_steps = 10
batch_size = 2
save_steps = 4
workers = 1
log_every = 100
"""


# ---- from outside --------------------------------------------------------------------------------

def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, str]:
    """name -> sha256 of every file below a folder."""
    return {p.relative_to(folder).as_posix(): digest(p)
            for p in sorted(folder.rglob("*")) if p.is_file()}


def checkpoints(out: Path) -> list[Path]:
    """The folders of a run that have a checkpoint's name: ckpt_*, and last or what it replaced."""
    found = sorted(path for path in out.glob("ckpt_*") if re.fullmatch(r"ckpt_\d+", path.name))
    return found + [path for path in (out / "last", out / "last.old") if path.is_dir()][:1]


def faults(folder: Path) -> list[str]:
    """What is not as a checkpoint's state.json and the seal beside it say; of a whole one nothing.

    This is the format in the words of this file: no code of what is tested is asked.
    """
    state, seal = folder / "state.json", folder / "state.json.sha256"
    if missing := [str(path) for path in (state, seal) if not path.is_file()]:
        return missing
    if seal.read_text() != f"{digest(state)}  state.json\n":
        return [str(state)]
    files = json.loads(state.read_text())["files"]
    moments = [name for name in files
               if re.fullmatch(r"optimizer/(adamw|shard-.*)\.safetensors", name)]
    if not moments or not {"config.json", "model.safetensors",
                           "optimizer/random.safetensors"} <= files.keys():
        return [f"{state} names only {', '.join(files)}"]
    return [str(folder / name) for name, should in files.items()
            if not (folder / name).is_file() or digest(folder / name) != should]


def steps_of(out: Path) -> dict[str, int]:
    """The step of every checkpoint of a run. Raises Stop(CHECKPOINT) if one is not whole."""
    if broken := [name for folder in checkpoints(out) for name in faults(folder)]:
        raise Stop(CHECKPOINT, f"not whole: {', '.join(broken)}")
    return {folder.name: json.loads((folder / "state.json").read_text())["step"]
            for folder in checkpoints(out)}


def compare_kept(before: dict[str, int], now: dict[str, int]) -> None:
    """Raises Stop(CHECKPOINT) if a checkpoint is gone, or the newest state is older than before."""
    lost = [name for name in before if name.startswith("ckpt") and name not in now]
    if lost or max(before.values(), default=0) > max(now.values(), default=0):
        raise Stop(CHECKPOINT, f"lost: there were {before}, now there are {now}")


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tok_per_s", "mfu", "memory")
             and not k.startswith("time_")} for line in lines]


def compare(out: Path, should: tuple[set[str], dict[str, str], list[dict]]) -> None:
    """Raises Stop(CHECKPOINT) with what is not as in the undisturbed run."""
    names, files, lines = result(out)
    wrong = names ^ should[0] | {k for k in files.keys() | should[1].keys()
                                 if files.get(k) != should[1].get(k)}
    if lines != should[2]:
        wrong.add("metrics.jsonl")
    if wrong:
        raise Stop(CHECKPOINT, f"not as the undisturbed run: {', '.join(sorted(wrong))}")


def result(out: Path) -> tuple[set[str], dict[str, str], list[dict]]:
    """What each run has to end with: its names, the files of its checkpoints, its metrics."""
    files = {f"{folder.name}/{name}": sha for folder in checkpoints(out)
             for name, sha in contents(folder).items()}
    return {path.name for path in out.iterdir()}, files, metrics(out)


# ---- kills ---------------------------------------------------------------------------------------

def start(folder: Path, stage: str) -> subprocess.Popen:
    """A stage as a user starts it, in this folder."""
    return subprocess.Popen([sys.executable, str(REPO / stage), "run.py"], cwd=folder, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(child: subprocess.Popen) -> None:
    """Raises Stop(DATA) if it needs a hand."""
    _, err = child.communicate()
    if child.returncode:
        raise Stop(DATA, f"{child.args[1]} ended with {child.returncode}: {err}")


def text_of(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def saving(out: Path) -> bool:
    """Whether a checkpoint is being written: its folder has its unfinished name."""
    return any(path.is_dir() for path in out.glob("*.part"))


def phase(out: Path) -> str:
    """What a run that was killed was at, by what it left."""
    if saving(out):
        return "writing"
    if list(out.glob("*.old")):
        return "replacing"
    return "removing" if list(out.glob("*.gone")) else "between saves"


@dataclass(frozen=True)
class Times:
    """Seconds of a run that nobody disturbs."""
    boot: float  # until its first step
    whole: float  # until its end
    save: float  # of a save, the median
    inside: float  # of all saves


def undisturbed(root: Path, out: Path) -> Times:
    began, boot, spans, since = time.perf_counter(), 0.0, [], None
    child = start(root, "train.py")
    while child.poll() is None:
        now = time.perf_counter()
        boot = boot or (now - began) * (out / "metrics.jsonl").is_file()
        if saving(out) and since is None:
            since = now
        elif since is not None and not saving(out):
            spans, since = [*spans, now - since], None
        time.sleep(POLL)
    finish(child)
    return Times(boot, time.perf_counter() - began, statistics.median(spans), sum(spans))


@dataclass(frozen=True)
class Aim:
    """When to kill."""
    step: int | None  # once its line is in metrics.jsonl; none: from the start of the process
    inside: bool  # and then, once a save begins
    delay: float  # and so many seconds later


def take_aim(dice: random.Random, times: Times, n: int, done: int, last: int) -> Aim:
    """Inside a save for odd n; for even n uniform over the time that the run will still take."""
    if n % 2:  # soon, so that one run is killed more than once
        return Aim(dice.randint(done, done + (last - done) // 3), True, dice.uniform(0, times.save))
    step = (times.whole - times.boot) / last
    moment = dice.uniform(0, times.boot + step * (last - done))
    if moment < times.boot:
        return Aim(None, False, moment)
    return Aim(done + int((moment - times.boot) / step), False, dice.uniform(0, step))


def kill(child: subprocess.Popen, out: Path, aim: Aim) -> str:
    """What a run was at when it was killed; nothing if it had ended by then."""
    began, launches, idle, at = time.perf_counter(), text_of(out / "run.json"), False, None
    if aim.step is None:
        at = began + aim.delay
    while child.poll() is None and (at is None or time.perf_counter() < at):
        # Until it adds its launch to run.json, all that is there was left by the one before.
        if at is None and text_of(out / "run.json") != launches:
            reached = text_of(out / "metrics.jsonl").count('"kind": "train"') >= aim.step
            if reached and (not aim.inside or idle and saving(out)):
                at = time.perf_counter() + aim.delay
            idle = reached and not saving(out)
        time.sleep(POLL)
    if child.poll() is not None:
        return ""
    child.kill()
    child.communicate()
    return phase(out) if text_of(out / "run.json") != launches else "before the first step"


def soak(root: Path, kills: int, dice: random.Random) -> None:
    out = root / "out" / "soak"
    finish(start(root, "prepare.py"))
    times, should = undisturbed(root, out), result(out)
    last = max(steps_of(out).values())
    size = sum(p.stat().st_size for p in (out / "ckpt_000").rglob("*"))
    print(f"undisturbed: {times.whole:.1f} s, {last} steps, {len(should[1])} files in "
          f"{len(checkpoints(out))} checkpoints of {size / 1e6:.1f} MB; a save takes "
          f"{times.save:.3f} s, {times.inside / times.whole:.0%} of the time is inside one",
          flush=True)
    shutil.rmtree(out)
    phases, ended, starts, kept = collections.Counter(), 0, 0, {}
    while (n := sum(phases.values())) < kills or kept:
        aim = take_aim(dice, times, n, max(kept.values(), default=0), last)
        child, starts = start(root, "train.py"), starts + 1
        if n < kills and (came := kill(child, out, aim)):
            now = steps_of(out)
            compare_kept(kept, now)
            phases[came], kept = phases[came] + 1, now
            print(f"kill {n + 1:>3}: {came}, the newest of {len(now)} whole checkpoints has step "
                  f"{max(now.values(), default=0)}", flush=True)
            continue
        finish(child)
        compare_kept(kept, steps_of(out))
        compare(out, should)
        shutil.rmtree(out)
        ended, kept = ended + 1, {}
    print(", ".join(f"{n} {name}" for name, n in phases.most_common()))
    print(f"{kills} kills, {phases['writing']} inside a save, {starts} starts, {ended} runs "
          f"finished; 0 checkpoints lost, 0 runs needed a hand, {len(should[1])} files "
          "byte-identical in each run")


def kills_of(argv: list[str], usual: int) -> int:
    words = [re.fullmatch("--kills=([1-9][0-9]*)", word) for word in argv]
    if len(words) > 1 or not all(words):
        raise Stop(USAGE, f"expected --kills=N or nothing, got {' '.join(argv)!r}")
    return int(words[0][1]) if words else usual


def in_a_folder(argv: list[str], run_file: str, text: str, kills: int,
                work: Callable[[Path, int, random.Random], None]) -> None:
    """A soak's command line -> work(a folder with run.py and text.txt, how many kills, dice)."""
    kills = kills_of(argv, kills)
    with tempfile.TemporaryDirectory() as name:
        root, library = Path(name), Path(sysconfig.get_paths()["stdlib"])
        (root / "run.py").write_text(run_file)
        (root / "text.txt").write_text("".join(
            path.read_text(encoding="utf-8") for path in sorted(library.glob(text))))
        work(root, kills, random.Random(1))


def main(argv: list[str]) -> None:
    in_a_folder(argv, RUN, "[a-d]*.py", 100, soak)


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
