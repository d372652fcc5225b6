"""Tasks: where items come from, what their prompts say and how an answer is scored.

An item is one question with its right answer. Every module of this package is a task, but for `general`, the retention
suite. A task makes its items of a data set's rows, or draws them itself, or can do both; splits, files, engines, metric
tables and the database are shared by all.
"""

import hashlib
import importlib
import math
import random
import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping
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
    id: str  # unique within a data set, the same in every run
    task: str  # of the retention suite: the general task
    prompt: str  # what the user says; the prompt template goes round it later
    completion: str  # the answer trained on, without end-of-sequence token
    truth: dict[str, Any] = field(default_factory=dict)  # what scoring needs, e.g. {"aqi": 126}
    turns: tuple[tuple[str, str], ...] = ()  # (question, answer) before the prompt; the answers are learnt too
    system: str | None = None  # the conversation's system message
    whole: bool = False  # prompt and completion are one text, learnt from its first token on, within no template

    def to_json(self) -> dict[str, Any]:
        """Without what only conversations and texts have, where an item is neither."""
        row = asdict(self)
        return {name: value for name, value in row.items() if value or name not in ("turns", "system", "whole")}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Item":
        """Item from one line of data/*.jsonl; KeyError where a field is missing."""
        given = {name: row[name] for name in ("id", "task", "prompt", "completion")} | {"truth": dict(row["truth"])}
        turns = tuple((question, answer) for question, answer in row.get("turns", ()))
        return cls(**given, turns=turns, system=row.get("system"), whole=row.get("whole", False))

    @property
    def asked(self) -> Hashable:
        """What the answer depends on: the prompt, or all that was said up to it; a whole text stands for itself."""
        if self.whole:
            return self.prompt + self.completion
        return (self.system, self.turns, self.prompt) if self.system or self.turns else self.prompt

    @property
    def characters(self) -> int:
        before = [self.system or "", *(text for turn in self.turns for text in turn)]
        return sum(map(len, (*before, self.prompt, self.completion)))


@dataclass(frozen=True)
class Score:
    correct: bool
    predicted: float | str | None  # the value read from the answer, None where nothing could be read
    exact: bool
    abs_error: float | None = None  # |predicted − truth| in the task's unit, None where that has no meaning
    label_agrees: bool = False  # the answer also names, in words, the class that its value belongs to
    remark: str = ""  # what is right and what is wrong in it, where that is not plain
    partial: float | None = None  # credit from 0 to 1 where an answer can be right in part; None: all or nothing
    extra: Mapping[str, float] = field(default_factory=dict)  # other numbers that the task's `summarize` needs

    @property
    def credit(self) -> float:
        """From 0 to 1; its mean over the test items is the task's primary metric."""
        return float(self.correct) if self.partial is None else self.partial


Rewording = Callable[[Item, random.Random], str]
"""The prompt of an item as somebody else would put it; as it is where nothing else is known to ask the same."""


class RowError(ValueError):
    """A row that no item can be made of; problems: (field, or None for the whole row; what was expected and came)."""

    def __init__(self, name: str | None, reason: str, *more: tuple[str | None, str]) -> None:
        self.problems = [(name, reason), *more]
        super().__init__("; ".join(f"{name}: {reason}" if name else reason for name, reason in self.problems))


@dataclass(frozen=True)
class Source:
    hub: str  # org/name
    subset: str | None = None  # configuration, where it has several
    train: str = "train"  # split for training and validation
    test: str | None = None  # split for test items; None: they are drawn from `train`


@dataclass(frozen=True)
class Field:
    column: str | None  # the data set's own name of it, unless params.yaml says another; None: read only where it does
    required: bool
    about: str  # what it holds, for error messages
    unit: str | None = None  # of numbers: the unit that `make_item` gets them in; columns may have another
    typical: tuple[float, float] | None = None  # of numbers: between what their median lies


class Task(Protocol):
    """What a task module provides: the first block always, the second to make items of rows, the third to draw them.

    Optional: SOURCE, the data set on the hub; SETTINGS and ROW_SETTINGS, keys of section prepare_data that `generate`
    and `retention_items` get as keywords, and that every row holds beside its fields; facts(test items), for run.json;
    check_mapping(fields), what is wrong with the choice of mapped fields; recognise(columns of the table, field →
    column as mapped), which fields are read (field → column) and a sentence on that, or ItemError; complete(items of
    all rows), which adds to their truths what they must know of each other, and returns what to say of them;
    retention_items(per_task, seed=, folder=, **settings), in the place of the suite in `general`; REWORDINGS, what
    evaluation.paraphrase trains and asks with beside white space, NEW_WORDINGS, what it only asks with.
    """

    NAME: str  # the module's name, and prepare_data.task in params.yaml
    TITLE: str  # of the primary metric in tables: "AQI accuracy"
    METRICS: Mapping[str, Mapping[str, str]]  # name → unit, direction (higher or lower is better), description
    PRIMARY: str  # the metric that arms are compared by: the mean of Score.credit

    def score(self, item: Item, answer: str) -> Score: ...
    def summarize(self, scores: list[Score]) -> dict[str, float]: ...

    FIELDS: Mapping[str, Field]

    def make_item(self, item_id: str, row: Mapping[str, Any]) -> Item:
        """An item of a row (field → value; optional fields may be missing or None); RowError where there is none."""
        ...

    def group(self, item: Item) -> Hashable:
        """Items of one group never land in different splits, e.g. questions about one passage."""
        ...

    def generate(self, sizes: Mapping[str, int], *, seed: int, folder: Path, **settings: Any) -> dict[str, list[Item]]:
        """Items of each split (name → how many), the same for the same seed; pictures go to `folder`/images."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Names of the tasks, which are the modules of this package."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(found - {RETENTION, "__init__"}))


def load(name: str) -> Task:
    """The task of that name; ItemError where there is none, or its module lacks what a task has."""
    if name not in (*names(), RETENTION):
        raise ItemError(f"expected a task ({', '.join(names())}), got {name!r}")
    module = _module(name)
    if problems := _misnamed_or_missing(name, module) or _unsound(module):
        raise ItemError(f"evaluation/tasks/{name}.py is no task: {'; '.join(problems)}")
    return cast(Task, module)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"evaluation.tasks.{name}")


def _misnamed_or_missing(name: str, module: ModuleType) -> list[str]:
    problems = []
    if name in _module(RETENTION).GENERAL_TASKS:  # their items would be mixed up
        problems.append(f"{name} is a task of the retention suite; rename the file")
    if hasattr(module, "NAME") and name != module.NAME:
        problems.append(f"expected NAME = {name!r}, as the file is called, got {module.NAME!r}")
    recipe = any(hasattr(module, part) for part in ("SOURCE", "FIELDS", "group"))
    values = ["NAME", "TITLE", "METRICS", "PRIMARY"]
    functions = ["score", "summarize"]
    if recipe:
        values, functions = [*values, "FIELDS"], [*functions, "make_item", "group"]
    problems += [f"{part} is missing" for part in values if not hasattr(module, part)]
    return problems + [f"the function {f} is missing" for f in functions if not callable(getattr(module, f, None))]


def _unsound(module: ModuleType) -> list[str]:
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


def metric(unit: str, direction: str, description: str) -> dict[str, str]:
    return {"unit": unit, "direction": direction, "description": description}


def share(description: str, direction: str = "higher") -> dict[str, str]:
    return metric("share", direction, description)


def mean(values: Iterable[float]) -> float:
    """NaN of none."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def mean_credit(scores: Iterable[Score]) -> float:
    return mean(s.credit for s in scores)


def render(template: str, prompt: str) -> str:
    return template.replace("{prompt}", prompt)


def marked(item: Item, rng: random.Random) -> str:
    """The prompt with another mark at its end, or none."""
    bare = item.prompt.rstrip("?.! ")
    return rng.choice([text for mark in ("", "?", ".", "!") if (text := bare + mark) != item.prompt])


# --- cells of rows, checked before an item is made of them ---

_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_DECIMAL_POINT = re.compile(r"[+-]?[0-9]*\.[0-9]+")


def shown(value: object) -> str:
    """A value as errors show it: cut where it is long."""
    return reprlib.repr(value)


def _blank(text: str) -> bool:
    """Whether a reader would see nothing: white space, or marks without width such as U+200B."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def text(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, without white space at its ends; RowError where there is none, or UTF-8 cannot hold it."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(name, f"expected text, got {'nothing' if value is None else shown(value)}")
    if _blank(value):
        raise RowError(name, "expected text, got blanks only" if value else "expected text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(name, f"expected text that UTF-8 can hold, got half a character: {error}") from error
    return value.strip()


def written(row: Mapping[str, Any], name: str) -> str:
    """As `text`, but of a number or a truth value too: 1.0 is 1, since a column of numbers with gaps has floats."""
    value = row.get(name)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.15g}"
    return str(value) if isinstance(value, int) else text(row, name)


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """As `text`, but "" where the field is missing, None or blank."""
    value = row.get(name)
    return "" if value is None or (isinstance(value, str) and _blank(value)) else text(row, name)


def choice(row: Mapping[str, Any], name: str, names: Mapping[str, str]) -> str:
    """The label of a field: `names` maps what it may hold (text, bool, number; in small letters) to labels."""
    value = row.get(name)
    label = names.get(str(value).strip().casefold())
    if label is None:
        raise RowError(name, f"expected one of {', '.join(names)}, got {'nothing' if value is None else shown(value)}")
    return label


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN, or a word such as NA."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _MISSING)


def number(value: object) -> float:
    """A finite number ≥ 0 from a cell; ValueError says what was expected instead."""
    if isinstance(value, str):
        plain = value.strip()
        if not _NUMBER.fullmatch(plain):
            comma = "; write the decimal comma as a point" if _DECIMAL_COMMA.fullmatch(plain) else ""
            if _THOUSANDS.fullmatch(plain):
                comma = f"; is it {plain.replace(',', '.')} or {plain.replace(',', '')}? Write it without the comma"
            raise ValueError(f"expected a number, got {value!r}{comma}")
        result = float(plain)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {type(value).__name__} {value!r}")
    else:
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"expected a finite number, got {str(value)[:40]}")
    if result < 0:
        raise ValueError(f"expected a number ≥ 0, got {value}")
    return result + 0.0  # -0.0 becomes 0.0


def decimal_commas(cells: Iterable[object]) -> bool:
    """Whether a column certainly writes 12.5 as "12,5"; one with points too, or with 1,234 alone, leaves it open."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    commas = [text for text in texts if _DECIMAL_COMMA.fullmatch(text)]
    return not all(map(_THOUSANDS.fullmatch, commas)) and not any(map(_DECIMAL_POINT.fullmatch, texts))


def with_point(value: object) -> object:
    return value.replace(",", ".") if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()) else value


def by_prompt(item: Item) -> Hashable:
    """A task's `group` where one question is one item."""
    return digest(item.prompt)


def digest(value: str) -> str:
    """A short name of a text, the same for texts that differ in case or white space alone."""
    return hashlib.sha256(" ".join(value.casefold().split()).encode()).hexdigest()[:16]
