"""Averaging the weights at the end of each restart cycle: AdamWR with torch.optim.swa_utils.

A cycle of cosine annealing ends in a minimum, the next restart leaves it for another one. The average of the networks
at the ends of the cycles tends to lie in a flatter part of the loss than each of them (SWA, arXiv 1803.05407). The
first cycles, from which the network still learns much, are left out.

    python examples/swa_restarts.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, update_bn

import fused_adamw


def spirals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (n, 2) of three noisy spiral arms, and the arm of each."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(3, (n,), generator=generator)
    radius = torch.rand(n, generator=generator)
    angle = 4 * radius + arm * 2.1 + 0.25 * torch.randn(n, generator=generator)
    return radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1), arm


def train(cycles: int = 10, first: int = 2, T_0: int = 4, seed: int = 0) -> tuple[nn.Module, AveragedModel, list]:
    """Return the network, the average of its weights at the end of each cycle from the first on, and those weights."""
    torch.manual_seed(seed)
    x, y = spirals(512, seed)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    average = AveragedModel(model)
    ends = []

    batches = list(zip(x.split(32), y.split(32), strict=True))
    optimizer = fused_adamw.AdamW(fused_adamw.param_groups(model, 0.05), lr=1e-2, decouple_lr=True)
    scheduler = fused_adamw.CosineWarmRestarts(optimizer, T_0, steps_per_epoch=len(batches), normalized_decay=True)
    for _ in range(cycles * T_0):
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle = scheduler.cycle
            scheduler.step()
            if scheduler.cycle > cycle >= first:  # the step just made was the last of its cycle
                average.update_parameters(model)
                ends.append([p.detach().clone() for p in model.parameters()])
    update_bn([batch for batch, _ in batches], average)  # the averaged weights have activations of their own
    return model, average, ends


@torch.no_grad()
def sharpness(network: nn.Module, x: Tensor, y: Tensor, size: float = 0.1) -> float:
    """Rise of the loss under random changes of the weights by a tenth of their norm, on average."""
    generator = torch.Generator().manual_seed(0)
    params = dict(network.named_parameters())
    flat = F.cross_entropy(network(x), y)
    rises = []
    for _ in range(20):
        noise = {name: torch.randn(p.shape, generator=generator) for name, p in params.items()}
        moved = {name: p + size * p.norm() / noise[name].norm() * noise[name] for name, p in params.items()}
        rises.append(F.cross_entropy(functional_call(network, moved, (x,)), y) - flat)
    return torch.stack(rises).mean().item()


def main() -> None:
    model, average, ends = train()
    x, y = spirals(4096, seed=1)
    print(f"{len(ends)} networks are averaged")
    for name, network in (("last network", model.eval()), ("average of the cycles' ends", average.eval())):
        with torch.no_grad():
            error = (network(x).argmax(1) != y).float().mean()
        print(f"{name:28} test error {error:.1%}, loss rises by {sharpness(network, x, y):.3f} nearby")


if __name__ == "__main__":
    main()
