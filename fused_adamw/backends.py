"""The registry of backends: which one steps a device's tensors, and why not another.

A backend is one function, ``prepare(watch, rows) -> run(scalars)``, and one line of ``BACKENDS``.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from fused_adamw import reference
from fused_adamw.scalars import Adam, Sgd

if TYPE_CHECKING:
    from fused_adamw.plan import Row

BUILD = (
    "pip install --no-build-isolation --force-reinstall --no-deps . (in a checkout; needs a C++ compiler, and ninja)"
)


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fused_adamw._C"), ""
    except ModuleNotFoundError:
        return None, f"the extension fused_adamw._C was not built; build it with: {BUILD}"
    except ImportError as error:  # built against another torch
        return None, f"the extension fused_adamw._C does not load ({error}); build it anew with: {BUILD}"


def native() -> ModuleType | None:
    """The extension module ``fused_adamw._C``, or None where it was not built."""
    return _load_native()[0]


Scalars = list[Adam] | list[Sgd]


@dataclass(frozen=True)
class Backend:
    """A way to step a bucket of rows in one call.

    ``prepare(watch, rows)`` returns the call; ``missing()`` says why the backend cannot run here, or nothing;
    ``bucket(row)`` tells rows apart that cannot share a launch.
    """

    name: str
    devices: tuple[str, ...]  # device types, () for any
    prepare: Callable[[Any, list["Row"]], Callable[[Scalars], None]]
    missing: Callable[[], str] = lambda: ""
    bucket: Callable[["Row"], Hashable] = lambda row: None


def _prepare_cpu(watch: Any, rows: list["Row"]) -> Callable[[Scalars], None]:
    return native().CpuStep(watch, [(row.slot, row.rule, row.p, row.g, list(row.states)) for row in rows])


def _prepare_reference(watch: Any, rows: list["Row"]) -> Callable[[Scalars], None]:
    @torch.no_grad()
    def run(scalars: Scalars) -> None:
        for row in rows:
            values = scalars[watch.scalars_of(row.slot)]._asdict()
            compute = torch.float64 if row.p.dtype is torch.float64 else torch.float32
            stored = [row.p, *row.states]
            p, *states = [t.to(compute) for t in stored]
            g = row.grad().to(compute)
            if row.rule.startswith("adam"):
                m, v, *vmax = states
                reference.adam(p, g, m, v, *(vmax or [None]), **values)
            else:
                reference.sgd(p, g, *(states or [None]), **values)
            for t, new in zip(stored, [p, *states], strict=True):
                if t is not new:
                    t.copy_(new)

    return run


# Best first.
BACKENDS = (
    Backend("cpu", ("cpu",), _prepare_cpu, missing=lambda: _load_native()[1]),
    Backend("reference", (), _prepare_reference),
)


def named(name: str) -> Backend:
    """The backend of this name; raises ValueError, which lists the names there are."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"no backend {name!r}: there are {', '.join(repr(b.name) for b in BACKENDS)}")


def pick(device: torch.device, requested: str | None = None) -> Backend:
    """The backend that steps tensors of this device.

    Raises ValueError for an unknown name, RuntimeError with the reason where the one asked for cannot run; warns once
    where none was asked for and the first choice cannot run.
    """
    if requested is not None:
        backend = named(requested)
        if backend.devices and device.type not in backend.devices:
            raise RuntimeError(
                f"backend={requested!r} steps tensors on {' or '.join(backend.devices)}, not on {device}"
            )
        if why := backend.missing():
            raise RuntimeError(f"backend={requested!r} cannot run: {why}")
        return backend
    backend, reasons = first(device)
    if backend.name == "reference":
        why = "; ".join(reasons) or f"there are no kernels for {device.type}"
        _warn_once(f"fused_adamw steps {device.type} tensors with plain PyTorch operators, right but slow: {why}")
    return backend


def first(device: torch.device) -> tuple[Backend, list[str]]:
    """The best backend that can run for tensors of this device, and why those before it cannot."""
    able = [b for b in BACKENDS if not b.devices or device.type in b.devices]
    reasons = [b.missing() for b in able]
    i = reasons.index("")  # the reference backend runs everywhere
    return able[i], [f"{b.name}: {why}" for b, why in zip(able[:i], reasons, strict=False)]


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
