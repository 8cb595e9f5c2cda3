"""The state of a parameter: when it is made, in which dtypes, and what happens where it is cleared."""

import pytest
import torch

from tests import cases
from tests.test_checkpoints import steps


@pytest.mark.parametrize(("name", "options"), [*cases.SHARED, *cases.OURS], ids=cases.name_of)
def test_init_state_makes_what_the_first_step_would(name, options, target):
    eager, lazy = (cases.parameters([(9,), (0,), ()], torch.bfloat16, target.device) for _ in range(2))
    a, b = (cases.make(name, ps, options, backend=target.backend) for ps in (eager, lazy))
    eager[1].requires_grad_(False)
    a.init_state()
    assert [p in a.state for p in eager] == [True, False, True]
    eager[1].requires_grad_(True)
    made = {k: t for k, t in cases.tensors_of(a).items() if not k.endswith(".p")}
    assert not any(t.any() for t in made.values())
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
