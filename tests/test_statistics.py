"""What steps measure beside their update: norms, and the shares of clipped and of skipped steps."""

import copy
import itertools

import pytest
import torch

from tests import cases
from tests.test_averages import FORMS, KINDS, SHAPES
from tests.test_formats import BF16, F32

# (class, options): each rule, with decay.
RULES = [
    *KINDS,
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.3, "cautious": "decay"}),
    ("AdaBoundW", {"lr": 1e-2, "weight_decay": 0.3}),
    ("Adam", {"lr": 1e-2, "betas": (0.0, 0.9), "first_moment": False, "weight_decay": 0.1}),
]


def norms(optimizer, i=0):
    return [x.double().cpu() for x in optimizer.statistics.groups[i]]


def wide(params):
    return [p.detach().double().cpu().clone() for p in params]


def of_each(tensors):
    return torch.stack([x.norm() for x in tensors])


@pytest.mark.float64
@pytest.mark.parametrize("dtype", [F32, torch.float64])
@pytest.mark.parametrize(("name", "options"), RULES, ids=cases.name_of)
def test_norms_are_those_of_the_tensors(name, options, dtype, target):
    """Of each parameter and of a group, with what a parameter without a gradient does."""
    params = cases.parameters([*SHAPES, (8193,)], dtype, device=target.device)
    groups = [{"params": params[:3], "statistics": "parameter"}, {"params": params[3:]}]
    optimizer = cases.make(name, groups, options, backend=target.backend, statistics=True)
    for t in range(4):
        cases.set_gradients(params, t)
        live = [p for k, p in enumerate(params) if k != 1 or t not in (1, 2)]
        params[1].grad = params[1].grad if params[1] in set(live) else None
        before = wide(params)
        optimizer.step()
        after = wide(params)
        gradients = wide([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        updates = [a - b for a, b in zip(after, before, strict=True)]
        after = [x * (p.grad is not None) for x, p in zip(after, params, strict=True)]
        for k, tensors in enumerate((gradients, updates, after)):
            tolerance = {"rtol": 1e-5 if k == 1 else 2e-6, "atol": 0}
            torch.testing.assert_close(norms(optimizer)[k], of_each(tensors[:3]), **tolerance)
            torch.testing.assert_close(norms(optimizer, 1)[k], of_each(tensors[3:]).norm(), **tolerance)
    assert all(x.dtype is F32 for x in itertools.chain(*optimizer.statistics.groups))


@pytest.mark.parametrize(("dtype", "form"), FORMS, ids=cases.name_of)
def test_nothing_else_changes_and_norms_are_taken_before_the_rounding(dtype, form, target):
    """The same bits with and without; and the norms of the reference, whose parameter is float32 until it is stored."""
    results = []
    for backend, device, asked in (
        (target.backend, target.device, {}),
        (target.backend, target.device, {"statistics": True}),
        ("reference", "cpu", {"statistics": True}),
    ):
        params = cases.parameters(SHAPES, dtype, device=device)
        optimizer = cases.make("AdamW", params, {"lr": 1e-2, "weight_decay": 0.1}, backend=backend, **form, **asked)
        for t in range(2):
            cases.set_gradients(params, t)
            optimizer.step()
        results.append((optimizer, params))
    (plain, ours), (measured, theirs), (reference, _) = results
    cases.assert_same_bits({str(k): p for k, p in enumerate(ours)}, {str(k): p for k, p in enumerate(theirs)})
    for p, q in zip(ours, theirs, strict=True):
        cases.assert_same_bits(plain.state[p], measured.state[q])
    for mine, expected in zip(norms(measured), norms(reference), strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-4 if "int8" in form.values() else 1e-5, atol=0)


def test_gradients_are_those_that_the_step_used_and_shares_count_its_outcomes(target):
    """Clipped in two of four steps, skipped in one; a skipped step leaves the norms of the last one that was taken."""
    (p,) = cases.parameters([(40, 7)], device=target.device)
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "statistics": True}
    optimizer = cases.make("AdamW", [p], {"lr": 1e-2}, backend=target.backend, **options)
    expected = []
    for size in (0.5, 3.0, 2.0, float("nan")):
        p.grad = torch.full_like(p, size / 280**0.5)
        optimizer.step()
        expected.append(min(size, 1.0) if size == size else expected[-1])
        torch.testing.assert_close(norms(optimizer)[0].item(), expected[-1], rtol=1e-4, atol=0)
    found = optimizer.statistics
    assert (found.clipped.item(), found.skipped.item()) == (0.5, 0.25)
    scaled = cases.make("AdamW", [p], {"lr": 1e-2}, backend=target.backend, statistics=True, amp_scaling=True)
    scaled.grad_scale = torch.full((), 8.0, device=target.device)
    scaled.found_inf = torch.zeros((), device=target.device)
    p.grad = torch.full_like(p, 8 / 280**0.5)
    scaled.step()
    torch.testing.assert_close(norms(scaled)[0].item(), 1.0, rtol=1e-5, atol=0)
    assert scaled.statistics.clipped.item() == scaled.statistics.skipped.item() == 0


def test_without_a_factor_the_shares_are_zero_and_a_group_without_statistics_has_none(target):
    params = cases.parameters([(4,), (5,)], device=target.device)
    groups = [{"params": params[:1]}, {"params": params[1:], "statistics": True}]
    optimizer = cases.make("SGD", groups, {"lr": 0.1}, backend=target.backend)
    cases.set_gradients(params, 0)
    optimizer.step()
    found = optimizer.statistics
    assert found.groups[0] is None
    assert found.clipped.item() == found.skipped.item() == 0


def test_the_option_may_change_between_steps_and_is_not_loaded(target):
    params = cases.parameters(SHAPES, device=target.device)
    optimizer = cases.make("AdamW", params, {}, backend=target.backend)
    group = optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match="AdamW: no group has statistics: construct the optimizer with statistics=T"):
        optimizer.statistics  # noqa: B018
    for asked, shape in ((True, ()), ("parameter", (3,)), (True, ())):
        group["statistics"] = asked
        cases.set_gradients(params, 0)
        optimizer.step()
        assert [x.shape for x in optimizer.statistics.groups[0]] == [shape] * 3
        assert all((x > 0).all() for x in optimizer.statistics.groups[0])
    other = cases.make("AdamW", params, {}, backend=target.backend)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not other.param_groups[0].get("statistics")
    group["statistics"] = "parameters"
    with pytest.raises(ValueError, match=r"statistics='parameters': must be False, True or 'parameter' \(group 0\)"):
        optimizer.step()


def test_gradient_release_is_measured_too(target):
    params = cases.parameters(SHAPES, device=target.device)
    whole = cases.make("AdamW", params, {}, backend=target.backend, statistics="parameter")
    cases.set_gradients(params, 0)
    twins = cases.parameters(SHAPES, device=target.device)
    ours = cases.make("AdamW", twins, {}, backend=target.backend, statistics="parameter")
    for p, q in zip(params, twins, strict=True):
        q.grad = p.grad.clone()
        ours.step_parameter(q)
    whole.step()
    for mine, expected in zip(norms(ours), norms(whole), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "form"), [(F32, {}), (BF16, {"state_dtype": BF16}), (BF16, {"master": "split16"})])
def test_no_bit_depends_on_the_number_of_threads(dtype, form):
    """Parts of 8192 elements are added in one order."""
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = cases.parameters([(8192 * 5 + 77,), (3,), (20000,)], dtype)
            optimizer = cases.make("AdamW", params, {}, backend="cpu", statistics="parameter", **form)
            cases.set_gradients(params, 0)
            optimizer.step()
            found.append(torch.stack(list(optimizer.statistics.groups[0])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.gpu
def test_a_captured_graph_measures_and_reading_does_not_wait(backend):
    params = cases.parameters(SHAPES, device="cuda")
    options = {"capturable": True, "max_grad_norm": 1e9, "statistics": True}
    optimizer = cases.make("AdamW", params, {"lr": 1e-2}, backend=backend, **options)
    cases.set_gradients(params, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for p in params:
        p.grad.mul_(2)
    before = optimizer.statistics.groups[0].gradient.item()
    graph.replay()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = optimizer.statistics
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.groups[0].gradient.item(), 2 * before, rtol=1e-6, atol=0)
