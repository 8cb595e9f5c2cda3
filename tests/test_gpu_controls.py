"""Negative controls of the GPU path, on a virtual GPU, which reports what a real one does in silence."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fused_adamw import backends, gpu
from tests import cases, test_gpu

vgpu = pytest.importorskip("vgpu", reason="needs the virtual GPU")
pytestmark = [pytest.mark.gpu, pytest.mark.vgpu_allow_faults]


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """A backend that a control breaks, or a kernel that it loads on another device, is not there for the next one."""
    from fused_adamw.triton_kernels.multi_tensor import step_kernel

    monkeypatch.setattr(backends, "_broken", {})
    yield
    step_kernel.device_caches.clear()


def caught(check, *args):
    """The check fails: by its own assertion, or because a fault was reported."""
    vgpu.clear_faults()
    try:
        check(*args)
        vgpu.synchronize()
    except (AssertionError, RuntimeError):
        return True
    return bool(vgpu.faults())


def test_a_missing_device_guard(backend, monkeypatch):
    assert not caught(test_gpu.check_devices, ("cuda:1",), backend)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert caught(test_gpu.check_devices, ("cuda:1",), backend)


def test_a_staging_buffer_used_again_too_early(backend, monkeypatch):
    """A step whose staging memory is filled with the next one's data right after the copy was queued."""
    shared = {}

    def init(self, *args):
        true_init(self, *args)
        shared[self] = torch.zeros(self.host.nbytes + self.scalars.nbytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, owner, scalars):
        self.watch.update(self.host, self.slots)
        parts = self.host, torch.tensor(scalars, dtype=torch.float32)
        data = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
        staging = shared[self][: len(data)].copy_(data)
        self.buffer[: len(data)].copy_(staging, non_blocking=True)
        if early:
            staging.zero_()

    true_init = gpu.Launch.__init__
    monkeypatch.setattr(gpu.Launch, "__init__", init)
    monkeypatch.setattr(gpu.Launch, "_upload", upload)
    early = False
    assert not caught(test_gpu.test_a_network_trains_to_the_bits_of_the_cpu, backend)
    early = True
    assert caught(test_gpu.test_a_network_trains_to_the_bits_of_the_cpu, backend)


def test_a_table_that_tells_of_more_elements_than_there_are(backend, monkeypatch):
    def check():
        (p,) = (torch.nn.Parameter(torch.ones(1000, device="cuda")),)
        p.grad = torch.ones_like(p)
        cases.make("AdamW", [p], {}, backend=backend).step()

    assert not caught(check)
    row = gpu.Launch._row
    monkeypatch.setattr(gpu.Launch, "_row", staticmethod(lambda r: [*row(r)[:5], row(r)[5] + 1, 0, 0]))
    assert caught(check)


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
        (
            "if flags & IS_ALIGNED != 0:\n        whole = n // (THREADS",
            "if n > 0:\n        whole = n // (THREADS",
        ),
    ],
    ids=["a dropped tail mask", "a skipped tail", "alignment taken for granted"],
)
def test_a_broken_kernel(old, new, monkeypatch, tmp_path):
    from fused_adamw.triton_kernels import kernels

    def check():
        base = torch.zeros(2000, device="cuda")
        ours = [torch.nn.Parameter(base[1:1026]), torch.nn.Parameter(torch.zeros(1025, device="cuda"))]
        theirs = cases.parameters([(1025,), (1025,)])
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        a, b = cases.make("AdamW", ours, {}, backend="triton"), cases.make("AdamW", theirs, {})
        test_gpu.same_gradients(ours, theirs, 0)
        a.step()
        b.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))

    assert not caught(check)
    monkeypatch.setattr(kernels, "step_kernel", mutant(tmp_path, old, new).step_kernel)
    assert caught(check)
