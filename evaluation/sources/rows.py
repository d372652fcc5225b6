"""Judging raw rows: each becomes a record or a rejection, never both, never neither."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

from evaluation.epa import AQI_MAX, CATEGORIES, POLLUTANTS, OffScaleError, aqi, category, sub_index
from evaluation.sources.types import TEXT_FIELDS, AqiRecord, RawRow, Rejection, Target, suggest

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none"})
AQI_TOLERANCE = 1  # index points; other tools round halves to even or use the breakpoints of before May 2024
LARGEST = 1e6  # in any of EPA's units; every scale ends far below, and decimal arithmetic not far above
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN, or one of MISSING in any case."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING)


def number(value: object) -> float:
    """A finite number ≥ 0 from a cell.

    Raises:
        ValueError: anything else, with what was expected.
    """
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            comma = "; write the decimal comma as a point" if _DECIMAL_COMMA.fullmatch(text) else ""
            raise ValueError(f"expected a number, got {value!r}{comma}")
        result = float(text)
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


@dataclass(frozen=True)
class _Problem:
    column: str | None
    value: object
    reason: str


class RowChecker:
    """Judges the rows of one source in order; remembers what it accepted, to find duplicates."""

    def __init__(self, file: str, targets: Mapping[str, Target], trust_given_aqi: bool):
        self._file = file
        self._targets = targets
        self._trust = trust_given_aqi
        self._seen: dict[object, int] = {}
        self._ids: dict[str, int] = {}

    def check(self, raw: RawRow) -> AqiRecord | Rejection:
        """The verdict on one row."""
        if raw.problem is not None:
            return self._reject(raw, [_Problem(None, None, raw.problem)])
        problems: list[_Problem] = []
        record = self._record(raw, problems)
        if problems:
            return self._reject(raw, problems)
        # Only now: a row must not be a duplicate of one that was refused.
        self._seen[_identity(record)] = raw.row
        self._ids[record.id] = raw.row
        return record

    def _reject(self, raw: RawRow, problems: list[_Problem]) -> Rejection:
        first = problems[0]
        reason = "; ".join(f"{p.column}: {p.reason}" if p.column else p.reason for p in problems)
        return Rejection(self._file, raw.row, raw.line, first.column, first.value, reason, raw.values)

    def _value(self, raw: RawRow, name: str) -> object:
        """The cell behind a field; None when it is unmapped or missing."""
        target = self._targets.get(name)
        value = raw.values.get(target.column) if target else None
        return None if is_missing(value) else value

    def _record(self, raw: RawRow, problems: list[_Problem]) -> AqiRecord:
        readings = self._readings(raw, problems)
        given = self._given_aqi(raw, problems)
        computed: int | None = None
        if readings and not problems:
            computed = self._computed(raw, readings, problems)
        if computed is not None and given is not None and not self._trust and abs(computed - given) > AQI_TOLERANCE:
            reason = f"the given AQI is {given}, EPA's calculation of the readings gives {computed}"
            problems.append(self._problem(raw, "aqi", reason))
        label = self._category(raw, {i for i in (given, computed) if i is not None}, problems)
        texts = [self._text(raw, name, problems) for name in TEXT_FIELDS]
        if "prompt" in self._targets:
            if given is None and not problems:
                problems.append(self._problem(raw, "aqi", "is missing; it is the truth that an answer is scored by"))
        elif not readings and not problems:
            columns = [t.column for f, t in self._targets.items() if f in POLLUTANTS]
            problems.append(_Problem(None, None, f"no reading: all of {', '.join(columns)} are missing"))
        name = self._value(raw, "id")
        record = AqiRecord(
            id=f"row-{raw.row}" if name is None else str(name).strip(),
            row=raw.row,
            line=raw.line,
            readings=readings,
            given_aqi=given,
            category=label,
            prompt=texts[0],
            completion=texts[1],
        )
        if not problems:
            self._duplicates(raw, record, problems)
        return record

    def _problem(self, raw: RawRow, name: str, reason: str) -> _Problem:
        column = self._targets[name].column
        return _Problem(column, raw.values.get(column), reason)

    def _readings(self, raw: RawRow, problems: list[_Problem]) -> dict[str, float]:
        readings: dict[str, float] = {}
        for key in POLLUTANTS:
            value = self._value(raw, key)
            if value is None:
                continue
            try:
                reading = number(value)
            except ValueError as error:
                problems.append(self._problem(raw, key, str(error)))
                continue
            factor = self._targets[key].factor
            # Decimal: 70 ppb are 0.07 ppm, and EPA truncates, so 0.06999… would fall below the breakpoint.
            reading = reading if factor == 1 else float(Decimal(repr(reading)) * factor)
            if reading > LARGEST:
                problems.append(self._problem(raw, key, f"is far off EPA's scale, got {value}"))
                continue
            readings[key] = reading
        return readings

    def _computed(self, raw: RawRow, readings: dict[str, float], problems: list[_Problem]) -> int | None:
        """EPA's index; when there is none, names the columns at fault."""
        try:
            return aqi(readings)
        except ValueError as error:
            sound = {k: v for k, v in readings.items() if _on_scale(k, v)}
            for key in readings.keys() - sound.keys():
                try:
                    aqi({**sound, key: readings[key]})  # EPA passes some ozone values over when another one counts
                except ValueError as fault:
                    problems.append(self._problem(raw, key, str(fault)))
            if not problems:
                problems.append(_Problem(None, None, str(error)))
            return None

    def _given_aqi(self, raw: RawRow, problems: list[_Problem]) -> int | None:
        value = self._value(raw, "aqi")
        if value is None:
            return None
        try:
            index = number(value)
        except ValueError as error:
            problems.append(self._problem(raw, "aqi", str(error)))
            return None
        if index > AQI_MAX:
            problems.append(self._problem(raw, "aqi", f"expected an index in 0..{AQI_MAX}, got {value}"))
            return None
        return int(Decimal(repr(index)).quantize(Decimal(1), rounding=ROUND_HALF_UP))

    def _category(self, raw: RawRow, indices: set[int], problems: list[_Problem]) -> str | None:
        value = self._value(raw, "category")
        if value is None:
            return None
        known = {c.lower(): c for c in CATEGORIES}
        label = known.get(str(value).strip().lower())
        if label is None:
            hint = suggest(str(value), CATEGORIES)
            problems.append(
                self._problem(raw, "category", f"expected one of {', '.join(CATEGORIES)}, got {value!r}.{hint}")
            )
        elif indices and label not in {category(i) for i in indices}:
            numbers = " or ".join(str(i) for i in sorted(indices))
            reason = f"the given category is {label}, an AQI of {numbers} is {category(max(indices))}"
            problems.append(self._problem(raw, "category", reason))
        return label

    def _text(self, raw: RawRow, name: str, problems: list[_Problem]) -> str | None:
        if name not in self._targets:
            return None
        value = raw.values.get(self._targets[name].column)
        if isinstance(value, str) and value.strip():
            return value
        got = "nothing" if value is None or value == "" else repr(value)
        problems.append(self._problem(raw, name, f"expected a text, got {got}"))
        return None

    def _duplicates(self, raw: RawRow, record: AqiRecord, problems: list[_Problem]) -> None:
        twin = self._seen.get(_identity(record))
        if twin is not None:
            what = "prompt" if record.prompt is not None else "readings"
            problems.append(_Problem(None, None, f"duplicate: same {what} as row {twin}"))
        if record.id in self._ids:
            reason = f"the id {record.id!r} is that of row {self._ids[record.id]}; ids must be unique"
            column = self._targets["id"].column if "id" in self._targets else None
            problems.append(_Problem(column, record.id, reason))


def _identity(record: AqiRecord) -> object:
    return record.prompt if record.prompt is not None else tuple(sorted(record.readings.items()))


def _on_scale(key: str, value: float) -> bool:
    try:
        sub_index(key, value)
    except OffScaleError:
        return False
    return True
