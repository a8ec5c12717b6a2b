"""Which ranks share what: the layout of a run, and what cannot be laid out.

    layout = choose_layout(config, world, per_node, available)

Ranks lie in a mesh (pp, dp_replicate, dp_shard, tp), the last one fastest. A rank computes with
micro_batch_size rows at a time, of those that are left to it of the batch.
"""

import math
from dataclasses import dataclass

from model import parameters
from nano360.config import USAGE, Config, Stop, say

# A parameter is 16 bytes in fp32: weight, gradient, two moments. 4 more are its bfloat16 copy and
# what is in flight; the last fifth of a GPU is for activations.
BYTES, SHARE = 20, 0.8

@dataclass(frozen=True)
class Layout:
    """How many ranks share what. The product but for pp_stages is `world`."""
    world: int
    dp_replicate: int
    dp_shard: int
    tp: int
    pp: int
    pp_stages: int

    @property
    def dp_world(self) -> int:
        """Ranks that share the rows of a batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weights: under every layout that is not DDP alone."""
        return self.world > self.dp_replicate


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def nearest(good: list[int], n: int) -> str:
    """Of ascending numbers the last below n and the first above it, in words."""
    below, above = [g for g in good if g < n][-1:], [g for g in good if g > n][:1]
    return " or ".join(f"{one:,}" for one in below + above)


def rows_of(config: Config, ranks: int) -> tuple[int, int]:
    """Rows of a batch on one of so many data-parallel ranks, and of these at a time."""
    rows = config.optim.batch_size // ranks
    return rows, min(config.optim.micro_batch_size or rows, rows)


def layout_errors(config: Config, layout: Layout) -> list[str]:
    """What a layout cannot do with this model and batch, a line each."""
    m, n, tp, pp = config.model, layout.world, layout.tp, layout.pp
    if n % (tp * pp):
        up = n // (tp * pp) + 1
        good = [k * tp * pp for k in range(1, up + 1)]
        return [f"tp x pp = {tp} x {pp} does not divide {n} ranks: start {nearest(good, n)}, or "
                "give other --tp and --pp"]
    if layout.dp_world * tp * pp != n:
        data = n // (tp * pp)
        return [f"dp_shard = {layout.dp_shard} does not divide the {data} data-parallel ranks: "
                f"give --dp_shard={nearest(divisors(data), layout.dp_shard)}"]
    errors, sizes = [], {"n_head": m.n_head, "n_kv_head": m.n_kv_head or m.n_head,
                         "n_inner": m.n_inner, "vocab_size": m.vocab_size, "seq_len": m.seq_len}
    if odd := [f"{name} = {size}" for name, size in sizes.items() if size % tp]:
        errors.append(f"tp = {tp} does not divide {', '.join(odd)}: give --tp="
                      f"{nearest(divisors(math.gcd(*sizes.values())), tp)}")
    stages = pp * layout.pp_stages
    if pp == 1 and layout.pp_stages > 1:
        errors.append(f"pp_stages = {layout.pp_stages}, but there is no pipeline: give --pp too, "
                      "or --pp_stages=1")
    if m.n_layer < stages:
        errors.append(f"pp x pp_stages = {stages} stages want a block each, the model has "
                      f"{m.n_layer}: give fewer")
    return errors + batch_errors(config, layout)


def batch_errors(config: Config, layout: Layout) -> list[str]:
    """Whether the batch divides into ranks, micro-batches and what a pipeline asks of these."""
    B, data, pp = config.optim.batch_size, layout.dp_world, layout.pp
    (rows, micro), want = rows_of(config, layout.dp_world), config.optim.micro_batch_size
    if B % data:
        good = [k for k in range(1, rows + (want or 1) + 1) if k % min(want or k, k) == 0]
        sizes = nearest([k * data for k in good], B)
        counts = nearest([d * layout.tp * pp for d in divisors(B)], layout.world)
        return [f"batch_size = {B:,} rows do not divide by {data} data-parallel ranks; nearest "
                f"batch sizes that do: {sizes}; nearest numbers of ranks for {B:,} rows: {counts}"]
    if rows % micro:
        good = [d for d in divisors(rows) if d <= micro][-1]
        return [f"each of {data} data-parallel ranks has {rows} rows, which do not divide by "
                f"micro_batch_size = {micro}: give --micro_batch_size={good}"]
    n, stages = rows // micro, pp * layout.pp_stages
    odd = layout.pp_stages > 1 and n % pp
    if pp == 1 or (n >= stages and not odd):
        return []
    good = [d for d in divisors(rows) if rows // d >= stages
            and (layout.pp_stages == 1 or rows // d % pp == 0)][-1:]
    more = f"in a multiple of {pp}, " if layout.pp_stages > 1 else ""
    return [f"{stages} pipeline stages want {stages} micro-batches or more, {more}a rank has {n} "
            f"of {micro} rows: give " + (f"--micro_batch_size={good[0]}" if good else
                                         f"--batch_size={stages * data} or a multiple of it")]


def layout_of(config: Config, world: int, dp_shard: int) -> Layout:
    """The layout of so many ranks; it is for layout_errors to say whether there can be one."""
    t = config.train
    data = max(1, world // (t.tp * t.pp))
    return Layout(world, max(1, data // dp_shard), dp_shard, t.tp, t.pp, t.pp_stages)


def choose_dp_shard(config: Config, world: int, per_node: int, available: float | None) -> int:
    """The dp_shard of a run: the config's, or 1 when BYTES a parameter fit in SHARE of a GPU, else
    the GPUs of a node, between which weights travel fast. Says which, and why.

    `available`: bytes that a GPU reports; None on a CPU, whose memory is not a rank's own: 1.
    """
    t = config.train
    data = max(1, world // (t.tp * t.pp))
    if t.dp_shard is not None or available is None or data == 1:
        return t.dp_shard or 1
    need, room = BYTES * parameters(config.model) / (t.tp * t.pp), SHARE * available
    dp_shard, reason = 1, "each GPU has all weights"
    if need > room:
        dp_shard, reason = math.gcd(data, max(1, per_node // t.tp)), "the GPUs of a node share them"
    say(f"dp_shard {dp_shard}, {reason}: {BYTES} bytes a parameter are {need / 1e9:,.1f} GB, "
        f"{SHARE:.0%} of a GPU are {room / 1e9:,.1f} GB; --dp_shard=N says otherwise")
    return dp_shard


def choose_layout(config: Config, world: int, per_node: int, available: float | None) -> Layout:
    """The layout of a run on so many ranks, `per_node` of them on a node, on GPUs that report
    `available` bytes (None: CPUs). Raises Stop(USAGE) for what cannot be laid out."""
    layout = layout_of(config, world, choose_dp_shard(config, world, per_node, available))
    if errors := layout_errors(config, layout):
        raise Stop(USAGE, "\n".join(errors))
    return layout
