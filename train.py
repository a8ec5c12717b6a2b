"""Stage 2: chunks -> checkpoints. The loop: order, batches, optimizer, metrics, and a way back in.

    python train.py configs/demo.py                                # one process: CPU, CUDA or MPS
    python train.py configs/demo.py --lr=1e-3 --run=demo_lr1e-3    # any key, in another folder
    python train.py configs/amber_7b.py --plan --world_size=224    # what it would cost, on paper
    torchrun --nproc_per_node=8 train.py configs/amber_7b.py       # the same loop on eight GPUs

A run is a queue of visits. Visit v trains chunk queue[v] in an order that depends on nothing but
(seed, epoch, chunk), ends in checkpoint v, and can be named, verified and trained again: to the
same bits on the same kind of CPU, with the same torch, threads, processes and layout. The same
command goes on where the run stopped. Reads data/<dataset>/; writes out/<run>/:

    run.json         every knob, every launch (command line, code, versions, hardware), data hash,
                     parent, and the queue: which chunks were deferred, and which dropped
    metrics.jsonl    a line per optimizer step, and per visit a line for each held-out source
    incidents.jsonl  steps that were not taken, and their rows; spikes; restarts
    ckpt_000/ ...    one per visit: a Hugging Face folder + optimizer/ + state.json; whole or absent
    last/            the same inside a visit: every ten minutes, at a signal, and at max_steps
"""

import contextlib
import datetime
import gc
import hashlib
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel

from model import (IGNORE, Block, Transformer, flops_per_token, hardware, init_weights,
                   param_groups, parameters, peak_flops, peak_memory)
from nano360.checkpoints import (FORMAT, MASTER, Saver, check_shape, check_space, checkpoints_of,
                                 discard, found, load_optimizer, sweep, thin)
from nano360.config import (CHECKPOINT, DATA, NUMERICAL, SECTIONS, USAGE, Config, OptimConfig, Stop,
                            key, load, run, say)
from nano360.files import locked, sha256_file
from nano360.hf_folders import verify
from nano360.layout import rows_of
from nano360.place import (Clock, Place, Watch, choose_place, clip, exchange, explain, listening,
                           random_states, set_random_states, total)
from nano360.records import (QUEUE, SPIKE, WINDOW, exact_facts, failed, is_validated, judge,
                             metrics_hash, open_journal, parent_of, read_run, recent_losses,
                             save_run, spike, truncate_metrics, without, write_run)
from nano360.rows import (chunk_name, open_rows, permutation, read_manifest, read_tokenizer_files,
                          valid_name)

Runner = Callable[..., torch.Tensor]  # what the loop calls: the model, or what it is wrapped in


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    plan: bool = key("print what the run will need, and end", False)
    world_size: int | None = key("GPUs of the plan, in all; none: one node", None, low=1)
    gpu: Literal["a100-40", "a100-80", "h100-80", "h200-141", "b200-192"] = key(
        "GPU of the plan", "h100-80")
    gpus_per_node: int = key("GPUs of a node of the plan", 8, low=1)
    mfu: float | None = key("share of the GPUs' peak that the plan counts on; none: a table", None,
                            above=0, high=1)


# ---- order: which rows, when ---------------------------------------------------------------------

def lr_at(step: int, optim: OptimConfig, last: int) -> float:
    """The learning rate of step 1, 2, ...: a pure function, the same after any restart.

    1) It rises in a line, lr / warmup_steps at step 1 and lr at step warmup_steps. (Released
       amber-train trains its first step with rate 0; this is its line one step earlier.)
    2) It falls to min_lr at decay_steps, which is the queue's last step unless given.
    3) It stays there.
    """
    end = optim.decay_steps or last
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if step >= end:
        return optim.min_lr
    done = (step - optim.warmup_steps) / (end - optim.warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if optim.schedule == "cosine" else 1 - done
    return optim.min_lr + (optim.lr - optim.min_lr) * left


@dataclass(frozen=True)
class Plan:
    """The queue of a run, and its numbers. step s >= 1 is the s-th batch of the queue."""
    queue: list[list[int]]  # [epoch, chunk] of every visit
    steps_per_visit: int  # rows that fill no last batch are left out
    last: int  # last step of the queue as it was planned: where the schedule ends
    stop: int  # last step of this run: max_steps, or the end of the queue

    def visit_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_visit


def make_plan(config: Config, manifest: dict, queue: list[list[int]] | None = None) -> Plan:
    """The plan of a run, with the queue it has by now; none: all chunks, epoch after epoch."""
    whole = [[e, c] for e in range(config.optim.epochs) for c in range(config.data.n_chunks)]
    per_visit = manifest["rows_per_chunk"] // config.optim.batch_size
    queue = whole if queue is None else queue
    end = per_visit * len(queue)
    return Plan(queue, per_visit, per_visit * len(whole), min(end, config.optim.max_steps or end))


def batches(config: Config, plan: Plan, manifest: dict, folder: Path, first: int,
            heard: Sequence[int] = ()) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(step, row numbers (B,), rows (B, seq_len + 1)) of every global batch from `first` on."""
    if first > plan.stop:
        return
    B, left = config.optim.batch_size, []

    def open_visit(visit: int) -> np.ndarray:  # may wait for prepare.py, but not for ever
        return open_rows(folder, manifest, chunk_name(plan.queue[visit][1]),
                         lambda: max(heard, default=0) or len(left))

    visits = range(plan.visit_of(first), plan.visit_of(plan.stop) + 1)
    with ThreadPoolExecutor(1) as ahead:  # the next chunk is opened, so hashed, while one trains
        try:
            opening = ahead.submit(open_visit, visits[0])
            for visit in visits:
                rows = opening.result()
                if visit + 1 in visits:
                    opening = ahead.submit(open_visit, visit + 1)
                epoch, chunk = plan.queue[visit]
                order = permutation(len(rows), config.data.seed, epoch, chunk)
                for b in range(plan.steps_per_visit):
                    step, batch = visit * plan.steps_per_visit + b + 1, order[b * B:(b + 1) * B]
                    if first <= step <= plan.stop:
                        yield step, batch, rows[batch]
        finally:
            left.append(1)


# ---- before the first step -----------------------------------------------------------------------

def check(config: Config, manifest: dict) -> None:
    """What the config says against the data. Raises Stop with every error."""
    m, d, o, errors = config.model, config.data, config.optim, []
    ids = manifest["tokenizer"]["vocab_size"]
    # Rounding the embedding up to a multiple of 128 is the custom; more is another tokenizer.
    if not ids <= m.vocab_size < ids + 128:
        errors.append(f"vocab_size is {m.vocab_size}, the data's tokenizer has {ids} ids: prepare "
                      f"with the model's tokenizer or give --vocab_size={ids}")
    sha = manifest["tokenizer"]["sha256"]
    if d.tokenizer_sha256 not in ("", sha, manifest["recipe"]["tokenizer"]):  # made of, or with
        errors.append(f"the data's tokenizer has sha256 {sha}, the config names "
                      f"{d.tokenizer_sha256}: prepare with the config's tokenizer")
    for name, value in (("seq_len", m.seq_len), ("n_chunks", d.n_chunks)):
        if manifest[name] != value:
            errors.append(f"{name} is {value}, the data has {manifest[name]}: prepare again or "
                          f"give --{name}={manifest[name]}")
    if errors:
        raise Stop(DATA, "\n".join(f"data/{d.dataset}: {error}" for error in errors))
    last = make_plan(config, manifest).last
    if o.decay_steps is None and o.warmup_steps >= last > 0:
        raise Stop(USAGE, f"warmup_steps = {o.warmup_steps}, but the whole queue has {last} steps: "
                   f"give --warmup_steps={last // 10}, or --decay_steps=N beyond the warm-up")
    if manifest["rows_per_chunk"] < o.batch_size:
        raise Stop(DATA, f"data/{d.dataset}: a chunk has {manifest['rows_per_chunk']} rows, fewer "
                   f"than one batch of {o.batch_size}: give a smaller --batch_size or more data")


def blocks_of(module: torch.nn.Module) -> list[Block]:
    return [one for one in module.modules() if isinstance(one, Block)]


def shard(module: torch.nn.Module, place: Place) -> None:
    """FSDP2: of every weight, gradient and moment a rank keeps its shard. A block is gathered, in
    bfloat16, when it is its turn; gradients are averaged in fp32, and stay where their shard is."""
    dims = ("dp_replicate", "dp_shard") if place.size("dp_replicate") > 1 else ("dp_shard",)
    options = dict(
        mesh=place.mesh[dims],  # two: shards within a group of ranks, copies across groups
        mp_policy=MixedPrecisionPolicy(
            param_dtype=None if place.dtype == torch.float32 else place.dtype,
            reduce_dtype=torch.float32, cast_forward_inputs=False),  # rotary tables stay fp32
        # A pipeline needs the blocks again for the next micro-batch: gather them once a step.
        reshard_after_forward=place.size("pp") == 1)
    for block in blocks_of(module):
        fully_shard(block, **options)
    fully_shard(module, **options | {"reshard_after_forward": False})  # embedding, norm, head


def parallelize(model: Transformer, place: Place, config: Config) -> Runner:
    """From a model on no device to what the loop calls in its place. The order is the lesson.

    The weights have memory after it, and anything in it: they are yet to be drawn or loaded.
    """
    stages: list = [model]
    # 1. Only this rank's blocks, and its part of each matrix: what follows sees nothing else.
    if place.size("tp", "pp") > 1:
        from nano360.scale.parallel import Pipeline, split
        stages = split(model, place, config)
    # 2. What is computed again, inside of what is compiled; then 3. each block, in place: names
    # stay as they are, and compile time does not grow with depth.
    for block in blocks_of(model):
        block.recompute = config.train.recompute
        if place.compile:
            block.compile()
    # 4. Shards of what the others have left of a weight; what gathers them is not compiled.
    for stage in stages if place.sharded else ():
        shard(stage, place)
    # 5. Memory, and only for what this rank keeps.
    for stage in stages:
        stage.to_empty(device=place.device)
        stage.set_tables()
    # 6. What calls it: the schedule of a pipeline, or DDP, whose buckets of gradients need memory.
    if place.size("pp") > 1:
        return Pipeline(stages, model, place, config)
    if place.sharded or place.world == 1:
        return stages[0]
    runner = DistributedDataParallel(
        model, gradient_as_bucket_view=True, init_sync=False,  # all ranks draw the same weights
        device_ids=[place.device] if place.device.type == "cuda" else None)
    runner.broadcast_buffers = False  # all compute the same tables; as an argument it is deprecated
    return runner


def start(config: Config, place: Place, plan: Plan, resume: tuple[Path, dict] | None,
          parent: dict | None) -> tuple[Transformer, Runner, torch.optim.Optimizer, dict]:
    """The model, what runs it, the optimizer and the state of a checkpoint, or of step 0, perhaps
    with a parent. A checkpoint to resume was verified when it was found.

    The state is what a run is besides weights and moments: its step; updates, the steps that were
    taken, which AdamW counts; tokens; the steps that were skipped; the queue; and the sha256 of the
    state.json of the checkpoint before the next one, its parent (of init_from, of its weights).
    """
    o, folder = config.optim, Path(config.train.init_from) if config.train.init_from else None
    state = {"step": 0, "updates": 0, "tokens": 0, "skipped": [], "parent": None,
             "queue": plan.queue, "deferred": [], "dropped": []}
    if resume:
        folder, state = resume[0], {k: resume[1][k] for k in state}
    if folder:
        check_shape(folder, config.model)
    if parent:
        verify(folder)
    with torch.device("meta"):  # the shapes; no rank ever holds the whole, unless it keeps it
        model = Transformer(config.model)
    runner = parallelize(model, place, config)
    if folder:
        model.load_weights(folder)
    else:
        init_weights(model, config.data.seed)
    optimizer = torch.optim.AdamW(param_groups(model, o.weight_decay), lr=o.lr, eps=o.eps,
                                  betas=(o.beta1, o.beta2), fused=True)
    torch.manual_seed(config.data.seed + place.rank)  # nothing here draws; what a fork adds may
    if resume:
        load_optimizer(optimizer, folder, state["updates"])
        set_random_states(load_file(folder / "optimizer" / "random.safetensors"), place)
        if folder.name.startswith("ckpt"):  # else it is the parent of last/, too
            state["parent"] = sha256_file(folder / "state.json")
    elif parent:
        state["parent"] = parent["sha256"]
        if config.train.init_optimizer:
            load_optimizer(optimizer, folder, parent["updates"], verified=False)
            state["updates"] = parent["updates"]
    return model, runner, optimizer, state


# ---- one step ------------------------------------------------------------------------------------

def loss_of(runner: Runner, rows: np.ndarray, place: Place) -> torch.Tensor:
    """The summed loss (n,) of each of rows (n, seq_len + 1): every id but the first is a target,
    and rows of IGNORE have none."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(place.device, non_blocking=True)
    # Where weights are sharded they are gathered in bfloat16, and so is all that they touch, the
    # residual stream too, which autocast keeps in fp32.
    cast = place.dtype == torch.bfloat16 and not place.sharded
    with torch.autocast(place.device.type, torch.bfloat16, cast):
        return runner(ids[:, :-1].clamp(min=0), ids[:, 1:], per_row=True)


def look(runner: Runner, rows: np.ndarray, lot: int, place: Place) -> np.ndarray:
    """The summed loss (n,) of each of this rank's rows, `lot` of them at a time."""
    if isinstance(runner, DistributedDataParallel):  # nothing is to be exchanged
        runner = runner.module
    lots = [loss_of(runner, rows[i:i + lot], place) for i in range(0, len(rows), lot)]
    if isinstance(runner, FSDPModule):  # else embedding and head stay gathered, and in bfloat16,
        runner.reshard()  # until a backward pass, which does not follow
    return torch.cat(lots).cpu().double().numpy()


@contextlib.contextmanager
def aside(model: Transformer, place: Place) -> Iterator[None]:
    """For a look at the model that training must not notice: a fork's dropout is off, and whatever
    is drawn leaves the random state as it was."""
    model.eval()
    with torch.random.fork_rng([place.device] if place.device.type == "cuda" else []):
        yield
    model.train()


@torch.no_grad()
def validate(model: Transformer, runner: Runner, place: Place, manifest: dict, folder: Path,
             sizes: np.ndarray, lot: int) -> Iterator[dict]:
    """Loss and bits per byte of each source's held-out rows, in fixed order, over all ranks."""
    for source in (one for one in manifest["sources"] if one["valid_rows"]):
        rows = open_rows(folder, manifest, valid_name(source["name"]))
        mine = rows[place.dp_rank::place.dp_world].astype(np.int64)
        # All ranks look at as many: each has to be there when sharded weights are gathered.
        more = np.full((-(-len(rows) // place.dp_world) - len(mine), rows.shape[1]), IGNORE)
        with aside(model, place):
            nats = look(runner, np.concatenate([mine, more]), lot, place).sum()
        targets = mine[:, 1:]
        sums = torch.tensor([nats, targets.size, sizes[targets].sum()], dtype=torch.float64)
        nats, tokens, n_bytes = total(sums, place).tolist()
        # Bits per byte is a sum over a sum, so that it does not depend on the tokenizer.
        yield {"source": source["name"], "loss": nats / tokens,
               "bits_per_byte": nats / math.log(2) / n_bytes,
               "tokens": int(tokens), "bytes": int(n_bytes)}


def forward_backward(runner: Runner, rows: np.ndarray, micro: int, place: Place,
                     clock: Clock) -> torch.Tensor:
    """Gradients of the mean loss over this rank's rows, in micro-batches; returns that mean.

    Ranks have as many targets each, all of a row's ids but the first: so the mean of their means,
    and of their gradients, is that of the batch.
    """
    if place.size("pp") > 1:  # micro-batches are what fills a pipeline: its schedule is this loop
        ids = torch.from_numpy(rows.astype(np.int64)).to(place.device)
        mean = runner.forward_backward(ids[:, :-1], ids[:, 1:])
        clock.lap("backward")
        return mean
    mean = torch.zeros((), device=place.device)
    for at in range(0, len(rows), micro):
        # Copies of a gradient are averaged only after the last micro-batch. Shards are after each:
        # to wait is to keep all of the gradients, which are not for one rank to hold.
        last = at + micro >= len(rows)
        if isinstance(runner, DistributedDataParallel):
            runner.require_backward_grad_sync = last
        elif isinstance(runner, FSDPModule):
            runner.set_requires_all_reduce(last)
        # Gradients add up over micro-batches, and a sum of means is not a mean: divide by all.
        loss = loss_of(runner, rows[at:at + micro], place).sum() / rows[:, 1:].size
        clock.lap("forward")
        loss.backward()
        mean += loss.detach()
        clock.lap("backward")
    return mean


def norm_of(model: Transformer, place: Place) -> torch.Tensor:
    """The global norm of all gradients."""
    if place.size("tp", "pp") > 1:
        from nano360.scale.parallel import global_norm
        return global_norm(model, place)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of the shards of all ranks


@torch.no_grad()
def suspects(model: Transformer, runner: Runner, mine: np.ndarray, lot: int, place: Place
             ) -> np.ndarray:
    """(B,) bool over the global batch: rows whose own loss is no number.

    All of them where none is: then it is the gradient that overflows.
    """
    with aside(model, place):
        odd = ~np.isfinite(look(runner, mine, lot, place))
    found = exchange(odd.tolist(), place)[place.speakers].astype(bool).ravel()
    return found if found.any() else np.full(len(found), True)


# ---- the loop ------------------------------------------------------------------------------------

def train(config: Config, manifest: dict, place: Place, plan: Plan, out: Path, record: dict,
          model: Transformer, runner: Runner, optimizer: torch.optim.Optimizer, state: dict,
          heard: Sequence[int] = (), validating: bool = True) -> dict | None:
    """Train from the step the state is at to the last one of the plan.

    Returns None, or the queue without a chunk that failed: the caller goes back to the checkpoint
    before its visit, and on with that queue.
    """
    folder = Path("data") / config.data.dataset
    tokenizer = read_tokenizer_files(folder, manifest)
    n_rank, micro = rows_of(config, place.dp_world)  # rows of a batch here, and at a time
    lot = n_rank if place.size("pp") > 1 else micro  # rows look() takes: a pipeline's are fixed
    n_params = parameters(config.model)
    flops, peak = flops_per_token(config.model), peak_flops(place.device)
    left_out = manifest["rows_per_chunk"] - plan.steps_per_visit * config.optim.batch_size
    say(f"{n_params / 1e6:.2f}M parameters, {hardware(place.device)} x {place.world}"
        f"{'' if peak else ' (its peak is not known: no mfu)'}, "
        f"{str(place.dtype).removeprefix('torch.')}; {plan.steps_per_visit} steps a chunk "
        f"({left_out} rows left out), {plan.steps_per_visit * len(plan.queue)} in all")
    journal = open_journal(config, record, out, place, state["step"] + 1)

    def report(step: int) -> None:  # the held-out rows of every source
        if not validating:
            return
        lines = [{"kind": "valid", "step": step, "visit": plan.visit_of(step), **line}
                 for line in validate(model, runner, place, manifest, folder, tokenizer.piece_bytes,
                                  lot)]
        journal.metrics(lines)
        for line in lines:
            say(f"  valid {line['source']:<12} loss {line['loss']:.4f}  "
                f"{line['bits_per_byte']:.4f} bits per byte")

    first, clock = state["step"] + 1, Clock(place.device)
    recent = deque(recent_losses(out / "metrics.jsonl", WINDOW), WINDOW)
    with contextlib.ExitStack() as stack:
        stack.callback(journal.close)
        saver = stack.enter_context(Saver(out, config.model, tokenizer, state["parent"],
                                          config.train.keep_optimizer, place))
        watch = stack.enter_context(Watch(config.train.timeout, place))
        if place.size("tp") > 1:  # ids are cut over ranks: so is the softmax, forward and backward
            stack.enter_context(loss_parallel())
        if state["step"] and (state["step"] % plan.steps_per_visit == 0 or first > plan.stop) and (
                not is_validated(out, manifest, state["step"])):
            report(state["step"])  # a kill came between the checkpoint and these lines
        began = saved = time.monotonic()
        clock.start()
        for step, numbers, rows in batches(config, plan, manifest, folder, first, heard):
            clock.lap("data")
            watch.step(step)
            visit, tokens = plan.visit_of(step), numbers.size * config.model.seq_len
            epoch, chunk = plan.queue[visit]
            where = {"step": step, "visit": visit, "epoch": epoch, "chunk": chunk}
            lr = lr_at(step, config.optim, plan.last)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_mult"]
            mine = rows[place.dp_rank * n_rank:(place.dp_rank + 1) * n_rank]
            loss = forward_backward(runner, mine, micro, place, clock)
            norm = norm_of(model, place)
            late = (time.monotonic() - saved > 60 * (config.train.save_minutes or math.inf)
                    and not saver.busy())
            # Once a step all ranks learn what each has: whether the step is taken, whether one was
            # told to stop, whether it is time to save (by the clock of rank 0) are one decision.
            losses, norms, signals, lates = exchange(
                (loss, norm, max(heard, default=0), late), place).T
            losses = losses[place.speakers]
            loss_now, norm_now, told = losses.mean(), norms.max(), int(signals.max())
            taken = math.isfinite(loss_now) and math.isfinite(norm_now)
            if step in state["skipped"]:  # analyze.py replay knows what the run left out
                taken = False
            elif not taken:
                action = judge(config, state, step, visit)
                bad = numbers[suspects(model, runner, mine, lot, place)].tolist()
                failed(journal, where, action, lr, place, losses, norms, bad)
                if action != "skip":
                    return without(state, visit, action)
                state["skipped"].append(step)
            if taken:
                clip(model, config.optim.grad_clip, norm_now, place)
                optimizer.step()
                state["updates"], state["tokens"] = state["updates"] + 1, state["tokens"] + tokens
                if (z := spike(recent, loss_now)) > SPIKE:
                    journal.incident("spike", where | {"loss": float(loss_now), "deviations": z,
                                                       "rows": numbers.tolist()})
                    say(f"step {step}: loss {loss_now:.4f} is a spike, {z:.1f} deviations high")
                recent.append(float(loss_now))
            optimizer.zero_grad(set_to_none=True)
            state["step"] = step
            clock.lap("optimizer")

            whole = step % plan.steps_per_visit == 0
            due = (whole or step == plan.stop or told or lates[0]
                   or step % (config.train.save_steps or step + 1) == 0)
            name = f"ckpt_{visit:03d}" if whole else "last"
            if due:
                random, saved = random_states(place), time.monotonic()
                saver.take(name, model, optimizer, random)
            clock.lap("save")
            spent = clock.read()
            speed = tokens / (sum(spent.values()) - spent["save"])
            journal.metrics([{
                "kind": "train", "step": step, "visit": visit, "chunk": chunk,
                "tokens": state["tokens"], "loss": float(loss_now) if taken else None, "lr": lr,
                "grad_norm": float(norm_now) if taken else None,
                "rows": hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16],
                "tok_per_s": speed, "mfu": peak and speed * flops / (peak * place.world),
                "memory": peak_memory(place.device),
                **{f"time_{part}": seconds for part, seconds in spent.items()}}])
            if step % config.train.log_every == 0 or step in (first, plan.stop):
                left = (plan.stop - step) * (time.monotonic() - began) / (step - first + 1)
                say(f"step {step:>{len(str(plan.stop))}}/{plan.stop}  chunk {chunk:03d}"
                    f"  loss {loss_now:.4f}  lr {lr:.2e}  norm {norm_now:.2f}  {speed:,.0f} tok/s"
                    f"  {datetime.timedelta(seconds=round(left))} left")
            if due:  # its line is in metrics.jsonl by now
                saver.save(name, ledger(plan, manifest, place, optimizer, state, config, out))
            else:
                saver.check()
            if told and step < plan.stop:
                saver.wait()
                exchange([0], place)  # where one rank has ended, torchrun ends the others
                raise Stop(128 + told, f"{signal.Signals(told).name} came: {out / name} holds step "
                           f"{step}, the same command goes on from there")
            if whole or step == plan.stop:
                report(step)
            watch.step(None)
            clock.start()
    return None


def tidy(out: Path, step: int, plan: Plan, validated: bool) -> None:
    """Remove from a run's folder what kills have left and what is no longer true."""
    sweep(out)
    if step == plan.stop and step % plan.steps_per_visit == 0:  # its successor is whole
        discard(out / "last")
    truncate_metrics(out / "metrics.jsonl", step, plan.steps_per_visit, validated)


def ledger(plan: Plan, manifest: dict, place: Place, optimizer: torch.optim.Optimizer, state: dict,
           config: Config, out: Path) -> dict:
    """What state.json says: where the run stands, what it came from, what it was trained with."""
    visit = plan.visit_of(state["step"])
    epoch, chunk = plan.queue[visit]
    # replay --verify holds chunk and lines to these. Read again: the chunk may be newer than ours.
    files = read_manifest(Path("data") / config.data.dataset)["files"]
    return state | {
        "chunk_sha256": files[chunk_name(chunk)]["sha256"],
        "metrics_sha256": metrics_hash(out / "metrics.jsonl", visit, plan.steps_per_visit),
        "format": FORMAT, "visit": visit, "chunk": chunk, "epoch": epoch,
        "skipped": list(state["skipped"]),  # the loop goes on with its own
        "consumed": plan.queue[:state["step"] // plan.steps_per_visit],
        "dtypes": {"weights": MASTER, "optimizer": MASTER,
                   "compute": str(place.dtype).removeprefix("torch.")},
        "data_hash": manifest["data_hash"], "seed": config.data.seed,
        "param_groups": [{k: group[k] for k in ("names", "lr_mult", "weight_decay", "betas", "eps")}
                         for group in optimizer.param_groups]}


def go(config: Config, manifest: dict, place: Place, out: Path, argv: list[str],
       heard: Sequence[int]) -> None:
    """Train from where the run's folder stands, and again from there when a chunk was put off."""
    record, launched, state = read_run(config, manifest, out), False, {"step": 0}
    check(config, manifest)
    facts = {"data_hash": manifest["data_hash"], "seed": config.data.seed}
    try:
        while True:
            resume = found(out, facts, place)
            step, saved = (resume[1]["step"], resume[1]) if resume else (0, {})
            plan = make_plan(config, manifest, record.get("queue", saved.get("queue")))
            if not plan.queue:
                if place.rank == 0:
                    tidy(out, step, plan, False)
                raise Stop(NUMERICAL, f"{out}: every chunk was dropped; try a smaller --lr")
            validated = is_validated(out, manifest, step)
            finished = bool(resume) and step >= plan.stop and validated
            if finished:
                say(f"{out} is finished: {resume[0]} holds step {step}, asked for were {plan.stop}")
                if place.rank == 0:
                    tidy(out, step, plan, True)
                    thin(out, plan.visit_of(step), config.train.keep_optimizer)
                break
            if resume:
                say(f"going on from {resume[0]}, step {step} of {plan.stop}")
            parent = None if resume else parent_of(config)
            if parent and record["parent"] not in (None, parent):
                raise Stop(CHECKPOINT, f"{parent['checkpoint']} is not what {out} began with: its "
                           f"weights have sha256 {parent['sha256']}; give --run=NAME")
            model, runner, optimizer, state = start(config, place, plan, resume, parent)
            state |= {k: record[k] for k in QUEUE if k in record}  # it is newer than a checkpoint
            record |= {k: state[k] for k in QUEUE} | ({"parent": parent} if parent else {})
            if place.rank == 0:  # only now: what is on disk changes after all was verified
                if not launched:
                    check_space(out, config.model, -(-(plan.stop - step) // plan.steps_per_visit))
                    write_run(record, out, exact_facts(config, place), argv, step, resume)
                tidy(out, step, plan, validated and step % plan.steps_per_visit == 0)
            launched = True
            exchange([0], place)  # all wait for what rank 0 has written
            new_queue = train(config, manifest, place, plan, out, record, model, runner, optimizer,
                              state, heard)
            if new_queue is None:
                exchange([0], place)  # none leaves before the last save is on the disk
                break
            record |= new_queue
            if place.rank == 0:
                for name in ("last", "last.old"):  # of the visit that failed; first, so that a
                    discard(out / name)            # kill finds no rest of it under the new queue
                save_run(record, out)
            del model, runner, optimizer
            gc.collect()  # compiled blocks hold themselves; both models may not fit
            exchange([0], place)
    except RuntimeError as error:
        if stop := explain(error, config, place, state["step"]):
            raise stop from error
        raise
    inside = " and last/, inside a visit" if (out / "last").is_dir() else ""
    lost = "".join(f"; chunk {c} of epoch {e} was dropped" for e, c in record["dropped"])
    say(f"finished: {out} has {len(checkpoints_of(out))} checkpoints{inside}{lost}")


def main(argv: list[str]) -> None:
    config, options = load(argv, PlanOptions)
    if options.plan:
        from nano360.scale.plan import print_plan
        print_plan(config, options.world_size or options.gpus_per_node, options.gpu,
                   options.gpus_per_node, options.mfu)
        return
    manifest = read_manifest(Path("data") / config.data.dataset)
    out, place = Path("out") / config.train.run, choose_place(config)
    with locked(out) if place.rank == 0 else contextlib.nullcontext(), listening() as heard:
        go(config, manifest, place, out, argv, heard)
    if place.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [*SECTIONS.values(), PlanOptions]))
