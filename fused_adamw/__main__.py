"""Tells what can run here: ``python -m fused_adamw``. ``python -m fused_adamw build`` builds the native extension."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

import fused_adamw
from fused_adamw import build


def report() -> int:
    """Print versions, and for each device which backends can run, and why the others cannot."""
    found = fused_adamw.capabilities()
    print(f"fused_adamw {found['fused_adamw']}, torch {found['torch']}, Python {found['python']}, {sys.platform}")
    if extension := found["extension"]:
        path, isas = Path(extension["path"]), extension["instruction_sets"]
        hidden = f", of the installed package that {build.PACKAGE} hides" if path.parent in build.hidden() else ""
        print(f"extension: {path}, built for torch {extension['torch']}{hidden}")
        print(f"CPU kernels: {', '.join(isas)} ({isas[-1]} is used), {found['threads']} threads")
    elif lines := build.failed(torch.__version__).splitlines()[1:]:
        print("the last build of the extension ended with:", *lines, sep="\n    ")
    for name, backend in found["backends"].items():
        devices = ", ".join(backend["devices"]) or "any device"
        print(f"backend {name!r} ({devices}): {backend['reason'] or 'available'}")
    for device, name in found["steps"].items():
        print(f"{device} tensors are stepped by {name!r}")
    return 0


def bench(arguments: list[str]) -> int:
    """Run the bench of the checkout that the package lies in."""
    checkout = build.PACKAGE.parent
    if not (checkout / "bench" / "__main__.py").exists():
        print(f"the bench is not installed with the package ({build.PACKAGE}): it needs a checkout", file=sys.stderr)
        return 1
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    return subprocess.call([sys.executable, "-m", "bench", *arguments], env={**os.environ, "PYTHONPATH": path})


def main() -> int:
    """Run a subcommand and return the exit code."""
    if sys.argv[1:2] == ["bench"]:
        return bench(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m fused_adamw", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    building = commands.add_parser("build", help="build the native extension for the torch at hand (needs a compiler)")
    building.add_argument("--force", action="store_true", help="build it anew, even if one fits already")
    commands.add_parser("bench", help="run the bench, in a checkout: the same as python -m bench")
    args = parser.parse_args()
    if args.command != "build":
        return report()
    try:
        path = build.build(args.force)
    except build.CannotBuild as error:
        print(f"fused_adamw: the extension was not built: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    print(f"{path}: built for torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
