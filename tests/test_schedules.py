"""Schedules: against transcriptions of the paper's formulas at every step, torch's own schedulers, and resume."""

import doctest
import io
import math
import warnings
from fractions import Fraction

import pytest
import torch
from torch import nn

import fused_adamw
from fused_adamw import CosineWarmRestarts, normalized_weight_decay, param_groups, schedules
from tests import cases
from tests.test_optimizers import network, train

ALGORITHMS = [
    ("AdamW", {"lr": 1e-2, "weight_decay": 0.3, "decouple_lr": True}),
    ("SGDW", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.3, "decouple_lr": True, "lr_in_momentum": True}),
]


def transcription(step, T_0, T_mult, steps_per_epoch, lr, norm, eta_min=0.0):
    """(learning rate, weight decay) of appendix B.1, T_cur and T_i in epochs; restarts where the decimals say."""
    epoch, start, T_i = Fraction(step) / Fraction(str(steps_per_epoch)), Fraction(0), Fraction(str(T_0))
    while epoch - start >= T_i:
        start, T_i = start + T_i, T_i * Fraction(str(T_mult))
    T_cur = epoch - start
    gamma = eta_min + 0.5 * (lr - eta_min) * (1 + math.cos(math.pi * float(T_cur / T_i)))
    return gamma, norm * math.sqrt(1 / float(Fraction(str(steps_per_epoch)) * T_i))


def optimizer_of(lr=0.3, weight_decay=0.05, kind=fused_adamw.AdamW, **options):
    options = {"decouple_lr": True} | options
    return kind([nn.Parameter(torch.zeros(2))], lr=lr, weight_decay=weight_decay, **options)


def step(optimizer, scheduler):
    optimizer.step()
    scheduler.step()


def now(optimizer, group=0):
    return optimizer.param_groups[group]["lr"], optimizer.param_groups[group]["weight_decay"]


@pytest.mark.parametrize("eta_min", [0.0, 0.01])
@pytest.mark.parametrize("steps_per_epoch", [1, 7, 10, 12.5])
@pytest.mark.parametrize("T_mult", [1, 2, 1.5])
@pytest.mark.parametrize("T_0", [3, 2.5, 0.1, 0.3])
def test_every_value_is_the_papers(T_0, T_mult, steps_per_epoch, eta_min):
    optimizer = optimizer_of()
    scheduler = CosineWarmRestarts(
        optimizer, T_0, T_mult, eta_min, steps_per_epoch=steps_per_epoch, normalized_decay=True
    )
    restarts = 0
    for t in range(120):
        wanted = transcription(t, T_0, T_mult, steps_per_epoch, 0.3, 0.05, eta_min)
        assert now(optimizer) == pytest.approx(wanted, rel=1e-12, abs=1e-13)
        assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        before = scheduler.cycle
        step(optimizer, scheduler)
        restarts += scheduler.cycle > before
        assert 0 <= scheduler.T_cur < scheduler.T_i
    assert restarts > 1


@pytest.mark.parametrize("T_mult", [1, 2, 3])
def test_per_epoch_it_is_torchs(T_mult):
    ours, theirs = optimizer_of(), optimizer_of()
    mine = CosineWarmRestarts(ours, 4, T_mult, 0.02)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(theirs, 4, T_mult, 0.02)
    for _ in range(60):
        assert now(ours) == pytest.approx(now(theirs), rel=1e-12)
        assert now(ours)[1] == 0.05
        step(ours, mine)
        step(theirs, torchs)


def test_fractions_of_epochs_as_torchs_step_takes_them():
    """torch's idiom, ``step(epoch + i / iters)``, is as good as steps_per_epoch; and one may jump, back too."""
    ours, theirs, counted = optimizer_of(), optimizer_of(), optimizer_of()
    mine = CosineWarmRestarts(ours, 2, 2, steps_per_epoch=7, normalized_decay=True)
    torchs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(theirs, 2, 2)
    counting = CosineWarmRestarts(counted, 2, 2, steps_per_epoch=7, normalized_decay=True)
    for epoch in range(16):
        for i in range(7):
            for optimizer in (ours, theirs, counted):
                optimizer.step()
            mine.step(epoch + i / 7)
            torchs.step(epoch + i / 7)
            if (epoch, i) != (0, 0):
                counting.step()
            assert now(ours)[0] == pytest.approx(now(theirs)[0], rel=1e-12, abs=1e-12)
            assert now(ours) == now(counted)
    mine.step(2.5)
    assert now(ours) == pytest.approx(transcription(Fraction(35, 2), 2, 2, 7, 0.3, 0.05))
    mine.step()
    assert now(ours) == pytest.approx(transcription(Fraction(37, 2), 2, 2, 7, 0.3, 0.05))
    with pytest.raises(ValueError, match="Invalid epoch: -1"):
        mine.step(-1)


def trained(name, options, steps, stopped=None, sequential=False):
    """Parameters, state and hyperparameters after so many steps of AdamWR or SGDWR; stopped and resumed in between."""

    def setup():
        model = network()
        optimizer = cases.make(name, param_groups(model, options["weight_decay"]), options)
        scheduler = CosineWarmRestarts(optimizer, 1.5, 2, steps_per_epoch=4, normalized_decay=True)
        if sequential:
            warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
            scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, scheduler], [5])
        return model, optimizer, scheduler

    model, optimizer, scheduler = setup()
    if stopped is not None:
        train(optimizer, model, stopped, scheduler)
        file = io.BytesIO()
        torch.save([x.state_dict() for x in (model, optimizer, scheduler)], file)
        file.seek(0)
        model, optimizer, scheduler = setup()
        for x, state in zip((model, optimizer, scheduler), torch.load(file), strict=True):
            x.load_state_dict(state)
    train(optimizer, model, steps - (stopped or 0), scheduler, start=stopped or 0)
    return cases.tensors_of(optimizer), [now(optimizer, i) for i in range(2)]


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("stopped", [1, 6, 11, 17, 18, 19])  # restarts are after steps 6, 18 and 42
@pytest.mark.parametrize(("name", "options"), ALGORITHMS, ids=cases.name_of)
def test_resumed_bit_for_bit(name, options, stopped, sequential):
    tensors, hyper = trained(name, options, 50, None, sequential)
    resumed_tensors, resumed_hyper = trained(name, options, 50, stopped, sequential)
    cases.assert_same_bits(resumed_tensors, tensors)
    assert resumed_hyper == hyper


def test_resumed_by_last_epoch():
    first = optimizer_of()
    scheduler = CosineWarmRestarts(first, 0.5, 2, steps_per_epoch=10, normalized_decay=True)
    for _ in range(8):
        step(first, scheduler)
    second = optimizer_of()
    second.load_state_dict(first.state_dict())
    resumed = CosineWarmRestarts(second, 0.5, 2, last_epoch=7, steps_per_epoch=10, normalized_decay=True)
    for _ in range(20):
        assert now(second) == now(first)
        step(first, scheduler)
        step(second, resumed)
    fresh = optimizer_of()
    fresh.param_groups[0]["initial_lr"] = 0.3
    with pytest.raises(KeyError, match="group 0 has no 'initial_weight_decay'"):
        CosineWarmRestarts(fresh, 0.5, last_epoch=7, steps_per_epoch=10, normalized_decay=True)


def test_after_a_warmup():
    optimizer = optimizer_of()
    restarts = CosineWarmRestarts(optimizer, 1, 2, steps_per_epoch=8, normalized_decay=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, restarts], [3])
    for t in range(60):
        lr, decay = transcription(max(0, t - 3), 1, 2, 8, 0.3, 0.05)
        assert now(optimizer) == pytest.approx((lr if t >= 3 else 0.3 * (0.25 + 0.25 * t), decay))
        step(optimizer, scheduler)


def test_groups_have_their_own_values_and_zero_stays_zero():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    groups = [{"params": params[0]}, {"params": params[1], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = fused_adamw.SGDW(groups, lr=0.3, weight_decay=0.05, momentum=0.9, decouple_lr=True)
    scheduler = CosineWarmRestarts(optimizer, 2, 2, steps_per_epoch=5, normalized_decay=True)
    for t in range(40):
        assert now(optimizer, 0) == pytest.approx(transcription(t, 2, 2, 5, 0.3, 0.05))
        assert now(optimizer, 1) == pytest.approx(transcription(t, 2, 2, 5, 0.1, 0.0))
        if t == 12:
            state = scheduler.state_dict()
            optimizer.add_param_group({"params": params[2], "lr": 0.2, "weight_decay": 0.01})
        if t > 12:
            assert now(optimizer, 2) == pytest.approx(transcription(t, 2, 2, 5, 0.2, 0.01))
        step(optimizer, scheduler)
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert len(state["base_lrs"]) == len(state["base_decays"]) == 2  # what was saved does not grow


def test_tensors_are_written_in_place():
    lr, decay = torch.tensor(0.25), torch.tensor(0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)
    optimizer.param_groups[0]["weight_decay"] = decay
    scheduler = CosineWarmRestarts(optimizer, 2, 2, steps_per_epoch=5, normalized_decay=True)
    for t in range(25):
        assert (lr.item(), decay.item()) == pytest.approx(transcription(t, 2, 2, 5, 0.25, 0.5), rel=1e-6, abs=1e-8)
        step(optimizer, scheduler)
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.param_groups[0]["weight_decay"] is decay


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T_0": 0}, "Invalid T_0: 0"),
        ({"T_0": math.nan}, "Invalid T_0: nan"),
        ({"T_0": 1, "T_mult": 0.5}, "Invalid T_mult: 0.5"),
        ({"T_0": 1, "eta_min": -1}, "Invalid eta_min: -1"),
        ({"T_0": 1, "steps_per_epoch": 0}, "Invalid steps_per_epoch: 0"),
        ({"T_0": 1, "normalized_decay": True}, "needs steps_per_epoch"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CosineWarmRestarts(optimizer_of(), **arguments)


def test_an_optimizer_without_decay_is_refused():
    optimizer = torch.optim.Rprop([nn.Parameter(torch.zeros(2))])
    CosineWarmRestarts(optimizer, 3)
    with pytest.raises(ValueError, match="group 0 has none"):
        CosineWarmRestarts(optimizer, 3, steps_per_epoch=2, normalized_decay=True)
    with pytest.raises(TypeError, match="is not an Optimizer"):
        CosineWarmRestarts(nn.Linear(1, 1), 3)


def test_a_normalized_decay_that_the_learning_rate_scales_is_told():
    """It is in the paper's convention. Not where there is no decay, or it is L2, or the decay is left alone."""

    def made(name, **options):
        p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        return cases.make(name, [{"params": p, "weight_decay": 0.0}, {"params": q}], {"weight_decay": 0.1, **options})

    driven = {"steps_per_epoch": 5, "normalized_decay": True}
    for name in ("AdamW", "SGDW"):
        with pytest.warns(UserWarning, match="group 1 multiplies its decay .* decouple_lr=True") as told:
            CosineWarmRestarts(made(name), 3, **driven)
        assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CosineWarmRestarts(made("AdamW", decouple_lr=True), 3, **driven)
        CosineWarmRestarts(made("Adam"), 3, **driven)
        CosineWarmRestarts(made("AdamW"), 3)


TORCHS = {
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=1e-4),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 7, gamma=0.3),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15]),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
    "CosineWarmRestarts": lambda o: CosineWarmRestarts(o, 0.5, 2, steps_per_epoch=8, normalized_decay=True),
}


@pytest.mark.float64
@pytest.mark.filterwarnings("ignore:normalized_decay=True sets decays in the paper's convention")
@pytest.mark.parametrize("scheduler", TORCHS)
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_a_scheduled_optimizer_follows_torchs(name, scheduler, target):
    """torch's schedulers drive our optimizers as they drive torch's, and so does ours torch's."""
    options = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    ours, theirs = (cases.parameters([(7,), (17, 31)], torch.float64, target.device) for _ in range(2))
    a = cases.make(name, ours, options, backend=target.backend)
    b = getattr(torch.optim, name)(theirs, **options)
    mine, torchs = TORCHS[scheduler](a), TORCHS[scheduler](b)
    rates = set()
    for t in range(1, 41):
        cases.set_gradients(ours, t)
        cases.set_gradients(theirs, t)
        step(a, mine)
        step(b, torchs)
        assert now(a) == now(b)
        rates.add(now(a)[0])
    assert len(rates) > 2
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_normalized_weight_decay():
    assert normalized_weight_decay(0.05, 128, 50_000, 100) == pytest.approx(0.05 / math.sqrt(50_000 * 100 / 128))
    assert normalized_weight_decay(0.05, 1, 1, 1) == 0.05
    assert normalized_weight_decay(0.0, 128, 50_000, 0.5) == 0
    for arguments, name in [
        ((-1, 1, 1, 1), "norm"),
        ((1, 0, 1, 1), "batch_size"),
        ((1, 1, -2, 1), "dataset_size"),
        ((1, 1, 1, math.nan), "epochs"),
    ]:
        with pytest.raises(ValueError, match=f"Invalid {name}"):
            normalized_weight_decay(*arguments)


class Model(nn.Module):
    """A model with every kind of parameter that is not to be decayed."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm2d = nn.BatchNorm2d(2)
        self.norm = nn.LayerNorm((4, 6))  # of two dimensions
        self.group_norm, self.rms = nn.GroupNorm(2, 4), nn.RMSNorm((2, 3))
        self.attention = nn.MultiheadAttention(6, 2, add_bias_kv=True)  # bias_k: three dimensions
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 5)
        self.head.weight = self.embedding.weight  # shared
        self.conv.weight.requires_grad_(False)


def test_param_groups():
    model = Model()
    decayed, plain = param_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = ["embedding.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    assert [names[id(p)] for p in decayed["params"]] == wanted
    assert {names[id(p)] for p in plain["params"]} == set(names.values()) - set(wanted)
    assert len(plain["params"]) == len(names) - len(wanted)
    for kind in (fused_adamw.AdamW, torch.optim.SGD):
        assert len(kind(param_groups(model, 0.1), lr=0.1).param_groups) == 2


def test_equal_and_empty_groups_are_merged():
    model = Model()
    (group,) = param_groups(model, 0)
    assert len(group["params"]) == len(list(model.parameters()))
    assert group["weight_decay"] == 0
    assert [len(g["params"]) for g in param_groups(nn.Linear(3, 3, bias=False), 0.1)] == [1]
    assert [g["weight_decay"] for g in param_groups(nn.LayerNorm(3), 0.1)] == [0.0]


def test_docstring_examples():
    results = doctest.testmod(schedules)
    assert results.attempted > 0
    assert results.failed == 0


class Blocks(nn.Module):
    """An embedding, three layers of two parameters, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)


def options_by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["weight_decay"], g.get("lr_mult", 1)) for g in groups for p in g["params"]}


def test_param_groups_of_layers_and_patterns():
    model = Blocks()
    groups = param_groups(
        model, 0.1, no_decay=["embedding.*"], lr_mult={"head.*": 10.0, "*.bias": 2.0}, layer_decay=0.5
    )
    found = options_by_name(model, groups)
    assert found == {
        "embedding.weight": (0.0, 0.0625),
        **{f"blocks.{i}.0.weight": (0.1, 0.5 ** (3 - i)) for i in range(3)},
        **{f"blocks.{i}.0.bias": (0.0, 2 * 0.5 ** (3 - i)) for i in range(3)},
        "norm.weight": (0.0, 1),
        "norm.bias": (0.0, 2),
        "head.weight": (0.1, 10),
        "head.bias": (0.0, 20),
    }
    assert len(groups) == len(set(found.values()))
    fused_adamw.AdamW(groups)
    with pytest.raises(ValueError, match=r"'heads\.\*' matches no parameter: the first is 'embedding.weight'"):
        param_groups(model, 0.1, lr_mult={"heads.*": 2.0})
    with pytest.raises(ValueError, match="'nothing' matches no parameter"):
        param_groups(model, 0.1, no_decay=["nothing"])
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="Invalid multiplier of 'layer_decay'"):
            param_groups(model, 0.1, layer_decay=bad)
        with pytest.raises(ValueError, match="Invalid multiplier of 'head"):
            param_groups(model, 0.1, lr_mult={"head.*": bad})
    with pytest.raises(ValueError, match="layer_decay needs layers in a ModuleList or a Sequential"):
        param_groups(nn.Linear(2, 2), 0.1, layer_decay=0.5)
    deep = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    assert options_by_name(deep, param_groups(deep, 0.1, layer_decay=0.5)) == {
        f"{i}.weight": (0.1, 0.5 ** (3 - i)) for i in range(3)
    }


def test_many_groups_of_layers_are_one_launch():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    optimizer = fused_adamw.AdamW(param_groups(model, 0.1, layer_decay=0.99))
    assert len(optimizer.param_groups) == 400
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(optimizer._plans) == 1
