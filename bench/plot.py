"""Draw: GB/s against size with the ceiling, bars against the peers."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
OURS, PEER, CEILING = "tab:blue", "tab:gray", "tab:red"


def color_of(arm: str) -> str:
    """Return the colour of an arm: ours, the ceiling, or another's."""
    return OURS if arm.startswith("fused_adamw") else CEILING if arm.startswith("ceiling") else PEER


def bars(report: dict[str, Any], path: Path) -> None:
    """Draw for each case the GB/s of its arms, with whiskers from the 20th to the 80th percentile, and the stream's."""
    cases: dict[tuple, list[dict[str, Any]]] = {}
    for r in report["results"]:
        if not r["arm"].startswith("ceiling"):
            cases.setdefault((r["workload"], r["algorithm"], r["dtypes"]), []).append(r)
    rows = sum(map(len, cases.values())) + len(cases)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.27 * rows), dpi=150, layout="constrained")
    y, ticks, labels = 0, [], []
    for case, arms in cases.items():
        axes.text(0, y, " · ".join(case), va="center", fontweight="bold", fontsize=9)
        y += 1
        for r in arms:
            scale = r["gb_per_s"] * r["ms_median"]
            low, high = scale / r["ms_p80"], scale / r["ms_p20"]
            whiskers = [[r["gb_per_s"] - low], [high - r["gb_per_s"]]]
            axes.barh(y, r["gb_per_s"], color=color_of(r["arm"]), xerr=whiskers, error_kw={"linewidth": 0.8})
            ratio = "" if r["ratio_median"] is None else f"  {r['ratio_median']:.2f}×"
            axes.text(max(r["gb_per_s"], high), y, f"{ratio}  {r['ms_median']:.3g} ms", va="center", fontsize=7)
            ticks.append(y)
            labels.append(r["arm"])
            y += 1
        for stream in (r for r in report["results"] if (r["workload"], r["algorithm"], r["dtypes"]) == case):
            if stream["arm"] == "ceiling: stream":
                axes.vlines(stream["gb_per_s"], y - len(arms) - 0.5, y - 0.5, color=CEILING, linewidth=1.5)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_ylim(y, -1)
    axes.margins(x=0.2)
    axes.set(
        xlabel="GB/s of a full step(); red: a stream of the same reads and writes; ×: times as fast as torch fused"
    )
    entitle(figure, report)
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
    head = report["environment"]
    machine = head.get("GPU") or f"{head['CPU']}, {head['threads'].split(',')[0]} threads"
    version = f"torch {head['torch'].split(',')[0]}, fused_adamw {head['fused_adamw'].split(', backend')[0]}"
    figure.suptitle(f"{machine}; {version}; {head['date'][:10]}", fontsize=8)


def write(figure: Any, path: Path) -> None:
    """Write a picture to a file."""
    figure.savefig(path)
    plt.close(figure)
