"""Refuses tensors that cannot be stepped, with a remedy each, before anything is written."""

import contextlib
import math
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import codecs, formats, options, state
from fused_adamw.contract import Owner, Storage
from fused_adamw.formats import storage_of
from fused_adamw.tensors import dense_like, has_memory, is_dtensor, local, same_layout, shard_numbering

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Checked(NamedTuple):
    """Holds a parameter that passed the checks, and how it is to be stepped."""

    where: str  # for error texts
    group_index: int
    position: int  # in the group
    group: dict[str, Any]
    param: Tensor
    rule: str
    names: tuple[str, ...]  # of the states that the rule moves
    storage: Storage


def check_params(owner: Owner, wanted: Callable[[Tensor], bool]) -> dict[int, Checked]:
    """Check the tensors of every wanted parameter, and the options of its group; return these by slot.

    Raises TypeError, ValueError or RuntimeError for the first that cannot be stepped, naming group, index and shape.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError(
            f"{type(owner).__name__}: under FakeTensorMode tensors have no memory to step: leave the mode, or use "
            "torch.optim's class of this name there"
        )
    checked: dict[int, Checked] = {}
    seen: dict[int, tuple[int, int]] = {}
    for i, group in enumerate(owner.param_groups):
        _check_list(owner, i, group["params"])
        rule = ""
        for j, p in enumerate(group["params"]):
            slot = len(seen)
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"{type(owner).__name__}: group {i}, parameter {j} is {p!r}, and no tensor: take it out"
                )
            if seen.setdefault(id(p), (i, j)) != (i, j):
                raise ValueError(
                    f"{describe(owner, i, j)} is {describe(owner, *seen[id(p)])} as well, and would be stepped "
                    "twice: give every parameter once"
                )
            if wanted(p):
                if not rule:
                    check_group(owner, i)
                    rule, names = owner.rule_of(group)
                checked[slot] = _check_param(owner, i, j, rule, names)
    return checked


def check_param(owner: Owner, p: Tensor) -> dict[int, Checked]:
    """Check one parameter and the options of its group; return it by slot. Raises as :func:`check_params` does."""
    slot = 0
    for i, group in enumerate(owner.param_groups):
        _check_list(owner, i, group["params"])
        for j, q in enumerate(group["params"]):
            if q is p:
                check_group(owner, i)
                return {slot + j: _check_param(owner, i, j, *owner.rule_of(group))}
        slot += len(group["params"])
    raise ValueError(
        f"{type(owner).__name__}.step_parameter: a tensor of shape {list(p.shape)} is not among the parameters of "
        "this optimizer: use add_param_group"
    )


def check_idle(owner: Owner, checked: Container[int]) -> dict[int, Checked]:
    """Return, by slot, the parameters that have state but no gradient, and could be stepped with one as they are."""
    idle: dict[int, Checked] = {}
    slot = -1
    for i, group in enumerate(owner.param_groups):
        fine = None  # not known yet
        for j, p in enumerate(group["params"]):
            slot += 1
            if fine is False or slot in checked or p.grad is not None or not owner.state.get(p):
                continue
            # Whatever is wrong is raised once there is a gradient.
            with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):
                if fine is None:
                    fine = False
                    check_group(owner, i)
                    fine = True
                idle[slot] = _check_param(owner, i, j, *owner.rule_of(group))
    return idle


def _check_param(owner: Owner, i: int, j: int, rule: str, names: tuple[str, ...]) -> Checked:
    group = owner.param_groups[i]
    p, where = group["params"][j], describe(owner, i, j)
    param_state = owner.state.get(p, {})
    try:
        states = check_state(p, names, param_state)
        storage = check_storage(p, group, names, param_state)
        check_sharding(p, p.grad, states)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    _check_tensors(where, p, group, states)
    return Checked(where, i, j, group, p, rule, names, storage)


def check_group(owner: Owner, i: int) -> None:
    """Raise ValueError or TypeError for an option of a group that no step can use; they may have been set by hand."""
    group, name_of_class = owner.param_groups[i], type(owner).__name__
    for name in options.NEEDED[owner.family]:
        if name not in group:
            raise ValueError(f"{name_of_class}: group {i} has no {name!r}: set it, as the constructor did")
    options.check(group, i, at="step")
    warn_of_ascent(owner, i)


def warn_of_ascent(owner: Owner, i: int) -> None:
    """Warn, once, of a group that is stepped with a negative learning rate."""
    group = owner.param_groups[i]
    if any(p.grad is not None for p in group["params"]) and options.ascends(group):
        formats.warn_once(
            f"{type(owner).__name__}: the learning rate of group {i} is negative, so its steps ascend, as torch's do: "
            "maximize=True ascends without this warning, and a lr of 0 stays where it is"
        )


def explain(owner: Owner) -> None:
    """Raise for what a step found that it cannot use, with its group or parameter; return if it was nothing of these.

    Of groups alone whose parameters have gradients: nobody else reads the options of the others.
    """
    for i, group in enumerate(owner.param_groups):
        stepped = [(j, p) for j, p in enumerate(group["params"]) if p.grad is not None]
        if stepped:
            check_group(owner, i)
        for j, p in stepped:
            try:
                check_step(owner.state.get(p, {}).get("step"))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{describe(owner, i, j)}: {error}") from None


def describe(owner: Owner, i: int, j: int) -> str:
    """Return which parameter of which group this is, in words."""
    group = owner.param_groups[i]
    names, shape = group.get("param_names", ()), list(group["params"][j].shape)
    name = f"{names[j]!r}, " if len(names) == len(group["params"]) else ""
    return f"{type(owner).__name__}: group {i}, parameter {j} ({name}shape {shape})"


def _check_list(owner: Owner, i: int, params: Any) -> None:
    if isinstance(params, Mapping) or not hasattr(params, "__getitem__"):
        raise TypeError(
            f"{type(owner).__name__}: group {i}: its 'params' were set to a {type(params).__name__}, whose entries "
            "have no index: set group['params'] to a list"
        )


def check_storage(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...], param_state: Mapping) -> Storage:
    """Return how p is stored; raise TypeError or ValueError if it cannot be, or if codes lack their scales."""
    storage = storage_of(p, group, names)
    if storage.stochastic:
        shard_numbering(p)
    if storage.int8 and is_dtensor(p):
        _check_blocks(p)
    _check_codes(param_state)
    return storage


def check_state(p: Tensor, names: tuple[str, ...], param_state: Mapping) -> dict[str, Tensor]:
    """Return the entries of a state that are to have p's shape; raise TypeError or ValueError for one of no use."""
    check_step(param_state.get("step"))
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
    if state.is_cut(p) and (shard_numbering(p).skip or codecs.blocks_across(p) is None):
        raise TypeError(
            f"it is placed {p.placements}, which cuts the blocks of {codecs.BLOCK} elements that share a scale of "
            "int8 moments: shard it along the first dimension, the others a multiple of that, or give its group "
            "state_dtype=torch.bfloat16"
        )


def _check_codes(param_state: Mapping) -> None:
    for name in sorted({key.removesuffix(part) for key in param_state for part in state.CODED if key.endswith(part)}):
        codes, scales = (param_state.get(name + part) for part in state.CODED)
        if not _belong_together(codes, scales):
            expected = f"float32 {list(codecs.scales_shape(codes))}" if isinstance(codes, Tensor) else "codes"
            raise ValueError(
                f"its state {name + state.CODED[1]!r} does not go with {name + state.CODED[0]!r}, which needs "
                f"{expected}: load the right checkpoint, or del optimizer.state[p]"
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


def _check_tensors(where: str, p: Tensor, group: dict, states: dict[str, Tensor]) -> None:
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
        if value.numel() and not has_memory(value):
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
        if t.numel() and not has_memory(t):
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
            raise ValueError(f"{placed}, and a sum cannot be stepped by its terms: use p.redistribute(...)")
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
