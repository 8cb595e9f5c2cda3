"""Smoke runs of the bench: what it prints and writes, never how fast anything is."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import torch.nn.functional as F

import fused_adamw
from bench import measures, picture, step, stream, timing
from bench.__main__ import main
from bench.arms import ALGORITHMS, DTYPES, PEERS, TORCH, Arm, arms_of, chunked, with_chunks, with_steady
from bench.memory import FORMS
from bench.paper import claims, digits, experiments, valleys
from bench.studies import demo, gpt
from bench.studies.formats import Run
from fused_adamw import backends, formats, gpu
from fused_adamw.contract import Variant
from tests import cases

ROOT = Path(__file__).parent.parent


def bench(*argv: str, strict: bool = True) -> str:
    """Output of the bench in a process of its own, which may compile, and replace what it likes."""
    command = [sys.executable, *(["-W", "error::RuntimeWarning"] if strict else []), "-m", "bench", *argv]
    environment = {**os.environ, "OMP_PROC_BIND": "false"}  # the tests share their CPUs
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CACHE = 4 << 20


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys, threads) -> Callable[..., str]:
    """Output of the bench in this process, which spares the imports, as if the last cache held ``CACHE`` bytes."""
    for module in (step, stream):
        monkeypatch.setattr(module, "last_level_cache", lambda device: CACHE)

    def run(*argv: str) -> str:
        code = main(list(argv))
        out = capsys.readouterr().out
        assert code == 0, out
        return out

    return run


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., str]) -> None:
    monkeypatch.setattr(gpt, "CHARACTERS", 100_000)
    monkeypatch.setattr(demo, "VALIDATION_BATCHES", 2)
    out = here("demo", "--steps", "1", "--threads", "1", "--out", str(tmp_path / "new"))
    for text in ("threads", "validation", "28 bytes per parameter", "fused_adamw.AdamW", "fused=True", "demo.png"):
        assert text in out
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def threads() -> Iterator[None]:
    """A run in this process sets the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(tmp_path: Path, *more: str) -> list[str]:
    files = [f"--{kind}={tmp_path / 'step.'}{kind}" for kind in ("json", "csv")]
    return ["--rounds", "2", "--threads", "1", *files, *more]


def test_step(tmp_path: Path, here: Callable[..., str]) -> None:
    out = here("step", "--workload", "1x131k", *options(tmp_path, f"--plot={tmp_path / 'step.png'}"))
    assert "✗" not in out
    for text in (
        "threads",
        "commit",
        "28 bytes an element: read p fp32, g fp32, m fp32, v fp32; write p fp32",
        "cold: ",
    ):
        assert text in out
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["environment"]["threads"].startswith("1,")
    arms = ["fused_adamw cpu", "torch fused", "ceiling: stream", "ceiling: copy"]
    assert [r["arm"] for r in report["results"]] == arms
    for r in report["results"]:
        assert len(r["seconds"]) == 2
        assert r["gb_per_s"] > 0
        assert r["of_ceiling"] > 0
    ours, fused = report["results"][:2]
    assert ours["match"]
    assert fused["match"]
    assert ours["bytes"] == fused["bytes"] == 28 * 131072
    assert ours["launches"] == 1
    assert ours["host_us"] > 0
    assert ours["first_ms"] > 0
    assert ours["extra_bytes"] < 1024
    assert ours["sets"] * 16 * 131072 > CACHE
    assert ours["ratio_median"] == pytest.approx(np.median(np.divide(fused["seconds"], ours["seconds"])))
    with (tmp_path / "step.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["arm"] for r in rows] == arms
    assert all(r["CPU"] == report["environment"]["CPU"] for r in rows)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_step_of_what_torch_does_not_fuse(tmp_path: Path, here: Callable[..., str]) -> None:
    """RAdam beside torch's foreach, the others beside torch's Adam: all are judged by the oracle."""
    algorithms = [
        "radam",
        "adabound",
        "amsbound",
        "adamw-no-first-moment",
        "adamw-cautious-decay",
        "adamw-cautious-update",
        "adamw-ema",
    ]
    args = ["--workload", "1x131k", "--algorithm", *algorithms, "--against", "fused", "foreach"]
    out = here("step", *args, *options(tmp_path))
    assert "torch.optim.RAdam has no fused step: compare with --against foreach" in out
    report = json.loads((tmp_path / "step.json").read_text())
    found = {(r["algorithm"], r["arm"]): r for r in report["results"]}
    for algorithm in algorithms:
        ours, foreach = (found[algorithm, arm] for arm in ("fused_adamw cpu", "torch foreach"))
        assert ours["match"]
        assert foreach["match"] is (True if algorithm == "radam" else None)
        theirs = foreach if algorithm == "radam" else found[algorithm, "torch fused"]
        assert ours["ratio_median"] == pytest.approx(np.median(np.divide(theirs["seconds"], ours["seconds"])))
    moved = {arm: r["bytes"] / r["parameters"] for (algorithm, arm), r in found.items() if algorithm == "adamw-ema"}
    assert moved["fused_adamw cpu"] == 36
    assert moved["fused_adamw cpu, bfloat16 averages"] == 32
    assert moved["fused_adamw cpu + foreach_lerp"] == moved["torch fused"] == moved["torch foreach"] == 40
    assert found["adamw-ema", "fused_adamw cpu + foreach_lerp"]["match"]


@pytest.mark.parametrize("name", [name for name, workload in cases.WORKLOADS.items() if workload.change])
def test_step_of_lists_that_change(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Callable[..., str]
) -> None:
    """Every arm takes a turn before each step, but for ours on a steady list, which stays at turn 0."""
    true, turns = cases.WORKLOADS[name], {}

    def change(given: cases.Given, state: cases.State, turn: int) -> None:
        turns.setdefault(id(state), []).append(turn)
        true.change(given, state, turn)

    kept = []  # no id comes twice
    monkeypatch.setattr(step, "with_steady", lambda arms: [keeping(arm, kept) for arm in with_steady(arms)])
    monkeypatch.setitem(cases.WORKLOADS, name, cases.Workload(lambda n: cases.one_group([(3, 3)] * 20), change=change))
    out = here("step", "--workload", name, "--against", "fused", "foreach", *options(tmp_path))
    assert "warm" in out
    rows = {r["arm"]: r for r in json.loads((tmp_path / "step.json").read_text())["results"]}
    arms = ["fused_adamw cpu", "fused_adamw cpu, steady", "torch fused", "torch foreach"]
    assert [arm for arm in rows if not arm.startswith("ceiling")] == arms
    part = {"alternating": 1 / 2, "layerdrop": 4 / 5, "layerdrop-1000": 4 / 5}.get(name, 1)
    for arm in arms:
        assert rows[arm]["match"]
        assert rows[arm]["bytes"] == round(part * 28 * 180)
        assert len(rows[arm]["seconds"]) == 2
    ours, steady = (np.array(rows[arm]["seconds"]) for arm in arms[:2])
    assert rows[arms[0]]["of_steady"] == pytest.approx(np.median(ours / steady))
    assert f"fused_adamw cpu: {rows[arms[0]]['of_steady']:.2f} times what it takes steady" in out
    assert not any(row["of_steady"] for arm, row in rows.items() if arm != arms[0])
    for arm, optimizer in kept:  # each is made twice: of tensors of one element, for the time on the host, and whole
        seen = turns[id(optimizer.state)]
        assert seen == ([0] * len(seen) if arm.endswith("steady") else [*range(1, len(seen) + 1)]), arm
    assert [arm for arm, _ in kept] == arms * 2


def keeping(arm: Arm, kept: list) -> Arm:
    """The arm, which appends its name and each optimizer that it makes to a list."""
    return arm._replace(make=lambda groups: kept.append((arm.name, arm.make(groups))) or kept[-1][1])


def test_what_comes_before_a_step_is_not_timed() -> None:
    events = []

    def clock(call: Callable[[], object], repeats: int) -> float:
        events.append("start")
        call()
        events.append("end")
        return repeats / 8

    changing = timing.untimed(lambda: events.append("change"), clock)
    assert changing(lambda: events.append("step"), 3) == 1 / 8
    assert events == ["change", "start", "step", "end"] * 3
    times = timing.interleave(
        {"a": lambda: events.append("a")}, range(2), clock, changes={"a": partial(events.append, "b")}
    )
    assert times == {"a": [1 / 8] * 2}
    assert events[12:] == ["b", "start", "a", "end"] * (len(events[12:]) // 4)


def test_what_changes_between_steps() -> None:
    """Which gradients are missing, and which tensors are others, at each turn."""
    params = cases.parameters([(2,)] * 20)
    cases.set_gradients(params, 0)
    given = [(p, p.grad) for p in params]
    for turn in range(6):
        cases.drop_layers(given, {}, turn)
        assert [i for i, p in enumerate(params) if p.grad is None] == [i for i in range(20) if i % 5 == turn % 5]
        cases.alternate(given, {}, turn)
        missing = range(10, 20) if turn % 2 == 0 else range(10)
        assert [i for i, p in enumerate(params) if p.grad is None] == [*missing]
        assert all(p.grad is g for p, g in given if p.grad is not None)
    for p, g in given:
        p.grad = g
    optimizer = torch.optim.AdamW(params)
    optimizer.step()
    for turn, moved in ((0, False), (1, True)):
        before = cases.tensors_of(optimizer)
        cases.replace_state(given, optimizer.state, turn)
        cases.move_parameters(given, optimizer.state, turn)
        after = cases.tensors_of(optimizer)
        cases.assert_same_bits(before, after)
        same = {key.split(".")[1]: before[key].data_ptr() == after[key].data_ptr() for key in before}
        assert same == {"p": not moved, "step": True, "exp_avg": not moved, "exp_avg_sq": not moved}


@pytest.mark.slow
def test_step_of_other_algorithms_and_dtypes(tmp_path: Path, here: Callable[..., str]) -> None:
    dtypes = {"bf16": ("bf16", 14, 10), "bf16+fp32": ("bf16+fp32", 22, 14)}
    argv = ["--workload", "465-groups", "--algorithm", "adamw", "sgdw", "--dtype", *dtypes, "--warm"]
    out = here("step", *argv, *options(tmp_path))
    assert "✗" not in out
    assert "warm" in out
    report = json.loads((tmp_path / "step.json").read_text())
    ours = {(r["algorithm"], r["dtypes"]): r for r in report["results"] if r["arm"] == "fused_adamw cpu"}
    for name, (storage, adamw, sgdw) in dtypes.items():
        for algorithm, size in (("adamw", adamw), ("sgdw", sgdw)):
            r = ours[algorithm, name]
            assert r["match"]
            assert (r["storage"], r["bytes"], r["sets"]) == (storage, size * r["parameters"], 1)
            streams = {x["formula"] for x in report["results"] if x["arm"].startswith("ceiling: stream")}
            assert r["formula"] in streams
    assert {(r["tensors"], r["groups"], r["sets"]) for r in report["results"]} == {(465, 465, 1)}
    fused = {r["algorithm"]: r for r in report["results"] if r["arm"] == "torch fused"}
    assert fused["adamw"]["match"]
    assert fused["sgdw"]["match"] is None  # SGD: torch has no SGDW
    assert fused["adamw"]["storage"] == "bf16"


@pytest.mark.slow
def test_step_against_all(tmp_path: Path) -> None:
    """Every peer is there, or is skipped with the reason."""
    out = bench("step", "--workload", "1x131k", "--all", "--warm", *options(tmp_path), strict=False)
    report = json.loads((tmp_path / "step.json").read_text())
    assert {s["arm"] for s in report["skipped"]} | {r["arm"] for r in report["results"]} >= {
        *PEERS,
        *(f"torch {name}" for name in TORCH),
        "fused_adamw reference",
    }
    assert "skipped: apex: it steps tensors on cuda, not on cpu" in out
    extra = {r["arm"]: r["extra_bytes"] for r in report["results"]}
    assert extra["torch for-loop"] >= 131072 * 4
    assert extra["torch fused"] < 1024
    assert all(r["match"] for r in report["results"] if r["arm"].startswith(("fused_adamw", "torch ")))


@pytest.mark.gpu
@pytest.mark.usefixtures("young")
def test_step_with_other_chunks(tmp_path: Path, here: Callable[..., str]) -> None:
    here("step", "--workload", "148x64", "--chunk", "128", "512", *options(tmp_path, "--device", "cuda", "--warm"))
    found = {r["arm"]: r for r in json.loads((tmp_path / "step.json").read_text())["results"]}
    for chunk in (128, 512):
        assert found[f"fused_adamw triton, chunk {chunk}"]["match"]
        assert found[f"fused_adamw triton, chunk {chunk}"]["ms_median"] > 0


def test_chunks_are_those_of_the_context() -> None:
    arms = with_chunks(arms_of("adamw", DTYPES["fp32"], torch.device("cpu"), ["fused"], False), [128, 4096])
    assert [a.name for a in arms] == [
        "fused_adamw cpu", "fused_adamw cpu, chunk 128", "fused_adamw cpu, chunk 4096", "torch fused"
    ]  # fmt: skip
    assert [a.chunk for a in arms] == [None, 128, 4096, None]
    variant = Variant("adam", torch.float32, torch.float32, torch.float32)
    before = gpu.chunk_size(variant)
    with chunked(128):
        assert gpu.chunk_size(variant) == 128
    with chunked(None):
        assert gpu.chunk_size(variant) == before


@pytest.mark.parametrize("more", [["--chunk", "100"], ["--chunk", "128", "--device", "cpu"]], ids=["100", "cpu"])
def test_chunks_that_cannot_be(more: list[str], here: Callable[..., str], capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        here("step", *more)
    assert "multiple of 128" in capsys.readouterr().err or "--chunk" in str(refused.value)


@pytest.mark.gpu
@pytest.mark.usefixtures("young")
def test_step_on_a_gpu(tmp_path: Path, here: Callable[..., str]) -> None:
    here("step", "--workload", "465-groups", "148x64", *options(tmp_path, "--device", "cuda", "--warm"))
    report = json.loads((tmp_path / "step.json").read_text())
    assert "CUDA" in report["environment"]["GPU"]
    arms = {"fused_adamw triton", "fused_adamw triton, graph", "torch fused", "torch fused, graph", "ceiling: stream"}
    for workload in ("465-groups", "148x64"):
        found = {r["arm"]: r for r in report["results"] if r["workload"] == workload}
        assert found.keys() >= arms
        for arm in arms - {"ceiling: stream"}:
            assert found[arm]["match"] or arm.startswith("torch")  # torch's GPU kernels round as they like
            assert found[arm]["host_us"] > 0
            assert found[arm]["ms_median"] > 0
        assert found["ceiling: copy"]["gb_per_s"] > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("young")
def test_step_of_a_list_that_changes_on_a_gpu(tmp_path: Path, here: Callable[..., str]) -> None:
    """Beside ours on a steady list; no graph, which would not follow."""
    here("step", "--workload", "alternating", *options(tmp_path, "--device", "cuda"))
    found = {r["arm"]: r for r in json.loads((tmp_path / "step.json").read_text())["results"]}
    assert found.keys() >= {"fused_adamw triton", "fused_adamw triton, steady", "torch fused", "ceiling: stream"}
    assert not any(arm.endswith("graph") for arm in found)
    assert found["fused_adamw triton"]["match"]
    assert found["fused_adamw triton"]["of_steady"] > 0
    assert len({r["bytes"] for arm, r in found.items() if not arm.startswith("ceiling")}) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("young")
def test_limit_on_a_gpu(tmp_path: Path, here: Callable[..., str]) -> None:
    here("limit", *options(tmp_path, "--device", "cuda", "--largest", "4096"))
    arms = {r["arm"] for r in json.loads((tmp_path / "step.json").read_text())["results"]}
    assert arms >= {"fused_adamw triton", "fused_adamw triton, graph", "torch fused", "ceiling: stream"}


def test_limit(tmp_path: Path, here: Callable[..., str]) -> None:
    plot = tmp_path / "limit.png"
    argv = ["--largest", "16384", "--dtype", "bf16+fp32", f"--plot={plot}"]
    out = here("limit", *argv, *options(tmp_path))
    assert "22 bytes an element" in out
    assert "16,384" in out
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert {(r["parameters"], r["arm"]) for r in rows} == {
        (n, a) for n in (4096, 16384) for a in ("fused_adamw cpu", "torch fused", "ceiling: stream", "ceiling: copy")
    }
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_report(tmp_path: Path, here: Callable[..., str]) -> None:
    """Runs of its own, each a process, then the same from files."""
    out = bench("report", "--runs", "2", "--rounds", "2", "--workload", "1x131k", "--threads", "1")
    (row,) = [line for line in out.splitlines() if line.startswith("| 1x131k | adamw | fp32 | fused_adamw cpu |")]
    assert row.endswith("| ✓ |")
    assert row.count(" to ") >= 2  # two runs: of ms, GB/s, % and the ratio, where they differ
    here("step", "--workload", "1x131k", *options(tmp_path))
    file, target, plot = tmp_path / "step.json", tmp_path / "table.md", tmp_path / "report.png"
    here("report", str(file), str(file), "--out", str(target), "--plot", str(plot))
    assert "| 1x131k | adamw | fp32 | torch fused |" in target.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    file.write_text("{}")
    with pytest.raises(SystemExit, match="not a file of python -m bench step --json"):
        main(["report", str(file)])


def test_torchs_variable_chooses_our_instructions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    native = backends.native()
    assert native
    last = native.cpu_isas()[-1]
    try:
        for asked, used in (("default", "generic"), ("no such set", last), ("", last)):
            monkeypatch.setenv("ATEN_CPU_CAPABILITY", asked)
            assert timing.environment(1)["instructions"] == used
    finally:
        native.use_cpu_isa(last)


def test_picture(tmp_path: Path) -> None:
    """README's pictures and figures are those of the tables of docs/performance.md and docs/gpu.md: the medians."""
    assert main(["picture", "--out", str(tmp_path)]) == 0
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("speed.png", "speed_gpu.png", "formats.png")
    )
    found = picture.spreads(picture.DOCS / "performance.md", "torch fused / ours")
    assert len(found) == 15
    medians = {name: median for name, (median, *_) in found.items()}
    on_gpu = {name: m for name, (m, *_) in picture.spreads(picture.DOCS / "gpu.md", "torch fused / ours").items()}
    many, many_on_gpu = (
        [m for name, m in of.items() if "s of " in name and "of Llama" not in name] for of in (medians, on_gpu)
    )
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    told = re.search(r"small is (\S+) times .* clipping (\S+) times, .* (\d+) to (\d+) times\. On 2 CPU", readme)
    assert told
    gpt2 = [round(m, 1) for name, m in on_gpu.items() if name.startswith("GPT-2")]
    assert [float(n) for n in told.groups()] == [*gpt2, round(min(many_on_gpu)), max(many_on_gpu)]
    told = re.search(r"clipped step of GPT-2 small is (\S+) times as .* (\d+) to (\d+) times as fast", readme)
    assert told
    assert [float(n) for n in told.groups()] == [round(medians["GPT-2 small, clipped"], 1), min(many), max(many)]
    slower = re.search(r"\| slower than torch \| on a CPU(.*?)\|", readme)[1]
    assert sorted(map(float, re.findall(r"\d\.\d+", slower))) == sorted(n for n in medians.values() if n < 1)
    apart = picture.spreads(picture.DOCS / "formats.md", "beside fp32")
    assert apart["fp32, int8 moments"] == (-0.0079, -0.0121, -0.0001)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned on Linux alone")
def test_report_pins_the_threads_of_its_runs() -> None:
    """Each to a CPU of its own; those of a process that was pinned itself have one CPU for all."""
    free = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = [sys.executable, "-m", "bench", "report", "--runs", "1", "--rounds", "2", "--workload", "1x131k"]
    out = subprocess.run(command, cwd=ROOT, env=free, check=True, capture_output=True, text=True, timeout=120).stdout
    assert f"threads: {min(2, len(os.sched_getaffinity(0)))}, OMP_PROC_BIND=true" in out


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, threads) -> None:
    """Ctrl-C in the second round: the first is printed and written."""
    true = step.progress_range

    def interrupted(rounds: int, advance: Callable[[str], None]) -> Iterator[int]:
        for i in true(rounds, advance):
            if i == 1:
                raise KeyboardInterrupt
            yield i

    monkeypatch.setattr(step, "progress_range", interrupted)
    assert main(["step", "--workload", "148x64", "1x131k", "--warm", *options(tmp_path)]) == 130
    out = capsys.readouterr().out
    assert "interrupted: above is what was measured so far" in out
    assert "torch fused" in out
    results = json.loads((tmp_path / "step.json").read_text())["results"]
    assert {r["workload"] for r in results} == {"148x64"}
    assert all(len(r["seconds"]) == 1 for r in results)


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, threads) -> None:
    monkeypatch.setattr(step, "available_memory", lambda device: 1 << 20)
    assert main(["step", "--workload", "llama-7b", *options(tmp_path)]) == 1
    assert "skipped: llama-7b, adamw, fp32: needs" in capsys.readouterr().out.replace("\n", " ")


def test_layers_are_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = step.Bench.__new__(step.Bench)
    fits.case, fits.device, fits.warm = step.Case("llama-7b", "adamw", "fp32"), torch.device("cpu"), False
    fits.dtype, fits.state_dtype = torch.float32, torch.float32
    found = []
    for gigabytes in (20, 80, 640):
        monkeypatch.setattr(step, "available_memory", lambda device, n=gigabytes: n << 30)
        assert fits._fit([Arm("fused_adamw cpu", dict), Arm("torch fused", dict)]) == ""
        found.append(fits.layers)
    assert found[0] < found[1] < found[2] == 32


def test_a_wrong_step_does_not_match() -> None:
    """The oracle of the match column, given ours, torch's, and one whose second moment forgets too fast."""
    groups = cases.WORKLOADS["465-groups"].groups(1)
    start = cases.parameters([shape for shapes, _ in groups for shape in shapes])
    cases.set_gradients(start, 0)
    oracle = measures.Oracle(start, groups, ALGORITHMS["adamw"])
    verdicts = []
    for cls, options in (
        (fused_adamw.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (fused_adamw.AdamW, {"betas": (0.9, 0.99)}),
        (fused_adamw.AdamW, {"eps": 1e-6}),
    ):
        params = cases.parameters([shape for shapes, _ in groups for shape in shapes])
        cases.set_gradients(params, 0)
        optimizer = cls(measures.grouped(params, groups), **{**ALGORITHMS["adamw"].options, **options})
        for _ in measures.checked_steps(params):
            optimizer.step()
        verdicts.append(oracle.judge("", optimizer)[0])
    assert verdicts == [True, True, False, False]


def test_peers_that_fail_are_skipped_and_ours_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step.Case("1x131k", "adamw", "fp32")
    device = torch.device("cpu")
    monkeypatch.setitem(PEERS, "optimi", PEERS["optimi"]._replace(module="no.such.module"))
    (arm,) = arms_of("adamw", DTYPES["fp32"], device, ["optimi"], False)[1:]
    report = {"skipped": [], "results": []}
    made = []

    def broken(groups):
        raise RuntimeError("broken")

    def broken_later(groups):
        made.append(groups)
        return torch.optim.AdamW(groups) if len(made) == 1 else broken(groups)

    step.measure(case, [arm, Arm("later", broken_later, foreign=True)], device, 1, True, report)
    assert "No module named 'no'" in report["skipped"][0]["reason"]
    assert report["skipped"][1]["reason"] == "RuntimeError: broken"
    assert report["results"] == []
    with pytest.raises(RuntimeError, match="broken"):
        step.measure(case, [Arm("fused_adamw cpu", broken)], device, 1, True, report)


@pytest.mark.parametrize("dtypes", [("float32",) * 4, ("bfloat16", "float32", "int8", "bfloat16")])
@pytest.mark.parametrize("written", [1, 3, 4])
def test_stream(dtypes: tuple[str, ...], written: int, one_thread_then_two) -> None:
    """Each line of 64 bytes that is written gains the sum of all lines of its block of 128 elements in all arrays."""
    blocks = 37
    for _ in one_thread_then_two:
        arrays = [torch.empty(128 * blocks, dtype=getattr(torch, d)) for d in dtypes]
        lines = [t.view(torch.int64).view(blocks, -1, 8) for t in arrays]
        for i, t in enumerate(lines):
            t.copy_(torch.arange(t.numel()).view(t.shape) * (i + 1))
        before = [t.clone() for t in lines]
        total = sum(t.sum(1, keepdim=True) for t in before)
        stream.cpu_stream(arrays, written)()
        for i, (t, was) in enumerate(zip(lines, before, strict=True)):
            assert torch.equal(t, was + total if i < written else was)


def test_stream_refuses() -> None:
    with pytest.raises(ValueError, match="a multiple of 128"):
        stream.cpu_stream([torch.zeros(129)], 1)
    with pytest.raises(ValueError, match="of one length"):
        stream.cpu_stream([torch.zeros(128), torch.zeros(256)], 1)
    with pytest.raises(ValueError, match="up to 8 tensors"):
        stream.cpu_stream([torch.zeros(128)] * 9, 1)
    with pytest.raises(ValueError, match="writes 1 to 1 tensors"):
        stream.cpu_stream([torch.zeros(128)], 2)


def test_stream_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench" / "csrc").mkdir(parents=True)
    (tmp_path / "bench" / "csrc" / "stream_cpu.cpp").write_text("int main() { return 0; }")
    monkeypatch.setattr(stream, "ROOT", tmp_path)
    monkeypatch.setenv("CXX", "/no/compiler")
    stream._library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"stream_cpu.cpp cannot be built, which takes a C\+\+ compiler"):
            stream.cpu_stream([torch.zeros(128)], 1)
    finally:
        stream._library.cache_clear()


@pytest.fixture
def one_thread_then_two(threads: None) -> Iterator[int]:
    def each() -> Iterator[int]:
        for n in (1, 2):
            torch.set_num_threads(n)
            yield n

    return each()


# What the papers and torchvision say that these models have.
SIZES = {
    "gpt2": (148, 124_439_808),
    "resnet50": (161, 25_557_032),
    "vit-b": (152, 86_567_656),
    "llama-7b": (291, 6_738_415_616),
    "moe": (3219, 130_892_032),
}


@pytest.mark.parametrize("name", SIZES)
def test_models_have_the_sizes_of_the_models(name: str) -> None:
    workload = cases.WORKLOADS[name]
    shapes = [shape for shapes, _ in workload.groups(workload.layers) for shape in shapes]
    assert (len(shapes), sum(map(math.prod, shapes))) == SIZES[name]


@pytest.mark.parametrize("name", cases.WORKLOADS)
def test_every_workload_is_stepped_right(name: str, target: cases.Target) -> None:
    """The lists that are timed, changed where they change, every dimension cut to 5, and 10000 alike to 2500."""
    workload = cases.WORKLOADS[name]
    cut = 2500 if name == "10000x64" else None
    groups = [
        ([tuple(min(n, 5) for n in s) for s in shapes[:cut]], own) for shapes, own in workload.groups(workload.layers)
    ]
    shapes = [shape for shapes, _ in groups for shape in shapes]
    stepped = []
    for make, dtype, device in (
        (partial(fused_adamw.AdamW, backend=target.backend), torch.float32, target.device),
        (partial(torch.optim.AdamW, foreach=False), torch.float32, "cpu"),
        (partial(torch.optim.AdamW, foreach=False), torch.float64, "cpu"),
    ):
        params = cases.parameters(shapes, dtype, device)
        optimizer = make(measures.grouped(params, groups))
        for t in range(3):
            cases.set_gradients(params, t)
            if workload.change:
                workload.change([(p, p.grad) for p in params], optimizer.state, t)
            optimizer.step()
        found = cases.tensors_of(optimizer)
        names = ("p", "exp_avg", "exp_avg_sq")
        stepped.append({n: torch.cat([t.flatten() for k, t in found.items() if k.endswith(f".{n}")]) for n in names})
    cases.assert_no_worse(*stepped)


def test_host() -> None:
    pytest.importorskip("triton")
    out = bench("host", "--tensors", "3", "--rounds", "2")
    assert "in place" in out
    assert "moved" in out
    assert "capturable, clipped" in out
    assert "DTensor / plain" in out


def test_sharding() -> None:
    """Sizes of shards are those of torch.chunk; a list of 975 tensors is planned as one launch."""
    pytest.importorskip("triton")
    from bench.sharding import piece

    for size in range(12):
        for parts in range(1, 8):
            chunks = [len(chunk) for chunk in torch.empty(size).chunk(parts)]
            assert [piece(size, parts, i) for i in range(parts)] == chunks + [0] * (parts - len(chunks))
    command = [sys.executable, "-W", "error", "-m", "bench.sharding", "--ranks", "8192"]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "8192" in line]
    assert [row[:3] + row[6:7] for row in rows] == [
        ["Llama 70B", "8192", "723 of 723", "1"],
        ["MoE 1T", "8192", "975 of 975", "1"],
    ]


# ---- the paper

TINY = experiments.Plan(seeds=5, every=4, epochs=1, long=15, lengths=(1, 2))


def test_memory(here: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SMALL_VECTOR", formats.SMALL)
    out = here("memory", "--workload", "1x131k", "--threads", "1")
    found = {}
    for line in out.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        if cells:
            found[name] = [float(cell or 0) for cell in cells]
    assert found.keys() == FORMS.keys()
    for name, (parameter, moments, master, held, with_gradient) in found.items():
        size = 2 if "bf16" in name else 4
        assert parameter == size
        assert moments == pytest.approx(2.06 if "int8" in name else 4 if name.startswith("all") else 8, abs=0.04)
        assert master == (4 if "fp32 master" in name else 2 if "kahan" in name or "split16" in name else 0)
        assert held == pytest.approx(parameter + moments + master, abs=0.011)
        assert with_gradient == pytest.approx(held + size, abs=0.011)


@pytest.mark.slow
def test_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, threads) -> None:
    """Every form is trained and compared; the moments of fp32 are those of its shadow, those of int8 near them."""
    monkeypatch.setattr("bench.studies.formats.EPOCHS", 1)
    found = {}
    true = Run.moment_errors
    monkeypatch.setattr(Run, "moment_errors", lambda run: found.setdefault(len(found), true(run)))
    assert main(["formats", "--steps", "3", "--seeds", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"│ {name} " in out for name in FORMS)
    assert (tmp_path / "formats.png").read_bytes().startswith(b"\x89PNG")
    for name, errors in zip(FORMS, found.values(), strict=True):
        for moment, (error, angle) in errors.items():
            exact = "int8" not in name and not name.startswith("all")
            assert error < 1e-12 if exact else 1e-7 < error < 0.02, (name, moment)
            assert angle < (1e-12 if exact else 0.01)


@pytest.mark.slow
def test_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It draws and states everything; what is there is not trained again, what is missing or of other versions is."""
    trained = []
    monkeypatch.setattr(experiments, "QUICK", TINY)
    monkeypatch.setattr(valleys, "RESAMPLES", 20)
    monkeypatch.setattr(
        experiments, "train", lambda batch, device: trained.append(batch) or digits.train(batch, device)
    )
    command = ["paper", "--quick", "--threads", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    for text in (
        "SGDW: the best decay does not depend",
        "AdamW, plain head, not decayed",
        "AdamWR ends within",
        "AdaBoundW errs less",
        "95 % interval",
        "5 seeds, 10 of figure 5",
        "paper.json",
    ):
        assert text in out
    for name in ("1_coupling", "2_networks", "3_schedules", "4_curves", "5_restarts", "6_length", "7_others"):
        assert (tmp_path / f"paper_{name}.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "paper.json").read_text("utf-8"))
    assert len((tmp_path / "paper.md").read_text("utf-8").splitlines()) == 2 + len(report["claims"]) == 2 + 28
    assert len(trained) == len(set(trained)) == len(report["points"]) == 19 * 2 + 2 * 2 + 4 * 2 + 4
    assert report["versions"]["torch"] == torch.__version__
    assert report["plan"]["seeds"] == 5
    assert {claim["verdict"] for claim in report["claims"]} <= {"yes", "no", "unclear"}
    assert {claim["figure"] for claim in report["claims"]} == set("1234567")
    for point in report["points"]:
        cells, found = point["batch"]["cells"], point["result"]
        assert len(cells) == len(found["errors"]) == len(found["losses"])
        assert found["epochs"][-1] == point["batch"]["epochs"]
        assert all(len(row) == len(found["epochs"]) for row in found["errors"] + found["losses"])

    lines = (tmp_path / "paper_points.jsonl").read_text("utf-8").splitlines()
    other = json.loads(lines[0])
    other["versions"]["torch"] = "1.0"
    kept = [json.dumps(other), *lines[1:-1], lines[-1][:100]]
    (tmp_path / "paper_points.jsonl").write_text("\n".join(kept) + "\n", "utf-8")
    again = [json.loads(line)["batch"]["schedule"] for line in (lines[0], lines[-1])]
    trained.clear()
    monkeypatch.setattr(experiments.figures, "draw", lambda *results: None)
    assert main(command) == 0
    assert sorted(batch.schedule for batch in trained) == sorted(again)
    assert json.loads((tmp_path / "paper.json").read_text("utf-8"))["claims"] == report["claims"]


def test_paper_finds_results_where_they_belong(tmp_path: Path) -> None:
    """Batches of some seeds each are put together again, by learning rate, decay and seed."""

    def error(batch: digits.Batch, cell: tuple[float, float, int], epoch: int) -> float:
        return hash((batch.algorithm, batch.schedule, batch.network, batch.epochs, *cell, epoch)) / 2**64

    points = experiments.Points(tmp_path / "points.jsonl", "cpu")
    grids = experiments.grid_batches(TINY, "Adam", "step", "ordinary")
    lengths = [batch for epochs in TINY.lengths for batch in experiments.length_batches(TINY, epochs)]
    long = experiments.long_batches(TINY, "SGDW", "restarts")
    assert len(grids) == len(long) == len(lengths) / 2 == 2
    for batch in (*grids, *lengths, *long):
        epochs = [batch.epochs - 1, batch.epochs]
        found = [[error(batch, cell, epoch) for epoch in epochs] for cell in batch.cells]
        points.add(batch, {"epochs": epochs, "errors": found, "losses": found})
    points = experiments.Points(tmp_path / "points.jsonl", "cpu")
    assert points.missing([*grids, *lengths, *long]) == []
    assert experiments.Points(tmp_path / "points.jsonl", "cuda").missing(grids) == grids

    grid = experiments.grid_of(TINY, points, "Adam", "step", "ordinary")
    assert grid.errors.shape == (5, len(grid.rates), len(grid.decays)) == (5, 2, 5)
    for (seed, i, j), value in np.ndenumerate(grid.errors):
        assert value == error(grids[0], (grid.rates[i], grid.decays[j], seed), 1)
    curve = experiments.curve_of(points, long)
    assert curve.errors.shape == (10, 2)
    for (seed, i), value in np.ndenumerate(curve.errors):
        assert value == error(long[0], (curve.rate, curve.decay, seed), curve.epochs[i])
    found = experiments.lengths_of(TINY, points)
    assert found.errors.shape == (5, 2, len(found.decays))
    for (seed, i, j), value in np.ndenumerate(found.errors):
        cell = (experiments.LENGTH_RATE, found.decays[j], seed)
        assert value == error(lengths[2 * i], cell, found.epochs[i])
    assert found.steps.tolist() == [64, 128]


@pytest.mark.slow
def test_paper_in_several_processes() -> None:
    batches = [digits.Batch("AdamW", "cosine", 1, 1, ((1e-2, decay, 0),)) for decay in (0.0, 0.1)]
    found = dict(experiments.results(batches, 2, "cpu"))
    assert found == dict(experiments.results(batches, 1, "cpu"))
    assert found[batches[0]] != found[batches[1]]


@pytest.mark.parametrize(
    ("algorithm", "network"),
    [*((name, "normalized") for name in digits.PAPERS), *(("AdamW", network) for network in digits.NETWORKS)],
)
def test_networks_side_by_side_are_those_trained_alone(algorithm: str, network: str) -> None:
    cells = ((4e-3, 1e-2, 0), (1e-2, 3e-2, 1))
    found = digits.train(digits.Batch(algorithm, "restarts", 3, 2, cells, network))
    assert found["epochs"] == [2, 3]
    for k, (lr, decay, seed) in enumerate(cells):
        x, y, test_x, test_y = digits.digits(seed)
        assert (len(x), len(test_x)) == (256, 1541)
        model = digits.network(seed, network)
        layers = {"plain head, not decayed": (0, 3), "plain head, alone decayed": (7,)}.get(network, range(8))
        parts: dict[bool, list[torch.Tensor]] = {True: [], False: []}
        for i, layer in enumerate(model):
            parts[i in layers] += layer.parameters()
        groups = [{"params": parts[True]}, {"params": parts[False], "weight_decay": 0.0}]
        kind, options = getattr(fused_adamw, algorithm), digits.PAPERS[algorithm]
        optimizer = kind([group for group in groups if group["params"]], lr=lr, weight_decay=decay, **options)
        schedule = digits.SCHEDULES["restarts"](optimizer, 3, 16)
        shuffle = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for picked in torch.randperm(256, generator=shuffle).split(16):
                optimizer.zero_grad()
                F.cross_entropy(model(x[picked]), y[picked]).backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            assert found["losses"][k][-1] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-3)
            error = (model(test_x).argmax(1) != test_y).double().mean().item()
            assert found["errors"][k][-1] == pytest.approx(error, abs=2 / 1541)


@pytest.mark.gpu
def test_networks_on_a_gpu_are_those_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without convolutions: of those a virtual GPU lacks the depthwise kernel."""

    def linear(seed: int, kind: str) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), digits.Scaled())

    monkeypatch.setattr(digits, "network", linear)
    batch = digits.Batch("AdamW", "cosine", 1, 1, ((4e-3, 1e-2, 0), (1e-2, 3e-2, 1)))
    cpu, cuda = (digits.train(batch, device) for device in ("cpu", "cuda"))
    assert cuda["epochs"] == cpu["epochs"] == [1]
    assert np.array(cuda["losses"]) == pytest.approx(np.array(cpu["losses"]), rel=1e-3)
    assert np.array(cuda["errors"]) == pytest.approx(np.array(cpu["errors"]), abs=2 / 1541)


@pytest.mark.parametrize("network", digits.NETWORKS)
def test_scale_does_not_matter_where_a_normalization_follows(network: str) -> None:
    """In the network of the headline this holds for every weight; the others say where it does not."""
    images, *_ = digits.digits(0, training=1024)
    invariant = {}
    for name in dict(digits.network(0, network).named_parameters()):
        model = digits.network(0, network)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.dim() == 1):
                p += torch.arange(len(p)) / len(p)  # biases begin as 0, which has no scale
            before = model(images)
            model.get_parameter(name).mul_(8)
            invariant[name] = torch.allclose(model(images), before, rtol=1e-2, atol=1e-2)
    convolutions = {"0.weight", "3.weight"}
    expected = {"normalized": {*convolutions, "7.weight"}, "unnormalized": set()}.get(network, convolutions)
    assert {name for name, holds in invariant.items() if holds} == expected


def grid(moves: float, noise: float = 0.0) -> valleys.Grid:
    """Errors with a valley whose decay moves by so many octaves for each octave of the learning rate."""
    rng = np.random.default_rng(0)
    rates, decays = 2.0 ** np.arange(4), np.array([0.0, *2.0 ** np.arange(9)])
    valley = 5 + moves * np.arange(-1, 3)
    errors = 0.04 + 0.002 * (np.arange(10) - valley[:, None]) ** 2
    noisy = errors + noise * rng.standard_normal((6, 4, 10))
    return valleys.Grid("SGD", "cosine", "normalized", rates, decays, noisy)


@pytest.mark.parametrize("moves", [-1, 0, 1])
def test_paper_measures_how_the_best_decay_moves(moves: int) -> None:
    found = grid(moves, noise=1e-3)
    value, low, high = valleys.bootstrap(valleys.shift(found), 6)
    assert low <= value <= high
    assert value == pytest.approx(moves, abs=0.1)
    for expected in (-1, 0, 1):
        assert claims.about(expected, "").verdict(low, high) == ("yes" if expected == moves else "no")
    if moves:
        assert claims.BELOW_0.verdict(low, high) == ("yes" if moves < 0 else "no")
    centre = valleys.valleys(found)
    assert centre.rows.tolist() == [0, 1, 2, 3]
    assert centre.best == pytest.approx(4 + moves * np.arange(-1, 3), abs=0.5)
    assert (centre.low <= centre.best).all()
    assert (centre.best <= centre.high).all()


def test_paper_takes_intervals_as_scipy_does() -> None:
    from scipy import stats

    values = np.random.default_rng(1).standard_normal(8)
    options = {"vectorized": False, "method": "percentile", "n_resamples": valleys.RESAMPLES}
    found = stats.bootstrap(
        (np.arange(8),), lambda seeds: values[seeds].mean(), **options, rng=np.random.default_rng(0)
    )
    assert valleys.bootstrap(lambda seeds: float(values[seeds].mean()), 8)[1:] == pytest.approx(
        found.confidence_interval, rel=1e-12
    )


def test_paper_leaves_out_what_has_no_valley() -> None:
    flat = grid(0)
    flat.errors[:, :, :6] = flat.errors.min()  # any small decay is as good
    assert flat.usable() == []
    assert valleys.valleys(flat).rows.tolist() == []
    assert np.isnan(valleys.shift(flat)(np.arange(6)))
    assert claims.BELOW_0.verdict(np.nan, np.nan) == claims.BETWEEN.verdict(np.nan, np.nan) == "unclear"
    claim = claims.judge("1", "", claims.BELOW_0, claims.OCTAVES, valleys.shift(flat), 6)
    assert (claim.value, claim.cells()[3:]) == (None, ("fewer than two valleys inside the grid", "", "unclear"))
    claim = claims.Claim("1", "", "0", claims.POINTS, -0.004, -1.5, 0.25, "unclear")
    assert claim.cells()[3:5] == ("0.00 points", "−1.50 … +0.25")
    worse = grid(0)
    worse.errors[:, 2] += 2 * valleys.USABLE
    assert worse.usable() == [0, 1, 3]


def test_paper_measures_the_length_of_the_run() -> None:
    """A best decay of λ_norm / √steps shrinks by half an octave for each octave, and normalized not at all."""
    epochs, decays = 2 ** np.arange(1, 6), 2.0 ** (np.arange(25) / 2)
    valley = 16 - np.arange(5)
    errors = np.tile(0.04 + 0.002 * (np.arange(25) - valley[:, None]) ** 2, (3, 1, 1))
    lengths = valleys.Lengths(epochs, 16 * epochs, decays, errors)
    seeds = np.arange(3)
    assert valleys.shrinkage(lengths, False)(seeds) == pytest.approx(-0.5)
    assert valleys.shrinkage(lengths, False, range(2))(seeds) == pytest.approx(-0.5)
    assert valleys.shrinkage(lengths, True)(seeds) == pytest.approx(0, abs=1e-12)
    assert np.isnan(valleys.shrinkage(lengths, False, range(1))(seeds))


def test_paper_takes_the_network_at_the_end_of_the_last_cycle() -> None:
    epochs = np.arange(1, 16)
    errors = np.arange(15.0)[None].repeat(2, 0)
    curve = claims.Curve("AdamW", "restarts", 1e-3, 0.1, epochs, errors, errors)
    assert claims.taken(curve)[0].tolist() == [0, 0, 2, 2, 2, 2, 6, 6, 6, 6, 6, 6, 6, 6, 14]
    assert claims.taken(curve._replace(schedule="cosine")) is errors


def test_paper_compares_at_equal_training_loss() -> None:
    losses = np.tile(np.geomspace(1, 1e-2, 40), (3, 1))
    a, b = (
        claims.Curve("Adam", "cosine", 1, 1, np.arange(40), 0.05 + shift + 0 * losses, losses) for shift in (0, 0.01)
    )
    assert claims.at_equal_loss(a, b)(np.arange(3)) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["step", "--workload", "gpt3"], "no workload 'gpt3': there are gpt2, resnet50"),
        (["step", "--algorithm", "lion"], "invalid choice: 'lion'"),
        (["step", "--against", "nobody"], "invalid choice: 'nobody'"),
        (["limit", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["report", "no/such/file.json"], "no/such/file.json is not a file"),
        (["step", "--rounds", "0"], "0 is not a whole number of at least 1"),
        (["step", "--json", "no/such/folder/file.json"], "is not a file name in a directory that exists"),
        (["demo", "--steps", "-1"], "-1 is not a whole number of at least 1"),
        (["demo", "--out", __file__], "is not a directory"),
        (["paper", "--out", __file__], "is not a directory"),
        (["paper", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["paper", "--threads", "0"], "0 is not a whole number of at least 1"),
    ],
)
def test_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
