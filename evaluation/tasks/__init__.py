"""Tasks: where items come from, what their prompts say and how an answer is scored.

An item is one question with its correct answer. Every module of this package is a task, except `general`, the retention
suite. A task makes items from the rows of a data set, or generates them, or both. Splits, files, engines, metric tables
and the database are shared by all tasks.
"""

import hashlib
import importlib
import math
import random
import re
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date, time, timedelta
from decimal import Context, Decimal
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

from evaluation import EvaluationError
from trainers.words import tidy

RETENTION = "general"


@dataclass(frozen=True)
class Item:
    id: str  # unique within a data set, the same in every run
    task: str  # for the retention suite: the general task
    prompt: str  # what the user says; the prompt template is applied later
    completion: str  # the answer to train on, without end-of-sequence token
    truth: dict[str, Any] = field(default_factory=dict)  # what scoring needs, e.g. {"aqi": 126}
    turns: tuple[tuple[str, str], ...] = ()  # (question, answer) before the prompt; these answers are learned too
    system: str | None = None  # the conversation's system message
    whole: bool = False  # prompt and completion are one text, learned from its first token, without a template
    given: tuple[int, ...] = ()  # places in `turns` of answers that are not learned

    def to_json(self) -> dict[str, Any]:
        """One line of data/*.jsonl; fields that only conversations and texts have are left out where they are empty."""
        row, rare = asdict(self), ("turns", "system", "whole", "given")
        return {name: value for name, value in row.items() if value or name not in rare}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Item":
        """Item from one line of data/*.jsonl; KeyError if a field is missing."""
        fields = {name: row[name] for name in ("id", "task", "prompt", "completion")} | {"truth": dict(row["truth"])}
        fields |= {name: row[name] for name in ("system", "whole") if name in row}
        turns = tuple((question, answer) for question, answer in row.get("turns", ()))
        return cls(**fields, turns=turns, given=tuple(row.get("given", ())))

    @property
    def context(self) -> Hashable:
        """What the answer depends on: the prompt and everything said before it. A whole text is its own context."""
        if self.whole:
            return self.prompt + self.completion
        return (self.system, self.turns, self.prompt) if self.system or self.turns else self.prompt

    @property
    def texts(self) -> list[str]:
        """All that the model reads or learns, in order."""
        return [self.system or "", *(text for turn in self.turns for text in turn), self.prompt, self.completion]


@dataclass(frozen=True)
class Score:
    correct: bool
    predicted: float | str | None  # the value read from the answer, None if nothing could be read
    exact: bool
    abs_error: float | None = None  # |predicted − truth| in the task's unit, None if that has no meaning
    label_agrees: bool = False  # the answer also names, in words, the class that its value belongs to
    remark: str = ""  # what is right and what is wrong about the answer, if that is not obvious
    partial: float | None = None  # credit from 0 to 1 for answers that can be partly right; None: all or nothing
    extra: Mapping[str, float] = field(default_factory=dict)  # other numbers that the task's `summarize` needs

    @property
    def credit(self) -> float:
        """From 0 to 1; its mean over the test items is the task's primary metric."""
        return float(self.correct) if self.partial is None else self.partial


Rewording = Callable[[Item, random.Random], str]
"""Returns an item's prompt as somebody else would put it, or unchanged if no equivalent wording is known."""


class RowError(ValueError):
    """A row that cannot become an item; `problems` holds (field, or None for the whole row; what is wrong)."""

    def __init__(self, name: str | None, reason: str, *more: tuple[str | None, str]) -> None:
        self.problems = [(name, reason), *more]
        super().__init__("; ".join(f"{name}: {reason}" if name else reason for name, reason in self.problems))


@dataclass(frozen=True)
class Source:
    hub: str  # org/name
    subset: str | None = None  # configuration, if it has several
    train: str = "train"  # split for training and validation
    test: str | None = None  # split for test items; None: they are drawn from `train`


@dataclass(frozen=True)
class Field:
    column: str | None  # the data set's name for it, unless params.yaml maps another; None: read only if mapped
    required: bool
    about: str  # what it holds, for error messages
    unit: str | None = None  # of numbers: the unit that `make_item` expects; the column may be in another
    typical: tuple[float, float] | None = None  # of numbers: the range in which their median lies
    molar_mass: Decimal | None = None  # of a gas, g/mol


class Task(Protocol):
    """What a task module provides: the first block always, the second to read rows, the third to generate items.

    Optional:
    SOURCE: the data set on the hub.
    SETTINGS, ROW_SETTINGS: keys of section prepare_data, passed as keywords to `generate` and `retention_items`, and
        added to every row beside its fields.
    facts(test items): added to run.json.
    check_mapping(fields): what is wrong with this choice of mapped fields.
    recognize(columns of the table, field → column as mapped): field → column to read, and a sentence about that;
        EvaluationError if it cannot tell.
    as_published(table, field → column, field → unit as mapped): the table in the task's terms, field → column where
        nothing is mapped, and a sentence about that; None if nothing is mapped nor recognized.
    index_values(table, field → column without a unit): questions about columns that look like something else.
    unread(fields of a row): the names of what is in them and is not read.
    MARKED_TURNS: whether `make_item` also takes "marks", column → values, one for each turn or each answer.
    complete(items of all rows): adds to their truths what they need to know about each other; returns notes.
    retention_items(per_task, seed=, folder=, **settings): replaces the suite in `general`.
    REWORDINGS: what evaluation.paraphrase trains and asks with, besides white space.
    NEW_WORDINGS: what it only asks with.
    """

    NAME: str  # the module's name, and prepare_data.task in params.yaml
    TITLE: str  # of the primary metric in tables: "AQI accuracy"
    METRICS: Mapping[str, Mapping[str, str]]  # name → unit, direction (higher or lower is better), description
    PRIMARY: str  # the metric that arms are compared by: the mean of Score.credit

    def score(self, item: Item, answer: str) -> Score: ...
    def summarize(self, scores: list[Score]) -> dict[str, float]: ...

    FIELDS: Mapping[str, Field]

    def make_item(self, item_id: str, row: Mapping[str, Any]) -> Item:
        """The item of a row (field → value; optional fields may be missing or None); RowError if there is none."""
        ...

    def group(self, item: Item) -> Hashable:
        """Items of one group never land in different splits, e.g. questions about one passage.

        A tuple names the parts of a conversation: its first element is the group, which is divided by the next ones
        where it is too large, and whatever one item begins another belongs to.
        """
        ...

    def generate(self, sizes: Mapping[str, int], *, seed: int, folder: Path, **settings: Any) -> dict[str, list[Item]]:
        """Items of each split (name → how many), the same for the same seed; pictures go to `folder`/images."""
        ...


@cache
def names() -> tuple[str, ...]:
    """Names of the tasks, which are the modules of this package."""
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(modules - {RETENTION, "__init__"}))


def load(name: str) -> Task:
    """The task of that name; EvaluationError if there is none, or its module is incomplete."""
    if name not in (*names(), RETENTION):
        raise EvaluationError(f"expected a task ({', '.join(names())}), got {name!r}")
    module = importlib.import_module(f"evaluation.tasks.{name}")
    if problems := _missing_parts(name, module) or _metric_problems(module):
        raise EvaluationError(f"evaluation/tasks/{name}.py is not a task: {'; '.join(problems)}")
    return cast(Task, module)


def _missing_parts(name: str, module: ModuleType) -> list[str]:
    problems = []
    if name in importlib.import_module(f"evaluation.tasks.{RETENTION}").GENERAL_TASKS:  # their items would be mixed up
        problems.append(f"{name} is a task of the retention suite; rename the file")
    if name != getattr(module, "NAME", name):
        problems.append(f"expected NAME = {name!r}, like the file, got {module.NAME!r}")
    values, functions = ["NAME", "TITLE", "METRICS", "PRIMARY"], ["score", "summarize"]
    if any(hasattr(module, part) for part in ("SOURCE", "FIELDS", "group")):  # it reads rows
        values, functions = [*values, "FIELDS"], [*functions, "make_item", "group"]
    problems += [f"{part} is missing" for part in values if not hasattr(module, part)]
    return problems + [f"the function {f} is missing" for f in functions if not callable(getattr(module, f, None))]


def _metric_problems(module: ModuleType) -> list[str]:
    keys = {"unit", "direction", "description"}
    problems = [
        f"METRICS: expected {', '.join(sorted(keys))} for {metric}, got {', '.join(sorted(meaning)) or 'nothing'}"
        for metric, meaning in module.METRICS.items()
        if set(meaning) != keys
    ]
    if not problems and module.METRICS.get(module.PRIMARY, {}).get("direction") != "higher":
        better = ", ".join(name for name, meaning in module.METRICS.items() if meaning["direction"] == "higher")
        problems.append(f"PRIMARY: expected a metric for which higher is better ({better}), got {module.PRIMARY!r}")
    return problems


def metric(unit: str, direction: str, description: str) -> dict[str, str]:
    return {"unit": unit, "direction": direction, "description": description}


def share(description: str, direction: str = "higher") -> dict[str, str]:
    return metric("share", direction, description)


def mean(values: Iterable[float]) -> float:
    """NaN if there are none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else float("nan")


def mean_credit(scores: Iterable[Score]) -> float:
    return mean(s.credit for s in scores)


def render(template: str, prompt: str) -> str:
    return template.replace("{prompt}", prompt)


def repunctuate(item: Item, rng: random.Random) -> str:
    """The prompt with another punctuation mark at its end, or none."""
    bare = item.prompt.rstrip("?.! ")
    return rng.choice([text for mark in ("", "?", ".", "!") if (text := bare + mark) != item.prompt])


# --- cells of rows, checked before an item is made of them ---

_EXACT = Context(prec=400)  # keeps every digit that a float or a decimal column has
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+−-]?[0-9]+,[0-9]+")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")
_DECIMAL_POINT = re.compile(r"[+-]?[0-9]*\.[0-9]+")


def brief(value: object) -> str:
    """A value as error messages show it: cut if it is long."""
    return reprlib.repr(value)


def _blank(text: str) -> bool:
    """Whether a reader would see nothing: white space, or zero-width characters such as U+200B."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def text(row: Mapping[str, Any], name: str) -> str:
    """The text of a field, white space included; RowError if there is none, or UTF-8 cannot encode it."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(name, f"expected text, got {'nothing' if value is None else brief(value)}")
    if _blank(value):
        raise RowError(name, f"expected text, got {'only blanks' if value else 'an empty string'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(name, f"expected text that UTF-8 can encode, got half a character: {error}") from error
    return value


def text_or_number(row: Mapping[str, Any], name: str) -> str:
    """Like `text`, but also of a number, truth value or date.

    A float is written as the shortest decimal that means it, beyond 1e21 with an exponent; 1.0 is 1, since a column of
    integers with gaps has floats.
    """
    value = row.get(name)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        exact = Decimal(str(value)).normalize(_EXACT)
        return f"{exact:f}" if -7 < exact.adjusted() <= 21 else f"{exact:g}"
    return str(value) if isinstance(value, int | date | time | timedelta) else text(row, name)


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """Like `text`, but "" if the field is missing, None or blank."""
    value = row.get(name)
    return "" if value is None or (isinstance(value, str) and _blank(value)) else text(row, name)


def choice(row: Mapping[str, Any], name: str, names: Mapping[str, str]) -> str:
    """The label of a field: `names` maps its possible values (text, bool, number; in lower case) to labels."""
    value = row.get(name)
    label = names.get(tidy(str(value)).casefold())
    if label is None:
        raise RowError(name, f"expected one of {', '.join(names)}, got {'nothing' if value is None else brief(value)}")
    return label


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN, or a word such as NA."""
    if isinstance(value, float | Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in _MISSING)


def number(value: object, *, signed: bool = False) -> Decimal:
    """The decimal that a cell holds, finite, and ≥ 0 unless `signed`; the ValueError says what was expected instead.

    Of a float that is the shortest decimal that means it.
    """
    plain = "" if isinstance(value, int) else str(value).strip().replace("−", "-")
    if isinstance(value, str) and not _NUMBER.fullmatch(plain):
        hint = "; write the decimal comma as a point" if _DECIMAL_COMMA.fullmatch(plain) else ""
        if _THOUSANDS.fullmatch(plain):
            hint = f"; is it {plain.replace(',', '.')} or {plain.replace(',', '')}? Write it without the comma"
        raise ValueError(f"expected a number, got {value!r}{hint}")
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"expected a number, got {type(value).__name__} {value!r}")
    result = Decimal(value if isinstance(value, int) else plain)
    if not math.isfinite(float(result)):
        raise ValueError(f"expected a finite number, got {str(value)[:40]}")
    if result < 0 and not signed:
        raise ValueError(f"expected a number ≥ 0, got {value}")
    return result if result < 0 else result.copy_abs()  # -0.0 becomes 0.0


def decimal_commas(cells: Iterable[object]) -> bool:
    """Whether a column clearly writes 12.5 as "12,5"; points among its values, or only values like 1,234, mean no."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    commas = [text for text in texts if _DECIMAL_COMMA.fullmatch(text)]
    return not all(map(_THOUSANDS.fullmatch, commas)) and not any(map(_DECIMAL_POINT.fullmatch, texts))


def with_point(value: object) -> object:
    return value.replace(",", ".") if isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()) else value


def by_prompt(item: Item) -> Hashable:
    """A task's `group` when every question is its own item."""
    return digest(item.prompt)


def digest(value: str) -> str:
    """A short name for a text, the same for texts that differ only in case, white space or Unicode composition."""
    return hashlib.sha256(tidy(value).casefold().encode()).hexdigest()[:16]
