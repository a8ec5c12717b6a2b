"""evaluate.py against lm-evaluation-harness, against transformers one sequence at a time, and
against what users give it.

    pytest tests/test_evaluate.py

The comparison with the harness, by harness.py, runs its own tasks and its own scoring of a Hugging
Face model, on rows that are made and, where developers have them, on real ones.
"""

import json
import math
import os
import random
import re
import shutil
import statistics
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import harness
import prepare
from conftest import REPO
from model import Transformer
from nano360 import tasks, tokenizers
from nano360.config import CHECKPOINT, DATA, ENVIRONMENT, NUMERICAL, USAGE, ModelConfig, Stop
from nano360.files import sha256_file
from nano360.hf_folders import checkpoint_hash
from nano360.hub import benchmarks
from nano360.place import Place

T = 48  # the context of the small model
CHECKPOINTS = ("ckpt_998", "ckpt_999", "ckpt_1000")  # in the order of training, not of the alphabet
RUN_FILE = """
sources = [dict(name="code", path="text/code"), dict(name="prose", path="text/prose", weight=2)]
vocab_size, seq_len, n_chunks, valid_share, valid_rows = 512, 48, 1, 0.2, 7
n_layer, n_head, n_embd, n_inner, lr, batch_size, workers = 2, 2, 32, 64, 1e-3, 2, 1
"""
PROSE = """Zoë's naïve café, “open” since 1998 — 日本 and Ελλάδα.\r
She  left it\twith 12345 coins; the rest is history.
"""


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= harness.tolerance(theirs)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Many small matrices: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A working directory: text, data/tiny, out/tiny with three checkpoints, and benchmarks."""
    root, before = tmp_path_factory.mktemp("world"), Path.cwd()
    for name, file in (("code", "textwrap.py"), ("prose", "argparse.py")):
        (root / "text" / name).mkdir(parents=True)
        shutil.copy(Path(os.__file__).parent / file, root / "text" / name / "1.txt")
    (root / "text" / "prose" / "2.txt").write_bytes(PROSE.encode() * 20)
    (root / "tiny.py").write_text(RUN_FILE)
    harness.write_rows(root / "benchmarks", dict(validation=9, test=9, train=6, dev=8), 5)
    os.chdir(root)
    try:
        prepare.main(["tiny.py"])
    finally:
        os.chdir(before)
    tokenizer = tokenizers.load_tokenizer(root / "data" / "tiny")
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, n_inner=64, vocab_size=520, seq_len=T,
                         init_std=0.25)
    run = root / "out" / "tiny"
    for seed, name in enumerate(CHECKPOINTS):
        harness.save_llama(run / name, tokenizer, False, config, seed)
    manifest = prepare.read_manifest(root / "data" / "tiny")
    (run / "run.json").write_text(json.dumps(
        {"config": {"data": {"dataset": "tiny"}}, "data_hash": manifest["data_hash"]}))
    shutil.copytree(run / CHECKPOINTS[0], run / "ckpt_1001.part")  # what a killed run leaves
    return root


@pytest.fixture
def here(world, monkeypatch) -> Path:
    monkeypatch.chdir(world)
    return world


CKPT = f"out/tiny/{CHECKPOINTS[0]}"


def entries(*words: str) -> list[dict]:
    """What evaluate.py writes for a command line."""
    evaluate.main([*words, "--output=scores.json", "--device=cpu"])
    return json.loads(Path("scores.json").read_text())["runs"]


@pytest.fixture(scope="module")
def theirs(world):
    """The small model as transformers has it."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(world / CKPT).eval()


@torch.no_grad()
def log_probs(model, ids: list[int]) -> torch.Tensor:
    """log p of each id but the first, (len(ids) - 1,), from one sequence alone."""
    logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# ---- against lm-evaluation-harness ---------------------------------------------------------------

@pytest.fixture(scope="module")
def lm_eval() -> types.SimpleNamespace:
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    return harness.import_harness()


@pytest.fixture(scope="module")
def made(lm_eval, tmp_path_factory) -> Path:
    """Rows of all tasks, of MMLU for each of its subjects, made here."""
    folder = tmp_path_factory.mktemp("made")
    harness.write_subjects(folder, lm_eval.subjects)
    harness.write_rows(folder, dict(validation=9, test=9, train=30), 5)
    return folder


@pytest.mark.numeric
@pytest.mark.parametrize("shots, add_bos", ((0, False), (None, True), (harness.SHOTS, True)))
def test_scores_equal_the_harness(lm_eval, made, tmp_path, shots, add_bos):
    """Every log-likelihood and metric, at several batch sizes; harness.py does it with more."""
    tokenizer = harness.tokenizer_at(tmp_path)
    folder = harness.save_llama(tmp_path / "llama", tokenizer, add_bos, ModelConfig(
        n_layer=2, n_head=4, n_embd=64, n_inner=128, vocab_size=tokenizer.vocab_size, seq_len=224,
        init_std=0.1))
    model = harness.harness_model(lm_eval, folder, 4)
    assert model.tok_encode("a")[:1] == [1] * add_bos + tokenizer.encode("a")[:1 - add_bos]
    names = ("leaderboard" if shots is None else ",".join(
        name for name, task in tasks.TASKS.items() if task.shots is None) + ",wikitext")
    words = [f"--tasks={names}", "--limit=6"] + [f"--num_fewshot={shots}"] * (shots is not None)
    several = [harness.ask_ours(folder, made, [*words, f"--batch_size={B}"]) for B in (1, 5, 64)]
    assert [one["task"] for one in several[0]] == [
        *(name for name, task in tasks.TASKS.items() if (task.shots is None) != (shots is None)),
        *(["wikitext"] if shots is not None else [])]
    truncated = 0
    for ours in zip(*several, strict=True):
        name = ours[0]["task"]
        theirs = harness.ask_harness(lm_eval, model, made, [name], ours[0]["num_fewshot"], 6)
        (again,) = [one for one in harness.rescored(
            folder, made, words, [ours[0]], {name: theirs}) if one["task"] == name]
        for one in ours:
            assert one["add_bos"] is add_bos
            verdict = harness.compare(one, again, theirs)
            assert verdict.n >= 6 and verdict.metrics >= 1 and verdict.moved == 0
            truncated += one["metrics"].get("truncated", 0)
    assert truncated > 0 or shots is not None


def test_the_leaderboard_has_its_shots(lm_eval):
    """As the harness' own list of it has them, for what we have of it."""
    options = evaluate.EvaluateOptions(tasks="leaderboard")
    assert evaluate.shots_of(options) == dict(
        arc_challenge=25, hellaswag=10, mmlu=5, truthfulqa_mc1=0, truthfulqa_mc2=0)
    yaml = pytest.importorskip("yaml")
    theirs = yaml.safe_load((lm_eval.tasks / "benchmarks/openllm.yaml").read_text())["task"]
    for words in ("hellaswag,leaderboard,piqa", "leaderboard,piqa,hellaswag"):
        shots = evaluate.shots_of(evaluate.EvaluateOptions(tasks=words))
        assert shots["hellaswag"] == 10 and shots["piqa"] == 0 and len(shots) == 6
    assert {one["task"]: one["num_fewshot"] for one in theirs} == dict(
        arc_challenge=25, hellaswag=10, mmlu=5, truthfulqa=0, winogrande=5, gsm8k=5)


@pytest.mark.numeric
@pytest.mark.parametrize("name, metric", (
    ("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("arc_easy", "acc_norm_stderr"),
    ("truthfulqa_mc2", "acc"), ("crows_pairs_english", "likelihood_diff"), ("mmlu", "acc_stderr"),
    ("wikitext", "word_perplexity"), ("wikitext", "bits_per_byte")))
def test_the_comparison_can_fail(lm_eval, made, tmp_path, name, metric):
    """At a log-likelihood 1.2 tolerances off, at a metric one millionth off, at
    items that are missing or twice there; with other settings nothing is the same."""
    tokenizer = harness.tokenizer_at(tmp_path)
    folder = harness.save_llama(tmp_path / "llama", tokenizer, True, ModelConfig(
        n_layer=1, n_head=2, n_embd=32, n_inner=64, vocab_size=tokenizer.vocab_size, seq_len=224,
        init_std=0.3))
    model, words = harness.harness_model(lm_eval, folder, 4), [f"--tasks={name}"]
    theirs = harness.ask_harness(lm_eval, model, made, [name], 0, None)
    (right,) = harness.ask_ours(folder, made, words)
    (again,) = harness.rescored(folder, made, words, [right], {name: theirs})
    harness.compare(right, again, theirs)
    for wrong in ["--convention=legacy", *["--add_bos=false", "--limit=8"] * (name == "arc_easy")]:
        (one,) = harness.ask_ours(folder, made, [*words, wrong])
        with pytest.raises(Stop, match=f"^{name}: "):
            harness.compare(one, again, theirs)
    value, items = right["metrics"][metric], right["items"]
    measured = right if name == "wikitext" else again
    off = measured | dict(metrics=measured["metrics"] | {metric: value * (1 + 1e-6)})
    with pytest.raises(Stop, match=f"^{name}: {metric} is"):
        harness.compare(*((off, again) if name == "wikitext" else (right, off)), theirs)
    ll = items[0]["lls"][0] + 1.2 * harness.tolerance(items[0]["lls"][0])
    for bad in ([items[0] | dict(lls=[ll, *items[0]["lls"][1:]]), *items[1:]], items[1:],
                [items[0], *items]):
        with pytest.raises(Stop, match=f"^{name}: "):
            harness.compare(right | dict(items=bad), again, theirs)


@pytest.mark.parametrize("name, split", [
    *((name, None) for name in tasks.TASKS),
    *((name, "train") for name in ("arc_challenge", "hellaswag", "winogrande")),
    *((name, "test") for name in ("arc_easy", "mmlu")), ("boolq", "validation")])
def test_prompts_equal_the_harness(lm_eval, made, name, split):
    """Contexts and continuations, character by character, at 5 shots; with examples from `train` as
    the harness' own group `openllm` has it."""
    check_prompts(lm_eval, made, name, split, 1 if (name, split) == ("mmlu", "test") else 5)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_prompts_of_real_rows_equal_the_harness(lm_eval, shared, tmp_path, name):
    shutil.copytree(shared / "eval", tmp_path, dirs_exist_ok=True)
    harness.write_rows(tmp_path, dict(train=9, test=9), 5)  # where there are none
    check_prompts(lm_eval, tmp_path, name, None, 5)


def check_prompts(lm_eval, data: Path, name: str, split: str | None, shots: int) -> None:
    options = evaluate.EvaluateOptions(tasks=name, limit=60, data_dir=str(data),
                                       fewshot_split=split)
    task, ours, theirs = tasks.TASKS[name], {}, {}
    for one in evaluate.read_questions(options, name, shots if task.pool else 0):
        ours.setdefault(one.subject, []).extend(
            (context, task.blank + choice)
            for context, choice in zip(one.contexts, one.choices, strict=True))
    with harness.local_hub(lm_eval, data):
        loaded = lm_eval.manager.load([f"mmlu_{subject}" for subject in [*ours][:9]]
                                      if name == "mmlu" else [name])["tasks"]
    for key, one in loaded.items():
        if one.config.num_fewshot is None:
            one.set_config("num_fewshot", shots)
        if split:
            one.fewshot_cfg.split = split
            one.sampler.replace_df([*one.fewshot_docs()])  # it has those of its file already
        one.set_fewshot_seed(1234)  # the default of its command line
        one.build_all_requests(limit=60, rank=0, world_size=1)
        theirs[key.removeprefix("mmlu_") if name == "mmlu" else ""] = [
            request.args for request in one.instances]
    assert len(theirs) == (9 if name == "mmlu" else 1) and len(ours) >= len(theirs)
    assert {key: ours[key] for key in theirs} == theirs


def test_another_task_is_a_function_and_a_row(lm_eval, tmp_path, monkeypatch):
    """The lines that README.md has for SciQ, scored as the harness scores its SciQ."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    (block,) = [one for one in blocks if "TASKS[" in one]
    body = re.search(r"^def .*?\n\n", block, re.DOTALL).group().strip().split("\n")
    assert len(body) <= 5
    monkeypatch.setattr(tasks, "TASKS", added := dict(tasks.TASKS))  # what is added goes again
    exec(block, vars(tasks))
    monkeypatch.setattr(evaluate, "TASKS", added)
    rng = random.Random(0)
    (tmp_path / "sciq").mkdir()
    rows = [dict(question=harness.sentence(rng, 5), support=f" {harness.sentence(rng, 9)}",
                 correct_answer=harness.sentence(rng, 2), **{
                     f"distractor{k}": harness.sentence(rng, k) for k in (1, 2, 3)})
            for _ in range(24)]
    for split, some in (("test", rows[:9]), ("train", rows[9:])):
        (tmp_path / "sciq" / f"{split}.jsonl").write_text("".join(
            json.dumps(row) + "\n" for row in some))
    monkeypatch.setitem(harness.HUB, ("allenai/sciq", None), "sciq")
    tokenizer = harness.tokenizer_at(tmp_path)
    folder = harness.save_llama(tmp_path / "llama", tokenizer, True, ModelConfig(
        n_layer=1, n_head=2, n_embd=32, n_inner=64, vocab_size=tokenizer.vocab_size, seq_len=224,
        init_std=0.3))
    (ours,) = harness.ask_ours(folder, tmp_path, ["--tasks=sciq", "--num_fewshot=2"])
    theirs = harness.ask_harness(lm_eval, harness.harness_model(lm_eval, folder, 4), tmp_path,
                                 ["sciq"], 2, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TASKS", added)
        (again,) = harness.rescored(folder, tmp_path, ["--tasks=sciq", "--num_fewshot=2"], [ours],
                                    {"sciq": theirs})
    assert harness.compare(ours, again, theirs).n == 36
    (old,) = harness.ask_ours(folder, tmp_path, ["--tasks=sciq", "--convention=legacy"])
    assert len(old["items"]) == 9


@pytest.mark.parametrize("n", (1, 5, 6, 7, 12, 13, 14, 31))
def test_windows_equal_the_harness(lm_eval, n):
    expected = lm_eval.utils.get_rolling_token_windows(
        list(range(1, n + 1)), prefix_token=0, max_seq_len=6, context_len=1)
    assert [(ids[:-1].tolist(), ids[-K:].tolist()) for ids, K in
            evaluate.windows(list(range(n + 1)), 6)] == list(expected)


# ---- prompts -------------------------------------------------------------------------------------

def draws_of(tmp_path, monkeypatch, task: str, sizes: tuple[int, int], shots: int, docs: int,
             **options: str) -> list[tuple[int, list[int]]]:
    """What read_questions draws from files of these sizes: (question, examples), by row number."""
    def read(row: dict) -> tuple:
        return f"<{row['number']}>", ["y"], 0
    one = replace(tasks.TASKS[task], read=read)
    monkeypatch.setattr(evaluate, "tasks_of", lambda _: {task: one})
    (tmp_path / task).mkdir()
    for split, n in zip((one.split, one.pool), sizes, strict=True):
        (tmp_path / task / f"{split}.jsonl").write_text(
            "".join(f'{{"number": {i}, "split": "{split}"}}\n' for i in range(n)))
    found = evaluate.read_questions(evaluate.EvaluateOptions(
        tasks=task, data_dir=str(tmp_path), limit=docs, **options), task, shots)
    numbers = [[int(word.split(">")[0]) for word in question.contexts[0].split("<")[1:]]
               for question in found]
    assert [one.doc_id for one in found] == [many[-1] for many in numbers]
    return [(many[-1], many[:-1]) for many in numbers]


def test_draws_are_the_published_vectors(tmp_path, monkeypatch):
    """Row numbers in the full files, HellaSwag 10042 and 39905, ARC 1172 and 1119, WinoGrande 1267
    and 40398: by the harness' code, run once on files of these sizes."""
    def draws(*args, **options):
        (tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
        return draws_of(max(tmp_path.iterdir(), key=lambda p: int(p.name)), monkeypatch, *args,
                        **options)
    hellaswag = draws("hellaswag", (10042, 39905), 10, 3)
    assert hellaswag[0] == (
        0, [28883, 7657, 490, 5940, 38156, 2288, 5500, 6450, 23241, 15519])
    assert [(i, many[:5]) for i, many in hellaswag[1:]] == [
        (1, [2019, 1038, 22681, 31735, 30379]), (2, [31899, 16372, 4231, 35460, 30533])]
    named = draws("hellaswag", (10042, 39905), 10, 3, fewshot_split="train")
    assert named[0] == hellaswag[0]  # and now 10 of 10, not of 11, are drawn
    assert [many[:5] for _, many in named[1:]] == [
        [1142, 2019, 1038, 22681, 31735], [958, 32970, 31899, 16372, 4231]]
    assert draws("arc_challenge", (1172, 1119), 25, 1) == [(
        0, [902, 239, 15, 185, 71, 171, 201, 726, 484, 35, 63, 32, 708, 991, 949, 304, 186, 374,
            234, 29, 1030, 996, 511, 132, 1108])]
    assert draws("winogrande", (1267, 40398), 5, 2) == [
        (0, [28883, 7657, 490, 5940, 38156]), (1, [5500, 6450, 23241, 15519, 1142])]


def test_legacy_draws_are_the_published_vectors(tmp_path, monkeypatch):
    """The order of the questions is drawn too, and by the same generator before the examples."""
    (tmp_path / "h").mkdir()
    hellaswag = draws_of(tmp_path / "h", monkeypatch, "hellaswag", (10042, 39905), 10, 6,
                         convention="legacy")
    assert [i for i, _ in hellaswag] == [9792, 1027, 5366, 615, 5402, 477]
    assert hellaswag[0][1] == [3656, 36651, 3421, 19327, 24999, 26324, 6280, 26942, 15277, 39293]
    (tmp_path / "a").mkdir()
    arc = draws_of(tmp_path / "a", monkeypatch, "arc_challenge", (1172, 1119), 25, 6,
                   convention="legacy")
    assert [i for i, _ in arc] == [595, 716, 511, 906, 148, 368]
    assert arc[0][1][:6] == [888, 201, 205, 908, 340, 613]


def test_a_question_is_never_its_own_example():
    for seed in range(50):
        drawn = tasks.draw(random.Random(seed), ["a", "b", "c", "c"], 2, True, "c")
        assert sorted(drawn) == ["a", "b"]
        assert len(tasks.draw(random.Random(seed), ["a", "b", "c"], 2, True, "d")) == 2


def test_prompts_of_rows():
    row = dict(activity_label="Youth", ctx_a="[header] How to go [title] Buy   it.",
               ctx_b="THEN Go", endings=[" [step] Do  [x] it. ", "b"], label="1")
    assert tasks.hellaswag(row) == (  # three blanks become two; a mark leaves its blank
        "Youth: How to go. Buy  it. Then go", [" Do  it.", "b"], 1)
    assert tasks.hellaswag(row | dict(ctx_b=""))[0] == "Youth: How to go. Buy  it."
    row = dict(question="Q?", choices=dict(text=["a", "b", "c"], label=["1", "2", "3"]),
               answerKey="3")
    assert tasks.arc(row) == ("Question: Q?\nAnswer:", ["a", "b", "c"], 2)
    row = dict(sentence="Zoë saw _ , and _ too .", option1="a cat ", option2="it", answer="2")
    assert tasks.winogrande(row) == (  # what is scored is the same, only the context is another
        ["Zoë saw a cat ", "Zoë saw it"], [", and _ too ."] * 2, 1)
    row = dict(question=" Which? \n", choices=["w", "x", "y", "z"], answer=3)
    assert tasks.mmlu(row) == ("Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:", ["A", "B", "C", "D"], 3)


def problems(*questions: str) -> str:
    return str([dict(question=one, options=["a", "b", "c", "d"], answer="B") for one in questions])


def test_prompts_of_legacy(tmp_path):
    """What commit b281b09 asks otherwise: RACE, COPA; and TruthfulQA's sum."""
    row = dict(article="It was.", problems=problems("Who is  _  .", "Why?", "It is  _  ."))
    assert tasks.TASKS["race"].read(row) == (
        "Article: It was.\n\nWho is b\nQuestion: Why?\nAnswer: b\nIt is  _  .", [*"abcd"], 1)
    assert tasks.LEGACY["race"].read(row)[0] == (
        "Article: It was.\n\n _  .b\nQuestion: Why?\nAnswer: b\nIt is  _  .")
    row = dict(premise=" Zoë sang. ", choice1="The cat left.", choice2="I did.", question="cause",
               label=1)
    assert tasks.TASKS["copa"].read(row) == ("Zoë sang because", [" the cat left.", " i did."], 1)
    assert tasks.LEGACY["copa"].read(row) == ("Zoë sang because", ["the cat left.", "i did."], 1)


@pytest.mark.numeric
def test_truthfulqa_is_split_by_label_or_at_the_first_wrong_answer():
    row = dict(mc2_targets=dict(labels=[1, 0, 1, 0]))
    one = tasks.Example(row, [], [], 0, 0, "")
    lls = [math.log(x) - 2000 for x in (0.1, 0.2, 0.3, 0.4)]  # exp() of these alone is 0
    assert tasks.TASKS["truthfulqa_mc2"].metrics["acc"](lls, one) == pytest.approx(0.4)
    assert tasks.LEGACY["truthfulqa_mc2"].metrics["acc"](lls, one) == pytest.approx(0.1)
    sorted_row = tasks.Example(dict(mc2_targets=dict(labels=[1, 1])), [], [], 0, 0, "")
    assert tasks.mc2_legacy([-1.0, -2.0], sorted_row) == tasks.mc2([-1.0, -2.0], sorted_row) == 1


@pytest.mark.numeric
def test_a_subject_counts_once_or_each_question_does():
    values = {"law": [1.0] * 6 + [0.0] * 2, "virology": [0.0, 1.0], "econometrics": [0.0] * 5}
    now = tasks.over_subjects("acc", values, legacy=False)
    old = tasks.over_subjects("acc", values, legacy=True)
    assert now["acc"] == now["acc_by_size"] == old["acc_by_size"] == pytest.approx(7 / 15)
    assert old["acc"] == old["acc_by_subject"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    assert now["acc/law"] == 0.75 and now["acc/virology"] == 0.5
    errors = [statistics.stdev(v) / math.sqrt(len(v)) for v in values.values()]
    assert old["acc_stderr"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 3)
    pooled = sum((len(v) - 1) * len(v) * e**2
                 for v, e in zip(values.values(), errors, strict=True)) / (15 - 3)
    assert now["acc_stderr"] == pytest.approx(math.sqrt(pooled / 15))
    assert tasks.over_subjects("acc", dict(law=[1.0], virology=[0.0]), False)["acc_stderr"] is None


@pytest.mark.numeric
def test_legacy_has_no_bos_and_begins_with_eos(here):
    """In contexts, in front of what has none, and of texts; in MMLU's average, each subject counts
    once."""
    names = "--tasks=piqa,crows_pairs_english,wikitext,mmlu,hellaswag"
    shutil.copytree(CKPT, "bos/ckpt_0", dirs_exist_ok=True)
    file = Path("bos/ckpt_0/tokenizer_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(add_bos_token=True)))
    words = (names, "--data_dir=benchmarks", "--num_fewshot=1")
    now, old, forced = (entries("bos/ckpt_0", *words, *more) for more in (
        [], ["--convention=legacy"], ["--convention=legacy", "--add_bos=true"]))
    assert [{one["add_bos"] for one in many} for many in (now, old, forced)] == [
        {True}, {False}, {True}]
    tokenizer = tokenizers.load_tokenizer(CKPT)
    model = Transformer.from_pretrained(CKPT).eval()
    row = json.loads(Path("benchmarks/crows_pairs/test.jsonl").read_text().split("\n")[4])
    for many, first in ((now, tokenizer.bos), (old, tokenizer.eos)):
        pool = evaluate.read_questions(evaluate.EvaluateOptions(
            tasks="", data_dir="benchmarks",
            convention="legacy" if many is old else "current"), "crows_pairs_english", 0)
        assert [one.contexts for one in pool] == [["", ""]] * 9
        (scored,) = [one for one in entries(
            "bos/ckpt_0", "--tasks=crows_pairs_english", "--data_dir=benchmarks",
            *["--convention=legacy"] * (many is old))]
        (item,) = [one for one in scored["items"] if one["doc_id"] == 4]
        for ll, name in zip(item["lls"], ("sent_more", "sent_less"), strict=True):
            ids = torch.tensor([[first, *tokenizer.encode(row[name])]])
            assert close(ll, -model(ids[:, :-1], ids[:, 1:], per_row=True).item())
    assert [one["doc_id"] for one in now[0]["items"]] == [*range(9)]
    order = [*range(9)]
    random.Random(42).shuffle(order)
    assert [one["doc_id"] for one in old[0]["items"]] == order
    mmlu_now, mmlu_old = now[3]["metrics"], old[3]["metrics"]
    assert mmlu_now["acc"] == mmlu_now["acc_by_size"] != mmlu_now["acc_by_subject"]
    assert mmlu_old["acc"] == mmlu_old["acc_by_subject"]


def test_a_page_is_put_together_again():
    """Each pair of marks and signs, by itself and in a page."""
    for cut, whole in (
            ("boys ' tea", "boys' tea"), ("3 @-@ 4", "3-4"), ("1 @,@ 000", "1,000"),
            ("1 @.@ 5", "1.5"), ("a : b", "a: b"), ("a ; b", "a; b"), ("a . b", "a. b"),
            ("a ! b", "a! b"), ("a ? b", "a? b"), ("a , b", "a, b"), ("( a b )", "(a b)"),
            ("[ a ]", "[a]"), ("{ a }", "{a}"), ('" a "', '"a"'), ("' a '", "'a'"),
            ("= = = = A", "==== A"), ("= = = A", "=== A"), ("= = A", "== A"), ("9 ° C", "9°C"),
            ("a \n b", "a\nb"), ("a N b", "a 1 b"), ("it 's", "it's")):
        assert tasks.detokenize(cut) == whole
    assert tasks.detokenize(" = A = \n He said ( in 1 @,@ 000 ) : \" so \" . \n") == (
        ' = A =\nHe said (in 1,000): "so".\n')


def test_what_is_fetched(here, monkeypatch):
    """The folders of the tasks that are named, before anything is read; nothing unasked."""
    asked = []
    monkeypatch.setattr(benchmarks, "fetch_benchmarks", lambda *args: asked.append(args))
    words = [CKPT, "--tasks=crows_pairs_english,truthfulqa_mc2,valid", "--data_dir=fetched"]
    for more in ([], ["--fetch"]):
        with pytest.raises(Stop, match="fetched/crows_pairs/test.jsonl not found"):
            evaluate.main([*words, *more, "--device=cpu"])
    assert asked == [(["crows_pairs", "truthfulqa_mc", "valid"], Path("fetched"))]
    assert not list(here.glob("fetched*"))


def test_examples_stand_in_front_of_the_question(tmp_path):
    (tmp_path / "piqa").mkdir()
    rows = [dict(goal=f"g{i}\u2028", sol1=f"a{i}", sol2=f"b{i}", label=i % 2) for i in range(4)]
    (tmp_path / "piqa" / "train.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "piqa" / "validation.jsonl").write_text(
        "".join(json.dumps(rows[0] | dict(goal=goal)) + "\n" for goal in "QRS"))
    options = evaluate.EvaluateOptions(tasks="piqa", data_dir=str(tmp_path))
    rng = random.Random(1234)  # one for all questions
    for one, goal in zip(evaluate.read_questions(options, "piqa", 2), "QRS", strict=True):
        i, j, _ = rng.sample(range(4), 3)
        assert one.contexts == ["".join(f"Question: g{k}\u2028\nAnswer: {'ab'[k % 2]}{k}\n\n"
                                        for k in (i, j)) + f"Question: {goal}\nAnswer:"] * 2
        assert (one.choices, one.gold) == (["a0", "b0"], 0)


# ---- log-likelihoods -----------------------------------------------------------------------------

def checkpoint(folder: str, add_bos: bool = False, max_length: int = T, model: object = None,
               **options: object) -> evaluate.Checkpoint:
    return evaluate.Checkpoint(
        Path(folder), model, tokenizers.load_tokenizer(folder), add_bos, max_length,
        evaluate.EvaluateOptions(tasks="", **options),
        Place(0, 1, torch.device("cpu"), torch.float32, compile=False))


@pytest.mark.parametrize("add_bos", (False, True))
def test_context_and_continuation(here, add_bos):
    ckpt = checkpoint(CKPT, add_bos)
    front, encode = [ckpt.tokenizer.bos] * add_bos, ckpt.tokenizer.encode

    def pair(context: str, continuation: str) -> tuple[list[int], int]:
        return evaluate.encode_pair(ckpt, ckpt.encode(context.rstrip()), context, continuation)
    ids, K = pair("Question: how\nAnswer:", " the kettle")
    assert ids == front + encode("Question: how\nAnswer: the kettle")
    assert ids[-K:] == encode("the kettle")  # whose blank, in front, is that of the dummy prefix
    # blanks at the end of the context are scored: they go over to the continuation
    assert pair("how \n ", "the") == pair("how", " \n the")
    assert pair("how  ", "the")[0] == front + encode("how  the")
    # where a piece spans the border, the context keeps the ids it has alone
    head, whole = encode("tea an"), encode("tea and the the")
    assert whole[:len(head)] != head and len(whole) > len(head)
    assert pair("tea an", "d the the") == (front + head + whole[len(head):], len(whole) - len(head))
    # nothing in front: BOS stands there, since a first id cannot be predicted from nothing
    assert pair("", "the") == ([ckpt.tokenizer.bos] + encode("the"), 1)


@pytest.mark.numeric
@pytest.mark.parametrize("shots, add_bos", ((0, False), (1, True), (3, False)))
def test_choices_one_sequence_at_a_time(here, theirs, shots, add_bos):
    """Tasks against transformers; with 3 shots, contexts are longer than the model's."""
    options, names = evaluate.EvaluateOptions(tasks="", data_dir="benchmarks", limit=7), [
        "piqa", "arc_challenge", "hellaswag", "openbookqa"]
    scored = entries(CKPT, f"--tasks={','.join(names)}", f"--num_fewshot={shots}",
                     "--data_dir=benchmarks", "--limit=7", f"--add_bos={str(add_bos).lower()}")
    tokenizer, n_truncated = tokenizers.load_tokenizer(CKPT), 0
    assert [one["task"] for one in scored] == names
    for one in scored:
        questions = evaluate.read_questions(options, one["task"], shots)
        acc, acc_norm, truncated = [], [], set()
        for i, question in enumerate(questions):
            lls = []
            for context, choice in zip(question.contexts, question.choices, strict=True):
                bare = context.rstrip()
                head = [tokenizer.bos] * add_bos + tokenizer.encode(bare)
                whole = [tokenizer.bos] * add_bos + tokenizer.encode(f"{context} {choice}")
                ids, K = head + whole[len(head):], len(whole) - len(head)
                if len(ids) > T + 1:
                    truncated.add(i)
                lls.append(log_probs(theirs, ids[-T - 1:])[-K:].sum().item())
            norm = [ll / len(c) for ll, c in zip(lls, question.choices, strict=True)]
            acc.append(float(np.argmax(lls) == question.gold))
            acc_norm.append(float(np.argmax(norm) == question.gold))
            assert one["items"][i]["doc_id"] == i
            assert len(lls) == len(one["items"][i]["lls"])
            assert all(map(close, one["items"][i]["lls"], lls)), (one["items"][i], lls)
        assert one["metrics"] == dict(
            truncated=len(truncated), acc=pytest.approx(np.mean(acc)),
            acc_stderr=pytest.approx(statistics.stdev(acc) / math.sqrt(7)),
            acc_norm=pytest.approx(np.mean(acc_norm)),
            acc_norm_stderr=pytest.approx(statistics.stdev(acc_norm) / math.sqrt(7)))
        assert (one["num_fewshot"], one["limit"], one["add_bos"]) == (shots, 7, add_bos)
        n_truncated += len(truncated)
    assert n_truncated > 0 or shots < 3


def example(choices: list[str], gold: int = 0) -> tasks.Example:
    return tasks.Example({}, ["c"] * len(choices), choices, gold, 0, "")


def job_of(*questions: tasks.Example) -> evaluate.Job:
    return evaluate.Job("piqa", 0, {}, list(questions))


@pytest.mark.numeric
def test_the_first_of_equals_is_chosen_and_characters_are_counted(here, monkeypatch):
    job = job_of(example(["a", "a"]), example(["aé", "a"]), example(["", "a"], 1))
    lls = [[-2.0, -2.0], [-3.0, -2.0], [-1.0, -9.0]]
    monkeypatch.setattr(evaluate, "score", lambda *_: lls)
    metrics, items = evaluate.score_choices(checkpoint(CKPT), job)
    assert [one["lls"] for one in items] == lls
    assert metrics["acc"] == pytest.approx(1 / 3)  # -3 < -2, and -1 > -9
    assert metrics["acc_norm"] == 1  # -3 / 2 > -2 / 1; an empty choice never wins


def test_what_is_lost_is_counted(here, monkeypatch):
    """An item of T + 1 ids fits: the last id is predicted and not read."""
    monkeypatch.setattr(evaluate, "score", lambda _, groups, __: [
        [float(len(ids)) for ids, _ in group] for group in groups])
    for lengths, lost in (((T, T + 1), 0), ((T + 1, T + 2), 1), ((T + 2, T + 9), 1)):
        left = iter(lengths)
        monkeypatch.setattr(evaluate, "encode_pair", lambda *_, left=left: ([5] * next(left), 1))
        metrics, items = evaluate.score_choices(checkpoint(CKPT), job_of(example(["a", "b"])))
        assert metrics["truncated"] == lost and metrics["acc_stderr"] is None
        assert items[0]["lls"] == [min(n, T + 1) for n in lengths]


@pytest.mark.numeric
def test_max_length_cuts_on_the_left(here):
    whole = Path("benchmarks/arc_easy/test.jsonl").read_text().split("\n")[3]
    Path("short/arc_easy").mkdir(parents=True, exist_ok=True)
    Path("short/arc_easy/test.jsonl").write_text(whole + "\n")
    words = ("--tasks=arc_easy", "--data_dir=short")
    (full,), (cut,) = entries(CKPT, *words), entries(CKPT, *words, "--max_length=9")
    assert (full["metrics"]["truncated"], cut["metrics"]["truncated"]) == (0, 1)
    (question,) = evaluate.read_questions(evaluate.EvaluateOptions(
        tasks="", data_dir="short"), "arc_easy", 0)
    tokenizer, model = tokenizers.load_tokenizer(CKPT), Transformer.from_pretrained(CKPT).eval()
    for ll, choice in zip(cut["items"][0]["lls"], question.choices, strict=True):
        head = tokenizer.encode(question.contexts[0])
        ids = tokenizer.encode(f"{question.contexts[0]} {choice}")
        K, idx = len(ids) - len(head), torch.tensor([ids[-10:]])
        logits = model(idx[:, :-1]).log_softmax(-1)[0, -K:]
        assert close(ll, logits.gather(1, idx[0, -K:, None]).sum().item())


@pytest.mark.numeric
def test_what_choices_have_in_common_is_run_once(here, monkeypatch):
    """Of a question with choices of one token nothing is left but its context; of others the rests
    alone. The scores are those of each request by itself."""
    model, seen, hidden = Transformer.from_pretrained(CKPT).eval(), [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda self, idx, *rest: seen.append(
        tuple(idx.shape)) or hidden(self, idx, *rest))
    rng = np.random.default_rng(0)
    front = rng.integers(3, 500, 20).astype(np.int32)

    def group(*tails: int, K: int = 1) -> list[evaluate.Request]:
        return [(np.concatenate([front, rng.integers(3, 500, n).astype(np.int32)]), K)
                for n in tails]
    for groups, shapes in (
            ([group(1, 1, 1, 1)], [(1, 20)]),  # the head alone tells four last ids apart
            ([group(5, 3, 5, K=3)], [(1, 20), (3, 4)]),
            ([group(4)], [(1, 23)]),  # one choice: there is nothing to share
            ([group(1, 1), group(9, 2, K=2)], [(2, 20), (2, 8)]),
            ([group(2, 2, K=20)], [(1, 20), (2, 1)])):  # what is scored begins in what is common
        seen.clear()
        ours = evaluate.score(checkpoint(CKPT, model=model), groups, "x")
        assert seen == shapes
        for many, lls in zip(groups, ours, strict=True):
            for (ids, K), ll in zip(many, lls, strict=True):
                alone = torch.tensor(ids[None].astype(np.int64))
                targets = alone[:, 1:].clone()
                targets[:, :-K] = -100
                assert close(ll, -model(alone[:, :-1], targets, per_row=True).item())


def test_batches_fit_the_context():
    """Longest first; what is common and what follows it fit into T for the whole batch."""
    shapes = [(9, 1), (9, 3), (8, 2), (2, 10), (0, 12), (0, 3), (0, 1)]
    found = [*evaluate.batches(shapes, [*range(7)], 3, 12)]
    assert found == [[0, 1, 2], [3], [4, 5, 6]]
    assert [*evaluate.batches(shapes, [], 3, 12)] == []


@pytest.mark.numeric
def test_batch_size_changes_nothing(here):
    words = [CKPT, f"--tasks=valid,text:text/prose/2.txt,wikitext,{','.join(tasks.TASKS)}",
             "--num_fewshot=1", "--data_dir=benchmarks"]
    one, five, all_ = (entries(*words, f"--batch_size={B}") for B in (1, 5, 1000))
    for ours, *others in zip(one, five, all_, strict=True):
        for other in others:
            assert other["metrics"] == pytest.approx(ours["metrics"], rel=1e-3, abs=1e-3)
            for a, b in zip(ours["items"], other["items"], strict=True):
                assert a["doc_id"] == b["doc_id"]
                assert b["lls"] == pytest.approx(a["lls"], abs=1e-4)


@pytest.mark.numeric
def test_bfloat16_is_near_float32(here):
    words = (CKPT, "--tasks=text:text/prose/2.txt,hellaswag", "--data_dir=benchmarks")
    full, half = (entries(*words, f"--dtype={dtype}") for dtype in ("float32", "bfloat16"))
    a, b = (one[0]["metrics"]["nats_per_token"] for one in (full, half))
    assert a != b and a == pytest.approx(b, rel=0.02)
    for a, b in zip(full[1]["items"], half[1]["items"], strict=True):
        assert a["lls"] != b["lls"] and a["lls"] == pytest.approx(b["lls"], rel=0.05)


# ---- rows and files ------------------------------------------------------------------------------

def bytes_of(piece: str) -> int:
    """By the spelling of a sentencepiece piece: "▁the" is four bytes, "<0x0A>" one, EOS none."""
    if piece in ("<s>", "</s>", "<unk>"):
        return 0
    return 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())


@pytest.mark.numeric
@pytest.mark.parametrize("limit", (None, 3))
def test_held_out_rows(here, theirs, limit):
    scored = entries(CKPT, "--tasks=valid", *([f"--limit={limit}"] if limit else []))
    assert [one["task"] for one in scored] == ["valid/code", "valid/prose"]
    coder = tokenizers.load_tokenizer("data/tiny").coder
    for one in scored:
        file = Path("data/tiny") / f"valid_{one['task'].removeprefix('valid/')}.bin"
        rows = np.fromfile(file, np.uint16).reshape(-1, T + 1)[:limit].tolist()
        assert len(rows) == (limit or len(rows)) > 1
        lls = [log_probs(theirs, row).sum().item() for row in rows]
        n_bytes = sum(bytes_of(coder.id_to_piece(i)) for row in rows for i in row[1:])
        assert [item["doc_id"] for item in one["items"]] == list(range(len(rows)))
        assert all(close(item["lls"][0], ll) for item, ll in zip(one["items"], lls, strict=True))
        assert one["metrics"] == dict(
            nats_per_token=pytest.approx(-sum(lls) / (len(rows) * T), rel=1e-6),
            bits_per_byte=pytest.approx(-sum(lls) / math.log(2) / n_bytes, rel=1e-6),
            tokens=len(rows) * T, bytes=n_bytes)


@pytest.mark.numeric
@pytest.mark.parametrize("n, add_bos", (
    (T - 9, False), (T, True), (2 * T, False), (3 * T - 7, True)))
def test_text_one_token_at_a_time(here, theirs, n, add_bos):
    """Each token from the context that its window gives it; the last window's is full. BOS stands
    in front, and the one that add_bos puts there is predicted from it."""
    tokenizer = tokenizers.load_tokenizer(CKPT)
    text = next(text for k in range(900) for text in [(PROSE * 9)[:k]]
                if len(tokenizer.encode(text)) >= n)
    Path("a text.txt").write_bytes(text.encode())
    (one,) = entries(CKPT, "--tasks=text:a text.txt", f"--add_bos={str(add_bos).lower()}")
    ids, total = [tokenizer.bos] * (1 + add_bos) + tokenizer.encode(text), 0.0
    for p in range(1, len(ids)):
        window = (p - 1) // T
        start = window * T if (window + 1) * T < len(ids) else max(0, len(ids) - 1 - T)
        total += log_probs(theirs, ids[start:p + 1])[-1].item()
    assert len(one["items"]) == 1 and close(one["items"][0]["lls"][0], total)
    n_bytes, words = len(text.encode()), text.split()
    n_words = len(words) + text[0].isspace() + text[-1].isspace()  # re.split() counts empty ends
    assert one["metrics"] == dict(
        nats_per_token=pytest.approx(-total / (len(ids) - 1), rel=1e-6),
        bits_per_byte=pytest.approx(-total / math.log(2) / n_bytes, rel=1e-6),
        byte_perplexity=pytest.approx(math.exp(-total / n_bytes), rel=1e-6), words=n_words,
        word_perplexity=pytest.approx(math.exp(-total / n_words), rel=1e-4),
        tokens=len(ids) - 1, bytes=n_bytes)


def test_windows_predict_every_token_once():
    for n in (1, 5, 6, 7, 12, 13, 14, 31):
        requests = evaluate.windows(list(range(n + 1)), 6)
        assert [i for ids, K in requests for i in ids[-K:]] == list(range(1, n + 1))
        for ids, _ in requests:
            assert len(ids) == min(6, n) + 1 and (np.diff(ids) == 1).all()


# ---- runs and what they leave --------------------------------------------------------------------

@pytest.mark.numeric
def test_a_run_is_scored_checkpoint_by_checkpoint(here, capsys):
    scored = entries("out/tiny", "--tasks=valid,piqa", "--data_dir=benchmarks", "--limit=2")
    names = [one["settings"]["checkpoint"] for one in scored]
    assert names == [name for name in CHECKPOINTS for _ in ("valid/code", "valid/prose", "piqa")]
    for one in scored:
        folder = Path("out/tiny") / one["settings"]["checkpoint"]
        assert one["settings"] == dict(
            checkpoint=folder.name, checkpoint_hash=checkpoint_hash(folder), device="cpu",
            tokenizer_sha256=tokenizers.load_tokenizer(folder).spec()["sha256"], dtype="float32",
            batch_size=16, max_length=T, torch=torch.__version__, convention="current",
            fewshot_split=None, data=one["settings"]["data"])
    assert [one["settings"]["data"] for one in scored[1:3]] == [
        {"tiny": prepare.read_manifest(Path("data/tiny"))["data_hash"]},
        {"validation.jsonl": sha256_file("benchmarks/piqa/validation.jsonl")}]
    assert len({one["metrics"]["nats_per_token"] for one in scored[::3]}) == 3
    alone = entries(f"out/tiny/{CHECKPOINTS[1]}", "--tasks=valid,piqa", "--data_dir=benchmarks",
                    "--limit=2")
    assert alone == scored[3:6]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["checkpoint", "task", "shots", "BOS", "items", "metric",
                                "value", "stderr"]
    piqa = next(line.split() for line in table if "piqa" in line and " acc " in line)
    assert piqa[:6] == [CHECKPOINTS[0], "piqa", "0", "no", "2", "acc"]
    assert [float(x) for x in piqa[6:]] == [pytest.approx(scored[2]["metrics"][k], abs=1e-4)
                                            for k in ("acc", "acc_stderr")]


def test_a_checkpoint_is_called_what_it_is_called_there(here):
    """A link by its own name; a folder that is given as `.` by the name it has."""
    for k in (0, 1):
        Path(f"out/links/ckpt_{k}").parent.mkdir(exist_ok=True)
        Path(f"out/links/ckpt_{k}").symlink_to(here / CKPT)
    scored = entries("out/links", "--tasks=piqa", "--data_dir=benchmarks", "--limit=2")
    assert [one["settings"]["checkpoint"] for one in scored] == ["ckpt_0", "ckpt_1"]
    (one,) = entries(f"{CKPT}/../{CHECKPOINTS[1]}/", "--tasks=piqa", "--data_dir=benchmarks")
    assert one["settings"]["checkpoint"] == CHECKPOINTS[1]


def test_output_names_no_place_and_is_whole(here):
    path = here / "text" / "prose" / "2.txt"
    (one,) = entries(str(here / CKPT), f"--tasks=text:{path}", f"--tokenizer={here / CKPT}"
                     "/tokenizer.model")
    assert one["task"] == "text:2.txt"
    assert str(here) not in Path("scores.json").read_text() and "/" not in json.dumps(one)
    assert not list(here.glob("*.part"))


def test_the_folder_says_whether_bos_is_put(here, tmp_path):
    shutil.copytree(CKPT, tmp_path / "llama")
    file = tmp_path / "llama" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(add_bos_token=True)))
    words = ("--tasks=piqa", "--data_dir=benchmarks", "--limit=2")
    (without,), (with_bos,) = entries(CKPT, *words), entries(str(tmp_path / "llama"), *words)
    assert (without["add_bos"], with_bos["add_bos"]) == (False, True)
    assert entries(CKPT, *words, "--add_bos=true")[0]["items"] == with_bos["items"]
    assert without["items"] != with_bos["items"]


# ---- what users give -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bad(world) -> Path:
    """Files and folders that users might give."""
    bad = world / "bad"
    for task in ("piqa", "hellaswag", "arc_challenge", "2/piqa"):
        (bad / task).mkdir(parents=True)
    row = harness.made_rows(random.Random(0), 1)
    (bad / "piqa" / "validation.jsonl").write_text(json.dumps(row["piqa"]) + "\n{}\n")
    (bad / "2" / "piqa" / "validation.jsonl").write_bytes("é".encode("latin-1"))
    (bad / "hellaswag" / "validation.jsonl").write_text("")
    (bad / "arc_challenge" / "test.jsonl").write_text(
        json.dumps(row["arc_challenge"] | dict(answerKey="E")))
    (bad / "blank.txt").write_text("\n \n")
    (bad / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, size in (("other", 500), ("large", 600)):
        (bad / f"{name}.model").write_bytes(prepare.train_tokenizer(
            [(world / "text/prose/1.txt").read_text()], size))
    shutil.copytree(world / CKPT, bad / "alone")
    for name, data in (("other", "gone"), ("changed", "tiny")):
        shutil.copytree(world / CKPT, bad / name / "ckpt_0")
        (bad / name / "run.json").write_text(json.dumps(
            {"config": {"data": {"dataset": data}}, "data_hash": "0"}))
    shutil.copytree(world / CKPT, bad / "broken")
    model = Transformer.from_pretrained(bad / "broken")
    model.lm_head.weight.data[3] = math.nan
    (bad / "broken" / "model.safetensors").unlink()
    model.save_pretrained(bad / "broken")
    for task, line in (("piqa", '{"goal": "\\ud800", "sol1": "a", "sol2": "b", "label": 0}'),
                       ("winogrande", "[" * 99999),
                       ("copa", "\n".join([json.dumps(row["copa"])] * 4))):
        for split in ("validation", "train"):
            (world / "half" / task).mkdir(parents=True, exist_ok=True)
            (world / "half" / task / f"{split}.jsonl").write_text(line)
    return bad


@pytest.mark.parametrize("words, code, said", (
    ((CKPT, "--tasks=helaswag"), USAGE, "unknown task 'helaswag'; expected some of valid, text:"),
    ((CKPT, "--tasks=piqa,"), USAGE, "unknown task ''"),
    ((CKPT,), USAGE, "missing key 'tasks'"),
    ((CKPT, "--tasks=piqa"), DATA, "data/eval/piqa/validation.jsonl not found.*--fetch"),
    ((CKPT, "--tasks=piqa", "--data_dir=benchmarks", "--num_fewshot=6"), DATA,
     "piqa: --num_fewshot=6 needs 7 rows, benchmarks/piqa/train.jsonl has 6"),
    ((CKPT, "--tasks=arc_challenge", "--data_dir=benchmarks", "--num_fewshot=7"), DATA,
     "--num_fewshot=7 needs 7 rows, benchmarks/arc_challenge/train.jsonl has 6"),
    ((CKPT, "--tasks=mmlu", "--data_dir=benchmarks", "--num_fewshot=5"), DATA,
     "--num_fewshot=5 needs 5 rows of anatomy, benchmarks/mmlu/dev.jsonl has 4"),
    ((CKPT, "--tasks=piqa", "--data_dir=benchmarks", "--num_fewshot=1", "--fewshot_split=dave"),
     DATA, "benchmarks/piqa/dave.jsonl not found"),
    ((CKPT, "--tasks=leaderboard", "--num_fewshot=5"), USAGE, "leaderboard has shots of its own"),
    ((CKPT, "--tasks=piqa", "--max_length=49"), USAGE, "--max_length=49, but the context .* is 48"),
    ((CKPT, "--tasks=wikitext"), DATA, "data/eval/wikitext/test.jsonl not found.*--fetch"),
    ((CKPT, "--tasks=piqa", "--data_dir=bad"), DATA, "validation.jsonl:2: not a row of piqa"),
    ((CKPT, "--tasks=piqa", "--data_dir=bad/2"), DATA, "validation.jsonl:1: .*UnicodeDecodeError"),
    ((CKPT, "--tasks=hellaswag", "--data_dir=bad"), DATA, "validation.jsonl holds no rows"),
    ((CKPT, "--tasks=arc_challenge", "--data_dir=bad"), DATA, "test.jsonl:1: .* 'E' is not in"),
    ((CKPT, "--tasks=text:nothing.txt"), DATA, "nothing.txt is missing or blank"),
    ((CKPT, "--tasks=text:bad/blank.txt"), DATA, "blank.txt is missing or blank"),
    ((CKPT, "--tasks=text:bad/latin.txt"), DATA, "latin.txt is not UTF-8"),
    (("out/nothing", "--tasks=valid"), CHECKPOINT, "no checkpoint at out/nothing; expected"),
    (("text", "--tasks=valid"), CHECKPOINT, "no checkpoint at text; expected"),
    (("bad/alone", "--tasks=valid"), DATA, "no run.json .* beside bad/alone"),
    (("bad/other/ckpt_0", "--tasks=valid"), DATA, "data/gone not found here; make it first"),
    (("bad/changed/ckpt_0", "--tasks=valid"), DATA, "data/tiny is not what bad/changed/ckpt_0 was"),
    ((CKPT, "--tasks=valid", "--output=nowhere/x.json"), USAGE, "in a folder that does not"),
    ((CKPT, "--tasks=valid", "--output=out/tiny/run.json"), USAGE, "is there and something else"),
    ((CKPT, "--tasks=valid", "--output=/dev/null"), USAGE, "is there and something else"),
    ((CKPT, "--tasks=valid", "--max_length=9"), USAGE, "held-out rows are scored whole, .* 48 tok"),
    ((CKPT, "--tasks=text:tiny.py,text:text/tiny.py"), USAGE, "a second text is called tiny.py"),
    ((CKPT, "--tasks=piqa", "--data_dir=half"), DATA, "validation.jsonl:1: .*surrogates"),
    ((CKPT, "--tasks=winogrande", "--data_dir=half"), DATA, "validation.jsonl:1: .*RecursionError"),
    ((CKPT, "--tasks=copa", "--data_dir=half", "--num_fewshot=2"), DATA, "2 solved examples"),

    ((CKPT, "--tasks=valid", "--tokenizer=bad/other.model"), DATA, "made with another tokenizer"),
    (("bad/alone", "--tasks=text:tiny.py", "--tokenizer=bad/large.model"), DATA,
     "the tokenizer has 600 ids, the model 520"),
    ((CKPT, "--tasks=text:tiny.py", "--device=mps"), ENVIRONMENT, "mps"),
    (("bad/broken", "--tasks=text:tiny.py"), NUMERICAL, "not finite"),
))
def test_bad_input(here, bad, words, code, said):
    with pytest.raises(Stop, match=said) as stop:
        evaluate.main([*words])
    assert stop.value.code == code and "\n" not in str(stop.value)


def test_a_choice_longer_than_the_context(here, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(
        dict(goal="g", sol1="a", sol2="日" * T, label=0)))
    with pytest.raises(Stop, match="piqa, row 0 of validation.jsonl: a choice has") as stop:
        evaluate.main([CKPT, "--tasks=piqa", f"--data_dir={tmp_path}"])
    assert stop.value.code == DATA
