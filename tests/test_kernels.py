"""The compiled kernels of both GPU backends without a GPU: what the compiler made of them, and their PTX executed.

One table of cases for Triton and CUDA C++, against the CPU kernel, bit by bit.
"""

import importlib.util
import shutil

import numpy as np
import pytest

from fused_adamw import launch, scalars
from tests import gpu_kernels
from tests.gpu_kernels import (
    ADAM,
    ADAM_ALL_BF16,
    ADAM_BF16,
    AMSGRAD,
    BLOCK,
    CHUNK,
    EXECUTED,
    LAYOUTS,
    MOMENTUM,
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


# ---- What came out of the compiler.


@pytest.mark.parametrize("variant", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "sm"), ON)
def test_compiled_code(name, sm, variant):
    compiled = compiler_of(name).step(sm, variant)
    check_resources(compiled)
    wide = [compiled.width * d.itemsize for d in variant.streams]  # bytes per access of a stream on the full path
    assert max(wide) == 16 or name == "triton"
    for kind, sizes in (("ld", wide), ("st", wide[:1] + wide[2:])):
        accesses = gpu_kernels.vectors(compiled.ptx, kind)
        assert set(accesses) == set(sizes)
        # A loop that the compiler unrolled has its accesses several times over.
        assert all(accesses.count(size) % sizes.count(size) == 0 for size in sizes)


def check_resources(compiled):
    assert compiled.registers <= 64  # 32 warps on a multiprocessor
    assert compiled.frame == compiled.shared == 0
    assert not forbidden(compiled.ptx)


@pytest.mark.slow
def test_every_cuda_kernel():
    """All mixes of dtypes, for one architecture."""
    every = type(compiler_of("cuda"))()
    every.variants = []
    compiled = every.module(90)
    steps = [kernel for name, kernel in compiled.items() if name.startswith("step_kernel")]
    assert len(steps) == 3 * 27 + 9
    for kernel in steps:
        check_resources(kernel)


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
@pytest.mark.parametrize("sm", EXECUTED)
def test_beyond_32_bits(compiler, sm, cpu_step):
    rows = scalar_rows("adam")
    given = tensors(ADAM_BF16, [2 * CHUNK + 77], rows)
    got, _ = simulate(compiler.step(sm, ADAM_BF16), ADAM_BF16, given, rows, CHUNK, bias=1 << 40)
    assert same_bits(got, cpu_step(ADAM_BF16, given, rows))


@needs_ptxsim
@pytest.mark.parametrize(
    ("variant", "minimum"), [(ADAM, 28), (ADAM_BF16, 22), (MOMENTUM, 20), (ADAM_ALL_BF16, 14)], ids=str
)
@pytest.mark.parametrize("sm", EXECUTED)
def test_bytes(compiler, sm, variant, minimum):
    n = 1 << 18
    compiled, rows = compiler.step(sm, variant), scalar_rows(variant.rule)
    _, result = simulate(compiled, variant, tensors(variant, [n], rows), rows, launch.chunk_size(1 << 30), race=False)
    memory = [i for i in result.s.mem_ins if i["lanes"]]
    # Distinct bytes of each warp: all lanes read the same entry of a table, and that is one request.
    requested = sum(i["eff"] * 32 * i["sectors"] for i in memory)
    assert minimum <= requested / n <= 1.01 * minimum
    assert 32 * sum(i["sectors"] for i in memory) <= 1.02 * minimum * n
    wide = {i["bytes_per_lane"] for i in memory if i["lanes"] * i["bytes_per_lane"] > n / 8}
    assert wide == {compiled.width * d.itemsize for d in variant.streams}
    for i in memory:
        if i["bytes_per_lane"] in wide and i["text"].startswith(("ld.global.v", "st.global.v")):
            assert i["eff"] >= 0.99, i
    if minimum >= 20:
        assert result.s.load_eff >= 0.99, "tables included"
    assert result.s.store_eff >= 0.99


@needs_ptxsim
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("sm", EXECUTED)
def test_scalars_on_the_device(compiler, sm, adam):
    """Equal to ``scalars.py`` in every bit, which rounds once what it has computed in double."""
    steps = [1.0, 2.0, 7.0, 1000.0, 123457.0]
    base = {"lr": 3e-3, "base_lr": 0.1, "maximize": True, "decoupled_weight_decay": True, "weight_decay": 0.1}
    groups = []
    if adam:
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
    rule = "adam" if adam else "sgd"
    cases_of = [(group, step) for group in groups for step in steps]
    mem = gpu_kernels.ptxsim.GlobalMemory(1 << 24)
    counters = mem.upload(np.array([step - 1 for _, step in cases_of], np.float32), "counters")
    out = mem.alloc(len(cases_of) * 32, "out", np.float32)
    tables = [
        mem.upload(np.array([scalars.HYPER[rule](group) for group, _ in cases_of]), readonly=True),
        mem.upload(counters.addr + 4 * np.arange(len(cases_of)), readonly=True),
    ]
    count = [] if compiler.name == "triton" else [len(cases_of)]
    launched = [mem.upload(np.array([factor], np.float32), readonly=True) for factor in (1.0, -1.0)]
    for factor in launched:  # the second leaves all as it is
        args = [*tables, factor, out, *count]
        compiler.scalars(sm, adam).launch(mem, compiler.blocks(len(cases_of)), args)
    expected = [list(scalars.ROWS[rule](group, step)) for group, step in cases_of]
    np.testing.assert_array_equal(out.get().reshape(-1, 8), np.array(expected, np.float32))
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
@pytest.mark.parametrize("variant", [ADAM, ADAM_ALL_BF16, VARIANTS[3]], ids=str)
@pytest.mark.parametrize("sm", EXECUTED)
def test_sums_of_squares(compiler, sm, variant):
    """Of each chunk, within the roundings of a sum in double; every gradient is read once, 16 bytes at a time."""
    compiled = compiler.squares(sm, variant.g)
    assert max(gpu_kernels.vectors(compiled.ptx, "ld")) == 16
    rows = scalar_rows(variant.rule)
    given = tensors(variant, SIZES, rows) + tensors(variant, [1, 7, 600, CHUNK + 1], rows, seed=1, unaligned=True)
    for t in given:
        t.data[1] = t.data[1].nan_to_num(0.5, 60000.0, -3e-7)
    sums = gpu_kernels.sums_of_squares(compiled, given, CHUNK)
    chunks = [c.double() for t in given for c in (t.data[1].split(CHUNK) if len(t.data[1]) else [t.data[1]])]
    expected = [(c * c).sum().item() for c in chunks]
    np.testing.assert_allclose(sums, expected, rtol=1e-13)


# ---- The tests see a wrong kernel.


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong", "seen"),
    [
        (
            "triton",
            "multi_tensor.py",
            '"num_warps": NUM_WARPS, "enable_fp_fusion": False',
            '"enable_fp_fusion": True',
            ".f32",
        ),
        ("triton", "rules.py", "tl.div_rn(m, denom)", "m / denom", "div.full"),
        ("triton", "rules.py", "tl.sqrt_rn(second)", "tl.sqrt(second)", "sqrt.approx"),
        ("cuda", "rules.h", "m / denom", "__fdividef(m, denom)", "div.approx"),
        ("cuda", "step_cuda.cu", "__builtin_assume(__isGlobal(pointer));", "", "ld."),
    ],
)
def test_forbidden_instruction_is_seen(name, file, right, wrong, seen, tmp_path):
    compiled = changed(compiler_of(name), file, right, wrong, tmp_path).step(90, ADAM_BF16)
    assert any(seen in text for text in forbidden(compiled.ptx))


def test_shared_memory_is_seen(tmp_path):
    own = changed(compiler_of("triton"), "multi_tensor.py", '"TAIL": 2 * threads,', '"TAIL": 4 * threads,', tmp_path)
    assert own.step(90, ADAM).shared


WRONG = [
    ("triton", "multi_tensor.py", "mask = None if ALIGNED else i < end", "mask = None", "oob"),
    (
        "triton",
        "multi_tensor.py",
        "if tl.load(row + 7) & 1 != 0:\n        whole = n // BLOCK * BLOCK\n    # In",
        "if chunk > 0:\n        whole = n // BLOCK * BLOCK\n    # In",
        "misaligned",
    ),
    ("triton", "multi_tensor.py", "if whole < n:", "if whole == 0:", "once"),
    ("triton", "multi_tensor.py", "n = tl.minimum(tl.load(row + 5) - base, chunk)", "n = chunk + 0 * base", "oob"),
    ("triton", "multi_tensor.py", "scalars + tl.load(row + 6) * 8", "scalars + tl.load(row + 6) * 0", "bits"),
    (
        "triton",
        "multi_tensor.py",
        "base = tl.load(entry + 1).to(tl.int64) * chunk",
        "base = tl.load(entry + 1) * chunk",
        "oob",
    ),
    ("triton", "multi_tensor.py", "f * tl.load(at + 2)", "tl.load(at + 2)", "bits"),
    ("cuda", "step_cuda.cu", "s.grad_factor *= *factor;", "", "bits"),
    ("triton", "rules.py", "tl.fma(-s[4], v, v)", "v - s[4] * v", "bits"),
    ("triton", "rules.py", "p = tl.fma(-s[0], p, p)", "p = p - s[0] * p", "bits"),
    ("triton", "rules.py", "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE", "bits"),
    ("cuda", "step_cuda.cu", "step_span<R, 1>(s, to, whole, c.n);", "", "once"),
    (
        "cuda",
        "step_cuda.cu",
        "row[7] & 1 ? n / kWidth * kWidth",
        "row[7] & 1 ? (n + kWidth - 1) / kWidth * kWidth",
        "oob",
    ),
    ("cuda", "step_cuda.cu", "row[7] & 1 ?", "true ?", "misaligned"),
    ("cuda", "step_cuda.cu", "int(min(row[5] - base, int64_t(chunk)))", "chunk", "oob"),
    ("cuda", "step_cuda.cu", "scalars + c.row[6] * kScalars", "scalars", "bits"),
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
