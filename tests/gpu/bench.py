"""Speed: full optimizer steps of Amber-7B and of a 1.1B model, a step being Amber's share of a GPU.

    bash tests/gpu/run.sh bench                         # on a CUDA device, within nine minutes
    bash tests/gpu/run.sh bench --only='chip|amber-7b'  # one model, in a file of its own
    bash tests/gpu/run.sh bench --tiny --device=cpu     # the same code at toy sizes

A step is 10 rows of 2,048 tokens in micro-batches: forward, backward, clipping, fused AdamW on fp32
masters, by train.py's own functions; bf16 autocast, or with "fsdp" FSDP2 over this one GPU, which
casts weights to bf16 once a block. `tok_per_s` is of the median of the steps after two, of which
the first compiles (`first_s`). `mfu` counts model.py's flops_per_token over the data sheet's peak;
`of_matmul` the same over the rate of a large bf16 product on this very device. `memory_gb` is the
allocator's peak in 10^9 bytes, `plan_gb` what nano360/scale/plan.py expects. Amber-7B wants 12,458
tokens/s on an H100 or H200: 55 % with the embedding counted, an `mfu` of 54. The best published for
one such GPU is 57.8 %, an 8B model at 4,096 tokens (KempnerForge, H200). Weights are noise, see
steps.py.

Every configuration has a process of its own: what one leaves behind, compiled code that holds its
blocks, a heap in pieces, a fault of the device, is nothing to the next; 108 GB of 150 are weights,
gradients and moments of a 7B, so pieces count. For the same reason memory is taken in segments that
can grow (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True); the best is timed without, too, as
train.py leaves it to its user. Out of memory is a row, and what needs more is not tried.

Reads configs/amber_7b.py; writes what rows.py says. Exit code 1 if a configuration broke, or if
Amber-7B was timed and is below its target.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rows import Options, Part, begin, config_of  # finds the repository
from steps import Sharded, Steps, alone

from model import flops_per_token, peak_flops
from nano360.config import Config, run
from nano360.layout import Layout
from nano360.place import Place
from nano360.scale.plan import memory

AMBER, SMALLER = "amber-7b", "llama-1.1b"
MODELS = {  # keys on top of configs/amber_7b.py
    AMBER: {},
    SMALLER: dict(n_layer=22, n_embd=2048, n_inner=5632, n_head=32, n_kv_head=4),  # TinyLlama's
}
TINY = dict(n_layer=2, n_embd=64, n_inner=172, n_head=4, vocab_size=512, seq_len=64)
ROWS = 10  # of a step, as each of Amber's 224 GPUs had
TARGET = 12_458  # tokens/s of Amber-7B: 0.55 x 989e12 / 43.66e9, the embedding counted
MODES = ("none", "selective", "full")  # of recompute: each keeps less memory than the one before
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
SPENT = 75  # seconds of a model's first row, a guess: start, build, compile, seven steps


@dataclass(frozen=True)
class Setup:
    """One configuration."""
    model: str
    recompute: str
    micro: int
    compile: bool = True
    fsdp: bool = False
    segments: bool = True

    @property
    def name(self) -> str:
        return (f"{self.model}, {self.micro} x {ROWS // self.micro}, recompute {self.recompute}"
                + ", eager" * (not self.compile) + ", fsdp" * self.fsdp
                + ", fixed segments" * (not self.segments))


# The likeliest of each model first. Of 150 GB an H200 has 42 beside Amber's 108. By plan.py
# blocks keep 9 GB of a row of 2,048 tokens with no recompute, 7 with selective, 1 with full; with
# none also 13 GB of bf16 weights. More rows at a time are fewer casts of 27 GB of weights, and
# recompute is up to a third more work.
FIRST = [Setup(AMBER, "none", 2), Setup(AMBER, "selective", 2), Setup(AMBER, "full", 10),
         Setup(AMBER, "selective", 5), Setup(SMALLER, "none", 10), Setup(SMALLER, "none", 5)]
REST = [Setup(model, mode, micro) for model, micros in ((AMBER, (5, 1, 2, 10)),
                                                        (SMALLER, (10, 5, 2, 1)))
        for micro in micros for mode in MODES]


# ---- in the process of one configuration ---------------------------------------------------------

def config_for(setup: Setup, tiny: bool) -> Config:
    keys = MODELS[setup.model] | (TINY if tiny else {})
    return config_of("configs/amber_7b.py", keys | dict(
        batch_size=ROWS, micro_batch_size=setup.micro, recompute=setup.recompute))


def measure(setup: Setup, device: torch.device, tiny: bool) -> dict:
    """The row of one configuration."""
    config = config_for(setup, tiny)
    if not setup.fsdp:
        place = Place(0, 1, device, torch.bfloat16, setup.compile)
        return timed(config, place, setup)
    with alone(device) as mesh:
        return timed(config, Sharded(0, 1, device, torch.bfloat16, setup.compile, mesh), setup)


def timed(config: Config, place: Place, setup: Setup) -> dict:
    began = time.perf_counter()
    steps, device = Steps(config, place), place.device
    built = time.perf_counter() - began
    first, second = steps.take()[0], steps.take()[0]
    if device.type == "cuda":  # the compiler has tried kernels, on copies
        torch.cuda.reset_peak_memory_stats(device)
    n = 3 if device.type == "cpu" else 5 if second > 1 else 10
    times = [steps.take() for _ in range(n)]
    tokens = ROWS * config.model.seq_len
    took = statistics.median(seconds for seconds, _ in times)
    flops, peak = tokens / took * flops_per_token(config.model), peak_flops(device)
    row = {"ok": math.isfinite(steps.loss) and math.isfinite(steps.norm),
           "tok_per_s": tokens / took, "mfu": flops / peak if peak else None, "flops": flops,
           "step_s": took, "slowest_s": max(seconds for seconds, _ in times), "steps": n,
           **{f"{part}_s": seconds for part, seconds in times[-1][1].items()},
           "first_s": first, "build_s": built, "loss": steps.loss}
    if device.type == "cuda":
        row |= {"memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
                "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9}
    return row


def chip(device: torch.device, tiny: bool) -> dict:
    """What the device itself can do: bf16 products of noise (zeros are faster), and a copy."""
    def median_of(work: Callable[[], object], n: int) -> float:
        times = []
        for i in range(n + 3):  # three to warm up
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times += [time.perf_counter() - began] * (i >= 3)
        return statistics.median(times)
    shapes = [(256, 256, 256)] if tiny else [(8192, 8192, 8192), (20480, 4096, 11008),
                                             (4096, 4096, 11008)]
    rates = {}
    for m, k, n in shapes:
        a, b = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((m, k), (k, n)))
        seconds = median_of(lambda a=a, b=b: a @ b, 20)
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / seconds
    a = torch.randn(2**16 if tiny else 2**30, device=device)
    b = torch.empty_like(a)
    moved = 2 * a.nbytes / median_of(lambda: b.copy_(a), 10)
    return {"flops": max(rates.values()), "bytes_per_s": moved, "said": ", ".join(
        f"{shape}: {rate / 1e12:.0f} TFLOP/s" for shape, rate in rates.items())}


def out_of_memory(error: Exception) -> bool:
    """Compilers wrap what the allocator raises while they try kernels."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def one(words: dict) -> None:
    """Print the row of a configuration, or of the chip, as json."""
    device = torch.device(words["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        row = (measure(Setup(**words["setup"]), device, words["tiny"]) if words["setup"] else
               chip(device, words["tiny"]))
    except Exception as error:
        if not out_of_memory(error):
            raise
        row = {"status": "out of memory", "said": str(error).splitlines()[0][:120]}
    print("\n" + json.dumps(row), flush=True)


# ---- in the first process, which asks the device for its name and allocates nothing --------------

def in_a_process(part: Part, setup: Setup | None) -> dict:
    """The row that a process of its own prints."""
    words = {"setup": setup and dataclasses.asdict(setup), "tiny": part.options.tiny,
             "device": str(part.device)}
    env = os.environ | (SEGMENTS if not setup or setup.segments else {})
    if setup and not setup.segments:
        env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), json.dumps(words)],
                          stdout=subprocess.PIPE, text=True, env=env,
                          timeout=max(1, part.left()))
    if done.returncode:
        raise RuntimeError(f"its process ended with {done.returncode}; its last words are above")
    return json.loads(done.stdout.splitlines()[-1])


def hopeless(setup: Setup, failed: list[Setup]) -> Setup | None:
    """One that was out of memory and keeps no more than this: fewer rows, as much recompute."""
    return next((f for f in failed if f.model == setup.model and f.micro <= setup.micro
                 and MODES.index(f.recompute) >= MODES.index(setup.recompute)
                 and f.compile == setup.compile and f.fsdp == setup.fsdp), None)


def try_all(part: Part, setups: list[Setup], done: dict[Setup, dict], chip_rate: float) -> None:
    """A row for each that was not done yet."""
    for setup in setups:
        if setup in done:
            continue
        failed = [s for s, row in done.items() if row.get("status") == "out of memory"]
        if more := hopeless(setup, failed):
            part.add({"row": setup.name, "status": "not tried", "said": f"{more.name} ran out"})
            continue

        def work(setup: Setup = setup) -> dict:
            row = in_a_process(part, setup)
            if chip_rate and "flops" in row:
                row["of_matmul"] = row["flops"] / chip_rate
            if not setup.fsdp:  # which the plan knows of more ranks than one only
                config = config_for(setup, part.options.tiny)
                bill = memory(config, Layout(1, 1, 1, 1, 1, 1), True, setup.compile)
                row["plan_gb"] = sum(bill.values()) / 1e9
            return row
        took = [row["seconds"] for s, row in done.items() if s.model == setup.model
                and "tok_per_s" in row]
        done[setup] = part.row(setup.name, work, max(took, default=SPENT))


def best_of(done: dict[Setup, dict], model: str) -> Setup | None:
    speeds = {s: row["tok_per_s"] for s, row in done.items()
              if s.model == model and "tok_per_s" in row}
    return max(speeds, key=speeds.get, default=None)


def verdict(part: Part, done: dict[Setup, dict]) -> None:
    """Mark the best rows, and hold Amber's against its target."""
    for model in MODELS:
        if not (best := best_of(done, model)):
            continue
        done[best]["best"] = "best"
        row = {"row": f"{model}, best", "tok_per_s": done[best]["tok_per_s"],
               "mfu": done[best]["mfu"], "said": best.name}
        if model != AMBER or part.options.tiny:
            part.add(row | {"status": "told"})
        else:
            reached = row["tok_per_s"] >= TARGET
            part.add(row | {"status": "ok" if reached else "FAILED",
                            "wanted": f"{TARGET:,} tok/s, 55 % of an H100's or H200's peak with "
                            "the embedding counted"})


def main(argv: list[str]) -> None:
    if argv and argv[0].startswith("{"):
        return one(json.loads(argv[0]))
    part, done = begin("bench", argv), {}
    found = part.row("chip", lambda: in_a_process(part, None), 30)
    rate = found.get("flops", 0.0)
    dry = [Setup(AMBER, "none", 5, compile=False), Setup(SMALLER, "full", 5, compile=False)]
    try_all(part, dry if part.options.tiny else FIRST, done, rate)
    for model in MODELS:  # of the best so far: what compile, FSDP2 and the allocator change
        if best := best_of(done, model):
            ways = (dict(fsdp=True), dict(compile=False), dict(segments=False))
            ways = ways[:1] if part.options.tiny else ways
            try_all(part, [dataclasses.replace(best, **way) for way in ways], done, rate)
    if not part.options.tiny:
        try_all(part, REST, done, rate)
    verdict(part, done)
    part.end()


if __name__ == "__main__":
    sys.exit(run(main, __doc__, [Options]))
