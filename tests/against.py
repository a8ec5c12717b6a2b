"""Old code against new, on one machine: all that they write, bit by bit.

    python tests/against.py 3e72e77    # that commit against the working tree; about two minutes

Both prepare the recipes of small.py, train six steps of each model: straight, stopped after step 3
and resumed, and on two processes; then score the checkpoints and sample from them. A third folder
has runs that the old code began and the new one ended. Every file below data/ and out/, every score
and text is compared. Of run.json the commit, the command and the versions are left out, of
metrics.jsonl what a clock or a memory says; ALLOWED lists every further difference.

Exit code 5 if anything else differs. Leaves nothing behind.
"""

import fnmatch
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from safetensors.numpy import load_file  # noqa: E402

from nano360.config import NUMERICAL, USAGE, Stop, run  # noqa: E402
from small import write_inputs  # noqa: E402

MODELS = ("llama", "crystal")
# (files, field, why). Fields are joined by dots, * is any number or name.
LEFT_OUT = [
    ("out/*/run.json", "launches.*.git", "another commit"),
    ("out/*/run.json", "launches.*.command", "the command line"),
    ("out/*/run.json", "launches.*.versions", "of packages"),
    ("out/*/metrics.jsonl", "tok_per_s", "speed"),
    ("out/*/metrics.jsonl", "mfu", "speed"),
    ("out/*/metrics.jsonl", "memory", "memory"),
    ("out/*/metrics.jsonl", "time_*", "time"),
]
# (files, field, issue, why): what differs on purpose since 3e72e77. A field "" is the whole file,
# which may also be there on one side alone. A line is added only where an issue's text says so.
ALLOWED = [
    ("out/*/run.json", "launches.*.exact.threads", 1, "run.json records torch's threads"),
    ("out/*/run.json", "launches.*.exact.cpu_capability", 1, "and the CPU's capability"),
    ("out/*/incidents.jsonl", "documents", 2, "analyze.py looks documents up"),
    ("data/*/tokenizer.json", "", 2, "a data set has what a checkpoint copies"),
    ("data/*/tokenizer_config.json", "", 2, "and this"),
    ("data/*/piece_bytes.npy", "", 2, "and what bits per byte are counted with"),
    ("data/*/manifest.json", "files.tokenizer.json", 2, "its manifest lists them"),
    ("data/*/manifest.json", "files.tokenizer_config.json", 2, "and this"),
    ("data/*/manifest.json", "files.piece_bytes.npy", 2, "and this"),
    ("data/*/manifest.json.sha256", "", 2, "the seal of that manifest"),
]


# ---- what is run ---------------------------------------------------------------------------------

def go(code: Path, folder: Path, *words: str, processes: int = 1, out: str = "") -> None:
    """Run a stage of a checkout in a folder; its output goes to a file there if one is named."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                "--"]  # or --run would be taken for torchrun's
    command = [sys.executable, *(torchrun if processes > 1 else []), str(code / words[0])]
    done = subprocess.run([*command, *words[1:]], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise Stop(NUMERICAL, f"{code / words[0]} {' '.join(words[1:])} ended with "
                   f"{done.returncode}: {done.stderr.strip()[-500:]}")
    if out:
        (folder / out).write_text(done.stdout, encoding="utf-8")


def prepare(code: Path, folder: Path) -> None:
    write_inputs(folder)
    for name in (*MODELS, "release"):
        go(code, folder, "prepare.py", f"{name}.py")


def stopped(code: Path, folder: Path, name: str) -> None:
    go(code, folder, "train.py", f"{name}.py", "--max_steps=3", f"--run={name}_resumed")


def resumed(code: Path, folder: Path, name: str) -> None:
    go(code, folder, "train.py", f"{name}.py", "--max_steps=6", f"--run={name}_resumed")


def all_stages(code: Path, folder: Path) -> None:
    prepare(code, folder)
    for name in MODELS:
        go(code, folder, "train.py", f"{name}.py", "--max_steps=6")
        go(code, folder, "train.py", f"{name}.py", "--max_steps=6", f"--run={name}_two",
           processes=2)
        stopped(code, folder, name)
        resumed(code, folder, name)
        go(code, folder, "evaluate.py", f"out/{name}", "--tasks=valid,arc_challenge",
           "--data_dir=eval", f"--output={name}_scores.json")
        for temperature in (0, 1):
            go(code, folder, "sample.py", f"out/{name}/ckpt_002", f"--temperature={temperature}",
               "--max_new_tokens=40", "--prompt=ba ", out=f"{name}_{temperature}.txt")


def begun_and_ended(old: Path, new: Path, folder: Path) -> None:
    """Runs that the old code began, on sets that it made, and the new code ended."""
    prepare(old, folder)
    for name in MODELS:
        stopped(old, folder, name)
        resumed(new, folder, name)


# ---- what is compared ----------------------------------------------------------------------------

def without(value: Any, fields: list[str], at: str = "") -> Any:
    """Json without the fields that any of the patterns names."""
    if isinstance(value, dict):
        items = ((k, v, f"{at}{k}") for k, v in value.items())
        return {k: without(v, fields, f"{where}.") for k, v, where in items
                if not any(fnmatch.fnmatch(where, field) for field in fields)}
    if isinstance(value, list):
        return [without(v, fields, f"{at}{i}.") for i, v in enumerate(value)]
    return value


def read(path: Path, fields: list[str]) -> list[str]:
    """The lines of json in a file, in their order, without some fields."""
    text = path.read_text(encoding="utf-8")
    values = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else [json.loads(text)]
    return [json.dumps(without(value, fields)) for value in values]


def differs(old: Path, new: Path, fields: list[str]) -> str:
    """In what two files differ; empty if in nothing but the fields."""
    if old.read_bytes() == new.read_bytes():
        return ""
    if fields:
        ours, theirs = read(new, fields), read(old, fields)
        if ours == theirs:
            return ""
        i = next((i for i, pair in enumerate(zip(theirs, ours)) if len(set(pair)) > 1),  # noqa: B905
                 min(len(theirs), len(ours)))
        return f"line {i + 1}: {str(theirs[i:i + 1])[:200]} is now {str(ours[i:i + 1])[:200]}"
    if old.suffix == ".safetensors":
        ours, theirs = load_file(new), load_file(old)
        names = [name for name in theirs.keys() | ours.keys() if name not in ours
                 or name not in theirs or theirs[name].tobytes() != ours[name].tobytes()]
        return f"{len(names)} tensors, first {min(names, default='none: the header')}"
    return f"{old.stat().st_size} bytes, now {new.stat().st_size}"


def compare(old: Path, new: Path, part: str = "") -> tuple[int, list[str]]:
    """How many files of two folders were compared, and a line for each that differs. `part`: only
    files whose name this regular expression finds."""
    names = {path.relative_to(folder).as_posix() for folder in (old, new)
             for path in folder.rglob("*") if path.is_file()}
    lines, count = [], 0
    for name in sorted(name for name in names if re.search(part, name)):
        fields = [field for files, field, *_ in LEFT_OUT + ALLOWED if fnmatch.fnmatch(name, files)]
        if "" in fields:
            continue
        count += 1
        if not (old / name).is_file() or not (new / name).is_file():
            lines.append(f"{name} is only {'new' if (new / name).is_file() else 'old'}")
        elif said := differs(old / name, new / name, fields):
            lines.append(f"{name}: {said}")
    return count, lines


def checkout(commit: str, folder: Path) -> None:
    """A clone of this repository at a commit. Raises Stop(USAGE)."""
    for command in (["git", "clone", "--quiet", "--no-checkout", str(REPO), str(folder)],
                    ["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Stop(USAGE, f"no checkout of {commit}: {done.stderr.strip()}; give a commit of "
                       "this repository, such as 3e72e77")


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0].startswith("-"):
        raise Stop(USAGE, "expected a commit, such as 3e72e77")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        root = Path(name)
        checkout(argv[0], root / "code")
        old, new, mixed = (root / side for side in ("old", "new", "mixed"))
        for folder in (old, new, mixed):
            folder.mkdir()
        works = [pool.submit(all_stages, root / "code", old), pool.submit(all_stages, REPO, new),
                 pool.submit(begun_and_ended, root / "code", REPO, mixed)]
        for work in works:
            work.result()
        found = []
        for what, pair in (("old and new", (old, new, "")),
                           ("old, and begun old and ended new", (old, mixed, "^data/|_resumed/"))):
            count, lines = compare(*pair)
            print(f"{what}: {count} files compared, {len(lines)} differ")
            found += lines
        for files, field, issue, why in ALLOWED:
            print(f"allowed by issue {issue}: {field or 'all'} of {files} ({why})")
    for line in found:
        print(line)
    if found:
        raise Stop(NUMERICAL, f"{len(found)} files are not what {argv[0]} wrote: {found[0]}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
