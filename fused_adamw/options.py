"""Defines the arguments of the four classes: types, texts for docstrings, a table of those that are ours, one check."""

import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Backend = Literal["cpu", "triton", "cuda", "reference"]
Rounding = Literal["nearest", "stochastic"]
Master = Literal["kahan", "split16", "fp32"]
StateDtype = torch.dtype | Literal["float32", "bfloat16", "float16", "float64", "int8"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT8 = ("int8", torch.int8)
ROUNDINGS = get_args(Rounding)
MASTERS = get_args(Master)


class Option(NamedTuple):
    """Describes an option of a parameter group that some class of torch lacks."""

    default: Any
    ours: tuple[str, ...]  # the families whose classes in torch lack it: a group holds it only where it is set
    kept: bool = False  # loading a checkpoint leaves it as it is here
    replans: bool = False  # a change makes the plans stale


OPTIONS = {
    "decoupled_weight_decay": Option(False, ours=("sgd",)),
    "decouple_lr": Option(False, ours=("adam", "sgd")),
    "lr_in_momentum": Option(False, ours=("sgd",)),
    "capturable": Option(False, ours=("sgd",), kept=True, replans=True),
    "state_dtype": Option(None, ours=("adam", "sgd"), kept=True, replans=True),
    "rounding": Option("nearest", ours=("adam", "sgd"), kept=True, replans=True),
    "master": Option(None, ours=("adam", "sgd"), kept=True, replans=True),
    "seed": Option(0, ours=("adam", "sgd"), replans=True),
}
KEPT = tuple(name for name, option in OPTIONS.items() if option.kept)
REPLANS = tuple(name for name, option in OPTIONS.items() if option.replans)


def ours(family: str) -> dict[str, Any]:
    """Return the options that torch's classes of a family lack, and their defaults.

    At the defaults the keys of a group are torch's, because torch.distributed.checkpoint asks a checkpoint for every
    key of the group that it is loaded into.
    """
    return {name: option.default for name, option in OPTIONS.items() if family in option.ours}


_TEXTS = {
    "params": "parameters, named parameters, or dicts of parameter groups.",
    "lr": "learning rate γ, a float or a tensor of one element.",
    "betas": "coefficients β1, β2 of the running averages.",
    "eps": "ε, added to the denominator.",
    "momentum": "μ.",
    "dampening": "τ.",
    "weight_decay": "λ.",
    "nesterov": "Nesterov's momentum: :math:`g_t + \\mu b_t` in place of :math:`b_t`.",
    "amsgrad": "use the maximum of all v_t so far (arXiv 1904.09237).",
    "foreach": "torch's choice of an implementation. There is one here, and it is fused: True is refused.",
    "differentiable": "as foreach: True is refused.",
    "fused": "as foreach: True and None are accepted, and are the same.",
    "maximize": "ascend.",
    "capturable": """\
keep steps and scalars on the device, so that a CUDA graph of the step replays correctly; see
:meth:`refresh_captured`. For parameters on a GPU, on the "triton" and "cuda" backends.""",
    "decoupled_weight_decay": "decay as AdamW does.",
    "decouple_lr": """\
decoupled decay as in the paper, by lr / base_lr times λ, where base_lr is the learning rate that the group was
made with; torch's is lr times λ.""",
    "lr_in_momentum": "the paper's momentum, in which a change of the learning rate acts on new gradients only.",
    "state_dtype": """\
storage of the moments, a dtype or its name; by default float32, or float64 for float64 parameters. ``"int8"``:
codes of one byte, with a scale for every 128 of them; moments of fewer than 4096 elements stay float32.""",
    "rounding": """\
``"nearest"``, or ``"stochastic"``: bfloat16 parameters, and second moments in bfloat16 or int8, are rounded up or
down with the probability that makes the mean right, by random bits of Philox 4x32-10, a function of seed, step,
parameter and element: the same on every replica, backend and shard, and after a resume.""",
    "master": """\
of bfloat16 parameters: ``"kahan"``, a compensation in bfloat16; ``"split16"``, the lower half of a float32 of
which the parameter is the upper; ``"fp32"``, a float32, of float16 ones too. Updates act on these, and the
parameter is their rounded value. See :meth:`refresh_masters`.""",
    "seed": "of stochastic rounding; the only part of it that is state.",
    "backend": """\
``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``; by default the best that runs on the device of a tensor.""",
    "max_grad_norm": """\
clip by the global norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does, within the step: gradients
are read once more, and not written. ``optimizer.grad_norm`` is the norm, on the device. Its last bits in float64
depend on how the parameters are cut into tensors, and on the backend; not on threads.""",
    "skip_nonfinite": "a step whose gradients' norm is not finite changes nothing and is not counted.",
    "amp_scaling": """\
let ``torch.amp.GradScaler`` hand its scale and its finding of infinities to the step, which then divides and
skips by itself, without a synchronisation. By default the scaler does both before the step, so that the gradients
can be clipped in between, and that Accelerate sees which steps were skipped.""",
}

_REST = """
Parameters and gradients are float32, bfloat16, float16, float64, or complex of these, in any mix. Arithmetic is in
float32 (float64 for float64 parameters), with one rounding to the storage type.

Raises:
    ValueError: for a hyperparameter out of range, in torch's words, and with its group.
    TypeError: for a hyperparameter that is not a number.
    RuntimeError: for an argument or a backend that cannot be had, with what to do instead.
"""

Class = TypeVar("Class", bound=type)


def documented(cls: Class) -> Class:
    """Put a text for each argument of ``cls``, with its default, where the docstring says ``Args:``."""
    lines = ["Args:"]
    for name, parameter in inspect.signature(cls).parameters.items():
        default = "" if parameter.default is parameter.empty else f" (default: {parameter.default!r})"
        text = f"{name}: {_TEXTS[name].removesuffix('.')}{default}."
        lines += textwrap.wrap(text, 100, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
    if cls.__doc__:  # not under python -OO
        cls.__doc__ = inspect.cleandoc(cls.__doc__).replace("Args:", "\n".join(lines) + "\n" + _REST.rstrip())
    return cls


def name_dtype(group: dict[str, Any]) -> None:
    """Replace the name of a dtype under ``"state_dtype"`` by the dtype; leave all else, "int8" too, as it is."""
    name = group.get("state_dtype")
    if isinstance(name, str):
        dtype = getattr(torch, name.removeprefix("torch."), None)
        if dtype in DTYPES:
            group["state_dtype"] = dtype


def record_seed(group: dict[str, Any]) -> None:
    """Write the seed of stochastic rounding into a group that was set to it by hand, so that a checkpoint has it."""
    if group.get("rounding") == "stochastic":
        group.setdefault("seed", 0)


def check(group: dict[str, Any], index: int | None = None) -> None:
    """Raise ValueError or TypeError for an option that no step could use; name a dtype by the dtype."""
    name_dtype(group)
    try:
        check_hyperparameters(group)
        _check_storage(group)
    except (ValueError, TypeError) as error:
        raise error if index is None else type(error)(f"{error} (group {index})") from None


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError, in torch's words, for one that no step could use; TypeError for one that is not a number."""
    lr = group["lr"]
    given = {name: group[name] for name in (*_NOT_NEGATIVE, "dampening") if name in group}
    for name, value in (*given.items(), *(("beta", beta) for beta in group.get("betas", ()))):
        check_number(name, value)
    if getattr(lr, "numel", int)() > 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, text in _NOT_NEGATIVE.items():
        if name in group and not 0.0 <= group[name] < math.inf:
            raise ValueError(f"Invalid {text}: {group[name]}")
    if "betas" in group and len(group["betas"]) != 2:
        raise ValueError(f"Invalid betas: {group['betas']}, there must be two")
    for i, beta in enumerate(group.get("betas", ())):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group.get("decouple_lr") and not group.get("decoupled_weight_decay"):
        raise ValueError("decouple_lr=True needs decoupled weight decay: use AdamW or SGDW, or drop it")
    if group.get("decouple_lr") and not group.get("base_lr", group["lr"]) > 0:
        raise ValueError(
            "decouple_lr=True scales the decay by lr / base_lr, and base_lr, the lr the group was made with, is "
            f"{group.get('base_lr', group['lr'])}: make the group with a positive lr, or give it a positive 'base_lr'"
        )


def check_number(name: str, value: Any) -> None:
    """Raise TypeError for anything that is not a number."""
    if not hasattr(value, "__float__"):
        yaml = ": in YAML, 1e-3 is a string, 1.0e-3 a number" if isinstance(value, str) else ""
        raise TypeError(f"{name} must be a number, and is {value!r}{yaml}")


_NOT_NEGATIVE = {
    "lr": "learning rate",
    "eps": "epsilon value",
    "weight_decay": "weight_decay value",
    "momentum": "momentum value",
}


def _check_storage(group: Mapping[str, Any]) -> None:
    if group.get("rounding", "nearest") not in ROUNDINGS:
        raise ValueError(f"rounding={group['rounding']!r}: must be one of {', '.join(map(repr, ROUNDINGS))}")
    if group.get("master") not in (None, *MASTERS):
        raise ValueError(f"master={group['master']!r}: must be None or one of {', '.join(map(repr, MASTERS))}")
    seed = group.get("seed", 0)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r}: must be a whole number from 0 to 2**63 - 1")
    if group.get("state_dtype") in INT8 and group.get("amsgrad"):
        raise ValueError(
            "state_dtype='int8' with amsgrad=True is not supported, a running maximum only grows, with its errors: "
            "use state_dtype=torch.bfloat16"
        )
    declared = group.get("state_dtype")
    if declared not in (None, *DTYPES, *INT8):
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"state_dtype={declared!r}: must be one of {names}, their names, or 'int8'")
