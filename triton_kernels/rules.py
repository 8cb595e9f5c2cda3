"""Defines the update rules once for Triton: the roundings of ``csrc/rules.h``, in its order and with its names.

``s`` is a row of launch scalars, as ``layout.py`` has them. Everything is fp32; a storage type is never seen here.
"""

import triton
import triton.language as tl


@triton.jit
def minus(x):
    """Return -x. Triton's own sign, up to version 3.6, is 0 - x, which makes +0 of +0."""
    return x * -1.0


@triton.jit
def lerp(a, b, w):
    """Return a + w * (b - a) from the nearer end, w a scalar."""
    near_a = w < 0.5
    return tl.fma(tl.where(near_a, w, w - 1), b - a, tl.where(near_a, a, b))


@triton.jit
def decayed(s, p, g):
    """Start both rules: decoupled decay, then the gradient with its sign and L2 term."""
    p = tl.fma(minus(s[0]), p, p)
    g = tl.fma(s[1], p, s[2] * g)
    return p, g


@triton.jit
def agree(a, b):
    """Return whether two numbers are on the same side of 0; of a NaN, anything."""
    return (tl.minimum(a, b) > 0) | (tl.maximum(a, b) < 0)


@triton.jit
def opposed(a, b):
    """Return whether they are on different sides; of a NaN, anything."""
    return (tl.minimum(a, b) < 0) & (tl.maximum(a, b) > 0)


@triton.jit
def adam(s, p0, g, m, v, vmax, RULE: tl.constexpr):
    """Step Adam and AdamW: s = decay, l2, grad_factor, w1, w2, step_size, inv_sqrt_bc2, eps.

    AdaBound and AMSBound have lo in place of inv_sqrt_bc2, and hi.
    """
    p, g = decayed(s, p0, g)
    m = lerp(m, g, s[3])
    v = tl.fma(s[4], g * g, tl.fma(minus(s[4]), v, v))
    second = v
    if RULE == "adam_amsgrad" or RULE == "amsbound":
        vmax = tl.maximum(vmax, v, propagate_nan=tl.PropagateNan.ALL)
        second = vmax
    if RULE == "adabound" or RULE == "amsbound":
        rate = tl.div_rn(s[5], tl.sqrt_rn(second) + s[7])
        rate = tl.where(rate < s[6], s[6], rate)  # keeps a NaN
        rate = tl.where(rate > s[10], s[10], rate)
        return tl.fma(minus(rate), m, p), m, v, vmax
    denom = tl.fma(tl.sqrt_rn(second), s[6], s[7])
    moved = m
    if RULE == "adam_cautious_decay":
        p = tl.where(opposed(m, p0), p0, p)
    if RULE == "adam_cautious_update":
        moved = m * tl.where(agree(m, g), 1.0, 0.0)
    p = tl.fma(minus(s[5]), tl.div_rn(moved, denom), p)
    return p, m, v, vmax


@triton.jit
def sgd(s, p, g, b, MOMENTUM: tl.constexpr):
    """Step SGD and SGDW: s = decay, l2, grad_factor, momentum, c1, c2, take_g, take_b."""
    p, g = decayed(s, p, g)
    d = s[6] * g
    if MOMENTUM:
        b = tl.fma(s[4], g, s[3] * b)
        d = tl.fma(s[7], b, d)
    p = tl.fma(minus(s[5]), d, p)
    return p, b
