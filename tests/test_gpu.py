"""tests/gpu/ where there is no GPU: it says so, and its code runs at toy sizes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from conftest import REPO


def start(tmp_path, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(REPO / "tests/gpu/run.sh"), *argv], text=True,
                          capture_output=True, timeout=500,
                          env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run tests/gpu/run.sh")
@pytest.mark.parametrize("part", ["check", "bench", "train"])
def test_without_a_gpu_it_says_so(part, tmp_path):
    done = start(tmp_path, part)
    assert done.returncode == 6 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.numeric
@pytest.mark.parametrize("part, only", [
    ("check", "^FSDP2 of one|^recompute full|greedy|scored|memory, amber, eager"),
    ("bench", "chip|llama")])
def test_the_code_runs_at_toy_sizes(part, only, tmp_path):
    done = start(tmp_path, part, "--tiny", "--device=cpu", f"--only={only}")
    assert done.returncode == 0, done.stdout + done.stderr
    [found] = tmp_path.glob(f"{part}_*.json")
    rows = json.loads(found.read_text())["rows"]
    assert len(rows) >= 3 and not [row for row in rows if row.get("status") == "FAILED"], rows
    assert found.with_suffix(".md").is_file()
