"""Let Triton launch kernels where there is no GPU, into a driver of CUDA whose functions do nothing."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc" / "no_driver.c"


def install() -> None:
    """Build the driver, and make it the one that Triton's launcher calls, for the rest of the process."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("it takes a C compiler to leave out the driver")
    folder = tempfile.mkdtemp()
    library = Path(folder) / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *flags, "-o", str(library), str(SOURCE)], check=True)
    (Path(folder) / "libcuda.so").symlink_to(library.name)
    own = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if _address(ctypes.CDLL("libcuda.so.1")) != _address(own):
        raise SystemExit("a driver of CUDA is loaded already, which would launch the kernels")
    os.environ["TRITON_LIBCUDA_PATH"] = folder

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    shutil.rmtree(folder)  # it is loaded, and so is what was linked with it
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)


def _address(library: ctypes.CDLL) -> int | None:
    return ctypes.cast(library.cuLaunchKernelEx, ctypes.c_void_p).value
