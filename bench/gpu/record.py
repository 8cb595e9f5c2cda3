"""Write and read the lines of JSON of the stages, and keep to their time."""

import json
import time
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
MARGIN = 3.0  # seconds before its limit at which a stage starts nothing more


class Record:
    """Hold what a stage writes to, and when it must end."""

    def __init__(self, folder: Path, stage: str, seconds: float = 0.0, tiny: bool = False) -> None:
        self.folder, self.stage, self.tiny = folder, stage, tiny
        self.end = time.monotonic() + seconds - MARGIN

    def emit(self, **row: Any) -> None:
        """Write a row, at once: a run that is cut off leaves what it has. One write, so that several may go on."""
        with (self.folder / FILE).open("a") as file:
            file.write(json.dumps({"stage": self.stage, **row}, default=str) + "\n")

    def note(self, text: str) -> None:
        """Say something that belongs beside the stage in the summary."""
        print(text, flush=True)
        self.emit(kind="note", text=text)

    def seconds_left(self) -> float:
        """Return how long something may take, at least a second."""
        return max(1.0, self.end - time.monotonic())

    def time_left(self, what: str) -> bool:
        """Return whether something may be started, and note it where it may not."""
        if time.monotonic() < self.end:
            return True
        self.note(f"not run, no time was left: {what}")
        return False


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return every row; a line that was cut off when its process ended is left out."""
    path = folder / FILE
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Replace all rows."""
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
