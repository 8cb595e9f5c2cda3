"""Tells what of a state was loaded from what was there before.

torch.distributed.checkpoint loads into the state_dict of the optimizer itself: it writes into its tensors, or replaces
those that the checkpoint has too, and leaves the rest. So a state can come with the loaded ``exp_avg`` beside the
``exp_avg_codes`` that were there, or with the loaded ``step`` beside a moment that the checkpoint has in another form.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fused_adamw import codecs, formats, state, tensor_checks
from fused_adamw.contract import EMA
from fused_adamw.tensors import is_dtensor, local

_BEGUN = ("momentum_buffer",)


def versions(states: Mapping[Any, Mapping[str, Any]]) -> dict[int, int]:
    """Return the versions of the tensors of all states, by id, from which :func:`only` tells which were written to."""
    return {id(t): _version(t) for own in states.values() for t in own.values() if isinstance(t, Tensor)}


def _version(t: Tensor) -> int:
    if t.is_inference():  # which counts none
        return -1
    return t._version + (local(t)._version if is_dtensor(t) else 0)  # either may be written to


def only(
    p: Tensor,
    names: tuple[str, ...],
    saved: Mapping[str, Any],
    own: Mapping[str, Any],
    handed: Mapping[int, int],
    by_name: bool,
) -> Mapping[str, Any]:
    """Return what was loaded of p's state: ``saved`` without those of p's ``own`` moments and masters that are in it.

    ``handed`` has the versions of the own tensors as they were handed out. ``by_name`` says that the state comes from
    torch.distributed.checkpoint; else a mixture is somebody's deliberate change, unless the step was written in place.
    Raises ValueError for a moment that is still the own one beside the loaded number of steps.
    """
    if not own:
        return saved
    kept = {key for key, t in saved.items() if t is own.get(key) and _is_old(t, handed)}
    if kept != saved.keys():
        other = _of_the_own_form(saved, own)
        moments = {key.removesuffix("_codes") for key in saved if key not in kept | other}
        if "step" in kept:  # torch's SGD has none
            if moments.issuperset(names) and names == _BEGUN and not _count(saved):
                other = {*other, "step"}
        elif by_name or saved.get("step") is own.get("step"):
            stale = [name for name in names if name not in moments and not {name, f"{name}_codes"}.isdisjoint(kept)]
            if stale and _count(saved) > 0:
                raise ValueError(
                    f"its state {stale[0]!r} was not loaded, and its 'step' was, and is {_count(saved):g}: the "
                    "checkpoint has this moment in another form, or not at all. Give the optimizer the state_dtype "
                    "with which it was saved, or load the whole state with set_optimizer_state_dict and "
                    "StateDictOptions(full_state_dict=True)"
                )
            mine = {*state.MASTERS, EMA, *(name + part for name in moments for part in ("", *state.CODED))}
            other = other | (kept & mine)
        if other:
            saved = {key: t for key, t in saved.items() if key not in other}
    return _placed(p, saved, own) if is_dtensor(p) else saved


def _count(saved: Mapping[str, Any]) -> float:
    step: Any = saved.get("step")
    tensor_checks.check_step(step)
    return 0.0 if state.is_missing(step) else float(step)


def _is_old(t: Any, handed: Mapping[int, int]) -> bool:
    """Return whether this is a tensor that was not written to since it was handed out; False if it holds nothing."""
    return isinstance(t, Tensor) and id(t) in handed and local(t).numel() > 0 and handed[id(t)] == _version(t) >= 0


def _of_the_own_form(saved: Mapping[str, Any], own: Mapping[str, Any]) -> set[str]:
    """Return the keys of moments and masters that ``saved`` has in the own form, and in another form as well.

    No optimizer saves two forms of one, so the form that is not the own one was loaded, and the other was there.
    """
    found: set[str] = set()
    for codes in [key for key in saved if key.endswith("_codes")]:
        name = codes.removesuffix("_codes")
        if name in saved:
            found |= {name + part for part in state.CODED} if codes in own else {name}
    masters = {key for key in state.MASTERS if key in saved}
    return found | (masters & own.keys() if len(masters) > 1 else set())


def _placed(p: Any, saved: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state whose whole tensors are sharded as p is, where the own state lacks them.

    set_optimizer_state_dict shards those only that the own state has too.
    """
    whole = {
        key: t
        for key, t in saved.items()
        if key not in own and isinstance(t, Tensor) and not is_dtensor(t) and t.dim() > 0 and t.shape == p.shape
    }
    if not whole:
        return saved
    from torch.distributed.tensor import distribute_tensor

    new = dict(saved)
    for key, t in whole.items():
        name, scales = key.removesuffix("_codes"), saved.get(key.replace("_codes", "_scales"))
        if name != key and isinstance(scales, Tensor) and scales.shape == codecs.scales_shape(t):
            del new[key], new[f"{name}_scales"]
            key, t = name, codecs.decode(t, scales, name == formats.SECOND)  # the blocks of codes may be cut
        # Every rank has the whole: nothing is sent.
        new[key] = distribute_tensor(t.detach(), p.device_mesh, p.placements, src_data_rank=None)
    return new
