"""Computes the numbers of a launch from the hyperparameters of a group and a step count, in double precision.

Only this code tells AdamW from Adam, SGDW from SGD, and torch's conventions from the paper's. The fields of a row are
the arguments of the rules in ``reference.py``, and the step, which stochastic rounding draws by; their order is that of
the structs in ``csrc/rules.h``. Steps that are counted on the host take their rows from ``csrc/scalars.h``, which
computes the same from ``HYPER``. This code runs where that is not built, and is its oracle in the tests.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fused_adamw import options
from fused_adamw.layout import LR_IN_MOMENTUM, NESTEROV


class Adam(NamedTuple):
    """Holds a row of scalars for the rule ``reference.adam``."""

    decay: float
    l2: float
    grad_factor: float
    w1: float
    w2: float
    step_size: float
    inv_sqrt_bc2: float
    eps: float
    step: float


class Sgd(NamedTuple):
    """Holds a row of scalars for the rule ``reference.sgd``."""

    decay: float
    l2: float
    grad_factor: float
    momentum: float
    c1: float
    c2: float
    take_g: float
    take_b: float
    step: float


def adam(group: Mapping[str, Any], step: float) -> Adam:
    """Return the row of Adam and AdamW at their ``step``-th step (1 at the first)."""
    _check_count(step)
    lr = _float("lr", group["lr"])
    beta1, beta2 = (_float("beta", beta) for beta in group["betas"])
    decay, l2, sign = _decay(group, lr)
    return Adam(
        decay=decay,
        l2=l2,
        grad_factor=sign,
        w1=1 - beta1,
        w2=1 - beta2,
        step_size=lr / (1 - beta1**step),
        inv_sqrt_bc2=1 / math.sqrt(1 - beta2**step),
        eps=_float("eps", group["eps"]),
        step=step,
    )


def sgd(group: Mapping[str, Any], step: float) -> Sgd:
    """Return the row of SGD and SGDW at their ``step``-th step (1 at the first, which is not dampened, as in torch).

    torch multiplies the momentum by the learning rate, Algorithm 1 of the paper accumulates it
    (``lr_in_momentum``); the two are the same as long as the learning rate stays the same.
    """
    _check_count(step)
    lr = _float("lr", group["lr"])
    momentum = _float("momentum", group["momentum"])
    decay, l2, sign = _decay(group, lr)
    into, out = (lr, 1.0) if group.get("lr_in_momentum") else (1.0, lr)
    if not momentum:
        take_g, take_b = into, 0.0
    elif group["nesterov"]:
        take_g, take_b = into, momentum
    else:
        take_g, take_b = 0.0, 1.0
    return Sgd(
        decay=decay,
        l2=l2,
        grad_factor=sign,
        momentum=momentum,
        c1=into * (1 - _float("dampening", group["dampening"]) if step > 1 else 1.0),
        c2=out,
        take_g=take_g,
        take_b=take_b,
        step=step,
    )


def adam_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what ``adam`` depends on, in the order of ``layout.HYPER_LR`` and on."""
    beta1, beta2 = (_float("beta", beta) for beta in group["betas"])
    return (*_decay_hyper(group), beta1, beta2, _float("eps", group["eps"]))


def sgd_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what ``sgd`` depends on, in the order of ``layout.HYPER_LR`` and on."""
    flags = NESTEROV * bool(group["nesterov"]) + LR_IN_MOMENTUM * bool(group.get("lr_in_momentum"))
    momentum, dampening = (_float(name, group[name]) for name in ("momentum", "dampening"))
    return (*_decay_hyper(group), momentum, dampening, flags)


def is_on_device(lr: float | Tensor) -> bool:
    """Return whether a learning rate is a tensor that only its device can read without a synchronisation."""
    return isinstance(lr, Tensor) and not lr.is_cpu


def _decay_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the columns HYPER_LR to HYPER_SIGN of ``layout.py``."""
    lr = 0.0 if is_on_device(group["lr"]) else _float("lr", group["lr"])
    base_lr = _base_lr(group) if group.get("decouple_lr") else 1.0
    weight_decay = _float("weight_decay", group["weight_decay"])
    parts = (weight_decay, 0.0) if group.get("decoupled_weight_decay") else (0.0, weight_decay)
    return (lr, base_lr, *parts, -1.0 if group["maximize"] else 1.0)


def _decay(group: Mapping[str, Any], lr: float) -> tuple[float, float, float]:
    """Return (decay, l2, grad_factor): torch's decay is lr * weight_decay, the paper's lr / base_lr * weight_decay."""
    sign = -1.0 if group["maximize"] else 1.0
    weight_decay = _float("weight_decay", group["weight_decay"])
    if not (0.0 <= lr < math.inf and 0.0 <= weight_decay < math.inf):
        options.check_hyperparameters(group)
    if not group.get("decoupled_weight_decay"):
        return 0.0, weight_decay, sign
    return (lr / _base_lr(group) if group.get("decouple_lr") else lr) * weight_decay, 0.0, sign


def _base_lr(group: Mapping[str, Any]) -> float:
    try:
        return group["base_lr"]
    except KeyError:
        raise ValueError("decouple_lr=True, set by hand, needs the group's 'base_lr' too: a positive float") from None


def _check_count(step: float) -> None:
    if not 1 <= step < math.inf:
        raise ValueError(
            "a parameter's 'step' is negative, infinite or NaN: load a checkpoint, or set it to the number of steps "
            "taken"
        )


def _float(name: str, value: Any) -> float:
    options.check_number(name, value)
    return float(value)


# By family.
HYPER: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {"adam": adam_hyper, "sgd": sgd_hyper}
ROWS: dict[str, Callable[[Mapping[str, Any], float], Adam | Sgd]] = {"adam": adam, "sgd": sgd}
