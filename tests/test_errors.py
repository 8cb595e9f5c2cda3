"""Bad input: what the message says, and that nothing was written when it is raised."""

import re
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_adamw
from fused_adamw import backends, options
from tests import cases


def optimizer_of(bad, target, **options):
    """Two good parameters in group 0, a good and the bad one in group 1, all with gradients."""
    good = cases.parameters([(3,), (4,), (5,)], device=target.device)
    cases.set_gradients(good, 1)
    groups = [{"params": good[:2]}, {"params": [good[2], bad]}]
    return cases.make("AdamW", groups, options, backend=target.backend)


def with_gradient(p, g):
    p.grad = g
    return p


def sparse_like(g):
    return torch.sparse_coo_tensor(
        torch.tensor([[0] * g.dim()]).T, [1.0], g.shape, device=g.device, check_invariants=False
    )


def broken(kind, device):
    """A parameter that cannot be stepped, and what the message must hold."""
    p = torch.nn.Parameter(torch.ones(2, 3, device=device))
    g = torch.ones(2, 3, device=device)
    if kind == "sparse":
        return with_gradient(p, sparse_like(g)), RuntimeError, "gradient is sparse.*sparse=False"
    if kind == "integer":
        p = torch.nn.Parameter(torch.ones(2, 3, device=device, dtype=torch.int64), requires_grad=False)
        return with_gradient(p, torch.ones_like(p)), TypeError, "the parameter is torch.int64.*leave the parameter out"
    if kind == "float8":
        p = torch.nn.Parameter(torch.ones(2, 3, device=device).to(torch.float8_e4m3fn))
        return with_gradient(p, torch.ones_like(p)), TypeError, "the parameter is torch.float8_e4m3fn"
    if kind == "shape":
        with_gradient(p, g).data = torch.ones(3, 3, device=device)
        return p, ValueError, r"gradient has shape \[2, 3\].*p.grad = None"
    if kind == "complex":
        with_gradient(p, g).data = torch.ones(2, 3, device=device, dtype=torch.complex64)
        return p, TypeError, "parameter is torch.complex64, its gradient torch.float32"
    if kind == "expanded":
        p = torch.nn.Parameter(torch.ones(2, 1, device=device).expand(2, 3))
        return with_gradient(p, g), ValueError, "share memory.*clone"
    if kind == "conjugate":
        p = torch.nn.Parameter(torch.ones(2, 3, device=device, dtype=torch.complex64).conj())
        return with_gradient(p, torch.ones_like(p)), ValueError, "resolve_conj"
    if kind == "no memory":
        p = torch.nn.Parameter(Wrapper(g))
        return with_gradient(p, Wrapper(g)), TypeError, "is a Wrapper, a subclass of Tensor.*plain tensors"
    if kind == "fake":
        with FakeTensorMode():
            p = torch.nn.Parameter(torch.ones(2, 3, device=device))
            return with_gradient(p, torch.ones(2, 3, device=device)), TypeError, "is a FakeTensor, a subclass of Tensor"
    if kind == "overlapping":
        p = torch.nn.Parameter(torch.ones(8, device=device).as_strided((2, 3), (2, 1)))
        return with_gradient(p, g), ValueError, "share memory.*clone"
    if kind == "shifted":
        memory = torch.ones(7, device=device)
        p = torch.nn.Parameter(memory[:6].view(2, 3))
        return with_gradient(p, memory[1:].view(2, 3)), ValueError, "its gradient overlaps it.*clone"
    if kind == "inference":
        with torch.inference_mode():
            p = torch.nn.Parameter(torch.ones(2, 3, device=device))
            p.grad = g
        return p, TypeError, "made under torch.inference_mode.*outside"
    raise AssertionError(kind)


class Wrapper(torch.Tensor):
    """A subclass that wraps another tensor and has no memory of its own, as DTensor and the like."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


KINDS = ["sparse", "integer", "float8", "shape", "complex", "expanded", "conjugate", "no memory"]
KINDS += ["fake", "overlapping", "shifted", "inference"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_tensor(kind, target):
    bad, error, text = broken(kind, target.device)
    optimizer = optimizer_of(bad, target)
    good = [p for group in optimizer.param_groups for p in group["params"] if p is not bad]
    before = [p.detach().clone() for p in good]
    where = re.escape(f"AdamW: group 1, parameter 1 (shape {list(bad.shape)}): ")
    for _ in range(2):  # and again: a failed step leaves nothing half-made behind
        with pytest.raises(error, match=where + ".*" + text):
            optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(p, b) for p, b in zip(good, before, strict=True))
    bad.grad = None
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(good, before, strict=True))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_step_under_fake_tensor_mode_is_refused(allowed, target):
    """Its tensors have shapes alone; real parameters keep what they have, and get no fake state."""
    params = cases.parameters([(3,)], device=target.device)
    optimizer = cases.make("AdamW", params, {}, backend=target.backend)
    cases.set_gradients(params, 1)
    with (
        FakeTensorMode(allow_non_fake_inputs=allowed),
        pytest.raises(RuntimeError, match="AdamW: under FakeTensorMode tensors have no memory to step: leave the mode"),
    ):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()


@pytest.mark.parametrize("kind", [set, dict.fromkeys, iter, lambda params: dict.fromkeys(params).keys()])
def test_params_that_have_no_index(kind):
    """A group's list that was replaced by hand."""
    params = cases.parameters([(3,), (4,)])
    optimizer = cases.make("AdamW", [{"params": params[:1]}, {"params": params[1:]}], {})
    cases.set_gradients(params, 1)
    for _ in range(2):
        optimizer.param_groups[1]["params"] = kind(params[1:])
        before = [p.detach().clone() for p in params]
        with pytest.raises(TypeError, match=r"^AdamW: group 1: its 'params' were set to a \w+, .* to a list$"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        optimizer.param_groups[1]["params"] = tuple(params[1:])
        optimizer.step()


def test_bad_tensor_is_named_when_it_has_a_name(target):
    model = torch.nn.Linear(2, 3).to(target.device)
    optimizer = cases.make("SGD", model.named_parameters(), {}, backend=target.backend)
    model.bias.grad = sparse_like(torch.ones(3, device=target.device))
    with pytest.raises(
        RuntimeError, match=r"SGD: group 0, parameter 1 \('bias', shape \[3\]\): its gradient is sparse"
    ):
        optimizer.step()


def test_parameter_given_twice(target):
    p = cases.parameters([(3,)], device=target.device)[0]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cases.make("AdamW", [p, p], {}, backend=target.backend)
    with pytest.raises(ValueError, match=r"parameter 1 \(shape \[3\]\) is AdamW: group 0, parameter 0 .* as well"):
        optimizer.step()


def test_state_of_another_shape(target):
    p = cases.parameters([(3,)], device=target.device)[0]
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.zeros(4, device=target.device)
    with pytest.raises(ValueError, match=r"state 'exp_avg' has shape \[4\]"):
        optimizer.step()


@pytest.mark.float64
def test_narrow_state_of_float64_parameters(target):
    p = cases.parameters([(3,)], torch.float64, target.device)[0]
    optimizer = cases.make("AdamW", [p], {"state_dtype": torch.bfloat16}, backend=target.backend)
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="state_dtype=torch.bfloat16 is not supported: give this group"):
        optimizer.step()


BAD_OPTIONS = [
    ("AdamW", {"lr": -1.0}, "Invalid learning rate: -1.0"),
    ("AdamW", {"lr": float("nan")}, "Invalid learning rate: nan"),
    ("AdamW", {"lr": torch.tensor([1.0, 2.0])}, "Tensor lr must be 1-element"),
    ("AdamW", {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ("Adam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ("Adam", {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ("AdamW", {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
    ("SGD", {"lr": -0.5}, "Invalid learning rate: -0.5"),
    ("SGD", {"momentum": -0.5}, "Invalid momentum value: -0.5"),
    ("SGDW", {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
    ("SGDW", {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
    ("Adam", {"decouple_lr": True}, "needs decoupled weight decay: use AdamW or SGDW"),
    ("AdamW", {"decouple_lr": True, "lr": 0.0}, "make the group with a positive lr"),
    ("AdamW", {"cautious": True}, "cautious=True: must be None or one of 'decay', 'update'"),
    ("RAdam", {"cautious": "both"}, "cautious='both': must be None or one of 'decay', 'update'"),
    ("AdamW", {"cautious": "update", "amsgrad": True}, "cautious='update' with amsgrad=True is not supported: drop"),
    ("Adam", {"cautious": "decay"}, "cautious='decay' needs decoupled weight decay: use AdamW, or drop it"),
    ("AdaBound", {"final_lr": -0.1}, "Invalid final learning rate: -0.1"),
    ("AdaBoundW", {"final_lr": float("inf")}, "Invalid final learning rate: inf"),
    ("AdaBound", {"gamma": 1.0}, "Invalid gamma parameter: 1.0, it must be above 0 and below 1"),
    ("AdaBoundW", {"gamma": 0.0}, "Invalid gamma parameter: 0.0, it must be above 0 and below 1"),
    ("AdaBound", {"lr": 0.0}, "AdaBound scales final_lr by lr / base_lr, and base_lr, the lr the group was made with"),
    ("AdaBound", {"decouple_lr": True}, "needs decoupled weight decay: use AdamW or SGDW"),
    ("AdaBound", {"amsbound": True, "state_dtype": "int8"}, "state_dtype='int8' with amsbound=True is not supported"),
    ("AdamW", {"first_moment": False}, "first_moment=False needs betas[0] = 0, and it is 0.9: give betas=(0.0, 0.999)"),
    ("Adam", {"first_moment": None}, "first_moment=None: must be True or False"),
    (
        "AdamW",
        {"first_moment": False, "betas": (0, 0.9), "amsgrad": True},
        "first_moment=False with amsgrad=True is not",
    ),
    (
        "AdamW",
        {"first_moment": False, "betas": (0, 0.9), "cautious": "decay"},
        "first_moment=False with cautious='decay'",
    ),
    ("AdamW", {"betas": (0.9, 0.99, 0.5)}, "there must be two"),
    ("AdamW", {"betas": (torch.ones(2), torch.ones(2))}, "Tensor betas[0] must be 1-element"),
    ("AdamW", {"state_dtype": torch.int16}, "state_dtype=torch.int16: must be one of torch.float32"),
    ("AdamW", {"state_dtype": "bf16"}, "state_dtype='bf16': must be one of torch.float32"),
    ("AdamW", {"state_dtype": "nn"}, "state_dtype='nn': must be one of torch.float32"),
    ("AdamW", {"backend": "cudnn"}, "no backend 'cudnn': there are 'cpu', 'triton', 'cuda', 'reference'"),
]


@pytest.mark.parametrize(("name", "options", "text"), BAD_OPTIONS, ids=cases.name_of)
def test_bad_option(name, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(fused_adamw, name)(cases.parameters([(3,)]), **options)


def test_bad_option_of_a_group():
    a, b = cases.parameters([(3,), (3,)])
    with pytest.raises(ValueError, match=r"Invalid learning rate: -2 \(group 1\)"):
        fused_adamw.AdamW([{"params": [a]}, {"params": [b], "lr": -2}])
    optimizer = fused_adamw.SGD([a])
    with pytest.raises(ValueError, match=r"Invalid momentum value: -1 \(group 1\)"):
        optimizer.add_param_group({"params": [b], "momentum": -1})


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_capturable_on_the_cpu(backend):
    p = cases.parameters([(3,)])[0]
    optimizer = fused_adamw.AdamW([p], capturable=True, backend=backend)
    cases.set_gradients([p], 1)
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0 .*: move the parameters there .* or leave out capt"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("option", [{"foreach": True}, {"differentiable": True}])
def test_refused_with_a_remedy(option):
    a, b = cases.parameters([(3,), (3,)])
    with pytest.raises(RuntimeError, match=r"Adam\(.*\) is not supported: .*(use|drop)"):
        fused_adamw.Adam([a], **option)
    with pytest.raises(RuntimeError, match=r"Adam: .*=True of group 1 is not supported: .*(use|drop)"):
        fused_adamw.Adam([{"params": [a]}, {"params": [b], **option}])


@pytest.mark.parametrize("fused", [True, False, None])
def test_fused_may_be_anything(fused):
    """As in torch; the step is fused."""
    a, b = cases.parameters([(3,), (3,)])
    optimizer = fused_adamw.AdamW([{"params": [a]}, {"params": [b], "fused": fused}], fused=fused)
    assert [group["fused"] for group in optimizer.param_groups] == [fused, fused]
    assert optimizer.backend == {torch.device("cpu"): "cpu"}


@pytest.mark.parametrize(
    "option",
    [
        {"max_grad_norm": 1.0},
        {"skip_nonfinite": True},
        {"amp_scaling": True},
        {"backend": "reference"},
        {"process_group": len},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_all_groups_are_no_options_of_one(option):
    a, b = cases.parameters([(3,), (3,)])
    (name,) = option
    text = rf"SGD: '{name}' holds for all groups.* of group 1: .*constructor, SGD\(groups, {name}="
    with pytest.raises(ValueError, match=text):
        fused_adamw.SGD([{"params": [a]}, {"params": [b], **option}])
    optimizer = fused_adamw.SGD([a])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [b], **option})
    assert len(optimizer.param_groups) == 1
    fused_adamw.SGD([{"params": [b], **option}], **option)  # the same in both places, as a wrapper may write it


@pytest.mark.parametrize("bad", ["WORLD", 0])
def test_a_process_group_that_is_none(bad):
    with pytest.raises(TypeError, match="process_group must be a process group or a function.*mesh.get_group"):
        fused_adamw.AdamW(cases.parameters([(3,)]), process_group=bad)


@pytest.mark.parametrize("module", ["deepspeed.runtime.zero.stage3", "deepspeed.runtime.bf16_optimizer"])
def test_deepspeed_is_refused_what_it_does_itself(module, monkeypatch):
    """Of its ranks, each would have a norm of its own."""
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    caller = types.FunctionType(compile("optimizer.step()", "zero.py", "exec"), {"__name__": module})
    p = cases.parameters([(3,)])[0]
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    for asked in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        caller.__globals__["optimizer"] = optimizer = fused_adamw.AdamW([p], **asked)
        with pytest.raises(RuntimeError, match="AdamW: the norm.*DeepSpeed hands.*set gradient_clipping in DeepSpeed"):
            caller()
        assert not optimizer.state
    assert torch.equal(p, before)
    caller.__globals__["optimizer"] = fused_adamw.AdamW([p])
    caller()
    assert not torch.equal(p, before)


def test_what_torch_refuses_of_a_group_names_it():
    a, b = cases.parameters([(3,), (3,)])
    for bad, kind in ((None, TypeError), (b * 2, ValueError)):
        with pytest.raises(kind, match=r"can.*optimize.*\(group 1\)"):
            fused_adamw.AdamW([{"params": [a]}, {"params": [bad]}])


MISSING = "missing"
BY_HAND = [
    ("AdamW", {"betas": (1.0, 0.9)}, ValueError, r"Invalid beta parameter at index 0: 1.0 \(group 1\)"),
    ("AdamW", {"betas": (0.9, float("nan"))}, ValueError, r"Invalid beta parameter at index 1: nan \(group 1\)"),
    ("AdamW", {"betas": (0.9,)}, ValueError, r"there must be two \(group 1\)"),
    ("AdamW", {"betas": None}, TypeError, r"betas must be two numbers, and is None \(group 1\)"),
    ("AdamW", {"betas": 0.9}, TypeError, r"betas must be two numbers, and is 0.9 \(group 1\)"),
    ("AdamW", {"lr": float("nan")}, ValueError, r"Invalid learning rate: nan \(group 1\)"),
    ("SGD", {"lr": float("-inf")}, ValueError, r"Invalid learning rate: -inf \(group 1\)"),
    ("SGD", {"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element \(group 1\)"),
    ("SGD", {"lr": torch.ones(0)}, ValueError, r"Tensor lr must be 1-element \(group 1\)"),
    ("SGD", {"lr": 1j}, TypeError, r"lr must be a number, and is 1j \(group 1\)"),
    ("SGD", {"momentum": float("inf")}, ValueError, r"Invalid momentum value: inf \(group 1\)"),
    ("AdamW", {"decouple_lr": True}, ValueError, r"set by hand, needs the group's 'base_lr' too.*\(group 1\)"),
    ("AdamW", {"decouple_lr": True, "base_lr": "1"}, TypeError, r"base_lr must be a number.*\(group 1\)"),
    ("AdamW", {"decouple_lr": True, "base_lr": None}, TypeError, r"base_lr must be a number.*\(group 1\)"),
    ("AdamW", {"decouple_lr": True, "base_lr": 0.0}, ValueError, r"base_lr.* is 0.0: .*\(group 1\)"),
    ("AdamW", {"cautious": "weights"}, ValueError, r"cautious='weights': must be None or one of.*\(group 1\)"),
    ("Adam", {"cautious": "decay"}, ValueError, r"cautious='decay' needs decoupled weight decay.*\(group 1\)"),
    ("AdamW", {"first_moment": False}, ValueError, r"needs betas\[0\] = 0, and it is 0.9: .* \(group 1\)"),
    ("AdaBound", {"final_lr": float("nan")}, ValueError, r"Invalid final learning rate: nan \(group 1\)"),
    ("AdaBound", {"gamma": 0}, ValueError, r"Invalid gamma parameter: 0, it must be above 0.* \(group 1\)"),
    ("AdaBoundW", {"gamma": "1"}, TypeError, r"gamma must be a number, and is '1'.*\(group 1\)"),
    ("AdaBound", {"base_lr": 0.0}, ValueError, r"base_lr, the lr the group was made with, is 0.0: .*\(group 1\)"),
    ("AdamW", {"seed": None}, ValueError, r"seed=None: must be a whole number.*\(group 1\)"),
    ("SGD", {"rounding": None}, ValueError, r"rounding=None: must be one of.*\(group 1\)"),
    *(("Adam", {name: MISSING}, ValueError, f"Adam: group 1 has no '{name}'") for name in options.NEEDED["adam"]),
    *(("SGD", {name: MISSING}, ValueError, f"SGD: group 1 has no '{name}'") for name in options.NEEDED["sgd"]),
    *(("AdaBound", {name: MISSING}, ValueError, f"group 1 has no '{name}'") for name in options.NEEDED["adabound"]),
]


@pytest.mark.parametrize(("name", "option", "kind", "text"), BY_HAND, ids=cases.name_of)
@pytest.mark.parametrize("native", [True, False])
def test_bad_option_set_by_hand(name, option, kind, text, native, monkeypatch):
    """Found at the step, at the first and while a plan holds, before anything is written or counted."""
    if not native:
        monkeypatch.setattr(backends, "native", lambda: None)
    for steps in (0, 1):
        a, b = cases.parameters([(3,), (3,)])
        optimizer = cases.make(name, [{"params": [a]}, {"params": [b]}], {}, backend="cpu" if native else "reference")
        cases.set_gradients([a, b], 1)
        for _ in range(steps):
            optimizer.step()
        before = a.detach().clone()
        group = optimizer.param_groups[1]
        was = dict(group)
        group.update(option)
        if MISSING in option.values():
            del group[next(iter(option))]
        for _ in range(2):
            with pytest.raises(kind, match=text):
                optimizer.step()
        assert torch.equal(a, before)
        assert [own["step"].item() for own in optimizer.state.values()] == [1, 1] * steps
        b.grad = None  # as in torch, nobody reads the options of a group without gradients
        optimizer.step()
        assert not torch.equal(a, before)
        group.clear()
        group.update(was)
        cases.set_gradients([b], 1)
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1])
def test_no_tensor_among_the_parameters(steps):
    a, b = cases.parameters([(3,), (3,)])
    optimizer = fused_adamw.AdamW([{"params": [a]}, {"params": [b]}])
    cases.set_gradients([a, b], 1)
    for _ in range(steps):
        optimizer.step()
    before = a.detach().clone()
    optimizer.param_groups[1]["params"].append(None)
    with pytest.raises(TypeError, match="AdamW: group 1, parameter 1 is None, not a tensor"):
        optimizer.step()
    assert torch.equal(a, before)


def test_views_that_only_look_as_if_they_overlapped(target):
    """Strides that interleave without meeting, and a gradient in the gaps of its parameter."""
    memory = torch.zeros(4, 10, device=target.device)
    p, q = memory[:, :5], torch.zeros(8, device=target.device).as_strided((3, 2), (2, 3))
    ours = [torch.nn.Parameter(p), torch.nn.Parameter(q)]
    ours[0].grad, ours[1].grad = memory[:, 5:], torch.ones_like(q)
    memory[:, 5:] = torch.arange(20, device=target.device).view(4, 5)
    optimizer = cases.make("SGD", ours, {"lr": 1.0}, backend=target.backend)
    optimizer.step()
    assert torch.equal(p, -memory[:, 5:])
    assert torch.equal(q, -torch.ones_like(q))


def test_names_that_no_longer_fit_are_left_out():
    model = torch.nn.Linear(2, 3)
    optimizer = fused_adamw.SGD(model.named_parameters())
    optimizer.param_groups[0]["params"].pop(0)
    model.bias.grad = sparse_like(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"group 0, parameter 0 \(shape \[3\]\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        ("AdamW", {"lr": "1e-3"}, "lr must be a number, and is '1e-3': in YAML, 1e-3 is a string"),
        ("AdamW", {"weight_decay": None}, "weight_decay must be a number, and is None"),
        ("Adam", {"betas": ("0.9", 0.999)}, "beta must be a number, and is '0.9'"),
        ("Adam", {"betas": None}, "betas must be two numbers, and is None"),
        ("AdamW", {"eps": None}, "eps must be a number, and is None"),
        ("SGD", {"dampening": [0.5]}, r"dampening must be a number, and is \[0.5\]"),
    ],
)
def test_no_number(name, option, text):
    """In the constructor, in a group, and set by hand."""
    a, b = cases.parameters([(3,), (3,)])
    cls = getattr(fused_adamw, name)
    with pytest.raises(TypeError, match=text):
        cls([a], **option)
    with pytest.raises(TypeError, match=rf"({text}).*\(group 1\)"):
        cls([{"params": [a]}, {"params": [b], **option}])
    for steps in (0, 1):
        optimizer = cls([a])
        cases.set_gradients([a], 1)
        for _ in range(steps):
            optimizer.step()
        optimizer.param_groups[0].update(option)
        with pytest.raises(TypeError, match=text):
            optimizer.step()


def test_typing_error_in_an_argument():
    with pytest.raises(TypeError, match="weight_deacy"):
        fused_adamw.AdamW(cases.parameters([(3,)]), weight_deacy=0.1)
