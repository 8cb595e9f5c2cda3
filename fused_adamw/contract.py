"""Defines what the modules of a step hand each other: rows, launches, the watch; ``csrc/step.h`` in Python."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_adamw.options import Backend
from fused_adamw.tensors import Numbering, gradient, local, real

#: The family of each rule: the key of its scalars and hyperparameters.
FAMILIES = {"adam": "adam", "adam_amsgrad": "adam", "sgd": "sgd", "sgd_momentum": "sgd"}
#: How many states each rule moves.
STATES = {"adam": 2, "adam_amsgrad": 3, "sgd": 0, "sgd_momentum": 1}
#: The key of each master's data in the state.
MASTER_KEYS = {"kahan": "compensation", "split16": "remainder", "fp32": "master"}

Scalars = list[tuple[float, ...]]  # rows of layout.SCALARS numbers, the fields of scalars.Adam or scalars.Sgd


class RandomStreams(NamedTuple):
    """Says which streams of a row are rounded stochastically."""

    param: bool = False
    first_moment: bool = False
    second_moment: bool = False


def random_streams(p: torch.dtype, master: str, states: int, state: torch.dtype | None) -> RandomStreams:
    """Return the streams that rounding="stochastic" is for, of a rule with so many states; Python decides it here."""
    codes = state is torch.int8
    return RandomStreams(
        param=p is torch.bfloat16 and master == "none",
        first_moment=codes and states > 0,
        second_moment=states > 1 and (codes or state is torch.bfloat16),
    )


class Storage(NamedTuple):
    """Says in which form a parameter and its moments are stored."""

    master: str = "none"  # or a key of MASTER_KEYS
    stochastic: bool = False  # whether anything is rounded stochastically
    int8: bool = False

    def moments(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys in the state of the moments of these names."""
        return tuple(f"{name}_codes" for name in names) if self.int8 else names

    def scales(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return the keys in the state of their scales."""
        return tuple(f"{name}_scales" for name in names) if self.int8 else ()

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

    @property
    def is_adam(self) -> bool:
        """Whether the rule is Adam's, with a second moment."""
        return FAMILIES[self.rule] == "adam"

    @property
    def random_streams(self) -> RandomStreams:
        """Which streams are rounded stochastically."""
        if not self.stochastic:
            return RandomStreams()
        return random_streams(self.p, self.master, STATES[self.rule], self.state)


@dataclass(slots=True)
class Row:
    """Describes one tensor of a launch. ``p``, ``states`` and ``grad()`` are real, dense and laid out alike.

    Of a DTensor, ``p``, ``states`` and ``grad()`` are the shards of this rank.
    """

    slot: int  # position among the parameters that are watched
    group: int
    counts_on_device: bool  # where the steps are counted
    rule: str  # a key of FAMILIES
    param: Tensor  # as the user gave it
    p: Tensor  # what is stepped: the parameter's memory, or a dense copy of a parameter that is not dense
    states: tuple[Tensor, ...]
    step: Tensor
    g: Tensor | None  # a copy of the gradient in p's layout, where its own differs
    storage: Storage
    master_data: Tensor | None
    scales: tuple[Tensor, ...]  # of int8 states
    seed: int  # of stochastic rounding
    index: int  # position among all parameters of all groups; random bits depend on it
    numbering: Numbering

    @property
    def master(self) -> str:
        """A key of MASTER_KEYS, or "none"."""
        return self.storage.master

    @property
    def stochastic(self) -> bool:
        """Whether anything of the row is rounded stochastically."""
        return self.storage.stochastic

    @property
    def family(self) -> str:
        """The family of the rule."""
        return FAMILIES[self.rule]

    @property
    def second_moment(self) -> int:
        """The index of the second moment among the states; -1 if there is none."""
        return 1 if self.family == "adam" else -1

    @property
    def variant(self) -> Variant:
        """What the kernel that steps the row depends on."""
        state = self.states[0] if self.states else self.p
        return Variant(self.rule, self.p.dtype, self.grad().dtype, state.dtype, self.master, self.stochastic)

    def grad(self) -> Tensor:
        """Return the gradient in p's layout: the copy, where there is one."""
        return self.g if self.g is not None else real(local(gradient(self.param)))

    def copy_gradient(self) -> None:
        """Fill the copy of the gradient, where there is one."""
        if self.g is not None:
            self.g.copy_(real(local(gradient(self.param))))

    def before(self) -> None:
        """Fill the copy of the parameter, which a launch before this one may have changed."""
        if self.is_copy():
            self.p.copy_(real(local(self.param)))

    def after(self) -> None:
        """Bring the parameter back from its copy."""
        if self.is_copy():
            real(local(self.param)).copy_(self.p)

    def is_copy(self) -> bool:
        """Return whether p is a copy, because the parameter itself is not dense."""
        return self.p.data_ptr() != local(self.param).data_ptr()


class Launch(Protocol):
    """Steps the rows of one launch, as a backend has prepared them."""

    def prepare_step(self, scalars: Scalars) -> None:
        """Take the scalars and the gradients of the coming step."""

    def sum_squares(self) -> Tensor:
        """Return the sum of the squares of the gradients, float64, 0-dim, on their device."""

    def run(self, factor: float | Tensor) -> None:
        """Step, with gradients multiplied by ``factor``, 1.0 or a tensor; do nothing where that is negative."""


class Watch(Protocol):
    """Compares tensors with those that plans were built from: ``_C.Watch``, or ``watch.Watch`` in Python."""

    def poll(self, groups: list[dict], state: dict, plan_key: Callable[[dict], tuple]) -> bool:
        """Return whether the plans still hold: same groups, parameters, states, layouts. Gradients may have moved."""

    def scalar_rows(self) -> Scalars:
        """Return the rows of scalars of the coming step, one for each distinct (group, step); a slot knows its own."""

    def advance(self) -> None:
        """Count the step, and tell autograd that the parameters have changed."""

    def upload(
        self, rows: Tensor, slots: Tensor, scalars: Scalars, buffer: Tensor, every: bool, staging: Tensor | None
    ) -> None:
        """Bring the tables of a launch to this step: the rows, if any changed or ``every``, and the rows of scalars.

        ``rows`` is a copy of the table on the host, of which three columns are brought up to date: COL_GRAD (kept for a
        slot of -1 - slot), COL_SCALARS (kept for parameters whose steps are not counted here), and of COL_FLAGS the bit
        ALIGNED (SHARD_ALIGNED is kept). One copy goes up, from pinned memory, which torch's caching allocator does not
        hand out again before it is done; a graph, which copies at each replay, brings its own ``staging``.
        """

    def scalars_of(self, slot: int) -> int:
        """Return the index of the row of scalars that this parameter is stepped with."""


class Owner(Protocol):
    """Gives the checks and the plans what they need of an optimizer; error texts name its class."""

    param_groups: list[dict[str, Any]]
    state: Any  # by parameter, a dict of its state
    family: str
    requested: Backend | None

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


def counts_on_device(owner: Owner, group: dict[str, Any], p: Tensor) -> bool:
    """Return whether p's steps are counted on its device: only that knows whether a step is skipped, or replayed."""
    return bool(group.get("capturable")) or (owner.skips_steps and p.is_cuda)
