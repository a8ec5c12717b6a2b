"""Rows that others published, read as they are, for analyze.py memorization --sample.

    asked = read_sample(Path("train_355.jsonl"), [32], 32, n=1000, seed=42)

Lines are {"prompt": [...], "continuation": [...], "source": NAME}, as in Analysis360's samples, or
{"token_ids": [...], "source": NAME}, as in the released chunks of Amber, of which rows are drawn.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nano360.config import DATA, Stop


@dataclass(frozen=True)
class Asked:
    """Rows of a chunk, or of a file of rows, that every checkpoint is asked for."""
    chunk: int | None
    rows: np.ndarray  # (n,) their numbers
    ids: np.ndarray  # (n, k + l or more) int64
    sources: list[str]
    data: str  # the sha256 of what they were read from, its first 16 digits


def draw(n: int, rows: int, seed: int) -> np.ndarray:
    """Which of n rows are asked for, in the order that Analysis360 draws them in: seed 42 on a
    released file gives the 1,000 rows that it published."""
    return np.random.default_rng(seed).permutation(n)[:rows]


def read_row(line: bytes, where: str, ks: list[int], l: int) -> tuple[list[int], str]:
    """The first ids of a line of a sample, and its source. Raises Stop(DATA)."""
    try:
        one = json.loads(line)
        names = [name for name in ("prompt", "continuation", "token_ids") if name in one]
        parts = [one[name] for name in names]
        ids, source = [i for part in parts for i in part], one.get("source", "sample")
        fits = names in (["prompt", "continuation"], ["token_ids"])
        fits = fits and {type(i) for i in ids} == {int} and min(ids) >= 0 and type(source) is str
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # no more of the error: it may quote the line, which is training text
        raise Stop(DATA, f"{where} is no line of a sample: {type(error).__name__}") from error
    if not fits:
        raise Stop(DATA, f"{where} is none of prompt, continuation and source, or token_ids and "
                   "source")
    if len(ids) < max(ks) + l or len(parts) == 2 and ks != [len(parts[0])]:
        raise Stop(DATA, f"{where} has {' + '.join(str(len(part)) for part in parts)} ids, asked "
                   f"are k = {', '.join(map(str, ks))} and l = {l}: give others by --k and --l")
    return ids[:max(ks) + l], source


def read_sample(path: Path, ks: list[int], l: int, n: int, seed: int) -> Asked:
    """n rows of a file, all of a smaller one, with the first k + l ids of each for every k of ks.
    Its chunk is the number that its name ends in. Raises Stop(DATA)."""
    starts, at, lines, digest = [], 0, [], hashlib.sha256()
    try:
        with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B",
                                            unit_scale=True, disable=None) as bar:
            for line in file:
                starts.append(at)
                at += len(line)
                digest.update(line)
                bar.update(len(line))
            rows = np.arange(len(starts)) if len(starts) <= n else (
                draw(len(starts), n, seed))
            for row in rows:
                file.seek(starts[row])
                lines.append(file.readline())
    except OSError as error:
        raise Stop(DATA, f"--sample={path} cannot be read: {error.strerror}") from error
    if not lines:
        raise Stop(DATA, f"--sample={path} has no lines")
    found = [read_row(line, f"{path}, line {row + 1}", ks, l)
             for row, line in zip(rows, lines, strict=True)]
    number = re.search("[0-9]+$", path.name.split(".")[0])
    return Asked(int(number[0]) if number else None, rows, np.array([ids for ids, _ in found]),
                 [source for _, source in found], digest.hexdigest()[:16])
