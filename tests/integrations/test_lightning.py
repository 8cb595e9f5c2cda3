"""Lightning: automatic optimization by closures, clipping, bf16, fp16 with a scaler, resuming."""

import math

import lightning as L
import pytest
import torch

import fused_adamw


class Module(L.LightningModule):
    def __init__(self, optimizers, bad_batch=-1):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
        self.optimizers_of, self.bad_batch, self.losses = optimizers, bad_batch, []

    def training_step(self, batch, index):
        (x,) = batch
        loss = (self.net(x) - x.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss * math.inf if index == self.bad_batch else loss

    def configure_optimizers(self):
        optimizer = self.optimizers_of.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=50)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).repeat(20, 1)  # one batch, 20 times
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=8)


def fit(module, folder, steps=20, ckpt_path=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def fp16_on_the_cpu():
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))


CLIPS = {"norm": {"gradient_clip_val": 0.5}, "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "fp16"])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_run_follows_torchs(precision, clip, tmp_path):
    """Clipping under AMP too, which Lightning refuses for an optimizer that unscales by itself."""
    runs = [Module(m) for m in (fused_adamw, torch.optim)]
    for module in runs:
        options = {"plugins": [fp16_on_the_cpu()]} if precision == "fp16" else {"precision": precision}
        trainer = fit(module, tmp_path, **CLIPS[clip], **options)
        assert all(own["step"].item() == 20 for own in trainer.optimizers[0].state.values())
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    rel = 1e-4 if precision == "32-true" else 0.05
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=rel)
    assert runs[0].losses[-1] < runs[0].losses[0]


def test_a_skipped_step_counts_nowhere(tmp_path):
    module = Module(fused_adamw, bad_batch=0)
    trainer = fit(module, tmp_path, plugins=[fp16_on_the_cpu()], gradient_clip_val=0.5)
    assert all(own["step"].item() == 19 for own in trainer.optimizers[0].state.values())
    assert all(p.isfinite().all() for p in module.parameters())


def test_resuming_gives_the_same_bits(tmp_path):
    whole, first, second = (Module(fused_adamw) for _ in range(3))
    fit(whole, tmp_path, 40, precision="bf16-mixed")
    fit(first, tmp_path, 20, precision="bf16-mixed").save_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    fit(second, tmp_path, 40, ckpt_path=tmp_path / "checkpoint", precision="bf16-mixed")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), second.parameters(), strict=True))
