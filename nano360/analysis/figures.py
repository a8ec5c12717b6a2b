"""Tables and a picture of memorization.jsonl.

    show(lines)                                    # of the rows and canaries that were asked for
    plot(lines, Path("out/demo/memorization.png"))

LLM360's three figures: how the scores of a checkpoint are distributed, over the chunks it has seen;
the mean score of every checkpoint on every chunk; and whether the rows that one checkpoint
remembers are those that another one does. Also: scores by source, how many rows longer prompts
extract, and canaries. The picture needs matplotlib, an optional package.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np

from nano360.config import ENVIRONMENT, Stop, columns

Lines = list[dict]
WIDE = 12  # columns of a table that fit a terminal


def load_matplotlib() -> ModuleType:
    """What draws. Raises Stop(ENVIRONMENT), before hours of work if it is called before them."""
    try:
        import matplotlib
        matplotlib.use("Agg")  # draws into files: no window
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise Stop(ENVIRONMENT, "--plot needs matplotlib: pip install matplotlib; the tables and "
                   "memorization.jsonl need nothing") from error
    return plt


# ---- what the lines say --------------------------------------------------------------------------

def of(lines: Lines, name: str, value: object) -> Lines:
    """The lines in which a key has this value."""
    return [line for line in lines if line[name] == value]


def values(lines: Lines, name: str) -> list:
    """The values of a key, each once, in the order of their first line."""
    return list(dict.fromkeys(line[name] for line in lines))


def seen(lines: Lines) -> Lines:
    """Rows that their checkpoint was trained on, or of which that is not known (None)."""
    return [line for line in lines if line["seen"] != 0]


def mean(lines: Lines) -> float:
    return float(np.mean([line["score"] for line in lines])) if lines else np.nan


def extracted(lines: Lines) -> float:
    """The share of rows that were said again to the last id: k-extractible (arXiv 2202.07646)."""
    return float(np.mean([line["score"] == 1 for line in lines])) if lines else np.nan


def name_of(visit: int | None) -> str:
    return "checkpoint" if visit is None else f"ckpt_{visit:03d}"


def grid(lines: Lines, measure: Callable[[Lines], float], down: str, across: str
         ) -> tuple[list, list, np.ndarray]:
    """A measure of the lines for every pair of values of two keys, and these values."""
    rows, cols = values(lines, down), values(lines, across)
    cells: dict[tuple, Lines] = {}
    for line in lines:
        cells.setdefault((line[down], line[across]), []).append(line)
    return rows, cols, np.array([[measure(cells.get((r, c), [])) for c in cols]
                                    for r in rows])


def correlations(lines: Lines) -> tuple[list, np.ndarray]:
    """Pearson's correlation of the scores of every two checkpoints, on the rows that both were
    asked for; nan where one of them has the same score everywhere."""
    visits = values(lines, "visit")
    scores = {v: {(line["data"], line["chunk"], line["row"]): line["score"]
                  for line in of(lines, "visit", v)} for v in visits}
    found = np.full((len(visits), len(visits)), np.nan)
    for i, a in enumerate(visits):
        for j, b in enumerate(visits):
            both = scores[a].keys() & scores[b].keys()
            pair = np.array([[scores[a][one], scores[b][one]] for one in both]).reshape(-1, 2)
            if len(both) > 1 and pair.std(axis=0).all():
                found[i, j] = np.corrcoef(pair.T)[0, 1]
    return visits, found


# ---- tables --------------------------------------------------------------------------------------

def table(lines: Iterable[Iterable[object]]) -> str:
    return "\n".join(columns(lines))


def number(value: float, form: str = ".4f") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def show_checkpoints(lines: Lines) -> None:
    """A line for each checkpoint and length of prompt: what it has seen, and what it has not."""
    known = any(line["seen"] is not None for line in lines)
    found = [["checkpoint", "k", "rows seen" if known else "rows", "score", "extracted", "not seen",
              "score", "extracted"]]
    for visit in values(lines, "visit"):
        for k in values(lines, "k"):
            mine = of(of(lines, "visit", visit), "k", k)
            yes, no = seen(mine), of(mine, "seen", 0)
            found.append([name_of(visit), k, f"{len(yes):,}", number(mean(yes)),
                          number(extracted(yes), ".2%"), f"{len(no):,}", number(mean(no)),
                          number(extracted(no), ".2%")])
    print(table(found))


def show_grid(title: str, lines: Lines, measure: Callable[[Lines], float], across: str) -> None:
    rows, cols, found = grid(lines, measure, "visit", across)
    if len(cols) > 1:
        print(f"\n{title}")
        head = [f"{c:03d}" if isinstance(c, int) else c for c in cols]
        print(table([["checkpoint", *head[:WIDE]]] + [
            [name_of(v), *(number(x) for x in line[:WIDE])]
            for v, line in zip(rows, found, strict=True)]))
        if len(cols) > WIDE:
            print(f"({len(cols) - WIDE} columns more are in memorization.jsonl)")


def show_canaries(lines: Lines) -> None:
    """For each checkpoint and number of plantings, 0 for controls: loss, rank, extraction."""
    found = [["checkpoint", "planted", "canaries", "seen", "nats", "lowest", "highest", "ranks",
              "extracted"]]
    for visit in values(lines, "visit"):
        for times in sorted(values(lines, "planted")):
            mine = of(of(lines, "visit", visit), "planted", times)
            nats, ranks = [one["nats"] for one in mine], [one["rank"] for one in mine]
            found.append([
                name_of(visit), times, len(mine),
                number(np.mean([np.nan if one["seen"] is None else one["seen"] for one in mine]),
                       ".1f"), f"{np.mean(nats):.2f}",
                f"{min(nats):.2f}", f"{max(nats):.2f}",
                " ".join(map(str, sorted(ranks))) if times else "-",
                sum(one["extracted"] for one in mine)])
    print("\ncanaries: nats of the secret; rank: 1 + how many controls (planted 0) have fewer")
    print(table(found))


def show(lines: Lines) -> None:
    """All tables of what one command asked for; grids are of the first length of prompt."""
    rows, canaries = of(lines, "kind", "row"), of(lines, "kind", "canary")
    show_checkpoints(rows)
    first = of(rows, "k", rows[0]["k"])
    show_grid("mean score by source, of rows seen", seen(first), mean, "source")
    show_grid("mean score by chunk", first, mean, "chunk")
    visits, found = correlations(first)
    if 1 < len(visits) <= WIDE:
        print("\ncorrelation of the scores of two checkpoints on the same rows")
        print(table([["", *map(name_of, visits)]] + [
            [name_of(v), *(number(x, ".3f") for x in line)]
            for v, line in zip(visits, found, strict=True)]))
    if canaries:
        show_canaries(canaries)


# ---- the picture ---------------------------------------------------------------------------------

def draw_distribution(ax: object, lines: Lines) -> None:
    """The share of a checkpoint's rows that have each score, of chunks it has seen."""
    visits = values(lines, "visit")
    some = [visits[i] for i in np.unique(np.linspace(0, len(visits) - 1, 10).astype(int))]
    for i, visit in enumerate(some):
        scores = np.array([line["score"] for line in seen(of(lines, "visit", visit))])
        if len(scores):
            bins = np.arange(lines[0]["l"] + 2) - 0.5
            share = np.histogram(scores * lines[0]["l"], bins)[0] / len(scores)
            share[share == 0] = np.nan  # which has no logarithm
            ax.plot(np.arange(len(share)) / lines[0]["l"], share, ".-", lw=0.8, ms=3,
                    color=f"{0.8 - 0.8 * i / max(1, len(some) - 1):.2f}" if i < len(some) - 1
                    else "tab:red", label=name_of(visit))
    ax.set(yscale="log", xlabel="score", ylabel="share of rows", title="scores on chunks seen")
    ax.legend(fontsize=6)


def draw_heat_map(ax: object, lines: Lines) -> None:
    """Mean score of every checkpoint on every chunk; a dot on the first one asked that has seen
    it."""
    rows, cols, found = grid(lines, mean, "visit", "chunk")
    image = ax.imshow(found, aspect="auto", cmap="viridis", origin="lower")
    ax.figure.colorbar(image, ax=ax, fraction=0.046)
    first: dict[object, object] = {}  # chunk -> checkpoint
    for line in lines:
        if line["seen"]:
            first.setdefault(line["chunk"], line["visit"])
    for c, v in first.items():
        ax.plot(cols.index(c), rows.index(v), "w.", ms=5)
    ax.set(xlabel="chunk", ylabel="checkpoint", title="mean score (dot: first that saw the chunk)",
           xticks=range(len(cols)), yticks=range(len(rows)))
    ax.set_xticklabels([str(c) for c in cols], fontsize=6)
    ax.set_yticklabels([str(v) for v in rows], fontsize=6)


def draw_correlation(ax: object, lines: Lines) -> None:
    visits, found = correlations(lines)
    image = ax.imshow(found, vmin=0, vmax=1, cmap="viridis", origin="lower")
    ax.figure.colorbar(image, ax=ax, fraction=0.046)
    ax.set(xlabel="checkpoint", ylabel="checkpoint", title="correlation of scores, same rows",
           xticks=range(len(visits)), yticks=range(len(visits)))
    ax.set_xticklabels([str(v) for v in visits], fontsize=6)
    ax.set_yticklabels([str(v) for v in visits], fontsize=6)


def draw_curves(ax: object, lines: Lines, measure: Callable[[Lines], float], by: str, title: str
                ) -> None:
    """A measure of the rows seen, checkpoint by checkpoint, one curve for each value of a key."""
    visits, cols, found = grid(seen(lines), measure, "visit", by)
    for i, column in enumerate(cols):
        ax.plot(range(len(visits)), found[:, i], "o-", ms=3, label=f"{by} {column}")
    ax.set(xlabel="checkpoint", title=title, xticks=range(len(visits)))
    ax.set_ylim(bottom=0)
    ax.set_xticklabels([str(v) for v in visits], fontsize=6)
    ax.legend(fontsize=6)


def draw_canaries(ax: object, lines: Lines) -> None:
    """Loss of each canary over the checkpoints, in front of the band of the controls."""
    visits = values(lines, "visit")
    controls = [[one["nats"] for one in of(of(lines, "visit", v), "planted", 0)] for v in visits]
    ax.fill_between(range(len(visits)), [*map(min, controls)], [*map(max, controls)],
                    color="0.85", label=f"{len(controls[0])} controls")
    colors = ("tab:blue", "tab:orange", "tab:red")
    for times, color in zip(sorted({*values(lines, "planted")} - {0}), colors, strict=False):
        mine = of(lines, "planted", times)
        for i, canary in enumerate(values(mine, "canary")):
            ax.plot(range(len(visits)), [one["nats"] for one in of(mine, "canary", canary)], "-",
                    color=color, lw=0.8, label=f"planted {times}" if i == 0 else None)
    ax.set(xlabel="checkpoint", ylabel="nats", title="canaries: loss of the secret",
           xticks=range(len(visits)))
    ax.set_xticklabels([str(v) for v in visits], fontsize=6)
    ax.legend(fontsize=6)


def plot(lines: Lines, path: Path) -> None:
    """Draw all figures of what one command asked for. Raises Stop(ENVIRONMENT)."""
    plt = load_matplotlib()
    rows, canaries = of(lines, "kind", "row"), of(lines, "kind", "canary")
    first = of(rows, "k", rows[0]["k"])
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    draw_distribution(axes[0, 0], first)
    draw_heat_map(axes[0, 1], first)
    draw_correlation(axes[0, 2], first)
    draw_curves(axes[1, 0], first, mean, "source", "mean score of rows seen")
    draw_curves(axes[1, 1], rows, extracted, "k", "share of rows seen that are extracted")
    if canaries:
        draw_canaries(axes[1, 2], canaries)
    else:
        axes[1, 2].set_axis_off()
    part = path.with_name(f"{path.name}.part")
    figure.savefig(part, dpi=110, format="png")
    part.rename(path)
    plt.close(figure)
