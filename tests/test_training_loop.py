"""What a training loop asks of an optimizer: groups, zero_grad, closures, hooks, the profiler, names, repr."""

import copy
import pickle

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_adamw import backends
from tests import cases
from tests.training import assert_close, loss_of, network, pair, params_of


def test_groups_are_added_while_training(target):
    a, b = pair("AdamW", target)
    for t in range(6):
        if t == 2:
            for optimizer in (a, b):
                late = cases.parameters([(4,), (3, 3)], device=target.device, seed=1)
                optimizer.add_param_group({"params": late, "lr": 1e-2, "weight_decay": 0.3})
        for optimizer in (a, b):
            cases.set_gradients(params_of(optimizer), t)
            optimizer.step()
    assert_close(a, b)
    assert [a.state[p]["step"].item() for p in params_of(a)] == [6, 6, 4, 4]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none, target):
    a, b = pair("AdamW", target)
    for t in range(3):
        for optimizer in (a, b):
            cases.set_gradients(params_of(optimizer), t)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
            optimizer.step()  # without gradients nothing; with zeros, a step
    assert_close(a, b)
    assert a.state[params_of(a)[0]]["step"].item() == (3 if to_none else 6)


def test_a_closure_is_evaluated_anew_at_each_step(target):
    """As LBFGS asks for it: with gradients on inside of no_grad, cleared by the closure itself."""
    a, b = pair("SGD", target, lr=0.1, momentum=0.9)
    losses = []
    for optimizer in (a, b):

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in params_of(optimizer))
            loss.backward()
            return loss

        with torch.no_grad():
            losses.append([optimizer.step(closure).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0][-1] < losses[0][0]
    assert_close(a, b)


def test_hooks_see_and_change_the_step(target):
    """Of the optimizer and of all optimizers; a pre-hook may scale the gradients, as clipping in one does."""
    a, b = pair("AdamW", target)
    calls = []

    def halve(optimizer, args, kwargs):
        calls.append("pre")
        for p in params_of(optimizer):
            p.grad.mul_(0.5)

    handles = [o.register_step_pre_hook(halve) for o in (a, b)]
    handles += [o.register_step_post_hook(lambda *_: calls.append("post")) for o in (a, b)]
    handles.append(register_optimizer_step_post_hook(lambda *_: calls.append("all")))
    try:
        for optimizer in (a, b):
            cases.set_gradients(params_of(optimizer), 1)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["pre", "post", "all"] * 2
    assert_close(a, b)


def test_state_dict_hooks(target):
    a, _ = pair("AdamW", target)
    cases.set_gradients(params_of(a), 1)
    a.step()
    seen = []
    a.register_state_dict_pre_hook(lambda o: seen.append("before"))
    a.register_state_dict_post_hook(lambda o, d: {**d, "note": "mine"})
    assert a.state_dict()["note"] == "mine"
    assert seen == ["before"]


def test_profiler_names_the_step(target):
    a, _ = pair("AdamW", target)
    cases.set_gradients(params_of(a), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        a.step()
        a.zero_grad()
    names = {event.name for event in profile.events()}
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_named_parameters(target):
    model = network(target.device)
    optimizer = cases.make("AdamW", model.named_parameters(), {}, backend=target.backend)
    loss_of(model, 0).backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == names
    twin = copy.deepcopy(model)
    other = cases.make("AdamW", twin.named_parameters(), {}, backend=target.backend)
    other.load_state_dict(saved)
    cases.assert_same_bits(cases.tensors_of(other), cases.tensors_of(optimizer))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=cases.name_of)
def test_gradients_with_a_graph_of_their_own(options, target):
    """create_graph=True, as for a penalty on the gradient's norm: a step reads the values, and adds to no graph."""
    optimizers = []
    for create_graph in (True, False):
        model = network(target.device)
        optimizer = cases.make("AdamW", model.parameters(), options, backend=target.backend)
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, t).backward(create_graph=create_graph)
            gradients = [p.grad for p in model.parameters()]
            assert all(g.requires_grad is create_graph for g in gradients)
            versions = [g._version for g in gradients]
            optimizer.step()
            assert [g._version for g in gradients] == versions
            assert not any(t.requires_grad for own in optimizer.state.values() for t in own.values())
            assert all(p.is_leaf for p in model.parameters())
        optimizers.append(optimizer)
    cases.assert_same_bits(*map(cases.tensors_of, optimizers))


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_what_belongs_to_the_optimizer_outlives_a_copy(way):
    """It stands in no group, so a class made anew of the groups has to be given it again."""
    optimizer = cases.fused_adamw.AdamW(
        cases.parameters([(9,)]), max_grad_norm=0.5, skip_nonfinite=True, amp_scaling=True, backend="reference"
    )
    made = way(optimizer)
    for name, value in {"max_grad_norm": 0.5, "skip_nonfinite": True, "amp_scaling": True}.items():
        assert getattr(made, name) == value
    assert made.requested == "reference"
    made.load_state_dict(cases.fused_adamw.AdamW(cases.parameters([(9,)])).state_dict())
    assert made.max_grad_norm == 0.5


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_repr_is_torchs(name):
    ours, torchs = (getattr(m, name)(cases.parameters([(3,)])) for m in (cases.fused_adamw, torch.optim))
    start, ours_alone = repr(ours).split("\nAll groups\n")
    assert start + ")" == repr(torchs)
    assert ours_alone == (
        "    amp_scaling: False\n    backend: cpu\n    max_grad_norm: None\n    skip_nonfinite: False\n)"
    )


def test_repr_tells_what_was_asked_for_and_what_runs(monkeypatch):
    """Without a warning, or the error, that are the step's."""
    params = cases.parameters([(3,)])
    optimizer = cases.fused_adamw.AdamW(params, backend="triton", max_grad_norm=0.5, skip_nonfinite=True)
    for line in ("backend: triton", "max_grad_norm: 0.5", "skip_nonfinite: True"):
        assert f"    {line}\n" in repr(optimizer)
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "not built"))
    meta = torch.nn.Parameter(torch.ones(3, device="meta"))
    assert "    backend: reference\n" in repr(cases.fused_adamw.AdamW(params))
    monkeypatch.undo()
    assert "    backend: cpu on cpu, reference on meta\n" in repr(cases.fused_adamw.AdamW([*params, meta]))
