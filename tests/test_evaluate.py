"""evaluate.py against lm-evaluation-harness, against transformers one sequence at a time, and
against what users give it.

    pytest tests/test_evaluate.py

The comparison with the harness runs its own task classes and its own Hugging Face model on rows
that developers have beside the repository; all else is made here.
"""

import importlib
import json
import math
import os
import random
import shutil
import statistics
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import prepare
from configs import CHECKPOINT, DATA, ENVIRONMENT, NUMERICAL, USAGE, ModelConfig, Stop
from extras.hf_folders import checkpoint_hash
from extras import tokenizers
from extras.tokenizer_json import tokenizer_files
from model import Transformer, init_weights

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
WORDS = "how do you make a kettle sing before the water boils and then pour it over tea".split()


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= max(4e-4, 2e-6 * abs(theirs))


def saved_model(folder: Path, config: ModelConfig, seed: int, files: dict[str, bytes]) -> Path:
    """A seeded model in a folder, its weights large enough that its choices differ."""
    model = Transformer(config)
    init_weights(model, seed)
    model.save_pretrained(folder, 1, 2)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def benchmark_rows(rng: random.Random, n: int) -> dict[str, list[dict]]:
    """n rows of each task as the hub has them, with what makes each of them awkward."""
    lengths = [rng.randint(1, 9) for _ in range(n)]
    return {
        "arc_challenge": [dict(
            id=str(i), question=sentence(rng, k) + "?  "[:i % 3],
            choices=dict(text=[sentence(rng, rng.randint(1, 5)) for _ in range(3 + i % 3)],
                         label=list("ABCDE" if i % 2 else "12345")[:3 + i % 3]),
            answerKey=("ABC" if i % 2 else "123")[i % 3]) for i, k in enumerate(lengths)],
        "hellaswag": [dict(
            activity_label="Tea", ctx_a=f"[header] {sentence(rng, k)} [title] Boil it.",
            ctx_b="" if i % 2 else "THE water   boils", label=i % 4 if i % 2 else str(i % 4),
            endings=[f"[step] {sentence(rng, rng.randint(1, 6))}  [substeps] é" for _ in range(4)])
            for i, k in enumerate(lengths)],
        "piqa": [dict(goal=sentence(rng, k), sol1=sentence(rng, 1 + i % 4), sol2=sentence(rng, 2),
                      label=i % 2) for i, k in enumerate(lengths)],
    }


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
    rng = random.Random(5)
    for split, n in (("validation", 9), ("test", 9), ("train", 6)):
        for task, rows in benchmark_rows(rng, n).items():
            path = root / "benchmarks" / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
        saved_model(run / name, config, seed, tokenizer_files(tokenizer))
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
def harness():
    """lm_eval's modules. Its Hugging Face model imports accelerate, and uses it for many GPUs."""
    pytest.importorskip("lm_eval")
    transformers = pytest.importorskip("transformers")  # first: it looks for the real accelerate
    assert transformers.LlamaForCausalLM
    stand_ins = {}
    if importlib.util.find_spec("accelerate") is None:
        names = dict(Accelerator=None, InitProcessGroupKwargs=None, find_executable_batch_size=None)
        stand_ins = {"accelerate": names, "accelerate.utils": dict(get_max_memory=None)}
    for name, content in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        return types.SimpleNamespace(
            task=importlib.import_module("lm_eval.api.task").ConfigurableTask,
            evaluate=importlib.import_module("lm_eval.evaluator").evaluate,
            model=importlib.import_module("lm_eval.models.huggingface").HFLM,
            hellaswag=importlib.import_module("lm_eval.tasks.hellaswag.utils").process_docs,
            tasks=Path(importlib.import_module("lm_eval").__file__).parent / "tasks",
            transformers=transformers)
    finally:
        for name in stand_ins:
            del sys.modules[name]


HARNESS_FILES = {"arc_challenge": ("arc/arc_easy.yaml", "arc/arc_challenge.yaml"),
                 "hellaswag": ("hellaswag/hellaswag.yaml",), "piqa": ("piqa/piqa.yaml",)}


def harness_task(harness, name: str, shots: int, data: Path, cache: Path):
    """The harness' own task, from its own yaml file, reading local rows."""
    yaml = importlib.import_module("yaml")
    config: dict = {}
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda *_: harness.hellaswag)
    for file in HARNESS_FILES[name]:
        config |= yaml.load((harness.tasks / file).read_text(), loader)
    files = {path.stem: str(path) for path in (data / name).glob("*.jsonl")}
    task = harness.task(config={k: v for k, v in config.items() if k not in ("include", "tag")} | {
        "dataset_path": "json", "dataset_name": None, "num_fewshot": shots,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)}})
    task.set_fewshot_seed(1234)  # the default of its command line
    return task


@pytest.mark.parametrize("add_bos", (False, True))
def test_scores_equal_the_harness(harness, shared, tmp_path, add_bos):
    """Every log-likelihood and metric at 0 shots without BOS and at 2 shots with it."""
    tokenizer = tokenizers.load_tokenizer(shared / "tokenizer" / "llama_tokenizer.model")
    files = tokenizer_files(tokenizer)
    if add_bos:  # as LLaMA's own folder says it
        whole = json.loads(files["tokenizer.json"])
        whole["post_processor"] = dict(
            type="TemplateProcessing", pair=[], special_tokens={
                "<s>": dict(id="<s>", ids=[1], tokens=["<s>"])},
            single=[{"SpecialToken": dict(id="<s>", type_id=0)},
                    {"Sequence": dict(id="A", type_id=0)}])
        config = json.loads(files["tokenizer_config.json"]) | dict(add_bos_token=True)
        files |= {"tokenizer.json": json.dumps(whole).encode(),
                  "tokenizer_config.json": json.dumps(config).encode()}
    shots, n = 2 * add_bos, 12
    folder = saved_model(tmp_path / "llama", ModelConfig(
        n_layer=2, n_head=4, n_embd=64, n_inner=128, vocab_size=32000, seq_len=192, init_std=0.1),
        7, files)
    llama = harness.transformers.LlamaForCausalLM.from_pretrained(folder)
    model = harness.model(pretrained=llama, batch_size=4,
                          tokenizer=harness.transformers.AutoTokenizer.from_pretrained(folder))
    assert model.tok_encode("a")[:1] == [1] * add_bos + tokenizer.encode("a")[:1 - add_bos]
    tasks = {name: harness_task(harness, name, shots, shared / "eval", tmp_path)
             for name in evaluate.TASKS}
    expected = harness.evaluate(model, tasks, limit=n, bootstrap_iters=1)
    output = tmp_path / "scores.json"
    evaluate.main([str(folder), f"--tasks={','.join(tasks)}", f"--num_fewshot={shots}",
                   f"--limit={n}", f"--data_dir={shared / 'eval'}", f"--output={output}",
                   "--device=cpu"])
    worst, truncated = 0.0, 0
    for ours in json.loads(output.read_text())["runs"]:
        samples = expected["samples"][ours["task"]]
        assert len(samples) == len(ours["items"]) == n and ours["add_bos"] is add_bos
        for item, sample in zip(ours["items"], sorted(samples, key=lambda s: s["doc_id"]),
                                strict=True):
            assert item["doc_id"] == sample["doc_id"]
            lls = [ll for ll, _ in sample["filtered_resps"]]
            assert all(map(close, item["lls"], lls)), (item, lls)
            worst = max(worst, *(abs(a - b) for a, b in zip(item["lls"], lls, strict=True)))
        for metric in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
            assert ours["metrics"][metric] == pytest.approx(
                expected["results"][ours["task"]][f"{metric},none"], abs=1e-9), metric
        truncated += ours["metrics"]["truncated"]
    assert truncated > 0 if shots else truncated == 0
    print(f"largest difference of a log-likelihood: {worst:.1e}")


@pytest.mark.parametrize("name", evaluate.TASKS)
def test_prompts_equal_the_harness(harness, shared, tmp_path, name):
    """Contexts and continuations, character by character, at 5 shots."""
    task = harness_task(harness, name, 5, shared / "eval", tmp_path)
    task.build_all_requests(limit=60, rank=0, world_size=1)
    options = evaluate.EvaluateOptions(tasks=name, num_fewshot=5, limit=60,
                                       data_dir=str(shared / "eval"))
    ours = [(one.context, f" {choice}") for one in
            evaluate.read_questions(options, evaluate.TASKS[name]) for choice in one.choices]
    assert ours == [request.args for request in task.instances]


@pytest.mark.parametrize("n", (1, 5, 6, 7, 12, 13, 14, 31))
def test_windows_equal_the_harness(harness, n):
    expected = importlib.import_module("lm_eval.utils").get_rolling_token_windows(
        list(range(1, n + 1)), prefix_token=0, max_seq_len=6, context_len=1)
    assert [(ids[:-1].tolist(), ids[-K:].tolist()) for ids, K in
            evaluate.windows(list(range(n + 1)), 6)] == list(expected)


# ---- prompts -------------------------------------------------------------------------------------

def test_draws_are_the_published_vectors():
    """Indices into the full pools, in the order of the questions."""
    def draws(pool: int, n: int, extra: int) -> list[list[int]]:
        rng = random.Random(evaluate.SEED)
        return [evaluate.draw(rng, range(pool), n, extra, None) for _ in range(3)]

    hellaswag = draws(39905, 10, 1)
    assert hellaswag[0] == [28883, 7657, 490, 5940, 38156, 2288, 5500, 6450, 23241, 15519]
    assert hellaswag[1][:5] == [2019, 1038, 22681, 31735, 30379]
    assert hellaswag[2][:5] == [31899, 16372, 4231, 35460, 30533]
    without_extra = draws(39905, 10, 0)
    assert without_extra[0] == hellaswag[0]
    assert without_extra[1][:5] == [1142, 2019, 1038, 22681, 31735]
    assert draws(1119, 25, 0)[0] == [902, 239, 15, 185, 71, 171, 201, 726, 484, 35, 63, 32, 708,
                                     991, 949, 304, 186, 374, 234, 29, 1030, 996, 511, 132, 1108]
    assert draws(40398, 5, 1)[:2] == [[28883, 7657, 490, 5940, 38156],
                                      [5500, 6450, 23241, 15519, 1142]]
    assert {name: task.draw_extra for name, task in evaluate.TASKS.items()} == {
        "arc_challenge": 0, "hellaswag": 1, "piqa": 1}


def test_a_question_is_never_its_own_example():
    for seed in range(50):
        drawn = evaluate.draw(random.Random(seed), ["a", "b", "c", "c"], 2, 1, "c")
        assert sorted(drawn) == ["a", "b"]
        assert len(evaluate.draw(random.Random(seed), ["a", "b", "c"], 2, 1, "d")) == 2


def test_prompts_of_rows():
    row = dict(activity_label="Youth", ctx_a="[header] How to go [title] Buy   it.",
               ctx_b="THEN Go", endings=[" [step] Do  [x] it. ", "b"], label="1")
    assert evaluate.hellaswag(row) == (  # three blanks become two; a mark leaves its blank
        "Youth: How to go. Buy  it. Then go", [" Do  it.", "b"], 1)
    assert evaluate.hellaswag(row | dict(ctx_b=""))[0] == "Youth: How to go. Buy  it."
    row = dict(question="Q?", choices=dict(text=["a", "b", "c"], label=["1", "2", "3"]),
               answerKey="3")
    assert evaluate.arc_challenge(row) == ("Question: Q?\nAnswer:", ["a", "b", "c"], 2)
    row = dict(goal="Go", sol1="x", sol2="y", label=1)
    assert evaluate.piqa(row) == ("Question: Go\nAnswer:", ["x", "y"], 1)


def test_examples_stand_in_front_of_the_question(tmp_path):
    (tmp_path / "piqa").mkdir()
    rows = [dict(goal=f"g{i}\u2028", sol1=f"a{i}", sol2=f"b{i}", label=i % 2) for i in range(4)]
    (tmp_path / "piqa" / "train.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "piqa" / "validation.jsonl").write_text(
        "".join(json.dumps(rows[0] | dict(goal=goal)) + "\n" for goal in "QRS"))
    options = evaluate.EvaluateOptions(tasks="piqa", num_fewshot=2, data_dir=str(tmp_path))
    rng = random.Random(1234)  # one for all questions
    for one, goal in zip(evaluate.read_questions(options, evaluate.TASKS["piqa"]), "QRS",
                         strict=True):
        i, j, _ = rng.sample(range(4), 3)
        assert one.context == "".join(f"Question: g{k}\u2028\nAnswer: {'ab'[k % 2]}{k}\n\n"
                                      for k in (i, j)) + f"Question: {goal}\nAnswer:"
        assert (one.choices, one.gold) == (["a0", "b0"], 0)


# ---- log-likelihoods -----------------------------------------------------------------------------

@pytest.mark.parametrize("add_bos", (False, True))
def test_context_and_continuation(world, add_bos):
    tokenizer = tokenizers.load_tokenizer(world / CKPT)
    ckpt = evaluate.Checkpoint("", None, tokenizer, add_bos, None)
    front = [tokenizer.bos] * add_bos
    encode = tokenizer.encode
    ids, K = evaluate.encode_pair(ckpt, "Question: how\nAnswer:", " the kettle")
    assert ids == front + encode("Question: how\nAnswer: the kettle")
    assert ids[-K:] == encode("the kettle")  # whose blank, in front, is that of the dummy prefix
    # blanks at the end of the context are scored: they go over to the continuation
    assert evaluate.encode_pair(ckpt, "how \n ", "the") == evaluate.encode_pair(
        ckpt, "how", " \n the")
    assert evaluate.encode_pair(ckpt, "how  ", "the")[0] == front + encode("how  the")
    # where a piece spans the border, the context keeps the ids it has alone
    head, whole = encode("tea an"), encode("tea and the the")
    assert whole[:len(head)] != head and len(whole) > len(head)
    assert evaluate.encode_pair(ckpt, "tea an", "d the the") == (
        front + head + whole[len(head):], len(whole) - len(head))
    # nothing in front: BOS stands there, since a first id cannot be predicted from nothing
    assert evaluate.encode_pair(ckpt, "", "the") == ([tokenizer.bos] + encode("the"), 1)


@pytest.mark.parametrize("shots, add_bos", ((0, False), (1, True), (3, False)))
def test_choices_one_sequence_at_a_time(here, theirs, shots, add_bos):
    """All tasks against transformers; with 3 shots, contexts are longer than the model's."""
    options = evaluate.EvaluateOptions(tasks="", num_fewshot=shots, data_dir="benchmarks", limit=7)
    scored = entries(CKPT, "--tasks=piqa,arc_challenge,hellaswag", f"--num_fewshot={shots}",
                     "--data_dir=benchmarks", "--limit=7", f"--add_bos={str(add_bos).lower()}")
    tokenizer, n_truncated = tokenizers.load_tokenizer(CKPT), 0
    assert [one["task"] for one in scored] == ["piqa", "arc_challenge", "hellaswag"]
    for one in scored:
        questions = evaluate.read_questions(options, evaluate.TASKS[one["task"]])
        acc, acc_norm, truncated = [], [], set()
        for i, question in enumerate(questions):
            lls = []
            for choice in question.choices:
                bare = question.context.rstrip()
                head = [tokenizer.bos] * add_bos + tokenizer.encode(bare)
                whole = [tokenizer.bos] * add_bos + tokenizer.encode(f"{question.context} {choice}")
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
        metrics = one["metrics"]
        assert metrics == dict(
            truncated=len(truncated), acc=pytest.approx(np.mean(acc)),
            acc_stderr=pytest.approx(statistics.stdev(acc) / math.sqrt(7)),
            acc_norm=pytest.approx(np.mean(acc_norm)),
            acc_norm_stderr=pytest.approx(statistics.stdev(acc_norm) / math.sqrt(7)))
        assert (one["num_fewshot"], one["limit"], one["add_bos"]) == (shots, 7, add_bos)
        n_truncated += len(truncated)
    assert n_truncated > 0 if shots == 3 else True


def test_the_first_of_equals_is_chosen_and_characters_are_counted(here, monkeypatch):
    questions = [evaluate.Example({}, "c", choices, gold) for choices, gold in
                 ((["a", "a"], 0), (["aé", "a"], 0), (["", "a"], 1))]
    monkeypatch.setattr(evaluate, "score", lambda *_: [-2.0, -2.0, -3.0, -2.0, -1.0, -9.0])
    ckpt = evaluate.Checkpoint("", Transformer(ModelConfig(
        n_layer=1, n_head=1, n_embd=2, n_inner=2, vocab_size=2, seq_len=T)),
        tokenizers.load_tokenizer(CKPT), False, None)
    _, metrics, lls = evaluate.score_choices(ckpt, evaluate.TASKS["piqa"], questions)
    assert lls == [[-2.0, -2.0], [-3.0, -2.0], [-1.0, -9.0]]
    assert metrics["acc"] == pytest.approx(1 / 3)  # -3 < -2, and -1 > -9
    assert metrics["acc_norm"] == 1  # -3 / 2 > -2 / 1; an empty choice never wins


def test_what_is_lost_is_counted(here, monkeypatch):
    """An item of T + 1 ids fits: the last id is predicted and not read."""
    (question,) = [evaluate.Example({}, "c", ["a", "b"], 0)]
    ckpt = evaluate.Checkpoint("", Transformer.from_pretrained(CKPT), None, False, None)
    monkeypatch.setattr(evaluate, "score", lambda _, requests, __: [
        float(len(ids)) for ids, _ in requests])
    for lengths, lost in (((T, T + 1), 0), ((T + 1, T + 2), 1), ((T + 2, T + 9), 1)):
        left = iter(lengths)
        monkeypatch.setattr(evaluate, "encode_pair", lambda *_, left=left: ([5] * next(left), 1))
        _, metrics, lls = evaluate.score_choices(ckpt, evaluate.TASKS["piqa"], [question])
        assert metrics["truncated"] == lost and metrics["acc_stderr"] is None
        assert lls == [[min(n, T + 1) for n in lengths]]


def test_batch_size_changes_nothing(here):
    words = [CKPT, f"--tasks=valid,text:text/prose/2.txt,{','.join(evaluate.TASKS)}",
             "--num_fewshot=1", "--data_dir=benchmarks"]
    one, five, all_ = (entries(*words, f"--batch_size={B}") for B in (1, 5, 1000))
    for ours, *others in zip(one, five, all_, strict=True):
        for other in others:
            assert other["metrics"].keys() == ours["metrics"].keys()
            for a, b in zip(ours["items"], other["items"], strict=True):
                assert a["doc_id"] == b["doc_id"]
                assert b["lls"] == pytest.approx(a["lls"], abs=1e-4)


def test_bfloat16_is_near_float32(here):
    (full,), (half,) = (entries(CKPT, "--tasks=text:text/prose/2.txt", f"--dtype={dtype}")
                        for dtype in ("float32", "bfloat16"))
    a, b = (one["metrics"]["nats_per_token"] for one in (full, half))
    assert a != b and a == pytest.approx(b, rel=0.02)


# ---- rows and files ------------------------------------------------------------------------------

def bytes_of(piece: str) -> int:
    """By the spelling of a sentencepiece piece: "▁the" is four bytes, "<0x0A>" one, EOS none."""
    if piece in ("<s>", "</s>", "<unk>"):
        return 0
    return 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())


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


@pytest.mark.parametrize("n, add_bos", (
    (T - 9, False), (T, True), (2 * T, False), (3 * T - 7, True)))
def test_text_one_token_at_a_time(here, theirs, n, add_bos):
    """Each token from the context that its window gives it; the last window's is full."""
    tokenizer = tokenizers.load_tokenizer(CKPT)
    text = next(text for k in range(900) for text in [(PROSE * 9)[:k]]
                if len(tokenizer.encode(text)) >= n)
    Path("a text.txt").write_bytes(text.encode())
    (one,) = entries(CKPT, "--tasks=text:a text.txt", f"--add_bos={str(add_bos).lower()}")
    ids = [tokenizer.bos if add_bos else tokenizer.eos, *tokenizer.encode(text)]
    sums: dict[int, float] = {}
    for p in range(1, len(ids)):
        window = (p - 1) // T
        start = window * T if (window + 1) * T < len(ids) else max(0, len(ids) - 1 - T)
        sums[window] = sums.get(window, 0) + log_probs(theirs, ids[start:p + 1])[-1].item()
    total = sum(sums.values())
    assert all(close(item["lls"][0], ll)
               for item, ll in zip(one["items"], sums.values(), strict=True))
    assert one["metrics"] == dict(
        nats_per_token=pytest.approx(-total / (len(ids) - 1), rel=1e-6),
        bits_per_byte=pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-6),
        tokens=len(ids) - 1, bytes=len(text.encode()))


def test_windows_predict_every_token_once():
    for n in (1, 5, 6, 7, 12, 13, 14, 31):
        requests = evaluate.windows(list(range(n + 1)), 6)
        assert [i for ids, K in requests for i in ids[-K:]] == list(range(1, n + 1))
        for ids, _ in requests:
            assert len(ids) == min(6, n) + 1 and (np.diff(ids) == 1).all()


# ---- runs and what they leave --------------------------------------------------------------------

def test_a_run_is_scored_checkpoint_by_checkpoint(here, capsys):
    scored = entries("out/tiny", "--tasks=valid,piqa", "--data_dir=benchmarks", "--limit=2")
    names = [one["settings"]["checkpoint"] for one in scored]
    assert names == [name for name in CHECKPOINTS for _ in ("valid/code", "valid/prose", "piqa")]
    for one in scored:
        folder = Path("out/tiny") / one["settings"]["checkpoint"]
        assert one["settings"] == dict(
            checkpoint=folder.name, checkpoint_hash=checkpoint_hash(folder), device="cpu",
            tokenizer_sha256=tokenizers.load_tokenizer(folder).spec()["sha256"], dtype="float32",
            batch_size=16, max_length=T, torch=torch.__version__)
    assert len({one["metrics"]["nats_per_token"] for one in scored[::3]}) == 3
    alone = entries(f"out/tiny/{CHECKPOINTS[1]}", "--tasks=valid,piqa", "--data_dir=benchmarks",
                    "--limit=2")
    assert alone == scored[3:6]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["checkpoint", "task", "items", "metric", "value", "stderr"]
    piqa = next(line.split() for line in table if "piqa" in line and " acc " in line)
    assert piqa[:4] == [CHECKPOINTS[0], "piqa", "2", "acc"]
    assert [float(x) for x in piqa[4:]] == [pytest.approx(scored[2]["metrics"][k], abs=1e-4)
                                            for k in ("acc", "acc_stderr")]


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

@pytest.mark.parametrize("words, code, said", (
    ((CKPT, "--tasks=helaswag"), USAGE, "unknown task 'helaswag'; expected some of valid, text:"),
    ((CKPT, "--tasks=piqa,"), USAGE, "unknown task ''"),
    ((CKPT,), USAGE, "missing key 'tasks'"),
    ((CKPT, "--tasks=piqa"), DATA, "data/eval/piqa/validation.jsonl not found.*--data_dir=DIR"),
    ((CKPT, "--tasks=piqa", "--data_dir=benchmarks", "--num_fewshot=6"), DATA,
     "--num_fewshot=6 draws from 7 rows or more, train.jsonl has 6"),
    ((CKPT, "--tasks=arc_challenge", "--data_dir=benchmarks", "--num_fewshot=7"), DATA,
     "--num_fewshot=7 draws from 7 rows or more, train.jsonl has 6"),
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
    ((CKPT, "--tasks=valid", "--output=nowhere/x.json"), USAGE, "or in one that does not exist"),
    ((CKPT, "--tasks=valid", "--tokenizer=bad/other.model"), DATA, "made with another tokenizer"),
    (("bad/alone", "--tasks=text:tiny.py", "--tokenizer=bad/large.model"), DATA,
     "the tokenizer has 600 ids, the model 520"),
    ((CKPT, "--tasks=text:tiny.py", "--device=mps"), ENVIRONMENT, "mps"),
    (("bad/broken", "--tasks=text:tiny.py"), NUMERICAL, "not finite"),
))
def test_bad_input(here, words, code, said):
    bad = here / "bad"
    if not bad.exists():
        for task in ("piqa", "hellaswag", "arc_challenge", "2/piqa"):
            (bad / task).mkdir(parents=True)
        row = benchmark_rows(random.Random(0), 1)
        (bad / "piqa" / "validation.jsonl").write_text(json.dumps(row["piqa"][0]) + "\n{}\n")
        (bad / "2" / "piqa" / "validation.jsonl").write_bytes("é".encode("latin-1"))
        (bad / "hellaswag" / "validation.jsonl").write_text("")
        (bad / "arc_challenge" / "test.jsonl").write_text(
            json.dumps(row["arc_challenge"][0] | dict(answerKey="E")))
        (bad / "blank.txt").write_text("\n \n")
        (bad / "latin.txt").write_bytes("é".encode("latin-1"))
        for name, size in (("other", 500), ("large", 600)):
            (bad / f"{name}.model").write_bytes(tokenizers.train_tokenizer(
                [Path("text/prose/1.txt").read_text()], size))
        shutil.copytree(CKPT, bad / "alone")
        for name, data in (("other", "gone"), ("changed", "tiny")):
            shutil.copytree(CKPT, bad / name / "ckpt_0")
            (bad / name / "run.json").write_text(json.dumps(
                {"config": {"data": {"dataset": data}}, "data_hash": "0"}))
        shutil.copytree(CKPT, bad / "broken")
        model = Transformer.from_pretrained(bad / "broken")
        model.lm_head.weight.data[3] = math.nan
        (bad / "broken" / "model.safetensors").unlink()
        model.save_pretrained(bad / "broken")
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
