"""Where a run computes: its process among the others, device, types, and what is said if it fails.

    place = choose_place(config)                 # alone, or under torchrun
    everyone = exchange([loss, norm], place)     # (ranks, 2): what each rank has

Reads the variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""

import datetime
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from configs import ENVIRONMENT, Config, Stop
from model import Transformer, choose_device

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = datetime.timedelta(minutes=30)  # for a rank that others wait for, as while it saves
LAUNCH = "torchrun --nproc_per_node=2 train.py configs/demo.py"


@dataclass(frozen=True)
class Place:
    """This process among the others, and what it computes with."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: bool


def read_ranks() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK, WORLD_SIZE; 0, 0, 1 for a process alone. Raises Stop(ENVIRONMENT)."""
    there = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not there.keys() & set(VARIABLES[:3]):  # some clusters set an address for every job
        return 0, 0, 1
    if missing := [name for name in VARIABLES if name not in there]:
        raise Stop(ENVIRONMENT, f"{', '.join(there)} is set, but {', '.join(missing)} is not: "
                   f"start with torchrun, which sets all of them ({LAUNCH}), or unset all")
    odd = [f"{name}={there[name]}" for name in VARIABLES if name != "MASTER_ADDR"
           and not there[name].isdecimal()]
    if not odd:
        rank, local, world, port = (int(there[n]) for n in VARIABLES if n != "MASTER_ADDR")
        odd = ([f"RANK={rank} of WORLD_SIZE={world}"] * (rank >= world)
               + [f"MASTER_PORT={port}"] * (not 0 < port < 2**16))
    if odd:
        raise Stop(ENVIRONMENT, f"{', '.join(odd)} cannot be: start with torchrun, which sets "
                   f"{', '.join(VARIABLES)} ({LAUNCH})")
    return rank, local, world


def choose_place(config: Config) -> Place:
    """Device and type by what is there; under torchrun, the process group too. Raises Stop."""
    want, (rank, local, world) = config.train, read_ranks()
    kind = choose_device(want.device).type
    if kind == "cuda" and local >= torch.cuda.device_count():
        raise Stop(ENVIRONMENT, f"LOCAL_RANK={local}, but there are {torch.cuda.device_count()} "
                   "GPUs here: give torchrun --nproc_per_node as many")
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
        join(device, rank, world)
    return Place(rank, world, device, torch.bfloat16 if bf16 else torch.float32,
                 kind == "cuda" if want.compile is None else want.compile)


def join(device: torch.device, rank: int, world: int) -> None:
    """Meet the other ranks. Raises Stop(ENVIRONMENT) if they cannot be met."""
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE,
                                device_id=device if device.type == "cuda" else None)
    except (dist.DistError, dist.DistStoreError, RuntimeError) as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0]
        raise Stop(ENVIRONMENT, f"rank {rank} of WORLD_SIZE={world} did not meet the others at "
                   f"MASTER_ADDR:MASTER_PORT = {at} ({first}): is the port taken, are all "
                   f"{world} started? Another port: torchrun --master_port=29501 ...") from error


def exchange(numbers: Sequence[torch.Tensor | float], place: Place) -> np.ndarray:
    """(ranks, n) float64: these n numbers of every rank. The CPU waits here for the device."""
    mine = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=place.device)
                        for x in numbers])
    everyone = [torch.empty_like(mine) for _ in range(place.world)]
    if place.world > 1:
        dist.all_gather(everyone, mine)
    return torch.stack(everyone if place.world > 1 else [mine]).cpu().double().numpy()


def total(values: torch.Tensor, place: Place) -> torch.Tensor:
    """The sum of a small tensor over all ranks."""
    if place.world > 1:
        values = values.to(place.device)
        dist.all_reduce(values)
    return values


def random_states(place: Place) -> dict[str, torch.Tensor]:
    """The state of torch's generators on every rank, uint8, by name."""
    mine = {"cpu": torch.get_rng_state()}
    if place.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(place.device)
    found = {}
    for kind, state in mine.items():
        everyone = [torch.empty_like(state, device=place.device) for _ in range(place.world)]
        if place.world > 1:
            dist.all_gather(everyone, state.to(place.device))
        found |= {f"{kind}.{rank}": one.cpu() for rank, one in
                  enumerate(everyone if place.world > 1 else [state])}
    return found


def set_random_states(states: dict[str, torch.Tensor], place: Place) -> None:
    """Put back what random_states gave; a rank that was not there keeps the state it has."""
    if f"cpu.{place.rank}" in states:
        torch.set_rng_state(states[f"cpu.{place.rank}"])
    if place.device.type == "cuda" and f"cuda.{place.rank}" in states:
        torch.cuda.set_rng_state(states[f"cuda.{place.rank}"], place.device)


@dataclass
class Clock:
    """Where the time of a step goes.

    On CUDA the laps are marks in the device's own queue: a lap of the CPU's clock would time how
    fast work is handed over.
    """
    device: torch.device
    marks: list = field(default_factory=list)

    def start(self) -> None:
        """What was done until now is nobody's."""
        self.marks = []
        self.lap("")

    def lap(self, name: str) -> None:
        """What was done since the lap before is `name`."""
        if self.device.type == "cuda":
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))

    def read(self) -> dict[str, float]:
        """Seconds of each name since the start."""
        spent = {}
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        for (_, before), (name, mark) in zip(self.marks, self.marks[1:], strict=False):
            seconds = (before.elapsed_time(mark) / 1000 if self.device.type == "cuda"
                       else mark - before)
            spent[name] = spent.get(name, 0.0) + seconds
        return spent


def explain(error: RuntimeError, config: Config, place: Place, step: int) -> Stop | None:
    """The line a user can act on, for what machines do to a run; None for bugs of ours."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
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
        return Stop(ENVIRONMENT, f"torch.compile failed ({text.splitlines()[0]}); it needs a C++ "
                    "compiler: install one or give --compile=false")
    if place.world > 1 and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        reason = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).split(". ")[0]
        return Stop(ENVIRONMENT, f"rank {place.rank} lost the others after step {step} "
                    f"({reason}): one of them ended, its own last line says why; the "
                    "same command goes on from the last checkpoint")
    return None
