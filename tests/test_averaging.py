"""Averaged models, and sharpness-aware minimization and Lookahead around an optimizer of ours."""

import copy
import functools

import pytest
import torch
from torch.optim import swa_utils

from tests import cases
from tests.training import loss_of, network, params_of


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_model(ema, target):
    """The average sees the parameters that were stepped in place; it is that of the same run under torch's."""
    averages = []
    for module, options in ((cases.fused_adamw, {"backend": target.backend}), (torch.optim, {})):
        model = network(target.device)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5) if ema else None)
        optimizer = module.SGD(model.parameters(), lr=0.1, **options)
        for t in range(5):
            cases.set_gradients(model.parameters(), t)
            optimizer.step()
            average.update_parameters(model)
        averages.append(list(average.parameters()))
        assert not torch.equal(averages[-1][0], next(model.parameters()))
    for p, q in zip(*averages, strict=True):
        torch.testing.assert_close(p, q)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412) around a base optimizer whose groups and state it shares."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = params_of(self)
        scale = self.param_groups[0]["rho"] / torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["climbed"] = p.grad * scale
            p.add_(self.state[p]["climbed"])
        closure()
        for p in params:
            p.sub_(self.state[p]["climbed"])
        self.base.step()
        return loss


def test_sam_around_ours(target):
    """It moves the parameters between the backward passes, by hand; judged by torch's in float64."""
    runs = []
    for base, options in ((cases.fused_adamw.SGD, {"backend": target.backend}), (torch.optim.SGD, {})):
        model = network(target.device) if options else network(dtype=torch.float64)
        optimizer = SAM(model.parameters(), functools.partial(base, **options), lr=0.05, momentum=0.9)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        runs.append([optimizer.step(closure).item() for _ in range(8)])
        assert optimizer.param_groups[0]["rho"] == 0.05
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][-1] < runs[0][0]


class Lookahead(torch.optim.Optimizer):
    """Lookahead (arXiv 1907.08610): slow weights, in the base optimizer's state, pull the fast ones every k steps."""

    def __init__(self, base, k=3, alpha=0.5):
        self.base, self.k, self.alpha, self.steps = base, k, alpha, 0
        super().__init__(base.param_groups, base.defaults)
        self.param_groups, self.state = base.param_groups, base.state

    @torch.no_grad()
    def step(self):
        slow = {p: self.state[p].get("slow", p.clone()) for p in params_of(self)}
        self.base.step()
        for p, weights in slow.items():
            self.state[p]["slow"] = weights
        self.steps += 1
        if self.steps % self.k == 0:
            for p in params_of(self):
                self.state[p]["slow"].lerp_(p, self.alpha)
                p.copy_(self.state[p]["slow"])


@pytest.mark.parametrize("resumed", [False, True])
def test_lookahead_around_ours(resumed, target):
    """It keeps tensors of its own in our state, which a checkpoint holds, and overwrites the parameters."""
    runs = []
    for module, options in ((cases.fused_adamw, {"backend": target.backend}), (torch.optim, {})):
        params = cases.parameters([(9,), (2, 3)], device=target.device)
        optimizer = Lookahead(module.AdamW(params, lr=0.1, **options))
        for t in range(8):
            if resumed and t == 5:
                saved = copy.deepcopy(optimizer.base.state_dict())
                optimizer.base.load_state_dict(saved)
                optimizer.param_groups, optimizer.state = optimizer.base.param_groups, optimizer.base.state
            cases.set_gradients(params, t)
            optimizer.step()
        assert all(optimizer.base.state[p]["step"].item() == 8 for p in params)
        runs.append(cases.tensors_of(optimizer.base))
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key])
