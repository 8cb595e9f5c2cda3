"""What the tests of training scripts share: a model, and the same optimizer of ours and of torch's."""

import torch

from tests import cases

SHAPES = [(9,), (2, 3)]


def pair(name, target, **options):
    """Ours and torch's optimizer of this name, with the same parameters."""
    ours, torchs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend)
    return a, getattr(torch.optim, name)(torchs, **options)


def ours_twice(target):
    """The same optimizer of ours twice, over parameters of their own."""
    ours = [cases.parameters(SHAPES, device=target.device) for _ in range(2)]
    return [cases.make("AdamW", ps, {}, backend=target.backend) for ps in ours]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(a, b):
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q)


def network(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)
    return torch.nn.Sequential(*layers).to(device, dtype)


def loss_of(model, t):
    p = next(model.parameters())
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t)).to(p.device, p.dtype)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()
