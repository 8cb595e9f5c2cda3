"""Measure the ceiling: read and write arrays of the dtypes that a step touches, and compute next to nothing."""

import ctypes
import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.arms import SHORT
from bench.timing import last_level_cache
from fused_adamw import backends

ROOT = Path(__file__).resolve().parents[1]

LARGEST = 1 << 26  # elements an array: 1.9 GB in all for float32 AdamW
LENGTH = 4096  # lengths are multiples of it, and so of the blocks of the CPU's stream and of the GPU's
LETTERS = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vmax", "momentum_buffer": "buf"}


class Shape(NamedTuple):
    """Describe the traffic of a step: dtypes of the arrays that are read and written, and of those only read."""

    written: tuple[torch.dtype, ...]
    read: tuple[torch.dtype, ...]
    states: tuple[str, ...] = ()  # the names of what is written beside the parameter

    @property
    def bytes(self) -> int:
        return 2 * sum(d.itemsize for d in self.written) + sum(d.itemsize for d in self.read)

    def __str__(self) -> str:
        """Write the formula of its bytes."""
        names = (LETTERS.get(name.removesuffix("_codes"), name) for name in self.states)
        state = [f"{name} {SHORT[d]}" for name, d in zip(names, self.written[1:], strict=True)]
        p, g = f"p {SHORT[self.written[0]]}", f"g {SHORT[self.read[0]]}"
        return f"{self.bytes} bytes an element: read {', '.join([p, g, *state])}; write {', '.join([p, *state])}"


def shape_of(optimizer: torch.optim.Optimizer) -> Shape | None:
    """Return the traffic of a step where nearly all elements of the optimizer are alike, else None.

    Scales, one to 128 elements, are left out.
    """
    found: Counter[Shape] = Counter()
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        own = {key: t for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor) and key != "step"}
        own = {key: t for key, t in own.items() if not key.endswith("_scales")}
        if any(t.numel() != p.numel() or t.dtype not in SHORT for t in own.values()):
            return None
        found[Shape((p.dtype, *(t.dtype for t in own.values())), (p.grad.dtype,), tuple(own))] += p.numel()
    shape, count = found.most_common(1)[0]
    return shape if count >= 0.99 * found.total() else None


class Stream(NamedTuple):
    """Hold a call that streams, and the bytes it moves."""

    call: Callable[[], object]
    bytes: int


def stream(shape: Shape, elements: int, device: torch.device, cold: bool = True) -> Stream:
    """Make a stream of this shape, of about as many elements; of more where they would fit in the caches.

    Raises RuntimeError where there is nothing to run it: a C++ compiler on the CPU, Triton on a GPU.
    """
    if cold:
        elements = max(elements, 4 * last_level_cache(device) // shape.bytes)
    elements = max(1, min(elements, LARGEST) // LENGTH) * LENGTH
    written, read = ([random(elements, d, device) for d in part] for part in shape[:2])
    if device.type == "cpu":
        return Stream(cpu_stream([*written, *read], len(written)), elements * shape.bytes)
    if why := backends.named("triton").missing():
        raise RuntimeError(why)
    from bench.stream_triton import block_of, stream_kernel

    block = block_of({*shape.written, *shape.read})
    grid = (elements // block,)
    return Stream(lambda: stream_kernel[grid](tuple(written), tuple(read), BLOCK=block), elements * shape.bytes)


def random(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return data as memory sees it in training: zeros are faster, since less of what they cross toggles."""
    empty = torch.empty(elements, dtype=dtype, device=device)
    return empty.normal_() if dtype.is_floating_point else empty.random_(-120, 120)


def cpu_stream(arrays: list[torch.Tensor], written: int) -> Callable[[], object]:
    """Return a call that reads CPU tensors once, side by side, and writes the first ``written`` of them."""
    elements = arrays[0].numel()
    if any(t.device.type != "cpu" or not t.is_contiguous() or t.numel() != elements for t in arrays) or elements % 128:
        raise ValueError("stream takes contiguous CPU tensors of one length, a multiple of 128")
    if len(arrays) > 8:
        raise ValueError(f"stream takes up to 8 tensors, not {len(arrays)}")
    if not 0 < written <= len(arrays):
        raise ValueError(f"stream writes 1 to {len(arrays)} tensors, not {written}")
    addresses = (ctypes.c_void_p * len(arrays))(*(t.data_ptr() for t in arrays))
    widths = (ctypes.c_int64 * len(arrays))(*(t.element_size() for t in arrays))
    run, blocks = _library().stream_cpu, ctypes.c_int64(elements // 128)
    return lambda: run(addresses, widths, len(arrays), written, blocks)  # holds the arrays, too


@functools.cache
def _library() -> ctypes.CDLL:
    """Build bench/csrc/stream_cpu.cpp into build/bench of the checkout, where it is not built yet, and load it."""
    from torch.utils import cpp_extension

    folder, name = ROOT / "build" / "bench", "bench_stream"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob(f"{name}.*")):
        print("bench: compiling bench/csrc/stream_cpu.cpp, once", file=sys.stderr, flush=True)
    flags = ["/O2"] if sys.platform == "win32" else ["-O3"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    if shutil.which("ninja") is None:  # pip puts it beside an interpreter that need not be in the PATH
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    try:
        path = cpp_extension.load(
            name,
            [str(ROOT / "bench" / "csrc" / "stream_cpu.cpp")],
            extra_cflags=flags + openmp,
            extra_ldflags=openmp,
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"bench/csrc/stream_cpu.cpp cannot be built, which takes a C++ compiler and ninja: {error}"
        ) from error
    return ctypes.CDLL(path)


def copy(elements: int, device: torch.device, cold: bool = True) -> Stream:
    """Make a ``copy_`` of a float32 array; if ``cold``, of one that no cache holds."""
    elements = min(LARGEST, max(elements, last_level_cache(device) if cold else 0))
    source, target = (random(elements, torch.float32, device) for _ in range(2))
    return Stream(lambda: target.copy_(source), 2 * source.nbytes)
