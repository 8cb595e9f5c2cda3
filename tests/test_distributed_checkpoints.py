"""Distributed checkpoints of every format, between forms and numbers of ranks: the bits, or what is missing by name."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fused_adamw
from fused_adamw import formats, state, tensors
from tests import cases, ranks
from tests.test_distributed import INT8, LONG_VECTOR, inject, load, locals_of, placed_like, save, trainable

BF16 = torch.bfloat16
SPLIT16 = {"master": "split16", "state_dtype": BF16, "rounding": "stochastic"}
PARTIAL = dcp.DefaultLoadPlanner(allow_partial_load=True)


@pytest.fixture(scope="module", autouse=True)
def reaped():
    yield
    ranks.close()


class Net(nn.Module):
    """Matrices and vectors, of which all but one are int8, a row for one rank alone, and a late parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.matrix, self.odd = nn.Parameter(torch.randn(34, 128)), nn.Parameter(torch.randn(96, 96))
        self.vector, self.long = nn.Parameter(torch.randn(4100)), nn.Parameter(torch.randn(LONG_VECTOR))
        self.row, self.late = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(5))
        self.to(dtype)


CODED = ("matrix", "odd", "long")


def shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def trained(dtype, options, name="AdamW"):
    """A model on all ranks, and its optimizer, which has taken three steps."""
    twin, model = Net(dtype), shard(Net(dtype))
    optimizer = cases.make(name, trainable(model), {"lr": 1e-2, **options})
    for t in range(3):
        inject(model, twin, t)
        optimizer.step()
    return model, optimizer


# ---- whole states


def check_save_whole(file, options, dtype, cpu_offload):
    model, optimizer = trained(dtype, options)
    how = StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload)
    whole = get_optimizer_state_dict(model, optimizer, options=how)
    weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": whole}, file)


def check_load_whole(file, options, dtype, plain, used):
    """Equal to what one process loads into an optimizer that has no state, whatever is in the state of this one."""
    saved = torch.load(file)
    model = Net(dtype) if plain else shard(Net(dtype))
    optimizer = cases.make("AdamW", trainable(model), options)
    optimizer.init_state()
    if used:
        inject(model, Net(dtype), 9)
        optimizer.step()
    for p, whole in zip(model.parameters(), saved["model"].values(), strict=True):
        tensors.local(p.detach()).copy_(tensors.local(placed_like(whole, p)))
    how = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(saved["optimizer"]), options=how)
    twin = Net(dtype)
    twin.load_state_dict(saved["model"])
    reference = cases.make("AdamW", trainable(twin), options)
    reference.load_state_dict(saved["optimizer"])
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        mine, theirs = optimizer.state[p], reference.state[q]
        assert mine.keys() == theirs.keys()
        assert mine["step"] == (2 if p is model.late else 3)
        assert ("exp_avg_codes" in mine) == (options.get("state_dtype") == "int8" and name in CODED)
        ours = {key: tensors.local(t) for key, t in mine.items()}
        cases.assert_same_bits(ours, {key: tensors.local(placed_like(t, mine[key])) for key, t in theirs.items()})
        moment = state._as_float(theirs, "exp_avg")
        assert moment.count_nonzero() > 0.9 * moment.numel()


@pytest.mark.parametrize(
    ("saved", "loaded", "dtype"),
    [
        (INT8, {}, torch.float32),
        ({}, INT8, torch.float32),
        (INT8, INT8, torch.float32),
        (SPLIT16, SPLIT16, BF16),
        (SPLIT16, {"master": "split16", "state_dtype": "int8"}, BF16),
        ({"master": "fp32"}, {"master": "split16", "state_dtype": BF16}, BF16),
        ({"state_dtype": BF16}, {"state_dtype": torch.float16}, torch.float32),
    ],
    ids=["int8-fp32", "fp32-int8", "int8-int8", "split16-split16", "split16-int8", "fp32-split16", "bf16-fp16"],
)
def test_whole_states_between_formats(saved, loaded, dtype, tmp_path):
    for offload in (False, True):
        file = str(tmp_path / f"{offload}.pt")
        ranks.run(2, check_save_whole, file, saved, dtype, offload)
        for world, plain, used in ((1, True, offload), (2, False, not offload), (3, False, offload)):
            ranks.run(world, check_load_whole, file, loaded, dtype, plain, used)


def check_save_old(file, smallest, sharded):
    """As when vectors of one process were int8 from 4096 elements on, and those of shards never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "SMALL_VECTOR", smallest)
        twin, model = Net(), shard(Net()) if sharded else Net()
        optimizer = cases.make("AdamW", trainable(model), {"lr": 1e-2, **INT8})
        for t in range(3):
            inject(model, twin, t)
            optimizer.step()
        whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        assert ("exp_avg_codes" in whole["state"]["vector"]) == (not sharded)
        assert ("exp_avg_codes" in whole["state"]["long"]) == (not sharded)
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": whole}, file)
        if not sharded:
            save(file + ".dcp", model, optimizer, False)


def check_load_old(folder):
    """What a distributed checkpoint has in another form is named."""
    model = Net()
    optimizer = cases.make("AdamW", trainable(model), INT8)
    optimizer.init_state()
    with pytest.raises(dcp.CheckpointException, match=r"Missing key .*optimizer\.state\.vector\.exp_avg"):
        load(folder, model, optimizer, False)
    with pytest.raises(ValueError, match=r"parameter 2 .*: its state 'exp_avg' was not loaded"):
        load(folder, model, optimizer, False, PARTIAL)


@pytest.mark.parametrize(("smallest", "sharded"), [(4096, False), (1 << 40, True)], ids=["plain", "sharded"])
def test_vectors_of_the_older_form_are_converted(smallest, sharded, tmp_path):
    file = str(tmp_path / "old.pt")
    ranks.run(2 if sharded else 1, check_save_old, file, smallest, sharded)
    for loaded in (INT8, {}):
        for world, plain in ((1, True), (2, False)):
            ranks.run(world, check_load_whole, file, loaded, torch.float32, plain, True)
    if not sharded:
        ranks.run(1, check_load_old, file + ".dcp")
        dcp_to_torch_save(file + ".dcp", file)
        ranks.run(2, check_load_whole, file, INT8, torch.float32, False, True)


def check_broadcast(file, options):
    model = shard(Net())
    optimizer = cases.make("AdamW", trainable(model), options)
    optimizer.init_state()
    saved = torch.load(file) if dist.get_rank() == 0 else {"optimizer": {}}
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if options != {}:
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)
        return [float(own["step"]) for own in optimizer.state.values()]
    if dist.get_rank() == 0:
        set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)
    else:
        with pytest.raises(ValueError, match=r"its state 'exp_avg' was not loaded, and its 'step' was, and is 3"):
            set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=how)
    return []


def test_whole_state_from_one_rank(tmp_path):
    """torch hands the other ranks no moment of another form; these say so."""
    file = str(tmp_path / "whole.pt")
    ranks.run(2, check_save_whole, file, INT8, torch.float32, False)
    assert ranks.run(2, check_broadcast, file, INT8) == [[3.0] * 5 + [2.0]] * 2
    ranks.run(2, check_broadcast, file, {})


# ---- any layout into any other

LAYOUTS = {"plain": 1, "ddp": 2, "fsdp2": 2, "fsdp3": 3}  # on so many ranks
WAYS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True),
    "whole": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def laid_out(layout):
    """A model laid out so, its parameters' owner, and an int8 optimizer."""
    inner = Net()
    model = DistributedDataParallel(inner) if layout == "ddp" else inner if layout == "plain" else shard(inner)
    return model, inner, cases.make("AdamW", trainable(inner), {"lr": 1e-2, **INT8})


def check_save_layout(folder, layout, way):
    model, inner, optimizer = laid_out(layout)
    for t in range(3):
        inject(inner, Net(), t)
        optimizer.step()
    saved = {
        "model": get_model_state_dict(model, options=WAYS[way]),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=WAYS[way]),
    }
    if way != "whole":
        dcp.save(saved, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(saved, folder + ".pt")


def check_load_layout(folder, layout, way):
    """The bits of one process, at once and two steps later."""
    twin = Net()
    b = cases.make("AdamW", trainable(twin), {"lr": 1e-2, **INT8})
    for t in range(3):
        inject(twin, twin, t)
        b.step()
    model, inner, a = laid_out(layout)
    with torch.no_grad():
        for p in inner.parameters():
            p.zero_()
    a.init_state()
    if way == "whole":
        saved = torch.load(folder + ".pt")
    else:
        saved = {
            "model": get_model_state_dict(model, options=WAYS[way]),
            "optimizer": get_optimizer_state_dict(model, a, options=WAYS[way]),
        }
        dcp.load(saved, checkpoint_id=folder)
    set_model_state_dict(model, saved["model"], options=WAYS[way])
    set_optimizer_state_dict(model, a, saved["optimizer"], options=WAYS[way])
    for t in range(3, 6):
        assert {name for name, p in inner.named_parameters() if "exp_avg_codes" in a.state[p]} == set(CODED)
        cases.assert_same_bits(*locals_of(a, b))
        inject(inner, twin, t)
        a.step()
        b.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_int8_from_any_layout_into_any_other(saved, way, tmp_path):
    folder = str(tmp_path / "saved")
    ranks.run(LAYOUTS[saved], check_save_layout, folder, saved, way)
    for layout, world in LAYOUTS.items():
        ranks.run(world, check_load_layout, folder, layout, way)


def turned(placement, options):
    """A transposed weight of shards that torch does not transpose; its twin of one process; an optimizer of each."""
    twin, model = nn.Module(), nn.Module()
    twin.weight = nn.Parameter(cases.parameters([(400, 70)], BF16)[0].detach().t())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(twin.weight.detach(), mesh, [placement]))
    return model, twin, *(cases.make("AdamW", [m.weight], {"lr": 1e-2, **options}) for m in (model, twin))


def step_turned(model, twin, a, b, t):
    cases.set_gradients([twin.weight], t)
    model.weight.grad = placed_like(twin.weight.grad, model.weight)
    a.step()
    b.step()
    cases.assert_same_bits(*locals_of(a, b))


def check_save_turned(folder, placement, options):
    model, twin, a, b = turned(placement, options)
    for t in range(3):
        step_turned(model, twin, a, b, t)
    save(folder, model, a, True)
    whole = get_optimizer_state_dict(model, a, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        torch.save(whole, folder + ".pt")


def check_load_turned(folder, placement, options, way):
    model, twin, a, b = turned(placement, options)
    for t in range(3):
        cases.set_gradients([twin.weight], t)
        b.step()
    a.init_state()
    load(folder, model, a, True)
    if way == "whole":
        a.state[model.weight]["step"].zero_()
        how = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, a, torch.load(folder + ".pt"), options=how)
    cases.assert_same_bits(*locals_of(a, b))
    for t in range(3, 5):
        step_turned(model, twin, a, b, t)


@pytest.mark.parametrize("way", ["flat", "whole"])
@pytest.mark.parametrize(
    ("placement", "options"),
    [(Shard(0), SPLIT16), (Shard(1), {"rounding": "stochastic"}), (Replicate(), INT8)],
    ids=["rows", "columns", "int8"],
)
def test_transposed_weight_resumes(placement, options, way, tmp_path):
    folder = str(tmp_path / "saved")
    ranks.run(2, check_save_turned, folder, placement, options)
    for world in (2, 3):
        ranks.run(world, check_load_turned, folder, placement, options, way)


# ---- partial loads


def check_save(folder, options, flat):
    save(folder, *trained(torch.float32, options), flat)


def check_partial(folder, options, flat, missing):
    model = shard(Net())
    optimizer = cases.make("AdamW", trainable(model), options)
    optimizer.init_state()
    with pytest.raises(ValueError, match=f"its state '{missing}' was not loaded, .* 'step' was, and is 3.*full_state"):
        load(folder, model, optimizer, flat, PARTIAL)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("saved", "loaded"), [(INT8, {}), ({}, INT8)], ids=["int8-fp32", "fp32-int8"])
def test_partial_load_that_leaves_a_moment_names_it(saved, loaded, flat, tmp_path):
    ranks.run(2, check_save, str(tmp_path), saved, flat)
    for world in (1, 2):
        ranks.run(world, check_partial, str(tmp_path), loaded, flat, "exp_avg")


def check_stateful(folder, saved, options):
    """The optimizer itself, whose state_dict torch loads into."""
    _, optimizer = trained(torch.float32, saved)
    dcp.save({"optimizer": optimizer}, checkpoint_id=folder)
    again = cases.make("AdamW", trainable(shard(Net())), options)
    again.init_state()
    if saved == options:
        dcp.load({"optimizer": again}, checkpoint_id=folder, planner=PARTIAL)
        cases.assert_same_bits(
            *(
                {f"{i}.{k}": tensors.local(t) for i, own in enumerate(o.state.values()) for k, t in own.items()}
                for o in (again, optimizer)
            )
        )
        return
    with pytest.raises(ValueError, match="its state 'exp_avg' was not loaded"):
        dcp.load({"optimizer": again}, checkpoint_id=folder, planner=PARTIAL)


@pytest.mark.parametrize(("saved", "loaded"), [(INT8, INT8), (INT8, {})], ids=["int8-int8", "int8-fp32"])
def test_partial_load_of_an_optimizer(saved, loaded, tmp_path):
    ranks.run(2, check_stateful, str(tmp_path), saved, loaded)


def check_torchs(folder, name, options, ours, flat):
    """A checkpoint of torch's, into groups that have options of ours."""
    twin, model = Net(), shard(Net())
    b = getattr(torch.optim, name)(trainable(twin), **options)
    for t in range(2):
        inject(twin, twin, t)
        b.step()
    save(folder, twin, b, flat)
    a = getattr(fused_adamw, name)(trainable(model), **{**options, "lr": 0.5}, **ours)
    a.init_state()
    load(folder, model, a, flat, PARTIAL)
    assert a.param_groups[0]["lr"] == options["lr"]
    if ours.get("decouple_lr"):
        assert a.param_groups[0]["base_lr"] == 0.5
    for p, q in zip(trainable(model), trainable(twin), strict=True):
        for key, whole in b.state[q].items():
            mine = tensors.local(a.state[p][key])
            assert torch.equal(mine, tensors.local(placed_like(whole, a.state[p][key])))
        assert name != "SGD" or a.state[p]["step"] == 1


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("AdamW", {"lr": 1e-2}, {"decouple_lr": True}),
        ("SGD", {"lr": 1e-2, "momentum": 0.9}, {}),
    ],
    ids=["AdamW", "SGD"],
)
def test_partial_load_of_torchs(name, options, ours, flat, tmp_path):
    """Its SGD has no step: a momentum that was loaded was begun, and the next gradient does not replace it."""
    ranks.run(2, check_torchs, str(tmp_path), name, options, ours, flat)


# ---- a mesh of one rank


def check_one_rank(shape, placement):
    whole = cases.parameters([shape])[0]
    mesh = init_device_mesh("cpu", (1,))
    ours = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement], src_data_rank=None))
    a, b = (cases.make("AdamW", [p], INT8) for p in (ours, whole))
    for t in range(2):
        cases.set_gradients([whole], t)
        ours.grad = placed_like(whole.grad, ours)
        a.step()
        b.step()
    cases.assert_same_bits(*locals_of(a, b))
    again = cases.make("AdamW", [ours], INT8)
    again.load_state_dict(a.state_dict())
    cases.assert_same_bits(*locals_of(again, b))


@pytest.mark.parametrize(("shape", "placement"), [((77, 65), Shard(0)), ((77, 65), Shard(1)), ((77, 256), Shard(1))])
def test_int8_on_a_mesh_of_one_rank(shape, placement):
    ranks.run(1, check_one_rank, shape, placement)
