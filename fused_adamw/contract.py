"""Defines what the modules of a step hand each other: rows, launches, the watch; ``csrc/step.h`` in Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from fused_adamw.layout import COL_EMA, COL_EXTRA, COL_SCALES, COL_STATE
from fused_adamw.options import Backend
from fused_adamw.tensors import Numbering, gradient, local, real

#: The family of each rule: the key of its scalars and hyperparameters.
FAMILIES = {
    "adam": "adam",
    "adam_amsgrad": "adam",
    "sgd": "sgd",
    "sgd_momentum": "sgd",
    "adam_cautious_decay": "adam",
    "adam_cautious_update": "adam",
    "adabound": "adabound",
    "amsbound": "adabound",
    "adam_no_first_moment": "adam",
}
#: How many states each rule moves.
STATES = {
    "adam": 2,
    "adam_amsgrad": 3,
    "sgd": 0,
    "sgd_momentum": 1,
    "adam_cautious_decay": 2,
    "adam_cautious_update": 2,
    "adabound": 2,
    "amsbound": 3,
    "adam_no_first_moment": 1,
}
#: The key of the average of the parameter in the state.
EMA = "ema"
#: The key of each master's data in the state.
MASTER_KEYS = {"kahan": "compensation", "split16": "lower_half", "fp32": "master"}

Scalars = list[tuple[float, ...]]  # rows of layout.SCALARS numbers, the fields of a class in scalars.py


def second_moment_of(rule: str) -> int:
    """Return the index of the second moment among the states of a rule; -1 if there is none."""
    return -1 if FAMILIES[rule] == "sgd" else 0 if rule == "adam_no_first_moment" else 1


class RandomStreams(NamedTuple):
    """Says which streams of a row are rounded stochastically."""

    param: bool = False
    first_moment: bool = False
    second_moment: bool = False


def random_streams(
    p: torch.dtype, master: str, first_moment: bool, second_moment: bool, state: torch.dtype | None
) -> RandomStreams:
    """Return the streams that rounding="stochastic" is for, of a rule with these moments; Python decides it here."""
    codes = state is torch.int8
    return RandomStreams(
        param=p is torch.bfloat16 and master == "none",
        first_moment=first_moment and codes,
        second_moment=second_moment and (codes or state is torch.bfloat16),
    )


class Storage(NamedTuple):
    """Says in which form a parameter and its moments are stored."""

    master: str = "none"  # or a key of MASTER_KEYS
    stochastic: bool = False  # whether the parameter or a moment is rounded stochastically
    int8: bool = False
    ema: torch.dtype | None = None  # of the average of the parameter, as a real one; None where none is kept

    def moments(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys in the state of the moments of these names."""
        return tuple(f"{name}_codes" for name in names) if self.int8 else names

    def scales(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys in the state of their scales."""
        return tuple(f"{name}_scales" for name in names) if self.int8 else ()

    @property
    def draws(self) -> bool:
        """Whether random bits are drawn: a narrow average is rounded stochastically whatever the rest is."""
        return self.stochastic or self.ema is torch.bfloat16

    @property
    def ordered(self) -> bool:
        """Whether the order of memory matters: random bits are drawn, and blocks of codes lie, in that of the whole."""
        return self.draws or self.int8

    @property
    def master_key(self) -> str | None:
        """The key in the state of the master's data."""
        return MASTER_KEYS.get(self.master)


class Variant(NamedTuple):
    """Names all that a compiled kernel depends on, besides the device."""

    rule: str  # a key of FAMILIES
    p: torch.dtype
    g: torch.dtype
    state: torch.dtype  # int8: codes, with a scale for each codecs.BLOCK of them
    master: str = "none"
    stochastic: bool = False
    ema: torch.dtype | None = None  # of the average, where there is one
    measured: bool = False

    @property
    def is_adam(self) -> bool:
        """Whether the rule is Adam's or AdaBound's, with a second moment."""
        return FAMILIES[self.rule] != "sgd"

    @property
    def draws(self) -> bool:
        """Whether random bits are drawn, for the parameter, a moment or the average."""
        return any(self.random_streams) or self.ema is torch.bfloat16

    @property
    def random_streams(self) -> RandomStreams:
        """Which of parameter and moments are rounded stochastically."""
        if not self.stochastic:
            return RandomStreams()
        second = second_moment_of(self.rule)
        return random_streams(self.p, self.master, STATES[self.rule] > 0 and second != 0, second >= 0, self.state)


class Clipping(NamedTuple):
    """Says what the factor of all gradients depends on, besides their norm."""

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    grad_scale: Tensor | None = None  # of a GradScaler, one number each
    found_inf: Tensor | None = None

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of the gradients is asked for."""
        return self.max_grad_norm is not None or self.skip_nonfinite


class Owner(Protocol):
    """Gives the checks and the plans what they need of an optimizer; error texts name its class."""

    param_groups: list[dict[str, Any]]
    state: Any  # by parameter, a dict of its state
    family: str
    requested: Backend | None
    swapped: bool  # parameters hold their averages
    process_group: Any  # of parameters that are no DTensors: None, a group, or a function that returns a parameter's

    @property
    def skips_steps(self) -> bool:
        """Whether a step may turn out to change nothing."""

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are multiplied by a factor, which takes their norm or a GradScaler to know."""

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        """Return the rule that steps a group, and the names of the states that it moves, in the rule's order."""

    def plan_key(self, group: dict[str, Any]) -> tuple:
        """Return the options that force a new plan when they change."""


class Tensors(NamedTuple):
    """Holds the tensors of a row during one call. ``p``, ``g`` and ``states`` are real, dense and laid out alike."""

    p: Tensor  # what is stepped: the parameter's memory, or the dense copy of a parameter that is not dense
    g: Tensor  # the gradient, or its copy in p's layout
    states: tuple[Tensor, ...]
    step: Tensor
    master_data: Tensor | None
    scales: tuple[Tensor, ...]
    ema: Tensor | None  # as p


@dataclass(slots=True)
class Row:
    """Describes one tensor of a launch, and keeps none of the optimizer's alive; of a DTensor, this rank's shard."""

    slot: int  # position among the parameters that are watched
    group: int
    position: int  # in the group
    index: int  # position among all parameters of all groups; random bits depend on it
    device: torch.device
    rule: str  # a key of FAMILIES
    p: torch.dtype  # of the parameter, as a real one; so are the next two
    g: torch.dtype  # of the gradient
    state: torch.dtype  # of the states; p where there are none
    numel: int  # as a real one
    names: tuple[str, ...]  # of the states that the rule moves
    storage: Storage
    p_copy: Tensor | None  # of a parameter that is not dense
    g_copy: Tensor | None  # of a gradient whose layout is not that of the dense parameter
    counts_on_device: bool  # where the steps are counted
    seed: int  # of stochastic rounding
    numbering: Numbering
    measured: bool  # steps write sums of squares, for statistics
    as_before: bool  # the gradient is missing; the row expects one of the dtype and layout that the previous plans saw

    @property
    def master(self) -> str:
        """A key of MASTER_KEYS, or "none"."""
        return self.storage.master

    @property
    def stochastic(self) -> bool:
        """Whether the parameter or a moment is rounded stochastically."""
        return self.storage.stochastic

    @property
    def ema(self) -> torch.dtype:
        """The dtype of the average; of the arithmetic where none is kept."""
        return self.storage.ema or torch.promote_types(self.p, torch.float32)

    @property
    def family(self) -> str:
        """The family of the rule."""
        return FAMILIES[self.rule]

    @property
    def second_moment(self) -> int:
        """The index of the second moment among the states; -1 if there is none."""
        return second_moment_of(self.rule)

    @property
    def variant(self) -> Variant:
        """What the kernel that steps the row depends on."""
        form = (self.master, self.stochastic, self.storage.ema, self.measured)
        return Variant(self.rule, self.p, self.g, self.state, *form)

    @property
    def columns(self) -> dict[str, int]:
        """The columns of ``layout.py`` that hold the addresses of the parameter's state, by its keys."""
        columns = {key: COL_STATE + j for j, key in enumerate(self.storage.moments(self.names))}
        columns |= {key: COL_SCALES + j for j, key in enumerate(self.storage.scales(self.names))}
        columns |= {EMA: COL_EMA} if self.storage.ema else {}
        return columns | ({self.storage.master_key: COL_EXTRA} if self.storage.master_key else {})

    def param(self, owner: Owner) -> Tensor:
        """Return the parameter as the user gave it."""
        return owner.param_groups[self.group]["params"][self.position]

    def tensors(self, owner: Owner) -> Tensors:
        """Return the tensors of the row, which has a gradient."""
        param = self.param(owner)
        own, master_key = owner.state[param], self.storage.master_key
        return Tensors(
            p=real(local(param)) if self.p_copy is None else self.p_copy,
            g=real(local(gradient(param))) if self.g_copy is None else self.g_copy,
            states=tuple(real(local(own[key])) for key in self.storage.moments(self.names)),
            step=own["step"],
            master_data=local(own[master_key]) if master_key else None,
            scales=tuple(local(own[key]) for key in self.storage.scales(self.names)),
            ema=real(local(own[EMA])) if self.storage.ema else None,
        )

    def is_live(self, owner: Owner) -> bool:
        """Return whether the parameter has a gradient, so that this step moves it."""
        return self.param(owner).grad is not None

    def copy_gradient(self, owner: Owner) -> None:
        """Fill the copy of the gradient, where there is one."""
        if self.g_copy is not None and self.is_live(owner):
            self.g_copy.copy_(real(local(gradient(self.param(owner)))))

    def before(self, owner: Owner) -> None:
        """Fill the copy of the parameter, which a launch before this one may have changed."""
        if self.p_copy is not None:
            self.p_copy.copy_(real(local(self.param(owner))))

    def after(self, owner: Owner) -> None:
        """Bring the parameter back from its copy."""
        if self.p_copy is not None and self.is_live(owner):
            real(local(self.param(owner))).copy_(self.p_copy)


class Launch(Protocol):
    """Steps the rows of one launch, as a backend has prepared them. It keeps no tensor of the owner alive."""

    def prepare_step(self, owner: Owner, scalars: Scalars) -> None:
        """Take the scalars and the addresses of the coming step."""

    @property
    def parts(self) -> int:
        """How many numbers ``sum_squares`` writes."""

    def sum_squares(self, owner: Owner, sums: Tensor) -> None:
        """Write the sums of the squares of the gradients, float64, one for each part of them."""

    def run(self, owner: Owner, factor: float | Tensor, count: bool) -> None:
        """Step, with gradients multiplied by ``factor``, a number or a tensor; do nothing where that is negative.

        Where ``count`` is set the watch then counts the step, within the same call.
        """

    def squares(self) -> Tensor:
        """Return sums of squares of the last step that was not skipped, float64 [3, rows], of the measured rows.

        They are of gradients times their factor, of updates and of new parameters, before any rounding to storage; 0 of
        a row that the step left out.
        """


@runtime_checkable
class Summed(Protocol):
    """Does for all launches of a device what ``clipping.factor_of`` does with torch's operators."""

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor, just allocated, that kernels read or write, as long as the launch or a graph of it lives."""

    def totals(self, sums: Tensor, bounds: Tensor, found: Tensor | None, totals: Tensor, flag: Tensor) -> None:
        """Write the sum of each segment of ``sums``, and to ``flag`` whether an infinity was found, 0 or 1.

        Segment k is from ``bounds[k]`` to ``bounds[k + 1]``.
        """

    def factor(self, sums: Tensor, clipping: Clipping, factor: Tensor, norm: Tensor | None) -> float | Tensor:
        """Return the factor, written to ``factor`` where that is on a device, and write the norm."""


class Watch(Protocol):
    """Follows the tensors that plans were built from: ``_C.Watch``, or ``watch.Watch`` in Python. It owns none."""

    def poll(self, groups: list[dict], state: dict, plan_key: Callable[[dict], tuple]) -> bool:
        """Return whether the plans still hold; take the addresses of tensors that moved, and which have a gradient.

        They hold as long as parameters, dtypes, layouts and the options of ``plan_key`` are the same, and no gradient
        comes that was not planned for.
        """

    def scalar_rows(self, groups: list[dict]) -> Scalars:
        """Return the rows of scalars of the coming step, one for each distinct (group, step); a slot knows its own."""

    def device_hypers(
        self, groups: list[dict], some: list[int], values: Tensor, rates: Tensor, device: torch.device
    ) -> tuple[bool, list[int]]:
        """Bring numbers of ``layout.HYPER_LR`` and on to the rows of ``values`` of some groups; see ``csrc/watch.h``.

        Addresses of learning rates that are tensors on ``device`` go to ``rates``. Return whether anything changed, and
        the groups whose rate is one that kernels there cannot read.
        """

    def advance(self) -> None:
        """Count the step of the parameters that have a gradient, and tell autograd that they have changed."""

    def update(self, table: Tensor, slots: Tensor) -> bool:
        """Bring the rows of a launch, on the host, to this step; return whether any changed.

        ``table`` has the rows, and behind them the addresses of their counters where these are on the device.
        """

    def upload(self, table: Tensor, slots: Tensor, scalars: Scalars, buffer: Tensor, every: bool) -> None:
        """Update ``table``, and bring it to its copy on the device if any row changed or ``every``; and the scalars.

        One copy goes up, from pinned memory, which torch's caching allocator does not hand out again before it is done.
        """

    def any_live(self) -> bool:
        """Return whether the last poll saw a gradient."""

    def scalars_of(self, slot: int) -> int:
        """Return the index of the row of scalars that this parameter is stepped with."""


def counts_on_device(owner: Owner, group: dict[str, Any], p: Tensor) -> bool:
    """Return whether p's steps are counted on its device: only that knows whether a step is skipped, or replayed."""
    return bool(group.get("capturable")) or (owner.skips_steps and p.is_cuda)
