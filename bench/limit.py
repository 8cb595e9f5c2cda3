"""How fast memory is, and how near to it a step of one tensor comes, in the caches and beyond."""

import argparse
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table

from bench import measures, stream
from bench.arms import DTYPES, FUSED, Missing, arms_of, step_of
from bench.step import device_of, save
from bench.timing import bytes_of_step, console, cpu_clock, cuda_clock, environment, interleave, print_head

NOTES = """\
One tensor of so many elements, its buffers used over and over: small sizes stay in the caches, and the smallest show
what a call costs. stream reads and writes arrays of the same dtypes once; copy is torch's copy_ of a float32 array.
% = GB/s of the step / GB/s of the stream; ratio = ms of torch fused / ms of ours; medians of what each round gave."""


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files; after Ctrl-C with what there is."""
    device = device_of(args.device)
    head = environment(args.threads, device)
    print_head(f"The memory's limit and a step of {args.algorithm}, {args.dtype}", head)
    report: dict[str, Any] = {"environment": head, "results": []}
    largest = min(args.largest, stream.LARGEST)
    sizes = [n for n in (1 << k for k in range(12, 27, 2)) if n <= largest] or [stream.LENGTH]
    interrupted = False
    try:
        for n in track(sizes, "sizes", console=console, transient=True, disable=not console.is_terminal):
            measure(n, args, device, report)
    except KeyboardInterrupt:
        interrupted = True
    if report["results"]:
        console.print(report["results"][0]["formula"])
        console.print(table(report["results"]))
        console.print(NOTES)
    as_plot, args.plot = args.plot, None
    save(report, args.json, args.csv, None)
    if as_plot and report["results"]:
        from bench.plot import curves

        curves(report, as_plot)
        console.print(f"wrote {as_plot}")
    if interrupted:
        found = "above is what was measured so far" if report["results"] else "nothing was measured"
        console.print(f"interrupted: {found}")
        return 130
    return 0


def measure(n: int, args: argparse.Namespace, device: torch.device, report: dict[str, Any]) -> None:
    """One size."""
    storage = DTYPES[args.dtype]
    calls, results, shape = {}, [], None
    for arm in arms_of(args.algorithm, storage, device, ["fused"], False):
        params = measures.random_parameters([(n,)], storage.dtype, device)
        try:
            optimizer = arm.make(measures.grouped(params, [([(n,)], {})]))
        except Missing as error:
            if n == stream.LENGTH:
                console.print(f"skipped: {arm.name}: {error}", style="yellow", markup=False)
            continue
        optimizer.step()
        calls[arm.name] = step_of(arm, [optimizer])
        shape = shape or stream.shape_of(optimizer)
        results.append({"arm": arm.name, "bytes": bytes_of_step(optimizer)})
    for name, each in (
        ("ceiling: stream", stream.stream(shape, n, device, cold=False)),
        ("ceiling: copy", stream.copy(n, device, cold=False)),
    ):
        calls[name] = each.call
        results.append({"arm": name, "bytes": each.bytes})
    times: dict[str, list[float]] = {name: [] for name in calls}
    interleave(calls, range(args.rounds), times, cpu_clock if device.type == "cpu" else cuda_clock)
    rates = {r["arm"]: r["bytes"] / np.array(times[r["arm"]]) / 1e9 for r in results}
    for r in results:
        seconds = np.array(times[r["arm"]])
        r |= {
            "algorithm": args.algorithm,
            "dtypes": args.dtype,
            "parameters": n,
            "formula": str(shape),
            "ms_median": float(np.median(seconds)) * 1e3,
            "gb_per_s": float(np.median(rates[r["arm"]])),
            "of_ceiling": float(np.median(rates[r["arm"]] / rates["ceiling: stream"])),
            "ratio_median": float(np.median(times[FUSED] / seconds)),
            "seconds": times[r["arm"]],
        }
    report["results"] += results


def table(results: list[dict[str, Any]]) -> Table:
    """A line for each size."""
    arms = list(dict.fromkeys(r["arm"] for r in results))
    shown = Table("elements", "MB", *(f"{arm.removeprefix('ceiling: ')}\nGB/s" for arm in arms))
    for arm in arms:
        if arm.startswith("fused_adamw"):
            shown.add_column(f"{arm}\n% of stream")
            shown.add_column(f"{arm}\nratio")
    for column in shown.columns:
        column.justify = "right"
    for n in dict.fromkeys(r["parameters"] for r in results):
        row = {r["arm"]: r for r in results if r["parameters"] == n}
        cells = [f"{n:,}", f"{next(iter(row.values()))['bytes'] / 1e6:.3g}"]
        cells += [f"{row[arm]['gb_per_s']:.1f}" for arm in arms]
        for arm in arms:
            if arm.startswith("fused_adamw"):
                cells += [f"{row[arm]['of_ceiling']:.0%}", f"{row[arm]['ratio_median']:.2f}"]
        shown.add_row(*cells)
    return shown
