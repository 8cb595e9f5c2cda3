"""Follows the tensors that plans were built from: ``_C.Watch`` in Python, for when that is not built."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_adamw import scalars
from fused_adamw.contract import Row, Scalars
from fused_adamw.layout import (
    ADDRESSES,
    ALIGNED,
    COL_FLAGS,
    COL_GRAD,
    COL_NUMEL,
    COL_PARAM,
    COL_SCALARS,
    COLUMNS,
    SHARD_ALIGNED,
)
from fused_adamw.tensors import has_memory, is_dtensor, is_pending, local

STEP = -1  # in the place of a column: the address of the counter


@dataclass(slots=True)
class Watched:
    """Holds what a plan depends on of a parameter, and the addresses that a step reads and writes."""

    param: int  # its id
    group: int
    position: int
    row: Row | None = None
    keys: list = field(default_factory=list)  # of the state
    kinds: dict[str, tuple] = field(default_factory=dict)  # of "param", "grad", and what a step takes from the state
    addresses: dict[int, int] = field(default_factory=dict)  # by column
    live: bool = False
    scalars: int = -1


def kind(t: Tensor) -> tuple:
    """Return all that a plan depends on of a tensor but its address."""
    sharding = (t.device_mesh, t.placements) if is_dtensor(t) else ()
    t = local(t)
    return (t.dtype, t.device, t.layout, t.shape, t.stride(), t.is_conj(), t.is_neg(), *sharding)


def strings(own: dict) -> list[str | None]:
    """Return the keys of a state, None for one that is no string, and may hold a tensor."""
    return [key if isinstance(key, str) else None for key in own]


def reach(t: Tensor) -> int:
    """Return how many bytes there are from the first element of t to the end of its last."""
    return (sum(stride * (size - 1) for size, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


class Watch:
    """Implements ``contract.Watch``; see ``csrc/watch.h`` for the arguments."""

    def __init__(
        self,
        groups: list[dict],
        state: dict,
        rows: list[Row],
        plan_key: Callable,
        family: str,
        _: Callable,
        previous: "Watch | None",
        only: list[tuple[int, int]] | None,
    ) -> None:
        self.family = family
        self.partial = only is not None
        everything = [(i, j) for i, group in enumerate(groups) for j in range(len(group["params"]))]
        self.entries = [Watched(id(groups[i]["params"][j]), i, j) for i, j in (everything if only is None else only)]
        self.offsets = self._offsets(groups)
        self.options = self._options(groups, plan_key)
        before = {e.param: e for e in previous.entries if e.row} if previous else {}
        for row in rows:
            entry, p = self.entries[row.slot], groups[row.group]["params"][row.position]
            entry.row = row
            grad = p.grad if p.grad is not None else p
            remembered = before[id(p)].kinds["grad"] if row.as_before and id(p) in before else kind(grad)
            tensors = {key: t for key, t in state[p].items() if key in row.columns or key == "step"}
            entry.keys = strings(state[p])
            entry.kinds = {"param": kind(p), "grad": remembered} | {key: kind(t) for key, t in tensors.items()}
            copies = {COL_PARAM: row.p_copy, COL_GRAD: row.g_copy}
            entry.addresses = {column: t.data_ptr() for column, t in copies.items() if t is not None}
        self.params: list[Tensor] = []  # within a step
        # Parameters that share memory now have launches of their own.
        self.spans = self._spans([groups[e.group]["params"][e.position] for e in self.entries])
        if not self.poll(groups, state, plan_key):
            raise ValueError("the memory of a parameter or its state is gone")

    def _options(self, groups: list[dict], plan_key: Callable) -> list:
        used = {entry.group for entry in self.entries} if self.partial else range(len(groups))
        return [plan_key(groups[i]) for i in used]

    def _offsets(self, groups: list[dict]) -> list[int]:
        """Return how many parameters come before each group that is watched."""
        sizes = [len(group["params"]) for group in groups]
        return [sum(sizes[: entry.group]) for entry in self.entries]

    def poll(self, groups: list[dict], state: dict, plan_key: Callable) -> bool:
        lists = [group["params"] for group in groups]
        if not self.partial:
            if [(e.group, e.param) for e in self.entries] != [(i, id(p)) for i, ps in enumerate(lists) for p in ps]:
                return False
        elif self._offsets(groups) != self.offsets or any(
            len(lists) <= e.group or len(lists[e.group]) <= e.position for e in self.entries
        ):
            return False
        params = [lists[e.group][e.position] for e in self.entries]
        if any(id(p) != e.param for p, e in zip(params, self.entries, strict=True)):
            return False
        if self._options(groups, plan_key) != self.options:
            return False
        if not all(self._follow(e, p, state) for e, p in zip(self.entries, params, strict=True)):
            return False
        self.params = [p for e, p in zip(self.entries, params, strict=True) if e.live]
        self.steps = [state[p]["step"] for e, p in zip(self.entries, params, strict=True) if self._counts(e)]
        before, self.spans = self.spans, self._spans(params)
        if before == self.spans:
            return True
        if any(first + size > second for (first, size), (second, _) in itertools.pairwise(sorted(self.spans))):
            self.spans = []
            return False
        return True

    @staticmethod
    def _counts(entry: Watched) -> bool:
        return entry.live and entry.row is not None and not entry.row.counts_on_device

    def _follow(self, entry: Watched, p: Tensor, state: dict) -> bool:
        entry.live, row = p.grad is not None, entry.row
        if row is None:
            return not entry.live
        own = state.get(p)
        if not isinstance(own, dict) or strings(own) != entry.keys:
            return False
        tensors: list[tuple[str, int, Any]] = [("param", COL_PARAM, p)] if row.p_copy is None else []
        if entry.live and row.g_copy is None:
            tensors.append(("grad", COL_GRAD, p.grad))
        tensors += [(key, row.columns.get(key, STEP), own[key]) for key in list(entry.kinds)[2:]]
        if kind(p) != entry.kinds["param"] or (p.grad is not None and kind(p.grad) != entry.kinds["grad"]):
            return False
        for key, column, t in tensors:
            if not isinstance(t, Tensor) or kind(t) != entry.kinds[key]:
                return False
            t = local(t)
            if t.numel() and not has_memory(t):
                return False
            entry.addresses[column] = t.data_ptr()
        if p.grad is None or not row.numel:
            return True
        if row.g_copy is None:
            first, other, whole = entry.addresses[COL_PARAM], entry.addresses[COL_GRAD], local(p.grad)
            return first == other or not (first < other + reach(whole) and other < first + reach(local(p)))
        return is_pending(p.grad) or has_memory(local(p.grad))

    def _spans(self, params: list[Tensor]) -> list[tuple[int, int]]:
        planned = [local(p) for e, p in zip(self.entries, params, strict=True) if e.row is not None and e.row.numel]
        return [(p.data_ptr(), reach(p)) for p in planned]

    def scalar_rows(self, groups: list[dict]) -> Scalars:
        distinct: dict[tuple[int, float], int] = {}
        steps = iter(self.steps)
        for entry in filter(self._counts, self.entries):
            entry.scalars = distinct.setdefault((entry.group, float(next(steps)) + 1), len(distinct))
        return [scalars.ROWS[self.family](groups[group], step) for group, step in distinct]

    def device_hypers(
        self, groups: list[dict], some: list[int], values: Tensor, rates: Tensor, device: torch.device
    ) -> tuple[bool, list[int]]:
        before, unreadable = (values.clone(), rates.clone()), []
        for i in some:
            group, lr = groups[i], groups[i]["lr"]
            try:
                values[i] = torch.tensor(scalars.HYPER[self.family](group), dtype=torch.float64, device="cpu")
            except (KeyError, TypeError, ValueError):  # nobody reads the options of a group without gradients
                if any(p.grad is not None for p in group["params"]):
                    raise
                continue
            if not scalars.is_on_device(lr):
                rates[i] = 0
            elif lr.device != device or lr.dtype not in (torch.float32, torch.float64) or is_dtensor(lr):
                unreadable.append(i)
            else:
                rates[i] = lr.data_ptr() if lr.dtype is torch.float64 else ~lr.data_ptr()
        return not all(map(torch.equal, before, (values, rates))), unreadable

    def advance(self) -> None:
        torch.autograd.graph.increment_version([*self.params, *(local(p) for p in self.params if is_dtensor(p))])
        for step in self.steps:
            step += 1
        self.params, self.steps = [], []

    def update(self, table: Tensor, slots: Tensor) -> bool:
        before, n = table.clone(), len(slots)
        rows, steps = table[: n * COLUMNS].view(n, COLUMNS), table[n * COLUMNS :]
        for i, slot in enumerate(slots.tolist()):
            row, entry = rows[i], self.entries[slot]
            for column in ADDRESSES:
                row[column] = entry.addresses.get(column, 0)
            numel = max(int(row[COL_NUMEL]), ~int(row[COL_NUMEL]))
            row[COL_NUMEL] = numel if entry.live else ~numel
            if len(steps):
                steps[i] = entry.addresses[STEP] if entry.live else 0
            elif entry.live:
                row[COL_SCALARS] = entry.scalars
            fixed = row[COL_FLAGS] & ~ALIGNED
            aligned = fixed & SHARD_ALIGNED and not any(int(row[i]) % 16 for i in ADDRESSES)
            row[COL_FLAGS] = fixed | ALIGNED * bool(aligned)
        return not torch.equal(before, table)

    def upload(self, table: Tensor, slots: Tensor, scalars: list, buffer: Tensor, every: bool) -> None:
        every = self.update(table, slots) or every
        values = torch.tensor(scalars, dtype=torch.float32, device="cpu")
        data = torch.cat([t.view(-1).view(torch.uint8) for t in ([table] if every else []) + [values]])
        if len(data):
            staging = data.pin_memory() if buffer.is_cuda else data
            start = 0 if every else table.nbytes
            buffer[start : start + len(data)].copy_(staging, non_blocking=True)

    def any_live(self) -> bool:
        return any(entry.live for entry in self.entries)

    def scalars_of(self, slot: int) -> int:
        return self.entries[slot].scalars
