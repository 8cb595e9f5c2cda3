"""AMP: torch's GradScaler, which unscales and skips on the host, and autocast."""

import math

import pytest
import torch

from tests import cases
from tests.training import assert_close, loss_of, network, pair, params_of


def scaled(optimizer, scaler, t, bad=False):
    """Gradients of step t as a backward of the scaled loss leaves them, an infinity among them if ``bad``."""
    scaler.scale(torch.ones((), device=params_of(optimizer)[0].device))
    cases.set_gradients(params_of(optimizer), t)
    for p in params_of(optimizer):
        p.grad.mul_(scaler.get_scale())
    if bad:
        params_of(optimizer)[-1].grad.view(-1)[-1] = math.inf


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_grad_scaler(name, target):
    """The very first step is skipped, and one later: nothing changes, nothing counts, no state is made."""
    extra = {"momentum": 0.9} if name == "SGD" else {}
    a, b = pair(name, target, lr=1e-2, **extra)
    twin, _ = pair(name, target, lr=1e-2, **extra)
    scalers = [torch.amp.GradScaler(target.device, init_scale=2.0**10, growth_interval=100) for _ in range(2)]
    for t, bad in enumerate([True, False, False, True, False]):
        before = {k: v.clone() for k, v in cases.tensors_of(a).items()}
        for optimizer, scaler in zip((a, b), scalers, strict=True):
            scaled(optimizer, scaler, t, bad)
            scaler.step(optimizer)
            scaler.update()
        if bad:
            cases.assert_same_bits(cases.tensors_of(a), before)
            assert any(a.state.values()) == (t > 0)
        else:
            cases.set_gradients(params_of(twin), t)
            twin.step()
    assert_close(a, b)
    assert scalers[0].get_scale() == 2.0**8
    # the scale is a power of two, so that these are the bits of a run that knows of no scaler
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(twin))


def test_a_scaler_may_find_no_gradient(target):
    """Then it gives 0 for found_inf, and no tensor."""
    a, _ = pair("AdamW", target, lr=1e-2)
    a = cases.make("AdamW", params_of(a), {}, backend=target.backend, amp_scaling=True)
    scaler = torch.amp.GradScaler(target.device)
    for t in range(2):
        scaled(a, scaler, t)
        if t == 1:
            a.zero_grad()
            before = {k: v.clone() for k, v in cases.tensors_of(a).items()}
        scaler.step(a)
        if t == 0:
            scaler.update()  # which raises where no gradient was
    cases.assert_same_bits(cases.tensors_of(a), before)


def test_grad_scaler_with_clipping_unscales_once(target):
    """unscale_, clip_grad_norm_, step: as torch's recipe for clipping says."""
    a, b = pair("AdamW", target, lr=1e-2)
    scaler = torch.amp.GradScaler(target.device, init_scale=2.0**10)
    for t, bad in enumerate([True, False, False]):
        scaled(a, scaler, t, bad)
        scaler.unscale_(a)
        norm = torch.nn.utils.clip_grad_norm_(params_of(a), 0.5)
        scaler.step(a)
        scaler.update()
        if not bad:
            cases.set_gradients(params_of(b), t)
            torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(params_of(b), 0.5))
            b.step()
    assert_close(a, b)
    assert a.state[params_of(a)[0]]["step"].item() == 2


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_an_infinity_in_one_of_two_optimizers(amp_scaling, target):
    """Under one GradScaler: that one is skipped, the other steps, and the scale is halved for both."""
    pairs = [pair("AdamW", target, lr=1e-2), pair("SGD", target, lr=1e-2, momentum=0.9)]
    ours, torchs = zip(*pairs, strict=True)
    for optimizer in ours:
        optimizer.amp_scaling = amp_scaling
    scalers = [torch.amp.GradScaler(target.device, init_scale=2.0**10, growth_interval=100) for _ in range(2)]
    for t, bad in enumerate([None, 0, 1, None]):
        for optimizers, scaler in zip((ours, torchs), scalers, strict=True):
            before = [cases.tensors_of(o) for o in optimizers]
            before = [{k: v.clone() for k, v in tensors.items()} for tensors in before]
            for i, optimizer in enumerate(optimizers):
                scaled(optimizer, scaler, t, bad=i == bad)
            for i, optimizer in enumerate(optimizers):
                scaler.step(optimizer)
                if i == bad:
                    cases.assert_same_bits(cases.tensors_of(optimizer), before[i])
                else:
                    assert not torch.equal(params_of(optimizer)[0], before[i]["0.p"])
            scaler.update()
    for a, b in pairs:
        assert_close(a, b)
        assert a.state[params_of(a)[0]]["step"].item() == 3
    assert scalers[0].get_scale() == scalers[1].get_scale() == 2.0**8


def test_autocast_in_bf16(target):
    """float32 parameters under autocast: bf16 products, float32 gradients; judged by torch's in float64 without it."""
    losses = []
    for module, options in ((torch.optim, {}), (cases.fused_adamw, {"backend": target.backend})):
        model = network(target.device) if options else network(dtype=torch.float64)
        optimizer = module.AdamW(model.parameters(), lr=1e-2, **options)
        for t in range(30):
            with torch.autocast(target.device, torch.bfloat16, enabled=bool(options)):
                loss = loss_of(model, t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
