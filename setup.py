"""Builds the native extension where torch and a compiler are at hand; without them the package is pure Python.

FUSED_ADAMW_CPU=0 leaves the extension out, =1 makes a failure to build it an error; unset, a failure is told and the
package is installed without it. FUSED_ADAMW_CUDA does the same for its CUDA part, which is built where nvcc and a CUDA
build of torch are, GPU or no GPU, for the architectures of TORCH_CUDA_ARCH_LIST. The rest of the metadata is in
pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def switch(name: str) -> str | None:
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        sys.exit(f"{name}={value}: must be 0, 1 or unset")
    return value


WANTED, CUDA_WANTED = switch("FUSED_ADAMW_CPU"), switch("FUSED_ADAMW_CUDA")
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def tell(text: str) -> None:
    print(f"fused_adamw: {text}", file=sys.stderr)


def without(reason: str) -> None:
    if WANTED == "1":
        sys.exit(f"fused_adamw: cannot build the extension (FUSED_ADAMW_CPU=1): {reason}")
    tell(f"installing without the native extension: {reason}")


def without_cuda(reason: str) -> None:
    if CUDA_WANTED == "1":
        sys.exit(f"fused_adamw: cannot build the CUDA part (FUSED_ADAMW_CUDA=1): {reason}")
    tell(f"building without the CUDA part: {reason}")


def cuda_architectures(torch, nvcc: Path) -> list[str]:
    """The architectures to compile for; raises RuntimeError where there is nothing to compile with or against."""
    if CUDA_WANTED == "0":
        raise RuntimeError("FUSED_ADAMW_CUDA=0")
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is built without CUDA")
    try:
        run = {"capture_output": True, "text": True, "check": True}
        found = re.search(r"release (\d+)\.\d+", subprocess.run([nvcc, "--version"], **run).stdout)[1]
        known = subprocess.run([nvcc, "--list-gpu-code"], **run).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"nvcc does not run ({error}); install the CUDA toolkit, or set CUDA_HOME") from error
    if found != torch.version.cuda.split(".")[0]:
        raise RuntimeError(
            f"{nvcc} is of CUDA {found}, torch {torch.__version__} of CUDA {torch.version.cuda}: "
            "set CUDA_HOME to a toolkit of torch's version"
        )
    wanted = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}\n" in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(wanted) + "+PTX").replace(" ", ";").split(";")


def extensions() -> dict:
    """The arguments of setup() that build fused_adamw._C."""
    if WANTED == "0":
        without("FUSED_ADAMW_CPU=0")
        return {}
    # torch takes the folder above nvcc's, which for a link or a wrapper is not that of the toolkit.
    for home in (Path(shutil.which("nvcc") or "/").resolve().parent.parent, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime_api.h").exists():
            os.environ.setdefault("CUDA_HOME", str(home))
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: a torch whose libraries do not load
        without(f"the build sees no torch ({error}); install torch first, then pip install --no-build-isolation")
        return {}

    # No contraction and no errno: the rounding is spelled out in csrc/rules.h, and sqrt has to vectorise.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    flags += ["-fvisibility=hidden", "-Wall"]
    if sys.platform == "darwin":
        flags.remove("-fopenmp")
    if sys.platform == "win32":
        flags = ["/O2", "/fp:precise"]
    arguments = {
        "name": "fused_adamw._C",
        "sources": ["csrc/bindings.cpp", "csrc/step_cpu.cpp", "csrc/norm_cpu.cpp"],
        "depends": [str(header) for header in sorted(Path("csrc").glob("*.h"))],
        "extra_link_args": ["-fopenmp"] if "-fopenmp" in flags and sys.platform == "linux" else [],
    }
    cpu = cpp_extension.CppExtension(**arguments, extra_compile_args={"cxx": flags})
    cuda = None
    try:
        architectures = cuda_architectures(torch, Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
        arguments["sources"] = [*arguments["sources"], "csrc/step_cuda.cu"]
        cuda = cpp_extension.CUDAExtension(
            **arguments,
            define_macros=[("FUSED_ADAMW_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-fmad=false", "--threads=0"]},
        )
    except (RuntimeError, OSError) as error:
        without_cuda(str(error))

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            if cuda is not None:
                try:
                    super().run()
                    tell(f"built for the CPU and for CUDA {torch.version.cuda} ({' '.join(architectures)})")
                    return
                except Exception as error:  # as below; and then the CPU's part alone
                    without_cuda(f"the build failed: {error}")
                    self.extensions = self.distribution.ext_modules = [cpu]
            try:
                super().run()
                tell("built for the CPU")
            except Exception as error:  # no compiler, no headers, a compile error: each has a type of its own
                without(f"the build failed: {error}")
                self.extensions = []  # nothing to copy into the package

    return {"ext_modules": [cuda or cpu], "cmdclass": {"build_ext": BuildExtension}}


setup(**extensions())
