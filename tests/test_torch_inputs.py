"""The inputs, error inputs and schedules that torch ships for the tests of its own optimizers, run against ours.

What ours refuses stands case by case in docs/compatibility.md, and the tests read it there.
"""

import copy
import inspect
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import fused_adamw
from tests import cases

pytest.importorskip("expecttest", reason="torch's own test inputs need expecttest")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # hypothesis, which these inputs do not need, may be missing
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
# The import forbids to set any flag of torch.backends in this process: allowed again.
setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)

NAMES = ("AdamW", "Adam", "RAdam", "SGD")
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in NAMES}
# The implementations that torch's own tests add to each of the inputs; ours is one, and fused.
FLAGS = {
    "none": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "differentiable": {"differentiable": True},
    "for-loop": {"foreach": False, "fused": False, "differentiable": False},
}
DOCUMENT = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text()


def table(title):
    """The rows of the table under a heading of the document, by the names in their first cell, as {column: cell}."""
    section = DOCUMENT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    rows = [(line[0].split("; "), dict(zip(lines[0][1:], line[1:], strict=True))) for line in lines[2:]]
    return {name.strip("`"): row for names, row in rows for name in names}


def inputs(device):
    """(class, description, options) of every input."""
    found = []
    for name, info in INFOS.items():
        found += [(name, given.desc, given.kwargs) for given in info.optim_inputs_func(device=device)]
    return found


def error_inputs(device):
    found = []
    for name, info in INFOS.items():
        found += [(name, e.optimizer_error_input.desc, e) for e in info.optim_error_inputs_func(device, torch.float32)]
    return found


CPU_INPUTS, GPU_INPUTS = inputs("cpu"), inputs("cuda")
ONLY_GPU = [(name, desc, options) for name, desc, options in GPU_INPUTS if "capturable" in options]


def check(name, desc, options, flag, target):
    """As torch's for 6 steps, parameters and states; or refused, with what the document says, before any step."""
    cell = table("Inputs of " + (name if name in ("RAdam", "SGD") else "AdamW and Adam"))[desc][flag]
    arguments = inspect.signature(getattr(torch.optim, name)).parameters
    flags = {key: value for key, value in FLAGS[flag].items() if key in arguments}
    dtype = torch.float64 if target.float64 else torch.float32
    ours, torchs = (cases.parameters([(9,), (4, 5), ()], dtype, target.device) for _ in range(2))
    options = copy.deepcopy(options)
    if cell != "as torch":
        with pytest.raises(RuntimeError, match=re.escape(table("Refused arguments")[cell.split("`")[1]]["message"])):
            cases.make(name, ours, options, backend=target.backend, **flags)
        return
    theirs = copy.deepcopy(options)
    if options.get("capturable"):  # torch's own tests move it; its fused step reads it on the device
        theirs["lr"] = torch.as_tensor(theirs.get("lr", 1e-3)).to(target.device)
    a = cases.make(name, ours, options, backend=target.backend, **flags)
    b = getattr(torch.optim, name)(torchs, **theirs, **flags)
    for t in range(6):
        for optimizer, params in ((a, ours), (b, torchs)):
            cases.set_gradients(params, t)
            optimizer.step()
    states = cases.tensors_of(a)
    for key, value in cases.tensors_of(b).items():
        torch.testing.assert_close(states[key].to(value), value, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "desc", "options"), CPU_INPUTS, ids=cases.name_of)
@pytest.mark.parametrize("flag", FLAGS)
def test_input(name, desc, options, flag, target):
    check(name, desc, options, flag, target)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "desc", "options"), ONLY_GPU, ids=cases.name_of)
@pytest.mark.parametrize("flag", FLAGS)
def test_input_of_a_gpu(name, desc, options, flag):
    check(name, desc, options, flag, cases.Target("cuda", "triton"))


def check_error(name, desc, case):
    row = table("Error inputs")[desc.strip("`")]
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    kind, text = case.error_type, case.error_regex
    if row["ours"] != "as torch":
        kind, text = RuntimeError, re.escape(table("Refused arguments")[row["ours"].split("`")[1]]["message"])
    given = case.optimizer_error_input
    params = given.params if given.params is not None else cases.parameters([(1, 1)])
    if issubclass(kind, Warning):
        with pytest.warns(kind, match=text):
            cases.make(name, params, given.kwargs)
    else:
        with pytest.raises(kind, match=text):
            cases.make(name, params, given.kwargs)


def told(value):
    """An id without the address of an object, which every process of pytest-xdist has elsewhere."""
    return value if isinstance(value, str) else "case"


@pytest.mark.parametrize(("name", "desc", "case"), error_inputs("cpu"), ids=told)
def test_error_input(name, desc, case):
    check_error(name, desc, case)


@pytest.mark.gpu
def test_error_inputs_of_a_gpu():
    found = error_inputs("cuda")
    assert len(found) >= 4
    for name, desc, case in found:
        check_error(name, desc, case)


def test_the_document_lists_nothing_else():
    listed = {desc for name in ("AdamW and Adam", "RAdam", "SGD") for desc in table(f"Inputs of {name}")}
    assert listed == {desc for _, desc, _ in GPU_INPUTS}
    assert {desc.strip("`") for _, desc, _ in error_inputs("cpu")} <= table("Error inputs").keys()


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", INFOS)
def test_schedules(name, target):
    """The combinations of schedules that torch tests each class with."""
    for made in INFOS[name].scheduler_inputs:
        ours, torchs = (cases.parameters([(9,), (4, 5)], device=target.device) for _ in range(2))
        a = cases.make(name, ours, {"lr": 0.01}, backend=target.backend)
        b = getattr(torch.optim, name)(torchs, lr=0.01)
        schedules = [[make(o) for make in made] for o in (a, b)]
        for t in range(12):
            for optimizer, params, all_of in ((a, ours, schedules[0]), (b, torchs, schedules[1])):
                cases.set_gradients(params, t)
                optimizer.step()
                for s in all_of:
                    s.step(*([1.0] if "Plateau" in type(s).__name__ else []))
            assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"]
        for p, q in zip(ours, torchs, strict=True):
            torch.testing.assert_close(p, q)


def test_sparse_gradients_which_torchs_sgd_takes_are_refused():
    assert [name for name, info in INFOS.items() if info.supports_sparse] == ["SGD"]
    p = cases.parameters([(4, 3)])[0]
    p.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match=re.escape(table("Refused tensors")["sparse gradients"]["message"])):
        cases.make("SGD", [p], {}).step()


def test_fake_tensors_which_torch_takes_are_refused():
    refused = table("Refused tensors")
    with FakeTensorMode():
        optimizer = cases.make("AdamW", [torch.nn.Parameter(torch.ones(3))], {})
        with pytest.raises(RuntimeError, match=re.escape(refused["any under FakeTensorMode"]["message"])):
            optimizer.init_state()


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"max_grad_norm": 1.0}], ids=str)
def test_parameters_on_meta_are_counted(options, target):
    """As torch counts them, beside others that are stepped."""
    shape = (5000, 3)
    real = cases.parameters([(4,)], device=target.device)[0]
    twin = torch.nn.Parameter(real.detach().clone())
    p = torch.nn.Parameter(torch.ones(shape, device="meta"))
    a = cases.make("AdamW", [p, real], options, backend=target.backend)
    b = cases.make("AdamW", [twin], options, backend=target.backend)
    for t in range(3):
        p.grad = torch.ones(shape, device="meta") if t else None
        real.grad, twin.grad = torch.ones_like(real), torch.ones_like(real)
        a.step()
        b.step()
    assert torch.equal(real, twin)
    assert a.state[p]["step"] == 2
    moments = [a.state[p][name].device.type for name in a.state[p] if name != "step"]
    assert moments == ["meta"] * len(moments) and moments


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_on_meta_has_a_distributed_state(flat):
    """Of the keys, shapes and dtypes that torch's has, into which a checkpoint can be planned."""
    found = []
    for module in (torch.optim, fused_adamw):
        with torch.device("meta"):
            model = torch.nn.Linear(3, 4)
        optimizer = module.AdamW(model.parameters(), lr=1e-3)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        found.append(get_optimizer_state_dict(model, optimizer, options=options))
    torchs, ours = found
    if not flat:
        torchs, ours = ({f"{p}.{k}": t for p, own in s["state"].items() for k, t in own.items()} for s in found)
    assert torchs.keys() == ours.keys()
    for key, t in torchs.items():
        if isinstance(t, torch.Tensor):
            assert (ours[key].shape, ours[key].dtype, ours[key].device) == (t.shape, t.dtype, t.device)


def test_a_weight_of_minus_zero_without_a_gradient_becomes_plus_zero(target):
    """As the document says; every backend alike, with a decay and without."""
    for name, options in (("AdamW", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"weight_decay": 0.1})):
        p = torch.nn.Parameter(torch.tensor([-0.0, 0.0], device=target.device))
        p.grad = torch.zeros_like(p)
        cases.make(name, [p], options, backend=target.backend).step()
        assert p.tolist() == [0.0, 0.0]
        assert not p.signbit().any()
