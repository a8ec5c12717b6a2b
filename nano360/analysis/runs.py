"""A run as it lies on the disk, for those who look at it afterwards.

    run = open_run("out/demo")                        # or one of its checkpoints, out/demo/ckpt_003
    run = open_run("out/amber_7b", "data/amber_7b")   # a release: checkpoints without a run.json
    run.steps(3, np.array([17, 18]))                  # when visit 3 trained these rows

Reads run.json, the newest state.json and the manifest of the data, and checks that they belong to
each other.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano360.analysis.canaries import FILE as CANARIES
from nano360.checkpoints import checkpoints_of
from nano360.config import CHECKPOINT, DATA, USAGE, Config, Stop, from_json
from nano360.files import read_sealed, sha256_file
from nano360.rows import permutation, read_manifest
from train import Plan, make_plan


@dataclass(frozen=True)
class Run:
    """What is known of a run, or of a release, which is checkpoints alone."""
    folder: Path
    checkpoints: dict[int | None, Path]  # by visit; or one, None: its name is no ckpt_<visit>
    data: Path
    manifest: dict | None  # None: the data set is not here
    config: Config | None  # config, record and plan are None for a release
    record: dict | None  # run.json
    plan: Plan | None
    step: int  # steps trained so far; 0 for a release
    skipped: frozenset[int]  # steps that were not taken

    def visits(self, chunk: int) -> list[int]:
        """The visits that train a chunk; a release trained chunk k in visit k."""
        return [chunk] if self.plan is None else [
            v for v, (_, one) in enumerate(self.plan.queue) if one == chunk]

    def order(self, visit: int) -> np.ndarray:
        """The rows of a visit's chunk, in the order in which they are trained."""
        epoch, chunk = self.plan.queue[visit]
        return permutation(self.manifest["rows_per_chunk"], self.config.data.seed, epoch, chunk)

    def steps(self, visit: int, rows: np.ndarray) -> np.ndarray:
        """The step at which a visit trains each of these rows of its chunk; 0 for the last ones,
        which are too few for a batch and left out."""
        epoch, chunk = self.plan.queue[visit]
        at = places(self.manifest["rows_per_chunk"], self.config.data.seed, epoch, chunk)[rows]
        batch = at // self.config.optim.batch_size
        return np.where(batch < self.plan.steps_per_visit,
                        visit * self.plan.steps_per_visit + batch + 1, 0)

    def seen(self, visit: int | None, chunk: int | None, rows: np.ndarray) -> list[int | None]:
        """How often each of these rows of a chunk was trained on by the end of a visit; None where
        that is not known: of a release it is known by chunk."""
        if None in (visit, chunk):
            return [None] * len(rows)
        times = np.zeros(len(rows), np.int64)
        for one in self.visits(chunk):
            if one <= visit and self.plan is None:
                times += 1
            elif one <= visit:
                steps = self.steps(one, rows)
                times += (steps > 0) & ~np.isin(steps, [*self.skipped])
        return times.tolist()


@functools.lru_cache(maxsize=16)
def places(n: int, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """Where each of n rows stands in the order of a visit: permutation(), the other way round."""
    found = np.empty(n, np.int64)
    found[permutation(n, seed, epoch, chunk)] = np.arange(n)
    return found


def read_record(folder: Path) -> tuple[Config, dict]:
    """The config and the run.json of a run. Raises Stop."""
    path = folder / "run.json"
    if not path.is_file():
        raise Stop(USAGE, f"{folder} is no run: {path} is missing; expected a folder such as "
                   "out/demo")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["launches"][0]["exact"], record["data_hash"]  # raises
        return from_json(record["config"]), record
    except (ValueError, LookupError, TypeError, AttributeError, Stop) as error:
        raise Stop(CHECKPOINT, f"{path} is broken: {error}") from error


def newest_state(folder: Path) -> dict:
    """The state.json with the most steps in a run's folder; empty if there is none yet."""
    states = [read_sealed(path, CHECKPOINT) for one in ("last", "ckpt_*")
              for path in folder.glob(f"{one}/state.json")]
    return max(states, key=lambda state: state["step"], default={})


def read_data(folder: Path) -> dict:
    """The manifest of a data set. What stands in canaries.json is taken as it is, so it is compared
    with the manifest's hash here. Raises Stop(DATA)."""
    manifest, path = read_manifest(folder), folder / CANARIES
    entry = manifest["files"].get(CANARIES)
    if entry and (not path.is_file() or sha256_file(path) != entry["sha256"]):
        raise Stop(DATA, f"{path} is missing or was changed; prepare the set again")
    return manifest


def open_run(word: str, data: str | None = None) -> Run:
    """A run by its folder or that of one checkpoint. Of a release, or of any folder from Hugging
    Face, the data set is `data`, or the one of its name. Raises Stop."""
    folder = Path(word)
    single = (folder / "config.json").is_file()
    checkpoints = checkpoints_of(folder)
    if single:
        visit = re.fullmatch("ckpt_([0-9]+)", folder.name)
        checkpoints = {int(visit[1]) if visit else None: folder}
        folder = folder.parent if visit else folder
    if not (folder / "run.json").is_file():
        if not checkpoints:
            raise Stop(USAGE, f"{folder} is no run: it has no run.json and no ckpt_000, ckpt_001, "
                       "...; expected a folder such as out/demo")
        where = Path(data) if data else Path("data") / folder.resolve().name
        manifest = read_data(where) if data or where.is_dir() else None
        return Run(folder, checkpoints, where, manifest, None, None, None, 0, frozenset())
    config, record = read_record(folder)
    where = Path(data) if data else Path("data") / config.data.dataset
    manifest, state = read_data(where), newest_state(folder)
    if record["data_hash"] != manifest["data_hash"]:
        raise Stop(DATA, f"{where} is not what {folder} was trained on: data hash "
                   f"{manifest['data_hash']}, the run has {record['data_hash']}")
    plan = make_plan(config, manifest, record.get("queue", state.get("queue")))
    return Run(folder, checkpoints, where, manifest, config, record, plan, state.get("step", 0),
               frozenset(state.get("skipped", ())))
