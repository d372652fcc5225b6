"""Differences between arms on the items that both answered, and what may be said about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from db.models import Run
from evaluation.statistics import (
    Interval,
    Verdict,
    bootstrap_mean,
    holm,
    judge,
    paired_differences,
    sign_test,
)

BASE = "base"
BASELINE = "baseline_lora"


@dataclass(frozen=True)
class Difference:
    """AQI category accuracy of an arm minus another's, on the same items.

    Attributes:
        against: The other arm.
        points: Estimate and 95% interval, in percentage points.
        items: Number of paired items.
        p_value: Exact sign test (McNemar's with one seed).
        p_holm: The same, adjusted over all arms.
        verdict: Direction, or undecided.
    """

    against: str
    points: Interval
    items: int
    p_value: float
    p_holm: float
    verdict: Verdict


def find_differences(
    arms: list[str], by_arm: dict[str, list[Run]], answers: dict[int, dict[str, bool]]
) -> dict[str, list[Difference]]:
    """Compare every arm with the base and with baseline_lora.

    Args:
        arms: Arms in the order of the report.
        by_arm: Arm -> its runs, one for each seed.
        answers: Run id -> item id -> answered correctly.

    Returns:
        Arm -> its differences; p-values are adjusted over all arms compared with the same one.
    """
    found: dict[str, list[Difference]] = {}
    for against in (BASE, BASELINE):
        family = [
            (arm, difference)
            for arm in arms
            if arm not in (BASE, against)
            and (difference := _difference(by_arm[arm], against, by_arm.get(against, []), answers))
        ]
        adjusted = holm([difference.p_value for _, difference in family])
        for (arm, difference), p_holm in zip(family, adjusted, strict=True):
            verdict = judge(difference.points, p_holm)
            found.setdefault(arm, []).append(replace(difference, p_holm=p_holm, verdict=verdict))
    return found


def _difference(
    runs: list[Run], against: str, others: list[Run], answers: dict[int, dict[str, bool]]
) -> Difference | None:
    pairs = [
        (answers[run.id], answers[other.id]) for run in runs if (other := _partner(run, against, others)) is not None
    ]
    values = paired_differences(pairs)
    if not values.size:
        return None
    p_value = sign_test(values)
    interval = bootstrap_mean(values).scaled(100)
    return Difference(against, interval, values.size, p_value, p_value, judge(interval, p_value))


def _partner(run: Run, against: str, others: list[Run]) -> Run | None:
    """The run to subtract: the base it refers to, or baseline_lora with its own seed, else the first."""
    if against == BASE:
        return next((other for other in others if other.id == run.reference_run_id), None)
    fair = [
        other
        for other in others
        if other.test_items_sha256 == run.test_items_sha256 and other.backend_name == run.backend_name
    ]
    return next((other for other in fair if other.seed == run.seed), fair[0] if fair else None)


def in_words(difference: Difference) -> str:
    """Say in a clause what the data allow to say."""
    points = difference.points
    numbers = (
        f"{points.estimate:+.1f} points, 95% interval [{points.low:+.1f}, {points.high:+.1f}], {difference.items} items"
    )
    if difference.verdict != "undecided":
        return f"{difference.verdict} than {difference.against} ({numbers})"
    why = (
        "the interval contains zero"
        if points.crosses_zero
        else f"too few items differ: exact test p = {difference.p_holm:.2g}"
    )
    return f"undecided against {difference.against} ({numbers}; {why})"
