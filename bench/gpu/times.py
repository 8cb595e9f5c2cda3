"""Time full optimizer.step() calls with bench.step, and the streams that are their ceilings."""

import argparse
import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench import limit, step, stream, stream_triton
from bench.arms import DTYPES, FUSED, PEERS, arms_of
from bench.gpu.record import Record
from bench.measures import first_line
from bench.output import console
from bench.timing import cuda_clock
from tests import cases

ROUNDS = 7
TRITON, CUDA = "fused_adamw triton", "fused_adamw cuda"
EAGER = (TRITON, CUDA, FUSED)
TORCHS = ["fused", "foreach"]
SMALL = ("465-groups", "148x64", "1x131k", "1000x1k", "10000x64", "resnet50", "moe")
SMALL += ("layerdrop", "alternating", "offloaded-states")
SMALLEST, LARGEST = 12, 28  # of the curve: powers of two of elements
VARIANTS = [(block, warps) for block in (512, 1024, 2048, 4096) for warps in (4, 8)]  # of the stream


def shrink() -> None:
    """Cut all lists to a few elements and groups: a virtual GPU takes minutes for a million elements."""

    def cut(workload: cases.Workload) -> cases.Workload:
        groups = [(shapes[:9], own) for shapes, own in workload.groups(1)[:7]]
        small = [([tuple(min(n, 5) for n in shape) for shape in shapes], own) for shapes, own in groups]
        return workload._replace(groups=lambda layers: small, layers=1)

    cases.WORKLOADS.update({name: cut(workload) for name, workload in cases.WORKLOADS.items()})
    stream.LARGEST = stream.LENGTH


def measure(
    record: Record,
    workload: str,
    algorithm: str = "adamw",
    dtypes: str = "fp32",
    against: list[str] = TORCHS,
    only: tuple[str, ...] = (),
) -> None:
    """Measure a case and write a row for each arm, or for ``only`` some of them."""
    device = torch.device("cuda", torch.cuda.current_device())
    case = step.Case(workload, algorithm, dtypes)
    if not record.time_left(str(case)):
        return
    arms = [a for a in arms_of(algorithm, DTYPES[dtypes], device, against, False) if not only or a.name in only]
    report: dict[str, Any] = {"results": [], "skipped": []}
    try:
        step.measure(case, arms, device, 2 if record.tiny else ROUNDS, False, report, tolerant=True)
    except Exception as error:
        report["skipped"].append({"case": str(case), "arm": "all", "reason": first_line(error)})
    for row in report["results"]:
        record.emit(kind="step", **{k: v for k, v in row.items() if k != "seconds"})
    for row in report["skipped"]:
        record.emit(kind="skipped", **row)
        print(f"skipped: {row}", flush=True)
    clean()


def clean() -> None:
    """Free what a failed case has left, which the next one needs."""
    gc.collect()
    torch.cuda.empty_cache()


def begin(record: Record) -> None:
    """Shorten the lists for a virtual GPU; else bring the clocks up."""
    if record.tiny:
        shrink()
        return
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        a @ a
    torch.cuda.synchronize()


def large(record: Record) -> None:
    """Time lists of 100 M elements and more, as graphs only where a graph could gain something."""
    begin(record)
    measure(record, "gpt2")
    measure(record, "1x1Gi", against=["fused"], only=EAGER)
    measure(record, "1x256Mi", against=["fused"], only=EAGER)
    measure(record, "llama-2b", against=["fused"], only=(TRITON, FUSED))  # a third optimizer would not fit 80 GB
    measure(record, "llama-2b", against=[], only=(CUDA,))


def small(record: Record) -> None:
    """Time lists that are bound by the host, where foreach takes three times as long as fused."""
    begin(record)
    for workload in SMALL:
        measure(record, workload, against=["fused"])


def formats(record: Record) -> None:
    """Time every format of 256 Mi elements, and SGDW."""
    begin(record)
    for dtypes in DTYPES:
        if dtypes != "fp32":
            measure(record, "1x256Mi", dtypes=dtypes, against=["fused"], only=EAGER)
    for dtypes in ("fp32", "bf16+fp32"):
        measure(record, "1x256Mi", "sgdw", dtypes, against=["fused"], only=EAGER)


def clipping(record: Record) -> None:
    """Time steps with gradients clipped by their global norm; torch's arms call clip_grad_norm_ before."""
    begin(record)
    measure(record, "gpt2", "adamw-clip")
    measure(record, "1x256Mi", "adamw-clip", against=["fused"], only=EAGER)


def peers(record: Record) -> None:
    """Time other projects' optimizers that are installed, each beside ours and torch's fused."""
    begin(record)
    last = ("torchao", "bitsandbytes")  # the first compiles for half a minute, the second may end the process
    for name in sorted(PEERS, key=lambda name: (name in last, name)):
        package = PEERS[name].module.split(".")[0]
        if "cuda" not in PEERS[name].devices:
            continue
        if importlib.util.find_spec(package) is None:
            record.note(f"{name}: not installed")
            continue
        for dtypes in ("fp32", "bf16"):
            measure(record, "gpt2", dtypes=dtypes, against=["fused", name], only=(TRITON, FUSED, name))


def ceilings(record: Record) -> None:
    """Time copies, and streams of the reads and writes of steps."""
    begin(record)
    n = stream.LENGTH if record.tiny else 1 << 28
    copies(record, n, torch.device("cuda"))
    streams(record, n, torch.device("cuda"))


def copies(record: Record, n: int, device: torch.device) -> None:
    """Time torch's own operators on one or two arrays."""
    x, y = (stream.random(n, torch.float32, device) for _ in range(2))
    for name, call, size in (
        ("copy", lambda: y.copy_(x), 2 * x.nbytes),
        ("fill", lambda: y.fill_(1.5), y.nbytes),
        ("sum", lambda: x.sum(), x.nbytes),
        ("scale", lambda: y.mul_(0.999), 2 * y.nbytes),
    ):
        ceiling(record, name, call, size)


def streams(record: Record, n: int, device: torch.device) -> None:
    """Time the bench's stream, with its block and with others."""
    f32, bf16 = torch.float32, torch.bfloat16
    for name, shape in (
        ("fp32 AdamW", stream.Shape((f32,) * 3, (f32,))),
        ("bf16+fp32 AdamW", stream.Shape((bf16, f32, f32), (bf16,))),
        ("bf16 AdamW", stream.Shape((bf16,) * 3, (bf16,))),
        ("fp32 SGDW", stream.Shape((f32,) * 2, (f32,))),
    ):
        if not record.time_left(name):
            return
        clean()
        stream_of(record, name, shape, n, device)


def stream_of(record: Record, name: str, shape: stream.Shape, n: int, device: torch.device) -> None:
    """Time the stream of one shape."""
    written, read = (tuple(stream.random(n, dtype, device) for dtype in part) for part in shape[:2])
    own = stream_triton.block_of({*shape.written, *shape.read})
    for block, warps in sorted(VARIANTS, key=lambda variant: variant != (own, 4)):
        if record.tiny and (block, warps) not in ((own, 4), (2048, 8)):
            continue

        def call(block: int = block, warps: int = warps) -> None:
            stream_triton.stream_kernel[(n // block,)](written, read, BLOCK=block, num_warps=warps)

        kind = "stream" if (block, warps) == (own, 4) else f"stream, block {block}, {warps} warps"
        ceiling(record, f"{kind}: {name}", call, n * shape.bytes)


def ceiling(record: Record, name: str, call: Any, size: int) -> None:
    """Time a call that moves so many bytes."""
    try:
        seconds = timed(call, record.tiny)
        record.emit(kind="ceiling", name=name, bytes=size, ms_median=seconds * 1e3, gb_per_s=size / seconds / 1e9)
        print(f"{name}: {size / seconds / 1e9:.1f} GB/s", flush=True)
    except Exception as error:
        record.emit(kind="skipped", case=name, arm="stream", reason=first_line(error))


def timed(call: Any, tiny: bool) -> float:
    """Return the median seconds of a call, of seven timings of 40 ms between events."""
    cuda_clock(call, 2)
    repeats = 1 if tiny else max(1, int(0.04 / cuda_clock(call, 2)))
    return float(np.median([cuda_clock(call, repeats) for _ in range(2 if tiny else 7)]))


def curve(record: Record) -> None:
    """Time a step of one tensor of many sizes, beside the stream of the same size."""
    begin(record)
    args = argparse.Namespace(algorithm="adamw", dtype="fp32", rounds=2 if record.tiny else 5)
    for n in sizes(record.tiny):
        if not record.time_left(f"{n} elements and more"):
            return
        report: dict[str, Any] = {"results": [], "skipped": []}
        try:
            limit.measure(n, args, torch.device("cuda", torch.cuda.current_device()), report)
        except Exception as error:
            record.emit(kind="skipped", case=f"{n} elements", arm="all", reason=first_line(error))
        for row in report["results"]:
            record.emit(kind="curve", **{k: v for k, v in row.items() if k != "seconds"})
        console.print(limit.table(report["results"]) if report["results"] else f"{n} elements failed")
        clean()


def sizes(tiny: bool) -> Iterator[int]:
    """Yield the elements of each point of the curve."""
    return (1 << k for k in range(SMALLEST, 15 if tiny else LARGEST + 1, 2))
