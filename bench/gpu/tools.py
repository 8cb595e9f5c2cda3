"""Run other programs: the build of the extension, pytest, compute-sanitizer, ncu."""

import csv
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

import fused_adamw
from bench.gpu.record import Record
from bench.stream import random
from tests import cases

ROOT = Path(__file__).resolve().parents[2]
ENDING = 12.0  # seconds that pytest takes to end its workers
HAS_CUDA = "import sys; from fused_adamw import backends; sys.exit(not hasattr(backends.native(), 'CudaKernels'))"


def build(record: Record) -> None:
    """Build the extension with its CUDA part into the checkout, unless it is there; nothing is installed."""
    if subprocess.run([sys.executable, "-c", HAS_CUDA], cwd=ROOT).returncode == 0:
        print("the extension is built")
        return
    major, minor = torch.cuda.get_device_capability()
    environment = {"FUSED_ADAMW_CPU": "1", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX", **os.environ}
    command = [sys.executable, "-m", "fused_adamw", "build", "--force"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    if subprocess.run([sys.executable, "-c", HAS_CUDA], cwd=ROOT).returncode:
        record.note("built without the CUDA part: see logs/build.log")
        raise SystemExit(1)


# ---- pytest


def tests(record: Record) -> None:
    """Run the tests marked gpu, on several processes where pytest-xdist is there."""
    results = record.folder / "logs" / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-x", "tests/test_backends.py"] if record.tiny else ["tests"]
    if importlib.util.find_spec("xdist") and not record.tiny:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_PROC_BIND": "false"}
    process = subprocess.Popen([*command, f"--junitxml={results}"], cwd=ROOT, env=environment)
    try:
        status = process.wait(max(1.0, record.seconds_left() - ENDING))
    except subprocess.TimeoutExpired:
        record.note("interrupted at the limit: not all tests have run")
        process.send_signal(signal.SIGINT)  # it writes what there is
        status = process.wait(ENDING)
    if results.exists():
        count(record, results)
        results.unlink()
    raise SystemExit(status)


def count(record: Record, results: Path) -> None:
    """Write how many tests passed, and which failed, with the first line of the error."""
    cases_of = list(ET.parse(results).iter("testcase"))
    bad = [(case, found) for case in cases_of for found in case if found.tag in ("failure", "error")]
    skipped = sum(found.tag == "skipped" for case in cases_of for found in case)
    for case, found in bad:
        name = f"{case.get('classname')}::{case.get('name')}"
        record.emit(kind="test", name=name, wrong=(found.get("message") or found.tag).splitlines()[0][:200])
    names = {id(case) for case, _ in bad}
    passed = len(cases_of) - len(names) - skipped
    record.note(f"tests marked gpu: {passed} passed, {len(names)} failed, {skipped} skipped")


# ---- NVIDIA's tools


def found(record: Record, tool: str) -> str:
    """Return where a tool is; where it is missing, note it and end the stage well."""
    places = [shutil.which(tool), *sorted(map(str, Path("/opt/nvidia").glob(f"nsight-compute/*/{tool}")))[::-1]]
    for place in filter(None, [*places, shutil.which(tool, path="/usr/local/cuda/bin")]):
        return place
    record.note(f"not run: there is no {tool} here")
    raise SystemExit(0)


def sanitize(record: Record, tool: str, backend: str) -> None:
    """Run compute-sanitizer's memcheck or racecheck over small steps on a backend."""
    command = [found(record, "compute-sanitizer"), "--tool", tool, "--print-limit", "5", "--error-exitcode", "9"]
    # Without torch's cache an access beyond a tensor is one beyond an allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    status, text = output(record, [*command, *part(record, "small_steps", backend)], environment)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text) or [f"no summary, status {status}"]
    record.note(f"{tool}, {backend}: {summary[-1]}")
    raise SystemExit(status)


def output(record: Record, command: list[str], environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Return exit status and output of a program; one that is ended at the limit of the stage has status 124."""
    try:
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, **options, timeout=record.seconds_left())
        status, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, text = 124, error.stdout or b""
    print(text.decode(errors="replace"), flush=True)
    return status, text.decode(errors="replace")


def small_steps(record: Record, backend: str) -> None:
    """Make two steps of tensors of awkward sizes with each kind of kernel, for compute-sanitizer."""
    bf16, f32 = torch.bfloat16, torch.float32
    shapes = [(n, 1) for n in (1, 7, 64, 127, 128, 129, 511, 513, 4096, 5003, 20_011)]
    for name, dtype, options in (
        ("AdamW", f32, {}),
        ("SGDW", f32, {"momentum": 0.9}),
        ("AdamW", bf16, {"state_dtype": "int8", "rounding": "stochastic"}),
        ("AdamW", bf16, {"master": "split16"}),
        ("AdamW", f32, {"max_grad_norm": 1.0}),
        ("AdamW", f32, {"capturable": True}),
    ):
        params = cases.parameters(shapes, dtype, "cuda")
        params.append(torch.nn.Parameter(torch.ones(1010, dtype=dtype, device="cuda")[3:1003]))
        optimizer = cases.make(name, params, options, backend=backend)
        for t in range(2):
            cases.set_gradients(params, t)
            optimizer.step()
        torch.cuda.synchronize()


SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "SchedulerStats", "WarpStateStats")


def ncu(record: Record) -> None:
    """Write the counters of one launch over a large tensor, of each backend, in float32 and bfloat16."""
    command = [found(record, "ncu"), "--clock-control", "none", "-k", "regex:step_kernel", "--csv", "--page", "details"]
    command += ["--launch-skip", "2", "--launch-count", "1", "--target-processes", "all"]
    command += [argument for name in SECTIONS for argument in ("--section", name)]
    for dtype, backend in itertools.product(("float32", "bfloat16"), ("triton", "cuda")):
        if not record.time_left(f"{backend}, {dtype}"):
            return
        status, text = output(record, [*command, *part(record, "large_steps", backend, dtype)])
        counters = counters_of(text)
        for name, unit, value in counters:
            record.emit(kind="counter", backend=backend, dtype=dtype, name=name, unit=unit, value=value)
        if not counters:
            record.note(f"{backend}, {dtype}: ncu gave nothing, status {status}: see its log")


def counters_of(text: str) -> list[tuple[str, str, str]]:
    """Return name, unit and value of each metric in ncu's CSV; other lines may stand before it."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = csv.DictReader(lines)
    return [(row["Metric Name"], row["Metric Unit"], row["Metric Value"]) for row in rows if row.get("Metric Name")]


def large_steps(record: Record, backend: str, dtype: str) -> None:
    """Make four steps of one tensor, for ncu."""
    storage = getattr(torch, dtype)
    p = torch.nn.Parameter(random(5000 if record.tiny else 1 << 26, storage, torch.device("cuda")))
    p.grad = random(p.numel(), storage, torch.device("cuda"))
    optimizer = fused_adamw.AdamW([p], backend=backend, state_dtype=storage)
    for _ in range(4):
        optimizer.step()
    torch.cuda.synchronize()


def part(record: Record, function: str, *arguments: str) -> list[str]:
    """Return the command that runs a function of this module in a process of its own."""
    common = [str(record.folder), record.stage, "1000", *(["--tiny"] if record.tiny else [])]
    return [sys.executable, "-m", "bench.gpu", *common, f"bench.gpu.tools.{function}", *arguments]
