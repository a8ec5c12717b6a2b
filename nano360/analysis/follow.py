"""What analyze.py prints of rows: their documents, when they were trained, what was said again.

    print_memorized(tokenizer, asked, lines, 7)   # of memorization, with --show_text
    print_parts(run, parts, texts)                # of trace
    print_documents(run, name, rows, texts)       # of batch
    logged_rows(path, step)                       # what batch holds its rows to
"""

import json
from pathlib import Path

import numpy as np

from nano360.analysis.provenance import Part, chunk_of, documents_of
from nano360.analysis.runs import Run
from nano360.analysis.samples import Asked
from nano360.analysis.search import plain
from nano360.config import CHECKPOINT, DATA, Stop, columns
from nano360.rows import chunk_name
from nano360.tokenizer_json import JsonTokenizer
from nano360.tokenizers import Tokenizer


def named(documents: list[dict] | None) -> list[str]:
    """A row's source, and its documents as file:line; a canary comes last."""
    if not documents:
        return ["-", "not known"]
    return [documents[0]["source"], plain(", ".join(
        f"canary {one['line']}" if one["source"] == "canaries" else f"{one['file']}:{one['line']}"
        for one in documents))]


def visits_of(run: Run, part: Part) -> list[tuple[str, str, str]]:
    """(visit, step, checkpoints that have seen it) of a row, for each visit of its chunk; `step` is
    a number only if the row was trained."""
    if not part.name.startswith("train_"):
        return [("-", "-", "held out: no checkpoint has seen it")]
    chunk, found = chunk_of(part.name), []
    for visit in run.visits(chunk):
        step = "not released"
        if run.plan is not None:
            number = int(run.steps(visit, np.array([part.row]))[0])
            step = ("left out" if not number else "not yet" if number > run.step else
                    "skipped" if number in run.skipped else str(number))
        seen = [v for v in sorted(v for v in run.checkpoints if v is not None) if v >= visit
                and (step.isdecimal() or run.plan is None)]
        later = f" and {len(seen) - 1} later" if len(seen) > 1 else ""
        found.append((str(visit), step, f"ckpt_{seen[0]:03d}{later}" if seen else
                      "not known" if None in run.checkpoints else "none"))
    return found or [("-", "dropped", "none")]


def excerpt(tokenizer: Tokenizer | JsonTokenizer, row: np.ndarray, part: Part) -> str:
    """About 60 characters of a part of a row, and as many before and after it."""
    before, now, after = (plain(tokenizer.decode(ids)) for ids in (
        row[max(0, part.first - 40):part.first], row[part.first:min(part.end, part.first + 40)],
        row[part.end:part.end + 40]))
    return f"    {before[-60:]}[{now[:60]}]{after[:60]}"


def print_rows(heads: list[str], lines: list[list], texts: list[str]) -> None:
    """A table, and under each of its lines its text, if there is one."""
    for line, text in zip(columns([heads, *lines]), ["", *texts], strict=True):
        print(line + f"\n{text}" * bool(text))


def print_parts(run: Run, parts: list[Part], texts: list[str]) -> None:
    """A line per row and visit, its text under it, and what they come to."""
    lines, below, trained, seen = [], [], [], []
    for part, text in zip(parts, texts, strict=True):
        documents = documents_of(run.data, run.manifest, part.name, [part.row],
                                 [(part.first, part.end)])
        for visit, step, checkpoints in visits_of(run, part):
            lines.append([part.name.removeprefix("train_").removesuffix(".bin"), str(part.row),
                          f"{part.first}-{part.end}", *named(documents), visit, step, checkpoints])
            below.append(text)
            trained += [int(step)] if step.isdecimal() else []
            seen += [checkpoints.split()[0]] * checkpoints.startswith("ckpt_")
    heads = ["chunk", "row", "tokens", "source", "documents", "visit", "step", "seen by"]
    if parts:
        print_rows(heads, lines, below)
    chunks = {part.name for part in parts if part.name.startswith("train_")}
    when = (f"first step {min(trained)}" if trained else "its step is not released" if
            run.plan is None and chunks else "no step trained it")
    whose = "first checkpoint that has seen it" if len(run.checkpoints) > 1 else "seen by"
    first = min(seen, key=lambda name: int(name[len("ckpt_"):]), default="none")
    rows = {(part.name, part.row) for part in parts}  # a canary may cut one in two parts
    print(f"rows {len(rows)}, chunks {len(chunks)}, " + (
        f"{when}, {whose}: {first}" if parts else
        "it is not in the data set, or was left out"))


def print_documents(run: Run, name: str, rows: list[int], texts: list[str]) -> None:
    """A table of rows of the file `name`, with the documents that each was cut from."""
    of_row: dict[int, list[dict]] = {row: [] for row in rows}
    for document in documents_of(run.data, run.manifest, name, rows) or ():
        of_row[document["row"]].append(document)
    lines = [[row, *named(documents)] for row, documents in of_row.items()]
    print_rows(["row", "source", "documents"], lines, texts)


def print_incidents(run: Run, step: int) -> None:
    """What incidents.jsonl says of the rows of a step, with their documents. After a chunk was put
    off, a step of this number trains other rows: each line names the chunk that it is about."""
    path = run.folder / "incidents.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        for line in map(json.loads, text[:text.rfind("\n") + 1].splitlines()):
            if line["step"] != step or "rows" not in line:  # a restart has none
                continue
            loss = line["loss"] if line["kind"] == "spike" else ", ".join(line["loss"])
            print(f"{line['kind']} in launch {line['launch']}: chunk {line['chunk']:03d} of epoch "
                  f"{line['epoch']}, loss {loss}" + f"; {line.get('action')}" * ("action" in line))
            rows = line["rows"]
            print_documents(run, chunk_name(line["chunk"]), rows, [""] * len(rows))
    except (ValueError, LookupError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{path} holds a line that is none of ours: {error!r}; mend it or "
                   "move it away") from error


def logged_rows(path: Path, step: int) -> str | None:
    """The hash of a step's rows as metrics.jsonl has it; none: no line yet. Raises Stop."""
    found = None
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n") and f'"step": {step},' in line:
                    one = json.loads(line)
                    found = one["rows"] if one["kind"] == "train" else found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise Stop(DATA, f"{path} is broken at step {step}: {error}") from error
    return found


def print_memorized(tokenizer: Tokenizer | JsonTokenizer, asked: list[Asked], lines: list[dict],
                    visit: int | None) -> None:
    """What a checkpoint says again to the last id, in its own lines: prompt, bar, continuation."""
    whole: dict[tuple, list[dict]] = {}
    for line in lines:
        if line["visit"] == visit and line["kind"] == "row" and line["score"] == 1:
            whole.setdefault((line["data"], line["row"]), []).append(line)
    for one in asked:
        for row, ids in zip(one.rows.tolist(), one.ids.tolist(), strict=True):
            for line in whole.get((one.data, row), ()):
                k, end = line["k"], line["k"] + line["l"]
                texts = tokenizer.decode(ids[:k]), tokenizer.decode(ids[k:end])
                print(f"\nchunk {one.chunk}, row {row}:\n" + "|".join(map(plain, texts)))
