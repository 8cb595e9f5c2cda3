"""What setup.py makes where the extension cannot be built, and what it says."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from fused_adamw import build

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what a wheel is made of, without an extension."""
    for folder in ("csrc", "fused_adamw", "triton_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def setup(checkout, *arguments, **env):
    env = {**os.environ, "FUSED_ADAMW_CUDA": "0", **env}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def wheel(checkout, **env):
    """The one wheel that is made, its name and what is in it."""
    done = setup(checkout, "bdist_wheel", **env)
    assert not done.returncode, done.stderr
    (path,) = (checkout / "dist").iterdir()
    with zipfile.ZipFile(path) as file:
        return path.name, {name: file.read(name) for name in file.namelist()}


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"FUSED_ADAMW_CPU": "0"}, "FUSED_ADAMW_CPU=0 when it was installed"),
        ({"CXX": "no-such-c++"}, "there is no C++ compiler ('no-such-c++' is not on PATH)"),
        ({"CXX": "{here}/c++"}, "the build failed: a.cpp:7: error: not today"),
    ],
    ids=["left out", "no compiler", "fails"],
)
def test_a_wheel_without_the_extension_is_for_any_platform(env, why, checkout):
    """It says why it has none, ships the sources, and nothing of an earlier build."""
    fails = "printf 'a.cpp:7: error: not today\\nlast\\n' >&2; exit 1"
    compiler = checkout / "c++"
    compiler.write_text(f"#!/bin/sh\ncase \"$*\" in *-o*) {fails};; *) echo 'g++ (GCC) 13.0.0';; esac\n")
    compiler.chmod(0o755)
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for lib in ("lib", f"lib.{tag}"):
        (checkout / "build" / lib / "fused_adamw").mkdir(parents=True)
        (checkout / "build" / lib / "fused_adamw" / build.FILE).touch()
    name, files = wheel(checkout, **{key: value.format(here=checkout) for key, value in env.items()})
    assert name.endswith("-py3-none-any.whl")
    assert files[f"fused_adamw/{build.FAILURE}"].decode().startswith(why)
    for path in (ROOT / "csrc").iterdir():
        assert files[f"fused_adamw/csrc/{path.name}"] == path.read_bytes()
    assert "fused_adamw/triton_kernels/multi_tensor.py" in files
    assert f"fused_adamw/{build.FILE}" not in files


def test_what_is_demanded_and_cannot_be_built_is_an_error(checkout):
    done = setup(checkout, "bdist_wheel", FUSED_ADAMW_CPU="1", CXX="no-such-c++")
    assert done.returncode
    start = "fused_adamw: cannot build the extension (FUSED_ADAMW_CPU=1): there is no C++ compiler"
    assert done.stderr.splitlines()[-1].startswith(start)


def test_a_wheel_with_the_extension_tells_its_torch(checkout):
    """As `make wheel` asks for it; loaded from an unpacked wheel, it has the record of what it was built for."""
    for path in (checkout / "csrc").iterdir():
        path.unlink()
    (checkout / "csrc" / "bindings.cpp").write_text(
        "#include <Python.h>\nPyMODINIT_FUNC PyInit__C() { return nullptr; }\n"
    )
    done = setup(checkout, "egg_info", "-b", "+torch2.13", "bdist_wheel", FUSED_ADAMW_CPU="1")
    assert not done.returncode, done.stderr
    (path,) = (checkout / "dist").iterdir()
    assert "+torch2.13-cp" in path.name
    assert "any" not in path.name
    with zipfile.ZipFile(path) as file:
        assert f'"torch": "{torch.__version__}"' in file.read(f"fused_adamw/{build.FILE}.json").decode()


def test_an_old_setuptools_is_refused_in_words(checkout):
    code = "import setuptools; setuptools.__version__ = '65.5.0'; exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode
    assert done.stderr == 'fused_adamw: setuptools 65.5.0 is too old: pip install -U "setuptools>=77"\n'
