"""Steps a whole model in one Triton launch: each program takes a chunk of a tensor, as tables tell it.

``fused_adamw/layout.py`` tells what is in the tables.
"""

import triton
import triton.language as tl

from .formats import (
    AVERAGES,
    QUANT_BLOCK,
    bf16,
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
    COL_EMA,
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
    HYPER_EMA_DECAY,
    HYPER_EMA_WARMUP,
    HYPER_EPS,
    HYPER_FINAL,
    HYPER_FLAGS,
    HYPER_GAMMA,
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
    SCALAR_EMA,
    SCALAR_EPS,
    SCALAR_GRAD_FACTOR,
    SCALAR_HI,
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
from .rules import adam, lerp, sgd

# Where the sum of squares of a chunk of up to 2^16 elements is at least this, what float32 lost below its range is less
# than a rounding. Less than it times SCALE_UP, and anything finite times SCALE_DOWN, has a square in the range.
LEAST_SUM = tl.constexpr(2.0**-80)
SCALE_UP = tl.constexpr(2.0**100)
SCALE_DOWN = tl.constexpr(2.0**-70)


@triton.jit
def stream(address, base, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to element ``base`` of the stream at an address."""
    address = address + base * (DTYPE.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the hint counts on the pointer only, not on the integer
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def place(rows, chunks, chunk):
    """Return a program's row, its first element, and the number of its elements: 0 where the step leaves it out."""
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    row = rows + tl.load(entry).to(tl.int64) * COLUMNS
    base = tl.load(entry + 1).to(tl.int64) * chunk
    numel = tl.load(row + COL_NUMEL)
    n = tl.minimum(numel - base, chunk).to(tl.int32)
    return row, base, tl.where(numel < 0, 0, n)


@triton.jit
def addresses_of(row, STATES: tl.constexpr, MASTER: tl.constexpr, CODES: tl.constexpr, EMA: tl.constexpr):
    """Return the addresses of a row in the order of its columns; that of the parameter for what it does not have."""
    p = tl.load(row + COL_PARAM)
    return (
        p,
        tl.load(row + COL_GRAD),
        tl.load(row + COL_STATE) if STATES > 0 else p,
        tl.load(row + COL_STATE + 1) if STATES > 1 else p,
        tl.load(row + COL_STATE + 2) if STATES > 2 else p,
        tl.load(row + COL_EXTRA) if MASTER != "none" else p,
        tl.load(row + COL_SCALES) if CODES else p,
        tl.load(row + COL_SCALES + 1) if CODES and STATES > 1 else p,
        tl.load(row + COL_EMA) if EMA != "none" else p,
    )


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
    row, addresses, base, begin, end, s, at,
    ALIGNED: tl.constexpr, RULE: tl.constexpr, STATES: tl.constexpr,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    MASTER: tl.constexpr, RANDOM_P: tl.constexpr, RANDOM_M: tl.constexpr, RANDOM_V: tl.constexpr,
    EMA: tl.constexpr, MEASURED: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Step elements [base + begin, base + end) of a row; an ALIGNED span is whole tiles and needs no mask.

    Return each thread's sums of the squares of gradients, updates and new parameters: where they are MEASURED.
    """
    CODES: tl.constexpr = STATE_DTYPE.is_int8()
    NO_FIRST: tl.constexpr = RULE == "adam_no_first_moment"
    param, grad, state0, state1, state2, extra, first_scales, second_scales, ema = addresses
    p_at = stream(param, base, P_DTYPE, ALIGNED)
    g_at = stream(grad, base, G_DTYPE, ALIGNED)
    EXTRA_DTYPE: tl.constexpr = P_DTYPE if MASTER == "kahan" else tl.int16 if MASTER == "split16" else tl.float32
    extra_at = stream(extra, base, EXTRA_DTYPE, ALIGNED)
    state0_at = stream(state0, base, STATE_DTYPE, ALIGNED)
    state1_at = stream(state1, base, STATE_DTYPE, ALIGNED)
    state2_at = stream(state2, base, STATE_DTYPE, ALIGNED)
    scales0_at = stream(first_scales, base // QUANT_BLOCK, tl.float32, False)
    scales1_at = stream(second_scales, base // QUANT_BLOCK, tl.float32, False)
    ema_at = stream(ema, base, tl.bfloat16 if EMA == "bf16" else tl.float32, ALIGNED)

    of_g = tl.zeros([THREADS], tl.float32)
    of_update, of_p = of_g, of_g
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
        m, v, vmax = g, g, g  # what the rule does not have
        if STATES > 0:
            m = load_moment(state0_at + i, scales0, mask, some, SECOND=NO_FIRST)
        if STATES > 1:
            v = load_moment(state1_at + i, scales1, mask, some, SECOND=True)
        if STATES > 2:
            vmax = load(state2_at + i, mask)
        average = load(ema_at + i, mask) if EMA == "fp32" else g
        if RANDOM_P or RANDOM_M or RANDOM_V:
            word = words(row, at, s[SCALAR_STEP].to(tl.uint32), start + first, end - start, ALIGNED)
            random_p = for_parameter(word) if RANDOM_P else None
            word_m = word if RANDOM_M or (NO_FIRST and RANDOM_V) else None
            word_v = word if RANDOM_V else None
        before = p
        if NO_FIRST:  # its second moment is m
            p, _, m, _ = adam(s, p, g, tl.zeros_like(g), m, vmax, RULE)
        elif STATES < 2:
            p, m = sgd(s, p, g, m, MOMENTUM=STATES == 1)
        else:
            p, m, v, vmax = adam(s, p, g, m, v, vmax, RULE)
        if MEASURED:
            of_g += squares(s[SCALAR_GRAD_FACTOR] * g, mask)
            of_update += squares(p - before, mask)
            of_p += squares(p, mask)
        if EMA == "fp32":
            store(ema_at + i, lerp(average, p, s[SCALAR_EMA]), mask)
        write(p_at + i, extra_at + i, p, random_p, mask, MASTER)
        if STATES > 1:
            store_moment(state1_at + i, scales1, v, word_v, mask, some, SECOND=True)
        if STATES > 0:
            store_moment(state0_at + i, scales0, m, word_m, mask, some, SECOND=NO_FIRST)
        if STATES > 2:
            store(state2_at + i, vmax, mask)
        if EMA == "bf16":  # last, when the registers of the moments are free
            word = words(row, at, s[SCALAR_STEP].to(tl.uint32), start + first, end - start, ALIGNED, AVERAGES)
            average = lerp(load(ema_at + i, mask), p, s[SCALAR_EMA])
            tl.store(ema_at + i, bf16(average, for_parameter(word)), mask)
    return of_g, of_update, of_p


@triton.jit
def squares(x, mask):
    """Return the sums of the squares of a tile's rows, without masked elements."""
    return tl.sum(x * x if mask is None else tl.where(mask, x * x, 0.0), axis=1)


@triton.jit
def scalar(at, given, which, first, second):
    """Return the scalar at an address, or where rows of scalars are given the first's or the second's."""
    return tl.load(at, mask=given == 0, other=tl.where(which == 0, first, second))


@triton.jit(do_not_specialize=["chunk", "sums", "given"])
def step_kernel(
    rows, chunks, scalars, factor, chunk, sums, given,
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10,
    RULE: tl.constexpr,
    P_DTYPE: tl.constexpr, G_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr,
    MASTER: tl.constexpr, RANDOM_P: tl.constexpr, RANDOM_M: tl.constexpr, RANDOM_V: tl.constexpr,
    EMA: tl.constexpr, MEASURED: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Step one entry of ``chunks`` per program; ``chunk`` is the elements of each, a multiple of QUANT_BLOCK.

    Where ``given`` is not 0, the rows of scalars are ``a0`` and on, and ``b0`` and on; else they lie at ``scalars``.
    Gradients are multiplied by ``factor``; where that is negative nothing is done. What is MEASURED of each program
    goes to float64 [3, programs] at the address ``sums``.
    """
    # No branch before all that the tables hold is asked for: the compiler would move loads behind it. This way four
    # loads wait for one another, of entry, row, scalars and data.
    f = tl.load(factor)
    row, base, n = place(rows, chunks, chunk)
    flags = tl.load(row + COL_FLAGS)
    k = tl.load(row + COL_SCALARS)
    at = scalars + k * SCALARS
    MAXIMUM: tl.constexpr = RULE == "adam_amsgrad" or RULE == "amsbound"
    ONE: tl.constexpr = RULE == "sgd_momentum" or RULE == "adam_no_first_moment"
    STATES: tl.constexpr = 0 if RULE == "sgd" else 1 if ONE else 3 if MAXIMUM else 2
    addresses = addresses_of(row, STATES, MASTER, STATE_DTYPE.is_int8(), EMA)
    s = (
        scalar(at, given, k, a0, b0), scalar(at + 1, given, k, a1, b1), f * scalar(at + 2, given, k, a2, b2),
        scalar(at + 3, given, k, a3, b3), scalar(at + 4, given, k, a4, b4), scalar(at + 5, given, k, a5, b5),
        scalar(at + 6, given, k, a6, b6), scalar(at + 7, given, k, a7, b7), scalar(at + 8, given, k, a8, b8),
        scalar(at + 9, given, k, a9, b9), scalar(at + 10, given, k, a10, b10),
    )  # fmt: skip
    DRAWS: tl.constexpr = RANDOM_P or RANDOM_M or RANDOM_V or EMA == "bf16"
    start = places(row, base) if DRAWS else None
    n = tl.where(f < 0, 0, n)
    if MEASURED:
        # Triton 3.4 and 3.5 cannot compile a branch here.
        whole = tl.where(flags & IS_ALIGNED != 0, n // (THREADS * WIDTH) * (THREADS * WIDTH), 0)
        x = step_span(row, addresses, base, 0, whole, s, start, True, RULE, STATES, P_DTYPE, G_DTYPE, STATE_DTYPE,
                      MASTER, RANDOM_P, RANDOM_M, RANDOM_V, EMA, True, THREADS, WIDTH)  # fmt: skip
        y = step_span(row, addresses, base, whole, n, s, start, False, RULE, STATES, P_DTYPE, G_DTYPE, STATE_DTYPE,
                      MASTER, RANDOM_P, RANDOM_M, RANDOM_V, EMA, True, THREADS, TAIL)  # fmt: skip
        to = sums.to(tl.int64).to(tl.pointer_type(tl.float64)) + tl.program_id(0)
        for k in tl.static_range(3):
            total = tl.sum((x[k] + y[k]).to(tl.float64))
            tl.store(to + k * tl.num_programs(0), total, mask=(f < 0) == 0)
        return
    whole = 0
    if flags & IS_ALIGNED != 0:
        whole = n // (THREADS * WIDTH) * (THREADS * WIDTH)
    # Two regions, so that neither keeps registers for the other.
    if whole > 0:
        step_span(row, addresses, base, 0, whole, s, start, True, RULE, STATES, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, RANDOM_P, RANDOM_M, RANDOM_V, EMA, False, THREADS, WIDTH)  # fmt: skip
    if whole < n:
        if STATE_DTYPE.is_int8():  # here, addresses that were kept would spill
            addresses = addresses_of(row, STATES, MASTER, STATE_DTYPE.is_int8(), EMA)
        step_span(row, addresses, base, whole, n, s, start, False, RULE, STATES, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, RANDOM_P, RANDOM_M, RANDOM_V, EMA, False, THREADS, TAIL)  # fmt: skip


@triton.jit
def add_squares(
    sums, g_at, begin, end, scale,
    ALIGNED: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the squares of scaled elements to the sums of threads: of a tile in float32, of all tiles in double."""
    own, _ = tile(ALIGNED, THREADS, WIDTH)
    for start in range(begin, end, THREADS * WIDTH):
        if ALIGNED:
            start = tl.multiple_of(start, THREADS * WIDTH)
        i = start + own
        g = scale * (load(g_at + i, None) if ALIGNED else tl.where(i < end, load(g_at + i, i < end), 0.0))
        sums += tl.sum(g * g, axis=1).to(tl.float64)
    return sums


@triton.jit
def sum_squares(address, base, n, whole, scale, G_DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sum of the squares of the scaled gradients of a chunk, of which ``whole`` are whole tiles."""
    sums = tl.zeros([THREADS], tl.float64)
    sums = add_squares(sums, stream(address, base, G_DTYPE, True), 0, whole, scale, True, THREADS, WIDTH)
    sums = add_squares(sums, stream(address, base, G_DTYPE, False), whole, n, scale, False, THREADS, 1)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["chunk"])
def square_kernel(rows, chunks, sums, chunk, G_DTYPE: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the sum of the squares of the gradients of each chunk, float64 [.].

    GPUs for graphics multiply doubles so slowly that a square in double would take longer than to read the element.
    """
    row, base, n = place(rows, chunks, chunk)
    address = tl.load(row + COL_GRAD)
    # Triton 3.4 and 3.5 cannot compile a branch here.
    whole = tl.where(tl.load(row + COL_FLAGS) & IS_ALIGNED != 0, n // (THREADS * WIDTH) * (THREADS * WIDTH), 0)
    total = sum_squares(address, base, n, whole, 1.0, G_DTYPE, THREADS, WIDTH)
    # Some square left the range of float32: again, scaled into it. A chunk of zeros is read twice, too.
    if (total < LEAST_SUM) | (total >= float("inf")):
        small = total < LEAST_SUM
        scale = tl.where(small, SCALE_UP, SCALE_DOWN)
        total = sum_squares(address, base, n, whole, scale, G_DTYPE, THREADS, WIDTH)
        unscale = tl.where(small, 1 / SCALE_UP, 1 / SCALE_DOWN).to(tl.float64)
        total *= unscale * unscale
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
        lr = lr * tl.load(rate.to(tl.pointer_type(tl.float64)))
    elif rate < 0:
        lr = lr * tl.load((~rate).to(tl.pointer_type(tl.float32))).to(tl.float64)
    to = scalars + row * SCALARS
    tl.store(to + SCALAR_STEP, count)
    ema_decay = tl.load(h + HYPER_EMA_DECAY)
    early = (1 + count.to(tl.float64)) / (10 + count.to(tl.float64))
    warms = (tl.load(h + HYPER_EMA_WARMUP) != 0) & (early < ema_decay)
    tl.store(to + SCALAR_EMA, (1 - tl.where(warms, early, ema_decay)).to(tl.float32))
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
        step_size = tl.where(waits, 0.0, step_size)
        inv_sqrt_bc2 = tl.where(early, 0.0, inv_sqrt_bc2)
        gamma = tl.load(h + HYPER_GAMMA)
        if gamma != 0:
            final = lr * tl.load(h + HYPER_FINAL)
            reach = gamma * count.to(tl.float64)
            near = final * reach / (reach + 1)
            far = final * (reach + 1) / reach
            step_size = step_size * tl.sqrt(bc2)
            inv_sqrt_bc2 = tl.where(final < 0, far, near)  # lo
            tl.store(to + SCALAR_HI, tl.where(final < 0, near, far).to(tl.float32))
        tl.store(to + SCALAR_STEP_SIZE, step_size.to(tl.float32))
        tl.store(to + SCALAR_INV_SQRT_BC2, inv_sqrt_bc2.to(tl.float32))
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
