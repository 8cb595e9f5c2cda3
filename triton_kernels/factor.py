"""Makes the factor of all gradients and their norm from sums of squares: ``csrc/factor.h`` in Triton.

Each sum is one program's: so the order of its additions is fixed without atomics. Arguments that may be missing are
addresses, 0 where they are; what varies from step to step is not compiled in.
"""

import triton
import triton.language as tl

CLIPS = tl.constexpr(1)
SKIPS = tl.constexpr(2)


@triton.jit
def total(sums, begin, end, BLOCK: tl.constexpr):
    own = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        own += tl.load(sums + i, mask=i < end, other=0.0)
    return tl.sum(own)


@triton.jit
def at(address):
    return address.to(tl.int64).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["found"])
def totals_kernel(sums, bounds, totals, flag, found, BLOCK: tl.constexpr):
    """Write the sum of each segment of ``sums``, and to ``flag`` whether an infinity was found, 0 or 1."""
    k = tl.program_id(0)
    tl.store(totals + k, total(sums, tl.load(bounds + k), tl.load(bounds + k + 1), BLOCK))
    if (k == 0) & (found != 0):
        tl.store(flag, (tl.load(at(found)) != 0).to(tl.float32))


@triton.jit(do_not_specialize=["n", "max_norm", "flags", "scale", "found", "norm"])
def factor_kernel(sums, factor, n, max_norm, flags, scale, found, norm, BLOCK: tl.constexpr):
    """Write the factor, negative where the step is to be skipped, and the norm.

    ``max_norm`` holds the bits of a float64: Triton takes a float for a float32.
    """
    unscale = tl.full([], 1.0, tl.float64)
    if scale != 0:
        unscale = 1 / tl.load(at(scale)).to(tl.float64)
    root = tl.sqrt(total(sums, 0, n, BLOCK)) * unscale
    f = unscale
    if flags & CLIPS != 0:
        ratio = max_norm.to(tl.int64).to(tl.float64, bitcast=True) / (root + 1e-6)
        f = f * tl.where(ratio > 1, 1.0, ratio)  # NaN stays
    skipped = (flags & SKIPS != 0) & ((root < float("inf")) == 0)
    if found != 0:
        skipped = skipped | (tl.load(at(found)) != 0)
    tl.store(factor, tl.where(skipped, -1.0, f).to(tl.float32))
    if norm != 0:
        tl.store(at(norm), root.to(tl.float32))
