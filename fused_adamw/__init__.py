"""Fused AdamW, Adam, SGDW and SGD: one optimizer step of a whole model in one launch."""

from fused_adamw._version import __version__
from fused_adamw.backends import capabilities
from fused_adamw.optimizers import SGD, SGDW, Adam, AdamW
from fused_adamw.schedules import CosineWarmRestarts, normalized_weight_decay, param_groups

__all__ = [
    "SGD",
    "SGDW",
    "Adam",
    "AdamW",
    "CosineWarmRestarts",
    "__version__",
    "capabilities",
    "normalized_weight_decay",
    "param_groups",
]
