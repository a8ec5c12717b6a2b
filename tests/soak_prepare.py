"""What a kill costs prepare.py: nothing but time.

    python tests/soak_prepare.py                 # 30 kills, a few minutes
    python tests/soak_prepare.py --kills=100

Makes 10 MB of text of two sources, prepares it once undisturbed, and then kills the same command
(SIGKILL, its main process alone) at moments drawn uniformly over the time that took. What is killed
is started again; what ended before its kill is compared and removed, and all begins anew. Every
file of every set that is finished has to be, byte for byte, the undisturbed one's, and no worker
process may be left. Prints in which phase each kill came; leaves nothing behind.
"""

import collections
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from nano360.config import DATA, Stop, run  # noqa: E402
from soak_kill import kills_of  # noqa: E402

SIZE = 10_000_000  # bytes of text
PATIENCE = 20.0  # seconds in which a worker has to notice that it works for nobody
RUN = """
dataset = "set"
sources = [dict(name="code", path="code", weight=2), dict(name="prose", path="prose.jsonl")]
tokenizer = "bpe"
vocab_size = 2048
seq_len = 256
n_chunks = 7
rows_per_chunk = 40_000
valid_rows = 64
n_layer = n_head = 1
n_embd = n_inner = 8
lr = 1e-3
batch_size = 1
workers = 2
"""


def make_text(root: Path) -> None:
    """Two sources of the standard library's files, repeated with changes: long files of code, and
    documents in lines."""
    paths = sorted(p for p in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for p in paths if (text := p.read_text(encoding="utf-8", errors="ignore"))]
    (root / "code").mkdir()
    size = turn = 0
    with open(root / "prose.jsonl", "w", encoding="utf-8") as prose:
        while size < SIZE:
            for i, text in enumerate(texts):
                text = re.sub(r"\bself\b", f"self{turn}", text) if turn else text
                if i % 2:
                    prose.writelines(json.dumps(dict(text=part)) + "\n"
                                     for part in text.split("\n\n") if part.strip())
                else:
                    with open(root / "code" / f"{i % 6}.py", "a", encoding="utf-8") as code:
                        code.write(text)
                size += len(text.encode())
            turn += 1


def start(folder: Path, *argv: str) -> subprocess.Popen:
    """prepare.py as a user starts it, in this folder."""
    return subprocess.Popen([sys.executable, str(REPO / "prepare.py"), *argv], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen) -> None:
    _, err = child.communicate()
    if child.returncode:
        raise Stop(DATA, f"prepare.py ended with {child.returncode}: {err}")


def phase(folder: Path) -> str:
    """How far a preparation that was killed had come, by what it left."""
    part = Path(f"{folder}.part")
    if folder.is_dir():
        return "after"
    if not part.is_dir():
        return "before"
    if not list((part / "work").glob("*.tokens")):
        return "listing, tokenizer"
    if not list(part.glob("*/train_000.bin")):
        return "tokenizing"
    return "hashing" if list(part.glob("*/provenance/train_000.bin.npy")) else "dealing"


def workers_of(folder: Path) -> list[int]:
    """Processes that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(path.name)] * (os.readlink(path / "cwd") == str(folder.resolve()))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def wait_for_workers(folder: Path) -> float:
    """Seconds until no process works in a folder. Raises Stop(DATA) if one stays."""
    began = time.perf_counter()
    while left := workers_of(folder):
        if time.perf_counter() - began > PATIENCE:
            raise Stop(DATA, f"processes {left} still work in {folder}")
        time.sleep(0.02)
    return time.perf_counter() - began


def contents(folder: Path) -> dict[str, str]:
    """name -> sha256 of every file below a folder."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def soak(root: Path, kills: int, dice: random.Random) -> None:
    data, began = root / "data", time.perf_counter()
    finish(start(root, "run.py"))
    whole, should = time.perf_counter() - began, contents(data)
    size = sum(p.stat().st_size for p in data.rglob("*.bin"))
    print(f"undisturbed: {whole:.1f} s, {len(should)} files, {size / 1e6:.0f} MB of rows",
          flush=True)
    shutil.rmtree(data)
    phases, finished, starts, slowest = collections.Counter(), 0, 0, 0.0
    while sum(phases.values()) < kills:
        child, moment, starts = start(root, "run.py"), dice.uniform(0, whole), starts + 1
        try:
            child.wait(moment)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            came = phase(data / "set")
            phases[came] += 1
            slowest = max(slowest, wait_for_workers(root))
            print(f"kill {sum(phases.values()):>3} after {moment:5.1f} s: {came}", flush=True)
            continue
        finish(child)
        compare(data, should)
        finished += 1
        shutil.rmtree(data)
    finish(start(root, "run.py"))
    compare(data, should)
    print(", ".join(f"{n} {name}" for name, n in phases.most_common()))
    print(f"{kills} kills, {starts + 1} starts, {finished + 1} sets finished; no process left, the "
          f"last gone after {slowest:.2f} s: {len(should)} files byte-identical in each set")


def compare(data: Path, should: dict[str, str]) -> None:
    """Raises Stop(DATA) if any file differs from the undisturbed ones, or was left over."""
    found = contents(data)
    if wrong := [k for k in found.keys() | should.keys() if found.get(k) != should.get(k)]:
        raise Stop(DATA, f"not as the undisturbed set: {', '.join(sorted(wrong))}")


def main(argv: list[str]) -> None:
    kills = kills_of(argv, 30)
    with tempfile.TemporaryDirectory() as name:
        make_text(Path(name))
        (Path(name) / "run.py").write_text(RUN)
        soak(Path(name), kills, random.Random(1))


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
