"""Train small convolutional networks on scikit-learn's digits, many at a time, for ``bench paper``.

Networks that differ in seed, learning rate and weight decay are stacked, so that one forward and backward pass serves
all of them, and each is a parameter group of one optimizer, whose step is one launch for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

import fused_adamw

# With more images to train on, every weight decay gives the same error.
TRAINING, BATCH = 256, 16
STEPS_PER_EPOCH = TRAINING // BATCH
CHUNK = 128  # images at a time that are only evaluated

PAPERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "lr_in_momentum": True},
    "SGDW": {"momentum": 0.9, "lr_in_momentum": True, "decouple_lr": True},
    "Adam": {},
    "AdamW": {"decouple_lr": True},
}
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int], LRScheduler]] = {
    "fixed": lambda optimizer, epochs: ConstantLR(optimizer, 1.0),
    "step": lambda optimizer, epochs: MultiStepLR(optimizer, [epochs * STEPS_PER_EPOCH * k // 4 for k in (2, 3)], 0.1),
    "cosine": lambda optimizer, epochs: CosineAnnealingLR(optimizer, epochs * STEPS_PER_EPOCH),
    "restarts": lambda optimizer, epochs: fused_adamw.CosineWarmRestarts(
        optimizer, epochs / 15, 2, steps_per_epoch=STEPS_PER_EPOCH, normalized_decay=True
    ),  # four cycles: 1 + 2 + 4 + 8 = 15
}


@dataclass(frozen=True)
class Batch:
    """Describe networks to train side by side."""

    algorithm: str  # a key of PAPERS
    schedule: str  # a key of SCHEDULES
    epochs: int
    every: int  # epochs between two evaluations
    cells: tuple[tuple[float, float, int], ...]  # (learning rate, weight decay, seed) of each network


def network(seed: int) -> nn.Module:
    """Make two convolutions and a linear layer, 3,842 parameters. GroupNorm, unlike BatchNorm, sees one image alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(1, 8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (n, 1, 8, 8), of mean 0 and variance 1, and labels: to train on, and the other 1,541 to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:TRAINING], order[TRAINING:]
    return images[seen], labels[seen], images[unseen], labels[unseen]


def optimizer_of(batch: Batch, stacks: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Make the batch's optimizer: a group for each network, whose parameters and gradients are views of the stacks."""
    groups = []
    for k, (lr, decay, _) in enumerate(batch.cells):
        params = [nn.Parameter(stack.detach()[k]) for stack in stacks.values()]
        for p, stack in zip(params, stacks.values(), strict=True):
            p.grad = stack.grad[k]
        groups.append({"params": params, "lr": lr, "weight_decay": decay})
    return getattr(fused_adamw, batch.algorithm)(groups, **PAPERS[batch.algorithm])


def train(batch: Batch) -> dict[str, list]:
    """Train the networks of a batch.

    Returns "epochs", those after which there was an evaluation, and for each of the networks a list of the test errors
    (between 0 and 1) and of the training losses (nats) then: "errors", "losses". The last evaluation is at the end.
    """
    seeds = sorted({seed for _, _, seed in batch.cells})
    of = torch.tensor([seeds.index(seed) for _, _, seed in batch.cells])
    x, y, test_x, test_y = (torch.stack(part) for part in zip(*map(digits, seeds), strict=True))
    stacks, _ = stack_module_state([network(seed) for _, _, seed in batch.cells])
    for stack in stacks.values():
        stack.grad = torch.zeros_like(stack)
    template = network(0)
    predict = vmap(lambda params, images: functional_call(template, params, images))
    optimizer = optimizer_of(batch, stacks)
    schedule = SCHEDULES[batch.schedule](optimizer, batch.epochs)

    shuffles = [torch.Generator().manual_seed(seed) for seed in seeds]
    found: dict[str, list] = {"epochs": [], "errors": [], "losses": []}
    for epoch in range(1, batch.epochs + 1):
        orders = torch.stack([torch.randperm(TRAINING, generator=g) for g in shuffles])
        for picked in orders.split(BATCH, dim=1):
            rows = torch.arange(len(seeds)).unsqueeze(1)
            logits = predict(stacks, x[rows, picked][of])
            for stack in stacks.values():
                stack.grad.zero_()
            F.cross_entropy(logits.flatten(0, 1), y[rows, picked][of].flatten(), reduction="sum").div(BATCH).backward()
            optimizer.step()
            schedule.step()
        if epoch % batch.every == 0 or epoch == batch.epochs:
            logits = evaluate(predict, stacks, test_x[of])
            found["errors"].append((logits.argmax(2) != test_y[of]).double().mean(1).tolist())
            logits = evaluate(predict, stacks, x[of])
            losses = F.cross_entropy(logits.transpose(1, 2), y[of], reduction="none")
            found["losses"].append(losses.mean(1).tolist())
            found["epochs"].append(epoch)
    return {
        key: value if key == "epochs" else [list(row) for row in zip(*value, strict=True)]
        for key, value in found.items()
    }


@torch.no_grad()
def evaluate(predict: Callable[..., Tensor], stacks: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits (networks, images, 10)."""
    return torch.cat([predict(stacks, part) for part in images.split(CHUNK, dim=1)], dim=1)
