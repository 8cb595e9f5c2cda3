"""Train a small character-level GPT on Python's standard library with torch's AdamW and with ours."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_adamw
from bench.output import begin, console, new_table, progress, wrote
from bench.plot import plt, write
from bench.studies.gpt import BATCH, CONTEXT, GPT, batches, corpus
from bench.timing import bytes_of_step, interleave

OURS, LOOP, FUSED = "fused_adamw.AdamW", "torch AdamW (for-loop, the default)", "torch AdamW (fused=True)"
LR, WEIGHT_DECAY = 3e-3, 0.1
VALIDATION_BATCHES, VALIDATIONS = 16, 8
LAST = 50  # steps whose mean is the final training loss
ROUNDS = 31


class Run:
    """Hold a model in training, its optimizer and schedule, and its losses so far."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        seed: int,
        steps: int,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model = GPT().to(dtype)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = kind(groups, lr=LR, betas=(0.9, 0.99), **options)
        warmup = max(1, steps // 10)
        self.schedule = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=warmup),
                torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, steps - warmup), eta_min=LR / 20),
            ],
            milestones=[warmup],
        )
        self.losses: list[float] = []
        self.validation: list[float] = []

    def loss(self, text: Tensor) -> Tensor:
        return F.cross_entropy(self.model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def train(self, text: Tensor) -> None:
        loss = self.loss(text)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def validate(self, texts: list[Tensor]) -> None:
        self.validation.append(sum(self.loss(text).item() for text in texts) / len(texts))

    def final(self) -> float:
        return float(np.mean(self.losses[-LAST:]))


def run(args: argparse.Namespace) -> int:
    """Train, time, and write demo.png."""
    begin("Training a character-level GPT on Python's standard library", args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = corpus()
    runs = {
        OURS: Run(fused_adamw.AdamW, args.seed, args.steps),
        LOOP: Run(torch.optim.AdamW, args.seed, args.steps),
        FUSED: Run(torch.optim.AdamW, args.seed, args.steps, fused=True),
    }
    params = sum(p.numel() for p in runs[OURS].model.parameters())
    console.print(
        f"  model     {params:,} parameters in {len(list(runs[OURS].model.parameters()))} tensors, "
        f"{args.steps} steps of {BATCH}×{CONTEXT} of {len(training):,} characters"
    )
    validated = train(runs, training, held_out, args.steps, args.seed)
    report(runs, interleave({name: r.optimizer.step for name, r in runs.items()}, range(ROUNDS)))
    plot(runs, validated, args.out / "demo.png")
    wrote(args.out / "demo.png")
    return 0


def train(runs: dict[str, Run], training: Tensor, held_out: Tensor, steps: int, seed: int) -> list[int]:
    """Train all models side by side on the same batches; return the steps after which they were validated."""
    held_out_batches = batches(held_out, seed)
    texts = [next(held_out_batches) for _ in range(VALIDATION_BATCHES)]
    every = max(1, steps // VALIDATIONS)
    validated = []
    with progress() as bar:
        task = bar.add_task("training", total=steps)
        for i, text in zip(range(1, steps + 1), batches(training, seed), strict=False):
            for r in runs.values():
                r.train(text)
            if i % every == 0 or i == steps:
                validated.append(i)
                for r in runs.values():
                    r.validate(texts)
            bar.update(task, advance=1, description=f"loss {runs[OURS].losses[-1]:.2f}")
    return validated


def difference(a: Run, b: Run) -> np.ndarray:
    """Return the distance of two loss curves, step by step."""
    return np.abs(np.subtract(a.losses, b.losses))


def report(runs: dict[str, Run], times: dict[str, list[float]]) -> None:
    """Print what the models learned, and how long their optimizer steps take."""
    last = min(LAST, len(runs[OURS].losses))
    shown = new_table(
        "loss, nats per character", f"training,\nlast {last} steps", "validation", "most apart\nfrom ours"
    )
    for name, r in runs.items():
        away = "" if name == OURS else f"{difference(r, runs[OURS]).max():.1e}"
        shown.add_row(name, f"{r.final():.4f}", f"{r.validation[-1]:.4f}", away)
    console.print(shown)
    console.print(
        "Same weights, same batches: the losses are equal up to rounding at first. The optimizers round last bits\n"
        "differently, and training amplifies that chaotically: torch's own two come apart by up to "
        f"{difference(runs[LOOP], runs[FUSED]).max():.1e}.\n"
        "Validation is on other files, which may be easier or harder than those of the training."
    )
    shown = new_table(f"optimizer.step(), median of {ROUNDS}", "ms", "GB/s", "times as fast as\ntorch's for-loop")
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    for name, r in runs.items():
        rate = bytes_of_step(r.optimizer) / medians[name] / 1e9
        shown.add_row(name, f"{medians[name] * 1e3:.3f}", f"{rate:.1f}", f"{medians[LOOP] / medians[name]:.1f}")
    console.print(shown)
    console.print(
        "GB/s = 28 bytes per parameter / time: read p, g, m, v and write p, m, v, 4 bytes each.\n"
        "A model as small as this lies in the caches in part."
    )


def plot(runs: dict[str, Run], validated: list[int], path: Path) -> None:
    """Draw both loss curves, and below them their difference."""
    steps = np.arange(1, len(runs[OURS].losses) + 1)
    window = max(1, len(steps) // 25)
    kernel = np.ones(window) / window
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.5), dpi=150, sharex=True, height_ratios=(2.2, 1), layout="constrained"
    )
    for name, color, width, size in ((LOOP, "tab:orange", 5, 11), (OURS, "tab:blue", 1.5, 5)):
        r = runs[name]
        top.plot(steps, r.losses, color=color, alpha=0.25, linewidth=width / 3)
        smooth = np.convolve(r.losses, kernel, "valid")
        top.plot(steps[window - 1 :], smooth, color=color, linewidth=width, label=f"{name}, training, mean of {window}")
        dots = {"markersize": size, "markeredgecolor": "black", "label": f"{name}, validation"}
        top.plot(validated, r.validation, "o", color=color, **dots)
    top.set(ylabel="loss (nats per character)", title="A character GPT trained by torch's AdamW and by fused_adamw's")
    top.legend()
    for name, color in ((FUSED, "tab:gray"), (OURS, "tab:blue")):
        apart = difference(runs[name], runs[LOOP])
        bottom.plot(steps[apart > 0], apart[apart > 0], ".", color=color, markersize=4, label=f"{name} − for-loop")
    bottom.set(yscale="log", xlabel="training step", ylabel="|difference of loss|\n(nats per character)")
    bottom.set_title("Difference of the training losses at each step (equal ones are not shown)", fontsize="medium")
    bottom.legend(loc="lower right")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
    write(figure, path)
