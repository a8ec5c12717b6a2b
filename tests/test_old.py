"""What was written at 3e72e77 stays readable: tests/old/ has two data sets, and a run of each.

The LLaMA-like run stopped after step 3, inside its second visit, the CrystalCoder-like one after
step 2, at the end of its first. That commit's prepare.py and train.py made them from the run files
of small.py, with --max_steps=3 and 2, on one thread; prepare.py had trained the tokenizer on the
same text. They are read, verified, gone on from, and trained again.
"""

import json
import shutil
from pathlib import Path

import pytest

import analyze
import evaluate
import prepare
import sample
import train
from nano360.config import CHECKPOINT, GONE, run
from small import write_inputs
from test_golden import GOLDEN, HERE, MODELS, kind, numbers_of, results_of

MADE_ON = "torch 2.13.0+cpu, cpu family 25, model 17, model name AMD EPYC, AVX2, 1 threads"


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """A folder with the old sets and runs, and the run files and text that they were made from."""
    write_inputs(tmp_path)
    shutil.copytree(HERE / "old" / "sets", tmp_path / "data")
    shutil.copytree(HERE / "old" / "runs", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def rounds_alike(golden: dict, name: str) -> bool:
    """Whether this kind of machine is known to give the bits of the one that made the old runs."""
    known = golden["bits"].get(kind())
    return known is not None and known[f"{name}.1"] == golden["bits"][MADE_ON][f"{name}.1"]


@pytest.mark.parametrize("name", MODELS)
def test_a_set_is_read_and_verified(name, room, golden, capsys):
    before = {path: path.read_bytes() for path in Path("data").rglob("*") if path.is_file()}
    assert run(prepare.main, "", [], [f"{name}.py", "--verify"]) == 0
    assert run(prepare.main, "", [], [f"{name}.py"]) == 0  # the recipe is the one it has
    assert f"data/{name} is prepared already" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in Path("data").rglob("*")
                      if path.is_file()}
    manifest = json.loads(Path("data", name, "manifest.json").read_text())
    assert manifest["data_hash"] == golden["exact"]["sets"][name]["data_hash"]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_read(name, room, capsys):
    folder = f"out/{name}/ckpt_000"
    assert run(sample.main, "", [], [folder, "--max_new_tokens=3"]) == 0
    assert run(evaluate.main, "", [], [folder, "--tasks=valid"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_verified(name, room, capsys):
    assert run(analyze.main, "", [], ["replay", f"out/{name}", "--verify"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert run(analyze.main, "", [], ["batch", f"out/{name}", "--step=2"]) == 0


@pytest.mark.numeric
@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on(name, room, golden, capsys):
    """To the end of a run that was never stopped; nothing is said of what it did not record."""
    assert run(train.main, "", [], [f"{name}.py", "--max_steps=6"]) == 0
    said = capsys.readouterr().out
    assert "going on from" in said and "cpu_capability" not in said
    out = Path("out", name)
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        # the set has only the first: training makes the others, as it did then
        assert (out / "ckpt_001" / file).read_bytes() == (out / "ckpt_000" / file).read_bytes()
    assert numbers_of(out) == pytest.approx(golden["numbers"][f"{name}.1"], rel=1e-5)
    if rounds_alike(golden, name):
        assert results_of(out) == golden["bits"][kind()][f"{name}.1"]
    assert run(analyze.main, "", [], ["replay", f"out/{name}", "--verify"]) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_run_is_trained_again(name, room, golden, capsys):
    if not rounds_alike(golden, name):
        pytest.skip(f"{kind()} is not known to round as {MADE_ON}, where the run was trained")
    assert run(train.main, "", [], [f"{name}.py", "--max_steps=6"]) == 0  # by this version
    capsys.readouterr()
    assert run(analyze.main, "", [], ["replay", f"out/{name}"]) == 0
    said = capsys.readouterr().out
    assert [f"visit {v}: identical" in said for v in range(3)] == [True] * 3
    assert "no longer bit-exact" not in said and "on other machines" not in said


# ---- what run.json says of older and newer versions ----------------------------------------------

@pytest.mark.parametrize("fact, was", [("threads", 64), ("cpu_capability", "AVX10")])
def test_another_machine_is_told(fact, was, room, capsys):
    path = Path("out/llama/run.json")
    record = json.loads(path.read_text())
    record["launches"][0]["exact"][fact] = was
    path.write_text(json.dumps(record))
    assert run(train.main, "", [], ["llama.py", "--max_steps=4"]) == 0
    assert f"{fact} was {was}, is " in capsys.readouterr().out
    now = json.loads(path.read_text())["launches"][1]["exact"]
    assert now[fact] not in (was, None)


@pytest.mark.parametrize("value", ["none", "some"])
def test_a_key_that_is_gone_is_still_read(value, room, monkeypatch, capsys):
    """One line says so if it was not at its default; a key that never was is an error."""
    path = Path("out/llama/run.json")
    record = json.loads(path.read_text())
    record["config"]["train"]["no_more"] = value
    path.write_text(json.dumps(record))
    command = ["llama.py", "--max_steps=4"]
    assert run(train.main, "", [], command) == CHECKPOINT
    assert "unknown key 'no_more'" in capsys.readouterr().err
    monkeypatch.setitem(GONE, "no_more", "none")
    assert run(train.main, "", [], command) == 0
    said = capsys.readouterr().out
    assert said.count("no_more") == (value == "some")
    assert "no_more" not in json.loads(path.read_text())["config"]["train"]
    assert run(analyze.main, "", [], ["replay", "out/llama", "--verify"]) == 0
