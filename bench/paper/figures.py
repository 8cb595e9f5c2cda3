"""Draw the figures of ``bench paper``, at the width of a page, and legible at that of a column."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bench.output import wrote
from bench.paper.claims import NEAR, Curve, Grid, Lengths, best_decay, multiplier, taken, usable, usable_rates
from bench.paper.digits import STEPS_PER_EPOCH
from bench.plot import plt, write

TITLES = {"SGD": "SGD with L2", "SGDW": "SGDW", "Adam": "Adam with L2", "AdamW": "AdamW"}
COLORS = {"SGD": "tab:orange", "SGDW": "tab:green", "Adam": "tab:red", "AdamW": "tab:blue"}
STYLE = {
    "figure.dpi": 130,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": False,
}
WIDTH = 7  # inches


def draw(
    grids: dict[tuple[str, str], Grid],
    short: list[Curve],
    long: list[Curve],
    lengths: Lengths,
    folder: Path,
) -> None:
    """Write the five figures."""
    figures = {
        "paper_1_coupling": lambda: heatmaps(
            [[grids[n, "cosine"] for n in pair] for pair in (("SGD", "SGDW"), ("Adam", "AdamW"))]
        ),
        "paper_2_schedules": lambda: heatmaps(
            [[grids[n, s] for s in ("fixed", "step", "cosine")] for n in ("Adam", "AdamW")]
        ),
        "paper_3_curves": lambda: learning_curves(short),
        "paper_4_restarts": lambda: restarts(long),
        "paper_5_length": lambda: run_lengths(lengths),
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


def heatmaps(rows: list[list[Grid]]) -> Figure:
    """Draw test error over learning rate and weight decay, on one colour scale."""
    from matplotlib import pyplot as plt

    means = [100 * grid.errors.mean(0) for row in rows for grid in row]
    lowest = min(mean.min() for mean in means)
    norm = LogNorm(lowest, 4 * lowest)
    columns = len(rows[0])
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(WIDTH, 2.9 * len(rows) if columns == 2 else 2.7 * len(rows)), layout="constrained"
    )
    for row, row_axes in zip(rows, axes, strict=True):
        for grid, ax in zip(row, row_axes, strict=True):
            mean = 100 * grid.errors.mean(0)
            image = ax.pcolormesh(mean, norm=norm, cmap="viridis", edgecolors="white", linewidth=0.4)
            mark(ax, grid)
            i, j = grid.best()
            title = f"{TITLES[grid.algorithm]}: " if columns == 2 else f"{TITLES[grid.algorithm]}, {grid.schedule}\n"
            ax.set_title(f"{title}best {mean[i, j]:.1f} %")
            every = 1 if columns == 2 else 2
            x, y = np.arange(len(grid.decays)), np.arange(len(grid.rates))
            ax.set_xticks(x[::every] + 0.5, thousandths(grid.decays)[::every])
            ax.set_yticks(y + 0.5, thousandths(grid.rates))
            ax.tick_params(length=0)
            ax.set_xlabel("weight decay λ (10⁻³)" if grid.algorithm.endswith("W") else "L2 factor λ (10⁻³)")
            if grid is row[0]:
                ax.set_ylabel("learning rate α (10⁻³)")
    bar = figure.colorbar(image, ax=axes, extend="max", aspect=40, pad=0.02)
    plain_ticks(bar.ax, lowest, 4 * lowest)
    bar.set_label("test error (%)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def mark(ax: Axes, grid: Grid) -> None:
    """Mark the best cell, and the best decay of each learning rate."""
    mean, rates = grid.errors.mean(0), np.array(usable_rates(grid), dtype=int)
    start, step = np.log2(grid.decays[1]), np.log2(grid.decays[2] / grid.decays[1])
    at = [(best_decay(mean[i, 1:], grid.decays[1:]) - start) / step + 1.5 for i in rates]
    label = f"best λ of a learning rate (middle of those within {100 * NEAR:.1f} points)"
    style = {"markerfacecolor": "none", "markeredgecolor": "white", "markersize": 5, "color": "white"}
    ax.plot(at, rates + 0.5, "o-", linewidth=0.8, label=label, **style)
    i, j = grid.best()
    ax.plot(j + 0.5, i + 0.5, "*", markersize=10, color="white", markeredgecolor="black", label="best of all")
    legend_on_white(ax)


def legend_on_white(ax: Axes) -> None:
    """Outline the white marks of the heatmap, which would not show in a legend."""
    for line in ax.get_lines():
        line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])


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
        right.plot(c.losses.mean(0), 100 * c.errors.mean(0), ".-", linewidth=1, markersize=3, **style)
    left.set(yscale="log", xlabel="epoch", ylabel="training loss (nats)")
    highest = 5 * 100 * min(c.errors.mean(0).min() for c in curves)
    middle.set(ylim=(None, highest), xlabel="epoch", ylabel="test error (%)")
    right.set(xscale="log", ylim=middle.get_ylim(), xlabel="training loss (nats)", ylabel="test error (%)")
    right.invert_xaxis()
    right.xaxis.set_minor_formatter("")
    left.yaxis.set_minor_formatter("")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for ax in (left, middle, right):
        ax.grid(alpha=0.25)
    return figure


def restarts(curves: list[Curve]) -> Figure:
    """Draw any-time test error with and without restarts, above the multipliers."""
    figure, axes = plt.subplots(
        2, 2, figsize=(WIDTH, 4.3), layout="constrained", sharex="col", sharey="row", height_ratios=(3, 1)
    )
    for pair, (top, bottom) in zip((curves[:2], curves[2:]), axes.T, strict=True):
        for c, color, label in zip(pair, ("tab:blue", "tab:red"), ("one cosine", "warm restarts"), strict=True):
            band(top, c.epochs, 100 * c.errors, color=color, label=label)
            bottom.plot(*multiplier(c), color=color, linewidth=1)
            if c.schedule == "restarts":
                style = {"color": "black", "linestyle": "--", "drawstyle": "steps-post", "linewidth": 1.3}
                top.plot(c.epochs, 100 * taken(c).mean(0), label="… network of the last finished cycle", **style)
        top.set_title(f"{pair[0].algorithm} and {pair[1].algorithm}R")
        bottom.set(xlabel="epoch", ylim=(0, 1.05))
        for ax in (top, bottom):
            ax.grid(alpha=0.25)
    means = [100 * c.errors.mean(0) for c in curves]
    low, high = 0.9 * min(m.min() for m in means), 1.1 * max(m.max() for m in means)
    axes[0, 0].set(yscale="log", ylim=(low, high), ylabel="test error (%)")
    plain_ticks(axes[0, 0], low, high)
    axes[1, 0].set_ylabel("multiplier η")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def run_lengths(lengths: Lengths) -> Figure:
    """Draw test error of runs of several lengths, over the raw and over the normalized decay."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), layout="constrained", sharey=True)
    colors = plt.get_cmap("plasma")(np.linspace(0, 0.85, len(lengths.epochs)))
    means = 100 * lengths.errors.mean(0)
    found = usable(means / 100)
    for ax, normalized in zip(axes, (False, True), strict=True):
        for row, (epochs, mean, color) in enumerate(zip(lengths.epochs, means, colors, strict=True)):
            x = lengths.decays * (np.sqrt(STEPS_PER_EPOCH * epochs) if normalized else 1)
            ax.plot(x, mean, ".-", color=color, linewidth=1, markersize=4, label=f"{epochs}")
            if row in found:
                best = best_decay(mean / 100, x)
                y = np.interp(best, np.log2(x), mean)
                ax.plot(2**best, y, "v", color=color, markeredgecolor="black", markersize=7)
        ax.set(xscale="log", yscale="log", ylim=(0.9 * means.min(), 5 * means.min()))
        ax.set_xlabel("λ_norm = λ √(BT/b)" if normalized else "λ")
        ax.set_title("normalized weight decay" if normalized else "raw weight decay")
        ax.grid(alpha=0.25)
    plain_ticks(axes[0], *axes[0].get_ylim())
    axes[0].set_ylabel("test error (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), title="epochs (▼ the best decay)", loc="outside right center")
    return figure
