"""The rows of scalars: whatever is set by hand is in the next one, or is an error at every step."""

import math

import numpy as np
import pytest
import torch

import fused_adamw
from fused_adamw import backends, plan, scalars
from tests import cases


def test_what_a_step_cannot_use_is_an_error_at_every_step():
    """Not only at the first, which has seen it; the learning rate and an option that the rows alone read."""
    p = cases.parameters([(3,)])[0]
    optimizer = cases.make("AdamW", [p], {"lr": np.float64(0.5)})
    cases.set_gradients([p], 0)
    optimizer.step()
    (group,), own, before = optimizer.param_groups, optimizer.state[p], p.detach().clone()
    assert scalars.adam_hyper(group)[0] == 0.5
    for name, values in (("amsgrad", ()), ("eps", (None, math.inf)), ("lr", (None, math.nan, -math.inf, "1"))):
        was = group.pop(name)
        for value in values:
            group[name] = value
            for _ in range(2):
                with pytest.raises((ValueError, TypeError), match=r"\(group 0\)"):
                    optimizer.step()
            del group[name]
        with pytest.raises(ValueError, match=f"group 0 has no '{name}'"):
            optimizer.step()
        group[name] = was
    for count in (-1, math.inf, math.nan):
        own["step"].fill_(count)
        with pytest.raises(ValueError, match=f"parameter 0 .*'step' is {float(count)}"):
            optimizer.step()
        with pytest.raises(ValueError, match="'step' is negative or no finite number"):
            scalars.adam(group, count + 1)
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0)


CHANGES = [
    {},
    {"lr": 0.25},
    {"lr": 1},
    {"lr_mult": 0.3},
    {"lr": 0.7},
    {"wd_mult": 1.7},
    {"lr": torch.tensor(0.125)},
    {"lr": -5e-21},
    {"lr": -0.25},
    {"lr": torch.tensor(-0.25, requires_grad=True)},
    {"lr": -1e-9, "initial_lr": 1e-2},
    {"lr": 0.5, "base_lr": 2.0},
    {"weight_decay": -1e-18},
    {"weight_decay": -0.3},
    {"weight_decay": 0.3},
    {"decouple_lr": False},
    {"decoupled_weight_decay": False},
    {"maximize": True},
    {"name": "mine"},
    {"betas": [0.5, 0.75], "momentum": 0.9},
    {"degenerated_to_sgd": False},
    {"betas": (0.5, 0.9), "lr": 0.125},
    {"betas": (0.0, 0.0)},
    {"final_lr": 0.3, "gamma": 1e-7},
    {"final_lr": 0.0},
    {"eps": 1e-3, "dampening": 0.25, "lr_in_momentum": True},
    {"nesterov": True, "dampening": 0},
]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("cls", [fused_adamw.AdamW, fused_adamw.RAdam, fused_adamw.AdaBoundW, fused_adamw.SGDW])
def test_what_is_set_by_hand_is_in_the_next_row(cls, native, monkeypatch):
    """The rows have the bits of scalars.py whatever changes, tensors and lists within themselves too."""
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    own = {"decoupled_weight_decay": True} if cls is fused_adamw.RAdam else {}
    optimizer = cls(
        [{"params": params[:2]}, {"params": params[2:], "lr": 2.0}], 0.5, weight_decay=0.1, decouple_lr=True, **own
    )
    optimizer.init_state()
    for i, p in enumerate(params):
        p.grad = torch.ones(1)
        optimizer.state[p]["step"].fill_(9.0 * i)
    groups = optimizer.param_groups
    row_of, kind = scalars.ROWS[optimizer.family], bool
    if not native:
        monkeypatch.setattr(backends, "native", lambda: None)
        optimizer.requested = "reference"
    optimizer.plan_key = kind
    seen = plan.build(optimizer).watch

    def rows():
        return [list(row) for row in seen.scalar_rows(groups)]

    for change in CHANGES:
        groups[1].update(change)
        assert seen.poll(groups, optimizer.state, kind)
        assert rows() == [
            list(row_of(group, step)) for group, step in zip([groups[0], *groups], (1, 10, 19), strict=True)
        ]
        assert [seen.scalars_of(i) for i in range(3)] == [0, 1, 2]
    groups[1]["lr"] = torch.tensor(0.5)
    for value in (0.75, 0.25):
        groups[1]["lr"].fill_(value)
        groups[1]["betas"] = [0.5, value]
        for beta in (0.875, 0.625):
            groups[1]["betas"][0] = beta
            assert seen.poll(groups, optimizer.state, kind)
            assert rows()[2] == list(row_of(groups[1], 19))
    groups[1].pop("lr")
    with pytest.raises(KeyError, match="lr"):
        seen.poll(groups, optimizer.state, kind)
        rows()


def test_negative_numbers_of_rounding_size():
    """They count as 0: down to -1e-12, for a learning rate under a scheduler down to -1e-6 of where it began."""
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False, "decoupled_weight_decay": True}

    def row(**changes):
        return scalars.adam({"weight_decay": 0.5, **group, **changes}, 1)

    for lr, initial, counts in (
        (-1e-12, None, 0.0),
        (-1.1e-12, None, -1.1e-12),
        (-1e-6, None, -1e-6),
        (-1e-8, 1e-2, 0.0),
        (-1e-6, torch.tensor(1.0), 0.0),
        (-1.1e-8, 1e-2, -1.1e-8),
        (-1e-12, 1e-9, 0.0),
        (torch.tensor(-4e-12), 1e-3, 0.0),
    ):
        under_a_scheduler = {} if initial is None else {"initial_lr": initial}
        step_size = row(lr=lr, **under_a_scheduler).step_size
        assert step_size == counts / (1 - 0.9)
        assert math.copysign(1, step_size) == (-1 if counts else 1)  # no -0.0
    assert row(lr=1.0, weight_decay=-1e-12).decay == 0.0
    assert row(lr=1.0, weight_decay=-1e-11, initial_lr=1e9).decay == -1e-11
    assert row(eps=-1e-13).eps == 0.0


@pytest.mark.parametrize(
    ("name", "decouple_lr"),
    [
        *((name, False) for name in ("AdamW", "Adam", "RAdam", "AdaBound", "SGD", "SGDW")),
        *(("AdamW", True), ("SGDW", True)),
    ],
)
def test_multipliers_of_a_group(name, decouple_lr, target):
    """They multiply rate and decay, whatever a schedule sets; the paper's decay does not depend on that of the rate."""
    ours, twins = (cases.parameters([(5,), (6,)], device=target.device) for _ in range(2))
    options = {"lr": 0.5, "weight_decay": 0.25, **({"decouple_lr": True} if decouple_lr else {})}
    groups = [{"params": ours[:1]}, {"params": ours[1:], "lr_mult": 0.25, "wd_mult": 0.5}]
    a = cases.make(name, groups, options, backend=target.backend)
    b = cases.make(name, [{"params": [p]} for p in twins], options, backend=target.backend)
    for t in range(5):
        for params in (ours, twins):
            cases.set_gradients(params, t)
        for group in a.param_groups:
            group["lr"] = 0.5 / (t + 1)
        b.param_groups[0]["lr"] = 0.5 / (t + 1)
        b.param_groups[1].update(lr=0.125 / (t + 1), weight_decay=0.125)
        if decouple_lr:
            b.param_groups[1]["base_lr"] = 0.125
        if t == 3:
            for o in (a, b):
                o.load_state_dict(o.state_dict())
        a.step()
        b.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    a.param_groups[1]["lr_mult"] = 0
    before = ours[1].detach().clone()
    a.step()
    assert torch.equal(ours[1], before)


@pytest.mark.parametrize("name", ["lr_mult", "wd_mult"])
def test_multipliers_that_are_no_numbers(name, target):
    """Refused when they are given, and when they are set by hand."""
    p = cases.parameters([(3,)], device=target.device)[0]
    for bad, error in ((-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)):
        with pytest.raises(error, match=rf"{name}.*\(group 0\)"):
            fused_adamw.AdamW([{"params": [p], name: bad}])
        optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
        cases.set_gradients([p], 0)
        optimizer.step()
        before = p.detach().clone()
        optimizer.param_groups[0][name] = bad
        for _ in range(2):
            with pytest.raises(error, match=rf"{name}.*\(group 0\)"):
                optimizer.step()
        assert torch.equal(p, before)
