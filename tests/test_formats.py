"""Formats: how parameters and moments are stored, on every backend, and that nothing is lost that a format promises."""

import copy
import io
import itertools
import re
from functools import partial

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fused_adamw import backends, codecs, formats, plan
from fused_adamw.contract import MASTER_KEYS
from fused_adamw.tensors import NOT_SHARDED
from tests import cases
from tests.test_checkpoints import module

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# What a bfloat16 parameter can be kept as.
CURES = [{"rounding": "stochastic"}, {"master": "kahan"}, {"master": "split16"}, {"master": "fp32"}]
# And its moments.
MOMENTS = [
    {"state_dtype": BF16, "rounding": "stochastic"},
    {"state_dtype": BF16, "rounding": "stochastic", "master": "split16"},
    {"state_dtype": "int8"},
    {"state_dtype": "int8", "rounding": "stochastic"},
    {"state_dtype": "int8", "rounding": "stochastic", "master": "split16"},
]
ALL = [*CURES, *MOMENTS]
LONG = (5003, 1)  # more than formats.SMALL, no vector, and no multiple of a block


def trained(name, options, target, steps=3, shapes=(LONG, (7, 9), ()), dtype=BF16, params=None, first=0):
    params = cases.parameters(shapes, dtype, target.device) if params is None else params
    optimizer = cases.make(name, params, options, backend=target.backend)
    go_on(optimizer, range(first, first + steps))
    return optimizer


def go_on(optimizer, steps):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        cases.set_gradients(params, t)
        optimizer.step()


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


# ---- Random bits.


def philox(counter, key):
    """Philox 4x32-7 in whole numbers."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 0xFFFFFFFF
    for _ in range(7):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "known"),
    [  # the known answers of the authors' Random123
        ((0,) * 4, (0,) * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_is_that_of_its_authors(counter, key, known):
    assert [f"{x:08x}" for x in philox(counter, key)] == known.split()


@pytest.mark.parametrize("place", [NOT_SHARDED, (5, 1 << 62, 0), ((1 << 35) + 2, 3, 10)])
def test_words(place):
    seed, step, index, n = (1 << 40) + 12345, 70000, 17, 50
    offset, run, skip = place
    numbers = [offset + i + i // run * skip for i in range(n)]
    key = seed & 0xFFFFFFFF, seed >> 32
    for average in (False, True):
        above = average << 31
        counters = [((i >> 3) & 0xFFFFFFFF, i >> 35 | above, step, index) for i in numbers]
        drawn = [philox(counter, key)[i >> 1 & 3] for i, counter in zip(numbers, counters, strict=True)]
        own_first = [w % 65536 * 65536 + w // 65536 if i % 2 else w for i, w in zip(numbers, drawn, strict=True)]
        assert codecs.words(seed, step, index, place, n, torch.device("cpu"), average).tolist() == own_first


def test_what_an_element_draws():
    word = torch.tensor([0x12345678])
    assert codecs.for_parameter(word).item() == 0x5678
    assert codecs.for_moment(word, second=False).item() == (0x1234 + 0xBB64 * 0x5678) % 65536
    assert codecs.for_moment(word, second=True).item() == (0x1234 + 0x9E36 * 0x5678) % 65536


def draws(word):
    """All that two neighbours draw by a word, [6, .]: for parameter, first and second moment, the even one first."""
    return torch.stack(
        [
            draw(own_first)
            for own_first in (word, (word << 16 | word >> 16) & 0xFFFFFFFF)
            for draw in (
                codecs.for_parameter,
                partial(codecs.for_moment, second=False),
                partial(codecs.for_moment, second=True),
            )
        ]
    )


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(range(6), 2)))
def test_any_two_draws_of_neighbours_are_independent(one, other):
    """Whatever the one is, the other has each value once; of some pairs, but for the two lowest bits."""
    stream, element = one % 3, one // 3
    same_stream, with_parameter = stream == other % 3, element == other // 3 and 0 in (stream, other % 3)
    most = 1 if same_stream or with_parameter else 4
    # Of all words, those that give `one` this value are found by their halves: it is linear in each of them.
    for value in (0, 0x1234, 0xFFFF):
        half = torch.arange(0x10000)
        coefficients = draws(torch.tensor([1, 1 << 16]))[one].tolist()  # of the lower and the upper half
        if coefficients[0] % 2:
            low = (value - coefficients[1] * half) * pow(coefficients[0], -1, 1 << 16) & 0xFFFF
            words = low | half << 16
        else:
            high = (value - coefficients[0] * half) * pow(coefficients[1], -1, 1 << 16) & 0xFFFF
            words = half | high << 16
        drawn = draws(words)
        assert drawn[one].eq(value).all()
        counts = drawn[other].bincount(minlength=1 << 16)
        assert counts.max() <= most
        assert counts.view(-1, 4).sum(1).eq(4).all()  # so that none of the upper 14 bits depends on `one`


# Neighbours of all exponents, of both signs: exact ones, ones just beside, halves, NaN with and without a payload.
HIGH = torch.cat([torch.arange(0, 0x8000, 64) + d for d in (-1, 0, 1)]) % 0x8000
LOW = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
VALUES = codecs._from_bits(((HIGH[:, None] << 16) | LOW).flatten())
VALUES = torch.cat([VALUES, -VALUES, codecs._from_bits(torch.tensor([0x7FFFFFFF, 0x7F7FFFFF, 0xFFFFFFFF, 0x7F800000]))])


def stored(values, options, target):
    """What is stored of these float32 in bfloat16 parameters, with random bits of step 1 for parameter 1."""
    filler, p = cases.parameters([(3,)], BF16, target.device)[0], torch.zeros(len(values), dtype=BF16)
    p = torch.nn.Parameter(p.to(target.device))
    cases.set_gradient(p, values.to(target.device))
    optimizer = cases.make("SGD", [filler, p], {"lr": 1.0, "maximize": True, **options}, backend=target.backend)
    optimizer.step()
    return optimizer, p


def test_stochastic_rounding_is_that_of_the_formula(target):
    """To the bit; infinities stay, and every NaN is a NaN."""
    _, p = stored(VALUES, {"rounding": "stochastic", "seed": 99}, target)
    random = codecs.for_parameter(codecs.words(99, 1, 1, NOT_SHARDED, len(VALUES), torch.device("cpu")))
    torch.testing.assert_close(p.detach().cpu(), codecs.stochastic(VALUES, random), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(p.cpu().isnan(), VALUES.isnan())
    assert p[-1].isinf()


def test_stochastic_rounding_has_the_right_mean(target):
    """A value between two bfloat16, rounded often enough: up as often as its place between them says."""
    n, part = 100_000, 0.3
    x = torch.full((n,), 1 + part / 128)
    _, p = stored(x, {"rounding": "stochastic"}, target)
    ups = (p > 1).float().mean().item()
    assert abs(ups - part) < 4 * (part * (1 - part) / n) ** 0.5
    assert set(p.tolist()) == {1.0, 1 + 1 / 128}


def test_random_bits_differ_by_step_parameter_and_seed(target):
    x = torch.full((1000,), 1 + 0.5 / 128)
    first = stored(x, {"rounding": "stochastic"}, target)[1]
    assert torch.equal(first, stored(x, {"rounding": "stochastic"}, target)[1])
    others = [stored(x, {"rounding": "stochastic", "seed": seed}, target)[1] for seed in (1, 1 << 32)]
    p, q = cases.parameters([(1000,)] * 2, BF16, target.device)
    optimizer = cases.make(
        "SGD", [p, q], {"lr": 1.0, "maximize": True, "rounding": "stochastic"}, backend=target.backend
    )
    for _ in range(2):
        for t in (p, q):
            t.detach().zero_()
            cases.set_gradient(t, x.to(target.device))
        optimizer.step()
        others += [p.detach().clone(), q.detach().clone()]
    agreeing = {
        round((a == b).float().mean().item(), 1) for a, b in itertools.combinations([*others[:2], *others[2:]], 2)
    }
    assert agreeing <= {0.4, 0.5, 0.6}
    assert torch.equal(others[3], first)  # step 1 of parameter 1


# ---- Masters.


def test_split16_is_every_float32(target):
    """Its halves come apart and together again, for all lower ones: what a step with lr=0 leaves is what it found."""
    high = torch.tensor([0, 1, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F])
    x = codecs._from_bits(((high[:, None] << 16) | torch.arange(0x10000)).flatten())
    x = torch.cat([x, -x])
    p, r = torch.empty(len(x), dtype=BF16), torch.empty(len(x), dtype=BF16)
    codecs.write_master("split16", x, p, r)
    assert torch.equal(bits(codecs.read_master("split16", p, r)), bits(x))
    nearest = x.to(BF16)
    ties = (codecs._bits(x) & 0xFFFF) == 0x8000
    assert torch.equal(bits(p)[~ties], bits(nearest)[~ties])
    assert (p.float().abs() > x.abs())[ties].all()

    param = torch.nn.Parameter(p.clone().to(target.device))
    param.grad = torch.zeros_like(param)
    optimizer = cases.make("SGD", [param], {"lr": 0.0, "master": "split16"}, backend=target.backend)
    optimizer.init_state()
    optimizer.state[param]["lower_half"].copy_(r)
    optimizer.step()
    kept = p.isfinite() & (x != 0)  # -0 becomes 0, an infinity NaN, in every format
    assert torch.equal(bits(param.detach().cpu())[kept], bits(p)[kept])
    assert torch.equal(bits(optimizer.state[param]["lower_half"].cpu())[kept], bits(r)[kept])


@pytest.mark.parametrize("master", MASTER_KEYS)
def test_a_master_holds_what_is_stored(master, target):
    """Of all kinds of values: exactly, with Kahan's compensation to an ulp of it; and NaN stays NaN."""
    optimizer, p = stored(VALUES, {"master": master}, target)
    extra = optimizer.state[p][MASTER_KEYS[master]]
    held, p = codecs.read_master(master, p.detach().cpu(), extra.cpu()), p.detach().cpu()
    assert torch.equal(held.isnan(), VALUES.isnan())
    if master == "kahan":
        plain = p.isfinite() & ~VALUES.isnan()
        assert ((held - VALUES).abs() <= VALUES.abs() * 2.0**-16 + 1e-40)[plain].all()
    else:
        same = (held == VALUES) | VALUES.isnan()
        assert same.all()


def test_split16_and_fp32_go_the_same_way(target):
    """To the bit, moments and parameters; so a checkpoint of 2 bytes less holds the same."""
    found = []
    for master in ("split16", "fp32"):
        optimizer = trained("AdamW", {"master": master, "lr": 1e-2, "weight_decay": 0.1}, target, steps=20)
        values = [
            codecs.read_master(master, p.detach(), own[MASTER_KEYS[master]]) for p, own in optimizer.state.items()
        ]
        moments = {k: v for k, v in cases.tensors_of(optimizer).items() if k.split(".")[1] not in MASTER_KEYS.values()}
        found.append(moments | {f"{i}.value": v for i, v in enumerate(values)})
    cases.assert_same_bits(*found)


MAGNITUDES = [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e25]


@pytest.mark.parametrize("name", ["AdamW", "SGDW"])
@pytest.mark.parametrize("master", MASTER_KEYS)
def test_masters_of_every_magnitude(master, name, target):
    """A float32 and a split one train to the bits of float32 parameters, a compensated one follows them."""
    starts = [p.detach() * m for p, m in zip(cases.parameters([(50, 3)] * 7, BF16), MAGNITUDES, strict=True)]
    found = []
    for dtype, options in ((BF16, {"master": master}), (F32, {})):
        params = [torch.nn.Parameter(x.to(target.device, dtype, copy=True)) for x in starts]
        groups = [{"params": [p], "lr": 1e-3 * m} for p, m in zip(params, MAGNITUDES, strict=True)]
        options |= {"weight_decay": 1e-3, "decouple_lr": True, **({"momentum": 0.9} if name == "SGDW" else {})}
        optimizer = cases.make(name, groups, options, backend=target.backend)
        for t in range(20):
            cases.set_gradients(params, t, F32)
            optimizer.step()
        found.append(optimizer)
    for m, start, (p, own), q in zip(MAGNITUDES, starts, found[0].state.items(), found[1].state, strict=True):
        value = codecs.read_master(master, p.detach(), own[MASTER_KEYS[master]])
        way = ((q.detach().cpu().double() - start.double()) / m).norm()
        assert 0.01 < way < 1
        if master == "kahan":
            assert ((value.double() - q.detach().double()) / m).norm().item() <= 0.005 * way
        else:
            assert cases.equal_bits(value, q.detach()).all()


@pytest.mark.parametrize("options", CURES[1:], ids=cases.name_of)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=cases.name_of)
def test_a_parameter_that_is_overwritten_is_what_counts(options, dtype, target):
    """Element by element, as a mask does it: exactly with a float32 master, else but for less than an ulp."""
    if dtype is F16 and options["master"] != "fp32":
        return  # refused: test_what_is_refused
    optimizer = trained("SGD", {"lr": 1e-2, **options}, target, dtype=dtype)
    p = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["lr"] = 0.0
    extra = optimizer.state[p][MASTER_KEYS[options["master"]]]
    before = codecs.read_master(options["master"], p.detach(), extra)
    with torch.no_grad():
        p[::2] *= 0.01
        p[1::4] = 0
    wanted = p.detach().float()
    go_on(optimizer, [9])
    after, info = codecs.read_master(options["master"], p.detach(), extra), torch.finfo(dtype)
    assert ((after - wanted).abs() <= wanted.abs() * info.eps + info.smallest_normal * info.eps).all()
    if options["master"] == "fp32":
        overwritten = torch.arange(len(p)) % 4 != 3
        assert torch.equal(after[overwritten], wanted[overwritten])
    assert torch.equal(after[3::4], before[3::4])  # what was not overwritten keeps its digits
    assert not torch.equal(before[3::4], wanted[3::4])
    optimizer.refresh_masters()
    assert torch.equal(codecs.read_master(options["master"], p.detach(), extra), p.float())


# ---- What is lost, and what is not.


@pytest.mark.slow
@pytest.mark.parametrize("options", CURES, ids=cases.name_of)
def test_weight_decay_in_bf16(options):
    """1000 steps at lr * wd = 1e-4 with zero gradients: torch's 1 stays 1, ours comes to 0.9048."""
    n, expected = 200_000, (1 - 1e-4) ** 1000
    p = torch.nn.Parameter(torch.ones(n if options == CURES[0] else 1000, dtype=BF16))
    q = torch.nn.Parameter(torch.ones(1000, dtype=BF16))
    p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    ours = cases.make("AdamW", [p], {"lr": 1e-3, "weight_decay": 0.1, **options})
    torchs = torch.optim.AdamW([q], lr=1e-3, weight_decay=0.1)
    for _ in range(1000):
        ours.step()
        torchs.step()
    assert (q == 1).all()
    if options == CURES[0]:
        x = p.detach().double()
        assert abs(x.mean().item() - expected) < 3 * x.std().item() / n**0.5
    else:
        assert ((p.double() - expected).abs() < 2.0**-8).all()  # an ulp


@pytest.mark.parametrize("options", [{}, *CURES], ids=cases.name_of)
def test_2000_tiny_updates(options):
    """Each of 1/10000 of the parameter: plain bfloat16 ends where it began."""
    p = torch.nn.Parameter(torch.ones(2000, dtype=BF16))
    p.grad = torch.ones_like(p)
    optimizer = cases.make("SGD", [p], {"lr": 1e-4, **options})
    for _ in range(2000):
        optimizer.step()
    if not options:
        assert (p == 1).all()
    else:
        assert p.float().mean().item() == pytest.approx(0.8, abs=0.002)


def test_second_moments_decay_where_they_are_rounded_stochastically(target):
    """beta2 = 0.999 over 500 steps without a gradient: 0.606 of what it was; rounded to nearest, all of it."""
    for rounding, expected in (("nearest", 1.0), ("stochastic", 0.999**500)):
        p = torch.nn.Parameter(torch.zeros(2000, dtype=F32, device=target.device))
        optimizer = cases.make("AdamW", [p], {"state_dtype": BF16, "rounding": rounding}, backend=target.backend)
        optimizer.init_state()
        optimizer.state[p]["exp_avg_sq"].fill_(1.0)
        p.grad = torch.zeros_like(p)
        for _ in range(500 if target == cases.CPU else 20):
            optimizer.step()
        if target != cases.CPU and rounding == "stochastic":
            expected = 0.999**20
        assert optimizer.state[p]["exp_avg_sq"].float().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("dtype", "options", "lost"),
    [
        (BF16, {}, "Parameters in bfloat16 or float16 .* rounding=.stochastic.* master=.kahan.*split16.*fp32"),
        (F16, {}, "Parameters in bfloat16 or float16"),
        (F32, {"state_dtype": BF16}, r"Second moments in torch.bfloat16 with beta2 = 0.999 never decay"),
        (F32, {"state_dtype": BF16, "betas": (0.9, 0.95)}, None),
        (F32, {"state_dtype": F16}, None),
        (F32, {"state_dtype": "int8"}, "Moments in int8 are rounded to nearest: .* rounding=.stochastic."),
        (F32, {}, None),
        (F16, {"master": "fp32"}, None),
        *((BF16, options, None) for options in ALL if "master" in options or "rounding" in options),
    ],
    ids=cases.name_of,
)
def test_what_is_lost_is_told_once(dtype, options, lost, recwarn):
    formats.warn_once.cache_clear()
    optimizer = trained("AdamW", options, cases.CPU, dtype=dtype)
    trained("AdamW", options, cases.CPU, dtype=dtype)
    assert len(recwarn) == (lost is not None)
    assert lost is None or re.search(lost, str(recwarn[0].message))
    assert optimizer.state


# ---- int8 moments.


def moments(n=5000):
    """Of several magnitudes within a block, with special values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-4, 1, generator=generator)
    x[0:128] = 0
    x[128:256] = 1e-40
    x[300], x[301], x[600] = torch.inf, torch.nan, -torch.inf
    return x


LEAST = 2.0**-32 * 1.125  # the least second moment that has a code, of its scale


@pytest.mark.parametrize("second", [False, True])
def test_codes(second):
    """Errors: half a step of the code, of a first moment relative to its block, of a second one relative to itself."""
    x = moments().abs() if second else moments()
    codes, scales = codecs.encode(x, second)
    y = codecs.decode(codes, scales, second)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 128)).view(-1, 128)
    poisoned = ~blocks.isfinite().all(1)
    assert poisoned.sum() == 2
    assert torch.equal(y.isnan(), poisoned.repeat_interleave(128)[: len(x)])
    assert (codes[256:384] == 0).all()
    assert (y[:256] == 0).all()
    most = blocks[~poisoned][2:].abs().amax(1)
    kept = scales[~poisoned][2:]
    assert ((kept >= most) & (kept <= most * (1 + 1 / 128))).all()
    assert (bits(kept) & 0xFFFF == 0).all()
    x, y, scales = x[1000:], y[1000:], scales.repeat_interleave(128)[1000:5000]
    if second:
        kept = x > scales * 2.0**-31
        assert ((y - x).abs() <= x / 16 * (1 + 1e-6))[kept].all()
        assert (y > 0).all()
        assert (codecs.decode(*codecs.encode(torch.tensor([0.0, 1.0]), True), True) == torch.tensor([LEAST, 1.0])).all()
    else:
        root = (x.abs() / scales).sqrt()
        assert ((y - x).abs() <= scales * (2 * root + 0.5 / 127) * 0.501 / 127).all()
        assert torch.equal(y.sign()[y != 0], x.sign()[y != 0])


@pytest.mark.parametrize("exponent", [125, 126, 127])
def test_the_largest_number_is_kept(exponent, target):
    """A first moment of nearly 2^126 is read again; one of 2^126 or more is NaN."""
    (p,) = cases.parameters([LONG], F32, target.device)
    options = {"lr": 0.0, "momentum": 0.5, "dampening": 0.5, "state_dtype": "int8"}
    optimizer = cases.make("SGD", [p], options, backend=target.backend)
    p.grad = torch.full_like(p, 2.0**exponent * (1.99 if exponent == 125 else 1))
    optimizer.step()
    optimizer.step()
    codes, scales = (optimizer.state[p][f"momentum_buffer_{part}"] for part in ("codes", "scales"))
    expected = p.grad if exponent == 125 else p.grad * torch.nan
    torch.testing.assert_close(codecs.decode(codes, scales, False), expected, rtol=1 / 64, atol=0, equal_nan=True)


def test_codes_of_second_moments_have_the_right_mean():
    """Under stochastic rounding, within four standard errors, also of the decay that rounding to nearest loses."""
    x = torch.full((128 * 2000,), 0.7)
    x[::128] = 1.0  # the scale of each block
    random = codecs.for_moment(codecs.words(1, 1, 0, NOT_SHARDED, len(x), torch.device("cpu")), second=True)
    y = codecs.decode(*codecs.encode(x, True, random), True)
    y = y.view(-1, 128)[:, 1:].double()
    assert abs(y.mean().item() - 0.7) < 4 * y.std().item() / y.numel() ** 0.5
    assert y.unique().numel() == 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spread", [1, 30, 60])
def test_codes_of_every_magnitude_are_those_of_every_instruction_set(spread, rounding):
    """Blocks of one magnitude, of many, with zeros, infinities and NaN, of nothing but subnormals, and a rest."""
    generator = torch.Generator().manual_seed(spread)
    n, C = 128 * 400 + 37, backends.native()
    block = torch.randint(-22, 22, (n // 128 + 1,), generator=generator).repeat_interleave(128)[:n]
    digits = torch.randn(n, generator=generator, dtype=torch.float64)
    g = (digits * 10.0 ** (block - spread * torch.rand(n, generator=generator, dtype=torch.float64))).float()
    g[::7], g[1000:1256], g[2560:2688], g[3000:3100], g[4000] = 0, 1e-23, 0, torch.inf, torch.nan
    kept = []
    try:
        for isa in C.cpu_isas():
            C.use_cpu_isa(isa)
            p = torch.nn.Parameter(torch.zeros(n, 1))
            p.grad = g[:, None].clone()
            optimizer = cases.make("AdamW", [p], {"betas": (0.0, 0.0), "state_dtype": "int8", "rounding": rounding})
            optimizer.step()
            kept.append(cases.tensors_of(optimizer))
    finally:
        C.use_cpu_isa(C.cpu_isas()[-1])
    for other in kept[1:]:
        cases.assert_same_bits(kept[0], other)


@pytest.mark.pairwise("cuda", options=[o for o in MOMENTS if "int8" in o.values()], name=["AdamW", "SGD"])
def test_int8_moments_follow_float32_ones(options, name, target):
    """Over 20 steps, to a few percent of the way; small tensors are float32, and stay so."""
    options = {"lr": 1e-3, **options, **({"momentum": 0.9} if name == "SGD" else {})}
    shapes = [LONG, (64, 128), (7, 9)]
    ours = trained(name, options, target, 20, shapes, F32)
    exact = trained(name, {k: v for k, v in options.items() if k != "state_dtype"}, target, 20, shapes, F32)
    for i, (p, q, start) in enumerate(zip(ours.state, exact.state, cases.parameters(shapes), strict=True)):
        way = (q.cpu() - start).norm()
        assert (p - q).norm().item() <= (0.05 * way.item() if i < 2 else 1e-6 * way.item())
        own = ours.state[p]
        names = {"AdamW": ["exp_avg", "exp_avg_sq"], "SGD": ["momentum_buffer"]}[name]
        assert own.keys() == {"step", *(f"{n}_{part}" for n in names for part in ("codes", "scales"))} or i == 2
        for n in names if i < 2 else ():
            assert own[f"{n}_codes"].dtype is (torch.uint8 if n == "exp_avg_sq" else torch.int8)
            assert own[f"{n}_codes"].shape == p.shape
            assert own[f"{n}_scales"].numel() == -(-p.numel() // 128)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_each_step_of_int8_moments_is_within_the_bounds_of_their_codes(name, target):
    """Rounded to nearest: from what was stored before to what is stored after, as docs/formats.md says."""
    options = {"state_dtype": "int8", **({"momentum": 0.9} if name == "SGD" else {})}
    p = cases.parameters([LONG], F32, target.device)[0]
    optimizer = cases.make(name, [p], options, backend=target.backend)
    keys = ["momentum_buffer"] if name == "SGD" else ["exp_avg", "exp_avg_sq"]
    before = dict.fromkeys(keys, torch.zeros(LONG))
    for t in range(30):
        go_on(optimizer, [t])
        g = p.grad.cpu()
        exact = {
            "momentum_buffer": 0.9 * before[keys[0]] + g,
            "exp_avg": 0.9 * before[keys[0]] + 0.1 * g,
            "exp_avg_sq": 0.999 * before[keys[-1]] + 0.001 * g * g,
        }
        for key in keys:
            codes, scales = (optimizer.state[p][f"{key}_{part}"].cpu() for part in ("codes", "scales"))
            before[key], scales = (
                codecs.decode(codes, scales, key == "exp_avg_sq"),
                scales.repeat_interleave(128)[: LONG[0], None],
            )
            error = (before[key] - exact[key]).abs()
            if key == "exp_avg_sq":
                assert (error <= exact[key] / 16 * (1 + 1e-5) + scales * 2.0**-31.5).all()
            else:
                assert (error <= scales * 0.008).all()
                small = exact[key].abs() < scales * 15e-6
                assert (before[key][small] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_moments_without_a_gradient_come_to_zero(name):
    """Beside others of their block that have one: else, as second moments decay, the parameters would run away."""
    moves = []
    for options in ({}, {"state_dtype": "int8", "rounding": "stochastic"}):
        options = {"lr": 1e-3, **({"weight_decay": 0.0} if name == "AdamW" else {"momentum": 0.9}), **options}
        p = torch.nn.Parameter(torch.zeros(8192))
        optimizer = cases.make(name, [p], options)
        generator = torch.Generator().manual_seed(0)
        for t in range(8000):
            p.grad = torch.randn(8192, generator=generator)
            if t >= 100:
                p.grad[::2] = 0
            if t == 200:
                start = p.detach().clone()
            optimizer.step()
        moves.append((p.detach() - start)[::2].abs().max().item())
    assert moves[1] <= 2 * moves[0] + 1e-3


def test_codes_of_first_moments_have_the_right_mean():
    """In value, not in its root, under stochastic rounding."""
    for value in (0.7, 0.01, 1e-5):
        x = torch.full((128 * 2000,), value)
        x[::128] = 1.0  # the scale of each block
        random = codecs.for_moment(codecs.words(1, 1, 0, NOT_SHARDED, len(x), torch.device("cpu")), second=False)
        y = codecs.decode(*codecs.encode(x, False, random), False).view(-1, 128)[:, 1:].double()
        assert abs(y.mean().item() - value) < 4 * y.std().item() / y.numel() ** 0.5
        assert y.unique().numel() == 2


def test_a_nan_stays_in_its_block(target):
    """It spreads over the elements that it shares a scale with, and no further."""
    found = []
    for poison in (0.0, torch.nan):
        p = cases.parameters([LONG], F32, target.device)[0]
        optimizer = cases.make("AdamW", [p], {"state_dtype": "int8"}, backend=target.backend)
        for t in range(3):
            cases.set_gradients([p], t)
            p.grad[700] = poison
            optimizer.step()
        found.append(p.detach())
    clean, poisoned = found
    assert poisoned.isnan().flatten().nonzero().flatten().tolist() == list(range(640, 768))
    poisoned[640:768] = clean[640:768]
    assert torch.equal(clean, poisoned)


# ---- The same bits: threads, instruction sets, devices.


@pytest.mark.parametrize("options", [*ALL, {"rounding": "stochastic", "state_dtype": F16}], ids=cases.name_of)
@pytest.mark.parametrize(("name", "more"), [("AdamW", {}), ("AdamW", {"amsgrad": True}), ("SGDW", {"momentum": 0.9})])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=cases.name_of)
def test_same_bits_for_every_instruction_set_and_number_of_threads(options, name, more, dtype):
    if options.get("state_dtype") == "int8" and "amsgrad" in more:
        return  # refused: test_what_is_refused
    C, threads = backends.native(), torch.get_num_threads()
    shapes = [(40_000, 1), (127,), (128,), (129,), (64, 65), (0,), ()]
    found = []
    try:
        for isa, n in [("generic", 1), *((isa, n) for isa in C.cpu_isas() for n in (1, 2))]:
            C.use_cpu_isa(isa)
            torch.set_num_threads(n)
            found.append(cases.tensors_of(trained(name, {**options, **more}, cases.CPU, 3, shapes, dtype)))
    finally:
        C.use_cpu_isa(C.cpu_isas()[-1])
        torch.set_num_threads(threads)
    for other in found[1:]:
        cases.assert_same_bits(found[0], other)


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
def test_same_bits_for_any_split_into_shards(options, target, monkeypatch):
    """Rows of a matrix, at offsets that are multiples of nothing but a block's where there are blocks."""
    step = 128 if "int8" in options.values() else 1
    whole = cases.parameters([(77, step)], BF16, target.device)[0]
    monkeypatch.setattr(formats, "SMALL", 1)
    cuts = [(0, 13), (13, 14), (14, 54), (54, 77)]
    shards = [torch.nn.Parameter(whole.detach()[a:b].clone()) for a, b in cuts]
    places = {p: (a * step, 1 << 62, 0) for p, (a, _) in zip(shards, cuts, strict=True)} | {whole: NOT_SHARDED}
    monkeypatch.setattr(plan, "shard_numbering", places.get)
    optimizers = [cases.make("AdamW", [p], {"lr": 1e-2, **options}, backend=target.backend) for p in [*shards, whole]]
    for t in range(3):
        cases.set_gradients([whole], t)
        for p, (a, b) in zip(shards, cuts, strict=True):
            p.grad = whole.grad[a:b].clone()
        for optimizer in optimizers:
            optimizer.step()
    *parts, expected = map(cases.tensors_of, optimizers)
    for key, x in expected.items():
        if key != "0.step":
            assert cases.equal_bits(torch.cat([part[key] for part in parts]), x).all(), key


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=cases.name_of)
def test_the_reference_follows(options, dtype):
    """Its fma may round twice: nearly all bits are the same, and the random ones are."""
    shapes = [LONG, (64, 65), (7, 9), ()]
    ours, reference = (
        cases.tensors_of(trained("AdamW", options, target, 1, shapes, dtype))
        for target in (cases.CPU, cases.Target("cpu", "reference"))
    )
    assert ours.keys() == reference.keys()
    for key, x in ours.items():
        assert (x != reference[key]).float().mean() < 0.05, key


@pytest.mark.gpu
@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
@pytest.mark.parametrize(("name", "more"), [("AdamW", {}), ("SGDW", {"momentum": 0.9})])
def test_same_bits_as_the_cpu(options, name, more, backend):
    shapes = [LONG, (64, 65), (7, 9), (), (0,)]
    ours = trained(name, {**options, **more}, cases.Target("cuda", backend), 3, shapes)
    cases.assert_same_bits(
        cases.tensors_of(ours), cases.tensors_of(trained(name, {**options, **more}, cases.CPU, 3, shapes))
    )


# ---- State.


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
def test_step_parameter_has_the_bits_of_step(options, target):
    """Random bits too, which are those of the parameter's place among all."""
    whole = trained("AdamW", options, target)
    params = cases.parameters((LONG, (7, 9), ()), BF16, target.device)
    alone = cases.make("AdamW", params, options, backend=target.backend)
    for t in range(3):
        cases.set_gradients(params, t)
        for p in reversed(params):
            alone.step_parameter(p)
    ours, theirs = (dict(sorted(cases.tensors_of(o).items())) for o in (alone, whole))
    cases.assert_same_bits(ours, theirs)


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
def test_resume_is_exact(options, target):
    """What a run of 6 steps gives, with the seed of the checkpoint and none but its state."""
    check_resume(options, "file", target)


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
@pytest.mark.parametrize("way", ["deepcopy", "state_dict", "dcp"])
def test_resume_is_exact_by_other_ways(options, way):
    check_resume(options, way, cases.CPU)


def check_resume(options, way, target):
    options = {**options, **({"seed": 5} if options.keys() & {"rounding", "ema_dtype"} else {})}
    whole = trained("AdamW", options, target, 6)
    half = trained("AdamW", options, target, 3)
    params = [torch.nn.Parameter(p.detach().clone()) for p in half.state]
    if way == "deepcopy":
        half = copy.deepcopy(half)
    else:
        saved = get_optimizer_state_dict(module(half), half) if way == "dcp" else half.state_dict()
        if way == "file":
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        half = cases.make("AdamW", params, {k: v for k, v in options.items() if k != "seed"}, backend=target.backend)
        if way == "dcp":
            half.init_state()
            set_optimizer_state_dict(module(half), half, copy.deepcopy(saved))
        else:
            half.load_state_dict(saved)
    go_on(half, range(3, 6))
    cases.assert_same_bits(cases.tensors_of(half), cases.tensors_of(whole))


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
def test_torchs_state_loads_and_ours_is_exported(options, target):
    """Both ways, within what the format holds; and what is exported is torch's in its keys."""
    theirs = torch.optim.AdamW(cases.parameters([LONG, (7, 9)], F32, target.device), lr=1e-2)
    go_on(theirs, range(3))
    params = [torch.nn.Parameter(p.detach().to(BF16)) for p in theirs.param_groups[0]["params"]]
    ours = cases.make("AdamW", params, options, backend=target.backend)
    ours.load_state_dict(theirs.state_dict())
    exported = copy.deepcopy(ours.export())
    assert exported["param_groups"][0].keys() <= theirs.state_dict()["param_groups"][0].keys()
    for key, own in theirs.state_dict()["state"].items():
        assert exported["state"][key].keys() == own.keys()
        for name, x in own.items():
            error = (exported["state"][key][name].float() - x).norm() / x.norm()
            assert error < 0.04, name
    go_on(ours, range(3, 5))
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    back = torch.optim.AdamW(fresh, lr=1e-2)
    back.load_state_dict(ours.export())
    go_on(back, range(5, 7))
    assert all(p.isfinite().all() for p in fresh)
    assert back.state[fresh[0]]["step"].item() == 7


@pytest.mark.parametrize(("first", "then"), list(itertools.permutations([{}, *ALL], 2)))
def test_every_format_loads_every_other(first, then):
    """The moments go on, the step counts on, and no name of the other's is left."""
    a = trained("AdamW", first, cases.CPU)
    b = cases.make("AdamW", [torch.nn.Parameter(p.detach().clone()) for p in a.state], then)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    go_on(b, [3])
    fresh = trained("AdamW", then, cases.CPU)
    for (p, own), (_, expected) in zip(b.state.items(), fresh.state.items(), strict=True):
        assert own["step"].item() == 4
        assert own.keys() == expected.keys()
        assert {k: v.dtype for k, v in own.items()} == {k: v.dtype for k, v in expected.items()}
        assert p.isfinite().all()


@pytest.mark.parametrize("options", ALL, ids=cases.name_of)
def test_any_layout(options, target):
    """Strided parameters are stepped as dense ones that lie in memory as they do."""
    base = cases.parameters([(65, 128)], BF16, target.device)[0].detach()
    strided = torch.nn.Parameter(torch.stack([base, base], 2)[..., 0])
    turned, dense = torch.nn.Parameter(base.clone().t()), torch.nn.Parameter(base.clone())
    ours = trained("AdamW", options, target, 0, params=[strided, turned, dense])
    for t in range(3):
        cases.set_gradients([dense], t)
        strided.grad, turned.grad = dense.grad.clone(), dense.grad.t().contiguous()
        ours.step()
    if "rounding" not in options:  # else the index of the parameter matters
        assert cases.equal_bits(strided, dense).all()
        assert cases.equal_bits(turned.t(), dense).all()
    assert not torch.equal(dense, base)


# ---- What is refused.


def test_options_set_by_hand_are_checked():
    """At the next step, before anything is written, and with the group."""
    for option, text in (
        ({"rounding": "Stochastic"}, "rounding='Stochastic': must be one of 'nearest', 'stochastic' .group 0."),
        ({"master": "bogus"}, "master='bogus': must be None or one of"),
        ({"seed": -1}, "seed=-1: must be a whole number"),
        ({"state_dtype": "int4"}, "state_dtype='int4': must be one of"),
        ({"amsgrad": True}, "amsgrad=True is not supported"),
    ):
        optimizer = trained("AdamW", {"state_dtype": "int8", "rounding": "stochastic"}, cases.CPU)
        before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
        optimizer.param_groups[0] |= option
        with pytest.raises(ValueError, match=text):
            go_on(optimizer, [3])
        cases.assert_same_bits(cases.tensors_of(optimizer), before)


def test_a_checkpoint_that_cannot_be_kept_is_refused_and_changes_nothing():
    """Of amsgrad, of codes without their scales, of another model; and formats that are for other parameters."""
    optimizer = trained("AdamW", {"state_dtype": "int8"}, cases.CPU)
    good, amsgrad = optimizer.state_dict(), trained("AdamW", {"amsgrad": True}, cases.CPU).state_dict()
    bad = [(amsgrad, "state_dtype='int8' with amsgrad=True is not supported")]
    for scales in (None, good["state"][0]["exp_avg_scales"][:1], good["state"][0]["exp_avg_scales"].bfloat16()):
        broken = copy.deepcopy(good)
        broken["state"][0]["exp_avg_scales"] = scales
        bad.append(
            (broken, r"parameter 0 \(shape \[5003, 1\]\): its state 'exp_avg_scales' .* 'exp_avg_codes', .* \[40\]")
        )
    before = {key: t.clone() for key, t in cases.tensors_of(optimizer).items()}
    lr = optimizer.param_groups[0]["lr"]
    for saved, text in bad:
        saved["param_groups"][0]["lr"] = 7.0
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == lr
        cases.assert_same_bits(cases.tensors_of(optimizer), before)
    half = cases.make("AdamW", cases.parameters([(3,)], F16), {"rounding": "stochastic"})
    with pytest.raises(TypeError, match=r"loading group 0, parameter 0 \(shape \[3\]\): rounding=.stochastic"):
        half.load_state_dict(trained("AdamW", {}, cases.CPU, shapes=[(3,)]).state_dict())


def test_scales_that_do_not_go_with_their_codes_are_refused():
    """They would be read beyond their end."""
    optimizer = trained("AdamW", {"state_dtype": "int8"}, cases.CPU)
    p = optimizer.param_groups[0]["params"][0]
    for scales in (torch.ones(1), torch.ones(80)[::2], torch.ones(40, dtype=BF16)):
        optimizer.state[p]["exp_avg_sq_scales"] = scales
        with pytest.raises(
            ValueError, match=r"parameter 0 .*: its state 'exp_avg_sq_scales' .* del optimizer.state.p."
        ):
            go_on(optimizer, [3])


def test_layouts_do_not_mistake_each_others_scales():
    """Codes of channels_last load into a contiguous parameter, unless their layout was lost on the way."""
    shape = (8, 64, 3, 3)
    p = cases.parameters([shape])[0]
    turned = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    a, b = trained("AdamW", {"state_dtype": "int8"}, cases.CPU, params=[turned]), None
    exact = a.export()["state"][0]["exp_avg"]
    b = cases.make("AdamW", [p], {"state_dtype": "int8"})
    b.load_state_dict(a.state_dict())
    assert (b.export()["state"][0]["exp_avg"] - exact).norm() < 0.04 * exact.norm()
    lost = copy.deepcopy(a.state_dict())
    lost["state"][0] = {key: t.contiguous() for key, t in lost["state"][0].items()}
    with pytest.raises(ValueError, match="'exp_avg_scales' does not go with 'exp_avg_codes'"):
        b.load_state_dict(lost)


def test_a_groups_own_choice_outlives_loading_and_copying():
    """Also where it is the default of the class, and the optimizer's is another."""
    defaults = {"master": "split16", "state_dtype": "int8", "rounding": "stochastic"}
    plain = {"master": None, "state_dtype": None, "rounding": "nearest"}
    p, q = cases.parameters([LONG] * 2, BF16)
    optimizer = cases.make("AdamW", [{"params": [p]}, {"params": [q], **plain}], defaults)
    go_on(optimizer, range(2))
    keys = optimizer.state[q].keys()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = copy.deepcopy(optimizer)
    go_on(optimizer, range(2, 4))
    assert [own.keys() == keys for own in optimizer.state.values()] == [False, True]


def test_a_seed_is_saved_however_the_rounding_was_chosen():
    optimizer = cases.make("AdamW", cases.parameters([(9,)], BF16), {})
    optimizer.param_groups[0]["rounding"] = "stochastic"
    go_on(optimizer, range(2))
    assert optimizer.state_dict()["param_groups"][0]["seed"] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounding": "up"}, "rounding='up': must be one of 'nearest', 'stochastic'"),
        ({"master": "bf16"}, "master='bf16': must be None or one of 'kahan', 'split16', 'fp32'"),
        ({"seed": -1}, "seed=-1: must be a whole number from 0 to 2**63 - 1"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"state_dtype": "int4"}, "state_dtype='int4': must be one of torch.float32"),
        ({"state_dtype": "int8", "amsgrad": True}, "state_dtype='int8' with amsgrad=True is not supported"),
    ],
    ids=cases.name_of,
)
def test_what_there_is_not(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        cases.make("AdamW", cases.parameters([(3,)]), options)


@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        (F16, {"rounding": "stochastic"}, 'rounding="stochastic" rounds to bfloat16.* master="fp32"'),
        (F16, {"master": "split16"}, 'master="split16" is for bfloat16 parameters, .* float16: use master="fp32"'),
        (F16, {"master": "kahan"}, 'master="kahan" is for bfloat16 parameters, .* float16: use master="fp32"'),
        (torch.float64, {"state_dtype": "int8"}, "torch.float64 with int8 moments is not supported"),
        (torch.complex64, {"state_dtype": torch.int8}, "torch.complex64 with int8 moments is not supported"),
    ],
    ids=cases.name_of,
)
def test_what_is_refused(dtype, options, text):
    p = torch.nn.Parameter(torch.ones(LONG, dtype=dtype))
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=rf"AdamW: group 0, parameter 0 \(shape \[5003, 1\]\): {text}"):
        cases.make("AdamW", [p], options).step()
    assert (p == 1).all()
