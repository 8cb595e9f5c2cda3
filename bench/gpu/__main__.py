"""Run one part of a stage in this process: python -m bench.gpu FOLDER STAGE SECONDS MODULE.FUNCTION [ARGUMENT...]"""

import argparse
import importlib
import warnings
from pathlib import Path

from bench.gpu.record import Record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("part")
    parser.add_argument("arguments", nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of what rounding to nearest loses, and of what other versions deprecate
    module, _, function = args.part.rpartition(".")
    record = Record(args.folder, args.stage, args.seconds, args.tiny)
    getattr(importlib.import_module(module), function)(record, *args.arguments)


if __name__ == "__main__":
    main()
