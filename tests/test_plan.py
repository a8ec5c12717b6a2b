"""scale/plan.py: exact where it says so, and within 15 % of what autograd keeps elsewhere."""

import dataclasses
import functools
import itertools
import time
import typing
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_py
import train
from conftest import REPO
from model import Block, Transformer, flops_per_token, init_weights, rope_tables
from nano360.config import ENVIRONMENT, USAGE, Config, ModelConfig, Stop, load
from nano360.layout import Layout, choose_layout, layout_errors, layout_of
from nano360.scale import plan
from nano360.scale.plan import (GPUS, check_fits, count, days, disk, kept_by_block, memory,
                                memory_of, parameters, scratch, steps_of)
from train import PlanOptions

A100, H100, H200 = (GPUS[name][0] for name in ("a100-80", "h100-80", "h200-141"))
SMALL = ModelConfig(n_layer=1, n_head=4, n_embd=128, n_inner=344, vocab_size=512, seq_len=64)
KINDS = [{}, dict(norm="layer", bias=True, rotary_dim=16, rope_interleaved=True, tie=True),
         dict(n_kv_head=2), dict(n_head=2, n_inner=512)]
TYPES = [(False, False), (True, False), (True, True)]  # mixed, sharded: fp32, autocast, FSDP2


@functools.cache
def run(name: str = "amber_7b", *flags: str) -> Config:
    return load([str(REPO / f"configs/{name}.py"), "--recompute=none", *flags])[0]


def small(**model: typing.Any) -> Config:
    amber = run()
    return dataclasses.replace(
        amber, model=dataclasses.replace(SMALL, **model),
        optim=dataclasses.replace(amber.optim, batch_size=24, micro_batch_size=1))


def error(config: Config, world: int) -> str:
    with pytest.raises(Stop) as stop:
        choose_layout(config, world, 8, A100)
    assert stop.value.code == USAGE and "\n" not in str(stop.value)
    return str(stop.value)


# ---- counts --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, n", [("amber_7b", 6_738_415_616),
                                     ("crystalcoder_7b_stage1", 6_575_278_720)])
def test_parameters(name, n):
    config = run(name)
    assert parameters(config.model) == n
    kinds = memory(config, layout_of(config, 1, 1), True, True)
    assert (kinds["weights"], kinds["gradients"], kinds["optimizer"]) == (4 * n, 4 * n, 8 * n)
    assert disk(config)[0] == config.data.n_chunks * 4 * n


def test_parameters_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM
    for kwargs in ({}, dict(n_kv_head=8), dict(tie=True)):
        m = dataclasses.replace(run().model, **kwargs)
        with torch.device("meta"):
            theirs = LlamaForCausalLM(LlamaConfig(
                num_hidden_layers=m.n_layer, num_attention_heads=m.n_head, hidden_size=m.n_embd,
                num_key_value_heads=m.n_kv_head or m.n_head, intermediate_size=m.n_inner,
                vocab_size=m.vocab_size, tie_word_embeddings=m.tie))
            optimizer = torch.optim.AdamW(theirs.parameters())
        n_bytes = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        config = dataclasses.replace(run(), model=m)
        kinds = memory(config, layout_of(config, 1, 1), True, True)
        assert (kinds["weights"], kinds["optimizer"]) == (n_bytes, 2 * n_bytes)


def brute(m: ModelConfig, layout: Layout, pp_rank: int) -> int:
    """Weight bytes of every rank of a stage by cutting tensors of the whole model; the fullest."""
    n = layout.pp * layout.pp_stages
    home = {i: next(s for s in range(n) if s * m.n_layer // n <= i < (s + 1) * m.n_layer // n)
            for i in range(m.n_layer)}
    with torch.device("meta"):
        whole = dict(Transformer(m).named_parameters())
    ranks = {at: 0 for at in itertools.product(range(layout.dp_shard), range(layout.tp))}
    for name, p in whole.items():
        if ".layers." in name:
            stages = {home[int(name.split(".")[2])]}
        else:
            stages = {0} if "embed" in name else {n - 1}
            stages |= {n - 1} if "embed" in name and m.tie else set()
        if pp_rank not in {s % layout.pp for s in stages}:
            continue
        for shard, t in ranks:
            part = p
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                part = part.chunk(layout.tp, 1)[t]
            elif "norm" not in name and not name.endswith(("o_proj.bias", "down_proj.bias")):
                part = part.chunk(layout.tp, 0)[t]
            cut = part.chunk(layout.dp_shard, 0)  # fewer than asked for where rows run out
            ranks[shard, t] += cut[shard].nbytes if shard < len(cut) else 0
    return max(ranks.values())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dp, tp, pp, stages", [
    (1, 1, 1, 1), (3, 1, 1, 1), (12, 1, 1, 1), (1, 2, 1, 1), (5, 2, 1, 1), (1, 1, 3, 1),
    (3, 1, 2, 2), (7, 2, 2, 1)])
def test_weights_of_every_layout(kind, dp, tp, pp, stages):
    """The fullest rank of every stage, where rows do not divide, too."""
    config = small(n_layer=6 if stages > 1 else 7, **kind)  # 1, 2, 1, 2 of 6
    layout = Layout(dp * tp * pp, 1, dp, tp, pp, stages)
    for rank in range(pp):
        kinds = memory_of(config, layout, rank, True, True)
        assert kinds["weights"] == brute(config.model, layout, rank)
        assert kinds["optimizer"] == 2 * kinds["weights"]
        if pp == 1 or dp == 1:  # else a pipeline keeps whole gradients
            assert kinds["gradients"] == kinds["weights"]
        else:
            assert kinds["gradients"] == brute(
                config.model, dataclasses.replace(layout, dp_shard=1), rank)


# ---- activations ---------------------------------------------------------------------------------

class Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakKeyDictionary()
        for tensor in known:
            self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in (one for one in tree_leaves(out) if isinstance(one, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen[storage] = size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self.gone, size)
                self.peak = max(self.peak, self.now)
        return out

    def gone(self, size: int) -> None:
        self.now -= size


def step(m: ModelConfig, recompute: str, mixed: bool, sharded: bool, B: int) -> tuple[int, int]:
    """Bytes alive after the forward pass of a real step, and its peak after that; no weights."""
    net = Transformer(m)
    init_weights(net, 1)
    if sharded:  # what FSDP2 computes with
        net = net.to(torch.bfloat16)
        net.set_tables()
    for block in net.model["layers"]:
        block.recompute = recompute
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    ids = torch.randint(m.vocab_size, (B, m.seq_len))
    known = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters()), ids]
    with Live(known) as live:
        with torch.autocast("cpu", torch.bfloat16, mixed and not sharded):
            loss = net(ids, ids)
        kept, live.peak = live.now, live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("mixed, sharded", TYPES)
@pytest.mark.parametrize("recompute", plan.MODES)
def test_activations_of_eager_blocks(kind, mixed, sharded, recompute):
    """Two blocks more, in a real step: what stays in memory until the backward pass."""
    m = dataclasses.replace(SMALL, **kind)
    two, four = (step(dataclasses.replace(m, n_layer=n), recompute, mixed, sharded, 2)[0]
                 for n in (2, 4))
    tokens, casts = 2 * m.seq_len, 0
    if mixed and not sharded and recompute == "none":
        casts = 2 * count(m, "matrices")
    ours = kept_by_block(m, recompute, 1, mixed, sharded, False) * tokens + casts
    assert (four - two) / 2 == pytest.approx(ours, rel=0.01)


@pytest.mark.numeric
@pytest.mark.parametrize("mixed, sharded", TYPES)
@pytest.mark.parametrize("recompute", plan.MODES)
def test_peak_of_an_eager_step(mixed, sharded, recompute):
    """The whole step, from the end of the forward pass on: all kinds but weights and moments."""
    config = small(n_layer=4, vocab_size=96)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, recompute=recompute),
        optim=dataclasses.replace(config.optim, batch_size=16, micro_batch_size=8))
    _, peak = step(config.model, recompute, mixed, sharded, 8)
    layout = Layout(2, 1, 2, 1, 1, 1) if sharded else Layout(1, 1, 1, 1, 1, 1)
    kinds = memory_of(config, layout, 0, mixed, False)
    casts = kinds["casts"] if not sharded and recompute == "none" else 0
    assert peak == pytest.approx(kinds["activations"] + kinds["scratch"] + casts, rel=0.15)
    if recompute == "none":  # gradients inside the block, beside what is kept: closer
        assert peak <= (kinds["activations"] + kinds["scratch"] + casts) * 1.005


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS[1:3], ids=str)
@pytest.mark.parametrize("mixed, sharded", TYPES[1:])
@pytest.mark.parametrize("recompute", plan.MODES)
def test_activations_of_compiled_blocks(kind, mixed, sharded, recompute):
    """What the partitioner of inductor saves; the machine code it would be made into is not."""
    m, held, casts = dataclasses.replace(SMALL, **kind), {}, {}
    torch._dynamo.reset()
    block = Block(m).to(torch.bfloat16 if sharded else torch.float32)
    block.recompute = recompute
    block.compile(backend="aot_eager_decomp_partition")
    tables = rope_tables(m, torch.device("cpu"))
    x = torch.randn(3, m.seq_len, m.n_embd, requires_grad=True,
                    dtype=torch.bfloat16 if sharded else torch.float32)
    ours = {p.untyped_storage().data_ptr() for p in (*block.parameters(), *tables)}
    like = {tuple(p.shape) for p in block.parameters()}
    like |= {one[::-1] for one in like}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in ours and t.dtype.is_floating_point:
            to = casts if tuple(t.shape) in like else held
            to[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t
    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
          torch.autocast("cpu", torch.bfloat16, mixed and not sharded)):
        y = block(x, *tables)
    kept = sum(size for size, _ in held.values())
    wanted = kept_by_block(m, recompute, 1, mixed, sharded, True) * 3 * m.seq_len
    assert y.shape == x.shape and kept == pytest.approx(wanted, rel=0.01)
    autocast = mixed and not sharded and recompute == "none"  # only then weights are kept as cast
    n_casts = 2 * count(m, "matrices") * autocast
    assert sum(size for size, _ in casts.values()) == pytest.approx(n_casts, rel=0.01)


@pytest.mark.numeric
def test_the_loss_takes_what_it_holds_at_once():
    """Many tokens do not mean many logits."""
    config = small(vocab_size=2**20, seq_len=4096)
    layout = Layout(1, 1, 1, 1, 1, 1)
    assert scratch(config, layout, True, True, True) == pytest.approx(
        12 * model_py.LOSS_LOGITS_GPU, rel=0.01)


def test_a_pipeline_keeps_what_waits():
    """1F1B: the first rank is pp micro-batches ahead, the last one none."""
    config = small(n_layer=8)
    one = round(kept_by_block(config.model, "none", 1, True, True, True)) * 64 * 2  # blocks
    rank = [memory_of(config, Layout(4, 1, 1, 1, 4, 1), r, True, True) for r in range(4)]
    sent = 64 * 2 * 128  # a stage's bfloat16 output, kept with what it came from
    assert [r["activations"] for r in rank] == [n * (one + sent) for n in (4, 3, 2, 1)]
    buffers = [r["communication"] - 4 * 3 * count(config.model, "block")  # reduce-scatter's
               - 2 * count(config.model, "block") - r["weights"] // 2 + 2 * 2 * count(
                   config.model, "block") for r in rank]
    assert buffers == [24 * n * sent for n in (1, 2, 2, 1)]


# ---- layouts -------------------------------------------------------------------------------------

def test_weights_that_are_gathered():
    """By FSDP2, a block and the next one, and what is outside; in a pipeline a rank's all."""
    config = small(n_layer=8)
    block, table = count(config.model, "block"), 512 * 128  # embedding, head
    assert memory(config, Layout(4, 1, 4, 1, 1, 1), True, True)["casts"] == 2 * (
        2 * block + 2 * table + 128)
    assert memory_of(config, Layout(8, 1, 4, 1, 2, 1), 0, True, True)["casts"] == 2 * (
        4 * block + table)


def test_amber_on_1_8_and_224():
    amber = run("amber_7b", "--recompute=selective", "--micro_batch_size=5")
    assert choose_layout(amber, 8, 8, A100) == Layout(8, 1, 8, 1, 1, 1)
    assert choose_layout(amber, 224, 4, A100) == Layout(224, 56, 4, 1, 1, 1)
    assert choose_layout(amber, 1, 8, A100) == Layout(1, 1, 1, 1, 1, 1)  # nobody to share with
    assert choose_layout(amber, 8, 8, None).dp_shard == 1  # a CPU
    assert choose_layout(amber, 28, 8, A100).dp_shard == 4  # 8 do not divide 28
    assert choose_layout(run("amber_7b", "--dp_shard=7"), 224, 4, A100) == Layout(
        224, 32, 7, 1, 1, 1)
    both = run("amber_7b", "--tp=2", "--pp=2", "--micro_batch_size=1")
    assert choose_layout(both, 32, 8, A100) == Layout(32, 8, 1, 2, 2, 1)
    assert choose_layout(both, 32, 8, 4e10) == Layout(32, 2, 4, 2, 2, 1)


def test_the_rule_of_dp_shard_is_printed(capsys):
    """20 bytes a parameter in 80 % of a GPU: 6,738,415,616 of Amber's are 134.8 GB."""
    edge, amber, given = 20 * 6_738_415_616 / 0.8, run(), run("amber_7b", "--dp_shard=2")
    capsys.readouterr()
    for available, dp_shard in ((edge * 1.001, 1), (edge * 0.999, 4)):
        assert choose_layout(amber, 8, 4, available).dp_shard == dp_shard
        said = capsys.readouterr().out
        assert said.startswith(f"dp_shard {dp_shard}, ") and said.count("\n") == 1
        assert "20 bytes a parameter are 134.8 GB" in said
        assert f"80% of a GPU are {available * 0.8 / 1e9:.1f} GB" in said
    choose_layout(given, 8, 4, edge)  # there is no rule
    choose_layout(amber, 8, 8, None)
    choose_layout(amber, 1, 8, edge)
    assert capsys.readouterr().out == ""


def test_the_gpus_of_the_plan_are_those_of_the_command_line():
    assert typing.get_args(typing.get_type_hints(PlanOptions)["gpu"]) == tuple(GPUS)


@pytest.mark.parametrize("world, sizes, ranks", [
    (48, "1,920 or 2,400", "40 or 56"), (128, "1,280 or 2,560", "112 or 140"),
    (256, "2,048 or 2,304", "224 or 280"), (512, "2,048 or 2,560", "448 or 560")])
def test_batches_that_do_not_divide(world, sizes, ranks):
    said = error(run(), world)
    assert f"nearest batch sizes that do: {sizes};" in said
    assert said.endswith(f"for 2,240 rows: {ranks}")
    for n in ranks.split(" or "):
        config = run("amber_7b", "--micro_batch_size=1")
        assert not layout_errors(config, layout_of(config, int(n), 1))
    for size in sizes.split(" or "):
        config = run("amber_7b", f"--batch_size={size.replace(',', '')}")
        assert not layout_errors(config, layout_of(config, world, 1))


@pytest.mark.parametrize("world, flags, said", [
    (64, [], "64 data-parallel ranks has 35 rows, which do not divide by micro_batch_size = 10: "
             "give --micro_batch_size=7"),
    (6, ["--tp=2", "--pp=2"], "does not divide 6 ranks: start 4 or 8"),
    (3, ["--tp=4"], "does not divide 3 ranks: start 4"),
    (8, ["--dp_shard=3"], "dp_shard = 3 does not divide the 8 data-parallel ranks: "
                          "give --dp_shard=2 or 4"),
    (8, ["--dp_shard=16"], "give --dp_shard=8"),
    (6, ["--tp=3"], "tp = 3 does not divide n_head = 32, n_kv_head = 32, n_inner = 11008, "
                    "vocab_size = 32000, seq_len = 2048: give --tp=2 or 4"),
    (8, ["--tp=8", "--n_kv_head=4"], "tp = 8 does not divide n_kv_head = 4: give --tp=4"),
    (64, ["--pp=64", "--micro_batch_size=1"], "64 stages want a block each, the model has 32"),
    (8, ["--pp_stages=2"], "pp_stages = 2, but there is no pipeline"),
    (448, ["--pp=2"], "2 pipeline stages want 2 micro-batches or more, a rank has 1 of 10 rows: "
                      "give --micro_batch_size=5"),
    (4480, ["--pp=2"], "a rank has 1 of 1 rows: give --batch_size=4480"),
    (64, ["--pp=2", "--pp_stages=2"], "in a multiple of 2, a rank has 7 of 10 rows: "
                                      "give --micro_batch_size=7"),
    (320, ["--pp=4", "--pp_stages=2", "--micro_batch_size=4"],
     "8 pipeline stages want 8 micro-batches or more, in a multiple of 4, a rank has 7 of 4 rows: "
     "give --micro_batch_size=1")])
def test_other_layouts_that_cannot_be(world, flags, said):
    assert said in error(run("amber_7b", *flags), world)


def test_errors_are_told_together():
    config = run("amber_7b", "--tp=3", "--n_layer=2", "--pp=4", "--micro_batch_size=1")
    assert len(layout_errors(config, layout_of(config, 12, 1))) == 2


# ---- what fits -----------------------------------------------------------------------------------

MICRO, FULL, SHARD, GPUS_MORE = ("a --micro_batch_size below 10", "--recompute=full",
                                 "a --dp_shard above", "more or larger GPUs")


@pytest.mark.parametrize("flags, world, per_node, available, turned", [
    ((), 224, 4, A100, [MICRO, FULL, f"{SHARD} 4"]), ((), 8, 8, H100, [MICRO, FULL]),
    (("--micro_batch_size=1",), 1, 1, 118e9, [FULL]),
    (("--recompute=full",), 1, 1, A100, [MICRO]),
    (("--micro_batch_size=1", "--recompute=full", "--dp_shard=1"), 8, 8, A100, [f"{SHARD} 1"]),
    (("--micro_batch_size=1", "--recompute=full"), 1, 1, A100, [])])
def test_what_can_be_turned(flags, world, per_node, available, turned):
    """What is missing, by kind, and the keys that still make it smaller."""
    config = run("amber_7b", *flags)
    layout = choose_layout(config, world, per_node, available)
    kinds = memory(config, layout, True, True)
    with pytest.raises(Stop) as stop:
        check_fits(config, layout, available, True, True)
    said = str(stop.value)
    assert stop.value.code == ENVIRONMENT and "\n" not in said
    assert f"needs {sum(kinds.values()) / 1e9:,.1f} GB" in said
    assert all(f"{kind} {n / 1e9:.1f}" in said for kind, n in kinds.items() if n)
    assert said.endswith(f"what makes it smaller: {', '.join([*turned, GPUS_MORE])}")
    check_fits(config, layout, sum(kinds.values()) / 0.95 * 1.001, True, True)  # raises nothing
    check_fits(config, layout, sum(kinds.values()) / 0.95 / 1.19, True, True, slack=1.2)


def test_each_change_saves_memory():
    """In one layout, smaller micro-batches and more recomputation take less."""
    config = run()
    for compiled in (False, True):
        used = []
        for flags in ((), ("--recompute=selective",), ("--recompute=full",)):
            for micro in (10, 5, 2, 1):
                one = run("amber_7b", *flags, f"--micro_batch_size={micro}")
                used.append(sum(memory(one, layout_of(config, 8, 8), True, compiled).values()))
        assert all(used[i] > used[i + 1] for i in range(11) if i % 4 != 3)
        assert all(used[i] > used[i + 4] for i in range(8))


# ---- time and disk -------------------------------------------------------------------------------

@pytest.mark.numeric
def test_the_papers_figures():
    """582.4k tokens/s on 224 A100s are 25.0 days for 1.2584e12 tokens."""
    amber, (_, peak) = run(), GPUS["a100-80"]
    tokens = steps_of(amber) * 2240 * 2048
    assert steps_of(amber) == 274_320 and tokens == 1_258_448_486_400
    mfu = 582.4e3 * flops_per_token(amber.model) / (224 * peak)
    assert days(amber, tokens, 224, peak, mfu) == pytest.approx(25.0, abs=0.05)
    assert mfu == pytest.approx(0.357, abs=5e-4) and 0.357 in plan.MFUS.values()
    embedding = 6 * 32000 * 4096  # which other tables count: they say 36.4 %
    assert mfu * (1 + embedding / flops_per_token(amber.model)) == pytest.approx(0.364, abs=5e-4)
    assert disk(amber) == (360 * 4 * 6_738_415_616, 10 * 8 * 6_738_415_616)


def test_steps_and_disk_of_other_runs():
    assert steps_of(run("crystalcoder_7b_stage1")) == 79_721  # max_steps, before the queue ends
    assert steps_of(run("amber_7b", "--rows_per_chunk=none")) is None
    assert steps_of(run("amber_7b", "--rows_per_chunk=none", "--max_steps=9")) == 9
    assert steps_of(run("amber_7b", "--epochs=2")) == 2 * 274_320
    assert disk(run("amber_7b", "--max_steps=763"))[0] == 2 * 4 * 6_738_415_616
    few = run("amber_7b", "--rows_per_chunk=100", "--max_steps=5")
    assert steps_of(few) == 5 and disk(few)[0] == 360 * 4 * 6_738_415_616


def test_the_printed_plan(capsys, monkeypatch):
    def said(*flags: str) -> str:
        assert not train.main([str(REPO / "configs/amber_7b.py"), "--plan", *flags])
        return capsys.readouterr().out
    began = time.monotonic()
    text = said("--world_size=224", "--gpu=a100-80", "--gpus_per_node=4", "--recompute=selective",
                "--micro_batch_size=5")
    assert time.monotonic() - began < 5  # about half a second; the machine may be busy
    for words in ("6,738,415,616 parameters", "dp_replicate 56, dp_shard 4, tp 1", "25.0 days",
                  "5 x 2048 tokens at a time", "274,320 steps", "9.70 TB of weights",
                  "539.1 GB of moments", "it fits"):
        assert words in text, words
    for kind in memory(run(), Layout(1, 1, 1, 1, 1, 1), True, True):
        assert f"  {kind} " in text
    text = said("--mfu=0.5", "--micro_batch_size=1", "--rows_per_chunk=none", "--recompute=full")
    assert text.count("MFU") == 1 and "the data decides" in text and "8 x h100-80" in text
    with pytest.raises(Stop, match="smaller: a --micro_batch_size below 10"):
        said("--world_size=224", "--gpu=a100-80", "--gpus_per_node=4", "--recompute=none")


def test_the_demo_fits_anywhere():
    demo = run("demo")
    layout = choose_layout(demo, 8, 8, 4e9)
    assert layout.dp_shard == 1
    check_fits(demo, layout, 4e9, True, False)
