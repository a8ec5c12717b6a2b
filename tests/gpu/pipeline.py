"""A real run of a 100M model, from text to score, as a user has it: four minutes of training.

    bash tests/gpu/run.sh train                         # on a CUDA device, within nine minutes
    bash tests/gpu/run.sh train --input=FOLDER          # on text of your own
    bash tests/gpu/run.sh train --tiny --device=cpu     # the same code at toy sizes

prepare.py, a few steps of train.py to learn its speed, then train.py with as many steps as fit;
half way it is told to stop by SIGTERM, and the same command goes on; then sample.py and
evaluate.py. Each is a process of its own with the command line of a user. Wanted: the exit codes,
that the second start goes on at the next step, that the loss falls, and that evaluate.py finds what
train.py logged.

Reads stdlib_100m.py beside this file and the library of this Python; works in a temporary folder;
writes what rows.py says.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rows import REPO, Options, Part, begin, lines_of, stage  # finds the repository

from nano360.config import key, run

RUN_FILE = "tests/gpu/stdlib_100m.py"
TINY = dict(n_layer=2, n_head=4, n_embd=64, n_inner=172, vocab_size=512, seq_len=64, n_chunks=2,
            rows_per_chunk=2000, batch_size=8, micro_batch_size=8, valid_rows=16)
TOTAL = 8 * 160  # steps that the data is enough for
SECONDS = 240  # of training, both starts and the saves included
AFTER = 75  # seconds kept for sample.py, evaluate.py and the last start
WAIT = 60  # seconds that a run has to save and end once it is told to


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    input: str | None = key("text in the library's place, as prepare.py's --input", None)


@dataclass
class Work:
    """The folder of the run, and the words that prepare.py and train.py have in common."""
    part: Part
    folder: Path
    keys: dict[str, object]

    def words(self, *more: str) -> list[str]:
        return [str(REPO / RUN_FILE), *(f"--{k}={v}" for k, v in self.keys.items()), *more]

    def lines(self, name: str, kind: str) -> list[dict]:
        return lines_of(self.folder / "out" / name, kind)


def prepare_text(work: Work) -> dict:
    """Stage 1. On a CPU the library alone would take minutes: a few files of ours do for a try."""
    options = work.part.options
    source = options.input or (str(REPO / "nano360") if options.tiny else None)
    argv = work.words(*[f"--input={source}"] * (source is not None))
    said = stage(work.part, work.folder, "prepare.py", *argv).splitlines()
    return {"ok": True, "said": "; ".join(line for line in said if "chunks of" in line
                                          or line.startswith(("source ", "code", "prose")))}


def probe(work: Work, steps: int) -> dict:
    """The first steps of a run that is not gone on with: the speed, and how long a start takes."""
    began = time.monotonic()
    stage(work.part, work.folder, "train.py", *work.words(
        "--run=probe", f"--max_steps={steps}", "--warmup_steps=2", f"--decay_steps={10 * steps}"))
    took, lines = time.monotonic() - began, work.lines("probe", "train")
    seconds = [sum(v for k, v in line.items() if k.startswith("time_")) for line in lines]
    step = statistics.median(seconds[len(seconds) // 2:])
    start = took - step * steps
    return {"ok": True, "step_s": step, "start_s": start, "tok_per_s": lines[-1]["tok_per_s"]}


def plan(work: Work, probed: dict) -> int:
    """Steps that fit into the time, with two starts; at least as many as a stop half way needs."""
    if work.part.options.tiny:
        return 300  # a visit of 250, and a part of the next one
    seconds = min(SECONDS, work.part.left() - AFTER)
    return max(20, min(TOTAL, int((seconds - 2 * probed["start_s"]) / probed["step_s"])))


def first_half(work: Work, argv: list[str], steps: int) -> dict:
    """Start, and a SIGTERM when half of the steps are written down."""
    log = work.folder / "first.log"
    with open(log, "w") as out:
        child = subprocess.Popen([sys.executable, str(REPO / "train.py"), *argv], cwd=work.folder,
                                 stdout=out, stderr=subprocess.STDOUT)
        try:
            while (child.poll() is None and work.part.left() > AFTER + WAIT
                   and len(work.lines("real", "train")) < steps // 2):
                time.sleep(0.2)
            child.send_signal(signal.SIGTERM)  # nothing happens to one that has ended
            code = child.wait(WAIT)
        finally:
            child.kill()
    lines, last = work.lines("real", "train"), log.read_text().splitlines()[-1]
    found = {"ok": code == 128 + signal.SIGTERM and 0 < len(lines) < steps, "exit_code": code,
             "steps": len(lines), "said": last[:300], "wanted": "exit code 143 before the end"}
    return found | ({"first_loss": lines[0]["loss"], "loss": lines[-1]["loss"]} if lines else {})


def second_half(work: Work, argv: list[str], steps: int, before: int) -> dict:
    """The same command again: on from the next step to the end."""
    said = stage(work.part, work.folder, "train.py", *argv)
    goes_on = next((line for line in said.splitlines() if line.startswith("going on")), "")
    lines = work.lines("real", "train")
    numbers = [line["step"] for line in lines]
    first, last = (statistics.mean(line["loss"] for line in some) for some in
                   (lines[:3], lines[-len(lines) // 20:]))
    late = lines[before + (len(lines) - before) // 4:]  # the compiler is done by then
    middle = {k: statistics.median(line[k] for line in late) if late[0][k] else None
              for k in ("tok_per_s", "mfu")}
    curve = [lines[i * (len(lines) - 1) // 10] for i in range(11)]
    ok = numbers == list(range(1, steps + 1)) and last < 0.9 * first and (
        f"step {before} of {steps}" in goes_on)
    return {"ok": ok, "steps": len(lines), "first_loss": lines[0]["loss"], "loss": last, **middle,
            "memory_gb": max(line["memory"] for line in lines) / 1e9,
            "tokens": lines[-1]["tokens"],
            "said": f"{goes_on}; step and loss: " + ", ".join(
                f"{line['step']} {line['loss']:.3f}" for line in curve),
            "wanted": "each step once, and the loss a tenth lower"}


def validation(work: Work) -> dict:
    """What train.py found on the held-out rows, after each visit."""
    found = {}
    for line in work.lines("real", "valid"):
        found.setdefault(line["source"], []).append(line)
    said = [f"{source}: bits per byte by step " + ", ".join(
        f"{line['step']} {line['bits_per_byte']:.4f}" for line in lines)
        for source, lines in found.items()]
    return {"ok": bool(found), "said": "; ".join(said), **{
        f"{source}_best_bpb": min(line["bits_per_byte"] for line in lines)
        for source, lines in found.items()}}


def newest_of(work: Work) -> Path:
    """The checkpoint that the run ended with."""
    out = work.folder / "out/real"
    steps = {path: json.loads((path / "state.json").read_text())["step"]
             for path in out.iterdir() if (path / "state.json").is_file()}
    return max(steps, key=steps.get)


def evaluate(work: Work) -> dict:
    """evaluate.py's bits per byte, in fp32, against train.py's last, in its own type."""
    stage(work.part, work.folder, "evaluate.py", str(newest_of(work)), "--tasks=valid",
          "--output=scores.json", f"--device={work.part.device.type}")
    scores = json.loads((work.folder / "scores.json").read_text())["runs"]
    theirs = {line["source"]: line["bits_per_byte"] for line in work.lines("real", "valid")}
    ours = {one["task"].removeprefix("valid/"): one["metrics"]["bits_per_byte"] for one in scores}
    apart = max(abs(ours[source] - bpb) / bpb for source, bpb in theirs.items())
    return {"ok": apart < 0.01, **{f"{source}_bpb": bpb for source, bpb in ours.items()},
            "apart": apart, "wanted": "apart <= 0.01"}


def sample(work: Work) -> dict:
    text = stage(work.part, work.folder, "sample.py", str(newest_of(work)),
                 "--prompt=def read(self, ", "--max_new_tokens=100",
                 f"--device={work.part.device.type}")
    return {"ok": len(text) > len("def read(self, ") + 20, "said": repr(text[:400])}


def again(work: Work, argv: list[str]) -> dict:
    said = stage(work.part, work.folder, "train.py", *argv).splitlines()[-1]
    return {"ok": "finished" in said, "said": said}


def main(argv: list[str]) -> None:
    part = begin("train", argv, TrainOptions)
    with tempfile.TemporaryDirectory() as name:
        work = Work(part, Path(name), TINY if part.options.tiny else {})
        part.row("prepare", lambda: prepare_text(work), 90)
        work.keys = work.keys | {"device": part.device.type}  # which prepare.py takes, too
        probed = part.row("probe", lambda: probe(work, 30), 60)
        if "step_s" in probed:
            steps = plan(work, probed)
            words = work.words("--run=real", f"--max_steps={steps}", f"--decay_steps={steps}",
                               f"--warmup_steps={max(2, steps // 20)}")
            half = part.row("train, stopped half way", lambda: first_half(work, words, steps), 60)
            part.row("train, the same again", lambda: second_half(
                work, words, steps, half.get("steps", 0)), 60)
            part.row("validation", lambda: validation(work), 1)
            part.row("sample", lambda: sample(work), 10)
            part.row("evaluate", lambda: evaluate(work), 15)
            part.row("train, once more", lambda: again(work, words), 15)
    part.end()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [TrainOptions]))
