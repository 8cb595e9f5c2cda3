"""Trains a small character-level GPT: decay groups, accumulation, clipping, warm-up, checkpoints.

    python examples/train_gpt.py --steps 200 --checkpoint /tmp/gpt.pt

Run it again with more --steps, and it goes on from the checkpoint, to the bits of a run that was never stopped.
From the top of a checkout.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the demo's model and text

import fused_adamw
from bench.studies.gpt import GPT, batches, corpus


def factor(step: int, warm_up: int, steps: int) -> float:
    """Return the multiplier of the learning rate: a linear warm-up, then a cosine down to a tenth."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warm_up) / max(1, steps - warm_up)))


def loss_of(model: GPT, text: Tensor) -> Tensor:
    """Return the mean loss of the next character."""
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train(steps: int, checkpoint: Path, accumulate: int = 2, horizon: int = 200, seed: int = 0) -> Iterator[float]:
    """Yield the loss of each step up to ``steps``, from the checkpoint on; write it at the end."""
    torch.manual_seed(seed)
    model = GPT()
    groups = fused_adamw.param_groups(model, weight_decay=0.1)  # biases and norms do not decay
    optimizer = fused_adamw.AdamW(groups, lr=3e-3, betas=(0.9, 0.99), max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, 20, horizon))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    done = scheduler.last_epoch
    texts = islice(batches(corpus()[0], seed), done * accumulate, None)  # without the batches that were seen before
    for _ in range(done, steps):
        optimizer.zero_grad()
        total = 0.0
        for text in islice(texts, accumulate):
            loss = loss_of(model, text) / accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        scheduler.step()
        yield total
    partial = checkpoint.with_suffix(".part")
    torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
    os.replace(partial, checkpoint)  # so that an interruption leaves the last one whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="of the whole run (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="to write, and to go on from (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for step, loss in enumerate(train(args.steps, args.checkpoint or Path(folder) / "gpt.pt"), 1):
            print(f"step {step:5}  loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
