"""The benchmarks' files: fetched once from where their makers put them, made into rows as the hub
has them.

    fetch_benchmarks(["hellaswag", "mmlu"], Path("data/eval"))    # evaluate.py --fetch calls it

Reads the URLs below; writes <root>/<benchmark>/<split>.jsonl, <root>/originals/<file> as it came,
and <root>/index.json: for each split its URL, the size, ETag and sha256 of what was fetched, and
the sha256 of the rows. What lies there is not fetched again, and nothing else is ever asked of the
network. Archives are read, never unpacked, so no path in them matters.
"""

import csv
import hashlib
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nano360.config import DATA, Stop, say
from nano360.files import sha256_file, write_atomic
from nano360.hub.fetch import ask, fetch

LIMIT = 2**30  # bytes of a file, and of an archive's member, which may claim more than any disk
Files = list[tuple[str, str]]  # name and text, in the order of the archive
DAMAGED = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError,
           zlib.error, lzma.LZMAError, struct.error)  # what reading a broken archive may raise
ODD = (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)  # its rows


# ---- files as they were published -> rows as the hub has them ------------------------------------

def lines(files: Files, suffix: str = ".jsonl") -> list[dict]:
    return [json.loads(line) for name, text in files if name.endswith(suffix)
            for line in text.split("\n") if line.strip()]


def as_they_are(files: Files) -> Iterable[dict]:
    return lines(files)


def with_labels(files: Files) -> Iterator[dict]:
    """Questions and, in a second file, what is right, one a line."""
    labels = [line for name, text in files if name.endswith(".lst") for line in text.split()]
    for row, label in zip(lines(files), labels, strict=True):
        yield row | {"label": int(label)}


def true_is_1(files: Files) -> Iterator[dict]:
    return (row | {"label": int(row["label"])} for row in lines(files))


def flat_choices(files: Files) -> Iterator[dict]:
    """ARC and OpenBookQA: the stem and the choices stand inside the question."""
    for row in lines(files):
        stem, choices = row["question"]["stem"], row["question"]["choices"]
        yield {"id": row["id"], "question": stem, "question_stem": stem, "choices": {
            "text": [one["text"] for one in choices], "label": [one["label"] for one in choices]},
            "answerKey": row["answerKey"]}


def mmlu_tables(files: Files) -> Iterator[dict]:
    """A table without header for each subject, which its name says; by subject, as on the hub."""
    for name, text in sorted(files):
        subject = name.rpartition("/")[2].rpartition("_")[0]
        for question, a, b, c, d, letter in csv.reader(io.StringIO(text, newline="")):
            yield {"question": question, "subject": subject, "choices": [a, b, c, d],
                   "answer": [*"ABCD"].index(letter)}  # "ABCD".index("") is 0


def targets(files: Files) -> Iterator[dict]:
    """TruthfulQA: {choice: 1 or 0}, in an order that counts."""
    for row in json.loads(files[0][1]):
        yield {"question": row["question"]} | {
            name: {"choices": [*row[name]], "labels": [*row[name].values()]}
            for name in ("mc1_targets", "mc2_targets")}


def race_articles(files: Files) -> Iterator[dict]:
    """An article in a file, its problems in three lists: one row. In the archive's order, which is
    the hub's and no other, and which solved examples are drawn by."""
    for _, text in files:
        one = json.loads(text)
        problems = [dict(question=question, answer=answer, options=options) for question, answer,
                    options in zip(one["questions"], one["answers"], one["options"], strict=True)]
        yield {"article": one["article"], "problems": str(problems)}


def tabbed(files: Files) -> Iterator[dict]:
    """A table with a header; the column of row numbers has no name in it."""
    for row in csv.DictReader(io.StringIO(files[0][1], newline=""), delimiter="\t"):
        if None in row:
            raise ValueError(f"a line has more fields than the header: {row[None]}")
        yield {name or "id": text for name, text in row.items()}


def pages(files: Files) -> Iterator[dict]:
    """WikiText: a page begins with a line = Title =; those of its parts have more signs."""
    page: list[str] = []
    for line in files[0][1].split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if any(map(str.strip, page)):
                yield {"page": "\n".join(page)}
            page = []
        page.append(line)
    yield {"page": "\n".join(page)}


# ---- where they are ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Origin:
    url: str
    splits: dict[str, tuple[str, int]]  # -> which members of an archive, and how many rows it has
    rows: Callable[[Files], Iterable[dict]] = as_they_are
    fields: str = ""  # what a row must have, where `rows` itself asks for nothing


AI2 = "https://ai2-public-datasets.s3.amazonaws.com"
MOSAIC = "https://storage.googleapis.com/ai2-mosaic/public"
GLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
GITHUB = "https://raw.githubusercontent.com"
ARC = f"{AI2}/arc/ARC-V1-Feb2018.zip"
HELLASWAG = "activity_label ctx_a ctx_b endings label"
ORIGINS = {  # the makers' own, or, where these have gone, of who keeps the same files
    "arc_challenge": [Origin(ARC, {"train": ("*/ARC-Challenge-Train.jsonl", 1119),
                                   "validation": ("*/ARC-Challenge-Dev.jsonl", 299),
                                   "test": ("*/ARC-Challenge-Test.jsonl", 1172)}, flat_choices)],
    "arc_easy": [Origin(ARC, {"train": ("*/ARC-Easy-Train.jsonl", 2251),
                              "validation": ("*/ARC-Easy-Dev.jsonl", 570),
                              "test": ("*/ARC-Easy-Test.jsonl", 2376)}, flat_choices)],
    "boolq": [Origin(f"{GLUE}/BoolQ.zip", {"train": ("*train.jsonl", 9427),
                                           "validation": ("*val.jsonl", 3270)}, true_is_1,
                     "question passage")],
    "copa": [Origin(f"{GLUE}/COPA.zip", {"train": ("*train.jsonl", 400),
                                         "validation": ("*val.jsonl", 100)},
                    fields="premise choice1 choice2 question label")],
    "crows_pairs": [Origin(  # not the first edition: the harness has this one
        "https://gitlab.inria.fr/french-crows-pairs/acl-2022-paper-data-and-code/-/raw/main/data/"
        "crows_pairs_EN_revised+210.csv", {"test": ("", 1677)}, tabbed,
        "sent_more sent_less stereo_antistereo bias_type")],
    "hellaswag": [
        Origin(f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_train.jsonl",
               {"train": ("", 39905)}, fields=HELLASWAG),
        Origin(f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
               {"validation": ("", 10042)}, fields=HELLASWAG)],
    "mmlu": [Origin("https://people.eecs.berkeley.edu/~hendrycks/data.tar", {
        "dev": ("data/dev/*_dev.csv", 285), "validation": ("data/val/*_val.csv", 1531),
        "test": ("data/test/*_test.csv", 14042)}, mmlu_tables)],
    "openbookqa": [Origin(f"{AI2}/open-book-qa/OpenBookQA-V1-Sep2018.zip", {
        "train": ("*/Main/train.jsonl", 4957), "validation": ("*/Main/dev.jsonl", 500),
        "test": ("*/Main/test.jsonl", 500)}, flat_choices)],
    "piqa": [Origin(f"{MOSAIC}/physicaliqa/physicaliqa-train-dev.zip", {
        "train": ("*/train[.-]*", 16113), "validation": ("*/dev[.-]*", 1838)}, with_labels,
        "goal sol1 sol2")],
    "race": [Origin("https://www.cs.cmu.edu/~glai1/data/race/RACE.tar.gz", {
        "train": ("*/train/high/*.txt", 18728), "test": ("*/test/high/*.txt", 1045)},
        race_articles)],
    "social_iqa": [Origin(f"{MOSAIC}/socialiqa/socialiqa-train-dev.zip", {
        "train": ("*/train[.-]*", 33410), "validation": ("*/dev[.-]*", 1954)}, with_labels,
        "context question answerA answerB answerC")],
    "truthfulqa_mc": [Origin(  # before 2025, when 27 questions were taken out
        f"{GITHUB}/sylinrl/TruthfulQA/013686a06be7a7bde5bf8223943e106c7250123c/data/mc_task.json",
        {"validation": ("", 817)}, targets)],
    "wikitext": [Origin("https://wikitext.smerity.com/wikitext-2-raw-v1.zip", {
        "test": ("*/wiki.test.raw", 62)}, pages)],
    "winogrande": [Origin(f"{MOSAIC}/winogrande/winogrande_1.1.zip", {
        "train": ("*/train_xl.jsonl", 40398), "validation": ("*/dev.jsonl", 1267)},
        fields="sentence option1 option2 answer")],
}


def members(path: Path, pattern: str) -> Files:
    """The members of an archive that a pattern names, in its order; of what is no archive, the file
    itself. Raises Stop(DATA)."""
    found = []
    try:
        if pattern and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for one in archive.infolist():
                    if wanted(one.filename, pattern, one.file_size, path):
                        found.append((one.filename, archive.read(one)))
        elif pattern:
            with tarfile.open(path) as archive:
                for one in archive:
                    if one.isreg() and wanted(one.name, pattern, one.size, path):
                        found.append((one.name, archive.extractfile(one).read()))
                while archive.fileobj.read(2**20):  # to where gzip has its checksum
                    pass
        else:
            found.append((path.name, path.read_bytes()))
        if not found:
            raise ValueError(f"it has no file {pattern}")
        return [(name, data.decode()) for name, data in found]
    except DAMAGED as error:
        what = str(error).partition("\n")[0].rstrip(":")  # tarfile's goes on for many lines
        raise Stop(DATA, f"{path} cannot be read: {what}; move it away, and the same command "
                   "fetches it again") from error


def wanted(name: str, pattern: str, size: int, path: Path) -> bool:
    """Whether a member is asked for; macOS puts shadows of files beside them."""
    *folders, last = name.split("/")
    if "__MACOSX" in folders or last.startswith("._") or not fnmatchcase(name, pattern):
        return False
    if size > LIMIT:
        raise Stop(DATA, f"{path}: {name!r} says that it has {size:,} bytes, at most {LIMIT:,} are "
                   "read; is this the file that its makers put there?")
    return True


def checked(row: dict, fields: str) -> dict:
    if lacking := [name for name in fields.split() if row.get(name) is None]:
        raise LookupError(f"a row without {', '.join(lacking)}")
    return row


def fetch_origin(folder: str, origin: Origin, root: Path, index: dict) -> None:
    """One file, and the splits in it that do not lie there yet. Raises Stop."""
    missing = {split: one for split, one in origin.splits.items()
               if not (root / folder / f"{split}.jsonl").is_file()}
    if not missing:
        return
    path = root / "originals" / origin.url.rpartition("/")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {one["sha256"]: one for one in index.values() if one["url"] == origin.url}
    found = sha256_file(path) if known and path.is_file() else ""
    if found not in known:
        remote = ask(origin.url)
        if found:  # fetch() knows the size of what is there, and would take it if that were right
            path.replace(f"{path}.bad")
            say(f"{path} was changed: fetched again, what it was is kept as {path.name}.bad")
        fetch(remote, path, LIMIT)
        found = sha256_file(path)
        known[found] = dict(url=origin.url, size=path.stat().st_size, etag=remote.etag,
                            sha256=found)
    for split, (pattern, count) in missing.items():
        files, where = members(path, pattern), root / folder / f"{split}.jsonl"
        try:
            rows = [json.dumps(checked(row, origin.fields)) for row in origin.rows(files)]
        except ODD as error:
            raise Stop(DATA, f"{path} is not as {folder} was published ({error!r}); put the rows "
                       f"into {where} yourself") from error
        if len(rows) != count:
            raise Stop(DATA, f"{path} has {len(rows)} rows for {where}, the benchmark has {count}: "
                       "it was changed, or is not whole; put the rows there yourself")
        where.parent.mkdir(exist_ok=True)
        text = "\n".join(rows) + "\n"
        index[f"{folder}/{split}.jsonl"] = known[found] | {
            "rows": count, "rows_sha256": hashlib.sha256(text.encode()).hexdigest()}
        # the index first: a kill in between leaves a split to make again, never one it lacks
        write_atomic(root / "index.json", json.dumps(index, indent=1) + "\n")
        write_atomic(where, text)
        say(f"{where}: {count:,} rows")


def fetch_benchmarks(folders: list[str], root: Path) -> None:
    """Put the rows of these benchmarks below root, as far as they are not there. Raises Stop."""
    path = root / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for one in index.values():
            checked(one, "url size etag sha256")
    except ODD as error:
        raise Stop(DATA, f"{path} is no index of benchmarks ({type(error).__name__}: {error}); "
                   "move it away, and it is begun anew") from error
    for folder in folders:
        for origin in ORIGINS.get(folder, ()):  # none: the rows of a run, a text
            fetch_origin(folder, origin, root, index)
