"""Puts averages of the parameters in their place: for a block of code, or in a model's state_dict."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import EMA
from fused_adamw.tensors import is_dtensor, local


class Averages:
    """Gives an optimizer the methods that use the averages in its state."""

    param_groups: list[dict[str, Any]]
    state: Any
    #: Whether the parameters hold their averages now.
    swapped: bool = False

    def _averages(self) -> dict[Tensor, Tensor]:
        """Return the averages by parameter; raise RuntimeError where none is kept."""
        params = [p for group in self.param_groups for p in group["params"]]
        found = {p: ema for p in params if isinstance(ema := self.state.get(p, {}).get(EMA), Tensor)}
        if not found and all(group.get("ema_decay") is None for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}: no parameter has an average: construct the optimizer with ema_decay=0.999, or "
                "another decay"
            )
        return found

    def _drop_plans(self) -> None:
        raise NotImplementedError

    @contextmanager
    def ema_swapped(self, model: torch.nn.Module | None = None) -> Iterator[None]:
        """Let parameters hold their averages (``ema_decay``) within a block, to evaluate or save the averaged model::

            with optimizer.ema_swapped():
                evaluate(model)

        They are rounded to the dtype of the parameter. One without an average, as it has no gradient or was not stepped
        yet, stays as it is. The weights come back when the block is left, by an exception too; until then they take as
        much memory again. The states stay what they are, so ``optimizer.state_dict()`` is right within the block.
        Where parameters are DTensors give the model: after a forward pass FSDP2 may keep gathered copies of parameters,
        which are dropped, with ``reshard()``, where the block begins and ends.

        Raises ValueError for DTensors without their model, RuntimeError where no averages are kept, and within such a
        block; a step there raises as well, but a replay of a captured graph cannot.
        """
        if self.swapped:
            raise RuntimeError(f"{type(self).__name__}: the averages are in place already: leave that block first")
        averages = self._averages()
        if model is None and any(map(is_dtensor, averages)):
            raise ValueError(
                f"{type(self).__name__}.ema_swapped: parameters are DTensors, of which FSDP2 may keep gathered copies: "
                "give the model, ema_swapped(model)"
            )
        with torch.no_grad():
            weights = [(p, local(p).clone()) for p in averages]  # all of them first: some may share memory
        self._drop_plans()  # so that a step asks for new ones, which are refused; a steady step has nothing to check
        self.swapped = True
        try:
            _copy([(p, local(ema)) for p, ema in averages.items()])
            _reshard(model)
            yield
        finally:
            _copy(weights)
            _reshard(model)
            self.swapped = False

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return ``model.state_dict()`` with the averages (``ema_decay``) in place of the parameters.

        They have the dtype of the parameter, and are sharded as it is. Buffers, and parameters without an average, are
        as in the model; tied weights are tied. As ``state_dict()``, it shares memory with what it was taken from: an
        average of its parameter's dtype goes on changing with each step. Raises RuntimeError where no averages are
        kept, and ValueError for a model without any of the parameters that have one.
        """
        averages = self._averages()
        found = model.state_dict(keep_vars=True)
        missing = bool(averages)
        for name, value in found.items():
            if isinstance(value, Tensor):
                missing = missing and value not in averages
                found[name] = averages[value].to(value.dtype) if value in averages else value.detach()
        if missing:
            raise ValueError(
                f"{type(self).__name__}.ema_state_dict: this model has none of the parameters with an average: give "
                "the one that is trained; where its state_dict() has other tensors, as FSDP1's, call that within "
                "ema_swapped()"
            )
        return found


@torch.no_grad()
def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for p, value in pairs:
        local(p).copy_(value)


def _reshard(model: torch.nn.Module | None) -> None:
    """Drop the gathered copies of parameters that FSDP2 keeps."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if model is not None and fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
