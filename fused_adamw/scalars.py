"""Computes the numbers of a launch from the hyperparameters of a group and a step count, in double precision.

Only this code tells AdamW from Adam, SGDW from SGD, and torch's conventions from the paper's. The fields of a row are
the arguments of the rules in ``reference.py``, and the step, which stochastic rounding draws by; their order is that of
``layout.py``. Steps that are counted on the host take their rows from ``csrc/scalars.h``, which computes the same from
``HYPER``. ``adam``, ``radam``, ``adabound`` and ``sgd`` here are for the reference backend and for when that is not
built, and are its oracle in the tests.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fused_adamw import options
from fused_adamw.layout import (
    HYPER_BETA2,
    HYPER_FINAL,
    HYPER_GAMMA,
    HYPER_LR,
    LR_IN_MOMENTUM,
    NESTEROV,
    RECTIFY,
    RECTIFY_OR_WAIT,
)


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
    ema: float
    hi: float = 0.0  # of Bound alone


class Bound(NamedTuple):
    """Holds a row of scalars for the rule ``reference.adabound``."""

    decay: float
    l2: float
    grad_factor: float
    w1: float
    w2: float
    step_size: float
    lo: float
    eps: float
    step: float
    ema: float
    hi: float


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
    ema: float
    hi: float = 0.0  # of Bound alone


def adam(group: Mapping[str, Any], step: float) -> Adam:
    """Return the row of Adam and AdamW at their ``step``-th step (1 at the first)."""
    _check_count(step)
    lr, base_lr, decay, l2, sign, beta1, beta2, eps, *_ = adam_hyper(_on_host(group))
    return Adam(
        decay=lr / base_lr * decay,
        l2=l2,
        grad_factor=sign,
        w1=1 - beta1,
        w2=1 - beta2,
        step_size=lr / (1 - beta1**step),
        inv_sqrt_bc2=1 / math.sqrt(1 - beta2**step),
        eps=eps,
        step=step,
        ema=_ema(group, step),
    )


def radam(group: Mapping[str, Any], step: float) -> Adam:
    """Return the row of RAdam at its ``step``-th step (1 at the first), as torch and arXiv 1908.03265 have it.

    Until the length ρ of the average that the second moment is exceeds 5, a denominator of 1 makes the step one of SGD
    with momentum or, with ``degenerated_to_sgd=False``, nothing but the moments moves.
    """
    row = adam(group, step)
    beta2 = options.as_float("beta", group["betas"][1])
    power = beta2**step
    bc2 = 1 - power
    last = 2 / (1 - beta2) - 1
    rho = last - 2 * step * power / bc2
    if rho > 5:
        ratio = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
        return row._replace(step_size=row.step_size * math.sqrt(ratio * bc2), inv_sqrt_bc2=1.0)
    row = row._replace(inv_sqrt_bc2=0.0, eps=1.0)
    return row if group.get("degenerated_to_sgd", True) else row._replace(step_size=0.0, decay=0.0)


def adabound(group: Mapping[str, Any], step: float) -> Bound:
    """Return the row of AdaBound and AMSBound at their ``step``-th step (1 at the first), as their authors' code.

    The bounds of the rates come together at final_lr * lr / base_lr; where that is negative, they change places.
    """
    row = adam(group, step)
    hyper = adabound_hyper(_on_host(group))
    final, reach = hyper[HYPER_LR] * hyper[HYPER_FINAL], hyper[HYPER_GAMMA] * step
    lo, hi = sorted((final * reach / (reach + 1), final * (reach + 1) / reach))
    step_size = row.step_size * math.sqrt(1 - hyper[HYPER_BETA2] ** step)
    return Bound(*row[:-1], hi=hi)._replace(step_size=step_size, lo=lo)


def sgd(group: Mapping[str, Any], step: float) -> Sgd:
    """Return the row of SGD and SGDW at their ``step``-th step (1 at the first, which is not dampened, as in torch).

    torch multiplies the momentum by the learning rate, Algorithm 1 of the paper accumulates it
    (``lr_in_momentum``); the two are the same as long as the learning rate stays the same.
    """
    _check_count(step)
    lr, base_lr, decay, l2, sign, momentum, dampening, *_ = sgd_hyper(_on_host(group))
    into, out = (lr, 1.0) if group.get("lr_in_momentum") else (1.0, lr)
    if not momentum:
        take_g, take_b = into, 0.0
    elif group["nesterov"]:
        take_g, take_b = into, momentum
    else:
        take_g, take_b = 0.0, 1.0
    return Sgd(
        decay=lr / base_lr * decay,
        l2=l2,
        grad_factor=sign,
        momentum=momentum,
        c1=into * (1 - dampening if step > 1 else 1.0),
        c2=out,
        take_g=take_g,
        take_b=take_b,
        step=step,
        ema=_ema(group, step),
    )


def adam_hyper(group: Mapping[str, Any], rectify: float = 0.0) -> tuple[float, ...]:
    """Return what ``adam`` depends on, in the order of ``layout.HYPER_LR`` and on, and ``rectify`` in its place.

    Raises as ``options.check_hyperparameters`` for what no step can use: the one check of their ranges at a step.
    """
    beta1, beta2 = (options.as_float("beta", beta) for beta in group["betas"])
    numbers = (*_decay_hyper(group, group["decoupled_weight_decay"]), beta1, beta2, options.number(group, "eps"))
    good = 0 <= beta1 < 1 and 0 <= beta2 < 1 and math.isfinite(sum(numbers))
    if not good or (beta1 != 0 and not group.get("first_moment", True)):
        options.check_hyperparameters(group, at="step")
    return (*numbers, rectify, *_ema_hyper(group), 0.0, 0.0)


def radam_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what ``radam`` depends on, as ``adam_hyper`` does."""
    return adam_hyper(group, RECTIFY if group.get("degenerated_to_sgd", True) else RECTIFY_OR_WAIT)


def adabound_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what ``adabound`` depends on, as ``adam_hyper`` does."""
    final_lr, gamma, base_lr = (options.as_float(name, group[name]) for name in ("final_lr", "gamma", "base_lr"))
    if not (0 <= final_lr < math.inf and 0 < gamma < 1 and 0 < base_lr < math.inf):
        options.check_hyperparameters(group, at="step")
    return (*adam_hyper(group)[:HYPER_FINAL], final_lr / base_lr, gamma)


def sgd_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what ``sgd`` depends on, in the order of ``layout.HYPER_LR`` and on; raise as ``adam_hyper`` does."""
    flags = NESTEROV * bool(group["nesterov"]) + LR_IN_MOMENTUM * bool(group.get("lr_in_momentum"))
    dampening = options.as_float("dampening", group["dampening"])
    decoupled = group.get("decoupled_weight_decay", False)
    numbers = (*_decay_hyper(group, decoupled), options.number(group, "momentum"), dampening, flags)
    if not math.isfinite(sum(numbers)):
        options.check_hyperparameters(group, at="step")
    return (*numbers, 0.0, *_ema_hyper(group), 0.0, 0.0)


def is_on_device(lr: float | Tensor | None) -> bool:
    """Return whether a learning rate is a tensor that only its device can read without a synchronisation."""
    return isinstance(lr, Tensor) and not lr.is_cpu


def _on_host(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**group, "lr": options.as_float("lr", group["lr"])} if is_on_device(group["lr"]) else group


def _decay_hyper(group: Mapping[str, Any], decoupled: bool) -> tuple[float, ...]:
    """Return the columns HYPER_LR to HYPER_SIGN of ``layout.py``."""
    lr_mult, wd_mult = (options.as_float(name, group.get(name, 1.0)) for name in ("lr_mult", "wd_mult"))
    if not (lr_mult >= 0 and wd_mult >= 0):
        options.check_hyperparameters(group, at="step")
    lr = lr_mult if is_on_device(group["lr"]) else options.number(group, "lr") * lr_mult
    base_lr = 1.0
    if group.get("decouple_lr"):
        base_lr = options.as_float("base_lr", group.get("base_lr", 0.0))
        if not base_lr > 0:
            options.check_hyperparameters(group, at="step")
        base_lr *= lr_mult or 1.0  # a multiplier of 0 stops the decay as well
    weight_decay = options.number(group, "weight_decay") * wd_mult
    parts = (weight_decay, 0.0) if decoupled else (0.0, weight_decay)
    return (lr, base_lr, *parts, -1.0 if group["maximize"] else 1.0)


def _ema(group: Mapping[str, Any], step: float) -> float:
    """Return how much of the new parameter its average takes."""
    decay, warmup = _ema_hyper(group)
    return 1 - (min(decay, (1 + step) / (10 + step)) if warmup else decay)


def _ema_hyper(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the columns HYPER_EMA_DECAY and HYPER_EMA_WARMUP of ``layout.py``."""
    decay = group.get("ema_decay")
    decay = 0.0 if decay is None else options.as_float("ema_decay", decay)
    if not 0 <= decay < 1:
        options.check_hyperparameters(group, at="step")
    return decay, float(bool(group.get("ema_warmup")))


def _check_count(step: float) -> None:
    if not 1 <= step < math.inf:
        raise ValueError("a parameter's 'step' is negative or no finite number")


# By family.
HYPER: dict[str, Callable[[Mapping[str, Any]], tuple[float, ...]]] = {
    "adam": adam_hyper,
    "radam": radam_hyper,
    "adabound": adabound_hyper,
    "sgd": sgd_hyper,
}
ROWS: dict[str, Callable[[Mapping[str, Any], float], Adam | Bound | Sgd]] = {
    "adam": adam,
    "radam": radam,
    "adabound": adabound,
    "sgd": sgd,
}
# By family of a rule.
KINDS: dict[str, Callable[..., Adam | Bound | Sgd]] = {"adam": Adam, "adabound": Bound, "sgd": Sgd}
