"""Measure each claim of the paper as a number with an interval, on the runs of ``bench paper``."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bench.paper.digits import SCHEDULES, STEPS_PER_EPOCH

RESAMPLES = 2000
NEAR = 0.005  # errors this close to the least are as good as the least: 8 of 1,541 test images
USABLE = 0.015  # learning rates whose least error is this close to the least of all are usable


class Grid(NamedTuple):
    """Hold final results over learning rates and weight decays."""

    algorithm: str
    schedule: str
    rates: np.ndarray
    decays: np.ndarray  # the first is 0
    errors: np.ndarray  # (seed, rate, decay), fractions of the test images

    def best(self) -> tuple[int, int]:
        """Return the indices of the rate and the decay with the least mean error."""
        mean = self.errors.mean(0)
        return np.unravel_index(mean.argmin(), mean.shape)


class Curve(NamedTuple):
    """Hold results in the course of training, a row for each seed."""

    algorithm: str
    schedule: str
    rate: float
    decay: float  # λ, or λ_norm under restarts
    epochs: np.ndarray
    errors: np.ndarray  # (seed, epoch)
    losses: np.ndarray


class Lengths(NamedTuple):
    """Hold AdamW's final errors over the length of the run and the weight decay."""

    rate: float
    epochs: np.ndarray
    decays: np.ndarray
    errors: np.ndarray  # (seed, length, decay)


class Claim(NamedTuple):
    """Hold a claim, its measurement, and whether it was seen."""

    text: str
    figure: str
    measured: str
    value: float | None  # None where it cannot be measured
    low: float | None  # of the 95 % interval
    high: float | None
    verdict: str  # "yes" or "no" where the interval leaves no doubt, else "unclear"


def best_decay(errors: np.ndarray, decays: np.ndarray) -> float:
    """Return log2 of the best weight decay: the mean over those whose error is near the least.

    A single error among eleven thousand can decide an argmin; the middle of the valley is steadier.
    """
    return float(np.log2(decays[errors <= errors.min() + NEAR]).mean())


def usable(errors: np.ndarray) -> list[int]:
    """Return the rows of errors over weight decays whose least error lies inside the row, not at an end of the grid."""
    inside = np.minimum(errors[:, 0], errors[:, -1]) > errors.min(1) + NEAR
    return [int(i) for i in np.flatnonzero(inside)]


def usable_rates(grid: Grid) -> list[int]:
    """Return the learning rates, as indices, that are about as good as the best and have a best decay in the grid."""
    mean = grid.errors.mean(0)[:, 1:]
    return [i for i in usable(mean) if mean[i].min() <= mean.min() + USABLE]


def slope(x: np.ndarray, y: list[float]) -> float:
    """Return the slope of the line of least squares, in octaves per octave; NaN for a single point."""
    if len(y) < 2:
        return float("nan")
    return float(np.polyfit(np.log2(x), y, 1)[0])


def shift(grid: Grid) -> Callable[[np.ndarray], float]:
    """Measure how many octaves the best weight decay moves for each octave of the learning rate, of resampled seeds."""
    rates = usable_rates(grid)

    def of(seeds: np.ndarray) -> float:
        mean = grid.errors[seeds].mean(0)[:, 1:]
        return slope(grid.rates[rates], [best_decay(mean[i], grid.decays[1:]) for i in rates])

    return of


def shrinkage(lengths: Lengths, normalized: bool) -> Callable[[np.ndarray], float]:
    """Measure how many octaves the best weight decay, or λ_norm, moves when the run gets twice as long."""
    factor = np.sqrt(STEPS_PER_EPOCH * lengths.epochs) if normalized else np.ones(len(lengths.epochs))
    rows = usable(lengths.errors.mean(0))

    def of(seeds: np.ndarray) -> float:
        mean = lengths.errors[seeds].mean(0)
        return slope(lengths.epochs[rows], [best_decay(mean[i], lengths.decays * factor[i]) for i in rows])

    return of


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
    schedule = SCHEDULES[curve.schedule](optimizer, total)
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


def bootstrap(of: Callable[[np.ndarray], float], seeds: int) -> tuple[float, float, float]:
    """Return the value on all seeds, and the ends of its 95 % interval: of values on as many, drawn with replacement.

    scipy.stats.bootstrap finds the same (tests/test_bench.py), but warns of every value that cannot be measured.
    """
    rng = np.random.default_rng(0)
    drawn = [of(rng.integers(seeds, size=seeds)) for _ in range(RESAMPLES)]
    return (of(np.arange(seeds)), *(float(x) for x in np.percentile(drawn, [2.5, 97.5])))


def negative(low: float, high: float) -> str:
    """Judge whether a value is below 0, as the paper expects."""
    return "yes" if high < 0 else "no" if low > 0 else "unclear"


def within(bound: float) -> Callable[[float, float], str]:
    """Return a judge of whether a value is within a bound of 0, as the paper expects."""

    def verdict(low: float, high: float) -> str:
        if -bound < low and high < bound:
            return "yes"
        return "no" if low > bound or high < -bound else "unclear"

    return verdict


def state(grids: dict[tuple[str, str], Grid], short: list[Curve], long: list[Curve], lengths: Lengths) -> list[Claim]:
    """Measure every claim."""
    of = {(name, schedule): grid for (name, schedule), grid in grids.items()}
    sgd, sgdw, adam, adamw = (of[name, "cosine"] for name in ("SGD", "SGDW", "Adam", "AdamW"))
    _, _, adam_curve, adamw_curve = short
    adamw_long, adamwr, sgdw_long, sgdwr = long
    octaves, points = "{:+.2f} octaves per octave of the learning rate", "{:+.2f} points of test error"
    length = "{:+.2f} octaves per octave of the length"
    third = within(1 / 3)
    rows = [
        ("1", "SGD: the best L2 factor shrinks as the learning rate grows", octaves, shift(sgd), negative),
        ("1", "SGDW: the best decay does not depend on the learning rate", octaves, shift(sgdw), third),
        (
            "1",
            "SGD: it does so beside SGDW's best decay (Proposition 1: -1)",
            octaves,
            less(shift(sgd), shift(sgdw)),
            negative,
        ),
        ("1", "Adam: the best L2 factor shrinks as the learning rate grows", octaves, shift(adam), negative),
        ("1", "AdamW: the best decay does not depend on the learning rate", octaves, shift(adamw), third),
        *(
            (
                "2",
                f"AdamW errs less than Adam with L2, {schedule} multiplier",
                points,
                less(least(of["AdamW", schedule]), least(of["Adam", schedule])),
                negative,
            )
            for schedule in ("fixed", "step", "cosine")
        ),
        (
            "2",
            "AdamW errs less with the cosine than with the fixed multiplier",
            points,
            less(least(adamw), least(of["AdamW", "fixed"])),
            negative,
        ),
        (
            "3",
            "AdamW errs less than Adam with L2 at equal training loss",
            points,
            at_equal_loss(adamw_curve, adam_curve),
            negative,
        ),
        ("4", "AdamWR errs less than AdamW on the way", points, any_time(adamwr, adamw_long), negative),
        ("4", "AdamWR ends within half a point of AdamW", points, final(adamwr, adamw_long), within(0.5)),
        ("4", "SGDWR errs less than SGDW on the way", points, any_time(sgdwr, sgdw_long), negative),
        ("4", "SGDWR ends within half a point of SGDW", points, final(sgdwr, sgdw_long), within(0.5)),
        (
            "5",
            "The best decay shrinks with the length of the run (the paper: -1/2)",
            length,
            shrinkage(lengths, False),
            negative,
        ),
        ("5", "The best normalized decay does not depend on the length", length, shrinkage(lengths, True), third),
    ]
    stated = []
    for figure, text, form, value_of, verdict_of in rows:
        value, low, high = bootstrap(value_of, len(sgd.errors))
        verdict = verdict_of(low, high)
        if np.isfinite(value):
            stated.append(Claim(text, figure, form.format(value), value, low, high, verdict))
        else:
            stated.append(Claim(text, figure, "fewer than two valleys inside the grid", None, None, None, verdict))
    return stated
