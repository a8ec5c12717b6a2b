"""Full optimizer steps, as train.py's loop takes them, without its data, journal and saves.

    steps = Steps(config, place)
    seconds, spent = steps.take()       # one step of batch_size rows; where its time went

Weights are normal noise that is drawn on the device, since a 7B model's own are drawn on one core
in a minute; ids are uniform noise. Neither speed nor memory depends on which they are, as long as
they are not zeros: those multiply faster.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import train
from model import Transformer, local, param_groups
from nano360.config import Config
from nano360.place import DIMS, Clock, Place, clip


class Sharded(Place):
    """A place that shards over its one rank. train.py has no use for that, so it would not."""
    sharded = True


@contextlib.contextmanager
def alone(device: torch.device) -> Iterator[DeviceMesh]:
    """The mesh of a process group of one, who meets itself in a file: no port is needed."""
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        dist.init_process_group("nccl" if cuda else "gloo", rank=0, world_size=1,
                                store=dist.FileStore(str(Path(name) / "store"), 1),
                                device_id=device if cuda else None)
        try:
            yield init_device_mesh(device.type, (1, 1, 1, 1), mesh_dim_names=DIMS)
        finally:
            dist.destroy_process_group()


@torch.no_grad()
def fill(model: Transformer) -> None:
    """Matrices from a normal distribution, norms one, biases too."""
    for p in model.parameters():
        if p.dim() > 1:
            local(p).normal_(0.0, 0.02)
        else:
            local(p).fill_(1.0)


class Steps:
    """A model, its optimizer and one batch, which is trained again and again."""

    def __init__(self, config: Config, place: Place):
        o, shape = config.optim, (config.optim.batch_size, config.model.seq_len + 1)
        self.config, self.place, self.clock = config, place, Clock(place.device)
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self.runner = train.parallelize(self.model, place, config)
        fill(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, o.weight_decay), lr=1e-5,
                                           eps=o.eps, betas=(o.beta1, o.beta2), fused=True)
        self.rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(
            np.uint16)
        self.loss = self.norm = 0.0

    def take(self) -> tuple[float, dict[str, float]]:
        """Seconds of one step, and of its parts. Loss and norm are read before the update, as in
        the loop, and the last lap waits for the device: so the clock stands when it is done."""
        o = self.config.optim
        began = time.perf_counter()
        self.clock.start()
        loss = train.forward_backward(self.runner, self.rows, o.micro_batch_size, self.place,
                                      self.clock)
        norm = train.norm_of(self.model, self.place)
        self.loss, self.norm = loss.item(), norm.item()
        clip(self.model, o.grad_clip, self.norm, self.place)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.lap("optimizer")
        spent = self.clock.read()
        return time.perf_counter() - began, spent
