"""What a run writes down about itself, but for checkpoints: run.json, metrics and incidents.

    record = read_run(config, manifest, out)        # of the folder, or a new one
    write_run(record, out, exact_facts(config, place), argv, step, resume)      # a launch more
    append(out / "metrics.jsonl", lines)

A run's folder is publishable as it is: no absolute path and no name of a machine stands in it.
"""

import dataclasses
import hashlib
import json
import platform
import statistics
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from model import hardware
from nano360.config import (CHECKPOINT, DATA, ENVIRONMENT, NUMERICAL, SECTIONS, USAGE, Config, Stop,
                            from_json, say, to_json)
from nano360.files import read_sealed, write_atomic
from nano360.hf_folders import checkpoint_hash
from nano360.place import DIMS, Place


QUEUE = ("queue", "deferred", "dropped")  # what run.json and every state.json say of the chunks
SPEED = ("tok_per_s", "mfu", "memory")  # keys of a line that depend on the clock, as all time_* do
SPIKE, WINDOW = 6.0, 128  # a spike lies so many robust deviations above so many losses before it


# ---- run.json ------------------------------------------------------------------------------------

def git_state() -> dict:
    """The commit of this code and whether anything was changed since; nulls without git."""
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words],
                                  capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "clean": None if changed is None else not changed}


def portable(value: object) -> object:
    """Absolute paths cut down to their names: a run's folder is publishable as it is."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    if isinstance(value, str):
        key, equals, word = value.partition("=") if value.startswith("--") else ("", "", value)
        return key + equals + Path(word).name if Path(word).is_absolute() else value
    return value


def read_run(config: Config, manifest: dict, out: Path) -> dict:
    """The run.json of a run's folder, or a new one. Raises Stop if it is another run's."""
    path, mine = out / "run.json", portable(to_json(config))
    # What the rows were made from is what their manifest says, whatever the run file says now.
    made = {"canaries": 0} | manifest["recipe"]  # which names none where none are planted
    mine["data"] |= {k: made[k] for k in made.keys() & mine["data"].keys() - {"seed", "sources"}}
    licences = {one["origin"]: one["licence"] for one in manifest["sources"]}
    mine["data"]["sources"] = [{"path": one["origin"], "licence": licences[one["origin"]]} | {
        k: v for k, v in one.items() if k not in ("origin", "revision")} for one in made["sources"]]
    if not path.is_file():
        return {"config": mine, "data_hash": manifest["data_hash"], "parent": None, "launches": []}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        theirs = to_json(from_json(record["config"]))  # a key that is newer has its default
    except (ValueError, KeyError, TypeError, AttributeError, Stop) as error:
        raise Stop(CHECKPOINT, f"{path} is broken ({error}); mend it or give --run=NAME") from error
    free = {f.name: f.metadata["free"] for c in SECTIONS.values() for f in dataclasses.fields(c)}
    was, now = ({k: v for section in sections.values() for k, v in section.items()}
                for sections in (theirs, to_json(from_json(mine))))
    if differ := [k for k in now if was[k] != now[k] and not free[k]]:
        rows = "\n".join(f"  {k:<18} {was[k]!s:<24} {now[k]!s}" for k in differ)
        raise Stop(USAGE, f"{out} is another run: give --run=NAME for a new one\n"
                   f"  {'key':<18} {'the run has':<24} now\n{rows}")
    if record["data_hash"] != manifest["data_hash"]:
        raise Stop(DATA, f"data/{config.data.dataset} is not what {out} was trained on: data hash "
                   f"{manifest['data_hash']}, the run has {record['data_hash']}; give --run=NAME, "
                   "and --init_from=CKPT to begin with this run's weights")
    return record | {"config": mine}


def parent_of(config: Config) -> dict | None:
    """The checkpoint of init_from: the sha256 of its weights, and how far it was trained."""
    if config.train.init_from is None:
        return None
    folder, known = Path(config.train.init_from), {}
    if (folder / "state.json").exists():
        known = read_sealed(folder / "state.json", CHECKPOINT)
    return {"checkpoint": portable(str(folder)), "sha256": checkpoint_hash(folder)} | {
        k: known.get(k) for k in ("step", "updates", "tokens")}


def exact_facts(config: Config, place: Place) -> dict:
    """What changes the order of additions, and so the last bits of all that follows."""
    on_cpu = place.device.type == "cpu"  # elsewhere the CPU only hands work over
    return {"world": place.world, "hardware": hardware(place.device), "compile": place.compile,
            "dtype": str(place.dtype).removeprefix("torch."), "torch": torch.__version__,
            "micro_batch_size": config.optim.micro_batch_size,
            "recompute": config.train.recompute, "pp_stages": config.train.pp_stages,
            "mesh": [place.size(dim) for dim in DIMS],
            "threads": torch.get_num_threads() if on_cpu else None,
            # the instructions that torch chose for this CPU: AVX512, AVX2, DEFAULT
            "cpu_capability": torch.backends.cpu.get_cpu_capability() if on_cpu else None}


def differing(was: dict, now: dict) -> list[str]:
    """The facts in which two launches differ. An older run.json lacks those that are newer: what
    is not known is not called different."""
    return [k for k in was if k in now and was[k] != now[k]]


def say_inexact(was: dict, now: dict) -> None:
    """Say in what this launch differs from another one."""
    for k in differing(was, now):
        say(f"{k} was {was[k]}, is {now[k]}: no longer bit-exact")


def write_run(record: dict, out: Path, exact: dict, argv: list[str], step: int,
              resume: tuple[Path, dict] | None) -> None:
    """Add this launch to run.json and find out, before the first step, that it can be written."""
    if record["launches"]:
        say_inexact(record["launches"][-1]["exact"], exact)
    record["launches"].append({
        "from_step": step, "command": portable(argv), "git": git_state(), "exact": exact,
        "versions": {"python": platform.python_version(), "numpy": np.__version__}})
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_run(record, out)
        mend(out / "incidents.jsonl")
        if resume:
            append(out / "incidents.jsonl", [{
                "kind": "restart", "launch": len(record["launches"]) - 1, "step": step,
                "from": resume[0].name}])
    except OSError as error:
        raise Stop(CHECKPOINT, f"cannot write to {out}: {error.strerror}; checkpoints need a "
                   "folder there: free the name or give --run=NAME") from error


def save_run(record: dict, out: Path) -> None:
    write_atomic(out / "run.json", json.dumps(record, indent=1) + "\n")


def trained_on(checkpoint: Path) -> tuple[Path, str]:
    """The data set of the run that a checkpoint lies in, and its hash. Raises Stop(DATA)."""
    try:
        text = (checkpoint.resolve().parent / "run.json").read_text(encoding="utf-8")
        content = json.loads(text)
        return Path("data", content["config"]["data"]["dataset"]), content["data_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(DATA, f"no run.json that names a data set beside {checkpoint} ({error!r}): "
                   "`valid` scores the held-out rows of a run's own data; give a checkpoint in "
                   "out/<run>/") from error


# ---- lines ---------------------------------------------------------------------------------------

def append(path: Path, lines: list[dict]) -> None:
    """Add lines to a .jsonl in one write; a killed run keeps them. Raises Stop(CHECKPOINT)."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise Stop(CHECKPOINT, f"{path} could not be written: {error.strerror}; mend it and type "
                   "the same command, it goes on from there") from error


def check_output(path: Path, begins: bytes) -> None:
    """Refuse to write a result over anything but one like it. Raises Stop(USAGE)."""
    there = b""
    if path.is_file():
        with open(path, "rb") as file:
            there = file.read(len(begins))
    if there not in (b"", begins) or not path.absolute().parent.is_dir() or (
            path.exists() and not path.is_file()):
        raise Stop(USAGE, f"--output={path} is there and something else, or in a folder that does "
                   "not exist; give a file, such as scores.json")


def mend(path: Path) -> None:
    """Forget a last line that a kill or a full disk cut short."""
    path.touch()
    content = path.read_bytes()
    if rest := len(content) - (content.rfind(b"\n") + 1):
        write_atomic(path, content[:-rest].decode())


def truncate_metrics(path: Path, step: int, per_visit: int, validated: bool) -> None:
    """Forget the lines after a step. Of held-out lines, those of the step itself stay if they are
    all there, and of earlier ones those at the end of a visit: where a run was stopped inside one,
    a run that nobody disturbed has none."""
    mend(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        kept = [text for text in lines for line in [json.loads(text)] if line["step"] <= step
                and (line["kind"] != "valid" or (
                    validated if line["step"] == step else line["step"] % per_visit == 0))]
    except (ValueError, KeyError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{path} holds a line that is none of ours: {error!r}; mend it or "
                   "move it away") from error
    if len(kept) < len(lines):
        write_atomic(path, "".join(kept))


def steady(line: dict) -> dict:
    """A line of metrics but for how fast it went: a run that nobody disturbed has the same one."""
    return {k: v for k, v in line.items() if k not in SPEED and not k.startswith("time_")}


def lines_hash(lines: list[dict]) -> str:
    """The sha256 of lines of metrics, without how fast it went."""
    text = "".join(f"{json.dumps(steady(line), sort_keys=True)}\n" for line in lines)
    return hashlib.sha256(text.encode()).hexdigest()


def metrics_hash(path: Path, visit: int, per_visit: int) -> str:
    """The sha256 of what metrics.jsonl says of a visit's steps so far, and of the held-out rows
    before it."""
    found, text = [], path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        if f'"visit": {visit},' not in line and f'"visit": {visit - 1},' not in line:
            continue  # 274,320 of Amber's are not parsed 360 times
        one = json.loads(line)
        if (one["kind"], one["visit"]) == ("train", visit) or (
                one["kind"], one["step"]) == ("valid", visit * per_visit):
            found.append(one)
    return lines_hash(found)


def is_validated(out: Path, manifest: dict, step: int) -> bool:
    """Whether the held-out lines of a step were logged; a kill may come between save and them."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = text[:text.rfind("\n") + 1]  # without a line that was cut short
    sources = [source["name"] for source in manifest["sources"] if source["valid_rows"]]
    return text.count(f'"kind": "valid", "step": {step},') == len(sources)


def recent_losses(path: Path, n: int) -> list[float]:
    """The last n losses in metrics.jsonl, of steps that were taken."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = (json.loads(line)["loss"] for line in reversed(lines) if '"kind": "train"' in line)
    return [*islice((loss for loss in found if loss is not None), n)][::-1]


@dataclass(frozen=True)
class Journal:
    """Where a run's lines go; of all ranks, only the first one's has a folder."""
    out: Path | None
    launch: int
    send: Callable[[dict], None] | None = None  # wandb or tensorboard, too
    close: Callable[[], None] = lambda: None  # of these: what they hold back is written

    def metrics(self, lines: list[dict]) -> None:
        """Lines for metrics.jsonl."""
        if self.out:
            append(self.out / "metrics.jsonl", lines)
        for line in lines if self.send else ():
            self.send(line)

    def incident(self, kind: str, facts: dict) -> None:
        """A line for incidents.jsonl. A run that goes on from before it may write it again: its
        launch, a place in run.json, tells the two apart."""
        if self.out:
            append(self.out / "incidents.jsonl", [{"kind": kind, "launch": self.launch} | facts])


def open_journal(config: Config, record: dict, out: Path, place: Place, first: int) -> Journal:
    """The journal of this launch, from its first step on."""
    launch = len(record["launches"]) - 1
    if place.rank:
        return Journal(None, launch)
    return Journal(out, launch, *open_log(config, record, first))


def open_log(config: Config, record: dict, first: int) -> tuple[Callable, ...]:
    """What sends a line of metrics where --log_to says, and what ends that; none of them: ().

    To logs/, outside the run's folder, since both write the machine's name; nothing leaves the
    machine until `wandb sync`.
    """
    kind, folder = config.train.log_to, Path("logs") / config.train.run
    if kind == "none":
        return ()
    try:
        if kind == "wandb":
            import wandb
            folder.mkdir(parents=True, exist_ok=True)
            one = wandb.init(project="nano360", name=config.train.run, dir=str(folder),
                             mode="offline", config=record["config"])
        else:
            from torch.utils.tensorboard import SummaryWriter
            one = SummaryWriter(str(folder), purge_step=first)
    except ImportError as error:
        raise Stop(ENVIRONMENT, f"--log_to={kind} needs a package that is not here: pip install "
                   f"{kind}; metrics.jsonl has every number without it") from error

    def send(line: dict) -> None:
        prefix = f"valid/{line['source']}/" if line["kind"] == "valid" else "train/"
        values = {prefix + k: v for k, v in line.items() if isinstance(v, float | int)
                  and k not in ("step", "visit", "chunk")}
        if kind == "wandb":
            one.log(values, step=line["step"])
        else:
            for name, value in values.items():
                one.add_scalar(name, value, line["step"])
    return send, one.finish if kind == "wandb" else one.close


# ---- incidents: steps that are not taken, losses that stand out ----------------------------------

def judge(config: Config, state: dict, step: int, visit: int) -> str:
    """What becomes of a step whose loss or gradient is no number: skip, defer, drop or stop."""
    if config.train.on_nonfinite == "defer":
        return "drop" if state["queue"][visit] in state["deferred"] else "defer"
    in_a_row = 1
    while step - in_a_row in state["skipped"]:
        in_a_row += 1
    # A first step that fails is not the data's fault: nothing would be left to skip to.
    give_up = config.train.on_nonfinite == "stop" or in_a_row >= config.train.max_skips or step == 1
    return "stop" if give_up else "skip"


def without(state: dict, visit: int, action: str) -> dict:
    """The queue after the chunk of a visit was deferred or dropped."""
    queue, deferred, dropped = (list(state[k]) for k in QUEUE)
    chunk = queue.pop(visit)
    if action == "drop":
        return dict(queue=queue, deferred=deferred, dropped=[*dropped, chunk])
    return dict(queue=[*queue, chunk], deferred=[*deferred, chunk], dropped=dropped)


def failed(journal: Journal, where: dict, action: str, lr: float, place: Place, losses: np.ndarray,
           norms: np.ndarray, rows: list[int]) -> None:
    """Write down and say that a step is not taken. Raises Stop if the run ends with it."""
    dtype = str(place.dtype).removeprefix("torch.")
    journal.incident("nonfinite", where | {
        "action": action, "lr": lr, "dtype": dtype, "loss": [str(x) for x in losses],
        "grad_norm": [str(x) for x in norms], "rows": rows, "documents": None})
    what = (f"step {where['step']}: loss {losses.mean()}, gradient norm {norms.max()}, chunk "
            f"{where['chunk']}, rows {str(rows[:8])[1:-1]}; see incidents.jsonl")
    if action == "stop":
        raise Stop(NUMERICAL, f"{what}; lr is {lr:g}, dtype {dtype}; the last checkpoint stays: "
                   "try a smaller --lr, more --warmup_steps or --dtype=float32")
    say(f"{what}; " + {"skip": "the step is skipped",
                       "defer": "the chunk is put off to the end of the queue",
                       "drop": "the chunk is dropped: it has failed twice"}[action])


def spike(recent: deque, loss: float) -> float:
    """How many robust deviations a loss lies above those before it; 0 while they are few."""
    if len(recent) < WINDOW // 2:
        return 0.0
    middle = statistics.median(recent)
    # 1.4826 medians of the distance are one standard deviation of normal values
    deviation = 1.4826 * statistics.median(abs(one - middle) for one in recent)
    return (loss - middle) / max(deviation, 1e-3 * abs(middle), 1e-12)
