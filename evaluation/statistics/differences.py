"""Differences between two arms on the items that both answered, and ratios to the base."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from db.runs import BASE
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
from evaluation.statistics.seeds import crossed_interval, mean_interval

SEED_MARGIN = 10.0
"""Points by which the whole interval of a single seed must miss zero for an arm to count as different from the base.

Runs of one arm have varied by up to 4.6 points (standard deviation; vanilla LoRA in docs/log, entry on GRIT-VLM). Its
effect on right and wrong calls is in benchmarks/results/one_seed.json.
"""


@dataclass(frozen=True)
class Pairs:
    """Answers of an arm and of its reference to the same items, seed by seed."""

    against: str
    seeds: tuple[int, ...]  # of the arm's S runs
    credit: Array  # of the arm: right (1), wrong (0) or in between, shape [S, I]
    reference: Array  # the same of what it is compared with; all rows of the base come from its one run

    @property
    def differences(self) -> Array:
        """Credit − reference: above 0 is a gain, below 0 a loss; shape [S, I]."""
        return self.credit - self.reference

    @property
    def binary(self) -> bool:
        return is_binary(self.credit, self.reference)


@dataclass(frozen=True)
class Difference:
    """Primary metric of an arm minus another's, on the same items."""

    against: str
    points: Interval  # estimate and 95% interval on which the outcome rests, in percentage points
    items: int
    # one seed: McNemar's exact test, or random sign flips if credits lie between 0 and 1; several: Student's t over
    # seeds and items
    p_value: float
    p_holm: float  # the same, adjusted for all arms compared with the same one
    outcome: Outcome
    # what `points` and `p_value` generalize to: other items only (one seed), or other seeds too
    level: Literal["items", "seeds and items"]
    seeds: int
    seed_numbers: tuple[int, ...]
    by_seed: tuple[float, ...]  # difference of each of `seed_numbers`, points
    gained: int  # items with more credit than the reference, summed over seeds
    lost: int  # items with less
    binary: bool = True  # whether all answers are right or wrong, nothing in between
    seeds_only: Interval | None = (
        None  # as a check: plain Student's t of `by_seed`, as if these items were the only ones
    )

    @property
    def on_these_items(self) -> str:
        """Where the arm stands if only the number of seeds leaves the outcome open; else empty."""
        open_for_seeds = self.outcome == "undecided" and self.seeds == 1
        words = {"better": "ahead of", "worse": "behind", "undecided": ""}
        return words[judge(self.points, self.p_holm)] if open_for_seeds else ""


def compare_pairs(pairs: Mapping[tuple[str, str], Pairs]) -> dict[str, tuple[Difference, ...]]:
    """Judge all pairs, keyed by (arm, against); p-values are adjusted over the arms compared with the same one."""
    raw = {key: difference(pair) for key, pair in pairs.items()}
    judged: dict[str, tuple[Difference, ...]] = {}
    for against in dict.fromkeys(against for _, against in raw):
        family = [(arm, one) for (arm, other), one in raw.items() if other == against]
        adjusted = holm([one.p_value for _, one in family])
        for (arm, one), p_holm in zip(family, adjusted, strict=True):
            outcome = _outcome(against, one.seeds, one.points, p_holm)
            judged[arm] = (*judged.get(arm, ()), replace(one, p_holm=p_holm, outcome=outcome))
    return judged


def _outcome(against: str, seeds: int, points: Interval, p_value: float) -> Outcome:
    """One seed cannot separate two arms, and an arm from the base only far beyond the variation between seeds."""
    if seeds == 1 and (against != BASE or min(abs(points.low), abs(points.high)) <= SEED_MARGIN):
        return "undecided"
    return judge(points, p_value)


def difference(pairs: Pairs) -> Difference:
    values = pairs.differences
    seeds, items = values.shape
    if seeds > 1:
        shares, p_value = crossed_interval(values)
    else:
        shares, p_value = bootstrap_mean(values[0]), mean_test(values[0], binary=pairs.binary)
    points, by_seed = shares.scaled(100), 100 * values.mean(axis=1)
    return Difference(
        against=pairs.against,
        points=points,
        items=items,
        p_value=p_value,
        p_holm=p_value,
        outcome=_outcome(pairs.against, seeds, points, p_value),
        level="seeds and items" if seeds > 1 else "items",
        seeds=seeds,
        seed_numbers=pairs.seeds,
        by_seed=tuple(map(float, by_seed)),
        gained=int((values > 0).sum()),
        lost=int((values < 0).sum()),
        binary=pairs.binary,
        seeds_only=mean_interval(by_seed) if seeds > 1 else None,
    )


def kept_share(pairs: Pairs) -> Interval | None:
    """An arm's accuracy divided by the base's on the same items: 1 if nothing is lost; None if the base has none right.

    One seed: percentile bootstrap over items, both arms resampled together (Efron 1979). Several: the interval over
    seeds and items of arm − ratio·base, divided by the base's accuracy (Fieller's numerator at the estimate). Never
    narrower than Wilson's interval for that share of the items that the base has right.
    """
    accuracy, base = float(pairs.credit.mean()), float(pairs.reference.mean())
    if base == 0:
        return None
    ratio = accuracy / base
    if len(pairs.seeds) > 1:
        # Ratios above 1 are scaled, so that the error lies between -1 and 1.
        scale = max(1.0, ratio)
        error, _ = crossed_interval((pairs.credit - ratio * pairs.reference) / scale)
        low, high = ratio + error.low * scale / base, ratio + error.high * scale / base
    else:
        low, high = _bounds_over_items(pairs)
    # If all items behave alike, both methods give no width; but what the base had right is a sample too.
    sample = wilson(min(ratio, 1.0), max(1, round(float(pairs.reference.mean(axis=0).sum()))))
    return Interval(ratio, max(0.0, min(low, sample.low)), max(high, ratio, sample.high))


def _bounds_over_items(pairs: Pairs) -> tuple[float, float]:
    kinds, counts = np.unique(np.stack([pairs.credit[0], pairs.reference[0]]), axis=1, return_counts=True)
    items = int(counts.sum())
    draws = np.random.default_rng(0).multinomial(items, counts / items, size=RESAMPLES)
    arm, base = kinds @ draws.T
    ratios = arm[base > 0] / base[base > 0]  # undefined for a resample in which the base has nothing right
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
