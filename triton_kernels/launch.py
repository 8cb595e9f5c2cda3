"""The Triton kernels of a bucket, compiled without a launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import SCALARS_OPTIONS, Variant, config, scalars_kernel, step_kernel

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = not hasattr(step_kernel, "device_caches")  # TRITON_INTERPRET=1 when triton was imported


class TritonKernels:
    """``fused_adamw.launch.Kernels`` of a rule and its dtypes on a device; raises what Triton raises."""

    def __init__(self, device: torch.device, rule: str, p: torch.dtype, g: torch.dtype, state: torch.dtype) -> None:
        variant = Variant(rule, DTYPES[p], DTYPES[g], DTYPES[p if rule == "sgd" else state])
        self.adam = rule.startswith("adam")
        if INTERPRETED:
            self.constexprs, self.options = config(variant, 32)
            return
        with torch.cuda.device(device):
            warp_size = triton.runtime.driver.active.get_current_target().warp_size
            self.constexprs, self.options = config(variant, warp_size)
            tables = (torch.int64, torch.int32, torch.float32)
            step_kernel.warmup(*tables, 1, grid=(1,), **self.constexprs, **self.options)

    def step(self, rows: Tensor, chunks: Tensor, scalars: Tensor, chunk: int) -> None:
        step_kernel[(len(chunks),)](rows, chunks, scalars, chunk, **self.constexprs, **self.options)

    def scalars(self, hyper: Tensor, steps: Tensor, scalars: Tensor) -> None:
        scalars_kernel[(len(steps),)](hyper, steps, scalars, ADAM=self.adam, **SCALARS_OPTIONS)
