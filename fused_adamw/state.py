"""The state of a parameter: made where it is missing, brought to the form that its group asks for, back to torch's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_adamw import formats, plan

Own = dict[str, Any]  # the state of one parameter


def init(own: Own, p: Tensor, names: tuple[str, ...], form: formats.Kept, declared: Any, step_on: torch.device) -> None:
    """Make the state of p that is missing; bring the rest to the form, dtype, device and layout that a step needs."""
    # What is no tensor is none: torch's SGD has a buffer of None, and no step, of which checkpoints make {}.
    buffer = any(isinstance(own.get(name), Tensor) for name in ("momentum_buffer", "momentum_buffer_codes"))
    there = isinstance(own.get("step"), (Tensor, int, float))
    step = own["step"] if there else float(buffer)
    if "momentum_buffer" in names and not buffer:
        step = 0.0  # SGD counts the steps of the momentum, whose first is not dampened
    if not isinstance(step, Tensor) or step.dtype is not torch.float32 or step.device != step_on or step.dim():
        own["step"] = torch.tensor(float(step), dtype=torch.float32, device=step_on)
    for name in names:
        _init_moment(own, name, p, form.int8, declared)
    _init_master(own, p, form)


def _init_moment(own: Own, name: str, p: Tensor, int8: bool, declared: Any) -> None:
    coded = [name + part for part in _CODED]
    if int8:
        dtype = torch.uint8 if name == formats.SECOND else torch.int8
        if not all(isinstance(own.get(key), Tensor) for key in coded) or not _fits(own[coded[0]], p, dtype):
            have = _as_float(own, name)
            own[coded[0]] = plan.state_like(p, dtype).zero_()
            own[coded[1]] = _scales_of(own[coded[0]])
            if have is not None:
                x = torch.empty_like(plan.local(own[coded[0]]), dtype=torch.float32).copy_(plan.local(have))
                for key, values in zip(coded, formats.encode(x, name == formats.SECOND), strict=True):
                    formats.flat(plan.local(own[key])).copy_(values)
        own.pop(name, None)
        return
    have, dtype = _as_float(own, name), plan.state_dtype_of(p, declared)
    if have is None:
        own[name] = plan.state_like(p, dtype).zero_()
    elif not _fits(have, p, dtype) or have is not own.get(name):
        own[name] = plan.state_like(p, dtype)
        plan.local(own[name]).copy_(plan.local(have))
    for key in coded:
        own.pop(key, None)


def _scales_shape(codes: Tensor) -> torch.Size:
    """[first dimension, blocks] where the scales can be sharded as the codes are, since no block goes across it.

    Else [blocks], or [blocks, 1] where the order of memory is not that of the indices, so that no two are mistaken.
    """
    across, blocks = plan.blocks_across(codes), -(-codes.numel() // formats.BLOCK)
    if across is not None:
        return torch.Size((codes.shape[0], across))
    return torch.Size((blocks,) if codes.is_contiguous() else (blocks, 1))


def _scales_of(codes: Tensor) -> Tensor:
    """Zeros, sharded as the codes are."""
    scales = torch.zeros(_scales_shape(plan.local(codes)), dtype=torch.float32, device=codes.device)
    if not plan.is_dtensor(codes):
        return scales
    shape = _scales_shape(codes)
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = codes.device_mesh, codes.placements
    return type(codes).from_local(scales, mesh, placements, run_check=False, shape=shape, stride=stride)


def check_codes(own: Own) -> None:
    """Raise ValueError for codes that have not the scales that are theirs."""
    for name in sorted({key.removesuffix(part) for key in own for part in _CODED if key.endswith(part)}):
        codes, scales = (own.get(name + part) for part in _CODED)
        if not _belong_together(codes, scales):
            expected = f"float32 {list(_scales_shape(codes))}" if isinstance(codes, Tensor) else "codes"
            raise ValueError(
                f"its state {name + _CODED[1]!r} does not go with {name + _CODED[0]!r}, which needs {expected}: "
                "load the right checkpoint, or del optimizer.state[p]"
            )


def _belong_together(codes: Any, scales: Any) -> bool:
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor) or codes.dtype not in (torch.int8, torch.uint8):
        return False
    if scales.dtype is not torch.float32 or not scales.is_contiguous() or scales.shape != _scales_shape(codes):
        return False
    if scales.device != codes.device:
        return False
    if plan.is_dtensor(codes) and plan.is_dtensor(scales):
        return scales.placements == codes.placements and scales.device_mesh == codes.device_mesh
    return plan.is_dtensor(scales) == plan.is_dtensor(codes)


_CODED = ("_codes", "_scales")


def _fits(t: Tensor, p: Tensor, dtype: torch.dtype) -> bool:
    t, p = plan.local(t), plan.local(p)
    return t.dtype is dtype and t.device == p.device and plan.same_layout(t, plan.dense_like(p))


def _as_float(own: Own, name: str) -> Tensor | None:
    """A moment as it is, or decoded; None where there is none."""
    codes, scales = own.get(f"{name}_codes"), own.get(f"{name}_scales")
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor):
        return own[name] if isinstance(own.get(name), Tensor) else None
    x = torch.empty_like(codes, dtype=torch.float32)
    plan.local(x).copy_(formats.decode(plan.local(codes), plan.local(scales), name == formats.SECOND))
    return x


def _init_master(own: Own, p: Tensor, form: formats.Kept) -> None:
    for key in formats.MASTERS.values():
        if key != form.extra:  # of another form, which this one does not keep up with
            own.pop(key, None)
    if form.extra is None:
        return
    dtype = {"kahan": p.dtype, "split16": torch.int16, "fp32": torch.float32}[form.master]
    have = own.get(form.extra)
    if isinstance(have, Tensor) and _fits(have, p, dtype):
        return
    own[form.extra] = plan.state_like(p, dtype)
    refresh_master(own, p, form)
    if isinstance(have, Tensor) and have.dtype is dtype:
        plan.local(own[form.extra]).copy_(plan.local(have))


def refresh_master(own: Own, p: Tensor, form: formats.Kept) -> None:
    """Make the value of a parameter what the parameter itself says."""
    if form.extra is not None:
        extra = plan.local(own[form.extra])
        extra.copy_(plan.local(p)) if form.master == "fp32" else extra.zero_()


def shaped(own: Own, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """What of a state has the shape of its parameter, by name."""
    for name in (*names, *(f"{name}_codes" for name in names), *formats.MASTERS.values()):
        if isinstance(own.get(name), Tensor):
            yield name, own[name]


def plain(own: Own) -> Own:
    """The state that torch's class keeps: the step, and moments in float32 where they are int8, without masters."""
    names = [key.removesuffix("_codes") for key in own if key.endswith("_codes")]
    moments = {name: _as_float(own, name) for name in names}
    left = {*formats.MASTERS.values(), *(f"{name}_{part}" for name in names for part in ("codes", "scales"))}
    return {**{key: value for key, value in own.items() if key not in left}, **moments}
