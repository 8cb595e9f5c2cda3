"""Compiles the Triton kernels of a variant without a launch, and launches them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_adamw.contract import Variant

from .multi_tensor import scalars_kernel, square_kernel, step_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
INTERPRETED = not hasattr(step_kernel, "device_caches")  # TRITON_INTERPRET=1 when triton was imported

# fp32 Adam takes 40 to 47 registers, so 40 to 48 warps fit a multiprocessor, and have 80 to 96 KiB of
# loads in flight: twice what 8 TB/s at a latency of 0.8 us asks for, with no pipelining.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
SCALARS_OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def config(variant: Variant, warp_size: int) -> tuple[dict, dict]:
    """Return the constexprs of ``step_kernel`` and the compile options; nothing is tuned on live tensors."""
    codes, random = variant.state is torch.int8, variant.random_streams
    constexprs = {
        "RULE": variant.rule,
        "P_DTYPE": DTYPES[variant.p],
        "G_DTYPE": DTYPES[variant.g],
        "STATE_DTYPE": DTYPES[variant.state],
        "MASTER": variant.master,
        "RANDOM_P": random.param,
        "RANDOM_M": random.first_moment,
        "RANDOM_V": random.second_moment,
        "THREADS": NUM_WARPS * warp_size,
        # 16 bytes of fp32. With 8, a mix of 2 and 4 bytes reads the fp32 streams at a stride of 32 bytes (sector
        # efficiency 0.6), and Adam in 2 bytes spills.
        "WIDTH": 4,
        # 4 costs fp32 Adam 2 to 6 more registers; int8 and Philox need it, because they work on groups of 4 elements.
        "TAIL": 4 if codes or any(random) else 2,
    }
    if not codes and not any(random):
        return constexprs, OPTIONS
    # Left to itself ptxas takes up to 96 registers, and spills; int8 with stochastic rounding or a master spills at 64.
    more = codes and (any(random) or variant.master != "none")
    return constexprs, OPTIONS | {"maxnreg": 80 if more else 64}


def square_constexprs(g: torch.dtype, warp_size: int) -> dict:
    """Return the constexprs of ``square_kernel``: 16 bytes per thread."""
    return {"G_DTYPE": DTYPES[g], "THREADS": NUM_WARPS * warp_size, "WIDTH": 16 // g.itemsize}


class TritonKernels:
    """Implements ``fused_adamw.gpu.Kernels`` for a variant on a device; raises what Triton raises."""

    def __init__(self, device: torch.device, variant: Variant) -> None:
        self.is_adam = variant.is_adam
        if INTERPRETED:
            self._configure(variant, 32)
            return
        with torch.cuda.device(device):
            self._configure(variant, triton.runtime.driver.active.get_current_target().warp_size)
            # A factor is 4 bytes of a tensor of its own, which torch aligns.
            step = (torch.int64, torch.int32, torch.float32, torch.float32, 1)
            kernel = step_kernel.warmup(*step, grid=(1,), **self.constexprs, **self.options)
            kernel._init_handles()  # loads it onto the device, which its first launch may not do during a graph capture

    def _configure(self, variant: Variant, warp_size: int) -> None:
        self.constexprs, self.options = config(variant, warp_size)
        self.squares = square_constexprs(variant.g, warp_size)

    def step(self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor) -> None:
        step_kernel[(len(chunks),)](rows, chunks, scalars, factor, chunk, **self.constexprs, **self.options)

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        square_kernel[(len(chunks),)](rows, chunks, sums, chunk, **self.squares, **self.options)

    def scalars(self, hyper: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        scalars_kernel[(len(steps),)](hyper, steps, factor, scalars, ADAM=self.is_adam, **SCALARS_OPTIONS)
