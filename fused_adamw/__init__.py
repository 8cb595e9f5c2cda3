"""Fused AdamW, Adam, RAdam, AdaBound, SGDW and SGD: a launch for each device, format and rule steps all parameters."""

from pathlib import Path as _Path

from fused_adamw._version import __version__
from fused_adamw.adabound import AdaBound, AdaBoundW
from fused_adamw.backends import capabilities
from fused_adamw.optimizers import SGD, SGDW, Adam, AdamW, RAdam
from fused_adamw.release import release_gradients
from fused_adamw.schedules import CosineWarmRestarts, normalized_weight_decay, param_groups

__all__ = [
    "SGD",
    "SGDW",
    "AdaBound",
    "AdaBoundW",
    "Adam",
    "AdamW",
    "CosineWarmRestarts",
    "RAdam",
    "__version__",
    "capabilities",
    "normalized_weight_decay",
    "param_groups",
    "release_gradients",
]

# In a checkout triton_kernels lies beside the package; an installation has it inside.
_package = _Path(__file__).resolve().parent
if not (_package / "triton_kernels").is_dir() and (_package.parent / "triton_kernels" / "multi_tensor.py").is_file():
    __path__.append(str(_package.parent))


def __dir__() -> list[str]:
    return __all__
