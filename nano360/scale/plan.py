"""The plan of a run before it runs: ranks, memory of a GPU by kind, days, disk. Needs no GPU.

    python train.py configs/amber_7b.py --plan --world_size=224 --gpu=a100-80 --gpus_per_node=4

How far to trust it. Weights, gradients and moments are exact, tensor by tensor. What a block keeps
for its backward pass was compared with the bytes that autograd holds on a CPU, eager and by the
partitioner that inductor uses, in every mode of recompute; so was the peak of a step of a small
eager model (formula by measured: 0.96 to 1.25). No GPU has measured any of it, and what FSDP2 and
the pipeline allocate is counted from their code, not seen. GB is 10^9 bytes.
"""

import dataclasses
import functools
import math

from model import LOSS_LOGITS_GPU, PEAK_FLOPS, flops_per_token, parameters, shapes_of
from nano360.config import ENVIRONMENT, Config, ModelConfig, Stop, say
from nano360.layout import Layout, choose_layout, rows_of

GPUS = {  # memory as the device reports it, less than on the box; dense bfloat16 FLOP/s
    "a100-40": (39.4 * 2**30, PEAK_FLOPS["A100"]),
    "a100-80": (79.1 * 2**30, PEAK_FLOPS["A100"]),
    "h100-80": (79.1 * 2**30, PEAK_FLOPS["H100"]),
    "h200-141": (139.8 * 2**30, PEAK_FLOPS["H200"]),
    "b200-192": (178.3 * 2**30, PEAK_FLOPS["B200"]),
}
USABLE = 0.95  # of it; assumed: the rest is CUDA's context, NCCL's buffers, gaps between tensors
MFUS = {  # by flops_per_token, which does not count the embedding; with it each is 2 % more
    "the paper's 2,600 tokens/s on an A100": 0.357, "40 %": 0.4, "50 %": 0.5,
    "the best published on A100s, fms-fsdp + compile": 0.663,
}
MODES = ("none", "selective", "full")  # of recompute, each keeps less
SHARD_0 = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
SHARD_1 = ("o_proj", "down_proj")  # the dimension of (out, in) that tp cuts; norms it does not


# ---- memory --------------------------------------------------------------------------------------

@functools.cache
def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape of a model of one block: the others are like it."""
    return dict(shapes_of(dataclasses.replace(model, n_layer=1)))


def count(model: ModelConfig, part: str, tp: int = 1, dp_shard: int = 1) -> int:
    """Numbers of one part of the model on the fullest rank: a "block", its "matrices" (that is
    without norms, with biases), the "embedding", the last "norm", the "head" if it is its own.

    FSDP2 cuts what tensor parallelism has left of a tensor along dimension 0: the first rank has
    the rest of a division, too.
    """
    total = 0
    for name, shape in shapes(model).items():
        module, kind = name.split(".")[-2:]
        home = ("block" if ".layers." in name else "embedding" if module == "embed_tokens" else
                "head" if module == "lm_head" else "norm")
        if home != part and not (part == "matrices" and home == "block" and "norm" not in module):
            continue
        rows, columns = shape[0], math.prod(shape[1:])
        if module in SHARD_0:
            rows //= tp
        elif module in SHARD_1 and kind == "weight":
            columns //= tp
        total += -(-rows // dp_shard) * columns
    return total


def blocks_of_stage(s: int, n: int, n_layer: int) -> range:
    """The blocks of stage s of n."""
    return range(s * n_layer // n, (s + 1) * n_layer // n)


def stages_of(config: Config, layout: Layout, rank: int) -> list[int]:
    """Blocks of each stage on one rank of the pipeline; stage s is on rank s % pp."""
    n = layout.pp * layout.pp_stages
    return [len(blocks_of_stage(s, n, config.model.n_layer)) for s in range(rank, n, layout.pp)]


def outside(config: Config, layout: Layout, rank: int, dp_shard: int) -> int:
    """Numbers on one rank of the pipeline outside of blocks: embedding, last norm, head.

    A tied matrix is on the first rank, where it is looked up, and on the last, where it multiplies.
    """
    model, first, last = config.model, rank == 0, rank == layout.pp - 1
    parts = ["embedding"] * (first or (last and model.tie)) + ["norm", "head"] * last
    return sum(count(model, part, layout.tp, dp_shard) for part in parts)


def kept_by_block(model: ModelConfig, recompute: str, tp: int, mixed: bool, sharded: bool,
                  compiled: bool) -> float:
    """Bytes per token that one block keeps from its forward pass for its backward pass.

    e bytes a number in matrix products; r in the residual stream, which autocast leaves in fp32
    and FSDP2 casts. Norms compute in fp32. Tensor parallelism shares out all but the inputs of the
    matrix products, which every rank gathers.
    """
    C, F, H = model.n_embd, model.n_inner, model.n_head
    C_kv = C // H * (model.n_kv_head or H)
    e, r = 2 if mixed else 4, 2 if mixed and sharded else 4
    if recompute == "full":
        return r * C / tp
    qkv, log_sum = e * (C + 2 * C_kv), 4 * H
    if recompute == "selective":  # input; q k v, attention, o, gate, up; eager down's output too
        return (r * C + qkv + e * (2 * C + 2 * F + (not compiled) * C) + log_sum) / tp
    # attention gives its output in q's memory order; where a part only rotates, q was put together
    # head by head, so that o_proj needs a copy of it
    attention = qkv + e * C * (2 if (model.rotary_dim or C // H) < C // H else 1) + log_sum
    root = 4 if model.norm == "rms" else 8  # of the mean square; or mean and root of the variance
    if compiled:  # input, statistics of two norms, o's output; of the MLP gate, up, their product
        return 2 * e * C + (r * C + 2 * root + attention + e * C + 3 * e * F) / tp
    copies = 5 if mixed and not sharded else 2  # autocast casts the input of q, k, v, gate, up each
    norms = 2 * (4 * C * (2 if model.norm == "rms" else 1) + root)  # in fp32; RMS also its result
    return copies * e * C + (norms + attention + 4 * e * F) / tp


def in_flight(config: Config, layout: Layout, rank: int) -> int:
    """Forward passes of one stage that wait for their backward pass, at most, on a rank.

    One forward, one backward in turn: the first rank is pp ahead. Interleaved, it begins with all
    its stages but the last for pp micro-batches, and 2 for each rank behind it.
    """
    rows, micro = rows_of(config, layout.dp_world)
    pp, v, n = layout.pp, layout.pp_stages, rows // max(1, micro)
    ahead = pp - rank if v == 1 else (v - 1) * pp + 2 * (pp - 1 - rank) + 1
    return min(n * v, ahead)


def scratch(config: Config, layout: Layout, last: bool, mixed: bool, compiled: bool) -> float:
    """Bytes that live for a moment at the peak: the logits of the loss, or one block's backward.

    The loss takes fp32 logits three times, their softmax and two gradients. A block has its own
    gradients, its recomputed activations, and the gradient of a matrix in two types.
    """
    m, tp, mode = config.model, layout.tp, config.train.recompute
    sharded, tokens = layout.sharded, rows_of(config, layout.dp_world)[1] * config.model.seq_len
    e, r = 2 if mixed else 4, 2 if mixed and sharded else 4
    # last norm; its result, which tensor parallelism gathers; ids
    head = 4 * (2 if m.norm == "rms" else 1) * m.n_embd / tp + r * m.n_embd + 20
    loss = tokens * head + 12 * min(tokens * m.vocab_size, LOSS_LOGITS_GPU) / tp
    again = (kept_by_block(m, "none", tp, mixed, sharded, compiled)
             - kept_by_block(m, mode, tp, mixed, sharded, compiled))
    back = tokens * (again + (2 * r * m.n_embd + 3 * e * m.n_inner) / tp)
    return max(loss * last, back + (e + 4) * m.n_embd * m.n_inner / tp)


def memory_of(config: Config, layout: Layout, rank: int, mixed: bool, compiled: bool
              ) -> dict[str, int]:
    """Bytes by kind on the fullest GPU of one rank of the pipeline."""
    m, tp, pp, dp, sharded = config.model, layout.tp, layout.pp, layout.dp_shard, layout.sharded
    e, r = 2 if mixed else 4, 2 if mixed and sharded else 4
    stages, last = stages_of(config, layout, rank), rank == pp - 1
    block, root = count(m, "block", tp), outside(config, layout, rank, 1)
    held = sum(stages) * count(m, "block", tp, dp) + outside(config, layout, rank, dp)
    whole = sum(stages) * block + root
    if sharded:  # a block and the next one, and what is outside; in a pipeline all, for all
        casts = e * (whole if pp > 1 else min(2, m.n_layer) * block + root)  # micro-batches
    elif mixed:  # autocast's; a compiled block that is recomputed casts anew and keeps none
        n = 1 if compiled and config.train.recompute != "none" else m.n_layer
        casts = 2 * (n * count(m, "matrices") + count(m, "embedding"))  # the head is as large
    else:
        casts = 0
    (rows, micro), ahead = rows_of(config, layout.dp_world), in_flight(config, layout, rank)
    kept = kept_by_block(m, config.train.recompute, tp, mixed, sharded, compiled)
    tokens, waiting = micro * m.seq_len, ahead * max(stages)
    # reduce-scatter: fp32 copies of two blocks' gradients and a shard, gradients in their own type
    sent = 4 * (2 * block - (-block // dp)) + e * (block + root) if sharded else 0
    # a pipeline has buffers for what comes in of every micro-batch, forward and backward
    ends, stream = len(stages) * 2 - (rank == 0) - last, r * m.n_embd / tp
    sent += ends * rows * m.seq_len * stream if pp > 1 else 0
    if sharded and layout.dp_replicate > 1 and rows > micro:
        sent += 4 * held  # sums of shards, which wait for the one exchange of copies
    out = tokens * stream * ahead if pp > 1 else 0  # what a stage has sent on
    made = {"weights": 4 * held, "gradients": 4 * (whole if pp > 1 else held),
            "optimizer": 8 * held, "casts": casts, "activations": tokens * kept * waiting + out,
            "scratch": scratch(config, layout, last, mixed, compiled), "communication": sent}
    return {kind: round(n) for kind, n in made.items()}


def memory(config: Config, layout: Layout, mixed: bool, compiled: bool) -> dict[str, int]:
    """Bytes by kind on the fullest GPU of all.

    weights: fp32. gradients: fp32, shards as the weights (in a pipeline whole until the last
    micro-batch). optimizer: AdamW's two moments. casts: copies of weights to compute with.
    activations: what waits for the backward pass. scratch: what lives for a moment at the peak.
    communication: buffers of FSDP2 and the pipeline.
    """
    return max((memory_of(config, layout, rank, mixed, compiled) for rank in range(layout.pp)),
               key=lambda kinds: sum(kinds.values()))


def check_fits(config: Config, layout: Layout, available: float, mixed: bool, compiled: bool,
               slack: float = 1.0) -> None:
    """Raises Stop(ENVIRONMENT) if a GPU that reports `available` bytes has too few of them, by a
    factor of more than `slack`, with what can be turned."""
    kinds = memory(config, layout, mixed, compiled)
    need, usable = sum(kinds.values()), USABLE * available
    if need <= slack * usable:
        return
    turned = []
    micro = rows_of(config, layout.dp_world)[1]
    if micro > 1:
        turned.append(f"a --micro_batch_size below {micro}")
    if config.train.recompute != "full":
        turned.append("--recompute=full")
    if layout.dp_shard < layout.dp_world:
        turned.append(f"a --dp_shard above {layout.dp_shard}")
    turned.append("more or larger GPUs")
    parts = ", ".join(f"{kind} {n / 1e9:.1f}" for kind, n in kinds.items() if n)
    raise Stop(ENVIRONMENT, f"this needs {gb(need)} on a GPU, of {gb(available)} {gb(usable)} can "
               f"be used ({parts}); what makes it smaller: {', '.join(turned)}")


# ---- time and disk -------------------------------------------------------------------------------

def steps_of(config: Config) -> int | None:
    """Optimizer steps of the whole run; None if it is the data that decides."""
    o, d = config.optim, config.data
    whole = d.rows_per_chunk and d.n_chunks * (d.rows_per_chunk // o.batch_size) * o.epochs
    return min((n for n in (whole, o.max_steps) if n), default=None)


def days(config: Config, tokens: int, world: int, peak: float, mfu: float) -> float:
    """Days that so many tokens take at a share of the peak of all GPUs."""
    return tokens * flops_per_token(config.model) / (mfu * peak * world) / 86400


def disk(config: Config) -> tuple[int, int]:
    """Bytes of all checkpoints: fp32 weights of every visit, moments of those that keep them."""
    visits, o = config.data.n_chunks * config.optim.epochs, config.optim
    per_visit = (config.data.rows_per_chunk or 0) // o.batch_size
    if o.max_steps and per_visit:
        visits = min(visits, -(-o.max_steps // per_visit))
    n, keep = parameters(config.model), min(visits, config.train.keep_optimizer or visits)
    return 4 * n * visits, 8 * n * keep


def gb(n: float) -> str:
    return f"{n / 1e12:,.2f} TB" if n >= 1e12 else f"{n / 1e9:,.1f} GB"


def print_plan(config: Config, world: int, gpu: str, per_node: int, counted_on: float | None
               ) -> None:
    """Say what a run takes on `world` GPUs of a kind in GPUS, `per_node` of them on a node, at a
    share of their peak that is `counted_on`, or at each of MFUS. Raises Stop(USAGE) for what cannot
    be laid out, Stop(ENVIRONMENT) for what does not fit."""
    available, peak = GPUS[gpu]
    mixed, compiled = config.train.dtype != "float32", config.train.compile is not False
    layout = choose_layout(config, world, per_node, available)
    (rows, micro), kinds = rows_of(config, layout.dp_world), memory(config, layout, mixed, compiled)
    say(f"{parameters(config.model):,} parameters, {kinds['weights'] // 4:,} on a GPU; "
        f"{world:,} x {gpu}, {min(world, per_node)} a node")
    say(f"layout: dp_replicate {layout.dp_replicate}, dp_shard {layout.dp_shard}, tp {layout.tp}, "
        f"pp {layout.pp} x {layout.pp_stages} stages; a rank has {rows} rows of a batch of "
        f"{config.optim.batch_size:,}, {micro} x {config.model.seq_len} tokens at a time; "
        f"recompute {config.train.recompute}, {'bfloat16' if mixed else 'float32'}, "
        f"{'compiled' if compiled else 'eager'}")
    sums = {"in all": sum(kinds.values()), "usable": USABLE * available}
    for kind, n in (kinds | sums).items():
        say(f"  {kind:<14} {n / 1e9:>8,.2f} GB  {n / available:>6.1%} of a GPU")
    steps, flops = steps_of(config), flops_per_token(config.model)
    tokens = (steps or 0) * config.optim.batch_size * config.model.seq_len
    say(f"{flops:.4g} FLOPs a token; " + (
        f"{steps:,} steps, {tokens:.5g} tokens, {tokens * flops:.4g} FLOPs in all" if steps else
        "how many tokens, the data decides"))
    shares = {f"{counted_on:.1%}": counted_on} if counted_on else MFUS
    for name, mfu in shares.items():
        speed = mfu * peak * world / flops
        took = f"  {days(config, tokens, world, peak, mfu):>8,.1f} days" if steps else ""
        say(f"  MFU {mfu:>6.1%}  {speed:>11,.0f} tokens/s  {speed / world:>7,.0f} a GPU{took}"
            + f"  ({name})" * (not counted_on and "%" not in name))
    say("disk: {} of weights and {} of moments in checkpoints, {} for last/".format(
        *map(gb, (*disk(config), 12 * parameters(config.model)))))
    check_fits(config, layout, available, mixed, compiled)
    say("it fits")
