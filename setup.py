"""Builds the native extension where torch and a compiler are at hand; without them the package is pure Python.

FUSED_ADAMW_CPU=0 leaves the extension out, =1 makes a failure to build it an error; unset, a failure is told and kept
in the package, which is installed without it. FUSED_ADAMW_CUDA does the same for its CUDA part, which is built where
nvcc and a CUDA build of torch are, GPU or no GPU, for the architectures of TORCH_CUDA_ARCH_LIST. The building itself is
in fused_adamw/build.py, the rest of the metadata in pyproject.toml.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import setup
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones know neither license files nor the wheel's command
    sys.exit(f'fused_adamw: setuptools {setuptools.__version__} is too old: pip install -U "setuptools>=77"')

from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
spec = importlib.util.spec_from_file_location("fused_adamw_build", ROOT / "fused_adamw" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
missing = ""  # why there is no extension


def without(reason: str) -> None:
    """Go on without the extension, or end where it is demanded."""
    global missing
    missing = reason
    if build.switch("FUSED_ADAMW_CPU") == "1":
        sys.exit(f"fused_adamw: cannot build the extension (FUSED_ADAMW_CPU=1): {reason}")
    build.tell(f"installing without the native extension: {reason.splitlines()[0]}")


class Python(build_py):
    """Puts the C++ sources, the Triton kernels and the reason for a missing extension into the package.

    In a checkout and an editable install they stay beside it. The bare name triton_kernels belongs to another project.
    """

    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else ("csrc", "triton_kernels"):
            to = Path(self.build_lib, "fused_adamw", name)
            shutil.rmtree(to, ignore_errors=True)
            shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
        for stale in Path(self.build_lib, "fused_adamw").glob("_C.*"):
            stale.unlink()
        if missing:
            keep(ROOT / "fused_adamw" if self.editable_mode else Path(self.build_lib, "fused_adamw"))


class Wheel(bdist_wheel):
    """Makes a wheel without the extension one for any platform."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.ext_modules
        super().run()


def keep(package: Path) -> None:
    (package / build.FAILURE).write_text(f"{missing}\n", "utf-8")


def arguments() -> dict:
    """Return the arguments of setup() that build fused_adamw._C, or that leave it out."""
    if build.switch("FUSED_ADAMW_CPU") == "0":
        without("FUSED_ADAMW_CPU=0 when it was installed")
        return {}
    build.switch("FUSED_ADAMW_CUDA")
    try:
        found = build.setup_arguments("csrc")
    except build.CannotBuild as error:
        without(str(error))
        return {}

    class Extension(found["cmdclass"]["build_ext"]):
        def run(self) -> None:
            try:
                super().run()
            except build.CannotBuild as error:
                without(f"the build failed: {error}")
                keep(Path(self.get_ext_fullpath("fused_adamw._C")).parent)
                self.extensions = self.distribution.ext_modules = []

    return {"ext_modules": found["ext_modules"], "cmdclass": {"build_ext": Extension}}


found = arguments()
setup(**found | {"cmdclass": {**found.get("cmdclass", {}), "build_py": Python, "bdist_wheel": Wheel}})
