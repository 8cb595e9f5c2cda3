"""DeepSpeed: its engine steps the partitions of ZeRO with our optimizer, saved and resumed; on one process."""

import deepspeed
import pytest
import torch
import torch.distributed as dist

import fused_adamw


@pytest.fixture(scope="module", autouse=True)
def group():
    """One group for all tests: DeepSpeed keeps the first that it finds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def made(module, stage, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.5,
    }
    return deepspeed.initialize(
        model=model, optimizer=module.AdamW(model.parameters(), lr=1e-2, **options), config=config
    )[0]


def train(engine, seed, steps=8):
    data, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(16, 8, generator=data)
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_follows_torchs_and_resumes_to_the_same_bits(stage, tmp_path):
    engine = made(fused_adamw, stage)
    assert type(engine.optimizer.optimizer) is fused_adamw.AdamW
    assert train(engine, seed=0) == pytest.approx(train(made(torch.optim, stage), seed=0), rel=1e-4)
    engine.save_checkpoint(tmp_path)
    expected = train(engine, seed=1)
    resumed = made(fused_adamw, stage)
    resumed.load_checkpoint(tmp_path)
    assert train(resumed, seed=1) == expected


def test_clipping_within_the_step_is_refused():
    """Each rank would clip by the norm of its own part."""
    engine = made(fused_adamw, 2, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="DeepSpeed hands the step a part of each parameter"):
        train(engine, seed=0, steps=1)
