"""Air quality files as agencies publish them, recognized by their headers, without a mapping.

Two forms: a pollutant a row, with its name, value and unit in columns of their own (EPA's daily files in both layouts,
OpenAQ, AirNow's API), and a column for each pollutant with a column for its unit beside it (AirNow's hourly files).
Either becomes a table with one column per pollutant, in EPA's unit.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation

from evaluation import epa
from evaluation.sources.columns import Column, factor
from evaluation.sources.tabular import RawRow, Table

NAMES = ("parameter", "parametername", "aqsparameterdescription", "aqsparameterdesc")
UNITS = ("unit", "units", "unitsofmeasure")
INDEX = ("dailyaqivalue", "aqi")
VALUE = re.compile("value|arithmeticmean|(?!raw)[a-z0-9]*concentration")
ALIASES = {"pm25": "pm25", "pm10": "pm10", "ozone": "o3_8h", "o3": "o3_8h", "carbonmonoxide": "co", "co": "co",
           "sulfurdioxide": "so2", "so2": "so2", "nitrogendioxide": "no2", "no2": "no2"}  # fmt: skip
"""How a pollutant is called, in lower-case letters and digits alone."""
UNIT_NAMES = {"microgramspercubicmeter": "µg/m3", "milligramspercubicmeter": "mg/m3", "partspermillion": "ppm",
              "partsperbillion": "ppb"}  # fmt: skip
_CONDITIONS = re.compile(r"\(?\b(lc|stp|25 c)\b\)?$", re.IGNORECASE)  # of temperature and pressure, behind a unit


def plain(name: object) -> str:
    return re.sub("[^a-z0-9]", "", str(name).casefold())


def pollutant(name: object, value_column: str) -> str | None:
    """The key of a pollutant by the text that names it, as in "PM2.5 - Local Conditions", or None."""
    text = plain(name)
    key = ALIASES.get(text) or next((key for alias, key in ALIASES.items() if len(alias) > 2 and alias in text), None)
    hourly = re.search("1h|hourly", text + plain(value_column))
    return "o3_1h" if key == "o3_8h" and hourly else key


def as_published(table: Table) -> tuple[Table, dict[str, Column], str] | None:
    """The table with a column per pollutant, (field → column), and a note; None if no agency's header is recognized."""
    by_name = {plain(column): column for column in reversed(table.columns)}
    name = next((by_name[n] for n in NAMES if n in by_name), None)
    value = next((column for column in table.columns if VALUE.fullmatch(plain(column))), None)
    unit = next((by_name[n] for n in UNITS if n in by_name), None)
    index = next((by_name[n] for n in INDEX if n in by_name), None)
    if name and value:
        rows, others = _a_pollutant_a_row(table, name, value, unit)
        of = f"the pollutant in {name!r}, its value in {value!r} and its unit in {unit!r}"
    else:
        beside = {
            key: (column, by_name.get(f"{alias}unit") or by_name.get(f"{alias}units"))
            for alias, key in ALIASES.items()
            if (column := by_name.get(alias)) is not None
        }
        if not any(units for _, units in beside.values()):
            return None
        rows, others, index = [_converted(row, beside) for row in table.rows], Counter[str](), None
        of = f"pollutants in {', '.join(column for column, _ in beside.values())}, with their units beside them"
    keys = [key for key in epa.POLLUTANTS if any(key in row.values for row in rows)]
    units_are_given = unit is not None or not name
    fields = {key: Column(column=key, unit=epa.POLLUTANTS[key].unit if units_are_given else None) for key in keys}
    fields |= {"aqi": Column(column=index)} if index else {}
    left_out = ", ".join(f"{other} ({count})" for other, count in others.most_common(3))
    note = f"The header is that of an agency: {of}" + (f", the index in {index!r}." if index else ".")
    note += f" {sum(others.values())} rows about other things are left out: {left_out}." if others else ""
    return replace(table, columns=list(dict.fromkeys([*table.columns, *keys])), rows=rows), fields, note


def _a_pollutant_a_row(table: Table, name: str, value: str, unit: str | None) -> tuple[list[RawRow], Counter[str]]:
    """The rows with their value in a column of the pollutant's key, and how many are about something else."""
    rows: list[RawRow] = []
    others = Counter[str]()
    for row in table.rows:
        key = pollutant(row.values.get(name, ""), value)
        if key is None and row.problem is None:
            others[str(row.values.get(name))] += 1
        else:
            rows.append(row if key is None else _converted(row, {key: (value, unit)}))
    return rows, others


def _converted(row: RawRow, columns: Mapping[str, tuple[str, str | None]]) -> RawRow:
    """The row with the values of `columns`, key → (column, column of its unit), in EPA's units."""
    values, problem = dict(row.values), row.problem
    for key, (column, units) in columns.items():
        cell = values.get(column)
        values[key] = cell
        text = str(values.get(units) or "").strip() if units else ""
        if not text or cell in (None, "") or problem:
            continue
        text = _CONDITIONS.sub("", text).strip()
        try:
            times = factor(key, epa.POLLUTANTS[key].unit, UNIT_NAMES.get(plain(text), text))
            values[key] = cell if times == 1 else str(Decimal(str(cell)) * times)
        except InvalidOperation:
            continue  # the task explains what is wrong with the cell
        except ValueError as error:
            problem = str(error)
    return replace(row, values=values, problem=problem)
