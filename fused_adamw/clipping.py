"""Computes what the gradients of a step are multiplied by: for clipping by the global norm, and for a GradScaler.

Nothing is written to the gradients, and nothing waits for a device but the step of a CPU tensor.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import Clipping, Owner
from fused_adamw.plan import Built


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


def factor_of(owner: Owner, built: Built, clipping: Clipping) -> tuple[float | Tensor, Tensor | None]:
    """Return the factor of all gradients, negative where the step is to be skipped; and their norm, float32.

    As ``torch.nn.utils.clip_grad_norm_`` has it: ``min(1, max_grad_norm / (norm + 1e-6))``, over the gradients divided
    by ``grad_scale``. The sum of squares is taken in double, in an order that follows the tensors, the backend and the
    ranks, but no threads; over the ranks that share a parameter it is one all-reduce for each mesh dimension that
    shards it, whether or not it has a gradient here.

    Where ``built.norm`` is None (several devices, no gradient at all, the reference backend) torch's operators compute
    it: with the same roundings, and the same collectives, since another rank may do without them.
    """
    if built.norm is not None:
        return built.norm.factor_of(owner, clipping)
    max_grad_norm, skip_nonfinite, grad_scale, found_inf = clipping
    sharing = built.sharing
    home = built.plans[0].device if built.plans else next(iter(sharing.values()), torch.device("cpu"))
    unscale = torch.ones((), dtype=torch.float64, device=home)
    if grad_scale is not None:
        unscale = moved(grad_scale, home).double().reciprocal()
    factor = unscale
    norm: Tensor | None = None
    skip: Tensor | None = None
    if clipping.needs_norm:
        norm = _sum_squares(owner, built, home).sqrt() * unscale
        if max_grad_norm is not None:
            factor = factor * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if skip_nonfinite:
            skip = ~(norm < math.inf)
    if found_inf is not None:
        if not isinstance(found_inf, Tensor):  # a GradScaler's sum over no gradients
            found_inf = torch.tensor(found_inf, dtype=torch.float32, device=home)
        found = (moved(found_inf, home) != 0).view(())
        devices: dict[Any, torch.device] = {}
        for over, device in sharing.items():
            for group in over:
                devices.setdefault(group, device)
        for group, device in devices.items():  # all ranks skip, or none
            counted = moved(found, device).float().view(1)
            torch.distributed.all_reduce(counted, group=group)
            found = moved(counted > 0, home).view(())
        skip = found if skip is None else skip | found
    if skip is not None:
        factor = factor.view(()).masked_fill(skip, -1.0)
    return factor.view(()), None if norm is None else norm.view(()).float()


def moved(t: Tensor, device: torch.device) -> Tensor:
    """Return t on a device. A copy to the CPU blocks, because what reads it there does not synchronise."""
    return t.to(device, non_blocking=device.type != "cpu")


def _sum_squares(owner: Owner, built: Built, home: torch.device) -> Tensor:
    """Return the sum over all gradients, of which this rank may hold a shard."""
    sums: dict[tuple, Tensor] = {}
    for part in built.plans:
        over = part.shard_groups
        own = torch.empty(part.launch.parts, dtype=torch.float64, device=part.device)
        part.launch.sum_squares(owner, own)
        s = moved(own.sum(), built.sharing[over])
        sums[over] = sums[over] + s if over in sums else s
    total: Tensor | None = None
    for over, device in built.sharing.items():
        s = sums[over] if over in sums else torch.zeros((), dtype=torch.float64, device=device)
        for group in over:
            torch.distributed.all_reduce(s, group=group)
        s = moved(s, home)
        total = s if total is None else total + s
    return torch.zeros((), dtype=torch.float64, device=home) if total is None else total
