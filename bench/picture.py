"""Draw the pictures of README and docs/formats.md from tables in docs/, so that both show the same runs."""

import argparse
import re
from pathlib import Path

from bench.output import wrote

DOCS = Path(__file__).parents[1] / "docs"


def run(args: argparse.Namespace) -> int:
    """Draw speed.png from docs/performance.md, and formats.png from docs/formats.md."""
    from bench.plot import differences, speedups

    ratios = spreads(DOCS / "performance.md", "torch fused / ours")
    rows = [(name, low, middle, high) for name, (middle, low, high) in ratios.items()]
    speedups(rows, args.out / "speed.png", "a step on 2 threads of an AMD EPYC: median and range of three runs")
    wrote(args.out / "speed.png")
    differences(spreads(DOCS / "formats.md", "beside fp32"), args.out / "formats.png")
    wrote(args.out / "formats.png")
    return 0


def spreads(page: Path, column: str) -> dict[str, tuple[float, float, float]]:
    """Return the number, the least and the most in a column, by the name of the row, of the first table that has it."""
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
            found[row[0]] = (numbers[0], numbers[1], numbers[2])
    return found


def cells(line: str) -> list[str]:
    """Split a line of a table of Markdown."""
    return [cell.strip() for cell in line.strip("|\n").split("|")]
