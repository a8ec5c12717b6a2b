"""Where a run computes: its process among the others, device, types, and what is said if it fails.

    place = choose_place(config)                 # alone, or under torchrun
    everyone = exchange([loss, norm], place)     # (ranks, 2): what each rank has

Reads the variables that torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; and
LOCAL_WORLD_SIZE, the ranks of a node, if it is there.
"""

import contextlib
import datetime
import logging
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from model import Transformer, choose_device, parameters
from nano360.config import ENVIRONMENT, Config, Stop
from nano360.layout import choose_layout, rows_of

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DIMS = ("pp", "dp_replicate", "dp_shard", "tp")  # of the mesh; neighbours talk most, so tp is last
GRACE = 1.0  # seconds in which a second signal is the first one's echo: torchrun passes them on
LAUNCH = "torchrun --nproc_per_node=2 train.py configs/demo.py"


@dataclass(frozen=True)
class Place:
    """This process among the others, and what it computes with."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    mesh: DeviceMesh | None = None  # (pp, dp_replicate, dp_shard, tp); none: a process alone
    patience: datetime.timedelta = datetime.timedelta(minutes=30)  # of what waits for other ranks

    def size(self, *dims: str) -> int:
        """How many ranks lie along these dimensions of the mesh."""
        return math.prod(self.mesh[dim].size() for dim in dims) if self.mesh is not None else 1

    def at(self, dim: str) -> int:
        """This rank's place along a dimension."""
        return self.mesh.get_local_rank(dim) if self.mesh is not None else 0

    @property
    def sharded(self) -> bool:
        """Whether weights are in parts: FSDP2, and so under every layout that is not DDP alone."""
        return self.size("dp_shard", "tp", "pp") > 1

    @property
    def dp_world(self) -> int:
        """How many ranks, or groups of them, have rows of their own."""
        return self.size("dp_replicate", "dp_shard")

    @property
    def dp_rank(self) -> int:
        """Which share of a batch this rank has."""
        return self.at("dp_replicate") * self.size("dp_shard") + self.at("dp_shard")

    @property
    def speakers(self) -> list[int]:
        """The ranks whose loss counts, one for each share of a batch: in the last stage, the first
        of those that share matrices."""
        return [0] if self.mesh is None else self.mesh.mesh[-1, :, :, 0].flatten().tolist()


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


def device_of(wanted: str, local: int) -> torch.device:
    """The device of a process, the local-th of its machine. Raises Stop(ENVIRONMENT)."""
    device = choose_device(wanted)
    if device.type != "cuda":
        return device
    if local >= torch.cuda.device_count():
        raise Stop(ENVIRONMENT, f"LOCAL_RANK={local}, but there are {torch.cuda.device_count()} "
                   "GPUs here: give torchrun --nproc_per_node as many")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def choose_place(config: Config) -> Place:
    """Device, type and layout by what is there; under torchrun, the process group and mesh too.

    Raises Stop: USAGE for a layout that cannot be, ENVIRONMENT for what this machine lacks.
    """
    want, (rank, local, world) = config.train, read_ranks()
    device = device_of(want.device, local)
    kind = device.type
    # bfloat16 pays where the matrix units know it; torch names the CPU's only by these two
    fast = {"cpu": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "cuda": kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": False}[kind]
    if want.dtype == "bfloat16" and not fast and kind != "cpu":  # a CPU is slow at it, but can
        raise Stop(ENVIRONMENT, f"dtype=bfloat16 is not supported by this {kind} device; give "
                   "--dtype=float32")
    bf16 = want.dtype == "bfloat16" or (want.dtype == "auto" and fast)
    compiled = kind == "cuda" if want.compile is None else want.compile
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    per_node, memory = int(here) if here.isdecimal() else world, 0  # a CPU's is nobody's own
    if kind == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    choose_layout(config, world, per_node, None)  # errors come before a meeting
    # The watch of train.py speaks first, with rank and step; this is for what it cannot end.
    patience = datetime.timedelta(minutes=want.timeout, seconds=5)
    if world > 1:
        join(device, rank, world, patience)
        least = torch.tensor([per_node, memory], device=device)  # nodes need not be alike, and all
        dist.all_reduce(least, dist.ReduceOp.MIN)  # ranks have to come to the same layout
        per_node, memory = least.tolist()
    layout = choose_layout(config, world, per_node, memory or None)
    if memory:
        from nano360.scale.plan import check_fits
        check_fits(config, layout, memory, bf16, compiled, slack=1.2)  # as the plan may be wrong
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=DIMS) if world > 1 else None
    for dim in DIMS if mesh is not None else ():  # else these groups have torch's own, 10 minutes
        _set_pg_timeout(patience, mesh.get_group(dim))  # for NCCL, and would end before the watch
    return Place(rank, world, device, torch.bfloat16 if bf16 else torch.float32, compiled, mesh,
                 patience)


def join(device: torch.device, rank: int, world: int, patience: datetime.timedelta) -> None:
    """Meet the other ranks. Raises Stop(ENVIRONMENT) if they cannot be met."""
    if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1") and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: nobody else may connect
    if rank:  # warnings of torch: rank 0's are everyone's
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience,
                                device_id=device if device.type == "cuda" else None)
    except (dist.DistError, dist.DistStoreError, RuntimeError) as error:
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first = str(error).strip().splitlines()[0]
        raise Stop(ENVIRONMENT, f"rank {rank} of WORLD_SIZE={world} did not meet the others at "
                   f"MASTER_ADDR:MASTER_PORT = {at} ({first}): is the port taken, are all "
                   f"{world} started? Another port: torchrun --master_port=29501 ...") from error


def meet(device: str, dtype: str) -> Place:
    """For those who read checkpoints: alone, or under torchrun, where each rank has the whole model
    and a share of what is asked. Raises Stop(ENVIRONMENT)."""
    rank, local, world = read_ranks()
    where = device_of(device, local)
    if world > 1:
        join(where, rank, world, Place.patience)
    return Place(rank, world, where, getattr(torch, dtype), compile=False)


def exchange(numbers: Sequence[torch.Tensor | float], place: Place) -> np.ndarray:
    """(ranks, n) float64: these n numbers of every rank. The CPU waits here for the device."""
    mine = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=place.device)
                        for x in numbers])
    everyone = [torch.empty_like(mine) for _ in range(place.world)]
    if place.world > 1:
        dist.all_gather(everyone, mine)
    return torch.stack(everyone if place.world > 1 else [mine]).cpu().double().numpy()


def total(values: torch.Tensor, place: Place) -> torch.Tensor:
    """The sum of a small tensor over the ranks that speak, each for its share of the rows."""
    if place.world > 1:
        values = values if place.rank in place.speakers else torch.zeros_like(values)
        values = values.to(place.device)
        dist.all_reduce(values)
    return values


def clip(model: Transformer, limit: float, norm: float, place: Place) -> None:
    """Clip all gradients, whose norm is known, by one number on all ranks: what several of them
    hold has to stay the same."""
    torch.nn.utils.clip_grads_with_norm_(
        model.parameters(), limit, torch.tensor(norm, dtype=torch.float32, device=place.device))


def owned(model: Transformer, place: Place) -> dict[str, torch.nn.Parameter]:
    """The parameters that this rank counts and saves, by name: all that it has, but for a tied
    matrix that the last stage of a pipeline has too."""
    twice = model.config.tie and place.at("pp") > 0
    return {name: p for name, p in model.named_parameters()
            if not (twice and name == "model.embed_tokens.weight")}


class Watch:
    """Ends this process when the others are not heard of for too long.

    A collective that waits for a rank which is gone, or stands still, cannot be interrupted: on a
    GPU the process is not even asked. So a thread looks at the clock, and has the last word.
    """

    def __init__(self, minutes: float, place: Place):
        self.minutes, self.place = minutes, place
        self.now, self.since = 0, math.inf
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def step(self, step: int | None) -> None:
        """From now on the others are waited for, in this step; None: no longer."""
        self.now = self.now if step is None else step
        self.since = math.inf if step is None else time.monotonic()

    def look(self) -> None:
        while not self.over.wait(min(1.0, 6 * self.minutes)):
            if time.monotonic() - self.since > 60 * self.minutes:
                print(f"[rank {self.place.rank}] error: step {self.now} has waited {self.minutes:g}"
                      " minutes for the other ranks: one of them stands still or is gone, or "
                      "--timeout is too short; the same command goes on from the last checkpoint",
                      file=sys.stderr, flush=True)
                os._exit(ENVIRONMENT)  # what hangs in a collective does not hear an exception

    def __enter__(self) -> "Watch":
        if self.place.world > 1:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.place.world > 1:  # a thread that is cut off at the end may abort the process
            self.thread.join()


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


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """The signals that came: SIGTERM and SIGINT are obeyed after the step; a second one at once."""
    heard, since = [], []

    def note(number: int, frame: object) -> None:
        if heard and time.monotonic() - since[0] > GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        heard.append(number)
        since.append(time.monotonic())
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("can't allocate memory", "MPS backend out of memory"))


def lost(error: RuntimeError, place: Place, when: str, then: str) -> Stop | None:
    """The line of a rank that others were taken from; None if the error says something else."""
    text = str(error).strip()
    if place.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in text
                                or "NCCL" in text):
        return None
    reason = re.sub(r"^\[[^]]*\] *", "", text.splitlines()[0]).split(". ")[0]
    return Stop(ENVIRONMENT, f"rank {place.rank} lost the others{when} ({reason}): one of them "
                f"ended, its own last line says why; the same command goes on{then}")


def explain_reading(error: RuntimeError, batch_size: int, place: Place) -> Stop | None:
    """The line a user can act on when memory or a rank is lost while checkpoints are read; None for
    anything else."""
    if lacks_memory(error):
        return Stop(ENVIRONMENT, f"out of memory at --batch_size={batch_size}; give a smaller one, "
                    "or --dtype=bfloat16")
    return lost(error, place, "", "")


def explain(error: RuntimeError, config: Config, place: Place, step: int) -> Stop | None:
    """The line a user can act on, for what machines do to a run; None for bugs of ours."""
    text = str(error).strip()
    if lacks_memory(error):
        n = parameters(config.model)
        n_rank, micro = rows_of(config, place.dp_world)
        less = next((m for m in range(micro // 2, 0, -1) if n_rank % m == 0), None)
        mine = 16 * n / place.size("dp_shard", "tp", "pp") / 1e9
        return Stop(ENVIRONMENT, f"out of memory: {n:,} parameters take {mine:.2f} GB here with "
                    f"gradients and AdamW, the rest is for micro-batches of {micro} rows of "
                    f"{config.model.seq_len}; " + (
                        f"give --micro_batch_size={less}, which leaves the batch as it is" if less
                        else "give --recompute=full" if config.train.recompute != "full" else
                        "this needs more ranks, a smaller model or a larger device"))
    if place.compile and any(kind.__module__.startswith(("torch._inductor", "torch._dynamo"))
                             for kind in type(error).__mro__):
        return Stop(ENVIRONMENT, f"torch.compile failed ({text.splitlines()[0]}); it needs a C++ "
                    "compiler: install one or give --compile=false")
    return lost(error, place, f" after step {step}", " from the last checkpoint")
