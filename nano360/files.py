"""Files that are there whole or not at all, json that can be trusted, one process in a folder.

    write_sealed(path, content);  content = read_sealed(path, DATA)
    with locked(Path("out/demo")):      # a second process is told who is there

A file is written under another name, synced and renamed. A sealed json file has its sha256 beside
it. The lock of out/demo is out/demo.lock, held by the system: that of a process that was killed
goes with it. Standard library only.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from nano360.config import CHECKPOINT, Stop


def sha256_file(path: str | Path) -> str:
    """The hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: dict) -> str:
    """The hex sha256 of json, its keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: str | Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write a file under another name and rename it: it is there whole or not at all."""
    (part := Path(f"{path}.part")).write_text(text, encoding="utf-8")
    sync(part)
    part.rename(path)
    sync(path.parent)


def write_sealed(path: Path, content: dict) -> None:
    """Write a json file and beside it its sha256, in the format that `sha256sum -c` reads.

    Over an older one, the seal names both while the file changes: a kill breaks nothing.
    """
    text, seal = json.dumps(content, indent=1) + "\n", Path(f"{path}.sha256")
    mine = f"{hashlib.sha256(text.encode()).hexdigest()}  {path.name}\n"
    if path.is_file():
        write_atomic(seal, mine + f"{sha256_file(path)}  {path.name}\n")
    write_atomic(path, text)
    write_atomic(seal, mine)


def read_sealed(path: Path, code: int) -> dict:
    """Read what write_sealed wrote. Raises Stop(code) if a file is missing or the hashes differ."""
    seal = Path(f"{path}.sha256")
    for _ in range(2):  # again, if both were written between the two reads
        for name in (path, seal):
            if not name.is_file():
                raise Stop(code, f"{name} is missing: {path.parent} is not complete")
        content, sealed = path.read_bytes(), seal.read_text(encoding="utf-8", errors="replace")
        digest = hashlib.sha256(content).hexdigest()
        if (re.fullmatch(f"([0-9a-f]{{64}}  {re.escape(path.name)}\n){{1,2}}", sealed)
                and f"{digest}  " in sealed):
            return json.loads(content)
    raise Stop(code, f"{path} was changed: its sha256 is {digest}, {seal.name} says another")


# ---- one process in a folder ---------------------------------------------------------------------

@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder. The lock of one that is killed goes with it."""
    path = Path(f"{folder}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise Stop(CHECKPOINT, f"cannot write to {folder}: {error.strerror}; free the name or "
                   "mend the disk; a run or a data set can have another, by --run=NAME or "
                   "--dataset=NAME") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError  # it was removed by one that ended just now
        except BlockingIOError as error:
            file.seek(0)
            raise Stop(CHECKPOINT, f"{folder} is in the hands of {file.read()}; wait for it, or "
                       "stop it") from error
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}",
              file=file, end="", flush=True)
        try:
            yield
        finally:
            path.unlink()


def is_locked(folder: Path) -> bool:
    try:
        with open(f"{folder}.lock") as file:
            return bool(fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB))
    except OSError as error:  # there is no lock, or it is held
        return isinstance(error, BlockingIOError)
