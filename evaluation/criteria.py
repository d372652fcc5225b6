"""The success criteria that the experiment was planned with, each judged by a whole interval.

Passed only when the whole 95% interval lies on the right side of the threshold, failed when all of it lies on the
wrong side, else undecided. For accuracies the p-value, corrected for several arms, must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evaluation.differences import Difference
from evaluation.pairs import BASE
from evaluation.primary import FIRST, Primary
from evaluation.statistics import LEVEL, Interval, Verdict

Outcome = Literal["pass", "fail", "undecided"]

GAIN = "accuracy gain"
"""Of the primary metric, whatever it is called: CSV has a column of this name for every task."""
LEAD = "above the baseline"
SPEED = "speed loss"
KEPT = "retention kept"
NAMES = (GAIN, LEAD, SPEED, KEPT)

SPEED_THRESHOLD = -10.0
"""Percent; decoding may lose less than a tenth of the base's speed."""
KEPT_THRESHOLD = 70.0
"""Percent of the base's retention accuracy; the plan says only "general knowledge retention > 70%"."""

_OUTCOMES: dict[Verdict, Outcome] = {"better": "pass", "worse": "fail", "undecided": "undecided"}


@dataclass(frozen=True)
class Criterion:
    """One criterion, judged for one arm.

    Attributes:
        name: One of `NAMES`.
        arm: The arm.
        threshold: What is asked for, in words.
        estimate: Estimate and interval, in `unit`; None where it was not measured.
        unit: Points (percentage points) or percent.
        outcome: pass, fail or undecided.
        why: A sentence.
        confidence: Of the interval, percent; below 95 where too few repetitions were timed, 0 of a single one.
    """

    name: str
    arm: str
    threshold: str
    estimate: Interval | None
    unit: str
    outcome: Outcome
    why: str
    confidence: float = 100 * LEVEL


def by_difference(arm: str, against: str, difference: Difference | None, primary: Primary = FIRST) -> Criterion:
    """Better than the base (ΔAQI > 0), or than the baseline, by the primary metric of the task."""
    name = GAIN if against == BASE else LEAD
    threshold = f"Δ{primary.short} > 0 against base" if against == BASE else f"{primary.title} above {against}"
    if difference is None:
        return _missing(name, arm, threshold, "points", f"No run of {against} with the same items, backend and seed.")
    points = difference.points
    if difference.verdict != "undecided":
        side = "above" if difference.verdict == "better" else "below"
        why = f"The whole interval is {side} zero, and p = {difference.p_holm:.2g} after correction for several arms."
    elif points.crosses_zero:
        why = "The interval contains zero."
    else:
        why = (
            f"Not shown: the interval excludes zero, but p = {difference.p_holm:.2g} after correction for several arms."
        )
    if difference.seeds == 1:
        why += " One seed: other seeds may differ."
    return Criterion(name, arm, threshold, points, "points", _OUTCOMES[difference.verdict], why)


def by_speed(arm: str, interval: Interval | None, confidence: float, repetitions: int) -> Criterion:
    """Decoding loses less than 10% against the base timed beside it.

    Args:
        arm: The arm.
        interval: Change of decode speed, percent.
        confidence: Of the interval, a share.
        repetitions: Behind it.
    """
    threshold = f"Δ speed > {SPEED_THRESHOLD:.0f}%"
    if interval is None:
        return _missing(SPEED, arm, threshold, "percent", "Decoding was not timed beside the base.")
    if confidence < LEVEL:
        why = (
            f"{repetitions} paired repetitions give an interval of {100 * confidence:.0f}% confidence at most; "
            "six or more are needed for 95%."
        )
        return Criterion(SPEED, arm, threshold, interval, "percent", "undecided", why, 100 * confidence)
    return _by_threshold(SPEED, arm, threshold, interval, SPEED_THRESHOLD, f"{repetitions} paired repetitions.")


def by_retention(arm: str, share: Interval | None, accuracy: float | None) -> Criterion:
    """Keeps more than 70% of the base's accuracy on the retention items.

    Args:
        arm: The arm.
        share: Of the base's accuracy, percent.
        accuracy: The arm's plain accuracy there, percent.
    """
    threshold = f"retention > {KEPT_THRESHOLD:.0f}% of the base's"
    if share is None:
        return _missing(KEPT, arm, threshold, "percent", "Not measured on the same items as the base.")
    plain = "" if accuracy is None else f"Plain accuracy {accuracy:.1f}%."
    return _by_threshold(KEPT, arm, threshold, share, KEPT_THRESHOLD, plain)


def _by_threshold(name: str, arm: str, threshold: str, interval: Interval, limit: float, rest: str) -> Criterion:
    outcome: Outcome = "pass" if interval.low > limit else "fail" if interval.high < limit else "undecided"
    where = {"pass": "above", "fail": "below", "undecided": "on both sides of"}[outcome]
    why = f"The {'whole ' if outcome != 'undecided' else ''}interval is {where} {limit:.0f}%. {rest}".strip()
    return Criterion(name, arm, threshold, interval, "percent", outcome, why)


def _missing(name: str, arm: str, threshold: str, unit: str, why: str) -> Criterion:
    return Criterion(name, arm, threshold, None, unit, "undecided", why)


def for_arm(criteria: Sequence[Criterion], arm: str, name: str) -> Criterion | None:
    """Return an arm's criterion of a name, if it applies to the arm."""
    return next((c for c in criteria if c.arm == arm and c.name == name), None)
