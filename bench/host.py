"""Time what a step of the Triton backend costs on the host: all up to the calls of the driver, which take a GPU."""

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

import fused_adamw
from bench import no_driver
from bench.output import begin, console, new_table
from bench.timing import interleave
from fused_adamw import backends

OURS, TORCH = "fused_adamw, triton", "torch fused"
NOTE = """\
CPU tensors of 64 elements stand in for CUDA's. Ours launches its Triton kernels into a driver of CUDA that does
nothing; torch's kernel is left out, and so is what its launch costs. On a GPU each side adds what the driver takes, and
ours the guards of the device. moved = every gradient lies at a new address at every step."""
KINDS = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "capturable": {"capturable": True},
    "capturable, clipped": {"capturable": True, "max_grad_norm": 1.0},
}
DTENSORS = 500
MAKERS = {OURS: fused_adamw.AdamW, TORCH: partial(torch.optim.AdamW, fused=True)}


def leave_out_kernels() -> None:
    """Let the Triton backend's host code drive CPU tensors, and no kernel run."""
    no_driver.install()
    triton = backends.named("triton")
    backends.BACKENDS = (dataclasses.replace(triton, devices=("cpu",)), *backends.BACKENDS)
    torch._fused_adamw_ = lambda *args, **options: None


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    if why := backends.named("triton").missing():
        raise SystemExit(f"python -m bench host needs triton: {why}")
    fused = torch._fused_adamw_
    leave_out_kernels()
    begin("Host time of AdamW.step()", 1)
    shown = new_table("tensors", "gradients", f"{OURS} (µs)", f"{TORCH} (µs)", "ratio (min)", left=2)
    for tensors, moved in itertools.product(args.tensors, (False, True)):
        ours, torchs = compare(tensors, moved, args.rounds)
        ratios = torchs / ours
        shown.add_row(
            f"{tensors:,}",
            "moved" if moved else "in place",
            f"{np.median(ours) * 1e6:.0f}",
            f"{np.median(torchs) * 1e6:.0f}",
            f"{np.median(ratios):.1f} ({ratios.min():.1f})",
        )
    console.print(shown)
    console.print(NOTE)
    compare_kinds(args.tensors[0], args.rounds)
    compare_dtensors(args.rounds, fused)
    return 0


def compare(tensors: int, moved: bool, rounds: int) -> list[np.ndarray]:
    """Return the seconds of a step of ours and of torch's, round by round; of ``moved`` gradients without the move."""
    # Gradients that are swapped step by step cost one assignment a tensor, which is timed apart and left out.
    sets = [[torch.zeros(64) for _ in range(tensors)] for _ in range(2)]

    def arm(step: Callable[[], object], params: list[torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            if moved:
                sets.reverse()
                move(params)
            step()

        return call

    def move(params: list[torch.Tensor]) -> None:
        for p, g in zip(params, sets[0], strict=True):
            p.grad = g

    calls = {}
    for name, make in MAKERS.items():
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(tensors)]
        move(params)
        calls[name] = arm(make(params).step, params)
    calls["the move"] = arm(lambda: None, params)
    for _ in range(20):  # the first calls are slow, and would make interleave() time too few of them
        for call in calls.values():
            call()
    times = interleave(calls, range(rounds))
    return [np.array(times[name]) - (np.array(times["the move"]) if moved else 0) for name in MAKERS]


def compare_kinds(tensors: int, rounds: int) -> None:
    """Measure and print what clipping and steps that the device counts add, gradients in place."""
    arms = {}
    for kind, options in KINDS.items():
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.zeros(64)
        arms[kind] = fused_adamw.AdamW(params, **options).step
    times = interleave(arms, range(rounds))
    shown = new_table(f"{tensors:,} tensors, in place", f"{OURS} (µs)", "/ plain")
    for kind in KINDS:
        ratio = np.median(np.divide(times[kind], times["plain"]))
        shown.add_row(kind, f"{np.median(times[kind]) * 1e6:.0f}", f"{ratio:.2f}")
    console.print(shown)


def compare_dtensors(rounds: int, fused: Callable[..., None]) -> None:
    """Measure and print what it adds that parameters, gradients and states are DTensors, on a mesh of one rank."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch._fused_adamw_ = fused  # it is this operator that is dispatched
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    kinds = {"plain": torch.zeros, "DTensor": lambda n: distribute_tensor(torch.zeros(n), mesh, [Shard(0)])}
    arms = {}
    for (name, make), (kind, zeros) in itertools.product(MAKERS.items(), kinds.items()):
        params = [torch.nn.Parameter(zeros(64)) for _ in range(DTENSORS)]
        for p in params:
            p.grad = zeros(64)
        arms[kind, name] = make(params).step
    times = interleave(arms, range(rounds))
    dist.destroy_process_group()
    shown = new_table(f"{DTENSORS} tensors", f"{OURS} (µs)", f"{TORCH}, its CPU kernel included (µs)")
    for kind in kinds:
        shown.add_row(kind, *(f"{np.median(times[kind, name]) * 1e6:.0f}" for name in MAKERS))
    ratios = [np.median(np.divide(times["DTensor", name], times["plain", name])) for name in MAKERS]
    shown.add_row("DTensor / plain", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(shown)
