"""One line for each task and arm: what the database says of every data set that was ever scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from db.queries_compare import TaskFacts
from evaluation.differences import Difference
from evaluation.pairs import BASE
from evaluation.primary import Primary
from evaluation.side_by_side import SideBySide
from evaluation.statistics import Interval


@dataclass(frozen=True)
class TaskRow:
    """One arm on one task.

    Attributes:
        task: Name.
        title: Of the primary metric.
        metric: Its name.
        arm: The arm.
        seeds: Those of its runs.
        score: Primary metric, percent.
        interval: Of it, percent.
        to_base: Difference from the base; None for the base, and where they cannot be compared.
        to_baseline: Difference from the arm in `baseline`, likewise.
        baseline: The arm that the others are compared with besides the base.
        ended: End of the last evaluation, UTC.
        current: Whether the task's results are on the disk.
    """

    task: str
    title: str
    metric: str
    arm: str
    seeds: tuple[int, ...]
    score: float | None
    interval: Interval | None
    to_base: Difference | None
    to_baseline: Difference | None
    baseline: str
    ended: datetime
    current: bool

    @property
    def verdict(self) -> str:
        """What may be said against the base and against the baseline; empty for the base itself."""
        if self.arm == BASE:
            return ""
        told = [(BASE, self.to_base)]
        if self.baseline not in (BASE, self.arm):
            told.append((self.baseline, self.to_baseline))
        return "; ".join(_in_a_word(against, found) for against, found in told)


def _in_a_word(against: str, found: Difference | None) -> str:
    if found is None:
        return f"not comparable with {against}"
    return f"undecided against {against}" if found.verdict == "undecided" else f"{found.verdict} than {against}"


def task_rows(
    tasks: Sequence[TaskFacts], shown: Primary, own: SideBySide, others: Callable[[str], SideBySide], baseline: str
) -> tuple[TaskRow, ...]:
    """Lines of all tasks, in the order given.

    Args:
        tasks: Those that have finished runs.
        shown: The task that the comparison is about.
        own: Its arms.
        others: Reads the arms of another task by its name.
        baseline: The arm to compare with besides the base.
    """
    return tuple(
        row for task in tasks for row in _rows(task, own if task.name == shown.task else others(task.name), baseline)
    )


def _rows(task: TaskFacts, arms: SideBySide, baseline: str) -> Iterable[TaskRow]:
    for row in arms.rows:
        yield TaskRow(
            task=task.name,
            title=task.title,
            metric=task.primary_metric,
            arm=row.arm,
            seeds=row.seeds,
            score=row.accuracy,
            interval=row.accuracy_interval,
            to_base=row.against(BASE),
            to_baseline=row.against(baseline) if baseline != BASE else None,
            baseline=baseline,
            ended=max(run.ended or run.started for run in arms.runs if run.arm == row.arm),
            current=task.current,
        )
