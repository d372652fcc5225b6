"""Which column each field is read from, and its values: numbers in the field's own unit, decimal commas as points."""

from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from statistics import median

from evaluation.marks import mark_of
from evaluation.sources.tabular import RawRow, Table
from evaluation.tasks import Field, Task, decimal_commas, number, with_point
from trainers.settings import Section
from trainers.words import as_written, nearest, suggest

# Units of one family differ by powers of ten; converting between the families takes temperature and pressure.
_MASS = {"µg/m3": Decimal(1), "mg/m3": Decimal(1000)}
_VOLUME = {"ppb": Decimal(1), "ppm": Decimal(1000)}
_SPELLINGS = {"ug/m3": "µg/m3", "mcg/m3": "µg/m3", "ppmv": "ppm", "ppbv": "ppb"}


class Column(Section):
    """A column of the user's data and its unit; None: the field's own unit."""

    column: str
    unit: str | None = None


def checked_columns(
    task: Task, entries: Mapping[str, str | Column | None]
) -> tuple[dict[str, str | None], dict[str, str], list[str]]:
    """What params.yaml says about a task's fields.

    Returns field → column (None to leave the field out), field → unit of its column (if named), and what is wrong with
    the entries that are in neither.
    """
    fields, columns, units, problems = task.FIELDS, dict[str, str | None](), dict[str, str](), list[str]()
    for name, entry in entries.items():
        column, unit = (entry.column, entry.unit) if isinstance(entry, Column) else (entry, None)
        twin = next((other for other in columns if column is not None and columns[other] == column), None)
        if name not in fields and column is None and mark_of(name):
            continue  # `_marks` in evaluation.sources.rows heeds it
        if name not in fields:
            problems.append(f"unknown field {name!r} in columns{suggest(name, fields)}.")
        elif column is None and fields[name].required:
            problems.append(f"{name}: expected a column, got null; items cannot do without it.")
        elif twin is not None:
            problems.append(f"column {column!r} is mapped to both {twin!r} and {name!r}; map it once.")
        else:
            try:
                factor(name, fields[name].unit, unit)
            except ValueError as error:
                problems.append(str(error))
                continue
            columns[name] = column
            if unit is not None:
                units[name] = unit
    problems += [
        f"column {column!r} is mapped to {name!r}, but {other!r} is read from it too; map {other!r} to another one."
        for name, column in columns.items()
        for other, spec in fields.items()
        if spec.required and spec.column == column and other not in columns
    ]
    check = getattr(task, "check_mapping", None)
    return columns, units, [*problems, *(check(entries) if check else ())]


def factor(name: str, to: str | None, unit: str | None) -> Decimal:
    """What a value in `unit` is multiplied by to be in unit `to`; ValueError if that is impossible."""
    if unit is None:
        return Decimal(1)
    if to is None:
        raise ValueError(f"{name}: expected no unit, got {unit!r}; this field has none.")
    family, other = (_VOLUME, _MASS) if to in _VOLUME else (_MASS, _VOLUME)
    plain = unit.strip().lower().replace(" ", "").replace("μ", "µ").replace("^3", "3").replace("³", "3")
    plain = _SPELLINGS.get(plain, plain)
    if plain in family:
        return family[plain] / family[to.replace("³", "3")]
    if plain in other:
        raise ValueError(
            f"{name}: cannot turn {unit} into {to}: that takes temperature and pressure, which the file does "
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
    mapping = {name: column and as_written(column, table.columns) for name, column in mapping.items()}
    in_use = {*mapping.values(), *(spec.column for spec in fields.values())}
    for name, spec in fields.items():
        column = mapping.get(name, spec.column and as_written(spec.column, table.columns))
        optional = name not in mapping and not spec.required
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
                f"{setting} ({name}: {spec.about})."
            )
    if not table.rows:
        problems.append("has a header, but no data row.")
    return columns, problems, notes


class FieldReader:
    """Reads the fields of one table's rows."""

    def __init__(
        self, fields: Mapping[str, Field], columns: Mapping[str, str], units: Mapping[str, str], table: Table
    ) -> None:
        self.fields, self.columns, self.units, self.table = fields, columns, units, table
        self.factors = {name: factor(name, fields[name].unit, units.get(name)) for name in columns}
        numeric = dict.fromkeys(column for name, column in columns.items() if fields[name].typical)
        self.commas = [c for c in numeric if decimal_commas(raw.values.get(c) for raw in table.rows)]

    def _cell(self, raw: RawRow, column: str) -> object:
        cell = raw.values.get(column)
        return with_point(cell) if column in self.commas else cell

    def values(self, raw: RawRow) -> dict[str, object]:
        """Field → value."""
        values = {}
        for name, column in self.columns.items():
            value, times = self._cell(raw, column), self.factors[name]
            if times != 1:
                # Decimal: 70 ppb are 0.07 ppm, and EPA truncates, so 0.06999… would fall below the breakpoint.
                with suppress(ValueError):  # the task explains what is wrong with the cell
                    value = number(value) * times
            values[name] = value
        return values

    def doubtful_units(self) -> list[str]:
        """Questions about columns without a unit whose values would fit the field's other one."""
        problems = []
        for name, column in self.columns.items():
            spec = self.fields[name]
            if spec.unit is None or spec.typical is None or name in self.units:
                continue
            numbers = list[Decimal]()
            for raw in self.table.rows:
                with suppress(ValueError):
                    numbers.append(number(self._cell(raw, column)))
            middle = float(median([value for value in numbers if value] or [Decimal(0)]))
            family = _VOLUME if spec.unit in _VOLUME else _MASS
            other = next(unit for unit in family if unit != spec.unit.replace("³", "3"))
            low, high = spec.typical
            if middle and not low <= middle <= high and low <= middle * float(factor(name, spec.unit, other)) <= high:
                size = "large" if middle > high else "small"
                problems.append(
                    f"{name}: expected {spec.unit}, got a median of {middle:g} in column {column!r}, which is too "
                    f"{size} for that and would fit {other}. If it is {other}, write {name}: {{column: {column}, unit: "
                    f"{other}}} under columns in params.yaml; if it is right as it is, write unit: {spec.unit} there."
                )
        return problems
