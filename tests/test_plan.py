"""Which memory is stepped: layouts, offsets, late gradients, and everything that makes a plan stale."""

import pytest
import torch

from fused_adamw import backends, options, plan
from tests import cases

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}


def plain_twin(p):
    """A contiguous parameter of the same values, with the same gradient."""
    twin = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    twin.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)
    return twin


def check_against_twins(params, target, steps=2):
    """Stepping these parameters gives the bits that contiguous copies of them get."""
    twins = [plain_twin(p) for p in params]
    a, b = (cases.make("AdamW", ps, OPTIONS, backend=target.backend) for ps in (params, twins))
    for _ in range(steps):
        a.step()
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


# ---- offsets and layouts


def check_sentinels(target, n=150):
    """Views slid over a buffer of sentinels; the whole buffer is compared: tails, misalignment, out of bounds."""
    for offset in range(41):
        buffers = [torch.full((n + 60,), 42.0, device=target.device) for _ in range(2)]
        p, g = (torch.nn.Parameter(b[offset : offset + n]) for b in buffers)
        p.data.copy_(torch.linspace(-1, 1, n))
        p.grad = g.data.copy_(torch.linspace(1, 2, n))
        twin = plain_twin(p)
        cases.make("AdamW", [p], OPTIONS, backend=target.backend).step()
        cases.make("AdamW", [twin], OPTIONS, backend="reference").step()
        outside = torch.ones(n + 60, dtype=torch.bool, device=target.device)
        outside[offset : offset + n] = False
        torch.testing.assert_close(p.detach(), twin.detach(), msg=lambda m, offset=offset: f"offset {offset}: {m}")
        assert all((b[outside] == 42).all() for b in buffers), f"offset {offset}: written beside the parameter"


def test_sentinels(target):
    check_sentinels(target)


def layouts(device):
    """Parameters in every layout, each with a gradient in its own and in another."""
    base = cases.parameters([(6, 5, 4, 3), (8, 6), (40,), (1, 7, 1, 1), (8, 6), (6, 5, 4, 3)], device=device)
    last = torch.nn.Parameter(base[0].detach().to(memory_format=torch.channels_last))
    transposed = torch.nn.Parameter(base[1].detach().t())
    sliced = torch.nn.Parameter(base[4].detach()[:, 1:4])
    every_other = torch.nn.Parameter(base[2].detach()[::2])
    params = [last, transposed, sliced, every_other, base[3], torch.nn.Parameter(base[5].detach().permute(2, 0, 3, 1))]
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(device)
        p.grad = torch.empty_like(p).copy_(g)
    return params


def check_mismatched_gradients(target):
    """A gradient whose strides differ from the parameter's is paired by index, not by address."""
    p = cases.parameters([(4, 6)], device=target.device)[0]
    square = cases.parameters([(5, 5)], device=target.device)[0]
    p.grad = torch.randn(6, 4, device=target.device).t()
    square.grad = torch.randn(5, 5, device=target.device).t()
    check_against_twins([p, square], target)


def test_layouts(target):
    check_against_twins(layouts(target.device), target)


def test_gradients_laid_out_unlike_the_parameter(target):
    check_mismatched_gradients(target)
    params = layouts(target.device)
    for p in params:
        p.grad = p.grad.clone(memory_format=torch.contiguous_format)
    check_against_twins(params, target)


def test_expanded_gradient(target):
    p = cases.parameters([(4, 6)], device=target.device)[0]
    p.grad = torch.ones((), device=target.device).expand(4, 6)
    check_against_twins([p], target)


def test_sliced_parameter_leaves_the_gaps_alone(target):
    buffer = torch.full((8, 6), 42.0, device=target.device)
    p = torch.nn.Parameter(buffer[:, 1:4])
    p.grad = torch.ones_like(p)
    cases.make("AdamW", [p], OPTIONS, backend=target.backend).step()
    assert (buffer[:, [0, 4, 5]] == 42).all()
    assert (buffer[:, 1:4] != 42).all()


def test_complex_is_two_reals(target):
    p = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.complex64, device=target.device))
    p.grad = torch.randn(5, 3, dtype=torch.complex64, device=target.device).conj()
    flat = torch.nn.Parameter(torch.view_as_real(p.detach()).clone())
    flat.grad = torch.view_as_real(p.grad.resolve_conj()).clone()
    a, b = (cases.make("AdamW", [x], OPTIONS, backend=target.backend) for x in (p, flat))
    for _ in range(2):
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(p.detach()), flat.detach())
    assert a.state[p]["exp_avg"].dtype is torch.complex64


@pytest.mark.parametrize("dtype", options.DTYPES, ids=cases.name_of)
@pytest.mark.parametrize("grad_dtype", options.DTYPES, ids=cases.name_of)
@pytest.mark.parametrize("state_dtype", [None, *options.DTYPES], ids=cases.name_of)
def test_any_mix_of_dtypes(dtype, grad_dtype, state_dtype, target):
    """The update is float32's (float64's) of the values as stored, rounded once into the storage."""
    if dtype is torch.float64 and state_dtype in (torch.bfloat16, torch.float16):
        return  # refused: test_errors
    if torch.float64 in (dtype, grad_dtype, state_dtype) and not target.float64:
        return  # refused: test_gpu
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    params = cases.parameters([(70,), (3, 5)], dtype, target.device)
    wide = [torch.nn.Parameter(p.detach().to(compute)) for p in params]
    a = cases.make("AdamW", params, OPTIONS, backend=target.backend, state_dtype=state_dtype)
    b = cases.make("AdamW", wide, OPTIONS, backend=target.backend)
    cases.set_gradients(params, 1, grad_dtype)
    for p, q in zip(params, wide, strict=True):
        q.grad = p.grad.to(compute)
    a.step()
    b.step()
    wanted = cases.tensors_of(b)
    stored = state_dtype or compute
    for key, x in cases.tensors_of(a).items():
        assert x.dtype is (dtype if key.endswith(".p") else torch.float32 if key.endswith("step") else stored)
        assert cases.equal_bits(x, wanted[key].to(x.dtype)).all(), key


# ---- what makes a plan stale, and what does not


@pytest.fixture(params=["native", "python"])
def watch(request, monkeypatch):
    """Both implementations of the watch: the extension's, and the one for when that is missing."""
    if request.param == "python":
        monkeypatch.setattr(backends, "native", lambda: None)
    return request.param


class Pair:
    """Two parameters under the reference backend (which works with both watches) and torch.optim's AdamW."""

    def __init__(self, **options):
        self.ours, self.torchs = cases.parameters([(5,), (2, 3)]), cases.parameters([(5,), (2, 3)])
        self.a = cases.make("AdamW", self.ours, options, backend="reference")
        self.b = torch.optim.AdamW(self.torchs, **options)
        self.t = 0

    def step(self, which=(0, 1)):
        self.t += 1
        for ps in (self.ours, self.torchs):
            for p in ps:
                p.grad = None
            cases.set_gradients([ps[i] for i in which], self.t)
        self.a.step()
        self.b.step()
        for p, q in zip(self.ours, self.torchs, strict=True):
            torch.testing.assert_close(p, q)

    def builds(self, monkeypatch):
        built = []
        original = plan.build
        monkeypatch.setattr(plan, "build", lambda *args: built.append(1) or original(*args))
        return built


def test_moving_gradients_need_no_new_plan(watch, monkeypatch):
    pair = Pair()
    pair.step()
    built = pair.builds(monkeypatch)
    keep = []
    for _ in range(5):
        pair.step()
        keep.append([p.grad for p in pair.ours])
        pair.a.param_groups[0]["lr"] = pair.b.param_groups[0]["lr"] = 1e-3 * pair.t
    assert not built
    assert len({g.data_ptr() for grads in keep for g in grads}) == 10


def test_late_and_absent_gradients(watch):
    pair = Pair()
    for which in ((0,), (0,), (0, 1), (1,), (), (0, 1)):
        pair.step(which)
    assert [pair.a.state[p]["step"].item() for p in pair.ours] == [4, 3]


def test_frozen_parameters(watch):
    pair = Pair()
    for ps in (pair.ours, pair.torchs):
        ps[0].requires_grad_(False)
    pair.step((1,))
    assert pair.ours[0] not in pair.a.state


def test_parameter_data_replaced(watch):
    pair = Pair()
    pair.step()
    for ps in (pair.ours, pair.torchs):
        ps[0].data = torch.arange(5.0)
        ps[1].data = ps[1].data.t().contiguous().t()
    pair.step()


def test_states_replaced(watch):
    pair = Pair()
    pair.step()
    for optimizer, ps in ((pair.a, pair.ours), (pair.b, pair.torchs)):
        optimizer.state[ps[0]]["exp_avg"] = torch.ones(5)
        optimizer.state[ps[1]]["exp_avg_sq"].data = torch.ones(2, 3)
        optimizer.state[ps[1]]["step"] = torch.tensor(10.0)
    pair.step()
    for optimizer, ps in ((pair.a, pair.ours), (pair.b, pair.torchs)):
        moment = optimizer.state[ps[1]]["exp_avg"]
        moment.data = moment.data.t().contiguous().t()  # the same address is possible: the layout tells
        optimizer.state[ps[0]]["exp_avg_sq"].data = optimizer.state[ps[0]]["exp_avg_sq"].data.double()
    pair.step()
    for optimizer, ps in ((pair.a, pair.ours), (pair.b, pair.torchs)):
        del optimizer.state[ps[0]]
    pair.step()
    for optimizer in (pair.a, pair.b):
        optimizer.state.clear()
    pair.step()
    for optimizer in (pair.a, pair.b):
        optimizer.state = type(optimizer.state)(dict)
    pair.step()


def test_groups_changed(watch):
    pair = Pair()
    pair.step()
    extra = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for optimizer, ps, p in ((pair.a, pair.ours, extra[0]), (pair.b, pair.torchs, extra[1])):
        ps.append(p)
        optimizer.add_param_group({"params": [p], "lr": 0.1})
    pair.step((0, 1, 2))
    for optimizer in (pair.a, pair.b):
        optimizer.param_groups[0]["params"].pop(0)
    pair.step((0, 1, 2))


def test_amsgrad_switched_on(watch):
    pair = Pair()
    pair.step()
    pair.a.param_groups[0]["amsgrad"] = True
    pair.ours[0].grad = torch.ones(5)
    pair.a.step()
    assert "max_exp_avg_sq" in pair.a.state[pair.ours[0]]


def test_cautious_switched_on_and_off(watch):
    """A weight below 0 that is stepped further down decays towards 0, but not while that is left out."""
    p = torch.nn.Parameter(-torch.ones(3))
    backend = "cpu" if watch == "native" else "reference"
    optimizer = cases.make("AdamW", [p], {"lr": 0.1, "weight_decay": 0.5}, backend=backend)
    p.grad = torch.ones_like(p)
    moved = []
    for cautious in (None, "decay", None):
        optimizer.param_groups[0]["cautious"] = cautious
        p.data.fill_(-1)
        optimizer.step()
        moved.append(p[0].item() + 1)
    assert moved == pytest.approx([0.05 - 0.1, -0.1, 0.05 - 0.1], abs=1e-6)


def test_gradient_that_becomes_strided_or_sparse(watch):
    pair = Pair()
    pair.step()
    for ps in (pair.ours, pair.torchs):
        ps[1].grad = torch.arange(6.0).reshape(3, 2).t()
    pair.a.step()
    pair.b.step()
    torch.testing.assert_close(pair.ours[1], pair.torchs[1])
    pair.ours[1].grad = torch.zeros(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        pair.a.step()


@pytest.mark.parametrize(
    ("edit", "text"),
    [("resize", "is gone"), ("slice", r"has shape \[2\]"), ("retype", "is torch.int32"), ("narrow", "")],
)
def test_states_changed_in_place(edit, text, watch):
    """Memory freed, cut or reinterpreted under an optimizer that holds its address."""
    p = cases.parameters([(5,)])[0]
    optimizer = cases.make("AdamW", [p], {}, backend="cpu" if watch == "native" else "reference")
    p.grad = torch.ones_like(p)
    optimizer.step()
    moment = optimizer.state[p]["exp_avg"]
    if edit == "resize":
        moment.untyped_storage().resize_(0)
    elif edit == "slice":
        moment.data = moment.data[:2]
    else:
        moment.data = moment.data.view(torch.int32) if edit == "retype" else moment.data.half()
    if text:
        with pytest.raises((ValueError, TypeError), match=text):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype is torch.float32


def swap(own, key, value):
    own[key] = value


def swap_gradient(p, dtype):
    p.grad = None
    cases.set_gradient(p, torch.ones(p.shape, dtype=dtype))


def swap_data(t):
    t.data = t.data.clone()


STALE = {
    "another parameter": lambda group, state, k: swap(group["params"], k, cases.parameters([(2,)])[0]),
    "one less": lambda group, state, k: group["params"].pop(k),
    "no state": lambda group, state, k: state.pop(group["params"][k]),
    "another layout": lambda group, state, k: swap(state[group["params"][k]], "exp_avg", torch.ones(3)),
    "another dtype": lambda group, state, k: swap(state[group["params"][k]], "exp_avg", torch.ones(2).double()),
    "another gradient": lambda group, state, k: swap_gradient(group["params"][k], torch.bfloat16),
    "memory shared": lambda group, state, k: setattr(group["params"][k], "data", group["params"][k - 1].data),
    "one moment less": lambda group, state, k: state[group["params"][k]].pop("exp_avg_sq"),
    "one moment more": lambda group, state, k: swap(state[group["params"][k]], "extra", 1),
}
FOLLOWED = {
    "its memory": lambda group, state, k: swap_data(group["params"][k]),
    "no gradient": lambda group, state, k: setattr(group["params"][k], "grad", None),
    "another state": lambda group, state, k: swap(state, group["params"][k], dict(state[group["params"][k]])),
    "more state": lambda group, state, k: swap(state, torch.ones(1), {}),
    "another moment": lambda group, state, k: swap(state[group["params"][k]], "exp_avg", torch.ones(2)),
    "a moment's memory": lambda group, state, k: swap_data(state[group["params"][k]]["exp_avg_sq"]),
    "another list": lambda group, state, k: swap(group, "params", list(group["params"])),
}


@pytest.mark.parametrize("k", [0, 7, 11])
@pytest.mark.parametrize("change", [*STALE, *FOLLOWED])
def test_a_change_is_seen_wherever_it_is_in_the_list(change, k, watch):
    params = cases.parameters([(2,)] * 12)
    optimizer = cases.make("AdamW", params, {}, backend="reference")
    cases.set_gradients(params, 0)
    watching = plan.build(optimizer).watch
    versions = [p._version for p in params]
    for t in (1, 2):
        cases.set_gradients(params, t)
        assert watching.poll(optimizer.param_groups, optimizer.state, optimizer.plan_key)
        watching.advance()
        assert {p._version - version for p, version in zip(params, versions, strict=True)} == {t}
        assert {own["step"].item() for own in optimizer.state.values()} == {t}
    (STALE | FOLLOWED)[change](optimizer.param_groups[0], optimizer.state, k)
    still = watching.poll(optimizer.param_groups, optimizer.state, optimizer.plan_key)
    assert still is (change in FOLLOWED)


def test_parameters_that_share_memory_are_stepped_one_after_the_other(target):
    """As torch steps them; in one launch they would race."""
    base = torch.zeros(4000, device=target.device)
    x, y, z = torch.nn.Parameter(base), torch.nn.Parameter(base[1000:]), torch.nn.Parameter(base.clone())
    for p, g in ((x, 1.0), (y, 2.0), (z, 3.0)):
        p.grad = torch.full_like(p, g)
    optimizer = cases.make("SGD", [x, y, z], {"lr": 1.0}, backend=target.backend)
    for _ in range(3):
        optimizer.step()
    assert len(optimizer._plans) == 2
    assert (base[:1000] == -3).all()
    assert (base[1000:] == -9).all()
    assert (z == -9).all()


def test_autograd_sees_the_step(target):
    """A backward through values that the step has overwritten is an error, as in torch, not a wrong gradient."""
    p = cases.parameters([(3,)], device=target.device)[0]
    optimizer = cases.make("SGD", [p], {"lr": 0.5}, backend=target.backend)
    p.grad = torch.ones_like(p)
    loss = p.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_default_device_does_not_matter(target):
    """Steps are counted where they are counted, whatever device factory functions use."""
    p, q = cases.parameters([(3,), (3,)], device=target.device)
    optimizer = cases.make("SGD", [p, q], {"lr": 1.0}, backend=target.backend)
    for t in range(2):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q) if t else None
        before = p.detach().clone(), q.detach().clone()
        with torch.device("meta"):
            optimizer.step()
        torch.testing.assert_close(p.detach(), before[0] - 1)
        torch.testing.assert_close(q.detach(), before[1] - t)


def test_an_error_in_the_middle_does_not_count(monkeypatch, target):
    p = cases.parameters([(4, 6)], device=target.device)[0]
    p.grad = torch.ones(6, 4, device=target.device).t()
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    monkeypatch.setattr(plan.Row, "before", lambda row, owner: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state[p]["step"].item() == 0
