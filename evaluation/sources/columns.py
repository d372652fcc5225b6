"""Which column each field is read from, and its values: numbers in the field's own unit, decimal commas as points.

The unit of a column may be stated in params.yaml, in the column's name, in a column of units, in the first row, above
the header, or elsewhere in the file. Statements that contradict each other are refused; without any, the numbers are
read in the field's own unit, which is said.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from statistics import median

from evaluation.marks import mark_of
from evaluation.sources.tabular import RawRow, Table
from evaluation.sources.units import MASS, factor, plain, stated, units_in
from evaluation.tasks import Field, RowError, Task, decimal_commas, is_missing, number, with_point
from trainers.settings import Section
from trainers.words import as_written, nearest, suggest

_UNIT_NAME = re.compile(
    r"units?(?:[\s_]*of[\s_]*measure(?:ment)?s?)?|uom|einheit(?:en)?|unités?|unidad(?:es)?|eenheid|单位"
)
_LIKELY = {"gas": ("µg/m³", "ppb", "ppm"), "particles": ("µg/m³", "mg/m³")}  # what a column without a unit may be in


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
                if unit is not None:
                    units[name] = stated(unit) or unit
                    factor(fields[name].unit, units[name], fields[name].molar_mass)
            except ValueError as error:
                problems.append(f"{name}: {error}.")
                continue
            columns[name] = column
    problems += [
        f"column {column!r} is mapped to {name!r}, but {other!r} is read from it too; map {other!r} to another one."
        for name, column in columns.items()
        for other, spec in fields.items()
        if spec.required and spec.column == column and other not in columns
    ]
    check = getattr(task, "check_mapping", None)
    return columns, units, [*problems, *(check(entries) if check else ())]


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


# --- units ---


def with_unit_row(table: Table) -> Table:
    """Without a first row that holds units above numbers, which become those of its columns."""
    first, *below = table.rows or [RawRow(1, None, {})]
    units = dict[str, str]()
    for column, cell in first.values.items():
        number_below = next((c for row in below if not is_missing(c := row.values.get(column))), "")
        if isinstance(cell, str) and _is_unit(cell) and re.match(r"\s*[-−+.]?\d", str(number_below)):
            units[column] = cell
    return replace(table, rows=below, units={**table.units, **units}) if units else table


def _is_unit(text: str) -> bool:
    return bool(units_in(text)) and not text.strip()[0].isdigit()


def unit_columns(table: Table, numbers: Collection[str]) -> dict[str, str]:
    """Column of `numbers` → the column that has the unit of each.

    That is the one named after it ("NO2 Units" of "NO2 Mean"), else the next one to the right, else one in front of all
    columns of numbers. A column of units is called so, or has units in all of its cells.
    """
    stems = dict[str, str]()  # column of units → what it is named after
    for column in table.columns if numbers else ():
        texts = (cell.strip() for row in table.rows if isinstance(cell := row.values.get(column), str) and cell.strip())
        first, is_named = next(texts, ""), _UNIT_NAME.search(column.casefold())
        if column in numbers or not first or not (is_named or _is_unit(first)):
            continue
        stem = plain(_UNIT_NAME.sub("", column.casefold())) if is_named else ""
        are_units = list(map(_is_unit, {first, *texts}))
        if all(are_units) or (is_named and (any(are_units) or any(_is_of(stem, number) for number in numbers))):
            stems[column] = stem
    others = [plain(column) for column in table.columns if column not in stems]
    free = [c for c, stem in stems.items() if not stem or not any(other.startswith(stem) for other in others)]
    front = min((table.columns.index(column) for column in numbers if column in table.columns), default=0)
    result = dict[str, str]()
    for column in numbers:
        place = table.columns.index(column) if column in table.columns else front
        after = [c for c, stem in stems.items() if stem and _is_of(stem, column)]
        right = next((c for c in table.columns[place + 1 :] if c in free), None)
        if units_in(column) and right not in table.columns[place + 1 : place + 2]:
            right = None  # the header has its unit, and another column's stands further away
        left = next((c for c in table.columns[:front] if c in free and not units_in(column)), None)
        if best := max(after, key=lambda c: len(stems[c]), default=right or left):
            result[column] = best
    return result


def _is_of(stem: str, column: str) -> bool:
    """Whether a column of units named after `stem` is of a column of numbers: of any if it is just called "unit"."""
    own = plain(column)
    return own.startswith(stem) or (own != "" and stem.startswith(own))


# --- values ---


class FieldReader:
    """Reads the fields of one table's rows; numbers of a field with a unit come in that unit.

    `problems` and `notes`: statements that contradict each other, and what a user should know.
    """

    def __init__(
        self,
        fields: Mapping[str, Field],
        columns: Mapping[str, str],
        units: Mapping[str, str],
        table: Table,
        missing: Collection[str | float],
    ) -> None:
        self._missing = {_canonical(mark) for mark in missing}
        self.fields, self.columns, self.table = fields, columns, table
        self.problems, self.notes = list[str](), list[str]()
        numeric = dict.fromkeys(column for name, column in columns.items() if fields[name].typical)
        self.commas = [c for c in numeric if decimal_commas(raw.values.get(c) for raw in table.rows)]
        if self.commas:
            self.notes.append(f"Decimal commas are read as points in {', '.join(self.commas)}.")
        readings = {name: column for name, column in columns.items() if fields[name].unit}
        self.unit_columns = unit_columns(table, list(readings.values()))
        self._converted, self._stated = list[str](), dict[str, list[str]]()  # sentences; field → its units
        self.units = {name: self._unit(name, column, units.get(name)) for name, column in readings.items()}
        if self._converted:
            self.notes.append(f"Units are converted, a gas at 25 °C and 1 atm: {', '.join(self._converted)}.")
        own = {name: column for name, column in readings.items() if column not in self.unit_columns}
        self.unstated = {name: column for name, column in own.items() if self.units[name] is None}
        gases = [name for name in readings if fields[name].molar_mass]
        by_mass = next((columns[name] for name in gases if not MASS.keys().isdisjoint(self._stated[name])), None)
        for name in gases if by_mass else ():
            if column := self.unstated.get(name):
                self.problems.append(
                    f"{name}: expected a unit, since the gas in {by_mass!r} is given by its mass, got none for column "
                    f"{column!r}. Write it under columns: {name}: {{column: {column}, unit: …}}."
                )
        if self.unstated:
            as_what = ", ".join(f"{column!r} is read in {fields[name].unit}" for name, column in self.unstated.items())
            self.notes.append(f"No unit is stated: {as_what}. If that is wrong, name the unit in columns.")

    def _unit(self, name: str, column: str, given: str | None) -> str | None:
        """The unit of all of a column's numbers; None if each row has its own, or none is stated."""
        beside = self.unit_columns.get(column)
        values = [raw.values for raw in self.table.rows if beside and not is_missing(raw.values.get(column))]
        statements = [
            ("prepare_data.columns", given or ""),
            (f"the name of column {column!r}", column),
            ("the file", str(self.table.units.get(column, ""))),
        ]
        statements += [
            (f"column {beside!r}", text) for text in {str(row.get(str(beside)) or ""): None for row in values}
        ]
        where = dict[str, str]()  # unit → where it is stated
        for place, text in statements:
            try:
                unit = given if given in units_in(text) else stated(text)
            except ValueError as error:
                self.problems.append(f"{name}: {error}.")
                continue
            if unit:
                where.setdefault(unit, place)
        above = {unit for line in self.table.above for unit in units_in(line)} - {self.fields[name].unit}
        if above and not where:
            self.problems.append(
                f"{name}: the lines above the header name {' and '.join(sorted(above))}. Write the unit of column "
                f"{column!r} under columns: {name}: {{column: {column}, unit: …}}."
            )
        self._stated[name] = list(where)
        every = next((unit for unit, place in where.items() if place != f"column {beside!r}"), None)
        if every and len(where) > 1:
            found = " and ".join(f"{unit} in {place}" for unit, place in where.items())
            self.problems.append(
                f"{name}: expected one unit, got {found}. Correct what is wrong, or rename the column."
            )
        for unit in where:
            try:
                if factor(self.fields[name].unit, unit, self.fields[name].molar_mass) != 1:
                    self._converted.append(f"{column!r} from {unit} to {self.fields[name].unit}")
            except ValueError as error:
                if every:
                    self.problems.append(f"{name}: {error} ({where[unit]}).")
        return every

    def values(self, raw: RawRow) -> dict[str, object]:
        """Field → value; RowError if a number's unit is none that is known."""
        values = dict[str, object]()
        for name, column in self.columns.items():
            values[name] = value = self._cell(raw, column)
            spec, unit = self.fields[name], self.units.get(name)
            if spec.unit is None or is_missing(value) or name in self.unstated:
                continue
            try:
                times = factor(spec.unit, unit or self._unit_of_row(raw, column), spec.molar_mass)
            except ValueError as error:
                raise RowError(name, str(error)) from error
            # Decimals: 70 ppb are 0.07 ppm, and EPA truncates, so 0.06999… would fall below the breakpoint.
            with suppress(ValueError):  # the task explains what is wrong with the cell
                values[name] = number(value, signed=True) * times
        return values

    def _unit_of_row(self, raw: RawRow, column: str) -> str:
        beside = self.unit_columns[column]
        text = str(raw.values.get(beside) or "")
        if unit := stated(text):
            return unit
        raise ValueError(f"expected a unit in column {beside!r}, got {text!r}")

    def _cell(self, raw: RawRow, column: str) -> object:
        cell = raw.values.get(column)
        cell = with_point(cell) if column in self.commas else cell
        return None if self._missing and _canonical(cell) in self._missing else cell

    def repeated_gaps(self) -> list[str]:
        """What to say about cells that may mark missing values, because they are no usual numbers and come again."""
        places = dict[Decimal | str, list[tuple[str, str]]]()  # mark → text and column of each cell
        for name, column in self.columns.items():
            spec, unit = self.fields[name], self.units.get(name)
            if spec.typical is None:
                continue
            scale = factor(spec.unit, unit, spec.molar_mass) if unit else 1
            mixed = unit is None and column in self.unit_columns
            beyond = Decimal("Infinity") if mixed else Decimal(spec.typical[1]) / scale
            for raw in self.table.rows:
                cell = self._cell(raw, column)
                if not is_missing(cell) and _may_be_gap(cell, beyond):
                    places.setdefault(_canonical(cell), []).append((str(cell).strip(), column))
        gaps = []
        for mark, cells in sorted(places.items(), key=lambda place: len(place[1]), reverse=True)[:3]:
            columns = ", ".join(dict.fromkeys(column for _, column in cells))
            written = json.dumps(mark, ensure_ascii=False) if isinstance(mark, str) else f"{mark:f}"
            if len(cells) > (2 if any(map(str.isalpha, cells[0][0])) else 1):
                gaps.append(
                    f"{cells[0][0]!r} stands in {len(cells)} cells of {columns}. If it marks missing values, write "
                    f"missing: [{written}] in prepare_data."
                )
        return gaps

    def doubtful_units(self) -> list[str]:
        """Questions about columns without a unit whose values would fit another one."""
        problems = []
        for name, column in self.unstated.items():
            spec = self.fields[name]
            numbers = list[Decimal]()
            for raw in self.table.rows:
                with suppress(ValueError):
                    numbers.append(number(self._cell(raw, column)))
            middle = median([value for value in numbers if value] or [Decimal(0)])
            low, high = spec.typical or (0, math.inf)
            fit = [unit for unit in _LIKELY["gas" if spec.molar_mass else "particles"] if _fits(middle, unit, spec)]
            if middle and not low <= middle <= high and fit:
                size = "large" if middle > high else "small"
                problems.append(
                    f"{name}: expected {spec.unit}, got a median of {middle:g} in column {column!r}, which is too "
                    f"{size} for that and would fit {' or '.join(fit)}. Look up its unit and write it under columns, "
                    f"e.g. {name}: {{column: {column}, unit: {fit[-1]}}}; if it is right as it is, write unit: "
                    f"{spec.unit} there."
                )
        return problems


def _may_be_gap(cell: object, beyond: Decimal) -> bool:
    """Whether a cell may mark a missing value: a word, a whole negative number, 999, a number beyond the scale."""
    try:
        value = number(cell, signed=True)
    except ValueError:
        return isinstance(cell, str) and not re.search(r"\d", cell)
    nines = re.fullmatch(r"-?99+(?:\.9+|\.0+)?", f"{value:f}") is not None and abs(value) > 99
    return nines or value > beyond or (value < 0 and value == value.to_integral_value())


def _canonical(cell: object) -> Decimal | str:
    """The same for cells that say the same: -999, -999.0 and " -999.00 "."""
    try:
        return number(str(cell), signed=True).normalize()
    except ValueError:
        return str(cell).strip().casefold()


def _fits(value: Decimal, unit: str, spec: Field) -> bool:
    """Whether `value` in `unit` is a plausible median."""
    low, high = spec.typical or (0, math.inf)
    try:
        return low <= value * factor(spec.unit, unit, spec.molar_mass) <= high
    except ValueError:
        return False
