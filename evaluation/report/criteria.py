"""The success criteria that the experiment was planned with, each judged by a whole interval.

Passed only when the whole 95% interval lies on the right side of the threshold, failed when all of it lies on the
wrong side, else undecided. For accuracies the p-value, corrected for several arms, must agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from db.queries import BASE
from evaluation.report.arms import ArmRow, SpeedChange
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import LEVEL, Interval
from evaluation.statistics.seeds import mean_interval

Outcome = Literal["pass", "fail", "undecided"]

GAIN = "accuracy gain"
"""Of the primary metric, whatever it is called: CSV has a column of this name for every task."""
LEAD = "above the baseline"
LOSS = "evaluation loss"
SPEED = "speed loss"
KEPT = "retention kept"
NAMES = (GAIN, LEAD, LOSS, SPEED, KEPT)
NATS = "nats per token"

SPEED_THRESHOLD = -10.0
"""Percent; decoding may lose less than a tenth of the base's speed."""
KEPT_THRESHOLD = 70.0
"""Percent of the base's retention accuracy; the plan says only "general knowledge retention > 70%"."""


@dataclass(frozen=True)
class Criterion:
    name: str
    arm: str
    threshold: str
    # in `unit`: points (percentage points), percent or nats per token; None where it was not measured
    estimate: Interval | None
    unit: str
    outcome: Outcome
    why: str
    # of the interval, percent; below 95 where too few repetitions were timed, 0 of a single one and of a single seed
    confidence: float = 100 * LEVEL


def judge_arm(row: ArmRow, baseline: str, change: SpeedChange, *, short: str, title: str) -> list[Criterion]:
    """Judge all criteria of an arm; `short` and `title` name the task's primary metric."""
    found = [by_difference(GAIN, row.arm, f"Δ{short} > 0 against base", BASE, row.against(BASE))]
    for other in dict.fromkeys((baseline, row.like)):
        if other and other not in (BASE, row.arm):
            found.append(by_difference(LEAD, row.arm, f"{title} above {other}", other, row.against(other)))
            found.append(by_loss(row.arm, other, row.losses.get(other, ())))
    return [*found, by_speed(row.arm, change), by_retention(row.arm, row.retention_share_interval, row.retention)]


def by_difference(name: str, arm: str, threshold: str, against: str, difference: Difference | None) -> Criterion:
    if difference is None:
        return _missing(name, arm, threshold, "points", f"No run of {against} with the same items, backend and seed.")
    points = difference.points
    if difference.outcome != "undecided":
        side = "above" if difference.outcome == "better" else "below"
        why = f"The whole interval is {side} zero, and p = {difference.p_holm:.2g} after correction for several arms."
    elif where := difference.on_these_items:
        why = f"{where.capitalize()} {against} on these items, p = {difference.p_holm:.2g} after correction: undecided."
    elif points.crosses_zero:
        why = "The interval contains zero."
    else:
        why = (
            f"Not shown: the interval excludes zero, but p = {difference.p_holm:.2g} after correction for several arms."
        )
    if difference.seeds == 1:
        why += " One seed: other seeds may differ."
    outcomes: dict[str, Outcome] = {"better": "pass", "worse": "fail", "undecided": "undecided"}
    return Criterion(name, arm, threshold, points, "points", outcomes[difference.outcome], why)


def by_loss(arm: str, against: str, differences: Sequence[float]) -> Criterion:
    """The evaluation loss is lower; `differences` are seed by seed, and not corrected for several arms."""
    threshold = f"loss below that of {against}"
    if not differences:
        return _missing(LOSS, arm, threshold, NATS, f"No run of {against} with the same seed has an evaluation loss.")
    seeds = len(differences)
    with np.errstate(invalid="ignore"):  # a run that diverged
        found = mean_interval(np.array(differences))
    if not math.isfinite(found.estimate):
        return Criterion(LOSS, arm, threshold, found, NATS, "undecided", "Not finite for every seed.")
    if seeds == 1:
        return Criterion(LOSS, arm, threshold, found, NATS, "undecided", "One seed: other seeds may differ.", 0)
    outcome: Outcome = "undecided" if found.crosses_zero else "pass" if found.high < 0 else "fail"
    where = {"pass": "is below", "fail": "is above", "undecided": "contains"}[outcome]
    why = f"The {'whole ' if outcome != 'undecided' else ''}interval {where} zero. {seeds} seeds."
    return Criterion(LOSS, arm, threshold, found, NATS, outcome, why)


def by_speed(arm: str, change: SpeedChange) -> Criterion:
    """Decoding loses less than 10% against the base timed beside it."""
    threshold = f"Δ speed > {SPEED_THRESHOLD:.0f}%"
    if change.interval is None:
        return _missing(SPEED, arm, threshold, "percent", "Decoding was not timed beside the base.")
    if change.confidence < LEVEL:
        why = (
            f"{change.repetitions} paired repetitions give an interval of {100 * change.confidence:.0f}% confidence at "
            "most; six or more are needed for 95%."
        )
        return Criterion(SPEED, arm, threshold, change.interval, "percent", "undecided", why, 100 * change.confidence)
    rest = f"{change.repetitions} paired repetitions."
    return _by_threshold(SPEED, arm, threshold, change.interval, SPEED_THRESHOLD, rest)


def by_retention(arm: str, share: Interval | None, accuracy: float | None) -> Criterion:
    """Keeps more than 70% of the base's accuracy on the retention items; both in percent."""
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
    return next((c for c in criteria if c.arm == arm and c.name == name), None)
