"""Check and measure everything on a machine with a GPU, in stages, and keep what they gave in a folder.

Each stage is one process or several side by side, in process groups of their own, and ends at its limit; later stages
run whatever became of earlier ones. After each the folder holds what there is.
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.gpu.record import Record, rows_of, write_rows

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 9.0
RESERVE = 6.0  # seconds that the report takes
LEAST = 5.0  # seconds that a stage is started for
KEPT = 120  # lines of a log, at its beginning and at its end


class Stage(NamedTuple):
    """Describe what runs under one limit: functions of modules, with their arguments, side by side."""

    seconds: int  # of the MINUTES; in proportion where there are more or fewer
    what: str
    parts: tuple[tuple[str, ...], ...]


# By worth: a machine that is taken away leaves what comes first.
STAGES = {
    "build": Stage(120, "the extension, with its CUDA part", (("bench.gpu.tools.build",),)),
    "facts": Stage(25, "the machine", (("bench.gpu.checks.facts",),)),
    "parity": Stage(
        70,
        "bits of every optimizer and format",
        (("bench.gpu.checks.parity", "triton"), ("bench.gpu.checks.parity", "cuda")),
    ),
    "ceilings": Stage(20, "what the memory allows", (("bench.gpu.times.ceilings",),)),
    "large": Stage(60, "lists of 100 M elements and more", (("bench.gpu.times.large",),)),
    "tests": Stage(
        150,
        "the tests marked gpu, and compute-sanitizer",
        (
            ("bench.gpu.tools.tests",),
            *(("bench.gpu.tools.sanitize", tool, b) for tool in ("memcheck", "racecheck") for b in ("triton", "cuda")),
        ),
    ),
    "small": Stage(60, "lists of small tensors", (("bench.gpu.times.small",),)),
    "models": Stage(50, "training steps of a GPT-2 and a ResNet", (("bench.gpu.models.train",),)),
    "formats": Stage(60, "formats of parameters and moments", (("bench.gpu.times.formats",),)),
    "clipping": Stage(25, "clipping by the global norm", (("bench.gpu.times.clipping",),)),
    "curve": Stage(25, "GB/s against size", (("bench.gpu.times.curve",),)),
    "sweep": Stage(60, "other chunks, warps, widths, hints", (("bench.gpu.sweep.sweep",),)),
    "ncu": Stage(45, "ncu's counters of one launch", (("bench.gpu.tools.ncu",),)),
    "peers": Stage(45, "other projects' optimizers", (("bench.gpu.times.peers",),)),
}


def run(args: argparse.Namespace) -> int:
    """Run the stages and write the folder, or write its summary anew; 0 where all stages ended well."""
    from bench.gpu import report

    if args.report:
        report.write(args.report)
        report.draw(args.report)
        print(report.table_of_docs(args.report))
        return 0
    folder = args.out or ROOT / "bench" / "results" / folder_name()
    folder.mkdir(parents=True, exist_ok=True)
    stages = {name: stage for name, stage in STAGES.items() if name in (args.stages or STAGES)}
    print(f"writing to {folder}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    well = run_stages(stages, folder, 60 * args.minutes, args.tiny)
    report.draw(folder)
    print((folder / "summary.md").read_text(), flush=True)
    return 0 if well else 1


def folder_name() -> str:
    """Return the GPU's name and the date; a process of its own asks, so that this one holds no GPU memory."""
    code = "import torch; print(torch.cuda.get_device_name())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise SystemExit(f"python -m bench gpu needs a GPU, and torch sees none: {why[0]}")
    name = re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().splitlines()[-1].lower()).strip("-")
    return f"{name}-{datetime.date.today()}"


def run_stages(stages: dict[str, Stage], folder: Path, seconds: float, tiny: bool = False) -> bool:
    """Run them one after the other within so many seconds; return whether all ended well.

    A stage that was run before in this folder replaces what it gave.
    """
    from bench.gpu import report

    end = time.monotonic() + seconds
    well = True
    for name, stage in stages.items():
        before = [row for row in rows_of(folder) if row["stage"] == name]
        limit = min(stage.seconds * seconds / (60 * MINUTES), end - time.monotonic() - RESERVE)
        began = time.monotonic()
        if limit < LEAST * seconds / (60 * MINUTES):
            rc, note = None, "not run: no time was left"
        else:
            write_rows(folder, [row for row in rows_of(folder) if row not in before])
            before = []
            print(f"{name}: {stage.what} (at most {limit:.0f} s)", flush=True)
            rc, note = run_one(name, stage, folder, limit, tiny)
        took = time.monotonic() - began
        if not before:
            Record(folder, name).emit(kind="stage", rc=rc, seconds=round(took, 1), note=note)
        print(f"{name}: {note or f'rc {rc}'}, {took:.0f} s", flush=True)
        well = well and rc == 0
        report.write(folder)
    return well


def run_one(name: str, stage: Stage, folder: Path, limit: float, tiny: bool) -> tuple[int, str]:
    """Run the parts of a stage; return an exit status, the first that is not 0, and what is to be said of it."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "99"}
    common = [str(folder), name, f"{limit:.1f}", *(["--tiny"] if tiny else [])]
    running: list[tuple[Path, subprocess.Popen]] = []
    end = time.monotonic() + limit
    statuses, late = [], []
    try:
        for part in stage.parts:
            log = logs / f"{'-'.join((name, *part[1:]))}.log"
            command = [sys.executable, "-m", "bench.gpu", *common, *part]
            with log.open("w") as out:
                options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
                running.append(
                    (log, subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options))
                )
        for log, process in running:
            try:
                statuses.append(process.wait(max(0.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                statuses.append(124)
                late.append(log.stem)
    finally:
        for log, process in running:
            end_group(process)
            shorten(log)
    note = f"ended at its limit: {', '.join(late)}" if late else ""
    return next((rc for rc in statuses if rc), 0), note


def end_group(process: subprocess.Popen) -> None:
    """End a process and everything that it started, which may outlive it, and wait until it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for _ in range(20):
            process.poll()
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            time.sleep(0.1)


def shorten(log: Path) -> None:
    """Keep the beginning and the end of a log."""
    lines = [line[:300] for line in log.read_text(errors="replace").splitlines()]
    if len(lines) > 2 * KEPT:
        lines = [*lines[:KEPT], f"... {len(lines) - 2 * KEPT} lines ...", *lines[-KEPT:]]
    log.write_text("\n".join(lines) + "\n")
