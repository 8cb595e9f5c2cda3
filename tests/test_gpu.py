"""The optimizer on a GPU: launches, streams, devices, synchronisation, graphs. Ordinary GPU tests, marked gpu."""

import contextlib
import gc
import importlib.util
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adamw import backends, formats, watch
from fused_adamw.gpu import Launch
from tests import cases

gpu = pytest.mark.gpu


@pytest.fixture
def launches(monkeypatch):
    """Every launch of a step's kernel: (chunks, device, stream)."""
    seen, true = [], Launch.__init__

    class Counted:
        def __init__(self, kernels):
            self.scalars, self.sum_squares, self.kernels = kernels.scalars, kernels.sum_squares, kernels

        def step(self, rows, chunks, *others):
            seen.append((len(chunks), rows.device, torch.cuda.current_stream()))
            self.kernels.step(rows, chunks, *others)

    def init(self, watch, rows, kernels, *others):
        true(self, watch, rows, Counted(kernels), *others)

    monkeypatch.setattr(Launch, "__init__", init)
    return seen


def triton_kernels():
    """Those of Triton, none if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from fused_adamw.triton_kernels.factor import factor_kernel
    from fused_adamw.triton_kernels.multi_tensor import scalars_kernel, square_kernel, step_kernel

    return step_kernel, scalars_kernel, square_kernel, factor_kernel


def compiled():
    """Number of kernels that Triton compiled, over all devices."""
    return sum(len(c[0]) for k in triton_kernels() for c in k.device_caches.values())


def step_kernels():
    """The compiled step kernels of all devices."""
    from fused_adamw.triton_kernels.multi_tensor import step_kernel

    return [kernel for cache, *_ in step_kernel.device_caches.values() for kernel in cache.values()]


def twins(shapes, device="cuda:0", dtype=torch.float32):
    """The same parameters on a GPU and on the CPU."""
    return cases.parameters(shapes, dtype, device), cases.parameters(shapes, dtype)


def same_gradients(gpu_params, cpu_params, t):
    cases.set_gradients(cpu_params, t)
    for p, q in zip(gpu_params, cpu_params, strict=True):
        p.grad = None if q.grad is None else q.grad.to(p.device)


# ---- one launch, no new table, no new compilation


@gpu
@pytest.mark.parametrize(
    ("shapes", "groups"), [([(1000,)], 1), ([(64,)] * 148, 1), ([(3,)] * 10_000, 1), ([(5,)] * 930, 465)]
)
def test_one_launch(shapes, groups, launches, backend):
    params = [torch.nn.Parameter(torch.ones(s, device="cuda")) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    split = [{"params": params[i::groups], "lr": 1e-3 * (i + 1)} for i in range(groups)]
    optimizer = cases.make("AdamW", split, {}, backend=backend)
    optimizer.step()
    assert len(launches) == 1
    assert launches[0][0] == len(shapes)


@gpu
def test_nothing_new_over_50_steps(launches, monkeypatch, backend):
    """OneCycleLR moves lr and betas, gradients move and come late: after the first steps no plan and no compilation."""
    from fused_adamw import plan

    ours, theirs = twins([(100,), (7, 9), (3000,)])
    a, b = cases.make("AdamW", ours, {}, backend=backend), cases.make("AdamW", theirs, {})
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60) for o in (a, b)]
    built, keep, true = [], [], plan.build
    monkeypatch.setattr(plan, "build", lambda o, *args: built.append(o) or true(o, *args))
    for t in range(50):
        same_gradients(ours, theirs, t)
        keep.append([p.grad for p in ours])  # so that the next gradients lie elsewhere
        if t < 5:
            ours[1].grad = theirs[1].grad = None
        if t == 7:
            known = compiled()
        for o in (a, b, *schedules):
            o.step()
    assert built == [a, b, a, b]  # at the first step, and when the late gradient came
    assert compiled() == known
    assert len(launches) == 50
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
def test_without_the_extension(monkeypatch):
    """The watch in Python drives the same tables."""
    ours, theirs = twins([(100,), (7, 9)])
    b = cases.make("AdamW", theirs, {}, backend="cpu")
    for t in range(3):
        same_gradients(ours, theirs, t)
        b.step()
    monkeypatch.setattr(backends, "native", lambda: None)
    a = cases.make("AdamW", ours, {}, backend="triton")
    for t in range(3):
        same_gradients(ours, theirs, t)
        if t == 0:
            ours[1].grad = torch.empty(9, 7, device="cuda").t().copy_(ours[1].grad)
        a.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}, {"statistics": True}],
    ids=["plain", "clipped", "measured"],
)
def test_warmup_compiles_what_the_step_needs(options):
    p = torch.nn.Parameter(torch.ones(10, device="cuda", dtype=torch.bfloat16))
    optimizer = cases.make("AdamW", [p], {"amsgrad": True, "state_dtype": torch.bfloat16}, **options)
    for kernel in triton_kernels():
        kernel.device_caches.clear()
    optimizer.warmup()
    assert torch.equal(p, torch.ones_like(p))
    assert not optimizer.state
    known = compiled()
    assert known == (4 if "max_grad_norm" in options else 1)
    assert all(kernel.module is not None for kernel in step_kernels()), "a graph capture cannot load a kernel"
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert compiled() == known


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_steady_step_does_not_synchronise(backend):
    ours, theirs = twins([(100,), (7, 9)])
    a, b = cases.make("AdamW", ours, {}, backend=backend), cases.make("AdamW", theirs, {})
    for t in range(4):
        same_gradients(ours, theirs, t)
        torch.cuda.set_sync_debug_mode("error" if t >= 2 else "default")
        try:
            a.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def check_all_kernels():
    """A step that clips and skips, whose parameters count their steps on the device, to the bits of the CPU."""
    ours, theirs = twins([(100,), (7, 9)])
    a = cases.make("AdamW", ours, {}, backend="triton", max_grad_norm=0.5, skip_nonfinite=True)
    b = cases.make("AdamW", theirs, {}, max_grad_norm=0.5)
    for t in range(3):
        same_gradients(ours, theirs, t)
        a.step()
        b.step()
    torch.testing.assert_close(a.grad_norm.cpu(), b.grad_norm, rtol=1e-6, atol=0)
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    return a


@gpu
def test_a_launch_goes_past_tritons_front_end(monkeypatch):
    """Which the first step runs through; hooks see each launch."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    optimizer, names = check_all_kernels(), []

    def refuse(*_, **__):
        raise AssertionError("the front end was called")

    monkeypatch.setattr(JITFunction, "run", refuse)
    optimizer.step()
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: names.append(metadata.get()["name"]))
    optimizer.step()
    assert names == ["square_kernel", "factor_kernel", "scalars_kernel", "step_kernel"]


@gpu
def test_where_compiled_kernels_are_launched_in_another_way(monkeypatch):
    """As by a version of Triton that this was not written for: the front end launches them."""
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    launched, true, front_end = [], CompiledKernel.run.fget, JITFunction.run

    def other(kernel):
        def launch(programs, *args):
            if not programs:
                raise TypeError("it takes other arguments")
            return true(kernel)(programs, *args)

        return launch

    def run(self, *args, warmup, **kwargs):
        launched.extend([self.__name__] * (not warmup))
        return front_end(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(CompiledKernel, "run", property(other))
    monkeypatch.setattr(JITFunction, "run", run)
    check_all_kernels()
    assert launched == ["square_kernel", "factor_kernel", "scalars_kernel", "step_kernel"] * 3


# ---- training, devices, streams


@gpu
@pytest.mark.parametrize(("name", "options"), [*cases.SHARED, *cases.OURS], ids=cases.name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=cases.name_of)
def test_same_bits_as_the_cpu(name, options, dtype, backend):
    ours, theirs = twins([*cases.SHAPES, (20_000,)], dtype=dtype)
    a, b = cases.make(name, ours, options, backend=backend), cases.make(name, theirs, options)
    for t in range(3):
        same_gradients(ours, theirs, t)
        a.step()
        b.step()
    assert list(a.backend.values()) == [backend]
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.parametrize(("name", "options"), [("AdamW", {"cautious": "decay"}), ("AdaBound", {})], ids=cases.name_of)
def test_steps_of_few_kernels_with_gradients_of_another_dtype(name, options, backend):
    """Triton compiles for any mix; CUDA's kernels were compiled before, and refuse it before anything is written."""
    ours, theirs = twins([(1000,)], dtype=torch.bfloat16)
    a, b = (cases.make(name, ps, options, **own) for ps, own in ((ours, {"backend": backend}), (theirs, {})))
    for ps in (ours, theirs):
        cases.set_gradients(ps, 0, torch.float32)
    if backend == "cuda":
        refused = r"cautious=, first_moment=False and in AdaBound, of that alone.* here they are Float and Float"
        with pytest.raises(NotImplementedError, match=refused):
            a.step()
        assert torch.equal(ours[0].cpu(), theirs[0])
    else:
        a.step()
        b.step()
        assert torch.equal(ours[0].cpu(), theirs[0])


@gpu
def test_a_network_trains_to_the_bits_of_the_cpu(backend):
    """The gradients are computed on the GPU and handed to the CPU's twin."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)).cuda()
    twin = [torch.nn.Parameter(p.detach().cpu().clone()) for p in model.parameters()]
    a = cases.make("AdamW", model.parameters(), {"lr": 1e-2}, backend=backend)
    b = cases.make("AdamW", twin, {"lr": 1e-2})
    losses = []
    for t in range(20):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(t)).cuda()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        a.zero_grad()
        loss.backward()
        for p, q in zip(model.parameters(), twin, strict=True):
            q.grad = p.grad.cpu()
        a.step()
        b.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def check_devices(devices, backend):
    """Parameters on other devices than the current one are stepped to the bits of the CPU."""
    ours, theirs = [], []
    for device in devices:
        x, y = twins([(100,), (7, 9)], device)
        ours, theirs = ours + x, theirs + y
    a, b = cases.make("AdamW", ours, {}, backend=backend), cases.make("AdamW", theirs, {})
    for t in range(3):
        same_gradients(ours, theirs, t)
        a.step()
        b.step()
    assert torch.cuda.current_device() == 0
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("devices", [("cuda:1",), ("cuda:0", "cuda:1")])
def test_other_devices_than_the_current_one(devices, launches, backend):
    check_devices(devices, backend)
    assert [str(device) for _, device, _ in launches] == [*devices] * 3


@gpu
def test_side_streams(launches, backend):
    """Each step on another stream, joined as a user would: the launch and its upload are on the current one."""
    ours, theirs = twins([(100,), (7, 9)])
    a, b = cases.make("AdamW", ours, {}, backend=backend), cases.make("AdamW", theirs, {})
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for t in range(6):
        stream = streams[t % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            same_gradients(ours, theirs, t)
            a.step()
        torch.cuda.current_stream().wait_stream(stream)
        b.step()
    assert [stream for *_, stream in launches] == streams * 3
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.usefixtures("young")
@pytest.mark.parametrize(("capturable", "captured"), [(True, False), (True, True), (False, False)])
def test_tables_outlive_a_step_on_another_stream(capturable, captured, backend):
    """The optimizer is gone before its step has run: what it frees may not be handed out until then."""
    ours, theirs = twins([(1000,), (7, 9)])
    a, b = cases.make("AdamW", ours, {"capturable": capturable}, backend=backend), cases.make("AdamW", theirs, {})
    same_gradients(ours, theirs, 0)
    a.step()
    b.step()
    side = torch.cuda.Stream()
    last = side
    if captured:  # a graph takes the tables; new ones are allocated on the stream of the step that follows
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            a.step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            a.step()
        b.step()
        torch.cuda.current_stream().wait_stream(side)
        last = torch.cuda.current_stream()
    same_gradients(ours, theirs, 1)
    b.step()
    states = [dict(a.state[p]) for p in ours]
    last.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(last):
        torch.cuda._sleep(100_000_000)  # cycles: 50 ms
        a.step()
    del a
    gc.collect()
    with torch.cuda.stream(side) if captured else contextlib.nullcontext():
        overwritten = [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in range(1, 2000, 4)]
    torch.cuda.synchronize()
    del overwritten
    for p, q, state in zip(ours, theirs, states, strict=True):
        assert cases.equal_bits(p.detach().cpu(), q.detach()).all()
        assert cases.equal_bits(state["exp_avg"].cpu(), b.state[q]["exp_avg"]).all()


# ---- graphs


@gpu
@pytest.mark.parametrize("name", ["AdamW", "AdaBoundW", "SGDW"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_captured_graph_replays_with_new_hyperparameters(name, tensor_lr, backend):
    """Capture once, replay 20 steps under OneCycleLR (lr, and betas or momentum) and a changing weight decay."""
    ours, theirs = twins([(100,), (7, 9)])
    lr = torch.tensor(1e-3, device="cuda", dtype=torch.float64) if tensor_lr else 1e-3
    options = {"momentum": 0.9} if name == "SGDW" else {}
    a = cases.make(name, ours, {"lr": lr, "capturable": True, **options}, backend=backend)
    b = cases.make(name, theirs, {"lr": 1e-3, **options})
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60) for o in (a, b)]
    static = [torch.zeros_like(p) for p in ours]
    for p, g in zip(ours, static, strict=True):
        p.grad = g

    def next_gradients(t):
        cases.set_gradients(theirs, t)
        for g, q in zip(static, theirs, strict=True):
            g.copy_(q.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for t in range(3):
            next_gradients(t)
            for o in (a, b, *schedules):
                o.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for t in range(3, 23):
        next_gradients(t)
        for o in (a, b):
            o.param_groups[0]["weight_decay"] = 0.01 * t
        a.refresh_captured()
        graph.replay()
        b.step()
        for s in schedules:
            s.step()
    next_gradients(30)
    a.step()  # and one more without the graph
    b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    graph.replay()  # the graph is still its own: another step of the same gradients
    b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.parametrize(
    ("backend", "native"), [("triton", True), ("triton", False), ("cuda", True)], indirect=["backend"]
)
@pytest.mark.parametrize("captured", [False, True])
def test_learning_rates_that_are_tensors(captured, native, backend, monkeypatch):
    """Of any dtype and device; changed in place, and replaced by other tensors, by floats and back."""
    ours, theirs = twins([(9,), (7, 9), (30,), (3,), (5,)])
    # A graph cannot hold a copy from another device.
    elsewhere = "cuda:0" if captured else f"cuda:{torch.cuda.device_count() - 1}"

    def tensor(value, dtype=torch.float64, device="cuda:0"):
        return torch.tensor(value, dtype=dtype, device=device)

    rates = [tensor(0.5), tensor(0.25, torch.float32), tensor(0.125, torch.bfloat16), tensor([0.375], device=elsewhere)]
    rates.append(tensor(0.75, device="cpu"))
    b = cases.make("AdamW", [{"params": [q], "lr": float(lr)} for q, lr in zip(theirs, rates, strict=True)], {})
    mults = [1.0, 0.5, 2.0, 0.25, 4.0]  # exact, so that the order of the products does not matter
    groups = [{"params": [p], "lr": lr, "lr_mult": m} for p, lr, m in zip(ours, rates, mults, strict=True)]
    a = cases.make("AdamW", groups, {"capturable": True}, backend=backend)
    for p, q in zip(ours, theirs, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    graph = torch.cuda.CUDAGraph() if captured else None

    def step(t):
        for p, q in zip(ours, theirs, strict=True):
            q.grad.normal_(generator=torch.Generator().manual_seed(t))
            p.grad.copy_(q.grad)
        for mine, theirs_ in zip(a.param_groups, b.param_groups, strict=True):
            theirs_["lr"] = float(mine["lr"]) * mine["lr_mult"]
        if captured and t:
            a.refresh_captured()
            graph.replay()
        else:
            with monkeypatch.context() as patched:
                if not native:
                    patched.setattr(backends, "native", lambda: None)
                a.step()
        b.step()

    step(0)
    assert isinstance(a._built[0].watch, watch.Watch) != native
    if captured:
        with torch.cuda.graph(graph):
            a.step()
    step(1)
    for lr in rates:
        lr.mul_(0.5)  # in place: nobody is told
    step(2)
    changes = [0.1, tensor(0.2), tensor(0.3, torch.float32), 0.4, tensor(0.6, torch.float32)]
    for t in range(3, 8):
        for i, group in enumerate(a.param_groups):  # each takes its turn of all of these
            group["lr"] = changes[(i + t) % len(changes)]
        step(t)
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
def test_options_on_the_device_are_those_of_the_host(backend):
    """Set by hand while a plan holds: what the host counts as 0, takes or refuses, a capturable step does too."""
    ours, theirs = twins([(100,), (7, 9)])
    optimizers = []
    for params, options in ((ours, {"backend": backend, "capturable": True}), (theirs, {})):
        optimizers.append(cases.fused_adamw.AdamW([{"params": [p]} for p in params], lr=1e-2, **options))
    a, b = optimizers

    def step(t):
        cases.set_gradients(theirs, t)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad.cuda()
        for o in optimizers:
            o.step()

    step(0)
    formats.warn_once.cache_clear()
    for t, change in enumerate([{"lr": -5e-21}, {"weight_decay": -1e-18}, {"lr": -0.1}, {"lr": -0.2}, {"lr": 0.1}]):
        for o in optimizers:
            o.param_groups[1].update(change)
        with contextlib.nullcontext() if change.get("lr") != -0.1 else pytest.warns(RuntimeWarning, match="group 1 is"):
            a.refresh_captured()
            step(t + 1)
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    before = ours[0].detach().clone()
    for change in ({"betas": (1.0, 0.9)}, {"lr": math.nan}, {"eps": None}):
        was = {key: a.param_groups[1][key] for key in change}
        a.param_groups[1].update(change)
        for call in (a.step, a.refresh_captured, a.step):
            with pytest.raises((ValueError, TypeError), match=r"\(group 1\)"):
                call()
        ours[1].grad = None  # nobody reads the options of a group without gradients
        a.step()
        ours[1].grad = torch.zeros_like(ours[1])
        a.param_groups[1].update(was)
        a.step()
    assert not torch.equal(ours[0], before)


@gpu
def test_eager_steps_between_replays(backend):
    """A replay puts the gradients of its capture into the tables; the eager step after it takes its own."""
    ours, theirs = twins([(100,), (7, 9)])
    a, b = cases.make("AdamW", ours, {"capturable": True}, backend=backend), cases.make("AdamW", theirs, {})
    captured, others = ([torch.full_like(p, value) for p in ours] for value in (1.0, -1.0))

    def use(gradients):
        for p, q, g in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = g, g.cpu()

    use(captured)
    a.step()
    b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for _ in range(2):
        for gradients, step in ((others, a.step), (captured, graph.replay), (others, a.step), (others, a.step)):
            use(gradients)
            step()
            b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


class Copied(TorchDispatchMode):
    """Notes the bytes of each copy to a device."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "aten::copy_" and args[0].is_cuda and args[1].is_cpu:
            self.bytes.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


@gpu
@pytest.mark.parametrize(
    ("moved", "bytes_each"), [("nothing", 0), ("a gradient", 8), ("a moment", 152), ("a gradient goes", 152)]
)
def test_a_captured_upload_sends_what_changed_alone(moved, bytes_each, backend):
    """And what eager steps do to their tables in between is no matter to a replay, nor a replay to them."""
    ours, theirs = twins([(100,), (7, 9), (0,), (30,)])
    a, b = cases.make("AdamW", ours, {"capturable": True}, backend=backend), cases.make("AdamW", theirs, {})

    def use(gradients):
        for p, q, g in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = g, None if g is None else g.cpu()

    def step(call):
        call()
        b.step()

    first, last = ([torch.full_like(p, value) for p in ours] for value in (1.0, -1.0))
    captured = [last[0], *first[1:]] if moved == "a gradient" else list(first)
    use(first)
    step(a.step)
    if moved == "a moment":
        a.state[ours[1]]["exp_avg"] = a.state[ours[1]]["exp_avg"].clone()
    if moved == "a gradient goes":
        captured[3] = None
    use(captured)
    graph, copied = torch.cuda.CUDAGraph(), Copied()
    with copied, torch.cuda.graph(graph):
        a.step()
    assert copied.bytes == [bytes_each * len(ours)] * bool(bytes_each)
    for _ in range(2):
        for gradients in ([None, *last[1:]], last, first):
            use(captured)
            step(graph.replay)
            use(gradients)
            step(a.step)
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
def test_a_learning_rate_on_the_cpu_is_no_part_of_a_graph(backend):
    """As a float: refresh_captured() brings its value of the moment."""
    ours, theirs = twins([(100,), (7, 9)])
    rates = [torch.tensor(1e-3, dtype=torch.float64) for _ in range(2)]
    a = cases.make("AdamW", ours, {"lr": rates[0], "capturable": True}, backend=backend)
    b = cases.make("AdamW", theirs, {"lr": rates[1]})
    cases.set_gradients(ours, 0)
    cases.set_gradients(theirs, 0)
    a.step()
    b.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step()
    for t in range(3):
        for lr in rates:
            lr.fill_(1e-2 * (t + 1))
        a.refresh_captured()
        graph.replay()
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.parametrize("name", ["AdamW", "SGDW"])
@pytest.mark.parametrize("captured_lr", ["float", "tensor"])
@pytest.mark.parametrize("loaded_lr", ["float", "tensor"])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("way", ["step", "step_parameter"])
def test_captured_graph_goes_on_from_a_loaded_checkpoint(name, captured_lr, loaded_lr, started, way):
    """load_state_dict puts moments and steps where the graph finds them, refresh_captured the loaded groups."""
    ours, theirs = twins([(100,), (7, 9)])
    kinds = {"float": float, "tensor": lambda lr: torch.tensor(lr, device="cuda", dtype=torch.float64)}
    extra = {"momentum": 0.9} if name == "SGDW" else {}
    a = cases.make(name, ours, {"lr": kinds[captured_lr](0.5), "weight_decay": 0.3, "capturable": True, **extra})
    b = cases.make(name, theirs, {"lr": 1e-3, "weight_decay": 0.1, **extra})
    for p in ours:
        p.grad = torch.zeros_like(p)

    def step():
        if way == "step":
            a.step()
        else:
            for p in ours:
                a.step_parameter(p)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    for t in range(3 * started):
        cases.set_gradients(theirs, t)
        b.step()
    saved = b.state_dict()
    saved["param_groups"][0]["lr"] = kinds[loaded_lr](saved["param_groups"][0]["lr"])
    a.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    for t in range(3, 8):
        cases.set_gradients(theirs, t)
        for p, q in zip(ours, theirs, strict=True):
            p.grad.copy_(q.grad)
        b.param_groups[0]["weight_decay"] = a.param_groups[0]["weight_decay"] = 0.01 * t
        a.refresh_captured()
        graph.replay()
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_without_capturable_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(10, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = cases.make("AdamW", [p], {}, backend=backend)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="Attempting CUDA graph capture of step.*capturable=True"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()


@gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("capturable", [True, False])
def test_a_first_step_within_a_capture_is_refused(capturable, backend):
    """In words, and with nothing written; and so is one whose gradients are other parameters'."""
    p, q = (torch.nn.Parameter(torch.ones(10, device="cuda")) for _ in range(2))
    p.grad = torch.ones_like(p)
    optimizer = cases.make("AdamW", [p, q], {"capturable": capturable}, backend=backend)
    refusal = pytest.raises(RuntimeError, match="AdamW: CUDA graph capture.*call step.. once before")
    with refusal, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    q.grad = torch.ones_like(q)
    with refusal, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert list(optimizer.state) == [p]
    optimizer.step()
    assert [optimizer.state[x]["step"].item() for x in (p, q)] == [2, 1]
    assert p.max() < q.max() < 1


# ---- what a backend cannot do


def test_capturable_on_the_cpu_is_refused():
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \[3\]\).*steps on the host, and capturable=True"):
        cases.make("AdamW", [p], {"capturable": True}).step()


@gpu
def test_float64_goes_to_the_reference_or_is_refused(backend):
    wide, narrow = (torch.nn.Parameter(torch.ones(3, device="cuda", dtype=d)) for d in (torch.float64, torch.float32))
    for p in (wide, narrow):
        p.grad = torch.ones_like(p)
    backends.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{backend}: it does not step torch.float64"):
        cases.make("AdamW", [wide, narrow], {}).step()
    assert torch.equal(wide.float(), narrow)
    with pytest.raises(RuntimeError, match=rf"backend='{backend}' cannot run: it does not step torch.float64"):
        cases.make("AdamW", [wide], {}, backend=backend).step()


@gpu
@pytest.mark.parametrize(("broken", "left"), [(["triton"], "cuda"), (["triton", "cuda"], "reference")])
def test_a_backend_that_fails_is_left_with_a_warning(broken, left, monkeypatch):
    """Triton without a compiler, CUDA code for other architectures."""
    from fused_adamw.triton_kernels import kernels

    def fail(*_):
        raise RuntimeError("ptxas not found")

    for backend in broken:
        where = {"triton": (kernels, "TritonKernels"), "cuda": (backends.native(), "CudaKernels")}[backend]
        monkeypatch.setattr(*where, fail)
    monkeypatch.setattr(backends, "_broken", {})
    backends.warn_once.cache_clear()
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = cases.make("AdamW", [p], {})
    with pytest.warns(RuntimeWarning, match="triton: it failed: RuntimeError: ptxas not found") as record:
        optimizer.step()
        optimizer.step()
    assert len(record) == len(broken)
    assert list(optimizer.backend.values()) == [left]
    assert optimizer.state[p]["step"].item() == 2
    for backend in broken:
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: it failed"):
            cases.make("AdamW", [p], {}, backend=backend).step()
