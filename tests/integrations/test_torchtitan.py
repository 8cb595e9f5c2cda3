"""torchtitan: its container of optimizers, on an FSDP2 model, saved and loaded; its trainer needs a GPU."""

import sys
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

import fused_adamw

if sys.version_info < (3, 11):
    pytest.skip("torchtitan needs Python 3.11", allow_module_level=True)

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig


class FusedOptimizers(OptimizersContainer):
    """The class of docs/integrations/recipes.md."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name):
        return getattr(fused_adamw, name)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def made(container, mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    fully_shard(model, mesh=mesh)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    groups = [
        ParamGroupConfig(pattern=r"bias$", optimizer_name="AdamW", optimizer_kwargs={**options, "weight_decay": 0.0}),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs=options),
    ]
    config = container.Config(param_groups=groups)
    return model, config.build(model_parts=[model])


def train(model, optimizers, seed, steps=8):
    data, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(16, 8, generator=data)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    return losses


def test_a_run_follows_torchs(mesh):
    ours, torchs = made(FusedOptimizers, mesh), made(OptimizersContainer, mesh)
    assert [type(optimizer) for optimizer in ours[1].optimizers] == [fused_adamw.AdamW]
    assert [group["weight_decay"] for group in ours[1].optimizers[0].param_groups] == [0.0, 0.1]
    assert train(*ours, seed=0) == pytest.approx(train(*torchs, seed=0), rel=1e-4)


def test_resuming_gives_the_same_bits(mesh, tmp_path):
    model, optimizers = made(FusedOptimizers, mesh)
    train(model, optimizers, seed=0)
    dcp.save({"model": model.state_dict(), "optimizer": optimizers.state_dict()}, checkpoint_id=tmp_path)
    expected = train(model, optimizers, seed=1)
    model, optimizers = made(FusedOptimizers, mesh)
    loaded = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    model.load_state_dict(loaded["model"])
    optimizers.load_state_dict(loaded["optimizer"])
    assert train(model, optimizers, seed=1) == expected
