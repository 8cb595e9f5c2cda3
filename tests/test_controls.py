"""Negative controls: the suite's own checks, run on code broken on purpose, have to fail."""

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fused_adamw import backends, codecs, plan, reference, scalars, state
from tests import cases, exact, test_averages, test_error, test_formats, test_launch, test_plan, test_reference

CSRC = Path(__file__).parent.parent / "csrc"


def fails(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


# ---- wrong numbers, wrong memory: found by the checks on the optimizer


def mutate_row(monkeypatch, **changes):
    """Rows of scalars with these fields computed from the true row."""
    watch = backends.native().Watch
    true = watch.scalar_rows

    def wrong(self, groups):
        rows = [scalars.Adam(*row) for row in true(self, groups)]
        return [row._replace(**{name: change(row) for name, change in changes.items()}) for row in rows]

    monkeypatch.setattr(watch, "scalar_rows", wrong)


MUTANTS = {
    "beta2 truncated to bf16": {"w2": lambda row: 1 - float(torch.tensor(1 - row.w2).bfloat16())},
    "eps left out": {"eps": lambda row: 0.0},
    "decay and l2 swapped": {"decay": lambda row: row.l2, "l2": lambda row: row.decay},
    "decay left out": {"decay": lambda row: 0.0},
    "bias correction in float32": {"step_size": lambda row: row.step_size * (1 + 1.7e-4)},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_scalars_are_seen(mutant, monkeypatch):
    """Of every launch, the oracle's included, so torch in float64 is the judge."""
    name, options = "AdamW", {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.3}
    test_reference.test_float64_equals_torch(name, options, cases.CPU)
    mutate_row(monkeypatch, **MUTANTS[mutant])
    fails(test_reference.test_float64_equals_torch, name, options, cases.CPU)


def test_the_tolerance_sees_a_factor_rounded_to_float32(monkeypatch):
    """1 - lr * wd in float32, torch's way: no error to torch's eyes, one of 100 ulp to ours after 1000 steps."""
    true = reference.decayed

    def rounded(p, g, decay, l2, grad_factor):
        if p.dtype is torch.float64:
            return true(p, g, decay, l2, grad_factor)
        return p * float(np.float32(1 - decay)), grad_factor * g

    monkeypatch.setattr(reference, "decayed", rounded)
    options = {"lr": 1e-3, "weight_decay": 0.1}
    target = cases.Target("cpu", "reference")
    for _, ours, _, truth in test_error.trajectories("AdamW", options, target, (300,)):
        assert cases.ulps(ours["0.p"], truth["0.p"]).median() > 15


def mutate(monkeypatch, rows=lambda rows: rows, scalars=lambda scalars: scalars):
    """The native backend, with its rows changed before it sees them, or its scalars before each launch."""
    cpu = backends.BACKENDS[0]

    def prepare(watch, true_rows, owner):
        launch = cpu.prepare(watch, rows(true_rows), owner)
        return SimpleNamespace(prepare_step=lambda o, true: launch.prepare_step(o, scalars(true)), run=launch.run)

    wrong = backends.Backend(cpu.name, cpu.devices, prepare)
    monkeypatch.setattr(backends, "BACKENDS", (wrong, *backends.BACKENDS[1:]))


def test_sentinels_see_a_skipped_tail(monkeypatch):
    mutate(monkeypatch, rows=lambda rows: [replace(row, numel=row.numel - 1) for row in rows])
    fails(test_plan.check_sentinels, cases.CPU)


def test_sentinels_see_an_element_too_many(monkeypatch):
    def with_room(p, dtype, storage):
        return torch.empty(p.numel() + 1, dtype=dtype)[:-1].view(p.shape)

    monkeypatch.setattr(state, "_empty_like", with_room)
    mutate(monkeypatch, rows=lambda rows: [replace(row, numel=row.numel + 1) for row in rows])
    fails(test_plan.check_sentinels, cases.CPU)


def test_layouts_see_mispaired_gradients(monkeypatch):
    monkeypatch.setattr(plan, "same_layout", lambda a, b: True)
    fails(test_plan.check_mismatched_gradients, cases.CPU)


def test_lists_see_a_wrong_row_of_scalars(monkeypatch):
    mutate(monkeypatch, scalars=lambda scalars: scalars[::-1])
    test_launch.check_list([(5,)] * 40, cases.CPU)  # one group: nothing to confuse
    fails(test_launch.check_list, [(5,)] * 40, cases.CPU, 20)


def test_lists_see_a_tensor_left_out(monkeypatch):
    mutate(monkeypatch, rows=lambda rows: rows[:-1] if len(rows) > 1 else rows)
    fails(test_launch.check_list, [(5,)] * 1000, cases.CPU)


# ---- wrong formats: what the native backend is held against, mutated, or the reference that is held to the formula

REFERENCE = cases.Target("cpu", "reference")
BY_BITS = test_formats.test_stochastic_rounding_is_that_of_the_formula, cases.CPU


def overwritten(master):
    return (
        test_formats.test_a_parameter_that_is_overwritten_is_what_counts,
        {"master": master},
        torch.bfloat16,
        REFERENCE,
    )


def without_notice(master, p, extra):
    if master == "fp32":
        return extra
    if master == "kahan":
        return p.float() + extra.float()
    return codecs._from_bits((codecs._bits(p.float()) + extra.long()) & 0xFFFFFFFF)


FORMATS = {
    "the other half of the word": ("words", lambda true: lambda *a: true(*a) << 16, *BY_BITS),
    "the next step": ("words", lambda true: lambda seed, step, *a: true(seed, step + 1, *a), *BY_BITS),
    "the lower half of the seed": ("words", lambda true: lambda seed, *a: true(seed & 63, *a), *BY_BITS),
    "rounding to nearest": ("stochastic", lambda true: lambda x, random: x.bfloat16(), *BY_BITS),
    "a NaN that is rounded": (
        "stochastic",
        lambda true: lambda x, random: codecs._from_bits((codecs._bits(x) + random) & 0xFFFF0000).bfloat16(),
        *BY_BITS,
    ),
    "ties to even": ("_rounded", lambda true: torch.Tensor.to, test_formats.test_split16_is_every_float32, REFERENCE),
    "overwritten beside kahan": ("read_master", lambda true: without_notice, *overwritten("kahan")),
    "overwritten beside split16": ("read_master", lambda true: without_notice, *overwritten("split16")),
    "overwritten beside fp32": ("read_master", lambda true: without_notice, *overwritten("fp32")),
    "codes one too small": (
        "encode",
        lambda true: lambda x, *a: (true(x, *a)[0] - 1, true(x, *a)[1]),
        test_formats.test_codes,
        True,
    ),
    "averages to nearest": (
        "stochastic",
        lambda true: lambda x, random: x.bfloat16(),
        test_averages.test_narrow_averages_follow_those_in_float32,
        REFERENCE,
    ),
    "the parameter's words for its average": (
        "words",
        lambda true: lambda *a, average=False: true(*a[:6]),
        test_averages.test_narrow_averages_draw_by_words_of_their_own,
        REFERENCE,
    ),
    "a NaN in the scale": (
        "encode",
        lambda true: lambda x, *a: true(x.nan_to_num(1e30), *a),
        test_formats.test_a_nan_stays_in_its_block,
        REFERENCE,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_format_is_seen(name, monkeypatch):
    what, wrong, check, *args = FORMATS[name]
    check(*args)
    monkeypatch.setattr(codecs, what, wrong(getattr(codecs, what)))
    fails(check, *args)


# ---- a wrong kernel: the C++ is mutated, compiled, and compared with the exact sequence

PLAIN_WORD = "\n      update_word<R, T, kRandom, false>"  # of a step that does not measure
MUTATIONS = {
    "as it is": None,
    "a decay with two roundings": ("p(fma(-decay, p0, p0))", "p(p0 - decay * p0)"),
    "beta1 for beta2": ("fma(s.w2, x.g * x.g, fma(-s.w2, v, v))", "fma(s.w1, x.g * x.g, fma(-s.w1, v, v))"),
    "a moment with three roundings": (
        "fma(s.w2, x.g * x.g, fma(-s.w2, v, v))",
        "s.w2 * (x.g * x.g) + fma(-s.w2, v, v)",
    ),
    "eps inside the root": (
        "fma(std::sqrt(second), s.inv_sqrt_bc2, s.eps)",
        "std::sqrt(second + s.eps) * s.inv_sqrt_bc2",
    ),
    "an update with two roundings": ("fma(-s.step_size, moved / denom, p)", "p - s.step_size * (moved / denom)"),
    "a reciprocal": ("moved / denom", "moved * (T(1) / denom)"),
    "decay and l2 swapped": (
        "x(s.decay, s.l2, s.grad_factor, p0, g0);\n    m =",
        "x(s.l2, s.decay, s.grad_factor, p0, g0);\n    m =",
    ),
    "an average of another weight": ("T(scalars[SCALAR_EMA]), n", "T(scalars[SCALAR_W2]), n"),
    "an average with two roundings": ("lerp(ema[i], p[i], weight)", "ema[i] + weight * (p[i] - ema[i])"),
    "a skipped tail": (f"i < n; ++i){PLAIN_WORD}", f"i < n / 64 * 64; ++i){PLAIN_WORD}"),
}
ENTRY = """
extern "C" void step(float* p, float* g, float* m, float* v, float* ema, long n, const double* scalars) {
  using namespace fused_adamw;
  Row row{p, g, {m, v, nullptr}, n, 0, Rule::adam, Format::f32, Format::f32, Format::f32};
  row.ema = ema;
  step_cpu(&row, 1, scalars, 0);
}
"""


@pytest.mark.parametrize("sizes", [[21, 7, 2, 2], [3, 3, 3, 3], [1, 4, 2], [5, 5]])
def test_pairwise_leaves_no_pair_out(sizes):
    rows = cases.pairwise(sizes)
    for (i, m), (j, n) in itertools.combinations(enumerate(sizes), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(range(m), range(n)))
    largest, next_largest = sorted(sizes)[:-3:-1]
    assert len(rows) <= 2 * largest * next_largest


SOURCES = (
    *("rules.h", "formats.h", "step.h", "loops_cpu.h"),
    *("formats_avx2.h", "formats_avx512.h", "threads_cpu.h", "step_cpu.cpp"),
)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_kernel_is_seen(name, tmp_path):
    source = "".join((CSRC / f).read_text() for f in SOURCES)
    source = source.replace("#pragma once", "").replace('#include "', '// #include "') + ENTRY
    source = source.replace("defined(__x86_64__)", "0")  # one instruction set compiles in a third of the time
    if MUTATIONS[name]:
        assert source.count(MUTATIONS[name][0]) == 1
        source = source.replace(*MUTATIONS[name])
    (tmp_path / "step.cpp").write_text(source)
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(tmp_path / "step.cpp"), "-o", str(tmp_path / "step.so")], check=True)

    n = 200
    rng = np.random.default_rng(0)
    p, g, m = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    streams = [p, g, m, rng.random(n).astype(np.float32) * 1e-2, rng.standard_normal(n).astype(np.float32)]
    row = scalars.adam(
        {
            "lr": 1e-2,
            "betas": (0.9, 0.999),
            "eps": 1e-3,
            "weight_decay": 30.0,
            "decoupled_weight_decay": True,
            "decouple_lr": False,
            "maximize": False,
            "ema_decay": 0.9,
        },
        7,
    )
    s = {k: Fraction(float(np.float32(v))) for k, v in row._asdict().items()}
    wanted = []
    for element in zip(*streams, strict=True):
        *before, ema = (Fraction(float(x)) for x in element)
        stepped = exact.adam(s, *before)
        wanted.append((*stepped, exact.lerp(ema, stepped[0], s["ema"])))
    arguments = [x.ctypes.data_as(ctypes.c_void_p) for x in streams]
    ctypes.CDLL(str(tmp_path / "step.so")).step(*arguments, ctypes.c_long(n), (ctypes.c_double * len(row))(*row))
    got = [tuple(Fraction(float(x)) for x in e) for e in zip(streams[0], *streams[2:], strict=True)]
    assert (got == wanted) == (name == "as it is")
