"""Measure each claim of the paper as a number with an interval, on the runs of ``bench paper``."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bench.paper.digits import SCHEDULES, STEPS_PER_EPOCH, WITH_L2
from bench.paper.valleys import Grid, Lengths, bootstrap, shift, shrinkage


class Curve(NamedTuple):
    """Hold results in the course of training, a row for each seed."""

    algorithm: str
    schedule: str
    rate: float
    decay: float  # λ, or λ_norm under restarts
    epochs: np.ndarray
    errors: np.ndarray  # (seed, epoch)
    losses: np.ndarray


class Expected(NamedTuple):
    """Say where the paper, or the theory, expects a value: between two bounds."""

    text: str
    low: float
    high: float
    value: float | None = None  # the middle, where it is one value that is expected

    def verdict(self, low: float, high: float) -> str:
        """Judge an interval: "yes" or "no" where it leaves no doubt, else "unclear"."""
        if self.low < low and high < self.high:
            return "yes"
        return "no" if low > self.high or high < self.low else "unclear"


def about(value: float, text: str) -> Expected:
    """Expect a slope: 1/3 more or less cannot be told from it on grids of octaves."""
    return Expected(text, value - 1 / 3, value + 1 / 3, value)


BELOW_0 = Expected("below 0", -np.inf, 0.0)
BETWEEN = Expected("0 to +1", 0.0, 1.0)
HALF_A_POINT = Expected("within ±0.5", -0.5, 0.5)


class Claim(NamedTuple):
    """Hold a claim, its measurement, and whether it was seen."""

    figure: str
    text: str
    expected: str
    unit: str
    value: float | None  # None where it cannot be measured
    low: float | None  # of the 95 % interval
    high: float | None
    verdict: str  # "yes" or "no" where the interval leaves no doubt, else "unclear"

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        measured, interval = "fewer than two valleys inside the grid", ""
        if self.value is not None:
            measured, interval = f"{signed(self.value)} {self.unit}", self.interval()
        return self.figure, self.text, self.expected, measured, interval, self.verdict

    def interval(self) -> str:
        return f"{signed(self.low)} … {signed(self.high)}"


def signed(value: float) -> str:
    """Write a number with its sign; 0 has none."""
    return f"{value:+.2f}".replace("-", "−").replace("+0.00", "0.00").replace("−0.00", "0.00")


def least(grid: Grid) -> Callable[[np.ndarray], float]:
    """Measure the error of the best cell, in percent."""
    return lambda seeds: 100 * float(grid.errors[seeds].mean(0).min())


def at_equal_loss(a: Curve, b: Curve) -> Callable[[np.ndarray], float]:
    """Measure a's test error less b's, in percent, averaged over the training losses that both pass through late."""

    def of(seeds: np.ndarray) -> float:
        curves = []
        for c in (a, b):
            loss, error = np.log(c.losses[seeds].mean(0)), 100 * c.errors[seeds].mean(0)
            # The least loss so far: the curve as a function of the loss.
            first = np.flatnonzero(loss <= np.minimum.accumulate(loss))
            curves.append((loss[first][::-1], error[first][::-1]))
        low = max(loss[0] for loss, _ in curves)
        losses = np.linspace(low, low + np.log(4), 50)
        values = [np.interp(losses, loss, error).mean() for loss, error in curves]
        return float(values[0] - values[1])

    return of


def any_time(a: Curve, b: Curve) -> Callable[[np.ndarray], float]:
    """Measure a's test error less b's, in percent, averaged over the evaluations: one may have to stop at any."""
    difference = taken(a) - taken(b)
    return lambda seeds: 100 * float(difference[seeds].mean())


def taken(curve: Curve) -> np.ndarray:
    """Return the errors of the network that one would take at each evaluation (seed, epoch).

    With restarts it is the network at the end of the last finished cycle, as the authors recommend (arXiv 1608.03983,
    section 3); before the first cycle has ended, and without restarts, it is the current one.
    """
    if curve.schedule != "restarts":
        return curve.errors
    epochs, eta = multiplier(curve)
    end = np.flatnonzero(np.isin(curve.epochs, [*epochs[1:][np.diff(eta) > 0], curve.epochs[-1]]))
    return curve.errors[:, [max(end[end <= i], default=i) for i in range(len(curve.epochs))]]


def multiplier(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return (epoch, η) at each step of a run."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    total = int(curve.epochs[-1])
    schedule = SCHEDULES[curve.schedule](optimizer, total, STEPS_PER_EPOCH)
    found = []
    for _ in range(total * STEPS_PER_EPOCH):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return np.arange(len(found)) / STEPS_PER_EPOCH, np.array(found)


def final(a: Curve, b: Curve) -> Callable[[np.ndarray], float]:
    """Measure a's test error less b's at the end, in percent."""
    return lambda seeds: 100 * float((a.errors[seeds, -1] - b.errors[seeds, -1]).mean())


def less(a: Callable[[np.ndarray], float], b: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    """Subtract b from a on the same seeds."""
    return lambda seeds: a(seeds) - b(seeds)


OCTAVES, POINTS = "octaves per octave", "points"
# The slope of the best weight decay over the learning rate, as the theory has it: docs/paper.md says why.
SLOPES = {
    ("SGD", "normalized"): about(-1, "−1"),
    ("SGDW", "normalized"): about(0, "0"),
    ("Adam", "normalized"): BELOW_0,
    ("AdamW", "normalized"): about(0, "0"),
    ("SGDW", "plain head, not decayed"): about(0, "0"),
    ("AdamW", "plain head, not decayed"): about(0, "0"),
    ("SGDW", "plain head"): BETWEEN,
    ("AdamW", "plain head"): BETWEEN,
    ("SGDW", "ordinary"): BETWEEN,
    ("AdamW", "ordinary"): BETWEEN,
    ("SGDW", "plain head, alone decayed"): about(1, "+1"),
    ("AdamW", "plain head, alone decayed"): about(1, "+1"),
    ("AdamW", "unnormalized"): about(1, "+1"),
}

# Algorithms of other papers, with AdamW's grid of learning rates and decoupled decays, by their names there.
OTHERS = {"RAdam": "RAdam with decoupled decay", "AdaBoundW": "AdaBoundW"}

Grids = dict[tuple[str, str, str], Grid]  # by algorithm, schedule and network


def judge(
    figure: str, text: str, expected: Expected, unit: str, of: Callable[[np.ndarray], float], seeds: int
) -> Claim:
    """Measure a claim, and compare the interval with what is expected."""
    value, low, high = bootstrap(of, seeds)
    numbers = (value, low, high) if np.isfinite(value) else (None, None, None)
    return Claim(figure, text, expected.text, unit, *numbers, expected.verdict(low, high))


def slopes(grids: Grids) -> dict[tuple[str, str], Claim]:
    """Measure how the best decay moves with the learning rate, for each algorithm and network."""
    found = {}
    for (name, network), expected in SLOPES.items():
        figure, text = "2", f"{name}, {network}"
        if network == "normalized":
            factor, moves = ("L2 factor", "shrinks with") if name in WITH_L2 else ("decay", "does not depend on")
            figure, text = "1", f"{name}: the best {factor} {moves} the learning rate"
        grid = grids[name, "cosine", network]
        found[name, network] = judge(figure, text, expected, OCTAVES, shift(grid), len(grid.errors))
    return found


def state(grids: Grids, curves: list[Curve], long: dict[str, tuple[Curve, Curve]], lengths: Lengths) -> list[Claim]:
    """Measure every claim but those on slopes over the learning rate."""
    of = {(name, schedule): grid for (name, schedule, network), grid in grids.items() if network == "normalized"}
    _, _, adam, adamw = curves
    stated = []

    def add(figure: str, text: str, expected: Expected, unit: str, value_of: Callable[[np.ndarray], float]) -> None:
        seeds = len((long["AdamW"][0] if figure == "5" else adamw).errors)
        stated.append(judge(figure, text, expected, unit, value_of, seeds))

    for schedule in ("fixed", "step", "cosine"):
        difference = less(least(of["AdamW", schedule]), least(of["Adam", schedule]))
        add("3", f"AdamW errs less than Adam with L2, {schedule} multiplier", BELOW_0, POINTS, difference)
    difference = less(least(of["AdamW", "cosine"]), least(of["AdamW", "fixed"]))
    add("3", "AdamW errs less with the cosine than with the fixed multiplier", BELOW_0, POINTS, difference)
    text = "AdamW errs less than Adam with L2 at equal training loss"
    add("4", text, BELOW_0, POINTS, at_equal_loss(adamw, adam))
    for name, (cosine, restarts) in long.items():
        add("5", f"{name}R errs less than {name} on the way", BELOW_0, POINTS, any_time(restarts, cosine))
        add("5", f"{name}R ends within half a point of {name}", HALF_A_POINT, POINTS, final(restarts, cosine))
    count, half = len(lengths.epochs), len(lengths.epochs) // 2
    for among in (range(count), range(half), range(half, count)):
        text = (
            f"The best decay shrinks with the length, {lengths.epochs[among[0]]} to {lengths.epochs[among[-1]]} epochs"
        )
        add("6", text, about(-1 / 2, "−1/2"), OCTAVES, shrinkage(lengths, False, among))
    text = "The best normalized decay does not depend on the length"
    add("6", text, about(0, "0"), OCTAVES, shrinkage(lengths, True))
    for name, title in OTHERS.items():
        difference = less(least(of[name, "cosine"]), least(of["AdamW", "cosine"]))
        add("7", f"{title} errs less than AdamW, of as many settings", BELOW_0, POINTS, difference)
    return stated
