"""What the tests share: the repository on sys.path, the prepared demo, the developers' data."""

import contextlib
import fcntl
import os
import sys
from pathlib import Path

import pytest

# Tiny models gain nothing from a second thread and lose much where the cores are busy. Read when
# torch and its children start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))


@pytest.fixture(scope="session")
def demo(tmp_path_factory, worker_id) -> Path:
    """The folder of configs/demo.py's data set, data/demo, with twice its rows, so that its prose
    is repeated; prepared once for all tests and all workers of pytest-xdist."""
    import prepare
    base = tmp_path_factory.getbasetemp()  # a worker's own lies in the one of all
    root = (base if worker_id == "master" else base.parent) / "demo"
    root.mkdir(exist_ok=True)
    with open(root / "lock", "w") as lock, contextlib.chdir(root):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path("data/demo").is_dir():  # it has this name when it is whole
            prepare.main([str(REPO / "configs/demo.py"), "--rows_per_chunk=1024"])
    return root / "data" / "demo"


@pytest.fixture(scope="session")
def server():
    """Where tests/ranks.py forks from; a process can have one alone. What it has imported stands in
    all children: so not test_layouts.py, as some want to see who imports parallel.py."""
    from ranks import forkserver
    return forkserver("test_damage")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Data that developers have beside the repository, and that is never part of it."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder


def pytest_terminal_summary(terminalreporter) -> None:
    """Say at the end what test_golden.py compared, from whichever worker it ran in."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "golden" and report.when == "call":
                terminalreporter.write_line(f"test_golden.py {value}")
