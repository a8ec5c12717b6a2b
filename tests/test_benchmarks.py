"""hub/benchmarks.py: every benchmark's files as their makers laid them out -> the hub's rows.

    pytest tests/test_benchmarks.py

A server on this machine has the archives, each with a few questions and with what else lies in the
real ones; the tables of URLs, members and adapters are those of ORIGINS, all but host and counts.
"""

import hashlib
import io
import json
import random
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nano360.config import DATA, Stop
from nano360.files import write_atomic
from nano360.hub import benchmarks, fetch as net
from nano360.hub.benchmarks import ORIGINS, fetch_benchmarks
from nano360.tasks import LEGACY, TASKS, read_examples, read_pages
from test_fetch import start, stopped

REAL = dict(ORIGINS)


def name_of(url: str) -> str:
    return url.rpartition("/")[2]


# ---- what the makers published -------------------------------------------------------------------

def jsonl(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zipped(files: dict[str, bytes]) -> bytes:
    """With the folders themselves, and the shadows that macOS adds, which are no text."""
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            folder, _, last = name.rpartition("/")
            archive.writestr(f"__MACOSX/{name}", b"\0\5\x16\7\xff")
            archive.writestr(f"{folder}/._{last}", b"\0\5\x16\7\xff")
            archive.writestr(name, data)
        archive.writestr(f"{folder}/", b"")
    return packed.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode=mode) as archive:
        for name, data in files.items():
            folder, _, last = name.rpartition("/")
            for one, content in ((f"{folder}/._{last}", b"\xff"), (name, data)):
                (info := tarfile.TarInfo(one)).size = len(content)
                archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo(f"{folder}/1{last}")  # what a pattern names, and is no file
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return packed.getvalue()


def arc_row(name: str, labels: str = "ABCD") -> dict:
    stem = f"{name}: “why”?"
    return {"id": name, "question": stem, "question_stem": stem, "choices": {
        "text": [f"because {one}" for one in labels], "label": [*labels]}, "answerKey": labels[2]}


def arc(row: dict) -> dict:
    """The same as it was published."""
    choices = [dict(text=text, label=label) for text, label in zip(
        row["choices"]["text"], row["choices"]["label"], strict=True)]
    return {"id": row["id"], "question": {"stem": row["question"], "choices": choices},
            "answerKey": row["answerKey"]}


ARC_FILES = {f"ARC-V1-Feb2018-2/ARC-{kind}/ARC-{kind}-{split}.{end}": data
             for kind in ("Challenge", "Easy") for split in ("Train", "Dev", "Test")
             for end, data in (("csv", b"not this"), ("jsonl", jsonl(
                 arc(arc_row(kind + split)), arc(arc_row(f"{kind}{split}2", "12345")))))}
OPENBOOK_FILES = {f"OpenBookQA-V1-Sep2018/Data/{name}.jsonl": jsonl(arc(arc_row(name)))
                  for name in ("Main/train", "Main/dev", "Main/test", "Additional/train_complete")}
BOOLQ = {"question": "is it so", "passage": "Title -- Text, with \u2028 in it.", "idx": 0}
COPA = {"premise": "It rained.", "choice1": "He got wet.", "choice2": "He sang.",
        "question": "effect", "idx": 0, "label": 0}
HELLASWAG = {"ind": 4, "activity_label": "Youth", "ctx_a": "[header] A", "ctx_b": "he", "ctx": "-",
             "split": "val", "split_type": "indomain", "label": 3, "endings": [*"abcd"],
             "source_id": "activitynet~v_1"}
PIQA = {"goal": "Open a jar", "sol1": "turn it", "sol2": "drop it"}
SIQA = {"context": "A met B.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z"}
WINOGRANDE = {"qID": "3FCO-1", "sentence": "A paid B as _ owed.", "option1": "A", "option2": "B",
              "answer": "1"}
CROWS = (b"\tsent_more\tsent_less\tstereo_antistereo\tbias_type\r\n"
         b'0\t"They said ""no"", and\tleft."\tThey left.\tstereo\tage\r\n'
         b"1\tIt's l\xc3\xa0.\tIt is.\tantistereo\tother\r\n")
RACE = {"answers": ["A", "D"], "options": [["a", "b's", 'c"', "d"], [*"wxyz"]],
        "questions": ["The text says  _  .", "Who?"], "article": "Once.\r\nUpon", "id": "high9.txt"}
PROBLEMS = [{"question": "The text says  _  .", "answer": "A", "options": ["a", "b's", 'c"', "d"]},
            {"question": "Who?", "answer": "D", "options": [*"wxyz"]}]
WIKI = (" \n = Robert <unk> = \n \n He acts . \n \n = = Career = = \n \n In 2000 @,@ 1 . \n "
        "= = = 2000 = = = \n Text \n = Du Fu = \n \n A poet .\n")
TRUTHS = [{"question": "Is it?", "mc1_targets": {"Yes.": 1, "No.": 0},
           "mc2_targets": {"z": 1, "a": 1, "m": 0}}]
MMLU_FILES = {  # the tar is in the order of no alphabet; a question has commas, lines and quotes
    "data/test/virology_test.csv": b'"He said ""a, b""\r\nI. x\nII. y",1,"2,5",3,,D\n',
    "data/test/abstract_algebra_test.csv": b"Q1,1,2,3,4,A\r\nQ2,5,6,7,8,B\n",
    "data/val/virology_val.csv": b"Q3,a,b,c,d,C\n", "data/dev/virology_dev.csv": b"Q4,a,b,c,d,B\n",
    "data/auxiliary_train/race.csv": b"Q5,a,b,c,d,A\n", "data/README.txt": b"read"}


def mmlu_row(question: str, subject: str, choices: str, answer: int) -> dict:
    return dict(question=question, subject=subject, choices=choices.split("|"), answer=answer)


ORIGINALS = {  # the last part of a URL -> the file
    "ARC-V1-Feb2018.zip": zipped(ARC_FILES),
    "BoolQ.zip": zipped({f"BoolQ/{split}.jsonl": jsonl(BOOLQ | {"label": right})
                         for split, right in (("train", True), ("val", False))} | {
        "BoolQ/test.jsonl": jsonl(BOOLQ)}),
    "COPA.zip": zipped({f"COPA/{split}.jsonl": jsonl(COPA | {"idx": n})
                        for n, split in enumerate(("train", "val", "test"))}),
    "crows_pairs_EN_revised+210.csv": CROWS,
    "hellaswag_train.jsonl": jsonl(HELLASWAG), "hellaswag_val.jsonl": jsonl(HELLASWAG, HELLASWAG),
    "data.tar": tarred(MMLU_FILES), "OpenBookQA-V1-Sep2018.zip": zipped(OPENBOOK_FILES),
    "physicaliqa-train-dev.zip": zipped({
        f"physicaliqa-train-dev/{name}": data
        for split, labels in (("train", b"1\n0\n"), ("dev", b"0\n1\n")) for name, data in (
            (f"{split}-labels.lst", labels), (f"{split}.jsonl", jsonl(PIQA, PIQA)))}),
    "RACE.tar.gz": tarred({"RACE/test/middle/1.txt": b"{", "RACE/dev/high/1.txt": b"{",
                           "RACE/train/high/2.txt": jsonl(RACE | {"article": "2"})} | {
        f"RACE/test/high/{n}.txt": jsonl(RACE | {"article": f"{n}"}) for n in (9, 1, 10)}, "w:gz"),
    "socialiqa-train-dev.zip": zipped({
        f"socialiqa-train-dev/{name}": data
        for split, labels in (("train", b"3"), ("dev", b"1")) for name, data in (
            (f"{split}.jsonl", jsonl(SIQA)), (f"{split}-labels.lst", labels))}),
    "mc_task.json": json.dumps(TRUTHS, indent=4).encode(),
    "wikitext-2-raw-v1.zip": zipped({"wikitext-2-raw/wiki.test.raw": WIKI.encode(),
                                     "wikitext-2-raw/wiki.train.raw": b" = X = \n"}),
    "winogrande_1.1.zip": zipped({
        f"winogrande_1.1/{name}": jsonl(WINOGRANDE | {"qID": name}) for name in (
            "train_xl.jsonl", "train_l.jsonl", "train_xl-labels.lst", "dev.jsonl", "test.jsonl")}),
}
ROWS = {  # what has to come of them
    folder: {split: [arc_row(kind + name), arc_row(f"{kind}{name}2", "12345")]
             for split, name in (("train", "Train"), ("validation", "Dev"), ("test", "Test"))}
    for folder, kind in (("arc_challenge", "Challenge"), ("arc_easy", "Easy"))} | {
    "boolq": {"train": [BOOLQ | {"label": 1}], "validation": [BOOLQ | {"label": 0}]},
    "copa": {"train": [COPA], "validation": [COPA | {"idx": 1}]},
    "crows_pairs": {"test": [
        {"id": "0", "sent_more": 'They said "no", and\tleft.', "sent_less": "They left.",
         "stereo_antistereo": "stereo", "bias_type": "age"},
        {"id": "1", "sent_more": "It's là.", "sent_less": "It is.",
         "stereo_antistereo": "antistereo", "bias_type": "other"}]},
    "hellaswag": {"train": [HELLASWAG], "validation": [HELLASWAG, HELLASWAG]},
    "mmlu": {"dev": [mmlu_row("Q4", "virology", "a|b|c|d", 1)],
             "validation": [mmlu_row("Q3", "virology", "a|b|c|d", 2)],
             "test": [mmlu_row("Q1", "abstract_algebra", "1|2|3|4", 0),
                      mmlu_row("Q2", "abstract_algebra", "5|6|7|8", 1),
                      mmlu_row('He said "a, b"\r\nI. x\nII. y', "virology", "1|2,5|3|", 3)]},
    "openbookqa": {split: [arc_row(f"Main/{name}")] for split, name in (
        ("train", "train"), ("validation", "dev"), ("test", "test"))},
    "piqa": {"train": [PIQA | {"label": 1}, PIQA | {"label": 0}],
             "validation": [PIQA | {"label": 0}, PIQA | {"label": 1}]},
    "race": {split: [{"article": f"{n}", "problems": str(PROBLEMS)} for n in numbers]
             for split, numbers in (("train", (2,)), ("test", (9, 1, 10)))},
    "social_iqa": {"train": [SIQA | {"label": 3}], "validation": [SIQA | {"label": 1}]},
    "truthfulqa_mc": {"validation": [{
        "question": "Is it?", "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["z", "a", "m"], "labels": [1, 1, 0]}}]},
    "wikitext": {"test": [{"page": WIKI[2:WIKI.index(" = Du Fu")].removesuffix("\n")},
                          {"page": " = Du Fu = \n \n A poet .\n"}]},
    "winogrande": {split: [WINOGRANDE | {"qID": f"{name}.jsonl"}] for split, name in (
        ("train", "train_xl"), ("validation", "dev"))},
}


# ---- a server that has it ------------------------------------------------------------------------

@pytest.fixture
def site(monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """The server; ORIGINS as it is, but for host and row counts."""
    server, moved = start("127.0.0.1"), {}
    monkeypatch.setattr(net, "SCHEMES", ("http://127.0.0.1:",))
    monkeypatch.setattr(net, "PAUSE", 0.002)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for folder, origins in REAL.items():
        moved[folder] = []
        for origin in origins:
            path = urlsplit(origin.url).path
            server.files[path] = (ORIGINALS[name_of(path)], {})
            moved[folder].append(replace(origin, url=server.url + path, splits={
                split: (pattern, len(ROWS[folder][split]))
                for split, (pattern, _) in origin.splits.items()}))
    monkeypatch.setattr(benchmarks, "ORIGINS", moved)
    yield server
    server.shutdown()
    server.server_close()


def serve(site: ThreadingHTTPServer, name: str, data: bytes) -> None:
    """Something else at the URL that ends in this name."""
    path, = (path for path in site.files if name_of(path) == name)
    site.files[path] = (data, {})


def index_of(root: Path) -> dict:
    return json.loads((root / "index.json").read_text(encoding="utf-8"))


def asked(site: ThreadingHTTPServer) -> Counter:
    return Counter((method, name_of(path)) for method, path, _ in site.seen)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def state(root: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in root.rglob("*") if path.is_file()}


def splits_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")
            if path.is_file() and path.parent.name != "originals"}


# ---- the rows ------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", REAL)
def test_rows(folder, site, tmp_path):
    """As on the hub, in its order, and as the tasks read them."""
    fetch_benchmarks([folder], tmp_path)
    for split, rows in ROWS[folder].items():
        path = tmp_path / folder / f"{split}.jsonl"
        assert read(path) == rows
        assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows)  # True is not 1
        for task in (task for name, task in TASKS.items() if (task.folder or name) == folder):
            assert sum(map(len, read_examples(path, task).values())) == len(rows)
        if folder == "wikitext":
            assert len(read_pages(path)) == len(rows)
    assert splits_in(tmp_path) == {"index.json", *(f"{folder}/{split}.jsonl"
                                                   for split in ROWS[folder])}


def test_the_table():
    """What the tasks ask for is there, no two files have one name, and all is https."""
    splits = {folder: {split for one in origins for split in one.splits}
              for folder, origins in REAL.items()}
    assert splits == {folder: {*rows} for folder, rows in ROWS.items()}
    for name, task in [*TASKS.items(), *LEGACY.items()]:
        assert {task.split, task.pool or task.split} <= splits[task.folder or name]
    urls = {one.url for origins in REAL.values() for one in origins}
    assert len({name_of(url) for url in urls}) == len(urls) == len(ORIGINALS)
    for url in urls:
        assert url.startswith("https://") and net.check_name(name_of(url)) == name_of(url)


def arc_zip(rows: list[dict]) -> bytes:
    return zipped({"A/ARC-Challenge-Test.jsonl": jsonl(*map(arc, rows))})


def mmlu_tar(rows: list[dict]) -> bytes:
    tables = dict.fromkeys((f"data/test/{row['subject']}_test.csv" for row in rows), b"")
    for row in rows:
        cells = [row["question"], *row["choices"], "ABCD"[row["answer"]]]
        tables[f"data/test/{row['subject']}_test.csv"] += (",".join(
            '"' + cell.replace('"', '""') + '"' for cell in cells) + "\n").encode()
    return tarred(dict(reversed(tables.items())))


def wiki_zip(rows: list[dict]) -> bytes:
    return zipped({"w/wiki.test.raw": "\n".join(row["page"] for row in rows).encode()})


@pytest.mark.parametrize("folder, published", [
    ("arc_challenge", arc_zip), ("mmlu", mmlu_tar), ("wikitext", wiki_zip)])
def test_real_rows_come_back(folder, published, site, tmp_path, shared, monkeypatch):
    if not (path := shared / "eval" / folder / "test.jsonl").is_file():
        pytest.skip(f"no rows of {folder} beside the repository")
    rows, (origin,) = read(path), benchmarks.ORIGINS[folder]
    serve(site, name_of(origin.url), published(rows))
    monkeypatch.setitem(benchmarks.ORIGINS, folder, [replace(origin, splits={
        "test": (origin.splits["test"][0], len(rows))})])
    fetch_benchmarks([folder], tmp_path)
    found = read(tmp_path / folder / "test.jsonl")
    assert [{key: row[key] for key in want} for row, want in zip(found, rows, strict=True)] == rows


# ---- once, and never again -----------------------------------------------------------------------

def test_once(site, tmp_path):
    """One GET for each file, though two benchmarks are in one; then nothing, with no network."""
    fetch_benchmarks([*REAL], tmp_path)
    assert asked(site) == {(method, name): 1 for method in ("HEAD", "GET") for name in ORIGINALS}
    for name, body in ORIGINALS.items():
        assert (tmp_path / "originals" / name).read_bytes() == body
    index = index_of(tmp_path)
    assert {*index} == splits_in(tmp_path) - {"index.json"}
    for folder, origins in benchmarks.ORIGINS.items():
        for origin, split in ((one, split) for one in origins for split in one.splits):
            body = ORIGINALS[name_of(origin.url)]
            rows = (tmp_path / folder / f"{split}.jsonl").read_bytes()
            assert index[f"{folder}/{split}.jsonl"] == {
                "url": origin.url, "size": len(body), "etag": '"v1"', "sha256": sha256(body),
                "rows": rows.count(b"\n"), "rows_sha256": sha256(rows)}
    before = state(tmp_path)
    site.shutdown()
    site.server_close()
    fetch_benchmarks([*REAL, "valid", "text"], tmp_path)
    assert state(tmp_path) == before
    for folder in REAL:  # made again from what was fetched
        shutil.rmtree(tmp_path / folder)
    fetch_benchmarks([*REAL], tmp_path)
    assert {path: data for path, (data, _) in state(tmp_path).items()} == {
        path: data for path, (data, _) in before.items()}


@pytest.mark.parametrize("longer", [False, True])
def test_a_damaged_original_is_fetched_again(longer, site, tmp_path):
    """Also one of the right size, which fetch() alone would take."""
    fetch_benchmarks(["copa"], tmp_path)
    path, body = tmp_path / "originals" / "COPA.zip", ORIGINALS["COPA.zip"]
    damaged = body + b"x" if longer else body[:-40] + b"x" + body[-39:]
    path.write_bytes(damaged)
    fetch_benchmarks(["copa"], tmp_path)  # the rows are there
    (tmp_path / "copa" / "train.jsonl").unlink()
    site.play = lambda h, n: h.reply(404, {})
    stopped(DATA, fetch_benchmarks, ["copa"], tmp_path)
    assert path.read_bytes() == damaged  # nothing better has come yet
    site.play = None
    fetch_benchmarks(["copa"], tmp_path)
    assert path.read_bytes() == body and Path(f"{path}.bad").read_bytes() == damaged
    assert read(tmp_path / "copa" / "train.jsonl") == [COPA]
    assert asked(site)["GET", "COPA.zip"] == 2


def test_an_original_that_its_makers_changed(site, tmp_path):
    """Each split says what it was made of; nobody is asked again because they differ."""
    fetch_benchmarks(["copa"], tmp_path)
    new = zipped({"COPA/val.jsonl": jsonl(COPA | {"label": 1})})
    serve(site, "COPA.zip", new)
    (tmp_path / "originals" / "COPA.zip").unlink()
    for _ in range(2):
        (tmp_path / "copa" / "validation.jsonl").unlink()
        fetch_benchmarks(["copa"], tmp_path)
    index = index_of(tmp_path)
    assert [index[f"copa/{split}.jsonl"]["sha256"] for split in ("train", "validation")] == [
        sha256(ORIGINALS["COPA.zip"]), sha256(new)]
    assert asked(site)["HEAD", "COPA.zip"] == 2


# ---- what goes wrong -----------------------------------------------------------------------------

BAD = {  # what lies at the URL, and what the one line says
    "no zip": ("copa", b"<html>no</html>", "cannot be read"),
    "half a tar.gz": ("race", ORIGINALS["RACE.tar.gz"][:-90], "cannot be read"),
    "no such member": ("copa", zipped({"COPA/x.jsonl": b""}), "it has no file *train.jsonl"),
    "a row too many": ("copa", zipped({"COPA/train.jsonl": jsonl(COPA, COPA)}), "has 2 rows"),
    "no json": ("copa", zipped({"COPA/train.jsonl": b"{\n"}), "as copa was published"),
    "json of great depth": ("copa", zipped({"COPA/train.jsonl": b"[" * 99999}), "published"),
    "no object": ("copa", zipped({"COPA/train.jsonl": b"[1]\n"}), "as copa was published"),
    "other fields": ("copa", zipped({"COPA/train.jsonl": jsonl({"a": 1})}), "without premise"),
    "no endings": ("hellaswag", jsonl({"label": 1, "ctx_a": ""}), "without activity_label"),
    "no choices": ("openbookqa", zipped({"O/Main/train.jsonl": jsonl(COPA)}), "published"),
    "a label short": ("piqa", zipped({"p/train.jsonl": jsonl(PIQA, PIQA),
                                      "p/train-labels.lst": b"1\n"}), "as piqa was published"),
    "other columns": ("crows_pairs", b"a\tb\n1\t2\n3\t4\n", "without sent_more"),
    "a column short": ("crows_pairs", CROWS.replace(b"\tage", b""), "without bias_type"),
    "a column more": ("crows_pairs", CROWS.replace(b"age", b"age\tx"), "more fields"),
    "three choices": ("mmlu", tarred({"data/dev/x_dev.csv": b"Q,a,b,c,A\n"}), "published"),
    "no letter": ("mmlu", tarred({"data/dev/x_dev.csv": b"Q,a,b,c,d,\n"}), "published"),
    "a field of great length": ("mmlu", tarred({"data/dev/x_dev.csv": b"q" * 200_000}), "publish"),
    "an answer short": ("race", tarred({"R/train/high/1.txt": jsonl(RACE | {"answers": ["A"]})}),
                        "as race was published"),
    "a list of truths": ("truthfulqa_mc", b'[{"question": "", "mc1_targets": []}]', "published"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_line_and_no_rows(case, site, tmp_path):
    folder, body, text = BAD[case]
    serve(site, name_of(REAL[folder][0].url), body)
    assert text in stopped(DATA, fetch_benchmarks, [folder], tmp_path / "a" / "root")
    assert not splits_in(tmp_path)


@pytest.mark.parametrize("folder", ["race", "piqa"])
def test_an_archive_with_a_byte_changed(folder, site, tmp_path):
    """The same rows or one line, whatever the byte."""
    name, rng, refused = name_of(REAL[folder][0].url), random.Random(0), 0
    for k in range(80):
        body, root = bytearray(ORIGINALS[name]), tmp_path / str(k)
        body[rng.randrange(len(body))] ^= rng.randrange(1, 256)
        serve(site, name, bytes(body))
        try:
            fetch_benchmarks([folder], root)
        except Stop as error:
            assert error.code == DATA and "\n" not in str(error)
            refused += 1
        for split in splits_in(root) - {"index.json"}:
            assert read(root / split) == ROWS[folder][Path(split).stem]
    assert 0 < refused < 80


@pytest.mark.parametrize("folder", ["copa", "race", "hellaswag"])
def test_what_says_that_it_is_large(folder, site, tmp_path, monkeypatch):
    """A member, by its header alone, and a file."""
    monkeypatch.setattr(benchmarks, "LIMIT", 10_000 if folder != "hellaswag" else 100)
    if folder == "copa":
        serve(site, "COPA.zip", zipped({"COPA/train.jsonl": b" " * 10_001}))
    elif folder == "race":
        (info := tarfile.TarInfo("RACE/train/high/1\n2.txt")).size = 2**40
        serve(site, "RACE.tar.gz", info.tobuf() + bytes(1024))
    assert "at most 10" in stopped(DATA, fetch_benchmarks, [folder], tmp_path)
    assert not splits_in(tmp_path)


def test_nothing_is_unpacked(site, tmp_path):
    """Members that are wanted are rows, whatever they are called; no name becomes a path."""
    serve(site, "COPA.zip", zipped({name: jsonl(COPA) for name in (
        "../../train.jsonl", f"{tmp_path}/val.jsonl", "/../x")}))
    fetch_benchmarks(["copa"], tmp_path / "a" / "b")
    assert splits_in(tmp_path) == {f"a/b/{one}" for one in (
        "index.json", "copa/train.jsonl", "copa/validation.jsonl")}


@pytest.mark.parametrize("text", [
    "{", "[]", "1", "null", "\ufeff{}", '{"copa/train.jsonl": {}}', '{"a": 1}', '{"a": null}',
    '{"a": {"url": "u"}}', '{"a": ["url", "sha256"]}', "[" * 99999, "\xff"])
def test_a_broken_index(text, site, tmp_path):
    (tmp_path / "index.json").write_bytes(text.encode("latin-1" if text == "\xff" else "utf-8"))
    assert "index.json is no index" in stopped(DATA, fetch_benchmarks, ["copa"], tmp_path)
    assert splits_in(tmp_path) == {"index.json"} and not site.seen


@pytest.mark.parametrize("code, text", [(404, "is not found (404)"), (500, "it answered 500"),
                                        (403, "is forbidden")])
def test_a_server_without_it(code, text, site, tmp_path):
    site.play = lambda h, n: h.reply(code, {}, b"no")
    assert text in stopped(DATA, fetch_benchmarks, ["copa"], tmp_path)
    assert not splits_in(tmp_path) and not [*(tmp_path / "originals").iterdir()]


def test_a_kill_before_the_rows(site, tmp_path, monkeypatch):
    """Whatever split is there is in the index."""
    def killed(path: Path, text: str) -> None:
        if path.suffix == ".jsonl":
            raise KeyboardInterrupt
        write_atomic(path, text)
    monkeypatch.setattr(benchmarks, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        fetch_benchmarks(["copa"], tmp_path)
    assert {*index_of(tmp_path)} == {"copa/train.jsonl"}
    monkeypatch.setattr(benchmarks, "write_atomic", write_atomic)
    fetch_benchmarks(["copa"], tmp_path)
    assert read(tmp_path / "copa" / "train.jsonl") == ROWS["copa"]["train"]
