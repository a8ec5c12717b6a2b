"""What a kill costs evaluate.py: nothing but time.

    python tests/soak_score.py                 # 20 kills, a few minutes
    python tests/soak_score.py --kills=100

Makes a run of eight small checkpoints and rows of the leaderboard's tasks, some others and a text,
scores it once undisturbed, and then kills the same command (SIGKILL): half of the times at moments
drawn uniformly over what it has before it, half of the times when evals.jsonl has just grown or a
file is being replaced. Every third kill is made a loss of power: it leaves a last line cut short.
At random the command also has --output. What is killed is started again; what ended before its
kill is compared and removed, and all begins anew. Three things have to hold:

1) At every kill, evals.jsonl is the beginning of the undisturbed one, and the --output file is
   absent, or json with the first scores of the undisturbed one.
2) Every run that is finished has, byte for byte, the undisturbed one's evals.jsonl, its printed
   table and, where it was asked for, its --output.
3) Nothing else is left in the run's folder: no lock, no file half written.

Prints what each kill came into; leaves nothing behind.
"""

import collections
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from harness import save_llama, write_rows  # noqa: E402
from nano360.config import CHECKPOINT, DATA, ModelConfig, Stop, run  # noqa: E402
from nano360.tokenizers import load_tokenizer  # noqa: E402
from prepare import train_tokenizer  # noqa: E402
from soak_kill import in_a_folder, text_of  # noqa: E402

POLL = 0.0005  # seconds between two looks at a run's folder
AT_ONCE = 5  # kills of one run, which then may end: so that more than a few are compared
SLACK = 0.02  # seconds after a line has come, in which a kill is drawn
CHECKPOINTS = 8
TASKS = "leaderboard,piqa,winogrande,wikitext,text:text.txt"  # shots: 25, 10, 5, and 0
ROWS = dict(train=40, dev=12, validation=10, test=10)
MODEL = dict(n_layer=3, n_head=4, n_embd=128, n_inner=344, vocab_size=1000, seq_len=192,
             init_std=0.1)


# ---- a run to score ------------------------------------------------------------------------------

def make_run(root: Path) -> None:
    """out/soak with its checkpoints, as if trained, and data/eval."""
    text = (root / "text.txt").read_text()
    (root / "made.model").write_bytes(train_tokenizer(iter([text]), MODEL["vocab_size"]))
    for seed in range(CHECKPOINTS):
        save_llama(root / f"out/soak/ckpt_{seed:03}", load_tokenizer(root / "made.model"), False,
                   ModelConfig(**MODEL), seed)
    write_rows(root / "data/eval", ROWS, 5)


def start(root: Path, with_output: bool) -> subprocess.Popen:
    """evaluate.py as a user starts it, in this folder; its table goes to table.txt."""
    words = ["out/soak", f"--tasks={TASKS}", "--data_dir=data/eval", "--device=cpu"]
    words += ["--output=scores.json"] * with_output
    with open(root / "table.txt", "w") as table:
        return subprocess.Popen([sys.executable, str(REPO / "evaluate.py"), *words], cwd=root,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                                stdout=table, stderr=subprocess.PIPE)


def finish(child: subprocess.Popen) -> None:
    """Raises Stop(DATA) if it needs a hand."""
    _, err = child.communicate()
    if child.returncode:
        raise Stop(DATA, f"evaluate.py ended with {child.returncode}: {err}")


# ---- from outside --------------------------------------------------------------------------------

def content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@dataclass(frozen=True)
class Whole:
    """What the run that nobody disturbed left, and its seconds."""
    log: bytes
    scores: bytes
    table: bytes
    boot: float  # until its first line
    seconds: float  # until its end

    @property
    def lines(self) -> int:
        return self.log.count(b"\n")


def compare_killed(root: Path, should: Whole) -> None:
    """Raises Stop(CHECKPOINT) if a kill has left what no undisturbed run writes."""
    if not should.log.startswith(content(root / "out/soak/evals.jsonl")):
        raise Stop(CHECKPOINT, "evals.jsonl is not how the undisturbed one begins")
    if (root / "scores.json").exists():
        try:
            found = json.loads(content(root / "scores.json"))["runs"]
        except ValueError as error:
            raise Stop(CHECKPOINT, f"scores.json is no json: {error}") from error
        if not found or found != json.loads(should.scores)["runs"][:len(found)]:
            raise Stop(CHECKPOINT, "scores.json is not how the undisturbed one begins")


def compare_finished(root: Path, should: Whole, with_output: bool) -> None:
    """Raises Stop(CHECKPOINT) with what is not as in the undisturbed run."""
    names = {path.name for path in (root / "out/soak").iterdir()}
    wrong = names ^ {"evals.jsonl", *(f"ckpt_{i:03}" for i in range(CHECKPOINTS))}
    for name, expected in (("out/soak/evals.jsonl", should.log), ("table.txt", should.table),
                           *([("scores.json", should.scores)] * with_output)):
        if content(root / name) != expected:
            wrong.add(name)
    if with_output and (root / "scores.json.part").exists():
        wrong.add("scores.json.part")
    if wrong:
        raise Stop(CHECKPOINT, f"not as the undisturbed run: {', '.join(sorted(wrong))}")


def begin_anew(root: Path) -> None:
    for name in ("out/soak/evals.jsonl", "scores.json", "scores.json.part"):
        (root / name).unlink(missing_ok=True)


def undisturbed(root: Path) -> Whole:
    began, boot = time.perf_counter(), 0.0
    child = start(root, True)
    while child.poll() is None:
        boot = boot or (time.perf_counter() - began) * bool(content(root / "out/soak/evals.jsonl"))
        time.sleep(POLL)
    finish(child)
    return Whole(content(root / "out/soak/evals.jsonl"), content(root / "scores.json"),
                 content(root / "table.txt"), boot, time.perf_counter() - began)


# ---- kills ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Aim:
    """When to kill."""
    lines: int | None  # at once if a file is being replaced, or once the log has so many lines
    delay: float  # and so many seconds later; lines none: from the start of the process


def take_aim(dice: random.Random, should: Whole, n: int, done: int, with_output: bool) -> Aim:
    """At a line for odd n; for even n uniform over the time that the run will still take."""
    if n % 2 and done < should.lines:  # soon, so that one run is killed more than once
        soon = done + 1 + (should.lines - done) // 3
        return Aim(dice.randint(done + 1, soon), dice.uniform(0, SLACK))
    left = 1 if with_output else (should.lines - done) / should.lines  # with it all is scored
    return Aim(None, dice.uniform(0, should.boot + (should.seconds - should.boot) * left))


def phase(root: Path, pid: int) -> str:
    """What a process that was killed was at, by what it left."""
    if (root / "out/soak/evals.jsonl.part").exists():
        return "mending evals.jsonl"
    if (root / "scores.json.part").exists():
        return "replacing scores.json"
    mine = f"process {pid} " in text_of(root / "out/soak/evals.jsonl.lock")
    return "scoring" if mine else "before the lock"


def kill(child: subprocess.Popen, root: Path, aim: Aim) -> str:
    """What a run was at when it was killed; nothing if it had ended by then."""
    log, at = root / "out/soak/evals.jsonl", None
    if aim.lines is None:
        at = time.perf_counter() + aim.delay
    while child.poll() is None and (at is None or time.perf_counter() < at):
        if at is None and [*root.glob("*.part"), *log.parent.glob("*.part")]:
            at = 0.0
        elif at is None and content(log).count(b"\n") >= aim.lines:
            at = time.perf_counter() + aim.delay
        time.sleep(POLL)
    if child.poll() is not None:
        return ""
    child.kill()
    child.communicate()
    return phase(root, child.pid)


def lose_power(log: Path, dice: random.Random) -> None:
    """Cut the last line short, as a machine may leave it that went down while it was written."""
    lines = content(log).splitlines(keepends=True)
    if lines:
        lines[-1] = lines[-1][:dice.randrange(1, len(lines[-1]))]
        log.write_bytes(b"".join(lines))


def soak(root: Path, kills: int, dice: random.Random) -> None:
    log, began = root / "out/soak/evals.jsonl", time.perf_counter()
    make_run(root)
    should = undisturbed(root)
    print(f"undisturbed: {should.seconds:.1f} s, the first line after {should.boot:.1f} s, "
          f"{should.lines} lines of {CHECKPOINTS} checkpoints, {len(should.log)} bytes", flush=True)
    begin_anew(root)
    phases, ended, starts, cut, left = collections.Counter(), 0, 0, 0, AT_ONCE
    while (n := sum(phases.values())) < kills or log.exists():
        with_output = dice.random() < 0.5
        aim = take_aim(dice, should, n, content(log).count(b"\n"), with_output)
        (root / "scores.json.part").unlink(missing_ok=True)  # it would tell nothing of this one
        stood = content(log).count(b"\n")
        child, starts = start(root, with_output), starts + 1
        if n < kills and left and (came := kill(child, root, aim)):
            compare_killed(root, should)
            if content(log).count(b"\n") < stood:
                raise Stop(CHECKPOINT, f"{stood} scores stood in {log} before the last start")
            left -= 1
            if n % 3 == 0:
                lose_power(log, dice)
            phases[came], whole = phases[came] + 1, content(log).count(b"\n")
            rest = len(content(log)) - content(log).rfind(b"\n") - 1
            cut += rest > 0
            print(f"kill {n + 1:>3}: {came}, {whole} lines stood there" + (
                f" and {rest} bytes of one cut short" if rest else ""), flush=True)
            continue
        finish(child)
        compare_finished(root, should, with_output)
        begin_anew(root)
        ended, left = ended + 1, AT_ONCE
    print(", ".join(f"{n} {name}" for name, n in phases.most_common()))
    print(f"{kills} kills, {cut} lines cut short, {starts} starts, {ended} runs finished; 0 runs "
          f"needed a hand, {should.lines} lines byte-identical in each run; "
          f"{time.perf_counter() - began:.0f} s")


def main(argv: list[str]) -> None:
    in_a_folder(argv, "", "ab*.py", 20, soak)


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
