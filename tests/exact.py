"""float32 arithmetic by exact rational numbers: the documented sequence of roundings, independent of any compiler."""

import math
from fractions import Fraction

import numpy as np

TINY = Fraction(1, 2**149)  # the least subnormal


def rounded(x: Fraction) -> Fraction:
    """x to the nearest float32, ties to even (overflow is not needed here)."""
    if x == 0:
        return Fraction(0)
    exponent = math.floor(math.log2(abs(x))) if abs(x) > Fraction(1, 2**1000) else -2000
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    ulp = max(Fraction(2) ** (exponent - 23), TINY)
    return round(x / ulp) * ulp  # Fraction rounds halves to even


def fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return rounded(a * b + c)


def sqrt(x: Fraction) -> Fraction:
    """The correctly rounded square root: NumPy's is IEEE."""
    return Fraction(float(np.sqrt(np.float32(float(x)))))


def lerp(a: Fraction, b: Fraction, w: Fraction) -> Fraction:
    near_a = w < Fraction(1, 2)
    return fma(w if near_a else w - 1, rounded(b - a), a if near_a else b)


def decayed(s: dict[str, Fraction], p: Fraction, g: Fraction) -> tuple[Fraction, Fraction]:
    p = fma(-s["decay"], p, p)
    return p, fma(s["l2"], p, rounded(s["grad_factor"] * g))


def moments(s: dict[str, Fraction], g: Fraction, m: Fraction, v: Fraction, vmax: Fraction | None):
    """(m, v, vmax, the second moment that the step divides by)."""
    near_m = s["w1"] < Fraction(1, 2)
    m = fma(s["w1"] if near_m else s["w1"] - 1, rounded(g - m), m if near_m else g)
    v = fma(s["w2"], rounded(g * g), fma(-s["w2"], v, v))
    if vmax is None:
        return m, v, None, v
    vmax = max(vmax, v)
    return m, v, vmax, vmax


def adam(
    s: dict[str, Fraction],
    p: Fraction,
    g: Fraction,
    m: Fraction,
    v: Fraction,
    vmax: Fraction | None = None,
    rule: str = "adam",
):
    """(p, m, v, vmax) after one step of the sequence in ``reference.py``'s docstring."""
    before = p
    p, g = decayed(s, p, g)
    m, v, vmax, second = moments(s, g, m, v, vmax)
    denom = fma(sqrt(second), s["inv_sqrt_bc2"], s["eps"])
    if rule == "adam_cautious_decay" and m * before < 0:
        p = before
    moved = Fraction(0) if rule == "adam_cautious_update" and m * g <= 0 else m
    p = fma(-s["step_size"], rounded(moved / denom), p)
    return (p, m, v) if vmax is None else (p, m, v, vmax)


def adam_no_first_moment(s: dict[str, Fraction], p: Fraction, g: Fraction, v: Fraction):
    """(p, v) after one step: that of adam, whatever its first moment was."""
    (stepped, _, v), (other, *_) = (adam(s, p, g, m, v) for m in (Fraction(0), Fraction(3)))
    assert stepped == other
    return stepped, v


def adabound(s: dict[str, Fraction], p: Fraction, g: Fraction, m: Fraction, v: Fraction, vmax: Fraction | None = None):
    """(p, m, v, vmax) after one step."""
    p, g = decayed(s, p, g)
    m, v, vmax, second = moments(s, g, m, v, vmax)
    rate = rounded(s["step_size"] / rounded(sqrt(second) + s["eps"]))
    p = fma(-min(max(rate, s["lo"]), s["hi"]), m, p)
    return (p, m, v) if vmax is None else (p, m, v, vmax)


def sgd(s: dict[str, Fraction], p: Fraction, g: Fraction, b: Fraction | None = None):
    """(p, b) after one step."""
    p, g = decayed(s, p, g)
    d = rounded(s["take_g"] * g)
    if b is not None:
        b = fma(s["c1"], g, rounded(s["momentum"] * b))
        d = fma(s["take_b"], b, d)
    p = fma(-s["c2"], d, p)
    return (p,) if b is None else (p, b)
