"""Prints a digest of everything that a few steps write, a line for each optimizer and format.

Two machines print the same: the values they begin with are made by operations that are exact everywhere.
"""

import hashlib
import math
import warnings

import torch

from tests import cases

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORMATS = [
    *((dtype, {}) for dtype in (F32, BF16, F16, F64)),
    (F32, {"max_grad_norm": 0.5}),
    (BF16, {"max_grad_norm": 0.5}),
    (F32, {"state_dtype": "int8"}),
    (F32, {"state_dtype": "int8", "rounding": "stochastic"}),
    (BF16, {"state_dtype": BF16}),
    (BF16, {"state_dtype": BF16, "rounding": "stochastic"}),
    (BF16, {"state_dtype": F16}),
    (F32, {"ema_dtype": BF16}),
    *((BF16, {"master": master}) for master in ("kahan", "split16", "fp32")),
    (BF16, {"master": "split16", "state_dtype": "int8", "rounding": "stochastic"}),
]
SHAPES = [(), (0,), (1,), (65,), (17, 31), (20_003,)]  # the last is for more than one thread
POWERS = torch.tensor([2.0**-k for k in range(20, 60)], dtype=F64)
SPECIAL = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-42, -1e30], dtype=F64)


def numbers(like: torch.Tensor, generator: torch.Generator, special: bool) -> torch.Tensor:
    """Numbers with 25 bits, of 40 magnitudes; ``special`` ones end a long tensor."""
    digits = torch.randint(-(2**24), 2**24, like.shape, generator=generator)
    made = digits * POWERS[torch.randint(len(POWERS), like.shape, generator=generator)]
    if special and like.dim() == 1 and len(like) > len(SPECIAL):
        made[-len(SPECIAL) :] = SPECIAL
    return made.to(like.dtype)


def digest(name: str, options: dict, dtype: torch.dtype, ours: dict) -> str:
    """Step three times. Any NaN counts as the same, because its bits are the processor's."""
    generator = torch.Generator().manual_seed(0)
    special = "max_grad_norm" not in ours  # else every gradient would become NaN
    params = [torch.nn.Parameter(numbers(torch.empty(s, dtype=dtype), generator, special)) for s in SHAPES]
    optimizer = cases.make(name, params, options, backend="cpu", **ours)
    for _ in range(3):
        for p in params:
            p.grad = numbers(p, generator, special)
        optimizer.step()
    found = hashlib.sha256()
    for tensor in cases.tensors_of(optimizer).values():
        one_nan = torch.where(tensor.isnan(), math.nan, tensor) if tensor.is_floating_point() else tensor
        found.update(one_nan.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # of what narrow formats lose
    for name, options in cases.SHARED + cases.OURS:
        for dtype, ours in FORMATS:
            maximum = options.get("amsgrad") or options.get("amsbound")
            if not (maximum and ours.get("state_dtype") == "int8"):  # which is refused
                print(cases.name_of([name, options, dtype, ours]), digest(name, options, dtype, ours))
