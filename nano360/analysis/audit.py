"""A whole run against what it says of itself: data, order, metrics, checkpoints, parents.

    python analyze.py replay out/demo --verify

Nothing is trained and nothing is written. Every file that the data's manifest or a state.json lists
is hashed, every line of metrics.jsonl is held to the order of its rows, and every checkpoint to the
one before it. All that is wrong is told at once: one bad file hides no other.

What it cannot see: the last checkpoint has no successor that names its state.json. If its weights
and its seal were both changed, only replay without --verify finds it, which trains again. Lines of
metrics.jsonl after the last checkpoint have no seal, nor has any of a run from before state.json
had metrics_sha256. Of a data set the checkpoints hold recipe, tokenizer and chunks; held-out rows
and provenance are held by the manifest alone. And who makes all seals anew, from one place to the
end, leaves nothing to compare with.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path

from nano360.analysis.pieces import (BROKEN, Log, checkpoint_files, collect, differs, files_wrong,
                                     look, queue_of, read_log, short)
from nano360.analysis.runs import Run
from nano360.checkpoints import FORMAT, check_shape
from nano360.config import CHECKPOINT, DATA, Stop, columns, say
from nano360.files import is_locked, sha256_file
from nano360.hf_folders import checkpoint_hash, verify
from nano360.records import lines_hash
from nano360.rows import FORMAT as DATA_FORMAT, chunk_name, data_hash
from train import check, lr_at, make_plan

COLUMNS = ("rows", "metrics", "files", "parent")
MOST = 4  # lines that are named, of those that are wrong in one column of one visit
Cell = tuple[list[str], str]  # what is wrong, and the word of the table if it is nothing


# ---- the data ------------------------------------------------------------------------------------

def facts_wrong(run: Run) -> Iterator[str]:
    """The manifest against its own recipe, and the run against the manifest."""
    path, m = run.data / "manifest.json", run.manifest
    spec = m["tokenizer"]
    yield from differs(path, "format", m["format"], DATA_FORMAT)
    yield from differs(path, "data_hash", m["data_hash"], data_hash(m["recipe"], spec["sha256"]))
    yield from differs(run.folder / "run.json", "data_hash", run.record["data_hash"],
                       m["data_hash"])
    yield from differs(path, f"sha256 of {spec['file']}", m["files"][spec["file"]]["sha256"],
                       spec["sha256"])
    for name in filter(lambda name: name.startswith("train_"), m["files"]):
        yield from differs(path, f"rows of {name}", m["files"][name]["rows"], m["rows_per_chunk"])


def data_cell(run: Run) -> Cell:
    """The data set: its manifest, and every file that it lists."""
    path, gone, wrong = run.data / "manifest.json", [], []

    def listed() -> list[str]:
        files, release = run.manifest["files"], run.manifest["recipe"]["sources"][0]["rows"]
        gone.extend(name for name in files if release and name.startswith("train_")
                    and not (run.data / name).exists())  # made, trained, and removed for the room
        return files_wrong(run.data, {name: files[name]["sha256"] for name in files
                                      if name not in gone}, run.manifest)
    if run.manifest:
        wrong = collect(path, facts_wrong, run) + collect(path, listed)
    if run.plan:
        wrong += collect(path, check, run.config, run.manifest)
    return wrong, f"ok; chunks that were made and let go: {len(gone)}" if gone else "ok"


# ---- one visit -----------------------------------------------------------------------------------

def rows_wrong(run: Run, log: Log, visit: int) -> Iterator[str]:
    """The lines of a visit against the order of (seed, epoch, chunk)."""
    chunk, per, B = run.plan.queue[visit][1], run.plan.steps_per_visit, run.config.optim.batch_size
    order = run.order(visit).astype("<i8")
    for n, line in log.train[visit]:
        at = (line["step"] - 1) % per * B
        rows = hashlib.sha256(order[at:at + B].tobytes()).hexdigest()[:16]
        for name, should in (("visit", visit), ("chunk", chunk), ("rows", rows)):
            yield from differs(f"{log.path} line {n}, step {line['step']}", name, line.get(name),
                               should)


def steps_wrong(run: Run, log: Log, visit: int) -> Iterator[str]:
    """The lines of a visit against the steps that it has: each once, its rate and its tokens."""
    per, optim, skipped = run.plan.steps_per_visit, run.config.optim, sorted(run.skipped)
    yield from log.order[visit]
    before, last = visit * per, min((visit + 1) * per, run.step)
    for step in [*sorted({line["step"] for _, line in log.train[visit]}), last + 1]:
        if step > before + 1:
            yield f"{log.path}: no line of steps {before + 1} to {step - 1}, visit {visit}"
        before = step
    for n, line in log.train[visit]:
        step, where = line["step"], f"{log.path} line {n}, step {line['step']}"
        taken, lr = step - bisect_right(skipped, step), lr_at(step, optim, run.plan.last)
        yield from differs(where, "tokens", line["tokens"],
                           taken * optim.batch_size * run.config.model.seq_len)
        if not math.isclose(line["lr"], lr, rel_tol=1e-12):  # another libm may round otherwise
            yield from differs(where, "lr", line["lr"], lr)
        for name in ("loss", "grad_norm"):
            if (line[name] is None) != (step in run.skipped):
                should = "null, it was skipped" if step in run.skipped else "a number"
                yield f"{where}: {name} is {short(line[name])}, expected {should}"


def state_wrong(run: Run, folder: Path, state: dict, visit: int, step: int) -> Iterator[str]:
    """Where a state.json says that the run stood, against run.json and the queue."""
    whole, record, optim = make_plan(run.config, run.manifest), run.record, run.config.optim
    skipped = [one for one in sorted(run.skipped) if one <= step]
    taken, begun = step - len(skipped), 0
    if run.config.train.init_optimizer:
        begun = record["parent"]["updates"]
    for name, should in {
            "format": FORMAT, "visit": visit, "step": step, "epoch": run.plan.queue[visit][0],
            "chunk": run.plan.queue[visit][1], "seed": run.config.data.seed,
            "data_hash": record["data_hash"], "skipped": skipped, "updates": begun + taken,
            "tokens": taken * optim.batch_size * run.config.model.seq_len,
            "consumed": run.plan.queue[:step // run.plan.steps_per_visit],
            "deferred": record["deferred"][:len(state["deferred"])],
            "dropped": record["dropped"][:len(state["dropped"])],
            "queue": queue_of(whole, state["deferred"], state["dropped"])}.items():
        yield from differs(folder / "state.json", name, state.get(name), should)


def seal_wrong(run: Run, log: Log, folder: Path, state: dict, visit: int) -> tuple[Cell, Cell]:
    """The bytes of the chunk, and the lines of metrics, that a checkpoint says it came with."""
    path, cells, name = folder / "state.json", [], chunk_name(run.plan.queue[visit][1])
    lines = [line for line in log.sealed[visit] if line["step"] <= run.step]
    if folder.name.startswith("last"):
        lines = [line for line in lines if line["step"] <= state.get("step", 0)]
    for key, what, should in (
            ("chunk_sha256", f"that of {name} in {run.data / 'manifest.json'}",
             lambda: run.manifest["files"].get(name, {}).get("sha256")),
            ("metrics_sha256", f"that of visit {visit} in {log.path}", lambda: lines_hash(lines))):
        wrong = []
        if key in state:
            wrong = collect(path, lambda key, should: differs(path, key, state[key], should()),
                            key, should)
        cells.append(([f"{line}, {what}" for line in wrong], "ok" if key in state else
                      "- not sealed"))
    return cells[0], cells[1]


def parent_cell(run: Run, folder: Path, state: dict, visit: int) -> Cell:
    """What a checkpoint says of the one before it; the first, of what the run began with."""
    if visit and not (before := run.checkpoints.get(visit - 1, folder / "none") / "state.json"
                      ).is_file():
        return [], "- not there"

    def check_parent() -> Iterator[str]:
        should = sha256_file(before) if visit else (run.record["parent"] or {}).get("sha256")
        of = before if visit else f"parent of {run.folder / 'run.json'}"
        for line in differs(folder / "state.json", "parent", state["parent"], should):
            yield f"{line}, the sha256 of {of}"
    return collect(folder / "state.json", check_parent), "ok"


def cells_of(run: Run, log: Log | None, visit: int, folder: Path | None, state: dict,
             wrong: list[str]) -> dict[str, Cell]:
    """The columns of a visit; `wrong` is what was the matter with its state.json."""
    cells = dict.fromkeys(COLUMNS, ([], "- not known"))
    if log:
        rows, steps = [([], "- not sealed")] * 2
        if folder and state:
            rows, steps = seal_wrong(run, log, folder, state, visit)
        cells["rows"] = rows[0] + most(log, rows_wrong, run, visit), rows[1]
        cells["metrics"] = steps[0] + most(log, steps_wrong, run, visit), steps[1]
    if folder is None:
        missing = [f"{run.folder / f'ckpt_{visit:03d}'} is missing, though visit {visit} was "
                   "trained to its end (if a kill came there, train.py goes on)"]
        return cells | {"files": (missing, ""), "parent": ([], "- not there")}
    if state:
        wrong = wrong + collect(folder / "state.json", checkpoint_files, folder, state)
        if log:
            wrong += collect(folder / "config.json", check_shape, folder, run.config.model)
            step = (visit + 1) * run.plan.steps_per_visit
            step = state.get("step", 0) if folder.name.startswith("last") else step
            wrong += collect(folder / "state.json", state_wrong, run, folder, state, visit, step)
        cells["parent"] = parent_cell(run, folder, state, visit)
    word = "ok" if (folder / "optimizer").is_dir() else "- thinned"
    return cells | {"files": (wrong, word)}


def most(log: Log, check: Callable, run: Run, visit: int) -> list[str]:
    """The first lines of a check of a visit's metrics, and how many more there are."""
    found = collect(log.path, check, run, log, visit)
    rest = [f"... and {len(found) - MOST:,} lines more in visit {visit}"]
    return found if len(found) <= MOST else found[:MOST] + rest


# ---- the whole -----------------------------------------------------------------------------------

def run_wrong(run: Run, init_from: str | None) -> Iterator[str]:
    """run.json against itself, and against the checkpoint that the run started from."""
    path, parent = run.folder / "run.json", run.record["parent"]
    yield from differs(path, "queue", run.record["queue"], run.plan.queue)
    yield from differs(path, "from_step of its first launch",
                       run.record["launches"][0]["from_step"], 0)
    m, made = run.manifest, {"canaries": 0} | run.manifest["recipe"]  # as read_run() writes it
    true = data_hash(m["recipe"], m["tokenizer"]["sha256"]) == m["data_hash"]
    for name in made.keys() & vars(run.config.data).keys() - {"seed", "sources"} if true else ():
        yield from differs(path, name, getattr(run.config.data, name), made[name])
    if (parent is None) != (run.config.train.init_from is None):
        yield (f"{path}: init_from is {short(run.config.train.init_from)}, its parent is "
               f"{short(parent)}")
    where = Path(init_from or (parent or {}).get("checkpoint", "none"))
    if parent and (init_from or where.is_dir()):
        verify(where)
        yield from differs(path, "sha256 of its parent", parent["sha256"], checkpoint_hash(where))


def incidents_wrong(run: Run, path: Path) -> Iterator[str]:
    """incidents.jsonl: each skipped step is in it, and each restart is a launch of run.json. (A
    kill may come between the two, so a launch without its restart is nothing.)"""
    found, content = set(), path.read_bytes() if path.is_file() else b""
    for n, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = json.loads(text.decode())
            if line["kind"] == "nonfinite":
                found.add((line["step"], line["chunk"]))
            if line["kind"] == "restart":
                yield from differs(f"{path} line {n}", "step", line["step"],
                                   run.record["launches"][line["launch"]]["from_step"])
        except BROKEN as error:
            yield f"{path} line {n} is none of this run's: {short(error)}"
    for step in sorted(run.skipped):
        chunk = run.plan.queue[run.plan.visit_of(step)][1]
        if (step, chunk) not in found:
            yield f"{path}: step {step} of chunk {chunk} was skipped, but has no line nonfinite"


def table(run: Run, rows: dict[str, tuple[int, dict[str, Cell]]]) -> None:
    """Print a line for each visit."""
    lines = [["visit", "chunk", "epoch", "steps", *COLUMNS]]
    for name, (visit, cells) in rows.items():
        per = run.plan.steps_per_visit if run.plan else 0
        last = min((visit + 1) * per, run.step) if name == "last" else (visit + 1) * per
        epoch, chunk = run.plan.queue[visit] if run.plan else (0, 0)
        facts = [f"{chunk:03d}", f"{epoch}", f"{visit * per + 1}-{last}"] if per else ["-"] * 3
        lines.append([name, *facts, *("BAD" if wrong else word for wrong, word in cells.values())])
    for line in columns(lines):
        say(line)


def rows_of(run: Run, log: Log | None, states: dict[Path, dict], wrong: dict[Path, list[str]]
            ) -> dict[str, tuple[int, dict[str, Cell]]]:
    """A line of the table for each visit that is finished, and for last/ inside one."""
    rows, have, per = {}, run.checkpoints, run.plan.steps_per_visit if run.plan else 0
    n = run.step // per if per else max(have, default=-1) + 1
    while per and sum(run.plan.visit_of(step) == n for step in log.tail) == per and not (
            run.folder / f"ckpt_{n:03d}.part").is_dir():  # a save that was killed is no loss
        n += 1
    for visit in range(n):
        if visit in have or per:
            folder = have.get(visit)
            rows[f"{visit}"] = visit, cells_of(run, log, visit, folder, states.get(folder, {}),
                                               wrong.get(folder, []))
    for folder in states.keys() - {*have.values()}:
        step = states[folder].get("step")
        if not per:
            wrong[folder] += collect(folder, checkpoint_files, folder, states[folder])
        elif type(step) is int and 0 < step < per * len(run.plan.queue) and step % per:
            visit = run.plan.visit_of(step)
            rows["last"] = visit, cells_of(run, log, visit, folder, states[folder], wrong[folder])
        else:
            wrong[folder].append(f"{folder / 'state.json'}: step {short(step)} is inside no visit")
    return rows


def audit(folder: Path, init_from: str | None) -> None:
    """Check a run and print what was found. Raises Stop if anything is wrong: DATA if it is the
    data set alone. `init_from`: where the checkpoint lies now that the run started from."""
    if is_locked(folder):
        say(f"{folder} is being trained: what is newest may change under the check")
    run, states, wrong = look(folder)
    more, word = data_cell(run)
    data_wrong, log, own = wrong.pop(run.data) + more, read_log(run) if run.plan else None, []
    if log:
        own += collect(folder / "run.json", run_wrong, run, init_from) + log.broken
        path = folder / "incidents.jsonl"
        own += collect(path, incidents_wrong, run, path)
        own += [f"{one} is of no visit: the queue has {len(run.plan.queue)}" for visit, one in
                run.checkpoints.items() if visit >= len(run.plan.queue)]
    rows = rows_of(run, log, states, wrong)
    say(f"{run.data}: {'BAD' if data_wrong else word}")
    table(run, rows)
    for name in ("thinned", "not sealed"):
        if found := [one for one, (_, cells) in rows.items() for _, word in cells.values()
                     if word == f"- {name}"]:
            say(f"{name}: {', '.join(dict.fromkeys(found))}")
    if log and log.tail:
        say(f"not checked: steps {run.step + 1} to {max(log.tail)}, which no checkpoint has yet; a "
            "run that goes on trains them again")
    own += [line for folder in wrong for line in wrong[folder]]
    own += [line for _, cells in rows.values() for found, _ in cells.values() for line in found]
    every = list(dict.fromkeys(data_wrong + own))
    for line in every:
        say(line)
    if every:
        things = "1 thing is" if len(every) == 1 else f"{len(every):,} things are"
        raise Stop(CHECKPOINT if own else DATA, f"{folder}: {things} wrong: {every[0]}")
    parents = sum(cells["parent"][1] == "ok" for _, cells in rows.values())
    say(f"{folder}: nothing is wrong: {run.config.data.n_chunks} chunks, {run.step:,} steps, "
        f"{len(run.checkpoints)} checkpoints{' and last/' * ('last' in rows)}, {parents} parents")
