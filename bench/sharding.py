"""Measure what a step costs on each of many ranks, from the lists of large models as FSDP2 shards them.

    python -m bench.sharding

One rank is played: its shards are DTensors of their true sizes, in address space that is reserved and never touched;
the plan and its tables are those that a step on a GPU would use. No kernel runs.
"""

import argparse
import itertools
import mmap
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import fused_adamw
from bench.host import leave_out_kernels
from bench.output import begin, console, new_table
from fused_adamw import plan

EXPERT_PARALLEL = 64
RANKS = (8, 64, 512, 1024, 8192)


class Sharded(NamedTuple):
    """Hold the shape of a tensor, and whether it is of experts, which expert parallelism splits before FSDP does."""

    shape: tuple[int, ...]
    experts: bool = False


def llama_70b() -> list[Sharded]:
    """List Llama 3 70B: 80 layers of width 8192, 8 key-value heads of 128, 70.6 G parameters."""
    d, kv, ffn = 8192, 1024, 28672
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [Sharded(s) for s in [(128256, d), *itertools.chain(*[layer] * 80), (d,), (128256, d)]]


def moe_1t() -> list[Sharded]:
    """List a mixture of 384 experts of 2048 in 60 of 61 layers of width 7168, latent attention; 1.03 T parameters."""
    d, e, ffn = 7168, 384, 2048
    attention = [(1536, d), (12288, 1536), (576, d), (16384, 512), (d, 8192), (d,), (d,), (1536,), (512,)]
    shared = [(e, d), (ffn, d), (ffn, d), (d, ffn)]
    experts = [Sharded(s, True) for s in ((e, ffn, d), (e, ffn, d), (e, d, ffn))]
    layer = [*map(Sharded, attention + shared), *experts]
    dense = [*map(Sharded, [*attention, (18432, d), (18432, d), (d, 18432)])]
    return [Sharded((163840, d)), *dense, *itertools.chain(*[layer] * 60), Sharded((d,)), Sharded((163840, d))]


MODELS = {"Llama 70B": llama_70b, "MoE 1T": moe_1t}


def piece(size: int, parts: int, index: int) -> int:
    """Return the length of one of the pieces that torch.chunk makes, 0 where there are fewer."""
    step = -(-size // parts)
    return max(0, min(step, size - index * step))


def local_shape(t: Sharded, ranks: int, rank: int) -> tuple[int, ...]:
    """Return the shape of FSDP2's shard, which splits the first dimension over all ranks.

    Experts are split over the ranks of expert parallelism, and their second dimension over the others.
    """
    if not t.experts:
        return (piece(t.shape[0], ranks, rank), *t.shape[1:])
    ep = min(EXPERT_PARALLEL, ranks)
    return (piece(t.shape[0], ep, rank % ep), piece(t.shape[1], ranks // ep, rank // ep), *t.shape[2:])


def untouched(shapes: list[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yield four float32 tensors of each shape, in address space without memory."""
    sizes = [-(-torch.Size(s).numel() // 16) * 16 for s in shapes]
    noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    space = torch.frombuffer(mmap.mmap(-1, 16 * sum(sizes) + 64, flags=flags), dtype=torch.float32)
    offset = 0
    for shape, size in zip(shapes, sizes, strict=True):
        for _ in range(4):
            yield space[offset : offset + torch.Size(shape).numel()].view(shape)
            offset += size


def optimizer_of(shapes: list[tuple[int, ...]], mesh: "dist.DeviceMesh") -> fused_adamw.AdamW:
    """Make an optimizer in mid-training, of DTensors with these shards."""
    from torch.distributed.tensor import DTensor, Shard

    tensors = (DTensor.from_local(t, mesh, [Shard(0)], run_check=False) for t in untouched(shapes))
    params, states = [], {}
    for p, g, m, v in zip(*[tensors] * 4, strict=True):
        param = torch.nn.Parameter(p)
        param.grad = g
        params.append(param)
        states[param] = {"step": torch.tensor(10.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer = fused_adamw.AdamW(params, backend="triton")
    optimizer.state.update(states)
    return optimizer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="(default: %(default)s)")
    args = parser.parse_args()
    begin("AdamW, float32, on the rank with the most to do", 1)
    leave_out_kernels()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    columns = ["model", "ranks", "tensors\nwith elements", "elements", "of an\neven share", "GB moved\na step"]
    shown = new_table(*columns, "launches", "tables\n(KB)", "plan\n(ms)", "host\na step (µs)")
    for (name, model), ranks in itertools.product(MODELS.items(), args.ranks):
        tensors = model()
        shapes = [local_shape(t, ranks, 0) for t in tensors]  # rank 0 has the most of every tensor
        counts = [torch.Size(s).numel() for s in shapes]
        elements, whole = sum(counts), sum(torch.Size(t.shape).numel() for t in tensors)
        optimizer = optimizer_of(shapes, mesh)
        with torch.no_grad():
            start = time.perf_counter()
            plan.build(optimizer)
            built = time.perf_counter() - start
        optimizer.step()
        start = time.perf_counter()
        for _ in range(20):
            optimizer.step()
        stepped = (time.perf_counter() - start) / 20
        (launch,) = (part.launch for part in optimizer._plans)
        shown.add_row(
            name,
            f"{ranks}",
            f"{sum(map(bool, counts))} of {len(counts)}",
            f"{elements / 1e6:,.1f} M",
            f"{elements * ranks / whole:.2f}",
            f"{28 * elements / 1e9:.3f}",
            f"{len(optimizer._plans)}",
            f"{sum(t.nbytes for t in (launch.buffer, launch.chunks, launch.norm_chunks)) / 1e3:,.0f}",
            f"{built * 1e3:.0f}",
            f"{stepped * 1e6:.0f}",
        )
    dist.destroy_process_group()
    console.print(shown)


if __name__ == "__main__":
    main()
