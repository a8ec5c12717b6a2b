"""What the loss of a rank costs a run: the time until the other one has noticed.

    python tests/soak_rank.py                 # 10 of each kind, some ten minutes
    python tests/soak_rank.py --kills=2

Two ranks, started one by one without torchrun, whose agent would end the one when the other is
gone. On each of three layouts (DDP, FSDP2, a pipeline) one rank, drawn by lot, is killed (SIGKILL)
or made to stand still (SIGSTOP), at a moment drawn uniformly over what a run has before it once the
two have met: before its first step, in a step, in a save, in a validation. The same command goes
on. Three things have to hold:

1) The other rank ends within --timeout and ten seconds, not with 0, and its last line names its
   rank and the step it was at. (It may end well if it had nothing more to do with the one that is
   gone: that is no loss, and does not count.)
2) Every folder that has a checkpoint's name is whole, and none that was whole before is gone.
3) Every run that is finished has, byte for byte, the undisturbed one's checkpoints and metrics,
   and its losses are those of one process, to 1e-5.

Prints a line per loss, and a summary with the slowest end; leaves nothing behind.
"""

import collections
import contextlib
import functools
import os
import random
import re
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import prepare  # noqa: E402
import soak_kill  # noqa: E402
from nano360.config import CHECKPOINT, ENVIRONMENT, Stop, run, say  # noqa: E402
from ranks import forkserver, start, trains  # noqa: E402

LAYOUTS = {"DDP": "--dp_shard=1", "FSDP2": "--dp_shard=2", "pipeline": "--pp=2"}
MINUTES, MORE = 0.1, 10.0  # --timeout, and the seconds after it in which all have ended
RUN = """
dataset = run = "soak"
sources = [dict(name="text", path="text.txt")]
vocab_size = 512
seq_len = 32
n_chunks = 4
rows_per_chunk = 64
valid_rows = 16
n_layer = 2
n_head = 4
n_embd = 64
n_inner = 172
lr = 1e-3
warmup_steps = 4
batch_size = 8
micro_batch_size = 4
save_steps = 3
workers = 1
log_every = 100
device = "cpu"
dtype = "float32"
"""


# ---- ranks ---------------------------------------------------------------------------------------

def begin(server: ForkServerContext, *argv: str, world: int = 2) -> list[BaseProcess]:
    """The ranks of a run that goes on where it stood."""
    for path in [*Path(".").glob("out.*"), *Path(".").glob("err.*")]:
        path.unlink()
    return start(server, trains, ["run.py", *argv], world)


def met(ranks: list) -> float:
    """The time when rank 0 says what it trains, which comes after all have agreed on it."""
    said = Path("out.0")
    while "parameters," not in (said.read_text() if said.is_file() else ""):
        if all(process.exitcode is not None for process in ranks):
            break
        time.sleep(0.01)
    return time.monotonic()


def finish(ranks: list) -> None:
    """Raises Stop(CHECKPOINT) if one of them needs a hand."""
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise Stop(CHECKPOINT, f"ended with {[process.exitcode for process in ranks]}: "
                   + " ".join(path.read_text() for path in sorted(Path(".").glob("err.*"))))


def steps_of(out: Path) -> dict[str, int]:
    """The step of every checkpoint of a run. Raises Stop(CHECKPOINT) if one is not whole."""
    steps = soak_kill.steps_of(out)
    for folder in soak_kill.checkpoints(out):
        shards = len([*folder.glob("optimizer/shard-*")])
        if shards not in (0, 2 * 2):  # of two ranks, two kinds of moments
            raise Stop(CHECKPOINT, f"{folder} has {shards} shards")
    return steps


# ---- losses --------------------------------------------------------------------------------------

def lose(ranks: list, lost: int, number: int, delay: float) -> tuple[float, str] | None:
    """Seconds until the other rank had ended, and its last line, none if it had nothing more to
    do with the one that is gone; nothing if the run was over."""
    met(ranks)
    ranks[0].join(delay)
    if any(process.exitcode is not None for process in ranks):
        finish(ranks)
        return None
    began, other = time.monotonic(), ranks[1 - lost]
    os.kill(ranks[lost].pid, number)
    other.join(60 * MINUTES + MORE + 20)
    took, code = time.monotonic() - began, other.exitcode
    for process in ranks:  # what stands still does not end by itself
        process.kill()
        process.join()
    lines = Path(f"err.{1 - lost}").read_text().splitlines()
    if took > 60 * MINUTES + MORE or code is None:
        raise Stop(ENVIRONMENT, f"rank {1 - lost} was there {took:.1f} s after the other: {lines}")
    if code == 0:
        return took, ""
    # Where a rank is lost while they make a group, torch says much before it, and not in Python.
    if code != ENVIRONMENT or any("Traceback" in line for line in lines) or not re.fullmatch(
            rf"\[rank {1 - lost}\] error: (rank {1 - lost} lost the others after step \d+ .*|"
            r"step \d+ has waited .*)", lines[-1]):
        raise Stop(ENVIRONMENT, f"rank {1 - lost} ended with {code} and said {lines}")
    return took, lines[-1]


def compare_losses(out: Path, alone: list[dict]) -> None:
    """Raises Stop(CHECKPOINT) if rows or losses are not those of one process."""
    for x, y in zip(soak_kill.metrics(out), alone, strict=True):
        if x.get("rows") != y.get("rows") or abs(x["loss"] / y["loss"] - 1) > 1e-5:
            raise Stop(CHECKPOINT, f"not as of one process: {x}, there {y}")


def soak_one(server: ForkServerContext, kind: str, number: int, losses: int, dice: random.Random,
             alone: list[dict]) -> list[float]:
    """Lose so many ranks on one layout; the seconds until the other one had ended."""
    out, argv = Path("out/soak"), [LAYOUTS[kind], f"--timeout={MINUTES}"]
    ranks = begin(server, *argv)
    began = met(ranks)
    finish(ranks)
    whole, should = time.monotonic() - began, soak_kill.result(out)
    compare_losses(out, alone)
    shutil.rmtree(out)
    took, kept, ended = [], {}, 0
    while len(took) < losses or kept or not ended:
        ranks, lost = begin(server, *argv), dice.randrange(2)
        if len(took) < losses and (came := lose(ranks, lost, number, dice.uniform(0, whole))):
            now = steps_of(out)
            soak_kill.compare_kept(kept, now)
            kept = now
            if not came[1]:
                continue
            took.append(came[0])
            say(f"{kind} {signal.Signals(number).name} {len(took):>3}: {came[0]:.1f} s; "
                f"{came[1][:70]}...; step {max(now.values(), default=0)} is there")
            continue
        finish(ranks)
        soak_kill.compare_kept(kept, steps_of(out))
        names, files, lines = soak_kill.result(out)
        # a run that was not alone has its restarts in incidents.jsonl
        soak_kill.compare(out, (should[0] | names & {"incidents.jsonl"}, *should[1:]))
        compare_losses(out, alone)
        shutil.rmtree(out)
        ended, kept = ended + 1, {}
    say(f"{kind}, {signal.Signals(number).name}: {losses} losses, the other rank had ended after "
        f"{max(took):.1f} s at most; {ended} runs finished; a run that nobody disturbs takes "
        f"{whole:.1f} s")
    return took


def soak(server: ForkServerContext, root: Path, losses: int, dice: random.Random) -> None:
    with contextlib.chdir(root):
        prepare.main(["run.py"])
        finish(begin(server, world=1))
        alone = soak_kill.metrics(Path("out/soak"))
        shutil.rmtree("out")
        slowest = collections.defaultdict(list)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for kind in LAYOUTS:
                slowest[number] += soak_one(server, kind, number, losses, dice, alone)
    say(f"{sum(map(len, slowest.values()))} ranks lost on {len(LAYOUTS)} layouts; with "
        f"--timeout={MINUTES} ({60 * MINUTES:g} s) the other one had ended after "
        f"{max(slowest[signal.SIGKILL]):.1f} s at most where a rank was killed, "
        f"{max(slowest[signal.SIGSTOP]):.1f} s where it stood still; 0 checkpoints lost, 0 runs "
        "needed a hand, all ended with the undisturbed bits")


def main(argv: list[str]) -> None:
    server = forkserver("soak_rank")
    soak_kill.in_a_folder(argv, RUN, "[a-b]*.py", 10, functools.partial(soak, server))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
