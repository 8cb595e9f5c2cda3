"""Describe the machine, and compare the bits of every optimizer and format with the CPU backend's."""

import json
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_adamw
from bench import timing
from bench.gpu.record import Record
from bench.measures import first_line
from tests import cases

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOOLS = ("nvcc", "g++", "ninja", "ncu", "compute-sanitizer", "cuobjdump", "nvidia-smi")
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "setuptools")

SHAPES: cases.Shapes = [*cases.SHAPES, (20_003, 1)]
LONG: cases.Shapes = [(1_000_003, 1), (4096, 513)]
CLIPPED = {"max_grad_norm": 0.5}
FORMATS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("AdamW", BF16, {}),
    ("AdamW", BF16, {"state_dtype": BF16}),
    ("AdamW", F16, {}),
    ("SGDW", BF16, {"momentum": 0.9}),
    ("AdamW", BF16, {"rounding": "stochastic"}),
    ("AdamW", BF16, {"rounding": "stochastic", "state_dtype": BF16}),
    ("AdamW", BF16, {"master": "kahan"}),
    ("AdamW", BF16, {"master": "split16"}),
    ("AdamW", BF16, {"master": "fp32"}),
    ("AdamW", F16, {"master": "fp32"}),
    ("AdamW", F32, {"state_dtype": "int8"}),
    ("AdamW", BF16, {"state_dtype": "int8"}),
    ("AdamW", BF16, {"state_dtype": "int8", "rounding": "stochastic", "master": "split16"}),
    ("SGDW", BF16, {"momentum": 0.9, "state_dtype": "int8", "rounding": "stochastic"}),
]
GRAPHS = [("AdamW", F32, {}), ("SGDW", F32, {"momentum": 0.9}), FORMATS[-2]]


# ---- the machine


def facts(record: Record) -> None:
    """Write environment.json: what the figures depend on."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    found = {
        **timing.environment(None, device),
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "L2": f"{timing.last_level_cache(device) / 2**20:.0f} MiB",
        "packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := version_of(name))),
        "tools": ", ".join(f"{name}{'' if shutil.which(name) else ': none'}" for name in TOOLS),
        "nvcc": (timing.output(["nvcc", "--version"]).splitlines() or ["none"])[-1],
        "backends": timing.output([sys.executable, "-m", "fused_adamw"]).replace(f"{ROOT}/", ""),
    }
    if record.tiny:
        found["tiny"] = "lists of a few elements: no figure means anything"
    (record.folder / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name}: {value}")
    print(timing.output(["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"])[:4000])


def version_of(package: str) -> str:
    """Return the version of an installed package, or nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


# ---- bits


def parity(record: Record, backend: str) -> None:
    """Check every optimizer, format, graph and view on a backend; exit with status 1 where a bit differs."""
    right = checks = 0
    for name, check in checks_of(backend, record.tiny):
        if not record.time_left(f"{backend}: {name} and what follows"):
            break
        try:
            wrong = check()
        except Exception as error:
            wrong = [first_line(error)]
        torch.cuda.empty_cache()
        checks, right = checks + 1, right + (not wrong)
        record.emit(kind="check", backend=backend, name=name, wrong=wrong[:5])
        print(f"{backend}: {name}: {'right' if not wrong else '; '.join(wrong[:5])}", flush=True)
    record.note(f"{backend}: {right} of {checks} checks right")
    if right < checks or not checks:
        raise SystemExit(1)


def checks_of(backend: str, tiny: bool) -> Iterator[tuple[str, Any]]:
    """Yield the name of each check and a function that returns what is wrong."""
    shapes = SHAPES if tiny else [*SHAPES, *LONG]
    plain = [(name, F32, options) for name, options in (*cases.SHARED, *cases.OURS)]
    if tiny:
        plain = plain[::7]
    for name, dtype, options in (*plain, *(FORMATS[::3] if tiny else FORMATS)):
        yield title(name, dtype, options), partial(same_bits, name, dtype, options, backend, shapes)
    for name, dtype, options in plain:
        yield f"zeros, {title(name, dtype, options)}", partial(zeros, name, options, backend)
    for name, dtype, options in GRAPHS:
        yield f"graph, {title(name, dtype, options)}", partial(replayed, name, dtype, options, backend)
    yield "clipped", partial(same_bits, "AdamW", F32, CLIPPED, backend, SHAPES)
    yield "unaligned views", partial(unaligned, backend, range(0, 41, 8 if tiny else 1))
    yield "more than 2^31 elements", partial(large, backend, 70_001 if tiny else (1 << 31) + 12345)


def title(name: str, dtype: torch.dtype, options: dict[str, Any]) -> str:
    """Name a check."""
    return f"{name} {cases.name_of(dtype)} {cases.name_of(options)}"


def differing(x: Tensor, y: Tensor) -> int:
    """Count the elements whose bits differ; all NaN are alike."""
    return int((~cases.equal_bits(x.detach().cpu(), y.detach().cpu())).sum())


def compare(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> list[str]:
    """List the tensors of two optimizers whose bits differ."""
    x, y = cases.tensors_of(ours), cases.tensors_of(theirs)
    if x.keys() != y.keys():
        return [f"other tensors: {sorted(x.keys() ^ y.keys())}"]
    counts = {name: differing(x[name], y[name]) for name in x}
    return [f"{name} {list(x[name].shape)}: {n} of {x[name].numel()} differ" for name, n in counts.items() if n]


def twins(
    name: str, dtype: torch.dtype, options: dict[str, Any], backend: str, shapes: cases.Shapes, **more: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Make the same optimizer on the GPU and on the CPU, with gradients of zeros."""
    found = []
    for device, where, ours in (("cuda", backend, more), ("cpu", "cpu", {})):
        params = cases.parameters(shapes, dtype, device)
        for p in params:
            p.grad = torch.zeros_like(p)
        found.append(cases.make(name, params, options, backend=where, **ours))
    return found[0], found[1]


def next_gradients(optimizers: tuple[torch.optim.Optimizer, ...], t: int, into: list[Tensor] | None = None) -> None:
    """Make the gradients of step ``t`` on the CPU, and copy them to the GPU: into these tensors, or where they are."""
    ours, theirs = (optimizer.param_groups[0]["params"] for optimizer in optimizers)
    cases.set_gradients(theirs, t)
    for g, q in zip(into or [p.grad for p in ours], theirs, strict=True):
        g.copy_(q.grad)


def same_bits(name: str, dtype: torch.dtype, options: dict[str, Any], backend: str, shapes: cases.Shapes) -> list[str]:
    """Compare three steps on both devices."""
    pair = twins(name, dtype, options, backend, shapes)
    for t in range(3):
        next_gradients(pair, t)
        for optimizer in pair:
            optimizer.step()
    return compare(*pair)


def zeros(name: str, options: dict[str, Any], backend: str) -> list[str]:
    """Compare steps of zeros of both signs, beside other numbers: a minus that is computed as 0 - x loses one."""
    pair = twins(name, F32, options, backend, [(36,)])
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1.0, -1.0])
    for optimizer in pair:
        (p,) = optimizer.param_groups[0]["params"]
        p.grad.copy_(values.repeat_interleave(6))
        with torch.no_grad():
            p.copy_(values.repeat(6))
        for _ in range(3):
            optimizer.step()
    return compare(*pair)


def replayed(name: str, dtype: torch.dtype, options: dict[str, Any], backend: str) -> list[str]:
    """Replay a graph, with other hyperparameters each time, between steps whose gradients lie elsewhere."""
    pair = twins(name, dtype, options, backend, SHAPES, capturable=True)
    params = pair[0].param_groups[0]["params"]
    static = [p.grad for p in params]
    graph = torch.cuda.CUDAGraph()
    for t, replays in enumerate((False, False, True, True, False, True, False)):
        for optimizer in pair:
            optimizer.param_groups[0]["weight_decay"] = 0.01 * t
        if t == 2:
            with torch.cuda.graph(graph):
                pair[0].step()
            for p in params:
                p.grad = torch.zeros_like(p)
        next_gradients(pair, t, static if replays else None)
        if replays:
            pair[0].refresh_captured()
            graph.replay()
        else:
            pair[0].step()
        pair[1].step()
    torch.cuda.synchronize()
    return compare(*pair)


def unaligned(backend: str, offsets: range) -> list[str]:
    """Step views slid over a buffer of sentinels: none is missed, and nothing beside them is written."""
    wrong = []
    for n in (150, 4099):
        for offset in offsets:
            buffer = torch.full((n + 60,), 42.0, device="cuda")
            p = torch.nn.Parameter(buffer[offset : offset + n])
            p.grad = torch.randn(n + 60, device="cuda")[offset : offset + n]
            q = torch.nn.Parameter(p.detach().cpu().clone())
            q.grad = p.grad.cpu().clone()
            fused_adamw.AdamW([p], backend=backend).step()
            fused_adamw.AdamW([q], backend="cpu").step()
            beside = torch.cat([buffer[:offset], buffer[offset + n :]])
            if differing(p, q) or not bool((beside == 42).all()):
                wrong.append(f"{n} elements at offset {offset}")
    return wrong


def large(backend: str, n: int) -> list[str]:
    """Compare both ends and the middle of one long tensor with the CPU's step of these pieces."""
    p = torch.nn.Parameter(torch.empty(n, dtype=BF16, device="cuda").normal_())
    p.grad = torch.empty(n, dtype=BF16, device="cuda").normal_()
    places = [0, n // 2, n - 4096]
    pieces = [torch.nn.Parameter(p.detach()[i : i + 4096].cpu().clone()) for i in places]
    for q, i in zip(pieces, places, strict=True):
        q.grad = p.grad[i : i + 4096].cpu().clone()
    fused_adamw.SGDW([p], lr=0.1, backend=backend).step()
    fused_adamw.SGDW(pieces, lr=0.1, backend="cpu").step()
    found = [(i, differing(p.detach()[i : i + 4096], q)) for q, i in zip(pieces, places, strict=True)]
    return [f"{count} of 4096 elements at {i} differ" for i, count in found if count]
