"""What the tests of the compiled GPU kernels share: both compilers, inputs, the CPU kernel, the launch in an emulator.

``../shared/ptxsim`` is an interpreter of PTX with the checks of a sanitizer; where it is missing, kernels are compiled
and looked at, but not executed.
"""

import ctypes
import functools
import importlib
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from fused_adamw import backends, contract
from fused_adamw.contract import FAMILIES, STATES, second_moment_of
from fused_adamw.layout import COLUMNS, SCALARS
from fused_adamw.tensors import NOT_SHARDED
from tests import cases

ROOT = Path(__file__).resolve().parents[1]
PTXSIM = ROOT.parent / "shared" / "ptxsim"
if PTXSIM.is_dir():
    sys.path.append(str(PTXSIM))
    import ptxsim
needs_ptxsim = pytest.mark.emulator

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
FORMATS = {F32: 0, BF16: 2, F16: 3, I8: 4}  # of csrc/formats.h
MASTERS = ["none", "kahan", "split16", "fp32"]
QUANT_BLOCK = 128
SEED = 0x123456789ABCDEF


class Variant(contract.Variant):
    """With what the tests ask of it."""

    def __str__(self) -> str:
        formats = [self.master] * (self.master != "none") + ["stochastic"] * self.stochastic
        formats += {None: [], F32: ["ema"], BF16: ["ema_bfloat16"]}[self.ema]
        formats += ["measured"] * self.measured
        return "-".join([self.rule, *(str(d).removeprefix("torch.") for d in self[1:4]), *formats])

    @property
    def averages(self) -> list[torch.dtype]:
        """The dtype of the average."""
        return [] if self.ema is None else [self.ema]

    @property
    def extra(self) -> list[torch.dtype]:
        """The dtype of what the master holds."""
        return {"none": [], "kahan": [self.p], "split16": [torch.int16], "fp32": [F32]}[self.master]

    @property
    def streams(self) -> list[torch.dtype]:
        """The dtypes of p, g, the states, what the master holds and the average: what has a value for each element."""
        return [self.p, self.g] + [self.state] * STATES[self.rule] + self.extra + self.averages

    @property
    def scales(self) -> int:
        """How many streams of scales follow."""
        return STATES[self.rule] if self.state is I8 else 0

    @property
    def plain(self) -> bool:
        return self.master == "none" and not self.stochastic and self.state is not I8

    @property
    def bytes(self) -> float:
        """That must be moved for each element."""
        moved = sum(d.itemsize for d in self.streams) * 2 - self.g.itemsize
        return moved + self.scales * 2 * F32.itemsize / QUANT_BLOCK


ADAM = Variant("adam", F32, F32, F32)
ADAM_BF16 = Variant("adam", BF16, BF16, F32)
ADAM_ALL_BF16 = Variant("adam", BF16, BF16, BF16)
AMSGRAD = Variant("adam_amsgrad", F32, F32, F32)
MOMENTUM = Variant("sgd_momentum", F32, F32, F32)
CAUTIOUS_DECAY = Variant("adam_cautious_decay", BF16, BF16, F32)
CAUTIOUS_UPDATE = Variant("adam_cautious_update", F32, F32, F32)
ADABOUND = Variant("adabound", F32, F32, F32)
AMSBOUND = Variant("amsbound", F16, F16, F32)
NO_FIRST = Variant("adam_no_first_moment", F32, F32, F32)
VARIANTS = [
    ADAM,
    ADAM_BF16,
    ADAM_ALL_BF16,
    Variant("adam", F16, F16, F16),
    Variant("adam", F32, BF16, F16),
    AMSGRAD,
    Variant("adam_amsgrad", F16, F32, BF16),
    Variant("sgd", F32, F32, F32),
    Variant("sgd", BF16, F16, BF16),
    MOMENTUM,
    Variant("sgd_momentum", BF16, BF16, F32),
    Variant("sgd_momentum", F16, F32, F16),
    CAUTIOUS_DECAY,
    CAUTIOUS_UPDATE,
    ADABOUND,
    AMSBOUND,
    NO_FIRST,
    Variant("adam_no_first_moment", F16, F16, F32),
]
SPLIT16 = Variant("adam", BF16, BF16, F32, "split16")
STOCHASTIC = Variant("adam", BF16, BF16, BF16, "none", True)
INT8 = Variant("adam", BF16, BF16, I8)
INT8_STOCHASTIC = Variant("adam", BF16, BF16, I8, "none", True)
# Each format, each of them beside each other one, and each rule.
FORMED = [
    Variant("adam", BF16, BF16, F32, "kahan"),
    SPLIT16,
    Variant("adam", F16, F16, F32, "fp32"),
    STOCHASTIC,
    INT8,
    INT8_STOCHASTIC,
    Variant("adam", BF16, F32, BF16, "kahan", True),
    Variant("adam", BF16, F32, I8, "split16", True),
    Variant("adam", BF16, BF16, I8, "fp32"),
    Variant("adam", F32, F32, I8, "none", True),
    Variant("adam", F32, F32, BF16, "none", True),
    Variant("adam_amsgrad", BF16, BF16, BF16, "none", True),
    Variant("adam_amsgrad", BF16, F32, F32, "fp32"),
    Variant("sgd", BF16, BF16, BF16, "none", True),
    Variant("sgd", F16, F16, F16, "fp32"),
    Variant("sgd_momentum", BF16, F32, F32, "none", True),
    Variant("sgd_momentum", BF16, BF16, BF16, "kahan"),
    Variant("sgd_momentum", F16, F16, I8),
    Variant("adam_cautious_decay", BF16, BF16, BF16, "none", True),
    Variant("adam_cautious_update", BF16, BF16, I8, "split16", True),
    Variant("adabound", BF16, BF16, I8, "none", True),
    Variant("amsbound", BF16, BF16, BF16, "kahan", True),
    Variant("adam_no_first_moment", BF16, BF16, BF16, "none", True),
    Variant("adam_no_first_moment", BF16, BF16, I8, "none", True),
    Variant("adam_no_first_moment", F32, F32, I8),
]
NARROW_AVERAGE = Variant("adam", F32, F32, F32, ema=BF16)
# An average beside each kind of rule, of parameter, of master, and of a moment.
AVERAGED = [
    Variant("adam", F32, F32, F32, ema=F32),
    Variant("adam", BF16, BF16, BF16, ema=F32),
    Variant("adam_amsgrad", F16, F32, F32, ema=F32),
    Variant("sgd", F16, F16, F16, ema=F32),
    Variant("sgd_momentum", F32, F32, F32, ema=F32),
    Variant("adam", BF16, BF16, F32, "split16", ema=F32),
    Variant("adam", BF16, F32, BF16, "kahan", True, ema=F32),
    Variant("adam", F16, F16, F32, "fp32", ema=F32),
    Variant("adam", BF16, BF16, BF16, "none", True, ema=F32),
    Variant("adam_amsgrad", BF16, BF16, BF16, "none", True, ema=F32),
    Variant("adam", F32, F32, I8, "none", True, ema=F32),
    Variant("adam", BF16, F32, I8, "split16", True, ema=F32),
    Variant("adam_cautious_update", BF16, BF16, I8, "split16", True, ema=F32),
    # Narrow ones, beside streams that draw words as well and beside none.
    NARROW_AVERAGE,
    Variant("sgd", F16, F16, F16, ema=BF16),
    Variant("adam_amsgrad", BF16, F32, BF16, ema=BF16),
    Variant("adam", BF16, BF16, F32, "split16", ema=BF16),
    Variant("adam", BF16, BF16, BF16, "none", True, ema=BF16),
    Variant("adam", F32, F32, I8, ema=BF16),
    Variant("adam", BF16, BF16, I8, "split16", True, ema=BF16),
]
# What is measured beside a rule, a master, words, codes and an average.
MEASURED = [
    Variant("adam", F32, F32, F32, measured=True),
    Variant("adam", BF16, BF16, BF16, measured=True),
    Variant("sgd", F16, F16, F16, measured=True),
    Variant("adam", BF16, BF16, F32, "split16", measured=True),
    Variant("adam", BF16, BF16, BF16, "kahan", True, measured=True),
    Variant("amsbound", BF16, BF16, BF16, "none", True, measured=True),
    Variant("adam_no_first_moment", BF16, BF16, I8, "none", True, measured=True),
    Variant("adam", BF16, BF16, I8, "split16", True, ema=F32, measured=True),
]
# The layouts that differ, each rule at least once: what is compiled for every architecture.
LAYOUTS = [*(VARIANTS[i] for i in (0, 1, 2, 6, 8, 9)), *(FORMED[i] for i in (1, 3, 4, 7, 9))]
EXECUTED = (80, 90, 120)  # the architectures whose PTX is executed
CHUNK, BLOCK = 4096, 512


# ---- The compilers.


@dataclass
class Compiled:
    """A kernel for one architecture."""

    ptx: str
    entry: str
    threads: int
    width: int  # elements per access where all is aligned
    registers: int
    frame: int  # bytes of local memory
    shared: int

    def launch(self, mem, blocks: int, args: list, **options):
        options.setdefault("shared", self.shared)
        return ptxsim.Module(self.ptx).launch(self.entry, blocks, self.threads, args, mem, **options)


class Triton:
    """Compiles a folder of Triton kernels; by folder, so that changed copies of it compile as well."""

    name, folder, architectures = "triton", ROOT / "triton_kernels", (80, 86, 89, 90, 100, 120)

    def __init__(self, folder: Path = folder) -> None:
        name = f"_kernels_{abs(hash(folder))}"
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder)]
        self.kernels = importlib.import_module(f"{name}.kernels")

    def step(self, sm: int, variant: Variant) -> Compiled:
        return self._compiled(self.compile_step(self._target(sm), variant))

    def compile_step(self, target, variant: Variant):
        """Compile ahead of time, for a target of Triton's; needs no GPU."""
        constexprs, options = self.kernels.config(variant, target.warp_size)
        signature = {"rows": "*i64", "chunks": "*i32", "scalars": "*fp32", "factor": "*fp32", "chunk": "i32"}
        signature |= {"sums": "i64", "given": "i32", **{f"{row}{i}": "fp32" for row in "ab" for i in range(SCALARS)}}
        return self._compile(self.kernels.step_kernel, target, signature, constexprs, options)

    def scalars(self, sm: int, adam: bool) -> Compiled:
        signature = {"hyper": "*fp64", "rates": "*i64", "steps": "*i64", "factor": "*fp32", "scalars": "*fp32"}
        kernel, options = self.kernels.scalars_kernel, self.kernels.SCALARS_OPTIONS
        return self._compiled(self._compile(kernel, self._target(sm), signature, {"ADAM": adam}, options))

    def squares(self, sm: int, g: torch.dtype) -> Compiled:
        constexprs = self.kernels.square_constexprs(g, self._target(sm).warp_size)
        signature = {"rows": "*i64", "chunks": "*i32", "sums": "*fp64", "chunk": "i32"}
        kernel, options = self.kernels.square_kernel, self.kernels.OPTIONS
        return self._compiled(self._compile(kernel, self._target(sm), signature, constexprs, options))

    def factor(self, sm: int) -> Compiled:
        signature = {"sums": "*fp64", "factor": "*fp32", "n": "i32", "max_norm": "i64", "flags": "i32"}
        signature |= dict.fromkeys(("scale", "found", "norm"), "i64")
        kernel, options = self.kernels.factor_kernel, self.kernels.FACTOR_OPTIONS
        return self._compiled(self._compile(kernel, self._target(sm), signature, self.kernels.FACTOR, options))

    def totals(self, sm: int) -> Compiled:
        signature = {"sums": "*fp64", "bounds": "*i64", "totals": "*fp64", "flag": "*fp32", "found": "i64"}
        kernel, options = self.kernels.totals_kernel, self.kernels.FACTOR_OPTIONS
        return self._compiled(self._compile(kernel, self._target(sm), signature, self.kernels.FACTOR, options))

    def factor_arguments(self, sums, n, asked, factor, norm) -> list:
        """Those of ``factor``; ``asked`` is max_norm or None, whether to skip, and addresses or 0."""
        max_norm, skips, scale, found = asked
        flags = self.kernels.CLIPS.value * (max_norm is not None) + self.kernels.SKIPS.value * skips
        return [sums, factor, n, int(np.float64(max_norm or 0).view(np.int64)), flags, scale, found, norm]

    @staticmethod
    def totals_arguments(sums, bounds, found, totals, flag) -> list:
        """Those of ``totals``."""
        return [sums, bounds, totals, flag, found]

    @staticmethod
    def _compile(kernel, target, signature, constexprs, options):
        import triton
        from triton.compiler import ASTSource

        signature = signature | dict.fromkeys(constexprs, "constexpr")
        tables = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
        return triton.compile(ASTSource(kernel, signature, constexprs, tables), target=target, options=options)

    @staticmethod
    def blocks(rows: int) -> int:
        """Of the kernel of the scalars."""
        return rows

    @staticmethod
    def _target(sm: int):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", sm, 32)

    @staticmethod
    def _compiled(compiled) -> Compiled:
        import triton

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
        registers, frame, local, shared = (
            int(re.search(rf"\b{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL", "SHARED")
        )
        metadata = compiled.metadata
        ptx, threads = compiled.asm["ptx"], 32 * metadata.num_warps
        # 1 KiB is what sm_90 and later reserve for themselves
        shared = metadata.shared + (shared if shared > 1024 else 0)
        return Compiled(ptx, metadata.name, threads, 4, registers, frame + local, shared)


class Cuda:
    """Compiles a folder of C++ sources with nvcc."""

    name, folder, architectures = "cuda", ROOT / "csrc", (75, 80, 86, 89, 90, 100, 120)
    variants: ClassVar = [*VARIANTS, *FORMED, *AVERAGED, *MEASURED]

    def __init__(self, folder: Path = folder) -> None:
        self.folder = folder

    TYPES: ClassVar = {F32: "float", BF16: "fused_adamw::BFloat16", F16: "fused_adamw::Float16", I8: "unsigned char"}

    def squares(self, sm: int, g: torch.dtype) -> Compiled:
        return self.module(sm)[f"square_kernel<{self.TYPES[g]}>"]

    def step(self, sm: int, variant: Variant) -> Compiled:
        dtypes = ", ".join(self.TYPES[d] for d in variant[1:4])
        formats = f"(fused_adamw::Master){MASTERS.index(variant.master)}"
        formats += "".join(f", {str(flag).lower()}" for flag in (variant.stochastic, variant.measured))
        return self.module(sm)[f"step_kernel<fused_adamw::{self._rule(variant.rule)}, {dtypes}, {formats}>"]

    def scalars(self, sm: int, adam: bool) -> Compiled:
        return self.module(sm)[f"scalars_kernel<{str(adam).lower()}>"]

    def factor(self, sm: int) -> Compiled:
        return self._small(sm)["factor_kernel"]

    def totals(self, sm: int) -> Compiled:
        return self._small(sm)["totals_kernel"]

    @staticmethod
    def factor_arguments(sums, n, asked, factor, norm) -> list:
        """Those of ``factor``; ``asked`` is max_norm or None, whether to skip, and addresses or 0."""
        max_norm, skips, scale, found = asked
        return [sums, n, struct.pack("d??6xQQ", max_norm or 0, max_norm is not None, skips, scale, found), factor, norm]

    @staticmethod
    def totals_arguments(sums, bounds, found, totals, flag) -> list:
        """Those of ``totals``."""
        return [sums, bounds, found, totals, flag]

    @functools.cache  # noqa: B019
    def _small(self, sm: int) -> dict[str, Compiled]:
        return self._compiled((self.folder / "factor_cuda.cu").read_text(), sm)

    @staticmethod
    def blocks(rows: int) -> int:
        return -(-rows // 128)

    @staticmethod
    def _rule(rule: str) -> str:
        if rule.startswith("sgd"):
            return f"Sgd<{str(rule == 'sgd_momentum').lower()}>"
        return f"Adam<(fused_adamw::Rule){list(STATES).index(rule)}>"

    @functools.cache  # noqa: B019
    def module(self, sm: int) -> dict[str, Compiled]:
        """All kernels for an architecture, by their names; of the step's, those of ``variants``, or all if empty.

        Of an architecture whose PTX is not executed, those of LAYOUTS alone.
        """
        source = (self.folder / "step_cuda.cu").read_text()
        if self.variants:
            source = source[: source.index("using StepKernel")]
            names = {F32: "float", BF16: "BFloat16", F16: "Float16", I8: "Code"}
            # Every kernel steps averages.
            for v in dict.fromkeys(v._replace(ema=None) for v in (self.variants if sm in EXECUTED else LAYOUTS)):
                args = ", ".join([names[d] for d in v[1:4]] + [f"Master::{v.master}"])
                args += "".join(f", {str(flag).lower()}" for flag in (v.stochastic, v.measured))
                source += (
                    f"template __global__ void step_kernel<{self._rule(v.rule)}, {args}>"
                    "(const int64_t*, const int32_t*, const float*, const float*, int, double*, GivenScalars);\n"
                )
            for adam in ("true", "false"):
                args = "const double*, const int64_t*, const int64_t*, const float*, float*, int64_t"
                source += f"template __global__ void scalars_kernel<{adam}>({args});\n"
            for g in list(names.values())[:3]:
                args = "const int64_t*, const int32_t*, double*, int"
                source += f"template __global__ void square_kernel<{g}>({args});\n"
            source += "}\n}\n"
        return self._compiled(source, sm)

    def _compiled(self, source: str, sm: int) -> dict[str, Compiled]:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernels.cu").write_text(source)
            command = ["nvcc", "-O3", "-std=c++17", "-fmad=false", f"-arch=sm_{sm}", "-cubin", "-Xptxas", "-v", "-keep"]
            command += ["-I", str(self.folder), "-keep-dir", folder, "-o", f"{folder}/k.cubin", f"{folder}/kernels.cu"]
            run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            assert run.returncode == 0, run.stderr
            ptx = (Path(folder) / "kernels.ptx").read_text()
        told = re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", run.stderr, re.S)
        what = r"Used (\d+) registers", r"(\d+) bytes (?:stack frame|lmem)", r"(\d+) bytes smem"
        return self._kernels(ptx, told, *what)

    def built(self, sm: int) -> dict[str, Compiled]:
        """All kernels of the extension, by their names, where it was built for this architecture; none elsewhere."""
        import triton

        tool, extension = triton.knobs.nvidia.cuobjdump.path, backends.native().__file__
        resources, ptx = (
            subprocess.run([tool, what, "-arch", f"sm_{sm}", extension], capture_output=True, text=True).stdout
            for what in ("-res-usage", "-ptx")
        )
        told = re.findall(r"Function (\w+):(.*?)(?=Function|\Z)", resources, re.S)
        return self._kernels(ptx, told, r"REG:(\d+)", r"(?:STACK|LOCAL):(\d+)", r"SHARED:(\d+)") if ptx else {}

    @staticmethod
    def _kernels(ptx: str, told: list[tuple[str, str]], registers: str, frame: str, shared: str) -> dict[str, Compiled]:
        """The kernels of a text of PTX, of whose entries a tool tells the resources that these patterns find."""
        names = "\n".join(entry for entry, _ in told)
        names = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
        header, *texts = re.split(r"(?=^(?:\.\w+ )*\.entry )", ptx, flags=re.M)
        texts = {re.search(r"\.entry (\w+)\(", text)[1]: text for text in texts}
        found = {}
        for (entry, text), full in zip(told, names, strict=True):
            name = re.search(r"\w+_kernel(?:<.*?>)?(?=\()", full)[0]
            found[name] = Compiled(
                ptx=header + texts[entry],
                entry=entry,
                threads=512 if name in ("factor_kernel", "totals_kernel") else 128,
                width=4 if re.search(r"float|Rule\)[17]|Master\)[123]", name.split("<", 1)[-1]) else 8,
                **{
                    what: sum(map(int, re.findall(pattern, text)))
                    for what, pattern in (("registers", registers), ("frame", frame), ("shared", shared))
                },
            )
        return found


LOOP = """
import torch, triton
import triton.language as tl

@triton.jit
def count(to, n):
    for i in range(tl.load(n)):
        tl.store(to, i + 1)

to, n = torch.zeros(1, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
count[(1,)](to, n)
assert to.item() == 3
"""


@functools.cache
def needs_interpreter() -> None:
    """Skip the test where Triton's interpreter cannot run a loop, as that of triton 3.6 cannot beside numpy 2.5."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "loop.py"
        script.write_text(LOOP)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment)
    if run.returncode:
        pytest.skip(f"Triton's interpreter cannot run a loop here: {run.stderr.strip().splitlines()[-1]}")


def forbidden(ptx: str) -> list[str]:
    """Instructions that are not in global memory, do not round once, or may be contracted.

    A reciprocal root may be approximate: the codes of int8 moments do not depend on its last bits.
    """
    memory = r"(?:ld|st)\.(?:local|shared|v\d|[bfsu]\d+)"  # without a space: a generic address
    rounding = r"div\.(?:full|approx)|sqrt\.approx|\w+\.ftz|(?:mul|add|sub)\.f32"
    ptx = ptx.replace("rsqrt.approx.ftz.f32", "rsqrt")
    return re.findall(rf"\b(?:{memory}|bar\.sync|{rounding})\b[^;]*", ptx)


def vectors(ptx: str, kind: str) -> list[int]:
    """Bytes of each vector access ("ld" or "st")."""
    return [int(n) * int(bits) // 8 for n, bits in re.findall(rf"{kind}\.global(?:\.nc)?\.v(\d)\.[bfu](\d+)", ptx)]


def changed(compiler, file: str, right: str, wrong: str, folder: Path):
    """The compiler of a copy of the sources, with a piece of one replaced."""
    for path in compiler.folder.glob("*.*"):
        text = path.read_text()
        if path.name == file:
            assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
            text = text.replace(right, wrong)
        (folder / path.name).write_text(text)
    return type(compiler)(folder)


# ---- The inputs.


@dataclass
class Tensor:
    """A row of a launch: p, g, the states, what the master holds, and the scales of int8 states."""

    data: list[torch.Tensor]
    offsets: list[int]  # bytes by which each lies off a multiple of 256
    scalars: int
    index: int = 0
    place: tuple[int, int, int] = NOT_SHARDED


SPECIAL = [0.0, -0.0, 1e-45, -3e-39, 6e-8, 1e-20, 65519.0, 65520.0, -3e38, math.inf, -math.inf, math.nan]


def tensors(variant, sizes, rows, seed=0, unaligned=False, places=(NOT_SHARDED,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(k: int, n: int, dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-6, 1, generator=generator)
        if n > 8:  # special values in a tenth of the elements
            at = torch.randperm(n, generator=generator)[: n // 10]
            special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (len(at),), generator=generator)]
            if variant.scales:  # large ones in one block of four, since they spoil the codes of a whole one
                special = torch.where((special.abs() < 1e9) | (at // QUANT_BLOCK % 4 == 3), special, 0)
            x[at] = special
        if not dtype.is_floating_point:  # codes, remainders: any bits
            info = torch.iinfo(dtype)
            return torch.randint(info.min, info.max + 1, (n,), generator=generator).to(dtype)
        return (x.abs() if k >= 2 + abs(second_moment_of(variant.rule)) else x).to(dtype)

    def extra(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Digits below those of p, of which some do not belong to it."""
        if variant.master == "split16":
            return make(2, len(p), dtype)
        below = p.float() * torch.randn(len(p), generator=generator) * 2.0 ** (-9 if p.dtype is BF16 else -12)
        return (below if variant.master == "kahan" else p.float() + below).to(dtype)

    made, states = [], STATES[variant.rule]
    for i, n in enumerate(sizes):
        data = [make(k, n, d) for k, d in enumerate(variant.streams[: 2 + states])]
        data += [extra(data[0], d) for d in variant.extra]
        data += [make(2, n, d) for d in variant.averages]
        data += [make(3, -(-n // QUANT_BLOCK), F32).nan_to_num(1.0, 1.0, 1.0) for _ in range(variant.scales)]
        if variant.scales and n >= 3 * QUANT_BLOCK:  # a block whose new second moments are too small for a scale
            data[1][2 * QUANT_BLOCK : 3 * QUANT_BLOCK] = 1e-18
            for scales in data[-variant.scales :]:
                scales[2] = 0
        offsets = [(1 + (i * 5 + k * 3) % 40) * x.element_size() if unaligned else 0 for k, x in enumerate(data)]
        made.append(Tensor(data, offsets, i % len(rows), i, places[i % len(places)]))
    return made


def columns(variant, addresses: list[int]) -> tuple[list[int], int, list[int], int]:
    """The addresses of p, g and three states; of what the master holds; of two scales; of the average."""
    states, streams = 2 + STATES[variant.rule], len(variant.streams)
    own, extra, scales = addresses[:states], addresses[states:streams], addresses[streams:]
    ema = extra.pop() if variant.averages else 0
    return own + [0] * (5 - len(own)), (extra or [0])[0], scales + [0] * (2 - len(scales)), ema


def scalar_rows(rule: str) -> list[tuple[float, ...]]:
    """The numbers of a rule, with the step and the weight of the average after the first eight."""
    more = zip((1.0, 2.0, 1000.0, 1e7), (1e-3, 0.7, 0.5, 1.0), strict=True)
    return [(*row[:8], *own, *row[8:]) for row, own in zip(_scalar_rows(rule), more, strict=True)]


def _scalar_rows(rule: str) -> list[tuple[float, ...]]:
    """The numbers before the step, and hi."""
    if FAMILIES[rule] == "adabound":
        return [
            (2e-2, 0.0, 1.0, 0.1, 0.001, 1e-2, 1e-4, 1e-8, 1.0),  # AdaBoundW
            (0.0, 1e-2, 1.0, 1e-1, 1e-3, 3e-3, 1e-2, 1e-8, 2e-2),  # AdaBound, L2, nearly SGD
            (3e-7, 0.0, -0.125, 0.7, 0.5, -1e-4, -1e2, 1e-15, -1e-4),  # ascends, scaled gradients, small betas
            (0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0),  # betas = lr = eps = 0
        ]
    return [(*row, 0.0) for row in _unbound_rows(rule)]


def _unbound_rows(rule: str) -> list[tuple[float, ...]]:
    if rule == "adam_no_first_moment":
        return [(*row[:3], 1.0, *row[4:]) for row in _unbound_rows("adam")]
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

    def step(variant, given, rows, squares=None):
        """What the rows measure goes to ``squares``, float64 [rows, parts, 3]."""
        results = [[x.clone() for x in t.data] for t in given]
        kinds = [list(STATES).index(variant.rule), *(FORMATS[d] for d in variant[1:4])]
        kinds += [MASTERS.index(variant.master), variant.stochastic]
        average = FORMATS[variant.ema or F32]
        table = np.zeros(len(given), np.dtype("u8,u8,3u8,i8,i4,6u1,u8,2u8,u8,u8,u1,u8,u4,3i8", align=True))
        for i, (t, data) in enumerate(zip(given, results, strict=True)):
            (p, g, *states), extra, scales, ema = columns(variant, [x.data_ptr() for x in data])
            numel = data[0].numel()
            measured = 0 if squares is None else squares[i].ctypes.data
            own = (p, g, states, numel, t.scalars, kinds, extra, scales, measured, ema, average)
            table[i] = (*own, SEED, t.index, t.place)
        numbers = np.array(rows, np.float32).astype(np.float64)
        library.fused_step(
            ctypes.c_void_p(table.ctypes.data),
            ctypes.c_int64(len(table)),
            ctypes.c_void_p(numbers.ctypes.data),
        )
        return [[x for k, x in enumerate(data) if k != 1] for data in results]

    return step


def simulate(compiled, variant, given, rows, chunk, bias=0, factor=1.0, by_value=False, **options):
    """(stepped p and states of each, ptxsim's result); a ``bias`` moves all tensors up by as many elements.

    The rows of scalars lie in memory, or are arguments: two of them.
    """
    mem = ptxsim.GlobalMemory(1 << 26)
    buffers, table, chunks = [], [], []
    for i, t in enumerate(given):
        n = t.data[0].numel()
        own = [
            mem.upload(x, f"{i}.{k}", offset=offset, readonly=k == 1)
            for k, (x, offset) in enumerate(zip(t.data, t.offsets, strict=True))
        ]
        moved = [bias] * len(variant.streams) + [bias // QUANT_BLOCK] * variant.scales
        addresses = [b.addr - m * x.element_size() for b, m, x in zip(own, moved, t.data, strict=True)]
        first, extra, scales, ema = columns(variant, addresses)
        offset, run, skip = t.place
        drawn_by = (offset, *((run, skip) if skip else ()))
        placed = not (variant.stochastic or variant.ema is BF16) or not any(x % 8 for x in drawn_by)
        flags = placed * (2 + (not any(b.addr % 16 for b in own))) + 4 * (variant.ema is BF16)
        place = SEED, t.index, offset - bias, run, skip
        table.append([*first, n + bias, t.scalars, flags, extra, *scales, ema, *place, 0])
        chunks += [[i, bias // chunk + c] for c in range(max(1, -(-n // chunk)))]
        buffers.append(own)
    tables = [
        mem.upload(np.array(x, dtype), name, readonly=True)
        for x, dtype, name in (
            (table, np.int64, "rows"),
            (chunks, np.int32, "chunks"),
            ([[math.nan]] if by_value else rows, np.float32, "scalars"),
            ([factor], np.float32, "factor"),
        )
    ]
    numbers = np.array(rows[:2] if by_value else [[math.nan] * SCALARS] * 2, np.float32).ravel().tolist()
    triton = compiled.entry == "step_kernel"  # nvcc mangles the name, and takes a struct
    sums = mem.alloc(8 * 3 * len(chunks), "sums", np.float64) if variant.measured else None
    taken = [by_value, *numbers] if triton else [struct.pack(f"i{2 * SCALARS}f", by_value, *numbers)]
    result = compiled.launch(mem, len(chunks), [*tables, chunk, sums.addr if sums else 0, *taken], **options)
    if sums and factor >= 0:
        assert sums.written().all()
        result.sums = sums.get().reshape(3, -1)
    if sums and factor < 0:  # nothing was read or written
        return [], result
    stepped = []
    for i, (own, t) in enumerate(zip(buffers, given, strict=True)):
        stepped.append([])
        for k, (b, x) in enumerate(zip(own, t.data, strict=True)):
            loads, stores = result.s.per_buffer.get(b.name, (0, 0))
            shared = k >= len(variant.streams)  # by the threads of a block of codes
            assert loads >= b.nbytes if shared else loads == b.nbytes, f"{b.name}: every byte is read once"
            assert stores == (0 if k == 1 else b.nbytes), f"{b.name}: every byte is written once"
            if k != 1:
                assert b.written().all()
                stepped[i].append(torch.from_numpy(b.raw().copy()).view(x.dtype) if x.numel() else x)
    return stepped, result


def same_bits(got: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    """Whether all bits agree; any NaN is as good as another."""
    pairs = zip((x for t in got for x in t), (x for t in expected for x in t), strict=True)
    return all(cases.equal_bits(a, b).all() for a, b in pairs)


def sums_of_squares(compiled, given, chunk, reads=1) -> np.ndarray:
    """What the kernel of the norm writes for each chunk; every gradient is read ``reads`` times."""
    mem = ptxsim.GlobalMemory(1 << 26)
    table, chunks, buffers = [], [], []
    for i, t in enumerate(given):
        g = mem.upload(t.data[1], f"{i}", offset=t.offsets[1], readonly=True)
        n = t.data[1].numel()
        table.append([0, g.addr, 0, 0, 0, n, 0, int(g.addr % 16 == 0), *[0] * (COLUMNS - 8)])
        chunks += [[i, c] for c in range(max(1, -(-n // chunk)))]
        buffers.append(g)
    tables = [mem.upload(np.array(x, dtype), readonly=True) for x, dtype in ((table, np.int64), (chunks, np.int32))]
    sums = mem.alloc(8 * len(chunks), "sums", np.float64)
    result = compiled.launch(mem, len(chunks), [*tables, sums, chunk])
    assert sums.written().all()
    for g in buffers:
        assert result.s.per_buffer.get(g.name, (0, 0)) == (reads * g.nbytes, 0)
    return sums.get()
