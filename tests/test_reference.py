"""The oracle itself: against torch.optim, and against transcriptions of the paper's two algorithms, in float64."""

import math

import pytest
import torch

from tests import cases


def run(optimizer, params, steps, schedule=None):
    for t in range(1, steps + 1):
        cases.set_gradients(params, t)
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(t)
        optimizer.step()


@pytest.mark.float64
@pytest.mark.parametrize(("name", "options"), cases.SHARED, ids=cases.name_of)
def test_float64_equals_torch(name, options, target):
    ours, theirs = (cases.parameters(cases.SHAPES, torch.float64, target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend)
    b = getattr(torch.optim, name)(theirs, **options)
    run(a, ours, 50)
    run(b, theirs, 50)
    wanted = cases.tensors_of(b)
    found = {k: x for k, x in cases.tensors_of(a).items() if name != "SGD" or not k.endswith(".step")}
    assert found.keys() == wanted.keys()
    for key, x in found.items():
        torch.testing.assert_close(
            x.double(), wanted[key].double(), rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )


def eta(t: int) -> float:
    """A schedule multiplier that changes at every step."""
    return 0.55 + 0.45 * math.cos(t / 5)


@pytest.mark.float64
@pytest.mark.parametrize("decoupled", [False, True])
def test_algorithm_1(decoupled, target):
    """SGD with L2 regularization and SGDW, both with momentum, line by line."""
    alpha, beta1, lam = 0.05, 0.9, 0.01
    theta = [p.detach().clone() for p in cases.parameters(cases.SHAPES, torch.float64, target.device)]
    m = [torch.zeros_like(x) for x in theta]
    for t in range(1, 51):
        cases.set_gradients(theta, t)
        for i, x in enumerate(theta):
            g = x.grad + (0 if decoupled else lam * x)
            m[i] = beta1 * m[i] + eta(t) * alpha * g
            theta[i] = x - m[i] - (eta(t) * lam * x if decoupled else 0)

    params = cases.parameters(cases.SHAPES, torch.float64, target.device)
    options = {"lr": alpha, "momentum": beta1, "weight_decay": lam, "lr_in_momentum": True, "decouple_lr": decoupled}
    optimizer = cases.make("SGDW" if decoupled else "SGD", params, options, backend=target.backend)
    run(optimizer, params, 50, lambda t: eta(t) * alpha)
    for p, x in zip(params, theta, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


@pytest.mark.float64
@pytest.mark.parametrize("decoupled", [False, True])
def test_algorithm_2(decoupled, target):
    """Adam with L2 regularization and AdamW, line by line."""
    alpha, beta1, beta2, eps, lam = 1e-2, 0.9, 0.999, 1e-8, 0.01
    theta = [p.detach().clone() for p in cases.parameters(cases.SHAPES, torch.float64, target.device)]
    m, v = ([torch.zeros_like(x) for x in theta] for _ in range(2))
    for t in range(1, 51):
        cases.set_gradients(theta, t)
        for i, x in enumerate(theta):
            g = x.grad + (0 if decoupled else lam * x)
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)
            theta[i] = x - eta(t) * (alpha * m_hat / (v_hat.sqrt() + eps) + (lam * x if decoupled else 0))

    params = cases.parameters(cases.SHAPES, torch.float64, target.device)
    options = {"lr": alpha, "betas": (beta1, beta2), "eps": eps, "weight_decay": lam, "decouple_lr": decoupled}
    optimizer = cases.make("AdamW" if decoupled else "Adam", params, options, backend=target.backend)
    run(optimizer, params, 50, lambda t: eta(t) * alpha)
    for p, x in zip(params, theta, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
