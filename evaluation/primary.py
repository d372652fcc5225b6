"""What a comparison is about: a task and its primary metric, and how both are called in words, columns and keys.

One scheme for all tasks. In words it is the task's title, "AQI accuracy" or "GSM8K exact match", whose first word
serves where there is little room: Δ AQI, Δ GSM8K. Keys of files that programs read say `score` and `delta_score`,
whatever the task; only the air quality task keeps the keys that it had before there were others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from db.queries_compare import RunFacts


@dataclass(frozen=True)
class Primary:
    """A task and the metric by which its arms are compared: the mean credit over its test items.

    Attributes:
        task: Name, as in prepare_data.task.
        title: Of the metric, as it stands in tables.
        metric: Its name among all metrics of split test.
    """

    task: str
    title: str
    metric: str

    @property
    def air(self) -> bool:
        """Whether this is the air quality task, whose index shares its letters with another one."""
        return self.task == FIRST.task

    @property
    def short(self) -> str:
        """The title's first word without punctuation, after a Δ."""
        return (self.title.split() or [self.title])[0].rstrip(",;:")

    @property
    def long(self) -> str:
        """For headings."""
        return "AQI category accuracy" if self.air else self.title

    @property
    def two_lines(self) -> str:
        """The title over two lines, where it has more than one word."""
        return self.title.replace(" ", "\n", 1)

    @property
    def key(self) -> str:
        """Of the arm's own number, in JSON of DVC and in CSV."""
        return "aqi_accuracy" if self.air else "score"

    @property
    def delta_key(self) -> str:
        """Of the difference to the base."""
        return "delta_aqi" if self.air else "delta_score"

    def against_key(self, arm: str) -> str:
        """Of the difference to another arm."""
        return f"{'aqi' if self.air else 'score'}_against_{arm}"


FIRST = Primary("aqi", "AQI accuracy", "aqi_category_accuracy")
"""The air quality task's; as db.records has it, which takes pydantic's time to import."""


def primary_of(runs: Iterable[RunFacts]) -> Primary:
    """What some runs of one task are about; without any run the air quality task."""
    return next((Primary(run.task, run.task_title, run.primary_metric) for run in runs), FIRST)
