"""What the tests share: the repository on sys.path, the prepared demo, the developers' data."""

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
def demo(tmp_path_factory) -> Path:
    """The folder of configs/demo.py's whole data set, prepared once for all tests: data/demo."""
    import prepare
    root, before = tmp_path_factory.mktemp("demo"), Path.cwd()
    os.chdir(root)
    try:
        prepare.main([str(REPO / "configs/demo.py")])
    finally:
        os.chdir(before)
    return root / "data" / "demo"


@pytest.fixture(scope="session")
def server():
    """Where tests/ranks.py forks from; a process can have one alone. What it has imported stands in
    all children: so not test_layouts.py, as some want to see who imports extras/parallel.py."""
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
