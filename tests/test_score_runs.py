"""evaluate.py over a whole run: what it keeps, what it does not do twice, and over several ranks.

    pytest tests/test_score_runs.py

What numbers a score has is in test_evaluate.py; what kills cost in earnest, in soak_score.py.
"""

import contextlib
import errno
import functools
import json
import re
import resource
import shutil
from pathlib import Path

import pytest

import evaluate
from harness import save_llama, write_rows
from nano360 import records
from nano360.config import CHECKPOINT, ENVIRONMENT, ModelConfig, run
from nano360.files import locked
from nano360.tokenizers import load_tokenizer
from prepare import train_tokenizer
from ranks import ended, start

CHECKPOINTS = ("ckpt_998", "ckpt_999", "ckpt_1000")  # in the order of training, not of the alphabet
TASKS = ("piqa", "truthfulqa_mc2", "text:text.txt")
RUN = ("out/tiny", f"--tasks={','.join(TASKS)}", "--limit=4", "--device=cpu")
ALL = [(name, task) for name in CHECKPOINTS for task in TASKS]
LOG = Path("out/tiny/evals.jsonl")
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=32, n_inner=64, vocab_size=400, seq_len=48,
                    init_std=0.3)
PROSE = "Zoë's naïve café, “open” since 1998.\nShe left it with 12345 coins; no more.\n" * 6
scores = functools.partial(run, evaluate.main, "", [])  # a command line -> an exit code


def add_checkpoint(name: str, seed: int, root: Path = Path()) -> None:
    shutil.rmtree(root / "out/tiny" / name, ignore_errors=True)
    save_llama(root / "out/tiny" / name, load_tokenizer(root / "made.model"), False, MODEL, seed)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A working directory: out/tiny with three checkpoints, data/eval, and a text."""
    root = tmp_path_factory.mktemp("small")
    (root / "text.txt").write_text(PROSE)
    text = Path(json.__file__).read_text()
    for name, size in (("made", 400), ("other", 390)):
        (root / f"{name}.model").write_bytes(train_tokenizer(iter([text]), size))
    for seed, name in enumerate(CHECKPOINTS):
        add_checkpoint(name, seed, root)
    write_rows(root / "data/eval", dict(train=9, validation=9), 5)
    return root


@pytest.fixture
def here(small, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(small, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """Each (checkpoint, task) that a model was asked since."""
    found, score = [], evaluate.score

    def noted(ckpt, groups, label):
        found.append((ckpt.folder.name, label))
        return score(ckpt, groups, label)
    monkeypatch.setattr(evaluate, "score", noted)
    return found


def lines() -> list[dict]:
    return [json.loads(line) for line in LOG.read_text().splitlines()]


def pairs(entries: list[dict]) -> list[tuple[str, str]]:
    return [(one["settings"]["checkpoint"], one["task"]) for one in entries]


def names() -> set[str]:
    return {path.name for path in LOG.parent.iterdir()}


def refused(capsys, *words: str) -> str:
    """What is said of a command that ends with one line and no traceback."""
    capsys.readouterr()
    assert scores([*words]) == CHECKPOINT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    return said


# ---- what a run keeps ----------------------------------------------------------------------------

def test_each_score_is_a_line_and_the_curve_is_in_the_order_of_training(here, asked, capsys):
    evaluate.main([*RUN, "--output=scores.json"])
    written, whole = lines(), json.loads(Path("scores.json").read_text())["runs"]
    assert asked == pairs(written) == ALL and names() == {*CHECKPOINTS, LOG.name}
    assert written == [{k: v for k, v in one.items() if k != "items"} for one in whole]
    assert [one["n"] for one in whole] == [len(one["items"]) for one in whole] == [4, 4, 1] * 3
    table, curve = (part.splitlines() for part in capsys.readouterr().out.split("\n\n"))
    assert table[0].split() == ["checkpoint", "task", "shots", "BOS", "items", "metric",
                                "value", "stderr"]
    assert list(dict.fromkeys(tuple(line.split()[:2]) for line in table[1:])) == ALL
    assert re.split(" {1,}(?=[pt])", curve[0])[1:] == [
        "piqa acc_norm", "truthfulqa_mc2 acc", "text:text.txt bits_per_byte"]
    assert [line.split() for line in curve[1:]] == [
        [name, *(f"{one['metrics'][metric]:.4f}" for one, metric in
                 zip(written[3 * i:], ("acc_norm", "acc", "bits_per_byte"), strict=False))]
        for i, name in enumerate(CHECKPOINTS)]
    assert len({line.split()[-1] for line in curve[1:]}) == 3  # they are three models


def test_what_stands_there_is_not_scored_again(here, asked, capsys):
    evaluate.main([*RUN])
    printed, written = capsys.readouterr().out, LOG.read_bytes()
    asked.clear()
    for words in ((), ("--batch_size=3",), ("--num_fewshot=0",), ("--max_length=48",)):
        evaluate.main([*RUN, *words])
        assert not asked and LOG.read_bytes() == written and capsys.readouterr().out == printed
    evaluate.main([RUN[0], "--tasks=text:text.txt,piqa", *RUN[2:]])  # fewer, in another order
    assert not asked and LOG.read_bytes() == written
    assert "text:text.txt bits_per_byte piqa acc_norm\n" in capsys.readouterr().out


@pytest.mark.parametrize("words, tasks", (
    (["--num_fewshot=2"], TASKS[:1]), (["--limit=3"], TASKS), (["--convention=legacy"], TASKS),
    (["--max_length=40"], TASKS), (["--add_bos=true"], TASKS), (["--dtype=bfloat16"], TASKS),
    (["--tokenizer=other.model"], TASKS),
    (["--fewshot_split=validation"], ())),  # there are no examples to come from it
    ids=lambda one: " ".join(one))
def test_other_settings_are_other_scores(here, asked, words, tasks):
    evaluate.main([*RUN])
    before, kept = LOG.read_bytes(), len(asked)
    words = [one for one in RUN if one.split("=")[0] != words[0].split("=")[0]] + words
    evaluate.main(words)
    fresh = [(name, task) for name in CHECKPOINTS for task in tasks]
    assert asked[kept:] == pairs(lines()[kept:]) == fresh
    assert LOG.read_bytes().startswith(before)
    evaluate.main(words)
    evaluate.main([*RUN])  # both stand there now
    assert len(asked) == len(lines()) == kept + len(fresh)


def test_each_number_of_examples_is_a_score_of_its_own(here, asked):
    for n in (1, 2, 1):  # drawn from the same file
        evaluate.main([*RUN, f"--num_fewshot={n}"])
    evaluate.main([*RUN, "--num_fewshot=2", "--fewshot_split=validation"])
    assert asked == ALL + [(name, "piqa") for name in CHECKPOINTS] * 2
    assert [one["num_fewshot"] for one in lines() if one["task"] == "piqa"] == [1] * 3 + [2] * 6


def test_other_data_and_other_weights_are_other_scores(here, asked, capsys):
    evaluate.main([*RUN])
    rows, before = Path("data/eval/piqa/validation.jsonl"), lines()
    rows.write_text(rows.read_text().replace("kettle", "cattle"))
    evaluate.main([*RUN])
    changed = [(name, "piqa") for name in CHECKPOINTS]
    assert asked[9:] == changed
    Path("text.txt").write_text(PROSE + "!")
    evaluate.main([*RUN])
    assert asked[12:] == [(name, "text:text.txt") for name in CHECKPOINTS]
    add_checkpoint("ckpt_999", 9)
    capsys.readouterr()
    evaluate.main([*RUN])
    assert asked[15:] == ALL[3:6] and lines()[:9] == before and len(lines()) == 18
    table, _ = capsys.readouterr().out.split("\n\n")  # shows what is there now
    shown = next(line.split() for line in table.splitlines() if "ckpt_999" in line
                 and "bits_per_byte" in line)
    assert shown[6] == f"{lines()[17]['metrics']['bits_per_byte']:.4f}"


def test_a_new_checkpoint_alone_is_scored(here, asked):
    evaluate.main([*RUN])
    add_checkpoint("ckpt_1001", 7)
    evaluate.main([*RUN])
    assert asked[9:] == pairs(lines()[9:]) == [("ckpt_1001", task) for task in TASKS]


def test_output_scores_all_and_appends_nothing_twice(here, asked):
    evaluate.main([RUN[0], f"--tasks={TASKS[0]}", *RUN[2:]])
    evaluate.main([*RUN, "--output=scores.json"])
    assert asked == [(name, TASKS[0]) for name in CHECKPOINTS] + ALL
    assert sorted(pairs(lines())) == sorted(ALL)
    written, output = LOG.read_bytes(), Path("scores.json").read_bytes()
    evaluate.main([*RUN, "--output=scores.json"])
    assert asked[12:] == ALL and LOG.read_bytes() == written
    assert Path("scores.json").read_bytes() == output
    assert all(one["items"] for one in json.loads(output)["runs"])


@pytest.mark.parametrize("every, expected", (
    (1, range(7)), (2, (1, 3, 5, 6)), (3, (2, 5, 6)), (7, (6,)), (100, (6,))))
def test_every(here, every, expected):
    for i in range(7):
        shutil.copytree("out/tiny/ckpt_998", f"out/more/ckpt_{i:03}")
    # what a run leaves when it is killed, and what people add
    for name in ("ckpt_007.part", "ckpt_008.old", "last", "ckpt_x9", "ckpt_best_9"):
        shutil.copytree("out/tiny/ckpt_998", f"out/more/{name}")
    assert [path.name for path in evaluate.chosen(Path("out/more"), every)] == [
        f"ckpt_{i:03}" for i in expected]


def test_every_third_and_the_last_stand_in_table_and_log(here, asked, capsys):
    for i in range(5):
        shutil.copytree("out/tiny/ckpt_998", f"out/more/ckpt_{i:03}")
    words = ["out/more/", "--tasks=piqa", "--limit=2", "--device=cpu"]
    evaluate.main([*words, "--every=3"])
    _, curve = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in curve.splitlines()[1:]] == ["ckpt_002", "ckpt_004"]
    evaluate.main(words)
    assert [name for name, _ in asked] == [f"ckpt_{i:03}" for i in (2, 4, 0, 1, 3)]
    _, curve = capsys.readouterr().out.split("\n\n")  # in the order of training all the same
    assert [line.split()[0] for line in curve.splitlines()[1:]] == [
        f"ckpt_{i:03}" for i in range(5)]


def test_a_checkpoint_alone_has_no_curve_and_keeps_nothing(here, asked, capsys):
    for _ in range(2):
        evaluate.main(["out/tiny/ckpt_999", *RUN[1:]])
        printed = capsys.readouterr().out
        assert {line.split()[0] for line in printed.splitlines()} == {"checkpoint", "ckpt_999"}
    assert asked == ALL[3:6] * 2 and names() == {*CHECKPOINTS}


def test_a_text_without_blanks(here, capsys):
    """Its one word is so unlikely that no float holds its perplexity."""
    Path("text.txt").write_text("日本語" * 200)
    for _ in range(2):  # the second time from evals.jsonl
        evaluate.main([*RUN])
        assert "word_perplexity" not in capsys.readouterr().out
    assert lines()[2]["metrics"]["words"] == 1 and lines()[2]["metrics"]["bits_per_byte"] > 5


# ---- kills, and files as they should not be ------------------------------------------------------

@pytest.fixture
def whole(here, capsys) -> tuple[bytes, str]:
    """evals.jsonl and what is printed when nothing goes wrong; then the run is as new."""
    evaluate.main([*RUN])
    written = LOG.read_bytes()
    LOG.unlink()
    return written, capsys.readouterr().out


@pytest.mark.parametrize("kept, rest", ((0, 30), (4, 1), (4, 300), (8, -1), (9, 0)))
def test_a_line_cut_short_is_scored_again(whole, asked, capsys, kept, rest):
    parts = whole[0].splitlines(keepends=True)
    LOG.write_bytes(b"".join(parts[:kept]) + (parts[kept][:rest] if rest else b""))
    evaluate.main([*RUN])
    assert asked == ALL[kept:] and LOG.read_bytes() == whole[0]
    assert capsys.readouterr().out == whole[1] and names() == {*CHECKPOINTS, LOG.name}


@pytest.mark.parametrize("n", (0, 1, 3, 5))
def test_a_run_that_is_stopped_goes_on(whole, monkeypatch, capsys, n):
    """After n scores: they stand there, the lock does not."""
    score, left = evaluate.score, [None] * n

    def stops(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return score(*args)
    monkeypatch.setattr(evaluate, "score", stops)
    assert scores([*RUN, "--output=scores.json"]) == 130
    assert LOG.read_bytes() == b"".join(whole[0].splitlines(keepends=True)[:n])
    assert names() == {*CHECKPOINTS, LOG.name}
    if n < 3:
        assert not Path("scores.json").exists()
    else:  # whole checkpoints
        assert pairs(json.loads(Path("scores.json").read_text())["runs"]) == ALL[:3]
    left.extend([None] * (9 - n))
    capsys.readouterr()
    evaluate.main([*RUN])
    assert not left and LOG.read_bytes() == whole[0] and capsys.readouterr().out == whole[1]


@pytest.mark.parametrize("line", (
    b"nonsense\n", b"3\n", b"[]\n", b"null\n", b"{}\n", b'{"settings": 1}\n', b"\xff\n",
    b"\n", b"\xff\n{", b'{"settings": {}}\n', b'{"settings": {}, "metrics": {}}\n'), ids=repr)
def test_a_line_that_is_no_score(here, asked, capsys, line):
    evaluate.main([RUN[0], "--tasks=piqa", "--limit=1"])
    good = LOG.read_bytes()
    for content in (line, good + line, line + good):
        asked.clear()
        LOG.write_bytes(content)
        assert f"{LOG} has a line that is no score" in refused(capsys, *RUN)
        assert not asked and LOG.read_bytes() == content
        assert names() == {*CHECKPOINTS, LOG.name}


def test_a_log_that_cannot_be_read_or_written(here, capsys, monkeypatch):
    LOG.mkdir()
    assert f"{LOG}: Is a directory" in refused(capsys, *RUN)
    LOG.rmdir()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(LOG))
    with monkeypatch.context() as now:
        now.setattr(records, "open", read_only, raising=False)
        assert f"{LOG} could not be written: Read-only file system" in refused(capsys, *RUN)
        now.setattr(Path, "touch", read_only)
        assert f"{LOG}: Read-only file system" in refused(capsys, *RUN)
    assert names() == {*CHECKPOINTS, LOG.name}  # no lock


def full_at(size: int) -> None:
    """From now on no file may be larger, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk(server, whole):
    """A line is cut short, which is mended once there is room."""
    size = whole[0].find(b"\n", 2500) - 100
    assert ended(start(server, scores, [*RUN], 1, functools.partial(full_at, size))) == [CHECKPOINT]
    assert LOG.read_bytes() == whole[0][:size]
    assert re.fullmatch(rf"error: {LOG} could not be written: File too large; .*\n",
                        Path("err.0").read_text())
    assert ended(start(server, scores, [*RUN])) == [0]
    assert LOG.read_bytes() == whole[0] and Path("out.0").read_text() == whole[1]


def test_one_process_at_a_time(server, here, asked, capsys):
    with locked(LOG):
        assert ended(start(server, scores, [*RUN])) == [CHECKPOINT]
        assert re.fullmatch(f"error: {LOG} is in the hands of process [0-9]+ on .* since .*; wait "
                            "for it, or stop it\n", Path("err.0").read_text())
        assert not Path("out.0").read_text() and not LOG.exists()
        evaluate.main(["out/tiny/ckpt_999", *RUN[1:]])  # a checkpoint alone keeps nothing
    assert ended(start(server, scores, [*RUN])) == [0] and names() == {*CHECKPOINTS, LOG.name}


# ---- ranks ---------------------------------------------------------------------------------------

def assert_close(ours: list[dict], alone: list[dict]) -> None:
    """The same scores in the same order, but for the rounding of other batches."""
    for a, b in zip(ours, alone, strict=True):
        assert evaluate.identity(a) == evaluate.identity(b) and a["n"] == b["n"]
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-4)
        assert [one | dict(lls=0) for one in a["items"]] == [
            one | dict(lls=0) for one in b["items"]]
        for one, other in zip(a["items"], b["items"], strict=True):
            assert one["lls"] == pytest.approx(other["lls"], abs=1e-4)


@pytest.mark.numeric
@pytest.mark.parametrize("world, words", (
    (2, ("out/tiny/ckpt_999", "--tasks=piqa,mmlu,text:text.txt", "--num_fewshot=1")),
    (2, RUN), (4, ("out/tiny", "--tasks=piqa", "--limit=3"))),
    ids=("checkpoint", "run", "more ranks than questions"))
def test_ranks_score_as_one(server, here, capsys, world, words):
    write_rows(here / "data/eval", dict(dev=2, test=5), 6)  # MMLU's, one example of each subject
    words = [*words, "--device=cpu", "--output=scores.json"]
    evaluate.main(words)
    alone, table = json.loads(Path("scores.json").read_text())["runs"], capsys.readouterr().out
    kept = lines() if LOG.exists() else None
    LOG.unlink(missing_ok=True)
    Path("scores.json").unlink()
    assert ended(start(server, scores, words, world)) == [0] * world
    assert_close(json.loads(Path("scores.json").read_text())["runs"], alone)
    printed = Path("out.0").read_text()
    assert [re.sub(r"[0-9]+[.][0-9]+", "x", text).split() for text in printed.splitlines()] == [
        re.sub(r"[0-9]+[.][0-9]+", "x", text).split() for text in table.splitlines()]
    assert not any(Path(f"out.{rank}").read_text() for rank in range(1, world))
    if kept is None:
        assert not LOG.exists()
    else:
        assert pairs(lines()) == pairs(kept) and names() == {*CHECKPOINTS, LOG.name}
        before = LOG.read_bytes()
        evaluate.main(words[:-1])  # and one process takes them as its own
        assert LOG.read_bytes() == before and capsys.readouterr().out == printed


def test_ranks_go_on_where_one_process_was_killed(server, whole):
    parts = whole[0].splitlines(keepends=True)
    LOG.write_bytes(b"".join(parts[:4]) + parts[4][:50])
    assert ended(start(server, scores, [*RUN], 2)) == [0, 0]
    assert LOG.read_bytes().startswith(b"".join(parts[:4])) and pairs(lines()) == ALL
    assert not Path("out.1").read_text() and "Traceback" not in Path("err.1").read_text()


@pytest.mark.parametrize("trouble", ("locked", "damaged"))
def test_ranks_that_may_not_begin(server, here, trouble):
    """Rank 0 says why, and no other waits for it: it says that it lost one."""
    said = dict(damaged="has a line that is no score", locked="is in the hands of")[trouble]
    LOG.write_text("{}\n" if trouble == "damaged" else "")
    with locked(LOG) if trouble == "locked" else contextlib.nullcontext():
        codes = ended(start(server, scores, [*RUN], 2))
    assert codes == [CHECKPOINT, ENVIRONMENT]
    assert re.fullmatch(r"\[rank 1\] error: rank 1 lost the others \(.*\): one of them ended, .*\n",
                        Path("err.1").read_text())
    assert re.fullmatch(rf"\[rank 0\] error: .*{said}.*\n", Path("err.0").read_text())
    assert LOG.stat().st_size < 4
