"""evaluate.py against lm-evaluation-harness 0.4.13: every log-likelihood, and every metric.

    python tests/harness.py                      # all tasks, 0 shots and more, three batch sizes
    python tests/harness.py --limit=20           # of each task or subject

The harness runs whole: its own tasks, groups, draws and its Hugging Face model, all from its own
command line's function. Only the hub is replaced, by rows that both read. Those are the ones that
developers have beside the repository, and, where these have none, made here to be awkward. So is
the model: a small LLaMA with weights drawn large enough that its choices differ, whose context is
too short for many questions. A log-likelihood is the same if it is within 4e-4 or 2e-6 of its size;
a metric if nothing but such a difference of two choices moves it.

Prints a line for each task; leaves nothing behind.
"""

import contextlib
import importlib
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
from configs import NUMERICAL, USAGE, ModelConfig, Stop, fill, key, run, split_words  # noqa: E402
from extras.tasks import TASKS  # noqa: E402
from extras.tokenizer_json import tokenizer_files  # noqa: E402
from extras.tokenizers import Tokenizer, load_tokenizer, train_tokenizer  # noqa: E402
from model import Transformer, init_weights  # noqa: E402

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
        "crows_pairs": dict(id=i, sent_more=sentence(rng, k) + " é.", sent_less=sentence(rng, k),
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
            mc2_targets=dict(choices=[sentence(rng, 2 + j) for j in range(len(right))],
                             labels=right)),
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
    """MMLU's rows, one to three questions of each subject; the harness wants all 57."""
    rng = random.Random(6)
    for split in ("test", "dev"):
        path = folder / "mmlu" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(
            json.dumps(made_rows(rng, i)["mmlu"] | dict(subject=subject)) + "\n"
            for k, subject in enumerate(subjects)
            for i in range(5 if split == "dev" else 1 + k % 3)))


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
    assert transformers.LlamaForCausalLM
    stand_ins = {}
    if importlib.util.find_spec("accelerate") is None:
        names = dict(Accelerator=None, InitProcessGroupKwargs=None, find_executable_batch_size=None)
        stand_ins = {"accelerate": names, "accelerate.utils": dict(get_max_memory=None)}
    for name, content in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        files = Path(importlib.import_module("lm_eval").__file__).parent / "tasks/mmlu/default"
        return types.SimpleNamespace(
            transformers=transformers, datasets=importlib.import_module("datasets"),
            subjects=sorted(one.stem.removeprefix("mmlu_") for one in files.glob("mmlu_*.yaml")),
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
    with local_hub(harness, data), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return harness.evaluate(model, tasks=names, num_fewshot=shots, limit=limit,
                                    bootstrap_iters=1, task_manager=harness.manager)
        except Exception:
            print(said.getvalue(), file=sys.stderr)
            raise


def ask_ours(folder: Path, data: Path, words: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        evaluate.main([str(folder), f"--data_dir={data}", f"--output={name}/o", "--device=cpu",
                       *words])
        return json.loads(Path(name, "o").read_text())["runs"]


# ---- the comparison ------------------------------------------------------------------------------

COUNTED = ("acc", "acc_norm", "pct_stereotype")  # of choices; the other metrics are continuous


@dataclass
class Verdict:
    """What was compared of a task."""
    items: int
    n: int = 0  # log-likelihoods
    worst: float = 0.0  # the largest difference of two, in nats
    tied: int = 0  # questions of which two choices lie so near that rounding may decide
    truncated: int = 0


def tolerance(ll: float) -> float:
    return max(4e-4, 2e-6 * abs(ll))


def is_tied(lls: list[float], lengths: list[int]) -> bool:
    """Whether two choices lie within the tolerance, as they are or per character."""
    pairs = [(a, b, m, n) for i, (a, m) in enumerate(zip(lls, lengths, strict=True))
             for b, n in zip(lls[:i], lengths[:i], strict=True)]
    return any(abs(a - b) <= tolerance(a) + tolerance(b)
               or abs(a / m - b / n) <= tolerance(a) / m + tolerance(b) / n for a, b, m, n in pairs)


def samples_of(name: str, theirs: dict) -> dict[tuple[str | None, int], dict]:
    """What the harness logged of a task: (subject, number) -> sample."""
    if name == "mmlu":
        return {(task.removeprefix("mmlu_"), one["doc_id"]): one
                for task, many in theirs["samples"].items() if task.startswith("mmlu_")
                for one in many}
    return {(None, one["doc_id"]): one for one in theirs["samples"][name]}


def compare(ours: dict, theirs: dict) -> Verdict:
    """A task as evaluate.py and the harness scored it. Raises Stop(NUMERICAL)."""
    name, samples = ours["task"], samples_of(ours["task"], theirs)
    verdict = Verdict(len(samples), truncated=ours["metrics"].get("truncated", 0))
    if samples.keys() != {(one.get("subject"), one["doc_id"]) for one in ours["items"]}:
        raise Stop(NUMERICAL, f"{name}: not the items that the harness has")
    for item in ours["items"]:
        sample = samples[item.get("subject"), item["doc_id"]]
        expected = [one if isinstance(one, float) else one[0] for one in sample["filtered_resps"]]
        off = [abs(a - b) for a, b in zip(item["lls"], expected, strict=True)]
        if not all(d <= tolerance(b) for d, b in zip(off, expected, strict=True)):
            raise Stop(NUMERICAL, f"{name}: {item}, the harness has {expected}")
        verdict.n, verdict.worst = verdict.n + len(off), max(verdict.worst, *off)
        lengths = [max(1, len(one[-1].removeprefix(" "))) for one in sample["arguments"]]
        verdict.tied += is_tied(expected, lengths)
    compared = 0
    for metric, theirs_is in theirs["results"][name].items():
        metric = metric.removesuffix(",none")
        if metric not in ours["metrics"] or theirs_is in ("N/A", None):
            continue
        ours_is, compared = ours["metrics"][metric], compared + 1
        if name.endswith("mc2") or metric.removesuffix("_stderr") not in COUNTED:
            equal = math.isclose(ours_is, theirs_is, rel_tol=1e-4, abs_tol=8e-4)
        else:
            equal = abs(ours_is - theirs_is) <= 1e-9 + verdict.tied / len(samples)
        if not equal:
            raise Stop(NUMERICAL, f"{name}: {metric} is {ours_is}, the harness has {theirs_is}")
    assert compared, name
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
    model, theirs = harness_model(harness, folder, 2), {}
    for one in found[BATCHES[0]]:
        theirs[one["task"]] = ask_harness(harness, model, data, [one["task"]], one["num_fewshot"],
                                          limit)
    for many in zip(*found.values(), strict=True):
        verdicts = [compare(one, theirs[one["task"]]) for one in many]
        print(f"{many[0]['task']:<20} {many[0]['num_fewshot']:>5} {str(many[0]['add_bos']):>5} "
              f"{verdicts[0].items:>5} {verdicts[0].n:>6} {verdicts[0].truncated:>9} "
              f"{verdicts[0].tied:>4}  " + " ".join(f"{one.worst:>8.1e}" for one in verdicts),
              flush=True)
    print(f"  ours, {len(BATCHES)} times: {took:.0f} s; the harness, once: "
          f"{time.monotonic() - began:.0f} s", flush=True)


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
              f"{'tied':>4}  largest difference, nats, at batch sizes {BATCHES}")
        every = ",".join([*TASKS, "wikitext"])
        others = ",".join(name for name, task in TASKS.items() if task.shots is None)
        for bos, names, shots in ((True, every, 0), (False, every, 0), (True, "leaderboard", None),
                                  (True, others, SHOTS)):
            compare_all(harness, folders[bos], data, names, shots, options.limit)


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [HarnessOptions]))
