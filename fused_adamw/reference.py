"""Defines the update rules in pure PyTorch, to be read beside the paper; and runs them, as the "reference" backend.

Source: Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, arXiv 1711.05101, Algorithms 1 and 2. In the
paper's letters θ is ``p``, g is ``g``, m is ``m`` (``b`` in SGD), v is ``v``, α·η_t is the learning rate, and λ is
the weight decay. Decoupled decay and L2 regularization differ in two numbers, ``decay`` and ``l2``, of which one is
zero, so that AdamW and Adam are one rule, and SGDW and SGD another. ``scalars.py`` computes these numbers.

The sequence of roundings, which every compiled backend follows to the bit (``fma`` rounds once, every other operation
rounds once, to nearest even)::

    both:  p = fma(-decay, p, p)
           g = fma(l2, p, grad_factor * g)
    adam:  m = lerp(m, g, w1)                                w1 = 1 - beta1
           v = fma(w2, g * g, fma(-w2, v, v))                w2 = 1 - beta2
           vmax = max(vmax, v)                               amsgrad only, then in place of v below
           p = fma(-step_size, m / fma(sqrt(v), inv_sqrt_bc2, eps), p)
           with cautious decay p is as before the decay where m and p had opposite signs; a cautious update has
           m * (m * g > 0) in place of m in the last line, the product taken as exact
    adabound: m and v, or vmax with amsbound, as adam has them; then
           p = fma(-min(max(step_size / (sqrt(v) + eps), lo), hi), m, p)
    sgd:   b = fma(c1, g, momentum * b)                      momentum only
           p = fma(-c2, fma(take_b, b, take_g * g), p)
    both:  ema = lerp(ema, p, 1 - ema_decay)                 where one is kept, by p before its rounding to storage

Why these forms: ``x - w * x`` in one rounding keeps a decay of 1e-6, or a 1 - beta of 1e-3, that the float32 factor
``1 - w`` would get wrong by a percent, or by 3e-5; ``lerp(a, b, w)``, ``fma(w, b - a, a)`` or, from w = 1/2,
``fma(w - 1, b - a, b)``, makes beta1 = 0 exact; the two terms of a second moment are never subtracted, so that it is
accurate relative to its size for every beta; and decay and update share the one rounding to the storage type. SGD
rounds as torch's for-loop does. An infinite parameter becomes NaN (inf - inf), and so does a moment that
overflowed.

Here, in PyTorch, ``fma(a, b, c)`` is ``addcmul``, which may round twice: in float64 this file is the oracle of the
tests, in float32 it agrees with the compiled backends to a few ulp.
"""

import torch
from torch import Tensor

from fused_adamw import codecs, scalars
from fused_adamw.contract import Owner, Row, Scalars, Watch
from fused_adamw.layout import SCALAR_STEP


def fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c."""
    if isinstance(a, Tensor):
        return c.addcmul(a, b)
    return c.add(b, alpha=a)


def decayed(p: Tensor, g: Tensor, decay: float, l2: float, grad_factor: float) -> tuple[Tensor, Tensor]:
    """Apply the decay to p, and factor and L2 term to g: both rules start with this.

    Algorithm 2, line 12 (Algorithm 1, line 9), the term -η_t·λ·θ; and line 6, g = ∇f(θ) + λ·θ.
    """
    p = fma(-decay, p, p)
    g = fma(l2, p, grad_factor * g)
    return p, g


def moments(m: Tensor, v: Tensor, vmax: Tensor | None, g: Tensor, w1: float, w2: float) -> Tensor:
    """Move Adam's moments, in place; return the second one that the step divides by."""
    m.lerp_(g, w1)  # line 7: m = β1·m + (1-β1)·g
    v.copy_(fma(w2, g * g, fma(-w2, v, v)))  # line 8: v = β2·v + (1-β2)·g²
    return v if vmax is None else vmax.copy_(vmax.maximum(v))


def adam(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    vmax: Tensor | None,
    *,
    rule: str = "adam",
    decay: float,
    l2: float,
    grad_factor: float,
    w1: float,
    w2: float,
    step_size: float,
    inv_sqrt_bc2: float,
    eps: float,
) -> None:
    """Step Adam or AdamW once, in place (Algorithm 2; ``vmax`` is AMSGrad's, arXiv 1904.09237).

    Cautious rules are Algorithm 1 of arXiv 2510.12402 (decay), whose update has the sign of m, and of 2411.16085
    (update) without the division by the mean of the mask, which takes a pass of its own.
    """
    x, g = decayed(p, g, decay, l2, grad_factor)
    v = moments(m, v, vmax, g, w1, w2)
    moved = m
    if rule == "adam_cautious_decay":
        x = torch.where(m.sign() * p.sign() < 0, p, x)
    elif rule == "adam_cautious_update":
        moved = m * (m.sign() * g.sign() > 0)  # keeps a NaN
    # lines 9, 10 and 12: step_size·m = η_t·α·m̂, sqrt(v)·inv_sqrt_bc2 = √v̂
    p.copy_(fma(-step_size, moved / (v.sqrt() * inv_sqrt_bc2 + eps), x))


def adabound(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    vmax: Tensor | None,
    *,
    decay: float,
    l2: float,
    grad_factor: float,
    w1: float,
    w2: float,
    step_size: float,
    lo: float,
    eps: float,
    hi: float,
) -> None:
    """Step AdaBound or AdaBoundW once, in place (arXiv 1902.09843, with the corrections of its authors' code)."""
    x, g = decayed(p, g, decay, l2, grad_factor)
    v = moments(m, v, vmax, g, w1, w2)
    rate = (step_size / (v.sqrt() + eps)).clamp(lo, hi)  # keeps a NaN
    p.copy_(fma(-rate, m, x))


def sgd(
    p: Tensor,
    g: Tensor,
    b: Tensor | None,
    *,
    decay: float,
    l2: float,
    grad_factor: float,
    momentum: float,
    c1: float,
    c2: float,
    take_g: float,
    take_b: float,
) -> None:
    """Step SGD or SGDW once, in place (Algorithm 1; ``c1 = 1`` and ``c2 = lr`` make it torch's)."""
    x, g = decayed(p, g, decay, l2, grad_factor)
    d = take_g * g
    if b is not None:
        b.copy_(fma(c1, g, momentum * b))  # line 8: m = β1·m + η_t·α·g
        d = fma(take_b, b, d)
    p.copy_(fma(-c2, d, x))  # line 9: θ = θ - m - η_t·λ·θ


class Launch:
    """Steps rows with plain PyTorch operators: the ``contract.Launch`` of the "reference" backend."""

    def __init__(self, watch: Watch, rows: list[Row]) -> None:
        self.watch, self.rows = watch, rows
        self.measured = {row.slot: torch.zeros(3, dtype=torch.float64) for row in rows if row.measured}

    def prepare_step(self, owner: Owner, scalars: Scalars) -> None:
        """Take the scalars of the coming step."""
        self.scalars = scalars

    parts = 1

    def sum_squares(self, owner: Owner, sums: Tensor) -> None:
        """Write the sum of the squares of the gradients."""
        gradients = [row.tensors(owner).g for row in self.rows if row.is_live(owner)]
        norms = torch._foreach_norm(gradients, dtype=torch.float64) if gradients else [torch.zeros_like(sums[0])]
        sums.copy_(torch.stack(norms).square().sum())

    def squares(self) -> Tensor:
        """Return sums of squares as ``contract.Launch`` says."""
        return torch.stack(list(self.measured.values()), 1)

    @torch.no_grad()
    def run(self, owner: Owner, factor: float | Tensor, count: bool) -> None:
        """Step every row that has a gradient, and count the steps that are counted on the device."""
        factor = float(factor)
        for row in () if factor < 0 else self.rows:
            if row.is_live(owner):
                self._step(owner, row, factor)
            elif row.measured:
                self.measured[row.slot].zero_()
        if count:
            self.watch.advance()

    def _step(self, owner: Owner, row: Row, factor: float) -> None:
        tensors = row.tensors(owner)
        if row.counts_on_device:
            tensors.step.add_(1)
        numbers = self._scalars_of(owner, row, tensors.step)
        values = dict(zip(numbers._fields[:SCALAR_STEP], numbers, strict=False))
        values["grad_factor"] *= factor
        step = int(numbers.step)
        p, *states = codecs.read(row, tensors, torch.float64 if row.p is torch.float64 else torch.float32)
        g = tensors.g.to(p.dtype)
        before = p.clone() if row.measured else p
        if row.family == "sgd":
            sgd(p, g, states[0] if states else None, **values)
        else:
            m, v, *rest = states if len(states) > 1 else (torch.zeros_like(g), *states)  # with beta1 = 0 any m would do
            vmax = rest[0] if rest else None
            if row.family == "adabound":
                adabound(p, g, m, v, vmax, **values, hi=numbers.hi)
            else:
                adam(p, g, m, v, vmax, rule=row.rule, **values)
        codecs.move_average(row, tensors, p, numbers.ema, step)
        if row.measured:
            measured = (values["grad_factor"] * g, p - before, p)
            self.measured[row.slot] = torch.stack([x.double().square().sum() for x in measured])
        codecs.write(row, tensors, p, states, step)

    def _scalars_of(self, owner: Owner, row: Row, step: Tensor) -> scalars.Adam | scalars.Bound | scalars.Sgd:
        if row.counts_on_device:
            return scalars.ROWS[owner.family](owner.param_groups[row.group], step.item())
        return scalars.KINDS[row.family](*self.scalars[self.watch.scalars_of(row.slot)])
