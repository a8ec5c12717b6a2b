"""muP: the table's numbers, the coordinate check, whether it notices errors, and the transfer.

What a coordinate check is: activations, and their change in a few steps of Adam, have to be of one
size at every width. tests/mup.py has the functions; `make mup` is the transfer test in full.
"""

import dataclasses
import functools
import json
import math
import sys

import pytest
import torch

import mup
from conftest import REPO
from model import Transformer, class_of, init_weights, param_groups, tensor_classes
from mup import MODELS, WIDTHS, activations, average, coordinates, exponents, widened
from nano360.config import ENVIRONMENT, ModelConfig, Stop

pytestmark = pytest.mark.numeric

RIGHT = MODELS["muP"]
CONTROL = dataclasses.replace(RIGHT, mup_base_width=None, mup_emb_mult=1.0, mup_alpha=1.0)
SUBLAYERS = ("attention 0", "mlp 0", "attention 1", "mlp 1")
HIDDEN = ("embedding", *SUBLAYERS, "last norm")


# ---- the table -----------------------------------------------------------------------------------

def test_table_is_crystalcoders():
    """The numbers of CrystalCoder-7B's params.yaml, worked out by hand: m = 4096 / 256 = 16."""
    wide = dataclasses.replace(RIGHT, n_layer=32, n_head=32, n_embd=4096, n_inner=10922,
                               init_std=0.073, mup_base_width=256, mup_emb_mult=14.6)
    found = {name: (one.lr_mult, one.decays, one.forward)
             for name, one in tensor_classes(wide).items()}
    assert found == {
        "embedding": (1, True, 14.6), "in": (0.0625, True, 1), "out": (0.0625, True, 1),
        "head": (1, True, pytest.approx(0.13875)), "norm": (1, False, 1), "bias": (1, False, 1)}
    std = {name: one.std for name, one in tensor_classes(wide).items()}
    assert std == {"embedding": 0.073, "in": pytest.approx(0.01825), "head": 0.073,
                   "out": pytest.approx(0.00228125), "norm": None, "bias": 0}


def test_table_without_mup_is_ambers():
    """One std, one rate, decay on everything, at every width; and at m = 1 muP's rates are 1."""
    for width in WIDTHS:
        for name, one in tensor_classes(widened(MODELS["SP"], width)).items():
            assert (one.lr_mult, one.decays, one.forward) == (1, True, 1), name
            assert one.std == {"norm": None, "bias": 0}.get(name, 0.02), name
    assert {one.lr_mult for one in tensor_classes(widened(RIGHT, 64)).values()} == {1}


def test_weights_and_groups_follow_the_table():
    """Every parameter's std, bound, rate and decay; the tied matrix is in one group, once."""
    config = widened(RIGHT, 256)  # m = 4
    model, std = Transformer(config), {"embedding": 0.146, "in": 0.073, "out": 0.0365}
    init_weights(model, 0)
    for name, p in model.named_parameters():
        kind = class_of(name)
        if kind in std:  # a normal distribution cut at two std has 0.8796 of its std
            assert p.std().item() == pytest.approx(0.8796 * std[kind], rel=0.02), name
            assert p.abs().max() <= 2 * std[kind], name
        else:
            assert (p == (1 if kind == "norm" else 0)).all(), name
    given = {name: (group["lr_mult"], group["weight_decay"])
             for group in param_groups(model, 0.1) for name in group["names"]}
    assert len(given) == len(list(model.parameters())) and "lm_head.weight" not in given
    wanted = {"embedding": (1, 0.1), "in": (0.25, 0.1), "out": (0.25, 0.1), "norm": (1, 0),
              "bias": (1, 0)}
    assert all(given[name] == wanted[class_of(name)] for name in given)


# ---- the coordinate check ------------------------------------------------------------------------

def measure(config: ModelConfig, seeds: int = 1, spoil: mup.Spoil | None = None
            ) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Exponents of the sizes at step 0, and of the changes from step 3 on."""
    sizes, changes = {}, {}
    for width in WIDTHS:
        runs = [coordinates(widened(config, width), seed, spoil) for seed in range(seeds)]
        sizes[width] = average([run[0][0] for run in runs])
        changes[width] = [average([run[1][t] for run in runs]) for t in range(7)]
    # steps 1 and 2 are not looked at: small widths are not yet as they will be (down to -0.13)
    return exponents(sizes), [exponents({w: changes[w][t] for w in WIDTHS}) for t in range(3, 7)]


@functools.cache
def right() -> tuple[dict[str, float], list[dict[str, float]]]:
    return measure(RIGHT, seeds=3)


def faults(changes: list[dict[str, float]]) -> set[str]:
    """What does not keep its size. The plain logits may fall by width^-0.5: with a tied head that
    starts from random weights, that is how their random part falls. What learns is the margin."""
    return {name for exponent in changes for name in (*HIDDEN, "margin", "logits")
            if not (-0.5 < exponent[name] < 0 if name == "logits" else abs(exponent[name]) < 0.15)}


def test_coordinates_keep_their_size():
    """At step 0, and their changes, over eight times the width."""
    start, changes = right()
    assert all(abs(start[name]) < 0.05 for name in HIDDEN), start
    assert -0.55 < start["logits"] < -0.4  # std alpha s sqrt(C) / m
    assert not faults(changes), changes


def test_without_mup_they_grow():
    """The control: one std and one rate at every width. Norms keep their size by themselves."""
    start, changes = measure(CONTROL)
    assert all(start[name] > 0.3 for name in SUBLAYERS)
    assert all(exponent[name] > 0.3 for exponent in changes
               for name in (*SUBLAYERS, "margin", "logits")), changes


def forget_lr(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """lr instead of lr / m for the matrices inside."""
    for group in optimizer.param_groups:
        group["lr_mult"] = 1.0


@torch.no_grad()
def forget_width_init(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """std s instead of s / sqrt(m) for the matrices inside."""
    for name, p in model.named_parameters():
        if class_of(name) in ("in", "out"):
            p *= math.sqrt(model.config.n_embd / model.config.mup_base_width)


def forget_alpha_m(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """Logits times alpha instead of alpha / m: the norm before them gives m times as much."""
    m = model.config.n_embd / model.config.mup_base_width
    model.model["norm"].register_forward_hook(lambda module, args, output: output * m)


@torch.no_grad()
def forget_depth_init(model: Transformer, optimizer: torch.optim.AdamW | None = None) -> None:
    """s / sqrt(m) without the 1 / sqrt(2 L) for what leads into the residual stream."""
    for name, p in model.named_parameters():
        if class_of(name) == "out":
            p *= math.sqrt(2 * model.config.n_layer)


@pytest.mark.parametrize("spoil, grows", [
    (forget_lr, {"attention 0", "mlp 0"}),
    (forget_width_init, set(SUBLAYERS)),
    (forget_alpha_m, {"margin"}),
])
def test_an_error_shows(spoil, grows):
    """Each of muP's three rules, forgotten: what it held in place grows, far beyond the limits."""
    start, changes = measure(RIGHT, spoil=spoil)
    assert grows <= faults(changes)
    assert all(exponent[name] > 0.5 for exponent in changes for name in grows), changes
    assert (max(start[name] for name in SUBLAYERS) > 1) == (spoil is forget_width_init)
    if spoil is forget_alpha_m:
        assert all(bad["logits"] - good["logits"] > 0.7
                   for bad, good in zip(changes, right()[1], strict=True))


# ---- sizes at step 0, against pencil and paper ---------------------------------------------------

def expected() -> dict[str, float]:
    """mean |x| where every token stands alone, so that attention hands its own v on; any width.

    A norm gives C numbers of variance 1, a matrix of C columns and std w sums them to std
    sqrt(C) w. With w = 0.8796 s / sqrt(m) and C / m = 64 that is 8 x 0.8796 s =: a for q, k, v,
    gate and up, whatever the width. o takes v's a to a x a / sqrt(2 L) = a^2 / 2, and down does the
    same to silu(gate) up, over F = 8/3 C columns. mean |x| of a normal x is 0.798 of its std; of
    one that is cut at two std, as the embedding, 0.7228 of the std it had before.
    """
    a = 8 * 0.8796 * 0.146
    g = torch.linspace(-8, 8, 4001, dtype=torch.float64)  # E silu(a g)^2, a sum over the bell curve
    bell = (-g * g / 2).exp()
    silu = ((torch.nn.functional.silu(a * g) ** 2 * bell).sum() / bell.sum()).sqrt().item()
    return {"embedding": 0.7228 * 0.146 * 7.3, "attention": 0.798 * a * a / 2,
            "mlp": 0.798 * math.sqrt(8 / 3) * silu * a * a / 2, "last norm": 0.798}


def size_errors(spoil: mup.Spoil | None = None) -> dict[str, float]:
    """Name -> the worst ratio, over the widths, of the size measured to the size expected."""
    alone = torch.arange(RIGHT.vocab_size)[:, None]  # (V, 1)
    worst = {}
    for width in WIDTHS:
        rows = []
        for seed in range(3):
            model = Transformer(widened(RIGHT, width))
            init_weights(model, seed)
            if spoil:
                spoil(model, None)
            found = activations(model, alone, alone)
            rows.append({name: found[name].abs().mean().item() for name in HIDDEN})
        for name, size in average(rows).items():
            ratio = size / expected()[name.rstrip(" 01")]
            worst[name] = max(ratio, worst.get(name, ratio), key=lambda r: abs(math.log(r)))
    return worst


def test_sizes_at_step_0():
    """Within a tenth of what the table says they are; exponents alone would not see a factor."""
    assert all(abs(math.log(ratio)) < 0.1 for ratio in size_errors().values()), size_errors()


def test_a_forgotten_depth_factor_shows_in_sizes_alone():
    ratios = size_errors(forget_depth_init)
    assert all(ratios[name] == pytest.approx(2, rel=0.1) for name in SUBLAYERS), ratios
    assert all(abs(math.log(ratios[name])) < 0.1 for name in ("embedding", "last norm")), ratios


# ---- transfer ------------------------------------------------------------------------------------

def test_the_best_rate_transfers():
    """In short, of `make mup`: from width 32 to 128 it moves by a factor of two at most, and at the
    one rate that is best for both together the wider model is better. (Without muP it moves by a
    factor of eight between these two.)"""
    rows = mup.table(mup.sweep([("muP", width, power) for width in (32, 128)
                                for power in range(-8, -3)]), "muP")
    fixed = mup.best_overall(rows)
    assert mup.moved(rows) <= 1, rows
    assert rows[128][fixed] < rows[32][fixed], rows
    assert rows[32][fixed] < 3  # it learned: ln 256 = 5.5


def test_facts_are_judged():
    """A table where the rate stays and wider wins passes; one where it moves or wider loses not."""
    def bowl(best: int, depth: float) -> dict[int, float]:
        return {power: abs(power - best) / 10 - depth for power in range(-12, -3)}

    def judge(*best: int, gain: float = 0.1) -> list[bool]:
        rows = {width: bowl(b, gain * i)
                for i, (width, b) in enumerate(zip(WIDTHS, best, strict=True))}
        return list(mup.facts(rows, rows).values())

    assert judge(-6, -6, -6, -6) == [True, True, False]
    assert judge(-5, -6, -5, -6, gain=0.2) == [True, True, False]
    assert judge(-5, -6, -7, -7, gain=0.2) == [False, True, True]
    assert judge(-6, -6, -6, -6, gain=-0.1) == [True, False, False]
    assert judge(-12, -12, -12, -12)[0] is False  # at the end of the grid nothing is known


def test_the_shipped_figure_is_of_this_code():
    """assets/mup.json: its settings are those of mup.py, its facts follow from its tables."""
    content = json.loads((REPO / "assets/mup.json").read_text(encoding="utf-8"))
    settings = content["settings"]
    assert settings["widths"] == list(WIDTHS) and settings["steps"] == mup.STEPS
    for name, model in settings["models"].items():
        assert model.items() <= dataclasses.asdict(MODELS[name]).items()
    tables = [{int(width): {int(power): math.inf if loss is None else loss
                            for power, loss in row.items()}
               for width, row in content[name]["loss"].items()} for name in MODELS]
    assert [sorted(table) for table in tables] == [list(WIDTHS)] * 2
    assert mup.facts(*tables) == content["facts"] and all(content["facts"].values())


def test_figure_needs_matplotlib(monkeypatch, tmp_path):
    content = json.loads((REPO / "assets/mup.json").read_text(encoding="utf-8"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Stop) as stop:
        mup.plot(content, tmp_path / "mup.png")
    assert stop.value.code == ENVIRONMENT and "pip install matplotlib" in str(stop.value)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    mup.plot(content, tmp_path / "mup.png")
    assert (tmp_path / "mup.png").stat().st_size > 10_000
