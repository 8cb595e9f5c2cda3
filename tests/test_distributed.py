"""Several ranks: DTensor parameters, FSDP2, DDP, ZeRO, distributed checkpoints. The tests share their ranks."""

import contextlib
import copy
import gc
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import fused_adamw
from fused_adamw import backends, plan, tensors
from tests import cases, ranks

ROOT = Path(__file__).parents[1]

RULES = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "decouple_lr": True, "cautious": "decay"}),
    ("AdaBoundW", {"lr": 1e-2, "gamma": 0.1, "weight_decay": 0.1}),
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.0, 0.99), "first_moment": False}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
]


BF16 = torch.bfloat16
INT8 = {"state_dtype": "int8", "rounding": "stochastic", "seed": 7}
LONG_VECTOR = 128 * 12 * 683  # enough for int8, and whole blocks on 2, 3 and 4 ranks
CUT = "cuts the blocks of 128 elements"
FORMATS = [
    ("AdamW", {"lr": 1e-2, "rounding": "stochastic", "state_dtype": BF16}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "rounding": "stochastic", "seed": 1 << 40}),
    ("AdamW", {"lr": 1e-2, "master": "kahan"}),
    ("AdamW", {"lr": 1e-2, "master": "split16", "state_dtype": BF16, "rounding": "stochastic"}),
    ("AdamW", {"lr": 1e-2, "master": "fp32"}),
    ("SGDW", {"lr": 0.1, "momentum": 0.9, "master": "split16", "ema_decay": 0.9, "ema_warmup": True}),
    ("AdamW", {"lr": 1e-2, "master": "kahan", "ema_decay": 0.9, "ema_dtype": BF16, "seed": 3}),
]


class Net(nn.Module):
    """Shapes that 2, 3 and 4 ranks share unevenly or not at all, a frozen and a late parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 7)
        self.scale, self.late = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.to(dtype)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale + self.late.sum() * 1e-3


def shard(model, mesh=None, **options):
    """FSDP2 over all ranks; the scale stays a plain parameter."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, ignored_params={model.scale}, **options)


def check_shards_of(shape, placements, sizes, options, refused="", turned=False, scattered=False):
    """A parameter cut so has the bits of the whole one, which may be the transpose of a contiguous one."""
    mesh = init_device_mesh("cpu", sizes)
    whole = cases.parameters([shape], BF16)[0]
    whole = nn.Parameter(whole.detach().t()) if turned else whole
    source = 0 if scattered else None  # a scattered shard is contiguous, whatever the whole is
    ours = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, placements, src_data_rank=source))
    a, b = cases.make("AdamW", [ours], {"lr": 1e-2, **options}), cases.make("AdamW", [whole], {"lr": 1e-2, **options})
    for t in range(3):
        cases.set_gradients([whole], t)
        ours.grad = placed_like(whole.grad, ours)
        if refused:
            with pytest.raises(TypeError, match=refused):
                a.step()
            return
        a.step()
        b.step()
    assert all(isinstance(t, DTensor) for key, t in a.state[ours].items() if key != "step")
    assert a.state[ours].keys() == b.state[whole].keys()
    cases.assert_same_bits(*locals_of(a, b))


def placed_like(t, p):
    """The shard of this rank of a whole tensor, in a DTensor of p's placement; no communication."""
    if not isinstance(p, DTensor):
        return t.clone()
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def inject(model, twin, step):
    """The same whole gradients for the twin and, sharded, for the model."""
    params = [p for p in twin.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    cases.set_gradients(params, step)
    if step == 0:
        twin.late.grad = None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            p.grad = placed_like(q.grad, p)


def locals_of(optimizer, twin_optimizer):
    """What each of the two optimizers holds of what this rank holds: everything a step writes."""
    ours, theirs = {}, {}
    params = [[p for g in o.param_groups for p in g["params"]] for o in (optimizer, twin_optimizer)]
    for i, (p, q) in enumerate(zip(*params, strict=True)):
        states = {"p": (p, q)} | {k: (v, twin_optimizer.state[q][k]) for k, v in optimizer.state[p].items()}
        for name, (mine, whole) in states.items():
            assert isinstance(mine, DTensor) == (isinstance(p, DTensor) and name != "step")
            ours[f"{i}.{name}"] = tensors.local(mine.detach())
            theirs[f"{i}.{name}"] = tensors.local(placed_like(whole.detach(), mine))
    return ours, theirs


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module", autouse=True)
def reaped():
    yield
    ranks.close()


# ---- the step of DTensors


@pytest.mark.parametrize(
    ("placements", "sizes", "shape"),
    [
        ((Shard(0),), (3,), (77, 65)),
        ((Shard(1),), (3,), (7, 65)),
        ((Shard(0), Shard(1)), (2, 2), (7, 65)),
        ((Shard(1), Shard(1)), (2, 2), (7, 65)),
        ((Shard(1), Shard(2)), (2, 2), (3, 1, 6)),  # two ranks hold nothing of it, and no pieces of pieces
        ((Shard(2), Replicate()), (2, 2), (3, 5, 70)),
        ((_StridedShard(0, split_factor=2),), (2,), (8, 5)),
        ((_StridedShard(0, split_factor=3),), (2,), (11, 5)),  # the last of three pieces is shorter
        ((_StridedShard(1, split_factor=2),), (2,), (7, 12)),
        ((_StridedShard(0, split_factor=2), Shard(0)), (2, 2), (9, 5)),  # FSDP2 over tensor parallelism
        ((Shard(0), _StridedShard(0, split_factor=2)), (2, 2), (16, 3)),
    ],
)
def test_random_bits_do_not_depend_on_the_placement(placements, sizes, shape):
    for options in (FORMATS[0][1], FORMATS[6][1]):
        ranks.run(math.prod(sizes), check_shards_of, shape, placements, sizes, options)


@pytest.mark.parametrize("options", [FORMATS[i][1] for i in (0, 3, 6)], ids=cases.name_of)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_random_bits_of_a_transposed_weight(placement, scattered, options):
    """Numbered in the order of memory of the whole, in which torch does not lay out every shard."""
    ranks.run(2, check_shards_of, (7, 65), [placement], (2,), options, "", True, scattered)


def numbers_of(p):
    """The numbers that a shard's elements have by its Numbering, in the shape of the shard."""
    offset, run, skip = tensors.shard_numbering(p)
    i = torch.arange(tensors.local(p).numel())
    numbers = torch.empty_like(tensors.dense_like(p, ordered=True), device="cpu")
    tensors.flat(numbers).copy_(offset + i + i // run * skip)
    return numbers


def check_numbering(sizes, shape, turned):
    """Every element has the number that it has in the memory of the whole, or no rank has a numbering."""
    mesh = init_device_mesh("cpu", sizes)
    whole = torch.arange(math.prod(shape)).view(shape)
    whole = whole.t() if turned else whole
    split = [_StridedShard(d, split_factor=n) for d in range(len(shape)) for n in (2, 3)]
    every = [Replicate(), *map(Shard, range(len(shape))), *split]
    numbered = []
    for placements in itertools.product(every, repeat=len(sizes)):
        p = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        try:
            numbers = numbers_of(p)
        except TypeError:
            numbered.append(False)
            continue
        numbered.append(True)
        assert torch.equal(numbers, tensors.local(p)), (placements, tensors.shard_numbering(p))
    return numbered


@pytest.mark.parametrize("sizes", [(4,), (2, 2)], ids=str)
@pytest.mark.parametrize(("shape", "turned"), [((8, 12), False), ((8, 12), True), ((7, 5), True), ((11,), False)])
def test_numbering_of_every_placement(sizes, shape, turned):
    first, *others = ranks.run(4, check_numbering, sizes, shape, turned)
    assert all(other == first for other in others)
    assert sum(first) > len(first) / 3


def check_tensor_parallel(options, widths):
    """FSDP2 over tensor parallelism, on a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(*widths), nn.Linear(widths[1], 6)).bfloat16()

    twin, model = net(), net()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert isinstance(model[0].weight.placements[0], _StridedShard)
    a, b = (cases.make("AdamW", list(m.parameters()), {"lr": 1e-2, **options}) for m in (model, twin))
    for t in range(3):
        cases.set_gradients(twin.parameters(), t)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = placed_like(q.grad, p)
        a.step()
        b.step()
        cases.assert_same_bits(*locals_of(a, b))
    return "exp_avg_codes" in a.state[model[0].weight]


def check_uneven():
    """What FSDP2 makes of an uneven shard of tensor parallelism is not what its placements say."""
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(nn.Linear(2, 7))
    whole = torch.arange(14.0).view(7, 2)
    model[0].weight.data.copy_(whole)
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    assert torch.equal(numbers_of(model[0].weight), tensors.local(model[0].weight).detach())
    return tensors.local(model[0].weight).numel()


def test_numbering_of_an_uneven_shard_of_an_uneven_shard():
    assert ranks.run(6, check_uneven) == [4, 2, 4, 2, 0, 2]


@pytest.mark.parametrize("widths", [(5, 8), (5, 7), (128, 70)], ids=str)
def test_random_bits_of_fsdp2_over_tensor_parallelism(widths):
    ranks.run(4, check_tensor_parallel, FORMATS[0][1], widths)
    assert all(ranks.run(4, check_tensor_parallel, INT8, widths)) == (widths == (128, 70))


@pytest.mark.parametrize(
    ("placements", "shape", "options", "refused"),
    [
        ((Shard(0),), (77, 256), {}, ""),
        ((Shard(0),), (77, 256), {"master": "split16", "rounding": "stochastic"}, ""),
        ((Replicate(),), (77, 65), {}, ""),
        ((Shard(0),), (77, 65), {}, CUT + ".* state_dtype=torch.bfloat16"),
        ((Shard(1),), (77, 256), {}, CUT),
        ((Shard(0),), (128, 66), {}, ""),  # 33 blocks a rank, though rows are no multiple of one
        ((Shard(0),), (126, 66), {}, CUT),
        ((Shard(0),), (4100,), {}, ""),
        ((Shard(0),), (LONG_VECTOR,), {"rounding": "stochastic"}, ""),
        ((Shard(0),), (LONG_VECTOR - 200,), {}, CUT),
        ((Shard(0),), (LONG_VECTOR + 200,), {}, CUT),
        ((Shard(0),), (LONG_VECTOR - 1,), {}, ""),  # the last block is shorter
        ((Replicate(),), (LONG_VECTOR - 200,), {}, ""),
        ((_StridedShard(0, split_factor=2),), (76, 128), {}, ""),
        ((_StridedShard(0, split_factor=2),), (128, 66), {}, CUT),
    ],
)
def test_int8_moments_are_sharded_by_blocks(placements, shape, options, refused):
    ranks.run(2, check_shards_of, shape, placements, (2,), {"state_dtype": "int8", **options}, refused)


@pytest.mark.parametrize(
    ("placements", "shape", "refused"),
    [
        ((Replicate(), Shard(0)), (LONG_VECTOR,), ""),
        ((Shard(0), Shard(0)), (LONG_VECTOR,), ""),
        ((Shard(0), Shard(0)), (LONG_VECTOR - 200,), CUT),
        ((_StridedShard(0, split_factor=2), Shard(0)), (LONG_VECTOR,), ""),
        ((Shard(0), Shard(1)), (64, 256), CUT),
    ],
)
def test_int8_moments_on_a_mesh_of_two_dimensions(placements, shape, refused):
    ranks.run(4, check_shards_of, shape, placements, (2, 2), INT8, refused)


@pytest.mark.parametrize("scattered", [False, True])
def test_int8_moments_of_a_transposed_weight(scattered):
    """Its blocks lie along columns: whole as on one process, and refused if cut."""
    ranks.run(2, check_shards_of, (80, 70), [Replicate()], (2,), INT8, "", True, scattered)
    ranks.run(1, check_shards_of, (80, 70), [Shard(0)], (1,), INT8, "", True, scattered)
    ranks.run(2, check_shards_of, (80, 128), [Shard(0)], (2,), INT8, CUT, True, scattered)


def test_pieces_of_pieces_are_not_numbered():
    placements = (Shard(1), Shard(2))
    options = {"master": "fp32", "ema_decay": 0.9, "ema_dtype": BF16}
    ranks.run(4, check_shards_of, (3, 4, 6), placements, (2, 2), options, "pieces of pieces, and stochastic rounding")
    options = {"rounding": "stochastic"}
    ranks.run(4, check_shards_of, (3, 4, 6), placements, (2, 2), options, "pieces of pieces, and stochastic rounding")


def check_same_bits(backend, native):
    build, built = plan.build, []
    dtypes = [torch.float32, BF16, torch.float32, BF16, torch.float32, *[BF16] * len(FORMATS)]
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(backends, "native", lambda: None)
        patch.setattr(plan, "build", lambda optimizer, *args: built.append(optimizer) or build(optimizer, *args))
        for (name, options), dtype in zip(RULES + FORMATS, dtypes, strict=True):
            model, optimizer = check_rule(name, options, dtype, backend)
            assert built.count(optimizer) == 2  # at the first step, and when the late gradient came
    return [tensors.local(p).numel() for p in trainable(model)]


def check_rule(name, options, dtype, backend):
    twin, model = Net(dtype), shard(Net(dtype))
    # Groups, so that DTensors and plain parameters share one launch of several rows of scalars.
    a, b = (
        cases.make(name, [{"params": ps[::2]}, {"params": ps[1::2], "lr": 0.02}], options, backend=backend)
        for ps in (trainable(model), trainable(twin))
    )
    kept = []
    for t in range(6):
        inject(model, twin, t)
        kept.append([p.grad for p in model.parameters()])  # so that the next gradients lie elsewhere
        a.step()
        b.step()
        cases.assert_same_bits(*locals_of(a, b))
    return model, a


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("backend", "native"), [("cpu", True), ("reference", True), ("reference", False)])
def test_same_bits_as_one_process(world, backend, native):
    """FSDP2 with the gradients of one process, uneven and empty shards and a plain parameter among them."""
    sizes = ranks.run(world, check_same_bits, backend, native)
    assert len(set(map(tuple, sizes))) > 1
    assert world < 3 or any(0 in own for own in sizes)


def check_clipping(backend):
    """The norm is that of whole gradients, on every rank; one rank's NaN makes all of them skip."""
    twin, model = Net(torch.float32), shard(Net(torch.float32))
    ours = {"backend": backend, "max_grad_norm": 0.05, "skip_nonfinite": True, "statistics": "parameter"}
    a, b = (cases.make("AdamW", trainable(m), {"lr": 1e-2}, **ours) for m in (model, twin))
    for t in range(5):
        inject(model, twin, t)
        if t == 2:
            before = {name: x.clone() for name, x in locals_of(a, b)[0].items()}
            if dist.get_rank() == 1:
                tensors.local(model.second.weight.grad)[0, 0] = float("nan")
            a.step()
            assert a.grad_norm.isnan()
            cases.assert_same_bits(locals_of(a, b)[0], before)
            continue
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        for mine, whole in zip(a.statistics.groups[0], b.statistics.groups[0], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=0)
    found = torch.tensor([float(dist.get_rank() == 1)])  # by the scaler of one rank
    c = cases.make("AdamW", trainable(model), {}, backend=backend, amp_scaling=True)
    c.found_inf = found
    inject(model, twin, 0)
    before = [tensors.local(p).clone() for p in trainable(model)]
    c.step()
    assert all(torch.equal(tensors.local(p), x) for p, x in zip(trainable(model), before, strict=True))
    for mine, whole in zip(*(list(x.values()) for x in locals_of(a, b)), strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_clipping_and_skipping_are_of_all_ranks(world, backend):
    ranks.run(world, check_clipping, backend)


NORMS = [{"max_grad_norm": 0.5}, {"skip_nonfinite": True}, {"amp_scaling": True}]
LAYOUTS = {  # the parameters: one of meshes(), and placements on it
    "one mesh": [("line", (Shard(0),)), ("line", (Shard(1),)), ("row", (Replicate(), Shard(0)))],
    "same ranks": [("square", (Shard(0), Shard(0))), ("turned", (Shard(1), Shard(0))), ("turned", (Shard(1),) * 2)],
    "same ranks in one dimension": [("row", (Shard(0), Shard(0))), ("row", (Replicate(), Shard(0)))],
    "two meshes": [("line", (Shard(0),)), ("square", (Shard(0), Shard(1)))],
    "sub-mesh": [("square", (Shard(0), Shard(0))), ("inner", (Shard(0),)), ("outer", (Shard(1),))],
    "rank outside": [("line", (Shard(0),)), ("three", (Shard(0),)), ("three", (Replicate(),))],
}
PATTERNS = {  # which of the parameters, of which the first is plain, have a gradient on a rank at a step
    "all": lambda rank, step, i: True,
    "late on a rank": lambda rank, step, i: rank != 1 or i != 1 or step > 0,
    "plain alone on a rank": lambda rank, step, i: rank != 1 or i == 0,
    "nothing on a rank": lambda rank, step, i: rank != 1 and i > 0,
    "an expert without tokens": lambda rank, step, i: i != 2 or (rank + step) % 4 == 0,
    "nothing anywhere, once": lambda rank, step, i: step != 1,
}


def meshes(device):
    world = dist.get_world_size()
    found = {"line": init_device_mesh(device, (world,)), "row": init_device_mesh(device, (1, world))}
    if world < 4:
        return found
    square = init_device_mesh(device, (2, 2), mesh_dim_names=("outer", "inner"))
    return found | {
        "square": square,
        "inner": square["inner"],
        "outer": square["outer"],
        "turned": DeviceMesh(device, [[0, 2], [1, 3]]),
        "three": DeviceMesh(device, [0, 1, 2]),
    }


def norm_of(params):
    """The norm that one process computes of the gradients, of which those that a rank lacks are 0."""
    total = torch.zeros((), dtype=torch.float64, device=params[0].device)
    for p in params:
        g = torch.zeros_like(p) if p.grad is None else p.grad
        if not isinstance(p, DTensor):
            total += g.double().square().sum()
        elif p.device_mesh.get_coordinate() is not None:
            total += g.full_tensor().double().square().sum()
    return total.sqrt().float()


def check_sum():
    """A sum of the user's own over all ranks."""
    numbers = torch.full((), dist.get_rank() + 1.0, dtype=torch.float64)
    dist.all_reduce(numbers)
    assert numbers == sum(range(1, dist.get_world_size() + 1))


def check_collectives(layout, options, device="cpu"):
    """Each rank has the norm and the step of one process; sums of the user's before and after go their own way."""
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh_of = meshes(device)
    for has_gradient in PATTERNS.values():
        params = [nn.Parameter(torch.zeros(3, device=device))]
        for i, (name, placements) in enumerate(LAYOUTS[layout]):
            whole = torch.zeros((3, 6) if i else (8, 4), device=device)  # fewer rows than ranks, too
            params.append(nn.Parameter(distribute_tensor(whole, mesh_of[name], placements, src_data_rank=None)))
        optimizer = cases.make("SGD", params, {"lr": 1.0}, **options)
        for step in range(4):
            for i, p in enumerate(params):
                whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i)).to(device)
                p.grad = placed_like(whole, p) if has_gradient(rank, step, i) else None
            skipped = step == 2 and "max_grad_norm" not in options
            if optimizer.amp_scaling:
                optimizer.found_inf = torch.tensor([float(skipped and rank == 0)], device=device)
            elif skipped and rank == 0:
                tensors.local(params[1].grad)[0, 0] = math.nan
            norm, before = norm_of(params), [tensors.local(p.detach()).clone() for p in params]
            factor = 0.5 / (norm + 1e-6) if "max_grad_norm" in options else 1.0
            check_sum()
            optimizer.step()
            check_sum()
            if not optimizer.amp_scaling:
                torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0, equal_nan=True)
            for p, old in zip(params, before, strict=True):
                new = old if p.grad is None or skipped else old - min(factor, 1.0) * tensors.local(p.grad)
                torch.testing.assert_close(tensors.local(p.detach()), new, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_takes_part_in_every_sum(layout, options):
    """Whichever of the ranks have a gradient of whichever parameters."""
    ranks.run(4, check_collectives, layout, options, limit=60)


def check_meshes():
    """Replicas of shards, two shards of one tensor, fewer elements than ranks, dense and strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    outer, inner = (mesh.get_group(name) for name in ("outer", "inner"))
    placements = {
        (Replicate(), Shard(0)): [inner],
        (Shard(0), Replicate()): [outer],
        (Shard(0), Shard(0)): [outer, inner],
        (Shard(1), Shard(0)): [outer, inner],
        (Replicate(), Replicate()): [],
    }
    ours, whole = [], []
    for own, groups in placements.items():
        for shape in ((1, 1), (3, 5), (6, 4)):
            t = torch.randn(shape, generator=torch.Generator().manual_seed(len(ours)))
            ours.append(nn.Parameter(distribute_tensor(t, mesh, own, src_data_rank=None)))
            whole.append(nn.Parameter(t))
            assert tensors.shard_groups(ours[-1]) == tuple(groups)
            total = tensors.local(ours[-1]).detach().double().square().sum()
            for group in tensors.shard_groups(ours[-1]):
                dist.all_reduce(total, group=group)
            torch.testing.assert_close(total, t.double().square().sum())
    assert tensors.shard_groups(whole[0]) == ()
    gaps = torch.randn(8, 6)  # a shard that is not dense, and a gradient laid out otherwise
    ours.append(nn.Parameter(DTensor.from_local(gaps[:, 1:4], mesh, [Replicate(), Replicate()])))
    whole.append(nn.Parameter(gaps[:, 1:4].clone()))
    a, b = cases.make("AdamW", ours, {}), cases.make("AdamW", whole, {})
    c = cases.make("AdamW", ours, {"lr": 0.0}, max_grad_norm=1.0)
    for t in range(3):
        cases.set_gradients(whole, t)
        for p, q in zip(ours, whole, strict=True):
            p.grad = placed_like(q.grad.t().contiguous().t() if q.shape[0] == 6 else q.grad, p)
        c.step()
        norm = torch.cat([q.grad.flatten() for q in whole]).norm()
        torch.testing.assert_close(c.grad_norm, norm, rtol=1e-6, atol=0)
        a.step()
        b.step()
        cases.assert_same_bits(*locals_of(a, b))


def test_other_placements_than_fsdps():
    ranks.run(4, check_meshes)


def check_host():
    """The wait for a collective, autograd's versions, an exchanged shard; then 500 steps that leave nothing behind."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

    mesh = init_device_mesh("cpu", (1,))
    params = [nn.Parameter(distribute_tensor(torch.ones(64), mesh, [Shard(0)])) for _ in range(500)]
    optimizer = cases.make("SGD", params, {"lr": 1.0})
    p = params[0]
    for _ in range(3):
        g = all_reduce(torch.ones(64), "sum", mesh)
        assert isinstance(g, AsyncCollectiveTensor)
        before = p.detach().to_local().clone()
        p.grad = DTensor.from_local(g, mesh, [Shard(0)])
        assert isinstance(p.grad._local_tensor, AsyncCollectiveTensor)
        optimizer.step()
        assert torch.equal(p.detach().to_local(), before - 1)

    loss, version = p.square().sum(), tensors.local(p)._version
    optimizer.step()
    assert tensors.local(p)._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    p.grad = distribute_tensor(torch.ones(64), mesh, [Shard(0)])
    optimizer.step()
    p._local_tensor = torch.full((64,), 8.0)  # as FSDP2 does when the model is moved
    optimizer.step()
    assert (p.detach().to_local() == 7).all()

    def specs():
        gc.collect()
        return sum(type(o) is DTensorSpec for o in gc.get_objects())

    optimizer = cases.make("AdamW", params, {})
    sizes = []
    for t in range(520):
        for q in params:
            q.grad = DTensor.from_local(torch.ones(64), mesh, [Shard(0)], run_check=False) if t % 20 == 0 else q.grad
        optimizer.step()
        if t in (19, 519):
            sizes.append((specs(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[1][1] - sizes[0][1] < 4096  # KiB; 16 bytes a parameter and step would be 4000


def test_nothing_is_left_behind_and_nothing_goes_unseen():
    ranks.close()  # the most memory that a rank has had is to be that of this function
    ranks.run(1, check_host)


# ---- refused


def check_refused():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return Wrapper(args[0])

    def parameter(placement):
        return nn.Parameter(distribute_tensor(torch.ones(5, 2), mesh, [placement], src_data_rank=None))

    ones = torch.ones(5, 2)
    at = r"AdamW: group 0, parameter 1 \(shape \[5, 2\]\): "
    good, replicated = nn.Parameter(torch.ones(3)), parameter(Replicate())
    good.grad = torch.ones(3)
    partial = DTensor.from_local(ones, mesh, [Partial()])
    bad = [
        (replicated, partial, r"placed \(Replicate.*its gradient \(Partial\(sum\),\).*p.grad.redistribute"),
        (parameter(Shard(0)), distribute_tensor(ones, mesh, [Replicate()]), "its gradient .Replicate.*redistribute"),
        (
            parameter(Shard(0)),
            distribute_tensor(ones, other, [Replicate(), Shard(0)]),
            "make the gradient on",
        ),
        (nn.Parameter(partial.detach()), partial, "a sum cannot be stepped by its terms"),
    ]
    for p, g, text in bad:
        p.grad = g
        optimizer = cases.make("AdamW", [good, p], {})
        for _ in range(2):
            with pytest.raises(ValueError, match=at + ".*" + text):
                optimizer.step()
        assert not optimizer.state
        assert (good == 1).all()
    replicated.grad = replicated.grad.redistribute(replicated.device_mesh, replicated.placements)  # the remedy
    cases.make("AdamW", [good, replicated], {}).step()
    good.data.fill_(1)

    mixed = parameter(Shard(0))
    mixed.grad = distribute_tensor(ones, mesh, [Shard(0)])
    optimizer = cases.make("AdamW", [good, mixed], {})
    optimizer.step()
    own = optimizer.state[mixed]
    mean = own["exp_avg"]
    for value, error, text in (
        (mean.full_tensor(), TypeError, "the parameter is a DTensor, its state 'exp_avg' a Tensor: .*set_optimizer"),
        (mean.redistribute(mesh, [Replicate()]), ValueError, r"its state 'exp_avg' \(Replicate\(\),\)"),
    ):
        own["exp_avg"] = value
        with pytest.raises(error, match=at + ".*" + text):
            optimizer.step()
    own["exp_avg"] = mean
    assert own["step"] == 1
    whole = copy.deepcopy(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        whole["state"][1][name] = own[name].full_tensor()
    with pytest.raises(TypeError, match=r"loading group 0, parameter 1 \(shape \[5, 2\]\): .*set_optimizer_state_dict"):
        optimizer.load_state_dict(whole)
    assert own["exp_avg"] is mean

    mixed.grad = None  # a gradient of another kind, without torch's own check of it
    p = nn.Parameter(DTensor.from_local(Wrapper(torch.ones(2, 2)), mesh, [Shard(0)], run_check=False))
    p.grad = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
    with pytest.raises(TypeError, match="the parameter is a Wrapper, a subclass of Tensor"):
        cases.make("AdamW", [good, p], {}).step()


def test_refused():
    ranks.run(2, check_refused)


def check_refused_everywhere():
    """Whatever a rank holds, and whether it has a gradient: no rank waits in the sum for one that raised."""
    square = init_device_mesh("cpu", (2, 2))
    rank = dist.get_rank()

    def parameter(shape, *placements):
        return nn.Parameter(distribute_tensor(torch.ones(shape), square, placements, src_data_rank=None))

    rows = parameter((3, 4096), Shard(0), Shard(1))  # two ranks hold parts of two rows, the others of one
    pieces = parameter((3, 4, 6), Shard(1), Shard(2)).to(BF16)
    partial = DTensor.from_local(torch.ones(5, 2), square, [Partial(), Replicate()])
    plain = parameter((5, 2), Shard(0), Replicate())
    three = DeviceMesh("cpu", [0, 1, 2])
    columns = nn.Parameter(distribute_tensor(torch.ones(40, 256), three, [Shard(1)], src_data_rank=None))
    vector = parameter((LONG_VECTOR - 128,), Shard(0), Replicate())  # half a block more than whole ones
    strided = parameter((3, 9), _StridedShard(1, split_factor=2), Replicate()).to(BF16)  # one rank has one piece
    bad = [
        (rows, {"state_dtype": "int8"}, TypeError, CUT),
        (columns, {"state_dtype": "int8"}, TypeError, CUT),
        (vector, {"state_dtype": "int8"}, TypeError, CUT),
        (nn.Parameter(strided.detach()), {"rounding": "stochastic"}, TypeError, "pieces of pieces"),
        (nn.Parameter(pieces.detach()), {"rounding": "stochastic"}, TypeError, "pieces of pieces"),
        (nn.Parameter(partial.detach()), {}, ValueError, "a sum cannot be stepped by its terms"),
        (plain, {"betas": (2.0, 0.9)}, ValueError, "Invalid beta"),
    ]
    for p, options, error, text in bad:
        good = parameter((5, 2), Shard(0), Shard(1))
        good.grad = torch.ones_like(good)
        for holders in (range(4), [0], [3]):
            p.grad = torch.ones_like(p) if rank in holders else None
            optimizer = cases.make("AdamW", [{"params": [good]}, {"params": [p]}], {}, max_grad_norm=1.0)
            optimizer.param_groups[1].update(options)
            with pytest.raises(error, match=text):
                optimizer.step()
            assert (tensors.local(good) == 1).all()


def test_refused_on_all_ranks_or_none():
    ranks.run(4, check_refused_everywhere, limit=60)


def check_gradient_that_changes_its_placement(native):
    """Between two steps, with nothing else changed; equal placements in another object change nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(backends, "native", lambda: None)
        _check_gradient_that_changes_its_placement(native)


def _check_gradient_that_changes_its_placement(native):
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()], src_data_rank=None))
    optimizer = cases.make("SGD", [p], {"lr": 1.0}, backend="cpu" if native else "reference")
    plans = set()
    for _ in range(3):
        p.grad = DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False)
        optimizer.step()
        plans.add(id(optimizer._built[0].watch))
    assert len(plans) == 1
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match="Partial"):
        optimizer.step()
    assert (tensors.local(p) == -2).all()


@pytest.mark.parametrize("native", [True, False])
def test_gradient_that_changes_its_placement(native):
    ranks.run(2, check_gradient_that_changes_its_placement, native)


# ---- in training: FSDP2, DDP, ZeRO, optimizers inside backward


def batch(step, device="cpu"):
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(step)).to(device)


def train(model, optimizer, steps, share=slice(None)):
    for t in steps:
        x = batch(t)
        loss = (model(x[share]) - x[share].sum(1, keepdim=True)).square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def check_training():
    """Every way to share the batch of one process ends at its parameters, up to the order of the sums."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    twin = Net()
    train(twin, fused_adamw.AdamW(twin.parameters(), **options), range(8))

    def compare(model):
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            torch.testing.assert_close(whole, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    mesh = init_device_mesh("cpu", (world,))
    for extra in ({}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {"reshard_after_forward": False}):
        model = Net()
        fully_shard(model.first, mesh=mesh, **extra)
        fully_shard(model, mesh=mesh, **extra)
        train(model, fused_adamw.AdamW(model.parameters(), **options), range(8), share)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        compare(model)

    model = DistributedDataParallel(Net())
    train(model, fused_adamw.AdamW(model.parameters(), **options), range(8), share)
    compare(model.module)

    model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fused_adamw.AdamW, **options)
    train(model, optimizer, range(4), share)
    optimizer.consolidate_state_dict(0)
    saved = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved)
    resumed = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fused_adamw.AdamW, lr=0.5)
    resumed.load_state_dict(saved[0])
    train(model, resumed, range(4, 8), share)
    compare(model.module)

    model = Net()  # released as soon as it is stepped, by one optimizer for each parameter
    mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    own = {p: fused_adamw.AdamW([p], **options) for p in trainable(model)}
    for t in range(8):
        train(model, None, [t], share)
        for p, optimizer in own.items():
            optimizer.step()
            p.grad = None
    compare(model)

    model = Net()  # released by buckets
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = fused_adamw.AdamW(model.parameters(), **options)
    fused_adamw.release_gradients(model, optimizer, bucket_mb=0)
    for t in range(8):
        train(model, None, [t], share)
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    compare(model)
    with pytest.raises(TypeError, match="DistributedDataParallel reduces gradients after.*use fully_shard"):
        fused_adamw.release_gradients(DistributedDataParallel(Net()), optimizer)


@pytest.mark.parametrize("world", [2, 3])
def test_training(world):
    ranks.run(world, check_training)


def check_zero_bits():
    """ZeRO given one process's gradients: its bits, on every rank, also through a consolidated checkpoint."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = Net(), Net()
    a = ZeroRedundancyOptimizer(trainable(model), optimizer_class=fused_adamw.AdamW, lr=1e-2)
    b = fused_adamw.AdamW(trainable(twin), lr=1e-2)
    for t in range(6):
        if t == 3:
            a.consolidate_state_dict(0)
            saved = [a.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(saved)
            a = ZeroRedundancyOptimizer(trainable(model), optimizer_class=fused_adamw.AdamW, lr=0.5)
            a.load_state_dict(saved[0])
        inject(model, twin, t + 1)
        a.step()
        b.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


def test_zero_has_the_bits_of_one_process():
    ranks.run(2, check_zero_bits)


def zero_of(params, options):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns

    zero = ZeroRedundancyOptimizer(params, optimizer_class=fused_adamw.AdamW, lr=0.1, **options)
    return zero, zero.optim


def plain_shards_of(params, options, groups):
    """An optimizer of this rank's rows of each parameter, which are plain tensors, as those of FSDP1 are."""
    own = [nn.Parameter(p.detach().tensor_split(dist.get_world_size())[dist.get_rank()].clone()) for p in params]
    optimizer = fused_adamw.AdamW(own, lr=0.1, process_group=groups, **options)
    return optimizer, optimizer


def check_process_group(way, options, device="cpu"):
    """Ranks that have plain parts of the whole have its norm, and its step, whatever has a gradient on them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    for count in (1, 5):  # some ranks of a ZeroRedundancyOptimizer have no parameter
        whole = cases.parameters([(5, 3), (7,), (2, 2), (1,), (6,)][:count], device=device)
        twin = fused_adamw.AdamW(whole, lr=0.1, **options)
        if way == "zero":
            params = [nn.Parameter(p.detach().clone()) for p in whole]
            outer, ours = zero_of(params, options)
            if device == "cuda":  # ZeRO's broadcasts run on threads of gloo, which a virtual GPU does not keep in order
                ours.register_step_post_hook(lambda *_: torch.cuda.synchronize())
        else:
            groups = dist.group.WORLD if way == "group" else lambda p: (dist.group.WORLD,)
            outer, ours = plain_shards_of(whole, options, groups)
            params = ours.param_groups[0]["params"]
        for step in range(5):
            cases.set_gradients(whole, step)
            skipped = step == 2 and "max_grad_norm" not in options
            if step == 1:
                whole[0].grad = None
            if skipped and ours.amp_scaling:
                ours.found_inf = torch.tensor([float(rank == world - 1)], device=device)
                twin.found_inf = torch.ones(1, device=device)
            elif skipped:
                whole[0].grad.view(-1)[0] = math.inf
            for p, q in zip(params, whole, strict=True):
                g = None if q.grad is None else q.grad if way == "zero" else q.grad.tensor_split(world)[rank]
                p.grad = None if g is None else g.clone()
            outer.step()
            twin.step()
            ours.found_inf = twin.found_inf = None
            if not ours.amp_scaling:
                torch.testing.assert_close(ours.grad_norm, twin.grad_norm, rtol=1e-6, atol=0, check_device=False)
            for p, q in zip(params, whole, strict=True):
                q = q.detach() if way == "zero" else q.detach().tensor_split(world)[rank]
                torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("way", ["zero", "group", "function"])
def test_norm_is_of_the_process_group(way, options, world):
    ranks.run(world, check_process_group, way, options)


def check_fsdp1():
    """FSDP1 ends where DDP does, clipped, given its process group; without it the step is refused on all ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    options = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05}
    twin = DistributedDataParallel(Net())
    b = fused_adamw.AdamW(trainable(twin), **options)
    train(twin, b, range(4), share)
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
        for names in (False, True):
            net = Net()
            del net.frozen  # FSDP1 flattens no frozen parameter with others
            model = FullyShardedDataParallel(
                net, use_orig_params=names, device_id=torch.device("cpu"), sharding_strategy=strategy
            )
            group = model.process_group if strategy is ShardingStrategy.FULL_SHARD else lambda p: ()
            train(model, None, [0], share)
            with pytest.raises(RuntimeError, match="FullyShardedDataParallel.*process_group=model.process_group"):
                fused_adamw.AdamW(model.parameters(), **options).step()
            fused_adamw.AdamW(model.parameters(), lr=0.0, weight_decay=0.0).step()  # needs no norm
            model.zero_grad()
            a = fused_adamw.AdamW(model.parameters(), **options, process_group=group)
            train(model, a, range(2), share)
            if not names:  # with names torch's own classes do not resume either
                saved = FullyShardedDataParallel.optim_state_dict(model, a)
                a = fused_adamw.AdamW(model.parameters(), **options, process_group=group)
                a.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(model, a, saved))
            train(model, a, range(2, 4), share)
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
            with FullyShardedDataParallel.summon_full_params(model):
                for name, p in model.module.named_parameters():
                    q = twin.module.get_parameter(name)
                    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_fsdp1_is_clipped_by_the_norm_of_its_process_group():
    ranks.run(2, check_fsdp1)


# ---- distributed checkpoints


def check_averages():
    """Those of FSDP2's shards are those of the whole, where it keeps gathered parameters after a forward pass, too."""
    twin, model = Net(), shard(Net())
    a, b = (cases.make("SGD", trainable(m), {"lr": 0.1, "ema_decay": 0.5}) for m in (model, twin))
    for t in range(3):
        inject(model, twin, t)
        a.step()
        b.step()
    with pytest.raises(ValueError, match=r"^SGD.ema_swapped: parameters are DTensors"), a.ema_swapped():
        pass
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model(x)]
        with b.ema_swapped():
            averaged = twin(x)
        with a.ema_swapped(model):
            torch.testing.assert_close(model(x), averaged)
            with pytest.raises(RuntimeError, match=r"a step within ema_swapped\(\)"):
                a.step()
        outputs += [model(x), twin(x)]
    assert not torch.allclose(averaged, outputs[-1])
    for output in outputs:
        torch.testing.assert_close(output, outputs[-1])
    cases.assert_same_bits(*locals_of(a, b))
    whole = b.ema_state_dict(twin)
    for key, value in a.ema_state_dict(model).items():
        assert isinstance(value, DTensor) == isinstance(model.state_dict()[key], DTensor)
        assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, whole[key])


def test_averages_of_shards():
    ranks.run(2, check_averages)


def check_save(folder, name, options, dtype, flat):
    twin, model = Net(dtype), shard(Net(dtype))
    optimizer = cases.make(name, trainable(model), options)
    for t in range(3):
        inject(model, twin, t)
        optimizer.step()
    save(folder, model, optimizer, flat)


def save(folder, model, optimizer, flat):
    own = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp.save({"model": model.state_dict(), "optimizer": own}, checkpoint_id=folder)


def load(folder, model, optimizer, flat, planner=None):
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=how)}
    dcp.load(state, checkpoint_id=folder, planner=planner)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=how)


def check_load(folder, name, options, dtype, flat, init, plain):
    """Resume on this many ranks, from random weights, and go on beside one process that was not interrupted."""
    twin = Net(dtype)
    b = cases.make(name, trainable(twin), options)
    for t in range(3):
        inject(twin, twin, t)
        b.step()
    model = Net(dtype)
    with torch.no_grad():
        for p in trainable(model):
            p.normal_()
    model = model if plain else shard(model)
    a = cases.make(name, trainable(model), {**options, "lr": 0.7})
    if init:
        a.init_state()
        assert not any(own["step"] for own in a.state.values())
    load(folder, model, a, flat)
    cases.assert_same_bits(*locals_of(a, b))
    assert {k: v for k, v in a.param_groups[0].items() if k != "params"} == {
        k: v for k, v in b.param_groups[0].items() if k != "params"
    }
    for t in range(3, 6):
        inject(model, twin, t)
        a.step()
        b.step()
        cases.assert_same_bits(*locals_of(a, b))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("name", "options"), [*RULES[1:], *(FORMATS[i] for i in (0, 3, 5, 6))], ids=cases.name_of)
def test_saved_on_2_ranks_loaded_on_1_2_and_3(name, options, flat, tmp_path):
    """bfloat16 parameters, whose moments stay float32."""
    ranks.run(2, check_save, str(tmp_path), name, options, torch.bfloat16, flat)
    for world, init, plain in ((1, True, True), (1, False, False), (2, False, False), (3, True, False)):
        ranks.run(world, check_load, str(tmp_path), name, options, torch.bfloat16, flat, init, plain)


def check_full_state(folder):
    """A state dict of one process, whole, is sharded by torch's function; and one of torch.optim, flat."""
    twin, model = Net(), shard(Net())
    options = {"lr": 1e-2, "weight_decay": 0.1}
    b = torch.optim.AdamW(trainable(twin), **options)
    a = fused_adamw.AdamW(trainable(model), lr=0.5)
    a.init_state()
    inject(twin, twin, 1)
    b.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        tensors.local(p).data.copy_(tensors.local(placed_like(q.detach(), p)))
    whole = get_optimizer_state_dict(twin, b)
    set_optimizer_state_dict(model, a, copy.deepcopy(whole), options=StateDictOptions(full_state_dict=True))
    cases.assert_same_bits(*locals_of(a, b))
    assert a.param_groups[0]["lr"] == 1e-2
    assert all(own["step"] == 1 for own in a.state.values())

    save(folder, twin, b, True)
    again = fused_adamw.AdamW(trainable(model), lr=0.5)
    again.init_state()
    load(folder, model, again, True, dcp.DefaultLoadPlanner(allow_partial_load=True))
    cases.assert_same_bits(*locals_of(again, b))
    assert again.param_groups[0]["lr"] == 1e-2


def test_whole_state_and_that_of_torch_are_sharded(tmp_path):
    ranks.run(2, check_full_state, str(tmp_path))


def check_killed(folder, when):
    """Save, step, and die: in the middle of the next step, or of the next checkpoint."""
    twin, model = Net(), shard(Net())
    optimizer = cases.make("AdamW", trainable(model), {})
    for t in range(3):
        inject(model, twin, t)
        optimizer.step()
    save(f"{folder}/3", model, optimizer, True)
    if dist.get_rank() == 1:
        if when == "step":
            type(optimizer)._step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        else:
            dcp.FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    inject(model, twin, 3)
    optimizer.step()
    try:
        save(f"{folder}/4", model, optimizer, True)
    except RuntimeError as error:  # the other rank is gone
        assert "Connection" in str(error) or "peer" in str(error) or "gloo" in str(error)
        os._exit(0)


@pytest.mark.parametrize("when", ["step", "checkpoint"])
def test_killed_rank_leaves_the_checkpoint_before_it(when, tmp_path):
    assert ranks.run(2, check_killed, str(tmp_path), when) == [ranks.KILLED] * 2
    assert not (tmp_path / "4" / ".metadata").exists()  # which makes it one that loads
    ranks.run(2, check_load, str(tmp_path / "3"), "AdamW", {}, torch.float32, True, True, False)
    with pytest.raises(AssertionError, match=r"\.metadata|CheckpointException"):
        ranks.run(2, check_load, str(tmp_path / "4"), "AdamW", {}, torch.float32, True, True, False)


# ---- examples/train_fsdp.py


def check_example(folder, steps, every):
    from argparse import Namespace

    from bench.studies import gpt
    from examples import train_fsdp

    own = Namespace(steps=steps, every=every, checkpoints=Path(folder), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "CHARACTERS", 100_000)
        return train_fsdp.train(own, torch.device("cpu"))


def test_example_resumes_to_the_bit(tmp_path):
    """On as many ranks; on another number up to the order of the sums. A checkpoint half written is passed over."""
    whole, parts = str(tmp_path / "whole"), tmp_path / "parts"
    losses = ranks.run(2, check_example, whole, 5, 5)[0]
    assert losses[-1] < losses[0]
    assert ranks.run(2, check_example, str(parts), 3, 3)[0] == losses[:3]
    (parts / "00000004.part").mkdir()
    shutil.copytree(parts, tmp_path / "one")
    assert ranks.run(2, check_example, str(parts), 5, 1)[0] == losses[3:]
    assert sorted(path.name for path in parts.iterdir()) == ["00000003", "00000004", "00000005"]
    assert ranks.run(1, check_example, str(tmp_path / "one"), 5, 5)[0] == pytest.approx(losses[3:], rel=1e-4)


@pytest.mark.slow
def test_example_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples" / "train_fsdp.py"), "--steps", "1", "--checkpoints", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=180)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
    assert process.returncode == 0, out
    assert "2 processes on cpu, 460,416 of 920,832 parameters" in out
    assert "step     1  loss" in out
    assert (tmp_path / "00000001" / ".metadata").exists()


# ---- on GPUs


def check_gpus():
    """The gradients of backward, handed to a twin on the CPU that holds what this rank holds: the same bits."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda", (world,))
    share = slice(rank * 12 // world, (rank + 1) * 12 // world)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    whole = Net()
    train(whole, fused_adamw.AdamW(trainable(whole), **options), range(3))

    def compare(model):
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            p = p.detach().full_tensor() if isinstance(p, DTensor) else p
            torch.testing.assert_close(p.cpu(), q, rtol=1e-4, atol=1e-5)

    ways = {
        "fsdp": lambda net: fully_shard(net, mesh=mesh),
        "offload": lambda net: fully_shard(net, mesh=mesh, offload_policy=CPUOffloadPolicy()),
        "ddp": lambda net: DistributedDataParallel(net, device_ids=[device.index]),
    }
    for way, wrap in ways.items():
        model = wrap(Net() if way == "offload" else Net().to(device))
        params = trainable(model)
        twins = [nn.Parameter(tensors.local(p.detach()).cpu().clone()) for p in params]
        a, b = fused_adamw.AdamW(params, **options), fused_adamw.AdamW(twins, **options)
        assert list(a.backend.values()) == ["cpu" if way == "offload" else "triton"]
        for t in range(3):
            x = batch(t, device)[share]
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            for p, q in zip(params, twins, strict=True):
                q.grad = tensors.local(p.grad).cpu().clone()
            a.step()
            b.step()
            for p, q in zip(params, twins, strict=True):
                ours = {"p": p.detach(), **a.state[p]}
                theirs = {"p": q.detach(), **b.state[q]}
                cases.assert_same_bits({name: tensors.local(t) for name, t in ours.items()}, theirs)
            a.zero_grad()
        compare(model)

    inner = Net().to(device)
    _apply_optimizer_in_backward(fused_adamw.AdamW, trainable(inner), options)
    model = DistributedDataParallel(inner, device_ids=[device.index])
    for t in range(3):
        x = batch(t, device)[share]
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    compare(inner)


@pytest.mark.gpu
def test_gpus_have_the_bits_of_the_cpu():
    ranks.run(2, check_gpus, limit=300, fork=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", NORMS, ids=str)
def test_gpus_take_part_in_every_sum(options):
    ranks.run(2, check_collectives, "one mesh", options, "cuda", limit=300, fork=False)


@pytest.mark.gpu
@pytest.mark.parametrize("options", NORMS, ids=str)
@pytest.mark.parametrize("way", ["zero", "group"])
def test_gpus_have_the_norm_of_the_process_group(way, options):
    ranks.run(2, check_process_group, way, options, "cuda", limit=300, fork=False)
