"""Full optimizer.step() calls on the workloads of tests/cases.py, ours against torch's."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fused_adamw
from bench.timing import bytes_of_step, console, environment, interleave, print_head
from tests import cases

DEFAULT = [name for name in cases.WORKLOADS if name != "1x16M"]
OURS, FUSED, LOOP, FOREACH = "fused_adamw", "torch fused", "torch for-loop", "torch foreach"
CHECKED_STEPS = 3
NOTES = f"""\
GB/s = bytes / median ms, bytes = 2·parameter + gradient + 2·(first + second moment): 28 per float32 parameter;
lists of a few MB stay in the caches.
ratio = ms of torch fused / ms of the arm, round by round: above 1, the arm is faster.
match = after {CHECKED_STEPS} steps of the timed list, parameters and moments of up to 32 of its tensors are as near to
the float64 result as those of torch's for-loop, within 1 ulp; beside it the largest error of a parameter."""


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the JSON file; after Ctrl-C with what there is."""
    head = environment(args.threads)
    print_head("optimizer.step() of AdamW", head)
    workloads = args.workload or DEFAULT
    dtype = getattr(torch, args.dtype)
    report: dict[str, Any] = {"environment": head, "dtype": args.dtype, "copy_gb_per_s": None, "results": []}
    interrupted = False
    try:
        report["copy_gb_per_s"] = copy_bandwidth()
        for name in workloads:
            measure(name, dtype, args.rounds, args.all, report["results"])
    except KeyboardInterrupt:
        interrupted = True
    results = report["results"] = [{**r, **summary(r, report["results"])} for r in report["results"] if r["seconds"]]
    if results:
        console.print(table(results))
        console.print(NOTES)
    if report["copy_gb_per_s"]:
        rate = report["copy_gb_per_s"]
        console.print(f"For orientation: copy_ of a 268 MB array moves {rate:.1f} GB/s, read and written.")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {args.json}")
    if interrupted:
        console.print("interrupted: " + ("above is what was measured so far" if results else "nothing was measured"))
        return 130
    return 0 if all(r["match"] for r in results) else 1


def copy_bandwidth() -> float:
    """GB/s, the median of ten, of a copy that no cache holds."""
    source, target = torch.ones(1 << 26), torch.zeros(1 << 26)
    times: dict[str, list[float]] = {"copy": []}
    interleave({"copy": lambda: target.copy_(source)}, range(10), times)
    return 2 * source.nbytes / np.median(times["copy"]) / 1e9


def arms_of(dtype: torch.dtype, slow: bool) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """What is compared: makers of optimizers by name."""
    arms: dict[str, Callable[..., torch.optim.Optimizer]] = {OURS: fused_adamw.AdamW}
    if dtype is not torch.float32:
        # torch keeps its state in the parameters' dtype: the like-for-like arm.
        arms[f"{OURS}, state too"] = lambda p: fused_adamw.AdamW(p, state_dtype=dtype)
    arms[FUSED] = lambda p: torch.optim.AdamW(p, fused=True)
    if slow:
        arms[LOOP] = lambda p: torch.optim.AdamW(p, foreach=False)
        arms[FOREACH] = lambda p: torch.optim.AdamW(p, foreach=True)
    return arms


def measure(name: str, dtype: torch.dtype, rounds: int, slow: bool, results: list[dict[str, Any]]) -> None:
    """Check and time every arm on one workload; its result is in ``results`` from the first round on."""
    start = cases.parameters(cases.WORKLOADS[name](), dtype)
    cases.set_gradients(start, 0)
    oracle = stepped_sample(start, torch.float64)
    bounds = {d: stepped_sample(start, d) for d in (dtype, torch.float32)}
    optimizers, found = {}, []
    for arm, make in arms_of(dtype, slow).items():
        params = [torch.nn.Parameter(p.detach().clone()) for p in start]
        for p, q in zip(params, start, strict=True):
            p.grad = q.grad
        optimizers[arm] = make(params)
        for _ in checked_steps(params):
            optimizers[arm].step()
        got = {key: sample(t) for key, t in cases.tensors_of(optimizers[arm]).items() if key in oracle}
        found.append(
            {
                "workload": name,
                "arm": arm,
                "tensors": len(params),
                "parameters": sum(p.numel() for p in params),
                "bytes": bytes_of_step(optimizers[arm]),
                "max_ulp": max(cases.ulps(t, oracle[key]).max().item() for key, t in got.items() if key.endswith(".p")),
                "match": matches(f"{name}, {arm}", got, {k: bounds[t.dtype][k] for k, t in got.items()}, oracle),
                "seconds": [],
            }
        )
    results += found
    ticks = track(range(rounds), name, console=console, transient=True, disable=not console.is_terminal)
    interleave({a: o.step for a, o in optimizers.items()}, ticks, {r["arm"]: r["seconds"] for r in found})


def checked_steps(params: list[torch.nn.Parameter]) -> Iterator[int]:
    """The steps of the check: the gradient, which all arms share, changes after each, and is as it was at the end."""
    for i in range(CHECKED_STEPS):
        yield i
        for p in params:
            p.grad.mul_(-0.5 if i + 1 < CHECKED_STEPS else (-2.0) ** (CHECKED_STEPS - 1))


def sample(t: Tensor) -> Tensor:
    """The beginning and the end of a tensor, where it is long: the oracle of GPT-2 in whole would take 4 GB."""
    t = t.detach().flatten()
    return t if t.numel() <= 8192 else torch.cat([t[:4096], t[-4096:]])


def stepped_sample(start: list[torch.nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """The samples of up to 32 of the tensors, named by their places, as torch's for-loop steps them in ``dtype``."""
    chosen = np.unique(np.linspace(0, len(start) - 1, 32).astype(int)).tolist()
    params = [torch.nn.Parameter(sample(start[i]).to(dtype, copy=True)) for i in chosen]
    for p, i in zip(params, chosen, strict=True):
        p.grad = sample(start[i].grad).to(dtype, copy=True)
    optimizer = torch.optim.AdamW(params, foreach=False)
    for _ in checked_steps(params):
        optimizer.step()
    stepped = cases.tensors_of(optimizer)
    places = {str(j): str(i) for j, i in enumerate(chosen)}
    return {f"{places[key.split('.')[0]]}.{key.split('.')[1]}": t for key, t in stepped.items()}


def matches(title: str, got: dict[str, Tensor], bound: dict[str, Tensor], oracle: dict[str, Tensor]) -> bool:
    """The tests' tolerance, as a boolean; ``bound`` has the dtypes of ``got``, in whose ulps it counts."""
    try:
        cases.assert_no_worse(got, bound, oracle)
    except AssertionError as error:
        console.print(f"[red]no match[/red] of {title}: {error}")
        return False
    return True


def summary(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """Quantiles of an arm's time, its bandwidth, and its ratios to torch fused on the same workload."""
    fused = next(r for r in results if r["workload"] == result["workload"] and r["arm"] == FUSED)
    seconds = np.array(result["seconds"])
    ratios = np.array(fused["seconds"]) / seconds
    median, low, high = np.quantile(seconds, [0.5, 0.2, 0.8])
    return {
        "ms_median": median * 1e3,
        "ms_p20": low * 1e3,
        "ms_p80": high * 1e3,
        "gb_per_s": result["bytes"] / median / 1e9,
        "ratio_median": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
    }


def table(results: list[dict[str, Any]]) -> Table:
    """One line per workload and arm."""
    columns = ["workload", "tensors", "parameters", "arm", "ms (p20–p80)", "GB/s", "ratio (min)", "match"]
    shown = Table(*columns)
    for column in shown.columns:
        column.no_wrap = True
        column.justify = "left" if column.header in ("workload", "arm") else "right"
    last = None
    for r in results:
        if last not in (None, r["workload"]):
            shown.add_section()
        new, last = r["workload"] != last, r["workload"]
        shown.add_row(
            r["workload"] if new else "",
            f"{r['tensors']:,}" if new else "",
            f"{r['parameters']:,}" if new else "",
            r["arm"],
            f"{r['ms_median']:.3g} ({r['ms_p20']:.3g}–{r['ms_p80']:.3g})",
            f"{r['gb_per_s']:.1f}",
            f"{r['ratio_median']:.2f} ({r['ratio_min']:.2f})",
            f"{'✓' if r['match'] else '✗'} {r['max_ulp']:.2f} ulp",
        )
    return shown
