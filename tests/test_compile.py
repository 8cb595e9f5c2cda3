"""torch.compile of a training step, and of the optimizer's step alone."""

import pytest
import torch
from torch.optim import lr_scheduler

from tests import cases
from tests.training import network, ours_twice, params_of


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own: the loss is returned from a compiled frame
@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_torch_compile_of_a_training_step(way):
    """step() is a graph break; forward and loss are compiled, once, whatever a schedule does."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, twin = network(), network()
    optimizers = [cases.make("AdamW", m.parameters(), {"lr": 1e-2}) for m in (model, twin)]
    schedules = [lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20) for o in optimizers]

    def step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        if way == "step":
            optimizer.step()
        else:
            for p in model.parameters():
                optimizer.step_parameter(p)
        optimizer.zero_grad()
        return loss.detach()

    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter)
    frames = []
    for t in range(6):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        assert torch.equal(compiled(model, optimizers[0], x), step(twin, optimizers[1], x))
        frames.append(counter.frame_count)
        for s in schedules:
            s.step()
    cases.assert_same_bits(*(cases.tensors_of(o) for o in optimizers))
    assert frames == [frames[0]] * 6
    assert frames[0] <= 2  # the forward, and the detach; torch.optim.AdamW makes 4
    torch._dynamo.reset()


def test_torch_compile_of_the_step_itself(target):
    """The pattern of torch's recipe for a compiled optimizer: it runs, uncompiled."""
    torch._dynamo.reset()
    a, b = ours_twice(target)
    compiled = torch.compile(lambda: a.step(), backend="eager")
    for t in range(3):
        for o in (a, b):
            cases.set_gradients(params_of(o), t)
        compiled()
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    torch._dynamo.reset()
