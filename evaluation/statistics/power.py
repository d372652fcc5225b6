"""Items needed to see a difference of 1, 2 or 3 points with 80% power at α = 0.05, two-sided.

One seed: McNemar's test, from the share of items on which the two arms differ now (Connor 1987, Biometrics 43:207); for
credits between 0 and 1, Student's t over items, from the variance of the items' differences now. Several seeds:
Student's t over seeds and items, from the estimated variance components (module `seeds`), by the non-central t
distribution. More items cannot make up for seeds that disagree: if seeds alone differ too much, no number of items is
enough, and the answer is a number of seeds.

Both answers rest on estimates from the data at hand. Two or three seeds determine the seeds' part only to within a
factor of a few, so read the answer as an order of magnitude.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import nctdtr, ndtri

from evaluation.statistics.differences import Pairs
from evaluation.statistics.intervals import ALPHA
from evaluation.statistics.seeds import Components, MeanSquares, components, quantile, variance_of_mean

POINTS = (1, 2, 3)
TARGET = 0.8
MOST_ITEMS = 10_000_000
MOST_SEEDS = 1000
_LEAST_ITEMS = 6
"""With fewer items, no sign-flip test reaches p < 0.05: 2·2⁻⁵ is 0.06."""
_LEAST_SHIFT = ndtri(1 - ALPHA / 2) + ndtri(TARGET) - 1e-3
"""The standard errors that a difference needs at least, even if they are known exactly."""


def power(shift: float, df: float) -> float:
    """Probability that a two-sided t-test detects a shift of its mean, in standard errors: the non-central t."""
    critical = quantile(df)
    return float(1 - nctdtr(df, shift, critical) + nctdtr(df, shift, -critical))


@dataclass(frozen=True)
class PowerRow:
    """What it takes to detect a true difference of `points` percentage points."""

    arm: str
    against: str
    points: int
    items: int | None  # needed with `seeds_now` paired seeds; None: no number is enough
    items_now: int
    seeds_now: int
    why: str  # what the number is based on, or why there is none
    # needed with `items_now` items; None: unknown from one seed, or no number is enough
    seeds: int | None = None


def power_rows(arm: str, pairs: Pairs) -> tuple[PowerRow, ...]:
    d = pairs.differences
    seeds, items = d.shape
    rows = []
    for points in POINTS:
        more_seeds = None
        if seeds > 1 and items > 1:
            needed, more_seeds, why = _several(points / 100, components(d), seeds, items)
        elif not pairs.binary and items > 1 and (deviation := float(d[0].std(ddof=1))) > 0:
            needed, why = _one_of_credits(points / 100, deviation)
        else:
            needed, why = _one(points, float((d != 0).mean()))
        rows.append(PowerRow(arm, pairs.against, points, needed, items, seeds if items > 1 else 1, why, more_seeds))
    return tuple(rows)


def _one(points: int, differing: float) -> tuple[int, str]:
    share = max(differing, points / 100)
    why = f"the arms differ on {100 * differing:.1f}% of the items now; one seed, so other seeds may differ"
    if share > differing:
        why += f"; a difference of {points} points needs {points}%"
    return mcnemar_items(points / 100, share), why


def _one_of_credits(delta: float, deviation: float) -> tuple[int | None, str]:
    def enough(n: int) -> bool:
        shift = delta * math.sqrt(n) / deviation
        return shift >= _LEAST_SHIFT and power(shift, n - 1) >= TARGET

    varying = f"the difference varies by {100 * deviation:.1f} points from item to item (standard deviation)"
    return _smallest(enough, _LEAST_ITEMS, MOST_ITEMS), f"{varying}; one seed, so other seeds may differ"


def mcnemar_items(delta: float, differing: float) -> int:
    """Items that McNemar's exact test needs (Connor 1987, with Fleiss' 1981 correction for the exact test).

    `delta` ≠ 0 is the share of gained minus that of lost items; `differing` ≥ |delta| the share of items on which the
    arms differ.
    """
    z_alpha, z_beta = ndtri(1 - ALPHA / 2), ndtri(TARGET)
    root = z_alpha * math.sqrt(differing) + z_beta * math.sqrt(max(differing - delta * delta, 0.0))
    plain = (root / delta) ** 2
    corrected = plain / 4 * (1 + math.sqrt(1 + 4 / (plain * abs(delta)))) ** 2
    return math.ceil(corrected)


def _several(delta: float, parts: Components, seeds: int, items: int) -> tuple[int | None, int | None, str]:
    def enough(n_seeds: int, n_items: int) -> bool:
        shift, df = shift_of(delta, parts, n_seeds, n_items)
        # The first condition is fast and safe: no t-test beats one with a known standard error.
        return shift >= _LEAST_SHIFT and power(shift, df) >= TARGET

    more_items = _smallest(lambda n: enough(seeds, n), 2, MOST_ITEMS)
    more_seeds = _smallest(lambda n: enough(n, items), 2, MOST_SEEDS)
    varying = f"single seeds differ by {100 * parts.seed:.1f} points (standard deviation)"
    if more_items is not None:
        why = f"{varying}; with {seeds} seeds as now"
    elif more_seeds is not None:
        why = f"{varying}: no number of items is enough with {seeds} seeds; with {items} items {more_seeds} seeds are"
    else:
        least = _smallest(lambda n: enough(n, MOST_ITEMS), 2, MOST_SEEDS)
        needed = f"at least {least} seeds and more items" if least else f"more than {MOST_SEEDS} seeds"
        why = f"{varying}: no number of items is enough with {seeds} seeds; it takes {needed}"
    return more_items, more_seeds, why


def shift_of(delta: float, parts: Components, seeds: int, items: int) -> tuple[float, float]:
    """(`delta` in standard errors of its estimate, their degrees of freedom), from expected mean squares."""
    rest = parts.residual**2
    expected = (delta, items * parts.seed**2 + rest, seeds * parts.item**2 + rest, rest)
    mean, of_seeds, of_items, residual = map(np.asarray, expected)
    variance, df = map(float, variance_of_mean(MeanSquares(mean, of_seeds, of_items, residual, seeds, items)))
    return delta / math.sqrt(variance) if variance else math.inf, df


def _smallest(enough: Callable[[int], bool], low: int, most: int) -> int | None:
    if enough(low):
        return low
    high = low
    while not enough(high):
        if high >= most:
            return None
        low, high = high, min(most, 2 * high)
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
