"""Tasks: where items come from, what their prompts say and how an answer is scored.

An item is one question with its right answer. A task module fills in what `Task` names, and what `Recipe` names where
its items come from rows of a data set; everything else (splits, files, backends, metrics tables, the database) is
shared. Every module of this package whose name has no leading underscore is a task; `general` is the retention suite.
"""

import importlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

RETENTION = "general"


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
        partial: Credit from 0 to 1 where an answer can be right in part, as in free text; None: all or nothing.
        extra: Further numbers that the task's `summarize` needs, by name.
    """

    correct: bool
    predicted: float | str | None
    exact: bool
    abs_error: float | None = None
    label_agrees: bool = False
    partial: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def credit(self) -> float:
        """From 0 to 1; its mean over the test items is the task's primary metric."""
        return float(self.correct) if self.partial is None else self.partial


class RowError(ValueError):
    """A row of a data set that no item can be made of.

    Attributes:
        name: The field at fault.
        reason: What was expected and what came.
    """

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class Source:
    """A data set on the Hugging Face hub.

    Attributes:
        hub: org/name.
        subset: Its configuration, where it has several.
        train: Split that training and validation items are taken from.
        test: Split that test items are taken from; None: it has none, they are drawn from `train`.
    """

    hub: str
    subset: str | None = None
    train: str = "train"
    test: str | None = None


@dataclass(frozen=True)
class Field:
    """A field of a task's rows.

    Attributes:
        column: The data set's own name of it; a setting may say another.
        required: Whether a data set without that column is refused.
        about: What it holds, for errors and documentation.
    """

    column: str
    required: bool
    about: str


class Task(Protocol):
    """What a task module provides.

    Attributes:
        NAME: The module's name, and `prepare_data.task` in params.yaml.
        TITLE: Of the primary metric, as it stands in tables: "AQI accuracy".
        METRICS: Metric name → unit, direction (higher or lower is better), description.
        PRIMARY: The metric by which arms are compared: the mean of `Score.credit` over the test items.
    """

    NAME: str
    TITLE: str
    METRICS: Mapping[str, Mapping[str, str]]
    PRIMARY: str

    def score(self, item: Item, answer: str) -> Score:
        """Judge one answer."""
        ...

    def summarize(self, scores: list[Score]) -> dict[str, float]:
        """Metric name → value over a split."""
        ...


class Recipe(Task, Protocol):
    """A task whose items are made of the rows of a data set.

    Attributes:
        SOURCE: Where it lies on the hub.
        FIELDS: Field → the column that it is read from.
    """

    SOURCE: Source
    FIELDS: Mapping[str, Field]

    def make_item(self, item_id: str, row: Mapping[str, Any]) -> Item:
        """An item of a row.

        Args:
            item_id: Of the item.
            row: Field → value as the data set has it; optional fields may be missing or None.

        Raises:
            RowError: a field cannot be used.
        """
        ...

    def group(self, item: Item) -> Hashable:
        """Items of one group never land in different splits, e.g. questions about one passage."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Names of the tasks, which are the modules of this package."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")}
    return tuple(sorted(found - {RETENTION}))


def load(name: str) -> Task:
    """The task of that name.

    Raises:
        ItemError: there is none, or its module does not provide what a task has.
    """
    if name not in (*names(), RETENTION):
        raise ItemError(f"expected a task ({', '.join(names())}), got {name!r}")
    module = importlib.import_module(f"evaluation.tasks.{name}")
    if problems := [*_named_wrongly(name, module), *_missing(module)] or _unsound(module):
        raise ItemError(f"evaluation/tasks/{name}.py is no task: {'; '.join(problems)}")
    return cast(Task, module)


def _named_wrongly(name: str, module: ModuleType) -> list[str]:
    """A general task's name would mix its items up with those of the retention suite."""
    problems = []
    if name in importlib.import_module(f"{__name__}.{RETENTION}").GENERAL_TASKS:
        problems.append(f"{name} is a task of the retention suite; rename the file")
    if hasattr(module, "NAME") and name != module.NAME:
        problems.append(f"expected NAME = {name!r}, as the file is called, got {module.NAME!r}")
    return problems


def _missing(module: ModuleType) -> list[str]:
    """What `Task` asks for, and `Recipe` where the module is meant as one, and the module has not."""
    recipe = any(hasattr(module, name) for name in ("SOURCE", "FIELDS", "group"))
    values = ("NAME", "TITLE", "METRICS", "PRIMARY", *(("SOURCE", "FIELDS") if recipe else ()))
    functions = ("score", "summarize", *(("make_item", "group") if recipe else ()))
    return [
        *(f"{name} is missing" for name in values if not hasattr(module, name)),
        *(f"the function {name} is missing" for name in functions if not callable(getattr(module, name, None))),
    ]


def _unsound(module: ModuleType) -> list[str]:
    """What is wrong with values that are all there."""
    wanted = {"unit", "direction", "description"}
    problems = [
        f"METRICS: expected {', '.join(sorted(wanted))} of {metric}, got {', '.join(sorted(meaning)) or 'nothing'}"
        for metric, meaning in module.METRICS.items()
        if set(meaning) != wanted
    ]
    if module.PRIMARY not in module.METRICS:
        problems.append(f"PRIMARY: expected one of METRICS ({', '.join(module.METRICS)}), got {module.PRIMARY!r}")
    elif module.METRICS[module.PRIMARY].get("direction", "higher") != "higher":
        problems.append(f"PRIMARY: expected a metric of which more is better, as of credit, got {module.PRIMARY}")
    return problems


def is_recipe(task: Task) -> bool:
    """Whether the task's items are made of the rows of a data set."""
    return hasattr(task, "SOURCE")


def load_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ItemError: there is none, or a task of that name makes its items itself.
    """
    task = load(name)
    if not is_recipe(task):
        recipes = ", ".join(n for n in names() if is_recipe(load(n)))
        raise ItemError(f"expected a task that reads a data set ({recipes}), got {name!r}")
    return cast(Recipe, task)


def mean_credit(scores: Sequence[Score]) -> float:
    """The primary metric of every task: mean credit; NaN for no items."""
    return sum(s.credit for s in scores) / len(scores) if scores else float("nan")


def render(template: str, prompt: str) -> str:
    """The text a model reads: `template` with its single `{prompt}` filled in."""
    return template.replace("{prompt}", prompt)
