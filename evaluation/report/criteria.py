"""The success criteria that the experiment was planned with, each judged by a whole interval, and their chapter.

A criterion passes only where the whole 95% interval lies on the right side of the threshold, fails where all of it
lies on the wrong side, and is undecided otherwise. For accuracies the p-value, corrected for several arms, must agree.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from db.runs import BASE
from evaluation.report.arms import ArmRow, SpeedChange
from evaluation.report.blocks import TONES, Cell, Section, Table, Text, arm_cell
from evaluation.report.judgement import Judgement, by_difference, by_interval
from evaluation.report.text import interval
from evaluation.statistics.intervals import LEVEL, Interval
from evaluation.statistics.seeds import mean_interval

Passed = Literal["pass", "fail", "undecided"]
GAIN = "accuracy gain"
"""Of the primary metric, whatever it is called: CSV has a column of this name for every task."""
LEAD = "above the baseline"
LOSS = "evaluation loss"
SPEED = "speed loss"
KEPT = "retention kept"
NAMES = (GAIN, LEAD, LOSS, SPEED, KEPT)
NATS = "nats per token"

_OUTCOMES: Mapping[str, Passed] = {"better": "pass", "worse": "fail", "undecided": "undecided"}
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
    outcome: Passed
    why: str
    # of the interval, percent; below 95 where too few repetitions were timed, 0 for a single value
    confidence: float = 100 * LEVEL


def _criterion(
    name: str, arm: str, threshold: str, estimate: Interval | None, unit: str, judged: Judgement | str,
    confidence: float = 100 * LEVEL,
) -> Criterion:  # fmt: skip
    """`judged` as a string is the reason why nothing can be decided."""
    judgement = Judgement("undecided", judged) if isinstance(judged, str) else judged
    why = f"{judgement.reason[0].upper()}{judgement.reason[1:]}."
    return Criterion(name, arm, threshold, estimate, unit, _OUTCOMES[judgement.outcome], why, confidence)


def judge_arm(row: ArmRow, baseline: str, *, short: str, title: str) -> list[Criterion]:
    """Judge all criteria of an arm; `short` and `title` name the task's primary metric."""
    judged = [_accuracy(row, GAIN, f"Δ{short} > 0 against base", BASE)]
    for other in dict.fromkeys((baseline, row.like)):
        if other and other not in (BASE, row.arm):
            judged.append(_accuracy(row, LEAD, f"{title} above {other}", other))
            judged.append(by_loss(row.arm, other, row.losses.get(other, ())))
    return [*judged, by_speed(row.arm, row.speed), by_retention(row.arm, row.retention_kept, row.retention)]


def _accuracy(row: ArmRow, name: str, threshold: str, against: str) -> Criterion:
    difference = row.against(against)
    if difference is None:
        why = f"no run of {against} has the same items, backend and seed"
        return _criterion(name, row.arm, threshold, None, "points", why)
    judged = by_difference(difference)
    if difference.seeds == 1 and not difference.on_these_items:
        judged = judged.noting("and another seed may differ")
    return _criterion(name, row.arm, threshold, difference.points, "points", judged)


def by_loss(arm: str, against: str, differences: Sequence[float]) -> Criterion:
    """The evaluation loss is lower; `differences` are seed by seed, and not corrected for several arms."""
    seeds, mean, judged = len(differences), None, Judgement("undecided", "one seed decides nothing")
    if not differences:
        judged = Judgement("undecided", f"no run of {against} with the same seed has an evaluation loss")
    else:
        with np.errstate(invalid="ignore"):  # a run that diverged
            mean = mean_interval(np.array(differences))
        if not math.isfinite(mean.estimate):
            judged = Judgement("undecided", "not finite for every seed")
        elif seeds > 1:
            judged = by_interval(mean, lower_is_better=True).noting(f"over {seeds} seeds")
    confidence = 0 if seeds == 1 else 100 * LEVEL
    return _criterion(LOSS, arm, f"loss below that of {against}", mean, NATS, judged, confidence)


def by_speed(arm: str, change: SpeedChange) -> Criterion:
    """Decoding loses less than 10% against the base timed beside it."""
    threshold, confidence = f"Δ speed > {SPEED_THRESHOLD:.0f}%", 100 * change.confidence
    if change.interval is None:
        return _criterion(SPEED, arm, threshold, None, "percent", "decoding was not timed beside the base")
    if change.confidence < LEVEL:
        why = (
            f"{change.repetitions} paired repetitions give at most a {confidence:.0f}% interval; 95% needs six or more"
        )
        return _criterion(SPEED, arm, threshold, change.interval, "percent", why, confidence)
    judged = by_interval(change.interval, SPEED_THRESHOLD, "%")
    judged = judged.noting(f"over {change.repetitions} paired repetitions")
    return _criterion(SPEED, arm, threshold, change.interval, "percent", judged)


def by_retention(arm: str, share: Interval | None, accuracy: float | None) -> Criterion:
    """Keeps more than 70% of the base's accuracy on the retention items; both in percent."""
    threshold = f"retention > {KEPT_THRESHOLD:.0f}% of the base's"
    if share is None:
        return _criterion(
            KEPT, arm, threshold, None, "percent", "the base was not asked the same items, or has too few right"
        )
    judged = by_interval(share, KEPT_THRESHOLD, "%")
    if accuracy is not None:
        judged = judged.noting(f"with a plain accuracy of {accuracy:.1f}%")
    return _criterion(KEPT, arm, threshold, share, "percent", judged)


def for_arm(criteria: Sequence[Criterion], arm: str, name: str) -> Criterion | None:
    return next((c for c in criteria if c.arm == arm and c.name == name), None)


# The chapter


def criteria(judged: Sequence[Criterion], gain: str = GAIN) -> Section | None:
    """What passed and failed, and why; `gain` names the first criterion, since not every metric is an accuracy."""
    if not judged:
        return None
    words = (
        "Three goals were set before the run: accuracy above the baseline's, evaluation loss below the baseline's, and "
        "retention. Loss is compared seed by seed with Student's t and without correction for several arms; one seed "
        "decides nothing."
    )
    lines = [
        (Cell(gain if c.name == GAIN else c.name, hint=c.threshold), arm_cell(c.arm),
         Cell(c.outcome, tone=TONES[c.outcome]), _estimate(c), c.why)
        for c in sorted(judged, key=lambda c: NAMES.index(c.name))
    ]  # fmt: skip
    caption = "Success criteria: pass or fail only where the whole 95% interval is on one side"
    table = Table(caption, ("Criterion", "Arm", "Outcome", "Estimate", "Why"), lines, ("Why",))
    return Section("Success criteria", (Text(words, "note"), table), brief=2)


def _estimate(criterion: Criterion) -> Cell:
    if criterion.estimate is None:
        return Cell("–")
    # The share of the base's accuracy that is kept is not a change, so it has no sign.
    points = interval(criterion.estimate, sign=criterion.name != KEPT, digits=4 if criterion.unit == NATS else 1)
    confidence = f"{criterion.confidence:.0f}% interval" if criterion.confidence > 0 else "a single value"
    return Cell(
        points, hint=f"{criterion.unit}\n{confidence}" if criterion.confidence < 100 * LEVEL else criterion.unit
    )
