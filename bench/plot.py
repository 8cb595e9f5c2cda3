"""Draw: GB/s against size with the ceiling, bars of speed beside torch's fused step."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from bench.arms import FUSED

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
# Blue and orange of Okabe and Ito, which colour-blind readers tell apart.
OURS, SLOWER, PEER, CEILING = "#0072B2", "#E69F00", "tab:gray", "tab:red"


def color_of(arm: str) -> str:
    """Return the colour of an arm: ours, the ceiling, or another's."""
    return OURS if arm.startswith("fused_adamw") else CEILING if arm.startswith("ceiling") else PEER


def bars(report: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast as torch fused (or foreach) each arm is, from its 20th to its 80th percentile."""
    results = [r for r in report["results"] if not r["arm"].startswith("ceiling")]
    rows = []
    for r in results:
        if r["ratio_median"] is None:
            continue
        ratios = (r["ratio_median"] * r["ms_median"] / ms for ms in (r["ms_p80"], r["ms_median"], r["ms_p20"]))
        rows.append((" · ".join((r["workload"], r["algorithm"], r["dtypes"], r["arm"])), *ratios))
    than = "fused" if any(row[0].endswith(FUSED) for row in rows) else "foreach"
    speedups([row for row in rows if not row[0].endswith(FUSED)] or rows, path, title_of(report), than)


def speedups(rows: list[tuple[str, float, float, float]], path: Path, title: str, than: str = "fused") -> None:
    """Draw a bar for each (name, least, median, greatest ratio), from 1 to the median, and a line over the range."""
    figure, axes = plt.subplots(figsize=(5.6, 1.3 + 0.27 * len(rows)), dpi=200, layout="constrained")
    for y, (_, low, middle, high) in enumerate(rows):
        axes.barh(y, middle - 1, left=1, height=0.7, color=OURS if middle >= 1 else SLOWER)
        axes.plot([low, high], [y, y], color="black", linewidth=1.2)
        text = f"{middle:.2g}×" if middle >= 10 else f"{middle:.2f}×"
        axes.annotate(text, (max(high, 1), y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=f"times as fast as torch's {than} step (log scale)\nblue: faster, orange: slower")
    least, most = min(row[1] for row in rows), max(row[3] for row in rows)
    axes.set_xlim(min(0.5, 0.9 * least), 1.6 * max(most, 1))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(title, fontsize=9)
    write(figure, path)


def differences(rows: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Draw how far the loss of each form is from that of fp32: the mean of the seeds, and a line over their range."""
    figure, axes = plt.subplots(figsize=(5.6, 1.3 + 0.27 * len(rows)), dpi=200, layout="constrained")
    for y, (middle, low, high) in enumerate(rows.values()):
        axes.plot([low, high], [y, y], color=OURS, linewidth=2)
        axes.plot(middle, y, "o", color=OURS)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel("loss beside that of fp32 (nats per character)\nleft: better, right: worse")
    figure.suptitle("a character GPT: mean and range of its seeds", fontsize=9)
    write(figure, path)


def curves(report: dict[str, Any], path: Path, ceiling: float | None = None) -> None:
    """Draw GB/s against the bytes that a step moves, with the stream of each size, and the best of all as a line."""
    series: dict[str, list[dict[str, Any]]] = {}
    for r in report["results"]:
        series.setdefault(r["arm"], []).append(r)
    figure, axes = plt.subplots(figsize=(9, 5), dpi=150, layout="constrained")
    for (arm, rows), marker in zip(series.items(), itertools.cycle(".sv^DxP*")):
        x, y = [r["bytes"] / 1e6 for r in rows], [r["gb_per_s"] for r in rows]
        style = "--" if arm == "ceiling: copy" or arm.endswith(", graph") else "-"
        axes.plot(x, y, style, marker=marker, markersize=4, color=color_of(arm), label=arm)
    if ceiling:
        axes.axhline(ceiling, color=CEILING, linewidth=0.8, linestyle=":", label=f"the best stream: {ceiling:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="MB moved by a step of one tensor", ylabel="GB/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    entitle(figure, report)
    write(figure, path)


def entitle(figure: Any, report: dict[str, Any]) -> None:
    """Name the machine in the title."""
    figure.suptitle(title_of(report), fontsize=8)


def title_of(report: dict[str, Any]) -> str:
    """Return the machine, the versions and the date, in one line."""
    head = report["environment"]
    machine = head.get("GPU") or f"{head['CPU']}, {head['threads'].split(',')[0]} threads"
    version = f"torch {head['torch'].split(',')[0]}, fused_adamw {head['fused_adamw'].split(', backend')[0]}"
    return f"{machine}; {version}; {head['date'][:10]}"


def write(figure: Any, path: Path) -> None:
    """Write a picture to a file."""
    figure.savefig(path)
    plt.close(figure)
