"""Sharpness-aware minimization (arXiv 2010.01412) around AdamW: the two gradients are a matter of the closure.

SAM steps along the gradient at θ + ρ g/‖g‖, the worst point nearby, and so prefers flat minima. Any optimizer that
takes a closure, as these do, can make the step.

    python examples/sam.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_adamw


def sam(model: nn.Module, loss_of: Callable[[], Tensor], rho: float = 0.05) -> Callable[[], Tensor]:
    """The closure of a SAM step: leaves the gradient at the perturbed weights, and the weights as they were.

    ``loss_of`` computes the loss of the batch; the closure returns its value at the unperturbed weights.
    """

    def closure() -> Tensor:
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        params = [p for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            kept = [p.clone() for p in params]  # (p + e) - e is not always p
            scale = rho / (nn.utils.get_total_norm([p.grad for p in params]) + 1e-12)
            for p in params:
                p.add_(scale * p.grad)
        model.zero_grad()
        loss_of().backward()
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)
        return loss.detach()

    return closure


def train(steps: int = 200, rho: float = 0.05, seed: int = 0) -> list[float]:
    """Losses of a small network in training."""
    torch.manual_seed(seed)
    x = torch.randn(256, 8)
    y = (x[:, :2].prod(1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = fused_adamw.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-3, decouple_lr=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        batch = torch.arange(32) + 32 * (step % 8)
        loss = optimizer.step(sam(model, lambda batch=batch: F.cross_entropy(model(x[batch]), y[batch]), rho))
        scheduler.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    losses = train()
    print(f"training loss: {sum(losses[:8]) / 8:.3f} at first, {sum(losses[-8:]) / 8:.3f} at last")


if __name__ == "__main__":
    main()
