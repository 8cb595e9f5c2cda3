"""Which backend runs, what is said when it is not the best one, and what importing the package needs: nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fused_adamw
from fused_adamw import backends, build
from tests import cases

WHY = "the extension fused_adamw._C was not built"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty folder in place of the package's, and another in place of the user's cache; nothing is installed."""
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    monkeypatch.setattr(build, "sources", lambda: ROOT / "csrc")
    monkeypatch.setattr(build, "hidden", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def not_built(place):
    """As if the package had been installed without its extension."""
    backends._load_native.cache_clear()
    backends.warn_once.cache_clear()
    yield
    backends._load_native.cache_clear()
    backends.warn_once.cache_clear()


def test_the_native_backend_is_the_choice_for_cpu_tensors():
    optimizer = fused_adamw.AdamW(cases.parameters([(3,)]))
    assert optimizer.backend == {torch.device("cpu"): "cpu"}


def test_without_the_extension_it_works_and_warns_once(not_built):
    params, twins = cases.parameters([(5,), (2, 3)]), cases.parameters([(5,), (2, 3)])
    a, b = fused_adamw.AdamW(params), torch.optim.AdamW(twins)
    with pytest.warns(
        RuntimeWarning, match=f"slower than torch.optim: cpu: {WHY}; build it with: {build.COMMAND}$"
    ) as record:
        for t in range(5):
            cases.set_gradients(params, t)
            cases.set_gradients(twins, t)
            a.step()
            b.step()
    assert [warning.filename for warning in record] == [__file__]
    assert a.backend == {torch.device("cpu"): "reference"}
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def test_a_warning_of_ours_is_an_error_in_this_suite(not_built):
    """By the filters of pyproject.toml, which leave out what other packages warn of."""
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeWarning, match="correct but slower than torch.optim"):
        fused_adamw.AdamW([p]).step()
    warnings.warn("another package's", FutureWarning, stacklevel=1)


def test_without_the_extension_asking_for_it_raises(not_built):
    (p,) = cases.parameters([(3,)])
    p.grad = torch.ones(3)
    optimizer = fused_adamw.AdamW([p], backend="cpu")
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: {WHY}"):
        optimizer.step()


def test_asking_for_the_reference_does_not_warn():
    backends.warn_once.cache_clear()
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


def package(folder, *extensions):
    """A copy of the package as a wheel would install it, with these extensions and their records."""
    shutil.copytree(ROOT / "fused_adamw", folder / "fused_adamw", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copytree(ROOT / "csrc", folder / "fused_adamw" / "csrc")
    shutil.copytree(ROOT / "triton_kernels", folder / "fused_adamw" / "triton_kernels", dirs_exist_ok=True)
    for extension in extensions:
        for suffix in ("", ".json"):
            shutil.copy(f"{extension}{suffix}", folder / "fused_adamw" / f"{build.FILE}{suffix}")
    return folder / "fused_adamw"


WITHOUT_CHECKOUT = f"""
import os, sys
given = os.environ["PYTHONPATH"].split(os.pathsep)
sys.path = [p for p in sys.path if p in given or os.path.realpath(p) != {os.path.realpath(ROOT)!r}]
"""


def run(*arguments, folder=ROOT, path=(), status=0, **env):
    """What ``python -m fused_adamw`` prints, in this folder and with these before everything else on the path.

    In another folder the checkout, which an editable install has put on the path, is not there.
    """
    if folder != ROOT:
        hook = folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(WITHOUT_CHECKOUT)
        path = [*path, hook]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **env}
    command = [sys.executable, "-m", "fused_adamw", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_python_m_fused_adamw():
    report = run()
    assert f"fused_adamw {fused_adamw.__version__}, torch {torch.__version__}" in report
    assert f"built for torch {torch.__version__}" in report
    assert "backend 'cpu' (cpu): available" in report
    assert "cpu tensors are stepped by 'cpu'" in report
    assert "Warning" not in report


def test_python_m_fused_adamw_says_why_not(tmp_path):
    """The reason that was kept when a build failed, the compiler's last lines, and the command to try."""
    folder = package(tmp_path)
    (folder / build.FAILURE).write_text("the build failed: x.cpp:1: error: no such thing\nthe last line\n")
    report = run(folder=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    reason = "the build failed: x.cpp:1: error: no such thing"
    assert f"backend 'cpu' (cpu): {WHY}: {reason}; build it with: {build.COMMAND}\n" in report
    assert "the last build of the extension ended with:\n    the last line\n" in report
    assert "cpu tensors are stepped by 'reference'" in report


def test_a_checkout_takes_the_extension_of_the_installed_package_that_it_hides(tmp_path):
    """It says so; where the sources are others it does not load it, and says what to do."""
    extension = Path(backends.native().__file__)
    installed = package(tmp_path / "site", extension)
    checkout = package(tmp_path / "checkout")
    options = {"folder": tmp_path / "checkout", "path": [tmp_path / "site"], "XDG_CACHE_HOME": str(tmp_path)}
    report = run(**options)
    assert f"extension: {installed / build.FILE}" in report
    assert f"of the installed package that {checkout} hides" in report
    assert "cpu tensors are stepped by 'cpu'" in report
    with (checkout / "csrc" / "step.h").open("a") as file:
        file.write("// another line\n")
    report = run(**options)
    assert f"{installed / build.FILE} was built from other sources than those in {checkout / 'csrc'}" in report
    assert f"the folder {checkout} hides this installed package: start Python elsewhere" in report
    assert "cpu tensors are stepped by 'reference'" in report


def test_a_build_in_a_checkout_is_for_the_installed_package_that_it_hides(tmp_path, monkeypatch):
    """So that Python finds it wherever it starts; of other sources, it is the checkout's own."""
    installed, checkout, other = (package(tmp_path / name) for name in ("site", "checkout", "other"))
    (other / "csrc" / "step.h").write_text("// other sources")
    monkeypatch.setattr(build, "PACKAGE", checkout)
    for hidden, expected in (([installed], installed), ([other], checkout), ([other, installed], installed)):
        monkeypatch.setattr(build, "hidden", lambda hidden=hidden: iter(hidden))
        assert build.place("2.13.0") == expected
    shutil.rmtree(installed / "csrc")
    assert build.place("2.13.0") == checkout


def test_an_extension_for_another_torch_is_not_loaded(place):
    """Neither is one without a record, which may be older than the sources; the cache's is, if it fits."""
    extension, fitting = place / build.FILE, build.cache("2.6.0") / build.FILE
    extension.touch()
    assert f"{extension} was built from other sources" in build.find("2.6.0")[1]
    build.write_record(extension, "2.13.0+cpu", "")
    assert build.find("2.13.1+cu130") == (extension, "")
    path, why = build.find("2.6.0")
    assert path is None
    assert f"{extension} was built for torch 2.13, this is 2.6.0; build it with: {build.COMMAND}" in why
    fitting.parent.mkdir(parents=True)
    fitting.touch()
    build.write_record(fitting, "2.6.0", "")
    assert build.find("2.6.0") == (fitting, "")


@pytest.mark.parametrize(
    ("version", "of"),
    [
        ("2.13.0", "2.13"),
        ("2.13.1+cu130", "2.13"),
        ("2.13.0a0+git1234567", "2.13.0a0+git1234567"),
        ("2.16.0.dev20261101+cpu", "2.16.0.dev20261101+cpu"),
    ],
)
def test_releases_share_an_extension_development_versions_do_not(version, of):
    assert build.series(version) == of


def test_an_old_torch_is_refused_in_words():
    assert build.too_old("2.7.1+cpu") == "torch 2.7.1+cpu is older than 2.8: pip install -U 'torch>=2.8'"
    assert not build.too_old("2.8.0") and not build.too_old("3.0.0")
    assert f"torch>={'.'.join(map(str, build.OLDEST_TORCH))}" in (ROOT / "pyproject.toml").read_text("utf-8")
    code = "import torch; torch.__version__ = '2.7.1'; import fused_adamw"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ImportError: fused_adamw cannot run: torch 2.7.1 is older than 2.8" in done.stderr


def test_build_says_what_is_missing_and_keeps_it(tmp_path):
    """Without a compiler; the reason is told by the next report."""
    package(tmp_path)
    options = {"folder": tmp_path, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-c++"}
    why = "there is no C++ compiler ('no-such-c++' is not on PATH): install one (Debian, Ubuntu: apt install g++;"
    assert f"fused_adamw: the extension was not built: {why}" in run("build", status=1, **options)
    assert f"{WHY}: {why}" in run(**options)


def test_build_keeps_the_compilers_lines(tmp_path):
    compiler = tmp_path / "c++"
    fails = "printf 'a.cpp:7: error: not today\\nlast\\n' >&2; exit 1"
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in *-o*) {fails};; *) echo 'g++ (GCC) 13.0.0';; esac\n")
    compiler.chmod(0o755)
    folder = package(tmp_path)
    options = {"folder": tmp_path, "XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler), "FUSED_ADAMW_CUDA": "0"}
    report = run("build", status=1, **options)
    assert "fused_adamw: the extension was not built: a.cpp:7: error: not today\n" in report
    assert not list(folder.glob("_C.*.so")) and not list(folder.glob("_C.build.*"))
    report = run(**options)
    assert f"{WHY}: a.cpp:7: error: not today; build it" in report
    assert "    last\n" in report.partition("the last build of the extension ended with:\n")[2]


SMALL = """
#include <Python.h>
static PyObject* cpu_isas(PyObject*, PyObject*) { return Py_BuildValue("(s)", "none"); }
static PyMethodDef functions[] = {{"cpu_isas", cpu_isas, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef of = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&of); }
"""


@pytest.mark.slow
def test_build_makes_the_extension_that_is_then_used(tmp_path):
    """In the package, or where that is read-only in the user's cache; once, though two ask for it at a time."""
    folder = package(tmp_path)
    sources = folder / "csrc"
    for path in sources.iterdir():
        path.unlink()
    (sources / "bindings.cpp").write_text(SMALL)
    options = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "FUSED_ADAMW_CUDA": "0"}
    readonly = "from fused_adamw import build; build.place = build.cache; build.build()"  # to root, nothing is
    env = {**os.environ, "PYTHONPATH": str(tmp_path), **options}
    command = [sys.executable, "-c", readonly]
    both = [subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = sorted((process.communicate()[1] for process in both), key=lambda log: "fits already" in log)
    assert [process.returncode for process in both] == [0, 0], logs
    assert "building for torch" in logs[0] and "fits already" not in logs[0]
    assert "building for torch" not in logs[1] and "fits already" in logs[1]
    options["folder"] = tmp_path
    assert f"extension: {tmp_path / 'cache' / 'fused_adamw' / 'native'}" in run(**options)
    assert f"{folder / build.FILE}: built for torch {torch.__version__}" in run("build", "--force", **options)
    assert f"extension: {folder / build.FILE}, built for torch {torch.__version__}" in run(**options)
    assert "fits already" in run("build", **options)


def test_a_failure_in_the_cache_is_later_than_that_in_the_package(place):
    (place / build.FAILURE).write_text("when it was installed\n")
    assert f"{WHY}: when it was installed; build it" in build.find("2.13.0")[1]
    build.cache("2.13.0").mkdir(parents=True)
    (build.cache("2.13.0") / build.FAILURE).write_text("by hand\n")
    assert f"{WHY}: by hand; build it" in build.find("2.13.0")[1]


def test_without_sources_nothing_is_found_and_nothing_raises(place, monkeypatch):
    monkeypatch.setattr(build, "sources", lambda: place / "gone")
    assert "the sources of the extension are missing" in build.find("2.13.0")[1]
    assert build.failed("2.13.0") == ""


def test_a_lock_ends_with_its_process(tmp_path):
    """Killed while it holds the lock, a build leaves nothing to wait for."""
    code = (
        "import os, pathlib; from fused_adamw import build\n"
        f"with build._locked(pathlib.Path({str(tmp_path / 'lock')!r})): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    with build._locked(tmp_path / "lock"):
        pass


def test_capabilities_are_data():
    found = fused_adamw.capabilities()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert found["extension"]["path"] == backends.native().__file__
    assert found["extension"]["instruction_sets"] == list(backends.native().cpu_isas())
    assert list(found["backends"]) == ["cpu", "triton", "cuda", "reference"]
    assert found["backends"]["cpu"] == {"devices": ["cpu"], "reason": ""}
    assert found["steps"]["cpu"] == "cpu"
    assert (found["backends"]["triton"]["reason"] == "") <= torch.cuda.is_available()


def test_capabilities_without_the_extension_do_not_warn(not_built):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fused_adamw.capabilities()
    assert found["extension"] is None
    assert found["backends"]["cpu"]["reason"].startswith(WHY)
    assert found["steps"]["cpu"] == "reference"


def test_the_bench_is_found_in_a_checkout_alone(tmp_path):
    assert "usage: python -m bench" in run("bench", "--help", folder=tmp_path, path=[ROOT])
    package(tmp_path)
    assert "it needs a checkout" in run("bench", "--help", folder=tmp_path, status=1)


def test_the_cuda_part_is_there_or_says_what_is_missing():
    """Importing it needs no driver; without a device it is refused by name, and the CPU is stepped all the same."""
    cuda = backends.named("cuda")
    built = hasattr(backends.native(), "CudaKernels")
    if torch.version.cuda is None:
        assert "is built without CUDA" in cuda.missing()
    elif not built:
        assert "without its CUDA part" in cuda.missing()
        assert f"build it, where nvcc is, with: FUSED_ADAMW_CUDA=1 {build.COMMAND} --force" in cuda.missing()
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
