"""Draw the picture of README from the table of docs/performance.md, so that both show the same runs."""

import argparse
from pathlib import Path

from bench.output import wrote

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
COLUMN = "torch fused / ours"


def run(args: argparse.Namespace) -> int:
    """Draw the first table of the page that has the column of ratios."""
    from bench.plot import speedups

    rows = [(name, min(found), sorted(found)[len(found) // 2], max(found)) for name, found in ratios(PAGE.read_text())]
    speedups(rows, args.out, "a step on 2 threads of an AMD EPYC: median and range of three runs")
    wrote(args.out)
    return 0


def ratios(text: str) -> list[tuple[str, list[float]]]:
    """Return the name of each row of the table, and the ratios of its runs."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and COLUMN in line)
    column = cells(lines[first]).index(COLUMN)
    found = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        row = cells(line)
        found.append((row[0], [float(ratio) for ratio in row[column].split(" · ")]))
    return found


def cells(line: str) -> list[str]:
    """Split a line of a table of Markdown."""
    return [cell.strip() for cell in line.strip("| \n").split(" | ")]
