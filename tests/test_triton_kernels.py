"""The Triton kernels without a GPU: compiled for every architecture, their PTX executed against the CPU kernel.

Where ``../shared/ptxsim`` (a PTX interpreter with the checks of a sanitizer) is missing, nothing is executed
but by Triton's own interpreter.
"""

import ctypes
import importlib
import math
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fused_adamw import scalars  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PTXSIM = ROOT.parent / "shared" / "ptxsim"
if PTXSIM.is_dir():
    sys.path.append(str(PTXSIM))
    import ptxsim
needs_ptxsim = pytest.mark.skipif(not PTXSIM.is_dir(), reason="needs ../shared/ptxsim")


def load_kernels(folder: Path, name: str) -> types.ModuleType:
    """``multi_tensor`` of a folder of kernels; by folder, so that changed copies of it load as well."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return importlib.import_module(f"{name}.multi_tensor")


kernels = load_kernels(ROOT / "triton_kernels", "_triton_kernels")

F32, BF16, F16 = tl.float32, tl.bfloat16, tl.float16
TORCH = {F32: torch.float32, BF16: torch.bfloat16, F16: torch.float16}
FORMATS = {F32: 0, BF16: 2, F16: 3}  # of csrc/formats.h
STATES = {"adam": 2, "adam_amsgrad": 3, "sgd": 0, "sgd_momentum": 1}
ADAM = kernels.Variant("adam", F32, F32, F32)
ADAM_BF16 = kernels.Variant("adam", BF16, BF16, F32)
MOMENTUM = kernels.Variant("sgd_momentum", F32, F32, F32)
VARIANTS = [
    ADAM,
    ADAM_BF16,
    kernels.Variant("adam", BF16, BF16, BF16),
    kernels.Variant("adam", F16, F16, F16),
    kernels.Variant("adam", F32, BF16, F16),
    kernels.Variant("adam_amsgrad", F32, F32, F32),
    kernels.Variant("adam_amsgrad", F16, F32, BF16),
    kernels.Variant("sgd", F32, F32, F32),
    kernels.Variant("sgd", BF16, F16, F32),
    MOMENTUM,
    kernels.Variant("sgd_momentum", BF16, BF16, F32),
    kernels.Variant("sgd_momentum", F16, F32, F16),
]
# The layouts that differ, each rule at least once: what is compiled for every architecture.
LAYOUTS = [VARIANTS[i] for i in (0, 1, 2, 6, 8, 9)]
SMS = (80, 86, 89, 90, 100, 120)
TARGETS = [GPUTarget("cuda", sm, 32) for sm in SMS] + [GPUTarget("hip", "gfx942", 64)]


def title(x: object) -> str:
    if isinstance(x, GPUTarget):
        return f"sm_{x.arch}" if x.backend == "cuda" else str(x.arch)
    return f"{x.rule}-{x.p_dtype}-{x.g_dtype}-{x.state_dtype}"


def streams(variant) -> list[tl.dtype]:
    """The dtypes of p, g and the states."""
    return [variant.p_dtype, variant.g_dtype] + [variant.state_dtype] * STATES[variant.rule]


# ---- What came out of the compiler.


@pytest.mark.parametrize("variant", LAYOUTS, ids=title)
@pytest.mark.parametrize("arch", TARGETS, ids=title)
def test_compiled_code(arch, variant, tmp_path):
    compiled = kernels.compile_for(arch, variant)
    bits = [dtype.primitive_bitwidth for dtype in streams(variant)]
    wide = [4 * b // 8 for b in bits]  # bytes per access of a stream on the full path: 16, or 8
    written = wide[:1] + wide[2:]
    assert compiled.metadata.shared == 0
    if arch.backend == "hip":
        asm = compiled.asm["amdgcn"]
        for what in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"):
            assert set(re.findall(rf"\.{what}:\s+(\d+)", asm)) == {"0"}, what
        assert int(re.search(r"\.vgpr_count:\s+(\d+)", asm)[1]) <= 64  # 8 waves on a SIMD
        assert not re.findall(r"\b(?:flat|scratch)_(?:load|store)_\w+", asm)
        for kind, sizes in (("load", wide), ("store", written)):
            for size in (8, 16):  # unrolled loops and table entries add to them
                assert len(re.findall(rf"\bglobal_{kind}_dwordx{size // 4}\b", asm)) >= sizes.count(size)
        return

    registers, frame, local, shared = resources(compiled, tmp_path)
    assert registers <= 64  # 32 warps on a multiprocessor
    assert frame == local == 0
    assert shared <= 1024  # what sm_90 and later reserve for themselves
    ptx = compiled.asm["ptx"]
    assert not forbidden(ptx)
    for kind, sizes in (("ld", wide), ("st", written)):
        vectors = [int(n) * int(b) // 8 for n, b in re.findall(rf"{kind}\.global\.v(\d)\.b(\d+)", ptx)]
        assert sorted(vectors) == sorted(sizes)


def forbidden(ptx: str) -> list[str]:
    """Instructions that are not in global memory, do not round once, or may be contracted."""
    memory = r"(?:ld|st)\.(?:local|shared|v\d|[bfsu]\d+)"  # without a space: a generic address
    rounding = r"div\.(?:full|approx)|sqrt\.approx|\w+\.ftz|(?:mul|add|sub)\.f32"
    return re.findall(rf"\b(?:{memory}|bar\.sync|{rounding})\b[^;]*", ptx)


def resources(compiled, folder: Path) -> tuple[int, ...]:
    """(registers, stack, local, shared) of a cubin."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"\b{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL", "SHARED"))


# ---- The compiled PTX, executed.


@dataclass
class Tensor:
    """A row of a launch: p, g and the states."""

    data: list[torch.Tensor]
    offsets: list[int]  # bytes by which each lies off a multiple of 256
    scalars: int


SPECIAL = [0.0, -0.0, 1e-45, -3e-39, 6e-8, 1e-20, 65519.0, 65520.0, -3e38, math.inf, -math.inf, math.nan]


def tensors(variant, sizes, rows, seed=0, unaligned=False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(k: int, n: int, dtype: tl.dtype) -> torch.Tensor:
        x = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-6, 1, generator=generator)
        if n > 8:  # special values in a tenth of the elements
            at = torch.randperm(n, generator=generator)[: n // 10]
            x[at] = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (len(at),), generator=generator)]
        return (x.abs() if k >= 3 else x).to(TORCH[dtype])

    made = []
    for i, n in enumerate(sizes):
        dtypes = streams(variant)
        offsets = [
            (1 + (i * 5 + k * 3) % 40) * d.primitive_bitwidth // 8 if unaligned else 0 for k, d in enumerate(dtypes)
        ]
        made.append(Tensor([make(k, n, d) for k, d in enumerate(dtypes)], offsets, i % len(rows)))
    return made


def scalar_rows(rule: str) -> list[tuple[float, ...]]:
    if rule.startswith("adam"):
        return [
            (2e-2, 0.0, 1.0, 0.1, 0.001, 1e-2, 31.6, 1e-8),  # AdamW
            (0.0, 1e-2, 1.0, 1e-1, 1e-3, 3e-3, 1.7, 1e-8),  # Adam, L2
            (3e-7, 0.0, -0.125, 0.7, 0.5, 1e-4, 1.0, 1e-15),  # maximize, scaled gradients, small betas
            (0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0),  # betas = lr = eps = 0
        ]
    plain, momentum = rule == "sgd", 0.9
    return [
        (2e-2, 0.0, 1.0, momentum, 1.0, 1e-1, 1.0 if plain else 0.0, 0.0 if plain else 1.0),  # torch
        (
            0.0,
            1e-2,
            -1.0,
            momentum,
            0.5,
            1e-2,
            1.0 if plain else 0.0,
            0.0 if plain else 1.0,
        ),  # L2, dampening, maximize
        (1e-6, 0.0, 1.0, momentum, 1.0, 3e-2, 1.0, 0.0 if plain else momentum),  # nesterov
        (1e-5, 0.0, 1.0, momentum, 0.1, 1.0, 0.1 if plain else 0.0, 0.0 if plain else 1.0),  # Algorithm 1
    ]


@pytest.fixture(scope="module")
def cpu_step(tmp_path_factory):
    """cpu_step(variant, tensors, scalar rows) -> stepped p and states of each, by the CPU kernel."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "step.cpp").write_text(
        f'#include "{ROOT}/csrc/step_cpu.cpp"\n'
        'extern "C" void fused_step(const fused_adamw::Row* rows, int64_t n, const double* scalars) {\n'
        "  fused_adamw::step_cpu(rows, n, scalars, 0);\n}\n"
    )
    flags = ["-O1", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, "-o", folder / "step.so", folder / "step.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "step.so"))

    def step(variant, given, rows):
        results = [[x.clone() for x in t.data] for t in given]
        kinds = [list(STATES).index(variant.rule)]
        kinds += [FORMATS[d] for d in (variant.p_dtype, variant.g_dtype, variant.state_dtype)]
        table = np.zeros(len(given), "u8,u8,3u8,i8,i4,4u1")
        for i, (t, data) in enumerate(zip(given, results, strict=True)):
            p, g, *states = (x.data_ptr() for x in data)
            table[i] = (p, g, states + [0] * (3 - len(states)), data[0].numel(), t.scalars, kinds)
        numbers = np.array(rows, np.float32).astype(np.float64)
        library.fused_step(
            ctypes.c_void_p(table.ctypes.data),
            ctypes.c_int64(len(table)),
            ctypes.c_void_p(numbers.ctypes.data),
        )
        return [[x for k, x in enumerate(data) if k != 1] for data in results]

    return step


def simulate(compiled, variant, given, rows, chunk, bias=0, **options):
    """(stepped p and states of each, ptxsim's result); a ``bias`` moves all tensors up by as many elements."""
    mem = ptxsim.GlobalMemory(1 << 26)
    buffers, table, chunks = [], [], []
    for i, t in enumerate(given):
        n = t.data[0].numel()
        own = [
            mem.upload(x, f"{i}.{k}", offset=offset, readonly=k == 1)
            for k, (x, offset) in enumerate(zip(t.data, t.offsets, strict=True))
        ]
        aligned = not any(b.addr % 16 for b in own)
        p, g, *states = (b.addr - bias * x.element_size() for b, x in zip(own, t.data, strict=True))
        table.append([p, g, *states, *[0] * (3 - len(states)), n + bias, t.scalars, int(aligned)])
        chunks += [[i, bias // chunk + c] for c in range(max(1, -(-n // chunk)))]
        buffers.append(own)
    tables = [
        mem.upload(np.array(x, dtype), name, readonly=True)
        for x, dtype, name in (
            (table, np.int64, "rows"),
            (chunks, np.int32, "chunks"),
            (rows, np.float32, "scalars"),
        )
    ]
    result = ptxsim.launch_triton(compiled, len(chunks), [*tables, chunk], mem, **options)
    stepped = []
    for i, (own, t) in enumerate(zip(buffers, given, strict=True)):
        stepped.append([])
        for k, (b, x) in enumerate(zip(own, t.data, strict=True)):
            loads, stores = result.s.per_buffer.get(b.name, (0, 0))
            assert loads == b.nbytes, f"{b.name}: every byte is read once"
            assert stores == (0 if k == 1 else b.nbytes), f"{b.name}: every byte is written once"
            if k != 1:
                assert b.written().all()
                stepped[i].append(torch.from_numpy(b.raw().copy()).view(x.dtype) if x.numel() else x)
    return stepped, result


def same_bits(got: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    """Whether all bits agree; any NaN is as good as another."""
    for a, b in zip((x for t in got for x in t), (x for t in expected for x in t), strict=True):
        integer = torch.int32 if a.element_size() == 4 else torch.int16
        if not ((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all():
            return False
    return True


CHUNK = 4096
EXECUTED = [GPUTarget("cuda", sm, 32) for sm in (80, 90, 120)]


BLOCK = 512
EDGES = [n + d for n in (BLOCK, CHUNK, CHUNK + BLOCK) for d in (-1, 0, 1)]
SIZES = [0, 1, 7, 255, 256, 257, *EDGES, 3 * CHUNK + 77]


@needs_ptxsim
@pytest.mark.parametrize("variant", VARIANTS, ids=title)
@pytest.mark.parametrize("arch", EXECUTED, ids=title)
def test_bits(arch, variant, cpu_step):
    compiled, rows = kernels.compile_for(arch, variant), scalar_rows(variant.rule)
    given = tensors(variant, SIZES, rows)
    given += tensors(variant, [1, 7, 600, CHUNK + 1], rows, seed=1, unaligned=True)
    got, _ = simulate(compiled, variant, given, rows, CHUNK)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
@pytest.mark.parametrize("variant", [ADAM, ADAM_BF16], ids=title)
def test_alignment(variant, cpu_step):
    compiled, rows = kernels.compile_for(EXECUTED[1], variant), scalar_rows(variant.rule)
    given = tensors(variant, [600] * 41, rows)
    for i, t in enumerate(given):  # one stream of each slides, a single one off 16 bytes is enough
        t.offsets[i % len(t.offsets)] = i * t.data[i % len(t.offsets)].element_size()
    got, _ = simulate(compiled, variant, given, rows, CHUNK)
    assert same_bits(got, cpu_step(variant, given, rows))


@needs_ptxsim
@pytest.mark.parametrize("order", ["linear", "reverse", "random"])
def test_200_tensors_in_four_groups(order, cpu_step):
    compiled, rows = kernels.compile_for(EXECUTED[1], ADAM), scalar_rows("adam")
    given = tensors(ADAM, [1 + (i * 37) % 700 for i in range(200)], rows)
    got, _ = simulate(compiled, ADAM, given, rows, 2048, order=order)
    assert same_bits(got, cpu_step(ADAM, given, rows))


@needs_ptxsim
@pytest.mark.parametrize("arch", EXECUTED, ids=title)
def test_beyond_32_bits(arch, cpu_step):
    compiled, rows = kernels.compile_for(arch, ADAM_BF16), scalar_rows("adam")
    given = tensors(ADAM_BF16, [2 * CHUNK + 77], rows)
    got, _ = simulate(compiled, ADAM_BF16, given, rows, CHUNK, bias=1 << 40)
    assert same_bits(got, cpu_step(ADAM_BF16, given, rows))


@needs_ptxsim
@pytest.mark.parametrize(
    ("variant", "minimum"),
    [(ADAM, 28), (ADAM_BF16, 22), (MOMENTUM, 20), (kernels.Variant("adam", BF16, BF16, BF16), 14)],
    ids=["adam-28", "adam-bf16-22", "momentum-20", "adam-all-bf16-14"],
)
@pytest.mark.parametrize("arch", EXECUTED, ids=title)
def test_bytes(arch, variant, minimum):
    n = 1 << 18
    compiled, rows = kernels.compile_for(arch, variant), scalar_rows(variant.rule)
    _, result = simulate(compiled, variant, tensors(variant, [n], rows), rows, kernels.chunk_size(1 << 30), race=False)
    memory = [i for i in result.s.mem_ins if i["lanes"]]
    # Distinct bytes of each warp: all lanes read the same entry of a table, and that is one request.
    requested = sum(i["eff"] * 32 * i["sectors"] for i in memory)
    assert minimum <= requested / n <= 1.01 * minimum
    assert 32 * sum(i["sectors"] for i in memory) <= 1.02 * minimum * n
    wide = {i["bytes_per_lane"] for i in memory if i["lanes"] * i["bytes_per_lane"] > n}
    assert wide == {d.primitive_bitwidth // 2 for d in streams(variant)}
    for i in memory:
        if i["bytes_per_lane"] in wide and i["text"].startswith(("ld.global.v", "st.global.v")):
            assert i["eff"] >= 0.99, i
    if minimum >= 20:
        assert result.s.load_eff >= 0.99, "tables included"
    assert result.s.store_eff >= 0.99


@needs_ptxsim
def test_fusion_would_find_nothing(cpu_step, tmp_path):
    """Every product that is added to something is an explicit fma already, in case a compiler ignores the option."""
    fused = changed_kernels(
        "multi_tensor.py",
        'NUM_WARPS, "enable_fp_fusion": False',
        'NUM_WARPS, "enable_fp_fusion": True',
        tmp_path,
    )
    for variant in (ADAM, MOMENTUM):
        rows = scalar_rows(variant.rule)
        given = tensors(variant, [CHUNK + 700], rows)
        got, _ = simulate(fused.compile_for(EXECUTED[1], variant), variant, given, rows, CHUNK, fuse=True)
        assert same_bits(got, cpu_step(variant, given, rows))


INTERPRETED = """
import importlib, sys, types
import torch
package = types.ModuleType("kernels")
package.__path__ = [sys.argv[1]]
sys.modules["kernels"] = package
kernels = importlib.import_module("kernels.multi_tensor")
launches = torch.load(sys.argv[2])
for rule, data, scalars, chunk in launches:
    variant = kernels.Variant(rule, *[kernels.tl.float32] * 3)
    rows = [[*(t.data_ptr() for t in x), *[0] * (5 - len(x)), x[0].numel(), i % 4, 1] for i, x in enumerate(data)]
    chunks = [[i, c] for i, x in enumerate(data) for c in range(-(-x[0].numel() // chunk))]
    constexprs, options = kernels.config(variant, 32)
    tables = torch.tensor(rows), torch.tensor(chunks, dtype=torch.int32), torch.tensor(scalars)
    kernels.step_kernel[(len(chunks),)](*tables, chunk, **constexprs, **options)
torch.save(launches, sys.argv[2])
"""


def test_interpreter(tmp_path, cpu_step):
    """The logic only: the interpreter of triton 3.8 rounds twice where an fma rounds once."""
    launches, expected = [], []
    for rule in STATES:
        variant, rows = kernels.Variant(rule, F32, F32, F32), scalar_rows(rule)
        given = tensors(variant, [1, 700, 2100], rows)
        for t in given:
            t.data = [x.clamp(-1, 1).nan_to_num() for x in t.data]
        launches.append((rule, [t.data for t in given], rows, 1024))
        expected.append(cpu_step(variant, given, rows))
    torch.save(launches, tmp_path / "data")
    command = [sys.executable, "-c", INTERPRETED, str(ROOT / "triton_kernels"), str(tmp_path / "data")]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    for (_, stepped, _, _), results in zip(torch.load(tmp_path / "data"), expected, strict=True):
        for data, result in zip(stepped, results, strict=True):
            for x, y in zip(data[:1] + data[2:], result, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@needs_ptxsim
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("arch", EXECUTED, ids=title)
def test_scalars_on_the_device(arch, adam):
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
    mem = ptxsim.GlobalMemory(1 << 24)
    counters = mem.upload(np.array([step - 1 for _, step in cases_of], np.float32), "counters")
    out = mem.alloc(len(cases_of) * 32, "out", np.float32)
    tables = [
        mem.upload(np.array([scalars.HYPER[rule](group) for group, _ in cases_of]), readonly=True),
        mem.upload(counters.addr + 4 * np.arange(len(cases_of)), readonly=True),
    ]
    compiled = kernels.compile_scalars_for(arch, adam)
    ptxsim.launch_triton(compiled, len(cases_of), [*tables, out], mem)
    expected = [list(scalars.ROWS[rule](group, step)) for group, step in cases_of]
    np.testing.assert_array_equal(out.get().reshape(-1, 8), np.array(expected, np.float32))
    np.testing.assert_array_equal(counters.get(), np.array([step for _, step in cases_of], np.float32))


# ---- The tests see a wrong kernel.


def changed_kernels(file: str, right: str, wrong: str, folder: Path) -> types.ModuleType:
    for path in (ROOT / "triton_kernels").glob("*.py"):
        text = path.read_text()
        if path.name == file:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        (folder / path.name).write_text(text)
    return load_kernels(folder, f"_changed_{folder.name}")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "seen"),
    [
        (
            "multi_tensor.py",
            '"num_warps": NUM_WARPS, "enable_fp_fusion": False',
            '"enable_fp_fusion": True',
            ".f32",
        ),
        ("rules.py", "tl.div_rn(m, denom)", "m / denom", "div.full"),
        ("rules.py", "tl.sqrt_rn(second)", "tl.sqrt(second)", "sqrt.approx"),
        ("multi_tensor.py", '"TAIL": 2 *', '"TAIL": 4 *', "shared"),
    ],
)
def test_forbidden_instruction_is_seen(file, right, wrong, seen, tmp_path):
    compiled = changed_kernels(file, right, wrong, tmp_path).compile_for(EXECUTED[1], ADAM)
    assert any(seen in text for text in forbidden(compiled.asm["ptx"]))


@needs_ptxsim
@pytest.mark.parametrize(
    ("file", "right", "wrong", "seen"),
    [
        ("multi_tensor.py", "mask = None if ALIGNED else i < end", "mask = None", "oob"),
        ("multi_tensor.py", "if tl.load(row + 7) & 1 != 0:", "if chunk > 0:", "misaligned"),
        ("multi_tensor.py", "if whole < n:", "if whole == 0:", "once"),
        ("multi_tensor.py", "n = tl.minimum(tl.load(row + 5) - base, chunk)", "n = chunk + 0 * base", "oob"),
        ("multi_tensor.py", "scalars + tl.load(row + 6) * 8", "scalars + tl.load(row + 6) * 0", "bits"),
        (
            "multi_tensor.py",
            "base = tl.load(entry + 1).to(tl.int64) * chunk",
            "base = tl.load(entry + 1) * chunk",
            "oob",
        ),
        ("rules.py", "tl.fma(-s[4], v, v)", "v - s[4] * v", "bits"),
        ("rules.py", "p = tl.fma(-s[0], p, p)", "p = p - s[0] * p", "bits"),
        ("rules.py", "propagate_nan=tl.PropagateNan.ALL", "propagate_nan=tl.PropagateNan.NONE", "bits"),
    ],
)
def test_wrong_kernel_is_seen(file, right, wrong, seen, tmp_path, cpu_step):
    changed = changed_kernels(file, right, wrong, tmp_path)
    variant = kernels.Variant("adam_amsgrad", F32, F32, F32)
    compiled, rows = changed.compile_for(EXECUTED[1], variant), scalar_rows(variant.rule)
    given = tensors(variant, [CHUNK + 700, 9, 300], rows) + tensors(variant, [600], rows, unaligned=True)
    bias = 1 << 40 if "base =" in wrong else 0
    try:
        got, _ = simulate(compiled, variant, given, rows, CHUNK, bias)
        outcome = "right" if same_bits(got, cpu_step(variant, given, rows)) else "bits"
    except (ptxsim.PtxFault, AssertionError) as error:
        outcome = str(error)
    assert seen in outcome
