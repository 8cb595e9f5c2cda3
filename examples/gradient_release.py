"""How much gradients are in memory at a time, with and without gradient release, cell by cell.

python examples/gradient_release.py
"""

# %% A model of 16 layers, whose gradients take as much memory as its parameters.
import torch
from torch import nn

import fused_adamw


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])


# %% Count the bytes of gradients after each gradient comes.
def train(bucket_mb: float | None, steps: int = 3) -> tuple[nn.Module, int]:
    """Return the trained model and the most bytes of gradients that were in memory; None releases nothing."""
    model, most = network(), 0

    def watch(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)
    groups = fused_adamw.param_groups(model, weight_decay=0.1)  # biases do not decay
    optimizer = fused_adamw.AdamW(groups, lr=1e-3)
    if bucket_mb is not None:
        fused_adamw.release_gradients(model, optimizer, bucket_mb)
    for _ in range(steps):
        model(torch.ones(8, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, most


# %% The same weights, to the bit.
def main() -> None:
    print(f"backends: {fused_adamw.capabilities()['steps']}")
    plain, most = train(None)
    print(f"without release   {most / 2**20:6.2f} MB of gradients")
    for bucket_mb in (1, 0):
        model, most = train(bucket_mb)
        same = all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        print(f"buckets of {bucket_mb} MB   {most / 2**20:6.2f} MB of gradients, the same bits: {same}")


if __name__ == "__main__":
    main()
