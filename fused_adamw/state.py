"""Makes the state of a parameter, brings it to the form that its group asks for, and back to torch's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_adamw import codecs, formats
from fused_adamw.contract import EMA, MASTER_KEYS, Storage
from fused_adamw.tensors import dense_like, flat, in_order, is_dtensor, local, same_layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

ParamState = dict[str, Any]  # the state of one parameter
CODED = ("_codes", "_scales")  # how the keys of int8 moments end
INT16_LOWER_HALF = "remainder"  # the key of a lower half in int16, which older checkpoints have
MASTERS = (*MASTER_KEYS.values(), INT16_LOWER_HALF)


def init(
    param_state: ParamState,
    p: Tensor,
    names: tuple[str, ...],
    storage: Storage,
    *,
    declared: Any,
    step_device: torch.device,
    loading: bool = False,
) -> None:
    """Make the state of p that is missing; bring the rest to the form, dtype, device and layout that a step needs.

    ``declared`` is the group's state_dtype; the steps are counted on ``step_device``. While ``loading`` no average is
    begun, because p may yet be loaded.
    """
    step: Any = param_state.get("step")
    if is_missing(step) or names == ("momentum_buffer",):
        buffer = any(not is_missing(param_state.get(name)) for name in ("momentum_buffer", "momentum_buffer_codes"))
        if is_missing(step) or not buffer:  # SGD counts the steps of the momentum, whose first is not dampened
            step = float(buffer)
    if not isinstance(step, Tensor) or step.dtype is not torch.float32 or step.device != step_device:
        param_state["step"] = torch.full((), float(step), dtype=torch.float32, device=step_device)
    elif step.dim():
        param_state["step"] = step.view(())  # of the same memory, which processes may share
    for key in _dropped(names):
        param_state.pop(key, None)
    for name in names:
        _init_moment(param_state, name, p, storage, declared)
    _init_master(param_state, p, storage)
    _init_ema(param_state, p, storage, loading)


def is_ready(
    param_state: ParamState,
    p: Tensor,
    names: tuple[str, ...],
    storage: Storage,
    declared: Any,
    step_device: torch.device,
) -> bool:
    """Return whether :func:`init` would leave the state as it is."""
    step = param_state.get("step")
    if not isinstance(step, Tensor) or step.dtype is not torch.float32 or step.device != step_device or step.dim():
        return False
    needed: dict[str, torch.dtype] = {}
    for name, key in zip(names, storage.moments(names), strict=True):
        needed[key] = _code_dtype(name) if storage.int8 else formats.state_dtype_of(p, declared)
    if storage.master_key:
        needed[storage.master_key] = _master_dtype(p, storage)
    if storage.ema:
        needed[EMA] = formats.state_dtype_of(p, storage.ema)
    wrong = {*MASTERS, *_dropped(names), *names, *(name + part for name in names for part in CODED)}
    wrong -= {*needed, *storage.scales(names)}
    if not wrong.isdisjoint(param_state) or any(key not in param_state for key in storage.scales(names)):
        return False
    return all(
        isinstance(t := param_state.get(key), Tensor) and _fits(t, p, dtype, storage) for key, dtype in needed.items()
    )


def _dropped(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the keys of the first moment if the rule moves the second alone: a checkpoint of torch's has it."""
    return tuple("exp_avg" + part for part in ("", *CODED)) if names == (formats.SECOND,) else ()


def _code_dtype(name: str) -> torch.dtype:
    return torch.uint8 if name == formats.SECOND else torch.int8


def _master_dtype(p: Tensor, storage: Storage) -> torch.dtype:
    return torch.float32 if storage.master == "fp32" else p.dtype


def _init_moment(param_state: ParamState, name: str, p: Tensor, storage: Storage, declared: Any) -> None:
    if storage.int8:
        _init_codes(param_state, name, p, storage)
        param_state.pop(name, None)
        return
    have, dtype = _as_float(param_state, name), formats.state_dtype_of(p, declared)
    if have is None:
        param_state[name] = _empty_like(p, dtype, storage).zero_()
    elif not _fits(have, p, dtype, storage) or have is not param_state.get(name):
        param_state[name] = _empty_like(p, dtype, storage)
        local(param_state[name]).copy_(local(have))
    for part in CODED:
        param_state.pop(name + part, None)


def _init_codes(param_state: ParamState, name: str, p: Tensor, storage: Storage) -> None:
    key_of_codes, key_of_scales = (name + part for part in CODED)
    old: Any = param_state.get(key_of_codes)
    dtype = _code_dtype(name)
    coded = isinstance(old, Tensor) and isinstance(param_state.get(key_of_scales), Tensor)
    if coded and _fits(old, p, dtype, storage):
        return
    codes = _empty_like(p, dtype, storage).zero_()
    if coded and old.dtype is dtype and old.device == p.device and same_layout(old, codes):
        param_state[key_of_codes] = codes
        local(codes).copy_(local(old))  # of a whole laid out as p: the shard alone is laid out otherwise
        return
    have = _as_float(param_state, name)
    param_state[key_of_codes], param_state[key_of_scales] = codes, _scales_of(codes)
    if have is not None:
        x = torch.empty_like(local(codes), dtype=torch.float32).copy_(local(have))
        for key, values in zip((key_of_codes, key_of_scales), codecs.encode(x, name == formats.SECOND), strict=True):
            flat(local(param_state[key])).copy_(values)


def _scales_of(codes: Tensor) -> Tensor:
    """Return scales of 0, sharded as the codes are."""
    scales = torch.zeros(codecs.scales_shape(local(codes)), dtype=torch.float32, device=codes.device)
    if not is_dtensor(codes):
        return scales
    shape = codecs.scales_shape(codes)
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = codes.device_mesh, scales_placements(codes)
    return type(codes).from_local(scales, mesh, placements, run_check=False, shape=shape, stride=stride)


def is_cut(p: Tensor) -> bool:
    """Return whether several ranks share the elements of p, which a mesh of one rank leaves whole."""
    return is_dtensor(p) and any(
        size > 1 and not placement.is_replicate()
        for size, placement in zip(p.device_mesh.shape, p.placements, strict=True)
    )


def scales_placements(codes: "DTensor") -> tuple["Placement", ...]:
    """Return the placements of the scales: those of the codes, or Replicate() where no rank splits the codes."""
    from torch.distributed.tensor import Replicate

    return tuple(codes.placements) if is_cut(codes) else (Replicate(),) * codes.device_mesh.ndim


def _empty_like(p: Tensor, dtype: torch.dtype, storage: Storage) -> Tensor:
    """Return an uninitialised state of p, laid out as the dense p."""
    made, dense = torch.empty_like(p, dtype=dtype, requires_grad=False), dense_like(p, storage.ordered)
    if not is_dtensor(made) or same_layout(local(made), dense):
        return made
    shard = torch.empty_like(dense, dtype=dtype, device=made.device)
    mesh, placements = made.device_mesh, made.placements
    return type(made).from_local(shard, mesh, placements, run_check=False, shape=made.shape, stride=made.stride())


def _fits(t: Tensor, p: Tensor, dtype: torch.dtype, storage: Storage) -> bool:
    t, dense = local(t), dense_like(p, storage.ordered)
    if t.dtype is not dtype or t.device != p.device:
        return False
    return (t.is_contiguous() and dense.is_contiguous()) or same_layout(t, dense)


def _as_float(param_state: ParamState, name: str) -> Tensor | None:
    """Return a moment as it is, or decoded; None where there is none."""
    codes, scales = param_state.get(f"{name}_codes"), param_state.get(f"{name}_scales")
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor):
        return param_state[name] if isinstance(param_state.get(name), Tensor) else None
    x = torch.empty_like(codes, dtype=torch.float32)
    local(x).copy_(codecs.decode(in_order(codes), local(scales), name == formats.SECOND))
    return x


def _init_master(param_state: ParamState, p: Tensor, storage: Storage) -> None:
    old = param_state.get(INT16_LOWER_HALF) if storage.master == "split16" else None
    for key in MASTERS:
        if key != storage.master_key:  # of another form, which steps in this one would leave behind
            param_state.pop(key, None)
    if storage.master_key is None:
        return
    dtype = _master_dtype(p, storage)
    have = param_state.get(storage.master_key, old)
    if isinstance(have, Tensor) and _fits(have, p, dtype, storage):
        return
    param_state[storage.master_key] = _empty_like(p, dtype, storage)
    refresh_master(param_state, p, storage)
    if isinstance(have, Tensor) and have.dtype in (dtype, torch.int16 if have is old else dtype):
        local(param_state[storage.master_key]).copy_(local(have).view(dtype))


def _init_ema(param_state: ParamState, p: Tensor, storage: Storage, loading: bool) -> None:
    have: Any = param_state.get(EMA)
    dtype = formats.state_dtype_of(p, storage.ema)
    begins = not isinstance(have, Tensor)
    if not storage.ema or (begins and loading) or (not begins and _fits(have, p, dtype, storage)):
        return
    param_state[EMA] = _empty_like(p, dtype, storage)
    local(param_state[EMA]).copy_(_value_of(param_state, p, storage) if begins else local(have))


def _value_of(param_state: ParamState, p: Tensor, storage: Storage) -> Tensor:
    """Return the shard of p, with the digits that its master holds."""
    own = local(p).detach()
    return (
        codecs.read_master(storage.master, own, local(param_state[storage.master_key])) if storage.master_key else own
    )


def refresh_master(param_state: ParamState, p: Tensor, storage: Storage) -> None:
    """Reset what the master holds, so that the value of the parameter is what the parameter itself says."""
    if storage.master_key is not None:
        data = local(param_state[storage.master_key])
        data.copy_(local(p).detach()) if storage.master == "fp32" else data.zero_()


def shaped(param_state: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return those entries of a state that are to have the shape of the parameter, without those that are missing."""
    keys = (*names, *(f"{name}_codes" for name in names), *MASTERS)
    return {key: param_state[key] for key in keys if not is_missing(param_state.get(key))}


def is_missing(value: Any) -> bool:
    """Return whether a value in a state stands for none: torch's SGD keeps None, which a checkpoint may make {}."""
    return value is None or (isinstance(value, dict) and not value)


def plain(param_state: ParamState) -> ParamState:
    """Return the state that torch's class keeps: no masters or averages, and moments in float32 where they are int8."""
    names = [key.removesuffix("_codes") for key in param_state if key.endswith("_codes")]
    moments = {name: _as_float(param_state, name) for name in names}
    left = {*MASTERS, EMA, *(name + part for name in names for part in CODED)}
    return {**{key: value for key, value in param_state.items() if key not in left}, **moments}
