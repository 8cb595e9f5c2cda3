"""The bench on a GPU: how it runs its stages and what it makes of their lines, and what it needs to measure rightly."""

import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench import arms, gpu, step, stream, timing
from bench.__main__ import main
from bench.gpu import predictions, report
from bench.gpu.checks import differing
from bench.gpu.models import GPT, resnet
from bench.gpu.record import FILE, Record, rows_of
from bench.gpu.tools import count, counters_of
from tests import cases

ROOT = Path(__file__).parent.parent
F32, BF16 = torch.float32, torch.bfloat16


# ---- stages


def stage(seconds: int, *parts: tuple[str, ...]) -> gpu.Stage:
    return gpu.Stage(seconds, "", tuple((f"tests.gpu_stages.{function}", *more) for function, *more in parts))


def rows_by_stage(folder: Path) -> dict[str, dict]:
    return {row["stage"]: row for row in rows_of(folder) if row["kind"] == "stage"}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended may wait for its parent's call."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_later_stages_run_whatever_became_of_earlier_ones(tmp_path: Path) -> None:
    stages = {
        "failing": stage(60, ("fail",)),
        "hanging": stage(6, ("hang",)),
        "well": stage(60, ("chatter", "a"), ("chatter", "b")),
    }
    assert not gpu.run_stages(stages, tmp_path, 60 * gpu.MINUTES)
    found = rows_by_stage(tmp_path)
    assert list(found) == list(stages)
    assert [row["rc"] for row in found.values()] == [1, 124, 0]
    assert found["hanging"]["note"] == "ended at its limit: hanging"
    (child,) = (row["pid"] for row in rows_of(tmp_path) if row["kind"] == "child")
    for _ in range(600):  # its end is not waited for where nobody reaps orphans
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert not is_alive(child)
    assert {row["text"] for row in rows_of(tmp_path) if row["kind"] == "note"} == {"a, tiny: False", "b, tiny: False"}
    summary = (tmp_path / "summary.md").read_text()
    for text in ("| failing | 1 |", "| hanging | 124 |", "| well | 0 |", "a, tiny: False", "| copy | 3000 | 1 |"):
        assert text in summary
    assert "RuntimeError: broken" in (tmp_path / "logs" / "failing.log").read_text()
    lines = (tmp_path / "logs" / "well-a.log").read_text().splitlines()
    assert lines[0] == "a 0"
    assert lines[-2] == "a 999"
    assert len(lines) == 2 * gpu.KEPT + 1

    # In the same folder: what the stage gave before is replaced, the others stay.
    assert gpu.run_stages({"failing": stage(60, ("chatter", "c"))}, tmp_path, 60 * gpu.MINUTES, tiny=True)
    assert {name: row["rc"] for name, row in rows_by_stage(tmp_path).items()} == {
        "hanging": 124,
        "well": 0,
        "failing": 0,
    }
    assert not report.of_kind(rows_of(tmp_path), "ceiling")
    assert "c, tiny: True" in (tmp_path / "summary.md").read_text()


def test_no_stage_is_begun_without_time(tmp_path: Path) -> None:
    assert not gpu.run_stages({"well": stage(60, ("chatter", "a"))}, tmp_path, gpu.RESERVE)
    row = rows_by_stage(tmp_path)["well"]
    assert (row["rc"], row["note"]) == (None, "not run: no time was left")
    assert "not run: no time was left" in (tmp_path / "summary.md").read_text()


def test_what_a_stage_gave_stays_where_there_is_no_time_for_it(tmp_path: Path) -> None:
    Record(tmp_path, "well").emit(kind="stage", rc=0, seconds=1.0, note="")
    assert not gpu.run_stages({"well": stage(60, ("chatter", "a"))}, tmp_path, gpu.RESERVE)
    assert rows_of(tmp_path) == [{"stage": "well", "kind": "stage", "rc": 0, "seconds": 1.0, "note": ""}]


def test_stages_fit_their_minutes() -> None:
    """Every limit is a share of the whole that a stage may be given, and every part is there."""
    assert all(gpu.LEAST <= each.seconds <= 60 * gpu.MINUTES for each in gpu.STAGES.values())
    for each in gpu.STAGES.values():
        for name, *_ in each.parts:
            module, _, function = name.rpartition(".")
            text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert f"\ndef {function}(record: Record" in text


def test_the_folder_is_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one it is said that there is none."""
    done = subprocess.CompletedProcess([], 0, "NVIDIA H100 80GB HBM3\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *args, **options: done)
    assert re.fullmatch(r"nvidia-h100-80gb-hbm3-\d{4}-\d\d-\d\d", gpu.folder_name())
    done.returncode, done.stderr = 1, "Traceback\nRuntimeError: No CUDA GPUs are available\n"
    with pytest.raises(SystemExit, match="needs a GPU, and torch sees none: RuntimeError: No CUDA GPUs are available"):
        main(["gpu"])


# ---- what is made of the lines


def step_row(workload: str, arm: str, ms: float, **more: object) -> dict:
    row = {"kind": "step", "workload": workload, "layers": 12, "algorithm": "adamw", "dtypes": "fp32", "arm": arm}
    row |= {"tensors": 148, "groups": 1, "parameters": 124_439_808, "bytes": 3_484_314_624, "warm": False}
    row |= {"ms_median": ms, "ms_p20": ms, "ms_p80": ms, "gb_per_s": 3484.3 / ms, "of_ceiling": 0.98, "host_us": 40.0}
    return row | {"launches": 1, "match": True, "max_ulp": 1.0, "ratio_median": 1.25, "ratio_min": 1.2} | more


def written(folder: Path) -> Path:
    """The folder of a run on an H100, as stages leave it."""
    (folder / "environment.json").write_text(
        json.dumps({"name": "NVIDIA H100 80GB HBM3", "GPU": "NVIDIA H100 80GB HBM3, 85 GB", "date": "2026-01-01 00:00"})
    )
    large = Record(folder, "large")
    large.emit(**step_row("gpt2", "fused_adamw triton", 1.25))
    large.emit(**step_row("gpt2", "fused_adamw triton, graph", 1.24))
    large.emit(**step_row("gpt2", "fused_adamw cuda", 1.397, match=False, max_ulp=7.5))
    large.emit(**step_row("gpt2", "torch fused", 1.0, ratio_median=1.0))
    large.emit(kind="stage", rc=0, seconds=50.0, note="")
    parity = Record(folder, "parity")
    parity.emit(kind="check", backend="cuda", name="AdamW", wrong=["0.p [7]: 3 of 7 differ"])
    curve = Record(folder, "curve")
    for arm in ("fused_adamw triton", "ceiling: stream"):
        for n in (4096, 16384):
            curve.emit(kind="curve", arm=arm, parameters=n, bytes=28 * n, gb_per_s=n / 100)
    with (folder / FILE).open("a") as file:
        file.write('{"stage": "curve", "kind": "cur')  # the machine was taken away
    return folder


def test_report_from_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path)
    (folder / report.NOTES).write_text("Short since the clocks were low.")
    assert main(["gpu", "--report", str(folder)]) == 0
    readme = capsys.readouterr().out
    assert "| GPT-2 small, 148 tensors, 124.4 M: AdamW | 1.25 (1.24) | 1 | 1.25 (1.20) | 2787 | 98% |" in readme
    assert readme.startswith("NVIDIA H100 80GB HBM3, 85 GB; 2026-01-01 00:00\n\n| workload |")
    assert "10,000 tensors" not in readme  # not measured
    summary = (folder / "summary.md").read_text()
    for text in (
        "# NVIDIA H100 80GB HBM3, 2026-01-01",
        "| large | 0 | 50 |",
        "- cuda: AdamW: 0.p [7]: 3 of 7 differ",
        "- fused_adamw cuda of gpt2, fp32: off by 7.5 ulp",
        "| gpt2, adamw, fp32, fused_adamw triton | ms | 1.2 to 1.27 | 1.25 | confirmed |",
        "| gpt2, adamw, fp32, fused_adamw cuda | ms | 1.2 to 1.27 | 1.4 | short by 10% |",
        "| gpt2, adamw, fp32, torch fused | ms | 1.17 to 1.22 | 1 | better by 17% |",
        "| llama-2b, adamw, fp32, fused_adamw triton | ms | 20 to 21.1 | not measured |",
        "Short since the clocks were low.",
    ):
        assert text in summary
    assert (folder / "gb_per_s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "predicted", "unit", "said"),
    [
        (1.0, (1.0, 2.0), "ms", "confirmed"),
        (2.05, (1.0, 2.0), "ms", "confirmed"),
        (2.2, (1.0, 2.0), "ms", "short by 10%"),
        (0.5, (1.0, 2.0), "us", "better by 100%"),
        (2700.0, (3000.0, 3000.0), "GB/s", "short by 11%"),
        (3300.0, (3000.0, 3000.0), "GB/s", "better by 10%"),
        (0.96, (0.97, 1.0), "of the stream", "confirmed"),
        (1.0, None, "ms", "no prediction"),
    ],
)
def test_verdict(value: float, predicted: predictions.Range, unit: str, said: str) -> None:
    assert predictions.verdict(value, predicted, unit) == said


def test_predictions_are_of_what_is_measured() -> None:
    """Their lists, algorithms and dtypes exist."""
    for (workload, algorithm, dtypes, _), field, *_ in predictions.PREDICTIONS:
        if algorithm:
            assert workload in cases.WORKLOADS
            assert algorithm in arms.ALGORITHMS
            assert dtypes in arms.DTYPES
            assert field in step_row("gpt2", "", 1.0)


def test_counters_of_ncu() -> None:
    text = (
        "==PROF== Connected\ndone\n" + '"ID","Metric Name","Metric Unit","Metric Value"\n"0","Duration","us","10,5"\n'
    )
    assert counters_of(text) == [("Duration", "us", "10,5")]
    assert counters_of("==ERROR== no permission\n") == []


def test_what_pytest_found_is_counted(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="well"/>'
        '<testcase classname="tests.a" name="not"><skipped message="no second GPU"/></testcase>'
        '<testcase classname="tests.a" name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>'
        '<testcase classname="tests.a" name="worse"><failure message="a"/><error message="b"/></testcase>'
        "</testsuite></testsuites>"
    )
    count(Record(tmp_path, "tests"), tmp_path / "tests.xml")
    found = rows_of(tmp_path)
    assert [(row["name"], row["wrong"]) for row in report.of_kind(found, "test")] == [
        ("tests.a::bad", "assert 1 == 2"),
        ("tests.a::worse", "a"),
        ("tests.a::worse", "b"),
    ]
    assert [row["text"] for row in report.of_kind(found, "note")] == ["tests marked gpu: 1 passed, 2 failed, 1 skipped"]
    report.write(tmp_path)
    assert "- tests.a::bad: assert 1 == 2" in (tmp_path / "summary.md").read_text()


def test_bits_are_compared() -> None:
    """The sign of zero counts, the payload of NaN does not."""
    assert differing(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == 1
    nan = torch.tensor([0x7FC00001, 0x7FC00002], dtype=torch.int32).view(F32)
    assert differing(nan[:1], nan[1:]) == 0
    assert differing(nan[:1], torch.ones(1)) == 1
    with pytest.raises(AssertionError, match="torch.bfloat16"):
        differing(torch.ones(3, dtype=BF16), torch.ones(3))


def test_models_are_those_they_are_named_after() -> None:
    with torch.device("meta"):
        found = [list(model.parameters()) for model in (GPT(50257, 1024, 768, 12), resnet((3, 4, 6, 3)))]
    sizes = [(len(params), sum(p.numel() for p in params)) for params in found]
    assert sizes == [(148, 124_439_808), (161, 25_557_032)]


def test_hints_of_the_sweep_reach_every_stream() -> None:
    pytest.importorskip("triton")
    sweep = pytest.importorskip("bench.gpu.sweep")
    lines = (ROOT / "triton_kernels" / "formats.py").read_text().splitlines()
    load, store = ', eviction_policy="a"', ', eviction_policy="b"'
    hinted = [sweep.with_hint(line, load, store) for line in lines]
    changed = {line.strip() for line, was in zip(hinted, lines, strict=True) if line != was}
    assert 'return tl.load(pointers, mask=mask, eviction_policy="a").to(tl.float32)' in changed
    assert 'tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask, eviction_policy="b")' in changed
    for line in lines:
        if "tl.load(pointers" in line or "tl.store(pointers" in line:
            assert sweep.with_hint(line, load, store) != line


# ---- what is measured rightly


@pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned on Linux alone")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if sys.platform == "linux" else True, reason="needs two CPUs")
def test_pinned_threads_leave_the_main_thread_free() -> None:
    """What it starts has its affinity: all CPUs. The other threads have one each."""
    code = """
from bench import pinning
pinning.pin()
import os, pathlib, torch
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)
print(len(os.sched_getaffinity(0)))
print(min(len(os.sched_getaffinity(int(task.name))) for task in pathlib.Path("/proc/self/task").iterdir()))
"""
    free = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=free, check=True, capture_output=True, text=True)
    assert out.stdout.split() == [str(len(os.sched_getaffinity(0))), "1"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_clocks_are_read_under_load(tmp_path: Path) -> None:
    """The command ends once the load has run."""
    started = tmp_path / "started"
    command = ["sh", "-c", f"while [ ! -e '{started}' ]; do :; done; echo 1980"]
    assert timing.output_under_load(command, started.touch) == "1980"
    assert timing.output_under_load(["sh", "-c", "echo 1; exit 1"], lambda: None) == ""
    assert timing.output_under_load([str(tmp_path / "no-such-program")], lambda: None) == ""


@pytest.mark.parametrize(
    ("workload", "sets"), [("148x64", 0), ("1x131k", 0), ("10000x64", 0), ("1000x1k", 7), ("gpt2", 1)]
)
def test_a_gpu_is_cold_or_said_to_be_warm(workload: str, sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of buffers of a list beside an L2 of 50 MiB; 0: it is timed in the cache, and said to be."""
    monkeypatch.setattr(step, "last_level_cache", lambda device: 50 << 20)
    monkeypatch.setattr(step, "available_memory", lambda device: 80 << 30)
    fits = step.Bench.__new__(step.Bench)
    fits.case, fits.device, fits.warm = step.Case(workload, "adamw", "fp32"), torch.device("cuda"), False
    fits.dtype, fits.state_dtype, fits.results = F32, F32, []
    assert fits._fit([arms.Arm("fused_adamw triton", dict)]) == ""
    assert (fits.count, fits.warm) == (max(sets, 1), sets == 0)
    assert ("; warm\n" if sets == 0 else f"cold: {sets} set") in fits.title().replace("fp32; ", "; ")
    assert sets == 0 or sets * 16 * fits.elements > 2 * (50 << 20)


def test_a_case_is_drawn_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the CPU's generator, which takes minutes for billions; every set is the same."""
    monkeypatch.setattr(step, "last_level_cache", lambda device: 1 << 20)
    monkeypatch.setattr(cases, "parameters", None)
    bench = step.Bench(step.Case("148x64", "adamw", "fp32"), [], torch.device("cpu"), False)
    assert bench.count > 1
    for params in bench.sets:
        for p, q, start in zip(params, bench.sets[0], bench.start, strict=True):
            assert torch.equal(p, start)
            assert torch.equal(p.grad, q.grad)
            assert len(p.unique()) == len(p.grad.unique()) == 64


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16, F32, F32), (BF16, torch.int8, torch.int8)])
def test_streams_are_of_random_data(dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(stream, "cpu_stream", lambda arrays, written: lambda: seen.extend(arrays))
    stream.stream(stream.Shape(dtypes, (dtypes[0],)), stream.LENGTH, torch.device("cpu"), cold=False).call()
    assert [t.dtype for t in seen] == [*dtypes, dtypes[0]]
    assert all(len(t.unique()) > 100 for t in seen)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("fp32",) * 3, ("fp32",)),
        (("bf16",) * 3, ("bf16",)),
        (("bf16", "fp32", "fp32"), ("bf16",)),
        (("fp32", "i8", "i8"), ("fp32",)),
        (("bf16", "i8", "i8"), ("bf16",)),
    ],
)
def test_the_stream_goes_through_no_shared_memory(written: tuple[str, ...], read: tuple[str, ...]) -> None:
    """A block whose layouts differ would be slower than what it is the ceiling of: the mixes were, at 1024."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from bench.stream_triton import block_of, stream_kernel

    names = {"fp32": F32, "bf16": BF16, "i8": torch.int8}

    def shared(block: int) -> int:
        types_of = [tuple(f"*{name}" for name in part) for part in (written, read)]
        signature = {"written": types_of[0], "read": types_of[1], "BLOCK": "constexpr"}
        aligned = {(i, j): [["tt.divisibility", 16]] for i, part in enumerate(types_of) for j in range(len(part))}
        source = triton.compiler.ASTSource(stream_kernel, signature, {"BLOCK": block}, aligned)
        return triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}
        ).metadata.shared

    dtypes = {names[name] for name in (*written, *read)}
    assert shared(block_of(dtypes)) == 0
    if "fp32" in written and "bf16" in written:
        assert shared(1024) > 0


@pytest.mark.gpu
def test_the_stream_stays_in_range() -> None:
    """Each array gets the mean of all: no call makes infinities of what the last one left."""
    pytest.importorskip("triton")
    shape = stream.Shape((F32, BF16, torch.int8), (F32,))
    device = torch.device("cuda", torch.cuda.current_device())
    kept: list[torch.Tensor] = []
    true = stream.random
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "random", lambda *args: kept.append(true(*args)) or kept[-1])
        run = stream.stream(shape, stream.LENGTH, device, cold=False)
    before = [t.float().clone() for t in kept]
    run.call()
    total = before[3] + before[0] + before[1] + before[2]
    assert torch.equal(kept[0], total * 0.25)
    for _ in range(4):
        run.call()
    assert all(bool(t.float().abs().max() <= 130) for t in kept)


@pytest.mark.gpu
def test_what_a_case_leaves_is_free_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    true = torch.cuda.empty_cache
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(torch.cuda.memory_allocated()) or true())
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    found = arms.arms_of("adamw", arms.DTYPES["fp32"], device, ["fused"], False)
    step.measure(step.Case("148x64", "adamw", "fp32"), found[:1], device, 1, True, {"results": [], "skipped": []})
    assert emptied[-1] <= before + 4096


def test_flashoptim_is_given_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor of FlashAdamW 0.1.4, which refuses a correction of float32 parameters."""

    class FlashAdamW(torch.optim.AdamW):
        def __init__(
            self,
            params,
            lr=1e-3,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=1e-2,
            decouple_lr=False,
            quantize=True,
            compress_state_dict=True,
            master_weight_bits=24,
            check_numerics=False,
            fused=True,
        ):
            super().__init__(params, lr, betas, eps, weight_decay)
            if master_weight_bits is not None and self.param_groups[0]["params"][0].dtype is F32:
                raise ValueError("master_weight_bits has no effect when all parameters are fp32")
            self.quantize = quantize

    monkeypatch.setitem(sys.modules, "flashoptim", types.SimpleNamespace(FlashAdamW=FlashAdamW))
    (arm,) = arms.peer("flashoptim", "adamw", F32, torch.device("cuda"))
    made = arm.make([{"params": [torch.nn.Parameter(torch.ones(3))]}])
    assert not made.quantize  # float32 states, as torch's


@pytest.mark.gpu
def test_measured_tolerantly_what_fails_is_skipped() -> None:
    """A backend that cannot run leaves the others' figures."""

    def broken(groups: object) -> torch.optim.Optimizer:
        raise RuntimeError("broken")

    device = torch.device("cuda", torch.cuda.current_device())
    found = arms.arms_of("adamw", arms.DTYPES["fp32"], device, ["fused"], False)
    result: dict = {"results": [], "skipped": []}
    both = [arms.Arm("fused_adamw broken", broken), found[0]]
    step.measure(step.Case("148x64", "adamw", "fp32"), both, device, 1, True, result, tolerant=True)
    assert [s["reason"] for s in result["skipped"]] == ["RuntimeError: broken"]
    assert found[0].name in [r["arm"] for r in result["results"]]


@pytest.mark.gpu
@pytest.mark.slow
def test_stages_on_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--tiny", "--minutes", "60", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--stages", "facts", "ceilings", "clipping"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["rc"] for row in rows_by_stage(tmp_path).values()} == {0}
    assert json.loads((tmp_path / "environment.json").read_text())["name"] == torch.cuda.get_device_name()
    found = [row["arm"] for row in report.of_kind(rows_of(tmp_path), "step")]
    assert {"fused_adamw triton", "fused_adamw triton, graph", "torch fused", "torch foreach"} <= set(found)
