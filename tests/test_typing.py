"""What a type checker sees of the package as it is installed, from outside of the checkout."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fused_adamw import backends, contract, options

RIGHT = """\
import torch
import fused_adamw

model = torch.nn.Linear(2, 3)
groups = fused_adamw.param_groups(model, 0.1)
optimizer = fused_adamw.AdamW(groups, lr=1e-3, state_dtype="bfloat16", rounding="stochastic", backend="cpu")
schedule = fused_adamw.CosineWarmRestarts(optimizer, T_0=10)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
norm: torch.Tensor | None = optimizer.grad_norm
"""
WRONG = {
    'fused_adamw.Adam([], rounding="stochastik")': "arg-type",
    'fused_adamw.SGD([], master="fp16")': "arg-type",
    'fused_adamw.SGDW([], backend="gpu")': "arg-type",
    'fused_adamw.AdamW([], state_dtype="bf16")': "arg-type",
    "fused_adamw.AdamW([], weight_deacy=0.1)": "call-arg",
    "fused_adamw.AdamW([]).stepp()": "attr-defined",
}


@pytest.mark.slow
def test_mypy_reads_the_installed_package(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text("\n".join(["import fused_adamw", *WRONG]))
    cache = Path(__file__).parents[1] / ".mypy_cache" / "tests"
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-pretty",
        "--cache-dir",
        str(cache),
        "right.py",
        "wrong.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {
        int(line.split(":")[1]): line.rpartition("[")[2].rstrip("]") for line in errors if line.startswith("wrong")
    }
    assert found == dict(enumerate(WRONG.values(), 2)), done.stdout + done.stderr
    assert len(errors) == len(WRONG), done.stdout


def test_the_literals_are_what_there_is() -> None:
    assert get_args(options.Backend) == tuple(backend.name for backend in backends.BACKENDS)
    assert get_args(options.Master) == tuple(contract.MASTER_KEYS)
    _, names = get_args(options.StateDtype)
    for name in get_args(names):
        group = {"state_dtype": name}
        options.name_dtype(group)
        assert group["state_dtype"] in (*options.DTYPES, "int8")
