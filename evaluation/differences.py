"""Differences between arms on the items that both answered, and what may be said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evaluation.pairs import BASE, BASELINE, Answered, Pairs, RunLike, pair
from evaluation.seeds import crossed_interval, items_interval
from evaluation.statistics import ALPHA, Interval, Verdict, bootstrap_mean, holm, judge, mean_test

__all__ = ["BASE", "BASELINE", "Difference", "compare_pairs", "find_pairs", "in_words"]

Level = Literal["items", "seeds and items"]


@dataclass(frozen=True)
class Difference:
    """Primary metric of an arm minus another's, on the same items.

    Attributes:
        against: The other arm.
        points: Estimate and 95% interval on which the verdict rests, in percentage points.
        items: Number of paired items.
        p_value: One seed: McNemar's exact test, or signs flipped at random where credits lie between 0 and 1; several:
            Student's t over seeds and items.
        p_holm: The same, adjusted over all arms compared with the same one.
        verdict: Direction, or undecided.
        level: What `points` and `p_value` are about: other items only (one seed), or other seeds too.
        items_only: Interval over items alone, as if these seeds were the only ones; points.
        seeds: Number of paired seeds.
        seed_numbers: Those seeds.
        by_seed: Difference of each of them, in the same order, points.
        gained: Items right here and wrong there (with more credit here than there), summed over seeds.
        lost: The reverse.
        binary: Whether all answers are right or wrong, none in between.
    """

    against: str
    points: Interval
    items: int
    p_value: float
    p_holm: float
    verdict: Verdict
    level: Level
    items_only: Interval
    seeds: int
    seed_numbers: tuple[int, ...]
    by_seed: tuple[float, ...]
    gained: int
    lost: int
    binary: bool = True


def find_pairs(
    arms: Sequence[str], by_arm: Mapping[str, Sequence[RunLike]], answers: Answered, baseline: str = BASELINE
) -> dict[tuple[str, str], Pairs]:
    """Hold every arm against the base and against the baseline.

    Args:
        arms: In the order of the report.
        by_arm: Arm -> its runs, one for each seed.
        answers: Of all of them.
        baseline: The arm to compare with besides the base.

    Returns:
        (arm, against) -> their answers; only where both answered the same items.
    """
    found = {
        (arm, against): pair(by_arm[arm], against, by_arm.get(against, ()), answers)
        for against in dict.fromkeys((BASE, baseline))
        for arm in arms
        if arm not in (BASE, against)
    }
    return {key: pairs for key, pairs in found.items() if pairs is not None}


def compare_pairs(found: Mapping[tuple[str, str], Pairs]) -> dict[str, tuple[Difference, ...]]:
    """Judge all pairs; p-values are adjusted over the arms compared with the same one (Holm 1979).

    Returns:
        Arm -> its differences, in the order given.
    """
    raw = {key: _difference(pairs) for key, pairs in found.items()}
    judged: dict[str, tuple[Difference, ...]] = {}
    for against in dict.fromkeys(against for _, against in raw):
        family = [(arm, difference) for (arm, other), difference in raw.items() if other == against]
        adjusted = holm([difference.p_value for _, difference in family])
        for (arm, difference), p_holm in zip(family, adjusted, strict=True):
            final = replace(difference, p_holm=p_holm, verdict=judge(difference.points, p_holm))
            judged[arm] = (*judged.get(arm, ()), final)
    return judged


def _difference(pairs: Pairs) -> Difference:
    values = pairs.differences
    seeds, items = values.shape
    if seeds > 1:
        shares, p_value = crossed_interval(values)
        alone = items_interval(values) if items > 1 else shares
    else:
        shares, p_value = bootstrap_mean(values[0]), mean_test(values[0], binary=pairs.binary)
        alone = shares
    points = shares.scaled(100)
    return Difference(
        against=pairs.against,
        points=points,
        items=items,
        p_value=p_value,
        p_holm=p_value,
        verdict=judge(points, p_value),
        level="seeds and items" if seeds > 1 else "items",
        items_only=alone.scaled(100),
        seeds=seeds,
        seed_numbers=pairs.seeds,
        by_seed=tuple(float(100 * value) for value in values.mean(axis=1)),
        gained=int((values > 0).sum()),
        lost=int((values < 0).sum()),
        binary=pairs.binary,
    )


def in_words(difference: Difference) -> str:
    """Say in a clause what the data allow to say."""
    points, alone = difference.points, difference.items_only
    estimate, *bounds = (
        f"{value:+z.1f}" for value in (points.estimate, points.low, points.high, alone.low, alone.high)
    )
    numbers = f"{estimate} points, 95% interval [{bounds[0]}, {bounds[1]}], {difference.items} items"
    if difference.seeds > 1:
        numbers += f" and {difference.seeds} seeds; over items alone [{bounds[2]}, {bounds[3]}]"
    else:
        numbers += ", one seed: others may differ"
    if difference.verdict != "undecided":
        return f"significantly {difference.verdict} than {difference.against} ({numbers}; p = {difference.p_holm:.2g})"
    if points.crosses_zero:
        return f"undecided against {difference.against} ({numbers}; the interval contains zero)"
    if difference.p_value >= ALPHA:
        why = f"too few items differ: p = {difference.p_value:.2g}"
    else:
        why = f"not after the correction for several arms: p = {difference.p_holm:.2g}"
    side = "better" if points.low > 0 else "worse"
    return f"not shown to be {side} than {difference.against} ({numbers}; {why})"
