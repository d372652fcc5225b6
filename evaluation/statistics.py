"""Paired statistics on items that several models answered. Pure functions of arrays; no files, no models.

The unit is the item: models answered the same items, so differences are taken item by item, which removes
the items' own difficulty from the noise. A difference is a number from -1 to 1 (a share).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
ALPHA = 0.05
Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval, all in one unit."""

    estimate: float
    low: float
    high: float

    @property
    def crosses_zero(self) -> bool:
        """True when zero lies inside or on the border: the data allow both directions."""
        return not (self.low > 0 or self.high < 0)

    def scaled(self, factor: float) -> Interval:
        """Return the interval in another unit, for example percentage points with factor 100."""
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


def paired_differences(
    pairs: Sequence[tuple[Mapping[str, bool], Mapping[str, bool]]],
) -> NDArray[np.float64]:
    """Return per item the difference of correctness, averaged over seeds.

    Args:
        pairs: For each seed, item id -> correct, of the arm and of its reference.

    Returns:
        Shape (items,), over the items that every mapping holds, ordered by item id.
    """
    if not pairs:
        return np.zeros(0)
    common = set.intersection(*(set(answers) for pair in pairs for answers in pair))
    items = sorted(common)
    by_seed = [[float(arm[item]) - float(reference[item]) for item in items] for arm, reference in pairs]
    return np.asarray(by_seed, dtype=np.float64).mean(axis=0)


def bootstrap_mean(
    values: NDArray[np.float64], *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of a mean, items resampled with replacement (Efron 1979).

    Few distinct values occur, so a resample is drawn as counts of each (multinomial), which is the same
    distribution as drawing items and takes milliseconds.

    Args:
        values: Shape (items,).
        level: Coverage, from 0 to 1.
        resamples: Number of resamples.
        seed: Of the random generator; the same data give the same interval.

    Raises:
        ValueError: There are no items.
    """
    if values.size == 0:
        raise ValueError("expected at least one item, came none")
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=resamples)
    # Rounded, so that a mean of exactly zero cannot come out as 1e-17 and count as a gain.
    means = np.round(draws @ distinct / values.size, 12)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(share: float, items: int, *, z: float = 1.959964) -> Interval:
    """Score interval of a share of right answers (Wilson 1927), which does not shrink to nothing at 0 and 1.

    For correctness averaged over seeds it is wide enough: such values vary less than single right or wrong answers.

    Args:
        share: Estimate, from 0 to 1.
        items: Number of items, ≥ 1.
        z: Quantile of the normal distribution; the default covers 95%.
    """
    spread = 1 + z * z / items
    middle = (share + z * z / (2 * items)) / spread
    half = z * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items)) / spread
    # Rounding must not lead beyond what a share can be.
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def sign_test(differences: NDArray[np.float64]) -> float:
    """Exact two-sided p-value that gains and losses among the differing items are equally likely.

    With one seed this is McNemar's exact test (McNemar 1947): items answered alike carry no information.
    It guards the interval, which is too narrow when only a handful of items differ.
    """
    gains, losses = int((differences > 0).sum()), int((differences < 0).sum())
    total = gains + losses
    tail = sum(math.comb(total, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several comparisons at once (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def judge(interval: Interval, p_value: float) -> Verdict:
    """Name a direction only when the interval excludes zero and the exact test agrees."""
    if interval.crosses_zero or p_value >= ALPHA:
        return "undecided"
    return "better" if interval.low > 0 else "worse"
