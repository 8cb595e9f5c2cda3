"""Turns tensors into plans: the rows that one backend steps in one launch.

A plan has a row for each parameter that has a gradient, or that has state and may have a gradient again. It holds until
a watch sees a parameter, a layout, a dtype or a gradient that it was not built for. Tensors that only moved are
followed, and a row whose gradient is missing is left out of a step. A plan keeps no parameter, gradient or state alive.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import backends, checks, formats, options, scalars, sharing, state, watch
from fused_adamw.checks import Checked
from fused_adamw.contract import Launch, Owner, Row, Scalars, Storage, Watch, counts_on_device
from fused_adamw.norm import Norm
from fused_adamw.tensors import (
    NOT_SHARDED,
    dense_like,
    is_meta,
    is_pending,
    is_sharded,
    local,
    real,
    same_layout,
    shard_numbering,
)


@dataclass(slots=True)
class Plan:
    """Prepares and runs one launch, with the copies that tensors of other layouts need."""

    rows: list[Row]
    copied: list[Row]  # those whose copies are filled before a launch, and brought back after it
    launch: Launch
    device: torch.device
    shard_groups: tuple[Any, ...] = ()  # a key of Built.sharing, where there is one

    def prepare_step(self, owner: Owner, scalars: Scalars) -> None:
        """Make the launch ready for a step."""
        if self.copied:
            with torch.no_grad():
                for row in self.copied:
                    row.copy_gradient(owner)
        self.launch.prepare_step(owner, scalars)

    def run(self, owner: Owner, factor: float | Tensor, count: bool) -> None:
        """Step, with gradients multiplied by ``factor``, and count where ``count``; do nothing if it is negative."""
        if not self.copied:
            self.launch.run(owner, factor, count)
            return
        with torch.no_grad():
            for row in self.copied:
                row.before(owner)
            self.launch.run(owner, factor, count)
            for row in self.copied:
                row.after(owner)


class Bucket(NamedTuple):
    """Tells apart rows that cannot share a launch."""

    turn: int  # launches of an earlier turn come first
    shard_groups: tuple[Any, ...]
    device: torch.device
    backend: str
    key: Hashable  # the backend's own


class GradientKind(NamedTuple):
    """Tells which kind of gradient a row expects; kept while the gradient is missing."""

    dtype: torch.dtype
    copied: bool
    param: tuple[Any, ...]  # the shape and strides of its parameter, made dense: it is valid for these alone


class Built(NamedTuple):
    """Holds plans and the watch over them."""

    watch: Watch
    plans: list[Plan]
    scaling: tuple[bool, bool, Any]  # of scaling_of(), for which they were built
    kinds: dict[int, GradientKind]  # by the id of the parameter
    sharing: dict[tuple[Any, ...], torch.device]
    measured: bool  # some row is
    norm: Norm | None  # None where no step needs one, or torch's operators compute it
    # Polls and steps in one call, where that is all there is to do: returns False if the plans do not hold.
    at_once: Callable[[list[dict], dict, Callable], bool] | None


def scaling_of(owner: Owner) -> tuple[bool, bool, Any]:
    """Return what plans depend on of an optimizer, besides its tensors and groups."""
    return owner.skips_steps, owner.scales_gradients, owner.process_group


def build(owner: Owner, previous: Built | None = None, only: Sequence[Tensor] | None = None) -> Built:
    """Check every tensor, make the missing state, and lay out the launches, of all parameters or of ``only`` some.

    ``previous`` plans tell which gradients there were before. Raises TypeError, ValueError or RuntimeError for the
    first tensor that cannot be stepped, naming its group, index and shape; nothing has been written then.
    """
    if owner.swapped:
        raise RuntimeError(
            f"{type(owner).__name__}: a step within ema_swapped() would move the averages, not the weights: leave the "
            "block first"
        )
    shared = sharing.sharing_of(owner)
    if only is None:
        # A rank that raised alone would leave the others waiting for it in a sum.
        scales = owner.scales_gradients
        checked = checks.check_params(owner, lambda p: p.grad is not None or (scales and _is_summed(p)))
        wanted = {slot: item for slot, item in checked.items() if item.param.grad is not None}
        places = None
    else:
        places = checks.locate(owner, only)
        wanted = checks.check_some(owner, places)
    if any(item.param.is_cuda for item in wanted.values()) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(owner).__name__}: CUDA graph capture of step() needs tables on the device that cannot be made "
            "during the capture: construct the optimizer with capturable=True, call step() once before the capture, "
            "and change no parameter, state, dtype or layout in between; gradients may move, come and go"
        )
    if places is None or len(wanted) < len(places):
        idle = checks.check_idle(owner, wanted, places)
        wanted = dict(
            sorted({**wanted, **{slot: item for slot, item in idle.items() if _is_ready(owner, item)}}.items())
        )
    on_meta = {slot: wanted.pop(slot) for slot, item in list(wanted.items()) if is_meta(item.param)}
    while True:
        chosen = {slot: _backend_of(owner, item) for slot, item in wanted.items()}
        init_states(owner, wanted)
        try:
            built = _lay_out(owner, wanted, chosen, previous, places, shared)
        except backends.CannotRun as error:
            backends.leave_out(error)
            if owner.requested:
                raise
            continue
        # These have no row, so that each step comes here. It counts them, as torch's does, and has nothing to write.
        init_states(owner, on_meta)
        for item in on_meta.values():
            owner.state[item.param]["step"] += 1
        return built


def _is_summed(p: Tensor) -> bool:
    return p.requires_grad and is_sharded(p)


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
    device = _step_device(owner, group, p)
    state.init(owner.state[p], p, names, storage, declared=group.get("state_dtype"), step_device=device)


def _step_device(owner: Owner, group: dict[str, Any], p: Tensor) -> torch.device:
    return p.device if counts_on_device(owner, group, p) else torch.device("cpu")


def _is_ready(owner: Owner, item: Checked) -> bool:
    declared, device = item.group.get("state_dtype"), _step_device(owner, item.group, item.param)
    return state.is_ready(owner.state[item.param], item.param, item.names, item.storage, declared, device)


def _lay_out(
    owner: Owner,
    wanted: dict[int, Checked],
    chosen: dict[int, backends.Backend],
    previous: Built | None,
    places: Mapping[int, tuple[int, int]] | None,
    shared: dict[tuple[Any, ...], torch.device],
) -> Built:
    turn_of = _overlaps({slot: local(item.param) for slot, item in wanted.items()})
    buckets: dict[Bucket, tuple[backends.Backend, list[Row]]] = {}
    kinds: dict[int, GradientKind] = {}
    rows = []
    slots = None if places is None else {index: slot for slot, index in enumerate(places)}
    for index, item in wanted.items():
        formats.warn_of_losses(item.param, item.group, item.names, item.storage)
        dense = dense_like(item.param, item.storage.ordered)
        kind = _gradient_kind(item.param, dense, previous)
        as_before = previous is not None and previous.kinds.get(id(item.param)) is kind
        slot = index if slots is None else slots[index]
        row = _row_of(owner, item, slot, index, dense, kind, as_before)
        backend = chosen[index]
        bucket = Bucket(
            turn=turn_of.get(index, 0),
            shard_groups=sharing.groups_of(owner, item.param) if owner.scales_gradients else (),
            device=row.device,
            backend=backend.name,
            key=backend.bucket(row),
        )
        buckets.setdefault(bucket, (backend, []))[1].append(row)
        rows.append(row)
        kinds[id(item.param)] = kind
    kind_of_watch = _kind_of_watch()
    watching = kind_of_watch(
        owner.param_groups,
        owner.state,
        rows,
        owner.plan_key,
        owner.family,
        scalars.HYPER[owner.family],
        previous.watch if previous and isinstance(previous.watch, kind_of_watch) else None,
        None if places is None else list(places.values()),
    )
    plans = []
    for bucket, (backend, rows) in sorted(buckets.items(), key=lambda entry: entry[0].turn):
        copied = [row for row in rows if row.g_copy is not None or row.p_copy is not None]
        launch = backend.prepare(watching, rows, owner)
        plans.append(Plan(rows, copied, launch, bucket.device, bucket.shard_groups))
    scaling = scaling_of(owner)
    plain = len(plans) == 1 and not plans[0].copied and not scaling[1]
    at_once = getattr(plans[0].launch, "step", None) if plain else None
    measured = any(row.measured for part in plans for row in part.rows)
    return Built(watching, plans, scaling, kinds, shared, measured, _norm_of(plans, shared), at_once)


def _norm_of(plans: list[Plan], shared: dict[tuple[Any, ...], torch.device]) -> Norm | None:
    launches = [(part.shard_groups, part.launch) for part in plans]
    serves = Norm.serves(launches, [*(part.device for part in plans), *shared.values()]) if shared else False
    return Norm(launches, shared) if serves else None


def _gradient_kind(p: Tensor, dense: Tensor, previous: Built | None) -> GradientKind:
    """Return what the row of p is built for: its gradient, or one as there was before, or one as p is."""
    param = (dense.shape, dense.stride())
    before = previous.kinds.get(id(p)) if previous and isinstance(previous.watch, _kind_of_watch()) else None
    if p.grad is None and before and before.param == param:
        return before
    g = local(p if p.grad is None else p.grad)
    as_it_is = same_layout(g, dense) and not g.is_conj() and not g.is_neg()
    # The watch cannot see the memory of a pending gradient, which is another one at every step.
    copied = not as_it_is or (p.grad is not None and is_pending(p.grad))
    return GradientKind(g.dtype.to_real(), copied, param)


def _kind_of_watch() -> Any:
    native = backends.native()
    return native.Watch if native else watch.Watch


def _row_of(
    owner: Owner, item: Checked, slot: int, index: int, dense: Tensor, kind: GradientKind, as_before: bool
) -> Row:
    p, storage = local(item.param), item.storage
    moments = storage.moments(item.names)
    return Row(
        slot=slot,
        group=item.group_index,
        position=item.position,
        index=index,
        device=p.device,
        rule=item.rule,
        p=p.dtype.to_real(),
        g=kind.dtype,
        state=torch.int8 if storage.int8 else (owner.state[item.param][moments[0]] if moments else p).dtype.to_real(),
        numel=p.numel() * (2 if p.is_complex() else 1),
        names=item.names,
        storage=storage,
        p_copy=None if same_layout(p, dense) else real(torch.empty_like(dense, device=p.device)),
        g_copy=real(torch.empty_like(dense, dtype=_like(p, kind.dtype), device=p.device)) if kind.copied else None,
        counts_on_device=counts_on_device(owner, item.group, item.param),
        seed=int(item.group.get("seed", 0)),
        numbering=shard_numbering(item.param) if storage.draws else NOT_SHARDED,
        measured=bool(item.group.get("statistics")),
        as_before=as_before,
    )


def _like(p: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the complex dtype of two such numbers where p is complex, else the dtype itself."""
    return dtype.to_complex() if p.is_complex() else dtype


def _overlaps(params: dict[int, Tensor]) -> dict[int, int]:
    """Return the turns, 0, 1 and on, in which parameters with overlapping memory are launched; the rest have none."""
    if len(params) < 2:
        return {}
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
    g = p if p.grad is None else p.grad
    dtypes = {t.to_real() for t in (p.dtype, g.dtype, formats.state_dtype_of(p, declared))}
    try:
        return backends.pick(p.device, dtypes, bool(item.group.get("capturable")), owner.requested)
    except RuntimeError as error:
        raise RuntimeError(f"{item.where}: {error}") from None
