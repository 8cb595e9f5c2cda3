"""What the benchmarks share: the machine in words, interleaved timing, the bytes of a step."""

import gc
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import fused_adamw

MIN_SECONDS = 5e-3  # of one timing: far above the clock's resolution and a stray interrupt

console = Console(width=None if sys.stdout.isatty() else 132)


def environment(threads: int | None) -> dict[str, str]:
    """Set the number of threads, and say what the numbers depend on."""
    torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    backend = fused_adamw.AdamW([torch.zeros(1)]).backend[torch.device("cpu")]
    return {
        "CPU": f"{_cpu()} ({os.cpu_count()} CPUs)",
        "threads": f"{torch.get_num_threads()}, {_pinning()}",
        "torch": f"{torch.__version__}, Python {platform.python_version()}",
        "fused_adamw": f"{fused_adamw.__version__}, commit {_commit()}, backend {backend}",
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _pinning() -> str:
    variables = ("OMP_PROC_BIND", "OMP_PLACES")
    return " ".join(f"{v}={os.environ[v]}" for v in variables if v in os.environ) or "not pinned"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_head(title: str, head: dict[str, str]) -> None:
    """The title and the environment, a line each."""
    console.print(f"[bold]{title}[/bold]")
    grid = Table.grid(padding=(0, 2))
    for key, value in head.items():
        grid.add_row(f"  {key}", value)
    console.print(grid)


def bytes_of_step(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step must move: it reads parameter, gradient and state, and writes parameter and state."""
    total = 0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        states = [t for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and name != "step"]
        total += 2 * sum(t.nbytes for t in (p, *states)) + p.grad.nbytes
    return total


def interleave(arms: dict[str, Callable[[], object]], rounds: Iterable[int], times: dict[str, list[float]]) -> None:
    """Append the seconds per call of every arm, round by round, to ``times``; every other round runs in reverse.

    The lists grow as it goes, so that an interrupted run leaves what it measured.
    """
    repeats = {}
    for name, call in arms.items():
        _time(call, 2)
        repeats[name] = math.ceil(MIN_SECONDS / _time(call, 1))
    gc.collect()
    gc.disable()
    try:
        for i in rounds:
            order = list(arms) if i % 2 == 0 else list(reversed(arms))
            seconds = {name: _time(arms[name], repeats[name]) for name in order}
            for name in arms:
                times[name].append(seconds[name])
    finally:
        gc.enable()


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
