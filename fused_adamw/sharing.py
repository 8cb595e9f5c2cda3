"""Tells which ranks hold the rest of a parameter: a norm is that of the whole, and all ranks skip a step or none.

A DTensor says so itself. Of plain tensors the optimizer is told, by its argument ``process_group``; a
ZeroRedundancyOptimizer that makes the optimizer is asked, and parameters of other wrappers that shard are refused.
"""

import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import Owner
from fused_adamw.tensors import is_dtensor, shard_groups

_NOWHERE = torch.device("meta")  # whose parameters are not stepped
# Modules of DeepSpeed whose optimizers hand the step a part of each parameter.
_DEEPSPEED = ("deepspeed.runtime.zero.", "deepspeed.runtime.bf16_optimizer")


def groups_of(owner: Owner, p: Tensor) -> tuple[Any, ...]:
    """Return the process groups whose ranks hold other elements than this one, or elements of other parameters.

    Summing over each of these groups in turn gives the sum over the whole.
    """
    if is_dtensor(p):
        return shard_groups(p)
    group = owner.process_group
    if callable(group):
        return tuple(group(p))
    return () if group is None else (group,)


def sharing_of(owner: Owner) -> dict[tuple[Any, ...], torch.device]:
    """Return the distinct process groups of all parameters, and where the first parameter of each is.

    Ranks give their optimizers the same parameters, so that all have these in one order, whatever has a gradient: what
    is summed over them is summed by all ranks, on devices of one type. The optimizer's own process group is the first,
    because of its parameters a rank may hold none. Empty where no step needs a sum.

    Raises RuntimeError where parameters are sharded, and nothing says over which ranks.
    """
    sharing: dict[tuple[Any, ...], torch.device] = {}
    if not owner.scales_gradients:
        return sharing
    params = [p for group in owner.param_groups for p in group["params"]]
    own = owner.process_group
    if own is None:
        _refuse_wrappers(owner, params)
    elif not callable(own):
        sharing[own,] = _NOWHERE
    for p in params:
        over = groups_of(owner, p)
        if sharing.get(over, _NOWHERE) == _NOWHERE:
            sharing[over] = p.device
    return {over: _device_of(over) if device == _NOWHERE else device for over, device in sharing.items()}


def _device_of(over: tuple[Any, ...]) -> torch.device:
    """Return a device on which the first of these groups can sum."""
    nccl = over and torch.distributed.get_backend(over[0]) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def zero_group() -> Any:
    """Return the process group of the ZeroRedundancyOptimizer that is making an optimizer for its part; else None."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if zero is not None:
        for frame in _callers():
            maker = frame.f_locals.get("self") if frame.f_code.co_name == "_init_local_optimizer" else None
            if isinstance(maker, zero.ZeroRedundancyOptimizer):
                return maker.process_group
    return None


def _refuse_wrappers(owner: Owner, params: Sequence[Tensor]) -> None:
    name = type(owner).__name__
    start = f"{name}: the norm, and whether a step is skipped, would be those of this rank alone: "
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise RuntimeError(
            f"{start}the parameters are sharded by FullyShardedDataParallel, and do not say over which ranks: give "
            f"{name} process_group=model.process_group, or lambda p: () if the strategy is NO_SHARD; fully_shard needs "
            "neither"
        )
    if "deepspeed" in sys.modules and any(
        str(frame.f_globals.get("__name__")).startswith(_DEEPSPEED) for frame in _callers()
    ):
        raise RuntimeError(
            f"{start}DeepSpeed hands the step a part of each parameter: leave out max_grad_norm, skip_nonfinite and "
            "amp_scaling, and set gradient_clipping in DeepSpeed's configuration, which skips steps itself"
        )


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back
