"""Stage 2: chunks -> checkpoints. The loop: order, batches, optimizer, metrics, and a way back in.

    python train.py configs/demo.py                                # one process: CPU, CUDA or MPS
    python train.py configs/demo.py --lr=1e-3 --run=demo_lr1e-3    # any key, in another folder
    torchrun --nproc_per_node=8 train.py configs/amber_7b.py       # the same loop on eight GPUs

A run is a queue of visits. Visit v trains chunk queue[v] in an order that depends on nothing but
(seed, epoch, chunk), ends in checkpoint v, and can be named, verified and trained again. The same
command goes on where the run stopped. Reads data/<dataset>/; writes out/<run>/:

    run.json         every knob, every launch (command line, code, versions, hardware), data hash
    metrics.jsonl    a line per optimizer step, and per visit a line for each held-out source
    ckpt_000/ ...    one per visit: a Hugging Face folder + optimizer/ + state.json; whole or absent
    last/            the same, where max_steps ended the run inside a visit
"""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from configs import (CHECKPOINT, DATA, ENVIRONMENT, NUMERICAL, SECTIONS, USAGE, Config, OptimConfig,
                     Stop, from_json, git_state, load, read_sealed, run, say, sha256_file, sync,
                     to_json, verify, write_atomic, write_sealed)
from extras.tokenizer_json import tokenizer_files
from extras.tokenizers import Tokenizer, load_tokenizer
from model import (Transformer, choose_device, flops_per_token, hardware, init_weights,
                   param_groups, peak_flops, peak_memory)
from prepare import chunk_name, open_rows, permutation, read_manifest, valid_name

FORMAT = 1  # of a checkpoint's state.json


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
    """The queue of a run, in numbers. step s >= 1 is the s-th batch of the queue."""
    n_chunks: int
    epochs: int
    steps_per_visit: int  # rows that fill no last batch are left out
    last: int  # last step of the queue
    stop: int  # last step of this run: max_steps or `last`

    def visit_of(self, step: int) -> int:
        return (step - 1) // self.steps_per_visit

    def chunk_of(self, visit: int) -> int:
        return visit % self.n_chunks


def make_plan(config: Config, manifest: dict) -> Plan:
    per_visit = manifest["rows_per_chunk"] // config.optim.batch_size
    last = per_visit * config.data.n_chunks * config.optim.epochs
    stop = min(last, config.optim.max_steps or last)
    return Plan(config.data.n_chunks, config.optim.epochs, per_visit, last, stop)


def batches(config: Config, plan: Plan, manifest: dict, folder: Path, first: int
            ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(step, row numbers (B,), rows (B, seq_len + 1)) of every global batch from `first` on."""
    if first > plan.stop:
        return
    B = config.optim.batch_size

    def open_visit(visit: int) -> np.ndarray:
        return open_rows(folder, manifest, chunk_name(plan.chunk_of(visit)))

    visits = range(plan.visit_of(first), plan.visit_of(plan.stop) + 1)
    with ThreadPoolExecutor(1) as ahead:  # the next chunk is opened, so hashed, while one trains
        opening = ahead.submit(open_visit, visits[0])
        for visit in visits:
            rows = opening.result()
            if visit + 1 in visits:
                opening = ahead.submit(open_visit, visit + 1)
            epoch, chunk = divmod(visit, plan.n_chunks)
            order = permutation(len(rows), config.data.seed, epoch, chunk)
            for b in range(plan.steps_per_visit):
                step, batch = visit * plan.steps_per_visit + b + 1, order[b * B:(b + 1) * B]
                if first <= step <= plan.stop:
                    yield step, batch, rows[batch]


# ---- where it runs -------------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """This process among the others, and what it computes with."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: bool


def choose_place(config: Config) -> Place:
    """Device and type by what is there; under torchrun, the process group too. Raises Stop."""
    want = config.train
    kind = choose_device(want.device).type
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    # bfloat16 pays where the matrix units know it; torch names the CPU's only by these two
    fast = {"cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "cuda": kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": False}[kind]
    if want.dtype == "bfloat16" and not fast and kind != "cpu":  # a CPU is slow at it, but can
        raise Stop(ENVIRONMENT, f"dtype=bfloat16 is not supported by this {kind} device; give "
                   "--dtype=float32")
    bf16 = want.dtype == "bfloat16" or (want.dtype == "auto" and fast)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo",
                                device_id=device if kind == "cuda" else None,
                                timeout=datetime.timedelta(minutes=30))
    return Place(rank, world, device, torch.bfloat16 if bf16 else torch.float32,
                 kind == "cuda" if want.compile is None else want.compile)


def check(config: Config, manifest: dict, place: Place) -> None:
    """What the config says against the data and the machine. Raises Stop with every error."""
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
    unit = place.world * min(o.micro_batch_size or 1, max(1, o.batch_size // place.world))
    if o.batch_size % unit:
        near = sorted({max(unit, o.batch_size // unit * unit), (o.batch_size // unit + 1) * unit})
        raise Stop(USAGE, f"batch_size = {o.batch_size} rows do not divide into {place.world} "
                   f"ranks x micro-batches of {unit // place.world}; nearest that do: "
                   f"{' or '.join(map(str, near))}")


# ---- checkpoints ---------------------------------------------------------------------------------

def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, updates: int) -> None:
    """Put the moments back; every parameter has taken the same number of updates."""
    verify(folder, below="optimizer")
    tensors = load_file(folder / "optimizer" / "adamw.safetensors")
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            optimizer.state[p] = {
                "step": torch.tensor(float(updates), device=p.device),  # where fused wants it
                **{kind: tensors.pop(f"{kind}.{name}").to(p.device)
                   for kind in ("exp_avg", "exp_avg_sq")}}
    assert not tensors, f"nobody claims {sorted(tensors)}"


def save(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer, state: dict,
         tokenizer: Tokenizer) -> None:
    """Write a checkpoint under another name, hash it, wait for the disk, rename it."""
    part = Path(f"{folder}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed save left
    model.save_pretrained(part, bos=None, eos=tokenizer.eos)  # rows have no BOS
    for name, content in tokenizer_files(tokenizer).items():
        (part / name).write_bytes(content)
    (part / "optimizer").mkdir()
    save_file({f"{kind}.{name}": optimizer.state[p][kind].detach().cpu().contiguous()
               for group in optimizer.param_groups
               for name, p in zip(group["names"], group["params"], strict=True)
               for kind in ("exp_avg", "exp_avg_sq")}, part / "optimizer" / "adamw.safetensors")
    files = sorted(path for path in part.rglob("*") if path.is_file())
    state = state | {"files": {p.relative_to(part).as_posix(): sha256_file(p) for p in files}}
    for path in (*files, part / "optimizer"):
        sync(path)
    write_sealed(part / "state.json", state)
    if folder.exists():  # only last/, which its successor replaces
        shutil.rmtree(f"{folder}.old", ignore_errors=True)
        folder.rename(f"{folder}.old")
    part.rename(folder)
    sync(folder.parent)
    shutil.rmtree(f"{folder}.old", ignore_errors=True)


def newest(out: Path, config: Config, manifest: dict) -> tuple[Path, dict] | None:
    """The checkpoint of a run with the most steps, and its state. Raises Stop(CHECKPOINT)."""
    states = [(path, read_sealed(path / "state.json", CHECKPOINT))
              for path in [*out.glob("ckpt_*[0-9]"), out / "last.old", out / "last"]
              if path.is_dir()]
    mine = {"format": FORMAT, "data_hash": manifest["data_hash"], "seed": config.data.seed}
    for path, state in states:
        names = ("last", "last.old", f"ckpt_{state['visit']:03d}")
        wrong = [k for k in mine if state.get(k) != mine[k]] + ["name"] * (path.name not in names)
        if wrong:
            raise Stop(CHECKPOINT, f"{path} is none of this run: its {', '.join(wrong)} differs; "
                       f"move it out of {out} or give --run=NAME")
    return max(states, key=lambda one: one[1]["step"], default=None)


# ---- the run's folder ----------------------------------------------------------------------------

def portable(value: object) -> object:
    """Absolute paths cut down to their names: a run's folder is publishable as it is."""
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    if isinstance(value, str):
        key, equals, word = value.partition("=") if value.startswith("--") else ("", "", value)
        return key + equals + Path(word).name if Path(word).is_absolute() else value
    return value


def read_run(config: Config, manifest: dict, out: Path) -> dict:
    """The run.json of a run's folder, or a new one. Raises Stop if it is another run's."""
    path, mine = out / "run.json", portable(to_json(config))
    # What the rows were made from is what their manifest says, whatever the run file says now.
    made = manifest["recipe"]
    mine["data"] |= {k: made[k] for k in made.keys() & mine["data"].keys() - {"seed", "sources"}}
    licences = {one["origin"]: one["licence"] for one in manifest["sources"]}
    mine["data"]["sources"] = [{"path": one["origin"], "licence": licences[one["origin"]]} | {
        k: v for k, v in one.items() if k not in ("origin", "revision")} for one in made["sources"]]
    if not path.is_file():
        return {"config": mine, "data_hash": manifest["data_hash"], "parent": None, "launches": []}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        from_json(record["config"])
    except (ValueError, KeyError, TypeError, AttributeError, Stop) as error:
        raise Stop(CHECKPOINT, f"{path} is broken ({error}); mend it or give --run=NAME") from error
    free = {f.name: f.metadata["free"] for c in SECTIONS.values() for f in dataclasses.fields(c)}
    was, now = ({k: v for section in sections.values() for k, v in section.items()}
                for sections in (record["config"], mine))
    if differ := [k for k in now if was.get(k) != now[k] and not free[k]]:
        rows = "\n".join(f"  {k:<18} {was.get(k)!s:<24} {now[k]!s}" for k in differ)
        raise Stop(USAGE, f"{out} is another run: give --run=NAME for a new one\n"
                   f"  {'key':<18} {'the run has':<24} now\n{rows}")
    if record["data_hash"] != manifest["data_hash"]:
        raise Stop(DATA, f"data/{config.data.dataset} is not what {out} was trained on: data hash "
                   f"{manifest['data_hash']}, the run has {record['data_hash']}; give --run=NAME")
    return record | {"config": mine}


def write_run(record: dict, out: Path, place: Place, argv: list[str], step: int) -> None:
    """Add this launch to run.json; the first write of a run, so it shows that it can write."""
    # what changes the order of additions, and so the last bits
    exact = {"world": place.world, "hardware": hardware(place.device), "compile": place.compile,
             "dtype": str(place.dtype).removeprefix("torch."), "torch": torch.__version__,
             "micro_batch_size": record["config"]["optim"]["micro_batch_size"]}
    for k, was in record["launches"][-1]["exact"].items() if record["launches"] else ():
        if was != exact[k]:
            say(f"{k} was {was}, is {exact[k]}: no longer bit-exact")
    record["launches"].append({
        "from_step": step, "command": portable(argv), "git": git_state(), "exact": exact,
        "versions": {"python": platform.python_version(), "numpy": np.__version__}})
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "run.json", json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise Stop(CHECKPOINT, f"cannot write to {out}: {error.strerror}; checkpoints need a "
                   "folder there: free the name or give --run=NAME") from error


def truncate_metrics(path: Path, step: int) -> None:
    """Forget the lines after a step, and a last line that a kill cut short."""
    path.touch()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise Stop(CHECKPOINT, f"{path} holds a line that is none of ours: {error!r}; mend it or "
                   "move it away") from error
    write_atomic(path, "".join(kept))


def is_validated(out: Path, manifest: dict, step: int) -> bool:
    """Whether the held-out lines of a step were logged; a kill may come between save and them."""
    path = out / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return f'"kind": "valid", "step": {step},' in text or not any(
        source["valid_rows"] for source in manifest["sources"])


def log(path: Path, place: Place, lines: list[dict]) -> None:
    """Append lines to metrics.jsonl in one write, from one rank; a killed run keeps them."""
    if place.rank == 0 and lines:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


# ---- the loop ------------------------------------------------------------------------------------

def total(values: torch.Tensor, place: Place) -> torch.Tensor:
    """The sum of a small tensor over all ranks."""
    if place.world > 1:
        values = values.to(place.device)
        dist.all_reduce(values)
    return values


def loss_of(model: torch.nn.Module, rows: np.ndarray, place: Place) -> torch.Tensor:
    """The mean loss of rows (n, seq_len + 1): every id but the first is a target."""
    ids = torch.from_numpy(rows.astype(np.int64)).to(place.device, non_blocking=True)
    with torch.autocast(place.device.type, torch.bfloat16, place.dtype == torch.bfloat16):
        return model(ids[:, :-1], ids[:, 1:])


@torch.no_grad()
def validate(model: Transformer, place: Place, manifest: dict, folder: Path, sizes: np.ndarray,
             micro: int) -> Iterator[dict]:
    """Loss and bits per byte of each source's held-out rows, in fixed order, over all ranks."""
    for source in (one for one in manifest["sources"] if one["valid_rows"]):
        rows = open_rows(folder, manifest, valid_name(source["name"]))[place.rank::place.world]
        nats, targets = 0.0, rows[:, 1:]
        for at in range(0, len(rows), micro):
            loss = loss_of(model, rows[at:at + micro], place)
            nats += loss.item() * targets[at:at + micro].size
        sums = torch.tensor([nats, targets.size, sizes[targets].sum()], dtype=torch.float64)
        nats, tokens, n_bytes = total(sums, place).tolist()
        # Bits per byte is a sum over a sum, so that it does not depend on the tokenizer.
        yield {"source": source["name"], "loss": nats / tokens,
               "bits_per_byte": nats / math.log(2) / n_bytes,
               "tokens": int(tokens), "bytes": int(n_bytes)}


def forward_backward(model: torch.nn.Module, rows: np.ndarray, micro: int, place: Place
                     ) -> torch.Tensor:
    """Gradients of the mean loss over this rank's rows, in micro-batches; returns that mean."""
    n = len(rows) // micro
    mean = torch.zeros((), device=place.device)
    for i in range(n):
        if place.world > 1:  # ranks need to exchange gradients only after the last micro-batch
            model.require_backward_grad_sync = i == n - 1
        # Gradients add up over micro-batches, and a sum of means is not a mean: divide here.
        loss = loss_of(model, rows[i * micro:(i + 1) * micro], place) / n
        loss.backward()
        mean += loss.detach()
    return mean


def start(config: Config, place: Place, resume: tuple[Path, dict] | None
          ) -> tuple[Transformer, torch.optim.Optimizer, dict]:
    """The model, the optimizer and the state of step 0, or of a checkpoint."""
    if resume:
        folder, state = resume
        model = Transformer.from_pretrained(folder, place.device)
        plain = config.model.n_kv_head == config.model.n_head  # which folders do not spell out
        if model.config != (dataclasses.replace(config.model, n_kv_head=None) if plain
                            else config.model):
            raise Stop(CHECKPOINT, f"{folder} holds another model than this run's: move it away")
    else:
        state = {"step": 0, "tokens": 0, "parent": None}
        model = Transformer(config.model)
        init_weights(model, config.data.seed)
        model.to(place.device)
    o = config.optim
    optimizer = torch.optim.AdamW(param_groups(model, o.weight_decay), lr=o.lr, eps=o.eps,
                                  betas=(o.beta1, o.beta2), fused=True)
    if resume:
        load_optimizer(optimizer, folder, state["updates"])
        state["parent"] = sha256_file(folder / "state.json")
    return model, optimizer, state


def explain(error: RuntimeError, config: Config, place: Place) -> Stop | None:
    """The line a user can act on, for what goes wrong in a first step; None for bugs of ours."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        with torch.device("meta"):
            n = sum(p.numel() for p in Transformer(config.model).parameters())
        n_rank = config.optim.batch_size // place.world
        micro = min(config.optim.micro_batch_size or n_rank, n_rank)
        less = next((m for m in range(micro // 2, 0, -1) if n_rank % m == 0), None)
        return Stop(ENVIRONMENT, f"out of memory: {n:,} parameters take {16 * n / 1e9:.2f} GB with "
                    f"gradients and AdamW, the rest is for micro-batches of {micro} rows of "
                    f"{config.model.seq_len}; " + (
                        f"give --micro_batch_size={less}, which leaves the batch as it is" if less
                        else "this needs a smaller model or a larger device"))
    if place.compile and any(kind.__module__.startswith(("torch._inductor", "torch._dynamo"))
                             for kind in type(error).__mro__):
        first = str(error).strip().splitlines()[0]
        return Stop(ENVIRONMENT, f"torch.compile failed ({first}); it needs a C++ compiler: "
                    "install one or give --compile=false")
    return None


def train(config: Config, manifest: dict, place: Place, plan: Plan, out: Path,
          model: Transformer, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Train from the step the state is at to the last one of the plan."""
    folder = Path("data") / config.data.dataset
    tokenizer = load_tokenizer(folder, manifest["tokenizer"]["sha256"])
    n_rank = config.optim.batch_size // place.world  # rows of a batch on this rank
    micro = min(config.optim.micro_batch_size or n_rank, n_rank)
    n_params = sum(p.numel() for p in model.parameters())
    flops, peak = flops_per_token(config.model), peak_flops(place.device)
    sizes = tokenizer.piece_bytes()  # every target is one of its ids
    left_out = manifest["rows_per_chunk"] - plan.steps_per_visit * config.optim.batch_size
    say(f"{n_params / 1e6:.2f}M parameters, {hardware(place.device)} x {place.world}, "
        f"{str(place.dtype).removeprefix('torch.')}; {plan.steps_per_visit} steps a chunk "
        f"({left_out} rows left out), {plan.last} in all")

    if place.compile:  # each block, in place: names stay, and compile time does not grow with depth
        for block in model.model["layers"]:
            block.compile()
    runner = model
    if place.world > 1:
        runner = DistributedDataParallel(
            model, gradient_as_bucket_view=True,
            device_ids=[place.device] if place.device.type == "cuda" else None)

    metrics = out / "metrics.jsonl"

    def report(step: int) -> None:  # the held-out rows of every source
        lines = [{"kind": "valid", "step": step, "visit": plan.visit_of(step), **line}
                 for line in validate(model, place, manifest, folder, sizes, micro)]
        log(metrics, place, lines)
        for line in lines:
            say(f"  valid {line['source']:<12} loss {line['loss']:.4f}  "
                f"{line['bits_per_byte']:.4f} bits per byte")

    first = state["step"] + 1
    if state["step"] and not is_validated(out, manifest, state["step"]):
        report(state["step"])
    began = done = time.perf_counter()
    for step, numbers, rows in batches(config, plan, manifest, folder, first):
        read = time.perf_counter()
        lr = lr_at(step, config.optim, plan.last)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        mine = rows[place.rank * n_rank:(place.rank + 1) * n_rank]
        loss = forward_backward(runner, mine, micro, place)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        # .item() makes the CPU wait for the device; once a step, for both numbers
        loss_now, norm_now = torch.stack((total(loss, place) / place.world, norm)).tolist()
        if not (math.isfinite(loss_now) and math.isfinite(norm_now)):
            raise Stop(NUMERICAL, f"step {step}: loss {loss_now}, gradient norm {norm_now}; the "
                       f"step was not taken, the last checkpoint stays; lr is {lr:g}: try a "
                       "smaller --lr or more --warmup_steps")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["tokens"] += numbers.size * config.model.seq_len

        now, visit = time.perf_counter(), plan.visit_of(step)
        speed = numbers.size * config.model.seq_len / (now - done)
        log(metrics, place, [{
            "kind": "train", "step": step, "visit": visit, "chunk": plan.chunk_of(visit),
            "tokens": state["tokens"], "loss": loss_now, "lr": lr, "grad_norm": norm_now,
            "rows": hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16],
            "tok_per_s": speed, "mfu": peak and speed * flops / (peak * place.world),
            "memory": peak_memory(place.device), "time_data": read - done,
            "time_step": now - read}])
        if step % config.train.log_every == 0 or step in (first, plan.stop):
            left = (plan.stop - step) * (now - began) / (step - first + 1)
            say(f"step {step:>{len(str(plan.stop))}}/{plan.stop}  chunk {plan.chunk_of(visit):03d}"
                f"  loss {loss_now:.4f}  lr {lr:.2e}  norm {norm_now:.2f}  {speed:,.0f} tok/s"
                f"  {datetime.timedelta(seconds=round(left))} left")

        whole = step % plan.steps_per_visit == 0
        if whole or step == plan.stop:
            state |= {"step": step, "updates": step, "visit": visit}
            path = out / (f"ckpt_{visit:03d}" if whole else "last")
            if place.rank == 0:
                content = ledger(config, plan, manifest, place, optimizer, state)
                save(path, model, optimizer, content, tokenizer)
                state["parent"] = sha256_file(path / "state.json")
                if whole:
                    shutil.rmtree(out / "last", ignore_errors=True)  # its successor is whole
            say(f"  saved {path}")
            report(step)
        done = time.perf_counter()


def ledger(config: Config, plan: Plan, manifest: dict, place: Place,
           optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """What state.json says: where the run stands, what it came from, what it was trained with."""
    visit = state["visit"]
    queue = [plan.chunk_of(v) for v in range(plan.n_chunks * plan.epochs)]
    return {
        "format": FORMAT, "visit": visit, "chunk": queue[visit], "epoch": visit // plan.n_chunks,
        "step": state["step"], "updates": state["updates"], "tokens": state["tokens"],
        "queue": queue, "consumed": queue[:state["step"] // plan.steps_per_visit],
        "dtypes": {"weights": "float32", "optimizer": "float32",
                   "compute": str(place.dtype).removeprefix("torch.")},
        "parent": state["parent"], "data_hash": manifest["data_hash"], "seed": config.data.seed,
        "param_groups": [{k: group[k] for k in ("names", "lr_mult", "weight_decay", "betas", "eps")}
                         for group in optimizer.param_groups]}


def main(argv: list[str]) -> None:
    config, _ = load(argv)
    manifest = read_manifest(Path("data") / config.data.dataset)
    out = Path("out") / config.train.run
    record = read_run(config, manifest, out)
    place = choose_place(config)
    check(config, manifest, place)
    plan = make_plan(config, manifest)
    resume = newest(out, config, manifest)
    step = resume[1]["step"] if resume else 0
    if step >= plan.stop and is_validated(out, manifest, step):
        say(f"{out} is finished: {resume[0]} holds step {step}, asked for were {plan.stop}")
        return
    if resume:
        say(f"going on from {resume[0]}, step {step} of {plan.stop}")
    try:
        model, optimizer, state = start(config, place, resume)
        if place.rank == 0:  # only now: what is on disk changes after the checkpoint was verified
            write_run(record, out, place, argv, step)
            truncate_metrics(out / "metrics.jsonl", step)
        if place.world > 1:
            dist.barrier()
        train(config, manifest, place, plan, out, model, optimizer, state)
    except RuntimeError as error:
        if stop := explain(error, config, place):
            raise stop from error
        raise
    inside = " and last/, inside a visit" if (out / "last").is_dir() else ""
    say(f"finished: {out} has {len(list(out.glob('ckpt_*[0-9]')))} checkpoints{inside}")
    if place.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, list(SECTIONS.values())))
