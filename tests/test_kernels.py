"""The compiled kernels of both GPU backends without a GPU: what the compiler made of them, and their PTX executed.

One table of cases for Triton and CUDA C++, against the CPU kernel, bit by bit.
"""

import dataclasses
import importlib.util
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch

from fused_adamw import gpu, layout, scalars
from fused_adamw.contract import STATES
from tests import gpu_kernels
from tests.gpu_kernels import (
    ADABOUND,
    ADAM,
    ADAM_ALL_BF16,
    ADAM_BF16,
    AMSBOUND,
    AMSGRAD,
    AVERAGED,
    BF16,
    BLOCK,
    CAUTIOUS_DECAY,
    CAUTIOUS_UPDATE,
    CHUNK,
    EXECUTED,
    F16,
    F32,
    FORMED,
    I8,
    INT8,
    INT8_STOCHASTIC,
    LAYOUTS,
    MEASURED,
    MOMENTUM,
    NARROW_AVERAGE,
    NO_FIRST,
    NOT_SHARDED,
    SPLIT16,
    STOCHASTIC,
    VARIANTS,
    Cuda,
    Triton,
    changed,
    forbidden,
    needs_ptxsim,
    same_bits,
    scalar_rows,
    simulate,
    tensors,
)

LOADED = {}


def compiler_of(name):
    if name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    if name == "cuda" and not (shutil.which("nvcc") and shutil.which("c++filt")):
        pytest.skip("needs nvcc and c++filt")
    if name not in LOADED:
        LOADED[name] = {"triton": Triton, "cuda": Cuda}[name]()
    return LOADED[name]


@pytest.fixture(params=["triton", "cuda"])
def compiler(request):
    return compiler_of(request.param)


ON = [(c.name, sm) for c in (Triton, Cuda) for sm in c.architectures]


def test_chunks_are_whole_blocks_of_codes():
    """No two chunks share a scale."""
    assert {gpu.chunk_size(variant) % gpu_kernels.QUANT_BLOCK for variant in LAYOUTS} == {0}


# ---- What came out of the compiler.


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "sm"), ON)
def test_compiled_code(name, sm, variant):
    compiled = compiler_of(name).step(sm, variant)
    check_resources(compiled, most_registers(name, sm, variant))
    wide = [compiled.width * d.itemsize for d in variant.streams]  # bytes per access of a stream on the full path
    assert max(wide) == 16 or name == "triton"
    # Every CUDA kernel steps averages, by tiles of at most 4 elements a thread.
    averaged = [4 * d.itemsize for d in [*variant.streams, F32, BF16]] if name == "cuda" else []
    for kind, own, others in (("ld", wide, averaged), ("st", wide[:1] + wide[2:], averaged[:1] + averaged[2:])):
        sizes, others = ([size for size in s if size > 4] for s in (own, others))  # 4 codes are one scalar access
        accesses = [size for size in gpu_kernels.vectors(compiled.ptx, kind) if size > 4]
        assert set(accesses) == {*sizes, *others}
        # A loop that the compiler unrolled has its accesses several times over.
        assert all(accesses.count(size) % sizes.count(size) == 0 or others for size in sizes)
        assert all(accesses.count(size) >= max(sizes.count(size), others.count(size)) for size in accesses)


@pytest.mark.parametrize("variant", [ADAM, MOMENTUM, INT8_STOCHASTIC], ids=str)
def test_tables_are_read_before_any_branch(compiler, variant):
    """A branch before some of the loads would make a program wait for memory once more."""
    before = re.split(r"\b(?:bra|ret)\b", compiler.step(90, variant).ptx)[0]
    # Factor; row and number of the chunk; numel, flags, index of the scalars; addresses. Scalars come last: they are
    # arguments, or loaded, as Triton predicates and nvcc branches.
    expected = 1 + 2 + 3 + len(variant.streams) + variant.scales
    assert len(re.findall(r"\bld\.global", before)) >= expected


def most_registers(name, sm, variant):
    """64 let 32 warps live on a multiprocessor; codes and words take more: 80 leave 24, 96 leave 20, 128 leave 16."""
    codes, averages = variant.state is I8, variant.ema is not None
    if not codes and not variant.stochastic:
        return 72 if variant.ema is BF16 and sm == 120 else 64
    if name == "triton":
        beside = variant.stochastic + (variant.master != "none") if codes else 0
        more = averages and variant.rule == "adam_amsgrad"
        return (72 if more else 64, 80, 88)[beside] + (8 if codes else 16) * averages
    if codes and variant.stochastic and variant.master != "none":
        return 128
    return 80 if codes + variant.stochastic + (STATES[variant.rule] == 3) == 1 else 96


def check_resources(compiled, registers=64, spilled=0):
    assert compiled.registers <= registers
    assert compiled.frame <= spilled
    assert compiled.shared == 0
    assert not forbidden(compiled.ptx)


@pytest.mark.parametrize(
    "rule", [rule for rule in STATES if rule not in ("adam", "adam_amsgrad", "sgd", "sgd_momentum")]
)
@pytest.mark.parametrize("sm", Triton.architectures)
def test_rules_beside_the_plain_ones_do_not_spill(sm, rule):
    """With random words, and with codes, which leave the least room. AMSBound spills two registers."""
    triton = compiler_of("triton")
    spilled = 8 * (rule == "amsbound")
    check_resources(triton.step(sm, gpu_kernels.Variant(rule, BF16, BF16, BF16, "none", True)), 72, spilled)
    if STATES[rule] < 3:
        check_resources(triton.step(sm, gpu_kernels.Variant(rule, BF16, BF16, I8)), 72)


@pytest.mark.parametrize("variant", AVERAGED, ids=str)
@pytest.mark.parametrize("sm", Triton.architectures)
def test_registers_of_averages(sm, variant):
    """CUDA's kernels are the same with and without. With random words ptxas spills two registers, at any limit.

    For an sm_120 it spills up to ten of those that have words for the average.
    """
    spilled = 40 if variant.ema is BF16 and sm == 120 else 8 * variant.draws
    check_resources(compiler_of("triton").step(sm, variant), most_registers("triton", sm, variant), spilled)


@pytest.mark.parametrize("variant", MEASURED, ids=str)
@pytest.mark.parametrize(("name", "sm"), [(name, sm) for name, sm in ON if sm in EXECUTED or name == "triton"])
def test_registers_of_what_is_measured(name, sm, variant):
    """A few words more than without. For an sm_120 Triton's AMSBound spills four with random words."""
    compiled = compiler_of(name).step(sm, variant)
    assert compiled.registers <= most_registers(name, sm, variant) + 16 * (name == "triton")
    assert compiled.frame <= (32 if name == "cuda" else 16 * (sm == 120 and variant.rule == "amsbound"))
    assert not [text for text in forbidden(compiled.ptx) if not re.search(r"shared|bar\.sync", text)]


@pytest.mark.slow
def test_every_cuda_kernel():
    """All mixes of dtypes, for one architecture; those that measure, of which a few spill up to 8 registers.

    They are the extension's, where it was built for that: to compile them takes minutes.
    """
    every = type(compiler_of("cuda"))()
    every.variants = []
    compiled = every.built(90) or every.module(90)
    steps = [kernel for name, kernel in compiled.items() if name.startswith("step_kernel")]
    assert len([kernel for kernel in steps if 8 < kernel.registers <= 64]) >= 3 * 27 + 9
    plain = [kernel for name, kernel in compiled.items() if re.fullmatch(r"step_kernel<.*, false>", name)]
    assert len(plain) == 252 + 72 + 58 + 36  # of the cautious rules, of AdaBound, without a first moment
    for kernel in plain:
        check_resources(kernel, 128)
    assert len(steps) == len(plain) + 277
    assert max(kernel.frame for kernel in steps) <= 32


# ---- The compiled PTX, executed.


EDGES = [n + d for n in (BLOCK, CHUNK, CHUNK + BLOCK) for d in (-1, 0, 1)]
SIZES = [0, 1, 7, 255, 256, 257, *EDGES, 3 * CHUNK + 77]


@needs_ptxsim
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("sm", EXECUTED)
def test_bits(compiler, sm, variant, cpu_step):
    rows = scalar_rows(variant.rule)
    given = tensors(variant, SIZES, rows)
    given += tensors(variant, [1, 7, 600, CHUNK + 1], rows, seed=1, unaligned=True)
    got, _ = simulate(compiler.step(sm, variant), variant, given, rows, CHUNK)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
def test_averages_take_no_part(compiler, cpu_step):
    """Tensors step to the same bits with an average and without."""
    for variant in AVERAGED:
        rows = scalar_rows(variant.rule)
        given = tensors(variant, [CHUNK + 77], rows)
        average = len(variant.streams) - 1
        without = [dataclasses.replace(t, data=[x for k, x in enumerate(t.data) if k != average]) for t in given]
        stepped = cpu_step(variant, given, rows)
        for t in stepped:
            del t[average - 1]  # there is no gradient in it
        assert same_bits(cpu_step(gpu_kernels.Variant(*variant[:6]), without, rows), stepped)


def measured(compiled, variant, cpu_step):
    """(stepped p and states of each, the sums of squares of each row), simulated and by the CPU kernel; the tensors."""
    rows, factor = scalar_rows(variant.rule)[:3], 0.25
    given = tensors(variant, [1, 7, 257, CHUNK, 2 * CHUNK + 77], rows)
    given += tensors(variant, [5, CHUNK + 1], rows, seed=1, unaligned=True)
    for t in given:
        t.data = [torch.where(x.abs() < 1e9, x, 1) if x.is_floating_point() else x for x in t.data]
    scaled = [(*row[:2], row[2] * factor, *row[3:]) for row in rows]
    parts = [np.zeros((2, 3)) for _ in given]
    stepped = cpu_step(variant, given, scaled, parts)
    assert same_bits(cpu_step(variant, given, scaled), stepped), "what does not measure has the same bits"
    exact = [(x.data[1].double() * scaled[x.scalars][2]).square().sum().item() for x in given]
    np.testing.assert_allclose([x.sum(0)[0] for x in parts], exact, rtol=1e-5)
    got, result = simulate(compiled, variant, given, rows, CHUNK, factor=factor, ulp_noise=1)
    firsts = np.cumsum([0, *(-(-t.data[0].numel() // CHUNK) for t in given)])[:-1]
    return (got, np.add.reduceat(result.sums, firsts, axis=1).T), (stepped, np.array([x.sum(0) for x in parts]))


@needs_ptxsim
@pytest.mark.parametrize(("sm", "variant"), [(EXECUTED[i % 3], v) for i, v in enumerate(MEASURED)], ids=str)
def test_squares(compiler, sm, variant, cpu_step):
    """A step that measures has the bits of one that does not, and sums its squares as the CPU does."""
    (got, sums), (stepped, expected) = measured(compiler.step(sm, variant), variant, cpu_step)
    assert same_bits(got, stepped)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


@needs_ptxsim
@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("triton", "multi_tensor.py", "of_update += squares(p - before, mask)", "of_update += squares(p, mask)"),
        ("triton", "multi_tensor.py", "(x[k] + y[k])", "x[k]"),
        ("cuda", "step_cuda.cu", "squares.add(s.grad_factor * gradient, ", "squares.add(gradient, "),
        ("cuda", "step_cuda.cu", "sum += of_warps[threadIdx.x][warp]", "sum = of_warps[threadIdx.x][warp]"),
    ],
)
def test_wrong_squares_are_seen(name, file, right, wrong, tmp_path, cpu_step):
    own = changed(compiler_of(name), file, right, wrong, tmp_path)
    own.variants = [MEASURED[0]]
    (_, sums), (_, expected) = measured(own.step(90, MEASURED[0]), MEASURED[0], cpu_step)
    assert not np.allclose(sums, expected, rtol=1e-5)


@needs_ptxsim
def test_a_skipped_step_leaves_its_squares(compiler):
    """The statistics are those of the last step that was taken."""
    variant = MEASURED[0]
    rows = scalar_rows(variant.rule)
    _, result = simulate(compiler.step(90, variant), variant, tensors(variant, [CHUNK], rows), rows, CHUNK, factor=-1.0)
    assert result.s.per_buffer.get("sums", (0, 0)) == (0, 0)


# Of shards: pieces of one dimension or another, the first ones of rows that 8 divides, and of large tensors.
PLACES = [
    NOT_SHARDED,
    (16, 24, 40),
    (3, 1 << 62, 0),
    ((1 << 40) + 8, 1 << 62, 0),
    ((1 << 33) + 5, 13, 1001),
    (0, 4096, 8),
]


@needs_ptxsim
@pytest.mark.parametrize(("sm", "variant"), [(EXECUTED[i % 3], v) for i, v in enumerate(FORMED + AVERAGED)], ids=str)
def test_bits_of_formats(compiler, sm, variant, cpu_step):
    """Whatever the errors of approximate instructions, within the bounds that NVIDIA documents."""
    rows = scalar_rows(variant.rule)
    given = tensors(variant, [*SIZES[1:6], 127, 128, 129, *EDGES, 2 * CHUNK + 77], rows, places=PLACES)
    given += tensors(variant, [1, 7, 600, 300, CHUNK + 1], rows, seed=1, unaligned=True, places=PLACES[1:])
    got, _ = simulate(compiler.step(sm, variant), variant, given, rows, CHUNK, ulp_noise=1)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
@pytest.mark.parametrize(("top", "bottom", "left", "right"), [(0, 30, 0, 48), (0, 30, 13, 120), (3, 17, 0, 120)])
@pytest.mark.parametrize("variant", [STOCHASTIC, NARROW_AVERAGE], ids=str)
def test_shards_are_rounded_as_the_whole(compiler, variant, top, bottom, left, right):
    """A piece of a matrix, stepped with its place, has the bits that it has in the whole."""

    def piece(x):
        return x.view(30, 120)[top:bottom, left:right].flatten()

    rows, width = scalar_rows("adam"), right - left
    (whole,) = tensors(variant, [30 * 120], rows)
    place = (top * 120 + left, width, 120 - width) if width < 120 else (top * 120, 1 << 62, 0)
    shard = dataclasses.replace(whole, data=[piece(x) for x in whole.data], place=place)
    got, _ = simulate(compiler.step(90, variant), variant, [whole, shard], rows, 2048)
    assert same_bits([got[1]], [[piece(x) for x in got[0]]])


@needs_ptxsim
@pytest.mark.parametrize("variant", [ADAM, ADAM_BF16, ADAM_ALL_BF16], ids=str)
def test_alignment(compiler, variant, cpu_step):
    rows = scalar_rows(variant.rule)
    given = tensors(variant, [600] * 41, rows)
    for i, t in enumerate(given):  # one stream of each slides, a single one off 16 bytes is enough
        t.offsets[i % len(t.offsets)] = i * t.data[i % len(t.offsets)].element_size()
    got, _ = simulate(compiler.step(90, variant), variant, given, rows, CHUNK)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
@pytest.mark.parametrize("order", ["linear", "reverse", "random"])
def test_200_tensors_in_four_groups(compiler, order, cpu_step):
    rows = scalar_rows("adam")
    given = tensors(ADAM, [1 + (i * 37) % 700 for i in range(200)], rows)
    got, _ = simulate(compiler.step(90, ADAM), ADAM, given, rows, 2048, order=order)
    assert same_bits(got, cpu_step(ADAM, given, rows))


@needs_ptxsim
@pytest.mark.parametrize("variant", [ADAM, MOMENTUM, INT8_STOCHASTIC], ids=str)
@pytest.mark.parametrize("sm", EXECUTED)
def test_rows_of_scalars_that_are_arguments(compiler, sm, variant, cpu_step):
    """Nothing is read where rows of scalars lie otherwise."""
    rows = scalar_rows(variant.rule)[:2]
    given = tensors(variant, [700, CHUNK + 77, 3], rows)
    assert {t.scalars for t in given} == {0, 1}
    got, result = simulate(compiler.step(sm, variant), variant, given, rows, CHUNK, by_value=True)
    assert same_bits(got, cpu_step(variant, given, rows))
    assert result.s.per_buffer.get("scalars", (0, 0)) == (0, 0)


@needs_ptxsim
@pytest.mark.parametrize("variant", [ADAM_BF16, INT8_STOCHASTIC], ids=str)
@pytest.mark.parametrize("sm", EXECUTED)
def test_beyond_32_bits(compiler, sm, variant, cpu_step):
    rows = scalar_rows("adam")
    given = tensors(variant, [2 * CHUNK + 77], rows, places=[(1 << 40, 1 << 62, 0)])
    got, _ = simulate(compiler.step(sm, variant), variant, given, rows, CHUNK, bias=1 << 40)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
@pytest.mark.parametrize(
    ("variant", "minimum", "instructions"),
    [
        (ADAM, 28, 21),
        (ADAM_BF16, 22, 24),
        (MOMENTUM, 20, 14),
        (AVERAGED[0], 36, 26),
        (AVERAGED[1], 22, 41),
        (NARROW_AVERAGE, 32, 70),
        (ADAM_ALL_BF16, 14, 34),
        (SPLIT16, 26, 43),
        (STOCHASTIC, 14, 70),
        (INT8, 10.125, 70),
        (INT8_STOCHASTIC, 10.125, 118),
    ],
    ids=str,
)
@pytest.mark.parametrize("sm", EXECUTED)
def test_bytes_and_instructions(compiler, sm, variant, minimum, instructions):
    """Of an element and a program's start. The instructions are PTX's: the processor's are up to 1.6 times as many."""
    n = 1 << 18
    assert variant.bytes == minimum
    compiled, rows = compiler.step(sm, variant), scalar_rows(variant.rule)
    chunk = gpu.chunk_size(variant)
    _, result = simulate(compiled, variant, tensors(variant, [n], rows), rows, chunk, race=False)
    programs = n // chunk  # of 4 warps, each of which reads the tables
    assert result.s.thread_insts <= instructions * n + 150 * 128 * programs
    memory = [i for i in result.s.mem_ins if i["lanes"]]
    # Distinct bytes of each warp: all lanes read the same entry of a table, and that is one request.
    requested = sum(i["eff"] * 32 * i["sectors"] for i in memory)
    # The seed and the index, which Triton's kernel reads anew for 128 elements, come from the L1 cache; and so do they
    # and the place of the elements, which CUDA's reads anew for the words of an average.
    anew = 40 if compiler.name == "cuda" and variant.ema is BF16 else 12
    words = anew / 128 if variant.draws else 0
    assert minimum <= requested / n <= 1.005 * minimum + words + 4 * 116 / chunk
    # A scale is 4 bytes of a sector that 8 warps share.
    scales = variant.scales * 2 * 28 / gpu_kernels.QUANT_BLOCK
    assert 32 * sum(i["sectors"] for i in memory) <= (minimum + scales + 8 * words) * n + 4 * 24 * 32 * programs
    wide = {i["bytes_per_lane"] for i in memory if i["lanes"] * i["bytes_per_lane"] > n / 8 and i["eff"] > 0.5}
    width = 4 if variant.ema else compiled.width
    assert wide == {width * d.itemsize for d in variant.streams}
    for i in memory:
        if i["bytes_per_lane"] in wide and i["text"].startswith(("ld.global.v", "st.global.v")):
            assert i["eff"] >= 0.99, i
    assert result.s.store_eff >= (0.9 if variant.scales else 0.99)


@needs_ptxsim
@pytest.mark.parametrize("family", scalars.ROWS)
@pytest.mark.parametrize("sm", EXECUTED)
def test_scalars_on_the_device(compiler, sm, family):
    """Equal to ``scalars.py`` in every bit, which rounds once what it has computed in double.

    A third of the learning rates are float64 tensors, and a third float32.
    """
    steps = [1.0, 2.0, 5.0, 7.0, 1000.0, 123457.0]
    base = {"lr": 3e-3, "base_lr": 0.1, "maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1}
    groups = []
    if family != "sgd":
        for decoupled, decouple_lr, betas in (
            (True, True, (0.9, 0.999)),
            (False, False, (0.0, 0.9999)),
            (True, False, (0.8, 0.5)),
        ):
            own = {
                "betas": betas,
                "eps": 1e-8,
                "decoupled_weight_decay": decoupled,
                "decouple_lr": decouple_lr,
                "degenerated_to_sgd": not decouple_lr,
                "final_lr": 0.05,
                "gamma": 0.3 if decouple_lr else 1e-3,
            }
            groups.append(base | own)
    else:
        for momentum, dampening, nesterov, lr_in_momentum in (
            (0, 0, 0, 0),
            (0.9, 0.3, 0, 0),
            (0.9, 0, 1, 1),
            (0.9, 0, 0, 1),
        ):
            own = {
                "momentum": momentum,
                "dampening": dampening,
                "nesterov": nesterov,
                "lr_in_momentum": lr_in_momentum,
            }
            groups.append(base | own | {"decouple_lr": False})
    groups.append(groups[0] | {"lr_mult": 0.3, "wd_mult": 0.7, "ema_decay": 0.9999})
    groups.append(groups[0] | {"ema_decay": 0.99, "ema_warmup": True})
    cases_of = [(group, step) for group in groups for step in steps]
    mem = gpu_kernels.ptxsim.GlobalMemory(1 << 24)
    numbers = np.array([scalars.HYPER[family](group) for group, _ in cases_of])
    rates = np.zeros(len(cases_of), np.int64)
    for i, dtype in enumerate((None, np.float64, np.float32)):
        if dtype:
            lr = dtype(groups[0]["lr"] * (1 + i))
            address = mem.upload(np.array([lr]), readonly=True).addr
            rates[i::3] = address if dtype is np.float64 else ~address
            numbers[i::3, layout.HYPER_LR] = [group.get("lr_mult", 1.0) for group, _ in cases_of[i::3]]
            cases_of[i::3] = [(group | {"lr": float(lr)}, step) for group, step in cases_of[i::3]]
    counters = mem.upload(np.array([step - 1 for _, step in cases_of], np.float32), "counters")
    out = mem.upload(np.zeros((len(cases_of), layout.SCALARS), np.float32), "out")
    tables = [
        mem.upload(numbers, readonly=True),
        mem.upload(rates, readonly=True),
        mem.upload(counters.addr + 4 * np.arange(len(cases_of)), readonly=True),
    ]
    count = [] if compiler.name == "triton" else [len(cases_of)]
    launched = [mem.upload(np.array([factor], np.float32), readonly=True) for factor in (1.0, -1.0)]
    for factor in launched:  # the second leaves all as it is
        args = [*tables, factor, out, *count]
        compiler.scalars(sm, family != "sgd").launch(mem, compiler.blocks(len(cases_of)), args)
    expected = [list(scalars.ROWS[family](group, step)) for group, step in cases_of]
    np.testing.assert_array_equal(out.get().reshape(-1, layout.SCALARS), np.array(expected, np.float32))
    np.testing.assert_array_equal(counters.get(), np.array([step for _, step in cases_of], np.float32))


@needs_ptxsim
@pytest.mark.parametrize("variant", [ADAM, ADAM_ALL_BF16, MOMENTUM], ids=str)
@pytest.mark.parametrize("factor", [0.37, 0.0, -1.0])
def test_factor(compiler, factor, variant, cpu_step):
    """The kernel multiplies as the host does for the CPU; a negative factor leaves every byte as it is."""
    rows = scalar_rows(variant.rule)
    given = tensors(variant, [9, CHUNK + 700], rows)
    if factor < 0:
        with pytest.raises(AssertionError, match="every byte is read once"):
            simulate(compiler.step(90, variant), variant, given, rows, CHUNK, factor=factor)
        return
    got, _ = simulate(compiler.step(90, variant), variant, given, rows, CHUNK, factor=factor)
    scaled = [(*row[:2], float(np.float32(row[2]) * np.float32(factor)), *row[3:]) for row in rows]
    assert same_bits(got, cpu_step(variant, given, scaled))


@needs_ptxsim
@pytest.mark.parametrize("size", [1.0, 0.0, 1e-30, 1e-42, 3e22, 3e37])
@pytest.mark.parametrize(("sm", "dtype"), [(80, F32), (90, F32), (120, BF16)])
def test_sums_of_squares(compiler, sm, dtype, size):
    """Of each chunk, for gradients of any size; in the usual range each is read once, 16 bytes at a time."""
    compiled = compiler.squares(sm, dtype)
    assert max(gpu_kernels.vectors(compiled.ptx, "ld")) == 16
    given = gradients(dtype, size)
    sums = gpu_kernels.sums_of_squares(compiled, given, CHUNK, reads=1 if size == 1 else 2)
    chunks = [c.double() for t in given for c in t.data[1].split(CHUNK)]
    np.testing.assert_allclose(sums, [(c * c).sum().item() for c in chunks], rtol=8 * 2.0**-24)  # of 8 squares


@needs_ptxsim
@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_sums_of_squares_that_are_not_finite(compiler, special):
    given = gradients(F16, 1.0)
    for t in given:
        t.data[1][-1] = special
    sums = gpu_kernels.sums_of_squares(compiler.squares(90, F16), given, 1 << 14, reads=2 if special > 0 else 1)
    assert np.array_equal(sums, np.full(len(sums), special), equal_nan=True)


def gradients(dtype, size):
    """Tensors of gradients of about a size, aligned and not."""
    given = tensors(ADAM, [1, 7, *EDGES, 3 * CHUNK + 77], scalar_rows("adam"))
    given += tensors(ADAM, [1, 7, 600, CHUNK + 1], scalar_rows("adam"), seed=1, unaligned=True)
    for t in given:
        t.data[1] = (torch.linspace(-1, 1, len(t.data[1])).double() * size).to(dtype)
    return given


def factor_by_hand(total, max_norm, skips, scale, found):
    """The factor and the norm as ``clipping.factor_of`` has them, in float64."""
    with np.errstate(all="ignore"):
        unscale = np.float64(1) / np.float64(np.float32(scale)) if scale is not None else np.float64(1)
        norm = np.sqrt(np.float64(total)) * unscale
        factor = unscale
        if max_norm is not None:
            factor = factor * np.minimum(max_norm / (norm + 1e-6), 1.0)  # which keeps NaN
        skipped = (skips and not norm < math.inf) or (found is not None and found != 0)
        return np.float32(-1 if skipped else factor), np.float32(norm)


@needs_ptxsim
@pytest.mark.parametrize("sm", EXECUTED)
def test_factor_of_all_gradients(compiler, sm):
    """Equal in every bit to what torch's operators make of the same sum; each sum is read once."""
    check_factor(compiler, sm)


def check_factor(compiler, sm):
    launched = compiler.factor(sm)
    generator = np.random.default_rng(0)
    totals = [0.0, 0.25, 1e300, math.inf, math.nan, None]
    asked = [
        (max_norm, skips, scale, found)
        for max_norm in (None, 0.1, 1e9, 0.0, math.inf)
        for skips in (False, True)
        for scale, found in ((None, None), (3.0, 0.0), (1024.0, 1.0), (None, math.nan), (0.0, None))
    ]
    sizes = [0, 1, 7, 511, 513, 2049, 9000]
    for i, (max_norm, skips, scale, found) in enumerate(asked):
        n, total = sizes[i % len(sizes)], totals[i % len(totals)]
        sums = generator.integers(0, 1 << 40, n).astype(np.float64)  # whole numbers: exact in any order
        if n and total is not None:
            sums[:] = 0
            sums[n // 2] = total
        mem = gpu_kernels.ptxsim.GlobalMemory(1 << 22)
        given = [None if x is None else mem.upload(np.array([x], np.float32), readonly=True) for x in (scale, found)]
        buffer = mem.upload(sums if n else np.zeros(1), "sums", readonly=True)
        factor, norm = mem.alloc(4, "factor", np.float32), mem.alloc(4, "norm", np.float32)
        addresses = [0 if x is None else x.addr for x in given]
        # Without a norm to clip to or to judge, none is asked for.
        wanted = max_norm is not None or skips
        args = (max_norm, skips, *addresses)
        args = compiler.factor_arguments(buffer, n, args, factor, norm.addr if wanted else 0)
        result = launched.launch(mem, 1, args)
        assert result.s.per_buffer.get("sums", (0, 0)) == (8 * n, 0)
        expected = factor_by_hand(sums.sum(), max_norm, skips, scale, found)
        np.testing.assert_array_equal(factor.get()[0], expected[0], err_msg=str(asked[i]))
        if wanted:
            np.testing.assert_array_equal(norm.get()[0], expected[1], err_msg=str(asked[i]))
        else:
            assert not norm.written().any()


@needs_ptxsim
@pytest.mark.parametrize("found", [None, 0.0, 2.0, math.nan])
def test_totals_of_segments(compiler, found):
    bounds = np.array([0, 3, 3, 4000, 4001])
    sums = np.random.default_rng(0).integers(0, 1 << 40, bounds[-1]).astype(np.float64)
    mem = gpu_kernels.ptxsim.GlobalMemory(1 << 22)
    given = [mem.upload(x, readonly=True) for x in (sums, bounds)]
    at = 0 if found is None else mem.upload(np.array([found], np.float32), readonly=True).addr
    totals, flag = mem.alloc(8 * (len(bounds) - 1), "totals", np.float64), mem.alloc(4, "flag", np.float32)
    compiler.totals(90).launch(mem, len(bounds) - 1, compiler.totals_arguments(*given, at, totals, flag))
    expected = [sums[a:b].sum() for a, b in itertools.pairwise(bounds)]
    np.testing.assert_array_equal(totals.get(), expected)
    if found is None:
        assert not flag.written().any()
    else:
        assert flag.get()[0] == (found != 0)


# ---- The tests see a wrong kernel.


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong", "seen"),
    [
        (
            "triton",
            "kernels.py",
            '"num_warps": NUM_WARPS, "enable_fp_fusion": False',
            '"enable_fp_fusion": True',
            ".f32",
        ),
        ("triton", "rules.py", "tl.div_rn(moved, denom)", "moved / denom", "div.full"),
        ("triton", "rules.py", "tl.fma(tl.sqrt_rn(second)", "tl.fma(tl.sqrt(second)", "sqrt.approx"),
        ("cuda", "rules.h", "moved / denom", "__fdividef(moved, denom)", "div.approx"),
        ("cuda", "step_cuda.cu", "__builtin_assume(__isGlobal(pointer));", "", "ld."),
    ],
)
def test_forbidden_instruction_is_seen(name, file, right, wrong, seen, tmp_path):
    own = changed(compiler_of(name), file, right, wrong, tmp_path)
    own.variants = [ADAM_BF16]
    assert any(seen in text for text in forbidden(own.step(90, ADAM_BF16).ptx))


def test_shared_memory_is_seen(tmp_path):
    right, wrong = "tl.max(own.reshape(BLOCKS, 32), axis=1)", "tl.max(own.reshape(32, BLOCKS), axis=0)"
    assert changed(compiler_of("triton"), "formats.py", right, wrong, tmp_path).step(90, INT8).shared


WRONG = [
    ("triton", "multi_tensor.py", "mask = None if ALIGNED else i < end", "mask = None", "oob"),
    (
        "triton",
        "multi_tensor.py",
        "if flags & IS_ALIGNED != 0:",
        "if chunk > 0:",
        "misaligned",
    ),
    ("triton", "multi_tensor.py", "if whole < n:", "if whole == 0:", "once"),
    (
        "triton",
        "multi_tensor.py",
        "n = tl.minimum(numel - base, chunk)",
        "n = chunk + 0 * base",
        "oob",
    ),
    ("triton", "multi_tensor.py", "at = scalars + k * SCALARS", "at = scalars", "bits"),
    (
        "triton",
        "multi_tensor.py",
        "base = tl.load(entry + 1).to(tl.int64) * chunk",
        "base = tl.load(entry + 1) * chunk",
        "oob",
    ),
    ("triton", "multi_tensor.py", "f * scalar(at + 2", "scalar(at + 2", "bits"),
    ("cuda", "step_cuda.cu", "s.grad_factor *= f;", "", "bits"),
    ("triton", "rules.py", "tl.fma(minus(s[4]), v, v)", "v - s[4] * v", "bits"),
    ("triton", "rules.py", "p = tl.fma(minus(s[0]), p, p)", "p = p - s[0] * p", "bits"),
    ("triton", "rules.py", "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE", "bits"),
    (
        "cuda",
        "step_cuda.cu",
        "step_span<R, kStochastic, kMeasured, false, kCodes ? 4 : 1>(s, to, random, whole, n, squares);",
        "",
        "once",
    ),
    (
        "cuda",
        "step_cuda.cu",
        "aligned ? n / kWidth * kWidth",
        "aligned ? (n + kWidth - 1) / kWidth * kWidth",
        "oob",
    ),
    ("cuda", "step_cuda.cu", "aligned = flags & ALIGNED;", "aligned = true;", "misaligned"),
    ("cuda", "step_cuda.cu", "int(max(min(row[COL_NUMEL] - base, int64_t(chunk)), int64_t(0)))", "chunk", "oob"),
    ("cuda", "step_cuda.cu", "const ScalarRow*>(scalars)[k]", "const ScalarRow*>(scalars)[0]", "bits"),
    ("cuda", "step_cuda.cu", "int64_t(entry[1]) * chunk", "entry[1] * chunk", "oob"),
    ("cuda", "rules.h", "fma(-s.w2, v, v)", "v - s.w2 * v", "bits"),
    ("cuda", "rules.h", "p(fma(-decay, p0, p0))", "p(p0 - decay * p0)", "bits"),
    ("cuda", "rules.h", "(v > vmax || v != v)", "(v > vmax)", "bits"),
]


@needs_ptxsim
@pytest.mark.parametrize(("name", "file", "right", "wrong", "seen"), WRONG)
def test_wrong_kernel_is_seen(name, file, right, wrong, seen, tmp_path, cpu_step):
    own = changed(compiler_of(name), file, right, wrong, tmp_path)
    own.variants = [AMSGRAD]
    rows = scalar_rows(AMSGRAD.rule)
    given = tensors(AMSGRAD, [CHUNK + 700, 9, 300, 701], rows) + tensors(AMSGRAD, [600], rows, unaligned=True)
    bias = 1 << 40 if "* chunk" in right else 0
    try:
        got, _ = simulate(own.step(90, AMSGRAD), AMSGRAD, given, rows, CHUNK, bias, factor=0.5)
        rows = [(*row[:2], 0.5 * row[2], *row[3:]) for row in rows]
        outcome = "right" if same_bits(got, cpu_step(AMSGRAD, given, rows)) else "bits"
    except (gpu_kernels.ptxsim.PtxFault, AssertionError) as error:
        outcome = str(error)
    assert seen in outcome


@needs_ptxsim
@pytest.mark.parametrize(
    ("name", "file", "right", "wrong"),
    [
        ("triton", "factor.py", "(root + 1e-6)", "root"),
        ("triton", "factor.py", "own += tl.load(", "own = tl.load("),
        ("triton", "factor.py", "skipped | (tl.load(at(found)) != 0)", "skipped | (tl.load(at(found)) > 0)"),
        ("cuda", "factor.h", "(norm + 1e-6)", "norm"),
        ("cuda", "factor.h", "!(norm < HUGE_VAL)", "norm == HUGE_VAL"),
        ("cuda", "factor_cuda.cu", "width = kThreads / 2", "width = kThreads / 4"),
    ],
)
def test_wrong_factor_is_seen(name, file, right, wrong, tmp_path):
    own = changed(compiler_of(name), file, right, wrong, tmp_path)
    with pytest.raises(AssertionError):
        check_factor(own, 90)


WRONG_FORMATS = [
    # Another word, the other half of it, another multiple of it, the number of an element in the shard.
    ("triton", "formats.py", "tl.join(tl.join(w0, w2), tl", "tl.join(tl.join(w2, w0), tl", STOCHASTIC),
    ("triton", "formats.py", "n & 4 == 0, tl.where", "n & 2 == 0, tl.where", STOCHASTIC),
    ("triton", "formats.py", "tl.where(n & 4 == 0, x0, x2)", "x0", STOCHASTIC),
    ("triton", "formats.py", "w3 = exchanged(w2)", "w3 = w2", STOCHASTIC),
    ("triton", "formats.py", "tl.where(n & 1 == 0, x, exchanged(x))", "x", STOCHASTIC),
    ("triton", "formats.py", "return word & 0xFFFF", "return (word >> 16) & 0xFFFF", STOCHASTIC),
    ("triton", "formats.py", "0x9E360001 if SECOND", "0x9E350001 if SECOND", STOCHASTIC),
    ("triton", "formats.py", "base + base // run * skip", "base", STOCHASTIC),
    ("cuda", "step_cuda.cu", "kWidth < kDrawing && i & 4", "false", NARROW_AVERAGE),
    ("cuda", "step_cuda.cu", "k % 2 ? exchanged(w.x[k / 2]) :", "", STOCHASTIC),
    ("cuda", "step_cuda.cu", "i & 1 ? exchanged(word) :", "", STOCHASTIC),
    ("cuda", "formats.h", "return word & 0xffffu;", "return word >> 16;", STOCHASTIC),
    ("cuda", "formats.h", "kFactor = 0x9e36", "kFactor = 0x9e35", STOCHASTIC),
    ("cuda", "step_cuda.cu", "const uint64_t i = number(tile.i);", "const uint32_t i = number(tile.i);", STOCHASTIC),
    # The scale before the step, one with all its digits, twice the scale, that of a part of the block.
    ("triton", "formats.py", "scale = scale_of(x, mask)", "scale = tl.load(scales, mask=some)", INT8),
    ("triton", "formats.py", "(largest + 0xFFFF) & -0x10000", "largest", INT8),
    (
        "cuda",
        "step_cuda.cu",
        "scales[unsigned(tile.i) / kQuantBlock] = scale;",
        "scales[unsigned(tile.i) / kQuantBlock] = 2 * scale;",
        INT8,
    ),
    ("cuda", "step_cuda.cu", "lanes = kLanes / 2", "lanes = kLanes / 4", INT8),
    # The scale of a block with a NaN, the code of 0, another root, the number of a code.
    ("triton", "formats.py", "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE", INT8),
    ("triton", "formats.py", "inverse(scale), x), 2.0**-32 * 1.125)", "inverse(scale), x), 0.0)", INT8),
    ("triton", "formats.py", "tl.rsqrt(square)", "1.2 * tl.rsqrt(square)", INT8),
    ("cuda", "formats.h", "largest < 0x7e800000u ?", "largest < 0xffffffffu ?", INT8),
    ("cuda", "formats.h", "uint32_t(code) << 20", "uint32_t(code + 1) << 20", INT8),
    # What the master held of a parameter that something else overwrote.
    ("triton", "formats.py", "tl.where(bits(bf16(x, 0x8000)) == bits(stored), x, p)", "x", SPLIT16),
    ("cuda", "formats.h", "rounded_away(x) == p.bits ? x : load(p)", "x", SPLIT16),
]
# A moment, gradient or parameter of 0; another tensor's sign; an infinite moment.
WRONG_RULES = [
    ("triton", "rules.py", "opposed(m, p0), p0, p)", "agree(m, p0), p, p0)", CAUTIOUS_DECAY),
    ("triton", "rules.py", "tl.where(agree(m, g), 1.0, 0.0)", "tl.where(opposed(m, g), 0.0, 1.0)", CAUTIOUS_UPDATE),
    ("cuda", "rules.h", "opposed(m, p0) ? p0 : p", "agree(m, p0) ? p : p0", CAUTIOUS_DECAY),
    ("cuda", "rules.h", "opposed(m, p0) ?", "opposed(x.g, p0) ?", CAUTIOUS_DECAY),
    ("cuda", "rules.h", "moved *= agree(m, x.g) ? T(1) : T(0);", "moved *= T(!opposed(m, x.g));", CAUTIOUS_UPDATE),
    ("cuda", "rules.h", "moved *= agree(m, x.g) ? T(1) : T(0);", "moved = agree(m, x.g) ? m : T(0);", CAUTIOUS_UPDATE),
    # A bound, a NaN, the moment that is divided by.
    ("triton", "rules.py", "rate > s[10], s[10], rate", "rate > s[9], s[10], rate", ADABOUND),
    ("triton", "rules.py", "tl.where(rate < s[6], s[6], rate)", "tl.where(rate > s[6], rate, s[6])", ADABOUND),
    ("triton", "rules.py", "tl.sqrt_rn(second) + s[7]", "tl.sqrt_rn(v) + s[7]", AMSBOUND),
    ("cuda", "rules.h", "rate > s.hi ? s.hi : rate", "rate", ADABOUND),
    ("cuda", "rules.h", "rate < lo ? lo : rate", "rate > lo ? rate : lo", ADABOUND),
    ("cuda", "rules.h", "std::sqrt(second) + s.eps", "std::sqrt(v) + s.eps", AMSBOUND),
    # Another second moment; a first moment that is something else than the gradient.
    (
        "triton",
        "multi_tensor.py",
        "adam(s, p, g, tl.zeros_like(g), m,",
        "adam(s, p, g, tl.zeros_like(g), m + m,",
        NO_FIRST,
    ),
    ("cuda", "rules.h", "T m = 0, vmax = 0;\n    s.w1 = 1;", "T m = g0, vmax = 0;\n    s.w1 = 1 / T(2);", NO_FIRST),
]


# The weight of another scalar; the parameter after it was rounded, or before it was stepped.
WRONG_AVERAGES = [
    ("triton", "multi_tensor.py", "lerp(average, p, s[SCALAR_EMA])", "lerp(average, p, s[SCALAR_W2])", AVERAGED[0]),
    ("triton", "multi_tensor.py", "lerp(average, p, s", "lerp(average, p.to(P_DTYPE).to(tl.float32), s", AVERAGED[5]),
    ("triton", "multi_tensor.py", "lerp(average, p, s", "lerp(p, average, s", AVERAGED[1]),
    ("cuda", "step_cuda.cu", "to.weight = numbers.x[SCALAR_EMA];", "to.weight = numbers.x[SCALAR_W2];", AVERAGED[0]),
    ("cuda", "step_cuda.cu", "stepped.x[k] = x;", "stepped.x[k] = load(p.x[k]);", AVERAGED[5]),
    ("cuda", "step_cuda.cu", "lerp(x.x[k], p.x[k], weight)", "fma(weight, p.x[k] - x.x[k], x.x[k])", AVERAGED[1]),
    # The parameter's words; rounding to nearest; another step's words; the other half of them.
    ("triton", "multi_tensor.py", "start, ALIGNED, AVERAGES)", "start, ALIGNED)", NARROW_AVERAGE),
    ("triton", "multi_tensor.py", "bf16(average, for_parameter(word))", "average.to(tl.bfloat16)", NARROW_AVERAGE),
    ("cuda", "step_cuda.cu", "random.words(tile, kAverageWords)", "random.words(tile)", NARROW_AVERAGE),
    ("cuda", "step_cuda.cu", "to.step = numbers.x[SCALAR_STEP];", "to.step = 1;", NARROW_AVERAGE),
    (
        "cuda",
        "step_cuda.cu",
        "x.x[k], for_parameter(words.x[k]));\n  tile",
        "x.x[k], words.x[k] >> 16);\n  tile",
        NARROW_AVERAGE,
    ),
]


@needs_ptxsim
@pytest.mark.parametrize(("name", "file", "right", "wrong", "variant"), WRONG_FORMATS + WRONG_RULES + WRONG_AVERAGES)
def test_wrong_format_or_rule_is_seen(name, file, right, wrong, variant, tmp_path, cpu_step):
    own = changed(compiler_of(name), file, right, wrong, tmp_path)
    own.variants = [variant]
    rows = scalar_rows(variant.rule)
    given = tensors(variant, [2 * 2048 + 700, 300], rows, places=PLACES[1:4:2])
    given += tensors(variant, [600], rows, unaligned=True, places=PLACES[4:])
    got, _ = simulate(own.step(90, variant), variant, given, rows, 2048)
    assert not same_bits(got, cpu_step(variant, given, rows))
