"""Items from a task's rows: each row becomes an item, or is refused with row, column and reason."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field as Key
from pydantic import field_validator

from evaluation import EvaluationError
from evaluation.marks import NOT_LEARNED, in_cell, is_empty, is_learned, is_mark
from evaluation.sources.columns import Column, FieldReader, checked_columns, match_columns, with_unit_row
from evaluation.sources.hub import HUB, DataSet, open_data_set
from evaluation.sources.tabular import AUTO, RawRow, Table, read_file
from evaluation.tasks import Item, RowError, Source, Task, brief
from trainers.encode import spelled_out
from trainers.settings import Positive, Section

T = TypeVar("T")
TASK_SOURCE = "hub"  # as the source: the task's own data set

_DUPLICATE, _TOO_LONG = "duplicate: ", "too long: "  # reasons that, like NOT_LEARNED, are no fault of the row
_REPEAT = "repeat"
_PAIR = ("chosen", "rejected")  # columns of a better answer and a worse one


class RowSource(Section):
    """Where rows are and what their columns mean: the part of section prepare_data that all tasks with rows share."""

    source: str  # hub | hub:org/name[@revision] | a file of a kind in FILES | a folder in the hub's format
    columns: dict[str, str | Column | None]  # field → column, in addition to the task's; null: do without the field
    missing: list[str | int | float] = Key(default=[])  # cells that hold nothing, besides NA, nan, null, none and n/a
    hub_split: str | None  # for training and validation; null: the task's own
    hub_test_split: str | None  # null: the task's own if the data set has it; like hub_split: drawn from that
    hub_subset: str | None  # configuration; null: the task's own if the data set has it
    delimiter: str  # of CSV files: auto, or a character
    encoding: str  # of text files: auto, or its name
    max_chars: Positive | None  # of prompt and completion together; longer rows are refused
    max_refused: Annotated[float, Key(ge=0, le=1)]  # share of a split's rows; duplicates and too long ones don't count

    @field_validator("delimiter")
    @classmethod
    def _delimiter(cls, delimiter: str) -> str:
        if delimiter != AUTO and (len(delimiter) != 1 or delimiter in '"\r\n'):
            raise ValueError(f"expected auto or one character, got {delimiter!r}")
        return delimiter

    @field_validator("encoding")
    @classmethod
    def _encoding(cls, encoding: str) -> str:
        try:
            if encoding != AUTO:
                "".encode(encoding)
        except LookupError:
            raise ValueError(f"expected auto, or a name such as utf-8, cp1252 or utf-16, got {encoding!r}") from None
        return encoding


# --- refusals ---


@dataclass(frozen=True)
class Rejection:
    """A line of data/rejected.jsonl."""

    file: str
    row: int
    line: int | None  # on which the row starts; None where there are no lines (Parquet, JSON array, hub)
    column: str | None  # of the first problem; None if the row as a whole is at fault
    value: object  # the content of that cell
    reason: str  # every problem of the row: what was expected and what it has
    raw: dict[str, object]
    split: str | None = None

    def __str__(self) -> str:
        line = f" (line {self.line})" if self.line else ""
        return f"row {self.row}{line}: {self.reason}"


def read_rows(
    table: Table, columns: Mapping[str, str], make: Callable[[RawRow], T], *, source: str, split: str | None = None
) -> tuple[list[T], list[Rejection]]:
    """What `make` returns for each row, and the rows that it, or the file's reader, refused.

    `columns` are those of the fields that a RowError may name.
    """
    results: list[T] = []
    rejected: list[Rejection] = []
    for raw in table.rows:
        try:
            if raw.problem is not None:
                raise RowError(None, raw.problem)
            results.append(make(raw))
        except RowError as error:
            problems = [(columns.get(name, name) if name else None, reason) for name, reason in error.problems]
            reason = "; ".join(f"{column}: {reason}" if column else reason for column, reason in problems)
            column = problems[0][0]
            value = raw.values.get(column) if column is not None else None
            rejected.append(Rejection(source, raw.row, raw.line, column, value, reason, raw.values, split))
    return results, rejected


def first_few(problems: Iterable[object], most: int = 5) -> list[str]:
    lines = [str(problem) for problem in problems]
    return [*lines[:most], *([f"… and {len(lines) - most} more"] if len(lines) > most else [])]


def _by_reason(rejections: Sequence[Rejection]) -> list[list[Rejection]]:
    """Groups with one reason, largest first; "at most 400, got 512" counts as the same as "at most 400, got 640"."""
    groups: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        groups.setdefault(re.sub("[0-9]+", "#", rejection.reason.partition(", got ")[0]), []).append(rejection)
    return sorted(groups.values(), key=len, reverse=True)


def write_rejected(path: Path, rejections: Sequence[Rejection]) -> None:
    """Write one JSON object per refused row, in file order; the file is empty if none was refused."""
    lines = [json.dumps(_plain(asdict(r)), ensure_ascii=False, default=str) + "\n" for r in rejections]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _plain(value: object) -> object:
    """`value` with NaN and infinities as text, since JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- a task's rows ---


@dataclass(frozen=True)
class RecipeRows:
    train: list[Item]  # in the split's order; ids are <task>-<split>-<row>, unless the rows have their own
    test: list[Item] | None  # of the test split; None if test items are to be drawn from `train`
    rejected: list[Rejection]
    notes: list[str]  # what a user should know, one sentence each
    facts: dict[str, object]  # for run.json: where the rows come from, and how many are usable


def read_recipe(task: Task, where: RowSource, control: Sequence[str] = ()) -> RecipeRows:
    """Every row as an item or a rejection; EvaluationError, with every problem, if a split has no usable row.

    Rows that spell out a token of `control` are refused.
    """
    defaults, fields = getattr(task, "SOURCE", Source("")), task.FIELDS
    entries = where.columns
    if where.source == TASK_SOURCE:
        where = where.model_copy(
            update={
                "source": f"{HUB}{defaults.hub}",
                "hub_subset": where.hub_subset or defaults.subset,
                "hub_test_split": where.hub_test_split or defaults.test,
            }
        )
    mapping, units, problems = checked_columns(task, entries)
    names = [mapping.get(name, spec.column) for name, spec in fields.items()]
    try:
        tables, facts, notes = _tables(task.NAME, defaults, where, [name for name in names if name])
        if any(spec.unit for spec in fields.values()):
            tables = {split: with_unit_row(table) for split, table in tables.items()}
        if hasattr(task, "as_published"):
            recognized, as_published = _of_agency(partial(task.as_published, mapping=mapping, units=units), tables)
            if not entries:
                mapping, units, problems = checked_columns(task, recognized)
            notes += as_published
        if hasattr(task, "recognize"):
            form, note = task.recognize(next(iter(tables.values())).columns, mapping)  # all splits have the same
            mapping, fields = dict(form), {name: fields[name] for name in form}
            notes.append(note)
    except EvaluationError as error:
        raise EvaluationError([*problems, *error.problems], f"{where.source} cannot be used:") from error.__cause__
    several, readers = len(tables) > 1, dict[str, FieldReader]()
    for split, table in tables.items():
        columns, faults, absent = match_columns(fields, mapping, table)
        problems += [f"split {split!r}: {fault}" if several else fault for fault in faults]
        notes += [note for note in absent if note not in notes]
        readers[split] = reader = FieldReader(fields, columns, units, table, where.missing)
        problems += reader.problems
        notes += reader.notes
    items, rejected, ids, repeated = list[list[Item]](), list[Rejection](), dict[str, int](), 0
    for split, reader in readers.items() if not problems else ():
        usable, refused, repeats = _items(task, where, split, reader, ids, control)
        repeated += repeats
        if repeats:
            notes.append(
                f"{repeats} of {len(reader.table.rows)} rows ask what an earlier row asks, with the same answer: each "
                f"question is used once, which leaves {len(usable)}. For more of them, add columns or rows that differ."
            )
        items.append(usable)
        rejected += refused
        doubts = task.index_values(reader.table, reader.unstated) if hasattr(task, "index_values") else []
        doubts = doubts or reader.doubtful_units()
        gaps = [] if doubts else reader.repeated_gaps()
        notes += gaps
        if faults := _too_many(usable, refused, where.max_refused):
            faults = [f"split {split!r}: {faults[0]}" if several else faults[0], *faults[1:], *gaps]
        problems += [*doubts, *faults]
    if problems:
        raise EvaluationError(list(dict.fromkeys(problems)), f"{where.source} cannot be used:")
    facts |= {
        "columns": next(iter(readers.values())).columns,
        "rows": {split: len(table.rows) for split, table in tables.items()},
        "accepted_rows": sum(map(len, items)),
        "rejected_rows": len(rejected),
        "repeated_rows": repeated,
        "duplicate_rows": sum(r.reason.startswith(_DUPLICATE) for r in rejected),
        "too_long_rows": sum(r.reason.startswith(_TOO_LONG) for r in rejected),
        "unlearned_rows": (unlearned := sum(r.reason.startswith(NOT_LEARNED) for r in rejected)),
    }
    if unlearned:
        notes.append(f"{unlearned} rows are left out, since they are marked as not to be learned.")
    notes += _unread(task, where, list(readers.values()))
    return RecipeRows(items[0], items[1] if several else None, rejected, notes, facts)


def _of_agency(
    as_published: Callable[[Table], Any], tables: dict[str, Table]
) -> tuple[dict[str, str | Column | None], list[str]]:
    """The mapping of tables with an agency's header, which get a column for each pollutant; and notes."""
    mapping: dict[str, str | Column | None] = {}
    notes = []
    for split, table in tables.items():
        if (published := as_published(table)) is None:
            raise EvaluationError(
                f"prepare_data.columns: expected a mapping, e.g. {{pm25: PM2.5_ugm3}}, because the header is none of "
                f"EPA's, AirNow's or OpenAQ's: {', '.join(table.columns)}"
            )
        tables[split], fields, note = published
        mapping |= fields
        notes += [note] if note else []
    return mapping, notes


def _tables(
    name: str, defaults: Source, where: RowSource, columns: Sequence[str]
) -> tuple[dict[str, Table], dict[str, object], list[str]]:
    """(split → its rows, the training split first; where they come from; notes)."""
    facts: dict[str, object] = dict.fromkeys(("subset", "test_split", "revision"))
    facts |= {"source": where.source, "train_split": defaults.train}
    if not where.source.startswith(HUB) and not Path(where.source).is_dir():
        table = read_file(where.source, where.delimiter, where.encoding, columns)
        notes = ["A file has no test split: test items are drawn from its rows."]
        return {defaults.train: table}, facts, [table.note, *notes] if table.note else notes
    with open_data_set(where.source, where.hub_subset, usual=defaults.subset) as data:
        train = where.hub_split or defaults.train
        test, notes = _test_split(name, defaults, where, data, train)
        tables: dict[str, Table] = {}
        problems = []
        for split in [train] if test is None else [train, test]:
            try:
                tables[split] = data.table(split)
            except EvaluationError as error:
                problems += error.problems
        if problems:
            raise EvaluationError(problems)
    facts |= {
        "subset": data.subset,
        "train_split": train,
        "test_split": test,
        "revision": tables[train].revision,
    }
    return tables, facts, notes


def _test_split(
    name: str, defaults: Source, where: RowSource, data: DataSet, train: str
) -> tuple[str | None, list[str]]:
    """The split of the test items, None if they are drawn from `train`; and a note on that."""
    test = where.hub_test_split or defaults.test
    if test is not None and test != train and (where.hub_test_split or test in data.splits):
        return test, []
    why = f"The data set has no split {test!r} (it has {', '.join(data.splits)})"
    if test is None:
        why = f"Task {name} names no test split"
    elif test == train:
        why = f"Split {train!r} is used for training and tests"
    return None, [f"{why}: test items are drawn from {train!r}."]


def _marks(where: RowSource, reader: FieldReader) -> list[str]:
    """The columns that say which rows are learned, except for classes and for those that `columns` sets to null."""
    classes = {*reader.table.labels, *(["label"] if "text" in reader.columns else [])}
    return [
        column
        for column in reader.table.columns
        if column not in (*reader.columns.values(), *classes)
        and where.columns.get(column, "") is not None
        and is_mark(column, (raw.values.get(column) for raw in reader.table.rows))
    ]


def _unread(task: Task, where: RowSource, readers: Sequence[FieldReader]) -> list[str]:
    """A note on the columns that nothing is read from, and the parts of cells, with the share of rows that have any."""
    parts, counts = getattr(task, "unread", None), Counter[str]()
    for reader in readers:
        read = {*reader.columns.values(), *reader.unit_columns.values(), *reader.table.used, *_marks(where, reader)}
        counts.update(dict.fromkeys((column for column in reader.table.columns if column not in read), 0))
        for raw in reader.table.rows:
            counts.update(column for column, cell in raw.values.items() if column in counts and not is_empty(cell))
            counts.update(parts(reader.values(raw)) if parts else ())
    rows = sum(len(reader.table.rows) for reader in readers)
    names = ", ".join(f"{name} ({count / rows:.0%} of rows)" for name, count in counts.items())
    return [f"Not read: {names}."] if names else []


def _refuse_unlearned(marks: Mapping[str, object]) -> None:
    """RowError if a row has a mark that it is not to be learned, or one that is unclear."""
    for name, mark in marks.items():
        try:
            learned = is_learned(name, mark)
        except ValueError as error:
            raise RowError(name, f"{error}. To learn all rows alike, set {name}: null in columns") from None
        if learned is False:
            raise RowError(None, f"{NOT_LEARNED}{name} is {mark!r}")


def _refuse_worse(answer: str, name: str, cell: object) -> None:
    """RowError unless the chosen answer of a pair is the one that is learned, and the rejected one is another."""
    texts = _strings(cell)
    is_there = any(answer in text if name == "chosen" else answer == text.strip() for text in texts)
    if texts and is_there is (name == "rejected"):
        other = "the answer that is learned" if name == "chosen" else "another answer than is learned"
        reason = f"expected {other}, {brief(answer)}, got {brief(cell)}"
        raise RowError(name, f"{reason}. Map the right one in columns, or set {name}: null there")


def _strings(value: object) -> list[str]:
    """Every text in a cell, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in _strings(one)] if isinstance(value, list) else [str(value)]


def _items(
    task: Task, where: RowSource, split: str, fields: FieldReader, ids: dict[str, int], control: Sequence[str]
) -> tuple[list[Item], list[Rejection], int]:
    """The items of a split's rows, those refused, and how many repeat an earlier one.

    `ids`: those of the items of all splits, with their rows.
    """
    table = fields.table
    classes = {name: table.labels[column] for name, column in fields.columns.items() if column in table.labels}
    settings = {name: getattr(where, name) for name in getattr(task, "ROW_SETTINGS", ())}
    first: dict[Hashable, tuple[int, str]] = {}  # context → first row that has it, and its completion
    marks = _marks(where, fields)
    pair = [c for c in _PAIR if c in {*table.columns}.difference(fields.columns.values(), marks, where.columns)]

    def item_of(raw: RawRow) -> Item:
        said = {name: in_cell(raw.values.get(name)) for name in marks}
        of_turns = {n: mark for n, mark in said.items() if isinstance(mark, list) and hasattr(task, "MARKED_TURNS")}
        _refuse_unlearned({name: mark for name, mark in said.items() if name not in of_turns})
        values = settings | fields.values(raw) | ({"marks": of_turns} if of_turns else {})
        for name, names in classes.items():
            position = values[name]
            if isinstance(position, int) and 0 <= position < len(names):
                values[name] = names[position]
            elif position == -1:
                raise RowError(name, f"expected one of {', '.join(names)}, got -1, which marks unpublished labels")
        item = task.make_item(f"{task.NAME}-{split}-{raw.row}", values)
        for name in pair:
            _refuse_worse(item.completion.strip(), name, raw.values.get(name) or [])
        if token := spelled_out(control, *item.texts):
            reason = f"expected text, got {token}, which the base reads as a control token, not as text; take it out"
            raise RowError(None, reason)
        size, most = sum(map(len, item.texts)), where.max_chars
        if most is not None and size > most:
            raise RowError(None, f"{_TOO_LONG}expected prompt and completion of at most {most} characters, got {size}")
        row, completion = first.setdefault(item.context, (raw.row, item.completion))
        if row != raw.row:
            if completion.split() == item.completion.split():
                raise RowError(None, _REPEAT)
            raise RowError(None, f"{_DUPLICATE}same prompt as row {row}, with another answer")
        if item.id in ids:
            del first[item.context]  # a refused row has no duplicates
            raise RowError("id", f"row {ids[item.id]} has the id {item.id!r} too; ids must be unique")
        ids[item.id] = raw.row
        return item

    items, rejected = read_rows(table, fields.columns, item_of, source=where.source, split=split)
    refused = [rejection for rejection in rejected if rejection.reason != _REPEAT]
    return items, refused, len(rejected) - len(refused)


def _too_many(items: Sequence[Item], rejected: Sequence[Rejection], most: float) -> list[str]:
    """What to say if no row is left, or a larger share of them than `most` is refused for faults of their own."""
    if not items:
        return [f"no row is left, all {len(rejected)} were rejected.", *first_few(rejected)]
    faults = [r for r in rejected if not r.reason.startswith((_DUPLICATE, _TOO_LONG, NOT_LEARNED))]
    rows, refused = len(items) + len(rejected), len(faults)
    if refused <= most * rows:
        return []
    return [
        f"{refused} of {rows} rows ({refused / rows:.0%}) were refused, more than prepare_data.max_refused "
        f"({most:.0%}) allows. Fix the file or columns, or raise it. Most frequent reasons:",
        *(f"{len(same)} times, first in {same[0]}" for same in _by_reason(faults)[:3]),
    ]
