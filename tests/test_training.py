"""What training scripts do with an optimizer: schedules, AMP, averaging, SAM, gradient release, torch.compile."""

import copy
import functools
import math

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook

from fused_adamw import backends, plan
from tests import cases

SHAPES = [(9,), (2, 3)]


def pair(name, target, **options):
    """Ours and torch's optimizer of this name, with the same parameters."""
    ours, torchs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend)
    return a, getattr(torch.optim, name)(torchs, **options)


def ours_twice(target):
    """The same optimizer of ours twice, over parameters of their own."""
    ours = [cases.parameters(SHAPES, device=target.device) for _ in range(2)]
    return [cases.make("AdamW", ps, {}, backend=target.backend) for ps in ours]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_close(a, b):
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q)


def network(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)
    return torch.nn.Sequential(*layers).to(device, dtype)


def loss_of(model, t):
    p = next(model.parameters())
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t)).to(p.device, p.dtype)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


# ---- schedules

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


# ---- groups, hooks, closures


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


# ---- wrappers


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_model(ema, target):
    """The average sees the parameters that were stepped in place; it is that of the same run under torch's."""
    averages = []
    for module, options in ((cases.fused_adamw, {"backend": target.backend}), (torch.optim, {})):
        model = network(target.device)
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5) if ema else None)
        optimizer = module.SGD(model.parameters(), lr=0.1, **options)
        for t in range(5):
            cases.set_gradients(model.parameters(), t)
            optimizer.step()
            average.update_parameters(model)
        averages.append(list(average.parameters()))
        assert not torch.equal(averages[-1][0], next(model.parameters()))
    for p, q in zip(*averages, strict=True):
        torch.testing.assert_close(p, q)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412) around a base optimizer whose groups and state it shares."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = params_of(self)
        scale = self.param_groups[0]["rho"] / torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["climbed"] = p.grad * scale
            p.add_(self.state[p]["climbed"])
        closure()
        for p in params:
            p.sub_(self.state[p]["climbed"])
        self.base.step()
        return loss


def test_sam_around_ours(target):
    """It moves the parameters between the backward passes, by hand; judged by torch's in float64."""
    runs = []
    for base, options in ((cases.fused_adamw.SGD, {"backend": target.backend}), (torch.optim.SGD, {})):
        model = network(target.device) if options else network(dtype=torch.float64)
        optimizer = SAM(model.parameters(), functools.partial(base, **options), lr=0.05, momentum=0.9)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        runs.append([optimizer.step(closure).item() for _ in range(8)])
        assert optimizer.param_groups[0]["rho"] == 0.05
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][-1] < runs[0][0]


# ---- AMP, by torch's GradScaler, which unscales and skips on the host


def scaled(optimizer, scaler, t, bad=False):
    """Gradients of step t as a backward of the scaled loss leaves them, an infinity among them if ``bad``."""
    scaler.scale(torch.ones((), device=params_of(optimizer)[0].device))
    cases.set_gradients(params_of(optimizer), t)
    for p in params_of(optimizer):
        p.grad.mul_(scaler.get_scale())
    if bad:
        params_of(optimizer)[-1].grad.view(-1)[-1] = math.inf


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_grad_scaler(name, target):
    """The very first step is skipped, and one later: nothing changes, nothing counts, no state is made."""
    extra = {"momentum": 0.9} if name == "SGD" else {}
    a, b = pair(name, target, lr=1e-2, **extra)
    twin, _ = pair(name, target, lr=1e-2, **extra)
    scalers = [torch.amp.GradScaler(target.device, init_scale=2.0**10, growth_interval=100) for _ in range(2)]
    for t, bad in enumerate([True, False, False, True, False]):
        before = {k: v.clone() for k, v in cases.tensors_of(a).items()}
        for optimizer, scaler in zip((a, b), scalers, strict=True):
            scaled(optimizer, scaler, t, bad)
            scaler.step(optimizer)
            scaler.update()
        if bad:
            cases.assert_same_bits(cases.tensors_of(a), before)
            assert any(a.state.values()) == (t > 0)
        else:
            cases.set_gradients(params_of(twin), t)
            twin.step()
    assert_close(a, b)
    assert scalers[0].get_scale() == 2.0**8
    # the scale is a power of two, so that these are the bits of a run that knows of no scaler
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(twin))


def test_grad_scaler_with_clipping_unscales_once(target):
    """unscale_, clip_grad_norm_, step: as torch's recipe for clipping says."""
    a, b = pair("AdamW", target, lr=1e-2)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10)
    for t, bad in enumerate([True, False, False]):
        scaled(a, scaler, t, bad)
        scaler.unscale_(a)
        norm = torch.nn.utils.clip_grad_norm_(params_of(a), 0.5)
        scaler.step(a)
        scaler.update()
        if not bad:
            cases.set_gradients(params_of(b), t)
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(params_of(b), 0.5))
            b.step()
    assert_close(a, b)
    assert a.state[params_of(a)[0]]["step"].item() == 2


def test_autocast_in_bf16(target):
    """float32 parameters under autocast: bf16 products, float32 gradients; judged by torch's in float64 without it."""
    losses = []
    for module, options in ((torch.optim, {}), (cases.fused_adamw, {"backend": target.backend})):
        model = network(target.device) if options else network(dtype=torch.float64)
        optimizer = module.AdamW(model.parameters(), lr=1e-2, **options)
        for t in range(30):
            with torch.autocast(target.device, torch.bfloat16, enabled=bool(options)):
                loss = loss_of(model, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# ---- gradient release


@pytest.mark.parametrize(("name", "options"), [*cases.SHARED, *cases.OURS], ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.name_of)
def test_step_parameter_has_the_bits_of_step(name, options, dtype, target):
    shapes = [*cases.SHAPES, (40, 70)]
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


def test_step_parameter_and_step_can_be_mixed(monkeypatch, target):
    a, b = ours_twice(target)
    built, true = [], plan.build
    monkeypatch.setattr(plan, "build", lambda o, only=None: built.append((o, only)) or true(o, only))
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
    # a load makes all plans anew, a replaced state those that held it, and nothing else does
    assert sum(o is a and only is not None for o, only in built) == 2 * 3 + 1
    assert sum(o is a and only is None for o, only in built) == 2 + 1 + 1


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


# ---- torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own: the loss is returned from a compiled frame
@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_torch_compile_of_a_training_step(way):
    """step() is a graph break; forward and loss are compiled, once, whatever a schedule does."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, twin = network(), network()
    optimizers = [cases.make("AdamW", m.parameters(), {"lr": 1e-2}) for m in (model, twin)]
    schedules = [lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=20) for o in optimizers]

    def step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        if way == "step":
            optimizer.step()
        else:
            for p in model.parameters():
                optimizer.step_parameter(p)
        optimizer.zero_grad()
        return loss.detach()

    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter)
    frames = []
    for t in range(6):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(t))
        assert torch.equal(compiled(model, optimizers[0], x), step(twin, optimizers[1], x))
        frames.append(counter.frame_count)
        for s in schedules:
            s.step()
    cases.assert_same_bits(*(cases.tensors_of(o) for o in optimizers))
    assert frames == [frames[0]] * 6
    assert frames[0] <= 2  # the forward, and the detach; torch.optim.AdamW makes 4
    torch._dynamo.reset()


def test_torch_compile_of_the_step_itself(target):
    """The pattern of torch's recipe for a compiled optimizer: it runs, uncompiled."""
    torch._dynamo.reset()
    a, b = ours_twice(target)
    compiled = torch.compile(lambda: a.step(), backend="eager")
    for t in range(3):
        for o in (a, b):
            cases.set_gradients(params_of(o), t)
        compiled()
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    torch._dynamo.reset()


# ---- memory


def allocated(profile):
    """Bytes of each allocation of torch's on the CPU."""
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_a_step_allocates_nothing_after_the_first(way):
    """On the CPU: every dtype, amsgrad, late and moved gradients, layouts that need a copy; a schedule."""
    params = [*cases.parameters([(5000,), (30, 40)]), *cases.parameters([(70, 80)], torch.bfloat16)]
    params[1].grad = torch.ones(40, 30).t()
    strided = torch.nn.Parameter(torch.ones(50, 60)[:, ::2])
    groups = [{"params": params}, {"params": [strided], "amsgrad": True}]
    optimizer = cases.make("AdamW", groups, {}, backend="cpu")

    def step(t):
        if way == "step":
            optimizer.step()
        else:
            for p in params_of(optimizer):
                optimizer.step_parameter(p)
        optimizer.param_groups[0]["lr"] = 1e-3 / (t + 1)

    def profiled(t):
        for p in params_of(optimizer):
            p.grad = torch.ones(40, 30).t() if p.shape == (30, 40) else torch.ones_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step(t)
        return allocated(profile)

    assert sum(profiled(0)) > 5000 * 8  # the moments, at the least: the profiler does see allocations
    assert [profiled(t) for t in (1, 2, 3)] == [[], [], []]


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_allocates_nothing_on_the_device_after_the_first(capturable):
    params = cases.parameters([(5000,), (30, 40)], device="cuda")
    optimizer = cases.make("AdamW", params, {}, backend="triton", capturable=capturable)
    for t in range(4):
        cases.set_gradients(params, t)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if t:
            assert torch.cuda.max_memory_allocated() == before
