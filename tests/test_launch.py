"""What one launch covers: lists of many tensors, in many groups, of several dtypes and rules."""

import pytest
import torch

from tests import cases
from tests.gpu_kernels import AVERAGED, MEASURED, Triton


def check_list(shapes, target, groups=1):
    """A list of tensors in groups of different options is stepped as each tensor alone would be, on the CPU.

    The reference's operators round otherwise on a GPU: there it is compared with itself.
    """
    params = cases.parameters(shapes, device=target.device)
    cases.set_gradients(params, 1)
    options = [{"lr": 1e-3 * (1 + i % 28), "weight_decay": 0.01 * (i % 5)} for i in range(groups)]
    together = [{"params": params[i::groups], **o} for i, o in enumerate(options)]
    before = [p.detach().cpu().clone() for p in params]
    cases.make("AdamW", together, {}, backend=target.backend).step()
    backend, device = ("reference", target.device) if target.backend == "reference" else ("cpu", "cpu")
    for i, (p, start) in enumerate(zip(params, before, strict=True)):
        alone = torch.nn.Parameter(start.to(device))
        alone.grad = p.grad.to(device)
        cases.make("AdamW", [alone], options[i % groups], backend=backend).step()
        assert cases.equal_bits(p, alone.to(p.device)).all(), f"parameter {i}"


def test_1000_tensors(target):
    check_list([(1 + i % 37,) for i in range(1000)], target)


def test_465_groups(target):
    check_list([(1 + i % 37,) for i in range(930)], target, groups=465)


@pytest.mark.parametrize("moved", [False, True])
def test_groups_of_different_dtypes(moved, target):
    """More rows of scalars than a launch has tensors: none of them may run into another's table."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    ours = [cases.parameters([(20_000,)], dtypes[i % 3], target.device, seed=i)[0] for i in range(7)]
    theirs = [cases.parameters([(20_000,)], dtypes[i % 3], target.device, seed=i)[0] for i in range(7)]
    together = cases.make(
        "AdamW", [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(ours)], {}, backend=target.backend
    )
    alone = [cases.make("AdamW", [q], {"lr": 1e-3 * (i + 1)}, backend=target.backend) for i, q in enumerate(theirs)]
    for t in range(3):
        if t == 0 or moved:
            for p, q in zip(ours, theirs, strict=True):
                p.grad, q.grad = torch.full_like(p, 0.1 * (t + 1)), torch.full_like(q, 0.1 * (t + 1))
        together.step()
        for optimizer in alone:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert cases.equal_bits(p, q).all()


def test_one_launch_for_a_device(target):
    """Of all dtypes and rules on the CPU; on a GPU one per compiled kernel: two dtypes, with amsgrad and without."""
    params = cases.parameters(cases.SHAPES, device=target.device)
    params += cases.parameters(cases.SHAPES, torch.bfloat16, target.device)
    groups = [{"params": params[::2]}, {"params": params[1::2], "amsgrad": True}]
    optimizer = cases.make("AdamW", groups, {}, backend=target.backend)
    cases.set_gradients(params, 1)
    optimizer.step()
    assert len(optimizer._plans) == (4 if target.backend in ("triton", "cuda") else 1)


@pytest.mark.parametrize("variant", [MEASURED[0], MEASURED[-1], AVERAGED[-1]], ids=str)
def test_triton_compiles_what_its_older_versions_have_trouble_with(variant):
    """Ahead of time: 3.4 and 3.5 cannot compile some branches."""
    pytest.importorskip("triton")
    Triton().compile_step(Triton._target(90), variant)
