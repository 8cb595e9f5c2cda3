"""The state of a parameter: when it is made, in which dtypes, and what happens where it is cleared."""

import pytest
import torch

from tests import cases
from tests.test_checkpoints import steps
from tests.test_formats import ALL


@pytest.mark.parametrize(("name", "options"), [*cases.SHARED, *cases.OURS], ids=cases.name_of)
def test_init_state_makes_what_the_first_step_would(name, options, target):
    eager, lazy = (cases.parameters([(9,), (0,), ()], torch.bfloat16, target.device) for _ in range(2))
    a, b = (cases.make(name, ps, options, backend=target.backend) for ps in (eager, lazy))
    eager[1].requires_grad_(False)
    a.init_state()
    assert [p in a.state for p in eager] == [True, False, True]
    eager[1].requires_grad_(True)
    made = {k: t for k, t in cases.tensors_of(a).items() if not k.endswith(".p")}
    assert not any(t.any() for k, t in made.items() if not k.endswith(".ema"))
    addresses = [t.data_ptr() for t in made.values()]
    for t in range(3):
        steps(a, [t])
        steps(b, [t])
    a.init_state()  # what is there stays
    after = cases.tensors_of(a)
    assert [after[k].data_ptr() for k in made] == addresses
    cases.assert_same_bits(after, cases.tensors_of(b))


def test_init_state_refuses_what_a_step_refuses_and_makes_nothing_then():
    good, bad = cases.parameters([(3,), (3,)])
    bad.data = bad.data[:1].expand(3)
    optimizer = cases.make("AdamW", [good, bad], {})
    with pytest.raises(ValueError, match=r"AdamW: group 0, parameter 1 \(shape \[3\]\): its elements share memory"):
        optimizer.init_state()
    assert not optimizer.state


def test_state_that_was_cleared_is_forgotten(target):
    """The step after it is a first step, from zero moments."""
    for forget in (lambda o, p: o.state.clear(), lambda o, p: o.state.pop(p), lambda o, p: o.state[p].clear()):
        p = cases.parameters([(9,)], device=target.device)[0]
        optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
        steps(optimizer, range(3))
        twin = torch.nn.Parameter(p.detach().clone())
        forget(optimizer, p)
        fresh = cases.make("AdamW", [twin], {}, backend=target.backend)
        steps(optimizer, range(3, 5))
        steps(fresh, range(3, 5))
        cases.assert_same_bits(cases.tensors_of(optimizer), cases.tensors_of(fresh))


def test_moments_keep_the_dtype_they_were_declared_with(target):
    p = cases.parameters([(3,)], torch.float16, target.device)[0]
    p.grad = torch.ones_like(p)
    for declared, expected in ((None, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)):
        optimizer = cases.make("AdamW", [p], {"state_dtype": declared}, backend=target.backend)
        optimizer.step()
        assert {k: v.dtype for k, v in optimizer.state[p].items()} == {
            "step": torch.float32,
            "exp_avg": expected,
            "exp_avg_sq": expected,
        }


def test_a_step_of_one_element_keeps_its_memory(target):
    """Processes may share it, as in A3C: it becomes a view of shape () of the same memory."""
    p = cases.parameters([(9,)], device=target.device)[0]
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    shared = torch.zeros(1).share_memory_()
    optimizer.state[p]["step"] = shared
    for t in range(3):
        steps(optimizer, [t])
        assert shared.tolist() == [t + 1]
    assert optimizer.state[p]["step"].shape == ()
    assert optimizer.state[p]["step"].is_shared()
    optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, [3])
    assert optimizer.state[p]["step"].item() == 4
    assert shared.item() == 3  # a loaded one is a copy, as all that is loaded


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        ("exp_avg", "running", TypeError, "its state 'exp_avg' is a str, and the parameter torch.float32: load"),
        ("exp_avg_sq", torch.ones(2, 3, dtype=torch.complex64), TypeError, "its state 'exp_avg_sq' is torch.complex64"),
        ("exp_avg", torch.ones(2, 3, dtype=torch.int32), TypeError, "its state 'exp_avg' is torch.int32"),
        ("step", "3", TypeError, "its state 'step' is a str, and must be a number: load"),
        ("step", torch.ones(3), ValueError, r"its state 'step' is torch.float32 of shape \[3\], and must be a number"),
        ("step", torch.tensor(1j), ValueError, r"its state 'step' is torch.complex64 of shape \[\]"),
        ("step", torch.tensor(float("inf")), ValueError, "its state 'step' is inf, which no number of steps can be"),
        ("step", float("nan"), ValueError, "its state 'step' is nan"),
        ("step", -2, ValueError, "its state 'step' is -2.0"),
    ],
)
def test_a_state_that_no_step_can_use_is_refused(key, value, error, text, target):
    """With its parameter, before anything is written, and by init_state() too."""
    good, p = cases.parameters([(9,), (2, 3)], device=target.device)
    optimizer = cases.make("AdamW", [{"params": [good]}, {"params": [p]}], {}, backend=target.backend)
    steps(optimizer, range(2))
    before = {k: t.clone() for k, t in cases.tensors_of(optimizer).items() if k != f"1.{key}"}
    optimizer.state[p][key] = value
    for act in (lambda: steps(optimizer, [2]), optimizer.init_state):
        with pytest.raises(error, match=rf"^AdamW: group 1, parameter 0 \(shape \[2, 3\]\): {text}"):
            act()
    optimizer.state[p].pop(key)
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    steps(optimizer, [2])


@pytest.mark.pairwise(
    "cuda",
    case=[("AdamW", {}), ("SGD", {"momentum": 0.9}), *(("AdamW", o) for o in ALL)],
    dtype=[torch.float64, torch.bfloat16, torch.float16],
)
def test_the_default_dtype_changes_nothing(case, dtype, target):
    """Neither the state's dtypes nor a bit: where it is made, stepped, saved, loaded and exported."""
    name, options = case
    found = []
    for default in (torch.float32, dtype):
        params = cases.parameters([(5003, 1), (7, 9), ()], torch.bfloat16, target.device)
        torch.set_default_dtype(default)
        try:
            optimizer = cases.make(name, params, {**options, "max_grad_norm": 0.5}, backend=target.backend)
            for t in range(3):
                gradients = torch.Generator().manual_seed(t)
                for p in params:
                    p.grad = torch.randn(p.shape, dtype=torch.float32, generator=gradients).to(p)
                optimizer.step()
                if t == 1:
                    optimizer.load_state_dict(optimizer.export())
        finally:
            torch.set_default_dtype(torch.float32)
        found.append({**cases.tensors_of(optimizer), "norm": optimizer.grad_norm})
    cases.assert_same_bits(*found)
