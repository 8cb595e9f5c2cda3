"""Find out what an arm is beside fast: whether it is right, and what it costs in launches, host time and memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import fused_adamw
from bench.arms import Algorithm, Groups
from bench.output import console
from bench.timing import Call, cpu_clock, untimed
from tests import cases

CHECKED_STEPS = 3


def grouped(params: list[Tensor], like: cases.Groups, options: dict[str, Any] | None = None) -> Groups:
    """Arrange parameters as the groups of a workload, each with its options."""
    rest = iter(params)
    return [{"params": [next(rest) for _ in shapes], **own, **(options or {})} for shapes, own in like]


def random_parameters(shapes: cases.Shapes, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Draw parameters, and gradients of several magnitudes, on the device: for billions the CPU takes minutes."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = {"generator": generator, "dtype": dtype, "device": device}
    params = [torch.nn.Parameter(torch.randn(shape, **drawn)) for shape in shapes]
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, **drawn).mul_(10.0 ** -(i % 4))
    return params


# ---- match


def checked_steps(params: list[Tensor]) -> Iterator[int]:
    """Yield the numbers of the steps of a check; the gradient changes after each, and at the end is as it was."""
    for i in range(CHECKED_STEPS):
        yield i
        for p in params:
            p.grad.mul_(-0.5 if i + 1 < CHECKED_STEPS else (-2.0) ** (CHECKED_STEPS - 1))


def sample(t: Tensor) -> Tensor:
    """Copy a tensor; of a long one its beginning and end alone, as the oracle of all of GPT-2 would take 4 GB."""
    t = t.detach().flatten()
    return (t if t.numel() <= 8192 else torch.cat([t[:4096], t[-4096:]])).to("cpu", copy=True)


class Oracle:
    """Step up to 32 of the tensors a few times: in float64, and in a dtype as well as torch's for-loop can.

    The reference in the dtype of the state takes the place of torch's for-loop for what torch lacks.
    """

    def __init__(self, start: list[Tensor], groups: cases.Groups, algorithm: Algorithm) -> None:
        self.count, self.groups, self.algorithm = len(start), groups, algorithm
        self.chosen = np.unique(np.linspace(0, len(start) - 1, 32).astype(int)).tolist()
        self.start = {i: (sample(start[i]), sample(start[i].grad)) for i in self.chosen}
        self.truth = self._stepped(torch.float64, True)
        self.bounds: dict[torch.dtype, dict[str, Tensor]] = {}

    def _stepped(self, dtype: torch.dtype, reference: bool) -> dict[str, Tensor]:
        params: list[Any] = [None] * self.count
        for i, (p, g) in self.start.items():
            params[i] = torch.nn.Parameter(p.to(dtype, copy=True))
            params[i].grad = g.to(dtype, copy=True)
        groups = grouped(params, self.groups)
        for group in groups:
            group["params"] = [p for p in group["params"] if p is not None]
        groups = [group for group in groups if group["params"]]
        if reference:
            cls = getattr(fused_adamw, self.algorithm.ours)
            options = {**self.algorithm.options, **self.algorithm.lacking}
            optimizer = cls(groups, **options, state_dtype=dtype, backend="reference")
        else:
            optimizer = getattr(torch.optim, self.algorithm.torchs)(groups, **self.algorithm.options, foreach=False)
        for _ in checked_steps([params[i] for i in self.chosen]):
            optimizer.step()
        places = {str(j): str(i) for j, i in enumerate(self.chosen)}
        stepped = cases.tensors_of(optimizer)
        return {f"{places[key.split('.')[0]]}.{key.split('.')[1]}": t for key, t in stepped.items()}

    def judge(self, title: str, optimizer: torch.optim.Optimizer, state: bool = True) -> tuple[bool, float]:
        """Return whether a stepped optimizer is within the tests' tolerance, and a parameter's largest error in ulp.

        Without ``state`` the parameters alone are compared.
        """
        got = {key: sample(t) for key, t in cases.tensors_of(optimizer).items() if key in self.truth}
        got = {key: t for key, t in got.items() if t.is_floating_point() and t.shape == self.truth[key].shape}
        got = {key: t for key, t in got.items() if state or key.endswith(".p")}
        truth = {key: self.truth[key] for key in got}
        for dtype in {t.dtype for t in got.values()} - self.bounds.keys():
            self.bounds[dtype] = self._stepped(dtype, not self.algorithm.same_rule)
        worst = max(cases.ulps(t, truth[key]).max().item() for key, t in got.items() if key.endswith(".p"))
        try:
            cases.assert_no_worse(got, {key: self.bounds[t.dtype][key] for key, t in got.items()}, truth)
        except AssertionError as error:
            console.print(f"[red]no match[/red] of {title}: {error}")
            return False, worst
        return True, worst


# ---- cost


class _Kernels(TorchDispatchMode):
    """Counts the CPU's kernels: an operator is one, or one for each tensor of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # Optimizer.step() marks where it begins and ends
            lists = [len(a) for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
            self.count += max(lists, default=1)
        return func(*args, **(kwargs or {}))


def launches(optimizer: torch.optim.Optimizer, call: Call, device: torch.device) -> int | None:
    """Count the kernels and copies of a call; None where no counter sees any."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            call()
            torch.cuda.synchronize()
        # Calls of the driver are among the events, as the CPU's.
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in found.events()) or None
    with _Kernels() as kernels:
        call()
    plans = getattr(optimizer, "_plans", ())
    ours = sum(type(plan.launch).__name__ == "CpuStep" for plan in plans)  # one parallel region each
    return kernels.count + ours or None


def host_microseconds(call: Call, device: torch.device, change: Call | None = None) -> float:
    """Time a call until it returns: on a GPU with an idle queue, on the CPU with tensors too small to matter."""
    if device.type == "cpu":
        call()
        return 1e6 * min(untimed(change, cpu_clock)(call, 3) for _ in range(5))
    seconds = []
    for _ in range(20):
        if change:
            change()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * float(np.median(seconds))


def extra_bytes(call: Call, device: torch.device) -> int:
    """Return the most bytes that torch's allocator handed out during a call, beyond what it had before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([0, *(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))])
    return int(held.max())


def first_line(error: Exception) -> str:
    """Put an error into one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def quietly(call: Callable[[], Any]) -> Any:
    """Return the value of a measurement, or None where the arm does not allow it."""
    with suppress(Exception):
        return call()
    return None
