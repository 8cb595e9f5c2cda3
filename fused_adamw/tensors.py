"""Finds the memory behind a tensor: the shard of this rank, its layout, the numbers of its elements in the whole."""

import itertools
import sys
from collections.abc import Sequence
from functools import cache
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


Ranges = tuple[range, ...]
Cuts = tuple[tuple[int, int], ...]
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
    """Return how the elements of this rank are numbered in the whole of p, both in the whole's order of memory.

    Raises TypeError for pieces of pieces, on all ranks if one holds such, whatever this one holds.
    """
    if not is_dtensor(p):
        return NOT_SHARDED
    steps, cuts = _whole_strides(p), [_cuts(p, d) for d in range(p.dim())]
    for held in itertools.product(*map(_kinds, p.shape, cuts)):
        _run_and_skip(p, held, steps)
    coordinate = p.device_mesh.get_coordinate()
    if coordinate is None:
        return NOT_SHARDED
    here = [_here(p, d, [coordinate[i] for i in _cutting(p, d)]) for d in range(p.dim())]
    if not all(here):
        return NOT_SHARDED
    offset = sum(ranges[0].start * step for ranges, step in zip(here, steps, strict=True))
    return Numbering(offset, *_run_and_skip(p, [_from_zero(ranges) for ranges in here], steps))


def shares(p: "DTensor", d: int, size: int) -> tuple[Ranges, ...]:
    """Return the indices of a dimension of this size that each rank holds, if it is cut as dimension d of p is."""
    return _shares(size, _cuts(p, d))


def cut_dims(p: "DTensor") -> set[int]:
    """Return the dimensions of p that several ranks share."""
    return {d for d in range(p.dim()) if any(p.device_mesh.size(i) > 1 for i in _cutting(p, d))}


def _cutting(p: "DTensor", d: int) -> list[int]:
    """Return the dimensions of the mesh over which dimension d of p is cut."""
    # is_shard() may not be true of torch's _StridedShard; a Partial has no dim.
    return [i for i, placement in enumerate(p.placements) if getattr(placement, "dim", None) == d]


def _cuts(p: "DTensor", d: int) -> Cuts:
    """Return how dimension d of p is cut, in turn: into so many parts, and each of these among so many ranks.

    torch's _StridedShard makes several parts, Shard one.
    """
    return tuple((getattr(p.placements[i], "split_factor", 1), p.device_mesh.size(i)) for i in _cutting(p, d))


def _here(p: "DTensor", d: int, coordinate: list[int]) -> Ranges:
    """Return the indices of dimension d that this rank holds."""
    cuts = _cuts(p, d)
    held = _held(p.shape[d], cuts, coordinate)
    if sum(map(len, held)) == local(p).shape[d]:
        return held
    # FSDP2 cuts what tensor parallelism left on this rank, and the placements say otherwise where that is uneven.
    return _held(p.shape[d], tuple((1, ranks) for _, ranks in reversed(cuts)), coordinate[::-1])


def _held(size: int, cuts: Cuts, coordinate: Sequence[int]) -> Ranges:
    """Return the indices of a dimension that a rank holds, in its order; the coordinate has an entry for each cut."""
    held: Ranges = (range(size),)
    for (parts, ranks), i in zip(cuts, coordinate, strict=True):
        held = _cut(held, parts, ranks, i)
    return _merged(held)


def _cut(held: Ranges, parts: int, ranks: int, i: int) -> Ranges:
    return tuple(r for part in range(parts) for r in _chunk(_chunk(held, parts, part), ranks, i))


def _chunk(held: Ranges, n: int, i: int) -> Ranges:
    """Return chunk i of n, as torch.chunk cuts them, empty where it makes fewer."""
    each, before, found = -(-sum(map(len, held)) // n), 0, []
    for r in held:
        found.append(r[max(i * each - before, 0) : max((i + 1) * each - before, 0)])
        before += len(r)
    return tuple(filter(None, found))


def _merged(held: Ranges) -> Ranges:
    """Return the same indices with ranges that follow one another made one."""
    merged: list[range] = []
    for r in held:
        follows = merged and merged[-1].stop == r.start
        merged.append(range(merged.pop().start, r.stop) if follows else r)
    return tuple(merged)


@cache
def _shares(size: int, cuts: Cuts) -> tuple[Ranges, ...]:
    every: list[Ranges] = [(range(size),)]
    for parts, ranks in cuts:
        every = [_cut(held, parts, ranks, i) for held in every for i in range(ranks)]
    return tuple(map(_merged, every))


@cache
def _kinds(size: int, cuts: Cuts) -> frozenset[Ranges]:
    """Return what the ranks that hold any of a dimension hold, each counted from its first index.

    Where no cut makes parts the first rank stands for all: the others hold one range too, and none a longer one.
    """
    alone = all(parts == 1 for parts, _ in cuts)
    every = [_held(size, cuts, [0] * len(cuts))] if alone else _shares(size, cuts)
    return frozenset(_from_zero(held) for held in every if held)


def _from_zero(held: Ranges) -> Ranges:
    return tuple(range(r.start - held[0].start, r.stop - held[0].start) for r in held)


def _run_and_skip(p: "DTensor", held: Sequence[Ranges], steps: Sequence[int]) -> tuple[int, int]:
    """Return the numbering's run and skip for a shard that holds these indices of each dimension, counted from 0."""
    levels, regular, ragged = [(1, 1)], True, False  # levels: how many, how far apart in the whole; the inner first
    for d in sorted(range(p.dim()), key=steps.__getitem__):
        ranges, n, length = held[d], len(held[d]), len(held[d][0])
        apart = ranges[1].start if n > 1 else 0
        for count, step in (length, steps[d]), (n, apart * steps[d]):
            if count == 1:
                continue
            regular &= not ragged  # a last piece that is shorter is the end of the shard
            if levels[-1][0] * levels[-1][1] == step:
                count, step = count * levels[-1][0], levels.pop()[1]
            levels.append((count, step))
        ragged |= len(ranges[-1]) < length
        full = (*ranges[:-1], range(ranges[-1].start, ranges[-1].start + max(length, len(ranges[-1]))))
        regular &= full == tuple(range(i * apart, i * apart + length) for i in range(n))
    if not regular or len(levels) > 2:
        raise TypeError(
            f"it is placed {p.placements}, which leaves a rank pieces of pieces, and stochastic rounding numbers the "
            'elements: give its group rounding="nearest", or shard it along one dimension'
        )
    (run, _), *outer = levels
    return (run, outer[0][1] - run) if outer else (NOT_SHARDED.run, NOT_SHARDED.skip)


def _whole_strides(p: "DTensor") -> tuple[int, ...]:
    """Return the strides of the whole of p, made dense, as one process would."""
    return torch.empty_like(torch.empty_strided(p.shape, p.stride(), device="meta")).stride()


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


def dense_like(p: Tensor, ordered: bool = False) -> Tensor:
    """Return a tensor in the dense layout nearest to that of p's shard: the shard itself, or one without memory.

    If ``ordered`` the layout has the order of the whole, which a shard need not have: torch transposes the whole alone.
    """
    t = local(p)
    if ordered and is_dtensor(p) and t.numel():
        strides = _whole_strides(p)
        order = sorted(range(t.dim()), key=strides.__getitem__, reverse=True)
        dense = torch.empty_permuted(t.shape, order, dtype=t.dtype, device="meta")
        return t if same_layout(t, dense) else dense
    return t if t.is_contiguous() else torch.empty_like(t, device="meta")


def in_order(t: Tensor) -> Tensor:
    """Return the shard of t in the whole's order of memory, copied if it has another."""
    shard, dense = local(t), dense_like(t, ordered=True)
    return shard if same_layout(shard, dense) else torch.empty_like(dense, device=shard.device).copy_(shard)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Return whether elements of equal index lie at equal offsets."""
    return a.numel() == 0 or _steps(a) == _steps(b)


def _steps(t: Tensor) -> Sequence[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
