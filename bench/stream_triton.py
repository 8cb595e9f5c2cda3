"""Stream on a GPU."""

import torch
import triton
import triton.language as tl


def block_of(dtypes: set[torch.dtype]) -> int:
    """Return the elements of a program of 128 threads, 8 a thread, or 4 where widths are mixed.

    Where widths are mixed, 8 elements a thread of the narrow dtype would be laid out otherwise than 4 of the wide one,
    and every block would change its layout through shared memory.
    """
    return 1024 if len({dtype.itemsize for dtype in dtypes}) == 1 else 512


@triton.jit
def stream_kernel(written, read, BLOCK: tl.constexpr):
    """Read every array, and write the mean of all, which stays in range, into each of the written ones."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(len(read)):
        total += tl.load(read[i] + at).to(tl.float32)
    for i in tl.static_range(len(written)):
        total += tl.load(written[i] + at).to(tl.float32)
    for i in tl.static_range(len(written)):
        tl.store(written[i] + at, (total * (1.0 / (len(read) + len(written)))).to(written[i].dtype.element_ty))
