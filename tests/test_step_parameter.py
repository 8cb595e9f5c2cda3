"""Gradient release: step_parameter(), step_parameters() and release_gradients() beside step()."""

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import fused_adamw
from fused_adamw import backends, plan
from tests import cases
from tests.test_errors import sparse_like
from tests.training import loss_of, network, ours_twice, params_of


@pytest.mark.pairwise("cuda", case=[*cases.SHARED, *cases.OURS], dtype=[torch.float32, torch.bfloat16])
def test_step_parameter_has_the_bits_of_step(case, dtype, target):
    name, options = case
    shapes = [*cases.SHAPES, (40, 70)]
    if target.device == "cuda":
        shapes = shapes[::2]  # each is a launch at each step, of which an emulator makes few a second
    alone, together = (cases.parameters(shapes, dtype, target.device) for _ in range(2))
    groups = [[{"params": ps[::2]}, {"params": ps[1::2], "lr": 3e-3}] for ps in (alone, together)]
    a, b = (cases.make(name, g, options, backend=target.backend) for g in groups)
    for t in range(4):
        for ps in (alone, together):
            cases.set_gradients(ps, t)
        if t == 2:
            for o in (a, b):
                o.param_groups[1].update(weight_decay=0.2, lr=1e-3)
        for p in reversed(alone):
            a.step_parameter(p)
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@pytest.mark.parametrize(("name", "options"), [*cases.SHARED, *cases.OURS], ids=cases.name_of)
def test_step_parameters_has_the_bits_of_step(name, options, target):
    """In any order, across groups, with gradients that come and go; one plan for each list of parameters."""
    shapes = [*cases.SHAPES, (40, 70)]
    some, together = (cases.parameters(shapes, torch.bfloat16, target.device) for _ in range(2))
    groups = [[{"params": ps[::2]}, {"params": ps[1::2], "lr": 3e-3}] for ps in (some, together)]
    a, b = (cases.make(name, g, options, backend=target.backend) for g in groups)
    lists = [some[3::-1], some[4:]]
    for t in range(6):
        for ps in (some, together):
            cases.set_gradients(ps, t)
            ps[t % 3].grad = None
            if t:
                ps[5].grad = None
        if t == 2:
            for o in (a, b):
                o.param_groups[1].update(weight_decay=0.2, lr=1e-3)
        for params in lists:
            a.step_parameters(params)
        b.step()
    a.step_parameters([])
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    assert len(a._built_some) == 2


def test_step_parameters_refuses_as_step_does(target):
    p, q, other = cases.parameters([(3,)] * 3, device=target.device)
    cases.set_gradients([p, q, other], 0)
    optimizer = cases.make("AdamW", [p, q], {}, backend=target.backend)
    with pytest.raises(ValueError, match="is not among the parameters of this optimizer"):
        optimizer.step_parameters([p, other])
    q.grad = None
    q.grad = sparse_like(q)
    with pytest.raises(RuntimeError, match="group 0, parameter 1 .*sparse"):
        optimizer.step_parameters([p, q])
    assert not optimizer.state
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="leave out max_grad_norm"):
        optimizer.step_parameters([p])


class Branches(torch.nn.Module):
    """Layers, tied weights, and one that takes part at odd steps only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(7, 16)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(5))
        self.rare = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, 7, bias=False)
        self.head.weight = self.embedding.weight

    def loss(self, t):
        tokens = torch.arange(7, device=self.head.weight.device)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.rare(x) if t % 2 else x
        return torch.nn.functional.cross_entropy(self.head(x), tokens.roll(t))


def released_and_twin(target, bucket_mb=25, **options):
    models = [Branches().to(target.device) for _ in range(2)]
    pairs = [(m, cases.make("AdamW", m.parameters(), {"lr": 1e-2, **options}, backend=target.backend)) for m in models]
    return *pairs[0], *pairs[1], fused_adamw.release_gradients(*pairs[0], bucket_mb)


KB = 2**-10


@pytest.mark.parametrize("bucket_mb", [0, 1 * KB, 3 * KB, 25], ids=["each", "1 KB", "3 KB", "one"])
def test_released_gradients_have_the_bits_of_an_ordinary_loop(bucket_mb, target):
    """With accumulation, tied weights, a schedule, and a layer without a gradient at every other step."""
    model, a, twin, b, released = released_and_twin(target, bucket_mb)
    schedules = [lr_scheduler.StepLR(o, 2, 0.5) for o in (a, b)]
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda p: alive.append(sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))
        )
    for t in range(6):
        if t in (2, 3):
            with released.accumulate():
                model.loss(t + 9).backward()
            twin.loss(t + 9).backward()
        for m, o in ((model, a), (twin, b)):
            m.loss(t).backward()
            o.step()
            o.zero_grad()
        for s in schedules:
            s.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
        if t == 1:  # after two steps without accumulation
            most = max(p.nbytes for p in model.parameters())
            whole = sum(p.nbytes for p in model.parameters())
            assert max(alive) <= min(whole, bucket_mb * 2**20 + 2 * most + model.rare.weight.nbytes)
    released.remove()
    for m, o in ((model, a), (twin, b)):
        m.loss(1).backward()
        assert all(p.grad is not None for p in m.parameters())
        o.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_a_second_gradient_after_a_release_is_refused(target):
    """Of a loop without optimizer.step(), of one that accumulates, and of reentrant checkpoints: not stepped twice."""
    model, _, _, _, _ = released_and_twin(target, 0)
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match="a second gradient.*optimizer.step.*accumulate.*use_reentrant=False"):
        model.loss(0).backward()
    model, a, _, _, _ = released_and_twin(target, 0)
    x = torch.ones(2, 16, device=target.device, requires_grad=True)
    layer = model.layers[0]
    twice = checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="a second gradient"):
        twice.sum().backward()
    a.step()
    checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False).sum().backward()
    assert a.state[layer.weight]["step"].item() == 2


def test_what_cannot_be_released_is_refused(target):
    model, a, _, _, _ = released_and_twin(target)
    with pytest.raises(TypeError, match="needs an optimizer of fused_adamw, and got a SGD"):
        fused_adamw.release_gradients(model, torch.optim.SGD(model.parameters()))
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="Invalid bucket_mb"):
            fused_adamw.release_gradients(model, a, bad)
    with pytest.raises(ValueError, match="no parameter of this model"):
        fused_adamw.release_gradients(torch.nn.Linear(2, 2), a)
    for option in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}, {"amp_scaling": True}):
        scaling = cases.make("AdamW", model.parameters(), {}, backend=target.backend, **option)
        with pytest.raises(RuntimeError, match="AdamW needs all gradients at once"):
            fused_adamw.release_gradients(model, scaling)


def test_a_step_without_gradients_launches_nothing(monkeypatch, target):
    model, a, _, _, _ = released_and_twin(target)
    model.loss(1).backward()
    a.step()
    counts = {p: own["step"].item() for p, own in a.state.items()}
    for built in a._built:
        for part in built.plans:
            monkeypatch.setattr(part, "launch", None)
    a.step()
    assert counts == {p: own["step"].item() for p, own in a.state.items()}


def test_gradient_release(target):
    """From the hooks of autograd, each gradient freed at once; under a schedule; the bits of the ordinary loop."""
    model, twin = network(target.device), network(target.device)
    a, b = (cases.make("AdamW", m.parameters(), {"lr": 1e-2}, backend=target.backend) for m in (model, twin))
    schedules = [lr_scheduler.StepLR(o, 2, 0.5) for o in (a, b)]
    alive = []

    def release(p):
        alive.append(sum(q.grad is not None for q in model.parameters()))
        a.step_parameter(p)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(release)
    for t in range(6):
        loss_of(model, t).backward()
        b.zero_grad()
        loss_of(twin, t).backward()
        b.step()
        for s in schedules:
            s.step()
    assert set(alive) == {1}
    assert len(alive) == 6 * len(params_of(b))
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_gradient_release_of_tied_weights(target):
    """autograd sums the gradients of both uses before its hook runs: one step each, with the bits of the usual loop."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 7, bias=False))
        model[2].weight = model[0].weight
        models.append(model.to(target.device))
    a, b = (cases.make("AdamW", m.parameters(), {"lr": 1e-2}, backend=target.backend) for m in models)
    assert len(params_of(a)) == 3

    def release(p):
        a.step_parameter(p)
        p.grad = None

    for p in params_of(a):
        p.register_post_accumulate_grad_hook(release)
    tokens = torch.arange(7, device=target.device)
    for _ in range(4):
        for model in models:
            torch.nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        b.step()
        b.zero_grad()
    assert all(own["step"].item() == 4 for own in a.state.values())
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_step_parameter_and_step_can_be_mixed(monkeypatch, target):
    a, b = ours_twice(target)
    built, true = [], plan.build
    monkeypatch.setattr(plan, "build", lambda o, was=None, only=None: built.append((o, only)) or true(o, was, only))
    for t in range(9):
        for o in (a, b):
            cases.set_gradients(params_of(o), t)
        if t in (2, 4):
            a.load_state_dict(a.state_dict())
        if t == 6:
            a.state[params_of(a)[0]]["exp_avg"] = a.state[params_of(a)[0]]["exp_avg"].clone()
        if t % 2:
            a.step()
        else:
            for p in params_of(a):
                a.step_parameter(p)
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    # neither a load nor a replaced state makes a plan anew
    assert sum(o is a and only is not None for o, only in built) == 2
    assert sum(o is a and only is None for o, only in built) == 1


def test_step_parameter_without_a_gradient_does_nothing(target):
    p = cases.parameters([(3,)], device=target.device)[0]
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    optimizer.step_parameter(p)
    assert not optimizer.state


def test_step_parameter_follows_changes(target):
    """A parameter that moved to another group, state that was cleared, memory that was replaced."""
    ours, torchs = (cases.parameters([(5,), (5,)], device=target.device) for _ in range(2))
    a = cases.make("AdamW", [{"params": [p]} for p in ours], {}, backend=target.backend)
    b = torch.optim.AdamW([{"params": [p]} for p in torchs])
    for t in range(6):
        for optimizer, ps in ((a, ours), (b, torchs)):
            if t == 1:
                optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = ps[1:], ps[:1]
                optimizer.param_groups[0]["lr"] = 0.1
            elif t == 2:
                optimizer.state.clear()
            elif t == 3:
                ps[0].data = torch.arange(5.0, device=target.device)
            elif t == 4:
                optimizer.state[ps[1]] = {k: v.clone() for k, v in optimizer.state[ps[0]].items()}
            elif t == 5:
                optimizer.param_groups[1]["maximize"] = True
            cases.set_gradients(ps, t)
        for p in ours:
            a.step_parameter(p)
        b.step()
        for p, q in zip(ours, torchs, strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"state_dtype": torch.float16}])
def test_step_parameter_follows_a_change_of_the_rule_or_of_the_storage(option, target):
    a, b = ours_twice(target)
    for t in range(4):
        for o in (a, b):
            cases.set_gradients(params_of(o), t)
            if t == 2:
                o.param_groups[0].update(option)
        for p in params_of(a):
            a.step_parameter(p)
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_step_parameter_without_the_extension(monkeypatch):
    """The watch in Python sees the same changes."""
    monkeypatch.setattr(backends, "native", lambda: None)
    test_step_parameter_follows_changes(cases.Target("cpu", "reference"))


def test_step_parameter_names_what_it_refuses():
    p, q, stranger = cases.parameters([(3,), (4,), (5,)])
    optimizer = cases.make("AdamW", [{"params": [p]}, {"params": [q]}], {})
    stranger.grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"AdamW.step_parameter: a tensor of shape \[5\] is not among the parameters"):
        optimizer.step_parameter(stranger)
    q.grad = torch.ones(4).to_sparse()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"AdamW: group 1, parameter 0 \(shape \[4\]\): its gradient is sparse"):
            optimizer.step_parameter(q)
    assert not optimizer.state
