"""Intervals and tests on items that several models answered.

The unit is the item: all models answered the same items, so differences are taken item by item, which removes the
difficulty of the items from the noise. A difference is a share, from -1 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEVEL = 0.95
ALPHA = 0.05
MOST_EXACT = 12
"""Up to this many differences, all sign combinations are tried; 2^-12 is far below any significance level."""
FLIPS = 10_000
RESAMPLES = 10_000
AT_ONCE = 4_000_000
"""Random numbers drawn at once, so that resampling many items does not take gigabytes."""
_MOST_DISTINCT = 256
"""With up to this many distinct values, a resample is drawn as counts; sums of 0 and 1 over 100 seeds have fewer."""
Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its confidence interval, all in the same unit."""

    estimate: float
    low: float
    high: float

    @property
    def crosses_zero(self) -> bool:
        return not (self.low > 0 or self.high < 0)

    def scaled(self, factor: float) -> Interval:
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


def aligned(answers: Sequence[Mapping[str, float]]) -> Array:
    """Credit on the items that all answers have in common, ordered by item id; shape [answers, items]."""
    if not answers:
        return np.zeros((0, 0))
    items = sorted(set.intersection(*map(set, answers)))
    return np.array([[credit[item] for item in items] for credit in answers], dtype=np.float64)


def bootstrap_mean(values: Array, *, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap interval of a mean, items resampled with replacement (Efron 1979).

    With few distinct values, a resample is drawn as counts of each (multinomial): the same distribution, but faster.
    The same data give the same interval.
    """
    if values.size == 0:
        raise ValueError("expected at least one item, got none")
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(0)
    if distinct.size <= _MOST_DISTINCT:
        means = rng.multinomial(values.size, counts / values.size, size=resamples) @ distinct / values.size
    else:
        parts = in_parts(resamples, values.size)
        drawn = [values[rng.integers(values.size, size=(part, values.size))].mean(axis=1) for part in parts]
        means = np.concatenate(drawn)
    # Rounded, so that a mean of exactly zero does not become 1e-17 and count as a gain.
    means = np.round(means, 12)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(share: float, items: int) -> Interval:
    """Score interval of a share of right answers (Wilson 1927), which keeps its width at 0 and 1.

    It is conservative for shares averaged over seeds, which vary less than single answers.
    """
    z = 1.959964  # 95%
    spread = 1 + z * z / items
    center = (share + z * z / (2 * items)) / spread
    half = z * math.sqrt(share * (1 - share) / items + z * z / (4 * items * items)) / spread
    # Rounding must not lead outside 0 to 1.
    return Interval(share, max(0.0, min(share, center - half)), min(1.0, max(share, center + half)))


def share_interval(values: Array, *, binary: bool) -> Interval:
    """Interval of a mean credit, shape (items,) or (seeds, items): Wilson's if `binary`, else by bootstrap."""
    if binary:
        return wilson(float(values.mean()), values.shape[-1])
    by_item = values.reshape(-1, values.shape[-1]).mean(axis=0)
    # A single credit says nothing about others, and its bootstrap interval has no width.
    return bootstrap_mean(by_item) if by_item.size > 1 else Interval(float(by_item[0]), 0.0, 1.0)


def is_binary(*values: Array) -> bool:
    """Whether every credit is 0 or 1: answers are right or wrong, nothing in between."""
    return all(bool(((credit == 0) | (credit == 1)).all()) for credit in values)


def sign_test(differences: Array) -> float:
    """Exact two-sided p-value that gains and losses among the differing items are equally likely.

    With one seed this is McNemar's exact test (1947). It backs up the interval, too narrow if only a few items differ.
    """
    gains, losses = int((differences > 0).sum()), int((differences < 0).sum())
    total = gains + losses
    tail = sum(math.comb(total, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def sign_flip_test(differences: Array, *, flips: int = FLIPS) -> float:
    """Two-sided p-value for each item's difference having either sign with equal probability (Fisher 1935).

    Exact if at most `MOST_EXACT` items differ (for right and wrong answers: McNemar's test), else from random flips,
    with one added to both counts (Phipson & Smyth 2010), so that p is never 0.
    """
    values = differences[differences != 0]
    items = values.size
    # Equal sums may differ by rounding, and must count as equal.
    threshold = abs(float(values.sum())) - 1e-9
    if items <= MOST_EXACT:
        ways = (np.arange(2**items)[:, None] >> np.arange(items)) & 1
        return float((np.abs((1 - 2 * ways) @ values) >= threshold).mean())
    rng = np.random.default_rng(0)
    extreme = 0
    for part in in_parts(flips, items):
        signs = rng.integers(2, size=(part, items), dtype=np.int8)
        extreme += int((np.abs(values.sum() - 2 * (signs @ values)) >= threshold).sum())
    return (1 + extreme) / (1 + flips)


def in_parts(rows: int, width: int) -> list[int]:
    """Split `rows` into parts small enough to be drawn at once."""
    most = max(1, AT_ONCE // max(1, width))
    return [min(most, rows - start) for start in range(0, rows, most)]


def mean_test(differences: Array, *, binary: bool) -> float:
    return sign_test(differences) if binary else sign_flip_test(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for several comparisons at once (Holm 1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def judge(interval: Interval, p_value: float) -> Outcome:
    """Name a direction only if the interval excludes zero and the exact test agrees."""
    if interval.crosses_zero or p_value >= ALPHA:
        return "undecided"
    return "better" if interval.low > 0 else "worse"
