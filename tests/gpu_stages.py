"""Stages of bench gpu that fail, hang and end well."""

import subprocess
import sys
import time

from bench.gpu.record import Record


def fail(record: Record) -> None:
    record.emit(kind="ceiling", name="copy", gb_per_s=3000.0, ms_median=1.0)
    raise RuntimeError("broken")


def hang(record: Record) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    record.emit(kind="child", pid=child.pid)
    time.sleep(600)


def chatter(record: Record, word: str) -> None:
    for i in range(1000):
        print(word, i)
    record.note(f"{word}, tiny: {record.tiny}")
