"""Devices and backends: every test that takes ``target`` runs once on each of them."""

import pytest
import torch

from fused_adamw import backends
from tests import cases
from tests.gpu_kernels import cpu_step  # noqa: F401


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that launch a kernel."""
    if why := backends.named(request.param).missing():
        pytest.skip(why)
    return request.param


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        wide = metafunc.definition.get_closest_marker("float64")
        targets = [t for t in cases.TARGETS if t.float64 or not wide]
        marked = [pytest.param(t, marks=pytest.mark.gpu if t.device == "cuda" else (), id=str(t)) for t in targets]
        metafunc.parametrize("target", marked)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    if backends.native() is None:
        pytest.exit(f"the suite tests the native extension: {backends.BACKENDS[0].missing()}", returncode=1)
