"""Parse the command line of the bench, and run a subcommand."""

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# Modules that stand in a folder, by subcommand.
FOLDERS = {"demo": "studies.demo", "formats": "studies.formats", "paper": "paper.experiments"}


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def chunk(text: str) -> int:
    """Parse the elements of a chunk, a multiple of 128: no two share a scale of int8 moments."""
    if positive(text) % 128:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 128")
    return int(text)


def workload(text: str) -> str:
    """Parse the name of a list of shapes in tests/cases.py."""
    from tests.cases import WORKLOADS

    if text not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"no workload {text!r}: there are {', '.join(WORKLOADS)}")
    return text


def path(what: str, fits: Callable[[Path], bool]) -> Callable[[str], Path]:
    """Return a parser of paths, which refuses one that does not fit before anything is measured."""

    def parse(text: str) -> Path:
        if not fits(Path(text)):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return Path(text)

    return parse


target_file = path("a file name in a directory that exists", lambda p: p.parent.is_dir() and not p.is_dir())
readable_file = path("a file", Path.is_file)
target_directory = path("a directory", lambda p: all(q.is_dir() for q in (p, *p.parents) if q.exists()))
existing_directory = path("a directory that exists", Path.is_dir)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the subcommands and their arguments."""
    from bench.arms import ALGORITHMS, DTYPES, NAMES
    from bench.gpu import MINUTES, STAGES
    from tests.cases import WORKLOADS

    top = argparse.ArgumentParser(prog="python -m bench", description=importlib.import_module("bench").__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small character-level GPT with torch's AdamW and with ours")
    demo.add_argument("--steps", type=positive, default=400, help="training steps (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")

    step = commands.add_parser("step", help="time optimizer.step() against the peers', and check what it computes")
    of = f"of tests/cases.py: {', '.join(WORKLOADS)} (default: those that take a minute together)"
    step.add_argument("--workload", type=workload, nargs="+", metavar="NAME", help=of)
    step.add_argument("--algorithm", choices=ALGORITHMS, nargs="+", default=["adamw"], help="(default: adamw)")
    of = "of parameters and gradients, + of the state where it is another (default: fp32)"
    step.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"], help=of)
    of = "to compare with (default: fused; those that are not installed are skipped)"
    step.add_argument("--against", choices=NAMES, nargs="+", default=["fused"], help=of)
    step.add_argument("--all", action="store_true", help="compare with all of them, slow ones too")
    step.add_argument("--warm", action="store_true", help="one set of buffers, which the caches may hold")
    of = "also time ours with programs of so many elements (a GPU's)"
    step.add_argument("--chunk", type=chunk, nargs="+", default=[], metavar="N", help=of)

    host = commands.add_parser("host", help="time what a step costs on the host, with the kernels left out")
    of = "lengths of the lists (default: 148 1000)"
    host.add_argument("--tensors", type=positive, nargs="+", default=[148, 1000], metavar="N", help=of)

    memory = commands.add_parser("memory", help="bytes per parameter of every format, as allocated")
    memory.add_argument("--workload", type=workload, default="gpt2", metavar="NAME", help="(default: %(default)s)")

    study = commands.add_parser("formats", help="what a small GPT and the digits learn in bf16 and with int8 moments")
    study.add_argument("--steps", type=positive, default=400, help="of the GPT (default: %(default)s)")
    study.add_argument("--seeds", type=positive, default=3, metavar="N", help="(default: %(default)s)")

    paper = commands.add_parser("paper", help="the claims of the paper, on scikit-learn's digits: figures and a table")
    paper.add_argument("--quick", action="store_true", help="a coarse version, in a minute instead of twenty")
    paper.add_argument("--seeds", type=positive, metavar="N", help="(default: 16, and 2 of the coarse version)")
    paper.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    of = "processes of one thread each (default: 2, or fewer where there are fewer)"
    paper.add_argument("--threads", type=positive, metavar="N", help=of)

    limit = commands.add_parser("limit", help="measure the memory's speed, and a step of one tensor beside it")
    limit.add_argument("--algorithm", choices=ALGORITHMS, default="adamw", help="(default: %(default)s)")
    limit.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    of = "elements of the longest tensor (default: %(default)s)"
    limit.add_argument("--largest", type=positive, default=1 << 26, metavar="N", help=of)

    report = commands.add_parser("report", help="the table of docs/performance.md, from several runs of step")
    of = "written by step --json; without any, step is run"
    report.add_argument("files", nargs="*", type=readable_file, metavar="FILE", help=of)
    of = "processes, one after the other (default: %(default)s)"
    report.add_argument("--runs", type=positive, default=3, help=of)
    report.add_argument("--workload", type=workload, nargs="+", metavar="NAME", help="only these (default: all)")
    report.add_argument("--out", type=target_file, metavar="FILE", help="write the Markdown to FILE")

    picture = commands.add_parser(
        "picture", help="the pictures of README and docs/formats.md, from the tables in docs/"
    )
    picture.add_argument("--out", type=existing_directory, metavar="DIR", default=Path("docs"), help="(default: docs)")

    gpu = commands.add_parser("gpu", help="check and measure everything on a machine with a GPU, and write a folder")
    gpu.add_argument("--minutes", type=float, default=MINUTES, help="for all stages (default: %(default)s)")
    of = "to write to, or to go on in (default: bench/results/GPU-DATE)"
    gpu.add_argument("--out", type=target_directory, metavar="DIR", help=of)
    gpu.add_argument("--stages", choices=STAGES, nargs="+", metavar="STAGE", help=f"of {', '.join(STAGES)}")
    gpu.add_argument("--tiny", action="store_true", help="lists of a few elements: does everything run?")
    of = "write the summary and the picture of DIR anew, and print the table for docs/gpu.md"
    gpu.add_argument("--report", type=existing_directory, metavar="DIR", help=of)

    for command in (step, limit):
        command.add_argument("--json", type=target_file, metavar="FILE", help="write every number to FILE")
        command.add_argument("--csv", type=target_file, metavar="FILE", help="write the tables to FILE")
    for command in (step, limit, report):
        command.add_argument("--plot", type=target_file, metavar="FILE", help="draw a picture (PNG)")
        command.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    for command in (step, host, limit, report):
        command.add_argument("--rounds", type=positive, default=21, help="timings of each arm (default: %(default)s)")
    for command in (demo, study, paper):
        of = "for the pictures, and what else it writes (default: %(default)s)"
        command.add_argument("--out", type=target_directory, metavar="DIR", default=Path("bench/out"), help=of)
    for command in (demo, step, limit, report, memory, study):
        command.add_argument("--threads", type=positive, help="of torch (default: 2, or fewer where there are fewer)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return the exit code; 130, as shells have it, after Ctrl-C."""
    # Some rows are there to show what rounding to nearest loses.
    for start in ("Parameters in bfloat16 or float16 are", "Second moments in torch", "Moments in int8 are"):
        warnings.filterwarnings("ignore", start, RuntimeWarning)
    try:
        args = parser().parse_args(argv)
        try:
            command = importlib.import_module(f"bench.{FOLDERS.get(args.command, args.command)}")
        except ModuleNotFoundError as error:
            if error.name not in ("matplotlib", "numpy", "rich", "sklearn"):
                raise
            print(f"{error.name} is missing: pip install matplotlib numpy rich scikit-learn", file=sys.stderr)
            return 1
        return command.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # gpu runs many processes at a time, and each would pin its threads to the same CPUs.
    if sys.argv[1:2] != ["gpu"]:
        from bench import pinning

        pinning.pin()
    sys.exit(main())
