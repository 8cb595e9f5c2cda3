"""Draw the pictures of README and of docs/ from tables in docs/, so that all show the same runs."""

import argparse
import re
from pathlib import Path

from bench.output import wrote

DOCS = Path(__file__).parents[1] / "docs"


def run(args: argparse.Namespace) -> int:
    """Draw speed.png from docs/performance.md, speed_gpu.png from docs/gpu.md, and formats.png from docs/formats.md."""
    from bench.plot import differences, speedups

    for page, name, title in (
        ("performance.md", "speed.png", "a step on 2 threads of an AMD EPYC: median and range of three runs"),
        ("gpu.md", "speed_gpu.png", "a step on an NVIDIA H200: median and least of seven rounds"),
    ):
        ratios = spreads(DOCS / page, "torch fused / ours")
        rows = [(of, min(numbers), numbers[0], max(numbers)) for of, numbers in ratios.items()]
        speedups(rows, args.out / name, title)
        wrote(args.out / name)
    differences(spreads(DOCS / "formats.md", "beside fp32"), args.out / "formats.png")
    wrote(args.out / "formats.png")
    return 0


def spreads(page: Path, column: str) -> dict[str, tuple[float, ...]]:
    """Return the numbers in a column, by the name of the row, of the first table that has it: one, and its range."""
    lines = page.read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and f"| {column} |" in line)
    place = cells(lines[first]).index(column)
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        row = cells(line)
        numbers = [float(number) for number in re.findall(r"[-+]?[\d.]+", row[place].replace("\u2212", "-"))]
        if numbers:
            found[row[0]] = tuple(numbers)
    return found


def cells(line: str) -> list[str]:
    """Split a line of a table of Markdown."""
    return [cell.strip() for cell in line.strip("|\n").split("|")]
