"""Turns tensors into plans: the rows that one backend steps in one launch.

A plan holds until a watch sees that a tensor, a layout or a state is not what it was built from; a gradient that only
moved is followed.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import backends, checks, formats, options, scalars, state, watch
from fused_adamw.checks import Checked
from fused_adamw.contract import Launch, Owner, Row, Scalars, Storage, Watch, counts_on_device
from fused_adamw.tensors import (
    NOT_SHARDED,
    dense_like,
    gradient,
    is_pending,
    local,
    real,
    same_layout,
    shard_groups,
    shard_numbering,
)


@dataclass(slots=True)
class Plan:
    """Prepares and runs one launch, with the copies that tensors of other layouts need."""

    rows: list[Row]
    copied: list[Row]  # those whose copies are filled before a launch, and brought back after it
    launch: Launch
    shard_groups: tuple[Any, ...] = ()  # process groups to sum a norm over, if one is asked for

    @property
    def device(self) -> torch.device:
        return self.rows[0].p.device

    def prepare_step(self, scalars: Scalars) -> None:
        """Make the launch ready for a step."""
        if self.copied:
            with torch.no_grad():
                for row in self.copied:
                    row.copy_gradient()
        self.launch.prepare_step(scalars)

    def run(self, factor: float | Tensor) -> None:
        """Step, with gradients multiplied by ``factor``; where that is negative nothing is done."""
        if not self.copied:
            self.launch.run(factor)
            return
        with torch.no_grad():
            for row in self.copied:
                row.before()
            self.launch.run(factor)
            for row in self.copied:
                row.after()


class Bucket(NamedTuple):
    """Tells apart rows that cannot share a launch."""

    turn: int  # launches of an earlier turn come first
    shard_groups: tuple[Any, ...]
    device: torch.device
    backend: str
    key: Hashable  # the backend's own


class Built(NamedTuple):
    """Holds plans, the watch over them, and the arguments to poll it with."""

    watch: Watch
    plans: list[Plan]
    groups: list[dict[str, Any]]
    state: dict[Tensor, Any]


def build(owner: Owner, only: Tensor | None = None) -> Built:
    """Check every tensor, make the missing state, and lay out the launches, of all parameters or of ``only`` one.

    Raises TypeError, ValueError or RuntimeError for the first tensor that cannot be stepped, naming its group, index
    and shape; nothing has been written then.
    """
    wanted = checks.check_params(owner, lambda p: p.grad is not None and (only is None or p is only))
    if any(item.param.is_cuda for item in wanted.values()) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(owner).__name__}: CUDA graph capture of step() needs tables on the device that cannot be made "
            "during the capture: construct the optimizer with capturable=True, call step() once before the capture, "
            "and change no parameter, state, dtype or layout in between; gradients may move, but none may come or go"
        )
    while True:
        chosen = {slot: _backend_of(owner, item) for slot, item in wanted.items()}
        init_states(owner, wanted)
        try:
            return _lay_out(owner, wanted, chosen, only)
        except backends.CannotRun as error:
            backends.leave_out(error)
            if owner.requested:
                raise


def init_states(owner: Owner, wanted: dict[int, Checked]) -> None:
    """Make the state of checked parameters that is missing, and bring the rest to the form that a step needs."""
    for group in owner.param_groups:
        options.record_seed(group)
    for item in wanted.values():
        _init_state(owner, item.group, item.param, item.names, item.storage)


def init_state(owner: Owner, group: dict[str, Any], p: Tensor) -> None:
    """Make or convert the state of one parameter, whose group is known to be good."""
    names = owner.rule_of(group)[1]
    _init_state(owner, group, p, names, formats.storage_of(p, group, names))


def _init_state(owner: Owner, group: dict[str, Any], p: Tensor, names: tuple[str, ...], storage: Storage) -> None:
    step_device = p.device if counts_on_device(owner, group, p) else torch.device("cpu")
    state.init(owner.state[p], p, names, storage, declared=group.get("state_dtype"), step_device=step_device)


def _lay_out(
    owner: Owner, wanted: dict[int, Checked], chosen: dict[int, backends.Backend], only: Tensor | None
) -> Built:
    groups, states = owner.param_groups, owner.state
    if only is not None:
        (item,) = wanted.values()
        groups, states = [{**item.group, "params": [only]}], {only: owner.state[only]}
    native = backends.native()
    on_device = [counts_on_device(owner, group, p) for group in groups for p in group["params"]]
    watching = (native.Watch if native else watch.Watch)(
        groups, states, on_device, owner.plan_key, owner.family, scalars.HYPER[owner.family]
    )
    turn_of = _overlaps({slot: local(item.param) for slot, item in wanted.items()})
    buckets: dict[Bucket, tuple[backends.Backend, list[Row]]] = {}
    for slot, item in wanted.items():
        formats.warn_of_losses(item.param, item.group, item.names, item.storage)
        row = _row_of(item, owner.state[item.param], 0 if only is not None else slot, slot, owner)
        backend = chosen[slot]
        bucket = Bucket(
            turn=turn_of.get(slot, 0),
            shard_groups=shard_groups(item.param) if owner.scales_gradients else (),
            device=row.p.device,
            backend=backend.name,
            key=backend.bucket(row),
        )
        buckets.setdefault(bucket, (backend, []))[1].append(row)
    plans = []
    for bucket, (backend, rows) in sorted(buckets.items(), key=lambda entry: entry[0].turn):
        copied = [row for row in rows if row.g is not None or row.is_copy()]
        plans.append(Plan(rows, copied, backend.prepare(watching, rows, owner.param_groups), bucket.shard_groups))
    return Built(watching, plans, groups, states)


def _row_of(item: Checked, param_state: state.ParamState, slot: int, index: int, owner: Owner) -> Row:
    p, grad, storage = local(item.param), local(gradient(item.param)), item.storage
    dense = real(p) if same_layout(p, dense_like(p)) else real(torch.empty_like(p))
    as_it_is = same_layout(grad, dense_like(p)) and not grad.is_conj() and not grad.is_neg()
    # The watch cannot see the memory of a pending gradient, which is another one at every step.
    as_it_is = as_it_is and not is_pending(gradient(item.param))
    return Row(
        slot=slot,
        group=item.group_index,
        counts_on_device=counts_on_device(owner, item.group, item.param),
        rule=item.rule,
        param=item.param,
        p=dense,
        states=tuple(real(local(param_state[key])) for key in storage.moments(item.names)),
        step=param_state["step"],
        g=None if as_it_is else torch.empty_like(dense, dtype=real(grad).dtype),
        storage=storage,
        master_data=local(param_state[storage.master_key]) if storage.master_key else None,
        scales=tuple(local(param_state[key]) for key in storage.scales(item.names)),
        seed=int(item.group.get("seed", 0)),
        index=index,
        numbering=shard_numbering(item.param) if storage.stochastic else NOT_SHARDED,
    )


def _overlaps(params: dict[int, Tensor]) -> dict[int, int]:
    """Return the turns, 0, 1 and on, in which parameters with overlapping memory are launched; the rest have none."""
    spans = []
    for slot, p in params.items():
        reach = sum(stride * (size - 1) for size, stride in zip(p.shape, p.stride(), strict=True))
        if p.numel():
            spans.append((str(p.device), p.data_ptr(), p.data_ptr() + (reach + 1) * p.element_size(), slot))
    turns: dict[int, int] = {}
    cluster: list[int] = []
    device, end = "", 0
    for on, first, last, slot in [*sorted(spans), ("", 0, 0, -1)]:
        if on != device or first >= end:
            if len(cluster) > 1:
                turns |= {slot: turn for turn, slot in enumerate(sorted(cluster))}
            cluster, device, end = [], on, last
        cluster.append(slot)
        end = max(end, last)
    return turns


def _backend_of(owner: Owner, item: Checked) -> backends.Backend:
    p, declared = item.param, item.group.get("state_dtype")
    dtypes = {t.to_real() for t in (p.dtype, gradient(p).dtype, formats.state_dtype_of(p, declared))}
    try:
        return backends.pick(p.device, dtypes, bool(item.group.get("capturable")), owner.requested)
    except RuntimeError as error:
        raise RuntimeError(f"{item.where}: {error}") from None
