"""Loads checkpoints and makes those of torch.optim; completes the groups of an optimizer that was unpickled."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_adamw import checks, loaded, options, plan, state, tensor_checks
from fused_adamw.contract import Owner, Storage, counts_on_device

# What every version of torch's classes, and of ours, has put into a group.
_GROUP_KEYS = {
    "adam": ("lr", "betas", "eps", "weight_decay"),
    "radam": ("lr", "betas", "eps", "weight_decay"),
    "adabound": ("lr", "betas", "final_lr", "gamma", "eps", "weight_decay"),
    "sgd": ("lr", "momentum", "dampening", "weight_decay"),
}
_OURS = {family: options.ours(family) for family in _GROUP_KEYS}
_IMMUTABLE = (float, int, bool, str, type(None))


def describe(state_dict: dict[str, Any], optimizer: Owner) -> dict[str, Any]:
    """Bring the groups of a state_dict to what every optimizer of the class loads, whatever the form of its storage.

    torch.distributed.checkpoint takes no dtype in a group, and loads no whole state whose groups have a number or a
    string that the groups here lack. So the options of storage, which a checkpoint does not change, are empty tuples,
    and the seed is a tensor.
    """
    ours = _OURS[optimizer.family]
    groups = state_dict.get("param_groups", ())  # a hook may have taken them out, or others in
    for group, live in zip(groups, optimizer.param_groups, strict=False):
        group.update((key, ()) for key in options.KEPT if key in ours and key in group)
        device = live["params"][0].device if live["params"] else torch.device("cpu")
        if isinstance(group.get("seed"), int) and device.type != "meta":
            group["seed"] = torch.tensor([group["seed"]], device=device)
    return state_dict


def export(exported: dict[str, Any], family: str) -> dict[str, Any]:
    """Turn a state_dict of ours into one of torch.optim's class: torch's keys, floating moments, no masters."""
    exported["state"] = {key: state.plain(own) for key, own in exported["state"].items()}
    for group in exported["param_groups"]:
        if not group.get("first_moment", True):  # torch's class needs one, and with betas[0] = 0 any will do
            for own in filter(None, map(exported["state"].get, group["params"])):
                own.setdefault("exp_avg", torch.zeros_like(own["exp_avg_sq"]))
        for key in (*options.ours(family), "base_lr"):
            group.pop(key, None)
    return exported


def read(optimizer: Owner, checkpoint: Any, handed: Mapping[int, int]) -> dict[str, Any]:
    """Return copies of a checkpoint's states and groups, in the form that this optimizer keeps them in.

    ``handed`` has the versions of the states when state_dict() last handed them out. Nothing is changed. Raises
    TypeError or ValueError for a checkpoint that does not fit the optimizer.
    """
    saved_groups = _groups_of(optimizer, checkpoint)
    saved, groups = checkpoint["state"], []
    states: dict[Any, Any] = defaultdict(dict)
    memo: dict[int, Any] = {}  # a tensor that groups share stays shared
    for i, (mine, theirs) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        group = {k: v if type(v) in _IMMUTABLE else _copy(v, memo) for k, v in theirs.items() if k != "params"}
        if isinstance(seed := group.get("seed"), Tensor) and seed.numel() == 1:
            group["seed"] = int(seed)
        merged = _merged(mine, group)
        _check_group(optimizer, i, mine, theirs, merged)
        names = optimizer.rule_of(merged)[1]
        # apex, TransformerEngine and Megatron count in the group; their SGD, as torch's, not at all.
        counts = "step" in group and optimizer.family != "sgd"
        counts = counts and any(key in saved and "step" not in saved[key] for key in theirs["params"])
        count = group.pop("step") if counts else None
        for j, key in enumerate(theirs["params"]):
            if key in saved:
                own = _loaded_state(optimizer, (i, j), names, saved[key], handed, isinstance(key, str))
                states[mine["params"][j]] = _read_state(optimizer, (i, j), merged, names, own, count)
        groups.append(group | {key: mine[key] for key in ("params", "param_names") if key in mine})
    keys = set(chain.from_iterable(group["params"] for group in saved_groups))
    states.update({key: value for key, value in saved.items() if key not in keys})
    return {"state": states, "param_groups": groups}


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    plain = type(value) is tuple and all(type(x) in _IMMUTABLE for x in value)
    return value if plain else deepcopy(value, memo)  # which takes longer


def _merged(mine: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the group as it will be: the options of storage stay those of this optimizer."""
    merged = {**mine, **group}
    for key in options.KEPT:
        if key in mine:
            merged[key] = mine[key]
        else:
            merged.pop(key, None)
    options.name_dtype(merged)
    return merged


def _groups_of(optimizer: Owner, checkpoint: Any) -> list[dict[str, Any]]:
    """Return a checkpoint's groups, their parameters in the order of ours; raise ValueError if they do not fit."""
    cls, ours = type(optimizer).__name__, optimizer.param_groups
    if not isinstance(checkpoint, Mapping) or not {"state", "param_groups"} <= checkpoint.keys():
        found = f"has {_listed(checkpoint)}" if isinstance(checkpoint, Mapping) else f"is a {type(checkpoint).__name__}"
        raise ValueError(
            f"{cls}: a checkpoint has 'state' and 'param_groups', and this one {found}: give what the state_dict() of "
            "an optimizer returned"
        )
    theirs: list[dict[str, Any]] = checkpoint["param_groups"]
    if len(theirs) != len(ours):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(theirs)}, and this {cls} has "
            f"{len(ours)}: make the groups that were saved"
        )
    for i, (group, saved) in enumerate(zip(ours, theirs, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group "
                f"{i} has {len(saved['params'])} parameters there, and {len(group['params'])} in this {cls}"
            )
    return _by_name(cls, ours, theirs) if any("param_names" in group for group in theirs) else theirs


def _by_name(cls: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return their groups, with the parameters that our groups hold by name; as they are, where both name others."""
    here, there, keys = (
        [entry for group in groups for entry in group.get(key, ())]
        for groups, key in ((ours, "param_names"), (theirs, "param_names"), (theirs, "params"))
    )
    if any(isinstance(key, str) for key in keys):
        # torch.distributed.checkpoint has put the keys, which are names, into our order, and not the names.
        return [{**saved, "param_names": [*saved["params"]]} for saved in theirs]
    if here == there or not len(here) == len(there) == len(keys):
        return theirs
    key_of = dict(zip(there, keys, strict=True))
    if key_of.keys() == set(here):
        return [
            {**saved, "params": [key_of[name] for name in group["param_names"]]}
            for group, saved in zip(ours, theirs, strict=True)
        ]
    moved = [name for name, other in zip(there, here, strict=True) if name != other and name in here]
    if moved:
        raise ValueError(
            f"{cls}: the checkpoint has {moved[0]!r} at another position, and its names are not those of this "
            f"optimizer: only one of them has {_listed(sorted(key_of.keys() ^ set(here)))}. Give the optimizer the "
            "parameters that were saved, or delete 'param_names' from the checkpoint's groups, to load by position"
        )
    return theirs


def _check_group(
    optimizer: Owner, i: int, mine: dict[str, Any], theirs: dict[str, Any], merged: dict[str, Any]
) -> None:
    missing = [key for key in _GROUP_KEYS[optimizer.family] if key not in theirs]
    if missing:
        raise ValueError(f"{type(optimizer).__name__}: group {i} of the checkpoint {_lacks(missing, theirs)}")
    try:
        if _differ(merged, mine):
            options.check(merged, i, at="loading")
    except (ValueError, TypeError) as error:
        where = f"{type(optimizer).__name__}: loading"
        raise type(error)(f"{where}: {error}: put it right in state_dict['param_groups'][{i}]") from None


def _differ(merged: dict[str, Any], mine: dict[str, Any]) -> bool:
    try:
        return merged != mine
    except RuntimeError:  # of a tensor of several elements
        return True


def _lacks(missing: Sequence[str], found: Mapping[str, Any]) -> str:
    return (
        f"lacks {_listed(missing)} and has {_listed(found)}: it is another optimizer's; load one of this class or of "
        "torch.optim's class of its name"
    )


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def _loaded_state(
    optimizer: Owner, at: tuple[int, int], names: tuple[str, ...], saved: Any, handed: Mapping[int, int], by_name: bool
) -> Any:
    p = optimizer.param_groups[at[0]]["params"][at[1]]
    if not isinstance(saved, Mapping):
        return saved
    try:
        with torch.no_grad():
            return loaded.only(p, names, saved, optimizer.state.get(p, {}), handed, by_name)
    except (TypeError, ValueError) as error:
        raise _at(optimizer, at, error) from None


def _at(optimizer: Owner, at: tuple[int, int], error: Exception) -> Exception:
    cls, _, place = checks.describe(optimizer, *at).partition(": ")
    return type(error)(f"{cls}: loading {place}: {error}")


def _read_state(
    optimizer: Owner, at: tuple[int, int], group: dict[str, Any], names: tuple[str, ...], saved: Any, count: Any
) -> dict[str, Any]:
    """Return a copy of the state of one parameter, in the form that its ``group`` asks for.

    ``count`` is the number of steps where the state has none.
    """
    p = optimizer.param_groups[at[0]]["params"][at[1]]
    step_device = p.device if counts_on_device(optimizer, group, p) else torch.device("cpu")
    try:
        if not isinstance(saved, Mapping):
            raise TypeError(f"its state is a {type(saved).__name__}, and must be a dict")
        if count is not None and "step" not in saved:
            saved = {**saved, "step": count}
        if _is_as_kept(p, group, names, saved, step_device):
            tensor_checks.check_step(saved["step"])
            return {key: value.clone() for key, value in saved.items()}
        storage = _check_state(optimizer, p, group, names, saved)
    except (TypeError, ValueError) as error:
        raise _at(optimizer, at, error) from None
    # torch would cast every state to its parameter's dtype: a loss, where that is bfloat16.
    with torch.no_grad():
        own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in saved.items()}
        state.init(own, p, names, storage, declared=group.get("state_dtype"), step_device=step_device, loading=True)
    return own


def _is_as_kept(p: Tensor, group: dict[str, Any], names: tuple[str, ...], saved: Any, step_device: Any) -> bool:
    """Return whether a state is in the form of a plain group's already; the checks and conversions take longer."""
    if (
        type(p) is not Parameter
        or p.dtype is not torch.float32
        or not p.is_contiguous()
        or len(saved) != 1 + len(names)
    ):
        return False
    if group.get("state_dtype") or group.get("rounding", "nearest") != "nearest" or group.get("master"):
        return False
    shape, device = p.shape, p.device
    for name in names:
        t = saved.get(name)
        if type(t) is not Tensor or t.dtype is not torch.float32 or t.shape != shape or t.device != device:
            return False
        if not t.is_contiguous() or t.requires_grad:
            return False
    step = saved.get("step")
    return type(step) is Tensor and step.dtype is torch.float32 and not step.dim() and step.device == step_device


def _check_state(
    optimizer: Owner, p: Tensor, group: dict[str, Any], names: tuple[str, ...], saved: Mapping[str, Any]
) -> Storage:
    shaped = tensor_checks.check_state(p, group, names, saved)
    found = {key.removesuffix("_codes"): value for key, value in saved.items() if not state.is_missing(value)}
    needed = ("step", *(name for name in ("exp_avg", "exp_avg_sq") if name in names))
    missing = [key for key in needed if key not in found]
    if found and missing and optimizer.family != "sgd":
        raise ValueError(f"its state {_lacks(missing, found)}")
    storage = tensor_checks.check_storage(p, group, names, saved)
    tensor_checks.check_sharding(p, None, shaped)
    for name, value in shaped.items():
        if value.shape != p.shape:
            raise ValueError(f"its state {name!r} has shape {list(value.shape)}: it is another model's")
    return storage


def complete_groups(optimizer: Any, before: list[dict[str, Any]], decoupled: bool | None) -> None:
    """Give groups that were loaded or unpickled all options; those of storage stay what they were ``before``."""
    ours = _OURS[optimizer.family]

    def put(group: dict[str, Any], key: str, value: Any) -> None:
        group[key] = value
        if key in ours and key not in optimizer.defaults and value in (None, ours[key]):
            del group[key]

    for i, group in enumerate(optimizer.param_groups):
        full = before[i] if i < len(before) else optimizer.defaults
        group.update((key, full[key]) for key in full if key not in group and key != "base_lr")
        if options.needs_base_lr(group):
            # AdaBound's authors take the base from the constructor: that of this group, where a checkpoint is theirs.
            made_with = full.get("base_lr", group["lr"]) if "amsbound" in group else group["lr"]
            group.setdefault("base_lr", options.as_float("lr", group.get("initial_lr", made_with)))
        if decoupled is not None:
            put(group, "decoupled_weight_decay", decoupled)
        if i < len(before):
            for key in options.KEPT:
                put(group, key, before[i].get(key, options.OPTIONS[key].default))
        options.name_dtype(group)


def load_into_captured(optimizer: Owner, old: dict[Tensor, dict[str, Any]]) -> None:
    """Put what was loaded where captured graphs find it: into the tensors that they were captured with."""
    for group in optimizer.param_groups:
        for p in filter(old.__contains__, group["params"]):
            plan.init_state(optimizer, group, p)  # the checkpoint may have been made before the first step
            param_state, was = optimizer.state[p], old[p]
            for name, value in param_state.items():
                if isinstance(was.get(name), Tensor) and was[name].dtype is value.dtype:
                    param_state[name] = was[name].copy_(value)
