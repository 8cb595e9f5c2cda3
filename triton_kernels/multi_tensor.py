"""The step of a whole model as one Triton launch: a program takes a chunk of a tensor, as tables tell it.

The tables are those of ``fused_adamw/launch.py``.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

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
from .rules import adam, sgd


@dataclass(frozen=True)
class Variant:
    """What a compiled kernel depends on, besides the architecture."""

    rule: str  # "adam", "adam_amsgrad", "sgd", "sgd_momentum"
    p_dtype: tl.dtype
    g_dtype: tl.dtype
    state_dtype: tl.dtype  # int8: codes, with a scale for each QUANT_BLOCK of them
    master: str = "none"  # "kahan", "split16", "fp32"
    stochastic: bool = False


COLUMNS = tl.constexpr(16)  # of a row
SCALARS = tl.constexpr(9)  # of a row of scalars, of which the last is the step


@triton.jit
def stream(row, column: tl.constexpr, base, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to element ``base`` of a stream of a row."""
    address = tl.load(row + column) + base * (DTYPE.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # the hint counts on the pointer only, not on the integer
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def place(rows, chunks, chunk):
    """A program's row, its first element, and the number of its elements."""
    entry = chunks + tl.program_id(0).to(tl.int64) * 2
    row = rows + tl.load(entry).to(tl.int64) * COLUMNS
    base = tl.load(entry + 1).to(tl.int64) * chunk
    n = tl.minimum(tl.load(row + 5) - base, chunk).to(tl.int32)
    return row, base, n


@triton.jit
def tile(ALIGNED: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Elements of a block of them, [THREADS, WIDTH], and the first of each thread.

    A thread has neighbours where it can access them at once, and else every 32nd, so that 32 threads do. Either way
    32 threads have 32 * WIDTH elements that follow one another.
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
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Step elements [base + begin, base + end) of a row; an ALIGNED span is whole tiles and needs no mask."""
    ADAM: tl.constexpr = RULE == "adam" or RULE == "adam_amsgrad"
    CODES: tl.constexpr = STATE_DTYPE.is_int8()
    RANDOM_P: tl.constexpr = STOCHASTIC and P_DTYPE.is_bf16() and MASTER == "none"
    RANDOM_M: tl.constexpr = STOCHASTIC and CODES
    RANDOM_V: tl.constexpr = RANDOM_M or (STOCHASTIC and ADAM and STATE_DTYPE.is_bf16())
    p_at = stream(row, 0, base, P_DTYPE, ALIGNED)
    g_at = stream(row, 1, base, G_DTYPE, ALIGNED)
    extra_at = p_at
    if MASTER != "none":
        EXTRA_DTYPE: tl.constexpr = P_DTYPE if MASTER == "kahan" else tl.int16 if MASTER == "split16" else tl.float32
        extra_at = stream(row, 8, base, EXTRA_DTYPE, ALIGNED)
    if RULE != "sgd":
        state0_at = stream(row, 2, base, STATE_DTYPE, ALIGNED)
    if ADAM:
        state1_at = stream(row, 3, base, STATE_DTYPE, ALIGNED)
    if RULE == "adam_amsgrad":
        state2_at = stream(row, 4, base, STATE_DTYPE, ALIGNED)
    if CODES:
        scales0_at = stream(row, 9, base // QUANT_BLOCK, tl.float32, False)
        scales1_at = stream(row, 10, base // QUANT_BLOCK, tl.float32, False)

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
        if RANDOM_P or RANDOM_V:
            word = words(row, at, s[8].to(tl.uint32), start + first, end - start, ALIGNED)
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
    MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    THREADS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One program per entry of ``chunks``; ``chunk`` is the number of elements of each, a multiple of 8.

    Gradients are multiplied by ``factor``; where that is negative nothing is done.
    """
    f = tl.load(factor)
    if f < 0:
        return
    row, base, n = place(rows, chunks, chunk)
    start = places(row, base) if STOCHASTIC else None
    at = scalars + tl.load(row + 6) * SCALARS
    s = (tl.load(at), tl.load(at + 1), f * tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
         tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8))  # fmt: skip
    whole = 0
    if tl.load(row + 7) & 1 != 0:
        whole = n // (THREADS * WIDTH) * (THREADS * WIDTH)
    # In regions of their own, so that nothing either needs is kept for both: fp32 Adam takes 41 to 43 registers on
    # sm_80 to 90 instead of 45 or 46.
    if whole > 0:
        step_span(row, base, 0, whole, s, start, True, RULE, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, STOCHASTIC, THREADS, WIDTH)  # fmt: skip
    if whole < n:
        step_span(row, base, whole, n, s, start, False, RULE, P_DTYPE, G_DTYPE, STATE_DTYPE,
                  MASTER, STOCHASTIC, THREADS, TAIL)  # fmt: skip


@triton.jit
def add_squares(
    sums, row, base, begin, end, ALIGNED: tl.constexpr, G_DTYPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In double: a square of a float is exact, and neither overflows nor underflows."""
    g_at = stream(row, 1, base, G_DTYPE, ALIGNED)
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
    """The sums of the squares of the gradients of each chunk, float64 [.]."""
    row, base, n = place(rows, chunks, chunk)
    whole = 0
    if tl.load(row + 7) & 1 != 0:
        whole = n // BLOCK * BLOCK
    total = tl.sum(add_squares(tl.zeros([BLOCK], tl.float64), row, base, 0, whole, True, G_DTYPE, BLOCK))
    total += tl.sum(add_squares(tl.zeros([TAIL], tl.float64), row, base, whole, n, False, G_DTYPE, TAIL))
    tl.store(sums + tl.program_id(0), total)


@triton.jit
def power(x, n):
    """x ** n for a whole n >= 0, within n ulp; by squaring, since Triton's interpreter has no pow."""
    y = x * 0 + 1
    while n > 0:
        if n & 1 != 0:
            y = y * x
        x = x * x
        n = n >> 1
    return y


@triton.jit
def scalars_kernel(hyper, steps, factor, scalars, ADAM: tl.constexpr):
    """Compute the scalar rows on the device: ``fused_adamw/scalars.py`` in Triton, for ``launch.Kernels.scalars``."""
    if tl.load(factor) < 0:
        return
    row = tl.program_id(0).to(tl.int64)
    h = hyper + row * 8
    counter = tl.load(steps + row).to(tl.pointer_type(tl.float32))
    count = tl.load(counter) + 1
    tl.store(counter, count)
    step = count.to(tl.int32)
    lr = tl.load(h)
    to = scalars + row * SCALARS
    tl.store(to + 8, count)
    tl.store(to, (lr / tl.load(h + 1) * tl.load(h + 2)).to(tl.float32))
    tl.store(to + 1, tl.load(h + 3).to(tl.float32))
    tl.store(to + 2, tl.load(h + 4).to(tl.float32))
    if ADAM:
        beta1 = tl.load(h + 5)
        beta2 = tl.load(h + 6)
        tl.store(to + 3, (1 - beta1).to(tl.float32))
        tl.store(to + 4, (1 - beta2).to(tl.float32))
        tl.store(to + 5, (lr / (1 - power(beta1, step))).to(tl.float32))
        tl.store(to + 6, (1 / tl.sqrt(1 - power(beta2, step))).to(tl.float32))
        tl.store(to + 7, tl.load(h + 7).to(tl.float32))
    else:
        momentum = tl.load(h + 5)
        flags = tl.load(h + 7).to(tl.int32)
        lr_in_momentum = flags & 2 != 0
        into = tl.where(lr_in_momentum, lr, 1.0)
        out = tl.where(lr_in_momentum, 1.0, lr)
        direct = (momentum == 0) | (flags & 1 != 0)
        tl.store(to + 3, momentum.to(tl.float32))
        tl.store(to + 4, (into * tl.where(step > 1, 1 - tl.load(h + 6), 1.0)).to(tl.float32))
        tl.store(to + 5, out.to(tl.float32))
        tl.store(to + 6, tl.where(direct, into, 0.0).to(tl.float32))
        tl.store(to + 7, tl.where(direct, momentum, 1.0).to(tl.float32))


# fp32 Adam takes 40 to 47 registers, so 40 to 48 warps fit a multiprocessor, and have 80 to 96 KiB of
# loads in flight: twice what 8 TB/s at a latency of 0.8 us asks for, with no pipelining.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
SCALARS_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def config(variant: Variant, warp_size: int) -> tuple[dict, dict]:
    """(constexprs of ``step_kernel``, compile options): static: nothing is tuned on live tensors."""
    codes = variant.state_dtype == tl.int8
    constexprs = {
        "RULE": variant.rule,
        "P_DTYPE": variant.p_dtype,
        "G_DTYPE": variant.g_dtype,
        "STATE_DTYPE": variant.state_dtype,
        "MASTER": variant.master,
        "STOCHASTIC": variant.stochastic,
        "THREADS": NUM_WARPS * warp_size,
        # 16 bytes of fp32. With 8, a mix of 2 and 4 bytes reads the fp32 streams at a stride of 32 bytes (sector
        # efficiency 0.6), and Adam in 2 bytes spills.
        "WIDTH": 4,
        # fp32 Adam takes 2 to 6 registers more with 4, which blocks of codes and the words of a counter come in.
        "TAIL": 4 if codes or variant.stochastic else 2,
    }
    if not codes and not variant.stochastic:
        return constexprs, OPTIONS
    # Left to itself ptxas takes up to 96 registers, and spills; codes beside words or a master would spill at 64.
    more = codes and (variant.stochastic or variant.master != "none")
    return constexprs, OPTIONS | {"maxnreg": 80 if more else 64}


def square_constexprs(g_dtype: tl.dtype, warp_size: int) -> dict:
    """Those of ``square_kernel``: 16 bytes per thread."""
    threads = NUM_WARPS * warp_size
    return {"G_DTYPE": g_dtype, "BLOCK": 128 // g_dtype.primitive_bitwidth * threads, "TAIL": 2 * threads}


def compile_for(target: GPUTarget, variant: Variant) -> CompiledKernel:
    """Compile ``step_kernel`` ahead of time; needs no GPU."""
    constexprs, options = config(variant, target.warp_size)
    signature = {"rows": "*i64", "chunks": "*i32", "scalars": "*fp32", "factor": "*fp32", "chunk": "i32"}
    return _compile(step_kernel, target, signature, constexprs, options)


def compile_squares_for(target: GPUTarget, g_dtype: tl.dtype) -> CompiledKernel:
    """Compile ``square_kernel`` ahead of time."""
    constexprs = square_constexprs(g_dtype, target.warp_size)
    signature = {"rows": "*i64", "chunks": "*i32", "sums": "*fp64", "chunk": "i32"}
    return _compile(square_kernel, target, signature, constexprs, OPTIONS)


def compile_scalars_for(target: GPUTarget, adam: bool) -> CompiledKernel:
    """Compile ``scalars_kernel`` ahead of time."""
    signature = {"hyper": "*fp64", "steps": "*i64", "factor": "*fp32", "scalars": "*fp32"}
    return _compile(scalars_kernel, target, signature, {"ADAM": adam}, SCALARS_OPTIONS)


def _compile(kernel, target, signature, constexprs, options):
    signature = signature | dict.fromkeys(constexprs, "constexpr")
    tables = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    return triton.compile(ASTSource(kernel, signature, constexprs, tables), target=target, options=options)
