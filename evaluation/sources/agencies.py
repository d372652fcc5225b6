"""Air quality files as agencies publish them, and what a file says about the pollutants in it.

Without a mapping two forms are recognized by their headers: a pollutant a row, with its name, value and unit in columns
of their own (EPA's daily files in both layouts, OpenAQ, AirNow's API, EEA), and a column for each pollutant whose unit
stands in the header or in a column beside it (AirNow's hourly files). With a mapping, rows about other pollutants are
left out. Index values, and columns that are named after another pollutant, are refused.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal

from evaluation import EvaluationError, epa
from evaluation.sources.columns import Column, unit_columns
from evaluation.sources.tabular import Table
from evaluation.sources.units import is_index, plain, units_in, without_units
from evaluation.tasks import number
from trainers.words import as_written

NAMES = ("parameter", "parametername", "aqsparameterdescription", "aqsparameterdesc", "airpollutant", "pollutant",
         "pollutantid", "pollutantname", "pollutanttype", "species", "specie")  # fmt: skip
INDEX = ("dailyaqivalue", "aqi")
VALUE = re.compile("value|mean|median|arithmeticmean|(pollutant)?(avg|average)(value)?|samplemeasurement|measurement|"
                   "(?!raw)[a-z0-9]*concentration")  # fmt: skip
ALIASES = {"pm25": "pm25", "pm10": "pm10", "ozone": "o3_8h", "o3": "o3_8h", "carbonmonoxide": "co", "co": "co",
           "sulfurdioxide": "so2", "sulphurdioxide": "so2", "so2": "so2", "nitrogendioxide": "no2",
           "no2": "no2"}  # fmt: skip
"""How a pollutant is called, in lower-case letters and digits alone."""
_AROUND = re.compile(
    "daily|mean|average|avg|max(imum)?|concentration|conc|value|hourly|(?<![0-9])(1|8|24)[ _-]?h(ou)?r?s?"
)
_OTHER_OXIDES = re.compile("nox|noy|oxides")
_WORST = re.compile("dominant|main|primary|prominent|responsible|defining|lead")  # a column of the worst pollutant
_COVID = {"specie", "count", "min", "max", "median", "variance"}  # of aqicn.org's bulk files


def named(text: str) -> set[str]:
    """The keys of the pollutant that a text is the name of, as "NO2 (µg/m³)" is; two for ozone without an hour."""
    name = _AROUND.sub("", without_units(text).replace("2,5", "2.5"))
    parts = [plain(part) for part in re.split(r"[()\[\],;]", name)]
    keys = {ALIASES[part] for part in parts if part in ALIASES}
    if len(keys) != 1 or is_index(text) or _OTHER_OXIDES.search(plain(text)):
        return set()
    if keys == {"o3_8h"} and "8h" not in plain(text):
        return {"o3_1h"} if re.search("1h|hourly", plain(text)) else {"o3_8h", "o3_1h"}
    return keys


def pollutant(name: object, value_column: str) -> str | None:
    """The key of a pollutant by the text that names it, as in "PM2.5 - Local Conditions", or None."""
    text = plain(name).removeprefix("acceptable")
    begins = (key for alias, key in ALIASES.items() if len(alias) > 2 and text.startswith(alias))
    key = max(named(str(name)), default=None) or next(begins, None)
    return "o3_1h" if key == "o3_8h" and re.search("1h|hourly", text + plain(value_column)) else key


def as_published(
    table: Table, mapping: Mapping[str, str | None], units: Mapping[str, str]
) -> tuple[Table, dict[str, Column], str] | None:
    """The table with a column per pollutant, (field → column) without a mapping, and a note.

    `mapping` and `units`: field → column, and → its unit, from params.yaml. None without a mapping if no header is
    recognized; EvaluationError if columns hold something else than what is read from them.
    """
    if {plain(column) for column in table.columns} >= _COVID:
        raise EvaluationError(
            "the header is that of aqicn.org, which publishes index values instead of concentrations."
        )
    if not mapping:
        return _of_header(table)
    columns = {key: as_written(column, table.columns) for key in epa.POLLUTANTS if (column := mapping.get(key))}
    table, note = _of_mapped(table, {key: column for key, column in columns.items() if column in table.columns}, units)
    return table, {}, note


def _of_mapped(table: Table, columns: Mapping[str, str], units: Mapping[str, str]) -> tuple[Table, str]:
    """The rows about the pollutants that are mapped, where each row is about one; and a note."""
    problems = [
        f"{key}: column {column!r} is named after another pollutant, {' or '.join(sorted(names))}. Map it to that, or "
        "rename it."
        for key, column in columns.items()
        if (names := named(column)) and key not in names
    ]
    if problems:
        raise EvaluationError(problems)
    unnamed = [key for key, column in columns.items() if not named(column)]
    name = _naming_column(table, columns, unnamed) if unnamed else None
    if name is None:
        return table, ""
    if len(unnamed) > 1:
        raise EvaluationError(
            f"each row is about the pollutant in {name!r}, but {', '.join(unnamed)} are mapped. Map one of them, or "
            "leave columns empty to read all."
        )
    (key,) = unnamed
    about = [None if row.problem else str(row.values.get(name)) for row in table.rows]
    keys = {text: pollutant(text, columns[key]) for text in about if text is not None}
    others = Counter(text for text in about if text is not None and _gas(keys[text]) != _gas(key))
    if len(others) == len(keys):
        raise EvaluationError(f"{key}: no row is about it; column {name!r} has {_most_common(others)}.")
    readings = ((keys[text], row.values.get(columns[key])) for text, row in zip(about, table.rows, strict=True) if text)
    if key not in units and not unit_columns(table, [columns[key]]) and _are_indices(readings):
        raise EvaluationError(_as_index({key: columns[key]}))
    rows = [row for text, row in zip(about, table.rows, strict=True) if text is None or text not in others]
    note = f"{key} is read from the rows that name it in {name!r}."
    return replace(table, rows=rows, used=frozenset({name})), note + (
        f" Left out: {_most_common(others)}." if others else ""
    )


def _gas(key: str | None) -> str | None:
    return key and key.partition("_")[0]


def _naming_column(table: Table, columns: Mapping[str, str], unnamed: Collection[str]) -> str | None:
    """The column that names each row's pollutant; EvaluationError if it must be one, but has no known names."""
    free = [c for c in table.columns if c not in columns.values() and not _WORST.search(plain(c))]
    for column in sorted(free, key=lambda column: plain(column) not in NAMES):
        texts = {
            str(cell) for row in table.rows if isinstance(cell := row.values.get(column), str | int) and cell != ""
        }
        if plain(column) in NAMES:
            if any(pollutant(text, "") for text in texts):
                return column
            if len(texts) > 1:
                raise EvaluationError(
                    f"each row is about what {column!r} names ({', '.join(sorted(texts)[:5])}), but none of that is a "
                    f"pollutant: {', '.join(ALIASES)}. Write such names, or keep the rows of one."
                )
        elif texts and all(map(named, texts)) and any(named(text).intersection(unnamed) for text in texts):
            return column
    return None


def _of_header(table: Table) -> tuple[Table, dict[str, Column], str] | None:
    by_name = {plain(column): column for column in reversed(table.columns)}
    name = next((by_name[n] for n in NAMES if n in by_name), None)
    value = next((column for column in table.columns if VALUE.fullmatch(plain(column))), None)
    if name is None or value is None:
        wide = {max(names): column for column in reversed(table.columns) if (names := named(column))}
        if not (unit_columns(table, wide.values()) or any(map(units_in, wide.values())) or table.units):
            return None
        note = f"The header is that of an agency: pollutants in {', '.join(wide.values())}, with their units."
        return table, {key: Column(column=wide[key]) for key in epa.POLLUTANTS if key in wide}, note
    rows, others = [], Counter[str]()
    for row in table.rows:
        key = pollutant(row.values.get(name, ""), value)
        if key is None and row.problem is None:
            others[str(row.values.get(name))] += 1
        else:
            rows.append(row if key is None else replace(row, values={**row.values, key: row.values.get(value)}))
    keys = [key for key in epa.POLLUTANTS if any(key in row.values for row in rows)]
    if not keys:
        raise EvaluationError(f"expected the names of pollutants in {name!r}, got {_most_common(others)}.")
    index = next((by_name[n] for n in INDEX if n in by_name), None)
    fields = {key: Column(column=key) for key in keys} | ({"aqi": Column(column=index)} if index else {})
    note = f"The header is that of an agency: the pollutant in {name!r}, its value in {value!r}"
    note += f", the index in {index!r}." if index else "."
    note += f" {sum(others.values())} rows about other things are left out: {_most_common(others)}." if others else ""
    place = table.columns.index(value) + 1  # beside the value, as its unit is
    columns = list(dict.fromkeys([*table.columns[:place], *keys, *table.columns[place:]]))
    return replace(table, columns=columns, rows=rows, used=frozenset({name, value})), fields, note


def _most_common(names: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in names.most_common(3))


def index_values(table: Table, columns: Mapping[str, str]) -> list[str]:
    """A question about columns without a unit (pollutant → column) if their readings look like index values."""
    keys = {c: max(names) for c in table.columns if (names := named(c))} | {c: key for key, c in columns.items()}
    readings = ((key, row.values.get(column)) for row in table.rows for column, key in keys.items())
    return [_as_index(columns)] if columns and _are_indices(readings) else []


def _are_indices(readings: Iterable[tuple[str | None, object]]) -> bool:
    """Whether (pollutant, cell) are whole numbers to 500 for at least three pollutants, as index values are.

    Among them must be ozone or CO, whose concentrations in ppm are none.
    """
    largest = dict[str | None, Decimal]()
    for key, cell in readings:
        with suppress(ValueError):
            value = number(cell)
            if key and (value > epa.AQI_MAX or value % 1):
                return False
            largest[_gas(key)] = max(value, largest.get(_gas(key), value))
    return len(largest.keys() - {None}) >= 3 and max(largest.get("o3", 0), largest.get("co", 0)) >= 1


def _as_index(columns: Mapping[str, str]) -> str:
    key = min(columns)
    return (
        f"{', '.join(columns)}: all readings are whole numbers up to {epa.AQI_MAX} and have no unit, as index values "
        "do (aqicn.org's, for example), which nothing turns into concentrations. If they are concentrations, write "
        f"their units under columns, e.g. {key}: {{column: {columns[key]}, unit: {epa.POLLUTANTS[key].unit}}}."
    )
