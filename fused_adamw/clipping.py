"""Computes what the gradients of a step are multiplied by: for clipping by the global norm, and for a GradScaler.

Nothing is written to the gradients, and nothing waits for a device.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import Owner
from fused_adamw.plan import Plan


class SetByScaler:
    """Lets a GradScaler, or a user, set and delete a tensor for the coming steps; unset, it is no attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.kept = name, f"_{name}"

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        value = getattr(optimizer, self.kept)
        if value is None:
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")
        return value

    def __set__(self, optimizer: Any, value: Tensor | None) -> None:
        setattr(optimizer, self.kept, value)

    def __delete__(self, optimizer: Any) -> None:
        setattr(optimizer, self.kept, None)


def factor_of(
    owner: Owner,
    plans: Sequence[Plan],
    *,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the factor of all gradients, float64, negative where the step is to be skipped; and their norm, float32.

    As ``torch.nn.utils.clip_grad_norm_`` has it: ``min(1, max_grad_norm / (norm + 1e-6))``, over the gradients divided
    by ``grad_scale``. The sum of squares is taken in double, in an order that follows the tensors, the backend and the
    ranks, but no threads; over the ranks that share a parameter it is one all-reduce for each mesh dimension that
    shards it.
    """
    home = plans[0].device
    unscale = torch.ones((), dtype=torch.float64, device=home)
    if grad_scale is not None:
        unscale = grad_scale.to(home, torch.float64, non_blocking=True).reciprocal()
    factor = unscale
    norm: Tensor | None = None
    skip: Tensor | None = None
    if max_grad_norm is not None or skip_nonfinite:
        norm = _sum_squares(owner, plans, home).sqrt() * unscale
        if max_grad_norm is not None:
            factor = factor * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if skip_nonfinite:
            skip = ~(norm < math.inf)
    if found_inf is not None:
        found = (found_inf.to(home, non_blocking=True) != 0).view(())
        for group in {group: None for part in plans for group in part.shard_groups}:  # all ranks skip, or none
            counted = found.to(torch.int32)
            torch.distributed.all_reduce(counted, group=group)
            found = counted > 0
        skip = found if skip is None else skip | found
    if skip is not None:
        factor = factor.view(()).masked_fill(skip, -1.0)
    return factor.view(()), None if norm is None else norm.view(()).float()


def _sum_squares(owner: Owner, plans: Sequence[Plan], home: torch.device) -> Tensor:
    """Return the sum over all gradients, of which this rank may hold a shard."""
    sums: dict[tuple, Tensor] = {}
    for part in plans:
        s = part.launch.sum_squares(owner).to(home, non_blocking=True)
        over = part.shard_groups
        sums[over] = sums[over] + s if over in sums else s
    for over, s in sums.items():
        for group in over:
            torch.distributed.all_reduce(s, group=group)
    return functools.reduce(torch.add, sums.values())
