"""Frameworks that drive our optimizers, on the CPU and offline; run by ``make test-integrations``."""

import os

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "LITLOGGER_DISABLED": "1", "DS_ACCELERATOR": "cpu"}

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # The package index has torchvision for CUDA's builds of torch. Beside a CPU build its operators fail to load, and
    # its import fails for lack of these two. The frameworks here import torchvision, and no test calls an operator.
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
