"""Describe the machine in words, time calls in turns, and count the bytes of a step."""

import functools
import gc
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

import torch

import fused_adamw
from fused_adamw import backends

MIN_SECONDS = 5e-3  # of one timing: far above the clock's resolution and a stray interrupt
LONG_SECONDS = 0.2
CPU = torch.device("cpu")

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else announces itself on stderr


def environment(threads: int | None, device: torch.device = CPU) -> dict[str, str]:
    """Set the number of threads, and return what the numbers depend on."""
    torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    backend = fused_adamw.AdamW([torch.zeros(1, device=device)]).backend[device]
    head = {
        "CPU": f"{_cpu()} ({os.cpu_count()} CPUs)",
        "threads": f"{torch.get_num_threads()}, {_pinning()}",
        "instructions": _instructions(),
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


def _instructions() -> str:
    """Let our step use those that ATEN_CPU_CAPABILITY names, by which torch's kernels are chosen, and return them."""
    module = backends.native()
    if module is None:
        return "the extension is not built"
    isas, asked = module.cpu_isas(), os.environ.get("ATEN_CPU_CAPABILITY", "").replace("default", "generic")
    used = asked if asked in isas else isas[-1]
    module.use_cpu_isa(used)
    return used


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
    return output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]) or "?"


def output(command: list[str]) -> str:
    """Return what a command prints; nothing where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def device_of(name: str | None) -> torch.device:
    """Return the device to measure; by default the GPU where there is one."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; see python -c 'import torch; torch.cuda.init()'")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def bytes_of_step(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes that a step must move: it reads parameter, gradient and state, and writes parameter and state."""
    total = getattr(optimizer, "bytes_after_step", 0)
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        states = [t for name, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and name != "step"]
        total += 2 * sum(t.nbytes for t in (p, *states)) + p.grad.nbytes
    return total


@functools.cache
def last_level_cache(device: torch.device) -> int:
    """Return the bytes of the largest cache; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().removesuffix("K")) << 10 for path in sizes), default=32 << 20)


def available_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated without swapping; a large number where the system does not tell."""
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
    """Return the seconds of one of ``repeats`` calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_clock(call: Call, repeats: int) -> float:
    """Return the same between two events of the current stream: the GPU was busy then, or waited for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def untimed(change: Call | None, clock: Clock) -> Clock:
    """Return a clock that calls ``change`` before each of its calls, and does not count that."""

    def clock_each(call: Call, repeats: int) -> float:
        seconds = 0.0
        for _ in range(repeats):
            change()
            seconds += clock(call, 1)
        return seconds / repeats

    return clock_each if change else clock


def interleave(
    arms: dict[str, Call],
    rounds: Iterable[int],
    clock: Clock = cpu_clock,
    times: dict[str, list[float]] | None = None,
    multiples: dict[str, int] | None = None,
    changes: dict[str, Call | None] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds per call of every arm, round by round; every other round runs in reverse.

    They are appended to ``times``, where it is given, so that an interrupted run leaves what it measured. The calls of
    a timing are a multiple of ``multiples``, the buffer sets that an arm goes round, unless that takes long. Each call
    comes after one of ``changes``, which is not timed.
    """
    times = {name: [] for name in arms} if times is None else times
    clocks = {name: untimed((changes or {}).get(name), clock) for name in arms}
    repeats = {}
    for name, call in arms.items():
        of = (multiples or {}).get(name, 1)
        seconds = clocks[name](call, 2)
        if of * seconds > LONG_SECONDS:
            of = 1
        if seconds < LONG_SECONDS:  # these calls may have made state and plans
            clocks[name](call, of)
            seconds = clocks[name](call, of)
        repeats[name] = of * math.ceil(MIN_SECONDS / seconds / of)
    gc.collect()
    gc.disable()
    try:
        for i in rounds:
            order = list(arms) if i % 2 == 0 else list(reversed(arms))
            seconds = {name: clocks[name](arms[name], repeats[name]) for name in order}
            for name in arms:
                times[name].append(seconds[name])
    finally:
        gc.enable()
    return times
