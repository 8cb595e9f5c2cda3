"""Every learning rate scheduler of torch, and a learning rate that changes its kind, beside torch's optimizers."""

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from tests import cases
from tests.training import assert_close, pair, params_of

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5], gamma=0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=4), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, T_max=5)], milestones=[3]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_in_the_table():
    assert SCHEDULES.keys() - {"SWALR"} == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step.*")  # SequentialLR's own call
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_scheduler(schedule, name, tensor_lr, target):
    """The same lr, betas and momentum as under torch's, at every step, and the same parameters."""
    if tensor_lr and schedule == "CyclicLR":
        return  # it multiplies lists of tensors and floats, and fails on torch's too
    lr = torch.tensor(1e-2, dtype=torch.float64) if tensor_lr else 1e-2
    a, b = pair(name, target, **({"momentum": 0.9} if name == "SGD" else {}), lr=lr)
    if tensor_lr:
        b.param_groups[0]["lr"] = lr.clone()
    both = [(o, SCHEDULES[schedule](o)) for o in (a, b)]
    rates = []
    for t in range(10):
        for optimizer, scheduler in both:
            cases.set_gradients(params_of(optimizer), t)
            optimizer.step()
            scheduler.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
        for key in ("lr", "betas", "momentum"):
            assert a.param_groups[0].get(key) == b.param_groups[0].get(key)
        rates.append(float(a.param_groups[0]["lr"]))
    assert len(set(rates)) > 1
    assert isinstance(a.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    assert_close(a, b)


@pytest.mark.parametrize("kind", ["float", "cpu", "device"])
def test_lr_changes_its_kind_between_steps(kind, target):
    a, b = pair("AdamW", target, lr=1e-2)
    for t in range(6):
        lr = 1e-2 * (t + 1)
        b.param_groups[0]["lr"] = lr
        if t % 2:  # 0-dim, and of one element
            value = torch.full([1] * (t % 4 == 3), lr, dtype=torch.float64)
            lr = {"float": lr, "cpu": value, "device": value.to(target.device)}[kind]
        a.param_groups[0]["lr"] = lr
        for optimizer in (a, b):
            cases.set_gradients(params_of(optimizer), t)
            optimizer.step()
    assert_close(a, b)
