"""Lists so long that all threads follow their tensors: whatever changes, and wherever, a step is that of one thread."""

import pytest
import torch

from fused_adamw import plan
from tests import cases
from tests.test_counts import mesh  # noqa: F401

LONG = 520  # more than 512, half of them for each of two threads
PLACES = {"first": 0, "middle": 260, "last": 519}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def builds(monkeypatch):
    """The optimizer of every plan that is built."""
    built, true = [], plan.build
    monkeypatch.setattr(plan, "build", lambda o, *args, **kwargs: built.append(o) or true(o, *args, **kwargs))
    return built


class Other(torch.nn.Parameter):
    """A parameter of a class that is not torch's."""


def lay_gradient_out(optimizer, p):
    p.grad = torch.empty(3, 2).t().copy_(p.grad)


def take_data(optimizer, p):
    p.grad = p.data


def cross_memory(optimizer, p):
    whole = torch.ones(7)
    p.data, p.grad = whole[:6].view(2, 3), whole[1:].view(2, 3)


def swap_state(optimizer, p):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] + 1


def swap_state_dict(optimizer, p):
    optimizer.state[p] = {key: t + 1 for key, t in optimizer.state[p].items()}


def misshape_state(optimizer, p):
    optimizer.state[p]["exp_avg"] = torch.ones(2)


def move_state(optimizer, p):
    optimizer.state[p]["exp_avg"].set_(optimizer.state[p]["exp_avg"] + 1)


def clone_lazily(optimizer, p):
    """Clones that have the memory of their originals until one of them is written."""
    return [torch._lazy_clone(t) for t in (p.data, *optimizer.state[p].values())]


def share_counter(optimizer, p):
    optimizer.state[p]["step"] = optimizer.state[optimizer.param_groups[0]["params"][7]]["step"]


def drop_state(optimizer, p):
    del optimizer.state[p]


def drop_parameter(optimizer, p):
    optimizer.param_groups[0]["params"] = [q for q in optimizer.param_groups[0]["params"] if q is not p]


def replace(optimizer, p, make=torch.nn.Parameter):
    params = optimizer.param_groups[0]["params"]
    k = next(k for k, q in enumerate(params) if q is p)
    params[k] = make(p.detach() + 1)
    params[k].grad = torch.ones_like(params[k])


CHANGES = {
    "nothing": lambda o, p: None,
    "no gradient": lambda o, p: setattr(p, "grad", None),
    "another gradient": lambda o, p: setattr(p, "grad", p.grad + 1),
    "another layout of the gradient": lay_gradient_out,
    "the parameter as its gradient": take_data,
    "a gradient across the parameter": cross_memory,
    "a freed gradient": lambda o, p: p.grad.untyped_storage().resize_(0),
    "another state": swap_state,
    "another dict": swap_state_dict,
    "a state of another shape": misshape_state,
    "a state that moved": move_state,
    "a freed state": lambda o, p: o.state[p]["exp_avg"].untyped_storage().resize_(0),
    "a freed counter": lambda o, p: o.state[p]["step"].untyped_storage().resize_(0),
    "copied on write": clone_lazily,
    "a counter of two": share_counter,
    "one more entry": lambda o, p: o.state[p].update(note=1),
    "no state": drop_state,
    "a parameter that moved": lambda o, p: setattr(p, "data", p.data + 1),
    "memory of another parameter": lambda o, p: setattr(p, "data", o.param_groups[0]["params"][7].data),
    "a freed parameter": lambda o, p: p.untyped_storage().resize_(0),
    "another class": lambda o, p: setattr(p, "__class__", Other),
    "another parameter": replace,
    "one parameter less": drop_parameter,
}


def outcomes(change, k, threads, builds):
    """All that can be seen of three steps after a change of the parameter in place k, by one thread and by two."""
    for n in (1, 2):
        threads(n)
        ps = cases.parameters([(2, 3)] * LONG)
        cases.set_gradients(ps, 0)
        optimizer = cases.make("AdamW", ps, {}, backend="cpu")
        for _ in range(2):
            optimizer.step()
        others = change(optimizer, ps[k]) or []
        builds.clear()
        seen = []
        for _ in range(3):
            error = ""
            try:
                optimizer.step()
            except (AttributeError, RuntimeError, TypeError, ValueError) as raised:
                error = str(raised)
            seen += len(builds), error
        seen += [p._version for p in optimizer.param_groups[0]["params"]]
        tensors = [*cases.tensors_of(optimizer).values(), *others]
        tensors = [getattr(t, "_local_tensor", t) for t in tensors]
        yield seen, torch.cat([t.flatten().double() for t in tensors if t.untyped_storage().nbytes()])


def check_change(change, k, threads, builds):
    (seen, numbers), (seen_by_two, numbers_of_two) = outcomes(change, k, threads, builds)
    assert seen_by_two == seen
    assert torch.equal(numbers_of_two, numbers)


@pytest.mark.parametrize("k", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_wherever_it_is(change, k, threads, builds):
    check_change(change, k, threads, builds)


@pytest.mark.parametrize("k", PLACES.values(), ids=PLACES)
def test_of_two_errors_the_first_in_the_list_is_raised(k, threads, builds):
    def change(optimizer, p):
        misshape_state(optimizer, optimizer.param_groups[0]["params"][100])
        cross_memory(optimizer, p)

    check_change(change, k, threads, builds)


@pytest.mark.parametrize("k", PLACES.values(), ids=PLACES)
def test_a_dtensor_among_plain_parameters(k, threads, builds, mesh):  # noqa: F811
    from torch.distributed.tensor import Shard, distribute_tensor

    on = mesh("cpu")
    check_change(
        lambda optimizer, p: replace(
            optimizer, p, lambda data: torch.nn.Parameter(distribute_tensor(data, on, [Shard(0)]))
        ),
        k,
        threads,
        builds,
    )
