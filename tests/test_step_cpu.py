"""The native step: its bits, and that neither threads nor instruction sets nor cuts change them."""

import functools
import itertools
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_adamw import backends, scalars
from fused_adamw.contract import FAMILIES
from tests import cases, exact

ROOT = Path(__file__).parents[1]
C = backends.native()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=C.cpu_isas())
def isa(request):
    """Each instruction set that this machine runs."""
    C.use_cpu_isa(request.param)
    yield request.param
    C.use_cpu_isa(C.cpu_isas()[-1])


@pytest.fixture
def one_and_two_threads():
    before = torch.get_num_threads()
    yield 1, 2
    torch.set_num_threads(before)


def stepped(name, options, shapes=cases.SHAPES, steps=3, dtype=torch.float32, grad_dtype=None, **ours):
    params = cases.parameters(shapes, dtype)
    optimizer = cases.make(name, params, options, **ours)
    for t in range(steps):
        cases.set_gradients(params, t, grad_dtype)
        optimizer.step()
    return cases.tensors_of(optimizer)


# ---- bits


def fractions(x: torch.Tensor) -> list[Fraction]:
    return [Fraction(v) for v in x.double().tolist()]


@pytest.mark.parametrize(("name", "options"), cases.SHARED + cases.OURS, ids=cases.name_of)
def test_bits_are_the_documented_sequence(name, options, isa):
    """Every operation and every rounding, redone with rational numbers; 77 elements, so vectors and tail."""
    (p,) = params = cases.parameters([(77,)])
    optimizer = cases.make(name, params, options, backend="cpu")
    group = optimizer.param_groups[0]
    rule, names = optimizer.rule_of(group)
    for t in range(1, 4):
        cases.set_gradients(params, t)
        streams = [p.detach(), p.grad, *(optimizer.state[p].get(k, torch.zeros(77)) for k in names)]
        before = list(zip(*map(fractions, streams), strict=True))
        optimizer.step()
        row = scalars.ROWS[optimizer.family](group, t)._asdict()
        s = {k: Fraction(float(np.float32(v))) for k, v in row.items()}
        function = {"adabound": exact.adabound, "sgd": exact.sgd}.get(FAMILIES[rule])
        function = exact.adam_no_first_moment if rule == "adam_no_first_moment" else function
        function = function or functools.partial(exact.adam, rule=rule)
        after = list(zip(*map(fractions, [p.detach(), *(optimizer.state[p][k] for k in names)]), strict=True))
        assert after == [function(s, *element) for element in before]


@pytest.mark.parametrize(("name", "options"), cases.SHARED + cases.OURS, ids=cases.name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name_of)
def test_same_bits_for_every_instruction_set(name, options, dtype, isa):
    ours = stepped(name, options, dtype=dtype)
    C.use_cpu_isa("generic")
    cases.assert_same_bits(ours, stepped(name, options, dtype=dtype))


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name_of)
@pytest.mark.parametrize(("name", "options"), [cases.SHARED[2], cases.SHARED[-2]], ids=cases.name_of)
def test_same_bits_for_every_number_of_threads(name, options, dtype, max_grad_norm, one_and_two_threads):
    results = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        shapes = [(100_003,), (5,), (64,), (70_001,)]
        results.append(stepped(name, options, shapes, dtype=dtype, max_grad_norm=max_grad_norm))
    cases.assert_same_bits(*results)


def test_every_thread_flushes_as_the_caller_does(isa, one_and_two_threads):
    """torch.set_flush_denormal sets the thread that calls it alone."""

    def flushed(flush):
        p = torch.nn.Parameter(torch.full((100_003,), 2e-39))
        p.grad = torch.full_like(p, 1e-39)
        optimizer = cases.make("AdamW", [p], {"lr": 1e-39}, max_grad_norm=1.0)
        optimizer.init_state()
        try:
            torch.set_flush_denormal(flush)
            optimizer.step()
        finally:
            torch.set_flush_denormal(False)
        return cases.tensors_of(optimizer) | {"norm": optimizer.grad_norm}

    results = {}
    for flush, threads in itertools.product((False, True), one_and_two_threads):
        torch.set_num_threads(threads)
        found = flushed(flush)
        cases.assert_same_bits(results.setdefault(flush, found), found)
    for name in ("0.p", "0.exp_avg", "norm"):
        assert results[False][name].count_nonzero() and not results[True][name].count_nonzero(), name


FORKED = """
import itertools, os, signal, sys, torch, fused_adamw

def parameters(count, size):
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params

torch.set_num_threads(2)
stepped = sys.argv[1] == "stepped"
lists = [(12, 4), (1200, 4), (100, 1000)] + [(1, 2_000_000)] * stepped  # else torch would hang, making the state
for (count, size), norm in itertools.product(lists, (None, 1e9)):
    params = parameters(count, size)
    optimizer = fused_adamw.AdamW(params, lr=0.5, max_grad_norm=norm)
    if stepped:
        optimizer.step()
    assert ("fused_adamw._C" in sys.modules) == stepped
    torch.ones(1_000_000).mul_(2)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, f"{count} tensors of {size}, max_grad_norm={norm}: exit code {code}"
    else:
        signal.alarm(60)
        before = [p[-1].item() for p in params]
        optimizer.step()
        os._exit(not all(p[-1] < b for p, b in zip(params, before)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("parent", ["stepped", "imported"])
def test_a_forked_process_steps(parent):
    """The threads of its parent are gone, and OpenMP would wait for them for ever; the alarm ends a child that does."""
    done = subprocess.run([sys.executable, "-c", FORKED, parent], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("cuts", [[1], [63, 64, 65], [1000, 30_000], list(range(0, 100_000, 9_973))])
@pytest.mark.parametrize("dtype", DTYPES, ids=cases.name_of)
def test_same_bits_for_every_split(cuts, dtype):
    """A tensor in pieces, each a parameter of its own, is stepped to the bits of the whole."""
    n = 100_003
    (whole,) = cases.parameters([(n,)], dtype)
    bounds = [0, *cuts, n]
    pieces = [torch.nn.Parameter(whole.detach()[a:b].clone()) for a, b in itertools.pairwise(bounds)]
    a, b = (cases.make("AdamW", ps, {"amsgrad": True}) for ps in ([whole], pieces))
    for t in range(3):
        cases.set_gradients([whole], t)
        for piece, g in zip(pieces, whole.grad.split([len(x) for x in pieces]), strict=True):
            piece.grad = g
        a.step()
        b.step()
    joined = {"p": torch.cat([x.detach() for x in pieces])}
    joined |= {k: torch.cat([b.state[x][k] for x in pieces]) for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    cases.assert_same_bits({"p": whole.detach(), **{k: a.state[whole][k] for k in joined if k != "p"}}, joined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=cases.name_of)
def test_a_split_moves_the_norm_by_its_last_bits(dtype):
    """Sums are rounded in an order that follows the tensors. float32 parameters take the factor as a float32."""
    n = 100_003
    (whole,) = cases.parameters([(n,)], dtype)
    pieces = [torch.nn.Parameter(x.clone()) for x in whole.detach().split(9_973)]
    a, b = (cases.make("AdamW", ps, {}, max_grad_norm=0.5) for ps in ([whole], pieces))
    for t in range(3):
        cases.set_gradients([whole], t)
        for piece, g in zip(pieces, whole.grad.split(9_973), strict=True):
            piece.grad = g
        a.step()
        b.step()
        cases.assert_same_bits({"norm": a.grad_norm}, {"norm": b.grad_norm})
    joined = torch.cat([x.detach() for x in pieces])
    if dtype == torch.float32:
        cases.assert_same_bits({"p": whole.detach()}, {"p": joined})
    else:
        torch.testing.assert_close(whole.detach(), joined, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name_of)
def test_the_sum_of_squares_is_that_of_the_same_float32_values(dtype):
    """To the bit: the order of the additions does not depend on the dtype."""
    generator = torch.Generator().manual_seed(0)
    sums: list[list[float]] = [[], []]
    for n in range(9_000, 9_032):
        values = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-14, 13, (n,), generator=generator)
        for k, x in enumerate([values.to(dtype), values.to(dtype).float()]):
            p = torch.nn.Parameter(torch.zeros_like(x))
            p.grad = x
            optimizer = cases.make("AdamW", [p], {}, max_grad_norm=1.0)
            optimizer.step()
            total = torch.zeros(1, dtype=torch.float64)
            optimizer._plans[0].launch.sum_squares(optimizer, total)
            sums[k].append(total.item())
    assert sums[0] == sums[1]


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *((dtype, {}) for dtype in DTYPES),
        (BF16, {"state_dtype": BF16}),
        (BF16, {"state_dtype": BF16, "rounding": "stochastic"}),
        (BF16, {"state_dtype": "int8", "rounding": "stochastic"}),
        *((BF16, {"master": master}) for master in ("kahan", "split16", "fp32")),
    ],
    ids=cases.name_of,
)
@pytest.mark.parametrize(("name", "more"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_same_bits_at_every_address(name, more, dtype, options, isa):
    """Each tensor begins at another of its elements, and nothing beside it is written."""
    n, room = 1001, 8

    def shifted(t, offset):
        buffer = torch.full((t.numel() + room,), 42, dtype=t.dtype)
        buffers.append((buffer, offset, t.numel()))
        buffer[offset : offset + t.numel()] = t.detach()
        return buffer[offset : offset + t.numel()]

    results = []
    for first in range(4):
        buffers = []
        p = torch.nn.Parameter(shifted(torch.linspace(-1, 1, n).to(dtype), first))
        optimizer = cases.make(name, [p], {"lr": 1e-2, **more, **options}, backend="cpu")
        cases.set_gradients([p], 0)
        optimizer.init_state()
        state = optimizer.state[p]
        state.update({k: shifted(t, (first * i) % 4) for i, (k, t) in enumerate(state.items(), 2) if k != "step"})
        for t in range(2):
            cases.set_gradients([p], t)
            p.grad = shifted(p.grad, first // 2)
            optimizer.step()
        results.append(cases.tensors_of(optimizer))
        cases.assert_same_bits(results[0], results[-1])
        for buffer, offset, numel in buffers:
            assert (buffer[:offset] == 42).all() and (buffer[offset + numel :] == 42).all()


# ---- formats

PATTERNS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name_of)
def test_every_narrow_value_is_read_exactly(dtype, isa):
    p = torch.nn.Parameter(torch.zeros(65536))
    cases.set_gradient(p, PATTERNS.view(dtype))
    cases.make("SGD", [p], {"lr": 1.0, "maximize": True}).step()
    torch.testing.assert_close(p.detach(), PATTERNS.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=cases.name_of)
def test_every_value_is_stored_with_one_rounding(dtype, isa):
    """All neighbours of all narrow values and of the midpoints between them, infinities and NaNs among them."""
    wide = PATTERNS.view(dtype).float()
    bits = torch.cat(
        [wide.view(torch.int32), (wide.double() * (1 + torch.finfo(dtype).eps / 2)).float().view(torch.int32)]
    )
    values = torch.cat(
        [(bits + i).view(torch.float32) for i in range(-2, 3)] + [torch.tensor([3e38, -3e38, 1e-45, 0.0])]
    )
    p = torch.nn.Parameter(torch.zeros(len(values), dtype=dtype))
    cases.set_gradient(p, values)
    cases.make("SGD", [p], {"lr": 1.0, "maximize": True}).step()
    torch.testing.assert_close(p.detach(), values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"amsgrad": True}),
        ("AdamW", {"cautious": "decay"}),
        ("AdamW", {"cautious": "update"}),
        ("AdaBoundW", {}),
        ("AdaBound", {"amsbound": True}),
        ("AdamW", {"first_moment": False, "betas": (0.0, 0.9)}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_every_nan_is_stored_as_the_same_pattern(name, options, isa):
    """Whatever its sign and payload, and wherever it came from; and its neighbours are what they are without it."""
    nans = PATTERNS.view(torch.bfloat16)[PATTERNS.view(torch.bfloat16).isnan()]
    n = 8 * len(nans) + 1
    for where in ("p", "g", "state"):
        stepped = []
        for poison in (False, True):
            p = cases.parameters([(n,)], torch.bfloat16)
            cases.set_gradients(p, 0)
            optimizer = cases.make(name, p, {"lr": 0.1, **options}, state_dtype=torch.bfloat16)
            optimizer.step()
            states = [t for key, t in optimizer.state[p[0]].items() if key != "step"]
            for t in {"p": [p[0].detach()], "g": [p[0].grad], "state": states}[where] if poison else []:
                t[:-1:8] = nans
            optimizer.step()
            stepped.append([p[0].detach(), *states])
        for clean, poisoned in zip(*stepped, strict=True):
            found = poisoned.view(torch.int16)
            assert (found[poisoned.isnan()] == 0x7FC0).all()
            touched = torch.zeros(n, dtype=torch.bool)
            touched[:-1:8] = True
            assert torch.equal(found[~touched], clean.view(torch.int16)[~touched])
        assert stepped[1][0].isnan().sum() == len(nans)


@pytest.mark.parametrize("flush", [False, True])
def test_half_subnormals_survive_flushing(flush):
    """A caller's set_flush_denormal must not turn float16 subnormals, which float32 holds as normals, into 0."""
    try:
        torch.set_flush_denormal(flush)
        p = torch.nn.Parameter(torch.zeros(1023))
        cases.set_gradient(p, PATTERNS[1:1024].view(torch.float16))
        cases.make("SGD", [p], {"lr": 1.0, "maximize": True}).step()
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(p.detach(), PATTERNS[1:1024].view(torch.float16).float(), rtol=0, atol=0)
