"""Rows that others released, ready made: file k becomes chunk k. Rows in, rows out.

    todo = to_make(corpus, n_chunks, folder, "0-3")
    release(corpus, recipe, work, out, folder, todo)

What prepare.py does for a source with `rows = true`, as configs/amber_7b.py has: every row is
checked, some of the first chunk are held out, and a chunk may be trained as soon as it is made.
"""

import collections
import json
import re
from pathlib import Path

import numpy as np

from nano360.config import DATA, NAME, USAGE, Stop, say
from nano360.files import sync, write_sealed
from nano360.rows import (HELD_ORDER, HELD_OUT, chunk_name, open_tokens, permutation, read_manifest,
                          valid_name)
from nano360.sources import Corpus, is_remote, read_json, skip_bad
from nano360.tokens import (Job, Work, Writer, check_bad, file_facts, intact, jobs_of, manifest_of,
                            ordered, publish, read_table)


def what_is_wrong(ids: object, label: object, row: int, limit: int) -> str:
    """With a row of a release, "" for nothing: `row` ids below `limit`, and a name."""
    if not isinstance(ids, list) or not {type(i) for i in ids} <= {int}:  # True is none
        return "no list of ids under 'token_ids'"
    if len(ids) != row:
        return f"{len(ids)} ids, expected {row}"
    if min(ids) < 0 or max(ids) >= limit:
        return f"an id outside of 0 to {limit - 1}"
    named = isinstance(label, str) and re.fullmatch(NAME, label)
    return "" if named else f"source {label!r} is no name"


def rows_job(job: Job) -> dict:
    """Write the rows of a stretch of a release, each checked. In their table the number of the
    source's name among `labels` stands for that of the span."""
    if found := intact(job.out):
        return found
    notes, labels, writer = collections.Counter(), {}, Writer(job.out, job.dtype)
    limit = json.loads(job.spec)["vocab_size"]
    for span in job.spans:
        for line, row in read_json(span, job.data, notes):
            row = row if isinstance(row, dict) else {}
            ids, label = row.get("token_ids"), row.get("source", job.source.name)
            if wrong := what_is_wrong(ids, label, job.row, limit):
                skip_bad(notes, job.data.max_bad_documents, f"{span.path}:{line}: {wrong} "
                         "(--max_bad_documents=N skips such lines)")
                continue
            writer.docs += [writer.at, labels.setdefault(label, len(labels)), line, 0, 0]
            writer.add(ids)
    return writer.close(notes, list(labels))


def read_release(corpus: Corpus, k: int, names: list[str], work: Work
                 ) -> tuple[np.ndarray, list[np.ndarray], collections.Counter]:
    """Of file k of a release: (source, epoch 0, line) of every row, (n, 3); the rows, stretch by
    stretch; and what was noticed. A source is its place in `names`, which grow by those that are
    new."""
    origin, stretches, notes = [], [], collections.Counter()
    jobs = jobs_of(corpus, [k], 0, work)
    for job, found in ordered(work.pool, rows_job, jobs, 2 * work.workers):
        names += [name for name in found["labels"] if name not in names]
        table, index = read_table(job.out), [names.index(name) for name in found["labels"]]
        index = np.array(index, int)[table[:, 1]]
        origin.append(np.stack([index, 0 * index, table[:, 2]], axis=1))
        stretches.append(open_tokens(f"{job.out}.tokens", work.dtype).reshape(-1, work.row))
        notes.update(found["notes"])
    corpus.notes.update(notes)
    check_bad(corpus, work.config.data)
    return np.concatenate(origin), stretches, notes


def make_chunk(corpus: Corpus, k: int, manifest: dict, work: Work, out: Path) -> None:
    """Turn file k of a release into chunk k, and add it to the manifest.

    Amber published no held-out rows: of every source valid_rows are taken out of the first chunk,
    by seed. All chunks are made of one size, and what is more is left out, as Amber's trainer did.
    The way back from a row: its line in file k, by the names in provenance/<release>_files.json.
    """
    data, names = work.config.data, [one["name"] for one in manifest["sources"]]
    origin, stretches, notes = read_release(corpus, k, names, work)
    order = permutation(len(origin), data.seed, HELD_ORDER, k)
    held, used = np.zeros((2, len(origin)), bool)
    for s in range(len(names) if k == 0 else 0):
        held[order[origin[order, 0] == s][:data.valid_rows]] = True
    free = order[~held[order]]
    size = manifest["rows_per_chunk"] or data.rows_per_chunk or len(free)
    if len(free) < max(1, size):
        raise Stop(DATA, f"{corpus.files[k].path} has {len(origin)} rows, {held.sum()} held out: "
                   f"fewer than {max(1, size)} to train; give a smaller --rows_per_chunk")
    used[free[len(free) - size:]], origin[held, 1] = True, HELD_OUT
    files = [(chunk_name(k), used)] + [(valid_name(name), held & (origin[:, 0] == s))
                                       for s, name in enumerate(names) if k == 0]
    edges = np.cumsum([0] + [len(rows) for rows in stretches])
    for name, mine in files:
        with open(out / f"{name}.part", "wb") as file:
            for rows, start, end in zip(stretches, edges[:-1], edges[1:], strict=True):
                file.write(rows[mine[start:end]].tobytes())
        np.save(out / "provenance" / f"{name}.npy", origin[mine])
        sync(out / f"{name}.part")
        (out / f"{name}.part").rename(out / name)
    manifest["rows_per_chunk"] = size
    for s, name in enumerate(() if chunk_name(k) in manifest["files"] else names):  # counted once
        n, all_rows, n_held = (int((mask & (origin[:, 0] == s)).sum()) for mask in
                               (used, True, held))
        if s == len(manifest["sources"]):
            manifest["sources"].append(manifest["recipe"]["sources"][0] | dict(
                name=name, licence=corpus.source.licence, documents=0, bytes=0, notes={}, rows=0,
                all_tokens=0, rows_per_chunk=n, tokens=0, epochs=1, valid_rows=n_held,
                rows_left_out=0))
        one = manifest["sources"][s]
        one.update(rows=one["rows"] + n, tokens=one["tokens"] + n * work.row,
                   all_tokens=one["all_tokens"] + all_rows * work.row,
                   notes={kind: one["notes"].get(kind, 0) + notes[kind]
                          for kind in sorted({*one["notes"], *notes})},
                   rows_left_out=one["rows_left_out"] + all_rows - n)
    names = [name for name, _ in files]
    facts = file_facts(out, work, names + [f"provenance/{name}.npy" for name in names])
    if changed := [n for n in facts if manifest["files"].get(n, facts[n]) != facts[n]]:
        raise Stop(DATA, f"{out / changed[0]} is not what it was when it was made before")
    manifest["files"] |= facts


def to_make(corpus: Corpus, n_chunks: int, folder: Path, chosen: str | None) -> list[int]:
    """Which chunks of a release are to be made: the first, of which rows are held out, and what was
    asked for; one that was made and let go only if it is named."""
    first, _, last = (chosen or f"0-{n_chunks - 1}").partition("-")
    asked, n = range(int(first), int(last or first) + 1), min(n_chunks, len(corpus.files))
    if not asked or asked[-1] >= n or n_chunks > n:
        raise Stop(USAGE, f"n_chunks = {n_chunks}, the release has {len(corpus.files)} files: "
                   f"give a smaller --n_chunks, or --chunks within 0-{n - 1}")
    made = read_manifest(folder)["files"] if folder.exists() else {}
    return [k for k in sorted({0, *asked}) if chunk_name(k) not in made or (
        chosen and k in asked and not (folder / chunk_name(k)).is_file())]


def release(corpus: Corpus, recipe: dict, work: Work, out: Path, folder: Path, todo: list[int]
            ) -> None:
    """Make the chunks of a release one after the other; each may be trained when it is made."""
    for k in todo:
        where = folder if folder.exists() else out
        manifest = read_manifest(folder) if folder.exists() else manifest_of(recipe, work, 0, [])
        make_chunk(corpus, k, manifest, work, where)
        if not folder.exists():
            (out / "provenance" / f"{corpus.source.name}_files.json").write_text(
                json.dumps([file.name for file in corpus.files]), encoding="utf-8")
            manifest["files"] |= file_facts(out, work)
        write_sealed(where / "manifest.json", manifest)
        if not folder.exists():
            publish(out, folder)
        for path in (work.folder / "work").glob("*.*"):
            path.unlink()
        if is_remote(corpus.source) and not work.config.data.keep_downloads:
            corpus.files[k].path.unlink(missing_ok=True)
        say(f"{folder / chunk_name(k)} is there: {manifest['rows_per_chunk']:,} rows")
