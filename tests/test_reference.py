"""The oracle itself, against torch.optim in float64. Against the paper's algorithms: test_paper_algorithms.py."""

import pytest
import torch

from tests import cases


def run(optimizer, params, steps):
    for t in range(1, steps + 1):
        cases.set_gradients(params, t)
        optimizer.step()


@pytest.mark.float64
@pytest.mark.parametrize(("name", "options"), cases.SHARED, ids=cases.name_of)
def test_float64_equals_torch(name, options, target):
    ours, theirs = (cases.parameters(cases.SHAPES, torch.float64, target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend)
    b = getattr(torch.optim, name)(theirs, **options)
    run(a, ours, 50)
    run(b, theirs, 50)
    wanted = cases.tensors_of(b)
    found = {k: x for k, x in cases.tensors_of(a).items() if name != "SGD" or not k.endswith(".step")}
    assert found.keys() == wanted.keys()
    for key, x in found.items():
        torch.testing.assert_close(
            x.double(), wanted[key].double(), rtol=1e-12, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}"
        )
