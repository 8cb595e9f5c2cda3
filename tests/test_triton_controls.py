"""Negative controls of the GPU path, on a virtual GPU, which reports what a real one does in silence."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fused_adamw import backends
from tests import cases, test_triton

vgpu = pytest.importorskip("vgpu", reason="needs the virtual GPU")
pytestmark = [pytest.mark.gpu, pytest.mark.vgpu_allow_faults]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """A backend that a control breaks, or a kernel that it loads on another device, is not there for the next one."""
    from fused_adamw.triton_kernels import launch

    monkeypatch.setattr(backends, "_broken", {})
    yield
    launch.step_kernel.device_caches.clear()


def caught(check, *args):
    """The check fails: by its own assertion, or because a fault was reported."""
    vgpu.clear_faults()
    try:
        check(*args)
        vgpu.synchronize()
    except (AssertionError, RuntimeError):
        return True
    return bool(vgpu.faults())


def test_a_missing_device_guard(monkeypatch):
    assert not caught(test_triton.check_devices, ("cuda:1",))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert caught(test_triton.check_devices, ("cuda:1",))


def test_a_staging_buffer_used_again_too_early(monkeypatch):
    from fused_adamw.triton_kernels import launch

    def copy(self, data, offset):
        staging = torch.empty(len(data), dtype=torch.uint8, pin_memory=True)
        staging.copy_(data)
        self.buffer[offset : offset + len(data)].copy_(staging, non_blocking=True)
        staging.zero_()  # as the next step would, had it the same buffer

    assert not caught(test_triton.test_a_network_trains_to_the_bits_of_the_cpu)
    monkeypatch.setattr(launch.Launch, "_copy", copy)
    assert caught(test_triton.test_a_network_trains_to_the_bits_of_the_cpu)


def mutant(tmp_path, old, new):
    """The module of the kernel, with one piece of its source replaced."""
    from fused_adamw.triton_kernels import multi_tensor

    source = Path(multi_tensor.__file__).read_text().replace("from .", "from fused_adamw.triton_kernels.")
    assert source.count(old) == 1
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mask = None if ALIGNED else i < end", "mask = None"),
        ("if whole < n:", "if whole + 1 < n:"),
        ("tl.load(row + 7) & 1 != 0", "tl.load(row + 5) > 0"),
    ],
    ids=["a dropped tail mask", "a skipped tail", "alignment taken for granted"],
)
def test_a_broken_kernel(old, new, monkeypatch, tmp_path):
    from fused_adamw.triton_kernels import launch

    def check():
        base = torch.zeros(2000, device="cuda")
        ours = [torch.nn.Parameter(base[1:1026]), torch.nn.Parameter(torch.zeros(1025, device="cuda"))]
        theirs = cases.parameters([(1025,), (1025,)])
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        a, b = cases.make("AdamW", ours, {}), cases.make("AdamW", theirs, {})
        test_triton.same_gradients(ours, theirs, 0)
        a.step()
        b.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))

    assert not caught(check)
    monkeypatch.setattr(launch, "step_kernel", mutant(tmp_path, old, new).step_kernel)
    assert caught(check)
