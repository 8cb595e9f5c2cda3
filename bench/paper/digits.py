"""Train small convolutional networks on scikit-learn's digits, many at a time, for ``bench paper``.

Networks that differ in seed, learning rate and weight decay are stacked, so that one forward and backward pass serves
all of them, and each is a parameter group of one optimizer, whose step is one launch for all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

import fused_adamw

# Few images, so that the error depends much on the weight decay.
TRAINING, BATCH = 256, 16
STEPS_PER_EPOCH = TRAINING // BATCH
CHUNK = 128  # images at a time that are only evaluated

PAPERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "lr_in_momentum": True},
    "SGDW": {"momentum": 0.9, "lr_in_momentum": True, "decouple_lr": True},
    "Adam": {},
    "AdamW": {"decouple_lr": True},
    "RAdam": {"decoupled_weight_decay": True, "decouple_lr": True},
    "AdaBoundW": {},
}
WITH_L2 = ("SGD", "Adam")  # the others decay as the paper does
# Made from an optimizer, the epochs of the run and the steps of an epoch.
SCHEDULES: dict[str, Callable[[torch.optim.Optimizer, int, int], LRScheduler]] = {
    "fixed": lambda optimizer, epochs, steps: ConstantLR(optimizer, 1.0),
    "step": lambda optimizer, epochs, steps: MultiStepLR(optimizer, [epochs * steps * k // 4 for k in (2, 3)], 0.1),
    "cosine": lambda optimizer, epochs, steps: CosineAnnealingLR(optimizer, epochs * steps),
    "restarts": lambda optimizer, epochs, steps: fused_adamw.CosineWarmRestarts(
        optimizer, epochs / 15, 2, steps_per_epoch=steps, normalized_decay=True
    ),  # four cycles: 1 + 2 + 4 + 8 = 15
}


class Network(NamedTuple):
    """Say which layers a network has, and which are decayed: 0 and 3 are the convolutions, 7 is the head."""

    norm: Callable[[int], nn.Module]  # what follows a convolution, from its channels
    bias: bool = False  # of the head
    normalized: bool = False  # the logits too, so that the scale of the head does not matter
    decayed: tuple[int, ...] | None = None  # layers; None: all parameters


def plain_norm(channels: int) -> nn.Module:
    """Make a GroupNorm without weights. Unlike BatchNorm, it sees one image alone."""
    return nn.GroupNorm(1, channels, affine=False)


NETWORKS = {
    "normalized": Network(plain_norm, normalized=True),
    "plain head, not decayed": Network(plain_norm, decayed=(0, 3)),
    "plain head": Network(plain_norm),
    "plain head, alone decayed": Network(plain_norm, decayed=(7,)),
    "ordinary": Network(partial(nn.GroupNorm, 1), bias=True),
    "unnormalized": Network(nn.Identity),
}


@dataclass(frozen=True)
class Batch:
    """Describe networks to train side by side."""

    algorithm: str  # a key of PAPERS
    schedule: str  # a key of SCHEDULES
    epochs: int
    every: int  # epochs between two evaluations
    cells: tuple[tuple[float, float, int], ...]  # (learning rate, weight decay, seed) of each network
    network: str = "normalized"  # a key of NETWORKS
    training: int = TRAINING  # images to train on

    @property
    def steps_per_epoch(self) -> int:
        return self.training // BATCH


class Scaled(nn.Module):
    """Normalize the logits of each image to mean 0 and standard deviation 2: of 1, they cannot express certainty."""

    def forward(self, logits: Tensor) -> Tensor:
        return 2 * F.layer_norm(logits, logits.shape[-1:])


def network(seed: int, kind: str) -> nn.Module:
    """Make two convolutions and a linear layer, about 3,800 weights.

    A weight that a normalization follows is scale-invariant: a multiple of it computes the same.
    """
    made = NETWORKS[kind]
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        made.norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        made.norm(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10, bias=made.bias),
        Scaled() if made.normalized else nn.Identity(),
    )


def digits(seed: int, training: int = TRAINING) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (n, 1, 8, 8), of mean 0 and variance 1, and labels: to train on, and the others to test on."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen, unseen = order[:training], order[training:]
    return images[seen], labels[seen], images[unseen], labels[unseen]


def optimizer_of(batch: Batch, stacks: dict[str, Tensor]) -> torch.optim.Optimizer:
    """Make the batch's optimizer: groups for each network, whose parameters and gradients are views of the stacks."""
    layers = NETWORKS[batch.network].decayed
    groups: list[dict[str, Any]] = []
    for k, (lr, decay, _) in enumerate(batch.cells):
        parts: dict[float, list[nn.Parameter]] = {}
        for name, stack in stacks.items():
            p = nn.Parameter(stack.detach()[k])
            p.grad = stack.grad[k]
            decayed = layers is None or int(name.partition(".")[0]) in layers
            parts.setdefault(decay if decayed else 0.0, []).append(p)
        groups += ({"params": params, "lr": lr, "weight_decay": part} for part, params in parts.items())
    return getattr(fused_adamw, batch.algorithm)(groups, **PAPERS[batch.algorithm])


def train(batch: Batch, device: str = "cpu") -> dict[str, list]:
    """Train the networks of a batch.

    Returns "epochs", those after which there was an evaluation, and for each of the networks a list of the test errors
    (between 0 and 1) and of the training losses (nats) then: "errors", "losses". The last evaluation is at the end.
    """
    seeds = sorted({seed for _, _, seed in batch.cells})
    of = torch.tensor([seeds.index(seed) for _, _, seed in batch.cells], device=device)
    parts = zip(*(digits(seed, batch.training) for seed in seeds), strict=True)
    x, y, test_x, test_y = (torch.stack(part).to(device) for part in parts)
    made, _ = stack_module_state([network(seed, batch.network) for _, _, seed in batch.cells])
    stacks = {name: stack.detach().to(device).requires_grad_() for name, stack in made.items()}
    for stack in stacks.values():
        stack.grad = torch.zeros_like(stack)
    template = network(0, batch.network)
    predict = vmap(lambda params, images: functional_call(template, params, images))
    optimizer = optimizer_of(batch, stacks)
    schedule = SCHEDULES[batch.schedule](optimizer, batch.epochs, batch.steps_per_epoch)

    # The order is drawn on the CPU, the same for every device.
    shuffles = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = torch.arange(len(seeds), device=device).unsqueeze(1)
    found: dict[str, list] = {"epochs": [], "errors": [], "losses": []}
    for epoch in range(1, batch.epochs + 1):
        orders = torch.stack([torch.randperm(batch.training, generator=g) for g in shuffles]).to(device)
        for picked in orders.split(BATCH, dim=1):
            logits = predict(stacks, x[rows, picked][of])
            for stack in stacks.values():
                stack.grad.zero_()
            F.cross_entropy(logits.flatten(0, 1), y[rows, picked][of].flatten(), reduction="sum").div(BATCH).backward()
            optimizer.step()
            schedule.step()
        if epoch % batch.every == 0 or epoch == batch.epochs:
            logits = evaluate(predict, stacks, test_x, of)
            found["errors"].append((logits.argmax(2) != test_y[of]).double().mean(1).tolist())
            logits = evaluate(predict, stacks, x, of)
            losses = F.cross_entropy(logits.transpose(1, 2), y[of], reduction="none")
            found["losses"].append(losses.mean(1).tolist())
            found["epochs"].append(epoch)
    return {
        key: value if key == "epochs" else [list(row) for row in zip(*value, strict=True)]
        for key, value in found.items()
    }


@torch.no_grad()
def evaluate(predict: Callable[..., Tensor], stacks: dict[str, Tensor], images: Tensor, of: Tensor) -> Tensor:
    """Return the logits (networks, images, 10); ``of`` says whose images each network gets."""
    return torch.cat([predict(stacks, part[of]) for part in images.split(CHUNK, dim=1)], dim=1)
