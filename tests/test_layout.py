"""The house: imports go down one ladder, and the names of columns mean the same in Python and C++."""

import ast
import re
from pathlib import Path

import pytest

from fused_adamw import layout

ROOT = Path(__file__).parent.parent
KINDS = (".py", ".cpp", ".cu", ".h")
# Each module imports modules to the right of it alone, for annotations too.
LADDERS = {
    "fused_adamw": (
        "__main__ __init__ adabound optimizers release base averages statistics checkpoints loaded clipping plan "
        "sharing checks backends norm gpu reference watch tensor_checks state codecs formats scalars contract layout "
        "options tensors schedules build _version"
    ),
    "triton_kernels": "kernels factor multi_tensor formats rules layout __init__",
}


def imported(source: str, package: str) -> set[str]:
    """Modules of the package that the source imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return found


def upward(sources: dict[str, str], package: str) -> list[str]:
    """Imports that do not go down the ladder."""
    ladder = LADDERS[package].split()
    return [
        f"{module} imports {other}"
        for module, source in sources.items()
        for other in imported(source, package) & set(ladder)
        if ladder.index(other) <= ladder.index(module)
    ]


@pytest.mark.parametrize("package", LADDERS)
def test_imports_go_down_the_ladder(package):
    sources = {path.stem: path.read_text() for path in (ROOT / package).glob("*.py")}
    ladder = LADDERS[package].split()
    assert set(sources) == set(ladder)
    assert upward(sources, package) == []
    first, last = ladder[0], ladder[-1]
    for line in (
        f"import {package}.{first}",
        f"from .{first} import x",
        f"def f():\n    from {package} import {first}",
    ):
        assert upward({last: line}, package) == [f"{last} imports {first}"]


def test_columns_are_fields_of_the_scalars():
    from fused_adamw import scalars

    for kind in scalars.KINDS.values():
        assert len(kind._fields) == layout.SCALARS
        for i, name in enumerate(kind._fields):
            assert getattr(layout, f"SCALAR_{name.upper()}") == i


def enums(source: str, known: dict[str, int]) -> dict[str, int]:
    """The constants of the unscoped enums of a header; ``known`` are those that they are computed from."""
    found = dict(known)
    for body in re.findall(r"^enum \w+ \{(.*?)\};", source, re.M | re.S):
        value = -1
        for name, _, expression in re.findall(r"(\w+)( = ([^,}\n]+))?", re.sub(r"//.*", "", body)):
            value = found[name] = eval(expression, {}, found) if expression else value + 1
    return found


def test_columns_are_those_of_the_headers():
    headers = "".join((ROOT / "csrc" / name).read_text() for name in ("rules.h", "step.h", "scalars.h"))
    assert int(re.search(r"kMaxStates = (\d+);", headers)[1]) == layout.STATES
    theirs = enums(headers, {"kMaxStates": layout.STATES})
    ours = {name: value for name, value in vars(layout).items() if isinstance(value, int)}
    del ours["STATES"], ours["SCALARS_BYTES"], theirs["kMaxStates"]
    assert len(ours) > 40
    assert theirs == ours


def test_the_map_of_the_house_is_true():
    """CONTRIBUTING.md names every file, and nothing in its answers that the sources lack."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = [p for f in ("fused_adamw", "csrc", "triton_kernels") for p in (ROOT / f).glob("*.*") if p.suffix in KINDS]
    sources = "".join(path.read_text() for path in files)
    shown = set(re.findall(r"`([^`]+)`", text.split("## Map of the house")[1]))
    assert {path.name for path in files if not path.name.startswith(("__init__", "_version"))} <= shown
    words = {word for name in shown for word in re.findall(r"[A-Za-z_]\w+", name) if "_" in word}
    assert not [word for word in words if word not in sources and not list(ROOT.glob(f"*/{word}.*"))]
