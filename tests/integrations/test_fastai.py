"""fastai: its Learner, with our class in an OptimWrapper, clipping, its one-cycle schedule, and a resumed run."""

from functools import partial

import pytest
import torch
from fastai.callback.schedule import Learner  # with fit_one_cycle
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper

import fused_adamw


def learner(module, folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
    x = torch.randn(128, 8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
    return Learner(
        DataLoaders(loader, loader),
        model,
        loss_func=torch.nn.functional.mse_loss,
        opt_func=partial(OptimWrapper, opt=module.AdamW),
        cbs=[GradientClip(0.5)],
        path=folder,
    )


def fit(run):
    with run.no_bar(), run.no_logging():
        run.fit_one_cycle(2, 1e-2)
    return [p.detach().clone() for p in run.model.parameters()], [float(loss) for loss in run.recorder.losses]


def test_a_run_follows_torchs(tmp_path):
    run = learner(fused_adamw, tmp_path)
    losses = fit(run)[1]
    assert type(run.opt.opt) is fused_adamw.AdamW
    assert {own["step"].item() for own in run.opt.opt.state.values()} == {16}
    assert losses == pytest.approx(fit(learner(torch.optim, tmp_path))[1], rel=1e-4)
    assert losses[-1] < losses[0]


def test_a_saved_learner_resumes_to_the_same_bits(tmp_path):
    run = learner(fused_adamw, tmp_path)
    fit(run)
    run.save("half")
    expected = fit(run)[0]
    again = learner(fused_adamw, tmp_path)
    again.load("half")
    assert all(torch.equal(p, q) for p, q in zip(fit(again)[0], expected, strict=True))
