"""Reads and writes each storage format in Triton, with the names and the bits of ``csrc/formats.h``, as fp32.

Tiles are [threads, elements of each]; values that a thread's elements share (a scale, a counter) are [threads].
"""

import triton
import triton.language as tl

from .layout import COL_INDEX, COL_OFFSET, COL_RUN, COL_SEED, COL_SKIP
from .rules import minus

QUANT_BLOCK = tl.constexpr(128)  # elements that share a scale
NAN_BF16 = tl.constexpr(0x7FC0)
NO_SCALE = tl.constexpr(0x7E800000)
SIGN = tl.constexpr(-0x80000000)
NEAREST = tl.constexpr(0x80000)  # as if these bits had been drawn
ROUNDS = tl.constexpr(7)
# Set in the second word of counters, it makes the words of averages: no element has so high a number.
AVERAGES = tl.constexpr(1 << 31)
FIRST = tl.constexpr(761 << 20)
MAGIC = tl.constexpr(12582912.0)  # the last bits of a sum with 1.5 * 2^23 are the nearest whole number, to even


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask).to(tl.float32)


@triton.jit
def store(pointers, x, mask):
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def bits(x):
    """Return the bits of an fp32 or a 16-bit float."""
    return x.to(tl.int32 if x.dtype.primitive_bitwidth == 32 else tl.int16, bitcast=True)


@triton.jit
def bf16(x, add):
    """Return x as bf16: its upper 16 bits, after ``add`` was added to round them."""
    return tl.where(x != x, NAN_BF16, (bits(x) + add) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


# ---- Stochastic rounding.


@triton.jit
def places(row, base):
    """Return where element ``base`` of a row lies among all elements of its parameter, for ``number``."""
    run = tl.load(row + COL_RUN)
    skip = tl.load(row + COL_SKIP)
    first = tl.load(row + COL_OFFSET) + base + base // run * skip
    # A run longer than a chunk ends at most once in it. Cutting the run to 2^30 does not move that end: 32 bits do.
    short = tl.minimum(run, 1 << 30)
    begin = short - tl.minimum(run - base % run, short)
    return first, skip, short.to(tl.uint32), begin.to(tl.uint32)


@triton.jit
def number(at, i):
    first, skip, run, begin = at
    n = first + i
    if skip != 0:  # a division takes long
        n += ((begin + i.to(tl.uint32)) // run).to(tl.int64) * skip
    return n


@triton.jit
def words(row, at, step, i, end, NEIGHBOURS: tl.constexpr, ABOVE: tl.constexpr = 0):
    """Return the words of a tile of 4 elements a thread; i [threads] are the first of each, ``end`` ends the span.

    Each has the element's own half as the lower. ``ABOVE`` is set in the second word of counters: AVERAGES, or nothing.
    """
    seed = tl.load(row + COL_SEED)  # loaded each time: a seed kept in a register keeps its 20 keys in 20 more
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    index = tl.load(row + COL_INDEX).to(tl.uint32)
    if NEIGHBOURS:
        n = number(at, i)  # a multiple of 4
        group = n >> 3
        low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32) | ABOVE
        x0, x1, x2, x3 = tl.philox_impl(low, high, step, index, k0, k1, ROUNDS)
        w0 = tl.where(n & 4 == 0, x0, x2)
        w2 = tl.where(n & 4 == 0, x1, x3)
        w1 = exchanged(w0)
        w3 = exchanged(w2)
    else:
        w0 = tl.zeros_like(i).to(tl.uint32)
        w1 = w0
        w2 = w0
        w3 = w0
        # A loop, since side by side they take 20 registers more.
        for k in range(tl.minimum(tl.cdiv(end, 32), 4)):
            n = number(at, i + 32 * k)
            group = n >> 3
            low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32) | ABOVE
            x0, x1, x2, x3 = tl.philox_impl(low, high, step, index, k0, k1, ROUNDS)
            x = tl.where(n & 4 == 0, tl.where(n & 2 == 0, x0, x1), tl.where(n & 2 == 0, x2, x3))
            x = tl.where(n & 1 == 0, x, exchanged(x))
            w0 = tl.where(k == 0, x, w0)
            w1 = tl.where(k == 1, x, w1)
            w2 = tl.where(k == 2, x, w2)
            w3 = tl.where(k == 3, x, w3)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(i.shape[0], 4).to(tl.int32, bitcast=True)


@triton.jit
def exchanged(word):
    return word << 16 | word >> 16


@triton.jit
def for_parameter(word):
    return word & 0xFFFF


@triton.jit
def for_moment(word, SECOND: tl.constexpr):
    product = word.to(tl.uint32, bitcast=True) * (0x9E360001 if SECOND else 0xBB640001)
    return (product >> 16).to(tl.int32)


# ---- Masters.


@triton.jit
def read(pointers, extra, mask, MASTER: tl.constexpr):
    """Return a parameter with the digits that its extra stream holds."""
    stored = tl.load(pointers, mask=mask)
    p = stored.to(tl.float32)
    if MASTER == "kahan":
        c = load(extra, mask)
        half = tl.fma(c, 0.5, p).to(stored.dtype)
        p = tl.where(bits(half) == bits(stored), p + c, p)
    elif MASTER == "split16":
        x = (bits(p) + tl.load(extra, mask=mask).to(tl.int32)).to(tl.float32, bitcast=True)
        p = tl.where(bits(bf16(x, 0x8000)) == bits(stored), x, p)
    elif MASTER == "fp32":
        master = tl.load(extra, mask=mask)
        p = tl.where(bits(rounded(master, stored.dtype)) == bits(stored), master, p)
    return p


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Round to nearest; to bf16 with ties away from zero."""
    return bf16(x, 0x8000) if DTYPE.is_bf16() else x.to(DTYPE)


@triton.jit
def write(pointers, extra, x, random, mask, MASTER: tl.constexpr):
    """Store what ``read`` reads; ``random`` is None, or 16 random bits of each element."""
    DTYPE: tl.constexpr = pointers.dtype.element_ty
    if MASTER == "kahan":
        p = x.to(DTYPE)
        store(extra, x - p.to(tl.float32), mask)
    elif MASTER == "split16":
        p = bf16(x, 0x8000)
        tl.store(extra, tl.where(x != x, 0, bits(x)).to(tl.int16), mask=mask)
    elif MASTER == "fp32":
        p = rounded(x, DTYPE)
        tl.store(extra, x, mask=mask)
    elif random is not None:
        p = bf16(x, random)
    else:
        p = x.to(DTYPE)
    tl.store(pointers, p, mask=mask)


# ---- Moments; int8 has a scale for each QUANT_BLOCK of them.


@triton.jit
def spread(x, like):
    """Repeat a value of each thread, [threads], over a tile."""
    return tl.broadcast_to(x[:, None], like.shape)


@triton.jit
def load_moment(pointers, scales, mask, some, SECOND: tl.constexpr):
    """Return a moment. ``scales`` is None, or moments are codes and a thread with ``some`` elements has a scale."""
    x = tl.load(pointers, mask=mask)
    if scales is None:
        x = x.to(tl.float32)
    else:
        code = x.to(tl.int32)
        scale = tl.load(scales, mask=some)
        if SECOND:
            x = (((code & 0xFF) << 20) + FIRST).to(tl.float32, bitcast=True) * spread(scale, code)
        else:
            c = code.to(tl.float32)
            x = c * tl.abs(c) * spread(scale * (1 / 16128), code)
    return x


@triton.jit
def store_moment(pointers, scales, x, word, mask, some, SECOND: tl.constexpr):
    """Store a moment, rounded to nearest if ``word`` is None, else stochastically."""
    if scales is not None:
        scale = scale_of(x, mask)
        first = tl.arange(0, scale.shape[0]) % 32 == 0
        tl.store(scales, scale, mask=first if some is None else first & some)
        if SECOND:
            ratio = tl.maximum(tl.abs(x) * spread(inverse(scale), x), 2.0**-32 * 1.125)
            add = NEAREST if word is None else for_moment(word, SECOND) << 4 | 8
            code = (bits(ratio) + (add - FIRST)) >> 20
        else:
            square = tl.maximum(tl.abs(x) * spread(inverse(scale) * 16128.0, x), 2.0**-18)
            root = root_of(square)
            if word is not None:
                below = root - 0.5 + MAGIC - MAGIC
                rest = tl.fma(minus(below), below, square)
                drawn = for_moment(word, SECOND).to(tl.float32) + 0.5
                width = tl.fma(below, 2.0**-15, 2.0**-16)
                root = below + tl.where(tl.fma(minus(drawn), width, rest) > 0, 1.0, 0.0)
            code = bits((bits(root) | bits(x) & SIGN).to(tl.float32, bitcast=True) + MAGIC)
        tl.store(pointers, code.to(tl.int8), mask=mask)
    elif word is None:
        store(pointers, x, mask)
    else:
        tl.store(pointers, bf16(x, for_moment(word, SECOND)), mask=mask)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_of(x, mask):
    """Return the scale of each thread's block. 32 threads share a block, so one warp finds its maximum."""
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    own = bits(tl.reduce(tl.abs(x), 1, larger))
    BLOCKS: tl.constexpr = own.shape[0] // 32
    largest = tl.max(own.reshape(BLOCKS, 32), axis=1)
    scale = tl.where(largest < NO_SCALE, (largest + 0xFFFF) & -0x10000, 0x7FC00000)
    return tl.broadcast_to(scale[:, None], (BLOCKS, 32)).reshape(own.shape[0]).to(tl.float32, bitcast=True)


# A reciprocal root errs by an ulp or two, and has no slow path as a division and an IEEE root do. One step of Newton's
# mends it for the 8 digits of a scale, and for each square far enough to give the code of the IEEE root
# (tests/test_codes.py).


@triton.jit
def inverse(scale):
    """Return the factor that brings the magnitudes of a block to [0, 1]; NaN where its scale is no normal number."""
    near = tl.rsqrt(scale)
    near = near * near
    return tl.fma(tl.fma(minus(scale), near, 1.0), near, near)


@triton.jit
def root_of(square):
    near = tl.rsqrt(square)
    root = square * near
    return tl.fma(tl.fma(minus(root), root, square), 0.5 * near, root)
