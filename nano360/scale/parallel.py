"""Tensor and pipeline parallelism, on PyTorch's own engine: where shards alone do not do.

    torchrun --nproc_per_node=8 train.py configs/amber_7b.py --tp=2 --pp=2     # and 2 x data

train.py imports this file only when tp or pp is above 1. The ranks are a mesh (pp, dp_replicate,
dp_shard, tp): neighbours share the matrices of a block, which is the most talk, groups of them have
rows of their own, and the blocks in a row are dealt to the stages of a pipeline. In here:

    split         only this rank's blocks, then only its part of every matrix of them
    Pipeline      what runs the stages: micro-batches, one forward, one backward (1F1B, interleaved)
    global_norm   of all gradients, each counted once, wherever they are

arXiv 1909.08053 (tensor parallelism), 2205.05198 (its sequence parallelism), 2104.04473 (1F1B,
interleaved), as DTensor and torch.distributed.pipelining have them.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleInput,
                                               PrepareModuleOutput, RowwiseParallel,
                                               SequenceParallel, parallelize_module)

from model import IGNORE, Transformer, local, row_nats
from nano360.config import Config
from nano360.layout import rows_of
from nano360.place import Place, owned
from nano360.scale.plan import blocks_of_stage

SEQ, FULL = Shard(1), Replicate()  # of x (B, T, C): each rank some of the tokens, or all of them


# ---- tensor parallelism: each rank some of the heads, of the MLP's units, of the vocabulary ------

def block_plan() -> dict:
    """What becomes of each module of a block. Between blocks the tokens are cut, inside the units:
    a row is gathered before the matrices that are cut by columns of y = x W, and summed and cut
    again by tokens after those that are cut by rows. Norms are whole everywhere, on their tokens.
    """
    rest = (None,) * 5  # of attention's arguments: cos, sin, cache, start, mask
    return {
        "input_layernorm":          SequenceParallel(),
        "self_attn":                PrepareModuleInput(input_layouts=(SEQ, *rest),
                                                       desired_input_layouts=(FULL, *rest)),
        "self_attn.q_proj":         ColwiseParallel(),
        "self_attn.k_proj":         ColwiseParallel(),
        "self_attn.v_proj":         ColwiseParallel(),
        "self_attn.o_proj":         RowwiseParallel(output_layouts=SEQ),
        "post_attention_layernorm": SequenceParallel(),
        "mlp":                      PrepareModuleInput(input_layouts=SEQ,
                                                       desired_input_layouts=FULL),
        "mlp.gate_proj":            ColwiseParallel(),
        "mlp.up_proj":              ColwiseParallel(),
        "mlp.down_proj":            RowwiseParallel(output_layouts=SEQ),
    }


def cut_matrices(stage: "Stage", place: Place) -> None:
    """Give every parameter of a stage its place in tensor parallelism."""
    mesh = place.mesh["tp"]
    for block in stage.layers:
        parallelize_module(block, mesh, block_plan())
    ends = {"embed_tokens": RowwiseParallel(input_layouts=FULL, output_layouts=SEQ),  # by ids
            "norm": SequenceParallel(), "lm_head": ColwiseParallel()}
    parallelize_module(stage, mesh, {k: v for k, v in ends.items() if hasattr(stage, k)})
    if hasattr(stage, "norm"):  # the head, cut by ids, multiplies all tokens
        gather = PrepareModuleOutput(output_layouts=SEQ, desired_output_layouts=FULL,
                                     use_local_output=False)
        parallelize_module(stage, mesh, {"norm": gather})


# ---- pipeline parallelism: each rank some of the blocks ------------------------------------------

class Stage(nn.Module):
    """A range of a Transformer's blocks, with the embedding before the first and the head after
    the last. It holds the model's own modules, so that their parameters keep the model's names."""

    def __init__(self, model: Transformer, index: int, n: int):
        super().__init__()
        self.config, self.emb_mult, self.head_mult = model.config, model.emb_mult, model.head_mult
        self.first, self.last = index == 0, index == n - 1
        self.layers = nn.ModuleList(model.model["layers"][i] for i in
                                    blocks_of_stage(index, n, model.config.n_layer))
        if self.first or (self.last and model.config.tie):
            self.embed_tokens = model.model["embed_tokens"]
        if self.last:
            self.norm = model.model["norm"]
            if not model.config.tie:
                self.lm_head = model.lm_head
        self.set_tables()

    set_tables = Transformer.set_tables  # of its own config and device

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None, per_row: bool = True
                ) -> torch.Tensor:
        """ids (B, T), or what the stage before gives (B, T / tp, C), to the same for the next
        stage, or to the summed loss of each row (B,), all there is of a Transformer's forward."""
        assert per_row
        if self.first:
            x = self.embed_tokens(x) * self.emb_mult  # times 1.0 too: see Transformer.hidden
        for block in self.layers:
            x = block(x, self.cos, self.sin, None, 0, None)
        if not self.last:
            return x
        head = self.embed_tokens if self.config.tie else self.lm_head
        nats = row_nats(self.norm(x) * self.head_mult, head.weight, targets)
        # a copy: what FSDP2 hands out must be no view
        return nats.to_local().clone() if isinstance(nats, DTensor) else nats


def split(model: Transformer, place: Place, config: Config) -> list[Stage]:
    """The stages of this rank, with its part of every matrix. What other ranks have leaves the
    model, so that its named parameters are those of this rank under the names they always have."""
    n = place.size("pp") * config.train.pp_stages
    mine = range(place.at("pp"), n, place.size("pp"))  # dealt in turn
    stages = [Stage(model, i, n) for i in mine]
    keep = {id(module) for stage in stages for module in stage.modules()}
    for parent in (model.model["layers"], model.model, model):
        for name, module in parent.named_children():
            if id(module) not in keep and module not in (model.model, model.model["layers"]):
                setattr(parent, name, nn.Identity())
    if place.size("tp") > 1:
        for stage in stages:
            cut_matrices(stage, place)
    return stages


class Pipeline:
    """The stages of this rank and the schedule that passes micro-batches through all of them."""

    def __init__(self, stages: list[Stage], model: Transformer, place: Place, config: Config):
        m, dtype = config.model, place.dtype
        self.model, self.place, self.stages = model, place, stages
        self.rows, micro = rows_of(config, place.dp_world)
        n, count = place.size("pp") * len(stages), self.rows * m.seq_len
        ids = torch.empty(micro, m.seq_len, dtype=torch.int64, device="meta")
        inside = torch.empty(micro, m.seq_len // place.size("tp"), m.n_embd, dtype=dtype,
                             device="meta", requires_grad=True)  # its gradient comes back
        nats = torch.empty(micro, device="meta")
        group = place.mesh.get_group("pp")
        wrapped = [PipelineStage(
            stage, place.at("pp") + i * place.size("pp"), n, place.device, group=group,
            input_args=(ids if stage.first else inside,),
            output_args=(nats if stage.last else inside,)) for i, stage in enumerate(stages)]

        def share(nats: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return nats.sum() / count  # of the mean over this rank's rows: so no division after
        # Micro-batches are what fills a pipeline: (pp - 1) / (micro-batches + pp - 1) of the time
        # is lost; with v stages on each rank, dealt in turn, that divided by v, for v times the
        # messages.
        if len(wrapped) == 1:
            self.schedule = Schedule1F1B(wrapped[0], self.rows // micro, share, scale_grads=False)
        else:
            self.schedule = ScheduleInterleaved1F1B(wrapped, self.rows // micro, share,
                                                    scale_grads=False)
        self.ties = self.tie_group() if m.tie else None

    def tie_group(self) -> dist.ProcessGroup | None:
        """The first and the last stage's ranks of the same data and the same part of a matrix."""
        mine, ends = None, self.place.mesh.mesh[[0, -1]].flatten(1)  # (2, the other dimensions)
        for pair in ends.T.tolist():  # every rank has to take part in making every group
            group = dist.new_group(pair, timeout=self.place.patience)
            mine = group if self.place.rank in pair else mine
        return mine

    def inputs(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[tuple, dict]:
        """What this rank's stages take of a batch."""
        last = any(stage.last for stage in self.stages)
        return ((ids,) if any(stage.first for stage in self.stages) else (),
                {"targets": targets} if last else {})

    def forward_backward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Gradients of the mean loss over this rank's rows; returns that mean, 0 where the last
        stage is not."""
        args, named = self.inputs(ids, targets)
        losses = []
        self.schedule.step(*args, target=targets if named else None, losses=losses,
                           return_outputs=False, **named)
        if self.ties:  # the tied matrix: each end has seen one of its two uses
            dist.all_reduce(local(self.model.model["embed_tokens"].weight.grad), group=self.ties)
        return torch.stack(losses).sum().detach() if losses else torch.zeros(
            (), device=self.place.device)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, targets: torch.Tensor, per_row: bool = True
                 ) -> torch.Tensor:
        """The summed loss of each of at most this rank's number of rows, without gradients; zeros
        where the last stage is not. A schedule has one length: missing rows are filled up."""
        assert per_row
        n = len(ids)
        more = self.rows - n
        ids, targets = (torch.cat([one, one.new_full((more, one.size(1)), fill)])
                        for one, fill in ((ids, 0), (targets, IGNORE)))
        args, named = self.inputs(ids, targets)
        nats = self.schedule.eval(*args, target=targets if named else None, losses=[], **named)
        for stage in self.stages:  # no backward pass follows that would let gathered weights go
            for module in stage.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        return nats[:n] if named else torch.zeros(n, device=ids.device)


def global_norm(model: Transformer, place: Place) -> torch.Tensor:
    """The norm of all gradients of the model, each counted once, whatever is where."""
    parts = {}  # how many ranks have the same -> those gradients, as far as they are here
    for p in owned(model, place).values():
        copies = math.prod(p.device_mesh.size(i) for i, one in enumerate(p.placements)
                           if one.is_replicate())
        parts.setdefault(copies, []).append(p.grad.to_local())
    square = sum(torch.nn.utils.get_total_norm(grads) ** 2 / copies
                 for copies, grads in parts.items())
    dist.all_reduce(square)
    return square.sqrt()
