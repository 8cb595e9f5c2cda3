"""Time steps with other chunks, of every format, and warps, widths and cache hints, without a change of the product."""

import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fused_adamw
from bench.arms import DTYPES, chunked
from bench.gpu.record import Record
from bench.gpu.times import begin, clean, timed
from bench.measures import first_line
from bench.stream import random
from bench.timing import bytes_of_step

kernels = importlib.import_module("fused_adamw.triton_kernels.kernels")
SOURCE = Path(kernels.__file__).parent
FORMATS = ("fp32", "bf16", "bf16+fp32", "bf16-stochastic", "bf16+int8", "bf16+int8-stochastic", "bf16+fp32-split16")
CHUNKS = (512, 1024, 2048, 4096, 8192)
CONFIGS = {"2 warps": (2, 4), "8 warps": (8, 4), "width 8": (4, 8), "2 warps, width 8": (2, 8)}
# Every access of the streams, in triton_kernels/formats.py, ends in this.
ACCESS = "mask=mask)"
EVICT, CACHE = ', eviction_policy="evict_first"', ', cache_modifier="{}"'
HINTS = {
    "loads evict first": (EVICT, ""),
    "stores evict first": ("", EVICT),
    "all evict first": (EVICT, EVICT),
    "loads .cg": (CACHE.format(".cg"), ""),
    "stores .cs": ("", CACHE.format(".cs")),
    "loads .cg, stores .cs": (CACHE.format(".cg"), CACHE.format(".cs")),
}


def sweep(record: Record) -> None:
    """Time every chunk with every format, and the other variants with two, until no time is left."""
    begin(record)
    large, middle = ("1x256Mi", 5000 if record.tiny else 1 << 28), ("1x24Mi", 5000 if record.tiny else 24 << 20)
    cases = [(large, dtypes, chunks_of()) for dtypes in FORMATS]
    cases += [(middle, dtypes, chunks_of()) for dtypes in FORMATS[:2]]
    cases += [(large, dtypes, variants_of()) for dtypes in FORMATS[:2]]
    for (name, n), dtypes, variants in cases[:: 5 if record.tiny else 1]:
        for backend, variant, patched in list(variants)[:: 3 if record.tiny else 1]:
            if not record.time_left(f"{dtypes}, {variant} and what follows"):
                return
            row = {"list": name, "dtypes": dtypes, "backend": backend, "variant": variant}
            try:
                with patched():
                    seconds, size = step_seconds(n, dtypes, backend, record.tiny)
                record.emit(kind="sweep", **row, ms_median=seconds * 1e3, gb_per_s=size / seconds / 1e9)
                print(row, f"{size / seconds / 1e9:.1f} GB/s", flush=True)
            except Exception as error:
                record.emit(kind="skipped", case=f"sweep {name} {dtypes}", arm=variant, reason=first_line(error))
                print(row, first_line(error), flush=True)
            clean()


def step_seconds(n: int, dtypes: str, backend: str, tiny: bool) -> tuple[float, int]:
    """Return the seconds and the bytes of a step of one tensor."""
    storage = DTYPES[dtypes]
    p = torch.nn.Parameter(random(n, storage.dtype, torch.device("cuda")))
    p.grad = random(n, storage.dtype, torch.device("cuda"))
    options = {**storage.options, "state_dtype": "int8" if storage.state_dtype is torch.int8 else storage.state_dtype}
    optimizer = fused_adamw.AdamW([p], lr=1e-6, backend=backend, **options)
    optimizer.step()
    return timed(optimizer.step, tiny), bytes_of_step(optimizer)


def chunks_of() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield the backend, the name, and a context in which optimizers are made that way; the same again is noise."""
    for backend in ("triton", "cuda"):
        for chunk in CHUNKS:
            yield backend, f"chunk {chunk}", lambda chunk=chunk: chunked(chunk)
        yield backend, f"chunk {CHUNKS[0]}, again", lambda: chunked(CHUNKS[0])


def variants_of() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Yield the same of other variants. The default comes first and last."""
    yield "triton", "default", ExitStack
    for name, (warps, width) in CONFIGS.items():
        yield "triton", name, lambda warps=warps, width=width: configured(warps, width)
    for name, (load, store) in HINTS.items():
        yield "triton", name, lambda load=load, store=store: hinted(load, store)
    yield "triton", "default, again", ExitStack


def configured(warps: int, width: int) -> Any:
    """Give a Triton program so many warps, and a thread so many elements at a time."""
    true = kernels.config

    def config(variant: Any, warp_size: int) -> tuple[dict, dict]:
        constexprs, options = true(variant, warp_size)
        return constexprs | {"THREADS": warps * warp_size, "WIDTH": width}, options | {"num_warps": warps}

    return mock.patch.object(kernels, "config", config)


@contextmanager
def hinted(load: str, store: str) -> Iterator[None]:
    """Use copies of the Triton kernels with a hint at every load and store of a stream."""
    with tempfile.TemporaryDirectory() as folder:
        for path in SOURCE.glob("*.py"):
            lines = path.read_text().splitlines(keepends=True)
            if path.name == "formats.py":
                lines = [with_hint(line, load, store) for line in lines]
            (Path(folder) / path.name).write_text("".join(lines))
        package = types.ModuleType(f"hinted_{abs(hash((load, store)))}")
        package.__path__ = [folder]
        sys.modules[package.__name__] = package
        changed = importlib.import_module(f"{package.__name__}.multi_tensor")
        with mock.patch.object(kernels, "step_kernel", changed.step_kernel):
            yield


def with_hint(line: str, load: str, store: str) -> str:
    """Put a hint into the access of a line of formats.py, if it has one."""
    hint = load if "tl.load(" in line else store if "tl.store(" in line else ""
    return line.replace(ACCESS, f"{ACCESS[:-1]}{hint})")
