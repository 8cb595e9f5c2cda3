"""Train in bf16 and with int8 moments, beside float32: the GPT of the demo, the digits of bench paper."""

import argparse
import itertools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import fused_adamw
from bench.memory import FORMS, Form
from bench.output import begin, console, new_table, progress, wrote
from bench.paper import digits
from bench.plot import differences
from bench.studies import demo, gpt
from fused_adamw import formats

FP32 = "fp32"
EPOCHS, DIGITS_LR, DIGITS_DECAY = 60, 3e-3, 0.05
NOTES = """\
Each model has the same first weights and batches in every row, forward and backward in float32, and gradients in the
dtype of its parameters. Loss of the GPT: mean of the last {last} steps; beside it the difference from fp32, of the same
seed: mean, least and most. Digits: test error of the ordinary network of bench paper after {epochs} epochs, in
percent, with int8 moments also of its small tensors.
m and v: error of the moments at the end of seed 0, |x - y|^2 / |y|^2 and 1 - cosine, against float32 moments of the
same gradients."""


def run(args: argparse.Namespace) -> int:
    """Train all, print the table, draw formats.png."""
    begin("bf16 parameters and int8 moments", args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, _ = gpt.corpus()
    jobs = [(name, seed) for seed in range(args.seeds) for name in FORMS]
    losses: dict[str, list[list[float]]] = {name: [] for name in FORMS}
    errors: dict[str, list[float]] = {name: [] for name in FORMS}
    moments: dict[str, dict[str, tuple[float, float]]] = {}
    with progress() as bar:
        for name, seed in bar.track(jobs, description="training"):
            trained = Run(FORMS[name], seed, args.steps, shadowed=seed == 0)
            for text in itertools.islice(gpt.batches(training, seed), args.steps):
                trained.train(text)
            losses[name].append(trained.losses)
            errors[name].append(digits_error(FORMS[name], seed))
            if seed == 0:
                moments[name] = trained.moment_errors()
    console.print(table(losses, errors, moments))
    console.print(NOTES.format(last=min(demo.LAST, args.steps), epochs=EPOCHS))
    apart = {name: beside(losses, name) for name in FORMS if name != FP32}
    differences({n: (d.mean(), d.min(), d.max()) for n, d in apart.items()}, args.out / "formats.png")
    wrote(args.out / "formats.png")
    return 0


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Predict in float32, whatever the dtype of the parameters."""
    return functional_call(model, {name: p.float() for name, p in model.named_parameters()}, x)


class Run(demo.Run):
    """Hold a GPT in training, and float32 moments of its gradients beside it if they are to be compared."""

    def __init__(self, form: Form, seed: int, steps: int, shadowed: bool) -> None:
        super().__init__(fused_adamw.AdamW, seed, steps, dtype=form.dtype, **form.options)
        self.shadow = None
        if shadowed:
            copies = [nn.Parameter(p.detach().float()) for p in self.model.parameters()]
            self.shadow = fused_adamw.AdamW(copies, lr=0.0, betas=(0.9, 0.99))
            self.optimizer.register_step_pre_hook(lambda *_: self._follow())

    def loss(self, text: Tensor) -> Tensor:
        return F.cross_entropy(logits(self.model, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def _follow(self) -> None:
        for q, p in zip(self.shadow.param_groups[0]["params"], self.model.parameters(), strict=True):
            q.grad = p.grad.float()
        self.shadow.step()

    def moment_errors(self) -> dict[str, tuple[float, float]]:
        """Return the squared error of each moment, divided by its squared norm, and 1 - cosine."""
        found = {}
        plain = self.optimizer.export()["state"].values()
        places = {p: i for i, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        order = [places[p] for p in self.model.parameters()]
        own = [list(plain)[i] for i in order]
        for name in ("exp_avg", "exp_avg_sq"):
            x = torch.cat([o[name].flatten().double() for o in own])
            y = torch.cat([o[name].flatten().double() for o in self.shadow.state.values()])
            found[name] = float((x - y).square().sum() / y.square().sum()), float(1 - F.cosine_similarity(x, y, dim=0))
        return found


def digits_error(form: Form, seed: int) -> float:
    """Return the percentage of the test images that the network gets wrong."""
    x, y, test_x, test_y = digits.digits(seed)
    model = digits.network(seed, "ordinary").to(form.dtype)
    sizes = formats.SMALL, formats.SMALL_VECTOR
    formats.SMALL = formats.SMALL_VECTOR = 1
    try:
        optimizer = fused_adamw.AdamW(model.parameters(), DIGITS_LR, weight_decay=DIGITS_DECAY, **form.options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * digits.STEPS_PER_EPOCH)
        shuffle = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for picked in torch.randperm(digits.TRAINING, generator=shuffle).split(digits.BATCH):
                optimizer.zero_grad()
                F.cross_entropy(logits(model, x[picked]), y[picked]).backward()
                optimizer.step()
                schedule.step()
    finally:
        formats.SMALL, formats.SMALL_VECTOR = sizes
    with torch.no_grad():
        return 100 * (logits(model, test_x).argmax(1) != test_y).double().mean().item()


def final(losses: list[float]) -> float:
    return float(np.mean(losses[-demo.LAST :]))


def beside(losses: dict[str, list[list[float]]], name: str) -> np.ndarray:
    """Return how far the last losses of a form are from those of fp32, by seed."""
    return np.array([final(curve) - final(fp32) for curve, fp32 in zip(losses[name], losses[FP32], strict=True)])


def table(
    losses: dict[str, list[list[float]]],
    errors: dict[str, list[float]],
    moments: dict[str, dict[str, tuple[float, float]]],
) -> Table:
    """Make a line for each form."""
    shown = new_table("AdamW", "GPT, loss", "beside fp32", "digits, %", "m", "v")
    for name in FORMS:
        loss, apart = np.mean([final(curve) for curve in losses[name]]), beside(losses, name)
        spread = "" if name == FP32 else f"{apart.mean():+.4f} ({apart.min():+.4f} to {apart.max():+.4f})"
        cells: list[Any] = [f"{loss:.4f}", spread, f"{np.mean(errors[name]):.2f}"]
        for moment in ("exp_avg", "exp_avg_sq"):
            error, angle = moments[name][moment]
            cells.append("" if error < 1e-12 or not math.isfinite(error) else f"{error:.1e}, {angle:.1e}")
        shown.add_row(name, *cells)
    return shown
