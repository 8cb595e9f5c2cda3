"""A step allocates nothing after the first."""

import pytest
import torch

from tests import cases
from tests.training import params_of


def allocated(profile):
    """Bytes of each allocation of torch's on the CPU."""
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_a_step_allocates_nothing_after_the_first(way):
    """On the CPU: every dtype, amsgrad, late and moved gradients, layouts that need a copy; a schedule."""
    params = [*cases.parameters([(5000,), (30, 40)]), *cases.parameters([(70, 80)], torch.bfloat16)]
    params[1].grad = torch.ones(40, 30).t()
    strided = torch.nn.Parameter(torch.ones(50, 60)[:, ::2])
    groups = [{"params": params}, {"params": [strided], "amsgrad": True}]
    optimizer = cases.make("AdamW", groups, {}, backend="cpu")

    def step(t):
        if way == "step":
            optimizer.step()
        else:
            for p in params_of(optimizer):
                optimizer.step_parameter(p)
        optimizer.param_groups[0]["lr"] = 1e-3 / (t + 1)

    def profiled(t):
        for p in params_of(optimizer):
            p.grad = torch.ones(40, 30).t() if p.shape == (30, 40) else torch.ones_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(t)
        return allocated(profile)

    assert sum(profiled(0)) > 5000 * 8  # the moments, at the least: the profiler does see allocations
    assert [profiled(t) for t in (1, 2, 3)] == [[], [], []]


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_allocates_nothing_on_the_device_after_the_first(capturable):
    params = cases.parameters([(5000,), (30, 40)], device="cuda")
    optimizer = cases.make("AdamW", params, {}, backend="triton", capturable=capturable)
    for t in range(4):
        cases.set_gradients(params, t)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if t:
            assert torch.cuda.max_memory_allocated() == before
