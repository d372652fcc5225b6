"""Tasks: where items come from, what their prompts say and how an answer is scored.

An item is one question with its right answer. A task module fills in what `Task` names; everything
else (splits, files, backends, metrics tables, the database) is shared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class ItemError(ValueError):
    """Items that cannot be made as asked."""


@dataclass(frozen=True)
class Item:
    """One question with its right answer.

    Attributes:
        id: Unique within a data set, stable over runs.
        task: Name of the task (in the retention suite: of the general task).
        prompt: What the user says, before the prompt template is put round it.
        completion: The answer trained on, without end-of-sequence token.
        truth: What scoring needs, e.g. {"aqi": 126} or {"answer": "12"}.
    """

    id: str
    task: str
    prompt: str
    completion: str
    truth: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Item":
        """Item from one line of data/*.jsonl.

        Raises:
            KeyError: a field is missing.
        """
        return cls(**{name: row[name] for name in ("id", "task", "prompt", "completion")}, truth=dict(row["truth"]))


@dataclass(frozen=True)
class Score:
    """What one answer is worth.

    Attributes:
        correct: The primary criterion of the task.
        predicted: The value read from the answer, None where nothing could be read.
        exact: The answer's value equals the truth.
        abs_error: |predicted − truth| in the task's unit; None where it has no meaning.
        label_agrees: The answer also names, in words, the class that its value belongs to.
    """

    correct: bool
    predicted: float | str | None
    exact: bool
    abs_error: float | None = None
    label_agrees: bool = False


class Task(Protocol):
    """What a task module provides."""

    NAME: str
    METRICS: Mapping[str, Mapping[str, str]]

    def score(self, item: Item, answer: str) -> Score:
        """Judge one answer."""
        ...

    def summarize(self, scores: list[Score]) -> dict[str, float]:
        """Metric name → value over a split."""
        ...


def render(template: str, prompt: str) -> str:
    """The text a model reads: `template` with its single `{prompt}` filled in."""
    return template.replace("{prompt}", prompt)
