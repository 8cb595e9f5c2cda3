"""Defines the arguments of the classes: types, texts for docstrings, a table of those that are ours, one check."""

import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Backend = Literal["cpu", "triton", "cuda", "reference"]
Rounding = Literal["nearest", "stochastic"]
Master = Literal["kahan", "split16", "fp32"]
Cautious = Literal["decay", "update"]
EmaDtype = torch.dtype | Literal["float32", "bfloat16"]
Measured = Literal["parameter"] | bool
StateDtype = torch.dtype | Literal["float32", "bfloat16", "float16", "float64", "int8"]

ProcessGroups: TypeAlias = "ProcessGroup | Callable[[Tensor], Sequence[ProcessGroup]] | None"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EMA_DTYPES = (torch.float32, torch.bfloat16)
INT8 = ("int8", torch.int8)
ROUNDINGS = get_args(Rounding)
MASTERS = get_args(Master)
CAUTIOUS = get_args(Cautious)
When = Literal["construction", "loading", "step"]


class Option(NamedTuple):
    """Describes an option of a parameter group that some class of torch lacks."""

    default: Any
    ours: tuple[str, ...]  # the families whose classes in torch lack it: a group holds it only where it is set
    kept: bool = False  # loading a checkpoint leaves it as it is here
    replans: bool = False  # a change makes the plans stale


_ALL = ("adam", "radam", "adabound", "sgd")
OPTIONS = {
    "decoupled_weight_decay": Option(False, ours=("sgd",)),
    "decouple_lr": Option(False, ours=_ALL),
    "cautious": Option(None, ours=("adam", "radam")),
    "first_moment": Option(True, ours=("adam",)),
    "lr_in_momentum": Option(False, ours=("sgd",)),
    "degenerated_to_sgd": Option(True, ours=("radam",)),
    "capturable": Option(False, ours=("sgd",), kept=True, replans=True),
    "state_dtype": Option(None, ours=_ALL, kept=True, replans=True),
    "rounding": Option("nearest", ours=_ALL, kept=True, replans=True),
    "master": Option(None, ours=_ALL, kept=True, replans=True),
    "lr_mult": Option(1.0, ours=_ALL),
    "wd_mult": Option(1.0, ours=_ALL),
    "seed": Option(0, ours=_ALL, replans=True),
    "ema_decay": Option(None, ours=_ALL, kept=True),
    "ema_warmup": Option(False, ours=_ALL, kept=True),
    "ema_dtype": Option(None, ours=_ALL, kept=True, replans=True),
    "statistics": Option(False, ours=_ALL, kept=True, replans=True),
}
KEPT = tuple(name for name, option in OPTIONS.items() if option.kept)
REPLANS = tuple(name for name, option in OPTIONS.items() if option.replans)
REPLAN_DEFAULTS = tuple(OPTIONS[name].default for name in REPLANS)
#: What a step reads from the groups of a family.
NEEDED = {
    "adam": ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    "radam": ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay"),
    "adabound": (
        *("lr", "betas", "final_lr", "gamma", "eps", "weight_decay", "amsbound"),
        *("maximize", "decoupled_weight_decay", "base_lr"),
    ),
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
}
#: Arguments of the constructor that hold for all groups.
OF_ALL_GROUPS = ("backend", "max_grad_norm", "skip_nonfinite", "amp_scaling", "process_group")


@functools.cache
def ours(family: str) -> dict[str, Any]:
    """Return the options that torch's classes of a family lack, and their defaults.

    At the defaults the keys of a group are torch's, because torch.distributed.checkpoint asks a checkpoint for every
    key of the group that it is loaded into.
    """
    return {name: option.default for name, option in OPTIONS.items() if family in option.ours}


_TEXTS = {
    "params": """\
parameters, named parameters, or dicts of parameter groups. Groups may have an ``lr_mult`` and a ``wd_mult``, numbers
of at least 0 that each step multiplies their ``lr`` and ``weight_decay`` by.""",
    "lr": """\
learning rate γ, a float or a tensor of one element; it may not be negative. If a group's ``lr`` is set below 0 later,
its steps ascend, as in torch, with a warning. Schedules may end a little below 0 by rounding: down to -1e-12, or to
-1e-6 times the group's ``initial_lr``, counts as 0. A tensor on a GPU is read by the device.""",
    "betas": "β1, β2 of the running averages of the gradient and of its square.",
    "eps": "ε, added to the denominator.",
    "momentum": "momentum μ.",
    "dampening": "dampening τ of the momentum.",
    "weight_decay": "weight decay λ.",
    "nesterov": "use Nesterov's momentum: :math:`g_t + \\mu b_t` in place of :math:`b_t`.",
    "amsgrad": "divide by the maximum of all v_t so far (arXiv 1904.09237).",
    "final_lr": """\
learning rate α that the bounds come together at, as in SGD; it is scaled by lr / base_lr, so that a schedule moves it
too. base_lr is the learning rate that the group was made with, and is saved with the group.""",
    "gamma": "speed γ at which the bounds come together, above 0 and below 1.",
    "amsbound": "divide by the maximum of all v_t so far: AMSBound.",
    "foreach": "torch's choice of an implementation. The step is always fused: True is refused.",
    "differentiable": "True is refused: a fused step has no derivative.",
    "fused": "torch's choice of an implementation. The step is always fused: any value is accepted.",
    "maximize": "maximize the objective instead of minimizing it.",
    "capturable": """\
keep steps and scalars on the device, so that a CUDA graph of the step replays correctly; see
:meth:`refresh_captured`. For parameters on a GPU, on the "triton" and "cuda" backends.""",
    "decoupled_weight_decay": "decay as AdamW does.",
    "degenerated_to_sgd": """\
step as SGD with momentum as long as the second moment tells too little, as torch does; False waits, as the authors'
code can.""",
    "decouple_lr": """\
decoupled decay as in the paper, by lr / base_lr times λ, where base_lr is the learning rate that the group was made
with. torch's decay is lr times λ.""",
    "cautious": """\
``"decay"`` decays only elements in which m_t and θ do not have opposite signs (arXiv 2510.12402), and needs decoupled
weight decay; ``"update"`` updates only elements in which m_t and the gradient have the same sign (arXiv 2411.16085,
without its rescaling by the share of such elements). Not with ``amsgrad``.""",
    "first_moment": """\
False keeps no ``exp_avg``, and moves 20 bytes an element where float32 takes 28. It needs ``betas[0] = 0``, with which
the first moment is the gradient: the step is the same. Not with ``amsgrad`` or ``cautious``.""",
    "lr_in_momentum": "use the paper's momentum, in which a change of the learning rate acts on new gradients only.",
    "state_dtype": """\
how moments are stored, a dtype or its name; by default float32, or float64 for float64 parameters. ``"int8"`` stores
codes of one byte, with a scale for every 128 of them; moments of fewer than 4096 elements, or in one dimension of fewer
than 2**20, stay float32.""",
    "rounding": """\
``"nearest"``, or ``"stochastic"``: bfloat16 parameters without a master, second moments in bfloat16 and all moments in
int8 are rounded up or down at random, so that the mean is exact. The random bits (Philox 4x32-7) are a function of
seed, step, parameter and element, so they are the same on every replica, backend and shard, and after a resume.""",
    "master": """\
for bfloat16 parameters, more digits than they hold: ``"kahan"`` keeps a compensation in bfloat16, ``"split16"`` the
lower half of a float32 whose upper half is the parameter, ``"fp32"`` a whole float32. Float16 parameters can have
``"fp32"``. The step updates the master, and the parameter is its rounded value. See :meth:`refresh_masters`.""",
    "seed": "seed of stochastic rounding, which has no other state.",
    "ema_decay": """\
keep an exponential moving average of each parameter in ``optimizer.state[p]["ema"]``, which begins as a copy of it; a
step then makes it ``ema_decay * ema + (1 - ema_decay) * p``, with p before its rounding to a narrower dtype. At least 0
and below 1, and free to change between steps; None keeps none. See :meth:`ema_swapped` and :meth:`ema_state_dict`.""",
    "ema_warmup": "use min(ema_decay, (1 + t) / (10 + t)) in the t-th step of a parameter in place of ``ema_decay``.",
    "ema_dtype": """\
dtype of the averages, or its name: float32 by default (float64 for float64 parameters), or ``torch.bfloat16``, which
takes 4 bytes less traffic and 2 less memory an element. It is rounded stochastically, with random bits of its own by
``seed``, whatever ``rounding`` is: to nearest, an average with a decay of 0.999 would stand still.""",
    "statistics": """\
measure, within the step, the norms of gradient, update and parameter of each group, or with ``"parameter"`` of each
parameter. See :attr:`statistics`.""",
    "backend": """\
``"cpu"``, ``"triton"``, ``"cuda"`` or ``"reference"``; by default the best one that runs on the device of a tensor.""",
    "max_grad_norm": """\
clip by the global norm of all gradients, as ``torch.nn.utils.clip_grad_norm_`` does, within the step: gradients are
read once more, and not written. ``optimizer.grad_norm`` is the norm, on the device, of gradients divided by a
GradScaler's scale; ``float("inf")`` clips nothing. Its last bits depend on how the parameters are cut into tensors and
on the backend (up to 1e-15 of it on a CPU, 3e-7 on a GPU), but not on threads. If each parameter has an optimizer of
its own, each is clipped by its own norm.""",
    "skip_nonfinite": "skip a step whose gradients have a norm that is not finite: nothing changes and nothing counts.",
    "amp_scaling": """\
let ``torch.amp.GradScaler`` hand its scale and its finding of infinities to the step, which then divides and skips by
itself, without a synchronisation. By default the scaler does both before the step, so that the gradients can be
clipped in between, and Accelerate sees which steps were skipped. Gradients stay scaled after the step; torch's fused
step unscales them in memory. Tensors set by hand as ``optimizer.grad_scale`` and ``optimizer.found_inf`` are honoured
with and without this, as by torch's fused step.""",
    "process_group": """\
the ranks over which the norm of ``max_grad_norm`` and ``skip_nonfinite``, and the infinities of ``amp_scaling``, are
summed, for plain tensors of which each rank has its own part: a process group, or a function ``process_group(p)``
that returns the process groups of one parameter, ``()`` for one that every rank has whole. A DTensor and a
``ZeroRedundancyOptimizer`` bring their own; FSDP1 needs ``model.process_group``.""",
}

_REST = """
Parameters and gradients are float32, bfloat16, float16, float64, or complex of these, in any mix. Arithmetic is in
float32 (float64 for float64 parameters), with one rounding to the storage type.

Raises:
    ValueError: for a hyperparameter out of range, in torch's words, and with its group.
    TypeError: for a hyperparameter that is not a number.
    RuntimeError: for an argument or a backend that is unavailable, with what to do instead.
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


_REFUSED = {
    ("foreach", True): "all tensors are stepped together without it; drop the argument",
    ("differentiable", True): "a fused step has no derivative; use torch.optim's class of this name",
}


def check_support(where: str, given: Mapping[str, Any]) -> None:
    """Raise RuntimeError for an argument of torch's that is unavailable; ``where`` has ``{}`` in its place."""
    for (name, value), remedy in _REFUSED.items():
        if given.get(name) is value:
            raise RuntimeError(f"{where.format(f'{name}={value}')} is not supported: {remedy}")


def name_dtype(group: dict[str, Any]) -> None:
    """Replace the names of dtypes that options have by the dtypes; leave all else, "int8" too, as it is."""
    for option in ("state_dtype", "ema_dtype"):
        name = group.get(option)
        if isinstance(name, str):
            dtype = getattr(torch, name.removeprefix("torch."), None)
            if dtype in DTYPES:
                group[option] = dtype


def draws(group: Mapping[str, Any]) -> bool:
    """Return whether a group asks for stochastic rounding."""
    averages = group.get("ema_decay") is not None and group.get("ema_dtype") is torch.bfloat16
    return averages or group.get("rounding") == "stochastic"


def record_seed(group: dict[str, Any]) -> None:
    """Write the seed of stochastic rounding into a group that was set to it by hand, so that a checkpoint has it."""
    if draws(group):
        group.setdefault("seed", 0)


def check(group: dict[str, Any], index: int | None = None, *, at: When = "construction") -> None:
    """Raise ValueError or TypeError for an option that is wrong ``at`` this moment; name a dtype by the dtype."""
    name_dtype(group)
    try:
        check_hyperparameters(group, at)
        _check_storage(group)
    except (ValueError, TypeError) as error:
        raise error if index is None else type(error)(f"{error} (group {index})") from None


def check_hyperparameters(group: Mapping[str, Any], at: When = "construction") -> None:
    """Raise ValueError, in torch's words, for one out of range; TypeError for one that is not a number.

    A step takes what torch's takes: a negative number, and Nesterov's momentum without one. Loading takes a negative
    number of rounding size, with which a run may have ended.
    """
    read = (*_NOT_NEGATIVE, "dampening", *(("base_lr",) if needs_base_lr(group) else ()))
    numbers = {name: as_float(name, group[name]) for name in read if name in group}
    for name, text in _NOT_NEGATIVE.items():
        value = numbers.get(name, 0.0)
        if 0.0 <= value < math.inf or (at == "step" and math.isfinite(value)):
            continue
        if at != "loading" or number(group, name) != 0.0:
            raise ValueError(f"Invalid {text}: {group[name]}")
    for name in ("lr_mult", "wd_mult"):
        if not 0 <= as_float(name, group.get(name, 1.0)) < math.inf:
            raise ValueError(f"Invalid {name}: {group[name]}, it must be a number of at least 0")
    betas = group.get("betas", (0.0, 0.0))
    if not hasattr(betas, "__len__"):
        raise TypeError(f"betas must be two numbers, and is {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}, there must be two")
    for i, beta in enumerate(betas):
        if not 0.0 <= as_float("beta", beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if at != "step" and group.get("nesterov") and (numbers["momentum"] <= 0 or numbers["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    _check_cautious(group)
    _check_ema(group)
    if (asked := group.get("statistics", False)) not in (False, True, "parameter"):
        raise ValueError(f"statistics={asked!r}: must be False, True or 'parameter'")
    _check_first_moment(group)
    if "amsbound" in group:
        _check_bounds(group)
    if not needs_base_lr(group):
        return
    if group.get("decouple_lr") and not group.get("decoupled_weight_decay"):
        raise ValueError("decouple_lr=True needs decoupled weight decay: use AdamW or SGDW, or drop it")
    if at == "step" and "base_lr" not in group:
        raise ValueError("decouple_lr=True, set by hand, needs the group's 'base_lr' too: a positive float")
    if not numbers.get("base_lr", numbers["lr"]) > 0:
        scaled = "AdaBound scales final_lr" if "amsbound" in group else "decouple_lr=True scales the decay"
        raise ValueError(
            f"{scaled} by lr / base_lr, and base_lr, the lr the group was made with, is "
            f"{group.get('base_lr', group['lr'])}: make the group with a positive lr, or give it a positive 'base_lr'"
        )


def _check_cautious(group: Mapping[str, Any]) -> None:
    cautious = group.get("cautious")
    if cautious not in (None, *CAUTIOUS):
        raise ValueError(f"cautious={cautious!r}: must be None or one of {', '.join(map(repr, CAUTIOUS))}")
    if cautious and group.get("amsgrad"):
        raise ValueError(f"cautious={cautious!r} with amsgrad=True is not supported: drop one of them")
    if cautious == "decay" and not group.get("decoupled_weight_decay"):
        raise ValueError("cautious='decay' needs decoupled weight decay: use AdamW, or drop it")


def _check_ema(group: Mapping[str, Any]) -> None:
    decay = group.get("ema_decay")
    if decay is not None and not 0 <= as_float("ema_decay", decay) < 1:
        raise ValueError(f"Invalid ema_decay: {decay}, it must be None, or at least 0 and below 1")
    dtype = group.get("ema_dtype")
    if dtype not in (None, *EMA_DTYPES):
        names = ", ".join(map(str, EMA_DTYPES))
        raise ValueError(f"ema_dtype={dtype!r}: must be None or one of {names}, or their names")


def _check_first_moment(group: Mapping[str, Any]) -> None:
    kept = group.get("first_moment", True)
    if not isinstance(kept, bool):
        raise ValueError(f"first_moment={kept!r}: must be True or False")
    if kept:
        return
    for name in ("amsgrad", "cautious"):
        if group.get(name):
            raise ValueError(f"first_moment=False with {name}={group[name]!r} is not supported: drop one of them")
    if (beta := as_float("beta", group["betas"][0])) != 0:
        raise ValueError(
            f"first_moment=False needs betas[0] = 0, and it is {beta}: give betas=(0.0, {group['betas'][1]}), and "
            "cycle_momentum=False to a scheduler that would change it, or leave out first_moment=False"
        )


def _check_bounds(group: Mapping[str, Any]) -> None:
    if not 0 <= as_float("final_lr", group["final_lr"]) < math.inf:
        raise ValueError(f"Invalid final learning rate: {group['final_lr']}")
    if not 0 < as_float("gamma", group["gamma"]) < 1:
        raise ValueError(f"Invalid gamma parameter: {group['gamma']}, it must be above 0 and below 1")


def needs_base_lr(group: Mapping[str, Any]) -> bool:
    """Return whether steps of a group depend on the learning rate that it was made with."""
    return bool(group.get("decouple_lr")) or "amsbound" in group


def number(group: Mapping[str, Any], name: str) -> float:
    """Return a hyperparameter as a float: 0.0 for a negative one of rounding size, with which a schedule may end.

    That size is 1e-12 or, for a learning rate that torch's schedulers drive, 1e-6 of the group's ``initial_lr`` if that
    is more: rates may be tensors in float32.
    """
    value = as_float(name, group[name])
    if value >= 0:
        return value
    initial = as_float("initial_lr", group.get("initial_lr") or 0.0) if name == "lr" else 0.0
    return 0.0 if 0 < -value <= max(1e-12, 1e-6 * initial) else value


def ascends(group: Mapping[str, Any]) -> bool:
    """Return whether the learning rate is negative by more than rounding; never of one that only a device can read."""
    return getattr(group["lr"], "is_cpu", True) and number(group, "lr") < 0


def floats(betas: Sequence[float | Tensor]) -> tuple[float, ...]:
    """Return betas as floats; raise TypeError or ValueError, in torch's words, for a mix of numbers and tensors."""
    if not hasattr(betas, "__len__"):
        raise TypeError(f"betas must be two numbers, and is {betas!r}")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    return tuple(as_float(f"betas[{i}]" if isinstance(beta, Tensor) else "beta", beta) for i, beta in enumerate(betas))


def as_float(name: str, value: Any) -> float:
    """Return a number or a tensor of one element as a float; raise TypeError or ValueError for anything else."""
    if type(value) is float:
        return value
    if not isinstance(value, (str, bytes)):  # which float() would read
        try:
            return float(value.detach() if getattr(value, "requires_grad", False) else value)
        except (TypeError, ValueError, RuntimeError):
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element") from None
    yaml = ": in YAML, 1e-3 is a string, 1.0e-3 a number" if isinstance(value, str) else ""
    raise TypeError(f"{name} must be a number, and is {value!r}{yaml}")


def check_process_group(value: Any) -> None:
    """Raise TypeError for what is neither a process group, nor a function that returns some, nor None."""
    if value is not None and not callable(value) and not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a process group or a function of a parameter, and is {value!r}: of a DeviceMesh, "
            "give mesh.get_group()"
        )


def check_max_grad_norm(value: Any) -> None:
    """Raise ValueError or TypeError for a norm that nothing can be clipped by; None stands for no clipping."""
    if value is not None and not as_float("max_grad_norm", value) >= 0:
        raise ValueError(f"Invalid max_grad_norm value: {value}, it must be at least 0, or None")


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
    if group.get("state_dtype") in INT8 and (group.get("amsgrad") or group.get("amsbound")):
        name = "amsbound" if group.get("amsbound") else "amsgrad"
        raise ValueError(
            f"state_dtype='int8' with {name}=True is not supported, because a running maximum keeps int8's errors: "
            "use state_dtype=torch.bfloat16"
        )
    declared = group.get("state_dtype")
    if declared not in (None, *DTYPES, *INT8):
        names = ", ".join(map(str, DTYPES))
        raise ValueError(f"state_dtype={declared!r}: must be one of {names}, their names, or 'int8'")
