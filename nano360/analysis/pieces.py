"""The pieces of a run that may be damaged or tampered with: each is read as far as it can be.

    run, states, wrong = look(Path("out/demo"))     # run.json, the manifest, every state.json
    log = read_log(run)                             # metrics.jsonl
    files_wrong(folder, {"model.safetensors": sha256})

Nothing here ends with the first thing that is wrong: that becomes a line, which names the file.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nano360.analysis.runs import Run, read_record
from nano360.checkpoints import checkpoints_of
from nano360.config import CHECKPOINT, DATA, USAGE, Config, Stop
from nano360.files import read_sealed, sha256_file
from nano360.records import steady
from nano360.rows import open_rows
from train import Plan, make_plan

# What reading a file that was tampered with can raise.
BROKEN = (Stop, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
          RecursionError, MemoryError)
LONGEST, LARGEST = 10**7, 10**8  # visits, rows of a chunk: more is a number tampered with
READ = (".safetensors", ".bin", ".json", ".model", ".tiktoken", ".py")  # what readers look for


# ---- how it is told ------------------------------------------------------------------------------

def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:87]}..."


def named(where: Path, error: Exception) -> str:
    """An error in a line that names a file."""
    ours = isinstance(error, Stop) or getattr(error, "filename", None)
    return "; ".join(str(error).splitlines()) if ours else f"{where} is broken: {short(error)}"


def collect(where: Path, check: Callable, *args: object) -> list[str]:
    """The lines of a check of a file; if it cannot go on, the last one says on what it broke."""
    found = []
    try:
        for line in check(*args) or ():
            found.append(line)
    except BROKEN as error:
        found.append(named(where, error))
    return found


def differs(where: object, name: str, given: object, should: object) -> Iterator[str]:
    """Nothing if two values are one; else a line, for lists with the first place that differs."""
    if given == should:
        return
    if isinstance(given, list) and isinstance(should, list):
        at = next((i for i, pair in enumerate(zip(given, should, strict=False))
                   if pair[0] != pair[1]), min(len(given), len(should)))
        name, given, should = f"{name}[{at}:]", given[at:], should[at:]
    yield f"{where}: {name} is {short(given)}, expected {short(should)}"


# ---- what there is -------------------------------------------------------------------------------

def load(path: Path, code: int) -> tuple[dict, list[str]]:
    """A sealed file, and what is wrong with it: without its seal it is still read, if it can be."""
    try:
        return dict(read_sealed(path, code)), []
    except BROKEN as error:
        wrong = [named(path, error)]
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))), wrong
    except BROKEN:
        return {}, wrong


def queue_of(plan: Plan, deferred: list, dropped: list) -> list[list[int]]:
    """A whole queue after chunks were put off to its end, and others dropped."""
    queue = list(plan.queue)
    for chunk in deferred:
        queue.remove(chunk)
        queue.append(chunk)
    return [chunk for chunk in queue if chunk not in dropped]


def plan_of(config: Config, manifest: dict, record: dict) -> Plan:
    """The plan of a run, with the queue that follows from what was deferred and dropped."""
    if config.optim.epochs * config.data.n_chunks > LONGEST:
        raise ValueError(f"{config.optim.epochs} epochs of {config.data.n_chunks} chunks")
    if manifest["rows_per_chunk"] > LARGEST:
        raise ValueError(f"{short(manifest['rows_per_chunk'])} rows a chunk")
    whole = make_plan(config, manifest)
    if type(whole.steps_per_visit) is not int or whole.steps_per_visit < 1:
        raise ValueError(f"a visit of {whole.steps_per_visit} steps")
    return make_plan(config, manifest, queue_of(whole, record["deferred"], record["dropped"]))


def look(folder: Path) -> tuple[Run, dict[Path, dict], dict[Path, list[str]]]:
    """A run, as far as it can be read; the state in each of its checkpoints; and what is wrong with
    run.json, the manifest and each state.json."""
    config, record, plan, path, wrong = None, {}, None, folder / "run.json", {}
    try:
        config, record = read_record(folder)
    except BROKEN as error:
        if isinstance(error, Stop) and error.code == USAGE and not path.is_file():
            raise
        wrong[path] = [named(path, error)]
    data = Path("data") / (config.data.dataset if config else "")
    manifest, wrong[data] = load(data / "manifest.json", DATA) if config else ({}, [])
    have, states = checkpoints_of(folder), {}
    last = next(filter(Path.is_dir, (folder / "last", folder / "last.old")), None)
    for one in [*have.values(), *filter(None, [last])]:
        states[one], wrong[one] = load(one / "state.json", CHECKPOINT)
    if config:
        try:
            plan = plan_of(config, manifest, record)
        except BROKEN as error:
            n = manifest.get("rows_per_chunk")
            at = path if type(n) is int and n <= LARGEST else data
            wrong.setdefault(at, []).append(
                f"{path} and {data / 'manifest.json'} give no queue, so neither order nor metrics "
                f"were checked: {short(error)}")
    mine = [visit for visit in have if plan and visit < len(plan.queue)]
    step, newest = ((mine[-1] + 1) * plan.steps_per_visit, states[have[mine[-1]]]) if mine else (
        0, {})
    inside = states[last].get("step") if last else None
    if plan and type(inside) is int and step < inside < step + plan.steps_per_visit:
        step, newest = inside, states[last]
    skipped = newest.get("skipped")
    skipped = frozenset(one for one in (skipped if isinstance(skipped, list) else [])
                        if type(one) is int and 0 < one <= step)
    return Run(folder, have, data, manifest, config, record, plan, step, skipped), states, wrong


@dataclass(frozen=True)
class Log:
    """metrics.jsonl, taken apart; a line without what a clock says, and with its number."""
    path: Path
    train: dict[int, list[tuple[int, dict]]]  # by visit, up to the newest checkpoint's step
    sealed: dict[int, list[dict]]  # what metrics_sha256 of a visit covers
    order: dict[int, list[str]]  # by visit: steps that come twice, or late
    tail: set[int]  # steps after the newest checkpoint's
    broken: list[str]


def read_log(run: Run) -> Log:
    """metrics.jsonl of a run. A last line that a kill cut short is not there, as for train.py."""
    path, per, before = run.folder / "metrics.jsonl", run.plan.steps_per_visit, 0
    log = Log(path, defaultdict(list), defaultdict(list), defaultdict(list), set(), [])
    content = path.read_bytes() if path.is_file() else b""
    for n, text in enumerate(content.split(b"\n")[:-1], 1):
        try:
            line = steady(json.loads(text.decode()))
            kind, step, visit = line["kind"], line["step"], line["visit"]
            if (kind not in ("train", "valid") or type(step) is not int or type(visit) is not int
                    or not 1 <= step <= per * len(run.plan.queue)):
                raise ValueError(f"kind {kind}, step {step}, visit {visit}")
        except BROKEN as error:
            log.broken.append(f"{path} line {n} is none of this run's: {short(error)}")
            continue
        if kind == "train" or step % per == 0:
            log.sealed[visit if kind == "train" else step // per].append(line)
        if kind == "train" and step > run.step:
            log.tail.add(step)
        elif kind == "train":
            log.train[run.plan.visit_of(step)].append((n, line))
            if step <= before:
                log.order[run.plan.visit_of(step)].append(
                    f"{path} line {n}: step {step} comes after step {before}, expected each once")
            before = step
    return log


# ---- files ---------------------------------------------------------------------------------------

def file_wrong(folder: Path, name: str, should: object, manifest: dict | None) -> Iterator[str]:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"{folder} is said to have a file {short(name)}, which is not in it"
    elif not path.is_file():
        yield f"{path} is missing"
    elif manifest and name.endswith(".bin"):
        open_rows(folder, manifest, name)
    elif (digest := sha256_file(path)) != should:
        yield f"{path} was changed: its sha256 is {digest}, expected {short(should)}"


def files_wrong(folder: Path, files: dict[str, object], manifest: dict | None = None) -> list[str]:
    """Files of a checkpoint, or of the data set of a manifest, against their sha256."""
    with ThreadPoolExecutor() as pool:  # hashing lets the other threads run
        found = pool.map(lambda name: collect(folder / name, file_wrong, folder, name, files[name],
                                              manifest), files)
        return sum(tqdm(found, desc=f"{folder}", total=len(files), disable=None, leave=False), [])


def checkpoint_files(folder: Path, state: dict) -> Iterator[str]:
    """The files of a checkpoint against its state.json; none that a reader looks for is more."""
    bare, path = not (folder / "optimizer").is_dir(), folder / "state.json"
    for one in sorted(folder.rglob("*")):
        if one.name.endswith(READ) and one != path and (
                one.relative_to(folder).as_posix() not in state["files"]):
            yield f"{one} is none of the files that {path} names"
    yield from files_wrong(folder, {name: should for name, should in state["files"].items()
                                    if not (bare and name.startswith("optimizer/"))})
