"""Decides in which form a group stores a parameter and its moments, and warns of what that form loses."""

import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_adamw.contract import Storage, random_streams
from fused_adamw.options import INT8

# Moments of fewer elements are float32 where int8 is asked for. On many numbers of ranks the shards of a vector end
# within a block, and all vectors of a model take little memory; a longer one is a buffer of many parameters.
SMALL = 4096
SMALL_VECTOR = 1 << 20
NARROW = (torch.bfloat16, torch.float16)
SECOND = "exp_avg_sq"


def storage_of(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...]) -> Storage:
    """Return how ``group`` stores ``p`` and the moments ``names``; raises TypeError for a form that is unavailable."""
    narrow, master = p.dtype in NARROW, group.get("master")
    master = master if narrow and master else "none"
    stochastic = group.get("rounding") == "stochastic"
    if p.dtype is torch.float16 and master in ("kahan", "split16"):
        raise TypeError(f'master="{master}" is for bfloat16 parameters, and this one is float16: use master="fp32"')
    if p.dtype is torch.float16 and master == "none" and stochastic:
        raise TypeError(
            'rounding="stochastic" rounds to bfloat16, and this parameter is float16: give its group master="fp32", '
            'or rounding="nearest"'
        )
    int8 = group.get("state_dtype") in INT8 and bool(names)
    int8 = int8 and p.numel() >= (SMALL_VECTOR if p.dim() == 1 else SMALL)  # of the whole, sharded or not
    if int8 and (p.is_complex() or p.dtype is torch.float64):
        raise TypeError(f"{p.dtype} with int8 moments is not supported: give this group another state_dtype")
    declared = group.get("state_dtype")
    state = torch.int8 if int8 else None if declared in INT8 else declared
    ema = _ema_dtype_of(p, group)
    moments = names[:1] not in ((), (SECOND,)), SECOND in names
    stochastic = stochastic and any(random_streams(p.dtype, master, *moments, state))
    return Storage(master, stochastic, int8, ema)


def _ema_dtype_of(p: Tensor, group: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of p's average, as a real one; None where none is kept. Raises TypeError."""
    if group.get("ema_decay") is None:
        return None
    own, declared = torch.promote_types(p.dtype.to_real(), torch.float32), group.get("ema_dtype")
    if declared not in (None, own) and (p.is_complex() or own is not torch.float32):
        raise TypeError(
            f"{p.dtype} with ema_dtype={declared} is not supported: leave it out for this group, whose averages are "
            f"then {own.to_complex() if p.is_complex() else own}"
        )
    return declared or own


def state_dtype_of(p: Tensor, declared: Any) -> torch.dtype:
    """Return the dtype of p's moments, where they are no codes: the declared one, else float32 or wider."""
    dtype = (None if declared in INT8 else declared) or torch.promote_types(p.dtype.to_real(), torch.float32)
    return dtype.to_complex() if p.is_complex() else dtype


def warn_of_losses(p: Tensor, group: Mapping[str, Any], names: tuple[str, ...], storage: Storage) -> None:
    """Warn, once each, of updates that rounding to nearest loses."""
    if p.dtype in NARROW and storage.master == "none" and not storage.stochastic:
        warn_once(
            "Parameters in bfloat16 or float16 are trained with rounding to nearest and no master: an update of less "
            "than half an ulp (1/512 of a bfloat16, 1/4096 of a float16) is lost, and weight decay is the first to go. "
            'Cures, as arguments of the optimizer: rounding="stochastic" (bfloat16, no more memory), master="kahan" or '
            '"split16" (bfloat16, 2 bytes more a parameter), master="fp32" (4 bytes).'
        )
    if storage.int8 and not storage.stochastic:
        warn_once(
            "Moments in int8 are rounded to nearest: a second one hardly ever decays, and a small first one beside "
            'large ones never comes to 0. Use rounding="stochastic", with which both do on average.'
        )
    if SECOND not in names or storage.stochastic or group.get("state_dtype") not in NARROW:
        return
    if 1 - float(group["betas"][1]) < torch.finfo(group["state_dtype"]).eps / 2:
        warn_once(
            f"Second moments in {group['state_dtype']} with beta2 = {float(group['betas'][1])} never decay under "
            'rounding to nearest: use rounding="stochastic" (bfloat16), or float32 moments, which are the default.'
        )


@cache
def warn_once(text: str) -> None:
    """Warn of this once in a process, at the line outside of this package and of torch that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in ("fused_adamw", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)
