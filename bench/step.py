"""Time full optimizer.step() calls on the workloads of tests/cases.py: ours, the peers', and the memory's speed."""

import argparse
import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import measures, stream
from bench.arms import (
    ALGORITHMS,
    DTYPES,
    FUSED,
    NAMES,
    SHORT,
    Arm,
    Missing,
    arms_of,
    chunked,
    step_of,
    with_chunks,
    with_steady,
)
from bench.output import Report, begin, console, finish, progress, until_interrupted
from bench.summary import HOST, LAUNCHES, MOST_SETS, NOTES, Result, summarized, table
from bench.timing import (
    Call,
    available_memory,
    bytes_of_step,
    cpu_clock,
    cuda_clock,
    device_of,
    interleave,
    last_level_cache,
)
from tests import cases

DEFAULT = ["gpt2", "1000x1k", "148x64", "10000x64", "465-groups", "1x131k"]
DEFAULT += ["layerdrop", "alternating", "offloaded-states"]
OBJECTS = 3 << 10  # bytes of Python and C++ objects of a parameter, its gradient, its state and their dicts


class Case(NamedTuple):
    """Name what one table is about: a list of tensors, an algorithm, dtypes."""

    workload: str
    algorithm: str
    dtypes: str

    def __str__(self) -> str:
        return f"{self.workload}, {self.algorithm}, {self.dtypes}"


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, and write the files; after Ctrl-C with what there is."""
    device = device_of(args.device)
    if args.chunk and device.type == "cpu":
        raise SystemExit("--chunk: only a GPU's programs have chunks; see kTile in csrc/loops_cpu.h")
    head = begin("optimizer.step()", args.threads, device)
    report: Report = {"environment": head, "results": [], "skipped": []}
    against = NAMES if args.all else args.against
    with until_interrupted(report):
        for case in itertools.starmap(Case, itertools.product(args.workload or DEFAULT, args.algorithm, args.dtype)):
            arms = with_chunks(arms_of(case.algorithm, DTYPES[case.dtypes], device, against, args.all), args.chunk)
            measure(case, arms, device, args.rounds, args.warm, report)
    interrupted = finish(report, NOTES.format(host=HOST[device.type], launches=LAUNCHES[device.type]), args, "bars")
    ours = [r for r in report["results"] if r["arm"].startswith("fused_adamw")]
    return interrupted or int(not ours or any(r["match"] is False for r in ours))


# ---- one case


def measure(
    case: Case,
    arms: list[Arm],
    device: torch.device,
    rounds: int,
    warm: bool,
    report: Report,
    tolerant: bool = False,
) -> None:
    """Check and time every arm of a case; what each gave is in ``report`` from the first round on.

    An arm of ours that fails is an error, unless ``tolerant``.
    """
    if cases.WORKLOADS[case.workload].change:
        arms = with_steady(arms)
    with progress() as bar:
        task = bar.add_task(str(case), total=2 * len(arms) + rounds)

        def advance(what: str) -> None:
            bar.update(task, advance=1, description=f"{case}: {what}")

        def tried(arm: Arm, call: Callable[..., Any], *args: Any) -> Any:
            """Return the value of a call; where the arm cannot do it, None, and report why it is skipped."""
            advance(arm.name)
            try:
                return call(arm, *args)
            except Exception as error:
                if not (tolerant or arm.foreign or isinstance(error, Missing)):
                    raise
                why = str(error) if isinstance(error, Missing) else measures.first_line(error)
                report["skipped"].append({"case": str(case), "arm": arm.name, "reason": why})
                return None

        probed = {arm.name: tried(arm, probe, case, device) for arm in arms}
        runnable = [arm for arm in arms if probed[arm.name] is not None]
        bench = Bench(case, runnable, device, warm)
        if bench.refusal:
            report["skipped"].append({"case": str(case), "arm": str(case), "reason": bench.refusal})
            return
        try:
            for arm in runnable:
                with chunked(arm.chunk):  # plans are built here
                    tried(arm, bench.prepare, *probed[arm.name])
            bench.add_ceilings()
            bar.update(task, total=2 * len(runnable) + rounds, completed=2 * len(runnable))
            bench.time(progress_range(rounds, advance))
        finally:
            done = bench.finish()
            report["results"] += done
    if done:
        console.print(bench.title())
        console.print(table(done))
        for r in (r for r in done if r["of_steady"]):
            console.print(f"{r['arm']}: {r['of_steady']:.2f} times what it takes steady, the median of the rounds")


def progress_range(rounds: int, advance: Callable[[str], None]) -> Any:
    """``range(rounds)``, seen by the progress bar."""
    for i in range(rounds):
        advance("timing")
        yield i


def probe(arm: Arm, case: Case, device: torch.device) -> tuple[float | None]:
    """Return the microseconds of host time, on the CPU alone; raise what the arm lacks before large allocations."""
    workload = cases.WORKLOADS[case.workload]
    like = workload.groups(1) if device.type == "cuda" or arm.compiled else workload.groups(workload.layers)
    count = sum(len(shapes) for shapes, _ in like)
    params = cases.parameters([(1,)] * count, DTYPES[case.dtypes].dtype, str(device))
    cases.set_gradients(params, 0)
    optimizer = arm.make(measures.grouped(params, like))
    if arm.compiled:
        return (None,)
    change = change_of(arm, case, [(p, p.grad) for p in params], optimizer)
    optimizer.step()
    return (measures.host_microseconds(optimizer.step, device, change) if device.type == "cpu" else None,)


def change_of(arm: Arm, case: Case, given: cases.Given, optimizer: torch.optim.Optimizer) -> Call | None:
    """Return what a list that changes does before each step: its next turn, or for a steady arm turn 0 again."""
    change, turns = cases.WORKLOADS[case.workload].change, itertools.repeat(0) if arm.steady else itertools.count(1)
    return (lambda: change(given, optimizer.state, next(turns))) if change else None


class Bench:
    """Hold the buffers of a case and the optimizers on them. Arms share parameters and gradients, not state."""

    def __init__(self, case: Case, arms: list[Arm], device: torch.device, warm: bool) -> None:
        self.case, self.device = case, device
        self.warm = warm or cases.WORKLOADS[case.workload].change is not None
        self.algorithm = ALGORITHMS[case.algorithm]
        self.dtype, self.state_dtype, _ = DTYPES[case.dtypes]
        self.results: list[Result] = []
        self.calls: dict[str, Call] = {}
        self.changes: dict[str, Call | None] = {}
        self.refusal = self._fit(arms)
        if self.refusal:
            return
        shapes = [shape for shapes, _ in self.groups for shape in shapes]
        self.sets = [measures.random_parameters(shapes, self.dtype, device) for _ in range(self.count)]
        self.start = [p.detach().clone() for p in self.sets[0]]
        self.given = [(p, p.grad) for p in self.sets[0]]
        self.oracle = measures.Oracle(self.sets[0], self.groups, self.algorithm)

    def _fit(self, arms: list[Arm]) -> str:
        """Choose the layers and the number of buffer sets; return why not even one layer fits."""
        workload = cases.WORKLOADS[self.case.workload]
        states = 3 if self.case.algorithm in ("amsgrad", "adamw-ema") else 2
        temporary = 8 if any(not a.name.startswith(("fused_adamw", FUSED)) for a in arms) else 0
        own = states * self.state_dtype.itemsize + (4 if "master" in DTYPES[self.case.dtypes].options else 0)
        free = 0.8 * available_memory(self.device)
        for layers in range(workload.layers, 0, -1):
            self.groups, self.layers = workload.groups(layers), layers
            self.elements = sum(math.prod(shape) for shapes, _ in self.groups for shape in shapes)
            self.tensors = sum(len(shapes) for shapes, _ in self.groups)
            # A GPU's cache holds none of the host's objects.
            one = self.elements * (2 * self.dtype.itemsize + own)
            one += self.tensors * OBJECTS if self.device.type == "cpu" else 0
            ceiling = min(max(self.elements, 4 * last_level_cache(self.device) // 20), stream.LARGEST) * 24
            self.count = 1 if self.warm else max(1, math.ceil(2 * last_level_cache(self.device) / one))
            if self.device.type != "cpu" and self.count > MOST_SETS:
                self.warm, self.count = True, 1
            need = self.elements * (self.dtype.itemsize + temporary) + ceiling
            need += self.count * (self.elements * 2 * self.dtype.itemsize + len(arms) * self.elements * own)
            if need <= free:
                return ""
        return f"needs {need / 1e9:.1f} GB for {layers} of its layers, and {free / 1e9:.1f} GB may be used here"

    def title(self) -> str:
        """Say what the rows of the table have in common."""
        workload = cases.WORKLOADS[self.case.workload]
        layers = "" if self.layers == workload.layers else f" ({self.layers} of {workload.layers} layers)"
        groups = f"{len(self.groups)} group{'s' if len(self.groups) > 1 else ''}"
        cache = "warm" if self.warm else f"cold: {self.count} set{'s' if self.count > 1 else ''} of buffers"
        return (
            f"\n[bold]{self.case.workload}{layers}[/bold]: {self.tensors:,} tensors in {groups}, {self.elements:,} "
            f"parameters; [bold]{self.case.algorithm}[/bold], {self.case.dtypes}; {cache}\n"
            f"{next((r['formula'] for r in self.results if r['formula']), '')}"
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, arm: Arm, host: float | None) -> None:
        """Make the arm's optimizers, check what they compute, and measure all but the time of a step."""
        params = self.sets[0]
        with torch.no_grad():  # the arms before have stepped them
            torch._foreach_copy_(params, self.start)
        for p, g in self.given:
            p.grad = g
        first = arm.make(measures.grouped(params, self.groups))
        call = step_of(arm._replace(graph=False), [first])
        for i in measures.checked_steps(params):
            self._synchronize()
            begun = time.perf_counter()
            call()
            self._synchronize()
            if i == 0:
                first_ms = (time.perf_counter() - begun) * 1e3
        match, worst = None, None
        if arm.same_rule:
            match, worst = self.oracle.judge(f"{self.case}, {arm.name}", first, state=not arm.foreign)
        optimizers = [first]
        # A compiled step is compiled anew for each optimizer: it stays with one set of buffers, and so warm.
        for params in [] if arm.compiled else self.sets[1:]:
            optimizers.append(arm.make(measures.grouped(params, self.groups)))
            optimizers[-1].step()
        if not arm.compiled or arm.graph:
            call = step_of(arm, optimizers)
        storage, shape = self._storage(first), stream.shape_of(first)
        change = self.changes[arm.name] = change_of(arm, self.case, self.given, first)
        advance = change or (lambda: None)
        advance()
        call()
        if self.device.type == "cuda":
            host = measures.host_microseconds(call, self.device, change)
        # Counting on the CPU keeps torch.compile from compiling, for good where another project calls it.
        countable = self.device.type == "cuda" or not (arm.compiled or arm.foreign)
        advance()
        launches = measures.quietly(lambda: measures.launches(first, call, self.device)) if countable else None
        advance()
        extra = measures.quietly(lambda: measures.extra_bytes(call, self.device))
        self.calls[arm.name] = call
        self.results.append(
            self._result(
                arm.name,
                bytes_of_step(first),
                storage=storage,
                formula=str(shape) if shape else "",
                shape=shape,
                sets=len(optimizers),
                first_ms=first_ms,
                host_us=host,
                launches=launches,
                extra_bytes=extra,
                match=match,
                max_ulp=worst,
            )
        )

    def _result(self, name: str, moved: int, **more: Any) -> Result:
        case = {"workload": self.case.workload, "layers": self.layers, "algorithm": self.case.algorithm}
        size = {"tensors": self.tensors, "groups": len(self.groups), "parameters": self.elements}
        where = {"dtypes": self.case.dtypes, "warm": self.warm}
        return {**case, **where, **size, "arm": name, "bytes": moved, **more, "seconds": []}

    def _storage(self, optimizer: torch.optim.Optimizer) -> str:
        """Name the dtypes of the parameter, its gradient and its state, as found."""
        p = max((p for group in optimizer.param_groups for p in group["params"]), key=Tensor.numel)
        state = [t for key, t in optimizer.state[p].items() if isinstance(t, Tensor) and key != "step" and t.dim()]
        dtypes = (p.dtype, p.grad.dtype, *(t.dtype for t in state if t.numel() == p.numel()))
        return "+".join(dict.fromkeys(SHORT.get(d, str(d).removeprefix("torch.")) for d in dtypes))

    def add_ceilings(self) -> None:
        """Add the streams of the shapes that the arms have, and a copy, as arms of their own."""
        shapes = list(dict.fromkeys(r["shape"] for r in self.results if r["shape"]))
        found = {
            shape: stream.stream(shape, self.elements, self.device, not self.warm)
            for shape in shapes
            if self._can_stream(shape)
        }
        for i, (shape, each) in enumerate(found.items()):
            name = "ceiling: stream" + (f" {i + 1}" if i else "")
            self.calls[name] = each.call
            empty = dict.fromkeys(("first_ms", "host_us", "launches", "extra_bytes", "match", "max_ulp"))
            storage = "+".join(dict.fromkeys(SHORT[d] for d in (*shape.written, *shape.read)))
            self.results.append(
                self._result(name, each.bytes, storage=storage, formula=str(shape), shape=shape, sets=1, **empty)
            )
        if found:
            each = stream.copy(self.elements, self.device, not self.warm)
            self.calls["ceiling: copy"] = each.call
            self.results.append(
                self._result("ceiling: copy", each.bytes, storage="fp32", formula="", shape=None, sets=1, **empty)
            )

    def _can_stream(self, shape: stream.Shape) -> bool:
        try:
            stream.stream(shape, stream.LENGTH, self.device, cold=False).call()
        except Exception as error:  # no extension, no Triton
            console.print(f"no ceiling: {measures.first_line(error)}", style="yellow", markup=False)
            return False
        return True

    def time(self, rounds: Any) -> None:
        """Time every arm in each of the rounds."""
        clock = cpu_clock if self.device.type == "cpu" else cuda_clock
        times = {r["arm"]: r["seconds"] for r in self.results}
        interleave(self.calls, rounds, clock, times, {r["arm"]: r["sets"] for r in self.results}, self.changes)

    def finish(self) -> list[Result]:
        """Return the results of the arms that were timed, and let the buffers go."""
        done = summarized([r for r in self.results if r["seconds"]])
        for r in self.results:
            r.pop("shape")
        self.calls.clear()
        self.changes.clear()
        self.sets = self.start = self.given = self.oracle = None
        gc.collect()
        if self.device.type == "cuda":  # what a case leaves in torch's cache is not free for the next one
            torch.cuda.empty_cache()
        return done
