"""torchtune: its recipe of full fine-tuning, with the optimizer named in the configuration."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf
from torchtune.models.llama2 import llama2

LLAMA = {"vocab_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16, "max_seq_len": 16}
CONFIG = """
model: {_component_: torchtune.models.llama2.llama2}
tokenizer: {_component_: tests.integrations.test_torchtune.Tokenizer}
dataset: {_component_: tests.integrations.test_torchtune.Counting, packed: false}
checkpointer:
  _component_: torchtune.training.FullModelTorchTuneCheckpointer
  checkpoint_dir: ${output_dir}/base
  checkpoint_files: [model.pt]
  output_dir: ${output_dir}/out
  model_type: LLAMA2
resume_from_checkpoint: false
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
  filename: log.txt
seed: 0
shuffle: true
batch_size: 8
epochs: 1
max_steps_per_epoch: 8
gradient_accumulation_steps: 1
compile: false
device: cpu
dtype: fp32
enable_activation_checkpointing: false
"""


class Tokenizer:
    """Has what the recipe asks of one."""

    pad_id = 0


class Counting(torch.utils.data.Dataset):
    """Sequences that count modulo 32: each token tells the next."""

    def __init__(self, tokenizer: Tokenizer, packed: bool):
        assert not packed

    def __len__(self):
        return 64

    def __getitem__(self, i):
        tokens = [(i + j) % 32 for j in range(16)]
        return {"tokens": tokens, "labels": tokens}


def losses(folder: Path, module: str, **options) -> list[float]:
    """Train by torchtune's recipe with the AdamW of a module, and return the loss of every step."""
    (folder / "base").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(llama2(**LLAMA).state_dict(), folder / "base" / "model.pt")
    config = OmegaConf.create(CONFIG)
    config.model.update(LLAMA)
    config.update({"output_dir": str(folder), "optimizer": {"_component_": f"{module}.AdamW", "lr": 1e-2}, **options})
    path = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    run = recipe.FullFinetuneRecipeSingleDevice(cfg=config)
    run.setup(cfg=config)
    each = run._optim_ckpt_wrapper.optim_map.values() if options["optimizer_in_bwd"] else [run._optimizer]
    assert all(type(optimizer).__module__.startswith(module) for optimizer in each)
    run.train()
    run.cleanup()
    assert (folder / "out" / "epoch_0").is_dir()
    return [float(loss) for loss in re.findall(r"loss:(\S+)", (folder / "logs" / "log.txt").read_text())]


@pytest.mark.parametrize(
    "options",
    [{"optimizer_in_bwd": False, "clip_grad_norm": 0.5}, {"optimizer_in_bwd": True}],
    ids=["clipped", "in the backward pass"],
)
def test_a_run_follows_torchs(options, tmp_path):
    ours = losses(tmp_path / "ours", "fused_adamw", **options)
    assert len(ours) == 8
    assert ours == pytest.approx(losses(tmp_path / "torchs", "torch.optim", **options), rel=1e-4)
    assert ours[-1] < ours[0] - 0.5
