"""What each format keeps of a small decay, and what it costs, cell by cell.

python examples/formats.py
"""

import warnings

# %% The formats: arguments of the optimizer, for bfloat16 parameters.
import torch

import fused_adamw

FORMATS = {
    "to nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "kahan": {"master": "kahan"},
    "split16": {"master": "split16"},
    "fp32 master": {"master": "fp32"},
    "split16, int8 moments": {"master": "split16", "state_dtype": "int8", "rounding": "stochastic"},
}


# %% 1000 steps of a decay of 1e-4, with zero gradients: 1 should become 0.905.
def decayed(options: dict, steps: int = 1000, n: int = 4096) -> tuple[float, float]:
    """Return the mean of the parameters after the steps, and the bytes of parameter and state for each."""
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    optimizer = fused_adamw.AdamW([p], lr=1e-3, weight_decay=0.1, **options)
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    held = p.nbytes + sum(value.nbytes for name, value in optimizer.state[p].items() if name != "step")
    return p.detach().float().mean().item(), held / n


# %% The table.
def main() -> None:
    warnings.filterwarnings("ignore", "Parameters in bfloat16 or float16")  # the first row is there to show it
    print(f"{'format':24}{'1 became':>10}{'bytes':>8}")
    for name, options in FORMATS.items():
        mean, size = decayed(options)
        print(f"{name:24}{mean:10.4f}{size:8.2f}")


if __name__ == "__main__":
    main()
