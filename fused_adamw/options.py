"""The arguments of the four classes: their types, and a text for each, of which their docstrings are made."""

import inspect
import textwrap
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Backend = Literal["cpu", "triton", "cuda", "reference"]
Rounding = Literal["nearest", "stochastic"]
Master = Literal["kahan", "split16", "fp32"]
StateDtype = torch.dtype | Literal["float32", "bfloat16", "float16", "float64", "int8"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
are read once more, and not written. ``optimizer.grad_norm`` is the norm, on the device.""",
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
