"""The whole optimizer on Triton's interpreter: the host code that drives a GPU drives CPU tensors, in CI.

The interpreter is chosen when triton is imported, hence the process of its own. It truncates bfloat16 instead of
rounding it, so that narrow storage is left to tests/test_triton_kernels.py, which executes the compiled code.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_kernels import needs_interpreter

HERE = Path(__file__).parent
FILES = ["test_plan.py", "test_optimizers.py", "test_errors.py", "test_checkpoints.py", "test_state.py"]
LEFT_OUT = "dtypes or bfloat16 or sentinels or moments_keep or goes_on_from or dcp or (default_dtype and int8)"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_suite_in_the_interpreter():
    needs_interpreter()
    files = [str(HERE / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"cpu-triton and not ({LEFT_OUT})"]
    done = subprocess.run(
        [*command, *files],
        cwd=HERE.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " failed" not in done.stdout
    assert int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) > 100, done.stdout
