"""Stage 4: score a checkpoint, or every checkpoint of a run.

    python evaluate.py out/demo --tasks=valid --output=scores.json   # held-out rows of its data
    python evaluate.py out/demo/ckpt_007 --tasks=text:novel.txt      # perplexity of a file
    python evaluate.py CKPT --tasks=hellaswag,piqa --num_fewshot=10 --data_dir=benchmarks

Multiple choice is scored by the rules of lm-evaluation-harness 0.4.13, prompts and draws of solved
examples included: a score here is a score there. Reads a checkpoint of ours or any Hugging Face
LLaMA folder, and for each task:

    valid                            out/<run>/run.json, data/<dataset>/valid_<source>.bin
    text:FILE                        the file, UTF-8
    arc_challenge, hellaswag, piqa   <data_dir>/<task>/<split>.jsonl, fields named as on the hub

Prints a table; --output=FILE writes json: {"runs": [{task, num_fewshot, limit, add_bos, metrics,
items: [{doc_id, lls}], settings}]} with the log-likelihoods of every item, in nats.
"""

import json
import math
import random
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configs import CHECKPOINT, DATA, NUMERICAL, USAGE, Stop, key, load_options, run, write_atomic
from extras.hf_folders import checkpoint_hash, read_config
from extras.tokenizers import Tokenizer, load_tokenizer
from model import Transformer, choose_device
from prepare import open_rows, read_manifest, valid_name

SEED = 1234  # of the harness' draws of solved examples
# Ids (T + 1,) int32 of which the last K are scored, and K. The model reads all but the last id.
Request = tuple[np.ndarray, int]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    tasks: str = key("what to score, separated by commas: valid, text:FILE, arc_challenge, "
                     "hellaswag, piqa")
    num_fewshot: int = key("solved examples in front of a question", 0, low=0)
    data_dir: str = key("where the benchmarks lie: DIR/<task>/<split>.jsonl", "data/eval")
    limit: int | None = key("questions of a task, rows of a source; none: all", None, low=1)
    batch_size: int = key("sequences per forward pass", 16, low=1)
    output: str | None = key("json file for metrics and the log-likelihoods of every item", None)
    add_bos: bool | None = key("BOS in front of a text; none: as the tokenizer's folder says", None)
    tokenizer: str | None = key("tokenizer file; none: the one in the checkpoint's folder", None)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("where to compute", "auto")
    dtype: Literal["float32", "bfloat16"] = key("type of the matrix products", "float32")


# ---- multiple choice: rows -> prompts ------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    """A question; its equality, by the whole row, keeps a question from being its own example."""
    row: dict
    context: str
    choices: list[str]
    gold: int


def arc_challenge(row: dict) -> tuple[str, list[str], int]:
    gold = row["choices"]["label"].index(row["answerKey"])  # labels are A B C or 1 2 3
    return f"Question: {row['question']}\nAnswer:", row["choices"]["text"], gold


def hellaswag(row: dict) -> tuple[str, list[str], int]:
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return without_marks(context), [without_marks(e) for e in row["endings"]], int(row["label"])


def without_marks(text: str) -> str:
    """HellaSwag's text without WikiHow's [header], [title], [step], as the harness cleans it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")  # once: three blanks become two


def piqa(row: dict) -> tuple[str, list[str], int]:
    return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"])


@dataclass(frozen=True)
class Task:
    name: str
    split: str  # the questions; solved examples come from "train"
    draw_extra: int  # 1 where the harness draws one more than it uses, to drop the question itself
    read: Callable[[dict], tuple[str, list[str], int]]  # row -> context, choices, gold


TASKS = {task.name: task for task in (
    Task("arc_challenge", "test", 0, arc_challenge),
    Task("hellaswag", "validation", 1, hellaswag),
    Task("piqa", "validation", 1, piqa),
)}


def read_examples(options: EvaluateOptions, task: Task, split: str) -> list[Example]:
    """The examples of a split in the order of its file. Raises Stop(DATA)."""
    path, examples = Path(options.data_dir) / task.name / f"{split}.jsonl", []
    if not path.is_file():
        raise Stop(DATA, f"{path} not found; expected one json object per line, fields named as on "
                   f"the Hugging Face hub, in DIR/{task.name}/{split}.jsonl: give --data_dir=DIR")
    try:
        with open(path, encoding="utf-8") as file:  # splitlines() would also cut at U+2028
            for line in file:
                one = Example(row := json.loads(line), *task.read(row))
                if not all(isinstance(text, str) for text in [one.context, *one.choices]):
                    raise TypeError("a choice is no text")
                if not 0 <= one.gold < len(one.choices):
                    raise ValueError(f"answer {one.gold} is none of the choices")
                examples.append(one)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(DATA, f"{path}:{len(examples) + 1}: not a row of {task.name} as the hub has it: "
                   f"{type(error).__name__}: {error}") from error
    if not examples:
        raise Stop(DATA, f"{path} holds no rows; expected one json object per line")
    return examples


def draw(rng: random.Random, pool: list, n: int, extra: int, question: object) -> list:
    """n solved examples for a question, as the harness draws them."""
    if n == 0 or not extra:
        return rng.sample(pool, n)
    others = [one for one in rng.sample(pool, n + 1) if one != question][:n]
    if len(others) == n:
        return others
    return rng.sample([one for one in pool if one != question], n)  # copies of it were drawn


def read_questions(options: EvaluateOptions, task: Task) -> list[Example]:
    """The questions of a task, their solved examples in front of the context. Raises Stop(DATA)."""
    questions, rng = read_examples(options, task, task.split)[:options.limit], random.Random(SEED)
    n, needs = options.num_fewshot, options.num_fewshot + task.draw_extra
    pool = read_examples(options, task, "train") if n else []
    if n and len(pool) < needs:
        raise Stop(DATA, f"{task.name}: --num_fewshot={n} draws from {needs} rows or more, "
                   f"train.jsonl has {len(pool)}; give fewer shots or the whole file")
    for i, one in enumerate(questions):  # one rng: each draw depends on those before it
        shots = draw(rng, pool, n, task.draw_extra, one)
        solved = "".join(f"{s.context} {s.choices[s.gold]}\n\n" for s in shots)
        questions[i] = replace(one, context=solved + one.context)
    return questions


# ---- log-likelihoods -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Checkpoint:
    name: str
    model: Transformer
    tokenizer: Tokenizer
    add_bos: bool
    options: EvaluateOptions


@torch.inference_mode()
def score(ckpt: Checkpoint, requests: list[Request], label: str) -> list[float]:
    """The log-likelihood of each request's last K ids, summed, in nats. Raises Stop(NUMERICAL)."""
    device, B = ckpt.model.cos.device, ckpt.options.batch_size
    cast = torch.autocast(device.type, torch.bfloat16, enabled=ckpt.options.dtype == "bfloat16")
    # Neighbours of one length need little padding; the longest first, so that want of memory shows.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    sums, bar = [0.0] * len(requests), tqdm(total=len(requests), desc=label, disable=None)
    for at in range(0, len(order), B):
        batch = order[at:at + B]
        # Padding stands on the right, where causal attention keeps it from all that is scored.
        inputs = [torch.from_numpy(requests[i][0][:-1]).long() for i in batch]
        with cast:
            logits = ckpt.model(pad_sequence(inputs, batch_first=True).to(device))  # (B, T, V)
        for b, i in enumerate(batch):
            ids, K = requests[i]
            scored = logits[b, len(ids) - 1 - K:len(ids) - 1].float().log_softmax(-1)  # (K, V)
            targets = torch.from_numpy(ids[-K:]).long().to(device)
            lls = scored.gather(1, targets[:, None]).cpu()  # (K, 1); MPS has no float64
            sums[i] = lls.double().sum().item()
        bar.update(len(batch))
    bar.close()
    if not all(map(math.isfinite, sums)):
        raise Stop(NUMERICAL, f"{ckpt.name}: a log-likelihood of {label} is not finite; the "
                   "weights are broken: choose another checkpoint")
    return sums


def encode_pair(ckpt: Checkpoint, context: str, continuation: str) -> tuple[list[int], int]:
    """Context and continuation -> ids, and how many of them are the continuation's.

    A continuation encoded alone would begin with a piece that it does not have in the text. So both
    are encoded and the context's ids cut off, its blanks at the end going to the continuation.
    """
    tokenizer, stripped = ckpt.tokenizer, context.rstrip()
    prefix = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    front = [prefix] if ckpt.add_bos or not stripped else []  # the first id needs one before it
    head = front + tokenizer.encode(stripped)
    whole = front + tokenizer.encode(context + continuation)
    return head + whole[len(head):], len(whole) - len(head)


def windows(ids: list[int], T: int) -> list[Request]:
    """Cut a text so that every id but the first is predicted once, from at most T ids before it.

    As in the harness, a window begins with the last id that the one before it predicted, and only
    the last, which is shorter, reaches further back: it has as much context as there is room for.
    """
    ends = [*range(T + 1, len(ids), T), len(ids)]
    return [(np.array(ids[max(0, end - T - 1):end], np.int32), end - start)
            for start, end in zip([1, *ends], ends, strict=False)]


# ---- tasks: name, metrics and, for every item, its log-likelihoods -------------------------------

Scores = tuple[str, dict[str, float | int | None], list[list[float]]]


def score_choices(ckpt: Checkpoint, task: Task, questions: list[Example]) -> Scores:
    """acc: how often the right choice is the likeliest; acc_norm: the likeliest per character."""
    T, requests, truncated, lls = ckpt.model.config.seq_len, [], set(), []
    for i, one in enumerate(questions):
        for choice in one.choices:
            ids, K = encode_pair(ckpt, one.context, f" {choice}")
            if not 0 < K <= T:
                raise Stop(DATA, f"{task.name}, row {i} of {task.split}.jsonl: a choice has {K} "
                           f"tokens; the context of this model can score 1 to {T}")
            if len(ids) > T + 1:  # what is furthest away is lost, BOS too
                truncated.add(i)
            requests.append((np.array(ids[-(T + 1):], np.int32), K))
    sums, hits = iter(score(ckpt, requests, task.name)), {"acc": [], "acc_norm": []}
    for one in questions:
        lls.append([next(sums) for _ in one.choices])
        # Characters are counted without the blank in front; of equals the first is chosen.
        norm = [ll / len(choice) if choice else -math.inf
                for ll, choice in zip(lls[-1], one.choices, strict=True)]
        hits["acc"].append(float(np.argmax(lls[-1]) == one.gold))
        hits["acc_norm"].append(float(np.argmax(norm) == one.gold))
    metrics, n = {"truncated": len(truncated)}, len(questions)
    for name, values in hits.items():
        metrics[name] = statistics.fmean(values)
        metrics[f"{name}_stderr"] = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return task.name, metrics, lls


def score_stretches(ckpt: Checkpoint, task: str, requests: list[Request], n_bytes: int) -> Scores:
    """The mean over all tokens of stretches of text that stand for n_bytes of UTF-8."""
    lls, tokens = score(ckpt, requests, task), sum(K for _, K in requests)
    metrics = dict(nats_per_token=-sum(lls) / tokens, tokens=tokens, bytes=n_bytes,
                   bits_per_byte=-sum(lls) / math.log(2) / n_bytes)
    return task, metrics, [[ll] for ll in lls]


def score_text(ckpt: Checkpoint, path: Path) -> Scores:
    """A file, the whole of it as one document that follows EOS, or BOS where one is put."""
    data = path.read_bytes()  # read_text() would turn \r\n into \n
    front = ckpt.tokenizer.bos if ckpt.add_bos else ckpt.tokenizer.eos
    requests = windows([front, *ckpt.tokenizer.encode(data.decode())], ckpt.model.config.seq_len)
    # The name without its folder: the output tells nothing of the machine.
    return score_stretches(ckpt, f"text:{path.name}", requests, len(data))


def data_of(folder: Path) -> tuple[Path, dict]:
    """The data set a checkpoint was trained on and its manifest, by the run.json beside it."""
    path = folder.resolve().parent / "run.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        data, data_hash = Path("data", content["config"]["data"]["dataset"]), content["data_hash"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(DATA, f"no run.json that names a data set beside {folder} ({error!r}): `valid` "
                   "scores the held-out rows of a run's own data; give a checkpoint in out/<run>/"
                   ) from error
    if (manifest := read_manifest(data))["data_hash"] != data_hash:
        raise Stop(DATA, f"{data} is not what {folder} was trained on; prepare that again")
    return data, manifest


def score_valid(ckpt: Checkpoint, folder: Path) -> list[Scores]:
    """Per source that has held-out rows: each id of a row predicted from those before it."""
    (data, manifest), sizes, scores = data_of(folder), ckpt.tokenizer.piece_bytes(), []
    for name in (source["name"] for source in manifest["sources"] if source["valid_rows"]):
        rows = open_rows(data, manifest, valid_name(name))[:ckpt.options.limit].astype(np.int32)
        requests = [(row, manifest["seq_len"]) for row in rows]
        n_bytes = int(sizes[rows[:, 1:]].sum())  # as predicted: rows begin and end inside documents
        scores.append(score_stretches(ckpt, f"valid/{name}", requests, n_bytes))
    return scores


# ---- the whole -----------------------------------------------------------------------------------

def check(word: str, options: EvaluateOptions) -> list[Path]:
    """All that can be told before the first forward pass -> the checkpoints to score, in order."""
    place, names = Path(word), options.tasks.split(",")
    checkpoints = [place] if (place / "config.json").is_file() else sorted(
        (path.parent for path in place.glob("ckpt_*[0-9]/config.json")),
        key=lambda path: (len(path.name), path.name))  # ckpt_1000 after ckpt_999
    if not checkpoints:
        raise Stop(CHECKPOINT, f"no checkpoint at {word}; expected a folder with a config.json, "
                   "such as out/demo/ckpt_007, or a run's folder with ckpt_000, ckpt_001, ...")
    choose_device(options.device)  # stops if it is not there
    if options.output and (Path(options.output).is_dir()
                           or not Path(options.output).absolute().parent.is_dir()):
        raise Stop(USAGE, f"--output={options.output} is a folder, or in one that does not exist; "
                   "give a file, such as scores.json")
    for name in names:
        if name.startswith("text:"):
            path = Path(name.removeprefix("text:"))
            try:
                if not path.is_file() or not path.read_bytes().decode().strip():
                    raise Stop(DATA, f"text file {path} is missing or blank; write text:FILE")
            except UnicodeDecodeError as error:
                raise Stop(DATA, f"{path} is not UTF-8 ({error}); convert it first") from error
        elif name not in TASKS and name != "valid":
            raise Stop(USAGE, f"unknown task {name!r}; expected some of valid, text:FILE, "
                       f"{', '.join(TASKS)}, separated by commas")
    for folder in checkpoints:
        config, tokenizer = read_config(folder), load_tokenizer(options.tokenizer or folder)
        if options.add_bos and tokenizer.bos is None:
            raise Stop(USAGE, f"{folder}: its tokenizer has no BOS; give --add_bos=false")
        if tokenizer.vocab_size > config.vocab_size:
            raise Stop(DATA, f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                       f"{config.vocab_size}; give the model's own by --tokenizer=FILE")
        if "valid" not in names:
            continue
        data, manifest = data_of(folder)
        if tokenizer.spec()["sha256"] != manifest["tokenizer"]["sha256"]:
            raise Stop(DATA, f"{data} was made with another tokenizer than {folder}'s; give the "
                       "run's own by --tokenizer=FILE")
        if not any(source["valid_rows"] for source in manifest["sources"]):
            raise Stop(DATA, f"{data} has no held-out rows; prepare it with --valid_rows=128")
    return checkpoints


def score_checkpoint(folder: Path, options: EvaluateOptions,
                     questions: dict[str, list[Example]]) -> list[dict]:
    """An entry for each task; the checkpoint's memory is free again when this returns."""
    device = choose_device(options.device)
    model = Transformer.from_pretrained(folder, device).eval()
    tokenizer = load_tokenizer(options.tokenizer or folder)
    add_bos = tokenizer.add_bos if options.add_bos is None else options.add_bos
    ckpt = Checkpoint(folder.resolve().name, model, tokenizer, add_bos, options)
    settings = dict(
        checkpoint=ckpt.name, checkpoint_hash=checkpoint_hash(folder), device=device.type,
        tokenizer_sha256=tokenizer.spec()["sha256"], max_length=model.config.seq_len,
        dtype=options.dtype, batch_size=options.batch_size, torch=torch.__version__)
    scores: list[Scores] = []
    for name in options.tasks.split(","):
        if name == "valid":
            scores += score_valid(ckpt, folder)
        elif name in TASKS:
            scores.append(score_choices(ckpt, TASKS[name], questions[name]))
        else:
            scores.append(score_text(ckpt, Path(name.removeprefix("text:"))))
    return [dict(task=task, num_fewshot=options.num_fewshot if task in TASKS else 0,
                 limit=options.limit, add_bos=add_bos, metrics=metrics, settings=settings,
                 items=[dict(doc_id=i, lls=one) for i, one in enumerate(lls)])
            for task, metrics, lls in scores]


def show(one: dict) -> None:
    for name, value in one["metrics"].items():
        if not name.endswith("_stderr"):
            stderr = one["metrics"].get(f"{name}_stderr")
            print(f"{one['settings']['checkpoint']:<12} {one['task']:<20} {len(one['items']):>6} "
                  f"{name:<15} {value:>{'12,' if isinstance(value, int) else '12.4f'}}"
                  + (f" {stderr:>8.4f}" if stderr is not None else ""))


def main(argv: list[str]) -> None:
    word, options = load_options(argv, EvaluateOptions, "a checkpoint or a run, such as "
                                 "out/demo/ckpt_007 or out/demo")
    checkpoints, entries = check(word, options), []
    questions = {name: read_questions(options, TASKS[name])
                 for name in options.tasks.split(",") if name in TASKS}
    print(f"{'checkpoint':<12} {'task':<20}  items {'metric':<15} {'value':>12}   stderr")
    for folder in checkpoints:
        entries += (new := score_checkpoint(folder, options, questions))
        for one in new:
            show(one)
        if options.output:  # after each checkpoint: what a killed run has is not lost
            write_atomic(Path(options.output), json.dumps({"runs": entries}) + "\n")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [EvaluateOptions]))
