"""Tensors → plans: every check of the tensors happens here and only here, before anything is written.

A plan is a list of rows, one per tensor, that one backend steps in one launch. It is built once and holds until a
``Watch`` sees that a tensor, a layout or a state is not what it was built from; a gradient that only moved is followed.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from fused_adamw import backends, formats, options, scalars, state

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from fused_adamw.optimizers import FusedOptimizer


@dataclass(slots=True)
class Row:
    """One tensor of a launch. ``p`` and ``states`` are real, dense and laid out alike; so is ``grad()``.

    Of a DTensor, ``p``, ``states`` and ``grad()`` are the shards of this rank.
    """

    slot: int  # position among the parameters that are watched
    group: int
    on_device: bool  # its steps are counted there
    rule: str  # "adam", "adam_amsgrad", "sgd", "sgd_momentum"
    param: Tensor  # as the user gave it
    p: Tensor  # what is stepped: the parameter's memory, or a dense copy of what is not dense
    states: tuple[Tensor, ...]
    step: Tensor
    g: Tensor | None  # a copy of the gradient in p's layout, where its own differs
    form: formats.Kept
    extra: Tensor | None  # what the master holds
    scales: tuple[Tensor, ...]  # of int8 states
    seed: int  # of stochastic rounding
    index: int  # position among all parameters of all groups, which it draws by
    place: tuple[int, int, int]  # of its elements in the whole parameter: offset, run, skip of csrc/step.h

    @property
    def master(self) -> str:
        """A key of formats.MASTERS, or "none"."""
        return self.form.master

    @property
    def stochastic(self) -> bool:
        """Whether anything of the row is rounded stochastically."""
        return self.form.stochastic

    @property
    def second(self) -> int:
        """Which of the states is a second moment; -1 if none."""
        return 1 if self.rule.startswith("adam") else -1

    def grad(self) -> Tensor:
        return self.g if self.g is not None else real(local(gradient(self.param)))

    def copy_gradient(self) -> None:
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
        """Whether the parameter itself is not dense."""
        return self.p.data_ptr() != local(self.param).data_ptr()


@dataclass(slots=True)
class Plan:
    """The rows of one launch."""

    rows: list[Row]
    copied: list[Row]  # those with copies to fill before, and to bring back after
    launch: "backends.Launch"
    sharded_over: tuple[Any, ...] = ()  # process groups, where a norm is asked for

    @property
    def device(self) -> torch.device:
        return self.rows[0].p.device

    def bring(self, scalars: "backends.Scalars") -> None:
        """Make the launch ready for a step."""
        if self.copied:
            with torch.no_grad():
                for row in self.copied:
                    row.copy_gradient()
        self.launch.bring(scalars)

    def run(self, factor: "float | Tensor") -> None:
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


class Watch:
    """What plans were built from, compared anew at each step: ``_C.Watch`` in Python, for when that is not built."""

    def __init__(
        self, groups: list[dict], state: dict, on_device: list[bool], kind: Callable, rule: str, _: Callable
    ) -> None:
        self.groups, self.state, self.rule = groups, state, rule
        self.slots = [(i, p) for i, group in enumerate(groups) for p in group["params"]]
        self.step = [
            None if there or p.grad is None or p not in state else state[p]["step"]
            for there, (_, p) in zip(on_device, self.slots, strict=True)
        ]
        self.index = [-1] * len(self.slots)
        self.seen = self._look(kind)
        self.held = [list(own.items()) for own in state.values()]  # an id is good while its object lives

    def _look(self, kind: Callable) -> list:
        def tensor(t: Tensor | None) -> tuple:
            if t is None:
                return ()
            sharding = (t.device_mesh, t.placements) if is_dtensor(t) else ()
            t = local(t)
            return (t.dtype, t.device, t.layout, t.shape, t.stride(), t.is_conj(), t.is_neg(), *sharding)

        params = [
            (i, id(p), local(p).data_ptr(), tensor(p), tensor(p.grad))
            for i, g in enumerate(self.groups)
            for p in g["params"]
        ]
        states = [
            (
                id(p),
                id(own),
                [
                    (k, id(t), *((local(t).data_ptr(), tensor(t)) if isinstance(t, Tensor) else ()))
                    for k, t in own.items()
                ],
            )
            for p, own in self.state.items()
        ]
        return [params, states, [kind(group) for group in self.groups]]

    def poll(self, groups: list[dict], state: dict, kind: Callable) -> bool:
        """Whether the plans still hold."""
        return groups is self.groups and state is self.state and self._look(kind) == self.seen

    def rows(self) -> "backends.Scalars":
        """The rows of scalars of the step to come, one for each distinct (group, step); a slot knows its own."""
        distinct: dict[tuple[int, float], int] = {}
        for slot, ((group, _), step) in enumerate(zip(self.slots, self.step, strict=True)):
            if step is not None:
                self.index[slot] = distinct.setdefault((group, float(step) + 1), len(distinct))
        return [scalars.ROWS[self.rule](self.groups[group], step) for group, step in distinct]

    def advance(self) -> None:
        """Count the step, and tell autograd that the parameters have changed."""
        stepped = [p for _, p in self.slots if p.grad is not None]
        torch.autograd.graph.increment_version([*stepped, *(local(p) for p in stepped if is_dtensor(p))])
        for step in self.step:
            if step is not None:
                step += 1

    def upload(
        self, rows: Tensor, slots: Tensor, scalars: list, buffer: Tensor, every: bool, staging: Tensor | None
    ) -> None:
        """Bring the tables of a launch to this step: the rows, if any changed or ``every``, and the rows of scalars.

        ``rows`` is a copy of the table on the host. Its column 1 is the address of the gradient (kept for a slot of
        -1 - slot), column 6 the index of the row of scalars (kept for parameters whose steps are not counted here),
        bit 0 of column 7 whether all addresses are aligned and bit 1, which is kept, set. One copy from pinned memory,
        which torch's caching allocator does not hand out again before it is done; a graph, which copies at each replay,
        brings its own ``staging``.
        """
        before = rows.clone()
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot >= 0:
                row[1] = local(self.slots[slot][1].grad).data_ptr()
            slot = max(slot, -1 - slot)
            if self.step[slot] is not None:
                row[6] = self.index[slot]
            row[7] = row[7] & 2 | int(row[7] & 2 and not any(int(row[i]) % 16 for i in (0, 1, 2, 3, 4, 8, 9, 10)))
        every = every or not torch.equal(before, rows)
        values = torch.tensor(scalars, dtype=torch.float32, device="cpu")
        data = torch.cat([t.view(-1).view(torch.uint8) for t in ([rows] if every else []) + [values]])
        if len(data):
            if staging is None:
                staging = torch.empty(len(data), dtype=torch.uint8, device="cpu", pin_memory=buffer.is_cuda)
            staging.copy_(data)
            start = 0 if every else rows.nbytes
            buffer[start : start + len(data)].copy_(staging, non_blocking=True)

    def scalars_of(self, slot: int) -> int:
        """Index of the row of scalars that this parameter is stepped with."""
        return self.index[slot]


def build(optimizer: "FusedOptimizer", only: Tensor | None = None) -> tuple[Any, list[Plan], tuple[list, dict]]:
    """Check every tensor, make the missing state, and lay out the launches, of all parameters or of ``only`` one.

    Returns the watch, the plans, and what the watch is to be polled with. Raises TypeError, ValueError or RuntimeError
    for the first tensor that cannot be stepped, naming its group, index and shape; nothing has been written then.
    """
    live = checked(optimizer, lambda p: p.grad is not None and (only is None or p is only))
    if any(p.is_cuda for *_, p in live.values()) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(optimizer).__name__}: CUDA graph capture of step() needs tables on the device that cannot be made "
            "during the capture: construct the optimizer with capturable=True, call step() once before the capture, "
            "and change no parameter, state, dtype or layout in between; gradients may move, but none may come or go"
        )
    chosen = {slot: _backend_of(optimizer, at, group, p) for slot, (at, _, group, p) in live.items()}
    for *_, group, p in live.values():
        optimizer.init_state_of(group, p)

    watched: tuple[list[dict[str, Any]], dict[Tensor, Any]] = optimizer.param_groups, optimizer.state
    index = {slot: slot for slot in live}
    if only is not None:
        ((slot, (_, _, group, _)),) = live.items()
        live, chosen, index = {0: live[slot]}, {0: chosen[slot]}, {0: slot}
        watched = [{**group, "params": [only]}], {only: optimizer.state[only]}
    native = backends.native()
    there = [optimizer.counts_on_device(group, p) for group in watched[0] for p in group["params"]]
    watch = (native.Watch if native else Watch)(
        *watched, there, optimizer.kind_of, optimizer.rule, scalars.HYPER[optimizer.rule]
    )
    later = _overlaps({slot: local(p) for slot, (*_, p) in live.items()})
    buckets: dict[Any, tuple[backends.Backend, list[Row]]] = {}
    for slot, (_, i, group, param) in live.items():
        rule, names = optimizer.rule_of(group)
        own, form = optimizer.state[param], formats.kept(param, group, names)
        formats.warn_of_losses(param, group, names, form)
        states = tuple(real(local(own[name])) for name in form.moments(names))
        extra = local(own[form.extra]) if form.extra else None
        scales = tuple(local(own[name]) for name in form.scales(names))
        place = place_of(param) if form.stochastic else formats.WHOLE
        p, grad = local(param), local(gradient(param))
        dense = real(p) if same_layout(p, dense_like(p)) else real(torch.empty_like(p))
        plain = same_layout(grad, dense_like(p)) and not grad.is_conj() and not grad.is_neg()
        plain = plain and not _pending(gradient(param))  # its memory is out of the watch's sight, at every step anew
        g = None if plain else torch.empty_like(dense, dtype=real(grad).dtype)
        kind = form, extra, scales, int(group.get("seed", 0)), index[slot], place
        row = Row(slot, i, there[slot], rule, param, dense, states, own["step"], g, *kind)
        backend = chosen[slot]
        over = sharded_over(param) if optimizer.scales() else ()
        key = later.get(slot, 0), over, p.device, backend.name, backend.bucket(row)
        buckets.setdefault(key, (backend, []))[1].append(row)
    plans = []
    for (_, over, *_), (backend, rows) in sorted(buckets.items(), key=lambda item: item[0][0]):
        copied = [row for row in rows if row.g is not None or row.is_copy()]
        try:
            plans.append(Plan(rows, copied, backend.prepare(watch, rows, optimizer.param_groups), over))
        except backends.CannotRun:
            if optimizer.requested:
                raise
            return build(optimizer, only)  # the backend is known to be broken now, and another is chosen
    return watch, plans, watched


def _overlaps(params: dict[int, Tensor]) -> dict[int, int]:
    """Parameters whose memory overlaps that of others, and which launch, one after the other, each has to be in."""
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


def checked(optimizer: "FusedOptimizer", wanted: Callable[[Tensor], bool]) -> dict[int, tuple[str, int, dict, Tensor]]:
    """For every slot of a wanted parameter, now known to be good: its place in words, its group, and itself."""
    live: dict[int, tuple[str, int, dict, Tensor]] = {}
    seen: dict[int, tuple[int, int]] = {}
    for i, group in enumerate(optimizer.param_groups):
        optimizer.check(group, i)  # options may have been set by hand
        if group.get("rounding") == "stochastic":
            group.setdefault("seed", 0)
        for j, p in enumerate(group["params"]):
            slot = len(seen)
            if seen.setdefault(id(p), (i, j)) != (i, j):
                raise ValueError(
                    f"{_place(optimizer, i, j)} is {_place(optimizer, *seen[id(p)])} as well, and would be stepped "
                    "twice: give every parameter once"
                )
            if wanted(p):
                at, names = _place(optimizer, i, j), optimizer.rule_of(group)[1]
                _check(at, p, group, names, optimizer.state.get(p, {}))
                live[slot] = at, i, group, p
    return live


def _place(optimizer: "FusedOptimizer", i: int, j: int) -> str:
    group = optimizer.param_groups[i]
    names, shape = group.get("param_names", ()), list(group["params"][j].shape)
    name = f"{names[j]!r}, " if len(names) == len(group["params"]) else ""
    return f"{type(optimizer).__name__}: group {i}, parameter {j} ({name}shape {shape})"


def _backend_of(optimizer: "FusedOptimizer", at: str, group: dict, p: Tensor) -> "backends.Backend":
    dtypes = {p.dtype.to_real(), gradient(p).dtype.to_real(), state_dtype_of(p, group.get("state_dtype")).to_real()}
    try:
        return backends.pick(p.device, dtypes, bool(group.get("capturable")), optimizer.requested)
    except RuntimeError as error:
        raise RuntimeError(f"{at}: {error}") from None


def check_formats(at: str, p: Tensor, group: Mapping[str, Any], names: tuple[str, ...], own: dict) -> None:
    """Raise TypeError or ValueError where p cannot be kept as its group asks, or codes have not their scales."""
    try:
        form = formats.kept(p, group, names)
        if form.stochastic:
            place_of(p)
        if form.int8 and is_dtensor(p) and sharded_over(p) and (place_of(p)[2] or blocks_across(p) is None):
            raise TypeError(
                f"it is placed {p.placements}, which cuts the blocks of {formats.BLOCK} elements that share a scale of "
                "int8 moments: shard it along the first dimension, the others a multiple of that, or give its group "
                "state_dtype=torch.bfloat16"
            )
        state.check_codes(own)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{at}: {error}") from None


def _check(at: str, p: Tensor, group: dict, names: tuple[str, ...], own: dict) -> None:
    check_formats(at, p, group, names, own)
    states = dict(state.shaped(own, names))
    others = {f"its state {name!r}": value for name, value in states.items()}
    check_sharding(at, p, others if p.grad is None else {"its gradient": p.grad, **others})
    p, g, states = local(p), p.grad, {name: local(value) for name, value in states.items()}
    g = p if g is None else local(g)  # without one, the state alone is to be made
    for name, t in (("the parameter", p), ("its gradient", g), *((f"its state {k!r}", t) for k, t in states.items())):
        if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(
                f"{at}: {name} is a {type(t).__name__}, a subclass of Tensor whose memory only its own operators "
                "understand: give the optimizer plain tensors or DTensors of plain tensors"
            )
    if g is not p and g.layout is not torch.strided:
        raise RuntimeError(
            f"{at}: its gradient is sparse ({g.layout}), and a fused step needs dense ones: make the layer with "
            "sparse=False, or give this parameter to torch.optim.SparseAdam or torch.optim.SGD"
        )
    if p.layout is not torch.strided:
        raise TypeError(f"{at}: its layout is {p.layout}, and only dense parameters can be stepped: use p.to_dense()")
    for name, t in (("the parameter", p), ("its gradient", g)):
        if t.dtype.to_real() not in options.DTYPES:
            raise TypeError(
                f"{at}: {name} is {t.dtype}; only float32, bfloat16, float16, float64 and complex of these can be "
                "stepped: convert it, or leave the parameter out of the optimizer"
            )
        if t.numel() and not _has_memory(t):
            raise TypeError(
                f"{at}: {name} is a {type(t).__name__} on {t.device} without memory of its own (a null data pointer), "
                "so there is nothing to step: move it to a real device"
            )
    if g.shape != p.shape:
        raise ValueError(f"{at}: its gradient has shape {list(g.shape)}: set p.grad = None and run backward again")
    if g.device != p.device:
        raise ValueError(f"{at}: the parameter is on {p.device}, its gradient on {g.device}: move one to the other")
    if p.is_complex() != g.is_complex():
        raise TypeError(f"{at}: the parameter is {p.dtype}, its gradient {g.dtype}: both real or both complex")
    if p.is_conj() or p.is_neg():
        raise ValueError(f"{at}: it is a conjugate or negative view: use p.resolve_conj().resolve_neg()")
    if any(stride == 0 and size > 1 for size, stride in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"{at}: its elements share memory (an expanded tensor): use p.clone()")
    for name, value in states.items():
        if value.numel() and not _has_memory(value):
            raise ValueError(
                f"{at}: the memory of its state {name!r} is gone: load a checkpoint or del optimizer.state[p]"
            )
        if value.shape != p.shape:
            raise ValueError(
                f"{at}: its state {name!r} has shape {list(value.shape)}: it belongs to another parameter, or the "
                "parameter was resized; load the right checkpoint or del optimizer.state[p]"
            )
    if (p.is_complex() or p.dtype is torch.float64) and group.get("state_dtype") in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"{at}: {p.dtype} with state_dtype={group['state_dtype']} is not supported: give this group "
            "state_dtype=torch.float32 or torch.float64"
        )


def check_sharding(at: str, p: Tensor, others: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError where one of the others, by name, is not sharded as p is."""
    kinds = {name: "DTensor" if is_dtensor(t) else type(t).__name__ for name, t in others.items()}
    if is_dtensor(p):
        where = f"it is placed {p.placements} on {p.device_mesh}"
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"{at}: {where}, and a sum cannot be stepped by its terms: use p.redistribute(...)")
    for name, t in others.items():
        remedy = (
            "del optimizer.state[p], or load with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, "
            "which shards a state as its parameter"
        )
        if is_dtensor(p) != is_dtensor(t):
            if name == "its gradient":
                remedy = "set p.grad = None and run backward again"
            kind = "DTensor" if is_dtensor(p) else type(p).__name__
            raise TypeError(f"{at}: the parameter is a {kind}, {name} a {kinds[name]}: {remedy}")
        if is_dtensor(p) and is_dtensor(t) and (t.device_mesh != p.device_mesh or t.placements != p.placements):
            if name == "its gradient":
                remedy = "p.grad = p.grad.redistribute(p.device_mesh, p.placements) before the step"
                if t.device_mesh != p.device_mesh:
                    remedy = "make the gradient on the parameter's mesh"
            raise ValueError(f"{at}: {where}, {name} {t.placements} on {t.device_mesh}: {remedy}")


def gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter that was found to have one."""
    assert p.grad is not None
    return p.grad


def is_dtensor(t: Tensor) -> TypeGuard["DTensor"]:
    """Whether t is a DTensor; without importing what that takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """What this rank holds of a DTensor, not copied; any other tensor itself."""
    if not is_dtensor(t):
        return t
    t = _shard(t)
    return t.wait() if hasattr(t, "wait") else t


def _shard(t: Any) -> Tensor:
    with torch.no_grad():  # or it would be a view with a history
        return t.to_local()


def _pending(t: Tensor) -> bool:
    """Whether the shard is the result of a collective that may still run, and a wrapper of what will hold it."""
    return is_dtensor(t) and hasattr(_shard(t), "wait")


def sharded_over(p: Tensor) -> tuple[Any, ...]:
    """The process groups whose ranks hold different elements of p: one for each dimension of the mesh that shards it.

    A sum over the elements on this rank is that over all of p once it is summed over each of these groups in turn; a
    plain or replicated parameter has none.
    """
    if not is_dtensor(p):
        return ()
    return tuple(p.device_mesh.get_group(i) for i, q in enumerate(p.placements) if not q.is_replicate())


def place_of(p: Tensor) -> tuple[int, int, int]:
    """Where the elements of this rank lie in the whole of p: offset, run, skip of csrc/step.h."""
    if not is_dtensor(p):
        return formats.WHOLE
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    offset, run, skip, inner = 0, *formats.WHOLE[1:], 1
    for d in reversed(range(p.dim())):
        offset += start[d] * inner
        if shape[d] != p.shape[d] and any(size != 1 for size in shape[:d]):
            if skip:
                raise TypeError(
                    f"it is placed {p.placements}, which leaves a rank pieces of pieces, and stochastic rounding "
                    'numbers the elements: give its group rounding="nearest", or shard it along one dimension'
                )
            run, skip = shape[d] * inner, (p.shape[d] - shape[d]) * inner
        inner *= p.shape[d]
    return offset, max(run, 1), skip


def blocks_across(p: Tensor) -> int | None:
    """How many blocks that share a scale there are to each index of p's first dimension; None if some go across it."""
    inner = math.prod(p.shape[1:])
    return inner // formats.BLOCK if p.dim() > 1 and inner % formats.BLOCK == 0 and p.is_contiguous() else None


def _has_memory(t: Tensor) -> bool:
    try:
        return t.data_ptr() != 0
    except RuntimeError:  # "Cannot access data pointer of Tensor that doesn't have storage"
        return False


def real(t: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of 2; a conjugate view is resolved by the copy it needs."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def dense_like(p: Tensor) -> Tensor:
    """A tensor without memory, in the dense layout nearest to p's: its own, if that has no gaps."""
    return torch.empty_like(p, device="meta")


def state_dtype_of(p: Tensor, declared: torch.dtype | None) -> torch.dtype:
    """The dtype of p's state: the declared one, else float32 or wider; of the few that int8 leaves as they are too."""
    dtype = (None if declared in formats.INT8 else declared) or torch.promote_types(p.dtype.to_real(), torch.float32)
    return dtype.to_complex() if p.is_complex() else dtype


def state_like(p: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised state of p, laid out as the dense p."""
    return torch.empty_like(p, dtype=dtype, requires_grad=False)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether elements of equal index lie at equal offsets."""
    return a.numel() == 0 or _steps(a) == _steps(b)


def _steps(t: Tensor) -> Sequence[int]:
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
