"""Reads what steps measure beside their update: norms of a group or of each parameter, and how steps went."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import sharing
from fused_adamw.clipping import moved
from fused_adamw.contract import Owner
from fused_adamw.plan import Plan


class Norms(NamedTuple):
    """Holds L2 norms of the last step that was not skipped, float32: 0-dim, or one of each parameter of the group."""

    gradient: Tensor  # as the step used it: divided by a GradScaler's scale, and clipped
    update: Tensor  # the new parameter minus the old one, decay included
    parameter: Tensor  # the new one, before it is rounded to a narrower dtype


class Statistics(NamedTuple):
    """Holds what ``optimizer.statistics`` returns, on the device of the first parameter that has statistics."""

    groups: list[Norms | None]  # None of a group without statistics
    clipped: Tensor  # the share of steps whose gradients were scaled down to max_grad_norm, float32, 0-dim
    skipped: Tensor  # the share of steps that changed nothing


class Outcomes:
    """Counts how steps went whose gradients were multiplied by a factor: all of them, clipped, skipped."""

    def __init__(self) -> None:
        self.on_host = [0.0, 0.0, 0.0]
        self.on_device: Tensor | None = None

    def count(self, factor: float | Tensor, norm: Tensor | None, max_grad_norm: float | None) -> None:
        """Count a step by its factor, negative where it is skipped, and by the norm of its gradients."""
        most = float("inf") if max_grad_norm is None else max_grad_norm
        if not isinstance(factor, Tensor) or factor.is_cpu:
            skipped = float(factor) < 0
            for k, counts in enumerate((True, not skipped and norm is not None and float(norm) > most, skipped)):
                self.on_host[k] += counts
            return
        if self.on_device is None:
            self.on_device = torch.zeros(3, dtype=torch.float64, device=factor.device)
        taken = (factor >= 0).view(())
        clipped = torch.zeros_like(taken) if norm is None else (norm > most) & taken
        self.on_device += torch.stack([torch.ones_like(taken), clipped, ~taken])

    def shares(self, home: torch.device) -> tuple[Tensor, Tensor]:
        """Return the shares of clipped and of skipped steps; 0 where none was counted."""
        counts = torch.empty(3, dtype=torch.float64, device=home)
        for to, number in zip(counts.unbind(), self.on_host, strict=True):  # without a copy from pageable memory
            to.fill_(number)
        if self.on_device is not None:
            counts += moved(self.on_device, home)
        clipped, skipped = (counts[1:] / counts[0].clamp(min=1)).float().unbind()
        return clipped, skipped


@torch.no_grad()
def read(owner: Owner, plans: Iterable[Plan], outcomes: Outcomes) -> Statistics:
    """Return the statistics of the groups that ask for them, from plans that ran: of two with one row, the later."""
    groups = [(i, group) for i, group in enumerate(owner.param_groups) if group.get("statistics")]
    places = [(i, position) for i, group in groups for position in range(len(group["params"]))]
    if not places:
        raise RuntimeError(
            f"{type(owner).__name__}: no group has statistics: construct the optimizer with statistics=True, or with "
            'statistics="parameter"'
        )
    params = [owner.param_groups[i]["params"][position] for i, position in places]
    home = params[0].device
    measured: dict[tuple[int, int], Tensor] = {}
    for part in plans:
        rows = [row for row in part.rows if row.measured]
        if rows:
            squares = moved(part.launch.squares(), home)
            measured |= zip(((row.group, row.position) for row in rows), squares.unbind(1), strict=True)
    nothing = torch.zeros(3, dtype=torch.float64, device=home)
    columns = [measured.get(place, nothing) for place in places]
    shared: dict[tuple[Any, ...], list[int]] = {}
    for k, p in enumerate(params):
        shared.setdefault(sharing.groups_of(owner, p), []).append(k)
    for over, own in shared.items():
        if over:
            summed = moved(torch.stack([columns[k] for k in own]), params[own[0]].device)
            for group in over:
                torch.distributed.all_reduce(summed, group=group)
            for k, column in zip(own, moved(summed, home).unbind(), strict=True):
                columns[k] = column
    squares = torch.stack(columns, 1)
    found: list[Norms | None] = [None] * len(owner.param_groups)
    for (i, group), own in zip(groups, squares.split([len(group["params"]) for _, group in groups], 1), strict=True):
        each = group["statistics"] == "parameter"
        found[i] = Norms(*(own if each else own.sum(1)).sqrt().float().unbind())
    return Statistics(found, *outcomes.shares(home))
