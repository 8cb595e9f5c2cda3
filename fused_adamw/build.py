"""Builds the native extension fused_adamw._C, and finds the one that fits the torch, the Python and the sources here.

setup.py loads this file by its path, where neither the package nor torch need be importable. Beside an extension lies a
record of what it was built for; where a build failed, a file says why.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PACKAGE = Path(__file__).resolve().parent
FILE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
FAILURE = "_C.failed.txt"
OLDEST_TORCH = (2, 8)
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
NINJA = re.compile(r"^(\[\d+/\d+\]) .* -c (?:-c )?\S*?([^/\s]+) -o .*")  # a command of ninja's, and what it compiles
COMMAND = "python -m fused_adamw build"


class CannotBuild(RuntimeError):
    """Says in its first line why the extension cannot be built; the compiler's last lines follow."""


def tell(text: str) -> None:
    """Print a line of the log of a build."""
    print(f"fused_adamw: {text}", file=sys.stderr, flush=True)


def switch(name: str) -> str | None:
    """Read FUSED_ADAMW_CPU or FUSED_ADAMW_CUDA: 1 demands the part, 0 leaves it out, unset tries."""
    value = os.environ.get(name)
    if value not in (None, "0", "1"):
        sys.exit(f"{name}={value}: must be 0, 1 or unset")
    return value


# ---- What was built.


def sources() -> Path:
    """Return the folder of the C++ sources: inside the package where it is installed, beside it in a checkout."""
    inside = PACKAGE / "csrc"
    return inside if inside.is_dir() else PACKAGE.parent / "csrc"


def fingerprint(folder: Path | None = None) -> str:
    """Return 16 hexadecimal digits that change with the sources; raises OSError where there are none."""
    digest = hashlib.sha256()
    for path in sorted((folder or sources()).iterdir()):
        if path.suffix in (".cpp", ".cu", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def series(torch_version: str) -> str:
    """Return what versions of torch that share a binary interface have in common: 2.13, or all of a development one."""
    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+|rocm.*|xpu))?", torch_version)
    return release[1] if release else torch_version


def cache(torch_version: str) -> Path:
    """Return the user's folder for extensions of this torch and these sources."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "fused_adamw", "native", f"torch-{torch_version}-{fingerprint()}")


def place(torch_version: str) -> Path:
    """Return the folder that ``build`` puts an extension into.

    In a checkout that hides an installed package of the same sources it is that package's, from which both load it.
    """
    for folder in (*hidden(), PACKAGE):
        with contextlib.suppress(OSError):  # no sources: another package of this name
            if folder == PACKAGE or fingerprint(folder / "csrc") == fingerprint():
                return folder if os.access(folder, os.W_OK) else cache(torch_version)
    return cache(torch_version)


def hidden() -> Iterator[Path]:
    """Yield other folders of this package on the path, which the one in use hides: an installed one, in a checkout."""
    for entry in sys.path:
        folder = Path(entry or os.curdir, "fused_adamw")
        if folder.is_dir() and folder.resolve() != PACKAGE:
            yield folder.resolve()


def record_of(extension: Path) -> dict[str, Any]:
    """Return what an extension was built for, and why it has no CUDA part; nothing known gives nothing."""
    try:
        return json.loads(Path(f"{extension}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def write_record(extension: Path, torch_version: str, without_cuda: str) -> None:
    """Write the record of an extension that was built from the sources as they are, and forget earlier failures."""
    record = {"torch": torch_version, "sources": fingerprint(), "without_cuda": without_cuda}
    Path(f"{extension}.json").write_text(json.dumps(record) + "\n", "utf-8")
    (extension.parent / FAILURE).unlink(missing_ok=True)


def find(torch_version: str) -> tuple[Path | None, str]:
    """Return the extension that fits, or None and the reason with its remedy.

    A checkout whose own folder has none takes that of the installed package that it hides, if it has the same sources.
    """
    try:
        own, places = fingerprint(), [PACKAGE, *hidden(), cache(torch_version)]
    except OSError as error:
        return None, f"the sources of the extension are missing ({error}): install fused_adamw anew"
    reasons = []
    for folder in places:
        extension = folder / FILE
        if not extension.exists():
            continue
        record = record_of(extension)
        if record.get("sources") != own:
            why = f"{extension} was built from other sources than those in {sources()}"
        elif series(record["torch"]) != series(torch_version):
            why = f"{extension} was built for torch {series(record['torch'])}, this is {torch_version}"
        else:
            return extension, ""
        if folder not in (PACKAGE, places[-1]):
            why += (
                f" (the folder {PACKAGE} hides this installed package: start Python elsewhere, or install the folder "
                "in place with: pip install --no-build-isolation -e .)"
            )
        reasons.append(why)
    failure = failed(torch_version).partition("\n")[0]
    if reasons:
        why = f"cannot be used: {'; '.join(reasons)}" + (f"; the last build failed: {failure}" if failure else "")
    else:
        why = f"was not built: {failure}" if failure else "was not built"
    return None, f"the extension fused_adamw._C {why}; build it with: {COMMAND}"


def failed(torch_version: str) -> str:
    """Return why the last build came to nothing and the compiler's last lines, or nothing."""
    for folder in (cache, place, lambda _: PACKAGE):
        with contextlib.suppress(OSError):
            return (folder(torch_version) / FAILURE).read_text("utf-8").strip()
    return ""


# ---- How it is built.


def too_old(torch_version: str) -> str:
    """Return what to do about a torch that is older than what fused_adamw runs with, or nothing."""
    if tuple(int(n) for n in torch_version.split(".")[:2]) >= OLDEST_TORCH:
        return ""
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"torch {torch_version} is older than {oldest}: pip install -U 'torch>={oldest}'"


def check_tools(compiler: str) -> None:
    """Raise CannotBuild where there is no compiler, or where Python's headers are missing."""
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise CannotBuild(
            f"there is no C++ compiler ({compiler!r} is not on PATH): install one (Debian, Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name yours in CXX"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise CannotBuild(
            f"Python's headers are missing ({headers / 'Python.h'}): install them (Debian, Ubuntu: apt install "
            "python3-dev; Fedora: dnf install python3-devel)"
        )


def cuda_architectures(torch: Any, nvcc: Path) -> list[str]:
    """Return the architectures to compile for; raises CannotBuild where there is nothing to compile with or against."""
    if switch("FUSED_ADAMW_CUDA") == "0":
        raise CannotBuild("FUSED_ADAMW_CUDA=0")
    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} is built without CUDA")
    try:
        text = subprocess.check_output([nvcc, "--version"], text=True)
        known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"nvcc does not run ({error}); install the CUDA toolkit, or set CUDA_HOME") from error
    found = re.search(r"release (\d+)\.\d+", text)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"{nvcc} is of CUDA {found and found[1]}, torch {torch.__version__} of CUDA {torch.version.cuda}: "
            "set CUDA_HOME to a toolkit of torch's version"
        )
    wanted = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}\n" in known]
    return os.environ.get("TORCH_CUDA_ARCH_LIST", ";".join(wanted) + "+PTX").replace(" ", ";").split(";")


@contextlib.contextmanager
def _recorded(lines: deque[str]) -> Iterator[None]:
    """Keep the last lines of what this process and its compilers write; they are shown all the same, on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    reader, writer = os.pipe()
    for descriptor in saved:
        os.dup2(writer, descriptor)
    os.close(writer)

    def copy() -> None:
        with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
            for line in pipe:
                line = NINJA.sub(r"\1 \2", line)
                lines.append(line.rstrip())
                os.write(saved[2], line.encode())

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
        thread.join()
        for original in saved.values():
            os.close(original)


def _explain(error: BaseException, lines: deque[str]) -> str:
    """Return the compiler's first error, or the exception, and under it the last lines of the log."""
    first = next((line for line in lines if re.search(r"\berror\b[: ]", line)), f"{type(error).__name__}: {error}")
    return "\n".join([first.strip().splitlines()[0], *(line for line in list(lines)[-20:] if line.strip())])


def setup_arguments(folder: str) -> dict[str, Any]:
    """Return the arguments of setup() that build the extension from the sources in this folder.

    Raises CannotBuild where it is clear at once that they cannot be built; the command build_ext raises it later.
    """
    # torch takes the folder above nvcc's, which for a link or a wrapper is not that of the toolkit.
    for home in (Path(shutil.which("nvcc") or "/").resolve().parent.parent, Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime_api.h").exists():
            os.environ.setdefault("CUDA_HOME", str(home))
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a torch whose libraries do not load
        isolated = "there was no torch; pip builds in isolation from yours, unless told --no-build-isolation"
        raise CannotBuild(isolated if getattr(error, "name", "") == "torch" else str(error)) from error
    if why := too_old(torch.__version__):
        raise CannotBuild(why)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuild(f'{error}: pip install -U "setuptools>=77"') from error
    check_tools(cpp_extension.get_cxx_compiler())

    # No contraction and no errno: the rounding is spelled out in csrc/rules.h, and sqrt has to vectorise.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]
    flags += ["-fvisibility=hidden", "-Wall"]
    if sys.platform == "darwin":
        flags.remove("-fopenmp")
    if sys.platform == "win32":
        flags = ["/O2", "/fp:precise"]
    arguments: dict[str, Any] = {
        "name": "fused_adamw._C",
        "sources": [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".cpp")],
        "depends": [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".h")],
        "extra_link_args": ["-fopenmp"] if "-fopenmp" in flags and sys.platform == "linux" else [],
    }
    cpu = cpp_extension.CppExtension(**arguments, extra_compile_args={"cxx": flags})
    cuda, no_cuda, architectures = None, "", []
    try:
        architectures = cuda_architectures(torch, Path(cpp_extension.CUDA_HOME or "") / "bin" / "nvcc")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
        kernels = [f"{folder}/{name}" for name in ("factor_cuda.cu", "step_cuda.cu")]
        arguments["sources"] = [*arguments["sources"], *kernels]
        cuda = cpp_extension.CUDAExtension(
            **arguments,
            define_macros=[("FUSED_ADAMW_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-fmad=false", "--threads=0"]},
        )
    except (CannotBuild, OSError) as error:
        no_cuda = str(error)
        _without_cuda(no_cuda)

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self) -> None:
            nonlocal no_cuda
            if cuda is not None:
                try:
                    self.compile_all()
                    tell(f"built for the CPU and for CUDA {torch.version.cuda} ({' '.join(architectures)})")
                    return
                except CannotBuild as error:
                    no_cuda = f"the build failed: {str(error).splitlines()[0]}"
                    _without_cuda(no_cuda)
                    self.extensions = self.distribution.ext_modules = [cpu]
            self.compile_all()
            tell("built for the CPU")

        def compile_all(self) -> None:
            """Build ``self.extensions`` and their record; whatever fails is CannotBuild, and leaves no extension."""
            lines: deque[str] = deque(maxlen=2000)
            try:
                with _recorded(lines):
                    super().run()
            except (Exception, SystemExit) as error:  # a compile error, a linker's: each has a type of its own
                raise CannotBuild(_explain(error, lines)) from error
            write_record(Path(self.get_ext_fullpath("fused_adamw._C")), torch.__version__, no_cuda)

    return {"ext_modules": [cuda or cpu], "cmdclass": {"build_ext": BuildExtension}}


def _without_cuda(reason: str) -> None:
    if switch("FUSED_ADAMW_CUDA") == "1":
        sys.exit(f"fused_adamw: cannot build the CUDA part (FUSED_ADAMW_CUDA=1): {reason}")
    tell(f"building without the CUDA part: {reason}")


# ---- python -m fused_adamw build


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock of the operating system, which ends with the process that holds it, however that ends."""
    with path.open("ab") as file:
        waiting = False
        while True:
            try:
                _lock(file)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    raise
                if not waiting:
                    tell(f"waiting for another build, which holds {path}")
                waiting = True
                time.sleep(0.2)
        yield


def _lock(file: IO[bytes]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def build(force: bool = False) -> Path:
    """Build the extension for the torch at hand into the package, or into the user's cache where that is read-only.

    Returns its path, at once where one fits already and ``force`` is not set. Raises CannotBuild, and keeps the reason.
    """
    try:
        import setuptools
        import torch
    except ImportError as error:
        raise CannotBuild(f'{error}: pip install -U "setuptools>=77"') from error
    folder = place(torch.__version__)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder / "_C.lock"), tempfile.TemporaryDirectory(dir=folder, prefix="_C.build.") as temporary:
        found, _ = find(torch.__version__)
        if found and not force and (found.parent == folder or folder == PACKAGE):
            tell(f"{found} fits already; --force builds it anew")
            return found
        tell(
            f"building for torch {torch.__version__}, Python {sys.version.split()[0]}, from {sources()}; a few minutes"
        )
        try:
            distribution = setuptools.Distribution({"name": "fused_adamw", **setup_arguments(str(sources()))})
            command = distribution.get_command_obj("build_ext")
            command.build_lib = command.build_temp = temporary
            command.ensure_finalized()
            command.run()
        except CannotBuild as error:
            (folder / FAILURE).write_text(f"{error}\n", "utf-8")
            raise
        built = Path(command.get_ext_fullpath("fused_adamw._C"))
        # The record last: an extension without its record is not loaded. A file in use is replaced, not overwritten.
        for name in (FILE, f"{FILE}.json"):
            os.replace(built.with_name(name), folder / name)
        (folder / FAILURE).unlink(missing_ok=True)
    return folder / FILE
