"""Accelerate: its wrapper of an optimizer, accumulation, clipping, bf16, saved states, skipped steps."""

import math

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

import fused_adamw


@pytest.fixture(autouse=True)
def fresh_state():
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def prepared(module, precision="bf16"):
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    optimizer = module.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    x = torch.randn(80, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    return accelerator, *accelerator.prepare(model, optimizer, schedule, loader)


def train(accelerator, model, optimizer, schedule, loader):
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_follows_torchs(precision):
    runs = []
    for module in (fused_adamw, torch.optim):
        accelerate.state.AcceleratorState._reset_state(True)
        parts = prepared(module, precision)
        runs.append(train(*parts))
        assert not parts[2].step_was_skipped
        if module is fused_adamw:
            assert {own["step"].item() for own in parts[2].optimizer.state.values()} == {10}
    assert runs[0] == pytest.approx(runs[1], rel=1e-4 if precision == "no" else 0.05)
    assert sum(runs[0][-4:]) < sum(runs[0][:4])


def test_a_saved_state_resumes_to_the_same_bits(tmp_path):
    accelerator, *parts = prepared(fused_adamw)
    train(accelerator, *parts)
    accelerator.save_state(str(tmp_path))
    train(accelerator, *parts)
    expected = [p.detach().clone() for p in parts[0].parameters()]
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator, *parts = prepared(fused_adamw)
    accelerator.load_state(str(tmp_path))
    train(accelerator, *parts)
    assert all(torch.equal(p, q) for p, q in zip(parts[0].parameters(), expected, strict=True))


def test_a_skipped_step_is_seen():
    """By its patched ``step``, which the scaler must not call; the scheduler is not to advance then."""
    accelerate.Accelerator(cpu=True)
    p = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AcceleratedOptimizer(fused_adamw.AdamW([p], lr=0.1), device_placement=False, scaler=scaler)
    for bad in (True, False, True):
        before = p.detach().clone()
        scaler.scale(p.sum()).backward()
        if bad:
            p.grad[1] = math.inf
        optimizer.step()
        assert optimizer.step_was_skipped == bad
        assert torch.equal(p, before) == bad
        optimizer.zero_grad()
    assert optimizer.optimizer.state[p]["step"].item() == 1
