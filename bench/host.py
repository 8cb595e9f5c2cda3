"""Host time of a step on the Triton backend: all but the copy and the launches, which take a GPU."""

import argparse
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

import fused_adamw
from bench.timing import console, environment, interleave, print_head
from fused_adamw import backends

OURS, TORCH = "fused_adamw, triton", "torch fused"
NOTE = """\
CPU tensors of 64 elements stand in for CUDA's, and the kernels of both sides are stubbed: what is left is what Python
and C++ do before a launch. On a GPU each side adds its launches, ours one copy and one launch of a compiled Triton
kernel besides. moved = every gradient lies at a new address at every step."""


DTENSORS = 500


class Stub:
    """Kernels that do nothing."""

    def __init__(self, *args):
        pass

    def step(self, *args):
        pass


def stub_kernels() -> None:
    """Let the Triton backend's host code drive CPU tensors, and no kernel run."""
    from fused_adamw.triton_kernels import kernels

    kernels.TritonKernels = Stub
    triton = backends.named("triton")
    backends.BACKENDS = (dataclasses.replace(triton, devices=("cpu",)), *backends.BACKENDS)
    torch._fused_adamw_ = lambda *args, **options: None


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    head = environment(1)
    if why := backends.named("triton").missing():
        raise SystemExit(f"python -m bench host needs triton: {why}")
    fused = torch._fused_adamw_
    stub_kernels()
    print_head("Host time of AdamW.step()", head)
    table = Table("tensors", "gradients", f"{OURS} (µs)", f"{TORCH} (µs)", "ratio (min)")
    for tensors in args.tensors:
        for moved in (False, True):
            optimizers = {}
            for name, make in ((OURS, fused_adamw.AdamW), (TORCH, lambda p: torch.optim.AdamW(p, fused=True))):
                params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(tensors)]
                optimizers[name] = make(params), params
            # Gradients that are swapped step by step: one assignment a tensor, which is timed apart and left out.
            sets = [[torch.zeros(64) for _ in range(tensors)] for _ in range(2)]

            def arm(name, sets=sets, optimizers=optimizers, moved=moved):
                optimizer, params = optimizers[name]

                def call():
                    if moved:
                        sets.reverse()
                        for p, g in zip(params, sets[0], strict=True):
                            p.grad = g
                    if optimizer is not None:
                        optimizer.step()

                return call

            for _, params in optimizers.values():
                for p, g in zip(params, sets[0], strict=True):
                    p.grad = g
            optimizers["moving"] = None, optimizers[OURS][1]
            times: dict[str, list[float]] = {name: [] for name in optimizers}
            interleave({name: arm(name) for name in optimizers}, range(args.rounds), times)
            moving = np.array(times["moving"])
            ours, torchs = (np.array(times[name]) - (moving if moved else 0) for name in (OURS, TORCH))
            ratios = torchs / ours
            table.add_row(
                f"{tensors:,}",
                "moved" if moved else "in place",
                f"{np.median(ours) * 1e6:.0f}",
                f"{np.median(torchs) * 1e6:.0f}",
                f"{np.median(ratios):.1f} ({ratios.min():.1f})",
            )
    console.print(table)
    console.print(NOTE)
    compare_dtensors(args.rounds, fused)
    return 0


def compare_dtensors(rounds: int, fused: Callable[..., None]) -> None:
    """Measure and print what it adds that parameters, gradients and states are DTensors, on a mesh of one rank."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch._fused_adamw_ = fused  # it is this operator that is dispatched
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    makers = {"plain": torch.zeros, "DTensor": lambda n: distribute_tensor(torch.zeros(n), mesh, [Shard(0)])}
    times: dict[tuple[str, str], list[float]] = {}
    arms = {}
    for name, make in ((OURS, fused_adamw.AdamW), (TORCH, lambda p: torch.optim.AdamW(p, fused=True))):
        for kind, zeros in makers.items():
            params = [torch.nn.Parameter(zeros(64)) for _ in range(DTENSORS)]
            for p in params:
                p.grad = zeros(64)
            arms[kind, name], times[kind, name] = make(params).step, []
    interleave(arms, range(rounds), times)
    dist.destroy_process_group()
    table = Table(f"{DTENSORS} tensors", f"{OURS} (µs)", f"{TORCH}, its CPU kernel included (µs)")
    for kind in makers:
        table.add_row(kind, *(f"{np.median(times[kind, name]) * 1e6:.0f}" for name in (OURS, TORCH)))
    ratios = [np.median(np.divide(times["DTensor", name], times["plain", name])) for name in (OURS, TORCH)]
    table.add_row("DTensor / plain", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
