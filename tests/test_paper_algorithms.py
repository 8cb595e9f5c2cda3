"""The paper's algorithms, line by line in float64, with a multiplier that changes at every step."""

import math

import pytest
import torch

from fused_adamw import CosineWarmRestarts
from tests import cases

pytestmark = pytest.mark.float64
STEPS = 60
STEPS_PER_EPOCH, T_0, T_MULT = 4, 2.5, 2  # restarts after 10 and 30 steps


def arbitrary(t):
    """(η_t, how λ_t relates to λ): any multiplier, and a decay that stays."""
    return 0.55 + 0.45 * math.cos(t / 5), 1.0


def warm_restarts(t):
    """(η_t, how λ_t relates to λ_norm) of appendix B.1 at the t-th update, T_cur and T_i in updates."""
    T_cur, T_i = t - 1, T_0 * STEPS_PER_EPOCH
    while T_cur >= T_i:
        T_cur, T_i = T_cur - T_i, T_i * T_MULT
    return 0.5 + 0.5 * math.cos(math.pi * T_cur / T_i), math.sqrt(1 / T_i)


def algorithm_1(theta, alpha, beta1, lam, schedule, decoupled):
    """SGD with L2 regularization (the terms λθ of line 6) or with decoupled decay, SGDW (those of line 9)."""
    m = [torch.zeros_like(x) for x in theta]  # line 2
    for t in range(1, STEPS + 1):  # lines 3, 4, 10
        cases.set_gradients(theta, t)  # line 5
        eta, factor = schedule(t)  # line 7
        lam_t = factor * lam
        for i, x in enumerate(theta):
            g = x.grad + (0 if decoupled else lam_t * x)  # line 6
            m[i] = beta1 * m[i] + eta * alpha * g  # line 8
            theta[i] = x - m[i] - (eta * lam_t * x if decoupled else 0)  # line 9


def algorithm_2(theta, alpha, beta1, beta2, eps, lam, schedule, decoupled):
    """Adam with L2 regularization (the terms λθ of line 6) or with decoupled decay, AdamW (those of line 12)."""
    m, v = ([torch.zeros_like(x) for x in theta] for _ in range(2))  # line 2
    for t in range(1, STEPS + 1):  # lines 3, 4, 13
        cases.set_gradients(theta, t)  # line 5
        eta, factor = schedule(t)  # line 11
        lam_t = factor * lam
        for i, x in enumerate(theta):
            g = x.grad + (0 if decoupled else lam_t * x)  # line 6
            m[i] = beta1 * m[i] + (1 - beta1) * g  # line 7
            v[i] = beta2 * v[i] + (1 - beta2) * g**2  # line 8
            m_hat, v_hat = m[i] / (1 - beta1**t), v[i] / (1 - beta2**t)  # lines 9, 10
            theta[i] = x - eta * (alpha * m_hat / (v_hat.sqrt() + eps) + (lam_t * x if decoupled else 0))  # line 12


def radam(theta, alpha, beta1, beta2, eps, lam, waits):
    """Algorithm 2 of arXiv 1908.03265, ε and the decay as in its authors' code, which can wait instead of line 12."""
    m, v = ([torch.zeros_like(x) for x in theta] for _ in range(2))
    rho_max = 2 / (1 - beta2) - 1
    for t in range(1, STEPS + 1):
        cases.set_gradients(theta, t)
        rho = rho_max - 2 * t * beta2**t / (1 - beta2**t)
        for i, x in enumerate(theta):
            v[i] = beta2 * v[i] + (1 - beta2) * x.grad**2
            m[i] = beta1 * m[i] + (1 - beta1) * x.grad
            m_hat = m[i] / (1 - beta1**t)
            if rho > 5:
                length = (v[i].sqrt() + eps) / math.sqrt(1 - beta2**t)
                r = math.sqrt((rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho))
                theta[i] = x - alpha * lam * x - alpha * r * m_hat / length
            elif not waits:
                theta[i] = x - alpha * lam * x - alpha * m_hat  # line 12


def cautious(theta, alpha, beta1, beta2, eps, lam, kind):
    """AdamW with Algorithm 1 of arXiv 2510.12402 or, without the division by the mask's mean, of arXiv 2411.16085."""
    m, v = ([torch.zeros_like(x) for x in theta] for _ in range(2))
    for t in range(1, STEPS + 1):
        cases.set_gradients(theta, t)
        for i, x in enumerate(theta):
            g = x.grad
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            u = (m[i] / (1 - beta1**t)) / ((v[i] / (1 - beta2**t)).sqrt() + eps)
            if kind == "decay":
                theta[i] = x - alpha * (u + lam * x * (u * x >= 0))
            else:
                theta[i] = x - alpha * (u * (u * g > 0) + lam * x)


def adabound(theta, alpha, beta1, beta2, final_lr, gamma, eps, lam, schedule, decoupled, ams):
    """AdaBound, AdaBoundW and their AMSBound, after arXiv 1902.09843 and its authors' code, the decay scheduled.

    Returns which of the bounds were met.
    """
    met = set()
    m, v, largest = ([torch.zeros_like(x) for x in theta] for _ in range(3))
    for t in range(1, STEPS + 1):
        cases.set_gradients(theta, t)
        eta, factor = schedule(t)
        final = final_lr * eta
        lower, upper = final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))
        for i, x in enumerate(theta):
            g = x.grad + (0 if decoupled else factor * lam * x)
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            largest[i] = torch.maximum(largest[i], v[i])
            rate = eta * alpha * math.sqrt(1 - beta2**t) / (1 - beta1**t) / ((largest if ams else v)[i].sqrt() + eps)
            met |= {"lower"} if (rate < lower).any() else set()
            met |= {"upper"} if (rate > upper).any() else set()
            theta[i] = x - rate.clamp(lower, upper) * m[i] - (eta * factor * lam * x if decoupled else 0)
    return met


def ours(name, options, schedule, target):
    """Parameters that our optimizer arrives at."""
    params = cases.parameters(cases.SHAPES, torch.float64, target.device)
    optimizer = cases.make(name, params, options, backend=target.backend)
    scheduler = None
    if schedule is warm_restarts:
        scheduler = CosineWarmRestarts(optimizer, T_0, T_MULT, steps_per_epoch=STEPS_PER_EPOCH, normalized_decay=True)
    for t in range(1, STEPS + 1):
        cases.set_gradients(params, t)
        if scheduler is None:
            optimizer.param_groups[0]["lr"] = schedule(t)[0] * options["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return params


def assert_equal(params, theta, started):
    for p, x, start in zip(params, theta, started, strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
        assert not x.numel() or (x - start.detach()).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", [arbitrary, warm_restarts])
@pytest.mark.parametrize("name", ["SGD", "SGDW"])
def test_algorithm_1(name, schedule, target):
    """SGD-L2, SGDW and, with warm restarts and normalized decay, SGDWR."""
    decoupled = name == "SGDW"
    start = cases.parameters(cases.SHAPES, torch.float64, target.device)
    theta = [p.detach().clone() for p in start]
    algorithm_1(theta, 0.05, 0.9, 0.1, schedule, decoupled)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "lr_in_momentum": True, "decouple_lr": decoupled}
    assert_equal(ours(name, options, schedule, target), theta, start)


@pytest.mark.parametrize("schedule", [arbitrary, warm_restarts])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_algorithm_2(name, schedule, target):
    """Adam-L2, AdamW and, with warm restarts and normalized decay, AdamWR."""
    decoupled = name == "AdamW"
    start = cases.parameters(cases.SHAPES, torch.float64, target.device)
    theta = [p.detach().clone() for p in start]
    algorithm_2(theta, 0.01, 0.9, 0.999, 1e-8, 0.1, schedule, decoupled)
    options = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decouple_lr": decoupled}
    assert_equal(ours(name, options, schedule, target), theta, start)


@pytest.mark.parametrize("name", ["SGD", "SGDW"])
def test_without_a_momentum_of_its_own_a_schedule_differs(name):
    """lr_in_momentum matters once η_t moves: torch's momentum is not Algorithm 1's."""
    target = cases.CPU
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "decouple_lr": name == "SGDW"}
    a, b = (ours(name, options | {"lr_in_momentum": x}, arbitrary, target) for x in (False, True))
    assert max((p - q).abs().max() for p, q in zip(a, b, strict=True) if p.numel()) > 1e-3


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999])
def test_radam_is_its_papers(beta2, waits, target):
    """Equal to 1e-12 in float64; with β2 = 0.5 the variance never tells enough."""
    options = {"lr": 0.01, "betas": (0.8, beta2), "eps": 1e-6, "weight_decay": 0.1, "decoupled_weight_decay": True}
    start = cases.parameters(cases.SHAPES, torch.float64, target.device)
    theta = [p.detach().clone() for p in start]
    radam(theta, 0.01, 0.8, beta2, 1e-6, 0.1, waits)
    got = ours("RAdam", options | {"degenerated_to_sgd": not waits}, lambda t: (1, 1), target)
    if waits and beta2 == 0.5:
        assert all(torch.equal(p, q) for p, q in zip(got, start, strict=True))
    else:
        assert_equal(got, theta, start)


@pytest.mark.parametrize("schedule", [arbitrary, warm_restarts])
@pytest.mark.parametrize(("ams", "gamma"), [(False, 1e-3), (False, 0.2), (True, 0.05)])
@pytest.mark.parametrize("name", ["AdaBound", "AdaBoundW"])
def test_adabound_is_its_authors(name, ams, gamma, schedule, target):
    """Equal to 1e-12 in float64, under a schedule that moves bounds with rates; some elements meet each bound."""
    decoupled = name == "AdaBoundW"
    start = cases.parameters(cases.SHAPES, torch.float64, target.device)
    theta = [p.detach().clone() for p in start]
    met = adabound(theta, 0.01, 0.9, 0.99, 0.5, gamma, 1e-6, 1e-3, schedule, decoupled, ams)
    assert met == {"lower", "upper"}
    own = {"lr": 0.01, "betas": (0.9, 0.99), "final_lr": 0.5, "gamma": gamma, "eps": 1e-6, "weight_decay": 1e-3}
    assert_equal(ours(name, own | {"amsbound": ams}, schedule, target), theta, start)


@pytest.mark.parametrize("kind", ["decay", "update"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_cautious_rules_are_their_papers(name, kind, target):
    """Equal to 1e-12 in float64, and another than the rule without the option."""
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    options |= {"decoupled_weight_decay": True} if name == "Adam" else {}
    start = cases.parameters(cases.SHAPES, torch.float64, target.device)
    theta = [p.detach().clone() for p in start]
    cautious(theta, 0.01, 0.9, 0.99, 1e-6, 0.3, kind)
    assert_equal(ours(name, options | {"cautious": kind}, lambda t: (1, 1), target), theta, start)
    plain = ours(name, options, lambda t: (1, 1), target)
    assert max((p - x).abs().max() for p, x in zip(plain, theta, strict=True) if p.numel()) > 1e-3


def test_a_cautious_update_masks_by_the_gradient_with_its_l2_term(target):
    """Adam's gradient is ∇f + λθ, and so is that whose sign counts."""
    (p,) = cases.parameters([(1,)], torch.float64, target.device)
    p.data.fill_(1.0)
    optimizer = cases.make("Adam", [p], {"weight_decay": 1.0, "cautious": "update"}, backend=target.backend)
    p.grad = torch.full_like(p, 1.0)  # g = 2
    optimizer.step()
    before = p.item()
    p.grad = torch.full_like(p, -0.5)  # g = 0.499, as m is above 0
    optimizer.step()
    assert p.item() < before
    before = p.item()
    p.grad = torch.full_like(p, -1.5)  # g = -0.502, m is still above 0
    optimizer.step()
    assert p.item() == before
