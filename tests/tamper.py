"""A finished run is tampered with in ten ways; replay --verify has to name each. And batch, at each
step of it, has to give the rows that training logged.

    python tests/tamper.py out/demo                # some seconds; in a copy, the run stays as it is

tests/test_audit.py does more of it to a run of sixteen steps.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import analyze
from nano360.config import run
from nano360.files import sha256_file, write_sealed


def said(*argv: str) -> tuple[int, str]:
    """The exit code of analyze.py, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = run(analyze.main, "", [], list(argv))
    return code, out.getvalue()


def flip(path: Path, at: float) -> None:
    """Another bit in one byte of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def seal(path: Path, key: str, value: object) -> None:
    """Another value in a sealed file, and its seal made right."""
    write_sealed(path, json.loads(path.read_text()) | {key: value})


def swap_rows(data: Path, name: str) -> None:
    """Two rows change places, and the manifest is made right: hash, and seal."""
    manifest = json.loads((data / "manifest.json").read_text())
    rows = np.fromfile(data / name, manifest["dtype"]).reshape(-1, manifest["seq_len"] + 1)
    rows[[0, 1]] = rows[[1, 0]]
    rows.tofile(data / name)
    manifest["files"][name]["sha256"] = sha256_file(data / name)
    write_sealed(data / "manifest.json", manifest)


def edit_line(path: Path, n: int, key: str | None) -> None:
    """Line n of a log is gone, or has another value."""
    lines = path.read_text().splitlines(keepends=True)
    new = [json.dumps(json.loads(lines[n]) | {key: 1.5}) + "\n"] if key else []
    path.write_text("".join(lines[:n] + new + lines[n + 1:]))


def reorder(path: Path) -> None:
    record = json.loads(path.read_text())
    record["queue"][:2] = record["queue"][1::-1]
    path.write_text(json.dumps(record))


def kinds(out: Path, data: Path) -> dict[str, tuple[Callable[[], None], str]]:
    """What is done, and what has to be named."""
    log, two = out / "metrics.jsonl", out / "ckpt_002"
    return {
        "a weight": (lambda: flip(two / "model.safetensors", 0.5), f"{two}/model.safetensors was"),
        "a moment": (lambda: flip(two / "optimizer/adamw.safetensors", 0.9),
                     f"{two}/optimizer/adamw.safetensors was changed"),
        "a token of a row": (lambda: flip(data / "train_003.bin", 0.3),
                             f"{data}/train_003.bin was changed"),
        "the order of two rows": (lambda: swap_rows(data, "train_003.bin"),
                                  f"{out}/ckpt_003/state.json: chunk_sha256"),
        "a loss in the metrics": (lambda: edit_line(log, 9, "loss"),
                                  f"{out}/ckpt_000/state.json: metrics_sha256"),
        "a line of the metrics": (lambda: edit_line(log, 9, None),
                                  f"{log}: no line of steps 10 to 10"),
        "a parent hash": (lambda: seal(two / "state.json", "parent", "0" * 64),
                          f"{two}/state.json: parent"),
        "the queue": (lambda: reorder(out / "run.json"), f"{out}/run.json: queue"),
        "a checkpoint that is gone": (lambda: shutil.rmtree(two), f"{two} is missing"),
        "the tokenizer": (lambda: flip(data / "tokenizer.model", 0.5),
                          f"{data}/tokenizer.model was changed"),
    }


def check_batches(out: Path) -> int:
    """Of every logged step, batch has to give the row hash of metrics.jsonl; how many there are."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    logged = {line["step"]: line["rows"] for line in lines if line["kind"] == "train"}
    for step, rows in tqdm(logged.items(), "batch", disable=None):
        code, text = said("batch", str(out), f"--step={step}")
        assert code == 0 and re.search("^rows ([0-9a-f]{16})", text, re.M)[1] == rows, (step, text)
    return len(logged)


def main() -> None:
    out = Path(sys.argv[1])
    data = Path("data") / json.loads((out / "run.json").read_text())["config"]["data"]["dataset"]
    kept = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for path in (out, data):
            shutil.copytree(kept / path, path)
        code, text = said("replay", str(out), "--verify")
        assert code == 0, text
        print(text.splitlines()[-1])
        for kind, (tamper, named) in kinds(out, data).items():
            tamper()
            code, text = said("replay", str(out), "--verify")
            assert code in (3, 4) and named in text and "nothing is wrong" not in text, (kind, text)
            print(f"{kind + ':':<28}{next(t for t in text.splitlines() if named in t)[:110]}")
            for path in (out, data):
                shutil.rmtree(path)
                shutil.copytree(kept / path, path)
        print(f"batch: the rows of all {check_batches(out):,} steps are those that training logged")
        os.chdir(kept)


if __name__ == "__main__":
    main()
