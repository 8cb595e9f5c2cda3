"""Muon for the matrices of a model beside AdamW for the rest, as one optimizer: one state dict, one scheduler.

    python examples/muon.py

``torch.optim.Muon`` came with torch 2.9.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fused_adamw


class Together(torch.optim.Optimizer):
    """Steps several optimizers as one. Its groups are theirs, so a scheduler drives them all."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def optimizer_of(model: nn.Module) -> Together:
    """Give the hidden matrices to Muon, and the first and last layers, biases and norms to AdamW."""
    matrices = [p for layer in list(model)[1:-1] for p in layer.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01)
    return Together(muon, fused_adamw.AdamW(others, lr=3e-3, weight_decay=0.0))


def train(steps: int = 60, seed: int = 0) -> list[float]:
    """Return the losses of a small network in training."""
    torch.manual_seed(seed)
    x = torch.randn(256, 8)
    y = (x[:, :2].prod(1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    losses = train()
    print(f"training loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
