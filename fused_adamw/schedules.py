"""Schedules what the paper does and torch does not: warm restarts that also drive normalized weight decay.

torch's own schedulers (CosineAnnealingLR, StepLR, OneCycleLR, ...) work with these optimizers as they are; what is here
works with torch's optimizers too. Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, arXiv
1711.05101, section 4 and appendix B.1; warm restarts: *SGDR*, arXiv 1608.03983.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def normalized_weight_decay(norm: float, batch_size: float, dataset_size: float, epochs: float) -> float:
    r"""Return the weight decay of a run, by its length: :math:`\lambda = \lambda_{norm} \sqrt{b / (B T)}`.

    The best decay shrinks with the number of updates; normalized by the square root of that number it is about the same
    for short and long runs (the paper's section 4, appendix B.1). It is a decay in the paper's convention: give it to
    an optimizer with ``decouple_lr=True``.

    Args:
        norm: λ_norm, the decay of a run of one update.
        batch_size: b, samples of an update (all devices and accumulated batches together).
        dataset_size: B, samples of an epoch.
        epochs: T, the length of the run, or of the cycle between two restarts; fractions are fine.

    Raises ValueError for a norm below 0 or any other argument not above 0.

    >>> import fused_adamw
    >>> fused_adamw.normalized_weight_decay(0.05, batch_size=128, dataset_size=51200, epochs=100)
    0.00025
    """
    if not 0 <= norm < math.inf:
        raise ValueError(f"Invalid norm: {norm}, it must be a number of at least 0")
    for name, value in (("batch_size", batch_size), ("dataset_size", dataset_size), ("epochs", epochs)):
        _check_positive(name, value)
    return norm * math.sqrt(batch_size / (dataset_size * epochs))


class CosineWarmRestarts(LRScheduler):
    r"""Anneals by a cosine with warm restarts, and can also drive normalized weight decay: AdamWR and SGDWR.

    .. math::
        \gamma_t &= \gamma_{min} + \tfrac{1}{2} (\gamma_0 - \gamma_{min}) (1 + \cos(\pi \, T_{cur} / T_i)) \\
        \lambda &= \lambda_{norm} \sqrt{b / (B \, T_i)}

    where γ_0 is the learning rate that the group was made with, T_cur the epochs since the last restart, T_i the epochs
    of the i-th cycle, :math:`T_{i+1} = T_{mult} T_i`, and B/b the steps of an epoch (appendix B.1 of the paper).

    AdamWR and SGDWR, then, are an optimizer whose ``weight_decay`` is λ_norm, and this::

        optimizer = fused_adamw.AdamW(fused_adamw.param_groups(model, 0.05), decouple_lr=True)
        scheduler = fused_adamw.CosineWarmRestarts(optimizer, T_0=10, T_mult=2, steps_per_epoch=len(loader),
                                                   normalized_decay=True)
        for batch in loader:
            ...
            optimizer.step()
            scheduler.step()

    Like torch's class, it sets what it drives, and does not multiply: after a warm-up it belongs in a ``SequentialLR``.
    A parameter group that is added later joins in, at the learning rate and decay it comes with.

    Args:
        optimizer: any optimizer of torch's kind.
        T_0: epochs until the first restart; fractions are fine.
        T_mult: how many times as long each cycle is as the one before, at least 1; fractions are fine.
        eta_min: γ_min, the learning rate at the end of a cycle.
        last_epoch: calls of :meth:`step` made so far, to resume without a ``state_dict``; -1 starts anew.
        steps_per_epoch: calls of :meth:`step` that make an epoch: ``len(loader)``, or B/b, to call it after each batch;
            by default 1, to call it after each epoch, as in torch.
        normalized_decay: whether each group's ``weight_decay`` is λ_norm and, at the start and at each restart, becomes
            λ. A decay of 0 stays 0. The group keeps λ_norm as ``initial_weight_decay``. Needs ``steps_per_epoch``, as
            the decay depends on the number of optimizer steps; with it, ``step(epoch)`` can still be called once an
            epoch. Warns of a group whose decay is decoupled as in torch, without ``decouple_lr``.

    Attributes:
        cycle: index of the cycle, i; it grows at a restart.
        T_i, T_cur: its length, and the epochs since it began.

    Raises ValueError for an argument out of range, or where a group has no ``weight_decay`` to drive; KeyError where
    ``last_epoch`` is given and the groups are not those of a run with a scheduler.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: float,
        T_mult: float = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        steps_per_epoch: float | None = None,
        normalized_decay: bool = False,
    ) -> None:
        if steps_per_epoch is None:
            if normalized_decay:
                raise ValueError(
                    "normalized_decay=True needs steps_per_epoch, the optimizer steps of an epoch: len(loader), say"
                )
            steps_per_epoch = 1
        _check_positive("T_0", T_0)
        _check_positive("steps_per_epoch", steps_per_epoch)
        if not 1 <= T_mult < math.inf:
            raise ValueError(f"Invalid T_mult: {T_mult}, it must be a number of at least 1")
        if not 0 <= eta_min < math.inf:
            raise ValueError(f"Invalid eta_min: {eta_min}, it must be a learning rate of at least 0")
        self.T_0, self.T_mult, self.eta_min = T_0, T_mult, eta_min
        self.steps_per_epoch, self.normalized_decay = steps_per_epoch, normalized_decay
        self.base_decays: list[float | Tensor] = []
        super().__init__(optimizer, last_epoch)
        for i, group in enumerate(optimizer.param_groups if normalized_decay else ()):
            if group.get("decoupled_weight_decay") and not group.get("decouple_lr") and group["weight_decay"] != 0:
                warnings.warn(
                    f"normalized_decay=True sets decays in the paper's convention, and group {i} multiplies its decay "
                    "by the learning rate, as torch does, which makes it weaker by that factor: give the optimizer "
                    "decouple_lr=True",
                    stacklevel=2,
                )
                break

    def step(self, epoch: float | None = None) -> None:
        """Move on by one step, or to ``epoch``, which may be a fraction (``epoch + i / len(loader)``)."""
        if epoch is not None:
            if not 0 <= epoch < math.inf:
                raise ValueError(f"Invalid epoch: {epoch}, it must be a number of at least 0")
            steps = epoch * self.steps_per_epoch
            whole = round(steps)
            # torch declares an int, and takes fractions.
            self.last_epoch = (whole if math.isclose(steps, whole, rel_tol=1e-12) else steps) - 1  # type: ignore[assignment]
        super().step()

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rates of the groups where the schedule is now; set their weight decays."""
        groups = self.optimizer.param_groups
        self._join(groups)
        self.cycle, self.T_i, self.T_cur = self._position(self.last_epoch / self.steps_per_epoch)
        if self.normalized_decay:
            factor = normalized_weight_decay(1.0, 1.0, self.steps_per_epoch, self.T_i)
            for group, norm in zip(groups, self.base_decays, strict=True):
                if isinstance(group["weight_decay"], Tensor):
                    group["weight_decay"].fill_(norm * factor)
                else:
                    group["weight_decay"] = norm * factor
        eta = (1 + math.cos(math.pi * self.T_cur / self.T_i)) / 2
        return [self.eta_min + (base - self.eta_min) * eta for base in self.base_lrs]

    def _join(self, groups: list[dict[str, Any]]) -> None:
        """Take in the groups that are new: all at first, then those that were added."""
        for group in groups[len(self.base_lrs) :]:
            # A new list: the old one may be in a state_dict.
            self.base_lrs = [*self.base_lrs, _copy(group.setdefault("initial_lr", _copy(group["lr"])))]
        if not self.normalized_decay:
            return
        first = not self.base_decays
        for i, group in enumerate(groups[len(self.base_decays) :], len(self.base_decays)):
            if "weight_decay" not in group:
                raise ValueError(f"normalized_decay=True needs a 'weight_decay' to drive, and group {i} has none")
            if first and self.last_epoch > 0 and "initial_weight_decay" not in group:
                raise KeyError(
                    f"last_epoch is given, and group {i} has no 'initial_weight_decay', the normalized one: load the "
                    "optimizer's state_dict of the run to be resumed first"
                )
            norm = group.setdefault("initial_weight_decay", _copy(group["weight_decay"]))
            self.base_decays = [*self.base_decays, _copy(norm)]

    def _position(self, epoch: float) -> tuple[int, float, float]:
        """Return (i, T_i, T_cur) at an epoch; 0.1 + 0.2, a little beyond 0.3, is taken for a restart at 0.3."""
        reached = epoch * (1 + 1e-12)
        cycle, start, length = 0, 0.0, self.T_0
        if self.T_mult == 1:
            cycle = math.floor(reached / length)
            start = cycle * length
        else:
            while start + length <= reached:
                cycle, start, length = cycle + 1, start + length, length * self.T_mult
        return cycle, length, max(epoch - start, 0.0)


def param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    no_decay: Iterable[str] = (),
    lr_mult: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    r"""Return the parameters of a model in the fewest groups of equal decay and learning rate.

    Not decayed are the parameters of normalization layers, those with "bias" in their own name, and all with fewer than
    two dimensions.

    Args:
        model: shared parameters are taken once, frozen ones too.
        weight_decay: of those that are decayed.
        no_decay: patterns of names that are not decayed either: ``["*embedding*"]``, say, as ``fnmatch`` reads it.
        lr_mult: multipliers of the learning rate by patterns of names: ``{"head.*": 10.0}``. Those of all patterns that
            match are multiplied.
        layer_decay: a multiplier :math:`d^{L+1-i}` for the i-th of L layers, those of the ModuleList or Sequential with
            the most entries. What comes before the layers in ``model.named_parameters()`` has i = 0, what comes after
            them has the full rate.

    Returns dicts with "params" and "weight_decay", for any optimizer, and with "lr_mult" where that is not 1, which the
    optimizers of this package multiply the group's ``lr`` by. Raises ValueError for a pattern that matches nothing, for
    a multiplier that is not above 0, and for ``layer_decay`` where the model has no such list.

    >>> import torch, fused_adamw
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    >>> [(len(group["params"]), group["weight_decay"]) for group in fused_adamw.param_groups(model, 0.1)]
    [(1, 0.1), (3, 0.0)]
    """
    norms = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters(False)}
    named = list(model.named_parameters())
    kept, multipliers = list(no_decay), dict(lr_mult or {})
    for pattern in (*kept, *multipliers):
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"param_groups: {pattern!r} matches no parameter: the first is {named[0][0]!r}")
    for what, value in (*multipliers.items(), *([] if layer_decay is None else [("layer_decay", layer_decay)])):
        _check_positive(f"multiplier of {what!r}", value)
    exponents = {} if layer_decay is None else _distances_to_the_end(model, [name for name, _ in named])
    groups: dict[tuple[float, float], list[Tensor]] = {(weight_decay, 1.0): [], (0.0, 1.0): []}
    for name, p in named:
        plain = p.dim() < 2 or id(p) in norms or "bias" in name.rpartition(".")[2]
        plain |= any(fnmatchcase(name, pattern) for pattern in kept)
        mult = (layer_decay or 1.0) ** exponents.get(name, 0)
        mult *= math.prod(value for pattern, value in multipliers.items() if fnmatchcase(name, pattern))
        groups.setdefault((0.0 if plain else weight_decay, mult), []).append(p)
    return [
        {"params": params, "weight_decay": decay, **({} if mult == 1 else {"lr_mult": mult})}
        for (decay, mult), params in groups.items()
        if params
    ]


def _distances_to_the_end(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Return for each parameter how many layers come after its own, the head counted as one."""
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    if not lists:
        raise ValueError("param_groups: layer_decay needs layers in a ModuleList or a Sequential: give lr_mult instead")
    longest = max(lists, key=lambda name: lists[name])
    prefix, n = f"{longest}." if longest else "", lists[longest]
    distances, reached = {}, False
    for name in names:
        entry = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        inside = entry.isdecimal()
        reached |= inside
        distances[name] = n - int(entry) if inside else 0 if reached else n + 1
    return distances


_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm, InstanceNorm
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _copy(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"Invalid {name}: {value}, it must be a number above 0")
