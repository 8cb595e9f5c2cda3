"""Compares with what plans were built from, at each step: ``_C.Watch`` in Python, for when that is not built."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_adamw import scalars
from fused_adamw.contract import Scalars
from fused_adamw.layout import ADDRESSES, ALIGNED, COL_FLAGS, COL_GRAD, COL_SCALARS, SHARD_ALIGNED
from fused_adamw.tensors import is_dtensor, local


class Watch:
    """Implements ``contract.Watch``. The last argument, which computes hyperparameters, is for the Watch in C++."""

    def __init__(
        self, groups: list[dict], state: dict, on_device: list[bool], plan_key: Callable, family: str, _: Callable
    ) -> None:
        self.groups, self.state, self.family = groups, state, family
        self.slots = [(i, p) for i, group in enumerate(groups) for p in group["params"]]
        self.step = [
            None if on_its_device or p.grad is None or p not in state else state[p]["step"]
            for on_its_device, (_, p) in zip(on_device, self.slots, strict=True)
        ]
        self.index = [-1] * len(self.slots)
        self.seen = self._look(plan_key)
        self.held = [list(own.items()) for own in state.values()]  # an id is good while its object lives

    def _look(self, plan_key: Callable) -> list:
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
        return [params, states, [plan_key(group) for group in self.groups]]

    def poll(self, groups: list[dict], state: dict, plan_key: Callable) -> bool:
        return groups is self.groups and state is self.state and self._look(plan_key) == self.seen

    def scalar_rows(self) -> Scalars:
        distinct: dict[tuple[int, float], int] = {}
        for slot, ((group, _), step) in enumerate(zip(self.slots, self.step, strict=True)):
            if step is not None:
                self.index[slot] = distinct.setdefault((group, float(step) + 1), len(distinct))
        return [scalars.ROWS[self.family](self.groups[group], step) for group, step in distinct]

    def advance(self) -> None:
        stepped = [p for _, p in self.slots if p.grad is not None]
        torch.autograd.graph.increment_version([*stepped, *(local(p) for p in stepped if is_dtensor(p))])
        for step in self.step:
            if step is not None:
                step += 1

    def upload(
        self, rows: Tensor, slots: Tensor, scalars: list, buffer: Tensor, every: bool, staging: Tensor | None
    ) -> None:
        before = rows.clone()
        for row, slot in zip(rows, slots.tolist(), strict=True):
            if slot >= 0:
                row[COL_GRAD] = local(self.slots[slot][1].grad).data_ptr()
            slot = max(slot, -1 - slot)
            if self.step[slot] is not None:
                row[COL_SCALARS] = self.index[slot]
            shard_aligned = row[COL_FLAGS] & SHARD_ALIGNED
            aligned = shard_aligned and not any(int(row[i]) % 16 for i in ADDRESSES)
            row[COL_FLAGS] = shard_aligned | ALIGNED * bool(aligned)
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
        return self.index[slot]
