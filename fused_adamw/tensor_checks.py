"""Refuses a parameter, its gradient or its state that cannot be stepped, in words; ``checks.py`` says which it is."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamw import codecs, options, state
from fused_adamw.contract import EMA, Storage
from fused_adamw.formats import storage_of
from fused_adamw.tensors import (
    cut_dims,
    dense_like,
    has_memory,
    is_dtensor,
    is_meta,
    local,
    same_layout,
    shard_numbering,
    shares,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_storage(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...], param_state: Mapping) -> Storage:
    """Return how p is stored; raise TypeError or ValueError if it cannot be, or if codes lack their scales."""
    storage = storage_of(p, group, names)
    if storage.draws:
        shard_numbering(p)
    if storage.int8 and is_dtensor(p):
        _check_blocks(p)
    _check_codes(p, param_state)
    return storage


def check_state(p: Tensor, group: Mapping, names: tuple[str, ...], param_state: Mapping) -> dict[str, Tensor]:
    """Return the entries of a state that are to have p's shape; raise TypeError or ValueError for one of no use."""
    check_step(param_state.get("step"))
    names = names if group.get("ema_decay") is None else (*names, EMA)
    shaped = state.shaped(param_state, names)
    for name, value in shaped.items():
        if not isinstance(value, Tensor):
            found = f"a {type(value).__name__}"
        elif name in names and not (value.is_complex() if p.is_complex() else value.is_floating_point()):
            found = str(value.dtype)
        else:
            continue
        raise TypeError(
            f"its state {name!r} is {found}, and the parameter {p.dtype}: load the right checkpoint, or del "
            "optimizer.state[p]"
        )
    return shaped


def check_step(step: Any) -> None:
    """Raise TypeError or ValueError for a step that counts nothing. On a device it is not read: that would wait."""
    remedy = "load the right checkpoint, or set it to the number of steps taken"
    if state.is_missing(step):
        return
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex():
            found = f"{step.dtype} of shape {list(step.shape)}"
            raise ValueError(f"its state 'step' is {found}, and must be a number: {remedy}")
        if type(step) is not Tensor or not step.is_cpu:
            return
    elif not isinstance(step, (int, float)):
        raise TypeError(f"its state 'step' is a {type(step).__name__}, and must be a number: {remedy}")
    if not 0 <= (count := float(step)) < math.inf:
        raise ValueError(f"its state 'step' is {count}, which no number of steps can be: {remedy}")


def _check_blocks(p: "DTensor") -> None:
    if not _leaves_blocks_whole(p):
        raise TypeError(
            f"it is placed {p.placements}, which cuts the blocks of {codecs.BLOCK} elements that share a scale of "
            "int8 moments: shard it along the first dimension, into multiples of that, or give its group "
            "state_dtype=torch.bfloat16"
        )


def _leaves_blocks_whole(p: "DTensor") -> bool:
    """Return whether no block lies on two ranks, and the scales can be sharded as p is; all ranks say the same."""
    if not (dims := cut_dims(p)):
        return True
    if dims != {0} or not p.is_contiguous():
        return False
    if codecs.blocks_across(p) is not None:
        return True
    n, inner, blocks = p.numel(), math.prod(p.shape[1:]), codecs.scales_shape(p)[0]
    of_elements, of_scales = (
        [[range(r.start * unit, min(r.stop * unit, n)) for r in held] for held in shares(p, 0, size)]
        for size, unit in ((p.shape[0], inner), (blocks, codecs.BLOCK))
    )
    return of_elements == of_scales


def _check_codes(p: Tensor, param_state: Mapping) -> None:
    keys = [key for key in param_state if isinstance(key, str)]
    for name in sorted({key.removesuffix(part) for key in keys for part in state.CODED if key.endswith(part)}):
        codes, scales = (param_state.get(name + part) for part in state.CODED)
        if not _belong_together(codes, scales):
            expected = f"float32 {list(codecs.scales_shape(codes))}" if isinstance(codes, Tensor) else "codes"
            raise ValueError(
                f"its state {name + state.CODED[1]!r} does not go with {name + state.CODED[0]!r}, which needs "
                f"{expected}: load the right checkpoint, or del optimizer.state[p]"
            )
        if isinstance(scales, Tensor) and scales.numel() and not has_memory(local(scales)) and not is_meta(p):
            raise ValueError(
                f"the memory of its state {name + state.CODED[1]!r} is gone: load the right checkpoint, or del "
                "optimizer.state[p]"
            )


def _belong_together(codes: Any, scales: Any) -> bool:
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor) or codes.dtype not in (torch.int8, torch.uint8):
        return False
    if scales.dtype is not torch.float32 or not scales.is_contiguous() or scales.shape != codecs.scales_shape(codes):
        return False
    if scales.device != codes.device:
        return False
    if is_dtensor(codes) and is_dtensor(scales):
        return scales.placements == state.scales_placements(codes) and scales.device_mesh == codes.device_mesh
    return is_dtensor(scales) == is_dtensor(codes)


def check_tensors(where: str, p: Tensor, group: dict, states: dict[str, Tensor]) -> None:
    p, g, states = local(p), p.grad, {name: local(value) for name, value in states.items()}
    g = p if g is None else local(g)  # without a gradient, only the state is to be made
    for name, t in (("the parameter", p), ("its gradient", g), *((f"its state {k!r}", t) for k, t in states.items())):
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(
                f"{where}: {name} is a {type(t).__name__}, a subclass of Tensor whose memory only its own operators "
                "understand: give the optimizer plain tensors or DTensors of plain tensors"
            )
    _check_gradient(where, p, g)
    if p.is_conj() or p.is_neg():
        raise ValueError(f"{where}: it is a conjugate or negative view: use p.resolve_conj().resolve_neg()")
    if _overlaps_itself(p):
        raise ValueError(f"{where}: its elements share memory (an expanded or strided view): use p.clone()")
    if _is_shifted(p, g):
        raise ValueError(f"{where}: its gradient overlaps it, shifted: use p.grad = p.grad.clone()")
    for name, value in states.items():
        if value.numel() and not has_memory(value) and not is_meta(p):
            raise ValueError(
                f"{where}: the memory of its state {name!r} is gone: load a checkpoint or del optimizer.state[p]"
            )
        if value.shape != p.shape:
            raise ValueError(
                f"{where}: its state {name!r} has shape {list(value.shape)}: it belongs to another parameter, or the "
                "parameter was resized; load the right checkpoint or del optimizer.state[p]"
            )
    if (p.is_complex() or p.dtype is torch.float64) and group.get("state_dtype") in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{where}: {p.dtype} with state_dtype={group['state_dtype']} is not supported: give this group "
            "state_dtype=torch.float32 or torch.float64"
        )


def _overlaps_itself(p: Tensor) -> bool:
    """Return whether two elements of p lie at one address."""
    if p.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(p.shape, p.stride(), strict=True) if size > 1):
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False  # each dimension steps over all that the smaller ones reach
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(p.shape, p.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
    return offsets.unique().numel() < p.numel()


def _is_shifted(p: Tensor, g: Tensor) -> bool:
    """Return whether g lies across the memory of p, and is not p's own; g of another layout than p is copied anyway."""
    first, other = p.data_ptr(), g.data_ptr()
    if first == other or other >= first + p.nbytes or first >= other + g.nbytes:
        return False
    return same_layout(p, dense_like(p)) and same_layout(g, p) and not g.is_conj() and not g.is_neg()


def _check_gradient(where: str, p: Tensor, g: Tensor) -> None:
    if g is not p and g.layout is not torch.strided:
        raise RuntimeError(
            f"{where}: its gradient is sparse ({g.layout}), and a fused step needs dense ones: make the layer with "
            "sparse=False, or give this parameter to torch.optim.SparseAdam or torch.optim.SGD"
        )
    if p.layout is not torch.strided:
        raise TypeError(
            f"{where}: its layout is {p.layout}, and only dense parameters can be stepped: use p.to_dense()"
        )
    if p.is_inference():
        raise TypeError(
            f"{where}: it was made under torch.inference_mode(), and autograd cannot be told that it changes: make it "
            "outside, or use p.clone() there"
        )
    for name, t in (("the parameter", p), ("its gradient", g)):
        if t.dtype.to_real() not in options.DTYPES:
            raise TypeError(
                f"{where}: {name} is {t.dtype}; only float32, bfloat16, float16, float64 and complex of these can be "
                "stepped: convert it, or leave the parameter out of the optimizer"
            )
        if t.numel() and not has_memory(t) and not is_meta(p):
            raise TypeError(
                f"{where}: {name} is a {type(t).__name__} on {t.device} without memory of its own (a null data "
                "pointer), so there is nothing to step: move it to a real device"
            )
    if g.shape != p.shape:
        raise ValueError(f"{where}: its gradient has shape {list(g.shape)}: set p.grad = None and run backward again")
    if g.device != p.device:
        raise ValueError(f"{where}: the parameter is on {p.device}, its gradient on {g.device}: move one to the other")
    if p.is_complex() != g.is_complex():
        raise TypeError(f"{where}: the parameter is {p.dtype}, its gradient {g.dtype}: both real or both complex")


def check_sharding(p: Tensor, grad: Tensor | None, states: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError if p's gradient, or a state, is not sharded as p is."""
    others = {f"its state {name!r}": t for name, t in states.items()}
    others = others if grad is None else {"its gradient": grad, **others}
    if is_dtensor(p):
        placed = f"it is placed {p.placements} on {p.device_mesh}"
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"{placed}: with a Partial placement each rank holds a summand, and a sum cannot be stepped by its "
                "terms: use p.redistribute(...)"
            )
    for name, t in others.items():
        remedy = (
            "del optimizer.state[p], or load with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, "
            "which shards a state as its parameter"
        )
        if is_dtensor(p) != is_dtensor(t):
            if name == "its gradient":
                remedy = "set p.grad = None and run backward again"
            kinds = ["DTensor" if is_dtensor(x) else type(x).__name__ for x in (p, t)]
            raise TypeError(f"the parameter is a {kinds[0]}, {name} a {kinds[1]}: {remedy}")
        if is_dtensor(p) and is_dtensor(t) and (t.device_mesh != p.device_mesh or t.placements != p.placements):
            if name == "its gradient":
                remedy = "p.grad = p.grad.redistribute(p.device_mesh, p.placements) before the step"
                if t.device_mesh != p.device_mesh:
                    remedy = "make the gradient on the parameter's mesh"
            raise ValueError(f"{placed}, {name} {t.placements} on {t.device_mesh}: {remedy}")
