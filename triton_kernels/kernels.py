"""Compiles the Triton kernels of a variant without a launch, and launches them."""

import contextlib
import functools
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_adamw.contract import Clipping, Variant
from fused_adamw.layout import SCALARS

from .factor import CLIPS, SKIPS, factor_kernel, totals_kernel
from .multi_tensor import scalars_kernel, square_kernel, step_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
AVERAGES = {None: "none", torch.float32: "fp32", torch.bfloat16: "bf16"}
INTERPRETED = not hasattr(step_kernel, "device_caches")  # TRITON_INTERPRET=1 when triton was imported

# fp32 Adam takes 40 to 47 registers, so 40 to 48 warps fit a multiprocessor, and have 80 to 96 KiB of
# loads in flight: twice what 8 TB/s at a latency of 0.8 us asks for, with no pipelining.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
SCALARS_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
# One program adds all sums: 8 of them a thread at a time, 16 KiB in flight.
FACTOR, FACTOR_OPTIONS = {"BLOCK": 2048}, {"num_warps": 8, "enable_fp_fusion": False}
RUNTIME = triton.knobs.runtime
NOT_GIVEN = (0.0,) * (2 * SCALARS)
ADDRESS = 1 << 62  # a number that Triton takes for an int64


def config(variant: Variant, warp_size: int) -> tuple[dict, dict]:
    """Return the constexprs of ``step_kernel`` and the compile options; nothing is tuned on live tensors."""
    codes, random, averages = variant.state is torch.int8, variant.random_streams, variant.ema is not None
    constexprs = {
        "RULE": variant.rule,
        "P_DTYPE": DTYPES[variant.p],
        "G_DTYPE": DTYPES[variant.g],
        "STATE_DTYPE": DTYPES[variant.state],
        "MASTER": variant.master,
        "RANDOM_P": random.param,
        "RANDOM_M": random.first_moment,
        "RANDOM_V": random.second_moment,
        "EMA": AVERAGES[variant.ema],
        "MEASURED": variant.measured,
        "THREADS": NUM_WARPS * warp_size,
        # 16 bytes of fp32. With 8, a mix of 2 and 4 bytes reads the fp32 streams at a stride of 32 bytes (sector
        # efficiency 0.6), and Adam in 2 bytes spills.
        "WIDTH": 4,
        # 4 costs fp32 Adam 2 to 6 more registers; int8 and Philox need it, because they work on groups of 4 elements.
        "TAIL": 4 if codes or variant.draws else 2,
    }
    if not codes and not any(random):
        return constexprs, OPTIONS
    # Left to itself ptxas takes up to 96 registers, and spills; int8 with stochastic rounding or a master spills at 64,
    # with both on an sm_120 at 80, and, by two registers, the cautious rules on an sm_100 or an sm_120 and AdaBound on
    # an sm_100. Adam without a first moment on an sm_120 spills at 72, but not at 64; AMSBound with random words spills
    # two registers at 64, and four at 72. An average takes 8 or 16 more, and so does what is measured. With an average
    # in bfloat16 an sm_120 spills 10 registers, and an sm_100 2.
    beside = any(random) + (variant.master != "none") if codes else 0
    more = variant.rule in ("adam_cautious_decay", "adam_cautious_update", "adabound")
    more = more or (averages and variant.rule in ("adam_amsgrad", "amsbound"))
    most = (72 if more else 64, 80, 88)[beside] + (8 if codes else 16) * (averages + variant.measured)
    return constexprs, OPTIONS | {"maxnreg": most}


def square_constexprs(g: torch.dtype, warp_size: int) -> dict:
    """Return the constexprs of ``square_kernel``: 16 bytes per thread."""
    return {"G_DTYPE": DTYPES[g], "THREADS": NUM_WARPS * warp_size, "WIDTH": 16 // g.itemsize}


class Compiled:
    """Launches a kernel that is compiled for its arguments, without Triton's front end, which takes 12 us a launch.

    Hooks and profilers see the launch. Where this version of Triton launches compiled kernels in another way, and in
    its interpreter, the kernel is launched as any other.
    """

    def __init__(self, function: Any, arguments: tuple, constexprs: dict, options: dict) -> None:
        self.function, self.constexprs, self.options = function, constexprs, options
        self.kernel = None
        if INTERPRETED:
            return
        kernel = function.warmup(*arguments, grid=(1,), **constexprs, **options)
        kernel._init_handles()  # loads it onto the device, which its first launch may not do during a graph capture
        rest = [constexprs[name] for name in function.arg_names[len(arguments) :]]
        device = triton.runtime.driver.active.get_current_device()
        self.stream = functools.partial(triton.runtime.driver.active.get_current_stream, device)
        self.fixed = (kernel.function, kernel.packed_metadata, None, None, None)  # no hooks, nor what they are told
        with contextlib.suppress(Exception):  # whatever another version may raise; no program runs in this grid
            nothing = [0 if isinstance(x, torch.dtype) else x for x in arguments]
            kernel.run(0, 1, 1, self.stream(), *self.fixed, *nothing, *rest)
            self.kernel, self.run, self.rest = kernel, kernel.run, rest

    def __call__(self, programs: int, *arguments: Any) -> None:
        if self.kernel is None:
            self.function[(programs,)](*arguments, **self.constexprs, **self.options)
            return
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        if _has(RUNTIME.launch_enter_hook) or _has(RUNTIME.launch_exit_hook):
            self.kernel[(programs, 1, 1)](*addresses, *self.rest, stream=self.stream())
        else:
            self.run(programs, 1, 1, self.stream(), *self.fixed, *addresses, *self.rest)


def _has(hook: Any) -> bool:
    """Return whether a hook of Triton's calls anything: it may be None, or a chain that is empty."""
    return bool(getattr(hook, "calls", hook))


class TritonKernels:
    """Implements ``fused_adamw.gpu.Kernels`` for a variant on a device; raises what Triton raises."""

    def __init__(
        self, device: torch.device, variant: Variant, scales_gradients: bool = False, counts_on_device: bool = False
    ) -> None:
        self.variant = variant
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.warp_size = 32 if INTERPRETED else triton.runtime.driver.active.get_current_target().warp_size
            # A factor is 4 bytes of a tensor of its own, which torch aligns.
            arguments = (torch.int64, torch.int32, torch.float32, torch.float32, 1, ADDRESS, 0, *NOT_GIVEN)
            self._step = Compiled(step_kernel, arguments, *config(variant, self.warp_size))
            if scales_gradients:
                self._squares, self._factor  # noqa: B018
            if counts_on_device:
                self._scalars  # noqa: B018

    # The kernels that not every optimizer needs are compiled when they are first asked for.

    @functools.cached_property
    def _squares(self) -> Compiled:
        constexprs = square_constexprs(self.variant.g, self.warp_size)
        return Compiled(square_kernel, (torch.int64, torch.int32, torch.float64, 1), constexprs, OPTIONS)

    @functools.cached_property
    def _totals(self) -> Compiled:
        arguments = (torch.float64, torch.int64, torch.float64, torch.float32, ADDRESS)
        return Compiled(totals_kernel, arguments, FACTOR, FACTOR_OPTIONS)

    @functools.cached_property
    def _factor(self) -> Compiled:
        arguments = (torch.float64, torch.float32, 1, ADDRESS, 1, ADDRESS, ADDRESS, ADDRESS)
        return Compiled(factor_kernel, arguments, FACTOR, FACTOR_OPTIONS)

    @functools.cached_property
    def _scalars(self) -> Compiled:
        arguments = (torch.float64, torch.int64, torch.int64, torch.float32, torch.float32)
        return Compiled(scalars_kernel, arguments, {"ADAM": self.variant.is_adam}, SCALARS_OPTIONS)

    def step(
        self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor, sums: Tensor | None,
        given: tuple[float, ...],
    ) -> None:  # fmt: skip
        arguments = (rows, chunks, scalars, factor, chunk, address(sums), len(given), *(given or NOT_GIVEN))
        self._step(chunks.shape[0], *arguments)

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        self._squares(chunks.shape[0], rows, chunks, sums, chunk)

    def totals(self, sums: Tensor, bounds: Tensor, found: Tensor | None, totals: Tensor, flag: Tensor) -> None:
        self._totals(totals.shape[0], sums, bounds, totals, flag, address(found))

    def factor(self, sums: Tensor, clipping: Clipping, factor: Tensor, norm: Tensor | None) -> None:
        max_norm, skips, scale, found = clipping
        flags = CLIPS.value * (max_norm is not None) + SKIPS.value * skips
        bits, addresses = bits_of(max_norm or 0.0), map(address, (scale, found, norm))
        self._factor(1, sums, factor, sums.shape[0], bits, flags, *addresses)

    def scalars(self, hyper: Tensor, rates: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        self._scalars(steps.shape[0], hyper, rates, steps, factor, scalars)


@functools.lru_cache
def bits_of(x: float) -> int:
    """Return the bits of a float64 as a number."""
    return struct.unpack("q", struct.pack("d", x))[0]


def address(t: Tensor | None) -> int:
    """Return where a tensor is, 0 where there is none."""
    return 0 if t is None else t.data_ptr()
