"""Refuses tensors that cannot be stepped, with a remedy each, before anything is written."""

import contextlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import formats, options, tensor_checks
from fused_adamw.contract import Owner, Storage


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
                raise TypeError(f"{type(owner).__name__}: group {i}, parameter {j} is {p!r}, not a tensor: take it out")
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


def locate(owner: Owner, params: Iterable[Tensor]) -> dict[int, tuple[int, int]]:
    """Return the group of each of these parameters and its position there, by slot; raise ValueError for others."""
    missing = {id(p): p for p in params}
    found: dict[int, tuple[int, int]] = {}
    slot = 0
    for i, group in enumerate(owner.param_groups):
        if not missing:
            break
        _check_list(owner, i, group["params"])
        for j, q in enumerate(group["params"]):
            if missing.pop(id(q), None) is not None:
                found[slot + j] = (i, j)
        slot += len(group["params"])
    for p in missing.values():
        raise ValueError(
            f"{type(owner).__name__}.step_parameter: a tensor of shape {list(p.shape)} is not among the parameters of "
            "this optimizer: use add_param_group"
        )
    return found


def check_some(owner: Owner, places: Mapping[int, tuple[int, int]]) -> dict[int, Checked]:
    """Check the parameters at these places that have a gradient, and the options of their groups; return these by slot.

    Raises as :func:`check_params` does.
    """
    checked: dict[int, Checked] = {}
    good: set[int] = set()
    for slot, (i, j) in places.items():
        group = owner.param_groups[i]
        if group["params"][j].grad is not None:
            if i not in good:
                check_group(owner, i)
                good.add(i)
            checked[slot] = _check_param(owner, i, j, *owner.rule_of(group))
    return checked


def check_idle(owner: Owner, checked: Container[int], places: Container[int] | None = None) -> dict[int, Checked]:
    """Return, by slot, the parameters that have state but no gradient, and could be stepped with one as they are.

    Of those that are not ``checked``, and at ``places`` if these are given.
    """
    idle: dict[int, Checked] = {}
    slot = -1
    for i, group in enumerate(owner.param_groups):
        fine = None  # not known yet
        for j, p in enumerate(group["params"]):
            slot += 1
            if fine is False or slot in checked or p.grad is not None or not owner.state.get(p):
                continue
            if places is not None and slot not in places:
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
        states = tensor_checks.check_state(p, group, names, param_state)
        storage = tensor_checks.check_storage(p, group, names, param_state)
        tensor_checks.check_sharding(p, p.grad, states)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    tensor_checks.check_tensors(where, p, group, states)
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
                tensor_checks.check_step(owner.state.get(p, {}).get("step"))
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
