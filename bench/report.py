"""Make the table of docs/performance.md: the cases that matter, measured in several processes one after the other."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.arms import FUSED
from bench.output import markdown, wrote

# The parts of a run: workloads, algorithms, dtypes, whom to compare with beside torch fused, and other arguments.
# Lists that fit in the caches stay there, which shows what a step costs beside its memory traffic.
RUNS = (
    (["gpt2"], ["adamw", "adamw-clip", "amsgrad", "sgdw"], ["fp32"], [], []),
    (["gpt2"], ["adamw"], ["bf16", "bf16+fp32"], ["deepspeed-cpu"], []),
    (["gpt2"], ["adamw"], ["bf16-stochastic", "bf16+fp32-split16", "fp32+int8", "bf16+int8-split16"], [], []),
    (["1000x1k", "1x131k", "148x64", "10000x64", "465-groups"], ["adamw"], ["fp32"], [], ["--warm"]),
)


def run(args: argparse.Namespace) -> int:
    """Measure, unless there are files already, and print the table."""
    try:
        reports = [read(path) for path in args.files] if args.files else measured(args)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"not a file of python -m bench step --json: {error}") from None
    text = merged(reports)
    if args.out:
        args.out.write_text(text)
        wrote(args.out)
    else:
        print(text, end="")
    if args.plot:
        from bench.plot import bars

        first = {tuple(key(r)): r for report in reversed(reports) for r in report["results"]}
        bars({**reports[0], "results": list(first.values())}, args.plot)
        wrote(args.plot)
    return 0


def read(path: Path) -> dict[str, Any]:
    """Read a file of ``python -m bench step --json``."""
    report = json.loads(path.read_text())
    return {"environment": report["environment"], "results": report["results"], "skipped": report["skipped"]}


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run ``python -m bench step`` in a fresh process for each of ``--runs`` runs of each part."""
    reports = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.json"
        for _ in range(args.runs):
            for workloads, algorithms, dtypes, against, more in RUNS:
                chosen = [w for w in workloads if not args.workload or w in args.workload]
                if not chosen:
                    continue
                command = [sys.executable, "-m", "bench", "step", "--json", str(file), "--rounds", str(args.rounds)]
                command += ["--workload", *chosen, "--algorithm", *algorithms, "--dtype", *dtypes]
                command += ["--against", "fused", *against, *more]
                command += ["--threads", str(args.threads)] if args.threads else []
                command += ["--device", args.device] if args.device else []
                done = subprocess.run(command, stdout=sys.stderr)
                if done.returncode not in (0, 1) or not file.exists():
                    raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
                reports.append(read(file))
                file.unlink()
    return reports


def key(result: dict[str, Any]) -> tuple[str, ...]:
    """Return what rows of several runs have in common."""
    return result["workload"], result["algorithm"], result["dtypes"], result["arm"]


def spread(values: list[float | None], form: str) -> str:
    """Format the median of some runs, with their range where they differ; nothing where a run has no value."""
    if None in values:
        return ""
    low, middle, high = (format(v, form) for v in (min(values), statistics.median_low(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def merged(reports: list[dict[str, Any]]) -> str:
    """Return a table of every row, with the median of the runs and their range."""
    rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for report in reports:
        for r in report["results"]:
            rows.setdefault(key(r), []).append(r)
    head = reports[0]["environment"]
    lines = []
    for (workload, algorithm, dtypes, arm), found in rows.items():
        cells = [workload, algorithm, dtypes, arm]
        cells.append(spread([r["ms_median"] for r in found], ".3g"))
        cells.append(spread([r["gb_per_s"] for r in found], ".1f"))
        cells.append(spread([r["of_ceiling"] for r in found], ".0%"))
        cells.append("" if arm == FUSED else spread([r["ratio_median"] for r in found], ".2f"))
        cells.append("" if found[0]["match"] is None else "✓" if all(r["match"] for r in found) else "✗")
        lines.append(cells)
    columns = ["workload", "algorithm", "dtypes", "", "ms", "GB/s", "of ceiling"]
    columns += ["times torch fused (or foreach)", "match"]
    skipped = dict.fromkeys((s["arm"], s["reason"]) for report in reports for s in report["skipped"])
    parts = ["\n".join(f"{name}: {value}  " for name, value in head.items()), markdown(columns, lines)]
    return (
        "\n\n".join([*parts, *(["\n".join(f"Skipped: {arm}: {why}" for arm, why in skipped)] if skipped else [])])
        + "\n"
    )
