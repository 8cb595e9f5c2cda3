"""The classes as a user of torch.optim meets them."""

import gc
import inspect
import re
import weakref

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fused_adamw
from tests import cases

NAMES = ["AdamW", "Adam", "SGD"]


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs_and_ours_after_it(name):
    ours, torchs = (inspect.signature(getattr(module, name)).parameters for module in (fused_adamw, torch.optim))
    for key, wanted in torchs.items():
        assert ours[key].default == wanted.default
        assert ours[key].kind == wanted.kind
    order = [k for k, v in ours.items() if v.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert order == [k for k, v in torchs.items() if v.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", [*NAMES, "SGDW"])
def test_help_documents_every_argument(name):
    cls = getattr(fused_adamw, name)
    doc = inspect.getdoc(cls)
    section = doc[doc.index("\nArgs:\n") : doc.index("\nParameters and gradients are")]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section, re.MULTILINE | re.DOTALL)
    signature = inspect.signature(cls).parameters
    assert [entry for entry, _ in entries] == list(signature)
    for entry, text in entries:
        if signature[entry].default is not inspect.Parameter.empty:
            assert " ".join(text.split()).endswith(f"(default: {signature[entry].default!r}).")
    assert max(map(len, doc.splitlines())) <= 120


def test_dir_shows_what_is_public():
    assert dir(fused_adamw) == sorted(fused_adamw.__all__)
    ours, torchs = (
        {name for name in dir(m.AdamW(cases.parameters([(3,)]))) if not name.startswith("_")}
        for m in (fused_adamw, torch.optim)
    )
    ours -= torchs
    assert {"step_parameter", "init_state", "warmup", "export", "backend", "grad_norm"} <= ours
    for name in ours:
        assert name in ("amp_scaling", "grad_norm", "max_grad_norm", "process_group", "skip_nonfinite") or (
            inspect.getdoc(getattr(fused_adamw.AdamW, name))
        )


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "torch.bfloat16", "float64"])
def test_state_dtype_by_its_name(name):
    """As a YAML file gives it: to the constructor, to a group, to a group by hand, and beside a checkpoint."""
    dtype = getattr(torch, name.removeprefix("torch."))
    saved = cases.make("AdamW", cases.parameters([(3,)]), {})
    for how in ("constructor", "group", "hand", "load"):
        p = cases.parameters([(3,)])[0]
        own = {"state_dtype": name}
        optimizer = cases.make(
            "AdamW",
            [{"params": [p], **own}] if how == "group" else [p],
            {**own} if how in ("constructor", "load") else {},
        )
        if how == "hand":
            optimizer.param_groups[0].update(own)
        cases.set_gradients([p, *saved.param_groups[0]["params"]], 0)
        if how == "load":
            saved.step()
            optimizer.load_state_dict(saved.state_dict())
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype is dtype
        assert optimizer.param_groups[0]["state_dtype"] is dtype


def test_state_dtype_by_its_name_as_the_dtype_itself_in_a_load():
    """Set by hand and loaded into before any step has seen it."""
    a, b = (cases.make("AdamW", cases.parameters([(3,)]), {}) for _ in range(2))
    cases.set_gradients(a.param_groups[0]["params"], 0)
    a.step()
    b.param_groups[0]["state_dtype"] = "bfloat16"
    b.load_state_dict(a.state_dict())
    (own,) = b.state.values()
    assert own["exp_avg"].dtype is b.param_groups[0]["state_dtype"] is torch.bfloat16


def test_docstring_example(doctest_namespace):
    import doctest

    from fused_adamw import optimizers

    assert doctest.testmod(optimizers).attempted > 0
    assert doctest.testmod(optimizers).failed == 0


def train(optimizer, model, steps, scheduler=None, start=0):
    device = next(model.parameters()).device
    losses = []
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 8, generator=generator).to(device)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def network(device="cpu"):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).to(device)


@pytest.mark.parametrize("name", NAMES)
def test_training_follows_torch(name, target):
    """Under OneCycleLR, which moves the learning rate and the first beta or the momentum at every step."""
    losses = []
    for module, options in ((torch.optim, {}), (fused_adamw, {"backend": target.backend})):
        model = network(target.device)
        extra = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(module, name)(model.parameters(), lr=1e-3, weight_decay=0.01, **extra, **options)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=60)
        losses.append(train(optimizer, model, 60, scheduler))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0] / 2


def test_step_without_gradients_and_under_no_grad(target):
    p = cases.parameters([(3,)], device=target.device)[0]
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    assert optimizer.step() is None
    assert not optimizer.state
    p.grad = torch.ones_like(p)
    with torch.no_grad():
        optimizer.step()
    assert p.requires_grad
    assert optimizer.state[p]["step"].item() == 1


def test_parameter_is_changed_in_place(target):
    """Whoever else holds the tensor sees the step: the storage stays."""
    p = cases.parameters([(3,)], device=target.device)[0]
    address, alias = p.data_ptr(), p.detach()
    p.grad = torch.ones_like(p)
    cases.make("AdamW", [p], {}, backend=target.backend).step()
    assert p.data_ptr() == address
    assert torch.equal(alias, p)


@pytest.mark.parametrize("name", [*NAMES, "SGDW"])
def test_first_step_of_momentum_is_not_dampened_nor_counted_twice(name, target):
    """A parameter whose gradient comes late has its first step then."""
    options = {} if "Adam" in name else {"momentum": 0.9, "dampening": 0.5, "lr": 1.0}
    late, early = cases.parameters([(3,), (3,)], device=target.device)
    optimizer = cases.make(name, [early, late], options, backend=target.backend)
    for t in range(4):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if t == 3 else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (early, late)] == [4, 1]
    if "momentum" in options:
        assert torch.equal(optimizer.state[late]["momentum_buffer"], torch.ones_like(late))


@pytest.mark.float64
def test_decay_without_gradient(target):
    """Three conventions: torch's lr * wd, the paper's (lr / base_lr) * wd, and none for L2 at zero gradient in SGD."""
    factors = {}
    for name, options in (
        ("AdamW", {}),
        ("AdamW", {"decouple_lr": True}),
        ("SGDW", {"decouple_lr": True}),
    ):
        p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64, device=target.device))
        optimizer = cases.make(name, [p], {"lr": 0.01, "weight_decay": 0.1, **options}, backend=target.backend)
        optimizer.param_groups[0]["lr"] = 0.005
        p.grad = torch.zeros_like(p)
        optimizer.step()
        factors[(name, *options)] = 1 - p.item()
    assert factors == pytest.approx({("AdamW",): 0.0005, ("AdamW", "decouple_lr"): 0.05, ("SGDW", "decouple_lr"): 0.05})


def test_a_cautious_step_that_masks_nothing_is_the_plain_one(target):
    """To the bit: a first update, whose moments have the gradients' signs, however small; a decay of 0."""
    for options, steps in (({"cautious": "update", "weight_decay": 0.1}, 1), ({"cautious": "decay"}, 3)):
        runs = []
        for own in (options, {k: v for k, v in options.items() if k != "cautious"}):
            params = cases.parameters(cases.SHAPES, device=target.device)
            optimizer = cases.make("AdamW", params, {"weight_decay": 0.0} | own, backend=target.backend)
            for t in range(steps):
                cases.set_gradients(params, t)
                for p in params[::2]:
                    p.data.zero_()
                    p.grad *= 1e-25
                optimizer.step()
            runs.append(cases.tensors_of(optimizer))
        cases.assert_same_bits(*runs)


FORMS = [
    {},
    {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
    {"state_dtype": "int8", "rounding": "stochastic"},
    {"state_dtype": "int8", "master": "split16"},
]


@pytest.mark.pairwise("cuda", name=["Adam", "AdamW"], dtype=[torch.float32, torch.bfloat16], form=FORMS)
def test_without_a_first_moment_a_step_has_the_bits_that_it_has_with_one(name, dtype, form, target):
    """Parameters and second moments, under a scheduler of the rate, and where the option changes between steps."""
    runs = []
    for kept in ([True] * 6, [False] * 6, [True, False, False, True, True, False]):
        params = cases.parameters([(65, 70), (5,), (0,), (4099,)], dtype, target.device)
        options = {"lr": 1e-2, "betas": (0.0, 0.95), "weight_decay": 0.1, "first_moment": kept[0], **form}
        optimizer = cases.make(name, params, options, backend=target.backend)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9, cycle_momentum=False)
        for t, first_moment in enumerate(kept):
            optimizer.param_groups[0]["first_moment"] = first_moment
            cases.set_gradients(params, t)
            optimizer.step()
            scheduler.step()
            found = cases.tensors_of(optimizer)
            assert any(".exp_avg" in key and "_sq" not in key for key in found) == first_moment
        runs.append({key: x for key, x in found.items() if ".exp_avg" not in key or "_sq" in key})
    for run in runs[1:]:
        cases.assert_same_bits(run, runs[0])


def test_a_scheduler_that_needs_the_first_moment_is_refused_before_anything_is_written(target):
    """OneCycleLR sets the first beta when it is made, and at each of its steps."""
    p = cases.parameters([(9,)], device=target.device)[0]
    own = {"first_moment": False, "betas": (0.0, 0.9)}
    optimizer = cases.make("AdamW", [p], own, backend=target.backend)
    cases.set_gradients([p], 0)
    optimizer.step()
    before = {key: x.clone() for key, x in cases.tensors_of(optimizer).items()}
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)
    for step in (optimizer.step, lambda: optimizer.step_parameter(p), optimizer.step):
        with pytest.raises(ValueError, match=r"needs betas\[0\] = 0, and it is 0.95: .*cycle_momentum=False.*group 0"):
            step()
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    optimizer.param_groups[0]["betas"] = (0.0, 0.9)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2
    with pytest.raises(ValueError, match=r"first_moment=False needs betas\[0\] = 0, and it is 0.5: .*\(group 1\)"):
        optimizer.add_param_group({"params": cases.parameters([(3,)], device=target.device), "betas": (0.5, 0.9)})


@pytest.mark.float64
@pytest.mark.filterwarnings("ignore:.*the learning rate of group 0 is negative:RuntimeWarning")
@pytest.mark.parametrize("name", ["AdaBound", "AdaBoundW"])
def test_a_negative_rate_mirrors_the_bounds_of_adabound(name, target):
    """Its steps ascend as far as those of the positive rate descend."""
    moved = []
    for sign in (1, -1):
        params = cases.parameters(cases.SHAPES, torch.float64, target.device)
        start = [p.detach().clone() for p in params]
        optimizer = cases.make(name, params, {"gamma": 0.1}, backend=target.backend)
        optimizer.param_groups[0]["lr"] *= sign
        cases.set_gradients(params, 0)
        optimizer.step()
        moved.append([sign * (p.detach() - x) for p, x in zip(params, start, strict=True)])
    for up, down in zip(*moved, strict=True):
        torch.testing.assert_close(up, down, rtol=1e-9, atol=1e-15)
        assert not up.numel() or up.count_nonzero()


def test_lr_of_zero_changes_no_weight(target):
    p = cases.parameters([(9,)], device=target.device)[0]
    before = p.detach().clone()
    optimizer = cases.make("AdamW", [p], {"decouple_lr": True, "weight_decay": 0.5}, backend=target.backend)
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("overridden", [False, True])
def test_hooks_and_profiles_are_torchs(overridden):
    """torch's wrapper is around our step where it has something to call, and once where a subclass has its own step."""

    class Own(fused_adamw.AdamW):
        if overridden:

            def step(self, closure=None):
                return super().step(closure)

    seen = {}
    for kind in (Own, torch.optim.AdamW):
        (p,) = cases.parameters([(3,)])
        p.grad = torch.ones(3)
        optimizer, calls = kind([p]), []

        def note(o, args, kwargs, calls=calls, optimizer=optimizer):
            calls.append((o is optimizer, args[0] is optimizer, args[1:], kwargs))

        handles = [
            optimizer.register_step_pre_hook(note),
            optimizer.register_step_post_hook(note),
            register_optimizer_step_pre_hook(note),
            register_optimizer_step_post_hook(note),
        ]
        for handle in handles:  # each alone is called, too
            optimizer.step()
            handle.remove()
        seen[kind] = calls
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        assert [e.key for e in profile.key_averages() if "step#" in e.key] == [f"Optimizer.step#{kind.__name__}.step"]
    assert seen[Own] == seen[torch.optim.AdamW]
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7), {}))
    assert optimizer.step() == 7


@pytest.mark.float64
@pytest.mark.parametrize("fresh", [True, False])
def test_momentum_switched_on_later_starts_as_in_torch(fresh, target):
    ours, theirs = (cases.parameters([(5,)], torch.float64, target.device) for _ in range(2))
    a = cases.make("SGD", ours, {"lr": 1.0, "dampening": 0.5}, backend=target.backend)
    b = torch.optim.SGD(theirs, lr=1.0, dampening=0.5)
    for t in range(8):
        for optimizer, ps in ((a, ours), (b, theirs)):
            optimizer.param_groups[0]["momentum"] = 0.9 if t in (2, 3, 6, 7) else 0.0
            if fresh and t == 6:
                optimizer.state[ps[0]].pop("momentum_buffer")
            cases.set_gradients(ps, t)
            optimizer.step()
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("young")
def test_an_optimizer_that_is_dropped_is_freed(target):
    """With its parameters and states: what it watches them with does not hold it in turn."""
    p = cases.parameters([(3,)], device=target.device)[0]
    p.grad = torch.ones_like(p)
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    optimizer.step()
    optimizer.step_parameter(p)
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None


def test_an_option_deleted_by_hand_is_missed_by_step_parameter_too():
    found = []
    for alone in (False, True):
        p = cases.parameters([(3,)])[0]
        optimizer = cases.make("SGD", [p], {"lr": 0.5, "momentum": 0.9, "lr_in_momentum": True})
        for t in range(3):
            cases.set_gradients([p], t)
            optimizer.step_parameter(p) if alone else optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.125
            optimizer.param_groups[0].pop("lr_in_momentum", None)
        found.append(cases.tensors_of(optimizer))
    cases.assert_same_bits(*found)
