"""muP measured: does the best learning rate of a narrow model hold for a wide one?

    python tests/mup.py            # about 20 minutes on two cores; `make mup`
    python tests/mup.py --plot     # only draw assets/mup.json again

Trains CrystalCoder's block at widths 64 to 512 under a range of learning rates, once in muP and
once in the standard parametrisation (SP: no tied head, one std, one rate), and finds the best rate
of every width. Reads the standard library of the running Python, as the demo does. Writes
assets/mup.json (settings, versions, tables, facts) and assets/mup.png; prints the tables. Exits
with 5 if a fact does not hold: in muP the best rate stays and wider is better, in SP it moves.

The functions of the coordinate check, which test_mup.py asks for, are here too: how large is every
activation, and how far does a step of Adam move it, at each width?
"""

import dataclasses
import hashlib
import importlib.util
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from any folder
from model import Transformer, flops_per_token, init_weights, param_groups, tensor_classes
from nano360.config import (ENVIRONMENT, NUMERICAL, USAGE, ModelConfig, OptimConfig, Source, Stop,
                            run, say)
from nano360.sources import find_files
from train import lr_at

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WIDTHS = (64, 128, 256, 512)
RATES = {"muP": range(-11, -3), "SP": range(-12, -3)}  # log2 of the peak learning rate
STEPS, BATCH, LAST = 150, 16, 20  # LAST: a run's figure is its mean loss over so many steps
CORPUS = 480_000  # bytes of the standard library, of the files whose code the demo takes
OPTIM = OptimConfig(lr=1.0, min_lr=0.1, schedule="linear", warmup_steps=STEPS // 10,
                    batch_size=BATCH, weight_decay=0.1, grad_clip=1.0, beta1=0.9, beta2=0.95,
                    eps=1e-9)

# CrystalCoder's block with heads of 16, of which 8 dimensions rotate. Depth is no part of muP.
BLOCK = ModelConfig(n_layer=2, n_head=4, n_embd=64, n_inner=170, vocab_size=256, seq_len=64,
                    norm="layer", norm_eps=1e-5, bias=True, rotary_dim=8, rope_interleaved=True)
# CrystalCoder's base width, std and embedding factor are 256, 0.073 and 14.6. Here the base is a
# quarter of that, the std twice as large and the factor half: 0.073 x 14.6 = 0.146 x 7.3.
MODELS = {
    "muP": dataclasses.replace(BLOCK, tie=True, init_std=0.146, mup_base_width=64,
                               mup_emb_mult=7.3, mup_alpha=2.22),
    "SP": dataclasses.replace(BLOCK, init_std=0.02),
}


def widened(config: ModelConfig, width: int) -> ModelConfig:
    """The same model at another width: more heads of 16, not larger ones, and F = 8/3 C."""
    return dataclasses.replace(config, n_embd=width, n_head=width // 16, n_inner=8 * width // 3)


def adamw(model: Transformer, lr: float) -> torch.optim.AdamW:
    """AdamW with the model's own groups, each at its multiple of the rate."""
    optimizer = torch.optim.AdamW(param_groups(model, OPTIM.weight_decay), lr=lr, eps=OPTIM.eps,
                                  betas=(OPTIM.beta1, OPTIM.beta2))
    set_lr(optimizer, lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


# ---- transfer: the best learning rate of every width ---------------------------------------------

def corpus() -> torch.Tensor:
    """The first 480,000 bytes of stdlib:code, files in the order of their names: (n,) int64."""
    text = b""
    for _, path in find_files(Source(name="code", path="stdlib:code"))[0]:
        text += path.read_bytes()
        if len(text) >= CORPUS:
            break
    return torch.frombuffer(bytearray(text[:CORPUS]), dtype=torch.uint8).long()


def batches(data: torch.Tensor, T: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random windows (BATCH, T) and their next bytes, the same ones for every run."""
    generator = torch.Generator().manual_seed(0)
    while True:
        start = torch.randint(len(data) - T, (BATCH, 1), generator=generator)
        rows = data[start + torch.arange(T + 1)]  # (BATCH, T + 1)
        yield rows[:, :-1], rows[:, 1:]


def train(name: str, width: int, power: int, seed: int = 0) -> tuple[float, float]:
    """One run at the peak rate 2^power -> (mean loss of the last steps, seconds it took)."""
    began = time.monotonic()
    config = widened(MODELS[name], width)
    model = Transformer(config)
    init_weights(model, seed)
    optimizer, losses = adamw(model, 0.0), []
    draws = batches(corpus(), config.seq_len)
    for step in range(1, STEPS + 1):
        idx, targets = next(draws)
        set_lr(optimizer, 2.0**power * lr_at(step, OPTIM, STEPS))
        loss = model(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    figure = sum(losses[-LAST:]) / LAST
    return figure if math.isfinite(figure) else math.inf, time.monotonic() - began


Runs = dict[tuple[str, int, int], tuple[float, float]]  # (name, width, power) -> (loss, seconds)


def one_thread() -> None:
    torch.set_num_threads(1)


def sweep(cells: list[tuple[str, int, int]], workers: int = 2) -> Runs:
    """Train every (name, width, power), the longest first, in processes of one thread each."""
    cost = {cell: flops_per_token(widened(MODELS[cell[0]], cell[1])) for cell in cells}
    done: Runs = {}
    # Spawned, not forked: a fork of a process whose torch has threads can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), one_thread)
    bar = tqdm(total=sum(cost.values()), desc=f"{len(cells)} runs",
               bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left")
    with pool, bar:
        running = {pool.submit(train, *cell): cell for cell in sorted(cells, key=cost.get)[::-1]}
        for future in as_completed(running):
            name, width, power = cell = running[future]
            done[cell] = future.result()
            bar.write(f"{name:<4} width {width:<4} lr 2^{power:<4} loss {done[cell][0]:.3f}"
                      f"  {done[cell][1]:.0f} s")
            bar.update(cost[cell])
    return done


def table(runs: Runs, name: str) -> dict[int, dict[int, float]]:
    """Width -> log2 of the rate -> loss, both in ascending order."""
    rows: dict[int, dict[int, float]] = {}
    for _, width, power in sorted(cell for cell in runs if cell[0] == name):
        rows.setdefault(width, {})[power] = runs[name, width, power][0]
    return rows


def optima(rows: dict[int, dict[int, float]]) -> dict[int, int]:
    """Width -> log2 of its best rate."""
    return {width: min(row, key=row.get) for width, row in rows.items()}


def best_overall(rows: dict[int, dict[int, float]]) -> int:
    """log2 of the one rate whose losses, summed over the widths, are the lowest."""
    powers = set.intersection(*(set(row) for row in rows.values()))
    return min(powers, key=lambda power: sum(row[power] for row in rows.values()))


def moved(rows: dict[int, dict[int, float]]) -> int:
    """How far the best rate moves over the widths, in factors of two."""
    best = optima(rows).values()
    return max(best) - min(best)


def inside(rows: dict[int, dict[int, float]]) -> bool:
    """No best rate lies at the end of its grid, where the true one might be beyond."""
    best = optima(rows)
    return all(min(row) < best[width] < max(row) for width, row in rows.items())


def facts(mup: dict[int, dict[int, float]], sp: dict[int, dict[int, float]]) -> dict[str, bool]:
    """What muP promises and what SP does, in words with the figures -> whether it is so."""
    fixed, span = best_overall(mup), max(mup) // min(mup)
    at_fixed = [row[fixed] for row in mup.values()]
    wider = all(b < a for a, b in zip(at_fixed, at_fixed[1:], strict=False))
    losses = ", ".join(f"{loss:.3f}" for loss in at_fixed)
    return {
        f"muP: over {span} times the width the best rate moves by a factor of "
        f"{2**moved(mup)} (at most 2)": moved(mup) <= 1 and inside(mup),
        f"muP: at the one rate 2^{fixed} wider is always better ({losses})": wider,
        f"SP: over {span} times the width the best rate moves by a factor of "
        f"{2**moved(sp)} (4 or more)": moved(sp) >= 2,
    }


def show(rows: dict[int, dict[int, float]], name: str) -> str:
    """A table as text; a star behind the best rate of every width."""
    best = optima(rows)
    powers = sorted({power for row in rows.values() for power in row})
    lines = [f"{name:<6}" + "".join(f"{f'2^{power}':>8} " for power in powers)]
    for width, row in rows.items():
        cells = (f"{row[power]:>8.3f}{'*' if power == best[width] else ' '}" for power in powers)
        lines.append(f"{width:<6}" + "".join(cells))
    return "\n".join(lines)


def record(runs: Runs, seconds: float) -> dict:
    """What assets/mup.json holds. A loss that is not finite becomes null: json has no word."""
    data = corpus().to(torch.uint8).numpy().tobytes()
    tables = {name: table(runs, name) for name in MODELS}
    content = {
        "settings": {
            "widths": WIDTHS, "steps": STEPS, "batch_size": BATCH, "seed": 0,
            "figure": f"mean training loss of the last {LAST} steps", "optimizer": {
                key: getattr(OPTIM, key) for key in (
                    "schedule", "warmup_steps", "weight_decay", "grad_clip", "beta1", "beta2",
                    "eps")} | {"min_lr": "a tenth of the peak"},
            "models": {name: dataclasses.asdict(config) for name, config in MODELS.items()},
            "wider": "n_head = C / 16, n_inner = 8 C // 3",
            "corpus": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "machine": platform.machine()},
        "seconds": round(seconds), "fixed_rate": best_overall(tables["muP"]),
        "facts": facts(*tables.values())}
    for name, rows in tables.items():
        losses = {width: {power: round(loss, 4) if math.isfinite(loss) else None
                          for power, loss in row.items()} for width, row in rows.items()}
        spent = {width: round(sum(s for (n, w, _), (_, s) in runs.items() if (n, w) == (
            name, width)) / len(row), 1) for width, row in rows.items()}
        content[name] = {"loss": losses, "optimum": optima(rows), "seconds_per_run": spent}
    return content


# ---- the figure ----------------------------------------------------------------------------------

def need_matplotlib() -> None:
    """Before the sweep: nobody waits a quarter of an hour to hear it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Stop(ENVIRONMENT, "the figure needs matplotlib: pip install matplotlib")


def plot(content: dict, path: Path) -> None:
    """Draw what assets/mup.json holds: loss over learning rate, one line per width."""
    need_matplotlib()
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = ["#9ecae1", "#4f9bcb", "#1f64ad", "#08214f"]  # light to dark as it grows wider
    titles = {"muP": "muP: the best rate stays", "SP": "SP: the best rate moves with the width"}
    for axes, name in zip(panels, MODELS, strict=True):
        for colour, (width, row) in zip(colours, content[name]["loss"].items(), strict=True):
            points = {int(power): math.nan if loss is None else loss for power, loss in row.items()}
            best = int(content[name]["optimum"][width])
            axes.plot(*zip(*points.items(), strict=True), "-o", color=colour, markersize=3.5,
                      linewidth=1.8, label=width)
            axes.plot(best, points[best], "*", color=colour, markersize=17, zorder=3,
                      markeredgecolor="white", markeredgewidth=0.8)
        axes.set_title(titles[name])
        axes.set_xlabel("peak learning rate" + (
            ", of which matrices inside get 64 / width" if name == "muP" else ""))
        powers = sorted({int(power) for row in content[name]["loss"].values() for power in row})
        axes.set_xticks(powers, [f"$2^{{{power}}}$" for power in powers])
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"training loss, last {LAST} of {STEPS} steps")
    panels[0].legend(title="width (star: best rate)", frameon=False, ncols=2, loc="upper left")
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    if argv not in ([], ["--plot"]):
        raise Stop(USAGE, f"expected nothing or --plot, got {' '.join(argv)!r}")
    need_matplotlib()
    path = ASSETS / "mup.json"
    if not argv:
        began = time.monotonic()
        runs = sweep([(name, width, power) for name in MODELS for width in WIDTHS
                      for power in RATES[name]])
        content = record(runs, time.monotonic() - began)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        say("\n" + "\n\n".join(show(table(runs, name), name) for name in MODELS) + "\n")
    content = json.loads(path.read_text(encoding="utf-8"))
    plot(content, path.with_suffix(".png"))
    for fact, holds in content["facts"].items():
        say(f"{'holds' if holds else 'FAILS'}  {fact}")
    if not all(content["facts"].values()):
        raise Stop(NUMERICAL, "a fact does not hold; see assets/mup.json")


# ---- the coordinate check: sizes of activations, and of what a few steps change ------------------

Values = dict[str, torch.Tensor]
Spoil = Callable[[Transformer, torch.optim.AdamW], None]


def markov(V: int = 256, B: int = 8, T: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch (B, T) of a random Markov chain of four likely successors, and its next tokens."""
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(V, (V, 4), generator=generator)
    rows = [torch.randint(V, (B,), generator=generator)]
    for _ in range(T):
        rows.append(successors[rows[-1], torch.randint(4, (B,), generator=generator)])
    rows = torch.stack(rows, dim=1)  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def activations(model: Transformer, idx: torch.Tensor, targets: torch.Tensor) -> Values:
    """One forward pass: the embedding after its factor, every addition to the residual stream, the
    last norm, the logits, and the margin: target logit minus mean logit, averaged over tokens."""
    watched = {"embedding": model.model["embed_tokens"]}
    for i, block in enumerate(model.model["layers"]):
        watched |= {f"attention {i}": block.self_attn, f"mlp {i}": block.mlp}
    watched["last norm"] = model.model["norm"]
    seen: Values = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            seen[name] = output.float()
        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    logits = model(idx)
    for handle in handles:
        handle.remove()
    # the factor is applied outside the module that the hook watches
    seen["embedding"] = seen["embedding"] * tensor_classes(model.config)["embedding"].forward
    target = logits.gather(-1, targets[..., None])[..., 0]
    return seen | {"logits": logits, "margin": (target - logits.mean(-1)).mean()}


def coordinates(config: ModelConfig, seed: int, spoil: Spoil | None = None, steps: int = 6,
                lr: float = 0.01) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Train on one fixed batch -> (mean |x_t|, mean |x_t - x_0|), a dict for each t = 0 .. steps.

    spoil(model, optimizer) may break something first, to see that the check notices.
    """
    model = Transformer(config)
    init_weights(model, seed)
    optimizer = adamw(model, lr)
    if spoil:
        spoil(model, optimizer)
        set_lr(optimizer, lr)
    idx, targets = markov(config.vocab_size)
    sizes, changes = [], []
    for step in range(steps + 1):
        now = activations(model, idx, targets)
        if step == 0:
            first = now
        sizes.append({name: x.abs().mean().item() for name, x in now.items()})
        changes.append({name: (x - first[name]).abs().mean().item() for name, x in now.items()})
        optimizer.zero_grad()
        model(idx, targets).backward()
        optimizer.step()
    return sizes, changes


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def exponents(rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """Width -> name -> value, to the name's exponent: the slope of log(value) over log(width)."""
    x = torch.tensor([math.log(width) for width in rows], dtype=torch.float64)
    x = x - x.mean()
    fitted = {}
    for name in next(iter(rows.values())):
        y = torch.tensor([math.log(row[name]) for row in rows.values()], dtype=torch.float64)
        fitted[name] = ((x * y).sum() / (x * x).sum()).item()
    return fitted


if __name__ == "__main__":
    sys.exit(run(main, __doc__, []))
