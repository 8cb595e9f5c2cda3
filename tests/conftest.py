"""Devices and backends: every test that takes ``target`` runs once on each of them, and is left out where it cannot."""

import gc
import itertools
import os
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

from fused_adamw import backends
from tests import cases
from tests.gpu_kernels import PTXSIM, cpu_step  # noqa: F401

# What a test may need that is no package, by its marker, and why there is none.
ABSENT = {}
if not torch.cuda.is_available():
    ABSENT["gpu"] = "there is no CUDA device"
if not PTXSIM.is_dir():
    ABSENT["emulator"] = "the emulator of PTX is no part of this repository"
collect_ignore = [] if find_spec("vgpu") else ["test_gpu_controls.py"]  # which break that virtual GPU on purpose
LEFT_OUT = pytest.StashKey[str]()


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that launch a kernel."""
    if why := backends.named(request.param).missing():
        pytest.skip(why)
    return request.param


@pytest.fixture
def young():
    """Collections of garbage look at what the test makes alone: an emulator's programs take them seconds each."""
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        wide = metafunc.definition.get_closest_marker("float64")
        targets = [t for t in cases.TARGETS if t.float64 or not wide]
        pairwise = metafunc.definition.get_closest_marker("pairwise")
        axes = pairwise.kwargs if pairwise else {}
        rows = []
        for device in ("cpu", "cuda"):  # apart, so that neither counts on what runs on the other
            own = [t for t in targets if t.device == device]
            some = [*axes.values(), own]
            sizes = list(map(len, some))
            pairs = axes and own and (cases.INTERPRETED or device in (pairwise.args or (device,)))
            chosen = cases.pairwise(sizes) if pairs else itertools.product(*map(range, sizes))
            rows += [[values[i] for values, i in zip(some, picked, strict=True)] for picked in chosen]
        marked = [
            pytest.param(*row, marks=pytest.mark.gpu if row[-1].device == "cuda" else (), id=cases.name_of(row))
            for row in rows
        ]
        metafunc.parametrize([*axes, "target"], marked)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what cannot run here: to show thousands as skipped would hide the few that should not be."""
    needs = [next((name for name in ABSENT if item.get_closest_marker(name)), None) for item in items]
    config.hook.pytest_deselected(items=[item for item, name in zip(items, needs, strict=True) if name])
    items[:] = [item for item, name in zip(items, needs, strict=True) if not name]
    counts = Counter(filter(None, needs))
    told = ", ".join(f"{n} marked {name} ({ABSENT[name]})" for name, n in counts.items())
    config.stash[LEFT_OUT] = told
    if hasattr(config, "workeroutput"):  # of a process of pytest-xdist, for the one that reports
        config.workeroutput["left out"] = told


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", "")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if told := config.stash.get(LEFT_OUT, ""):
        terminalreporter.line(f"deselected: {told}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of ``-n auto``: tests that use a GPU have it for themselves; else a process a CPU, of two threads where asked."""
    return 1 if torch.cuda.is_available() else min(4, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2)


def pytest_configure(config: pytest.Config) -> None:
    if backends.native() is None:
        pytest.exit(f"the suite tests the native extension: {backends.BACKENDS[0].missing()}", returncode=1)
