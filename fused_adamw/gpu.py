"""Prepares and runs launches on a GPU: tables that stay on the device, one launch and at most one upload per step.

``layout.py`` tells what is in the tables.
"""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor

from fused_adamw.contract import Clipping, Owner, Row, Scalars, Variant, Watch
from fused_adamw.layout import (
    COL_FLAGS,
    COL_GRAD,
    COL_INDEX,
    COL_NUMEL,
    COL_OFFSET,
    COL_RUN,
    COL_SCALARS,
    COL_SEED,
    COL_SKIP,
    COLUMNS,
    EMA_BF16,
    HYPERS,
    SCALARS,
    SCALARS_BYTES,
    SHARD_ALIGNED,
)
from fused_adamw.scalars import is_on_device

NO_STREAM = -1  # of tensors of several streams
NORM_CHUNK = 8192  # elements per program of a sum of squares, which reads one stream; each leaves a sum to add


class Kernels(Protocol):
    """Launches the compiled kernels of a bucket, on the current device and stream."""

    def step(
        self, rows: Tensor, chunks: Tensor, chunk: int, scalars: Tensor, factor: Tensor, sums: Tensor | None,
        given: tuple[float, ...],
    ) -> None:  # fmt: skip
        """Step every element; ``chunk`` is the number of elements of a chunk, a multiple of 128: no two share a scale.

        ``given`` has two rows of scalars, or is empty: then they lie in ``scalars``. Gradients are multiplied by
        ``factor``, float32 of one element; where that is negative nothing is done. ``sums``, of measured rows, float64
        [3, chunks], gets the sums of the squares of gradients, updates and new parameters of each chunk.
        """

    def sum_squares(self, rows: Tensor, chunks: Tensor, chunk: int, sums: Tensor) -> None:
        """Write the sums of the squares of the gradients of each chunk, float64."""

    def totals(self, sums: Tensor, bounds: Tensor, found: Tensor | None, totals: Tensor, flag: Tensor) -> None:
        """Do what ``contract.Summed`` says."""

    def factor(self, sums: Tensor, clipping: Clipping, factor: Tensor, norm: Tensor | None) -> None:
        """Write the factor, float32, and the norm, float32, unless that is None, from the sum of ``sums``."""

    def scalars(self, hyper: Tensor, rates: Tensor, steps: Tensor, factor: Tensor, scalars: Tensor) -> None:
        """Advance the float32 counters at the addresses ``steps``, and compute their rows of scalars from ``hyper``.

        ``rates`` has the addresses of learning rates that are tensors.

        An address of 0 is of a row without a gradient, which has no scalars in this step.

        A negative ``factor`` leaves all as it is, as it does in a step.
        """


def chunk_size(variant: Variant) -> int:
    """Return the elements per program of a step; no bit depends on it.

    About 28 KiB, of all streams together. While its last programs run, most of a GPU is idle. On an H200, fp32 AdamW of
    256 Mi elements runs at 4.17 to 4.20 TB/s with 1024 elements, at 4.05 with 4096 and at 3.93 with 65,536; of 24 Mi at
    4.00, 3.83 and 3.36. All in bf16 is as fast with 2048 as with 1024 elements, or faster. Programs that start slowly,
    with codes or random words, get more.
    """
    if variant.state is torch.int8 or variant.draws:
        return 8192
    return 2048 if max(variant.p.itemsize, variant.g.itemsize, variant.state.itemsize) < 4 else 1024


def chunks_of(numels: Tensor, size: int, device: torch.device) -> Tensor:
    """Return the row and the number of each chunk, int32 [chunks, 2], of rows with so many elements.

    They are made on the device: 70 billion parameters on 8 of them have 8.6 million chunks each.
    """
    counts = -(-numels // size)
    firsts = (counts.cumsum(0) - counts).int().to(device)
    rows = torch.arange(len(numels), dtype=torch.int32, device=device)
    rows = rows.repeat_interleave(counts.to(device), output_size=int(counts.sum()))
    numbers = torch.arange(len(rows), dtype=torch.int32, device=device) - firsts.index_select(0, rows)
    return torch.stack([rows, numbers], dim=1)


class Launch:
    """Holds the tables of a launch, and launches it.

    Rows, counters and scalars lie in one buffer on the device. Whatever changes from step to step (addresses of tensors
    that moved, rows without a gradient, more than two rows of scalars) goes up in one copy. The chunks never change.
    """

    counters = 0  # how many addresses of step counters follow the rows
    given: tuple[float, ...] = ()  # two rows of scalars, which are arguments of the kernel

    def __init__(self, watch: Watch, rows: list[Row], kernels: Kernels, owner: Owner) -> None:
        self.watch, self.kernels, self.device = watch, kernels, rows[0].device
        self.chunk = chunk_size(rows[0].variant)
        self.slots = torch.tensor([row.slot for row in rows], device="cpu")
        values = [x for row in rows for x in self._row(row)]
        self.host = torch.tensor(values + [0] * self.counters, device="cpu")
        table = self.host[: len(values)].view(-1, COLUMNS)
        # All launches of a step share its rows of scalars, at most one for each parameter.
        count = sum(len(group["params"]) for group in owner.param_groups)
        self.sizes = [table.nbytes, self.host.nbytes - table.nbytes, count * SCALARS_BYTES]
        on_gpu = self.device.type == "cuda"  # else this is Triton's interpreter, on CPU tensors
        self.guard: Any = torch.cuda.device(self.device) if on_gpu else contextlib.nullcontext()
        self.stream = self._current_stream()  # of all the tensors below
        self.kept: list[tuple[Tensor, int | None]] = []  # each with its stream
        self.ones = torch.ones((), device=self.device)
        # Zeros, because kernels read rows of scalars before they know whether they step by them.
        self._use(torch.zeros(sum(self.sizes), dtype=torch.uint8, device=self.device))
        numels = table[:, COL_NUMEL]
        self.chunks = chunks_of(numels, self.chunk, self.device)
        self.norm_chunks = chunks_of(numels if owner.scales_gradients else numels[:0], NORM_CHUNK, self.device)
        self.sums: Tensor | None = None  # what the last step measured
        if rows[0].measured:
            counts = (-(-numels // self.chunk)).repeat(3)
            self.sums = torch.zeros(3, len(self.chunks), dtype=torch.float64, device=self.device)
            self.bounds = torch.cat([torch.zeros(1, dtype=counts.dtype, device="cpu"), counts.cumsum(0)]).to(
                self.device
            )
            self.keep(self.sums)
        for tensor in (self.chunks, self.norm_chunks, self.ones):
            self.keep(tensor)
        self.uploaded = False

    def _use(self, buffer: Tensor) -> None:
        self.keep(buffer)
        rows, counters, scalars = buffer.split(self.sizes)
        self.buffer = buffer
        self.rows = rows.view(torch.int64).view(-1, COLUMNS)
        self.steps = counters.view(torch.int64)[: len(self.slots)]
        self.scalars = scalars.view(torch.float32).view(-1, SCALARS)

    @staticmethod
    def _row(row: Row) -> list[int]:
        """Return the columns that do not depend on addresses, which the watch fills in."""
        values = [0] * COLUMNS
        offset, run, skip = row.numbering
        drawn_by = (offset, run, skip) if skip else (offset,)
        values[COL_NUMEL] = row.numel
        values[COL_FLAGS] = 0 if row.storage.draws and any(x % 8 for x in drawn_by) else SHARD_ALIGNED
        values[COL_FLAGS] |= EMA_BF16 if row.ema is torch.bfloat16 else 0
        values[COL_SEED], values[COL_INDEX] = row.seed, row.index
        values[COL_OFFSET], values[COL_RUN], values[COL_SKIP] = offset, run, skip
        return values

    def prepare_step(self, owner: Owner, scalars: Scalars) -> None:
        """Bring the tables to the coming step, in the current stream."""
        if self.stream is None:
            self._upload(owner, scalars)
            return
        with self.guard:
            current = self._current_stream()
            if current != self.stream:
                stream = torch.cuda.current_stream()
                for tensor, own in self.kept:
                    if own != current:
                        tensor.record_stream(stream)
            if torch.cuda.is_current_stream_capturing():
                self._capture(owner)
            else:
                self._upload(owner, scalars)

    def _current_stream(self) -> int | None:
        """Return the address of the current stream: its object takes 1.6 us, this 0.1."""
        return torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else None

    def keep(self, tensor: Tensor) -> None:
        """Keep a tensor, just allocated, that kernels read or write, as long as the launch or a graph of it lives.

        torch may not reuse its memory while a kernel on another stream than its own uses it.
        """
        own = self._current_stream()
        self.kept.append((tensor, own))
        if own != self.stream:
            self.stream = NO_STREAM

    @property
    def parts(self) -> int:
        """How many numbers ``sum_squares`` writes."""
        return len(self.norm_chunks)

    def sum_squares(self, owner: Owner, sums: Tensor) -> None:
        """Write the sums of the squares of the gradients of each chunk of the norm, float64."""
        with self.guard:
            self.kernels.sum_squares(self.rows, self.norm_chunks, NORM_CHUNK, sums)

    def squares(self) -> Tensor:
        """Do what ``contract.Launch`` says."""
        assert self.sums is not None, "a bucket's rows are all measured, or none is"
        totals = self.sums.new_empty(3 * len(self.slots))
        with self.guard:
            self.kernels.totals(self.sums, self.bounds, None, totals, self.ones)
        return totals.view(3, -1)

    def totals(self, sums: Tensor, bounds: Tensor, found: Tensor | None, totals: Tensor, flag: Tensor) -> None:
        """Do what ``contract.Summed`` says."""
        with self.guard:
            self.kernels.totals(sums, bounds, found, totals, flag)

    def factor(self, sums: Tensor, clipping: Clipping, factor: Tensor, norm: Tensor | None) -> Tensor:
        """Write the factor and the norm, and return the factor."""
        with self.guard:
            self.kernels.factor(sums, clipping, factor, norm)
        return factor

    def run(self, owner: Owner, factor: float | Tensor, count: bool) -> None:
        """Step, with gradients multiplied by ``factor``; where that is negative nothing is done."""
        with self.guard:
            if not isinstance(factor, Tensor):
                factor = self.ones if factor == 1 else torch.full_like(self.ones, factor)
            self._launch(owner, factor if factor.dtype is torch.float32 else factor.float())
            if count:
                self.watch.advance()

    def _upload(self, owner: Owner, scalars: Scalars) -> None:
        # With decay and without makes two rows of nearly any model. An upload takes 16 to 26 us of the host of an H200.
        self.given = (*scalars[0], *scalars[-1]) if 0 < len(scalars) <= 2 else ()
        self.watch.upload(self.host, self.slots, [] if self.given else scalars, self.buffer, not self.uploaded)
        self.uploaded = True

    def _capture(self, owner: Owner) -> None:
        raise RuntimeError(
            "Attempting CUDA graph capture of step() of an optimizer that was constructed with capturable=False, whose "
            "scalars come from the host: construct it with capturable=True"
        )

    def _launch(self, owner: Owner, factor: Tensor) -> None:
        self.kernels.step(self.rows, self.chunks, self.chunk, self.scalars, factor, self.sums, self.given)


class CapturableLaunch(Launch):
    """Computes the scalars on the device, so that a CUDA graph of the launch replays with the coming steps.

    Every tensor has a row of scalars of its own, since only the device knows its step. Hyperparameters go up when they
    changed, outside of any capture. A learning rate that is a tensor is read where it lies, and kept for that.

    A graph takes the buffer with it. What the rows lacked of the step that was captured it copies at each replay:
    nothing, or addresses of gradients. Steps outside of it go on with a copy of the buffer.
    """

    def __init__(self, watch: Watch, rows: list[Row], kernels: Kernels, owner: Owner) -> None:
        self.counters = -(-len(rows) // 2) * 2  # so that the scalars behind them are aligned to 16 bytes
        super().__init__(watch, rows, kernels, owner)
        self.group_of = torch.tensor([row.group for row in rows], device="cpu")
        self.groups = self.group_of.unique().tolist()
        self.host[: -self.counters].view(-1, COLUMNS)[:, COL_SCALARS] = torch.arange(len(rows), device="cpu")
        self.hyper_of_group = torch.zeros(len(owner.param_groups), HYPERS, dtype=torch.float64, device="cpu")
        self.rate_of_group = torch.zeros(len(owner.param_groups), dtype=torch.int64, device="cpu")
        hypers = -(-len(rows) * HYPERS // 2) * 2  # so that the rates behind them are aligned to 16 bytes
        self.table = torch.empty(hypers + len(rows), dtype=torch.float64, device=self.device)
        self.hyper, rates = self.table.split([hypers, len(rows)])
        self.rates = rates.view(torch.int64)
        self.current = False  # whether the table has what the groups had when they were last read
        self.rate_tensors: list[Tensor] = []  # whose addresses are in the table
        # Of groups whose rate is a tensor of another device or dtype than kernels read: each step copies it to these.
        self.copied_rates: dict[int, Tensor] = {}
        self.to_copy: list[int] = []
        self.captured: list[Tensor] = []  # graphs copy from these at each replay
        self.is_taken = False  # the buffer is a graph's
        self.captured_lr: list[tuple[int, Tensor]] = []  # and from these: (group, its learning rate)
        self.spare: Tensor | None = self._staging()  # allocated now: not within a capture
        self.keep(self.table)

    def _staging(self) -> Tensor:
        return torch.empty(self.host.nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.stream is not None)

    def _upload(self, owner: Owner, scalars: Scalars) -> None:
        self._refresh(owner.param_groups)
        if self.is_taken:
            self._use(self.buffer.clone())
            self.is_taken = self.uploaded = False
        super()._upload(owner, [])
        if self.spare is None:
            self.spare = self._staging()

    def refresh(self, groups: list[dict]) -> None:
        """Bring hyperparameters that changed to the device, where captured graphs find them."""
        self._refresh(groups)
        for i, lr in self.captured_lr:
            if groups[i]["lr"] is not lr:
                lr.detach().fill_(groups[i]["lr"])
        self._copy_rates(groups)

    def _refresh(self, groups: list[dict]) -> None:
        was_current, self.current = self.current, False
        changed, self.to_copy = self.watch.device_hypers(
            groups, self.groups, self.hyper_of_group, self.rate_of_group, self.device
        )
        for i in self.to_copy:
            if i not in self.copied_rates:
                self.copied_rates[i] = torch.zeros((), dtype=torch.float64, device=self.device)
                self.keep(self.copied_rates[i])
            address = self.copied_rates[i].data_ptr()
            changed |= bool(self.rate_of_group[i] != address)
            self.rate_of_group[i] = address
        if changed or not was_current:
            values = torch.zeros(self.table.shape, dtype=torch.float64, device="cpu")
            values[: len(self.group_of) * HYPERS] = self.hyper_of_group[self.group_of].view(-1)
            values[len(self.hyper) :] = self.rate_of_group[self.group_of].view(torch.float64)
            self.table.copy_(values if self.stream is None else values.pin_memory(), non_blocking=True)
            self.rate_tensors = [group["lr"] for group in groups if is_on_device(group.get("lr"))]
        self.current = True

    def _capture(self, owner: Owner) -> None:
        if self.spare is None or not self.current:
            raise RuntimeError("CUDA graph capture of step(): call step() once between two captures, outside of both")
        before = self.host.clone()
        self.watch.update(self.host, self.slots)
        moved = self.host != before
        moved[: -self.counters].view(-1, COLUMNS)[:, COL_GRAD] = False
        if moved.any() or not self.uploaded:
            self.buffer[: self.host.nbytes].copy_(self.spare.copy_(self.host.view(torch.uint8)), non_blocking=True)
        elif not torch.equal(self.host, before):
            rows = self.host[: -self.counters].view(-1, COLUMNS)
            addresses = self.spare.view(torch.int64)[: len(rows)]
            self.rows[:, COL_GRAD].copy_(addresses.copy_(rows[:, COL_GRAD]), non_blocking=True)
        self.captured.append(self.spare)
        self.is_taken = True
        self.captured_lr += [(i, owner.param_groups[i]["lr"]) for i in self.to_copy]
        self.spare = None

    def _copy_rates(self, groups: list[dict]) -> None:
        for i in self.to_copy:
            self.copied_rates[i].copy_(groups[i]["lr"].detach().view(()), non_blocking=True)

    def _launch(self, owner: Owner, factor: Tensor) -> None:
        self._copy_rates(owner.param_groups)
        self.kernels.scalars(self.hyper, self.rates, self.steps, factor, self.scalars)
        super()._launch(owner, factor)
