"""Summarize what was timed side by side, print it as a table, and explain its columns."""

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from bench import measures
from bench.arms import FOREACH, FUSED
from bench.output import new_table, number

MOST_SETS = 8  # on a GPU: a list that would need more to leave the cache is timed in it
NOTES = f"""\
GB/s = bytes / median ms; the formula of the bytes stands above each table. % of ceiling = GB/s of the arm / GB/s of the
stream, which reads and writes arrays of the same dtypes once, in the same rounds; copy is torch's copy_.
ratio = ms of torch fused / ms of the arm: above 1, the arm is faster. Both are medians of what each round gave. Where
torch fused is not timed, as of RAdam, which torch does not fuse, torch foreach takes its place.
cold: the calls go round so many sets of buffers that the caches would have to be twice as large to hold them.
warm: the caches may hold the one set that there is; on a GPU so is a list that would need more than {MOST_SETS} sets.
steady: ours on the same list without what changes before each step of the others, which is not timed.
first ms: the first step, with what it compiles and allocates. host µs: {{host}}.
launches: {{launches}}.
extra MB: the most that torch's allocator handed out during a step.
match: after {measures.CHECKED_STEPS} steps of the timed list, parameters and moments (of other projects, the parameters
alone) of up to 32 of its tensors are as near to the float64 result as those of torch's for-loop, within 1 ulp; beside
it a parameter's largest error."""
HOST = {
    "cpu": "a step of the same list with tensors of one element",
    "cuda": "until the call returns",
}
LAUNCHES = {
    "cpu": "kernels called, one for each tensor where torch goes through a list; ours, one parallel region",
    "cuda": "kernels and copies",
}

Result = dict[str, Any]


def summarized(results: list[Result]) -> list[Result]:
    """Add to the rows that were timed side by side the figures that follow from their times, and return them.

    A ceiling is the stream of the same shape, or else the first; a row without a "shape" takes that one.
    """
    rates = {r["arm"]: r["bytes"] / np.array(r["seconds"]) / 1e9 for r in results}
    streams = {r.get("shape"): rates[r["arm"]] for r in results if r["arm"].startswith("ceiling: stream")}
    first = next(iter(streams.values()), None)
    torchs = {r["arm"]: np.array(r["seconds"]) for r in results if r["arm"] in (FUSED, FOREACH)}
    torch_seconds = torchs.get(FUSED, torchs.get(FOREACH))
    for r in results:
        seconds, ceiling = np.array(r["seconds"]), streams.get(r.get("shape"), first)
        median, low, high = np.quantile(seconds, [0.5, 0.2, 0.8])
        ratio = None if torch_seconds is None or r["arm"].startswith("ceiling") else torch_seconds / seconds
        steady = next((np.array(x["seconds"]) for x in results if x["arm"] == f"{r['arm']}, steady"), None)
        r |= {
            "ms_median": median * 1e3,
            "ms_p20": low * 1e3,
            "ms_p80": high * 1e3,
            "gb_per_s": r["bytes"] / median / 1e9,
            "of_ceiling": None if ceiling is None else float(np.median(rates[r["arm"]] / ceiling)),
            "ratio_median": None if ratio is None else float(np.median(ratio)),
            "ratio_min": None if ratio is None else float(ratio.min()),
            "of_steady": None if steady is None else float(np.median(seconds / steady)),
        }
    return results


def table(results: list[Result]) -> Table:
    """Make a line for each arm of a case, and for the ceilings."""
    columns = ["arm", "dtypes", "ms (p20–p80)", "first\nms", "GB/s", "% of\nceiling", "ratio\n(min)", "host\nµs"]
    columns += ["launches", "extra\nMB", "match"]
    shown = new_table(*columns, left=2, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in shown.columns:
        column.no_wrap = True
    for r in results:
        if r["arm"] == "ceiling: stream":
            shown.add_section()
        cold = "" if r["sets"] == max(x["sets"] for x in results) or r["arm"].startswith("ceiling") else " (warm)"
        match = "" if r["match"] is None else f"{'✓' if r['match'] else '✗'} {r['max_ulp']:.2f} ulp"
        if r["match"] is None and not r["arm"].startswith("ceiling"):
            match = "not compared"
        shown.add_row(
            r["arm"] + cold,
            r["storage"],
            f"{r['ms_median']:.3g} ({r['ms_p20']:.3g}–{r['ms_p80']:.3g})",
            number(r["first_ms"], ".3g"),
            f"{r['gb_per_s']:.1f}",
            number(r["of_ceiling"], ".0%").rstrip("%"),
            "" if r["ratio_median"] is None else f"{r['ratio_median']:.2f} ({r['ratio_min']:.2f})",
            number(r["host_us"], ".0f"),
            number(r["launches"], ","),
            "" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e6:.1f}",
            match,
        )
    return shown
