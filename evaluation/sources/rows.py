"""Rows → fields → items: every row of a table becomes an item, or is refused with row, column and reason."""

import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Annotated, TypeVar

from pydantic import Field as Key
from pydantic import field_validator

from evaluation import EvaluationError
from evaluation.sources.hub import HUB, DataSet, open_data_set
from evaluation.sources.tabular import AUTO, RawRow, Table, read_file
from evaluation.tasks import Field, Item, RowError, Source, Task, decimal_commas, number, with_point
from trainers.settings import Positive, Section
from trainers.words import nearest, suggest

T = TypeVar("T")
OWN = "hub"  # as the source: the task's own data set

# Units of one family differ by powers of ten; converting between the families takes temperature and pressure.
_MASS = {"µg/m3": Decimal(1), "mg/m3": Decimal(1000)}
_VOLUME = {"ppb": Decimal(1), "ppm": Decimal(1000)}
_SPELLINGS = {"ug/m3": "µg/m3", "mcg/m3": "µg/m3", "ppmv": "ppm", "ppbv": "ppb"}
_DUPLICATE, _TOO_LONG = "duplicate: ", "too long: "  # reasons that are no fault of the row


class Column(Section):
    """A column of the user's data and its unit; None: the field's own unit."""

    column: str
    unit: str | None = None


class RowSource(Section):
    """Where rows are and what their columns mean: the part of section prepare_data that all tasks with rows share."""

    source: str  # hub | hub:org/name[@revision] | .csv .jsonl .ndjson .json .parquet file | folder in the hub's format
    columns: dict[str, str | Column | None]  # field → column, in addition to the task's; null: do without the field
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


# --- which column each field is read from ---


def _checked_mapping(
    task: Task, columns: Mapping[str, str | Column | None]
) -> tuple[dict[str, str | None], dict[str, Decimal], list[str]]:
    """(field → column, None to leave it out; field → factor to its own unit; what is wrong with the mapping)."""
    mapping: dict[str, str | None] = {}
    factors: dict[str, Decimal] = {}
    problems: list[str] = []
    for name, entry in columns.items():
        column = Column(column=entry) if isinstance(entry, str) else entry
        known = task.FIELDS.get(name)
        if known is None:
            problems.append(f"unknown field {name!r} in columns{suggest(name, task.FIELDS)}.")
        elif column is None and known.required:
            problems.append(f"{name}: expected a column, got null; items cannot do without it.")
        elif column is None:
            mapping[name] = None
        elif (twin := next((f for f in mapping if mapping[f] == column.column), None)) is not None:
            problems.append(f"column {column.column!r} is mapped to both {twin!r} and {name!r}; map it once.")
        else:
            try:
                factors[name] = _factor(name, known, column.unit)
                mapping[name] = column.column
            except ValueError as error:
                problems.append(str(error))
    for name, column_name in mapping.items():
        for other, field_ in task.FIELDS.items():
            if field_.required and field_.column == column_name and other not in mapping:
                problems.append(
                    f"column {column_name!r} is mapped to {name!r}, but {other!r} is read from it too; map {other!r} "
                    "to another one."
                )
    check = getattr(task, "check_mapping", None)
    return mapping, factors, [*problems, *(check(columns) if check else ())]


def _factor(name: str, known: Field, unit: str | None) -> Decimal:
    """What a value in `unit` is multiplied by to be in the field's own; ValueError if that is impossible."""
    if unit is None:
        return Decimal(1)
    if known.unit is None:
        raise ValueError(f"{name}: expected no unit, got {unit!r}; this field has none.")
    family, other = (_VOLUME, _MASS) if known.unit in _VOLUME else (_MASS, _VOLUME)
    plain = unit.strip().lower().replace(" ", "").replace("μ", "µ").replace("^3", "3").replace("³", "3")
    plain = _SPELLINGS.get(plain, plain)
    if plain in family:
        return family[plain] / family[known.unit.replace("³", "3")]
    if plain in other:
        raise ValueError(
            f"{name}: cannot turn {unit} into {known.unit}: that takes temperature and pressure, which the file does "
            f"not give. Convert the column to {' or '.join(family)} first."
        )
    raise ValueError(f"{name}: expected the unit {' or '.join(family)}, got {unit!r}.")


def match_columns(
    fields: Mapping[str, Field], mapping: Mapping[str, str | None], table: Table, setting: str = "columns"
) -> tuple[dict[str, str], list[str], list[str]]:
    """(field → column, problems, notes). An unmapped optional field does without a column that is missing or taken."""
    columns: dict[str, str] = {}
    problems: list[str] = []
    notes: list[str] = []
    in_use = {*mapping.values(), *(known.column for known in fields.values())}
    for name, known in fields.items():
        column = mapping.get(name, known.column)
        optional = name not in mapping and not known.required
        if column is None or (optional and column in mapping.values()):
            continue
        missing = column not in table.columns
        if optional and missing:
            if table.columns:
                notes.append(f"There is no column {column!r}: items have none.")
            if near := nearest(column, [other for other in table.columns if other not in in_use]):
                problems.append(
                    f"{name}: there is no column {column!r}; did you mean {near!r}? Map it in {setting}, or set "
                    f"{name}: null there to do without."
                )
            continue
        columns[name] = column
        if column in table.repeated:
            problems.append(f"{name}: the header has {column!r} more than once; rename one.")
        elif missing and table.columns:
            problems.append(
                f"{name}: there is no column {column!r}{suggest(column, table.columns)}.{table.hint} Name it in "
                f"{setting} ({name}: {known.about})."
            )
    if not table.rows:
        problems.append("has a header, but no data row.")
    return columns, problems, notes


# --- a task's rows ---


@dataclass(frozen=True)
class RecipeRows:
    train: list[Item]  # in the split's order; ids are <task>-<split>-<row>, unless the rows have their own
    test: list[Item] | None  # of the test split; None if test items are to be drawn from `train`
    rejected: list[Rejection]
    notes: list[str]  # what a user should know, one sentence each
    facts: dict[str, object]  # for run.json: where the rows come from, and how many are usable


def read_recipe(task: Task, where: RowSource) -> RecipeRows:
    """Every row as an item or a rejection; EvaluationError, with every problem, if a split has no usable row."""
    own = getattr(task, "SOURCE", Source(""))
    fields = task.FIELDS
    mapping, factors, problems = _checked_mapping(task, where.columns)
    if where.source == OWN:
        where = where.model_copy(
            update={
                "source": f"{HUB}{own.hub}",
                "hub_subset": where.hub_subset or own.subset,
                "hub_test_split": where.hub_test_split or own.test,
            }
        )
    names = [mapping.get(name, known.column) for name, known in fields.items()]
    try:
        tables, facts, notes = _tables(task.NAME, own, where, [name for name in names if name])
        if hasattr(task, "recognize"):
            found, note = task.recognize(next(iter(tables.values())).columns, mapping)  # all splits have the same
            mapping, fields = dict(found), {name: fields[name] for name in found}
            notes.append(note)
    except EvaluationError as error:
        raise EvaluationError([*problems, *error.problems], f"{where.source} cannot be used:") from error.__cause__
    ids: dict[str, int] = {}
    splits = []
    for split, table in tables.items():
        columns, faults, absent = match_columns(fields, mapping, table)
        problems += [f"split {split!r}: {fault}" if len(tables) > 1 else fault for fault in faults]
        notes += [note for note in absent if note not in notes]
        splits.append(_Split(task, where, split, columns, factors, table, ids))
    for reader in splits if not problems else ():
        problems += [*reader.doubtful_units(), *reader.read(several=len(tables) > 1)]
        notes += reader.notes
    if problems:
        raise EvaluationError(list(dict.fromkeys(problems)), f"{where.source} cannot be used:")
    train, test = splits[0].items, splits[1].items if len(splits) > 1 else None
    rejected = [r for s in splits for r in s.rejected]
    facts |= {
        "columns": splits[0].columns,
        "rows": {s.split: len(s.table.rows) for s in splits},
        "accepted_rows": len(train) + len(test or ()),
        "rejected_rows": len(rejected),
        "duplicate_rows": sum(r.reason.startswith(_DUPLICATE) for r in rejected),
        "too_long_rows": sum(r.reason.startswith(_TOO_LONG) for r in rejected),
        "first_rejections": [f"{r.split} row {r.row}, column {r.column}: {r.reason}" for r in rejected[:5]],
    }
    return RecipeRows(train, test, rejected, notes, facts)


def _tables(
    name: str, own: Source, where: RowSource, columns: Sequence[str]
) -> tuple[dict[str, Table], dict[str, object], list[str]]:
    """(split → its rows, the training split first; where they come from; notes)."""
    facts: dict[str, object] = dict.fromkeys(("subset", "test_split", "revision"))
    facts |= {"source": where.source, "train_split": own.train}
    if not where.source.startswith(HUB) and not Path(where.source).is_dir():
        table = read_file(where.source, where.delimiter, where.encoding, columns)
        notes = ["A file has no test split: test items are drawn from its rows."]
        return {own.train: table}, facts, [table.note, *notes] if table.note else notes
    with open_data_set(where.source, where.hub_subset, own.subset) as data:
        train = where.hub_split or own.train
        test, notes = _test_split(name, own, where, data, train)
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
        "available_splits": list(data.splits),
        "revision": tables[train].revision,
    }
    return tables, facts, notes


def _test_split(name: str, own: Source, where: RowSource, data: DataSet, train: str) -> tuple[str | None, list[str]]:
    """The split of the test items, None if they are drawn from `train`; and a note on that."""
    test = where.hub_test_split or own.test
    if test is not None and test != train and (where.hub_test_split or test in data.splits):
        return test, []
    why = f"The data set has no split {test!r} (it has {', '.join(data.splits)})"
    if test is None:
        why = f"Task {name} names no test split"
    elif test == train:
        why = f"Split {train!r} is used for training and tests"
    return None, [f"{why}: test items are drawn from {train!r}."]


@dataclass
class _Split:
    """Makes items of the rows of one split."""

    task: Task
    where: RowSource
    split: str
    columns: dict[str, str]
    factors: Mapping[str, Decimal]
    table: Table
    ids: dict[str, int]  # of the items of all splits, with their rows
    items: list[Item] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commas: set[str] = field(default_factory=set)  # columns of numbers with decimal commas

    def __post_init__(self) -> None:
        numeric = [column for name, column in self.columns.items() if self.task.FIELDS[name].typical]
        self.commas = {c for c in numeric if decimal_commas(raw.values.get(c) for raw in self.table.rows)}
        if self.commas:
            columns = ", ".join(column for column in numeric if column in self.commas)
            self.notes.append(f"Decimal commas are read as points in {columns}.")

    def doubtful_units(self) -> list[str]:
        """Questions about columns without a unit whose values would fit the field's other one."""
        problems = []
        for name, column in self.columns.items():
            known, entry = self.task.FIELDS[name], self.where.columns.get(name)
            if known.unit is None or known.typical is None or (isinstance(entry, Column) and entry.unit):
                continue
            values = []
            for raw in self.table.rows:
                with suppress(ValueError):
                    values.append(number(self._cell(raw, column)))
            middle = median([value for value in values if value] or [0.0])
            family = _VOLUME if known.unit in _VOLUME else _MASS
            other = next(unit for unit in family if unit != known.unit.replace("³", "3"))
            low, high = known.typical
            if middle and not low <= middle <= high and low <= middle * float(_factor(name, known, other)) <= high:
                size = "large" if middle > high else "small"
                problems.append(
                    f"{name}: expected {known.unit}, got a median of {middle:g} in column {column!r}, which is too "
                    f"{size} for that and would fit {other}. If it is {other}, write {name}: {{column: {column}, unit: "
                    f"{other}}} under columns in params.yaml; if it is right as it is, write unit: {known.unit} there."
                )
        return problems

    def read(self, several: bool) -> list[str]:
        """Fill `items` and `rejected`; the problems if none is left, or too many are refused."""
        labels = self._labels_by_name()
        first: dict[Hashable, tuple[int, str]] = {}  # context → first row that has it, and its completion
        self.items, self.rejected = read_rows(
            self.table,
            self.columns,
            lambda raw: self._item(raw, labels, first),
            source=self.where.source,
            split=self.split,
        )
        where = f"split {self.split!r}: " if several else ""
        if not self.items:
            return [f"{where}no row is left, all {len(self.rejected)} were rejected.", *first_few(self.rejected)]
        lost = sum(raw.lost for raw in self.table.rows)
        if lost:
            self.notes.append(f"{lost} more rows are lost in unclosed quotes; data/rejected.jsonl shows where.")
        if (part := len(self.rejected) / len(self.table.rows)) > 0.5:
            commonest = _by_reason(self.rejected)[0]
            self.notes.append(
                f"WARNING: {part:.0%} of the rows of split {self.split!r} were refused, more than half; check columns "
                f"and max_chars. Most frequent reason ({len(commonest)} rows): {commonest[0].reason}"
            )
        faults = [r for r in self.rejected if not r.reason.startswith((_DUPLICATE, _TOO_LONG))]
        rows, refused = len(self.table.rows) + lost, len(faults) + lost
        if refused <= self.where.max_refused * rows:
            return []
        return [
            f"{where}{refused} of {rows} rows ({refused / rows:.0%}) were refused, more than prepare_data.max_refused "
            f"({self.where.max_refused:.0%}) allows. Fix the file or columns, or raise it. Most frequent reasons:",
            *(f"{len(same)} times, first in {same[0]}" for same in _by_reason(faults)[:3]),
        ]

    def _item(self, raw: RawRow, labels: Mapping[str, list[str]], first: dict[Hashable, tuple[int, str]]) -> Item:
        values = self._values(raw)
        for name, names in labels.items():
            position = values[name]
            if isinstance(position, int) and 0 <= position < len(names):
                values[name] = names[position]
            elif position == -1:
                raise RowError(name, f"expected one of {', '.join(names)}, got -1, which marks unpublished labels")
        item = self.task.make_item(f"{self.task.NAME}-{self.split}-{raw.row}", values)
        size, most = item.characters, self.where.max_chars
        if most is not None and size > most:
            raise RowError(None, f"{_TOO_LONG}expected prompt and completion of at most {most} characters, got {size}")
        row, completion = first.setdefault(item.context, (raw.row, item.completion))
        if row != raw.row:
            other = "" if completion == item.completion else ", with another answer"
            raise RowError(None, f"{_DUPLICATE}same prompt as row {row}{other}")
        if item.id in self.ids:
            del first[item.context]  # a refused row has no duplicates
            raise RowError("id", f"row {self.ids[item.id]} has the id {item.id!r} too; ids must be unique")
        self.ids[item.id] = raw.row
        return item

    def _cell(self, raw: RawRow, column: str) -> object:
        cell = raw.values.get(column)
        return with_point(cell) if column in self.commas else cell

    def _values(self, raw: RawRow) -> dict[str, object]:
        """Field → value, numbers in the field's own unit; plus the task's settings for rows."""
        values: dict[str, object] = {name: getattr(self.where, name) for name in getattr(self.task, "ROW_SETTINGS", ())}
        for name, column in self.columns.items():
            value, factor = self._cell(raw, column), self.factors.get(name, 1)
            if factor != 1:
                # Decimal: 70 ppb are 0.07 ppm, and EPA truncates, so 0.06999… would fall below the breakpoint.
                with suppress(ValueError):  # the task explains what is wrong with the cell
                    value = float(Decimal(repr(number(value))) * factor)
            values[name] = value
        return values

    def _labels_by_name(self) -> dict[str, list[str]]:
        """Field → class names, if this data set numbers its classes differently from the task; names are read then."""
        by_name: dict[str, list[str]] = {}
        for name, names in ((n, self.table.labels[c]) for n, c in self.columns.items() if c in self.table.labels):
            answers = [
                (self._answer(name, position), self._answer(name, label)) for position, label in enumerate(names)
            ]
            if any(of_name is not None and of_name != of_number for of_number, of_name in answers):
                by_name[name] = names
                self.notes.append(
                    f"Split {self.split!r}: {self.columns[name]} numbers its classes differently from "
                    f"{self.task.NAME}; they are read by name ({', '.join(names)})."
                )
        return by_name

    def _answer(self, name: str, value: object) -> str | None:
        """The completion of the first usable row, with another value in one field."""
        for raw in self.table.rows[:100]:
            try:
                return self.task.make_item("", {**self._values(raw), name: value}).completion
            except RowError:
                continue
        return None
