"""What check, bench and train share: their options, the clock they watch, the rows they write.

    part = begin("check", argv)
    part.row("greedy text", lambda: {"ok": gap < 1e-4, "gap": gap}, seconds=10)
    part.end()                              # Stop(1) if a row failed

Writes ${OUT:-tests/gpu/results}/<part>_<device>.json and .md again after every row, so that what
was done is there however the part ends.
"""

import contextlib
import dataclasses
import datetime
import functools
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

REPO = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

from model import hardware  # noqa: E402
from nano360.config import ENVIRONMENT, USAGE, Config, Stop, key, load, load_options  # noqa: E402
from nano360.records import git_state  # noqa: E402

FAILED = 1  # exit code: a check did not hold
DONE, WRONG, LATE = "ok", "FAILED", "skipped: time"


@dataclass(frozen=True, kw_only=True)
class Options:
    tiny: bool = key("toy sizes, on a CPU too: a dry run of the code, it measures nothing", False)
    device: Literal["auto", "cuda", "cpu"] = key("where; cpu only with --tiny", "auto")
    minutes: float = key("after which no row is begun that would not end in time", 8.5, above=0,
                         high=9)
    only: str = key("rows to do, by their names: a regular expression; empty: all", "")


@dataclass
class Part:
    """One of the three, on its way: where it computes, since when, and its rows so far."""
    name: str
    options: Options
    device: torch.device
    began: float
    rows: list[dict] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until nothing may run any more."""
        return 60 * self.options.minutes - (time.monotonic() - self.began)

    def row(self, name: str, work: Callable[[], dict], seconds: float) -> dict:
        """Do a row of about so many seconds if they are left, and write down what came of it.

        What work() returns goes into the row; its `ok` decides, and without one it only tells. An
        error is a row that failed, with its last line; the traceback goes to stderr.
        """
        if self.options.only and not re.search(self.options.only, name):
            return {}
        if self.left() < seconds:
            return self.add({"row": name, "status": LATE})
        began = time.monotonic()
        try:
            found = work()
        except subprocess.TimeoutExpired as error:  # of the clock's, or of a process that hangs
            found = {"status": LATE if self.left() < 1 else WRONG,
                     "said": f"cut off after {error.timeout:.0f} s"}
        except Exception as error:
            traceback.print_exc()
            last = (str(error).strip().splitlines() or [""])[-1]
            found = {"ok": False, "said": f"{type(error).__name__}: {last[:200]}"}
        ok = found.pop("ok", None)
        status = found.pop("status", "told" if ok is None else DONE if ok else WRONG)
        took = round(time.monotonic() - began, 1)
        return self.add({"row": name, "status": status, "seconds": took} | found)

    def add(self, row: dict) -> dict:
        self.rows.append(row)
        told = "  ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in ("row", "status"))
        print(f"{row['row']:<44} {row['status']:<14} {told}", flush=True)
        self.write()
        return row

    def write(self) -> None:
        """The rows so far: json for programs, a table for people."""
        folder = Path(os.environ.get("OUT", REPO / "tests/gpu/results"))
        folder.mkdir(parents=True, exist_ok=True)
        facts = facts_of(self)
        name = hardware(self.device).partition(",")[0]
        parts = [self.name, name, self.options.only, "tiny" * self.options.tiny]
        stem = folder / "_".join(re.sub("[^A-Za-z0-9]+", "-", one).strip("-") for one in parts
                                 if one)
        text = json.dumps(facts | {"rows": self.rows}, indent=1) + "\n"
        Path(f"{stem}.json").write_text(text, encoding="utf-8")
        Path(f"{stem}.md").write_text(table(facts, self.rows), encoding="utf-8")

    def end(self) -> None:
        """Raise Stop if a row is not as wanted."""
        self.write()
        bad = [row["row"] for row in self.rows if row["status"] == WRONG]
        late = sum(row["status"] == LATE for row in self.rows)
        if bad:
            raise Stop(FAILED, f"{self.name}: {len(bad)} of {len(self.rows)} rows failed: "
                       f"{', '.join(bad)}")
        print(f"{self.name}: none of {len(self.rows)} rows failed"
              + f", {late} skipped for want of time" * bool(late))


def shown(value: object) -> str:
    """A figure as people read it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value not in (True, False) else str(value)


def facts_of(part: Part) -> dict:
    """What the rows were measured with."""
    facts = {"part": part.name, "device": hardware(part.device), "torch": torch.__version__,
             "cuda": torch.version.cuda, "python": platform.python_version(),
             "commit": commit(),
             "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
             "minutes": round((time.monotonic() - part.began) / 60, 1),
             "options": dataclasses.asdict(part.options)}
    if part.device.type == "cuda":
        one = torch.cuda.get_device_properties(part.device)
        facts |= {"memory": one.total_memory, "capability": f"{one.major}.{one.minor}"}
    return facts


def lines_of(out: Path, kind: str) -> list[dict]:
    """A run's metrics.jsonl; none before its first step. A last line may be half written."""
    log = out / "metrics.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    whole = text[:text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


@functools.cache
def commit() -> str:
    """What was measured: the commit, and whether there were changes on top of it."""
    git = git_state()
    return (git["commit"] or "not a git checkout") + " and changes" * (git["clean"] is False)


def table(facts: dict, rows: list[dict]) -> str:
    """Facts and rows in markdown; a column for every key, in the order they first come."""
    columns = list(dict.fromkeys(k for row in rows for k in row))
    lines = [f"# tests/gpu/run.sh {facts['part']}: {facts['device']}", ""]
    if facts["options"]["tiny"]:
        lines += ["**A dry run at toy sizes: it shows that the code runs, and measures nothing.**",
                  ""]
    lines += [", ".join(f"{k} {v}" for k, v in facts.items()
                        if k not in ("part", "device", "options")), ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [shown(row[k]).replace("|", "/").replace("\n", " ") if k in row else ""
                 for k in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def begin(name: str, argv: list[str], kind: type[Options] = Options) -> Part:
    """The part of a command line. Raises Stop(ENVIRONMENT) where there is no GPU, unless tiny."""
    _, options = load_options([name, *argv], kind, "options only")
    if options.device == "cpu" and not options.tiny:
        raise Stop(USAGE, "--device=cpu only goes with --tiny: this measures GPUs")
    there = torch.cuda.is_available() and options.device != "cpu"
    if not there and not (options.tiny and options.device != "cuda"):
        raise Stop(ENVIRONMENT, "torch finds no CUDA device here; a dry run: --tiny --device=cpu")
    device = torch.device("cuda", 0) if there else torch.device("cpu")
    return Part(name, options, device, time.monotonic())


def config_of(file: str, keys: dict) -> Config:
    """A run file of this repository with some keys set otherwise."""
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        return load([str(REPO / file), *(f"--{k}={v}" for k, v in keys.items())])[0]


def release(device: torch.device) -> None:
    """Give back what the rows before have held: compiled code holds the blocks it was made for."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def stage(part: Part, folder: Path, script: str, *argv: str, wants: int = 0, **env: str) -> str:
    """What a stage of this repository prints, run in `folder` as a user would: a process of its
    own. Raises RuntimeError with its last line if its exit code is not the one that it wants."""
    path = REPO / script
    done = subprocess.run([sys.executable, str(path), *argv], cwd=folder, capture_output=True,
                          text=True, timeout=max(1, part.left()), env=os.environ | env)
    if done.returncode != wants:
        print(done.stdout, done.stderr, file=sys.stderr)
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"{script} ended with {done.returncode}: {last}")
    return done.stdout
