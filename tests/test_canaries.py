"""analysis/canaries.py: what is planted stands in the rows as often as it says, and nowhere else.

Rows are read with numpy, and decoded and counted with sentencepiece and tiktoken themselves.
"""

import base64
import collections
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken

import prepare
from nano360 import tokens
from nano360.analysis import canaries
from nano360.analysis.canaries import Canary, encode, overwritten, read_canaries
from nano360.analysis.provenance import documents_of, find_document
from nano360.analysis.runs import read_data
from nano360.analysis.search import find_text
from nano360.config import DATA, USAGE, Stop, load
from nano360.records import read_run
from nano360.rows import read_manifest
from nano360.tokenizer_json import tokenizer_files
from nano360.tokenizers import PATTERN, Tokenizer, load_tokenizer
from prepare import train_tokenizer
from test_prepare import DEMO, MERGES, die_at, files_of, prepare_here, ranks, story, write

SET = dict(input="text", seq_len=63, n_chunks=3, canaries=2)  # 222 plantings


def make_text(root: Path) -> None:
    """1,500 documents, most shorter than a canary: some rows lose whole ones to it."""
    texts = [story(90 if i % 5 == 0 else 1 + i % 4, i) for i in range(1500)]
    write(root, {"a.jsonl": "\n".join(json.dumps(dict(text=t)) for t in texts if t.strip())})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with text/, and data/planted and data/plain made of it."""
    root = tmp_path_factory.mktemp("canaries")
    make_text(root / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert prepare_here(dataset="planted", **SET) == 0
        assert prepare_here(dataset="plain", **SET | dict(canaries=0)) == 0
    return root


@pytest.fixture
def here(root, tmp_path, monkeypatch) -> Path:
    """A copy of it to be changed, which is the folder we are in."""
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def chunks(folder: Path, dtype: str = "<u2") -> list[np.ndarray]:
    return [np.fromfile(path, dtype).reshape(-1, 64) for path in sorted(folder.glob("train_*"))]


def counted(rows: list[np.ndarray], decode, eos: int, texts: set[str]) -> dict[str, list]:
    """text -> [[chunk, row], ...] where one of the texts is a whole document, all rows decoded."""
    found = collections.defaultdict(list)
    for k, chunk in enumerate(rows):
        for r, row in enumerate(chunk.tolist()):
            ends = [i for i, token in enumerate(row) if token == eos]
            parts = [decode(row[a + 1:b]) for a, b in zip(ends, ends[1:], strict=False)]
            for text in texts & set(parts):
                found[text] += [[k, r]] * parts.count(text)
            assert len(re.findall("nano360 canary", decode([i for i in row if i != eos]))) <= 1
    return found


def check_counts(folder: Path, decode, eos: int, dtype: str = "<u2") -> None:
    """Each text as often as it says, in the rows that it says, its ids from first to end."""
    laid, rows = json.loads((folder / "canaries.json").read_text())["canaries"], chunks(folder,
                                                                                        dtype)
    assert [one["times"] for one in laid] == [1, 1, 10, 10, 100, 100] + [0] * 200
    assert [one["number"] for one in laid] == list(range(206))
    found = counted(rows, decode, eos, {one["prefix"] + one["secret"] for one in laid})
    for one in laid:
        text, places = one["prefix"] + one["secret"], one["places"]
        assert re.fullmatch("nano360 canary [a-z]{6}: [0-9]{10}", text)
        assert found[text] == [place[:2] for place in places] and len(places) == one["times"]
        assert all(rows[k][r, a:b].tolist() == one["ids"] for k, r, a, b in places)
        assert decode(one["ids"][one["n_prefix"]:-1]).strip() == one["secret"]
        assert one["ids"][0] == one["ids"][-1] == eos
    planted = [tuple(place[:2]) for one in laid for place in one["places"]]
    assert len(planted) == len(set(planted)) == 222  # one to a row
    assert collections.Counter(k for k, _ in planted) == {0: 74, 1: 74, 2: 74}


def test_each_is_planted_as_often_as_it_says_and_nothing_else_is_changed(root, monkeypatch):
    monkeypatch.chdir(root)
    planted, plain = root / "data/planted", root / "data/plain"
    coder = sentencepiece.SentencePieceProcessor(model_file=str(planted / "tokenizer.model"))
    check_counts(planted, coder.decode, 2)
    places = [place for one in read_canaries(planted) for place in one["places"]]
    firsts = [a for _, _, a, _ in places]
    assert min(firsts) < 4 and len({*firsts}) > 15 and max(b for *_, b in places) > 60
    assert len({r // 50 for _, r, _, _ in places}) > 5  # all over the chunks
    hidden = [np.zeros(chunk.shape, bool) for chunk in chunks(plain)]
    for k, r, a, b in places:
        hidden[k][r, a:b] = True
        assert overwritten(planted, f"train_{k:03d}.bin")[r][1:] == (a, b)
    names = [f"train_{k:03d}.bin" for k in range(8)]
    assert sum(len(overwritten(planted, name)) for name in names) == 222
    assert not any(overwritten(plain, name) for name in names)
    for was, now, mask in zip(chunks(plain), chunks(planted), hidden, strict=True):
        assert np.array_equal(was[~mask], now[~mask]) and not np.array_equal(was, now)
    same = {k: v for k, v in files_of(planted).items() if "train" not in k and "manif" not in k}
    way = {k: v for k, v in files_of(planted).items() if k.startswith("provenance/train")}
    assert same.pop("canaries.json") and (same | way).items() <= files_of(plain).items()
    assert prepare_here(dataset="planted", verify="true") == 0


def test_verify_and_stats(here, capsys):
    assert prepare_here(dataset="planted", stats="true") == 0
    assert "planted: 6 canaries, 222 times\n" in capsys.readouterr().out
    assert prepare_here(dataset="plain", stats="true") == 0
    assert "planted" not in capsys.readouterr().out
    path = here / "data/planted/canaries.json"
    path.write_text(path.read_text().replace("nano360", "nano361", 1))
    assert prepare_here(dataset="planted", verify="true") == DATA
    assert "canaries.json is missing or was changed" in capsys.readouterr().err


def test_the_strings_follow_from_seed_and_number():
    """Written down: runs could not be repeated otherwise."""
    one, *_ = canaries.canaries(1337, 8)
    assert one == Canary(0, 1, "nano360 canary dzxvdf: ", "9613856293")
    few, many = canaries.canaries(5, 2), canaries.canaries(5, 20_000)  # 6 of 60,200 names collide
    assert [(c.prefix, c.secret) for c in few] == [(c.prefix, c.secret) for c in many[:206]]
    assert len({c.prefix for c in many}) == len(many) == 60_200
    assert not {c.secret for c in few} & {c.secret for c in canaries.canaries(6, 2)}
    last = collections.Counter(c.secret[-1] for c in many)
    assert len(last) == 10 and max(last.values()) < 1.1 * min(last.values())


def test_the_bytes_are_those_of_any_number_of_workers(here, root, monkeypatch):
    monkeypatch.setattr(tokens, "STRETCH", (8000, 8000))  # bytes: work for all three
    shutil.rmtree("data")
    assert prepare_here(dataset="planted", workers=3, **SET) == 0
    assert files_of(here / "data/planted") == files_of(root / "data/planted")


def test_killed_between_it_plants_again(here, root, monkeypatch):
    """In the midst of planting, before the manifest, and in the midst of dealing over it again."""
    shutil.rmtree("data")
    monkeypatch.setattr(prepare, "SYNC_EVERY", 1)  # byte: deal() notes every block
    monkeypatch.setattr(tokens, "BLOCK", 5000)
    for name, end, number in (("open", "train_002.bin", 2), ("write_origins", "", 1),
                              ("write_atomic", "dealt.json", 5), ("file_facts", "", 1)):
        if not (pid := os.fork()):
            place = canaries if name == "open" else prepare
            setattr(place, name, getattr(place, name, open))
            die_at(place, name, end, number, False)
            prepare_here(dataset="planted", **SET)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert bool(list(Path("data").rglob("canaries.json"))) == (name != "open")
    assert prepare_here(dataset="planted", **SET) == 0
    assert files_of(Path("data/planted")) == files_of(root / "data/planted")


@pytest.mark.parametrize("merges", [MERGES, [bytes([a, b]) for a in range(256) for b in range(256)]
                                    ], ids=["uint16", "uint32"])
def test_with_tiktoken(merges, here):
    Path("made.tiktoken").write_bytes(ranks(merges))
    dtype = "<u4" if (eos := 256 + len(merges)) > 2**16 else "<u2"
    assert prepare_here(dataset="set", tokenizer="made.tiktoken", **SET | dict(
        vocab_size=eos + 1)) == 0
    lines = (line.split() for line in Path("made.tiktoken").read_text().splitlines())
    coder = tiktoken.Encoding("own", pat_str=PATTERN, special_tokens={}, mergeable_ranks={
        base64.b64decode(token): int(rank) for token, rank in lines})
    check_counts(Path("data/set"), coder.decode, eos, dtype)


def test_with_bos(here):
    """As in front of every document; the secret is where n_prefix says all the same."""
    assert prepare_here(dataset="set", bos="true", overlap="true", **SET) == 0
    coder = sentencepiece.SentencePieceProcessor(model_file="data/set/tokenizer.model")
    check_counts(Path("data/set"), coder.decode, 2)
    for one in read_canaries(Path("data/set")):
        whole = coder.encode(one["prefix"] + one["secret"])
        assert one["ids"] == [2, 1, *whole, 2] and len(one["ids"]) - one["n_prefix"] == 11


def test_ids_of_prefix_and_secret(tmp_path):
    """Of each kind of tokenizer: together those of the whole text, cut in front of the digits."""
    pytest.importorskip("tokenizers")
    gpt2 = dict(pattern=r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+")  # joins the blank to digits
    bpe = Tokenizer("sentencepiece", train_tokenizer(iter([story(5000, 7)]), 300), {})
    blank = [b" %d" % digit for digit in range(10)] + [b": "]
    for coder, lost in ((bpe, ""), (Tokenizer("tiktoken", ranks(MERGES), {}), ""),
                        (Tokenizer("tiktoken", ranks(blank), gpt2), " "),
                        (Tokenizer("tiktoken", ranks(blank), {}), "")):
        write(tmp_path, {"tokenizer.json": tokenizer_files(coder)["tokenizer.json"]})
        for kind, one in itertools.product((coder, load_tokenizer(tmp_path)),
                                           canaries.canaries(3, 1)):
            prefix, secret = encode(kind, one)
            assert prefix + secret == kind.encode(one.prefix + one.secret)
            assert kind.decode(prefix) == one.prefix.removesuffix(lost)
            assert kind.decode([*prefix, *secret]) == one.prefix + one.secret


@pytest.mark.parametrize("options, said", [
    (dict(canaries=4), ["canaries = 4 are planted 444 times", "quarter", "training rows", "=3,"]),
    (dict(seq_len=24), ["has 3", "a row 25: give --seq_len=3", "--canaries=0"])], ids=str)
def test_too_many_or_too_long_is_one_line(options, said, here, capsys):
    capsys.readouterr()
    assert prepare_here(dataset="set", **SET | options) == DATA
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and not [part for part in said if part not in err[0]], err
    assert not Path("data/set").exists() and not list(Path("data").rglob("train_*.part"))


def test_another_number_is_another_set(here, capsys):
    for dataset, n in (("planted", 0), ("planted", 1), ("plain", 2)):
        before = files_of(here)
        assert prepare_here(dataset=dataset, **SET | dict(canaries=n)) == DATA
        assert f"data/{dataset} holds another data set (other canaries)" in capsys.readouterr().err
        assert files_of(here) == before
    assert prepare_here(dataset="planted", **SET) == 0
    assert "data/planted is prepared already" in capsys.readouterr().out


def test_rows_of_a_release_are_left_as_they_are(capsys):
    assert prepare_here(DEMO.parent / "amber_7b.py", canaries=1) == USAGE
    err = capsys.readouterr().err
    assert "canaries = 1" in err and "as they were released" in err and "--canaries=0" in err


def test_a_set_without_has_the_hash_that_it_always_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("text"), {"a.txt": "one two three\n" * 400})
    Path("bytes.tiktoken").write_bytes(ranks([]))
    assert prepare_here(input="text", seq_len=63, tokenizer="bytes.tiktoken", dataset="set") == 0
    manifest = read_manifest(Path("data/set"))
    assert "canaries" not in manifest["recipe"] and "canaries.json" not in manifest["files"]
    assert manifest["data_hash"] == (
        "cae7fa5d3b343d6eb7b4c52f4e852fa840e7f1f83fbd4dbba1cc2e0d1447f90b")


def test_a_run_says_what_its_rows_hold(root, tmp_path):
    """Whatever the run file says; and so it goes on with either."""
    for name, n in (("planted", 2), ("plain", 0)):
        manifest = read_manifest(root / "data" / name)
        for said in ("0", "2", "7"):
            config, _ = load([str(DEMO), f"--canaries={said}", f"--dataset={name}"])
            record = read_run(config, manifest, tmp_path / name)
            assert record["config"]["data"]["canaries"] == n
            write(tmp_path / name, {"run.json": json.dumps(record)})


def test_the_way_back_tells_what_is_a_canary(root):
    """Token by token: the documents that something is left of, and the canary."""
    folder, lost = root / "data/planted", 0
    manifest, plain = read_manifest(folder), read_manifest(root / "data/plain")
    documents = np.load(folder / "provenance/text_epoch_0.npy")
    numbers = {tuple(place[:2]): one["number"] for one in read_canaries(folder)
               for place in one["places"]}
    for k, chunk in enumerate(chunks(folder)):
        name, rows = f"train_00{k}.bin", list(range(len(chunk)))
        origin, should = np.load(folder / "provenance" / f"{name}.npy")[:, 2], []
        for r in rows:
            _, first, end = overwritten(folder, f"train_{k:03d}.bin").get(r, (0, 0, 0))
            tokens = [int(origin[r]) * 64 + i for i in range(64) if not first <= i < end]
            mine = sorted({*np.searchsorted(documents[:, 0], tokens, side="right") - 1})
            should += [(r, "text", "a.jsonl", int(documents[i, 2])) for i in mine]
            if end:
                should.append((r, "canaries", "canaries.json", numbers[k, r]))
        found = documents_of(folder, manifest, name, rows)
        assert [tuple(one.values()) for one in found] == should
        lost += len(documents_of(root / "data/plain", plain, name, rows)) - len(found) + 74
    assert lost > 50  # of which nothing is left in a row


def test_the_way_there_leaves_out_what_is_a_canarys(root):
    """The rows of a document are those of which documents_of says that something of it is left, and
    a canary's text is found where it was planted."""
    folder = root / "data/planted"
    manifest, rows, coder = read_manifest(folder), collections.defaultdict(set), None
    for path in sorted(folder.glob("*.bin")):
        numbers = [*range(path.stat().st_size // 128)]
        for one in documents_of(folder, manifest, path.name, numbers) if (
                path.name.startswith("train")) else ():
            rows[one["line"], one["source"]].add((path.name, one["row"]))
    lines = [line for line, source in rows if source == "text"]
    for line in lines[::7]:
        parts = find_document(folder, manifest, f"text/a.jsonl:{line}")
        assert {(part.name, part.row) for part in parts} == rows[line, "text"]
        for part in parts:
            _, first, end = overwritten(folder, part.name).get(part.row, (0, 0, 0))
            assert part.end <= first or part.first >= end
    coder = load_tokenizer(folder)
    for one in read_canaries(folder)[:5] + read_canaries(folder)[-2:]:
        parts = find_text(folder, manifest, coder, one["prefix"] + one["secret"])
        assert [[part.name, part.row] for part in parts] == [
            [f"train_{k:03d}.bin", row] for k, row, *_ in one["places"]]


def test_a_text_beside_a_canary_is_found(root):
    """What a canary left of a text that it cut off: more than an anchor."""
    folder, rows, n = root / "data/planted", chunks(root / "data/plain"), 0
    manifest, coder = read_manifest(folder), load_tokenizer(folder)
    for k, row, first, end in [place for one in read_canaries(folder) for place in one["places"]]:
        plain = rows[k][row].tolist()
        start = max([0, *(i + 1 for i in range(first) if plain[i] == 2)])
        stop = next((i for i in range(first, end) if plain[i] == 2), end)
        if first - start < 26 or stop - first < 1:
            continue  # the document begins or ends too near
        text, n = coder.decode(plain[start:stop]), n + 1
        if len(parts := find_text(root / "data/plain", manifest, coder, text)) == 1:
            assert (f"train_{k:03d}.bin", row) == (parts[0].name, parts[0].row)
            assert [(part.row, part.end) for part in find_text(folder, manifest, coder, text)] == [
                (row, first)]
    assert n > 0


def test_canaries_json_is_compared_with_the_manifest(here):
    """A changed or missing one is refused, before anything is said of memory."""
    path = here / "data/planted/canaries.json"
    assert read_data(path.parent)["n_chunks"] == 3
    for change in (lambda: path.write_text(path.read_text().replace('"9', '"8', 1)), path.unlink):
        change()
        with pytest.raises(Stop) as stop:
            read_data(path.parent)
        assert stop.value.code == DATA and f"{path} is missing or was changed" in str(stop.value)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"canaries": [{"number": 0}]}',
                                  '{"canaries": 3}', "short", "place"])
def test_a_broken_file_is_one_line(text, here):
    path = here / "data/planted/canaries.json"
    changed = {"short": path.read_text()[:-50], "place": path.read_text().replace("[[", "[[7, ", 1)}
    path.write_text(changed.get(text, text))
    with pytest.raises(Stop) as stop:
        read_canaries(path.parent)
    assert stop.value.code == DATA and len(str(stop.value).splitlines()) == 1
    assert str(path) in str(stop.value) and "prepare the set again" in str(stop.value)
