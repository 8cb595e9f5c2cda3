"""What the tests and the bench share: lists of shapes, cases of options, and the one tolerance function."""

import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_adamw

Shapes = list[tuple[int, ...]]


class Target(NamedTuple):
    """Where a test runs."""

    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"

    @property
    def float64(self) -> bool:
        """Whether the backend steps float64 tensors."""
        return self.backend not in ("triton", "cuda")


CPU = Target("cpu", "cpu")
# Triton steps CPU tensors only in its interpreter, whose bfloat16 truncates: tests/test_interpreter.py chooses.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TARGETS = [CPU, Target("cpu", "reference"), *(Target("cuda", b) for b in ("triton", "cuda", "reference"))]
if INTERPRETED:
    TARGETS = [Target("cpu", "triton")]

# Every shape that has ever been a trap: empty, 0-dim, 1, a vector ± 1, a block of 64 ± 1, a matrix, a convolution.
SHAPES: Shapes = [(), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (64,), (65,), (17, 31), (8, 3, 3, 3), (2500,)]


# What one parameter group holds: its shapes, and the options in which it differs from the others.
Groups = list[tuple[Shapes, dict[str, Any]]]


def one_group(*parts: Shapes) -> Groups:
    """All of these in a single group."""
    return [(list(itertools.chain(*parts)), {})]


def gpt2_small(layers: int) -> Groups:
    """GPT-2 small: 148 parameters, 124.4 M elements."""
    return one_group([(50257, 768), (1024, 768)], gpt2_block(768) * layers, [(768,), (768,)])


def gpt2_block(d: int) -> Shapes:
    """Return the 12 parameters of a block of GPT-2 of width d."""
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,)]
    return [*block, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]


def narrow_gpt2(layers: int) -> Groups:
    """20 blocks of GPT-2, of width 32: 240 parameters, 0.25 M elements."""
    return one_group(gpt2_block(32) * 20)


def resnet50(layers: int) -> Groups:
    """ResNet-50 (arXiv 1512.03385) with batch norms: 161 parameters, 25.6 M elements."""

    def conv(out: int, into: int, size: int) -> Shapes:
        return [(out, into, size, size), (out,), (out,)]

    shapes, into = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(blocks):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            shapes += conv(4 * width, into, 1) if i == 0 else []
            into = 4 * width
    return one_group(shapes, [(1000, 2048), (1000,)])


def vit_b(layers: int) -> Groups:
    """ViT-B/16 (arXiv 2010.11929) at 224 pixels: 152 parameters, 86.6 M elements."""
    d = 768
    block = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return one_group([(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)], block * layers, [(d,), (d,), (1000, d), (1000,)])


def llama_7b(layers: int) -> Groups:
    """Llama 7B (arXiv 2302.13971): 291 parameters, 6.74 G elements, of which 202 M in each of the 32 layers."""
    d, hidden = 4096, 11008
    layer = [(d, d)] * 4 + [(hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return one_group([(32000, d)], layer * layers, [(d,), (32000, d)])


def mixture_of_experts(layers: int) -> Groups:
    """OLMoE-1B-7B (arXiv 2409.02060), 64 experts a layer, with its widths divided by 8: 3219 parameters, 131 M."""
    d, hidden, experts = 2048 // 8, 1024 // 8, 64
    layer = [(d, d)] * 4 + [(d,)] * 4 + [(experts, d)] + [(hidden, d), (hidden, d), (d, hidden)] * experts
    return one_group([(50304, d)], layer * layers, [(d,), (50304, d)])


def one_group_each(layers: int) -> Groups:
    """465 parameters, each in a group of its own with one of 28 settings: layer-wise rates, no decay of vectors."""
    return [([(64,)], {"lr": 1e-3 * 0.8 ** (i % 14), "weight_decay": 0.1 * (i // 14 % 2)}) for i in range(465)]


# Parameters and all their gradients.
Given = list[tuple[Tensor, Tensor]]
State = dict[Tensor, dict[str, Any]]


def drop_layers(given: Given, state: State, turn: int) -> None:
    """Take the gradients of a fifth of 20 blocks away, at each turn of another fifth, as LayerDrop does."""
    for i, (p, g) in enumerate(given):
        p.grad = None if i * 20 // len(given) % 5 == turn % 5 else g


def alternate(given: Given, state: State, turn: int) -> None:
    """Leave gradients to one half of the list, at the next turn to the other, as a GAN or heads in turn do."""
    for i, (p, g) in enumerate(given):
        p.grad = g if i * 2 // len(given) == turn % 2 else None


def replace_state(given: Given, state: State, turn: int) -> None:
    """Replace all moments by copies, as where they were on the host; not at turn 0."""
    for of_one in state.values() if turn else ():
        of_one.update({k: t.clone() for k, t in of_one.items() if isinstance(t, Tensor) and k != "step"})


def move_parameters(given: Given, state: State, turn: int) -> None:
    """Give parameters other memory, as a projection of weights does; not at turn 0."""
    for p, _ in given if turn else ():
        p.data = p.data.clone()


class Workload(NamedTuple):
    """A list of parameters that the bench times, and the tests step."""

    groups: Callable[[int], Groups]  # of so many of the layers
    layers: int = 1
    change: Callable[[Given, State, int], None] | None = None  # before each step: turn 0 is that of a steady list


WORKLOADS: dict[str, Workload] = {
    "gpt2": Workload(gpt2_small, 12),
    "resnet50": Workload(resnet50),
    "vit-b": Workload(vit_b, 12),
    "llama-7b": Workload(llama_7b, 32),
    "moe": Workload(mixture_of_experts, 16),
    "1000x1k": Workload(lambda layers: one_group([(1000,)] * 1000)),
    "148x64": Workload(lambda layers: one_group([(64,)] * 148)),
    "10000x64": Workload(lambda layers: one_group([(64,)] * 10000)),
    "465-groups": Workload(one_group_each),
    "1x131k": Workload(lambda layers: one_group([(1024, 128)])),  # no vector: those keep moments in float32
    "1x16M": Workload(lambda layers: one_group([(1 << 24,)])),
    "layerdrop": Workload(narrow_gpt2, change=drop_layers),
    "layerdrop-1000": Workload(lambda layers: one_group([(1000,)] * 1000), change=drop_layers),
    "alternating": Workload(narrow_gpt2, change=alternate),
    "offloaded-states": Workload(narrow_gpt2, change=replace_state),
    "moved-parameters": Workload(narrow_gpt2, change=move_parameters),
    # For a GPU's memory alone.
    "1x256Mi": Workload(lambda layers: one_group([(1 << 28,)])),
    "1x1Gi": Workload(lambda layers: one_group([(1 << 30,)])),
    "llama-2b": Workload(llama_7b, 9),  # the first layers of Llama 7B: 2.08 G elements
}

# Options that torch.optim's class of the same name has too.
SHARED: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {}),
    ("AdamW", {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"maximize": True, "weight_decay": 0.1}),
    ("AdamW", {"lr": torch.tensor(2e-3, dtype=torch.float64), "weight_decay": 0.1}),
    ("AdamW", {"betas": (0.0, 0.0)}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 1e-2}),
    ("RAdam", {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    ("RAdam", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.9, "maximize": True}),
]
# Options that only ours has.
OURS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"decouple_lr": True, "weight_decay": 1e-3}),
    ("AdamW", {"cautious": "decay", "lr": 1e-2, "weight_decay": 0.3}),
    ("AdamW", {"cautious": "update", "lr": 1e-2, "weight_decay": 0.1}),
    ("Adam", {"cautious": "update", "weight_decay": 0.1, "maximize": True}),
    ("RAdam", {"cautious": "decay", "lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"degenerated_to_sgd": False, "decoupled_weight_decay": True, "weight_decay": 0.1, "decouple_lr": True}),
    ("AdamW", {"ema_decay": 0.9, "lr": 1e-2, "amsgrad": True}),
    ("SGD", {"ema_decay": 0.99, "ema_warmup": True, "lr": 0.1, "weight_decay": 0.1}),
    ("AdamW", {"first_moment": False, "betas": (0.0, 0.9), "lr": 1e-2, "weight_decay": 0.3}),
    ("Adam", {"first_moment": False, "betas": (0.0, 0.999), "weight_decay": 0.1, "maximize": True}),
    ("AdaBound", {"weight_decay": 0.1, "maximize": True, "ema_decay": 0.9}),
    ("AdaBound", {"betas": (0.8, 0.95), "final_lr": 0.02, "gamma": 0.3, "weight_decay": 0.1, "amsbound": True}),
    ("AdaBoundW", {"lr": 1e-2, "gamma": 0.1, "eps": 1e-4, "weight_decay": 1e-3}),
    ("AdaBoundW", {"weight_decay": 0.1, "amsbound": True, "decouple_lr": False}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3, "decouple_lr": True}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "decouple_lr": True, "lr_in_momentum": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "lr_in_momentum": True}),
]


def name_of(case: Any) -> str:
    """A test's id for a case."""
    if isinstance(case, dict):
        return ",".join(f"{k}={v.tolist() if isinstance(v, Tensor) else v}" for k, v in case.items()) or "defaults"
    if isinstance(case, (list, tuple)) and not isinstance(case, Target):
        return "-".join(map(name_of, case))
    return str(case).removeprefix("torch.")


def pairwise(sizes: list[int]) -> list[list[int]]:
    """Rows of one index for each axis, in which every two indices of different axes meet: few, and always the same."""
    axes = range(len(sizes))
    missing = {
        (i, a, j, b) for i, j in itertools.combinations(axes, 2) for a in range(sizes[i]) for b in range(sizes[j])
    }
    rows = []
    while missing:
        i, a, j, b = min(missing)
        row = {i: a, j: b}
        for k in (k for k in axes if k not in row):
            met = [
                sum((*min((k, c), own), *max((k, c), own)) in missing for own in row.items()) for c in range(sizes[k])
            ]
            row[k] = met.index(max(met))
        rows.append([row[k] for k in axes])
        missing -= {(k, row[k], m, row[m]) for k, m in itertools.combinations(axes, 2)}
    return rows


def parameters(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> list[torch.nn.Parameter]:
    """Normally distributed parameters, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_gradients(params: Iterable[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Gradients of step number ``step``, the same on every device, of several magnitudes."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator) * 10.0 ** (-(i % 4))
        set_gradient(p, g.to(p.device, dtype or p.dtype))


def set_gradient(p: Tensor, g: Tensor) -> None:
    """Make g, of any dtype, the gradient of p; torch 2.8 and 2.9 take another dtype than p's only in this way."""
    if hasattr(p, "grad_dtype"):
        p.grad_dtype, p.grad = g.dtype, g
    else:
        p.grad = torch.zeros_like(p)
        p.grad.data = g


def make(name: str, params: Any, options: dict[str, Any], **ours: Any) -> torch.optim.Optimizer:
    """Our optimizer of this name."""
    return getattr(fused_adamw, name)(params, **options, **ours)


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything a step writes, by name."""
    found = {}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(params):
        found[f"{i}.p"] = p.detach()
        found.update({f"{i}.{k}": v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)})
    return found


def equal_bits(x: Tensor, y: Tensor) -> Tensor:
    """Where two tensors have the same bits, signs of zeros included; any NaN equals any other."""
    assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
    if x.is_complex():
        return equal_bits(torch.view_as_real(x), torch.view_as_real(y)).all(-1)
    if not x.is_floating_point():
        return x == y
    as_integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(as_integer) == y.view(as_integer)) | (x.isnan() & y.isnan())


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equality of every bit of every tensor (NaN equals NaN)."""
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        y = theirs[name].cpu()
        wrong = ~equal_bits(x.cpu(), y)
        if wrong.any():
            first = [int(i) for i in wrong.nonzero()[0]]
            raise AssertionError(
                f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ, the first at {first}: "
                f"{x[tuple(first)].item()!r} and {y[tuple(first)].item()!r}"
            )


def ulps(x: Tensor, oracle: Tensor) -> Tensor:
    """Error of each element in units in the last place of x's dtype, at the element's magnitude or the tensor's.

    An element that nearly cancelled carries the error of the terms that cancelled, so the root mean square of the
    tensor is the smallest magnitude at which an error is judged.
    """
    oracle = oracle.double()
    magnitude = oracle.abs().clamp(min=oracle.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny))
    ulp = torch.finfo(x.dtype).eps * 2.0 ** magnitude.log2().floor()
    return (x.double() - oracle).abs() / ulp


QUANTILES = torch.tensor([0.5, 0.9, 0.99, 0.999, 1.0], dtype=torch.float64)


def assert_no_worse(ours: dict[str, Tensor], torchs: dict[str, Tensor], oracle: dict[str, Tensor], *more: dict) -> None:
    """The tolerance: our error against the oracle is at most torch's plus 1 ulp, at each quantile up to the maximum.

    ``more`` are other runs of torch's, of which the worst counts.
    """
    for name, truth in oracle.items():
        if not truth.numel() or name.endswith(".step"):
            continue
        mine = ulps(ours[name].cpu(), truth.cpu()).flatten().quantile(QUANTILES)
        errors = [ulps(run[name].cpu(), truth.cpu()).flatten().quantile(QUANTILES) for run in (torchs, *more)]
        bound = torch.stack(errors).nan_to_num(math.inf).amax(dim=0) + 1  # torch's for-loop in float16 can make NaN
        assert (mine <= bound).all(), f"{name}: our errors (ulp) {mine.tolist()} exceed {bound.tolist()}"
