"""Make the summary of a folder of results, its picture, and the table of docs/gpu.md from the lines of JSON."""

import json
from pathlib import Path
from typing import Any

from bench.gpu import predictions
from bench.gpu.predictions import PREDICTIONS, verdict
from bench.gpu.record import rows_of
from bench.output import markdown

Rows = list[dict[str, Any]]
NOTES = "notes.md"  # written by hand: why a figure falls short, and what was changed; taken into the summary


def of_kind(rows: Rows, *kinds: str) -> Rows:
    """Return the rows of these kinds."""
    return [row for row in rows if row.get("kind") in kinds]


def environment_of(folder: Path) -> dict[str, str]:
    """Return what the facts stage found; nothing where it did not run."""
    path = folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path) -> None:
    """Write summary.md anew."""
    rows, head = rows_of(folder), environment_of(folder)
    parts = [f"# {head.get('name', folder.name)}, {head.get('date', '')[:10]}", environment(head), stages(rows)]
    parts += [failures(rows), judged(rows, head.get("name", "")), ceilings(rows), steps(rows), models(rows)]
    parts += [sweep(rows), counters(rows), skipped(rows)]
    notes = folder / NOTES
    if notes.exists():
        parts.insert(5, "## Notes\n\n" + notes.read_text().strip())
    (folder / "summary.md").write_text("\n\n".join(filter(None, parts)) + "\n")


def draw(folder: Path) -> None:
    """Draw GB/s against size, with the best stream as a line, where there is something to draw."""
    rows = rows_of(folder)
    points = of_kind(rows, "curve")
    if not points:
        return
    from bench.plot import curves

    best = max((r["gb_per_s"] for r in streams(rows)), default=None)
    unknown = dict.fromkeys(("GPU", "torch", "fused_adamw", "date"), "?")
    curves({"environment": unknown | environment_of(folder), "results": points}, folder / "gb_per_s.png", best)


def section(title: str, body: str) -> str:
    """Return a heading and its body; nothing where the body is empty."""
    return f"## {title}\n\n{body}" if body else ""


def environment(head: dict[str, str]) -> str:
    """List what the figures depend on."""
    return markdown(["", ""], ([name, str(value).replace("\n", "; ")] for name, value in head.items()))


def stages(rows: Rows) -> str:
    """List each stage, how it ended, and its notes."""
    notes: dict[str, list[str]] = {}
    for row in of_kind(rows, "note"):
        notes.setdefault(row["stage"], []).append(row["text"])
    lines = []
    for row in of_kind(rows, "stage"):
        rc = "" if row["rc"] is None else str(row["rc"])
        said = [*([row["note"]] if row["note"] else []), *notes.get(row["stage"], [])]
        lines.append([row["stage"], rc, f"{row['seconds']:.0f}", "; ".join(dict.fromkeys(said))])
    return section("Stages", markdown(["stage", "rc", "seconds", ""], lines))


def failures(rows: Rows) -> str:
    """List what is wrong: checks, tests, and our steps that do not match; others' are told in the table."""
    lines = [f"- {r['backend']}: {r['name']}: {'; '.join(r['wrong'])}" for r in of_kind(rows, "check") if r["wrong"]]
    lines += [f"- {r['name']}: {r['wrong']}" for r in of_kind(rows, "test")]
    wrong = [r for r in of_kind(rows, "step") if r["match"] is False and r["arm"].startswith("fused_adamw")]
    lines += [f"- {r['arm']} of {r['workload']}, {r['dtypes']}: off by {r['max_ulp']:.1f} ulp" for r in wrong]
    return section("Failures", "\n".join(lines) or ("None." if of_kind(rows, "check", "step") else ""))


def judged(rows: Rows, gpu: str) -> str:
    """Put predictions beside measurements."""
    found = {predictions.key(r): r for r in of_kind(rows, "step", "ceiling")}
    lines = []
    for each in PREDICTIONS:
        predicted, row = predictions.of(gpu, each), found.get(each.row, {})
        value = row.get(each.field)
        if predicted is None and value is None:
            continue
        low, high = predicted or (0.0, 0.0)
        shown = "" if predicted is None else f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        measured = "not measured" if value is None else f"{value:.3g}"
        judgement = "" if value is None else verdict(value, predicted, each.unit)
        name = ", ".join(filter(None, each.row))
        lines.append([name, each.unit, shown, measured, judgement, each.source])
    return section(
        "Predictions", markdown(["of", "unit", "predicted", "measured", "verdict", "source of the prediction"], lines)
    )


def streams(rows: Rows) -> Rows:
    """Return the streams of a step's own reads and writes."""
    return [r for r in of_kind(rows, "ceiling") if r["name"].startswith("stream")]


def ceilings(rows: Rows) -> str:
    """List what the memory allows."""
    lines = ([r["name"], f"{r['gb_per_s']:.0f}", f"{r['ms_median']:.3g}"] for r in of_kind(rows, "ceiling"))
    return section("Ceilings", markdown(["", "GB/s", "ms"], lines))


def steps(rows: Rows) -> str:
    """List every arm of every case: eager steps, replays of graphs, the host."""
    lines = []
    for r in of_kind(rows, "step"):
        layers = f" ({r['layers']} layers)" if r["workload"].startswith("llama") else ""
        size = f"{r['tensors']:,} tensors, {r['parameters'] / 1e6:.4g} M{', in the cache' if r['warm'] else ''}"
        lines.append(
            [
                r["workload"] + layers,
                size,
                r["algorithm"],
                r["dtypes"],
                r["arm"],
                f"{r['ms_median']:.4g} ({r['ms_p20']:.4g} to {r['ms_p80']:.4g})",
                f"{r['gb_per_s']:.0f}",
                share(r["of_ceiling"]),
                "" if r["ratio_median"] is None else f"{r['ratio_median']:.2f}",
                "" if r["host_us"] is None else f"{r['host_us']:.0f}",
                "" if r["launches"] is None else f"{r['launches']}",
                "" if r["match"] is None else "yes" if r["match"] else "NO",
            ]
        )
    columns = ["list", "", "algorithm", "dtypes", "arm", "ms (20th to 80th percentile)", "GB/s", "of the stream"]
    return section("Steps", markdown([*columns, "times torch fused", "host µs", "launches", "match"], lines))


def share(value: float | None) -> str:
    """Format a share in percent."""
    return "" if value is None else f"{value:.0%}"


def models(rows: Rows) -> str:
    """List the training steps."""
    found = of_kind(rows, "model")
    fused = {r["name"]: r["per_second"] for r in found if r["arm"] == "torch fused"}
    lines = (
        [
            r["name"],
            r["arm"],
            f"{r['per_second']:,.0f} {r['unit']}/s",
            f"{r['ms_median']:.4g}",
            f"{r['per_second'] / fused[r['name']]:.3f}" if r["name"] in fused else "",
        ]
        for r in found
    )
    return section("Training steps", markdown(["model", "optimizer", "", "ms a step", "times torch fused"], lines))


def sweep(rows: Rows) -> str:
    """List the variants, the fastest first, of each list and format."""
    found = sorted(of_kind(rows, "sweep"), key=lambda r: (r["list"], r["dtypes"], -r["gb_per_s"]))
    lines = ([r["list"], r["dtypes"], r["backend"], r["variant"], f"{r['gb_per_s']:.0f}"] for r in found)
    return section("Variants of the kernels", markdown(["list", "format", "backend", "variant", "GB/s"], lines))


def counters(rows: Rows) -> str:
    """List ncu's counters, a column for each backend and dtype."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for r in of_kind(rows, "counter"):
        found.setdefault((r["name"], r["unit"]), {})[f"{r['backend']} {r['dtype']}"] = r["value"]
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    lines = ([name, unit, *(values.get(c, "") for c in columns)] for (name, unit), values in found.items())
    return section("Counters (ncu)", markdown(["", "unit", *columns], lines))


def skipped(rows: Rows) -> str:
    """List what could not be measured, and why."""
    lines = dict.fromkeys(f"- {r['case']}: {r['arm']}: {r['reason']}" for r in of_kind(rows, "skipped"))
    return section("Skipped", "\n".join(lines))


TABLE_CASES = (
    ("1x1Gi", "adamw", "fp32", "one tensor of 2^30: AdamW"),
    ("gpt2", "adamw", "fp32", "GPT-2 small, 148 tensors, 124.4 M: AdamW"),
    ("gpt2", "adamw-clip", "fp32", "the same, clipped; torch: `clip_grad_norm_`, then the step"),
    ("llama-2b", "adamw", "fp32", "9 layers of Llama 7B, 2.08 G"),
    ("1x256Mi", "sgdw", "fp32", "SGDW, momentum, 2^28; torch: SGD"),
    ("1x256Mi", "adamw", "bf16", "all bf16, 2^28"),
    ("1x256Mi", "adamw", "bf16+fp32-split16", "bf16, split16, 2^28; torch: all bf16"),
    ("1x256Mi", "adamw", "bf16+int8", "bf16, int8 moments, 2^28; torch: all bf16"),
    ("1x131k", "adamw", "fp32", "1 tensor of 131,072"),
    ("148x64", "adamw", "fp32", "148 tensors of 64"),
    ("1000x1k", "adamw", "fp32", "1000 tensors of 1000"),
    ("10000x64", "adamw", "fp32", "10,000 tensors of 64"),
    ("465-groups", "adamw", "fp32", "465 tensors of 64, each a group"),
)


def table_of_docs(folder: Path) -> str:
    """Return docs/gpu.md's table under the machine: the cases that matter, our first backend beside torch fused."""
    found = {predictions.key(r): r for r in of_kind(rows_of(folder), "step")}
    head = environment_of(folder)
    machine = "; ".join(head[name] for name in ("tiny", "GPU", "torch", "fused_adamw", "date") if name in head)
    lines = []
    for *case, name in TABLE_CASES:
        ours, graph, fused = (
            found.get((*case, arm)) for arm in ("fused_adamw triton", "fused_adamw triton, graph", "torch fused")
        )
        if ours:
            lines.append(
                [
                    name,
                    f"{ours['ms_median']:.3g}" + (f" ({graph['ms_median']:.3g})" if graph else ""),
                    f"{fused['ms_median']:.3g}" if fused else "",
                    "" if ours["ratio_median"] is None else f"{ours['ratio_median']:.2f} ({ours['ratio_min']:.2f})",
                    f"{ours['gb_per_s']:.0f}",
                    "in cache" if ours["warm"] else share(ours["of_ceiling"]),
                ]
            )
    columns = ["workload", "ours, ms (graph)", "torch fused, ms", "torch fused / ours", "GB/s", "of the stream"]
    return f"{machine}\n\n{markdown(columns, lines)}"
