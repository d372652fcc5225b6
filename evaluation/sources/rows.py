"""Items of a task's rows: each row of a data set becomes one, or is refused with row, column and reason."""

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import median
from typing import Annotated

from pydantic import Field as Key
from pydantic import field_validator

from evaluation.sources.hub import HUB, DataSet, open_data_set
from evaluation.sources.tables import AUTO, RawRow, Rejection, SourceError, Table, read_file
from evaluation.tasks import Field, Item, ItemError, RowError, Source, Task, decimal_commas, number, with_point
from trainers.settings import Positive, Section
from trainers.words import nearest, suggest

OWN = "hub"  # as the source: the task's own data set

# Units of one family differ by powers of ten only. Between the families lie temperature and pressure.
_MASS = {"µg/m3": Decimal(1), "mg/m3": Decimal(1000)}
_VOLUME = {"ppb": Decimal(1), "ppm": Decimal(1000)}
_SPELLINGS = {"ug/m3": "µg/m3", "mcg/m3": "µg/m3", "ppmv": "ppm", "ppbv": "ppb"}


class Column(Section):
    """A column of the user's data and the unit it is in; None: the field's own unit."""

    column: str
    unit: str | None = None


class RowSource(Section):
    """Where rows lie and which column means what: the part of section prepare_data that all tasks with rows share."""

    source: str  # hub | hub:org/name[@revision] | .csv .jsonl .ndjson .json .parquet file | folder in the hub's format
    columns: dict[str, str | Column | None]  # field → column, beside the task's own; null: an optional field left out
    hub_split: str | None  # for training and validation; null: the task's own
    hub_test_split: str | None  # null: the task's own, if the data set has it; like hub_split: drawn from that
    hub_subset: str | None  # configuration; null: the task's own, if the data set has it
    delimiter: str  # of CSV files: auto, or a character
    encoding: str  # of text files: auto, or its name
    max_chars: Positive | None  # of prompt and completion together; longer rows are refused
    max_refused: Annotated[float, Key(ge=0, le=1)]  # share of a split's rows; duplicates and too long ones apart

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


@dataclass(frozen=True)
class RecipeRows:
    train: list[Item]  # in the split's order; ids are <task>-<split>-<row>, unless the rows have their own
    test: list[Item] | None  # of the split for tests; None where test items are to be drawn from `train`
    rejected: list[Rejection]
    too_long: int  # of the rejected: for max_chars
    duplicates: int  # of the rejected: for a prompt that an earlier row of the split has
    most_refused: dict[str, float]  # split → share of its rows that were refused, where that is more than half
    notes: list[str]  # what a user should know, one sentence each
    facts: dict[str, object]  # for run.json: where the rows come from


def write_rejected(path: Path, rejections: Sequence[Rejection]) -> None:
    """Writes one JSON object per refused row, in file order; an empty file says that none was refused."""
    lines = [json.dumps(_plain(asdict(r)), ensure_ascii=False, default=str) + "\n" for r in rejections]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _plain(value: object) -> object:
    """`value` with NaN and infinities as text: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _said(rejection: Rejection) -> str:
    line = f" (line {rejection.line})" if rejection.line else ""
    return f"row {rejection.row}{line}: {rejection.reason}"


def commonest(rejections: Sequence[Rejection]) -> list[list[Rejection]]:
    """Rows refused for one reason, the most first; "at most 400, got 512" is the same as "at most 400, got 640"."""
    kinds: dict[str, list[Rejection]] = {}
    for rejection in rejections:
        kinds.setdefault(re.sub("[0-9]+", "#", rejection.reason.partition(", got ")[0]), []).append(rejection)
    return sorted(kinds.values(), key=len, reverse=True)


def read_recipe(task: Task, where: RowSource) -> RecipeRows:
    """Every row ends as an item or among the rejected; SourceError, with every problem, where no row of a split can."""
    own = getattr(task, "SOURCE", Source(""))
    asked, factors, problems = _asked(task, where.columns)
    if where.source == OWN:
        where = where.model_copy(
            update={
                "source": f"{HUB}{own.hub}",
                "hub_subset": where.hub_subset or own.subset,
                "hub_test_split": where.hub_test_split or own.test,
            }
        )
    try:
        names = [asked.get(name, field.column) for name, field in task.FIELDS.items()]
        tables, facts, notes = _tables(task.NAME, own, where, [name for name in names if name])
    except SourceError as error:
        raise SourceError(where.source, [*problems, *error.problems]) from error.__cause__
    first = next(iter(tables.values()))  # all splits have the same columns
    recognised: dict[str, str] | None = None
    if hasattr(task, "recognise"):
        try:
            recognised, said = task.recognise(first.columns, asked)
        except ItemError as error:
            raise SourceError(where.source, [*problems, str(error)]) from error
        notes.append(said)
    else:
        missing, near = _left_out(task, asked, first)
        notes += missing
        problems += near
    ids: dict[str, int] = {}
    splits = []
    for split, table in tables.items():
        columns = _columns(task, asked, table) if recognised is None else recognised
        found = _check_columns(task, columns, table)
        problems += [f"split {split!r}: {p}" if len(tables) > 1 else p for p in found]
        splits.append(_Split(task, where, split, columns, factors, table, ids))
    if problems:
        raise SourceError(where.source, list(dict.fromkeys(problems)))
    for made in splits:
        problems += [*made.doubted_units(), *made.read(several=len(tables) > 1)]
        notes += made.notes
    if problems:
        raise SourceError(where.source, problems)
    train, test = splits[0], splits[1] if len(splits) > 1 else None
    return RecipeRows(
        train=train.items,
        test=test.items if test else None,
        rejected=[r for s in splits for r in s.rejected],
        too_long=sum(s.too_long for s in splits),
        duplicates=sum(s.duplicates for s in splits),
        most_refused={s.split: share for s in splits if (share := len(s.rejected) / len(s.table.rows)) > 0.5},
        notes=notes,
        facts={**facts, "columns": train.columns, "rows": {s.split: len(s.table.rows) for s in splits}},
    )


# --- which column each field is read from ---


def _asked(
    task: Task, columns: Mapping[str, str | Column | None]
) -> tuple[dict[str, str | None], dict[str, Decimal], list[str]]:
    """(field → column, None to leave it out; field → factor to its own unit; what is wrong with the mapping)."""
    asked: dict[str, str | None] = {}
    factors: dict[str, Decimal] = {}
    problems: list[str] = []
    for name, entry in columns.items():
        column = Column(column=entry) if isinstance(entry, str) else entry
        own = task.FIELDS.get(name)
        if own is None:
            problems.append(f"unknown field {name!r} in columns{suggest(name, task.FIELDS)}.")
        elif column is None and own.required:
            problems.append(f"{name}: expected a column, got null; items cannot do without it.")
        elif column is None:
            asked[name] = None
        elif (twin := next((f for f in asked if asked[f] == column.column), None)) is not None:
            problems.append(f"column {column.column!r} is mapped to both {twin!r} and {name!r}; map it once.")
        else:
            try:
                factors[name] = _factor(name, own, column.unit)
                asked[name] = column.column
            except ValueError as error:
                problems.append(str(error))
    for name, taken in asked.items():
        for other, own in task.FIELDS.items():
            if own.required and own.column == taken and other not in asked:
                problems.append(
                    f"column {taken!r} is mapped to {name!r}, and {other!r} is read from it as well; map {other!r} "
                    "to another one."
                )
    check = getattr(task, "check_mapping", None)
    return asked, factors, [*problems, *(check(columns) if check else ())]


def _factor(name: str, own: Field, unit: str | None) -> Decimal:
    """What a value in `unit` is multiplied by to be in the field's own; ValueError where it cannot be."""
    if unit is None:
        return Decimal(1)
    if own.unit is None:
        raise ValueError(f"{name}: expected no unit, got {unit!r}; it has none.")
    family, other = (_VOLUME, _MASS) if own.unit in _VOLUME else (_MASS, _VOLUME)
    plain = unit.strip().lower().replace(" ", "").replace("μ", "µ").replace("^3", "3").replace("³", "3")
    plain = _SPELLINGS.get(plain, plain)
    if plain in family:
        return family[plain] / family[own.unit.replace("³", "3")]
    if plain in other:
        raise ValueError(
            f"{name}: cannot turn {unit} into {own.unit}: between mass and volume stand temperature and pressure, "
            f"which the file does not give. Convert the column to {' or '.join(family)} first."
        )
    raise ValueError(f"{name}: expected the unit {' or '.join(family)}, got {unit!r}.")


def _columns(task: Task, asked: Mapping[str, str | None], table: Table) -> dict[str, str]:
    """Field → column. An optional field that was not asked for is left out where its column is missing or taken."""
    columns = {}
    for name, own in task.FIELDS.items():
        column = asked.get(name, own.column)
        if column is None:
            continue
        if name in asked or own.required or (column in table.columns and column not in asked.values()):
            columns[name] = column
    return columns


def _left_out(task: Task, asked: Mapping[str, str | None], table: Table) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    problems: list[str] = []
    taken = {*asked.values(), *(own.column for own in task.FIELDS.values())}
    for name, own in task.FIELDS.items():
        if own.required or own.column is None or name in asked or not table.columns or own.column in table.columns:
            continue
        notes.append(f"There is no column {own.column!r}: items have none.")
        if near := nearest(own.column, [column for column in table.columns if column not in taken]):
            problems.append(
                f"{name}: there is no column {own.column!r}; did you mean {near!r}? Map it in columns, or say "
                f"{name}: null there to do without."
            )
    return notes, problems


def _check_columns(task: Task, columns: Mapping[str, str], table: Table) -> list[str]:
    problems = []
    for name, column in columns.items():
        if column in table.repeated:
            problems.append(f"{name}: the header holds {column!r} more than once; rename one.")
        elif table.columns and column not in table.columns:
            problems.append(
                f"{name}: there is no column {column!r}{suggest(column, table.columns)}.{table.hint} Say which it is "
                f"in columns ({name}: {task.FIELDS[name].about})."
            )
    if not table.rows:
        problems.append("has a header, but no data row.")
    return problems


# --- splits ---


def _tables(
    name: str, own: Source, where: RowSource, columns: Sequence[str]
) -> tuple[dict[str, Table], dict[str, object], list[str]]:
    """(split → its rows, the training split first; where they come from; notes)."""
    facts: dict[str, object] = dict.fromkeys(("subset", "test_split", "revision"))
    facts |= {"source": where.source, "train_split": own.train}
    if not where.source.startswith(HUB) and not Path(where.source).is_dir():
        table = read_file(where.source, where.delimiter, where.encoding, columns)
        notes = ["A file has no split for tests: test items are drawn from its rows."]
        return {own.train: table}, facts, [table.note, *notes] if table.note else notes
    with open_data_set(where.source, where.hub_subset, own.subset) as data:
        train = where.hub_split or own.train
        test, notes = _test_split(name, own, where, data, train)
        tables: dict[str, Table] = {}
        problems = []
        for split in [train] if test is None else [train, test]:
            try:
                tables[split] = data.table(split)
            except SourceError as error:
                problems += error.problems
        if problems:
            raise SourceError(where.source, problems)
    facts |= {
        "subset": data.subset,
        "train_split": train,
        "test_split": test,
        "available_splits": list(data.splits),
        "revision": tables[train].revision,
    }
    return tables, facts, notes


def _test_split(name: str, own: Source, where: RowSource, data: DataSet, train: str) -> tuple[str | None, list[str]]:
    """The split that test items are taken from, None where they are drawn from `train`; and what to say of it."""
    test = where.hub_test_split or own.test
    if test is not None and test != train and (where.hub_test_split or test in data.splits):
        return test, []
    why = f"The data set has no split {test!r} (it has {', '.join(data.splits)})"
    if test is None:
        why = f"No split of {name} is for tests"
    elif test == train:
        why = f"Split {train!r} is used for training and tests"
    return None, [f"{why}: test items are drawn from {train!r}."]


@dataclass
class _Split:
    """Makes items of the rows of one split, in order; remembers prompts and ids, to find duplicates."""

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
    too_long: int = 0
    duplicates: int = 0
    commas: set[str] = field(default_factory=set)  # columns of numbers with decimal commas

    def __post_init__(self) -> None:
        numbers = [column for name, column in self.columns.items() if self.task.FIELDS[name].typical]
        self.commas = {c for c in numbers if decimal_commas(raw.values.get(c) for raw in self.table.rows)}
        if self.commas:
            columns = ", ".join(column for column in numbers if column in self.commas)
            self.notes.append(f"Decimal commas are read as points in {columns}.")

    def doubted_units(self) -> list[str]:
        """Questions about columns without a unit whose values would fit the field's other one."""
        found = []
        for name, column in self.columns.items():
            own, said = self.task.FIELDS[name], self.where.columns.get(name)
            if own.unit is None or own.typical is None or (isinstance(said, Column) and said.unit):
                continue
            values = []
            for raw in self.table.rows:
                cell = raw.values.get(column)
                with suppress(ValueError):
                    values.append(number(with_point(cell) if column in self.commas else cell))
            typical = median([value for value in values if value] or [0.0])
            family = _VOLUME if own.unit in _VOLUME else _MASS
            other = next(unit for unit in family if unit != own.unit.replace("³", "3"))
            low, high = own.typical
            if typical and not low <= typical <= high and low <= typical * float(_factor(name, own, other)) <= high:
                size = "large" if typical > high else "small"
                found.append(
                    f"{name}: expected {own.unit}, got a median of {typical:g} in column {column!r}, which is too "
                    f"{size} for that and would fit {other}. Write in params.yaml, under columns, "
                    f"{name}: {{column: {column}, unit: {other}}} if it is, or unit: {own.unit} "
                    "if it is right as it is."
                )
        return found

    def read(self, several: bool) -> list[str]:
        """Fill `items` and `rejected`; what is wrong if none is left, or more are refused than may be."""
        named = self._named()
        seen: dict[Hashable, tuple[int, str]] = {}
        for raw in self.table.rows:
            try:
                item = self._item(raw, named, seen)
            except RowError as error:
                self._reject(raw, error.problems)
            else:
                self.ids[item.id] = raw.row
                self.items.append(item)
        where = f"split {self.split!r}: " if several else ""
        if not self.items:
            shown = [_said(rejection) for rejection in self.rejected[:5]]
            more = [f"… and {len(self.rejected) - 5} more"] if len(self.rejected) > 5 else []
            return [f"{where}no row is left, all {len(self.rejected)} were rejected.", *shown, *more]
        lost = sum(raw.lost for raw in self.table.rows)
        if lost:
            self.notes.append(f"{lost} more rows are lost in quotes left open; data/rejected.jsonl says where.")
        faults = [r for r in self.rejected if not r.reason.startswith(("duplicate: ", "too long: "))]
        rows, refused = len(self.table.rows) + lost, len(faults) + lost
        if refused <= self.where.max_refused * rows:
            return []
        return [
            f"{where}{refused} of {rows} rows ({refused / rows:.0%}) were refused, more than prepare_data.max_refused "
            f"({self.where.max_refused:.0%}) allows; mend the file or columns, or raise it. Most often:",
            *(f"{len(same)} times, first in {_said(same[0])}" for same in commonest(faults)[:3]),
        ]

    def _item(self, raw: RawRow, named: Mapping[str, list[str]], seen: dict[Hashable, tuple[int, str]]) -> Item:
        if raw.problem is not None:
            raise RowError(None, raw.problem)
        values = self._values(raw)
        for name, labels in named.items():
            number_of = values[name]
            if isinstance(number_of, int) and 0 <= number_of < len(labels):
                values[name] = labels[number_of]
            elif number_of == -1:
                raise RowError(name, f"expected one of {', '.join(labels)}, got -1, as where labels are kept secret")
        item = self.task.make_item(f"{self.task.NAME}-{self.split}-{raw.row}", values)
        size, most = item.characters, self.where.max_chars
        if most is not None and size > most:
            self.too_long += 1
            raise RowError(None, f"too long: expected prompt and completion of at most {most} characters, got {size}")
        row, completion = seen.setdefault(item.asked, (raw.row, item.completion))
        if row != raw.row:
            self.duplicates += 1
            other = "" if completion == item.completion else ", with another answer"
            raise RowError(None, f"duplicate: same prompt as row {row}{other}")
        if item.id in self.ids:
            del seen[item.asked]  # a row that is refused has no duplicates
            raise RowError("id", f"{item.id!r} is that of row {self.ids[item.id]} too; ids must be unique")
        return item

    def _values(self, raw: RawRow) -> dict[str, object]:
        """Field → value, numbers in the field's own unit; and the task's settings of rows."""
        values: dict[str, object] = {name: getattr(self.where, name) for name in getattr(self.task, "ROW_SETTINGS", ())}
        for name, column in self.columns.items():
            value, factor = raw.values.get(column), self.factors.get(name, 1)
            if column in self.commas:
                value = with_point(value)
            if factor != 1:
                # Decimal: 70 ppb are 0.07 ppm, and EPA truncates, so 0.06999… would fall below the breakpoint.
                with suppress(ValueError):  # the task says what is wrong with the cell
                    value = float(Decimal(repr(number(value))) * factor)
            values[name] = value
        return values

    def _named(self) -> dict[str, list[str]]:
        """Fields whose classes this data set numbers otherwise than the task's own; their names are read instead."""
        found: dict[str, list[str]] = {}
        for name, labels in ((n, self.table.labels[c]) for n, c in self.columns.items() if c in self.table.labels):
            answers = {k: (self._answer(name, k), self._answer(name, label)) for k, label in enumerate(labels)}
            if any(by_name is not None and by_name != by_number for by_number, by_name in answers.values()):
                found[name] = labels
                self.notes.append(
                    f"Split {self.split!r}: {self.columns[name]} numbers its classes otherwise than "
                    f"{self.task.NAME} does; they are read by name ({', '.join(labels)})."
                )
        return found

    def _answer(self, name: str, value: object) -> str | None:
        """The completion of the first sound row, with another value in one field."""
        for raw in self.table.rows[:100]:
            try:
                return self.task.make_item("", {**self._values(raw), name: value}).completion
            except RowError:
                continue
        return None

    def _reject(self, raw: RawRow, problems: Sequence[tuple[str | None, str]]) -> None:
        named = [(self.columns.get(name, name) if name else None, reason) for name, reason in problems]
        reason = "; ".join(f"{column}: {reason}" if column else reason for column, reason in named)
        column = named[0][0]
        value = raw.values.get(column) if column is not None else None
        row = Rejection(self.where.source, raw.row, raw.line, column, value, reason, raw.values, self.split)
        self.rejected.append(row)
