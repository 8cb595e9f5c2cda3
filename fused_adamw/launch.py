"""The host side of a step on a GPU: tables that stay on the device, one small upload and one launch per step.

rows     int64 [., 16]:
         0-4    addresses of p, g, state0, state1, state2 (Adam: m, v, vmax; Sgd: b; codes where they are int8)
         5      numel
         6      index of the row of scalars
         7      flags: bit 1, that offset, run and skip are multiples of 8, as far as they count; bit 0, that moreover
                all addresses are multiples of 16
         8      address of what the master holds
         9, 10  addresses of the scales of state0 and state1
         11-15  of stochastic rounding: seed; index of the parameter; offset, run, skip: element i of the row is element
                offset + i + i / run * skip of the parameter
chunks   int32 [., 2]: row, index of the chunk in its tensor; one program (a block of threads) each
scalars  float32 [., 9]: the launch scalars of the rule and the step, in the order of scalars.py
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_adamw.scalars import is_on_device

COLUMNS = 16  # of a row
SCALARS = 9  # of a row of scalars
SCALARS_BYTES = 4 * SCALARS
HYPER = 8  # of a row of hyperparameters


class Kernels(Protocol):
    """The compiled kernels of a bucket, launched on the current device and stream."""

    def step(self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor) -> None:
        """Step every element; ``chunk`` is the number of elements of a chunk, a multiple of 128.

        Gradients are multiplied by ``factor``, float32 of one element; where that is negative nothing is done.
        """

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        """Write the sums of the squares of the gradients of each chunk, float64."""

    def scalars(self, hyper: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        """Advance the float32 counters at the addresses ``steps``, and compute their rows of scalars.

        hyper   float64 [., 8]: lr, base_lr, decoupled decay, l2, grad_factor, then beta1, beta2, eps (Adam)
                or momentum, dampening, flags (Sgd; bit 0: nesterov, bit 1: lr_in_momentum). The decay is
                lr / base_lr * decoupled decay, so a base_lr of 1 makes it torch's.
        factor  as for a step: a negative one leaves all as it is
        """


def chunk_size(numel: int) -> int:
    """Elements per program of a launch over ``numel`` elements; the result of a step does not depend on it.

    The start of a program costs 97 instructions per thread and 544 bytes of table sectors per warp (fp32 Adam, Triton):
    at 16384 elements 4 % of its instructions and 0.5 % of its sectors. Models too small to fill a GPU with programs of
    that size get shorter ones.
    """
    return min(max(1 << (numel // 2048 - 1).bit_length(), 2048), 16384)


class Launch:
    """The rows of one launch.

    The tables lie in one buffer on the device: rows, scalars, chunks. What changes from step to step (addresses of
    gradients that moved, scalars) goes up in one copy.
    """

    def __init__(self, watch: Any, rows: list[Any], kernels: Kernels, groups: list[dict]) -> None:
        self.watch, self.kernels, self.device = watch, kernels, rows[0].p.device
        self.chunk = chunk_size(sum(row.p.numel() for row in rows))
        # -1 - slot: the gradient is a copy of ours, which stays where it is
        self.slots = torch.tensor([row.slot if row.g is None else -1 - row.slot for row in rows], device="cpu")
        self.host = torch.tensor([self._row(row) for row in rows], device="cpu")
        counts = -(-self.host[:, 5] // self.chunk)
        row_of_chunk = torch.arange(len(rows), device="cpu").repeat_interleave(counts)
        first_chunk = (counts.cumsum(0) - counts)[row_of_chunk]
        index = torch.arange(len(row_of_chunk), device="cpu") - first_chunk
        chunks = torch.stack([row_of_chunk, index], dim=1).int()

        # The scalars of a step are those of all launches: one row at most for each parameter.
        # A multiple of 4 rows, after which the chunks are aligned to 16 bytes: Triton compiles anew for less.
        count = -(-sum(len(group["params"]) for group in groups) // 4) * 4
        sizes = [self.host.nbytes, count * SCALARS_BYTES, chunks.nbytes]
        self.buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
        table, scalars, chunk_table = self.buffer.split(sizes)
        chunk_table.copy_(chunks.view(-1).view(torch.uint8))
        self.rows = table.view(torch.int64).view(-1, COLUMNS)
        self.scalars = scalars.view(torch.float32).view(-1, SCALARS)
        self.chunks = chunk_table.view(torch.int32).view(-1, 2)
        self.ones = torch.ones((), device=self.device)
        self.uploaded = False
        self.stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    @staticmethod
    def _row(row: Any) -> list[int]:
        offset, run, skip = row.place
        places = (offset, run, skip) if skip else (offset,)
        return [
            *_addresses([row.p, row.g, *row.states], 5),
            row.p.numel(),
            0,
            0 if row.stochastic and any(x % 8 for x in places) else 2,
            *_addresses([row.extra, *row.scales], 3),
            row.seed,
            row.index,
            offset,
            run,
            skip,
        ]

    def bring(self, scalars: list[tuple[float, ...]]) -> None:
        """Bring the tables to the step to come, in the current stream."""
        if self.stream is None:  # Triton's interpreter, on CPU tensors
            self._upload(scalars)
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                for tensor in self._on_device():
                    tensor.record_stream(stream)
            if torch.cuda.is_current_stream_capturing():
                self._capture()
            else:
                self._upload(scalars)

    def _on_device(self) -> list[Tensor]:
        """Return what the kernels read: torch may not hand its memory out again while another stream steps."""
        return [self.buffer, self.ones]

    def sum_squares(self) -> Tensor:
        """The sum of the squares of the gradients, float64, 0-dim, always added in the same order."""
        sums = torch.empty(len(self.chunks), dtype=torch.float64, device=self.device)
        with self._guard():
            self.kernels.sum_squares(self.rows, self.chunks, self.chunk, sums)
        return sums.sum()

    def run(self, factor: float | Tensor) -> None:
        """Step, with gradients multiplied by ``factor``; where that is negative nothing is done."""
        with self._guard():
            self._launch(factor.float() if isinstance(factor, Tensor) else self.ones)

    def _guard(self) -> Any:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.device(self.device)

    def _upload(self, scalars: list[tuple[float, ...]], staging: Tensor | None = None) -> None:
        self.watch.upload(self.host, self.slots, scalars, self.buffer, not self.uploaded, staging)
        self.uploaded = staging is None

    def _capture(self) -> None:
        raise RuntimeError(
            "Attempting CUDA graph capture of step() of an optimizer that was constructed with capturable=False, whose "
            "scalars come from the host: construct it with capturable=True"
        )

    def _launch(self, factor: Tensor) -> None:
        self.kernels.step(self.rows, self.chunks, self.chunk, self.scalars, factor)


def _addresses(tensors: list[Tensor | None], count: int) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors] + [0] * (count - len(tensors))


class CapturableLaunch(Launch):
    """A launch whose scalars are computed on the device, so that a CUDA graph of it replays with the steps to come.

    Every tensor has a row of scalars of its own, since only the device knows its step. ``hyper(group)`` gives the
    hyperparameters of ``Kernels.scalars``; they go up when they changed, outside of any capture.
    """

    def __init__(
        self,
        watch: Any,
        rows: list[Any],
        kernels: Kernels,
        groups: list[dict],
        hyper: Callable[[dict], Sequence[float]],
    ) -> None:
        super().__init__(watch, rows, kernels, groups)
        self.groups, self.hyper = groups, hyper
        self.group_of = torch.tensor([row.group for row in rows], device="cpu")
        ends = torch.bincount(self.group_of, minlength=len(groups)).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))  # the rows of each group, which are neighbours
        self.steps = torch.tensor([row.step.data_ptr() for row in rows], device=self.device)
        self.host[:, 6] = torch.arange(len(rows), device="cpu")
        self.table = torch.empty(len(rows), HYPER, dtype=torch.float64, device=self.device)
        self.current: list[Sequence[float]] = []
        self.captured: list[Tensor] = []  # graphs copy from these at each replay
        self.captured_lr: list[tuple[int, Tensor]] = []  # and from these, of groups
        self.spare: Tensor | None = self._staging()  # allocated now: not within a capture

    def _on_device(self) -> list[Tensor]:
        return [*super()._on_device(), self.steps, self.table]

    def _staging(self) -> Tensor:
        return torch.empty(self.host.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)

    def _upload(self, scalars: list[tuple[float, ...]], staging: Tensor | None = None) -> None:
        self._refresh()
        if self.captured:  # a replay has put the graph's gradients into the rows
            self.uploaded = False
        super()._upload([])
        if self.spare is None:
            self.spare = self._staging()

    def refresh(self, groups: list[dict]) -> None:
        """Bring hyperparameters that changed to the device, where captured graphs find them."""
        self.groups = groups  # others since a checkpoint was loaded
        self._refresh()
        for i, lr in self.captured_lr:
            if groups[i]["lr"] is not lr:
                lr.fill_(groups[i]["lr"])
        self._copy_lr()

    def _refresh(self) -> None:
        new = [self.hyper(group) for group in self.groups]
        if new != self.current:
            values = torch.tensor(new, dtype=torch.float64, device="cpu")[self.group_of]
            self.table.copy_(values.pin_memory() if self.stream else values, non_blocking=True)
            self.current = new

    def _capture(self) -> None:
        if self.spare is None or not self.current:
            raise RuntimeError("CUDA graph capture of step(): call step() once between two captures, outside of both")
        self.uploaded = False
        super()._upload([], self.spare)
        self.captured.append(self.spare)
        self.captured_lr += [(i, group["lr"]) for i, group in enumerate(self.groups) if is_on_device(group["lr"])]
        self.spare = None

    def _copy_lr(self) -> None:
        for (first, last), group in zip(self.spans, self.groups, strict=False):  # groups may have been added since
            if first < last and is_on_device(group["lr"]):
                self.table[first:last, 0].copy_(group["lr"], non_blocking=True)

    def _launch(self, factor: Tensor) -> None:
        self._copy_lr()
        self.kernels.scalars(self.table, self.steps, factor, self.scalars)
        super()._launch(factor)
