"""Frameworks that drive our optimizers, on the CPU and offline; run by ``make test-integrations``."""

import os

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true", "LITLOGGER_DISABLED": "1"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
