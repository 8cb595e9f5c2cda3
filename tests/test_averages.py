"""Averages of the parameters that a step keeps: what they are, when they move, and what a script does with them."""

import copy
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import swa_utils

import fused_adamw
from fused_adamw import codecs, state
from fused_adamw.options import EMA_DTYPES
from fused_adamw.tensors import NOT_SHARDED
from tests import cases, exact
from tests.test_checkpoints import steps
from tests.test_formats import BF16, F16, F32, check_resume
from tests.training import loss_of, network, params_of

KINDS = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}),
    ("RAdam", {"lr": 1e-2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1}),
]
# In which forms a parameter can be stored, with its dtype.
FORMS = [
    (F32, {}),
    (F16, {}),
    (BF16, {}),
    (BF16, {"rounding": "stochastic", "state_dtype": BF16}),
    (BF16, {"master": "kahan"}),
    (BF16, {"master": "split16", "state_dtype": "int8"}),
    (BF16, {"master": "fp32", "state_dtype": "int8", "rounding": "stochastic"}),
    (F16, {"master": "fp32"}),
    (F32, {"ema_dtype": BF16}),
    (F16, {"ema_dtype": "bfloat16"}),
    (BF16, {"ema_dtype": BF16, "rounding": "stochastic", "state_dtype": BF16, "seed": 7}),
    (BF16, {"ema_dtype": BF16, "master": "split16", "state_dtype": "int8"}),
]
SHAPES = [(5003, 1), (7, 9), ()]


def dtype_of(form):
    """Of the averages."""
    return BF16 if "ema_dtype" in form else F32


def averaged(optimizer):
    return [optimizer.state[p]["ema"] for p in params_of(optimizer)]


@pytest.mark.float64
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(("name", "options"), KINDS, ids=cases.name_of)
def test_equals_torchs_averaged_model(name, options, decay, target):
    """In float64, to 1e-12; that starts with a copy of the weights as well, at its first update."""
    ours, theirs = network(target.device, torch.float64), network(target.device, torch.float64)
    a = cases.make(name, ours.parameters(), options, backend=target.backend, ema_decay=decay)
    b = getattr(torch.optim, name)(theirs.parameters(), **options)
    model = swa_utils.AveragedModel(theirs, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    model.update_parameters(theirs)
    for t in range(8):
        for module, optimizer in ((ours, a), (theirs, b)):
            cases.set_gradients(module.parameters(), t)
            optimizer.step()
        model.update_parameters(theirs)
    for ema, expected in zip(averaged(a), model.module.parameters(), strict=True):
        assert ema.dtype is torch.float64
        torch.testing.assert_close(ema, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_decay_grows_by_the_steps_of_each_parameter(warmup, target):
    params = cases.parameters([(9,), (4,)], device=target.device)
    optimizer = cases.make("SGD", params, {"lr": 0.1}, backend=target.backend, ema_decay=0.6, ema_warmup=warmup)
    counts, expected = [0, 0], [p.detach().double() for p in params]
    for t in range(12):
        cases.set_gradients(params, t)
        if t < 3:
            params[1].grad = None
        optimizer.step()
        for k, p in enumerate(params):
            if p.grad is not None:
                counts[k] += 1
                decay = min(0.6, (1 + counts[k]) / (10 + counts[k])) if warmup else 0.6
                expected[k].lerp_(p.detach().double(), 1 - decay)
    for ema, truth in zip(averaged(optimizer), expected, strict=True):
        torch.testing.assert_close(ema.double(), truth, rtol=1e-6, atol=1e-6)


def exact_lerp(a, b, weight):
    """The bits of lerp(a, b, weight) of float32 tensors, by the documented sequence of roundings."""
    w = Fraction(float(np.float32(weight)))
    values = [exact.lerp(Fraction(x), Fraction(y), w) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return torch.tensor([float(x) for x in values], dtype=F32)


@pytest.mark.parametrize("decay", [0.99, 0.3, 0.0])
@pytest.mark.parametrize("dtype_and_form", FORMS, ids=cases.name_of)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_average_takes_the_parameter_before_it_is_rounded(name, dtype_and_form, decay):
    """Which the step of a float32 twin has, made anew for every step; to the bit."""
    (dtype, form), names = dtype_and_form, {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ()}[name]
    (p,) = cases.parameters([(70,)], dtype)
    optimizer = cases.make(name, [p], form, ema_decay=decay)
    optimizer.init_state()
    for t in range(4):
        own = optimizer.state[p]
        storage = optimizer_storage(optimizer, p)
        twin = torch.nn.Parameter(state._value_of(own, p, storage).float().clone())
        fresh = cases.make(name, [twin], {})
        fresh.state[twin] = {key: own[key].clone() for key in ("step", *names) if key in own}
        before = own["ema"].clone()
        cases.set_gradients([p], t)
        cases.set_gradient(twin, p.grad)
        optimizer.step()
        fresh.step()
        expected = exact_lerp(before.float(), twin.detach(), 1 - decay)
        if dtype_of(form) is BF16:
            word = codecs.words(form.get("seed", 0), t + 1, 0, NOT_SHARDED, len(p), p.device, average=True)
            expected = codecs.stochastic(expected, codecs.for_parameter(word))
        assert cases.equal_bits(own["ema"], expected).all()


def optimizer_storage(optimizer, p):
    from fused_adamw.formats import storage_of

    group = optimizer.param_groups[0]
    return storage_of(p, group, optimizer.rule_of(group)[1])


@pytest.mark.parametrize("dtype_and_form", FORMS, ids=cases.name_of)
def test_everything_else_keeps_its_bits(dtype_and_form, target):
    dtype, form = dtype_and_form
    a, b = (
        cases.make("AdamW", cases.parameters(SHAPES, dtype, target.device), form, backend=target.backend, **more)
        for more in ({}, {"ema_decay": 0.9})
    )
    for optimizer in (a, b):
        steps(optimizer, range(3))
    found = cases.tensors_of(b)
    emas = {key: found.pop(key) for key in list(found) if key.endswith(".ema")}
    assert {t.dtype for t in emas.values()} == {dtype_of(form)}
    assert len(emas) == len(SHAPES)
    cases.assert_same_bits(cases.tensors_of(a), found)


@pytest.mark.parametrize("dtype_and_form", FORMS, ids=cases.name_of)
def test_same_bits_for_every_instruction_set(dtype_and_form):
    from fused_adamw import backends

    native, (dtype, form) = backends.native(), dtype_and_form
    runs = []
    try:
        for isa in native.cpu_isas():
            native.use_cpu_isa(isa)
            optimizer = cases.make("AdamW", cases.parameters(SHAPES, dtype), form, ema_decay=0.9)
            steps(optimizer, range(3))
            runs.append(cases.tensors_of(optimizer))
    finally:
        native.use_cpu_isa(native.cpu_isas()[-1])
    for run in runs[1:]:
        cases.assert_same_bits(runs[0], run)


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype_and_form", FORMS, ids=cases.name_of)
def test_same_bits_as_the_cpu(dtype_and_form, capturable, backend):
    """Scalars of the device included: a decay that warms up, and groups with averages and without."""
    dtype, form = dtype_and_form
    optimizers = []
    for device, own in (("cuda", {"backend": backend, "capturable": capturable}), ("cpu", {})):
        params = cases.parameters(SHAPES, dtype, device)
        groups = [{"params": params[:2], "ema_decay": 0.9, "ema_warmup": True}, {"params": params[2:]}]
        optimizers.append(cases.make("SGD", groups, {**form, "momentum": 0.5}, **own))
    for t in range(4):
        for optimizer in optimizers:
            optimizer.param_groups[0]["ema_decay"] = 0.1 * (t + 1)
            steps(optimizer, [t])
    cases.assert_same_bits(*map(cases.tensors_of, optimizers))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EMA_DTYPES, ids=cases.name_of)
def test_a_captured_graph_moves_averages(dtype, backend):
    """By the decay that refresh_captured() brings, and by the steps that it counts itself."""
    a, b = (cases.parameters([(1000,)], device=device) for device in ("cuda", "cpu"))
    options = {"ema_decay": 0.9, "ema_warmup": True, "ema_dtype": dtype}
    ours = cases.make("AdamW", a, options, backend=backend, capturable=True)
    theirs = cases.make("AdamW", b, options)
    steps(ours, [0])
    steps(theirs, [0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for t in range(1, 5):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["ema_decay"] = 0.9 if t < 3 else 0.2
        ours.refresh_captured()
        a[0].grad.copy_(b[0].grad)
        graph.replay()
        theirs.step()
        torch.cuda.synchronize()
        mine, other = ours.state[a[0]]["ema"].cpu(), theirs.state[b[0]]["ema"]
        if dtype is F32:
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
        assert dtype is F32 or (mine == other).float().mean() > 0.99  # few are rounded otherwise for a last bit


# ---- in bfloat16


def test_narrow_averages_follow_those_in_float32(target):
    """To nearest they would stand still: a step moves them by far less than an ulp."""
    n, decay = 4096, 0.999
    ends = {}
    for dtype in EMA_DTYPES:
        p = torch.nn.Parameter(torch.ones(n, device=target.device))
        optimizer = cases.make("SGD", [p], {"lr": 0.0}, backend=target.backend, ema_decay=decay, ema_dtype=dtype)
        optimizer.init_state()
        p.data.fill_(1.1)
        p.grad = torch.zeros_like(p)
        for _ in range(300):
            optimizer.step()
        ends[dtype] = optimizer.state[p]["ema"].double()
    nearest = torch.ones((), dtype=BF16)
    for _ in range(300):
        nearest = nearest.float().lerp(torch.tensor(1.1), 1 - decay).bfloat16()
    truth = 1.1 - 0.1 * decay**300
    assert nearest == 1
    assert (ends[F32] - truth).abs().max() < 1e-5
    error = ends[BF16] - truth
    assert error.mean().abs() < 4 * error.std() / n**0.5
    assert error.std() < 2**-6  # of an ulp of 2**-7 each


def test_narrow_averages_draw_by_words_of_their_own(target):
    """Halfway between two values, of parameter and average alike, all four outcomes are equally frequent."""
    n = 20_000
    p = torch.nn.Parameter(torch.zeros(n, dtype=BF16, device=target.device))
    cases.set_gradient(p, torch.full((n,), 1 + 0.5 / 128, device=target.device))
    options = {"lr": 1.0, "maximize": True, "rounding": "stochastic"}
    optimizer = cases.make("SGD", [p], options, backend=target.backend, ema_decay=0.0, ema_dtype=BF16)
    optimizer.step()
    outcomes = 2 * (p.detach() > 1).long() + (optimizer.state[p]["ema"] > 1).long()
    counts = outcomes.cpu().bincount(minlength=4)
    assert ((counts - n / 4).square() / (n / 4)).sum() < 16.3  # chi-square, three degrees: 0.1 %
    words = [codecs.words(0, 1, 0, NOT_SHARDED, n, torch.device("cpu"), own) for own in (False, True)]
    first, second = (partial(codecs.for_moment, second=second) for second in (False, True))
    for drawn in (first, second, codecs.for_parameter):
        a, b = drawn(words[0]).double(), codecs.for_parameter(words[1]).double()
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / n**0.5


def test_the_dtype_is_free_to_change(target):
    """Between steps, by group: averages are converted, and go on. So it is where a checkpoint has another."""
    params = cases.parameters([(70,), (30,)], device=target.device)
    groups = [{"params": [params[0]]}, {"params": [params[1]], "ema_dtype": "bfloat16"}]
    optimizer = cases.make("SGD", groups, {"lr": 0.1, "ema_decay": 0.9}, backend=target.backend)
    steps(optimizer, [0])
    assert [ema.dtype for ema in averaged(optimizer)] == [F32, BF16]
    assert ["seed" in group for group in optimizer.param_groups] == [False, True]
    for t, (first, second) in enumerate([(BF16, F32), ("float32", None), ("bfloat16", BF16)], 1):
        before = [ema.clone() for ema in averaged(optimizer)]
        for group, dtype in zip(optimizer.param_groups, (first, second), strict=True):
            group["ema_dtype"] = dtype
        steps(optimizer, [t])
        dtypes = [BF16 if "bfloat16" in str(dtype) else F32 for dtype in (first, second)]
        assert [ema.dtype for ema in averaged(optimizer)] == dtypes
        for ema, old, p in zip(averaged(optimizer), before, params, strict=True):
            torch.testing.assert_close(ema.float(), old.float().lerp(p.detach(), 0.1), rtol=2**-6, atol=1e-5)
    for dtype in EMA_DTYPES:
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = cases.make("SGD", twins, {"lr": 0.1}, backend=target.backend, ema_decay=0.9, ema_dtype=dtype)
        other.param_groups[0]["params"], more = twins[:1], twins[1:]
        other.add_param_group({"params": more})
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for ema, saved in zip(averaged(other), averaged(optimizer), strict=True):
            assert ema.dtype is dtype
            assert torch.equal(ema.float(), saved.float())


def test_a_narrow_average_of_wide_parameters_is_refused():
    """Their arithmetic is in float64, and there is no complex bfloat16."""
    for dtype, wrong, kept in (
        (torch.float64, BF16, "float64"),
        (torch.float64, F32, "float64"),
        (torch.complex64, BF16, "complex64"),
    ):
        (p,) = cases.parameters([(2, 3)], dtype)
        before = p.detach().clone()
        optimizer = cases.make("AdamW", [p], {"ema_decay": 0.5, "ema_dtype": wrong})
        text = rf"^AdamW: group 0, parameter 0 \(shape \[2, 3\]\): {dtype} with ema_dtype={wrong} is not supported: "
        for act in (lambda optimizer=optimizer: steps(optimizer, [0]), optimizer.init_state):
            with pytest.raises(TypeError, match=text + f"leave it out for this group, .* then torch.{kept}"):
                act()
        assert torch.equal(p, before)
        assert not optimizer.state
        optimizer.param_groups[0]["ema_decay"] = None
        steps(optimizer, [0])
    (p,) = cases.parameters([(2, 3)], torch.complex64)
    optimizer = cases.make("AdamW", [p], {"ema_decay": 0.5, "ema_dtype": F32})
    steps(optimizer, [0])
    assert optimizer.state[p]["ema"].dtype is torch.complex64


@pytest.mark.parametrize("wrong", [F16, "int8", "half", 16])
def test_a_wrong_dtype_is_refused(wrong):
    (p,) = cases.parameters([(9,)])
    text = r"^ema_dtype=.*: must be None or one of torch.float32, torch.bfloat16, or their names"
    with pytest.raises(ValueError, match=text):
        cases.make("AdamW", [p], {"ema_decay": 0.9, "ema_dtype": wrong})
    optimizer = cases.make("SGDW", [p], {"ema_decay": 0.9})
    optimizer.param_groups[0]["ema_dtype"] = wrong
    with pytest.raises(ValueError, match=text + r".*\(group 0\)"):
        steps(optimizer, [0])
    assert not optimizer.state


# ---- what leaves them alone, and what changes them


def test_a_skipped_step_leaves_averages_alone(target):
    params = cases.parameters([(70,), (3, 4)], device=target.device)
    optimizer = cases.make("AdamW", params, {"ema_decay": 0.5}, backend=target.backend, skip_nonfinite=True)
    steps(optimizer, range(2))
    before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
    cases.set_gradients(params, 2)
    params[0].grad[3] = torch.inf
    optimizer.step()
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    optimizer.skip_nonfinite = False
    optimizer.found_inf = torch.ones((), device=target.device)
    cases.set_gradients(params, 3)
    optimizer.step()
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    optimizer.found_inf = None
    steps(optimizer, [4])
    assert not torch.equal(optimizer.state[params[0]]["ema"], before["0.ema"])


def test_the_decay_is_read_at_every_step(target):
    """Of each group: another number, None, which leaves averages as they are, and a number again."""
    params = cases.parameters([(70,), (30,), (9,)], device=target.device)
    groups = [{"params": [params[0]], "ema_decay": 0.5}, {"params": [params[1]]}, {"params": [params[2]]}]
    optimizer = cases.make("SGD", groups, {"lr": 0.1}, backend=target.backend)
    expected = params[0].detach().double()
    for t, decay in enumerate((0.5, 0.9, None, None, 0.0, 0.25)):
        optimizer.param_groups[0]["ema_decay"] = decay
        optimizer.param_groups[2]["ema_decay"] = 0.5 if t == 3 else None
        steps(optimizer, [t])
        if decay is not None:
            expected.lerp_(params[0].detach().double(), 1 - decay)
        torch.testing.assert_close(optimizer.state[params[0]]["ema"].double(), expected, rtol=1e-6, atol=1e-6)
    assert "ema" not in optimizer.state[params[1]]
    assert "ema" in optimizer.state[params[2]]


@pytest.mark.parametrize("dtype_and_form", FORMS, ids=cases.name_of)
def test_an_average_starts_from_the_value_of_the_master(dtype_and_form, target):
    """Also where it is kept from a later step on, or anew."""
    dtype, form = dtype_and_form
    params = cases.parameters(SHAPES, dtype, target.device)
    optimizer = cases.make("AdamW", params, form, backend=target.backend)
    steps(optimizer, range(2))
    for _ in range(2):
        values = [state._value_of(optimizer.state[p], p, optimizer_storage(optimizer, p)).clone() for p in params]
        optimizer.param_groups[0]["ema_decay"] = 0.5
        optimizer.init_state()
        expected = [value.to(dtype_of(form)) for value in values]
        assert all(map(torch.equal, averaged(optimizer), expected))
        steps(optimizer, [2])
        for p in params:
            del optimizer.state[p]["ema"]


def test_averages_that_were_replaced_are_followed(target):
    """By a copy elsewhere, in another dtype, and in another layout."""
    params = cases.parameters([(70,), (30, 40)], device=target.device)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    a, b = (cases.make("AdamW", ps, {"ema_decay": 0.5}, backend=target.backend) for ps in (params, twins))
    for t in range(5):
        if t:
            for own in a.state.values():
                ema = own["ema"]
                turned = ema.t().contiguous().t() if ema.dim() == 2 else ema.flip(0).flip(0)
                own["ema"] = (ema.clone(), ema.double(), turned, ema)[t - 1]
        steps(a, [t])
        steps(b, [t])
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_an_average_of_another_shape_is_refused(target):
    (p,) = cases.parameters([(2, 3)], device=target.device)
    optimizer = cases.make("AdamW", [p], {"ema_decay": 0.5}, backend=target.backend)
    steps(optimizer, [0])
    before = p.detach().clone()
    for wrong, error, text in (
        (torch.ones(6), ValueError, "its state 'ema' has shape"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, "its state 'ema' is torch.int32"),
        ("mean", TypeError, "its state 'ema' is a str"),
    ):
        optimizer.state[p]["ema"] = wrong
        with pytest.raises(error, match=rf"^AdamW: group 0, parameter 0 \(shape \[2, 3\]\): {text}"):
            steps(optimizer, [1])
    assert torch.equal(p, before)


def test_a_state_of_this_name_is_the_users_without_a_decay(target):
    (p,) = cases.parameters([(2, 3)], device=target.device)
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    optimizer.state[p]["ema"] = own = torch.ones(5, dtype=torch.int32)
    steps(optimizer, range(2))
    assert optimizer.state[p]["ema"] is own


def test_complex_parameters_and_strided_ones(target):
    """As two reals, and laid out as the dense parameter."""
    (p,) = cases.parameters([(30, 40, 2)], device=target.device)
    pair = torch.nn.Parameter(torch.view_as_complex(p.detach().clone()))
    strided = torch.nn.Parameter(torch.stack([p.detach(), p.detach()], 3)[..., 0])
    optimizer = cases.make("AdamW", [p, pair, strided], {"ema_decay": 0.5}, backend=target.backend)
    for t in range(3):
        cases.set_gradients([p], t)
        pair.grad, strided.grad = torch.view_as_complex(p.grad), p.grad.clone()
        optimizer.step()
    emas = averaged(optimizer)
    assert emas[1].dtype is torch.complex64
    assert emas[2].is_contiguous()
    assert torch.equal(torch.view_as_real(emas[1]), emas[0])
    assert torch.equal(emas[2], emas[0])


# ---- checkpoints


@pytest.mark.parametrize("way", ["file", "state_dict", "deepcopy", "dcp"])
@pytest.mark.parametrize("dtype_and_form", [*FORMS[2:7:2], *FORMS[-2:]], ids=cases.name_of)
def test_resume_is_exact(dtype_and_form, way):
    check_resume({**dtype_and_form[1], "ema_decay": 0.9, "ema_warmup": True}, way, cases.CPU)


def test_a_checkpoint_without_averages_starts_them_at_the_next_step(target):
    """From the weights that there are then, which may be loaded after the optimizer."""
    params, twins = (cases.parameters([(70,), (3, 4)], device=target.device) for _ in range(2))
    saved = cases.make("AdamW", params, {}, backend=target.backend)
    steps(saved, range(3))
    for used in (False, True):  # an optimizer with averages of its own forgets them
        optimizer = cases.make("AdamW", twins, {"ema_decay": 0.5}, backend=target.backend)
        if used:
            steps(optimizer, [7])
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert optimizer.param_groups[0]["ema_decay"] == 0.5
        assert not any("ema" in own for own in optimizer.state.values())
        weights = [torch.randn_like(p) for p in twins]
        with torch.no_grad():
            for p, w in zip(twins, weights, strict=True):
                p.copy_(w)
        steps(optimizer, [3])
        for ema, w, p in zip(averaged(optimizer), weights, twins, strict=True):
            torch.testing.assert_close(ema, w.lerp(p.detach(), 0.5))


def test_a_checkpoint_with_averages_loads_everywhere(target):
    """The decay is this optimizer's own; without one the averages stay what they are, and can be used."""
    params = cases.parameters([(70,), (3, 4)], device=target.device)
    saved = cases.make("AdamW", params, {"ema_decay": 0.5, "ema_warmup": True}, backend=target.backend)
    steps(saved, range(3))
    emas = [ema.clone() for ema in averaged(saved)]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for mine in ({}, {"ema_decay": 0.25}):
        optimizer = cases.make("AdamW", twins, mine, backend=target.backend)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert optimizer.param_groups[0].get("ema_decay") == mine.get("ema_decay")
        assert not optimizer.param_groups[0].get("ema_warmup")
        with optimizer.ema_swapped():
            assert all(torch.equal(p, ema) for p, ema in zip(twins, emas, strict=True))
        steps(optimizer, [3])
        for ema, before, p in zip(averaged(optimizer), emas, twins, strict=True):
            torch.testing.assert_close(ema, before.lerp(p.detach(), 0.75) if mine else before)
    exported = optimizer.export()
    assert not any("ema" in own for own in exported["state"].values())
    assert not exported["param_groups"][0].keys() & {"ema_decay", "ema_warmup"}
    torch.optim.AdamW(twins).load_state_dict(exported)


# ---- in the place of the parameters


@pytest.mark.parametrize("dtype_and_form", [*FORMS, (torch.complex64, {})], ids=cases.name_of)
def test_swapped(dtype_and_form, target):
    """Within the block the model computes with the averages; afterwards the run goes on as if there had been none."""
    dtype, form = dtype_and_form
    runs = []
    for swaps in (False, True):
        params = cases.parameters(SHAPES, dtype, target.device)
        optimizer = cases.make("AdamW", params, {**form, "ema_decay": 0.5}, backend=target.backend)
        for t in range(4):
            steps(optimizer, [t])
            if swaps:
                before = {key: x.clone() for key, x in cases.tensors_of(optimizer).items()}
                with optimizer.ema_swapped():
                    for p, ema in zip(params, averaged(optimizer), strict=True):
                        assert torch.equal(p, ema.to(dtype))
                    if t == 1:
                        saved = copy.deepcopy(optimizer.state_dict()["state"])
                        for k, own in saved.items():
                            assert torch.equal(own["ema"], before[f"{k}.ema"])
                cases.assert_same_bits(cases.tensors_of(optimizer), before)
        runs.append(cases.tensors_of(optimizer))
    cases.assert_same_bits(*runs)


def test_an_exception_ends_a_swap(target):
    params = cases.parameters([(70,)], device=target.device)
    optimizer = cases.make("AdamW", params, {"ema_decay": 0.5}, backend=target.backend)
    steps(optimizer, range(2))
    weights = params[0].detach().clone()
    with pytest.raises(KeyError, match="mine"), optimizer.ema_swapped():
        raise KeyError("mine")
    assert torch.equal(params[0], weights)
    assert not optimizer.swapped


def test_a_step_within_a_swap_is_refused(target):
    params = cases.parameters([(70,), (3, 4)], device=target.device)
    optimizer = cases.make("AdamW", params, {"ema_decay": 0.5}, backend=target.backend)
    for t in range(3):
        steps(optimizer, [t])
        for p in params:
            optimizer.step_parameter(p)
    before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
    with optimizer.ema_swapped():
        for act in (optimizer.step, lambda: optimizer.step_parameter(params[0]), lambda: optimizer.step(lambda: 0.0)):
            with pytest.raises(RuntimeError, match=r"^AdamW: a step within ema_swapped\(\) would move the averages"):
                act()
        with pytest.raises(RuntimeError, match="^AdamW: the averages are in place already"), optimizer.ema_swapped():
            pass
        assert torch.equal(params[0], before["0.ema"])
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    steps(optimizer, [3])


def test_parameters_that_share_memory_come_back():
    whole = torch.randn(100)
    params = [torch.nn.Parameter(whole[:60]), torch.nn.Parameter(whole[40:])]
    optimizer = cases.make("SGD", params, {"lr": 0.1, "ema_decay": 0.5})
    steps(optimizer, range(2))
    before = whole.clone()
    with optimizer.ema_swapped():
        assert not torch.equal(whole, before)
    assert torch.equal(whole, before)


def test_without_averages_there_is_nothing_to_swap():
    model = network()
    optimizer = cases.make("AdamW", model.parameters(), {})
    for act in (lambda: optimizer.ema_swapped().__enter__(), lambda: optimizer.ema_state_dict(model)):
        with pytest.raises(RuntimeError, match="^AdamW: no parameter has an average: construct .* ema_decay=0.999"):
            act()
    optimizer = cases.make("AdamW", model.parameters(), {"ema_decay": 0.5})
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    with optimizer.ema_swapped():  # before the first step an average is the weights
        cases.assert_same_bits(dict(model.state_dict()), weights)
    cases.assert_same_bits(dict(optimizer.ema_state_dict(model)), weights)


class Tied(torch.nn.Module):
    """Tied weights, a buffer, a frozen parameter."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 4, dtype=dtype), torch.nn.Linear(4, 4, dtype=dtype)
        self.last.weight = self.first.weight
        self.frozen = torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.arange(3))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=cases.name_of)
def test_state_dict_of_the_averages(dtype, target):
    torch.manual_seed(0)
    model = Tied(dtype).to(target.device)
    optimizer = cases.make("AdamW", model.parameters(), {"ema_decay": 0.5}, backend=target.backend)
    for t in range(3):
        cases.set_gradients([p for p in model.parameters() if p.requires_grad], t)
        optimizer.step()
    found = optimizer.ema_state_dict(model)
    assert list(found) == list(model.state_dict())
    assert found._metadata == model.state_dict()._metadata
    with optimizer.ema_swapped():
        expected = {key: x.clone() for key, x in model.state_dict().items()}
    cases.assert_same_bits(dict(found), expected)
    assert not any(x.requires_grad for x in found.values())
    assert torch.equal(found["first.weight"], found["last.weight"])
    assert not torch.equal(found["first.weight"], model.first.weight)
    fresh = Tied(dtype)
    fresh.load_state_dict(found)
    half = optimizer.ema_state_dict(model.last)  # of a part
    assert list(half) == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"^AdamW.ema_state_dict: this model has none of the parameters with an avera"):
        optimizer.ema_state_dict(fresh)


def test_the_averaged_model_is_the_better_one(target):
    """On noisy gradients, which is what averages are for."""
    model = network(target.device)
    optimizer = cases.make("SGD", model.parameters(), {"lr": 0.02}, backend=target.backend, ema_decay=0.97)
    noise = torch.Generator().manual_seed(0)
    for t in range(300):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        for p in model.parameters():
            p.grad += 3 * torch.randn(p.shape, generator=noise).to(p.device)
        optimizer.step()
    plain = loss_of(model, 1000).item()
    with optimizer.ema_swapped():
        assert loss_of(model, 1000).item() < 0.9 * plain
    assert loss_of(model, 1000).item() == plain


@pytest.mark.parametrize("wrong", [1.0, -0.1, 1, float("nan"), float("inf")])
def test_a_decay_out_of_range_is_refused(wrong, target):
    (p,) = cases.parameters([(9,)], device=target.device)
    text = r"^Invalid ema_decay: .*, it must be None, or at least 0 and below 1"
    for name in ("AdamW", "RAdam", "SGD"):
        with pytest.raises(ValueError, match=text):
            cases.make(name, [p], {"ema_decay": wrong})
    optimizer = cases.make("AdamW", [p], {"ema_decay": 0.5}, backend=target.backend)
    with pytest.raises(ValueError, match=text + r".*\(group 1\)"):
        optimizer.add_param_group({"params": cases.parameters([(3,)], device=target.device), "ema_decay": wrong})
    steps(optimizer, range(2))
    before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
    optimizer.param_groups[0]["ema_decay"] = wrong
    with pytest.raises(ValueError, match=text + r".*\(group 0\)"):
        steps(optimizer, [2])
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    with pytest.raises(TypeError, match="ema_decay must be a number, and is '0.9'"):
        cases.make("AdamW", [p], {"ema_decay": "0.9"})


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "SGD", "SGDW", "AdaBound", "AdaBoundW"])
def test_every_class_keeps_averages(name):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = getattr(fused_adamw, name)([p], lr=0.1, ema_decay=0.9, ema_warmup=True, ema_dtype="float32")
    optimizer.step()
    group = optimizer.param_groups[0]
    assert (group["ema_decay"], group["ema_warmup"], group["ema_dtype"]) == (0.9, True, F32)
    torch.testing.assert_close(optimizer.state[p]["ema"], 1 + (1 - 2 / 11) * (p.detach() - 1))
