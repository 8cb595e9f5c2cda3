"""Loads checkpoints and makes those of torch.optim; completes the groups of an optimizer that was unpickled."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from fused_adamw import checks, options, plan, state
from fused_adamw.contract import Owner, Row


def export(exported: dict[str, Any], family: str) -> dict[str, Any]:
    """Turn a state_dict of ours into one of torch.optim's class: torch's keys, floating moments, no masters."""
    exported["state"] = {key: state.plain(own) for key, own in exported["state"].items()}
    for group in exported["param_groups"]:
        for key in (*options.ours(family), "base_lr"):
            group.pop(key, None)
    return exported


def check(optimizer: Owner, loaded: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a checkpoint that does not fit the parameters, or whose options are wrong."""
    # The groups as they will be: the options of storage stay those of this optimizer.
    merged = [
        {**mine, **{key: value for key, value in theirs.items() if key not in options.KEPT and key != "params"}}
        for mine, theirs in zip(optimizer.param_groups, loaded["param_groups"], strict=False)
    ]
    for i, group in enumerate(merged):
        options.check(group, i, at="loading")
    group_of = {p: group for group in merged for p in group["params"]}
    name_of_class = type(optimizer).__name__
    for key, _, p in _loaded_params(optimizer, loaded):
        param_state, names = loaded["state"].get(key, {}), optimizer.rule_of(group_of[p])[1]
        where = f"{name_of_class}: loading parameter {key} (shape {list(p.shape)})"
        checks.check_storage(where, p, group_of[p], names, param_state)
        for name, value in state.shaped(param_state, names):
            checks.check_sharding(where, p, {f"its state {name!r}": value})
            if value.shape != p.shape:
                raise ValueError(
                    f"{name_of_class}: the state {name!r} to be loaded for parameter {key} has shape "
                    f"{list(value.shape)}, the parameter {list(p.shape)}: it is another model's"
                )


def _loaded_params(optimizer: Owner, loaded: dict[str, Any]) -> list[tuple[Any, dict[str, Any], Tensor]]:
    """Return (key in the state that is being loaded, group, parameter) of every parameter."""
    keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    params = ((group, p) for group in optimizer.param_groups for p in group["params"])
    return [(key, group, p) for key, (group, p) in zip(keys, params, strict=False)]


def complete_groups(optimizer: Any, before: list[dict[str, Any]], decoupled: bool | None) -> None:
    """Give groups that were loaded or unpickled all options; those of storage stay what they were ``before``."""
    ours = options.ours(optimizer.family)

    def put(group: dict[str, Any], key: str, value: Any) -> None:
        group[key] = value
        if key in ours and key not in optimizer.defaults and value in (None, ours[key]):
            del group[key]

    for i, group in enumerate(optimizer.param_groups):
        for key, value in (before[i] if i < len(before) else optimizer.defaults).items():
            if key != "base_lr":
                group.setdefault(key, value)
        if group.get("decouple_lr"):
            group.setdefault("base_lr", options.as_float("lr", group.get("initial_lr", group["lr"])))
        if decoupled is not None:
            put(group, "decoupled_weight_decay", decoupled)
        if i < len(before):
            for key in options.KEPT:
                put(group, key, before[i].get(key, options.OPTIONS[key].default))
        options.name_dtype(group)


def take_state(optimizer: Owner, loaded: dict[str, Any]) -> None:
    """Take copies of the saved states, in the form that the groups ask for.

    torch has cast every state to its parameter's dtype by now: a loss, where parameters are bfloat16.
    """
    for key, group, p in _loaded_params(optimizer, loaded):
        if key in loaded["state"]:
            saved = loaded["state"][key]
            optimizer.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
            plan.init_state(optimizer, group, p)


def load_into_captured(optimizer: Owner, rows: Sequence[Row], old: dict[Tensor, dict[str, Any]]) -> None:
    """Put what was loaded where captured graphs find it: into the tensors that they were captured with."""
    for row in rows:
        # The checkpoint may have been made before the first step.
        plan.init_state(optimizer, optimizer.param_groups[row.group], row.param)
        param_state, was = optimizer.state[row.param], old.get(row.param, {})
        for name, value in param_state.items():
            if isinstance(was.get(name), Tensor) and was[name].dtype is value.dtype:
                param_state[name] = was[name].copy_(value)
