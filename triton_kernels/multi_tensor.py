"""Steps a whole model in one Triton launch: each program takes a chunk of a tensor, as tables tell it.

``fused_adamw/layout.py`` tells what is in the tables.
"""

import triton
import triton.language as tl

from .formats import (
    QUANT_BLOCK,
    for_parameter,
    load,
    load_moment,
    places,
    read,
    store,
    store_moment,
    words,
    write,
)
from .layout import (
    COL_EXTRA,
    COL_FLAGS,
    COL_GRAD,
    COL_NUMEL,
    COL_PARAM,
    COL_SCALARS,
    COL_SCALES,
    COL_STATE,
    COLUMNS,
    HYPER_BASE_LR,
    HYPER_BETA1,
    HYPER_BETA2,
    HYPER_DAMPENING,
    HYPER_DECAY,
    HYPER_EPS,
    HYPER_FLAGS,
    HYPER_L2,
    HYPER_LR,
    HYPER_MOMENTUM,
    HYPER_RECTIFY,
    HYPER_SIGN,
    HYPERS,
    IS_ALIGNED,
    LR_IN_MOMENTUM,
    NESTEROV,
    RECTIFY,
    SCALAR_C1,
    SCALAR_C2,
    SCALAR_DECAY,
    SCALAR_EPS,
    SCALAR_GRAD_FACTOR,
    SCALAR_INV_SQRT_BC2,
    SCALAR_L2,
    SCALAR_MOMENTUM,
    SCALAR_STEP,
    SCALAR_STEP_SIZE,
    SCALAR_TAKE_B,
    SCALAR_TAKE_G,
    SCALAR_W1,
    SCALAR_W2,
    SCALARS,
)
from .rules import adam, sgd


@triton.jit
def stream(row, column: tl.constexpr, base, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element ``base`` of a stream of a row."""
    address = tl.load(row + column) + base * (DTYPE.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the hint counts on the pointer only, not on the integer
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def place(rows, chunks, chunk):
    """Return a program's row, its first element, the number of its elements, and whether the step leaves it out."""
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    row = rows + tl.load(entry).to(tl.int64) * COLUMNS
    base = tl.load(entry + 1).to(tl.int64) * chunk
    numel = tl.load(row + COL_NUMEL)
    n = tl.minimum(numel - base, chunk).to(tl.int32)
    return row, base, n, numel < 0


@triton.jit
def tile(ALIGNED: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the elements of a tile, [THREADS, WIDTH], and the first of each thread.

    ALIGNED threads have neighbours, which they access at once; others have every 32nd element, so that 32 threads
    access neighbours together. Either way 32 threads have 32 * WIDTH elements that follow one another.
    """
    thread = tl.arange(0, THREADS)
    if ALIGNED:
        first = thread * WIDTH
        return first[:, None] + tl.arange(0, WIDTH)[None, :], first
    first = thread // 32 * (32 * WIDTH) + thread % 32
    return first[:, None] + tl.arange(0, WIDTH)[None, :] * 32, first


@triton.jit
def step_span(
    row, base, begin, end, s, at,
    ALIGNED: tl.constexpr, RULE: tl.constexpr,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    MASTER: tl.constexpr, RANDOM_P: tl.constexpr, RANDOM_M: tl.constexpr, RANDOM_V: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Step elements [base + begin, base + end) of a row; an ALIGNED span is whole tiles and needs no mask."""
    ADAM: tl.constexpr = RULE == "adam" or RULE == "adam_amsgrad"
    CODES: tl.constexpr = STATE_DTYPE.is_int8()
    p_at = stream(row, COL_PARAM, base, P_DTYPE, ALIGNED)
    g_at = stream(row, COL_GRAD, base, G_DTYPE, ALIGNED)
    extra_at = p_at
    if MASTER != "none":
        EXTRA_DTYPE: tl.constexpr = P_DTYPE if MASTER == "kahan" else tl.int16 if MASTER == "split16" else tl.float32
        extra_at = stream(row, COL_EXTRA, base, EXTRA_DTYPE, ALIGNED)
    if RULE != "sgd":
        state0_at = stream(row, COL_STATE, base, STATE_DTYPE, ALIGNED)
    if ADAM:
        state1_at = stream(row, COL_STATE + 1, base, STATE_DTYPE, ALIGNED)
    if RULE == "adam_amsgrad":
        state2_at = stream(row, COL_STATE + 2, base, STATE_DTYPE, ALIGNED)
    if CODES:
        scales0_at = stream(row, COL_SCALES, base // QUANT_BLOCK, tl.float32, False)
        scales1_at = stream(row, COL_SCALES + 1, base // QUANT_BLOCK, tl.float32, False)

    own, first = tile(ALIGNED, THREADS, WIDTH)
    for start in range(begin, end, THREADS * WIDTH):
        if ALIGNED:
            start = tl.multiple_of(start, THREADS * WIDTH)
        i = start + own
        mask = None if ALIGNED else i < end
        p = read(p_at + i, extra_at + i, mask, MASTER)
        g = load(g_at + i, mask)
        scales0, scales1, some, random_p, word_m, word_v = None, None, None, None, None, None
        if CODES:
            block = (start + first) // QUANT_BLOCK
            some = None if ALIGNED else block * QUANT_BLOCK < end
            scales0 = scales0_at + block
            scales1 = scales1_at + block
        if RANDOM_P or RANDOM_M or RANDOM_V:
            word = words(row, at, s[SCALAR_STEP].to(tl.uint32), start + first, end - start, ALIGNED)
            random_p = for_parameter(word) if RANDOM_P else None
            word_m = word if RANDOM_M else None
            word_v = word if RANDOM_V else None
        if RULE == "sgd":
            p, _ = sgd(s, p, g, g, MOMENTUM=False)
        elif RULE == "sgd_momentum":
            b = load_moment(state0_at + i, scales0, mask, some, SECOND=False)
            p, b = sgd(s, p, g, b, MOMENTUM=True)
            store_moment(state0_at + i, scales0, b, word_m, mask, some, SECOND=False)
        else:
            m = load_moment(state0_at + i, scales0, mask, some, SECOND=False)
            v = load_moment(state1_at + i, scales1, mask, some, SECOND=True)
            vmax = load(state2_at + i, mask) if RULE == "adam_amsgrad" else v
            p, m, v, vmax = adam(s, p, g, m, v, vmax, AMSGRAD=RULE == "adam_amsgrad")
            store_moment(state0_at + i, scales0, m, word_m, mask, some, SECOND=False)
            store_moment(state1_at + i, scales1, v, word_v, mask, some, SECOND=True)
            if RULE == "adam_amsgrad":
                store(state2_at + i, vmax, mask)
        write(p_at + i, extra_at + i, p, random_p, mask, MASTER)


@triton.jit(do_not_specialize=["chunk"])
def step_kernel(
    rows, chunks, scalars, factor, chunk,
    RULE: tl.constexpr,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    MASTER: tl.constexpr, RANDOM_P: tl.constexpr, RANDOM_M: tl.constexpr, RANDOM_V: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Step one entry of ``chunks`` per program; ``chunk`` is the elements of each, a multiple of QUANT_BLOCK.

    Gradients are multiplied by ``factor``; where that is negative nothing is done.
    """
    f = tl.load(factor)
    if f < 0:
        return
    row, base, n, left_out = place(rows, chunks, chunk)
    if left_out:
        return
    start = places(row, base) if RANDOM_P or RANDOM_M or RANDOM_V else None
    at = scalars + tl.load(row + COL_SCALARS) * SCALARS
    s = (tl.load(at), tl.load(at + 1), f * tl.load(at + SCALAR_GRAD_FACTOR), tl.load(at + 3), tl.load(at + 4),
         tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8))  # fmt: skip
    whole = 0
    if tl.load(row + COL_FLAGS) & IS_ALIGNED != 0:
        whole = n // (THREADS * WIDTH) * (THREADS * WIDTH)
    # Two regions, so that neither keeps registers for the other: fp32 Adam takes 41 to 43 on sm_80 to 90 instead of
    # 45 or 46.
    if whole > 0:
        step_span(row, base, 0, whole, s, start, True, RULE, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, RANDOM_P, RANDOM_M, RANDOM_V, THREADS, WIDTH)  # fmt: skip
    if whole < n:
        step_span(row, base, whole, n, s, start, False, RULE, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, RANDOM_P, RANDOM_M, RANDOM_V, THREADS, TAIL)  # fmt: skip


@triton.jit
def add_squares(
    sums, row, base, begin, end, ALIGNED: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add squares in double, in which the square of a float is exact, and neither overflows nor underflows."""
    g_at = stream(row, COL_GRAD, base, G_DTYPE, ALIGNED)
    for start in range(begin, end, BLOCK):
        if ALIGNED:
            start = tl.multiple_of(start, BLOCK)
        i = start + tl.arange(0, BLOCK)
        g = load(g_at + i, None) if ALIGNED else tl.where(i < end, load(g_at + i, i < end), 0.0)
        g = g.to(tl.float64)
        sums += g * g
    return sums


@triton.jit(do_not_specialize=["chunk"])
def square_kernel(rows, chunks, sums, chunk, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Write the sum of the squares of the gradients of each chunk, float64 [.]."""
    row, base, n, left_out = place(rows, chunks, chunk)
    n = tl.where(left_out, 0, n)
    whole = 0
    if tl.load(row + COL_FLAGS) & IS_ALIGNED != 0:
        whole = n // BLOCK * BLOCK
    total = tl.sum(add_squares(tl.zeros([BLOCK], tl.float64), row, base, 0, whole, True, G_DTYPE, BLOCK))
    total += tl.sum(add_squares(tl.zeros([TAIL], tl.float64), row, base, whole, n, False, G_DTYPE, TAIL))
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def power(x, n):
    """Return x ** n for a whole n >= 0, within n ulp; by squaring, since Triton's interpreter has no pow."""
    y = x * 0 + 1
    while n > 0:
        if n & 1 != 0:
            y = y * x
        x = x * x
        n = n >> 1
    return y


@triton.jit
def scalars_kernel(hyper, rates, steps, factor, scalars, ADAM: tl.constexpr):
    """Compute the scalar rows on the device: ``fused_adamw/scalars.py`` in Triton, for ``gpu.Kernels.scalars``."""
    if tl.load(factor) < 0:
        return
    row = tl.program_id(0).to(tl.int64)
    address = tl.load(steps + row)
    if address == 0:
        return
    h = hyper + row * HYPERS
    counter = address.to(tl.pointer_type(tl.float32))
    count = tl.load(counter) + 1
    tl.store(counter, count)
    step = count.to(tl.int32)
    lr = tl.load(h + HYPER_LR)
    rate = tl.load(rates + row)
    if rate > 0:
        lr = tl.load(rate.to(tl.pointer_type(tl.float64)))
    elif rate < 0:
        lr = tl.load((~rate).to(tl.pointer_type(tl.float32))).to(tl.float64)
    to = scalars + row * SCALARS
    tl.store(to + SCALAR_STEP, count)
    decay = lr / tl.load(h + HYPER_BASE_LR) * tl.load(h + HYPER_DECAY)
    tl.store(to + SCALAR_L2, tl.load(h + HYPER_L2).to(tl.float32))
    tl.store(to + SCALAR_GRAD_FACTOR, tl.load(h + HYPER_SIGN).to(tl.float32))
    if ADAM:
        beta1 = tl.load(h + HYPER_BETA1)
        beta2 = tl.load(h + HYPER_BETA2)
        tl.store(to + SCALAR_W1, (1 - beta1).to(tl.float32))
        tl.store(to + SCALAR_W2, (1 - beta2).to(tl.float32))
        beta2_power = power(beta2, step)
        bc2 = 1 - beta2_power
        last = 2 / (1 - beta2) - 1
        rho = last - 2 * count.to(tl.float64) * beta2_power / bc2
        ratio = (rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)
        rectify = tl.load(h + HYPER_RECTIFY)
        rectified = (rectify != 0) & (rho > 5)
        early = (rectify != 0) & ~rectified
        waits = early & (rectify != RECTIFY)
        decay = tl.where(waits, 0.0, decay)
        step_size = lr / (1 - power(beta1, step)) * tl.where(rectified, tl.sqrt(ratio * bc2), 1.0)
        inv_sqrt_bc2 = tl.where(rectified, 1.0, 1 / tl.sqrt(bc2))
        tl.store(to + SCALAR_STEP_SIZE, tl.where(waits, 0.0, step_size).to(tl.float32))
        tl.store(to + SCALAR_INV_SQRT_BC2, tl.where(early, 0.0, inv_sqrt_bc2).to(tl.float32))
        tl.store(to + SCALAR_EPS, tl.where(early, 1.0, tl.load(h + HYPER_EPS)).to(tl.float32))
    else:
        momentum = tl.load(h + HYPER_MOMENTUM)
        flags = tl.load(h + HYPER_FLAGS).to(tl.int32)
        lr_in_momentum = flags & LR_IN_MOMENTUM != 0
        into = tl.where(lr_in_momentum, lr, 1.0)
        out = tl.where(lr_in_momentum, 1.0, lr)
        direct = (momentum == 0) | (flags & NESTEROV != 0)
        tl.store(to + SCALAR_MOMENTUM, momentum.to(tl.float32))
        tl.store(to + SCALAR_C1, (into * tl.where(step > 1, 1 - tl.load(h + HYPER_DAMPENING), 1.0)).to(tl.float32))
        tl.store(to + SCALAR_C2, out.to(tl.float32))
        tl.store(to + SCALAR_TAKE_G, tl.where(direct, into, 0.0).to(tl.float32))
        tl.store(to + SCALAR_TAKE_B, tl.where(direct, momentum, 1.0).to(tl.float32))
    tl.store(to + SCALAR_DECAY, decay.to(tl.float32))
