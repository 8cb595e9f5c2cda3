"""Which backend runs, what is said when it is not the best one, and what importing the package needs: nothing."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fused_adamw
from fused_adamw import backends
from tests import cases

WHY = "the extension fused_adamw._C was not built"


@pytest.fixture
def not_built(monkeypatch):
    """As if the package had been installed without its extension."""
    monkeypatch.setitem(sys.modules, "fused_adamw._C", None)
    backends._load_native.cache_clear()
    backends._warn_once.cache_clear()
    yield
    backends._load_native.cache_clear()
    backends._warn_once.cache_clear()


def test_the_native_backend_is_the_choice_for_cpu_tensors():
    optimizer = fused_adamw.AdamW(cases.parameters([(3,)]))
    assert optimizer.backend == {torch.device("cpu"): "cpu"}


def test_without_the_extension_it_works_and_warns_once(not_built):
    params, twins = cases.parameters([(5,), (2, 3)]), cases.parameters([(5,), (2, 3)])
    a, b = fused_adamw.AdamW(params), torch.optim.AdamW(twins)
    with pytest.warns(RuntimeWarning, match=f"right but slow: cpu: {WHY}; build it with: pip install") as record:
        for t in range(5):
            cases.set_gradients(params, t)
            cases.set_gradients(twins, t)
            a.step()
            b.step()
    assert len(record) == 1
    assert a.backend == {torch.device("cpu"): "reference"}
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def test_a_warning_of_ours_is_an_error_in_this_suite(not_built):
    """By the filters of pyproject.toml, which leave out what other packages warn of."""
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeWarning, match="right but slow"):
        fused_adamw.AdamW([p]).step()
    warnings.warn("another package's", FutureWarning, stacklevel=1)


def test_without_the_extension_asking_for_it_raises(not_built):
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    optimizer = fused_adamw.AdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: {WHY}"):
        optimizer.step()


def test_asking_for_the_reference_does_not_warn():
    backends._warn_once.cache_clear()
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_adamw.AdamW([p], backend="reference").step()


@pytest.mark.gpu
def test_cpu_backend_refuses_cuda_tensors():
    (p,) = cases.parameters([(3,)], device="cuda")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: it steps tensors on cpu, not on cuda"):
        fused_adamw.AdamW([p], backend="cpu").step()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_neither_the_extension_nor_a_compiler():
    code = (
        "import sys, fused_adamw; print(sorted(m for m in ('triton', 'fused_adamw._C', 'ninja') if m in sys.modules))"
    )
    assert python(code).strip() == "[]"


def test_the_kernels_of_triton_are_installed_inside_the_package():
    code = "import importlib.util as u; print(bool(u.find_spec('fused_adamw.triton_kernels')))"
    assert python(code).strip() == "True"


def test_python_m_fused_adamw():
    report = subprocess.run([sys.executable, "-m", "fused_adamw"], capture_output=True, text=True, check=True).stdout
    assert f"fused_adamw {fused_adamw.__version__}, torch {torch.__version__}" in report
    assert "backend 'cpu' (cpu): available" in report
    assert "cpu tensors are stepped by 'cpu'" in report


def test_python_m_fused_adamw_says_why_not():
    code = (
        "import sys, runpy; sys.modules['fused_adamw._C'] = None; runpy.run_module('fused_adamw', run_name='__main__')"
    )
    report = python(code)
    assert f"backend 'cpu' (cpu): {WHY}" in report
    assert "cpu tensors are stepped by 'reference'" in report


def test_the_cuda_part_is_there_or_says_what_is_missing():
    """Importing it needs no driver; without a device it is refused by name, and the CPU is stepped all the same."""
    cuda = backends.named("cuda")
    built = hasattr(backends.native(), "CudaKernels")
    if torch.version.cuda is None:
        assert "is built without CUDA" in cuda.missing()
    elif not built:
        assert "without its CUDA part; build it, where nvcc is, with: FUSED_ADAMW_CUDA=1 pip install" in cuda.missing()
    elif not torch.cuda.is_available():
        assert cuda.missing() == "it is built, but there is no CUDA device"
    else:
        assert not cuda.missing()
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: it steps tensors on cuda, not on cpu"):
        fused_adamw.AdamW([p], backend="cuda").step()
    fused_adamw.AdamW([p], backend="cpu").step()


@pytest.mark.parametrize(
    ("wanted", "nvcc", "text"),
    [
        ("1", "echo release 1.0,", "nvcc is of CUDA 1, torch .* of CUDA .*: set CUDA_HOME to a toolkit of torch's"),
        ("1", "exit 1", "nvcc does not run .*; install the CUDA toolkit, or set CUDA_HOME"),
        ("2", "exit 1", "FUSED_ADAMW_CUDA=2: must be 0, 1 or unset"),
    ],
)
def test_a_cuda_part_that_cannot_be_built_is_told(wanted, nvcc, text, tmp_path):
    """Before anything is compiled."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    if torch.version.cuda is None and wanted == "1":
        text = "torch .* is built without CUDA"
    env = {**os.environ, "CUDA_HOME": str(tmp_path), "FUSED_ADAMW_CUDA": wanted}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode
    assert re.search(text, done.stderr.splitlines()[-1]), done.stderr
