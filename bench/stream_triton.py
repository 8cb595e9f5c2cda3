"""The stream on a GPU."""

import triton
import triton.language as tl

BLOCK = 1024  # elements a program: 32 bytes of float32 a thread, two accesses of 16


@triton.jit
def stream_kernel(written, read, BLOCK: tl.constexpr):
    """Every array is read; into each of the written ones goes the sum of all."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(read)):
        total += tl.load(read[i] + at).to(tl.float32)
    for i in tl.static_range(len(written)):
        total += tl.load(written[i] + at).to(tl.float32)
    for i in tl.static_range(len(written)):
        tl.store(written[i] + at, total.to(written[i].dtype.element_ty))
