"""Datasets of charts, column by column, small enough for one file: texts coded, numbers rounded, lines thinned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_POINTS = 300
"""Of one line; more cannot be told apart on a screen."""
DIGITS = 5
"""Significant ones; a picture shows fewer."""

Value = str | float | int | None
Point = tuple[int, float | None, float, float | None]
"""(step, low, value, high)."""


@dataclass
class Dataset:
    """Rows of a chart.

    Attributes:
        names: Of the columns.
        rows: Each as long as `names`. A column holds texts, or numbers and None.
    """

    names: tuple[str, ...]
    rows: list[tuple[Value, ...]] = field(default_factory=list)

    def add(self, *row: Value) -> None:
        """Append a row.

        Raises:
            ValueError: Its length is not that of `names`.
        """
        if len(row) != len(self.names):
            raise ValueError(f"expected {len(self.names)} values ({', '.join(self.names)}), came {len(row)}")
        self.rows.append(row)

    def column(self, name: str) -> list[Value]:
        """The values of a column."""
        at = self.names.index(name)
        return [row[at] for row in self.rows]

    def levels(self, name: str) -> list[str]:
        """The different texts of a column, in the order of their first row."""
        return list(dict.fromkeys(str(value) for value in self.column(name)))

    def packed(self) -> dict[str, Any]:
        """The dataset for JSON: a column of texts as {levels, codes}, one of numbers as a list, NaN as null."""
        return {name: _packed(self.column(name)) for name in self.names}


def _packed(values: Sequence[Value]) -> Any:
    if any(isinstance(value, str) for value in values):
        levels = {text: code for code, text in enumerate(dict.fromkeys(str(value) for value in values))}
        return {"levels": list(levels), "codes": [levels[str(value)] for value in values]}
    return [rounded(value) for value in values]


def rounded(value: Value) -> float | int | None:
    """A number with `DIGITS` significant digits; None for NaN and infinities, which no axis can show."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return None
    if isinstance(value, int):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def thin(line: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[Point]:
    """A line of at most `most` points as (step, low, value, high).

    A longer line is cut into `most` stretches of equal length, each drawn as its mean at its middle step, with its
    smallest and largest value, so that no peak is lost. A line that is short enough stays, without bounds.

    Args:
        line: (step, finite value), by step.
        most: At least 1.
    """
    if len(line) <= most:
        return [(step, None, value, None) for step, value in line]
    found: list[Point] = []
    for part in range(most):
        stretch = line[part * len(line) // most : (part + 1) * len(line) // most]
        values = [value for _, value in stretch]
        found.append((stretch[len(stretch) // 2][0], min(values), math.fsum(values) / len(values), max(values)))
    return found


def spread(values: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    places = sorted({round(at * (len(values) - 1) / (most - 1)) for at in range(most)})
    return [values[at] for at in places]


def quantile(values: Iterable[float], share: float) -> float:
    """The quantile of some finite numbers, interpolated as numpy does."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
