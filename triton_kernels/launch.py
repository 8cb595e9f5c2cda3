"""The host side of the Triton step: tables that stay on the device, one small upload and one launch per step."""

from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import (
    SCALARS_OPTIONS,
    Variant,
    chunk_size,
    config,
    scalars_kernel,
    step_kernel,
)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
INTERPRETED = not hasattr(step_kernel, "device_caches")  # TRITON_INTERPRET=1 when triton was imported
COLUMNS = 8  # of a row, of a row of scalars, of a row of hyperparameters
SCALARS_BYTES = 4 * COLUMNS


def variant_of(rule: str, p: torch.dtype, g: torch.dtype, state: torch.dtype) -> Variant:
    """The compiled kernel that steps tensors of these dtypes."""
    return Variant(rule, DTYPES[p], DTYPES[g], DTYPES[p if rule == "sgd" else state])


def flat(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return t.view(-1).view(torch.uint8)


def compile_on(device: torch.device, variant: Variant) -> tuple[dict, dict]:
    """Compile for the device without a launch, and return what the launch takes; raises what Triton raises."""
    if INTERPRETED:
        return config(variant, 32)
    with torch.cuda.device(device):
        constexprs, options = config(variant, triton.runtime.driver.active.get_current_target().warp_size)
        tables = (torch.int64, torch.int32, torch.float32)
        step_kernel.warmup(*tables, 1, grid=(1,), **constexprs, **options)
    return constexprs, options


def compile_for_row(row: Any) -> tuple[dict, dict]:
    """Compile what steps this row, and all others of its bucket."""
    states = row.states[0].dtype if row.states else row.p.dtype
    return compile_on(row.p.device, variant_of(row.rule, row.p.dtype, row.grad().dtype, states))


class Launch:
    """The rows of one launch: called with the rows of scalars of a step, it steps them.

    The tables lie in one buffer on the device: rows, scalars, chunks. What changes from step to step (addresses of
    gradients that moved, scalars) goes up in one copy from a pinned tensor, which torch's caching host allocator does
    not hand out again before the copy is done.
    """

    def __init__(self, watch: Any, rows: list[Any], compiled: tuple[dict, dict]) -> None:
        self.watch, self.device = watch, rows[0].p.device
        self.constexprs, self.options = compiled
        self.chunk = chunk_size(sum(row.p.numel() for row in rows))
        # -1 - slot: the gradient is a copy of ours, which stays where it is
        self.slots = torch.tensor([row.slot if row.g is None else -1 - row.slot for row in rows], device="cpu")
        self.host = torch.tensor([self._row(row) for row in rows], device="cpu")
        counts = -(-self.host[:, 5] // self.chunk)
        row_of_chunk = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
        first_chunk = (counts.cumsum(0) - counts)[row_of_chunk]
        index = torch.arange(len(row_of_chunk), device="cpu") - first_chunk
        chunks = torch.stack([row_of_chunk, index], dim=1).int()

        self.grid = (len(chunks),)
        self.rows_bytes = self.host.nbytes
        sizes = [self.rows_bytes, len(rows) * SCALARS_BYTES, chunks.nbytes]
        self.buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        table, scalars, chunk_table = self.buffer.split(sizes)
        chunk_table.copy_(flat(chunks))
        self.tables = table.view(torch.int64), chunk_table.view(torch.int32), scalars.view(torch.float32)
        self.uploaded = False
        self.stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    @staticmethod
    def _row(row: Any) -> list[int]:
        states = [t.data_ptr() for t in row.states] + [0] * (3 - len(row.states))
        return [row.p.data_ptr(), 0 if row.g is None else row.g.data_ptr(), *states, row.p.numel(), 0, 0]

    def __call__(self, scalars: list[tuple[float, ...]]) -> None:
        moved = self.watch.update(self.host, self.slots) or not self.uploaded
        if self.stream is None:  # the interpreter, on CPU tensors
            self._upload(scalars, moved)
            self._launch()
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                self.buffer.record_stream(stream)
            if torch.cuda.is_current_stream_capturing():
                self._capture(scalars)
            else:
                self._upload(scalars, moved)
            self._launch()

    def _upload(self, scalars: list[tuple[float, ...]], moved: bool) -> None:
        values = torch.frombuffer(array("f", chain.from_iterable(scalars)), dtype=torch.uint8)
        self._copy(torch.cat([flat(self.host), values]) if moved else values, 0 if moved else self.rows_bytes)
        self.uploaded = True

    def _copy(self, data: Tensor, offset: int) -> None:
        staging = torch.empty(len(data), dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)
        staging.copy_(data)
        self.buffer[offset : offset + len(data)].copy_(staging, non_blocking=True)

    def _capture(self, scalars: list[tuple[float, ...]]) -> None:
        raise RuntimeError(
            "Attempting CUDA graph capture of step() of an optimizer that was constructed with capturable=False, whose "
            "scalars come from the host: construct it with capturable=True"
        )

    def _launch(self) -> None:
        step_kernel[self.grid](*self.tables, self.chunk, **self.constexprs, **self.options)


class CapturableLaunch(Launch):
    """A launch whose scalars are computed on the device, so that a CUDA graph of it replays with the steps to come.

    Every tensor has a row of scalars of its own, since only the device knows its step. ``hyper(group)`` gives the
    hyperparameters of ``scalars_kernel``; they go up when they changed, outside of any capture.
    """

    def __init__(
        self,
        watch: Any,
        rows: list[Any],
        compiled: tuple[dict, dict],
        groups: list[dict],
        hyper: Callable[[dict], Sequence[float]],
    ) -> None:
        super().__init__(watch, rows, compiled)
        self.groups, self.hyper = groups, hyper
        self.group_of = torch.tensor([row.group for row in rows], device="cpu")
        ends = torch.bincount(self.group_of, minlength=len(groups)).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))  # the rows of each group, which are neighbours
        self.steps = torch.tensor([row.step.data_ptr() for row in rows], device=self.device)
        self.host[:, 6] = torch.arange(len(rows), device="cpu")
        self.table = torch.empty(len(rows), COLUMNS, dtype=torch.float64, device=self.device)
        self.current: list[Sequence[float]] = []
        self.captured: list[Tensor] = []  # graphs copy from these at each replay
        self.spare = self._pinned_rows()  # allocated now: not within a capture

    def _pinned_rows(self) -> Tensor:
        return torch.empty(self.rows_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)

    def _upload(self, scalars: list[tuple[float, ...]], moved: bool) -> None:
        self.refresh()
        if moved:
            self._copy(flat(self.host), 0)
            self.uploaded = True
        if self.spare is None:
            self.spare = self._pinned_rows()

    def refresh(self) -> None:
        """Bring hyperparameters that changed to the device."""
        new = [self.hyper(group) for group in self.groups]
        if new != self.current:
            values = torch.tensor(new, dtype=torch.float64, device="cpu")[self.group_of]
            self.table.copy_(values.pin_memory() if self.stream else values, non_blocking=True)
            self.current = new

    def _capture(self, scalars: list[tuple[float, ...]]) -> None:
        if self.spare is None or not self.current:
            raise RuntimeError("CUDA graph capture of step(): call step() once between two captures, outside of both")
        self.spare.copy_(flat(self.host))
        self.buffer[: self.rows_bytes].copy_(self.spare, non_blocking=True)
        self.captured.append(self.spare)
        self.spare, self.uploaded = None, False

    def _launch(self) -> None:
        for (first, last), group in zip(self.spans, self.groups, strict=True):
            if first < last and isinstance(group["lr"], Tensor):
                self.table[first:last, 0].copy_(group["lr"], non_blocking=True)
        adam = self.constexprs["RULE"].startswith("adam")
        scalars_kernel[(len(self.host),)](self.table, self.steps, self.tables[2], ADAM=adam, **SCALARS_OPTIONS)
        super()._launch()
