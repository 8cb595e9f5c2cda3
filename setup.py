"""Builds the native extension where torch and a compiler are at hand; without them the package is pure Python.

FUSED_ADAMW_CPU=0 leaves the extension out, =1 makes a failure to build it an error; unset, a failure is told and the
package is installed without it. The rest of the metadata is in pyproject.toml.
"""

import os
import sys

from setuptools import setup

WANTED = os.environ.get("FUSED_ADAMW_CPU")
if WANTED not in (None, "0", "1"):
    sys.exit(f"FUSED_ADAMW_CPU={WANTED}: must be 0, 1 or unset")


def without(reason: str) -> None:
    if WANTED == "1":
        sys.exit(f"fused_adamw: cannot build the extension (FUSED_ADAMW_CPU=1): {reason}")
    print(f"fused_adamw: installing without the native extension: {reason}", file=sys.stderr)


def extension() -> dict:
    """The arguments of setup() that build fused_adamw._C."""
    if WANTED == "0":
        without("FUSED_ADAMW_CPU=0")
        return {}
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: a torch whose libraries do not load
        without(f"the build sees no torch ({error}); install torch first, then pip install --no-build-isolation")
        return {}

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # no compiler, no headers, a compile error: each has a type of its own
                without(f"the build failed: {error}")
                self.extensions = []  # nothing to copy into the package

    # No contraction and no errno: the rounding is spelled out in csrc/rules.h, and sqrt has to vectorise.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    flags += ["-fvisibility=hidden", "-Wall"]
    if sys.platform == "darwin":
        flags.remove("-fopenmp")
    native = cpp_extension.CppExtension(
        "fused_adamw._C",
        ["csrc/bindings.cpp", "csrc/step_cpu.cpp"],
        depends=["csrc/rules.h", "csrc/formats.h", "csrc/step.h"],
        extra_compile_args=["/O2", "/fp:precise"] if sys.platform == "win32" else flags,
        extra_link_args=["-fopenmp"] if "-fopenmp" in flags and sys.platform == "linux" else [],
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension())
