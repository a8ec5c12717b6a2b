"""One process in a folder at a time.

    with locked(Path("out/demo")):      # a second one is told who is there

The lock is out/demo.lock, held by the system: that of a process that was killed goes with it.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from configs import CHECKPOINT, Stop


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
