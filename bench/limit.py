"""Measure how fast memory is, and how near to it a step of one tensor comes, in the caches and beyond."""

import argparse

import torch
from rich.table import Table

from bench import measures, stream
from bench.arms import DTYPES, Missing, arms_of, step_of
from bench.output import Report, begin, console, finish, new_table, number, progress, until_interrupted
from bench.summary import Result, summarized
from bench.timing import bytes_of_step, cpu_clock, cuda_clock, device_of, interleave

NOTES = """\
One tensor of so many elements, its buffers used over and over: small sizes stay in the caches, and the smallest show
what a call costs. stream reads and writes arrays of the same dtypes once; copy is torch's copy_ of a float32 array.
% = GB/s of the step / GB/s of the stream; ratio = ms of torch fused / ms of ours; medians of what each round gave."""


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files; after Ctrl-C with what there is."""
    device = device_of(args.device)
    head = begin(f"The memory's limit and a step of {args.algorithm}, {args.dtype}", args.threads, device)
    report: Report = {"environment": head, "results": [], "skipped": []}
    largest = min(args.largest, stream.LARGEST)
    sizes = [n for n in (1 << k for k in range(12, 27, 2)) if n <= largest] or [stream.LENGTH]
    with until_interrupted(report), progress() as bar:
        for n in bar.track(sizes, description="sizes"):
            measure(n, args, device, report)
    if report["results"]:
        console.print(report["results"][0]["formula"])
        console.print(table(report["results"]))
    return finish(report, NOTES, args, "curves")


def measure(n: int, args: argparse.Namespace, device: torch.device, report: Report) -> None:
    """Measure one size, and add its rows to the report."""
    storage = DTYPES[args.dtype]
    calls, results, shape = {}, [], None
    for arm in arms_of(args.algorithm, storage, device, ["fused"], False):
        params = measures.random_parameters([(n,)], storage.dtype, device)
        try:
            optimizer = arm.make(measures.grouped(params, [([(n,)], {})]))
        except Missing as error:
            report["skipped"].append({"case": f"{n} elements", "arm": arm.name, "reason": str(error)})
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
    times = interleave(calls, range(args.rounds), cpu_clock if device.type == "cpu" else cuda_clock)
    case = {"algorithm": args.algorithm, "dtypes": args.dtype, "parameters": n, "formula": str(shape)}
    report["results"] += summarized([{**case, **r, "seconds": times[r["arm"]]} for r in results])


def table(results: list[Result]) -> Table:
    """Make a line for each size."""
    arms = list(dict.fromkeys(r["arm"] for r in results))
    ours = [arm for arm in arms if arm.startswith("fused_adamw")]
    columns = [f"{arm}\n{what}" for arm in ours for what in ("% of stream", "ratio")]
    shown = new_table("elements", "MB", *(f"{arm.removeprefix('ceiling: ')}\nGB/s" for arm in arms), *columns, left=0)
    for n in dict.fromkeys(r["parameters"] for r in results):
        row = {r["arm"]: r for r in results if r["parameters"] == n}
        cells = [f"{n:,}", f"{next(iter(row.values()))['bytes'] / 1e6:.3g}"]
        cells += [f"{row[arm]['gb_per_s']:.1f}" for arm in arms]
        for arm in ours:
            cells += [number(row[arm]["of_ceiling"], ".0%"), number(row[arm]["ratio_median"], ".2f")]
        shown.add_row(*cells)
    return shown
