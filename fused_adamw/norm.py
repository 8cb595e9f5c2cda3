"""Makes the factor of a step from the sums of squares of all its gradients, with the kernels of one backend alone.

Every launch writes partial sums into one buffer. One small kernel adds them and writes factor and norm; where ranks
share parameters another one adds them before, and their totals are reduced over the ranks in between.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import Clipping, Summed
from fused_adamw.tensors import local

#: Sums that one program adds in about 10 us. A list of more is first added in pieces of as many.
PIECE = 1 << 16


class Norm:
    """Holds the sums of a device on which all plans are, and all parameters that ranks share."""

    def __init__(self, launches: Sequence[tuple[tuple[Any, ...], Any]], sharing: Mapping[tuple[Any, ...], Any]) -> None:
        self.device = next(iter(sharing.values()))
        parts = {over: [launch for key, launch in launches if key == over] for over in sharing}
        counts = [sum(launch.parts for launch in own) for own in parts.values()]
        n = sum(counts)
        self.groups = list(sharing) if any(sharing) else []
        bounds = [0, *itertools.accumulate(counts)] if self.groups else [*range(0, n, PIECE), n]
        self.adds_twice = bool(self.groups) or n > PIECE
        sizes = [1, 1, len(bounds) - 1, len(bounds), n]
        # Each part is aligned to 16 bytes, for which Triton's kernels are compiled.
        split = torch.zeros(sum(s + s % 2 for s in sizes), dtype=torch.float64, device=self.device).split(
            [s + s % 2 for s in sizes]
        )
        factor, flag, totals, bounds_on_device, sums = (t[:s] for t, s in zip(split, sizes, strict=True))
        self.bounds = bounds_on_device.view(torch.int64)
        self.bounds.copy_(torch.tensor(bounds, device="cpu"))
        self.factor_on_device, self.flag = factor.view(torch.float32)[:1], flag.view(torch.float32)[:1]
        self.totals, self.sums, self.nothing = totals, sums, sums[:0]
        self.total_of = totals.split(1)
        self.summed = self.totals if self.adds_twice else self.sums
        ordered = [launch for own in parts.values() for launch in own]
        self.parts = list(zip(ordered, sums.split([launch.parts for launch in ordered]), strict=True))
        for launch in ordered:
            launch.keep(sums)
        self.launch = ordered[0]

    @staticmethod
    def serves(launches: Sequence[tuple[tuple[Any, ...], Any]], devices: Sequence[torch.device]) -> bool:
        """Return whether the launches can do without torch's operators."""
        return bool(launches) and len(set(devices)) == 1 and all(isinstance(launch, Summed) for _, launch in launches)

    def factor_of(self, owner: Any, clipping: Clipping) -> tuple[float | Tensor, Tensor | None]:
        """Return the factor, a number or float32 on the device, and the norm, as ``clipping.factor_of`` does."""
        if clipping.grad_scale is not None or clipping.found_inf is not None:
            scale, found = self._readable(clipping.grad_scale), self._readable(clipping.found_inf)
            clipping = clipping._replace(grad_scale=scale, found_inf=found)
        norm, summed = None, self.nothing
        if clipping.needs_norm:
            norm, summed = torch.empty((), dtype=torch.float32, device=self.device), self.summed
            for launch, sums in self.parts:
                launch.sum_squares(owner, sums)
        if self.adds_twice:
            self.launch.totals(self.sums, self.bounds, clipping.found_inf, self.totals, self.flag)
            if norm is not None:
                for total, over in zip(self.total_of, self.groups, strict=False):
                    for group in over:
                        torch.distributed.all_reduce(total, group=group)
            if clipping.found_inf is not None:
                for group in dict.fromkeys(itertools.chain.from_iterable(self.groups)):  # all ranks skip, or none
                    torch.distributed.all_reduce(self.flag, group=group)
                clipping = clipping._replace(found_inf=self.flag)
        return self.launch.factor(summed, clipping, self.factor_on_device, norm), norm

    def _readable(self, value: Tensor | float | None) -> Tensor | None:
        """Return a number as the kernels read it, float32 on their device."""
        if value is None or (type(value) is Tensor and value.dtype is torch.float32 and value.device == self.device):
            return value
        if not isinstance(value, Tensor):  # a GradScaler's sum over no gradients
            return torch.full((), value, dtype=torch.float32, device=self.device)
        return local(value).to(self.device, torch.float32, non_blocking=self.device.type != "cpu")
