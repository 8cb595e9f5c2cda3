"""State that comes and goes: torch's checkpoints and ours, both ways, and every way to save and to go on."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests import cases

NAMES = ["AdamW", "Adam", "RAdam", "SGD", "SGDW"]
TORCHS = [
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
]
IMPLEMENTATIONS = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
}


def steps(optimizer, times):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in times:
        cases.set_gradients(params, t)
        optimizer.step()


def through_a_file(saved, **options):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def module(optimizer):
    """A model of these parameters, which torch.distributed.checkpoint names them by."""
    return torch.nn.ParameterList([p for group in optimizer.param_groups for p in group["params"]])


# ---- the load matrix


@pytest.mark.parametrize(("name", "options"), TORCHS, ids=cases.name_of)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("to_ours", [True, False], ids=["torch to ours", "ours to torch"])
def test_a_run_goes_on_from_the_others_checkpoint(name, options, implementation, to_ours, target):
    """5 steps, a file, 20 more: no further from float64 than torch without the break, plus 1 ulp.

    Ours is held against torch's for-loop on the CPU or its implementation, whichever is worse: on an H200 the fused
    one, whose steps ours goes on from, is further from the truth. Torch's implementation is held against itself:
    kernels of a GPU, which contract, may be nearer to the truth than either.
    """
    kind = IMPLEMENTATIONS[implementation]
    if implementation == "capturable" and (name == "SGD" or target.device == "cpu"):
        return  # torch has none; test_a_checkpoint_of_a_capturable_optimizer_loads_on_the_cpu
    shapes = [(17, 31), (2500,)]
    first, second = (cases.parameters(shapes, device=target.device) for _ in range(2))
    oracle = torch.optim.__dict__[name](cases.parameters(shapes, torch.float64), **options)
    # What ours takes, its checkpoint tells; torch takes its choice of an implementation from there.
    told = kind if implementation == "fused" or (implementation, target.backend) == ("capturable", "triton") else {}

    def ours(params):
        return cases.make(name, params, options, backend=target.backend, **told)

    def torchs(params):
        return torch.optim.__dict__[name](params, **options, **kind)

    runs = [torchs(cases.parameters(shapes, device=target.device))]
    if to_ours:
        runs.append(torch.optim.__dict__[name](cases.parameters(shapes), **options, foreach=False))
    a, b = (torchs(first), ours(second)) if to_ours else (ours(first), torchs(second))
    steps(a, range(5))
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    b.load_state_dict(through_a_file(a.state_dict()))
    if not to_ours and not told:
        for group in b.param_groups:
            group.update(kind)
        if "capturable" in kind:
            for own in b.state.values():
                own["step"] = own["step"].to(target.device)
    steps(b, range(5, 25))
    for optimizer in (*runs, oracle):
        steps(optimizer, range(25))
    bound, *more = (cases.tensors_of(optimizer) for optimizer in runs)
    cases.assert_no_worse(cases.tensors_of(b), bound, cases.tensors_of(oracle), *more)
    if name != "SGD":  # torch's does not count; ours does, from 1 where it finds a buffer
        assert [b.state[p]["step"].item() for p in second] == [25, 25]


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_checkpoint_of_a_capturable_optimizer_loads_on_the_cpu(name):
    """As torch.load(map_location="cpu") gives it: the groups say capturable=True, and this optimizer is not."""
    (p,), (q,) = cases.parameters([(9,)]), cases.parameters([(9,)])
    theirs = getattr(torch.optim, name)([q])
    steps(theirs, range(3))
    saved = through_a_file(theirs.state_dict())
    saved["param_groups"][0] |= {"capturable": True, "fused": True}
    ours = cases.make(name, [p], {})
    ours.load_state_dict(saved)
    with torch.no_grad():
        p.copy_(q)
    steps(ours, range(3, 6))
    steps(theirs, range(3, 6))
    torch.testing.assert_close(p, q)
    assert ours.param_groups[0]["capturable"] is False


@pytest.mark.gpu
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("there", ["cuda", "cpu"])
def test_from_the_cpu_to_a_gpu_and_back(there, capturable):
    """The bits are those of a run that never moved: the backends agree in every one."""
    devices = {"cuda": ("cpu", "cuda"), "cpu": ("cuda", "cpu")}[there]
    a, b = (
        cases.make("AdamW", cases.parameters([(9,), (2, 3)], device=d), {}, capturable=capturable and d == "cuda")
        for d in devices
    )
    whole = cases.make("AdamW", cases.parameters([(9,), (2, 3)]), {})
    steps(a, range(3))
    with torch.no_grad():
        for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
            q.copy_(p)
    b.load_state_dict(through_a_file(a.state_dict(), map_location="cpu"))
    steps(b, range(3, 6))
    steps(whole, range(6))
    cases.assert_same_bits(cases.tensors_of(b), cases.tensors_of(whole))


# ---- our own


WAYS = ["state_dict", "torch.save", "deepcopy", "pickle", "dcp", "dcp flattened", "dcp full"]


@pytest.mark.pairwise(case=[*cases.SHARED, *cases.OURS], way=WAYS, dtype=[torch.float32, torch.bfloat16])
def test_resume_is_exact(case, dtype, way, target):
    """Save after 3 steps, go on for 3: the bits of 6 steps without a break, also with bf16 parameters."""
    name, options = case
    if way == "dcp full" and "SGD" in name and "momentum" not in options:
        return  # torch.distributed.checkpoint raises "Expected device to be set" for such a state, torch's SGD's too
    params = cases.parameters([(9,), (2, 3)], dtype, target.device)
    optimizer = cases.make(name, params, options, backend=target.backend)
    steps(optimizer, range(3))
    if way in ("deepcopy", "pickle"):
        resumed = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    else:
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        resumed = cases.make(name, twins, options, backend=target.backend)
    if way == "state_dict":
        resumed.load_state_dict(optimizer.state_dict())
    elif way == "torch.save":
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    elif way.startswith("dcp"):
        kind = StateDictOptions(flatten_optimizer_state_dict="flat" in way, full_state_dict="full" in way)
        saved = get_optimizer_state_dict(module(optimizer), optimizer, options=kind)
        set_optimizer_state_dict(module(resumed), resumed, saved, options=kind)
    assert resumed.backend == optimizer.backend
    steps(resumed, range(3, 6))
    steps(optimizer, range(3, 6))
    cases.assert_same_bits(cases.tensors_of(resumed), cases.tensors_of(optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_distributed_checkpoint_on_disk(tmp_path, target):
    params, twins = (cases.parameters([(9,), (2, 3)], device=target.device) for _ in range(2))
    a, b = (cases.make("AdamW", ps, {"amsgrad": True}, backend=target.backend) for ps in (params, twins))
    steps(a, range(3))
    dcp.save({"optimizer": get_optimizer_state_dict(module(a), a)}, checkpoint_id=tmp_path, no_dist=True)
    b.init_state()
    into = {"optimizer": get_optimizer_state_dict(module(b), b)}
    dcp.load(into, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(module(b), b, into["optimizer"])
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    steps(a, range(3, 6))
    steps(b, range(3, 6))
    cases.assert_same_bits(cases.tensors_of(b), cases.tensors_of(a))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("to_ours", [True, False], ids=["torch to ours", "ours to torch"])
def test_distributed_checkpoints_of_torch(name, flat, to_ours):
    """It looks for each key of the group that it loads into, so a key that only ours has would fail the load."""
    extra = {"momentum": 0.9} if name == "SGD" else {}
    first, second = cases.parameters([(9,), (2, 3)]), cases.parameters([(9,), (2, 3)])
    makers = [lambda ps: getattr(torch.optim, name)(ps, **extra), lambda ps: cases.make(name, ps, extra)]
    a, b = (make(ps) for make, ps in zip(makers if to_ours else makers[::-1], (first, second), strict=True))
    steps(a, range(3))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(module(a), a, options=options))
    if name == "SGD" and flat and to_ours and torch.__version__ < (2, 10):
        with pytest.raises(KeyError, match="step"):  # as docs/compatibility.md says
            set_optimizer_state_dict(module(b), b, saved, options=options)
        return
    set_optimizer_state_dict(module(b), b, saved, options=options)
    with torch.no_grad():
        for p, q in zip(first, second, strict=True):
            q.copy_(p)
    steps(a, range(3, 6))
    steps(b, range(3, 6))
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_groups_have_torchs_keys(name):
    """And ours only where they were set."""
    ours, torchs = (
        make(cases.parameters([(3,)]), 0.1) for make in (getattr(cases.fused_adamw, name), getattr(torch.optim, name))
    )
    assert ours.param_groups[0].keys() == torchs.param_groups[0].keys()
    ours.load_state_dict(torchs.state_dict())
    assert ours.param_groups[0].keys() == torchs.param_groups[0].keys()
    declared = cases.make(name, cases.parameters([(3,)]), {"state_dtype": torch.bfloat16})
    assert declared.param_groups[0].keys() - torchs.param_groups[0].keys() == {"state_dtype"}
    declared.load_state_dict(torchs.state_dict())
    assert declared.param_groups[0]["state_dtype"] is torch.bfloat16


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), *cases.OURS], ids=cases.name_of)
def test_the_dummy_step_of_distributed_checkpoint_changes_no_weight(name, options, target):
    """It steps a fresh optimizer with zero gradients and lr=0, to have its state made; a decay must not act then."""
    options = {**options, "weight_decay": 0.5}
    params = cases.parameters([(9,), (2, 3)], device=target.device)
    before = [p.detach().clone() for p in params]
    optimizer = cases.make(name, params, options, backend=target.backend)
    get_optimizer_state_dict(module(optimizer), optimizer)
    assert all(own["step"].item() == 1 for own in optimizer.state.values())  # it did step
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    spared = cases.make(name, params, options, backend=target.backend)
    spared.init_state()
    get_optimizer_state_dict(module(spared), spared)
    assert all(own["step"].item() == 0 for own in spared.state.values())


def test_loading_shares_nothing_and_keeps_the_declared_dtypes(target):
    lr = torch.tensor(1e-3, dtype=torch.float64)
    p = cases.parameters([(9,)], torch.bfloat16, target.device)[0]
    optimizer = cases.make("AdamW", [p], {"amsgrad": True, "lr": lr}, backend=target.backend)
    steps(optimizer, range(1))
    saved = optimizer.state_dict()
    twin = torch.nn.Parameter(p.detach().clone())
    other = cases.make("AdamW", [twin], {"amsgrad": True}, backend=target.backend)
    other.load_state_dict(saved)
    assert other.state[twin].keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for key, value in other.state[twin].items():
        assert value.dtype is torch.float32
        assert torch.equal(value, optimizer.state[p][key])
        assert value.data_ptr() != optimizer.state[p][key].data_ptr()
    assert other.param_groups[0]["lr"] is not lr
    before = copy.deepcopy(saved)
    steps(other, range(1, 3))
    other.param_groups[0]["lr"].fill_(7.0)
    assert all(torch.equal(v, before["state"][0][k]) for k, v in saved["state"][0].items())
    assert lr.item() == 1e-3
    narrow = cases.make("AdamW", [twin], {"state_dtype": torch.bfloat16}, backend=target.backend)
    narrow.load_state_dict(saved)
    assert narrow.state[twin]["exp_avg"].dtype is torch.bfloat16


def test_loading_keeps_state_that_is_not_ours():
    """Integers too, which torch would cast to bf16: 12345 would come back as 12352."""
    p, q = cases.parameters([(9,), (9,)], torch.bfloat16)
    a, b = (cases.make("AdamW", [x], {}) for x in (p, q))
    steps(a, range(1))
    a.state[p] |= {"seed": torch.tensor(2**40 + 1), "count": torch.tensor(12345, dtype=torch.int16), "note": "mine"}
    b.load_state_dict(through_a_file(a.state_dict()))
    assert {k: b.state[q][k] for k in ("seed", "count", "note")} == {"seed": 2**40 + 1, "count": 12345, "note": "mine"}
    assert b.state[q]["count"].dtype is torch.int16


def test_loading_runs_the_users_hooks(target):
    p = cases.parameters([(3,)], device=target.device)[0]
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    seen = []

    def before(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0]["exp_avg"].fill_(7.0)
        return state_dict

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg"].clone()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert (seen[0] == 7).all()


def test_loading_a_state_of_another_shape_is_refused_and_changes_nothing(target):
    p, q = cases.parameters([(3,), (1,)], device=target.device)
    a, b = (cases.make("AdamW", [x], {}, backend=target.backend) for x in (p, q))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    a.step()
    b.step()
    before = a.state[p]["exp_avg"]
    with pytest.raises(
        ValueError, match=r"AdamW: loading group 0, parameter 0 \(shape \[3\]\): its state 'exp_avg' has shape \[1\]"
    ):
        a.load_state_dict(b.state_dict())
    assert a.state[p]["exp_avg"] is before
    a.step()


# ---- another optimizer's, apex's, another model's


def foreign(name, p):
    """The state_dict of another optimizer over p after 1000 steps: torch's, or what others keep."""
    if hasattr(torch.optim, name):
        optimizer = getattr(torch.optim, name)([p], **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {}))
        steps(optimizer, [0])
        return optimizer.state_dict()
    group = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": [0]}
    if name == "Lion":
        state = {"exp_avg": torch.ones_like(p)}
    elif name == "Adafactor":
        group |= {"eps": (1e-30, 1e-3)}
        del group["betas"]
        state = {"step": 1000, "exp_avg_sq_row": torch.ones(9), "exp_avg_sq_col": torch.ones(1)}
    else:
        group |= {"eps": 1e-8}
        state = {"step": 1000, "state1": torch.ones_like(p).byte(), "state2": torch.ones_like(p).byte()}
    return {"state": {0: state}, "param_groups": [group]}


@pytest.mark.parametrize(
    ("name", "other", "lacks", "has"),
    [
        ("AdamW", "Adamax", "'exp_avg_sq'", "'exp_inf'"),
        ("AdamW", "RMSprop", "'betas'", "'alpha'"),
        ("AdamW", "Adagrad", "'betas'", "'lr_decay'"),
        ("AdamW", "SGD", "'betas', 'eps'", "'momentum'"),
        ("AdamW", "Lion", "'eps'", "'betas'"),
        ("AdamW", "Adafactor", "'betas'", "'eps'"),
        ("Adam", "8-bit", "'exp_avg', 'exp_avg_sq'", "'step', 'state1', 'state2'"),
        ("SGD", "AdamW", "'momentum', 'dampening'", "'betas'"),
        ("SGDW", "RMSprop", "'dampening'", "'momentum'"),
    ],
)
def test_another_optimizers_checkpoint_is_refused_and_changes_nothing(name, other, lacks, has, target):
    """With zero moments at step 1000, the first update would be that of a first step many times over."""
    p, q = cases.parameters([(9,), (9,)], device=target.device)
    optimizer = cases.make(name, [p], {"momentum": 0.9} if "SGD" in name else {}, backend=target.backend)
    steps(optimizer, range(2))
    before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"^{name}: .*group 0.* lacks {lacks} and has .*{has}.*another optimizer's"):
        optimizer.load_state_dict(foreign(other, q))
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups


def test_our_own_checkpoints_of_the_other_family_are_refused():
    a, b = (cases.make(name, cases.parameters([(9,)]), {}) for name in ("AdamW", "SGD"))
    for optimizer in (a, b):
        steps(optimizer, range(2))
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="it is another optimizer's; load one of this class"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "SGDW"])
@pytest.mark.parametrize("state", [{}, {0: {}}, {0: {"momentum_buffer": None}}, {0: {"exp_avg": {}, "step": {}}}])
def test_a_checkpoint_without_state_loads(name, state):
    """Nothing, or the None and {} that stand for it in checkpoints of torch: the next step is a first one."""
    (p,), (q,) = cases.parameters([(9,)]), cases.parameters([(9,)])
    options = {"momentum": 0.9, "dampening": 0.5} if "SGD" in name else {}
    a, b = cases.make(name, [p], options), cases.make(name, [q], options)
    a.load_state_dict({**a.state_dict(), "state": state})
    steps(a, range(2))
    steps(b, range(2))
    assert torch.equal(p, q)


@pytest.mark.parametrize("step", [1000, torch.tensor([1000], dtype=torch.int32), torch.tensor(1000.0)])
def test_steps_that_are_counted_in_the_group(step, target):
    """As apex, TransformerEngine and Megatron do; parameters that were never stepped start at 0."""
    shapes = [(9,), (2, 3), (5,)]
    ps, qs = (cases.parameters(shapes, device=target.device) for _ in range(2))
    theirs, ours = torch.optim.AdamW(qs), cases.make("AdamW", ps, {}, backend=target.backend)
    steps(theirs, range(1000, 1003))
    for own in theirs.state.values():
        own["step"].fill_(1000)
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            p.copy_(q)
    del theirs.state[qs[2]]
    saved = copy.deepcopy(theirs.state_dict())
    for own in saved["state"].values():
        del own["step"]
    group = saved["param_groups"][0]
    group["step"] = step
    for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del group[key]
    ours.load_state_dict(saved)
    steps(ours, range(3, 6))
    steps(theirs, range(3, 6))
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)
    assert [ours.state[p]["step"].item() for p in ps] == [1003, 1003, 3]
    assert "step" not in ours.param_groups[0]  # it would not be counted there
    assert saved["param_groups"][0]["step"] is step


def test_a_users_own_count_in_the_group_stays():
    for name, options in (("AdamW", {}), ("SGD", {"momentum": 0.9})):
        (p,), (q,) = cases.parameters([(9,)]), cases.parameters([(9,)])
        a, b = getattr(torch.optim, name)([p], **options), cases.make(name, [q], options)
        steps(a, range(3))
        a.param_groups[0]["step"] = 70
        b.load_state_dict(a.state_dict())
        assert b.param_groups[0]["step"] == 70
        assert b.state[q]["step"].item() == (3 if name == "AdamW" else 1)


def loaded_with(where, key, value):
    """AdamW, and its checkpoint with one thing changed: in the state, or in the group."""
    optimizer = cases.make("AdamW", cases.parameters([(9,), (2, 3)]), {})
    steps(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    (saved["state"][1] if where == "state" else saved["param_groups"][0])[key] = value
    return optimizer, saved


@pytest.mark.parametrize(
    ("where", "key", "value", "error", "text"),
    [
        ("state", "exp_avg", "running", TypeError, "its state 'exp_avg' is a str"),
        ("state", "exp_avg_sq", torch.ones(2, 3, dtype=torch.complex64), TypeError, "'exp_avg_sq' is torch.complex64"),
        ("state", "exp_avg", torch.ones(2, 3, dtype=torch.int64), TypeError, "its state 'exp_avg' is torch.int64"),
        ("state", "exp_avg", None, ValueError, "its state lacks 'exp_avg' and has 'step', 'exp_avg_sq'"),
        ("state", "master", "copy", TypeError, "its state 'master' is a str"),
        ("state", "step", "3", TypeError, "its state 'step' is a str, and must be a number"),
        ("state", "step", None, ValueError, "its state lacks 'step'"),
        ("state", "step", torch.ones(3), ValueError, r"its state 'step' is torch.float32 of shape \[3\], .* a number"),
        ("state", "step", torch.tensor(1j), ValueError, "its state 'step' is torch.complex64 of shape"),
        ("state", "step", float("inf"), ValueError, "its state 'step' is inf"),
        ("state", "step", torch.tensor(float("nan")), ValueError, "its state 'step' is nan"),
        ("state", "step", torch.tensor(-1.0), ValueError, "its state 'step' is -1.0"),
        (
            "group",
            "eps",
            (1e-30, 1e-3),
            TypeError,
            r"loading: eps must be a number, and is .* \(group 0\): put it",
        ),
        ("group", "lr", torch.ones(2), ValueError, r"loading: Tensor lr must be 1-element \(group 0\): put it"),
    ],
)
def test_what_a_checkpoint_cannot_say_is_refused_and_changes_nothing(where, key, value, error, text):
    optimizer, saved = loaded_with(where, key, value)
    before = {name: t.clone() for name, t in cases.tensors_of(optimizer).items()}
    place = r"AdamW: loading group 0, parameter 1 \(shape \[2, 3\]\): " if where == "state" else "AdamW: "
    with pytest.raises(error, match=f"^{place}.*{text}"):
        optimizer.load_state_dict(saved)
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    steps(optimizer, [2])


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        (None, "this one is a NoneType"),
        ({"model": {}, "optimizer": {}}, "this one has 'model', 'optimizer': give what the state_dict"),
        ({"state": {0: [1]}}, "loading group 0, parameter 0 .*: its state is a list, and must be a dict"),
    ],
)
def test_what_is_no_checkpoint_is_refused(saved, text):
    optimizer = cases.make("AdamW", cases.parameters([(9,)]), {})
    saved = {**optimizer.state_dict(), **saved} if saved and "state" in saved else saved
    with pytest.raises((ValueError, TypeError), match=f"^AdamW: .*{text}"):
        optimizer.load_state_dict(saved)


def test_another_number_of_groups_or_parameters_is_refused_in_torchs_words():
    params = cases.parameters([(9,), (2, 3), (4,)])
    one, two, uneven = (
        cases.make("AdamW", [{"params": ps} for ps in groups], {})
        for groups in ([params[:2]], [params[:1], params[1:2]], [params])
    )
    for optimizer in (one, two, uneven):
        steps(optimizer, [0])
    for a, b in ((one, two), (two, one)):
        with pytest.raises(ValueError, match="loaded state dict has a different number of parameter groups: [12], and"):
            a.load_state_dict(b.state_dict())
    with pytest.raises(ValueError, match="a parameter group that doesn't match the size of optimizer's group: group 0"):
        one.load_state_dict(uneven.state_dict())


# ---- by name


def named(names, value=0.0, name="AdamW"):
    """An optimizer over parameters of one shape with these names, and these by name."""
    params = {n: torch.nn.Parameter(torch.full((3,), value + ord(n[-1]))) for n in names}
    return cases.make(name, list(params.items()), {}), params


@pytest.mark.parametrize("way", ["state_dict", "dcp"])
def test_parameters_in_another_order_are_matched_by_name(way):
    """torch.distributed.checkpoint does so itself, and leaves the names in the order that was saved."""
    a, first = named("abc")
    b, second = named("cab")
    for n, p in first.items():
        p.grad = torch.full_like(p, float(ord(n)))
    a.step()
    if way == "state_dict":
        b.load_state_dict(through_a_file(a.state_dict()))
    else:
        models = [torch.nn.ParameterDict(ps) for ps in (first, second)]
        saved = copy.deepcopy(get_optimizer_state_dict(models[0], a))
        unnamed = cases.make("AdamW", second.values(), {})
        for optimizer in (unnamed, b):
            set_optimizer_state_dict(models[1], optimizer, copy.deepcopy(saved))
        assert unnamed.param_groups[0]["param_names"] == list("cab")
        b.load_state_dict(unnamed.state_dict())
    assert b.param_groups[0]["param_names"] == list("cab")
    for n, p in second.items():
        assert torch.equal(b.state[p]["exp_avg"], a.state[first[n]]["exp_avg"])


def test_names_of_groups_follow_their_parameters():
    """A state goes with its parameter to another group, the options of a group stay with the group."""
    made = []
    for order in (("ab", "cd"), ("ca", "bd")):
        params = {n: torch.nn.Parameter(torch.full((3,), float(ord(n)))) for n in "abcd"}
        groups = [{"params": [(n, params[n]) for n in ns], "lr": 0.1 * (i + 1)} for i, ns in enumerate(order)]
        made.append((cases.make("AdamW", groups, {}), params))
    (a, first), (b, second) = made
    for n, p in first.items():
        p.grad = torch.full_like(p, float(ord(n)))
    a.step()
    b.load_state_dict(a.state_dict())
    assert [group["lr"] for group in b.param_groups] == [0.1, 0.2]
    for n, p in second.items():
        assert torch.equal(b.state[p]["exp_avg"], a.state[first[n]]["exp_avg"])


def test_names_that_match_in_part_are_refused_and_new_ones_go_by_position():
    a, _ = named("abc")
    steps(a, [0])
    for names in ("bcd", "adb"):
        b, _ = named(names)
        with pytest.raises(
            ValueError, match="AdamW: the checkpoint has 'b' at another position, .* only one .*'[ac]', 'd'\\."
        ):
            b.load_state_dict(a.state_dict())
        assert not b.state
    for names in (["module.a", "module.b", "module.c"], ["a", "b", "z"], ["a", "x", "c"]):
        b, second = named(names)
        b.load_state_dict(a.state_dict())
        assert b.param_groups[0]["param_names"] == names
        for p, q in zip(a.state, second.values(), strict=True):
            assert torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])


def test_loading_makes_nothing_with_a_history():
    """Not of a master that the checkpoint lacks, nor of saved tensors that require grad."""
    p, q = cases.parameters([(9,)])[0], cases.parameters([(9,)], torch.bfloat16)[0]
    theirs = torch.optim.AdamW([p])
    steps(theirs, range(2))
    for master in ("fp32", "kahan", "split16"):
        ours = cases.make("AdamW", [q], {"master": master})
        saved = copy.deepcopy(theirs.state_dict())
        saved["state"][0]["exp_avg"].requires_grad_()
        ours.load_state_dict(saved)
        assert not any(t.requires_grad for t in ours.state[q].values())
        copy.deepcopy(ours.state[q])
    plain = cases.make("AdamW", [p], {})
    plain.load_state_dict(saved)
    assert not any(t.requires_grad for t in plain.state[p].values())


def test_a_learning_rate_that_groups_share_stays_shared():
    lr = torch.tensor(0.1)
    p, q = cases.parameters([(9,), (9,)])
    optimizer = cases.make("AdamW", [{"params": [p], "lr": lr}, {"params": [q], "lr": lr}], {})
    optimizer.load_state_dict(optimizer.state_dict())
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is second is not lr


@pytest.mark.float64
def test_a_checkpoint_of_torch_brings_its_learning_rate_as_the_base_of_the_decay(target):
    """decouple_lr: a decay of 1 % stays one, whatever the learning rate in the checkpoint."""
    p, q = cases.parameters([(1,), (1,)], torch.float64, target.device)
    theirs = torch.optim.AdamW([q], lr=0.1, weight_decay=0.01)
    q.grad = torch.ones_like(q)
    theirs.step()
    options = {"lr": 1e-3, "weight_decay": 0.01, "decouple_lr": True, "betas": (0.0, 0.9)}
    ours = cases.make("AdamW", [p], options, backend=target.backend)
    ours.load_state_dict(theirs.state_dict())
    ours.param_groups[0]["betas"] = (0.0, 0.9)
    before = p.item()
    p.grad = torch.zeros_like(p)
    ours.step()
    assert p.item() == pytest.approx(0.99 * before)


@pytest.mark.parametrize("form", [{}, {"state_dtype": "int8"}], ids=cases.name_of)
def test_a_first_moment_that_is_not_kept_is_dropped_from_a_checkpoint_and_exported_as_zeros(form, target):
    """torch's class loads what is exported, and goes on as this one does; torch's checkpoint loads back."""
    p, q, r = (cases.parameters([(70, 65)], device=target.device)[0] for _ in range(3))
    options = {"lr": 1e-2, "betas": (0.0, 0.9)}
    theirs = torch.optim.AdamW([p], **options)
    steps(theirs, range(2))
    ours = cases.make("AdamW", [q], options | {"first_moment": False} | form, backend=target.backend)
    q.data.copy_(p)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert not {"exp_avg", "exp_avg_codes", "exp_avg_scales"} & ours.state[q].keys()
    assert ours.param_groups[0]["first_moment"] is False
    steps(ours, range(2, 4))
    exported = ours.export()
    assert "first_moment" not in exported["param_groups"][0]
    assert exported["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    torchs = torch.optim.AdamW([r], **options)
    torchs.load_state_dict(through_a_file(exported))
    r.data.copy_(q)
    steps(torchs, range(4, 6))
    if form:
        return
    steps(ours, range(4, 6))
    torch.testing.assert_close(q, r)


def test_a_checkpoint_without_a_first_moment_brings_the_option_and_one_with_another_beta_is_refused(target):
    p, q = (cases.parameters([(9,)], device=target.device)[0] for _ in range(2))
    saved = cases.make("AdamW", [p], {"betas": (0.0, 0.9), "first_moment": False}, backend=target.backend)
    steps(saved, range(2))
    other = cases.make("AdamW", [q], {}, backend=target.backend)
    steps(other, range(1))
    theirs = copy.deepcopy(other.state_dict())
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["first_moment"] is False
    q.data.copy_(p)
    for optimizer in (saved, other):
        steps(optimizer, range(2, 4))
    cases.assert_same_bits(cases.tensors_of(other), cases.tensors_of(saved))
    with pytest.raises(ValueError, match=r"AdamW: loading: first_moment=False needs betas\[0\] = 0, and it is 0.9"):
        other.load_state_dict(theirs)


@pytest.mark.float64
@pytest.mark.parametrize("amsbound", [False, True])
def test_adabounds_rate_of_the_group_is_kept_by_a_run_that_resumes_with_another(amsbound, target):
    """A schedule had come to a tenth of it; the authors' class would take that for the whole: larger bounds."""
    options = {"lr": 1e-2, "gamma": 0.1, "amsbound": amsbound}
    whole, half, again = (cases.parameters([(9,)], torch.float64, target.device) for _ in range(3))
    a, b = (cases.make("AdaBound", ps, options, backend=target.backend) for ps in (whole, half))
    steps(a, range(3))
    steps(b, range(3))
    for optimizer in (a, b):
        optimizer.param_groups[0]["lr"] = 1e-3
    resumed = cases.make("AdaBound", again, options | {"lr": 1e-3}, backend=target.backend)
    again[0].data.copy_(half[0])
    resumed.load_state_dict(through_a_file(b.state_dict()))
    assert resumed.param_groups[0]["base_lr"] == 1e-2
    for optimizer in (a, resumed):
        steps(optimizer, range(3, 6))
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(resumed))
    b.param_groups[0]["base_lr"] = 1e-3
    steps(b, range(3, 6))
    assert (half[0] - whole[0]).abs().max() > 1e-4


def test_a_checkpoint_of_adabounds_authors_loads_and_ours_has_their_keys(target):
    p = cases.parameters([(9,)], device=target.device)[0]
    keys = {"lr": 1e-3, "betas": (0.9, 0.99), "final_lr": 0.2, "gamma": 0.1, "eps": 1e-8, "weight_decay": 0.0}
    moments = {"exp_avg": torch.full((9,), 0.5), "exp_avg_sq": torch.ones(9)}
    theirs = {"state": {0: {"step": 3, **moments}}, "param_groups": [{**keys, "amsbound": False, "params": [0]}]}
    optimizer = cases.make("AdaBound", [p], {"lr": 1e-2, "amsbound": True}, backend=target.backend)
    optimizer.load_state_dict(theirs)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in (*keys, "amsbound", "base_lr")} == {**keys, "amsbound": False, "base_lr": 1e-2}
    steps(optimizer, [0])
    assert optimizer.state[p]["step"] == 4
    exported = optimizer.export()
    assert exported["param_groups"][0].keys() >= theirs["param_groups"][0].keys()
    assert "base_lr" not in exported["param_groups"][0]
    assert exported["state"][0].keys() == theirs["state"][0].keys()
    del theirs["param_groups"][0]["gamma"]
    with pytest.raises(ValueError, match="AdaBound: group 0 of the checkpoint lacks 'gamma'"):
        optimizer.load_state_dict(theirs)


def test_cautious_goes_with_a_checkpoint_and_torch_loads_it(target):
    p, q, r = (cases.parameters([(9,)], device=target.device)[0] for _ in range(3))
    optimizer = cases.make("AdamW", [p], {"cautious": "update"}, backend=target.backend)
    steps(optimizer, range(2))
    other = cases.make("AdamW", [q], {}, backend=target.backend)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["cautious"] == "update"
    theirs = torch.optim.AdamW([r])
    theirs.load_state_dict(optimizer.state_dict())
    steps(theirs, [2])
    other.load_state_dict(theirs.state_dict())
    assert other.state[q]["step"] == 3
    # What a checkpoint of torch's lacks stays as it is here.
    optimizer.load_state_dict(torch.optim.AdamW([r]).state_dict())
    assert optimizer.param_groups[0]["cautious"] == "update"


@pytest.mark.parametrize(("value", "text"), [("both", "must be None or one of"), ("update", "with amsgrad=True")])
def test_a_cautious_checkpoint_that_no_step_can_use_is_refused(value, text):
    optimizer = cases.make("AdamW", cases.parameters([(9,)]), {"amsgrad": value == "update"})
    steps(optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["cautious"] = value
    with pytest.raises(ValueError, match=f"AdamW: loading: cautious={value!r}.* {text}.*group 0.*put it right in"):
        optimizer.load_state_dict(saved)


def test_a_lower_half_in_int16_loads(target):
    """As older checkpoints have it, under its name there."""
    options = {"master": "split16", "weight_decay": 0.1}
    first, second = (cases.parameters([(9, 5)], torch.bfloat16, target.device) for _ in range(2))
    a, b = (cases.make("AdamW", params, options, backend=target.backend) for params in (first, second))
    steps(a, range(3))
    saved = copy.deepcopy(a.state_dict())
    assert a.state[first[0]]["lower_half"].view(torch.int16).count_nonzero()
    saved["state"][0]["remainder"] = saved["state"][0].pop("lower_half").view(torch.int16)
    second[0].data.copy_(first[0])
    b.init_state()
    b.load_state_dict(saved)
    assert b.state[second[0]].keys() == a.state[first[0]].keys()
    cases.assert_same_bits(b.state[second[0]], a.state[first[0]])
    saved["state"][0]["remainder"] = saved["state"][0]["remainder"][:1]
    with pytest.raises(ValueError, match=r"its state 'remainder' has shape \[1, 5\]: it is another model's"):
        b.load_state_dict(saved)


def test_a_state_dict_that_was_changed_by_hand_loads_as_it_is():
    """It has tensors of the optimizer itself, as what torch.distributed.checkpoint hands over when it loads a part."""
    p = cases.parameters([(9,)])[0]
    optimizer = cases.make("AdamW", [p], {})
    steps(optimizer, range(2))
    before = optimizer.state[p]["exp_avg"].clone()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": torch.tensor(7.0)}
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 7
    assert torch.equal(optimizer.state[p]["exp_avg"], before)
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "exp_avg": torch.ones(9)}
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["step"] == 7
    assert (optimizer.state[p]["exp_avg"] == 1).all()
