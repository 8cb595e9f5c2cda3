"""What the benchmarks share: the machine in words, interleaved timing, the bytes of a step."""

import functools
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
LONG_SECONDS = 0.2

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else announces itself on stderr
console = Console(width=None if sys.stdout.isatty() else 140)


def environment(threads: int | None, device: torch.device = torch.device("cpu")) -> dict[str, str]:  # noqa: B008
    """Set the number of threads, and say what the numbers depend on."""
    torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    backend = fused_adamw.AdamW([torch.zeros(1, device=device)]).backend[device]
    head = {
        "CPU": f"{_cpu()} ({os.cpu_count()} CPUs)",
        "threads": f"{torch.get_num_threads()}, {_pinning()}",
        "torch": f"{torch.__version__}, Python {platform.python_version()}",
        "fused_adamw": f"{fused_adamw.__version__}, commit {_commit()}, backend {backend}",
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    return {"GPU": _gpu(device), **head} if device.type == "cuda" else head


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    name = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda or torch.version.hip}"
    fields = "driver_version,clocks.current.sm,clocks.current.memory,clocks.max.sm,clocks.max.memory"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    if found := output_under_load(query, lambda: _stream_for_a_while(device)):
        driver, *clocks = found.split(", ")
        name += f", driver {driver}, clocks under load SM {clocks[0]}, memory {clocks[1]} (of {', '.join(clocks[2:])})"
    return name


def _stream_for_a_while(device: torch.device) -> None:
    x = torch.empty(1 << 26, device=device).normal_()
    for _ in range(100):
        x.mul_(0.999)
    torch.cuda.synchronize(device)


def output_under_load(command: list[str], load: Callable[[], None]) -> str:
    """Return what a command prints while ``load`` is called again and again; nothing where it fails.

    The clocks of an idle GPU say nothing: an H200 was seen at 345 of 1980 MHz.
    """
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            while process.poll() is None:
                load()
            return process.stdout.read().strip() if process.returncode == 0 else ""
    except OSError:
        return ""


def _pinning() -> str:
    variables = ("OMP_PROC_BIND", "OMP_PLACES")
    return " ".join(f"{v}={os.environ[v]}" for v in variables if v in os.environ) or "not pinned"


def _commit() -> str:
    return _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]) or "?"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


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


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=32 << 20)


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated without driving anything out; a large number where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 50


Call = Callable[[], object]
Clock = Callable[[Call, int], float]


def cpu_clock(call: Call, repeats: int) -> float:
    """Seconds of one of ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_clock(call: Call, repeats: int) -> float:
    """The same between two events of the current stream: what the GPU was busy with, or waiting for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def interleave(
    arms: dict[str, Call],
    rounds: Iterable[int],
    times: dict[str, list[float]],
    clock: Clock = cpu_clock,
    multiples: dict[str, int] | None = None,
) -> None:
    """Append the seconds per call of every arm, round by round, to ``times``; every other round runs in reverse.

    The calls of a timing are a multiple of ``multiples``, the buffer sets that an arm goes round, unless that takes
    long. The lists grow as it goes, so that an interrupted run leaves what it measured.
    """
    repeats = {}
    for name, call in arms.items():
        of = (multiples or {}).get(name, 1)
        seconds = clock(call, 2)
        if of * seconds > LONG_SECONDS:
            of = 1
        if seconds < LONG_SECONDS:  # these calls may have made state and plans
            clock(call, of)
            seconds = clock(call, of)
        repeats[name] = of * math.ceil(MIN_SECONDS / seconds / of)
    gc.collect()
    gc.disable()
    try:
        for i in rounds:
            order = list(arms) if i % 2 == 0 else list(reversed(arms))
            seconds = {name: clock(arms[name], repeats[name]) for name in order}
            for name in arms:
                times[name].append(seconds[name])
    finally:
        gc.enable()
