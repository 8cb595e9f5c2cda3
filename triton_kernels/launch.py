"""The Triton kernels of a bucket, compiled without a launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import (
    SCALARS_OPTIONS,
    Variant,
    config,
    scalars_kernel,
    square_constexprs,
    square_kernel,
    step_kernel,
)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
INTERPRETED = not hasattr(step_kernel, "device_caches")  # TRITON_INTERPRET=1 when triton was imported


class TritonKernels:
    """``fused_adamw.launch.Kernels`` of a rule and its formats on a device; raises what Triton raises."""

    def __init__(
        self,
        device: torch.device,
        rule: str,
        p: torch.dtype,
        g: torch.dtype,
        state: torch.dtype,
        master: str,
        stochastic: bool,
    ) -> None:
        variant = Variant(rule, DTYPES[p], DTYPES[g], DTYPES[p if rule == "sgd" else state], master, stochastic)
        self.adam = rule.startswith("adam")
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
        self.squares = square_constexprs(variant.g_dtype, warp_size)

    def step(self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor) -> None:
        step_kernel[(len(chunks),)](rows, chunks, scalars, factor, chunk, **self.constexprs, **self.options)

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        square_kernel[(len(chunks),)](rows, chunks, sums, chunk, **self.squares, **self.options)

    def scalars(self, hyper: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        scalars_kernel[(len(steps),)](hyper, steps, factor, scalars, ADAM=self.adam, **SCALARS_OPTIONS)
