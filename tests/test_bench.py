"""Smoke runs of the bench: what it prints and writes, never how fast anything is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from bench.__main__ import main

ROOT = Path(__file__).parent.parent


def bench(*argv: str) -> str:
    """Output of the bench in a process of its own, which may pin its threads and set their number."""
    command = [sys.executable, "-W", "error", "-m", "bench", *argv]
    environment = {**os.environ, "OMP_PROC_BIND": "false"}  # the tests share their CPUs
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    out = bench("demo", "--steps", "1", "--threads", "1", "--out", str(tmp_path / "new"))
    for text in ("threads", "validation", "28 bytes per parameter", "fused_adamw.AdamW", "fused=True", "demo.png"):
        assert text in out
    assert (tmp_path / "new" / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "step.json"
    workloads = ["148x64", "1x131k"] if dtype == "float32" else ["148x64"]
    options = ["--rounds", "2", "--all", "--threads", "1", "--dtype", dtype, "--json", str(file)]
    out = bench("step", "--workload", *workloads, *options)
    assert "✓" in out
    assert "✗" not in out
    report = json.loads(file.read_text())
    assert report["environment"]["threads"].startswith("1,")
    assert report["copy_gb_per_s"] > 0
    arms = {"fused_adamw", "torch fused", "torch for-loop", "torch foreach"}
    if dtype == "bfloat16":
        arms.add("fused_adamw, state too")
    assert {(r["workload"], r["arm"]) for r in report["results"]} == {(w, a) for w in workloads for a in arms}
    for result in report["results"]:
        assert result["match"]
        assert len(result["seconds"]) == 2
        if result["arm"] == "fused_adamw":
            assert result["bytes"] == (28 if dtype == "float32" else 22) * result["parameters"]


def test_host() -> None:
    pytest.importorskip("triton")
    out = bench("host", "--tensors", "3", "--rounds", "2")
    assert "in place" in out
    assert "moved" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["step", "--workload", "gpt3"], "no workload 'gpt3': there are gpt2, 1000x1k"),
        (["step", "--rounds", "0"], "0 is not a whole number of at least 1"),
        (["step", "--json", "no/such/folder/file.json"], "is not a file name in a directory that exists"),
        (["demo", "--steps", "-1"], "-1 is not a whole number of at least 1"),
        (["demo", "--out", __file__], "is not a directory"),
    ],
)
def test_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
