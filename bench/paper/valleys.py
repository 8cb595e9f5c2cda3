"""Find the best weight decay of each learning rate, or length of a run, and how it moves, with intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
NEAR = 0.005  # errors this close to the least are as good as the least: 8 of 1,541 test images
NEAR_BY_LENGTH = 0.1  # the same as a fraction of the least error, which falls to a fifth as runs get longer
USABLE = 0.015  # learning rates whose least error is this close to the least of all are usable


class Grid(NamedTuple):
    """Hold final results over learning rates and weight decays."""

    algorithm: str
    schedule: str
    network: str
    rates: np.ndarray
    decays: np.ndarray  # the first is 0
    errors: np.ndarray  # (seed, rate, decay), fractions of the test images

    def best(self) -> tuple[int, int]:
        """Return the indices of the rate and the decay with the least mean error."""
        mean = self.errors.mean(0)
        return np.unravel_index(mean.argmin(), mean.shape)

    def usable(self) -> list[int]:
        """Return the learning rates, as indices, about as good as the best, that have a best decay in the grid."""
        mean = self.errors.mean(0)[:, 1:]
        return [i for i in inside(mean, NEAR) if mean[i].min() <= mean.min() + USABLE]

    def best_decay(self, seeds: np.ndarray, i: int) -> float:
        """Return log2 of the best weight decay of a learning rate."""
        return middle(self.errors[seeds, i, 1:].mean(0), self.decays[1:], NEAR)


class Lengths(NamedTuple):
    """Hold final errors over the length of the run and the weight decay."""

    epochs: np.ndarray
    steps: np.ndarray
    decays: np.ndarray
    errors: np.ndarray  # (seed, length, decay)

    def usable(self) -> list[int]:
        """Return the lengths, as indices, that have a best decay in the grid."""
        mean = self.errors.mean(0)
        return inside(mean, NEAR_BY_LENGTH * mean.min(1))

    def best_decay(self, seeds: np.ndarray, i: int) -> float:
        """Return log2 of the best weight decay of a length."""
        mean = self.errors[seeds, i].mean(0)
        return middle(mean, self.decays, NEAR_BY_LENGTH * mean.min())


class Valleys(NamedTuple):
    """Hold the best weight decays of usable rows, as log2, and the ends of their 95 % intervals."""

    rows: np.ndarray  # learning rates or lengths, as indices
    best: np.ndarray
    low: np.ndarray
    high: np.ndarray


def middle(errors: np.ndarray, decays: np.ndarray, near: float) -> float:
    """Return log2 of the best weight decay: the mean over those whose error is near the least.

    A single error among twenty thousand can decide an argmin; the middle of the valley is steadier.
    """
    return float(np.log2(decays[errors <= errors.min() + near]).mean())


def inside(errors: np.ndarray, near: float | np.ndarray) -> list[int]:
    """Return the rows of errors over weight decays whose least error lies inside the row, not at an end of the grid."""
    deep = np.minimum(errors[:, 0], errors[:, -1]) > errors.min(1) + near
    return [int(i) for i in np.flatnonzero(deep)]


def slope(x: np.ndarray, y: list[float]) -> float:
    """Return the slope of the line of least squares, in octaves per octave; NaN for a single point."""
    if len(y) < 2:
        return float("nan")
    return float(np.polyfit(np.log2(x), y, 1)[0])


def shift(grid: Grid) -> Callable[[np.ndarray], float]:
    """Measure how many octaves the best weight decay moves for each octave of the learning rate, of resampled seeds."""
    rows = grid.usable()
    return lambda seeds: slope(grid.rates[rows], [grid.best_decay(seeds, i) for i in rows])


def shrinkage(lengths: Lengths, normalized: bool, among: range | None = None) -> Callable[[np.ndarray], float]:
    """Measure how many octaves the best weight decay, or λ_norm, moves when the run gets twice as long.

    ``among`` are the lengths to take, as indices, by default all.
    """
    rows = [i for i in lengths.usable() if among is None or i in among]
    normal = np.log2(lengths.steps) / 2 * normalized
    return lambda seeds: slope(lengths.steps[rows], [lengths.best_decay(seeds, i) + normal[i] for i in rows])


def bootstrap(of: Callable[[np.ndarray], float], seeds: int) -> tuple[float, float, float]:
    """Return the value on all seeds, and the ends of its 95 % interval: of values on as many, drawn with replacement.

    scipy.stats.bootstrap finds the same (tests/test_bench.py), but warns of every value that cannot be measured.
    """
    rng = np.random.default_rng(0)
    drawn = [of(rng.integers(seeds, size=seeds)) for _ in range(RESAMPLES)]
    return (of(np.arange(seeds)), *(float(x) for x in np.percentile(drawn, [2.5, 97.5])))


def valleys(found: Grid | Lengths) -> Valleys:
    """Return the best weight decay of each usable row, with its interval."""
    rows = found.usable()
    values = [bootstrap(lambda seeds, i=i: found.best_decay(seeds, i), len(found.errors)) for i in rows]
    return Valleys(np.array(rows, dtype=int), *np.reshape(values, (len(rows), 3)).T)
