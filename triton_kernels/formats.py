"""How a value is stored, for Triton: read exactly into fp32, written with one rounding, to nearest even."""

import triton
import triton.language as tl


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask).to(tl.float32)


@triton.jit
def store(pointers, x, mask):
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)
