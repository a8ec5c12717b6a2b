"""The way back: from a row of a chunk to the documents it was cut from; and the way there again.

    documents_of(folder, manifest, "train_003.bin", [17, 18])
    find_document(folder, manifest, "code/ast.py:1")     # the rows that hold a token of it

Reads data/<dataset>/provenance/, which prepare.py writes and describes. train.py asks for the
documents behind a step that failed, analyze.py for the rows of a document.
"""

import difflib
import functools
import itertools
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nano360.analysis.canaries import FILE as CANARIES, overwritten
from nano360.config import DATA, USAGE, Stop
from nano360.rows import HELD_OUT, chunk_name, valid_name

NO_END = 1 << 62  # of a stream's last document: its table does not say where it ends


@dataclass(frozen=True, order=True)
class Part:
    """Tokens first to end - 1 of a row of a file of a data set."""
    name: str
    row: int
    first: int
    end: int


def stride_of(manifest: dict) -> int:
    """Tokens of a stream from where a row begins to where the next does."""
    return manifest["seq_len"] + (not manifest["recipe"]["overlap"])


def chunk_of(name: str) -> int:
    """The number of a file of rows; those held out of a release are of its first chunk."""
    return int(name[len("train_"):-len(".bin")]) if name.startswith("train_") else 0


def is_release(manifest: dict) -> bool:
    """Whether rows came ready: their documents are not known."""
    return bool(manifest["recipe"]["sources"][0]["rows"])


@functools.lru_cache(maxsize=1024)
def load_table(path: Path, changed: int) -> np.ndarray:
    """A table, mapped; the time at which it was `changed` names it too. Raises Stop(DATA)."""
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise Stop(DATA, f"{path} is no whole table: {error}; prepare the set again") from error


@functools.lru_cache(maxsize=64)
def load_names(path: Path, changed: int) -> list[str]:
    return json.loads(path.read_text(encoding="utf-8"))


def changed(path: Path) -> int:
    """When a file was changed. Raises Stop(DATA) if it is not there."""
    if not path.is_file():
        raise Stop(DATA, f"{path} is missing; prepare the set again, or copy all of it")
    return path.stat().st_mtime_ns


def origins_of(folder: Path, name: str) -> np.ndarray | None:
    """(source, epoch, row of its stream) of every row of a file, (rows, 3) int64, mapped; of a
    release (source, epoch, line). None where the set came without its provenance/."""
    path = folder / "provenance" / f"{name}.npy"
    return load_table(path, changed(path)) if path.parent.is_dir() else None


def documents_table(folder: Path, label: str, epoch: int) -> np.ndarray:
    """The documents of a source's stream, (n, 3) int64, mapped: first token, file, line."""
    which = "held_out" if epoch == HELD_OUT else f"epoch_{epoch}"
    path = folder / "provenance" / f"{label}_{which}.npy"
    return load_table(path, changed(path))


def files_of(folder: Path, manifest: dict, label: str) -> list[str]:
    """The names of a source's files, as the tables number them; of a release, chunk by chunk."""
    name = manifest["recipe"]["sources"][0]["name"] if is_release(manifest) else label
    path = folder / "provenance" / f"{name}_files.json"
    return load_names(path, changed(path))


def sources_of(folder: Path, manifest: dict, name: str, rows: list[int]) -> list[str]:
    """The source of each of these rows of the file `name`; where the set came without its
    provenance/, all are "unknown"."""
    if (origins := origins_of(folder, name)) is None:
        return ["unknown"] * len(rows)
    return [manifest["sources"][s]["name"] for s in origins[rows, 0]]


def documents_of(folder: Path, manifest: dict, name: str, rows: list[int],
                 spans: list[tuple[int, int]] | None = None) -> list[dict] | None:
    """{row, source, file, line} of every document that a token of these rows is from, in order.

    `rows` are places in the file `name` of a data set; `spans`, (first, end) for each, leave the
    row's other tokens out. Of a release, whose documents are not known, it is the line of the row
    itself. A canary comes last, its number for a line; a document of which it left nothing in the
    row is not there. None where the set came without its provenance/.
    """
    if (origins := origins_of(folder, name)) is None:
        return None
    T1, planted, found = manifest["seq_len"] + 1, overwritten(folder, name), []
    for row, (low, high) in zip(rows, spans or [(0, T1)] * len(rows), strict=True):
        source, epoch, number = map(int, origins[row])
        label = manifest["sources"][source]["name"]
        names = files_of(folder, manifest, label)
        if is_release(manifest):
            found.append(dict(row=row, source=label, file=names[chunk_of(name)], line=number))
            continue
        table = documents_table(folder, label, epoch)  # (n, 3): first token, file, line
        begins, canary = number * stride_of(manifest), planted.get(row, (-1, 0, 0))
        start, end = (bisect_right(range(len(table)), begins + token,
                                   key=lambda i, table=table: table[i, 0])
                      for token in (low, high - 1))
        edges = [*(table[start - 1:end, 0] - begins).clip(low), high]
        found += [dict(row=row, source=label, file=names[file], line=int(line))
                  for i, (_, file, line) in enumerate(table[start - 1:end])
                  if edges[i] < canary[1] or edges[i + 1] > canary[2]]
        if low < canary[2] and high > canary[1]:
            found.append(dict(row=row, source="canaries", file=CANARIES, line=canary[0]))
    return found


def epochs_of(manifest: dict, label: str) -> range:
    """The epochs of a source that have rows in the chunks."""
    return range(next(e for e in itertools.count() if (
        f"provenance/{label}_epoch_{e}.npy" not in manifest["files"])))


def tables_of(folder: Path, manifest: dict, source: int, file: str
              ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(epoch, table of documents, places in it that are of a file) of every stream of a source. The
    stream of held-out documents is that of epoch -1."""
    label = manifest["sources"][source]["name"]
    numbers = [i for i, name in enumerate(files_of(folder, manifest, label)) if name == file]
    for epoch in [*epochs_of(manifest, label), HELD_OUT]:
        table = documents_table(folder, label, epoch)
        yield epoch, table, np.flatnonzero(np.isin(table[:, 1], numbers))


def shares_stream(manifest: dict, source: int) -> bool:
    """Whether held-out rows were cut from the stream of the others: prepare.py does so where a
    source has too few documents to hold out whole ones."""
    one = manifest["sources"][source]
    return one["tokens"] == one["all_tokens"]


def stream_rows(folder: Path, manifest: dict, source: int, epoch: int, first: int, end: int
                ) -> list[tuple[int, Part]]:
    """The rows that hold any of tokens first to end - 1 of a stream, wherever they were dealt:
    (token of the stream, part) with what they hold of them. What was left out is not among them."""
    stride, T1, found = stride_of(manifest), manifest["seq_len"] + 1, []
    rows = max(0, (first - T1) // stride + 1), (end - 1) // stride + 1
    valid = valid_name(manifest["sources"][source]["name"])
    for name in manifest["files"]:
        if not name.endswith(".bin") or not name.startswith("train_") and name != valid:
            continue
        at = epoch
        if name == valid:
            if epoch != HELD_OUT and not shares_stream(manifest, source):
                continue
            at = HELD_OUT
        elif epoch == HELD_OUT:
            continue
        origins = origins_of(folder, name)  # sorted, as rows are dealt in their order
        low, high = (bisect_left(range(len(origins)), (source, at, row),
                                 key=lambda i, table=origins: tuple(table[i])) for row in rows)
        for i in range(low, high):
            begins = int(origins[i, 2]) * stride
            part = Part(name, i, max(0, first - begins), min(T1, end - begins))
            found += [(begins + one.first, one) for one in uncovered(folder, part)]
    return sorted(found)


def uncovered(folder: Path, part: Part) -> list[Part]:
    """What a canary left of a part of a row."""
    _, first, end = overwritten(folder, part.name).get(part.row, (-1, 0, 0))
    cuts = [(part.first, min(part.end, first)), (max(part.first, end), part.end)]
    return [Part(part.name, part.row, a, b) for a, b in (cuts if end else cuts[1:]) if a < b]


def find_document(folder: Path, manifest: dict, word: str) -> list[Part]:
    """All parts of rows that hold a token of SOURCE/FILE:LINE; of a release that line's row. Empty
    if they were left out. Raises Stop if there is no such document."""
    label, _, rest = word.partition("/")
    file, _, line = rest.rpartition(":")
    labels = [one["name"] for one in manifest["sources"]]
    if not (label and file and line.isdecimal() and len(line) < 19):
        raise Stop(USAGE, f"--document={word}: expected SOURCE/FILE:LINE, as incidents.jsonl and "
                   "analyze.py batch name documents")
    known = [*labels, *[manifest["recipe"]["sources"][0]["name"]] * is_release(manifest)]
    if label not in known:
        raise Stop(USAGE, f"--document={word}: {folder} has no source {label!r}; it has "
                   f"{', '.join(known)}")
    if not (folder / "provenance").is_dir():
        raise Stop(DATA, f"{folder} came without its provenance/: give --text or --file")
    if file not in (files := files_of(folder, manifest, label)):
        near = difflib.get_close_matches(file, files, 3, 0)
        raise Stop(USAGE, f"--document={word}: {label} has no file {file!r}; the nearest names are "
                   f"{', '.join(near)}")
    if is_release(manifest):
        k, T1, found = files.index(file), manifest["seq_len"] + 1, []
        if (chunk := chunk_name(k)) not in manifest["files"]:
            raise Stop(DATA, f"{folder} has not chunk {k}, which {file} becomes: python prepare.py "
                       f"CONFIG --chunks={k}")
        for name in [chunk, *(valid_name(one) for one in labels if k == 0)]:
            if (lines := origins_of(folder, name)) is None:
                continue  # this source first came in a later chunk
            found += [Part(name, int(i), 0, T1) for i in np.flatnonzero(lines[:, 2] == int(line))
                      if labels[lines[i, 0]] == label or label not in labels]
        return sorted(found)
    source = labels.index(label)
    lines, ranges = set(), []
    for epoch, table, places in tables_of(folder, manifest, source, file):
        lines |= set(table[places, 2].tolist())
        for i in places[table[places, 2] == int(line)]:  # from its BOS to its EOS
            end = table[i + 1, 0] if i + 1 < len(table) else NO_END
            ranges.append((epoch, int(table[i, 0]), int(end)))
    if not ranges:
        near = sorted(sorted(lines, key=lambda one: abs(one - int(line)))[:3])
        raise Stop(USAGE, f"--document={word}: no document begins at line {line} of {file}; the "
                   f"nearest begin at {', '.join(map(str, near)) or 'none: it was not used'}")
    return sorted({part for one in ranges for _, part in
                   stream_rows(folder, manifest, source, *one)})
