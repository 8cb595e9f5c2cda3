"""Registers the backends, and chooses the one that steps a device's tensors or says why it cannot.

A backend is one function, ``prepare(watch, rows, owner) -> Launch``, and one line of ``BACKENDS``.
"""

import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Hashable, Set
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fused_adamw import build, gpu, reference
from fused_adamw._version import __version__
from fused_adamw.contract import Launch, Owner, Row, Variant, Watch
from fused_adamw.formats import warn_once

if why := build.too_old(torch.__version__):
    raise ImportError(f"fused_adamw cannot run: {why}")


_forked = False


def _after_fork() -> None:
    """Tell the extension, or the one that is loaded later, that the threads of OpenMP are gone."""
    global _forked
    _forked = True
    if module := sys.modules.get("fused_adamw._C"):
        module.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    path, why = build.find(torch.__version__)
    if path is None:
        return None, why
    try:
        spec = importlib.util.spec_from_file_location("fused_adamw._C", path)
        assert spec is not None and spec.loader is not None, "the name ends as those of extensions do"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"{path} does not load ({error}); build it anew with: {build.COMMAND} --force"
    sys.modules["fused_adamw._C"] = module
    if _forked:
        module.after_fork()
    return module, ""


def native() -> ModuleType | None:
    """Return the extension module ``fused_adamw._C``, or None where it was not built."""
    return _load_native()[0]


def _built() -> ModuleType:
    module, why = _load_native()
    if module is None:
        raise RuntimeError(why)
    return module


class CannotRun(RuntimeError):
    """Says why a backend that seemed able to run could not prepare a launch."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"backend={name!r} cannot run: {why}")
        self.name, self.why = name, why


@dataclass(frozen=True)
class Backend:
    """Steps a bucket of rows in one call.

    ``prepare(watch, rows, owner)`` returns the launch; ``missing()`` returns why the backend cannot run here, or "";
    ``bucket(row)`` returns a key that rows of one launch share; ``warmup(device, variant, scales_gradients,
    counts_on_device)`` compiles without a launch.
    """

    name: str
    devices: tuple[str, ...]  # device types, () for any
    prepare: Callable[[Watch, list[Row], Owner], Launch]
    missing: Callable[[], str] = lambda: ""
    bucket: Callable[[Row], Hashable] = lambda row: None
    warmup: Callable[[torch.device, Variant, bool, bool], Any] = lambda *_: None
    dtypes: tuple[torch.dtype, ...] = ()  # of parameters, gradients and states, () for all
    capturable: bool = False

    def refuses(self, device: torch.device, dtypes: Set[torch.dtype], capturable: bool) -> str:
        """Return why this backend cannot step such a tensor, or ""."""
        if self.devices and device.type not in self.devices:
            return f"it steps tensors on {' or '.join(self.devices)}, not on {device}"
        if self.dtypes and (other := dtypes - set(self.dtypes)):
            return f"it does not step {', '.join(sorted(map(str, other)))}"
        if capturable and not self.capturable:
            return (
                "it keeps its steps on the host, and capturable=True, for CUDA graphs, asks for them on a GPU: move "
                "the parameters there before the optimizer is made, or leave out capturable=True"
            )
        return self.missing()


def _prepare_cpu(watch: Watch, rows: list[Row], owner: Owner) -> Launch:
    return _built().CpuStep(watch, rows)


_broken: dict[str, str] = {}  # by the name of a backend that failed to prepare a launch: its error


def leave_out(error: CannotRun) -> None:
    """Stop choosing this backend, and give the reason to those who ask for it by name."""
    _broken[error.name] = error.why


def _on_a_gpu(name: str, kernels: Callable[..., Any], missing: Callable[[], str], devices: tuple[str, ...]) -> Backend:
    """Make a backend that launches ``kernels(device, variant, scales_gradients, counts_on_device)``, over tables."""

    def prepare(watch: Watch, rows: list[Row], owner: Owner) -> Launch:
        row = rows[0]
        try:
            compiled = kernels(row.device, row.variant, owner.scales_gradients, row.counts_on_device)
        except NotImplementedError:  # the backend runs, but lacks kernels for these formats
            raise
        except Exception as error:  # whatever a compiler, a driver or another version of triton may raise
            raise CannotRun(name, f"it failed: {type(error).__name__}: {error}") from error
        if not row.counts_on_device:
            return gpu.Launch(watch, rows, compiled, owner)
        return gpu.CapturableLaunch(watch, rows, compiled, owner)

    return Backend(
        name,
        devices,
        prepare,
        missing=lambda: _broken.get(name) or missing(),
        bucket=lambda row: (row.variant, row.counts_on_device),
        warmup=kernels,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        capturable=True,
    )


@functools.cache
def _triton_missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return ""


def _triton_kernels(device: torch.device, variant: Variant, scales: bool, counts: bool) -> Any:
    from fused_adamw.triton_kernels.kernels import TritonKernels

    return TritonKernels(device, variant, scales, counts)


def _cuda_missing() -> str:
    module, why = _load_native()
    if module is None:
        return why
    if not hasattr(module, "CudaKernels"):
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        why = build.record_of(Path(str(module.__file__))).get("without_cuda") or "FUSED_ADAMW_CUDA=0"
        return (
            f"the extension was built without its CUDA part ({why}); build it, where nvcc is, with: "
            f"FUSED_ADAMW_CUDA=1 {build.COMMAND} --force"
        )
    return "" if torch.cuda.is_available() else "it is built, but there is no CUDA device"


def _cuda_kernels(device: torch.device, variant: Variant, scales: bool, counts: bool) -> Any:
    return _built().CudaKernels(device, *variant)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Best first. In Triton's interpreter its kernels step CPU tensors too.
BACKENDS = (
    Backend("cpu", ("cpu",), _prepare_cpu, missing=lambda: _load_native()[1]),
    _on_a_gpu("triton", _triton_kernels, _triton_missing, ("cuda", "cpu") if INTERPRETED else ("cuda",)),
    _on_a_gpu("cuda", _cuda_kernels, _cuda_missing, ("cuda",)),
    Backend("reference", (), lambda watch, rows, owner: reference.Launch(watch, rows)),
)


def named(name: str) -> Backend:
    """Return the backend of this name; raises ValueError, which lists the names there are."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"no backend {name!r}: there are {', '.join(repr(b.name) for b in BACKENDS)}")


def pick(
    device: torch.device,
    dtypes: Set[torch.dtype] = frozenset(),
    capturable: bool = False,
    requested: str | None = None,
) -> Backend:
    """Return the backend that steps tensors of this device and of these dtypes of parameter, gradient and state.

    Raises RuntimeError with the reason if the one asked for cannot, or if none can. Warns once if none was asked for
    and the first choice for the device cannot run.
    """
    if requested is not None:
        backend = named(requested)
        if why := backend.refuses(device, dtypes, capturable):
            raise RuntimeError(f"backend={requested!r} cannot run: {why}")
        return backend
    reasons = []
    for backend in BACKENDS:
        why = backend.refuses(device, dtypes, capturable)
        if why:
            if not backend.devices or device.type in backend.devices:
                reasons.append(f"{backend.name}: {why}")
            continue
        why = "; ".join(reasons)
        if backend.name == "reference":
            why = why or f"there are no kernels for {device.type}"
            warn_once(
                f"fused_adamw steps {device.type} tensors with PyTorch's operators, correct but slower than "
                f"torch.optim: {why}"
            )
        elif why:
            warn_once(
                f"fused_adamw steps {device.type} tensors on its {backend.name!r} backend: {why} "
                f"(backend={backend.name!r} asks for it without this warning)"
            )
        return backend
    raise RuntimeError(f"no backend can step {device.type} tensors: {'; '.join(reasons)}")


def capabilities() -> dict[str, Any]:
    """Return what can run here, as JSON could hold it: what ``python -m fused_adamw`` prints.

    ``backends`` gives each one's device types, [] for any, and the reason why it cannot run, "" where it can; ``steps``
    the backend that steps each kind of tensor; ``extension`` the file of the native extension, what it was built for
    and its instruction sets, the last of which is used, or None.
    """
    module = native()
    extension = None
    if module:
        record = build.record_of(Path(str(module.__file__)))
        extension = {"path": module.__file__, "torch": record["torch"], "instruction_sets": list(module.cpu_isas())}
    backends = {}
    for backend in BACKENDS:
        reason = backend.missing()
        if not reason and backend.devices == ("cuda",) and not torch.cuda.is_available():
            reason = "there is no CUDA device"
        backends[backend.name] = {"devices": list(backend.devices), "reason": reason}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "fused_adamw": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "extension": extension,
        "backends": backends,
        "steps": {d: next(b.name for b in BACKENDS if not b.refuses(torch.device(d), set(), False)) for d in devices},
    }
