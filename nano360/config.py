"""The one schema of a run, and the loader that fills it.

A run file is flat `key = value` Python, as in nanoGPT, and may start from another one:

    from configs.amber_7b import *
    batch_size = 64

It is executed in a namespace of its own; what it leaves there is checked key by key against the
frozen dataclasses below and sorted into their sections, so that code says `config.model.n_layer`.
Keys are unique over all sections, which is what lets the file and `--key=value` stay flat. All that
is wrong is told at once. Only the file named on the command line is executed: run folders hold
json. How a stage ends, in one line and an exit code, is here too.

Standard library only: every stage imports this file, and a run file is checked without torch.
"""

import ast
import dataclasses
import difflib
import math
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Exit codes of every stage. 0 is success, 1 a bug of ours (with its traceback).
USAGE, DATA, CHECKPOINT, NUMERICAL, ENVIRONMENT = 2, 3, 4, 5, 6

NANOGPT_NAMES = {  # what a reader of nanoGPT would write -> what it is called here
    "learning_rate": "lr", "block_size": "seq_len", "max_iters": "max_steps", "out_dir": "run",
    "warmup_iters": "warmup_steps", "lr_decay_iters": "decay_steps", "decay_lr": "schedule",
    "log_interval": "log_every",
}

GONE: dict[str, Any] = {}  # keys that older versions wrote to run.json -> their default there


class Stop(Exception):
    """Something the user can mend: an exit code and one line of what happened and what to do."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple:  # the way out of a worker process
        return Stop, (self.code, str(self))


# ---- the schema ----------------------------------------------------------------------------------

def key(meaning: str, default: Any = dataclasses.MISSING, *, unit: str = "",
        low: float | None = None, above: float | None = None, high: float | None = None,
        pattern: str = "", free: bool = False) -> Any:
    """One knob: its meaning and unit for --help, its limits for the check.

    low <= value, above < value, value <= high; `pattern` is a regular expression for strings.
    `free`: may differ when a run goes on in the folder it has.
    """
    return dataclasses.field(default=default, metadata=dict(
        meaning=meaning, unit=unit, low=low, above=above, high=high, pattern=pattern, free=free))


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # names that become file names: nothing that leaves its folder


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of the data mix."""
    name: str = key("what the source is called in tables and file names", pattern=NAME)
    path: str = key("a file or folder; https://HOST/FILE; list: and the URL of a list of such; "
                    "hf:datasets/OWNER/NAME[@REVISION]; or the library of this Python, stdlib:code "
                    "or stdlib:prose", pattern=".+")
    files: str = key("which of its files are read, as in *.parquet; empty: all that can be", "")
    subset: Literal["all", "even", "odd", "tenth"] = key(
        "of these, by name: those at even or odd places, counted from 0; the first tenth", "all")
    where: str = key("KEY=VALUE: only the documents that have it, as in meta.set=Book", "",
                     pattern="([^=]+=.*)?")
    text_key: str = key("key or column of its text; empty: the run's", "")
    rows: bool = key('lines are rows, {"token_ids": [...], "source": NAME}, files chunks', False)
    weight: float = key("share of the rows", 1.0, above=0)
    epochs: int | None = key("passes it has to give; none: one, or as many as its weight asks for",
                             None, low=1)
    max_tokens: int | None = key("it ends with the document in which this many are reached", None,
                                 unit="tokens", low=1)
    fim_rate: float = key("share of documents rewritten to be filled in the middle", 0.0, low=0,
                          high=1)
    licence: str = key("licence of the text", "unknown")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    n_layer: int = key("transformer blocks", low=1)
    n_head: int = key("query heads per block", low=1)
    n_kv_head: int | None = key("key/value heads per block; none: as many as n_head", None, low=1)
    n_embd: int = key("width C of the residual stream", low=1)
    n_inner: int = key("width of the MLP", low=1)
    vocab_size: int = key("rows of the embedding", low=2)
    seq_len: int = key("context length T", unit="tokens", low=1)
    norm: Literal["rms", "layer"] = key("RMSNorm, or LayerNorm with weight and bias", "rms")
    norm_eps: float = key("added to the mean square or variance in a norm", 1e-6, above=0)
    bias: bool = key("biases in the linear layers of the blocks", False)
    rotary_dim: int | None = key("leading dimensions of a head that rotate; none: all", None, low=2)
    rope_interleaved: bool = key("pairs are (0, 1), (2, 3), ...; false: i and i + half", False)
    rope_theta: float = key("base of the rotary frequencies", 10000.0, above=0)
    tie: bool = key("the head is the embedding, one matrix", False)
    init_std: float = key("standard deviation of the initial weights, at the muP base width", 0.02,
                          low=0)
    mup_base_width: int | None = key("width whose rates and stds muP carries over to n_embd; none: "
                                     "the standard parametrisation", None, low=1)
    mup_emb_mult: float = key("factor of the embedding's output", 1.0, above=0)
    mup_alpha: float = key("factor of the logits, which muP divides by n_embd / mup_base_width",
                           1.0, above=0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    dataset: str = key("folder below data/; the run file's name unless given", pattern=NAME)
    sources: tuple[Source, ...] = key("the mix: [dict(name=, path=, weight=, licence=, ...)]", ())
    tokenizer: str = key("bpe: train one; tiktoken:NAME; a file, .model .tiktoken .json; or "
                         "hf:OWNER/NAME[@REVISION]/FILE", "bpe")
    tokenizer_sha256: str = key("sha256 the tokenizer file must have; empty: any", "",
                                pattern="([0-9a-f]{64})?")
    special_tokens: str = key("tokens that follow sentencepiece's own, with blanks between", "")
    bos: bool = key("BOS in front of every document", False)
    overlap: bool = key("a row begins with the last token of the one before: no target is lost",
                        False)
    n_chunks: int = key("chunks the data is cut into; one checkpoint after each", low=1)
    rows_per_chunk: int | None = key("rows in a chunk, over all sources; none: each source once",
                                     None, low=1)
    valid_share: float = key("share of the documents held out, by hash", 0.01, low=0, high=0.5)
    valid_rows: int = key("held-out rows kept per source, at most", 128, low=0)
    seed: int = key("seed of the weights and of every order", 1337, low=0, high=2**32 - 1)
    text_key: str = key("key of the text in a line of .jsonl", "text")
    encoding: str = key("encoding of the text files", "utf-8")
    max_bad_documents: int = key("unreadable files and lines skipped, and counted, before prepare "
                                 "gives up", 0, low=0, free=True)
    keep_downloads: bool = key("keep what was fetched, in data/downloads, after it was read", True,
                               free=True)
    canaries: int = key("marked strings planted once, as many ten times and as many a hundred "
                        "times, to measure memorization by; 0: none", 0, low=0)
    workers: int = key("processes that tokenize; 0: one per core", 0, low=0, free=True)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = key("peak learning rate", above=0)
    min_lr: float = key("learning rate at decay_steps and after", 0.0, low=0)
    schedule: Literal["cosine", "linear"] = key("how lr falls from its peak to min_lr", "cosine")
    warmup_steps: int = key("linear rise to lr", 0, unit="steps", low=0)
    decay_steps: int | None = key("step at which min_lr is reached; none: the end of the queue",
                                  None, unit="steps", low=1)
    max_steps: int | None = key("stop after this step; none: the whole queue", None, unit="steps",
                                low=1, free=True)
    epochs: int = key("times the queue of chunks is trained", 1, low=1)
    batch_size: int = key("rows per optimizer step, over all ranks", low=1)
    micro_batch_size: int | None = key("rows per forward pass on one rank; none: all it has", None,
                                       low=1, free=True)
    weight_decay: float = key("decoupled weight decay", 0.1, low=0)
    grad_clip: float = key("largest global gradient norm", 1.0, above=0)
    beta1: float = key("AdamW: memory of the gradient", 0.9, low=0, high=0.999999)
    beta2: float = key("AdamW: memory of its square", 0.95, low=0, high=0.999999)
    eps: float = key("AdamW: added to the root of the square", 1e-8, above=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: str = key("folder below out/; the run file's name unless given", pattern=NAME)
    device: Literal["auto", "cpu", "cuda", "mps"] = key("where to compute", "auto", free=True)
    dtype: Literal["auto", "float32", "bfloat16"] = key("type of the matrix products", "auto",
                                                        free=True)
    compile: bool | None = key("compile each block; none: on CUDA only", None, free=True)
    recompute: Literal["none", "selective", "full"] = key(
        "activation checkpointing, what the backward pass computes again of a block: nothing; all "
        "but matrix products and attention; all", "none", free=True)
    dp_shard: int | None = key("ranks that share one copy of weights, gradients and moments "
                               "(FSDP2); 1: each has its own (DDP); none: 1 if 20 bytes a "
                               "parameter fit in 80 % of a GPU, else the GPUs of a node", None,
                               low=1, free=True)
    tp: int = key("ranks that share every matrix (tensor parallelism)", 1, low=1, free=True)
    pp: int = key("ranks in a row that share the blocks (pipeline parallelism)", 1, low=1,
                  free=True)
    pp_stages: int = key("stages of the pipeline on each of them; more than 1: interleaved", 1,
                         low=1, free=True)
    timeout: float = key("how long a rank waits for the others in a step or for a save", 30.0,
                         unit="minutes", above=0, free=True)
    init_from: str | None = key("checkpoint whose weights the run starts with; none: random ones",
                                None, pattern=".+")
    init_optimizer: bool = key("start with the optimizer state of init_from too", False)
    on_nonfinite: Literal["skip", "defer", "stop"] = key(
        "a loss or gradient that is no number: skip the step; defer the chunk to the end of the "
        "queue, and drop it if it fails again; or stop", "skip", free=True)
    max_skips: int = key("such steps in a row at which the run stops all the same", 3, low=1,
                         free=True)
    save_steps: int | None = key("steps between two saves of last/, inside a visit; none: by time",
                                 None, low=1, free=True)
    save_minutes: float | None = key("minutes between two saves of last/; none: by steps alone",
                                     10.0, above=0, free=True)
    keep_optimizer: int | None = key("checkpoints whose optimizer state is kept, the newest; none: "
                                     "all", None, low=2, free=True)
    log_to: Literal["none", "wandb", "tensorboard"] = key(
        "where metrics go besides metrics.jsonl: files below logs/", "none", free=True)
    log_every: int = key("steps between printed lines; metrics.jsonl has every step", 10, low=1,
                         free=True)


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig


SECTIONS: dict[str, type] = {f.name: f.type for f in dataclasses.fields(Config)}


def to_json(config: Config) -> dict:
    """The config as plain dicts and lists, one per section."""
    return dataclasses.asdict(config)


def from_json(sections: dict) -> Config:
    """The inverse of to_json(from json.load). A key in GONE is left out; one line says so where it
    was set. Raises Stop on anything else that the schema does not know."""
    given = {k: (v, "run.json") for s in sections.values() for k, v in s.items()}
    for name in GONE.keys() & given.keys():
        value, where = given.pop(name)
        if value != GONE[name]:
            say(f"{where} has {name} = {value}; this version has no such key and leaves it out")
    return Config(*fill(list(SECTIONS.values()), given))


# ---- one value -----------------------------------------------------------------------------------

def kinds(hint: Any) -> tuple[list, bool]:
    """Split an annotation: its alternatives, and whether None is one. int | None -> [int], True."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = typing.get_args(hint)
        return [p for p in parts if p is not types.NoneType], types.NoneType in parts
    return [hint], False


def wanted(hint: Any) -> str:
    """An annotation in words, for --help and messages."""
    parts, optional = kinds(hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    said = [words.get(p) or (" | ".join(map(str, typing.get_args(p)))
                             if typing.get_origin(p) is Literal else "a list of dict(...)")
            for p in parts]
    return " or ".join(said + ["none"] * optional)


def parse(text: str, hint: Any) -> Any:
    """A command-line word as a value of the annotation; ValueError when it is none."""
    parts, optional = kinds(hint)
    if optional and text.lower() == "none":
        return None
    for kind in parts:
        if kind is str or typing.get_origin(kind) is Literal:
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            return kind(text)
    raise ValueError(text)


def check_value(value: Any, hint: Any, field: dataclasses.Field) -> tuple[Any, str | list[str]]:
    """The value in its final form and, if it fits type or limits not, what was wanted instead.

    For the sources, whose items have keys of their own, a line for each that is wrong.
    """
    parts, optional = kinds(hint)
    kind, meta = parts[0], field.metadata
    if value is None and optional:
        return value, ""
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_origin(kind) is Literal:
        return value, "" if value in typing.get_args(kind) else f"wants one of {wanted(kind)}"
    if typing.get_origin(kind) is tuple:  # the sources
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, dict) for v in value):
            return value, "wants a list of dict(...)"
        item, made, errors = typing.get_args(kind)[0], [], []
        for i, one in enumerate(value):
            try:
                made += fill([item], {k: (v, f"{field.name}[{i}]") for k, v in one.items()})
            except Stop as stop:
                errors += str(stop).splitlines()
        return tuple(made), errors or ""
    if type(value) is not kind:  # bool is an int to isinstance, and 1 is not true
        return value, f"wants {wanted(hint)}"
    if isinstance(value, str):
        fits = re.fullmatch(meta["pattern"] or ".*", value, re.DOTALL)
        return value, "" if fits else f"wants text like {meta['pattern']}"
    low, above, high = meta["low"], meta["above"], meta["high"]
    if low is not None and not value >= low:
        return value, f"wants {low} or more"
    if above is not None and not value > above:
        return value, f"wants more than {above}"
    if high is not None and not value <= high:
        return value, f"wants {high} or less"
    return value, "" if math.isfinite(value) else "wants a finite number"


def unknown(name: str, where: str, names: list[str]) -> str:
    """What to say about a key that no schema has."""
    if name in NANOGPT_NAMES and NANOGPT_NAMES[name] in names:
        return f"{where}: {name!r} is called {NANOGPT_NAMES[name]!r} here"
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else "not a key"
    return f"{where}: unknown key {name!r}; {hint} (--help lists all)"


# ---- files and command lines -> dataclasses ------------------------------------------------------

def fill(classes: list[type], given: dict[str, tuple[Any, str]]) -> list:
    """One instance of each dataclass from key -> (value, where it was given).

    A value whose `where` starts with -- is still text. Raises Stop with every error at once.
    """
    fields = {f.name: (f, hints[f.name]) for c in classes
              for hints in [typing.get_type_hints(c)] for f in dataclasses.fields(c)}
    errors, values = [], {}
    for name, (value, where) in given.items():
        if name not in fields:
            errors.append(unknown(name, where, list(fields)))
            continue
        field, hint = fields[name]
        said, complaint = value, ""
        if where.startswith("--"):
            try:
                value = parse(value, hint)
            except ValueError:
                complaint = f"wants {wanted(hint)}"
        if not complaint:
            value, complaint = check_value(value, hint, field)
        if isinstance(complaint, list):
            errors += [f"{where}: {line}" for line in complaint]
        elif complaint:
            at = where if where.startswith("--") else f"{where}: {name}"
            errors.append(f"{at} {complaint}, got {said!r}")
        values[name] = value
    for name, (field, hint) in fields.items():
        if name not in given and field.default is dataclasses.MISSING:
            errors.append(f"missing key {name!r} ({wanted(hint)}): {field.metadata['meaning']}")
    if errors:
        raise Stop(USAGE, "\n".join(errors))
    return [c(**{f.name: values[f.name] for f in dataclasses.fields(c) if f.name in values})
            for c in classes]


def read_run_file(path: str) -> dict[str, tuple[Any, str]]:
    """Execute a run file in a namespace of its own -> key -> (value, file:line)."""
    if not path.endswith(".py") or not os.path.isfile(path):
        have = sorted(p.name for p in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))
        what = "is not a run file, flat key = value in .py" if os.path.exists(path) else "not found"
        raise Stop(USAGE, f"config {path} {what}; configs/ has {', '.join(have)}")
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(text, path)
        namespace: dict[str, Any] = {"__name__": "run_file", "__file__": path}
        exec(compile(tree, path, "exec"), namespace)
    except (Exception, SystemExit) as error:  # what the user's own lines raise is theirs
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = frames[-1].lineno if frames else getattr(error, "lineno", None) or 1
        raise Stop(USAGE, f"{path}:{line}: {type(error).__name__}: {error}; a run file holds only "
                          "key = value lines") from error
    lines = {name.id: name.lineno for name in ast.walk(tree)
             if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return {k: (v, f"{path}:{lines[k]}" if k in lines else path) for k, v in namespace.items()
            if not k.startswith("_") and not isinstance(v, types.ModuleType)}


def split_words(argv: list[str], names: dict[str, Any]) -> tuple[list[str], dict]:
    """Sort a command line into plain words and options, key -> (text, "--key").

    `names` is key -> annotation. A bool may stand alone: --verify is --verify=true.
    """
    words, given = [], {}
    for word in argv:
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and names.get(name) is bool:
            value = "true"
        elif not equals and name in names:
            raise Stop(USAGE, f"--{name} needs a value: write --{name}=VALUE")
        if name in given:
            say(f"--{name} is given twice: the last one, {value!r}, holds")
        given[name] = (value, f"--{name}")
    return words, given


def check_model(m: ModelConfig) -> list[str]:
    """What is wrong with a model's sizes, taken together."""
    errors, D, r = [], m.n_embd // m.n_head, m.rotary_dim
    if m.n_embd % m.n_head:
        step = m.n_head * 2  # twice the heads, so that the head size stays even for the rotation
        near = {max(step, m.n_embd // step * step), m.n_embd // step * step + step}
        errors.append(f"n_embd = {m.n_embd} is not divisible by n_head = {m.n_head}; "
                      f"nearest: {' or '.join(map(str, sorted(near)))}")
    elif r is None and D % 2:
        errors.append(f"n_embd / n_head = {D} is odd: RoPE turns pairs")
    elif r is not None and (r % 2 or r > D):
        errors.append(f"rotary_dim = {r} wants an even number of at most n_embd / n_head = {D}")
    if m.n_head % (m.n_kv_head or m.n_head):
        errors.append(f"n_head = {m.n_head} is not divisible by n_kv_head = {m.n_kv_head}")
    return errors


def check(config: Config) -> None:
    """What no single key can know. Raises Stop with every error at once."""
    d, o, errors = config.data, config.optim, check_model(config.model)
    if o.min_lr > o.lr:
        errors.append(f"min_lr = {o.min_lr} is above lr = {o.lr}")
    if o.decay_steps is not None and o.decay_steps < o.warmup_steps:
        errors.append(f"decay_steps = {o.decay_steps} ends before warmup_steps = {o.warmup_steps}")
    if config.train.init_optimizer and config.train.init_from is None:
        errors.append("init_optimizer = true, but init_from names no checkpoint")
    names = [source.name for source in d.sources]
    if len(set(names)) < len(names):
        errors.append(f"two sources have one name: {', '.join(names)}")
    if any(source.rows for source in d.sources) and len(d.sources) > 1:
        errors.append("a source of ready rows is the only one: its lines name theirs")
    if any(source.rows for source in d.sources) and d.canaries:
        errors.append(f"canaries = {d.canaries}, but they are planted in text, and the rows of a "
                      "release stay as they were released: give --canaries=0")
    if errors:
        raise Stop(USAGE, "\n".join(errors))


def load(argv: list[str], options: type | None = None) -> tuple[Config, Any]:
    """CONFIG --key=value ... -> the checked Config, and the stage's own options (None without)."""
    classes = [*SECTIONS.values()] + [options] * (options is not None)
    names = {k: hint for c in classes for k, hint in typing.get_type_hints(c).items()}
    words, line = split_words(argv, names)
    if len(words) != 1:
        stray = f", got {' '.join(words)!r}: write --key=value" if words else ""
        raise Stop(USAGE, f"expected a run file such as configs/demo.py{stray} (see --help)")
    file = read_run_file(words[0])
    stem = {name: (Path(words[0]).stem, words[0]) for name in ("dataset", "run")}
    filled = fill(classes, stem | file | line)
    for name in sorted(line.keys() & file.keys()):
        value, where = file[name]
        say(f"overridden on the command line: {name} = {line[name][0]} ({where}: {value})")
    config = Config(*filled[:len(SECTIONS)])
    check(config)
    return config, (filled[-1] if options else None)


def load_options(argv: list[str], options: type, expect: str) -> tuple[str, Any]:
    """WORD --key=value ... for stages without a run file -> the word and the filled options."""
    words, given = split_words(argv, typing.get_type_hints(options))
    if len(words) != 1:
        got = " ".join(words) or "nothing"
        raise Stop(USAGE, f"expected {expect}, got {got!r} (--help lists all options)")
    return words[0], fill([options], given)[0]


# ---- what every stage prints and how it ends -----------------------------------------------------

def say(line: str) -> None:
    """Print a line, once for all ranks of a torchrun."""
    if os.environ.get("RANK", "0") == "0":
        print(line + "\n", end="", flush=True)  # in one piece: a save may speak at the same time


def columns(lines: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table, heads first: columns of numbers to the right, others to the left."""
    aligned = []
    for column in zip(*([str(cell) for cell in line] for line in lines), strict=True):
        width = max(map(len, column))
        right = all(re.fullmatch(r"[-+.,%\d]*", cell) for cell in column[1:])
        aligned.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def help_text(doc: str, classes: list[type]) -> str:
    """A stage's docstring and, for every key, default, meaning, unit and what it wants."""
    rows = []
    for c in classes:
        rows.append("\nkeys of each of the sources, in a run file:" if c is Source else "")
        for f in dataclasses.fields(c):
            required = f.default is dataclasses.MISSING
            default = "required" if required else str(f.default).lower() or "''"
            default = "(file)" if f.name in ("dataset", "run") else default  # the run file's name
            unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
            want = wanted(typing.get_type_hints(c)[f.name])
            free = " (free on resume)" * f.metadata["free"]
            name = "--" * (c is not Source) + f.name
            rows.append(f"  {name:<20} {default:<9} {f.metadata['meaning']}{unit}; {want}{free}")
    return doc.strip() + "\n" + "\n".join(rows)


def run(main: Callable[[list[str]], None], doc: str, classes: list[type],
        argv: list[str] | None = None) -> int:
    """Run a stage's main(argv) and turn how it ended into an exit code.

    An error that the user can mend becomes one line on stderr; --debug adds its traceback.
    Anything else is a bug of ours and keeps its traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    if "--help" in argv or "-h" in argv:
        print(help_text(doc, classes))
        return 0
    try:
        main(argv)
        return 0
    except Stop as stop:
        error, code, text = stop, stop.code, str(stop)
    except KeyboardInterrupt as stop:
        error, code, text = stop, 130, "interrupted"
    except BrokenPipeError:  # `python sample.py ... | head`: the reader had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as stop:  # a full disk, a folder that may not be written
        what = f"{stop.filename or 'storage'}: {stop.strerror or stop}"
        error, code, text = stop, CHECKPOINT, what
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    word = "error: " * (code < 128)  # above are signals that were obeyed
    same = code == USAGE and os.environ.get("RANK", "0") != "0"  # on all ranks: one says it
    for line in () if same else text.splitlines():
        print(f"{rank}{word}{line}", file=sys.stderr, flush=True)
    if debug:
        traceback.print_exception(error)
    return code
