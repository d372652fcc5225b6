"""Differences between two arms on the items that both answered, and ratios to the base."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from db.queries import BASE
from evaluation.statistics.intervals import (
    LEVEL,
    RESAMPLES,
    Array,
    Interval,
    Outcome,
    bootstrap_mean,
    holm,
    is_binary,
    judge,
    mean_test,
    wilson,
)
from evaluation.statistics.seeds import crossed_interval, items_interval, mean_interval

SEED_MARGIN = 10.0
"""Points by which the whole interval of one seed must miss zero to tell an arm from the base.

Runs of one arm have varied by up to 4.6 points (standard deviation; vanilla LoRA in LOG.md's entry on GRIT-VLM). What
the margin does to right and wrong calls is in benchmarks/results/one_seed.json.
"""


@dataclass(frozen=True)
class Pairs:
    """Answers of an arm and of its reference to the same items, seed by seed."""

    against: str
    seeds: tuple[int, ...]  # of the arm's runs, S of them
    own: Array  # credit of the arm: right (1), wrong (0) or in between, shape [S, I]
    other: Array  # the same of the reference; of the base all rows come from its one run

    @property
    def differences(self) -> Array:
        """Own - other: above 0 gained, below 0 lost; shape [S, I]."""
        return self.own - self.other

    @property
    def binary(self) -> bool:
        return is_binary(self.own, self.other)


@dataclass(frozen=True)
class Difference:
    """Primary metric of an arm minus another's, on the same items."""

    against: str
    points: Interval  # estimate and 95% interval on which the outcome rests, in percentage points
    items: int
    # one seed: McNemar's exact test, or signs flipped at random where credits lie between 0 and 1; several: Student's t
    # over seeds and items
    p_value: float
    p_holm: float  # the same, adjusted over all arms compared with the same one
    outcome: Outcome
    # what `points` and `p_value` are about: other items only (one seed), or other seeds too
    level: Literal["items", "seeds and items"]
    items_only: Interval  # interval over items alone, as if these seeds were the only ones; points
    seeds: int
    seed_numbers: tuple[int, ...]
    by_seed: tuple[float, ...]  # difference of each of `seed_numbers`, points
    gained: int  # items with more credit here than there, summed over seeds
    lost: int  # the reverse
    binary: bool = True  # whether all answers are right or wrong, none in between
    seeds_only: Interval | None = None  # a check: plain Student's t of `by_seed`, as if these items were the only ones

    @property
    def on_these_items(self) -> str:
        """Where it lies if nothing but the number of seeds leaves the outcome open; else empty."""
        open_for_seeds = self.outcome == "undecided" and self.seeds == 1
        words = {"better": "ahead of", "worse": "behind", "undecided": ""}
        return words[judge(self.points, self.p_holm)] if open_for_seeds else ""


def compare_pairs(found: Mapping[tuple[str, str], Pairs]) -> dict[str, tuple[Difference, ...]]:
    """Judge all pairs, keyed by (arm, against); p-values are adjusted over the arms compared with the same one."""
    raw = {key: difference(pairs) for key, pairs in found.items()}
    judged: dict[str, tuple[Difference, ...]] = {}
    for against in dict.fromkeys(against for _, against in raw):
        family = [(arm, one) for (arm, other), one in raw.items() if other == against]
        adjusted = holm([one.p_value for _, one in family])
        for (arm, one), p_holm in zip(family, adjusted, strict=True):
            outcome = _outcome(against, one.seeds, one.points, p_holm)
            judged[arm] = (*judged.get(arm, ()), replace(one, p_holm=p_holm, outcome=outcome))
    return judged


def _outcome(against: str, seeds: int, points: Interval, p_value: float) -> Outcome:
    """One seed tells no arm from another, and an arm from the base only far beyond what seeds do."""
    if seeds == 1 and (against != BASE or min(abs(points.low), abs(points.high)) <= SEED_MARGIN):
        return "undecided"
    return judge(points, p_value)


def difference(pairs: Pairs) -> Difference:
    values = pairs.differences
    seeds, items = values.shape
    if seeds > 1:
        shares, p_value = crossed_interval(values)
        alone = items_interval(values) if items > 1 else shares
    else:
        shares, p_value = bootstrap_mean(values[0]), mean_test(values[0], binary=pairs.binary)
        alone = shares
    points, by_seed = shares.scaled(100), 100 * values.mean(axis=1)
    return Difference(
        against=pairs.against,
        points=points,
        items=items,
        p_value=p_value,
        p_holm=p_value,
        outcome=_outcome(pairs.against, seeds, points, p_value),
        level="seeds and items" if seeds > 1 else "items",
        items_only=alone.scaled(100),
        seeds=seeds,
        seed_numbers=pairs.seeds,
        by_seed=tuple(map(float, by_seed)),
        gained=int((values > 0).sum()),
        lost=int((values < 0).sum()),
        binary=pairs.binary,
        seeds_only=mean_interval(by_seed) if seeds > 1 else None,
    )


def kept_share(pairs: Pairs) -> Interval | None:
    """An arm's accuracy over the base's, on the same items: 1 for nothing lost; None where the base has nothing right.

    One seed: percentile bootstrap over items, both arms resampled together (Efron 1979). Several: the interval over
    seeds and items of own - ratio·base, divided by the base's accuracy (Fieller's numerator at the estimate). Never
    narrower than Wilson's interval for the share kept of the items that the base has right.
    """
    own, base = float(pairs.own.mean()), float(pairs.other.mean())
    if base == 0:
        return None
    ratio = own / base
    if len(pairs.seeds) > 1:
        # Half of it lies within -1 and 1 for any ratio up to 1; a ratio beyond 1 is scaled to fit.
        scale = max(1.0, ratio)
        error, _ = crossed_interval((pairs.own - ratio * pairs.other) / scale)
        low, high = ratio + error.low * scale / base, ratio + error.high * scale / base
    else:
        low, high = _bounds_over_items(pairs)
    # Items that all behave alike leave the two methods without width; what was right in the base is a sample too.
    sample = wilson(min(ratio, 1.0), max(1, round(float(pairs.other.mean(axis=0).sum()))))
    return Interval(ratio, max(0.0, min(low, sample.low)), max(high, ratio, sample.high))


def _bounds_over_items(pairs: Pairs) -> tuple[float, float]:
    kinds, counts = np.unique(np.stack([pairs.own[0], pairs.other[0]]), axis=1, return_counts=True)
    items = int(counts.sum())
    draws = np.random.default_rng(0).multinomial(items, counts / items, size=RESAMPLES)
    own, base = kinds @ draws.T
    ratios = own[base > 0] / base[base > 0]  # a resample where the base has nothing right has no ratio
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
