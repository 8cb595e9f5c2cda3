"""Print and write what commands have in common: the head, progress bars, tables, files, what an interruption leaves."""

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from bench.timing import CPU, environment

console = Console(width=None if sys.stdout.isatty() else 140)

Facts = dict[str, str]
Report = dict[str, Any]


def begin(title: str, threads: int | None, device: torch.device = CPU, more: Facts | None = None) -> Facts:
    """Set the number of threads, print the title and what the numbers depend on, a line each, and return the latter."""
    head = environment(threads, device) | (more or {})
    console.print(f"[bold]{title}[/bold]")
    grid = Table.grid(padding=(0, 2))
    for key, value in head.items():
        grid.add_row(f"  {key}", value)
    console.print(grid)
    return head


def progress() -> Progress:
    """Make a progress bar, which a terminal alone shows."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def new_table(*columns: str, left: int = 1, **options: Any) -> Table:
    """Make a table whose columns, but for so many on the left, are set flush right."""
    made = Table(*columns, **options)
    for column in made.columns[left:]:
        column.justify = "right"
    return made


def number(value: float | None, form: str) -> str:
    """Format a cell; an empty one for what could not be measured."""
    return "" if value is None else format(value, form)


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of Markdown; nothing where there are no rows."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    columns = list(columns)
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *lines]) if lines else ""


def wrote(path: Path) -> None:
    """Say that a file was written."""
    console.print(f"wrote {path}")


@contextmanager
def until_interrupted(report: Report) -> Iterator[None]:
    """End the block at Ctrl-C, and note so in its report, which holds what was measured until then."""
    try:
        yield
    except KeyboardInterrupt:
        report["interrupted"] = True


def finish(report: Report, notes: str, args: argparse.Namespace, picture: str) -> int:
    """Print the notes and what was skipped, write the files that were asked for, and return the exit status.

    ``picture`` is the function of bench.plot that draws; 130 is the status that shells have after Ctrl-C.
    """
    rows = [{k: v for k, v in r.items() if k != "seconds"} | report["environment"] for r in report["results"]]
    if rows:
        console.print(notes)
    for arm, why in dict.fromkeys((s["arm"], s["reason"]) for s in report["skipped"]):
        console.print(f"skipped: {arm}: {why}", style="yellow", markup=False)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        wrote(args.json)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
        wrote(args.csv)
    if args.plot and rows:
        from bench import plot

        getattr(plot, picture)(report, args.plot)
        wrote(args.plot)
    if "interrupted" not in report:
        return 0
    console.print("interrupted: " + ("above is what was measured so far" if rows else "nothing was measured"))
    return 130
