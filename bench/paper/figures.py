"""Draw the figures of ``bench paper``, at the width of a page, and legible at that of a column."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bench.output import wrote
from bench.paper.claims import OTHERS, SLOPES, Claim, Curve, Grids, multiplier, signed, taken
from bench.paper.digits import WITH_L2
from bench.paper.valleys import NEAR, Grid, Lengths, valleys
from bench.plot import plt, write

TITLES = {"SGD": "SGD with L2", "SGDW": "SGDW", "Adam": "Adam with L2", "AdamW": "AdamW"} | OTHERS
# Of Okabe and Ito: told apart by the colour-blind too.
BLUE, VERMILION = "#0072B2", "#D55E00"
COLORS = {"SGD": "#E69F00", "SGDW": "#009E73", "Adam": VERMILION, "AdamW": BLUE}
STYLE = {
    "figure.dpi": 160,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": False,
}
WIDTH = 7  # inches


def draw(
    grids: Grids,
    slopes: dict[tuple[str, str], Claim],
    curves: list[Curve],
    long: dict[str, tuple[Curve, Curve]],
    lengths: Lengths,
    folder: Path,
) -> None:
    """Write the seven figures."""

    def grid(name: str, schedule: str) -> Grid:
        return grids[name, schedule, "normalized"]

    figures = {
        "paper_1_coupling": lambda: coupling(
            [[grid(n, "cosine") for n in pair] for pair in (("SGD", "SGDW"), ("Adam", "AdamW"))], slopes
        ),
        "paper_2_networks": lambda: networks(grids),
        "paper_3_schedules": lambda: schedules(
            [[grid(n, s) for s in ("fixed", "step", "cosine")] for n in ("Adam", "AdamW")]
        ),
        "paper_4_curves": lambda: learning_curves(curves),
        "paper_5_restarts": lambda: restarts(long),
        "paper_6_length": lambda: run_lengths(lengths),
        "paper_7_others": lambda: least_errors(
            [[grid(n, "cosine") for n in pair] for pair in (("Adam", "AdamW"), tuple(OTHERS))]
        ),
    }
    for name, make in figures.items():
        with plt.rc_context(STYLE):
            write(make(), folder / f"{name}.png")
        wrote(folder / f"{name}.png")


def plain_ticks(ax: Axes, low: float, high: float) -> None:
    """Write percents in full on a logarithmic axis."""
    ticks = [t for t in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 40, 60) if low <= t <= high]
    limits = ax.get_ylim()
    ax.set_yticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()
    ax.set_ylim(limits)


def thousandths(values: np.ndarray) -> list[str]:
    """Return tick labels in units of 0.001, two digits each."""
    return [f"{1e3 * v:.2g}" if v < 0.0995 else f"{1e3 * v:.0f}" for v in values]


def coupling(rows: list[list[Grid]], slopes: dict[tuple[str, str], Claim]) -> Figure:
    """Draw the grids of four algorithms, with the slope of the best decay over each."""

    def title(grid: Grid) -> str:
        slope = slopes[grid.algorithm, grid.network]
        if slope.value is None:
            return TITLES[grid.algorithm]
        return f"{TITLES[grid.algorithm]}: slope {signed(slope.value)} ({slope.interval()})"

    return heatmaps(rows, title, every=2)


def schedules(rows: list[list[Grid]]) -> Figure:
    """Draw the grids of Adam and AdamW under three multipliers."""

    def title(grid: Grid) -> str:
        return f"{TITLES[grid.algorithm]}, {grid.schedule}: {100 * grid.errors.mean(0).min():.1f} %"

    return heatmaps(rows, title, every=3)


def least_errors(rows: list[list[Grid]]) -> Figure:
    """Draw the grids of several algorithms, with the least error of each."""
    return heatmaps(rows, lambda grid: f"{TITLES[grid.algorithm]}: {100 * grid.errors.mean(0).min():.1f} %", every=2)


def heatmaps(rows: list[list[Grid]], title: Callable[[Grid], str], every: int) -> Figure:
    """Draw test error over learning rate and weight decay, on one colour scale; label one in ``every`` decays"""
    means = [100 * grid.errors.mean(0) for row in rows for grid in row]
    lowest = min(mean.min() for mean in means)
    norm = LogNorm(lowest, 4 * lowest)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(WIDTH, 2.7 * len(rows)), layout="constrained")
    for row, row_axes in zip(rows, axes, strict=True):
        for grid, ax in zip(row, row_axes, strict=True):
            image = ax.pcolormesh(
                100 * grid.errors.mean(0), norm=norm, cmap="viridis", edgecolors="white", linewidth=0.3
            )
            mark(ax, grid)
            ax.set_title(title(grid))
            x, y = np.arange(len(grid.decays)), np.arange(len(grid.rates))
            ax.set_xticks(x[::every] + 0.5, thousandths(grid.decays[::every]), fontsize=8)
            ax.set_yticks(y + 0.5, thousandths(grid.rates), fontsize=8)
            ax.tick_params(length=0)
            ax.set_xlabel("L2 factor λ (10⁻³)" if grid.algorithm in WITH_L2 else "weight decay λ (10⁻³)")
            if grid is row[0]:
                ax.set_ylabel("learning rate α (10⁻³)")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=40, pad=0.02)
    plain_ticks(bar.ax, lowest, 4 * lowest)
    bar.set_label("test error (%)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def mark(ax: Axes, grid: Grid) -> None:
    """Mark the best cell, and the best decay of each learning rate with its interval."""
    start, step = np.log2(grid.decays[1]), np.log2(grid.decays[2] / grid.decays[1])
    found = valleys(grid)
    best, low, high = ((at - start) / step + 1.5 for at in found[1:])
    style = {"color": "white", "linewidth": 1, "path_effects": [withStroke(linewidth=2.6, foreground="black")]}
    for at in zip(low, high, found.rows + 0.5, strict=True):
        ax.hlines(at[2], *at[:2], **style)
    label = f"best λ of a learning rate: middle of those within {100 * NEAR:.1f} points, 95 % interval"
    ax.plot(best, found.rows + 0.5, "o-", markersize=4, label=label, **style)
    i, j = grid.best()
    ax.plot(j + 0.5, i + 0.5, "*", markersize=10, color="white", markeredgecolor="black", label="least error")


# The networks of the second figure, and what the theory says of the decoupled decay.
NETWORKS = {
    "normalized": "normalized\n(theory: 0, with L2 −1)",
    "plain head, not decayed": "plain head, not decayed\n(theory: 0)",
    "plain head": "plain head\n(theory: 0 to +1)",
    "ordinary": "ordinary\n(theory: 0 to +1)",
    "plain head, alone decayed": "plain head, alone decayed\n(theory: +1)",
    "unnormalized": "unnormalized\n(theory: +1)",
}


def networks(grids: Grids) -> Figure:
    """Draw the best decay over the learning rate, a panel for each network, beside the slopes of the theory."""
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 5), layout="constrained", sharex=True, sharey=True)
    for (network, title), ax in zip(NETWORKS.items(), axes.flat, strict=True):
        for name in (n for n, other in SLOPES if other == network):
            grid = grids[name, "cosine", network]
            found = valleys(grid)
            x, (best, low, high) = grid.rates[found.rows], (2**at for at in found[1:])
            line = "s--" if name in WITH_L2 else "o-"
            ax.plot(x, best, line, color=COLORS[name], markersize=4, linewidth=1.3, label=TITLES[name])
            ax.fill_between(x, low, high, color=COLORS[name], alpha=0.2, linewidth=0)
            if len(x) and (theory := SLOPES[name, network].value) is not None:
                x, y = (np.exp(np.log(values).mean()) for values in (x, best))
                style = {"color": "black", "linestyle": ":", "linewidth": 0.9}
                ax.axline((x, y), (2 * x, y * 2**theory), label="theory", **style)
        ax.set_title(title)
        ax.set(xscale="log", yscale="log", xlim=(6e-4, 1.6), ylim=(6e-4, 1.6))
        ax.grid(alpha=0.25)
    for ax in axes[1]:
        ax.set_xlabel("learning rate α")
    for ax in axes[:, 0]:
        ax.set_ylabel("best λ")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    named = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == "theory"))
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    return figure


def band(ax: Axes, x: np.ndarray, values: np.ndarray, **style: object) -> None:
    """Draw the mean over seeds, and its standard error."""
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    (line,) = ax.plot(x, mean, linewidth=1.3, **style)
    ax.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2, linewidth=0)


def learning_curves(curves: list[Curve]) -> Figure:
    """Draw training loss and test error by epoch, and one against the other."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(WIDTH, 2.9), layout="constrained")
    for c in curves:
        style = {"color": COLORS[c.algorithm], "label": TITLES[c.algorithm]}
        band(left, c.epochs, c.losses, **style)
        band(middle, c.epochs, 100 * c.errors, **style)
        band(right, c.losses.mean(0), 100 * c.errors, **style)
    left.set(title="training", yscale="log", xlabel="epoch", ylabel="training loss (nats)")
    highest = 5 * 100 * min(c.errors.mean(0).min() for c in curves)
    middle.set(title="test", ylim=(0, highest), xlabel="epoch", ylabel="test error (%)")
    right.set(title="test against training", xscale="log", xlim=(None, 0.5), ylim=(0, highest))
    right.set(xlabel="training loss (nats)", ylabel="test error (%)")
    right.invert_xaxis()
    right.xaxis.set_minor_formatter("")
    left.yaxis.set_minor_formatter("")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
    return figure


def restarts(long: dict[str, tuple[Curve, Curve]]) -> Figure:
    """Draw any-time test error with and without restarts, above the multipliers."""
    figure, axes = plt.subplots(
        2, 2, figsize=(WIDTH, 4.3), layout="constrained", sharex="col", sharey="row", height_ratios=(3, 1)
    )
    for (name, pair), (top, bottom) in zip(long.items(), axes.T, strict=True):
        for c, color, label in zip(pair, (BLUE, VERMILION), ("one cosine", "warm restarts"), strict=True):
            band(top, c.epochs, 100 * c.errors, color=color, label=label)
            bottom.plot(*multiplier(c), color=color, linewidth=1)
            if c.schedule == "restarts":
                style = {"color": "black", "linestyle": "--", "drawstyle": "steps-post", "linewidth": 1.3}
                top.plot(c.epochs, 100 * taken(c).mean(0), label="… network of the last finished cycle", **style)
        top.set_title(f"{name} and {name}R")
        bottom.set(xlabel="epoch", ylim=(0, 1.05))
        for ax in (top, bottom):
            ax.grid(alpha=0.25)
    means = [100 * c.errors.mean(0) for pair in long.values() for c in pair]
    low, high = 0.9 * min(m.min() for m in means), 1.1 * max(m.max() for m in means)
    axes[0, 0].set(yscale="log", ylim=(low, high), ylabel="test error (%)")
    plain_ticks(axes[0, 0], low, high)
    axes[1, 0].set_ylabel("multiplier η")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def run_lengths(lengths: Lengths) -> Figure:
    """Draw test error of runs of several lengths over the decay, raw and normalized, and the best decay."""
    figure, (*axes, right) = plt.subplots(1, 3, figsize=(WIDTH, 3.3), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(lengths.epochs)))
    for ax, normalized in zip(axes, (False, True), strict=True):
        for epochs, steps, errors, color in zip(
            lengths.epochs, lengths.steps, lengths.errors.swapaxes(0, 1), colors, strict=True
        ):
            x = lengths.decays * (np.sqrt(steps) if normalized else 1)
            band(ax, x, 100 * errors, color=color, label=f"{epochs}")
        ax.set(xscale="log", yscale="log", ylabel="test error (%)")
        ax.set_xlabel("λ_norm = λ √(BT/b)" if normalized else "weight decay λ")
        ax.set_title("over the normalized decay" if normalized else "over the decay")
        plain_ticks(ax, *ax.get_ylim())
    found = valleys(lengths)
    x, (best, low, high) = lengths.epochs[found.rows], (2**at for at in found[1:])
    right.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
    right.plot(x, best, "o-", color=BLUE, markersize=4, linewidth=1.3)
    guide = lengths.epochs / np.exp(np.log(lengths.epochs).mean())
    right.plot(lengths.epochs, np.exp(np.log(best).mean()) * guide**-0.5, ":", color="black", linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="epochs", ylabel="best weight decay λ")
    right.set_title("the best decay; dotted: −1/2")
    right.set_xticks(lengths.epochs, [str(e) for e in lengths.epochs])
    right.minorticks_off()
    for ax in (*axes, right):
        ax.grid(alpha=0.25)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, title="epochs", loc="outside lower center", ncols=len(lengths.epochs))
    return figure
