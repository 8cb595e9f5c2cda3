"""The examples run, and what they compose is what it says it is."""

import copy
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_adamw
from tests.test_optimizers import network

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


HAS_MUON = hasattr(torch.optim, "Muon")  # since torch 2.9
# train_fsdp, which runs on several processes, has its tests in test_distributed.py.
ALONE = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"train_fsdp", *(() if HAS_MUON else ("muon",))})


@pytest.mark.parametrize("name", ALONE)
def test_it_runs(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    example(name)["main"]()
    assert capsys.readouterr().out


def test_swa_averages_the_ends_of_the_cycles():
    model, average, ends = example("swa_restarts")["train"](cycles=4, first=1, T_0=2)
    assert len(ends) == average.n_averaged.item() == 3
    for i, (averaged, last) in enumerate(zip(average.module.parameters(), model.parameters(), strict=True)):
        torch.testing.assert_close(averaged, torch.stack([weights[i] for weights in ends]).mean(0))
        assert torch.equal(ends[-1][i], last)
        assert not torch.equal(averaged, last)


def test_the_average_is_flatter():
    """What the example prints, 0.24 against 0.63 here, with room for other machines' rounding."""
    swa = example("swa_restarts")
    model, average, _ = swa["train"]()
    x, y = swa["spirals"](1024, seed=1)
    rises = [swa["sharpness"](network.eval(), x, y) for network in (model, average)]
    assert rises[1] < 0.8 * rises[0]


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_sam_is_a_closure_around_any_optimizer(name, rho):
    """Ours, given the closure, goes where torch's goes that is given the gradient at the perturbed weights."""
    sam = example("sam")["sam"]
    x = torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x.sum(1, keepdim=True)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours, theirs = network().double(), network().double()
    a = getattr(fused_adamw, name)(ours.parameters(), **options)
    b = getattr(torch.optim, name)(theirs.parameters(), **options)
    for _ in range(20):
        plain = F.mse_loss(ours(x), y).item()
        assert a.step(sam(ours, lambda: F.mse_loss(ours(x), y), rho)).item() == plain

        params = dict(theirs.named_parameters())
        g = torch.autograd.grad(F.mse_loss(theirs(x), y), list(params.values()))
        norm = torch.cat([part.flatten() for part in g]).norm()
        there = {k: (p + rho * d / norm).detach().requires_grad_() for (k, p), d in zip(params.items(), g, strict=True)}
        loss = F.mse_loss(torch.func.functional_call(theirs, there, (x,)), y)
        for p, d in zip(params.values(), torch.autograd.grad(loss, list(there.values())), strict=True):
            p.grad = d
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_sam_leaves_the_weights_as_they_were():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    example("sam")["sam"](model, lambda: model(x).square().mean(), rho=0.3)()
    for p, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), kept)


def test_gradient_release_holds_less_and_gives_the_same_bits():
    train = example("gradient_release")["train"]
    (plain, most), (released, least) = train(None), train(0)
    assert 10 * least < most
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), released.parameters(), strict=True))


@pytest.mark.slow
def test_train_gpt_resumes_to_the_bits(tmp_path):
    train = example("train_gpt")["train"]
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    losses = list(train(4, whole))
    assert [*train(2, parts), *train(4, parts)] == losses
    a, b = (torch.load(path) for path in (whole, parts))
    assert all(torch.equal(p, b["model"][name]) for name, p in a["model"].items())
    assert a["scheduler"]["last_epoch"] == 4
    assert all(own["step"].item() == 4 for own in b["optimizer"]["state"].values())


@pytest.mark.skipif(not HAS_MUON, reason="torch.optim.Muon came with torch 2.9")
def test_muon_has_one_scheduler_and_one_state_dict():
    optimizer_of = example("muon")["optimizer_of"]

    def network():
        torch.manual_seed(0)
        sizes = ((4, 8), (8, 8), (8, 2))
        return torch.nn.Sequential(*[torch.nn.Linear(*size) for size in sizes])

    def run(model, optimizer, steps):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            scheduler.step()

    model = network()
    optimizer = optimizer_of(model)
    run(model, optimizer, 2)
    assert [type(part).__name__ for part in optimizer.optimizers] == ["Muon", "AdamW"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02 / 4, 3e-3 / 4]
    other = copy.deepcopy(model)
    resumed = optimizer_of(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, resumed)):
        run(*pair, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert resumed.param_groups[1] is resumed.optimizers[1].param_groups[0]
