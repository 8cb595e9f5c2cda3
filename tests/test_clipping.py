"""Clipping by the global norm, steps that are skipped, and a GradScaler that leaves its work to the step."""

import copy
import math
import warnings

import pytest
import torch

from fused_adamw import norm
from tests import cases

KINDS = [
    ("AdamW", {"weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1}),
]
SHAPES = [*cases.SHAPES, (20_000,)]


def state_of(optimizer):
    return {name: t.detach().clone() for name, t in cases.tensors_of(optimizer).items()}


def poison(params, value):
    params[4].grad.view(-1)[3] = value


@pytest.mark.float64
@pytest.mark.parametrize(("name", "options"), KINDS, ids=cases.name_of)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9, 0.0])
def test_equals_clip_grad_norm_and_a_step(name, options, max_norm, target):
    ours, theirs = (cases.parameters(SHAPES, torch.float64, target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend, max_grad_norm=max_norm)
    b = getattr(torch.optim, name)(theirs, **options)
    for t in range(5):
        cases.set_gradients(ours, t)
        cases.set_gradients(theirs, t)
        given = [p.grad.clone() for p in ours]
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm.float())
        assert a.grad_norm.shape == () and a.grad_norm.device == ours[0].device
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, given, strict=True)), "gradients are not written"
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.name_of)
def test_same_bits_as_scaled_gradients(dtype, target):
    """The step of float32 parameters with max_grad_norm is that with gradients multiplied by hand."""
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {}, backend=target.backend, max_grad_norm=0.5)
    b = cases.make("AdamW", theirs, {}, backend=target.backend)
    for t in range(3):
        cases.set_gradients(ours, t, dtype)
        grads = [p.grad.double() for p in ours]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = (0.5 / (norm + 1e-6)).float()
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.float() * factor
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm.float(), rtol=1e-6, atol=0)
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_squares_neither_overflow_nor_underflow(target):
    for size in (1e30, 1e-30):
        (p,) = cases.parameters([(1000,)], device=target.device)
        p.grad = torch.full_like(p, size)
        optimizer = cases.make("AdamW", [p], {}, backend=target.backend, max_grad_norm=1.0)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(size * math.sqrt(1000), rel=1e-6)


@pytest.mark.pairwise("cuda", case=KINDS, first=[True, False], value=[math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_skipped_whole(case, first, value, target):
    """Nothing changes, nothing is counted, also at the very first step; and training goes on as if it had not been."""
    name, options = case
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend, skip_nonfinite=True)
    b = cases.make(name, theirs, options, backend=target.backend)
    for t in range(3):
        if t == (0 if first else 1):
            cases.set_gradients(ours, 10)
            poison(ours, value)
            a.init_state()
            before = state_of(a)
            a.step()
            assert not a.grad_norm.isfinite()
            cases.assert_same_bits(cases.tensors_of(a), before)
        cases.set_gradients(ours, t)
        cases.set_gradients(theirs, t)
        a.step()
        b.step()
    assert a.grad_norm.isfinite()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_poisons_as_in_torch(value, target):
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {}, backend=target.backend, max_grad_norm=1.0)
    b = torch.optim.AdamW(theirs)
    for params in (ours, theirs):
        cases.set_gradients(params, 0)
        poison(params, value)
    a.step()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.isnan(), q.isnan())


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(in_step, unscaled, target):
    """Both ways of a GradScaler give the same bits: the scale is divided out once, a skipped step does not count."""
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {}, backend=target.backend, amp_scaling=in_step)
    b = cases.make("AdamW", theirs, {}, backend=target.backend)
    scaler = torch.amp.GradScaler(target.device, init_scale=1024.0, growth_interval=1)
    for t in range(5):
        cases.set_gradients(theirs, t)
        scaler.scale(torch.zeros((), device=target.device))  # makes its scale
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad * scaler.get_scale()
        bad = t in (0, 2)
        if bad:
            poison(ours, math.inf)
        if unscaled:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if not bad:
            b.step()
    assert scaler.get_scale() == 1024.0 / 4 * 8
    a.init_state()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    assert not hasattr(a, "found_inf") and not hasattr(a, "grad_scale")


@pytest.mark.parametrize("found", [2.0, 0.5, math.nan, -1.0])
def test_any_found_inf_but_zero_skips(found, target):
    (p,) = cases.parameters([(9,)], device=target.device)
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend, amp_scaling=True)
    p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.zeros(1, device=target.device)
    optimizer.step()
    before = state_of(optimizer)
    optimizer.found_inf = torch.full((1,), found, device=target.device)
    optimizer.step()
    cases.assert_same_bits(cases.tensors_of(optimizer), before)
    assert optimizer.state[p]["step"].item() == 1


@pytest.mark.parametrize("fused", [None, True])
def test_what_is_set_by_hand_is_honoured(fused, target):
    """grad_scale and found_inf, one or both, without amp_scaling: the steps of torch's fused implementation."""
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {"fused": fused}, backend=target.backend)
    b = torch.optim.AdamW(theirs, fused=True)
    for t, (scale, found) in enumerate(
        [(None, None), (1024, None), (None, 0), (None, 1), (512, 0), (512, 1), (2, None)]
    ):
        for params, optimizer in ((ours, a), (theirs, b)):
            cases.set_gradients(params, t)
            for name, value in (("grad_scale", scale), ("found_inf", found)):
                if value is not None:
                    setattr(optimizer, name, torch.tensor(float(value), device=target.device))
            if scale is not None:
                for p in params:
                    p.grad.mul_(scale)
        before, scaled = state_of(a), [p.grad.clone() for p in ours]
        a.step()
        b.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, scaled, strict=True))  # which torch's has unscaled
        if found:
            cases.assert_same_bits({k: v for k, v in state_of(a).items() if k in before}, before)
        for optimizer in (a, b):
            for name, value in (("grad_scale", scale), ("found_inf", found)):
                if value is not None:
                    delattr(optimizer, name)
        assert not hasattr(a, "grad_scale") and not hasattr(a, "found_inf")
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)
    assert a.state[ours[0]]["step"].item() == b.state[theirs[0]]["step"].item() == 5


def test_the_norm_alone(target):
    """An infinite max_grad_norm clips nothing and tells the norm of unscaled gradients, which stay scaled."""
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {}, backend=target.backend, amp_scaling=True, max_grad_norm=math.inf)
    b = cases.make("AdamW", theirs, {}, backend=target.backend)
    cases.set_gradients(theirs, 0)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = q.grad * 1024
    a.grad_scale = torch.tensor([1024.0], device=target.device)
    a.step()
    b.step()
    torch.testing.assert_close(a.grad_norm, torch.nn.utils.get_total_norm([q.grad for q in theirs]))
    assert all(torch.equal(p.grad, q.grad * 1024) for p, q in zip(ours, theirs, strict=True))
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_clipping_and_scaling_together(target):
    """The norm is that of the unscaled gradients."""
    ours, theirs = (cases.parameters(SHAPES, device=target.device) for _ in range(2))
    a = cases.make("AdamW", ours, {}, backend=target.backend, amp_scaling=True, max_grad_norm=0.5)
    b = cases.make("AdamW", theirs, {}, backend=target.backend, max_grad_norm=0.5)
    cases.set_gradients(theirs, 0)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = q.grad * 1024
    a.grad_scale = torch.tensor([1024.0], device=target.device)
    a.step()
    b.step()
    assert a.grad_norm == b.grad_norm
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_the_norm_is_over_all_groups_dtypes_and_layouts(target):
    params = [
        torch.nn.Parameter(torch.ones(3, device=target.device)),
        torch.nn.Parameter(torch.ones(4, 5, device=target.device, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(6, 7, device=target.device)),
    ]
    params[0].grad = torch.full_like(params[0], 2.0)
    params[1].grad = torch.full_like(params[1], 3.0)
    params[2].grad = torch.full((7, 6), 4.0, device=target.device).t()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
    optimizer = cases.make("AdamW", groups, {}, backend=target.backend, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(3 * 4 + 20 * 9 + 42 * 16), rel=1e-6)
    assert optimizer.state[params[0]]["exp_avg"][0].item() == pytest.approx(
        0.1 * 2 / optimizer.grad_norm.item(), rel=1e-5
    )


@pytest.mark.parametrize("before", [False, True])
def test_the_norm_of_no_gradients_is_0(target, before):
    params = cases.parameters([(9,), (4, 5)], device=target.device)
    optimizer = cases.make("AdamW", params, {}, backend=target.backend, max_grad_norm=1.0, skip_nonfinite=True)
    if before:
        cases.set_gradients(params, 0)
        optimizer.step()
        assert optimizer.grad_norm > 0
        optimizer.zero_grad()
    for _ in range(2):
        optimizer.step()
        assert optimizer.grad_norm == 0
        assert optimizer.grad_norm.shape == () and optimizer.grad_norm.device == params[0].device


def test_it_survives_copies_and_checkpoints(target):
    (p,) = cases.parameters([(9,)], device=target.device)
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend, max_grad_norm=0.25, skip_nonfinite=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert (twin.max_grad_norm, twin.skip_nonfinite, twin.amp_scaling) == (0.25, True, False)
    (q,) = twin.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    optimizer.step()
    twin.step()
    cases.assert_same_bits(cases.tensors_of(optimizer), cases.tensors_of(twin))
    torchs = torch.optim.AdamW(cases.parameters([(9,)], device=target.device))
    torchs.load_state_dict(optimizer.state_dict())


def test_it_can_be_switched_on_and_off_between_steps(target):
    """Steps go on being counted, wherever that is done from then on."""
    (p,), (q,) = (cases.parameters([(9,)], device=target.device) for _ in range(2))
    a, b = (cases.make("AdamW", [x], {}, backend=target.backend) for x in (p, q))
    for t in range(4):
        a.skip_nonfinite = t % 2 == 1
        cases.set_gradients([p], t)
        cases.set_gradients([q], t)
        a.warmup()
        a.step()
        b.step()
    assert a.state[p]["step"].item() == 4
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@pytest.mark.float64
def test_warmup_takes_the_backend_that_a_step_takes(target):
    (p,) = cases.parameters([(9,)], torch.float64, target.device)
    cases.make("AdamW", [p], {}, backend=target.backend, skip_nonfinite=True).warmup()


def test_the_same_norm_for_any_number_of_threads():
    norms = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            params = cases.parameters([(100_003,), (7,), (50_000,)])
            cases.set_gradients(params, 0)
            optimizer = cases.make("AdamW", params, {}, max_grad_norm=1.0)
            optimizer.step()
            sums = torch.empty(1, dtype=torch.float64)
            optimizer._plans[0].launch.sum_squares(optimizer, sums)
            norms.add(sums.item())
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


def test_what_cannot_be_is_refused(target):
    """In the constructor and set by hand, which leaves the norm as it was."""
    (p,) = cases.parameters([(9,)], device=target.device)
    optimizer = cases.make("AdamW", [p], {}, max_grad_norm=0.5)
    for bad, kind in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError), ([1.0], TypeError)):
        with pytest.raises(kind, match="(Invalid max_grad_norm value|max_grad_norm must be a number)"):
            cases.make("AdamW", [p], {}, max_grad_norm=bad)
        with pytest.raises(kind, match="(Invalid max_grad_norm value|max_grad_norm must be a number)"):
            optimizer.max_grad_norm = bad
        assert optimizer.max_grad_norm == 0.5
    optimizer.max_grad_norm = None
    assert not optimizer.scales_gradients
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="step_parameter: one gradient does not tell the norm of all"):
        cases.make("AdamW", [p], {}, backend=target.backend, max_grad_norm=1.0).step_parameter(p)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_on_several_devices_and_backends(backend):
    """On two GPUs and the CPU, one of them float64, which the reference backend steps: all have one norm."""
    ours, theirs = cases.parameters(SHAPES, device="cuda:1"), cases.parameters(SHAPES)
    wide, on_cpu = cases.parameters([(7, 9)], torch.float64, "cuda:0"), cases.parameters([(70,)])
    twins = [*theirs, *cases.parameters([(7, 9)], torch.float64), *cases.parameters([(70,)])]
    options = {"max_grad_norm": 0.5, "amp_scaling": True}
    a = cases.make("AdamW", [*ours, *wide, *on_cpu], {}, **options)
    b = cases.make("AdamW", twins, {}, **options)
    for t in range(3):
        cases.set_gradients(twins, t)
        for p, q in zip([*ours, *wide, *on_cpu], twins, strict=True):
            p.grad = q.grad.to(p.device)
        for optimizer, device in ((a, "cuda:0"), (b, "cpu")):
            optimizer.grad_scale = torch.full((), 1024.0, device=device)
            optimizer.found_inf = torch.full((), float(t == 1), device=device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of float64 on a GPU
                optimizer.step()
        assert a.grad_norm.device == ours[0].device
        torch.testing.assert_close(a.grad_norm.cpu(), b.grad_norm, rtol=1e-6, atol=0)
    assert {state["step"].item() for state in a.state.values()} == {2.0}
    for p, q in zip([*ours, *wide, *on_cpu], twins, strict=True):
        torch.testing.assert_close(p.cpu(), q)


def test_a_long_list_of_sums_is_added_in_pieces(target, monkeypatch):
    """And then the totals of the pieces: the norm is the same but for its last bits."""
    norms = []
    for piece in (norm.PIECE, 2):
        monkeypatch.setattr(norm, "PIECE", piece)
        params = cases.parameters([(9, 9), *SHAPES] * 3, device=target.device)
        params += cases.parameters([(9,)], torch.bfloat16, target.device)
        cases.set_gradients(params, 0)
        optimizer = cases.make("AdamW", params, {}, backend=target.backend, max_grad_norm=1.0)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    given = torch.cat([p.grad.double().flatten() for p in params])
    torch.testing.assert_close(norms[1], given.norm().float(), rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("skip", [False, True])
def test_nothing_waits_for_the_device(backend, skip):
    params = cases.parameters(SHAPES, device="cuda")
    optimizer = cases.make("AdamW", params, {}, backend=backend, max_grad_norm=1.0, skip_nonfinite=skip)
    for t in range(3):
        cases.set_gradients(params, t)
        torch.cuda.set_sync_debug_mode("error" if t else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_graph_clips_and_skips(backend):
    ours, theirs = cases.parameters([(100,), (7, 9)], device="cuda"), cases.parameters([(100,), (7, 9)], device="cuda")
    options = {"capturable": True}
    a = cases.make("AdamW", ours, options, backend=backend, max_grad_norm=0.5, skip_nonfinite=True)
    b = cases.make("AdamW", theirs, {}, backend=backend, max_grad_norm=0.5)
    for p in ours:
        p.grad = torch.zeros_like(p)

    def gradients(t):
        cases.set_gradients(theirs, t)
        for p, q in zip(ours, theirs, strict=True):
            p.grad.copy_(q.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(0)
        a.step()
        b.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for t in range(1, 6):
        gradients(t)
        if t == 3:
            ours[1].grad[0, 0] = math.nan
        graph.replay()
        if t != 3:
            b.step()
            assert a.grad_norm == b.grad_norm
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
