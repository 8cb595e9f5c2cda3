"""timm: a registered class, made by timm's factory with layer decay, and driven by timm's schedule."""

import pytest
import timm
import torch
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler

import fused_adamw

SIZE = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


@pytest.fixture
def registered():
    default_registry.register(OptimInfo(name="fusedadamw", opt_class=fused_adamw.AdamW, has_betas=True))
    yield
    del default_registry._optimizers["fusedadamw"]


def train(name):
    """Return the optimizer, the learning rates of its first epoch and the loss of every step."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**SIZE)
    optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    schedule = CosineLRScheduler(optimizer, t_initial=8)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    rates, losses = [group["lr"] for group in optimizer.param_groups], []
    for epoch in range(8):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(epoch + 1)
        losses.append(loss.item())
    return optimizer, rates, losses


def test_a_run_follows_torchs(registered):
    optimizer, rates, ours = train("fusedadamw")
    assert type(optimizer) is fused_adamw.AdamW
    assert len(optimizer._plans) == 1  # one launch for all groups
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    # The embedding, two blocks, and the last norm with the head.
    assert sorted(set(rates)) == pytest.approx([1e-3 * 0.75**i for i in (3, 2, 1, 0)])
    assert ours == pytest.approx(train("adamw")[2], rel=1e-3)
    assert ours[-1] < ours[0] - 0.3
