"""Does it matter over how many processes a step is spread? By nothing but rounding.

    python tests/parity.py                                         # all of it, a quarter of an hour
    python tests/parity.py --layouts=fsdp2,pp2.dp2.tp2 --variants=llama,crystal --steps=2

Every layout trains every variant for a few optimizer steps, on a CPU, in fp32, by the functions of
train.py; so does one process, by none of them: model(ids, targets).backward() on the whole batch,
and PyTorch's clip_grad_norm_. Of every step are compared the loss, the norm of all gradients and
the norm of each parameter's gradient. Prints for each layout how far they are apart at most,
relative to the one process, and ends with 1 where that is more than rounding explains.

A layout is called by its ranks: pp2.dp2.tp2 is 2 x 2 x 2 of them; dp is DDP (where others are, the
copies of FSDP2), fsdp are its shards, stages is pp_stages. A variant is keys of a run file; the
number of micro-batches is `pieces`, or what the pipeline asks for. Blocks are compiled by dynamo
and AOTAutograd, without inductor's code (backend aot_eager).

The processes of a layout are forked from one that has imported torch: they begin at once, and go
through all variants.
"""

import contextlib
import dataclasses
import functools
import gc
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))  # run from any folder
import model as model_file  # noqa: E402
import train  # noqa: E402
from model import Block, Transformer, init_weights, param_groups  # noqa: E402
from nano360.config import (  # noqa: E402
    SECTIONS, USAGE, Config, Stop, fill, key, run, say, split_words)
from nano360.layout import layout_errors, layout_of  # noqa: E402
from nano360.place import Clock, Place, choose_place, clip, exchange  # noqa: E402
from ranks import free_port  # noqa: E402

LAYOUTS = ("dp2", "fsdp2", "dp2.fsdp2", "tp2", "pp2", "pp4", "pp2.stages2", "dp2.tp2", "fsdp2.tp2",
           "dp2.pp2", "fsdp2.pp2", "tp2.pp2", "pp2.dp2.tp2", "pp2.fsdp2.tp2")
KEYS = {"fsdp": "dp_shard", "tp": "tp", "pp": "pp", "stages": "pp_stages"}
BASE = dict(
    n_layer=4, n_head=4, n_embd=32, n_inner=64, vocab_size=64, seq_len=16, init_std=0.1,
    dataset="parity", n_chunks=1, run="parity", lr=5e-3, batch_size=16, grad_clip=0.5,
    eps=1e-6,  # AdamW divides by the root of a square: of a gradient that is only rounding, too
    device="cpu", dtype="float32", compile=False, timeout=2.0)
CRYSTAL = dict(norm="layer", bias=True, rotary_dim=4, rope_interleaved=True)
MUP = dict(mup_base_width=16, mup_emb_mult=3.0, mup_alpha=2.0)
VARIANTS = {
    "llama": {},
    "grouped": dict(n_kv_head=2, pieces=2),
    "tied": dict(tie=True),
    "mup": MUP,
    "micro": dict(pieces=4, logits=24 * 64),  # the head on 24 tokens at a time, a last one of less
    "selective": dict(recompute="selective", pieces=2),
    "full": dict(recompute="full", n_kv_head=2),
    "crystal": CRYSTAL | MUP | dict(tie=True),
    "crystal_untied": CRYSTAL | MUP | dict(pieces=2),
    "crystal_sp": CRYSTAL | dict(tie=True, recompute="selective"),
    "crystal_micro": CRYSTAL | MUP | dict(tie=True, n_kv_head=2, recompute="full", pieces=4),
    "compiled": dict(compile=True),
    "compiled_crystal": CRYSTAL | MUP | dict(tie=True, compile=True, recompute="selective",
                                             pieces=2),
}
BOUNDS = {"loss": 1e-5, "norm": 1e-4, "grads": 1e-3}  # relative
Step = dict[str, typing.Any]  # loss, norm, grads: name -> the norm of its gradient


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    layouts: str = key("layouts to compare, with commas between", ",".join(LAYOUTS))
    variants: str = key("variants of each", ",".join(VARIANTS))
    steps: int = key("optimizer steps of each", 5, low=1)


# ---- processes -----------------------------------------------------------------------------------

def spread(n: int, work: Callable, *args: object, patience: float = 600.0) -> list:
    """What work(*args) gives in each of n processes that torchrun might have started.

    Raises RuntimeError with what one of them raised; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parity"])
    found_in = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    port, waiting, children, found = free_port(), {}, [], {}
    for rank in range(n):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=answer, args=(theirs, rank, n, port, work, args),
                                daemon=True)
        with patch.dict(os.environ, PYTHONPATH=found_in):  # for what forks them, which starts here
            child.start()
        theirs.close()
        waiting[mine] = rank
        children.append(child)
    until = time.monotonic() + patience
    try:
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), until - time.monotonic())
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} of {n} gave nothing for "
                                   f"{patience:g} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    fine, found[rank] = pipe.recv()
                except EOFError:
                    fine, found[rank] = False, "ended without a word"
                if not fine:
                    raise RuntimeError(f"rank {rank} of {n}: {found[rank]}")
    except RuntimeError:
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:
            child.join()
    return [found[rank] for rank in range(n)]


def answer(pipe: multiprocessing.connection.Connection, rank: int, n: int, port: str,
           work: Callable, args: tuple) -> None:
    """A rank from its birth to its end."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n),
                   "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        pipe.send((True, work(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- what is trained -----------------------------------------------------------------------------

def ranks_of(layout: str) -> dict[str, int]:
    """pp2.dp2 -> {"pp": 2, "dp": 2}. Raises Stop(USAGE)."""
    parts = [re.fullmatch(r"(dp|fsdp|tp|pp|stages)(\d+)", part) for part in layout.split(".")]
    if not all(parts):
        raise Stop(USAGE, f"a layout is {', '.join(LAYOUTS)} or alike, got {layout!r}")
    return {part[1]: int(part[2]) for part in parts}


def world_of(layout: str) -> int:
    return math.prod(n for name, n in ranks_of(layout).items() if name != "stages")


def config_of(variant: dict, layout: str = "") -> Config:
    """The run of a variant, on a layout or alone."""
    ranks = ranks_of(layout) if layout else {}
    rows = BASE["batch_size"] // (ranks.get("dp", 1) * ranks.get("fsdp", 1))
    stages = ranks.get("pp", 1) * ranks.get("stages", 1)
    keys = BASE | {k: v for k, v in variant.items() if k not in ("pieces", "logits")} | {
        "dp_shard": 1,
        "micro_batch_size": max(1, rows // max(variant.get("pieces", 1), stages))} | {
        KEYS[name]: n for name, n in ranks.items() if name in KEYS}
    config = Config(*fill(list(SECTIONS.values()), {k: (v, "parity") for k, v in keys.items()}))
    if layout:
        ours = layout_of(config, world_of(layout), config.train.dp_shard)
        if errors := layout_errors(config, ours):
            raise Stop(USAGE, f"{layout}: {'; '.join(errors)}")
    return config


def some_rows(config: Config, steps: int) -> np.ndarray:
    """(steps, batch_size, seq_len + 1) ids, the same at every call."""
    shape = (steps, config.optim.batch_size, config.model.seq_len + 1)
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.uint16)


def optimizer_of(model: Transformer, config: Config, fused: bool) -> torch.optim.Optimizer:
    """AdamW as train.start() makes it, at the rate of a step."""
    o = config.optim
    optimizer = torch.optim.AdamW(param_groups(model, o.weight_decay), lr=o.lr, eps=o.eps,
                                  betas=(o.beta1, o.beta2), fused=fused)
    for group in optimizer.param_groups:
        group["lr"] = o.lr * group["lr_mult"]
    return optimizer


def alone(variant: dict, steps: int) -> list[Step]:
    """The steps of one process, in PyTorch's words and the model's alone."""
    config, found = config_of(variant), []
    model = Transformer(config.model)
    init_weights(model, config.data.seed)
    optimizer = optimizer_of(model, config, fused=False)
    for rows in some_rows(config, steps):
        ids = torch.from_numpy(rows.astype(np.int64))
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = {name: float(p.grad.norm()) for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        found.append({"loss": loss.item(), "norm": norm.item(), "grads": grads})
        optimizer.step()
        optimizer.zero_grad()
    return found


def build(config: Config, place: Place) -> tuple[Transformer, train.Runner]:
    """The model of a rank, as train.start() makes it from nothing."""
    with torch.device("meta"):
        model = Transformer(config.model)
    runner = train.parallelize(model, place, config)
    init_weights(model, config.data.seed)
    return model, runner


def together(config: Config, place: Place, steps: int) -> list[Step]:
    """The same steps as a rank of a layout sees them, as train.train() takes them."""
    model, runner = build(config, place)
    optimizer, found, clock = optimizer_of(model, config, True), [], Clock(place.device)
    n = config.optim.batch_size // place.dp_world
    with loss_parallel() if place.size("tp") > 1 else contextlib.nullcontext():
        for rows in some_rows(config, steps):
            mine = rows[place.dp_rank * n:(place.dp_rank + 1) * n]
            loss = train.forward_backward(runner, mine, config.optim.micro_batch_size, place, clock)
            norm = train.norm_of(model, place)
            losses, norms = exchange((loss, norm), place).T
            grads = {name: float((p.grad.full_tensor() if isinstance(p.grad, DTensor)
                                  else p.grad).norm()) for name, p in model.named_parameters()}
            found.append({"loss": float(losses[place.speakers].mean()), "norm": norm.item(),
                          "grads": grads})
            clip(model, config.optim.grad_clip, norms.max(), place)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return found


@functools.cache
def place_of(layout: str) -> Place:
    """This rank's, which meets the others at the first call."""
    return choose_place(config_of({}, layout))


def trained(layout: str, names: list[str], steps: int) -> dict[str, list[Step]]:
    """On a rank: variant -> its steps."""
    found = {}
    for name in names:
        config = config_of(VARIANTS[name], layout)
        place = dataclasses.replace(place_of(layout), compile=bool(config.train.compile))
        Block.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
        logits, model_file.LOSS_LOGITS = model_file.LOSS_LOGITS, VARIANTS[name].get(
            "logits", model_file.LOSS_LOGITS)
        found[name] = together(config, place, steps)
        model_file.LOSS_LOGITS = logits
        torch._dynamo.reset()
        gc.collect()  # compiled blocks hold themselves
    return found


# ---- how far apart -------------------------------------------------------------------------------

def apart(one: float, other: float) -> float:
    """Relative to the other; infinite for what is no number."""
    return abs(one - other) / other if math.isfinite(one) and other > 0 else math.inf


def differences(ranks: list[list[Step]], should: list[Step]) -> dict[str, float]:
    """The largest relative differences of what any rank saw: of loss, norm and parameters' norms.
    Every parameter has to be on some rank."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for step, right in enumerate(should):
        for one in (rank[step] for rank in ranks):
            for kind in ("loss", "norm"):
                worst[kind] = max(worst[kind], apart(one[kind], right[kind]))
            for name, norm in one["grads"].items():
                worst["grads"] = max(worst["grads"], apart(norm, right["grads"].get(name, 0.0)))
        if {name for rank in ranks for name in rank[step]["grads"]} != right["grads"].keys():
            worst["grads"] = math.inf
    return worst


def equal(worst: dict[str, float]) -> bool:
    return all(worst[kind] <= bound for kind, bound in BOUNDS.items())


def compare(layout: str, names: list[str], steps: int) -> dict[str, dict[str, float]]:
    """Variant -> how far a layout is from one process."""
    ranks = spread(world_of(layout), trained, layout, names, steps, patience=3600.0)
    return {name: differences([rank[name] for rank in ranks], reference(name, steps))
            for name in names}


@functools.cache
def reference(name: str, steps: int) -> list[Step]:
    return alone(VARIANTS[name], steps)


def chosen(text: str, all_of_them: typing.Iterable[str]) -> list[str]:
    names = text.split(",")
    if odd := [name for name in names if name not in all_of_them]:
        raise Stop(USAGE, f"{', '.join(odd)}: there are {', '.join(all_of_them)}")
    return names


def main(argv: list[str]) -> None:
    words, given = split_words(argv, typing.get_type_hints(ParityOptions))
    options = fill([ParityOptions], given)[0]
    if words:
        raise Stop(USAGE, f"expected --key=value alone, got {' '.join(words)!r}")
    names, wrong = chosen(options.variants, VARIANTS), []
    for layout in options.layouts.split(","):  # what cannot be is said before all that takes time
        for name in names:
            config_of(VARIANTS[name], layout)
    say(f"variants: {', '.join(names)}; {options.steps} steps of each")
    say(f"{'layout':<15} ranks  {'loss':>8} {'norm':>8} {'grads':>8}        seconds  of variants")
    for layout in options.layouts.split(","):
        began, n = time.monotonic(), world_of(layout)
        found = compare(layout, names, options.steps)
        bad = [name for name, worst in found.items() if not equal(worst)]
        largest = [max(worst[kind] for worst in found.values()) for kind in BOUNDS]
        say(f"{layout:<15} {n:>5}  {' '.join(f'{one:8.1e}' for one in largest)}  "
            f"{'NOT' if bad else 'ok ':<4} {time.monotonic() - began:8.1f}  {len(names):>11}")
        for name in bad:
            say(f"    {name}: " + ", ".join(f"{k} {v:.1e}" for k, v in found[name].items()))
            wrong.append(f"{layout} {name}")
    if wrong:
        raise Stop(1, f"not as one process: {'; '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [ParityOptions]))
