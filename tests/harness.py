"""evaluate.py against lm-evaluation-harness 0.4.13: every log-likelihood, and every metric.

    python tests/harness.py                      # all tasks, 0 shots and more, three batch sizes
    python tests/harness.py --limit=20           # of each task or subject

The harness runs whole, by the function behind its command line: its own tasks, groups, draws, and
its own scoring of a Hugging Face model. Only the hub is replaced, by rows that both read: those
that developers have beside the repository, and, where these have none, rows made here to be
awkward. The model is a small LLaMA with weights drawn large enough that its choices differ, and a
context that is too short for many questions. A log-likelihood is the same if it is within 4e-4 or
2e-6 of its size; and every metric has to be the harness' to nine digits when evaluate.py is given
the harness' own log-likelihoods, so that nothing but their rounding can move one.

Prints a line for each task; leaves nothing behind.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import evaluate  # noqa: E402
from model import Transformer, init_weights  # noqa: E402
from nano360.config import (  # noqa: E402
    NUMERICAL, USAGE, ModelConfig, Stop, fill, key, run, split_words)
from nano360.tasks import TASKS  # noqa: E402
from nano360.tokenizer_json import tokenizer_files  # noqa: E402
from nano360.tokenizers import Tokenizer, load_tokenizer  # noqa: E402
from prepare import train_tokenizer  # noqa: E402

SHARED = REPO.parent / "shared" / "data"
BATCHES = (1, 7, 32)
SHOTS = 3  # of a task that has none of the leaderboard's
SEQ_LEN = 640  # 25 examples of ARC do not fit
HUB = {  # as the harness' files name the data -> our folder
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy", ("aps/super_glue", "boolq"): "boolq",
    ("aps/super_glue", "copa"): "copa", ("jannalu/crows_pairs_multilingual", "english"):
    "crows_pairs", ("Rowan/hellaswag", None): "hellaswag", ("allenai/openbookqa", "main"):
    "openbookqa", ("baber/piqa", None): "piqa", ("EleutherAI/race", "high"): "race",
    ("lighteval/siqa", None): "social_iqa", ("truthfulqa/truthful_qa", "multiple_choice"):
    "truthfulqa_mc", ("allenai/winogrande", "winogrande_xl"): "winogrande",
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): "wikitext",
}  # and ("cais/mmlu", a subject)
WORDS = "how do you make a kettle sing before the water boils and then pour it over tea".split()


# ---- rows ----------------------------------------------------------------------------------------

def sentence(rng: random.Random, n: int) -> str:
    return " ".join(rng.choices(WORDS, k=n))


def choices_of(rng: random.Random, i: int, n: int) -> dict:
    return dict(text=[sentence(rng, rng.randint(1, 5)) + " "[:i % 2] for _ in range(n)],
                label=list("ABCDE" if i % 2 else "12345")[:n])


def problem(rng: random.Random, i: int) -> dict:
    blank = ("  _  .", "?", "  _  . ")[i % 3]  # of the last no cloze is made: it ends in a blank
    return dict(question=sentence(rng, 4) + blank, answer="ABCD"[rng.randrange(4)],
                options=[sentence(rng, rng.randint(1, 4)) for _ in range(4)])


def made_rows(rng: random.Random, i: int) -> dict[str, dict]:
    """The i-th row of each task as the hub has it, with what makes it awkward."""
    n, k = 3 + i % 3, rng.randint(1, 9)
    arc = dict(id=str(i), question=sentence(rng, k) + "?  "[:i % 3], choices=choices_of(rng, i, n),
               answerKey=("ABC" if i % 2 else "123")[i % 3])
    right = [1, *([0, 1] if i % 4 == 0 else []), 0, 0]  # at times a right one after a wrong one
    return {
        "arc_challenge": arc, "arc_easy": arc,
        "boolq": dict(passage=f"Tea -- {sentence(rng, k)}.", question=sentence(rng, k), idx=i,
                      label=i % 2),
        "copa": dict(premise=f" {sentence(rng, k).capitalize()}. ", idx=i, label=i // 2 % 2,
                     choice1=f"The {sentence(rng, 2)}.", choice2=f"I {sentence(rng, 3)}.",
                     question=("cause", "effect")[i % 2]),
        "crows_pairs": dict(id=i, sent_more=sentence(rng, k) + " é."[:2 * (i % 2)],
                            sent_less=sentence(rng, k) + " é."[:2 - 2 * (i % 2)],
                            stereo_antistereo="stereo", bias_type="age"),
        "hellaswag": dict(
            activity_label="Tea", ctx_a=f"[header] {sentence(rng, k)} [title] Boil it.",
            ctx_b="" if i % 2 else "THE water   boils", label=str(i % 4),
            endings=[f"[step] {sentence(rng, rng.randint(1, 6))}  [substeps] é" for _ in range(4)]),
        "mmlu": dict(question=f" {sentence(rng, k)} \n", answer=i // 2 % 4,
                     subject=("anatomy", "high_school_physics")[i % 2],
                     choices=[sentence(rng, rng.randint(1, 3)) for _ in range(4)]),
        "openbookqa": dict(id=str(i), question_stem=sentence(rng, k) + " "[:i % 2],
                           choices=choices_of(rng, 1, 4), answerKey=" ABCD"[1 + i % 4]),
        "piqa": dict(goal=sentence(rng, k), sol1=sentence(rng, 1 + i % 4), sol2=sentence(rng, 2),
                     label=i % 2),
        "race": dict(article=f"{sentence(rng, k)}.\n{sentence(rng, k)}.", problems=str(
            [problem(rng, i + j) for j in range(1 + i % 4)])),
        "social_iqa": dict(context=sentence(rng, k), question=sentence(rng, 3), answerA="a kettle",
                           answerB=sentence(rng, 2), answerC="tea", label=str(1 + i % 3)),
        "truthfulqa_mc": dict(
            question=sentence(rng, k), mc1_targets=dict(
                choices=[sentence(rng, 2 + j) for j in range(n)], labels=[1] + [0] * (n - 1)),
            mc2_targets=dict(choices=[sentence(rng, 1) for _ in right], labels=right)),
        "wikitext": dict(page=" = Tea = \n \n It is 1 @,@ 000 @-@ 3 \" hot \" ( or not ) , you 's "
                         f".\n = = A = = \n {sentence(rng, 40 * k)} s ' \n"),
        "winogrande": dict(sentence=f"{sentence(rng, k)} _ {sentence(rng, 3)} .", option1="Zoë ",
                           option2="a kettle", answer=str(1 + i % 2)),
    }


def write_rows(folder: Path, counts: dict[str, int], seed: int) -> None:
    """<folder>/<task>/<split>.jsonl of made rows, for each split that is not there, so many."""
    rng = random.Random(seed)
    for split, n in counts.items():
        rows = [made_rows(rng, i) for i in range(n)]
        for task in rows[0]:
            path = folder / task / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text("".join(json.dumps(row[task]) + "\n" for row in rows))


def write_subjects(folder: Path, subjects: list[str]) -> None:
    """MMLU's rows, two to four questions of each subject; the harness wants all 57."""
    rng = random.Random(6)
    for split in ("test", "dev"):
        path = folder / "mmlu" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(
            json.dumps(made_rows(rng, i)["mmlu"] | dict(subject=subject, answer=(i + k) % 4)) + "\n"
            for k, subject in enumerate(subjects)
            for i in range(5 if split == "dev" else 2 + k % 3)))


def all_rows(folder: Path, subjects: list[str]) -> None:
    """What developers have beside the repository, and made rows for what is not there."""
    if (SHARED / "eval").is_dir():
        shutil.copytree(SHARED / "eval", folder, dirs_exist_ok=True)
    else:
        write_subjects(folder, subjects)
    write_rows(folder, dict(train=40, validation=24, test=24), 5)


# ---- a model for both ----------------------------------------------------------------------------

def tokenizer_at(folder: Path) -> Tokenizer:
    """LLaMA's, which developers have, or a small one made of Python's own library."""
    llama = SHARED / "tokenizer" / "llama_tokenizer.model"
    if llama.is_file():
        return load_tokenizer(llama)
    text = "".join(path.read_text() for path in sorted(Path(random.__file__).parent.glob("a*.py")))
    (folder / "made.model").write_bytes(train_tokenizer(iter(text.split("\n\n")), 2000))
    return load_tokenizer(folder / "made.model")


def files_with_bos(files: dict[str, bytes]) -> dict[str, bytes]:
    """A tokenizer's files, changed to put BOS in front of a text, as LLaMA's own folder says it."""
    whole = json.loads(files["tokenizer.json"])
    whole["post_processor"] = dict(
        type="TemplateProcessing", pair=[], special_tokens={
            "<s>": dict(id="<s>", ids=[1], tokens=["<s>"])},
        single=[{"SpecialToken": dict(id="<s>", type_id=0)},
                {"Sequence": dict(id="A", type_id=0)}])
    config = json.loads(files["tokenizer_config.json"]) | dict(add_bos_token=True)
    return files | {"tokenizer.json": json.dumps(whole).encode(),
                    "tokenizer_config.json": json.dumps(config).encode()}


def save_llama(folder: Path, tokenizer: Tokenizer, add_bos: bool, config: ModelConfig,
               seed: int = 7) -> Path:
    """A folder that both read: seeded weights and a tokenizer's files."""
    model = Transformer(config)
    init_weights(model, seed)
    model.save_pretrained(folder, tokenizer.bos, tokenizer.eos)
    files = tokenizer_files(tokenizer)
    for name, content in (files_with_bos(files) if add_bos else files).items():
        (folder / name).write_bytes(content)
    return folder


# ---- the harness ---------------------------------------------------------------------------------

def import_harness() -> types.SimpleNamespace:
    """What of lm_eval is used. Its Hugging Face model imports accelerate, for many GPUs alone."""
    transformers = importlib.import_module("transformers")  # first: it looks for the real one
    assert transformers.LlamaForCausalLM  # only asking for it imports it
    stand_ins = {}
    if importlib.util.find_spec("accelerate") is None:
        names = dict(Accelerator=None, InitProcessGroupKwargs=None, find_executable_batch_size=None)
        stand_ins = {"accelerate": names, "accelerate.utils": dict(get_max_memory=None)}
    for name, content in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        tasks = Path(importlib.import_module("lm_eval").__file__).parent / "tasks"
        files = (tasks / "mmlu/default").glob("mmlu_*.yaml")
        return types.SimpleNamespace(
            transformers=transformers, datasets=importlib.import_module("datasets"),
            tasks=tasks, subjects=sorted(one.stem.removeprefix("mmlu_") for one in files),
            evaluate=importlib.import_module("lm_eval.evaluator").simple_evaluate,
            manager=importlib.import_module("lm_eval.tasks").TaskManager(),
            model=importlib.import_module("lm_eval.models.huggingface").HFLM,
            utils=importlib.import_module("lm_eval.utils"))
    finally:
        for name in stand_ins:
            del sys.modules[name]


def harness_model(harness: types.SimpleNamespace, folder: Path, B: int) -> object:
    """Its model, with a tokenizer that reads the folder's tokenizer.json and changes nothing: of
    LlamaTokenizer (transformers 5.x) a text that begins with a blank loses a piece."""
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own
        llama = harness.transformers.LlamaForCausalLM.from_pretrained(folder)
    tokenizer = harness.transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return harness.model(pretrained=llama, tokenizer=tokenizer, batch_size=B)


@contextlib.contextmanager
def local_hub(harness: types.SimpleNamespace, data: Path) -> Iterator[None]:
    """datasets.load_dataset gives the rows in a folder; a subject of MMLU is a data set of its
    own."""
    def load(path: str, name: str | None = None, **_: object) -> dict:
        folder = data / ("mmlu" if path == "cais/mmlu" else HUB[path, name])
        splits = {}
        for file in folder.glob("*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().split("\n") if line]
            splits[file.stem] = [one for one in rows
                                 if path != "cais/mmlu" or one["subject"] == name]
        return harness.datasets.DatasetDict({
            split: harness.datasets.Dataset.from_list(rows) for split, rows in splits.items()})
    with mock.patch("datasets.load_dataset", load):
        yield


def ask_harness(harness: types.SimpleNamespace, model: object, data: Path, names: list, shots: int,
                limit: int | None) -> dict:
    """What its command line would print and log."""
    with local_hub(harness, data), contextlib.redirect_stderr(io.StringIO()):  # bars of its own
        return harness.evaluate(model, tasks=names, num_fewshot=shots, limit=limit,
                                bootstrap_iters=1, task_manager=harness.manager)


def ask_ours(folder: Path, data: Path, words: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([str(folder), f"--data_dir={data}", f"--output={name}/o", "--device=cpu",
                       *words])
        return json.loads(Path(name, "o").read_text())["runs"]


# ---- the comparison ------------------------------------------------------------------------------

@dataclass
class Verdict:
    """What was compared of a task."""
    n: int = 0  # log-likelihoods
    worst: float = 0.0  # the largest difference of two, in nats
    metrics: int = 0
    moved: int = 0  # of these, shares of questions that rounding has made others


def tolerance(ll: float) -> float:
    return max(4e-4, 2e-6 * abs(ll))


def lls_of(item: dict, name: str, theirs: dict) -> list[float]:
    """What the harness has for an item of ours. Raises Stop(NUMERICAL) if it has no such item."""
    task = f"mmlu_{item['subject']}" if name == "mmlu" else name
    for sample in theirs["samples"][task]:
        if sample["doc_id"] == item["doc_id"]:
            return [one if isinstance(one, float) else one[0] for one in sample["filtered_resps"]]
    raise Stop(NUMERICAL, f"{name}: the harness has no item {item['doc_id']}")


def rescored(folder: Path, data: Path, words: list[str], ours: list[dict], theirs: dict[str, dict]
             ) -> list[dict]:
    """What evaluate.py makes of the harness' log-likelihoods; texts it scores itself."""
    score, given = evaluate.score, {
        one["task"]: [lls_of(item, one["task"], theirs[one["task"]]) for item in one["items"]]
        for one in ours if one["task"] in TASKS}
    with mock.patch.object(evaluate, "score", lambda ckpt, groups, name: given.get(name)
                           or score(ckpt, groups, name)):
        return ask_ours(folder, data, words)


def perplexities(metrics: dict, nats: float) -> dict[str, float]:
    """What the harness measures of texts, of this many words and bytes."""
    return {"word_perplexity": math.exp(nats / metrics["words"]),
            "byte_perplexity": math.exp(nats / metrics["bytes"]),
            "bits_per_byte": nats / metrics["bytes"] / math.log(2)}


def compare(ours: dict, again: dict, theirs: dict) -> Verdict:
    """A task as evaluate.py and the harness scored it, and `again` from the harness' numbers.

    Raises Stop(NUMERICAL) if an item is missing, or a log-likelihood or a metric is another.
    """
    name, verdict = ours["task"], Verdict()
    n = sum(len(many) for task, many in theirs["samples"].items()
            if task == name or name == "mmlu" and task.startswith("mmlu_"))
    if n != len(ours["items"]):
        raise Stop(NUMERICAL, f"{name}: {len(ours['items'])} items, the harness has {n}")
    for item in ours["items"]:
        for a, b in zip(item["lls"], expected := lls_of(item, name, theirs), strict=True):
            verdict.n, verdict.worst = verdict.n + 1, max(verdict.worst, abs(a - b))
            if not abs(a - b) <= tolerance(b):
                raise Stop(NUMERICAL, f"{name}: {item}, the harness has {expected}")
    nats = -sum(one for item in ours["items"] for one in lls_of(item, name, theirs))
    for label, expected in theirs["results"][name].items():
        metric, kind, _ = label.partition(",")
        if not kind or (expected == "N/A" and again["metrics"].get(metric) is None):
            continue  # names and counts; and what has no error, in neither
        found = again["metrics"].get(metric)
        if name == "wikitext":  # in ours its own formula, and with the harness' sum the harness'
            mine = -sum(item["lls"][0] for item in ours["items"])
            found = perplexities(ours["metrics"], nats)[metric] if math.isclose(
                perplexities(ours["metrics"], mine)[metric], ours["metrics"][metric]) else None
        if found is None or expected == "N/A" or not math.isclose(found, expected, rel_tol=1e-9,
                                                                  abs_tol=1e-12):
            raise Stop(NUMERICAL, f"{name}: {metric} is {found}, the harness has {expected}")
        verdict.metrics += 1
        verdict.moved += metric in ("acc", "acc_norm", "pct_stereotype") and not (
            name.endswith("mc2") or math.isclose(ours["metrics"][metric], expected))
    return verdict


# ---- the whole -----------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    limit: int | None = key("questions of a task or subject; none: all", None, low=1)
    data_dir: str = key("rows that both read; none: those that developers have, and made ones", "")


def compare_all(harness: types.SimpleNamespace, folder: Path, data: Path, names: str,
                shots: int | None, limit: int | None) -> None:
    """Some tasks at all batch sizes, a line for each. shots None: the leaderboard has its own."""
    words = [f"--tasks={names}"] + ([f"--limit={limit}"] if limit else []) + (
        [] if shots is None else [f"--num_fewshot={shots}"])
    began = time.monotonic()
    found = {B: ask_ours(folder, data, [*words, f"--batch_size={B}"]) for B in BATCHES}
    took, began = time.monotonic() - began, time.monotonic()
    model, ours = harness_model(harness, folder, 2), found[BATCHES[0]]
    theirs = {one["task"]: ask_harness(harness, model, data, [one["task"]], one["num_fewshot"],
                                       limit) for one in ours}
    told = time.monotonic() - began
    for again, *many in zip(rescored(folder, data, words, ours, theirs), *found.values(),
                            strict=True):
        name, verdicts = again["task"], [compare(one, again, theirs[again["task"]]) for one in many]
        print(f"{name:<20} {again['num_fewshot']:>5} {str(again['add_bos']):>5} "
              f"{again['n']:>5} {verdicts[0].n:>6} {again['metrics'].get('truncated', 0):>9} "
              f"{verdicts[0].metrics:>7} {sum(one.moved for one in verdicts):>5}  "
              + " ".join(f"{one.worst:>8.1e}" for one in verdicts), flush=True)
    print(f"  ours, {len(BATCHES)} times: {took:.0f} s; the harness, once: {told:.0f} s")


def main(argv: list[str]) -> None:
    words, given = split_words(argv, typing.get_type_hints(HarnessOptions))
    options = fill([HarnessOptions], given)[0]
    if words:
        raise Stop(USAGE, f"expected --key=value alone, got {' '.join(words)!r}")
    harness = import_harness()
    with tempfile.TemporaryDirectory() as name:
        data = Path(options.data_dir or Path(name) / "rows")
        if not options.data_dir:
            all_rows(data, harness.subjects)
        tokenizer = tokenizer_at(Path(name))
        config = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_inner=128, init_std=0.1,
                             vocab_size=tokenizer.vocab_size, seq_len=SEQ_LEN)
        folders = {bos: save_llama(Path(name) / str(bos), tokenizer, bos, config)
                   for bos in (True, False)}
        print(f"{'task':<20} {'shots':>5} {'BOS':>5} {'items':>5} {'lls':>6} {'truncated':>9} "
              f"{'metrics':>7} {'moved':>5}  largest difference, nats, at batch sizes {BATCHES}")
        every = ",".join([*TASKS, "wikitext"])
        others = ",".join(name for name, task in TASKS.items() if task.shots is None)
        for bos, names, shots in ((True, every, 0), (False, every, 0), (True, "leaderboard", None),
                                  (True, others, SHOTS)):
            compare_all(harness, folders[bos], data, names, shots, options.limit)


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [HarnessOptions]))
