"""Fused AdamW, Adam, SGDW and SGD: one optimizer step of a whole model in one launch."""

from pathlib import Path as _Path

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

# In a checkout that was not installed, triton_kernels lies beside the package; an install puts it inside.
_checkout = _Path(__file__).resolve().parents[1]
if (_checkout / "triton_kernels" / "multi_tensor.py").is_file():
    __path__.append(str(_checkout))
