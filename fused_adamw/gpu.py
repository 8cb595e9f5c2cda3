"""Prepares and runs launches on a GPU: tables that stay on the device, one small upload and one launch per step.

``layout.py`` tells what is in the tables.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_adamw.contract import Owner, Row, Scalars, Watch
from fused_adamw.layout import (
    COL_FLAGS,
    COL_INDEX,
    COL_NUMEL,
    COL_OFFSET,
    COL_RUN,
    COL_SCALARS,
    COL_SEED,
    COL_SKIP,
    COLUMNS,
    HYPER_LR,
    HYPERS,
    SCALARS,
    SCALARS_BYTES,
    SHARD_ALIGNED,
)
from fused_adamw.scalars import is_on_device


class Kernels(Protocol):
    """Launches the compiled kernels of a bucket, on the current device and stream."""

    def step(self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor) -> None:
        """Step every element; ``chunk`` is the number of elements of a chunk, a multiple of 128: no two share a scale.

        Gradients are multiplied by ``factor``, float32 of one element; where that is negative nothing is done.
        """

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        """Write the sums of the squares of the gradients of each chunk, float64."""

    def scalars(self, hyper: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        """Advance the float32 counters at the addresses ``steps``, and compute their rows of scalars from ``hyper``.

        An address of 0 is of a row without a gradient, which has no scalars in this step.

        A negative ``factor`` leaves all as it is, as it does in a step.
        """


def chunk_size(numel: int, heavy: bool = False) -> int:
    """Return the elements per program of a launch over ``numel`` elements; without clipping no bit depends on it.

    While its last programs run, most of a GPU is idle: for 7 us with 16384 elements each on a list of 124 M, by a model
    of an H200, for 2 to 4 us with 4096. The start of a program costs 110 instructions per thread and 544 bytes of table
    sectors per warp (fp32 Adam, Triton): with 4096 elements 8 % of its instructions, which are not what it waits for,
    and 2 % of its sectors, which the caches hold. ``heavy`` programs, with codes or random words, start with more.
    Models too small to fill a GPU get shorter ones.
    """
    return min(max(1 << (numel // 2048 - 1).bit_length(), 2048), 8192 if heavy else 4096)


class Launch:
    """Holds the tables of a launch, and launches it.

    The tables lie in one buffer on the device: rows, counters, scalars, chunks. Whatever changes from step to step
    (addresses of tensors that moved, rows without a gradient, scalars) goes up in one copy.
    """

    counters = 0  # how many addresses of step counters follow the rows

    def __init__(self, watch: Watch, rows: list[Row], kernels: Kernels, owner: Owner) -> None:
        self.watch, self.kernels, self.device = watch, kernels, rows[0].device
        variant = rows[0].variant
        heavy = variant.state is torch.int8 or any(variant.random_streams)
        self.chunk = chunk_size(sum(row.numel for row in rows), heavy)
        self.slots = torch.tensor([row.slot for row in rows], device="cpu")
        values = [x for row in rows for x in self._row(row)]
        self.host = torch.tensor(values + [0] * self.counters, device="cpu")
        table = self.host[: len(values)].view(-1, COLUMNS)
        counts = -(-table[:, COL_NUMEL] // self.chunk)
        row_of_chunk = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
        first_chunk = (counts.cumsum(0) - counts)[row_of_chunk]
        index = torch.arange(len(row_of_chunk), device="cpu") - first_chunk
        chunks = torch.stack([row_of_chunk, index], dim=1).int()

        # All launches of a step share its rows of scalars, at most one for each parameter. There is room for a multiple
        # of 4, so that the chunks behind them are aligned to 16 bytes: Triton compiles anew for less.
        count = -(-sum(len(group["params"]) for group in owner.param_groups) // 4) * 4
        sizes = [table.nbytes, self.host.nbytes - table.nbytes, count * SCALARS_BYTES, chunks.nbytes]
        # Zeros, because kernels read rows of scalars before they know whether they step by them.
        self.buffer = torch.zeros(sum(sizes), dtype=torch.uint8, device=self.device)
        on_device, counters, scalars, chunk_table = self.buffer.split(sizes)
        chunk_table.copy_(chunks.view(-1).view(torch.uint8))
        self.rows = on_device.view(torch.int64).view(-1, COLUMNS)
        self.steps = counters.view(torch.int64)[: len(rows)]
        self.scalars = scalars.view(torch.float32).view(-1, SCALARS)
        self.chunks = chunk_table.view(torch.int32).view(-1, 2)
        self.ones = torch.ones((), device=self.device)
        self.uploaded = False
        self.stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    @staticmethod
    def _row(row: Row) -> list[int]:
        """Return the columns that do not depend on addresses, which the watch fills in."""
        values = [0] * COLUMNS
        offset, run, skip = row.numbering
        drawn_by = (offset, run, skip) if skip else (offset,)
        values[COL_NUMEL] = row.numel
        values[COL_FLAGS] = 0 if row.stochastic and any(x % 8 for x in drawn_by) else SHARD_ALIGNED
        values[COL_SEED], values[COL_INDEX] = row.seed, row.index
        values[COL_OFFSET], values[COL_RUN], values[COL_SKIP] = offset, run, skip
        return values

    def prepare_step(self, owner: Owner, scalars: Scalars) -> None:
        """Bring the tables to the coming step, in the current stream."""
        if self.stream is None:  # Triton's interpreter, on CPU tensors
            self._upload(owner, scalars)
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                for tensor in self._on_device():
                    tensor.record_stream(stream)
            if torch.cuda.is_current_stream_capturing():
                self._capture(owner)
            else:
                self._upload(owner, scalars)

    def _on_device(self) -> list[Tensor]:
        """Return the tensors that kernels read: torch may not reuse their memory while another stream steps."""
        return [self.buffer, self.ones]

    def sum_squares(self, owner: Owner) -> Tensor:
        """Return the sum of the squares of the gradients, float64, 0-dim, always added in the same order."""
        sums = torch.empty(len(self.chunks), dtype=torch.float64, device=self.device)
        with self._guard():
            self.kernels.sum_squares(self.rows, self.chunks, self.chunk, sums)
        return sums.sum()

    def run(self, owner: Owner, factor: float | Tensor, count: bool) -> None:
        """Step, with gradients multiplied by ``factor``; where that is negative nothing is done."""
        with self._guard():
            self._launch(owner, factor.float() if isinstance(factor, Tensor) else self.ones)
            if count:
                self.watch.advance()

    def _guard(self) -> Any:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.device(self.device)

    def _upload(self, owner: Owner, scalars: Scalars, staging: Tensor | None = None) -> None:
        self.watch.upload(self.host, self.slots, scalars, self.buffer, not self.uploaded, staging)
        self.uploaded = staging is None

    def _capture(self, owner: Owner) -> None:
        raise RuntimeError(
            "Attempting CUDA graph capture of step() of an optimizer that was constructed with capturable=False, whose "
            "scalars come from the host: construct it with capturable=True"
        )

    def _launch(self, owner: Owner, factor: Tensor) -> None:
        self.kernels.step(self.rows, self.chunks, self.chunk, self.scalars, factor)


class CapturableLaunch(Launch):
    """Computes the scalars on the device, so that a CUDA graph of the launch replays with the coming steps.

    Every tensor has a row of scalars of its own, since only the device knows its step. ``hyper(group)`` returns the
    hyperparameters for ``Kernels.scalars``; they go up when they changed, outside of any capture.
    """

    def __init__(
        self,
        watch: Watch,
        rows: list[Row],
        kernels: Kernels,
        owner: Owner,
        hyper: Callable[[dict], Sequence[float]],
    ) -> None:
        self.counters = -(-len(rows) // 2) * 2  # so that the scalars behind them are aligned to 16 bytes
        super().__init__(watch, rows, kernels, owner)
        self.hyper = hyper
        self.group_of = torch.tensor([row.group for row in rows], device="cpu")
        ends = torch.bincount(self.group_of, minlength=len(owner.param_groups)).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))  # the rows of each group, which are neighbours
        self.host[: -self.counters].view(-1, COLUMNS)[:, COL_SCALARS] = torch.arange(len(rows), device="cpu")
        self.table = torch.empty(len(rows), HYPERS, dtype=torch.float64, device=self.device)
        self.current: list[Sequence[float]] = []
        self.captured: list[Tensor] = []  # graphs copy from these at each replay
        self.captured_lr: list[tuple[int, Tensor]] = []  # and from these: (group, its learning rate)
        self.spare: Tensor | None = self._staging()  # allocated now: not within a capture

    def _on_device(self) -> list[Tensor]:
        return [*super()._on_device(), self.table]

    def _staging(self) -> Tensor:
        return torch.empty(self.host.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)

    def _upload(self, owner: Owner, scalars: Scalars, staging: Tensor | None = None) -> None:
        self._refresh(owner.param_groups)
        if self.captured:  # a replay has put the graph's gradients into the rows
            self.uploaded = False
        super()._upload(owner, [])
        if self.spare is None:
            self.spare = self._staging()

    def refresh(self, groups: list[dict]) -> None:
        """Bring hyperparameters that changed to the device, where captured graphs find them."""
        self._refresh(groups)
        for i, lr in self.captured_lr:
            if groups[i]["lr"] is not lr:
                lr.detach().fill_(groups[i]["lr"])
        self._copy_lr(groups)

    def _refresh(self, groups: list[dict]) -> None:
        new = [self._hyper_of(i, group) for i, group in enumerate(groups[: len(self.spans)])]
        if new != self.current:
            values = torch.tensor(new, dtype=torch.float64, device="cpu")[self.group_of]
            self.table.copy_(values.pin_memory() if self.stream else values, non_blocking=True)
            self.current = new

    def _hyper_of(self, i: int, group: dict) -> Sequence[float]:
        first, last = self.spans[i]
        try:
            return self.hyper(group) if first < last else (0.0,) * HYPERS
        except (KeyError, TypeError, ValueError):  # nobody reads the options of a group without gradients
            if any(p.grad is not None for p in group["params"]):
                raise
            return self.current[i] if self.current else (0.0,) * HYPERS

    def _capture(self, owner: Owner) -> None:
        if self.spare is None or not self.current:
            raise RuntimeError("CUDA graph capture of step(): call step() once between two captures, outside of both")
        self.uploaded = False
        super()._upload(owner, [], self.spare)
        self.captured.append(self.spare)
        self.captured_lr += [
            (i, group["lr"]) for i, group in enumerate(owner.param_groups) if is_on_device(group["lr"])
        ]
        self.spare = None

    def _copy_lr(self, groups: list[dict]) -> None:
        for (first, last), group in zip(self.spans, groups, strict=False):  # groups may have been added since
            if first < last and is_on_device(group["lr"]):
                self.table[first:last, HYPER_LR].copy_(group["lr"].detach(), non_blocking=True)

    def _launch(self, owner: Owner, factor: Tensor) -> None:
        self._copy_lr(owner.param_groups)
        self.kernels.scalars(self.table, self.steps, factor, self.scalars)
        super()._launch(owner, factor)
