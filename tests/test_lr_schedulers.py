"""Every learning rate scheduler of torch, and rates that change their kind or turn negative, beside torch's."""

import copy
import math
import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from fused_adamw import backends, formats
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
@pytest.mark.pairwise("cuda", schedule=list(SCHEDULES), name=["AdamW", "SGD"], tensor_lr=[False, True])
def test_scheduler(schedule, name, tensor_lr, target):
    """The same lr, betas and momentum as under torch's, at every step, and the same parameters."""
    tensor_lr &= schedule != "CyclicLR"  # which multiplies lists of tensors and floats, and fails on torch's too
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


def stepped(a, b, t=0):
    """One step of both on equal gradients."""
    for optimizer in (a, b):
        cases.set_gradients(params_of(optimizer), t)
        optimizer.step()


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_schedule_that_ends_below_zero_by_rounding(name, kind, target):
    """Its last steps change nothing but the moments, without a warning; and the run can be saved and resumed."""
    a, b = pair(name, target, lr=1e-3)
    for optimizer in (a, b):
        optimizer.param_groups[0]["lr"] = kind(1e-3)
    schedules = [lr_scheduler.LinearLR(o, start_factor=1 / 3, end_factor=0.0, total_iters=10) for o in (a, b)]
    below = []
    for t in range(14):
        before = [p.detach().clone() for p in params_of(a)]
        stepped(a, b, t)
        below.append(float(a.param_groups[0]["lr"]) < 0)
        if below[-1]:
            assert all(map(torch.equal, before, params_of(a)))
        for schedule in schedules:
            schedule.step()
    assert any(below)
    assert_close(a, b)
    twin, _ = pair(name, target)
    twin.load_state_dict(copy.deepcopy(a.state_dict()))
    cases.set_gradients(params_of(twin), 0)
    twin.step()


@pytest.mark.parametrize("change", [{"lr": -0.1}, {"lr": torch.tensor(-0.1)}, {"lr": -1}, {"lr": -1e-11}])
@pytest.mark.parametrize("native", [True, False])
def test_a_negative_rate_ascends_as_in_torch(change, native, target, monkeypatch):
    """With one warning, which names the group; at the first step, and while a plan holds."""
    if not native:
        if target.backend != "reference":
            return  # the others are made of the extension
        monkeypatch.setattr(backends, "native", lambda: None)
    for steps in (0, 1):
        formats.warn_once.cache_clear()
        pairs = []
        for module in (cases.fused_adamw, torch.optim):
            params = cases.parameters([(3,), (4, 2)], device=target.device)
            extra = {"backend": target.backend} if module is cases.fused_adamw else {}
            pairs.append(module.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=1e-2, **extra))
        a, b = pairs
        for t in range(steps):
            stepped(a, b, t)
        for optimizer in (a, b):
            optimizer.param_groups[1].update(copy.deepcopy(change))
        if steps and isinstance(change["lr"], torch.Tensor):  # of a tensor the next plan tells: to look takes time
            stepped(a, b, 1)
            params_of(a)[1].data = params_of(a)[1].data.t().contiguous().t()
        with pytest.warns(RuntimeWarning, match="AdamW: the learning rate of group 1 is negative"):
            stepped(a, b, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in range(3, 6):
                if not isinstance(change["lr"], torch.Tensor):
                    for optimizer in (a, b):
                        optimizer.param_groups[1]["lr"] = -0.01 * t
                stepped(a, b, t)
        assert_close(a, b)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("AdamW", {"weight_decay": -0.1}),
        ("AdamW", {"weight_decay": -5e-21}),
        ("Adam", {"eps": -1e-3}),
        ("SGD", {"momentum": -0.5}),
        ("SGD", {"momentum": 0.0, "nesterov": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "dampening": 0.1}),
    ],
)
def test_what_torch_takes_at_a_step(name, change, target):
    """Options that the constructor refuses, set by hand or by a schedule: the step is torch's."""
    extra = {"momentum": 0.9} if name == "SGD" else {}
    for steps in (0, 1):
        a, b = pair(name, target, lr=1e-2, **extra)
        for t in range(steps):
            stepped(a, b, t)
        for optimizer in (a, b):
            optimizer.param_groups[0].update(change)
        for t in range(2, 5):
            stepped(a, b, t)
        assert_close(a, b)


def test_construction_and_loading_are_strict():
    p = cases.parameters([(3,)])[0]
    for lr in (-5e-21, -0.1):
        with pytest.raises(ValueError, match=f"Invalid learning rate: {lr}"):
            cases.make("AdamW", [p], {"lr": lr})
    saved = cases.make("AdamW", [p], {}).state_dict()
    for option, text in (
        ({"lr": -0.1}, "learning rate: -0.1"),
        ({"weight_decay": math.nan}, "weight_decay value: nan"),
        ({"betas": (0.9, 1.0)}, "beta parameter at index 1: 1.0"),
    ):
        loaded = copy.deepcopy(saved)
        loaded["param_groups"][0].update(option)
        with pytest.raises(ValueError, match=rf"Invalid {text} \(group 0\)"):
            cases.make("AdamW", [p], {}).load_state_dict(loaded)


@pytest.mark.parametrize("name", ["AdamW", "SGDW"])
def test_a_learning_rate_that_requires_a_gradient(name, target):
    """It is stepped with as it is, without torch's warning of a conversion, and without a graph."""
    lr = torch.tensor(0.1, requires_grad=True)
    extra = {"momentum": 0.9} if name == "SGDW" else {}
    rates = []
    for rate in (lr, 0.1):
        ps = cases.parameters([(3,)], device=target.device)
        optimizer = cases.make(name, ps, {"lr": rate, "decouple_lr": True, **extra}, backend=target.backend)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for t in range(3):
                cases.set_gradients(ps, t)
                optimizer.step()
        assert not any(value.requires_grad for value in optimizer.state[ps[0]].values())
        rates.append(ps[0])
    torch.testing.assert_close(*rates)
