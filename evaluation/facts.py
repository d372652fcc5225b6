"""What the database holds of the runs that are compared, read at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy.orm import Session

from db import queries_compare as queries
from db.queries import Reading
from db.queries_compare import Choice, RunFacts, Timing
from evaluation.pairs import BASE, Answered
from evaluation.ratios import speed_changes, speed_interval
from evaluation.statistics import Interval

Key = tuple[str, str]


@dataclass(frozen=True)
class Facts:
    """What the database holds of the chosen runs; everything goes by run id.

    Attributes:
        by_arm: Arm -> its runs, one for each seed.
        metrics: (split, name) -> number.
        answers: Credit of the test items.
        retained: Credit of the retention items.
        timings: Timed phases.
        readings: What the probe says.
    """

    by_arm: Mapping[str, Sequence[RunFacts]]
    metrics: Mapping[int, Mapping[Key, float]]
    answers: Answered
    retained: Answered
    timings: Mapping[int, Sequence[Timing]]
    readings: Mapping[int, Mapping[str, Reading]]


def read_facts(session: Session, choice: Choice) -> Facts:
    """Read everything that rows are made of."""
    by_arm: dict[str, list[RunFacts]] = {}
    for run in queries.chosen_runs(session, choice):
        by_arm.setdefault(run.arm, []).append(run)
    return Facts(
        by_arm,
        queries.final_values(session, choice),
        Answered(queries.answers(session, choice, "test")),
        Answered(queries.answers(session, choice, "retention")),
        queries.timings(session, choice),
        queries.readings(session, choice),
    )


class SpeedChange(NamedTuple):
    """Decode speed against the base.

    Attributes:
        interval: Percent; None where nothing was timed.
        confidence: Of the interval, a share.
        repetitions: Paired ones.
    """

    interval: Interval | None
    confidence: float
    repetitions: int


def speed_change(arm: str, facts: Facts) -> SpeedChange:
    """Change of an arm's decode speed over the repetitions of all its seeds; of the base none."""
    if arm == BASE:
        return SpeedChange(None, 0.0, 0)
    changes = [c for run in facts.by_arm[arm] for c in speed_changes(arm, facts.timings.get(run.id, ()))]
    found = speed_interval(changes)
    return SpeedChange(found[0].scaled(100), found[1], len(changes)) if found else SpeedChange(None, 0.0, 0)
