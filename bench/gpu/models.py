"""Time whole training steps, as a user feels them: GPT-2 small and ResNet-50 on made-up data."""

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_adamw
from bench.gpu.record import Record
from bench.measures import first_line
from bench.timing import cuda_clock, interleave

MAX_NORM = 1.0
Optimizers = dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]]


class GPT(nn.Module):
    """Predict tokens as GPT-2 small does: 148 parameters, 124.4 M elements; the head is the embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        options = {"dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(width, width // 64, 4 * width, **options)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions.weight
        x = self.blocks(x, mask=self.mask, is_causal=True)
        return x @ self.tokens.weight.T


class Bottleneck(nn.Module):
    """Add three convolutions to the input, or to a fourth of it."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *convolved(into, width, 1, 1), nn.ReLU(), *convolved(width, width, 3, stride), nn.ReLU()
        )
        self.inner.extend(convolved(width, 4 * width, 1, 1))
        same = into == 4 * width and stride == 1
        self.beside = nn.Identity() if same else nn.Sequential(*convolved(into, 4 * width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.beside(x))


def convolved(into: int, out: int, size: int, stride: int) -> list[nn.Module]:
    """Make a convolution and its batch norm."""
    return [nn.Conv2d(into, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out)]


def resnet(blocks: tuple[int, ...]) -> nn.Module:
    """Make a ResNet of so many bottlenecks in each stage; (3, 4, 6, 3): ResNet-50, 161 parameters, 25.6 M elements."""
    layers, into = [*convolved(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for i, count in enumerate(blocks):
        for j in range(count):
            layers.append(Bottleneck(into, 64 << i, 2 if i and not j else 1))
            into = 256 << i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 1000))


def train(record: Record) -> None:
    """Time both models with each optimizer, clipped and not."""
    gpt2(record)
    resnet50(record)


def gpt2(record: Record) -> None:
    """Measure tokens a second in bf16 autocast."""
    vocabulary, context, width, layers, batch = (99, 8, 64, 1, 2) if record.tiny else (50257, 1024, 768, 12, 8)
    torch.manual_seed(0)
    model = GPT(vocabulary, context, width, layers).cuda()
    text = torch.randint(vocabulary, (batch, context + 1), device="cuda")

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    options = {"lr": 1e-4, "weight_decay": 0.1}
    optimizers = arms(torch.optim.AdamW, fused_adamw.AdamW, options)
    measure(record, "GPT-2 small, bf16 autocast, AdamW", model, loss, optimizers, batch * context, "tokens")


def resnet50(record: Record) -> None:
    """Measure images a second in bf16 autocast, channels last."""
    blocks, side, batch = ((1,), 16, 2) if record.tiny else ((3, 4, 6, 3), 224, 128)
    torch.manual_seed(0)
    model = resnet(blocks).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, side, side, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")

    def loss() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(images), labels)

    options = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    optimizers = arms(torch.optim.SGD, fused_adamw.SGD, options)
    measure(record, "ResNet-50, bf16 autocast, SGD", model, loss, optimizers, batch, "images")


def arms(torchs: Any, ours: Any, options: dict[str, Any]) -> Optimizers:
    """Name torch's optimizers and ours, of the same options."""
    return {
        "torch fused": lambda params: torchs(params, **options, fused=True),
        "torch foreach": lambda params: torchs(params, **options, foreach=True),
        "fused_adamw triton": lambda params: ours(params, **options, backend="triton"),
        "fused_adamw cuda": lambda params: ours(params, **options, backend="cuda"),
        "torch fused, clipped": lambda params: clipping(torchs(params, **options, fused=True)),
        "torch foreach, clipped": lambda params: clipping(torchs(params, **options, foreach=True)),
        "fused_adamw triton, clipped": lambda params: ours(params, **options, backend="triton", max_grad_norm=MAX_NORM),
        "fused_adamw cuda, clipped": lambda params: ours(params, **options, backend="cuda", max_grad_norm=MAX_NORM),
    }


def clipping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Call clip_grad_norm_ before each step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.register_step_pre_hook(lambda *_: (nn.utils.clip_grad_norm_(params, MAX_NORM), None)[1])
    return optimizer


def measure(
    record: Record,
    title: str,
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizers: Optimizers,
    count: int,
    unit: str,
) -> None:
    """Time training steps of one model with every optimizer in turn, and the forward and backward alone."""
    calls = {}
    params = list(model.parameters())

    def pass_alone() -> None:
        model.zero_grad()
        loss().backward()

    for name, make in {**optimizers, "no optimizer": None}.items():
        if not record.time_left(f"{title}: {name}"):
            break
        try:
            optimizer = make(params) if make else None

            def call(optimizer: Any = optimizer) -> None:
                pass_alone()
                if optimizer is not None:
                    optimizer.step()

            call()
            calls[name] = call
        except Exception as error:
            record.emit(kind="skipped", case=title, arm=name, reason=first_line(error))
    for name, seconds in interleave(calls, range(2 if record.tiny else 9), cuda_clock).items():
        rate = count / float(np.median(seconds))
        record.emit(kind="model", name=title, arm=name, per_second=rate, unit=unit, ms_median=count / rate * 1e3)
        print(f"{title}: {name}: {rate:,.0f} {unit} a second", flush=True)
    calls.clear()
    gc.collect()
    torch.cuda.empty_cache()
