"""The command line of the bench."""

import argparse
import importlib
import sys
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def workload(text: str) -> str:
    """The name of a list of shapes in tests/cases.py."""
    from tests.cases import WORKLOADS

    if text not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"no workload {text!r}: there are {', '.join(WORKLOADS)}")
    return text


def target_file(text: str) -> Path:
    """A file that can be written once the measurements are done."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a file name in a directory that exists")
    return path


def target_directory(text: str) -> Path:
    """A directory that exists or can be made."""
    path = Path(text)
    if any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def parser() -> argparse.ArgumentParser:
    """The subcommands and their arguments."""
    top = argparse.ArgumentParser(prog="python -m bench", description=importlib.import_module("bench").__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small character-level GPT with torch's AdamW and with ours")
    demo.add_argument("--steps", type=positive, default=400, help="training steps (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    out = Path("bench/out")
    demo.add_argument("--out", type=target_directory, default=out, help="for demo.png (default: %(default)s)")

    step = commands.add_parser("step", help="time optimizer.step() against torch's, and check what it computes")
    of = "of tests/cases.py (default: all but 1x16M)"
    step.add_argument("--workload", type=workload, nargs="+", metavar="NAME", help=of)
    step.add_argument("--rounds", type=positive, default=21, help="timings of each arm (default: %(default)s)")
    step.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and gradients")
    step.add_argument("--all", action="store_true", help="time torch's for-loop and foreach too, which are slow")
    step.add_argument("--json", type=target_file, metavar="FILE", help="write every number to FILE")

    host = commands.add_parser("host", help="time what a step costs on the host, with the kernels left out")
    of = "lengths of the lists (default: 148 1000)"
    host.add_argument("--tensors", type=positive, nargs="+", default=[148, 1000], metavar="N", help=of)
    host.add_argument("--rounds", type=positive, default=21, help="timings of each arm (default: %(default)s)")

    for command in (demo, step):
        command.add_argument("--threads", type=positive, help="of torch (default: 2, or fewer where there are fewer)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code; 130, as shells have it, after Ctrl-C."""
    try:
        args = parser().parse_args(argv)
        try:
            command = importlib.import_module(f"bench.{args.command}")
        except ModuleNotFoundError as error:
            if error.name not in ("matplotlib", "numpy", "rich"):
                raise
            print(f"{error.name} is missing: pip install matplotlib numpy rich", file=sys.stderr)
            return 1
        return command.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    from bench import pinning

    pinning.pin()
    sys.exit(main())
