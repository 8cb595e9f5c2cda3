"""Redo the paper's experiments on small data: learning rate against decay, schedules, restarts, the length of a run."""

import argparse
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

import fused_adamw
from bench.output import begin, console, new_table, progress, wrote
from bench.paper import claims, digits, figures
from bench.paper.claims import Claim, Curve, Grid, Lengths
from bench.paper.digits import STEPS_PER_EPOCH, Batch, train

ALGORITHMS = ("SGD", "SGDW", "Adam", "AdamW")
# The grids begin here, and go up by octaves; a weight decay of 0 stands before the least one.
LEAST_DECAY = {"SGD": 4e-3, "SGDW": 8e-4, "Adam": 1.6e-3, "AdamW": 1e-3}
LEAST_LR = {"SGD": 4e-3, "SGDW": 4e-3, "Adam": 1e-3, "AdamW": 1e-3}


@dataclass(frozen=True)
class Plan:
    """Say how much is run."""

    seeds: int
    epochs: int  # of a run of figures 1 to 3
    octaves: tuple[int, ...]  # of the learning rate, above the least
    decays: tuple[int, ...]  # of the weight decay, above the least; 0 is added
    long: int  # epochs of figure 4
    lengths: tuple[int, ...]  # epochs of the runs of figure 5
    length_decays: tuple[int, ...]  # octaves of their weight decay, above the least of AdamW's


FULL = Plan(8, 30, tuple(range(6)), tuple(range(7)), 150, (4, 8, 16, 32, 64, 128), tuple(range(-1, 8)))
QUICK = Plan(2, 10, (1, 3, 5), (0, 2, 4, 6), 30, (2, 4, 8, 16), (0, 2, 4, 6, 8))


def octaves(least: float, above: Iterable[int]) -> list[float]:
    """Return the numbers so many doublings above the least."""
    return [least * 2.0**k for k in above]


def grid_batches(plan: Plan, algorithm: str, schedule: str) -> list[Batch]:
    """Make a batch for each seed."""
    rates = octaves(LEAST_LR[algorithm], plan.octaves)
    decays = [0.0, *octaves(LEAST_DECAY[algorithm], plan.decays)]
    return [
        Batch(algorithm, schedule, plan.epochs, plan.epochs, tuple((r, d, seed) for r in rates for d in decays))
        for seed in range(plan.seeds)
    ]


def length_batches(plan: Plan) -> list[Batch]:
    """Make a batch for each length."""
    rate = octaves(LEAST_LR["AdamW"], [3])[0]
    decays = octaves(LEAST_DECAY["AdamW"], plan.length_decays)
    cells = tuple((rate, decay, seed) for seed in range(plan.seeds) for decay in decays)
    return [Batch("AdamW", "cosine", epochs, epochs, cells) for epochs in plan.lengths]


def curve_batch(plan: Plan, grid: Grid, schedule: str, epochs: int, decay: float) -> Batch:
    """Make a batch that follows the best learning rate of a grid, with this weight decay, in the course of training."""
    rate = float(grid.rates[grid.best()[0]])
    every = max(1, epochs // 75)
    return Batch(grid.algorithm, schedule, epochs, every, tuple((rate, decay, seed) for seed in range(plan.seeds)))


class Points:
    """Hold results by batch, kept in a file of a line each, so that an interrupted run goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.versions = {
            "fused_adamw": fused_adamw.__version__,
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
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
    return batch.epochs * STEPS_PER_EPOCH * len(batch.cells)


def results(batches: list[Batch], processes: int) -> Iterator[tuple[Batch, dict[str, list]]]:
    """Train batches, the costly ones first, in processes of one thread each; yield each as it is done."""
    batches = sorted(batches, key=steps_of, reverse=True)
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((batch, train(batch)) for batch in batches)
        finally:
            torch.set_num_threads(threads)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(train, batch): batch for batch in batches}
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
        for batch, result in results(missing, processes):
            points.add(batch, result)
            bar.advance(task, steps_of(batch))


def grid_of(plan: Plan, points: Points, algorithm: str, schedule: str) -> Grid:
    batches = grid_batches(plan, algorithm, schedule)
    rates, decays = (np.unique([cell[i] for cell in batches[0].cells]) for i in (0, 1))
    errors = [np.reshape(points[batch]["errors"], (len(rates), len(decays))) for batch in batches]
    return Grid(algorithm, schedule, rates, decays, np.stack(errors))


def curve_of(points: Points, batch: Batch) -> Curve:
    found = points[batch]
    rate, decay, _ = batch.cells[0]
    parts = (np.array(found[key]) for key in ("epochs", "errors", "losses"))
    return Curve(batch.algorithm, batch.schedule, rate, decay, *parts)


def lengths_of(plan: Plan, points: Points) -> Lengths:
    batches = length_batches(plan)
    decays = np.unique([cell[1] for cell in batches[0].cells])
    errors = [np.reshape(points[batch]["errors"], (plan.seeds, len(decays))) for batch in batches]
    return Lengths(batches[0].cells[0][0], np.array(plan.lengths), decays, np.stack(errors, axis=1))


def run(args: argparse.Namespace) -> int:
    """Train what is not there yet, state what was seen, and draw the figures."""
    plan = QUICK if args.quick else FULL
    processes = args.threads or min(2, os.cpu_count() or 1)
    facts = {"threads": f"{processes} processes of 1", "scikit-learn": sklearn.__version__}
    head = begin("Decoupled weight decay regularization, on scikit-learn's digits", 1, more=facts)
    args.out.mkdir(parents=True, exist_ok=True)
    points = Points(args.out / "paper_points.jsonl")

    schedules = {name: ("fixed", "step", "cosine") if name.startswith("Adam") else ("cosine",) for name in ALGORITHMS}
    batches = [b for name in ALGORITHMS for schedule in schedules[name] for b in grid_batches(plan, name, schedule)]
    fill(points, batches + length_batches(plan), "grids", processes)
    grids = {(name, s): grid_of(plan, points, name, s) for name in ALGORITHMS for s in schedules[name]}

    best = {name: float(grids[name, "cosine"].decays[grids[name, "cosine"].best()[1]]) for name in ALGORITHMS}
    wanted = [curve_batch(plan, grids[name, "cosine"], "cosine", plan.epochs, best[name]) for name in ALGORITHMS]
    for name in ("AdamW", "SGDW"):
        norm = best[name] * (plan.epochs * STEPS_PER_EPOCH) ** 0.5
        decay = fused_adamw.normalized_weight_decay(norm, digits.BATCH, digits.TRAINING, plan.long)
        wanted.append(curve_batch(plan, grids[name, "cosine"], "cosine", plan.long, decay))
        wanted.append(curve_batch(plan, grids[name, "cosine"], "restarts", plan.long, norm))
    fill(points, wanted, "curves", processes)
    curves = [curve_of(points, batch) for batch in wanted]
    short, long = curves[: len(ALGORITHMS)], curves[len(ALGORITHMS) :]
    lengths = lengths_of(plan, points)

    stated = claims.state(grids, short, long, lengths)
    report(stated, plan)
    report_file = {
        "environment": head,
        "versions": points.versions,
        "plan": asdict(plan) | {"training": digits.TRAINING, "batch": digits.BATCH},
        "claims": [claim._asdict() for claim in stated],
        "points": [{"batch": asdict(b), "result": points[b]} for b in (*batches, *length_batches(plan), *wanted)],
    }
    (args.out / "paper.json").write_text(json.dumps(report_file), encoding="utf-8")
    wrote(args.out / "paper.json")
    figures.draw(grids, short, long, lengths, args.out)
    return 0


def report(stated: list[Claim], plan: Plan) -> None:
    """Print a row for each claim."""
    shown = new_table("claim of the paper", "measured here", "95 % interval", "seen?", left=4, show_lines=True)
    for claim in stated:
        interval = "" if claim.value is None else f"{claim.low:+.2f} … {claim.high:+.2f}"
        shown.add_row(claim.text, claim.measured, interval, claim.verdict)
    console.print(shown)
    console.print(
        f"{plan.seeds} seeds (of the weights, the order and the choice of the {digits.TRAINING} training images); "
        "intervals by bootstrap over seeds.\n"
        "Learning rates and decays are chosen on the test images, as in the paper's figures: "
        "errors compare settings, and promise nothing on other images."
    )
