"""Finds the memory behind a tensor: the shard of this rank, its layout, the numbers of its elements in the whole."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Numbering(NamedTuple):
    """Numbers the elements of a shard in the whole: element i has the number offset + i + i // run * skip."""

    offset: int
    run: int
    skip: int


_PLAIN = (Tensor, torch.nn.Parameter)
NOT_SHARDED = Numbering(offset=0, run=1 << 62, skip=0)


def gradient(p: Tensor) -> Tensor:
    """Return the gradient of a parameter that was found to have one."""
    assert p.grad is not None
    return p.grad


def is_dtensor(t: Tensor) -> TypeGuard["DTensor"]:
    """Return whether t is a DTensor, without importing what that takes."""
    if type(t) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds, not copied; any other tensor itself."""
    if not is_dtensor(t):
        return t
    t = _shard(t)
    return t.wait() if hasattr(t, "wait") else t


def _shard(t: Any) -> Tensor:
    with torch.no_grad():  # or it would be a view with a history
        return t.to_local()


def is_pending(t: Tensor) -> bool:
    """Return whether a collective that may still run produces the shard: t then wraps what will hold the result."""
    return is_dtensor(t) and hasattr(_shard(t), "wait")


def shard_groups(p: Tensor) -> tuple[Any, ...]:
    """Return the process groups whose ranks hold different elements of p: one for each mesh dimension that shards it.

    Summing the elements of this rank over each of these groups in turn gives the sum of all of p. A plain or
    replicated parameter has none, and a rank outside p's mesh is in none.
    """
    if not is_dtensor(p) or _is_outside(p):
        return ()
    return tuple(p.device_mesh.get_group(i) for i, q in enumerate(p.placements) if not q.is_replicate())


def is_sharded(p: Tensor) -> bool:
    """Return whether p is a DTensor of which a rank may hold a part, or a summand; all ranks say the same."""
    return is_dtensor(p) and not all(placement.is_replicate() for placement in p.placements)


def _is_outside(p: "DTensor") -> bool:
    return p.device_mesh.get_coordinate() is None


def shard_numbering(p: Tensor) -> Numbering:
    """Return how the elements of this rank are numbered in the whole of p.

    Raises TypeError for pieces of pieces, on all ranks if one holds such, whatever this one holds.
    """
    if not is_dtensor(p):
        return NOT_SHARDED
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    largest_numbering(p)
    shape, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return NOT_SHARDED if _is_outside(p) or 0 in shape else _numbering(p, shape, start)


def largest_numbering(p: "DTensor") -> Numbering:
    """Return the numbering of the first shard, which all ranks can tell: if it is in one piece, so are the others.

    It has the most elements along each dimension. Raises as :func:`shard_numbering` does.
    """
    shape = list(p.shape)
    for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
        if (d := getattr(placement, "dim", None)) is not None:  # is_shard() may not be true of torch's _StridedShard
            shape[d] = -(-shape[d] // size)
    return _numbering(p, shape, [0] * p.dim())


def _numbering(p: "DTensor", shape: Sequence[int], start: Sequence[int]) -> Numbering:
    offset, run, skip, inner = 0, NOT_SHARDED.run, NOT_SHARDED.skip, 1
    for d in reversed(range(p.dim())):
        offset += start[d] * inner
        if shape[d] != p.shape[d] and any(size != 1 for size in shape[:d]):
            if skip:
                raise TypeError(
                    f"it is placed {p.placements}, cut along two inner dimensions, which leaves a rank pieces of "
                    'pieces, and stochastic rounding numbers the elements: give its group rounding="nearest", or shard '
                    "it along one dimension"
                )
            run, skip = shape[d] * inner, (p.shape[d] - shape[d]) * inner
        inner *= p.shape[d]
    return Numbering(offset, max(run, 1), skip)


def has_memory(t: Tensor) -> bool:
    """Return whether t has an address, and its storage reaches to its end."""
    try:
        last = sum(stride * (size - 1) for size, stride in zip(t.shape, t.stride(), strict=True))
        end = (t.storage_offset() + last + 1) * t.element_size()
        return t.data_ptr() != 0 and t.untyped_storage().nbytes() >= end
    except (RuntimeError, NotImplementedError):  # it has no storage
        return False


def is_meta(t: Tensor) -> bool:
    """Return whether t has no data, on torch.device("meta"). ``t.is_meta`` is true of fake tensors, too."""
    return t.device.type == "meta"


def real(t: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last dimension of 2. A conjugate view is copied for that."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def flat(t: Tensor) -> Tensor:
    """Return a dense tensor as one dimension, in the order of memory."""
    return t.as_strided((t.numel(),), (1,))


def dense_like(p: Tensor) -> Tensor:
    """Return a tensor in the dense layout nearest to p's: p itself, or one without memory."""
    return p if p.is_contiguous() else torch.empty_like(p, device="meta")


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether elements of equal index lie at equal offsets."""
    return a.numel() == 0 or _steps(a) == _steps(b)


def _steps(t: Tensor) -> Sequence[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
