"""Redo the paper's experiments on small data: learning rate against decay, schedules, restarts, the length of a run."""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch

import fused_adamw
from bench.output import begin, console, markdown, new_table, progress, wrote
from bench.paper import claims, digits, figures
from bench.paper.claims import Claim, Curve
from bench.paper.digits import STEPS_PER_EPOCH, Batch, train
from bench.paper.valleys import Grid, Lengths

ALGORITHMS = ("SGD", "SGDW", "Adam", "AdamW")
OTHERS = tuple(claims.OTHERS)  # beside them in figure 7


class Axis(NamedTuple):
    """Hold an axis of a grid: so many values, each so many octaves above the one before."""

    least: float
    octaves: int
    count: int

    def values(self, every: int) -> list[float]:
        """Return every value (1), or every second one (2), ...; the greatest is among them."""
        return [self.least * 2.0 ** (self.octaves * k) for k in range((self.count - 1) % every, self.count, every)]


RATES = {"SGD": Axis(4e-3, 2, 5), "SGDW": Axis(4e-3, 2, 5), "Adam": Axis(8e-3, 1, 6), "AdamW": Axis(1e-3, 2, 5)}
RATES |= dict.fromkeys(OTHERS, RATES["AdamW"])  # as much tuning as AdamW's
L2, DECOUPLED = Axis(4e-4, 1, 13), Axis(1e-3, 1, 10)  # a weight decay of 0 stands before the least one
# Where the scale of weights matters, decay gains something over fewer learning rates.
FEW, FEW_RATES = ("plain head, alone decayed", "unnormalized"), Axis(4e-3, 1, 6)
# (algorithm, schedule, network), in the order of the tables.
GRIDS = (
    *((name, "cosine", "normalized") for name in (*ALGORITHMS, *OTHERS)),
    *(
        (name, "cosine", network)
        for network in ("plain head, not decayed", "plain head", "ordinary")
        for name in ("SGDW", "AdamW")
    ),
    *((name, "cosine", "plain head, alone decayed") for name in ("SGDW", "AdamW")),
    ("AdamW", "cosine", "unnormalized"),
    *((name, schedule, "normalized") for name in ("Adam", "AdamW") for schedule in ("fixed", "step")),
)
# Learning rate and weight decay of a run of 30 epochs: the same whatever the grids find.
LONG = {"AdamW": (0.016, 0.064), "SGDW": (0.016, 0.016)}
LENGTH_RATE, LENGTH_DECAYS = 0.032, Axis(2.5e-4, 1, 12)


COLUMNS = ("figure", "claim", "expected", "measured", "95 % interval", "seen?")


@dataclass(frozen=True)
class Plan:
    """Say how much is run."""

    seeds: int
    every: int  # 2: each second learning rate and weight decay
    epochs: int  # of a run of the grids
    long: int  # epochs of the runs with restarts, and beside them, of twice as many seeds
    lengths: tuple[int, ...]  # epochs


FULL = Plan(16, 1, 30, 150, (1, 2, 4, 8, 16, 32))
QUICK = Plan(2, 2, 30, 30, (1, 2, 4, 8))


def parts(seeds: int, size: int) -> list[range]:
    """Divide seeds among batches: enough networks in each to be fast, and so few that little is lost with one."""
    return [range(first, min(first + size, seeds)) for first in range(0, seeds, size)]


def grid_batches(plan: Plan, algorithm: str, schedule: str, network: str) -> list[Batch]:
    """Make the batches of a grid."""
    rates = (FEW_RATES if network in FEW else RATES[algorithm]).values(plan.every)
    decays = [0.0, *(L2 if algorithm in digits.WITH_L2 else DECOUPLED).values(plan.every)]
    return [
        Batch(algorithm, schedule, plan.epochs, plan.epochs, tuple(itertools.product(rates, decays, seeds)), network)
        for seeds in parts(plan.seeds, 4)
    ]


def length_batches(plan: Plan, epochs: int) -> list[Batch]:
    """Make the batches of a length."""
    decays = LENGTH_DECAYS.values(plan.every)
    return [
        Batch("AdamW", "cosine", epochs, epochs, tuple(itertools.product([LENGTH_RATE], decays, seeds)), training=1024)
        for seeds in parts(plan.seeds, 4)
    ]


def curve_batches(plan: Plan, grid: Grid) -> list[Batch]:
    """Make the batch that follows the best cell of a grid in the course of training."""
    i, j = grid.best()
    cells = itertools.product([float(grid.rates[i])], [float(grid.decays[j])], range(plan.seeds))
    return [Batch(grid.algorithm, "cosine", plan.epochs, 1, tuple(cells))]


def long_batches(plan: Plan, algorithm: str, schedule: str) -> list[Batch]:
    """Make the batches of one cosine, or of warm restarts, of the same normalized decay."""
    rate, decay = LONG[algorithm]
    norm = decay * (FULL.epochs * STEPS_PER_EPOCH) ** 0.5
    whole = fused_adamw.normalized_weight_decay(norm, digits.BATCH, digits.TRAINING, plan.long)
    decay = norm if schedule == "restarts" else whole
    every = max(1, plan.long // 75)
    return [
        Batch(algorithm, schedule, plan.long, every, tuple(itertools.product([rate], [decay], seeds)))
        for seeds in parts(2 * plan.seeds, 8)
    ]


class Points:
    """Hold results by batch, kept in a file of a line each, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path, device: str) -> None:
        self.path = path
        self.versions = {
            "fused_adamw": fused_adamw.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "device": device,
            "bench/paper/digits.py": hashlib.sha256(Path(digits.__file__).read_bytes()).hexdigest()[:12],
        }
        self.of: dict[str, dict[str, Any]] = {}
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                point = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed
                continue
            if point["versions"] == self.versions:
                self.of[self.key(point["batch"])] = point["result"]

    @staticmethod
    def key(batch: Batch | dict[str, Any]) -> str:
        return json.dumps(asdict(batch) if isinstance(batch, Batch) else batch, sort_keys=True)

    def add(self, batch: Batch, result: dict[str, list]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            line = {"versions": self.versions, "batch": asdict(batch), "result": result}
            file.write(json.dumps(line) + "\n")
        self.of[self.key(batch)] = result

    def __getitem__(self, batch: Batch) -> dict[str, Any]:
        return self.of[self.key(batch)]

    def missing(self, batches: Iterable[Batch]) -> list[Batch]:
        return [batch for batch in batches if self.key(batch) not in self.of]


def steps_of(batch: Batch) -> int:
    """Count the steps of all networks, which is what a batch costs."""
    return batch.epochs * batch.steps_per_epoch * len(batch.cells)


def results(batches: list[Batch], processes: int, device: str) -> Iterator[tuple[Batch, dict[str, list]]]:
    """Train batches in processes of one thread each, and yield each as it is done.

    The first seeds come first, which ``--seeds`` can make do with, and of the same seeds the costly batches.
    """
    batches = sorted(batches, key=lambda batch: (batch.cells[0][2], -steps_of(batch)))
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((batch, train(batch, device)) for batch in batches)
        finally:
            torch.set_num_threads(threads)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(train, batch, device): batch for batch in batches}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def fill(points: Points, batches: list[Batch], title: str, processes: int) -> None:
    """Train what is missing, with a progress bar."""
    missing = points.missing(batches)
    total = sum(map(steps_of, batches))
    with progress() as bar:
        task = bar.add_task(title, total=total, completed=total - sum(map(steps_of, missing)))
        for batch, result in results(missing, processes, points.versions["device"]):
            points.add(batch, result)
            bar.advance(task, steps_of(batch))


def stacked(points: Points, batches: list[Batch], key: str) -> np.ndarray:
    """Return results of batches that differ in seeds alone: (rate, decay, seed, evaluation)."""
    rates, decays, _ = (len(axis) for axis in axes_of(batches[0]))
    parts = [np.array(points[batch][key]) for batch in batches]
    return np.concatenate([part.reshape(rates, decays, -1, part.shape[1]) for part in parts], axis=2)


def axes_of(batch: Batch) -> tuple[np.ndarray, ...]:
    """Return the learning rates, the weight decays and the seeds."""
    return tuple(np.unique(axis) for axis in zip(*batch.cells, strict=True))


def grid_of(plan: Plan, points: Points, algorithm: str, schedule: str, network: str) -> Grid:
    batches = grid_batches(plan, algorithm, schedule, network)
    rates, decays, _ = axes_of(batches[0])
    errors = stacked(points, batches, "errors")[..., -1]
    return Grid(algorithm, schedule, network, rates, decays, np.moveaxis(errors, 2, 0))


def curve_of(points: Points, batches: list[Batch]) -> Curve:
    first = batches[0]
    errors, losses = (stacked(points, batches, key)[0, 0] for key in ("errors", "losses"))
    rate, decay, _ = first.cells[0]
    return Curve(first.algorithm, first.schedule, rate, decay, np.array(points[first]["epochs"]), errors, losses)


def lengths_of(plan: Plan, points: Points) -> Lengths:
    of = [length_batches(plan, epochs) for epochs in plan.lengths]
    errors = [stacked(points, batches, "errors")[0, ..., -1].T for batches in of]
    steps = [batches[0].epochs * batches[0].steps_per_epoch for batches in of]
    return Lengths(np.array(plan.lengths), np.array(steps), axes_of(of[0][0])[1], np.stack(errors, axis=1))


def run(args: argparse.Namespace) -> int:
    """Train what is not there yet, state what was seen, and draw the figures."""
    plan = QUICK if args.quick else FULL
    plan = replace(plan, seeds=args.seeds or plan.seeds)
    processes = args.threads or min(2, os.cpu_count() or 1)
    facts = {"threads": f"{processes} processes of 1", "scikit-learn": sklearn.__version__}
    device = torch.device(args.device)
    head = begin("Decoupled weight decay regularization, on scikit-learn's digits", 1, device, more=facts)
    args.out.mkdir(parents=True, exist_ok=True)
    points = Points(args.out / "paper_points.jsonl", args.device)

    batches = [batch for which in GRIDS for batch in grid_batches(plan, *which)]
    batches += (batch for epochs in plan.lengths for batch in length_batches(plan, epochs))
    runs = {name: [long_batches(plan, name, schedule) for schedule in ("cosine", "restarts")] for name in LONG}
    batches += (batch for pair in runs.values() for run in pair for batch in run)
    fill(points, batches, "grids", processes)
    grids = {which: grid_of(plan, points, *which) for which in GRIDS}
    best = [curve_batches(plan, grids[name, "cosine", "normalized"]) for name in ALGORITHMS]
    fill(points, [batch for run in best for batch in run], "curves", processes)
    curves = [curve_of(points, run) for run in best]
    long = {name: tuple(curve_of(points, run) for run in pair) for name, pair in runs.items()}
    lengths = lengths_of(plan, points)

    slopes = claims.slopes(grids)
    stated = [*slopes.values(), *claims.state(grids, curves, long, lengths)]
    report(stated, plan)
    report_file = {
        "environment": head,
        "versions": points.versions,
        "plan": asdict(plan) | {"training": digits.TRAINING, "batch": digits.BATCH},
        "claims": [claim._asdict() for claim in stated],
        "points": [{"batch": asdict(b), "result": points[b]} for b in itertools.chain(batches, *best)],
    }
    (args.out / "paper.json").write_text(json.dumps(report_file), encoding="utf-8")
    (args.out / "paper.md").write_text(markdown(COLUMNS, (claim.cells() for claim in stated)) + "\n", encoding="utf-8")
    for name in ("paper.json", "paper.md"):
        wrote(args.out / name)
    figures.draw(grids, slopes, curves, long, lengths, args.out)
    return 0


def report(stated: list[Claim], plan: Plan) -> None:
    """Print a row for each claim."""
    shown = new_table(*COLUMNS, left=len(COLUMNS), show_lines=True)
    for claim in stated:
        shown.add_row(*claim.cells())
    console.print(shown)
    console.print(
        f"{plan.seeds} seeds, {2 * plan.seeds} of figure 5 (of the weights, the order and the choice of the training "
        "images); intervals by bootstrap over seeds.\n"
        "Slopes: octaves of the best weight decay for each octave of the learning rate, or of the length of the run. "
        "Points: percent of the test images.\n"
        "Learning rates and decays are chosen on the test images, as in the paper's figures: "
        "errors compare settings, and promise nothing on other images."
    )
