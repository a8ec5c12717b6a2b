"""Layouts of processes against one process; the seven traps of sharding, each sprung on purpose.

tests/parity.py compares all layouts with all variants; here is a cut of it. A layout's processes
are started once and look at all that this file asks of them. A trap is sprung from outside, by
giving the code what it would have had without its cure; the check that passes has to fail then.
"""
# ruff: noqa: F811 (fixtures)

import dataclasses
import datetime
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
import parity
import prepare
import train
from model import IGNORE, Block, Norm, Transformer, init_weights, local, param_groups, rope_tables
from nano360.checkpoints import moments_of
from nano360.config import load
from nano360.place import DIMS, Clock, Place, exchange
from parity import (VARIANTS, config_of, differences, equal, optimizer_of, place_of, reference,
                    spread, together, trained)
from test_stages import ONE
from test_train import loopback, prepared, words  # noqa: F401

pytestmark = pytest.mark.numeric

alone = pytest.mark.skipif(not loopback(), reason="no loopback interface: processes cannot talk")
ONE_PROCESS = Place(0, 1, torch.device("cpu"), torch.float32, False)
MARKS = (296, 297, 298)  # <|fim_prefix|> <|fim_middle|> <|fim_suffix|>
STEPS = 2


# ---- what a rank is asked ------------------------------------------------------------------------

def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def digests(model: Transformer) -> dict[str, str]:
    """Parameter -> sha256 of all of it, of those that this rank has a part of."""
    return {name: hashlib.sha256(whole(p).numpy().tobytes()).hexdigest()
            for name, p in model.named_parameters()}


def drawn_in_parts(model: Transformer) -> dict[str, str]:
    """The same after PyTorch's own initialisation of what is already sharded."""
    torch.manual_seed(1337)
    for p in model.parameters():
        nn.init.normal_(p.detach(), std=0.02)
    return digests(model)


def odd_tables(runner: object, config: object) -> list[str]:
    """The rotary tables of this rank that are not those of a plain model."""
    right = dict(zip(("cos", "sin"), rope_tables(config.model, torch.device("cpu")), strict=True))
    found = [(name, table) for stage in getattr(runner, "stages", [runner])
             for name, table in stage.named_buffers()]
    assert len(found) >= 2, "no rotary tables at all"
    return [name for name, table in found if not torch.equal(table, right[name])]


def tables_left_empty(config: object, place: Place) -> list[str]:
    """odd_tables where nobody fills them again after to_empty()."""
    parallel = sys.modules.get("nano360.scale.parallel")
    kinds = {Transformer, parallel.Stage} if parallel else {Transformer}
    real = {kind: kind.set_tables for kind in kinds}
    try:
        for kind, fill in real.items():
            def once(self, fill=fill):
                if not hasattr(self, "cos"):
                    fill(self)
            kind.set_tables = once
        torch.use_deterministic_algorithms(True)  # what is empty is filled with NaN
        return odd_tables(parity.build(config, place)[1], config)
    finally:
        torch.use_deterministic_algorithms(False)
        for kind, fill in real.items():
            kind.set_tables = fill


def mean_loss(config: object, place: Place, rows: np.ndarray) -> float:
    """The loss that the loop would log for a batch."""
    runner = parity.build(config, place)[1]
    n = len(rows) // place.dp_world
    mine = rows[place.dp_rank * n:(place.dp_rank + 1) * n]
    loss = train.forward_backward(runner, mine, n, place, Clock(place.device))
    return float(exchange([loss], place)[place.speakers].mean())


def types_of_tables(config: object, place: Place) -> set[str]:
    """What rotate() gets in a run in bfloat16."""
    seen, real = set(), model_file.rotate
    def spy(x, cos, sin, interleaved):
        seen.update((str(cos.dtype), str(sin.dtype)))
        return real(x, cos, sin, interleaved)
    with patch.object(model_file, "rotate", spy):
        together(config, dataclasses.replace(place, dtype=torch.bfloat16), 1)
    return seen


def meshes(model: Transformer) -> tuple[int, list[str]]:
    """On how many meshes the parameters lie, and which are no DTensor."""
    plain = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    return len({p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}), plain


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that is made in here and is somewhere, so not on meta."""
    bytes = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.device.type == "cpu":
                self.bytes = max(self.bytes, local(one).nbytes)
        return made


# ---- what the ranks of each layout do ------------------------------------------------------------

def on_fsdp2(fim: np.ndarray, masked: np.ndarray) -> dict:
    layout = "fsdp2"
    found = {"steps": trained(layout, ["crystal", "selective"], STEPS)}
    config, place = config_of(VARIANTS["crystal"], layout), place_of(layout)
    with torch.device("meta"):
        model = Transformer(config.model)
    with Largest() as largest:
        runner = train.parallelize(model, place, config)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    found["bytes"] = (largest.bytes, sum(local(p).untyped_storage().nbytes()
                                         for p in model.parameters()), sizes)
    init_weights(model, config.data.seed)
    found["digests"], found["tables"] = digests(model), odd_tables(runner, config)
    found["in parts"] = drawn_in_parts(model)
    for name, rows in (("fim", fim), ("masked", masked)):
        found[name] = mean_loss(config_of(dict(vocab_size=300, seq_len=32), layout), place, rows)

    real = train.forward_backward
    def scaled(runner, *args):  # each gradient larger by a hundredth
        loss = real(runner, *args)
        for p in runner.parameters():
            p.grad.mul_(1.01)
        return loss
    with patch.object(train, "forward_backward", scaled):
        found["scaled"] = trained(layout, ["crystal"], 1)
    found["types"] = types_of_tables(config, place)
    copies = dataclasses.replace(place, mesh=init_device_mesh("cpu", (1, 2, 1, 1),
                                                              mesh_dim_names=DIMS))
    found["ddp"] = together(config_of(VARIANTS["grouped"], "dp2"), copies, STEPS)
    found["imported"] = "nano360.scale.parallel" in sys.modules
    return found


class Nothing:
    """No arithmetic: what is multiplied by it is left as it is."""

    def __rmul__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def on_tp2() -> dict:
    layout = "tp2"
    found = {"steps": trained(layout, ["crystal", "compiled"], STEPS)}
    found["imported"] = "nano360.scale.parallel" in sys.modules
    from nano360.scale import parallel
    config, place = config_of(VARIANTS["crystal"], layout), place_of(layout)
    model, runner = parity.build(config, place)
    found["digests"], found["tables"] = digests(model), odd_tables(runner, config)
    found["meshes"] = meshes(model)
    rows = parity.some_rows(config, 1)[0]
    with loss_parallel():
        train.forward_backward(runner, rows, len(rows), place, Clock(place.device))
    grads = [whole(p.grad) for p in model.parameters()]
    found["norms"] = {"right": float(torch.nn.utils.get_total_norm(grads)),
                      "ours": float(train.norm_of(model, place))}
    with patch.object(parallel, "math", SimpleNamespace(prod=lambda sizes: 1)):
        found["norms"]["each copy counted"] = float(train.norm_of(model, place))
    found["in parts"] = drawn_in_parts(model)

    plan = {k: v for k, v in parallel.block_plan().items() if "norm" not in k}
    with patch.object(parallel, "block_plan", lambda: plan):
        found["plain norms"] = meshes(parity.build(config, place)[0])
    found["no tables"] = tables_left_empty(config, place)

    real = parallel.Stage.__init__
    def untouched(self, *args):
        real(self, *args)
        self.emb_mult = Nothing()
    with patch.object(parallel.Stage, "__init__", untouched):
        found["untouched"] = trained(layout, ["llama", "compiled"], 1)
    return found


def on_pp2(folder: str) -> dict:
    layout = "pp2"
    found = {"steps": trained(layout, ["crystal", "micro"], STEPS)}
    from nano360.scale import parallel
    config, place = config_of(VARIANTS["crystal"], layout), place_of(layout)
    model, runner = parity.build(config, place)
    found["digests"], found["tables"] = digests(model), odd_tables(runner, config)
    found["no tables"] = tables_left_empty(config, place)
    with patch.object(parallel, "owned", lambda model, place: dict(model.named_parameters())):
        found["tied twice"] = trained(layout, ["crystal"], 1)

    os.chdir(folder)  # and a run of its own, saved by two ranks
    argv = ["tiny.py", *PP2]
    own, manifest = load(argv)[0], prepare.read_manifest(Path("data/tiny"))
    train.go(own, manifest, place, Path("out/pp2"), argv, [])
    optimizer = train.start(own, place, train.make_plan(own, manifest), train.found(
        Path("out/pp2"), {"data_hash": manifest["data_hash"], "seed": own.data.seed}, place),
        None)[2]
    found["moments"] = {k: float(whole(v).norm()) for k, v in moments_of(optimizer).items()}
    for group in optimizer.param_groups:  # as the optimizer's own state_dict calls them
        group["names"] = [str(i) for i, _ in enumerate(group["names"])]
    found["numbered"] = list(moments_of(optimizer))
    return found


def on_mesh8() -> dict:
    layout = "pp2.fsdp2.tp2"
    found = {"steps": trained(layout, ["crystal_micro"], STEPS)}
    model, runner = parity.build(config_of(VARIANTS["crystal"], layout), place_of(layout))
    found["digests"], found["meshes"] = digests(model), meshes(model)
    found["tables"] = odd_tables(runner, config_of(VARIANTS["crystal"], layout))
    place = place_of(layout)
    groups = [place.mesh.get_group(dim) for dim in DIMS] + [runner.ties]
    found["patience"] = {one._get_backend(place.device).options._timeout for one in groups}
    copies = dataclasses.replace(place_of(layout), mesh=init_device_mesh(
        "cpu", (1, 2, 2, 2), mesh_dim_names=DIMS))
    found["copies"] = together(config_of(VARIANTS["llama"], "dp2.fsdp2.tp2"), copies, STEPS)
    return found


# ---- the layouts, each started once --------------------------------------------------------------

PP2 = ("--pp=2", "--micro_batch_size=4", "--max_steps=4", "--dtype=float32", "--run=pp2")
FIM = ONE.replace("weight=0.1)", "weight=0.1, fim_rate=0.9)")


@pytest.fixture(scope="module")
def fim(tmp_path_factory) -> tuple[np.ndarray, np.ndarray]:
    """Prepared rows with marks (8, 33): those with fewest, then those with most; and the same with
    no mark a target."""
    root = tmp_path_factory.mktemp("fim")
    (root / "one.py").write_text(FIM)
    for s, source in enumerate(("prose", "code")):
        (root / f"{source}.jsonl").write_text("\n".join(
            json.dumps({"text": words(20 + i, 1000 * s + i)}) for i in range(150)))
    with pytest.MonkeyPatch.context() as context:
        context.chdir(root)
        prepare.main(["one.py", "--workers=1"])
        data = Path("data/one")
        rows = np.array(prepare.open_rows(data, prepare.read_manifest(data), "train_000.bin"))
    order = np.argsort(np.isin(rows[:, 1:], MARKS).sum(1), kind="stable")
    rows = rows[[*order[:4], *order[-4:]]].astype(np.int64)
    masked = rows.copy()
    masked[:, 1:][np.isin(rows[:, 1:], MARKS)] = IGNORE
    return rows, masked


@pytest.fixture(scope="module")
def fsdp2(fim) -> list[dict]:
    return spread(2, on_fsdp2, *fim)


@pytest.fixture(scope="module")
def tp2() -> list[dict]:
    return spread(2, on_tp2)


@pytest.fixture(scope="module")
def pp2(prepared, tmp_path_factory) -> tuple[list[dict], Path]:
    root = tmp_path_factory.mktemp("pp2")
    (root / "data").symlink_to(prepared / "data")
    (root / "tiny.py").write_text((prepared / "tiny.py").read_text())
    return spread(2, on_pp2, str(root)), root


@pytest.fixture(scope="module")
def mesh8() -> list[dict]:
    return spread(8, on_mesh8)


@pytest.fixture(scope="module")
def plain() -> Transformer:
    """The model of "crystal" in one process, without parallelize."""
    model = Transformer(config_of(VARIANTS["crystal"]).model)
    init_weights(model, 1337)
    return model


def far(ranks: list[dict], variant: str, key: str = "steps", steps: int = STEPS
        ) -> dict[str, float]:
    """How far the ranks' steps are from those of one process."""
    return differences([rank[key][variant] for rank in ranks], reference(variant, steps))


def merged(ranks: list[dict], key: str) -> dict[str, str]:
    """What the ranks say of the parameters, which has to be the same wherever two have one."""
    found = {}
    for rank in ranks:
        for name, one in rank[key].items():
            assert found.setdefault(name, one) == one, f"{name} differs over ranks"
    return found


def stage_of(pp: int, at: int, config: object) -> Transformer:
    """The model as one rank of a pipeline keeps it, without the others."""
    from nano360.scale.parallel import split
    with torch.device("meta"):
        model = Transformer(config.model)
    split(model, SimpleNamespace(size=lambda dim: {"pp": pp}.get(dim, 1), at=lambda dim: at),
          config)
    return model


# ---- parity --------------------------------------------------------------------------------------

@alone
@pytest.mark.parametrize("variant", ["crystal", "selective"])
def test_fsdp2(fsdp2, variant):
    assert equal(far(fsdp2, variant)), far(fsdp2, variant)


@alone
@pytest.mark.parametrize("variant", ["crystal", "compiled"])
def test_tp2(tp2, variant):
    assert equal(far(tp2, variant)), far(tp2, variant)


@alone
@pytest.mark.parametrize("variant", ["crystal", "micro"])
def test_pp2(pp2, variant):
    assert equal(far(pp2[0], variant)), far(pp2[0], variant)


@alone
def test_eight_processes(mesh8, plain):
    """All three at once: the crystal family with grouped heads, recompute and micro-batches; and
    without a pipeline copies of shards."""
    assert equal(far(mesh8, "crystal_micro")), far(mesh8, "crystal_micro")
    copies = differences([rank["copies"] for rank in mesh8], reference("llama", STEPS))
    assert equal(copies), copies  # two copies of two shards
    assert merged(mesh8, "digests") == digests(plain)
    assert all(rank["meshes"] == (1, []) and rank["tables"] == [] for rank in mesh8)
    # --timeout is that of every group: else torch's own, which is shorter, would come before it
    assert [rank["patience"] for rank in mesh8] == 8 * [{datetime.timedelta(minutes=2, seconds=5)}]


@alone
def test_ddp(fsdp2):
    far_off = differences([rank["ddp"] for rank in fsdp2], reference("grouped", STEPS))
    assert equal(far_off), far_off


@alone
def test_the_comparison_can_fail(fsdp2, pp2):
    """Gradients a hundredth too large; a tied matrix of two stages whose norm is counted twice."""
    scaled, twice = far(fsdp2, "crystal", "scaled", 1), far(pp2[0], "crystal", "tied twice", 1)
    assert not equal(scaled) and scaled["loss"] < 1e-6
    assert scaled["norm"] == pytest.approx(0.01, rel=0.01)
    assert scaled["grads"] == pytest.approx(0.01, rel=0.01)
    assert not equal(twice) and twice["norm"] > 1e-2 and twice["grads"] < 1e-4
    right = reference("llama", 1)
    for step in ({"loss": float("nan")}, {"norm": float("inf")}, {"grads": {}}):
        assert not equal(differences([[right[0] | step]], right)), step
    assert equal(differences([right], right))


# ---- the seven traps -----------------------------------------------------------------------------

@alone
def test_1_tensor_parallel_and_compiled_blocks_keep_the_gradient_of_the_embedding(tp2):
    """What the embedding gives is on its way between ranks when the first block is called, and a
    compiled block that is the first to touch it loses its gradient; Stage multiplies it before."""
    assert equal(far(tp2, "compiled"))
    assert equal(far(tp2, "llama", "untouched", 1))  # not compiled: nothing is lost
    lost = far(tp2, "compiled", "untouched", 1)
    assert lost["loss"] < 1e-6 and not equal(lost)
    for rank in tp2:
        grads = rank["untouched"]["compiled"][0]["grads"]
        assert grads["model.embed_tokens.weight"] == 0


@alone
def test_2_the_moments_of_two_stages_have_names_of_their_own(pp2, monkeypatch):
    """Saved by a pipeline of two, read by one process: the moments of one that trained alone."""
    ranks, root = pp2
    assert not ranks[0]["moments"].keys() & ranks[1]["moments"].keys()
    assert set(ranks[0]["numbered"]) & set(ranks[1]["numbered"])  # by number they collide
    monkeypatch.chdir(root)
    train.main(["tiny.py", *PP2, "--pp=1", "--micro_batch_size=none", "--run=one"])
    config = load(["tiny.py", *PP2, "--pp=1", "--micro_batch_size=none"])[0]
    plan = train.make_plan(config, prepare.read_manifest(Path("data/tiny")))
    found = []
    for out in ("pp2", "one"):
        folder = Path("out") / out / "ckpt_000"
        state = json.loads((folder / "state.json").read_text())
        found.append(moments_of(train.start(config, ONE_PROCESS, plan, (folder, state), None)[2]))
    saved, should = found
    assert saved.keys() == should.keys() == ranks[0]["moments"].keys() | ranks[1]["moments"].keys()
    for name, one in should.items():
        assert one.norm() > 0 and (saved[name] - one).norm() < 1e-3 * one.norm(), name
    norms = ranks[0]["moments"] | ranks[1]["moments"]
    for name, one in saved.items():  # and those that the two ranks of the pipeline read
        assert float(one.norm()) == pytest.approx(norms[name], rel=1e-5), name


@pytest.mark.parametrize("variant", ["llama", "crystal"])
def test_3_a_stage_in_the_middle_has_no_empty_group(variant):
    """It has neither embedding nor head: groups are made of what it has, not of the whole."""
    config = config_of(VARIANTS[variant])
    with torch.device("meta"):
        every = param_groups(Transformer(config.model), 0.1)
    seen = []
    for at in range(4):
        model = stage_of(4, at, config)
        groups = param_groups(model, 0.1)
        assert groups and all(group["params"] for group in groups)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        seen += names
        optimizer_of(model, config, False)  # AdamW takes them
    tied = 1 if config.model.tie else 0
    assert len(seen) == len(set(seen)) + tied == sum(len(g["names"]) for g in every) + tied
    if variant == "crystal":  # sprung: of the whole model's groups, what the stage has
        inner = {name for name, _ in stage_of(4, 1, config).named_parameters()}
        assert not all([name for name in group["names"] if name in inner] for group in every)


@alone
def test_4_the_first_weights_are_the_same_on_every_layout(fsdp2, tp2, pp2, plain):
    """sha256 of each; drawn in shards, they would not be."""
    right = digests(plain)
    for ranks in (fsdp2, tp2, pp2[0]):
        assert merged(ranks, "digests") == right
    sprung = drawn_in_parts(Transformer(plain.config))
    for ranks in (fsdp2, tp2):
        assert ranks[0]["in parts"] != sprung


@alone
def test_5_rotary_tables_are_filled_again(fsdp2, tp2, pp2):
    for rank in (*fsdp2, *tp2, *pp2[0]):
        assert rank["tables"] == []
    for rank in (*tp2, *pp2[0]):  # sprung: memory after to_empty(), and anything in it
        assert rank["no tables"] == ["cos", "sin"]


@alone
def test_5_rotary_tables_stay_in_fp32(fsdp2):
    """In bfloat16, too, where blocks are gathered in it: as in one process, and under DDP."""
    assert [rank["types"] for rank in fsdp2] == [{"torch.float32"}] * 2


def test_5_rotary_tables_of_one_process():
    config = config_of({})
    assert odd_tables(parity.build(config, ONE_PROCESS)[1], config) == []
    assert tables_left_empty(config, ONE_PROCESS) == ["cos", "sin"]


@alone
def test_6_every_row_has_as_many_targets(fim, fsdp2):
    """So the mean of two ranks' means is the mean over all targets, filled in the middle or not.
    Without the marks among the targets it would not be: rows have them in unlike numbers."""
    rows, masked = fim
    marks = np.isin(rows[:, 1:], MARKS).sum(1)
    assert marks[:4].sum() < marks[4:].sum()
    assert rows.min() >= 0 and rows.max() < 300  # nothing of a row is left out
    config = config_of(dict(vocab_size=300, seq_len=32))
    model = Transformer(config.model)
    init_weights(model, config.data.seed)

    def mean(batch: np.ndarray) -> float:  # over all targets that count
        ids = torch.from_numpy(batch)
        with torch.no_grad():
            logits = model(ids[:, :-1].clamp(min=0))
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    for rank in fsdp2:
        assert rank["fim"] == pytest.approx(mean(rows), rel=1e-5)
        assert rank["masked"] != pytest.approx(mean(masked), rel=1e-5)
    halves = [mean(half) for half in (rows[:4], rows[4:], masked[:4], masked[4:])]
    assert sum(halves[:2]) / 2 == pytest.approx(mean(rows), rel=1e-6)
    assert sum(halves[2:]) / 2 != pytest.approx(mean(masked), rel=1e-5)


@alone
def test_7_every_parameter_is_on_one_mesh_and_counted_once(tp2):
    """Norms too, which tensor parallelism leaves whole: on a mesh of their own they could not be
    clipped with the others, and each of their copies would count."""
    for rank in tp2:
        assert rank["meshes"] == (1, [])
        assert rank["plain norms"][0] > 1 or rank["plain norms"][1]
        right, ours, twice = (rank["norms"][k] for k in ("right", "ours", "each copy counted"))
        assert ours == pytest.approx(right, rel=1e-5)
        assert twice > right * (1 + 1e-4)


# ---- besides -------------------------------------------------------------------------------------

def test_the_plan_names_every_matrix_and_norm_of_a_block():
    from nano360.scale.parallel import block_plan
    inside = {name for name, module in Block(config_of({}).model).named_modules()
              if isinstance(module, (nn.Linear, Norm))}
    assert len(inside) == 9 and inside <= block_plan().keys()
    assert block_plan().keys() - inside == {"self_attn", "mlp"}


@alone
def test_shards_need_no_parallel_py(fsdp2, tp2):
    """FSDP2 and DDP run without parallel.py; in a process that asked for tp it is there."""
    assert not any(rank["imported"] for rank in fsdp2)
    assert all(rank["imported"] for rank in tp2)


@alone
def test_no_rank_ever_holds_the_whole(fsdp2):
    """parallelize() begins on no device: what it makes is this rank's half of each tensor."""
    for rank in fsdp2:
        largest, kept, sizes = rank["bytes"]
        assert kept == pytest.approx(sum(sizes) / 2, rel=0.05)
        assert 0 < largest <= max(sizes) // 2


def test_processes_that_fail():
    """What one raises is said, and the others are ended."""
    with pytest.raises(RuntimeError, match="(?s)rank 1 of 2.*ZeroDivisionError"):
        spread(2, fail_on_one)
    assert not dist.is_initialized()


def fail_on_one() -> int:
    return 1 // (1 - int(os.environ["RANK"]))
