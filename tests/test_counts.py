"""What a steady step costs besides its polls: launches, operators of torch, copies to the device, collectives."""

import importlib.util
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adamw import gpu
from tests import cases

# These launch nothing: they allocate, and cut the part of a table that a copy goes to.
FREE = {"aten::empty", "aten::slice"}
COPY = "copy to the device"
# By kind: the optimizer's options, and the launches, copies and collectives of a step on a GPU.
KINDS = {
    "plain": ({}, ["step"], 0, 0),
    "three_groups": ({}, ["step"], 1, 0),
    "clipped": ({"max_grad_norm": 0.5}, ["sum_squares", "factor", "step"], 0, 0),
    "skipping": ({"skip_nonfinite": True}, ["sum_squares", "factor", "scalars", "step"], 0, 0),
    "amp": ({"amp_scaling": True}, ["factor", "scalars", "step"], 0, 0),
    "capturable": ({"capturable": True}, ["scalars", "step"], 0, 0),
    "tensor_lr": ({"capturable": True}, ["scalars", "step"], 0, 0),
    "dtensor": ({"max_grad_norm": 0.5}, ["sum_squares", "totals", "factor", "step"], 0, 1),
}
SHAPES = [(1000,), (7, 9), (3,)]


class Operators(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name == "aten::copy_" and args[0].is_cuda and args[1].is_cpu:
            name = COPY
        if func.namespace != "profiler" and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """Kernels that note the name of each launch."""

    def __init__(self, kernels, launched):
        self.kernels, self.launched = kernels, launched

    def __getattr__(self, name):
        self.launched.append(name)
        return getattr(self.kernels, name)


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda device: init_device_mesh(device, (1,))
    dist.destroy_process_group()


def counted(kind, device, backend, mesh):
    """The operators of a steady step on a device; and of a virtual GPU its own counts, which are of all that ran."""
    options = dict(KINDS[kind][0])
    capturable = {"capturable": options.pop("capturable")} if "capturable" in options else {}
    params = cases.parameters(SHAPES, device=device)
    if kind == "dtensor":
        from torch.distributed.tensor import Shard, distribute_tensor

        on = mesh(device)
        params = [torch.nn.Parameter(distribute_tensor(p.detach(), on, [Shard(0)])) for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    if kind == "three_groups":
        params = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
    if kind == "tensor_lr":
        params = [{"params": [p], "lr": torch.tensor(1e-3, device=device)} for p in params]
    optimizer = cases.make("AdamW", params, capturable, backend=backend, **options)
    if kind == "amp":
        optimizer.grad_scale = torch.full((1,), 1024.0, device=device)
        optimizer.found_inf = torch.zeros(1, device=device)
    optimizer.step()
    optimizer.step()
    vgpu = importlib.import_module("vgpu") if device == "cuda" and importlib.util.find_spec("vgpu") else None
    if vgpu:
        torch.cuda.synchronize()
        vgpu.reset_stats()
    with Operators() as operators:
        optimizer.step()
    if vgpu:
        torch.cuda.synchronize()
    return operators.counts, vgpu and vgpu.stats()


@pytest.mark.parametrize("kind", [kind for kind, (options, *_) in KINDS.items() if "capturable" not in options])
def test_a_step_on_the_cpu(kind, mesh):
    """It takes no operator of torch but the reduction over ranks."""
    operators, _ = counted(kind, "cpu", "cpu", mesh)
    assert operators == ({"c10d::allreduce_": 1} if kind == "dtensor" else {})


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_gpu(kind, mesh, backend, monkeypatch):
    """It takes no operator of torch but the copy of more than two rows of scalars, and the reduction over ranks."""
    _, launches, copies, collectives = KINDS[kind]
    launched, true = [], gpu.Launch.__init__

    def init(self, watch, rows, kernels, *others):
        true(self, watch, rows, Counted(kernels, launched), *others)

    monkeypatch.setattr(gpu.Launch, "__init__", init)
    operators, virtual = counted(kind, "cuda", backend, mesh)
    assert launched == launches * 3
    assert operators == +Counter({COPY: copies, "c10d::allreduce_": collectives})
    if virtual and not collectives:  # gloo copies to the host and back
        assert (virtual["kernels"], virtual["h2d"], virtual["emulated_ops"]) == (len(launches), copies, 0)
