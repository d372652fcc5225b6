"""Ratios to the base with their intervals: how much retention accuracy is kept, how much decoding slows down."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from db.queries_compare import Timing
from evaluation.pairs import BASE, Pairs
from evaluation.seeds import crossed_interval
from evaluation.speed import median_interval
from evaluation.statistics import LEVEL, Interval, wilson

RESAMPLES = 10_000


def kept_share(pairs: Pairs) -> Interval | None:
    """An arm's accuracy over the base's, on the same items.

    One seed: percentile bootstrap over items, both arms resampled together (Efron 1979). Several: the interval for
    other seeds and items of own - ratio·base, divided by the base's accuracy (Fieller's numerator at the estimate, the
    delta method), since that is where the ratio's error comes from. Never narrower than Wilson's interval for the share
    kept of the items that the base has right.

    Args:
        pairs: Answers of the arm and of the base.

    Returns:
        Share, 1 for nothing lost; None where the base has nothing right to keep.
    """
    own, base = float(pairs.own.mean()), float(pairs.other.mean())
    if base == 0:
        return None
    ratio = own / base
    if len(pairs.seeds) > 1:
        low, high = _bounds_over_seeds(pairs, ratio, base)
    else:
        low, high = _bounds_over_items(pairs)
    # Items that all behave alike leave the two methods without width; what was right in the base is a sample too.
    sample = wilson(min(ratio, 1.0), max(1, round(float(pairs.other.mean(axis=0).sum()))))
    return Interval(ratio, max(0.0, min(low, sample.low)), max(high, ratio, sample.high))


def _bounds_over_seeds(pairs: Pairs, ratio: float, base: float) -> tuple[float, float]:
    # Half of it lies within -1 and 1 for any ratio up to 1; a ratio beyond 1 is scaled to fit.
    scale = max(1.0, ratio)
    error, _ = crossed_interval((pairs.own - ratio * pairs.other) / scale)
    return ratio + error.low * scale / base, ratio + error.high * scale / base


def _bounds_over_items(pairs: Pairs) -> tuple[float, float]:
    kinds, counts = np.unique(np.stack([pairs.own[0], pairs.other[0]]), axis=1, return_counts=True)
    items = int(counts.sum())
    draws = np.random.default_rng(0).multinomial(items, counts / items, size=RESAMPLES)
    own, base = kinds @ draws.T
    ratios = own[base > 0] / base[base > 0]  # a resample where the base has nothing right has no ratio
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def speed_changes(arm: str, timings: Sequence[Timing]) -> list[float]:
    """Decode speed over that of the base in the same repetition, minus 1, for each repetition of one run.

    Args:
        arm: The run's own arm.
        timings: Of the run, with those of the base beside it.
    """
    own: dict[int, float] = {}
    base: dict[int, float] = {}
    rates = {BASE: base, arm: own}
    for who, phase, repetition, tokens, ns in timings:  # thousands of runs: unpacking costs less than names
        if phase == "decode" and tokens and ns and who in rates:
            rates[who][repetition] = tokens / ns
    return [own[k] / base[k] - 1 for k in sorted(own.keys() & base.keys())]


def speed_interval(changes: Sequence[float]) -> tuple[Interval, float] | None:
    """Median over the repetitions of all seeds, with an interval from their order, which outliers do not move.

    Returns:
        Interval, and its confidence (a share), below 0.95 with fewer than six repetitions; None without any.
    """
    if not changes:
        return None
    found = median_interval(changes, LEVEL)
    return Interval(found["median"], found["low"], found["high"]), found["confidence"]
