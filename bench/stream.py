"""The ceiling: arrays of the dtypes that a step touches, read and written once, with next to nothing computed."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.arms import SHORT
from bench.timing import last_level_cache
from fused_adamw import backends

LARGEST = 1 << 26  # elements an array: 1.9 GB in all for float32 AdamW
LENGTH = 4096  # what lengths are multiples of: blocks of the CPU's stream, and of the GPU's


LETTERS = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "vmax", "momentum_buffer": "buf"}


class Shape(NamedTuple):
    """The traffic of a step, by element: dtypes of the arrays that are read and written, and of those only read."""

    written: tuple[torch.dtype, ...]
    read: tuple[torch.dtype, ...]
    states: tuple[str, ...] = ()  # the names of what is written beside the parameter

    @property
    def bytes(self) -> int:
        return 2 * sum(d.itemsize for d in self.written) + sum(d.itemsize for d in self.read)

    def __str__(self) -> str:
        """The formula of its bytes."""
        names = (LETTERS.get(name.removesuffix("_codes"), name) for name in self.states)
        state = [f"{name} {SHORT[d]}" for name, d in zip(names, self.written[1:], strict=True)]
        p, g = f"p {SHORT[self.written[0]]}", f"g {SHORT[self.read[0]]}"
        return f"{self.bytes} bytes an element: read {', '.join([p, g, *state])}; write {', '.join([p, *state])}"


def shape_of(optimizer: torch.optim.Optimizer) -> Shape | None:
    """The traffic of a step of an optimizer nearly all of whose elements are alike; None where they are not.

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
    """A call that streams, and the bytes it moves."""

    call: Callable[[], object]
    bytes: int


def stream(shape: Shape, elements: int, device: torch.device, cold: bool = True) -> Stream:
    """A stream of this shape, of about as many elements; of more where they would fit in the caches.

    Raises RuntimeError where there is nothing to run it: the extension on the CPU, Triton on a GPU.
    """
    if cold:
        elements = max(elements, 4 * last_level_cache(device) // shape.bytes)
    elements = max(1, min(elements, LARGEST) // LENGTH) * LENGTH
    written, read = ([random(elements, d, device) for d in part] for part in shape[:2])
    if device.type == "cpu":
        if backends.native() is None:
            raise RuntimeError(backends.BACKENDS[0].missing())
        run = backends.native().stream
        return Stream(lambda: run([*written, *read], len(written)), elements * shape.bytes)
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


def copy(elements: int, device: torch.device, cold: bool = True) -> Stream:
    """``copy_`` of a float32 array, if ``cold`` one that no cache holds."""
    elements = min(LARGEST, max(elements, last_level_cache(device) if cold else 0))
    source, target = (random(elements, torch.float32, device) for _ in range(2))
    return Stream(lambda: target.copy_(source), 2 * source.nbytes)
