"""Tables in Markdown; cells may hold anything, a model's own words too."""

from __future__ import annotations

import html
import math
import re

from evaluation.statistics import Interval

NOT_FINITE = "not finite"
"""NaN or infinite: it was measured, and could not be computed."""
_BOUNDS = r"\[[-+\d., %]+\](?![(\[:])"
"""Numbers in brackets that no link follows, such as an interval."""
_INNER_UNDERSCORE = r"(?<=[^\W_])_(?=[^\W_])"
"""Within a word, as in a model's name, it means nothing to Markdown."""
_SPECIAL = re.compile(rf"{_BOUNDS}|{_INNER_UNDERSCORE}|(?P<escaped>[\\`*_\[\]|~])")


def cell(text: object) -> str:
    """One line that shows the text as it is: no markup, no HTML, no link, no end of its cell."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return _SPECIAL.sub(lambda found: f"\\{found[0]}" if found["escaped"] else found[0], line)


def grid(headers: list[str], lines: list[list[str]]) -> str:
    """Table, or a sentence where there is nothing to show."""
    if not lines:
        return "None recorded."
    rows = [list(map(cell, row)) for row in (headers, *lines)]
    rows.insert(1, ["---"] * len(headers))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def number(value: float | None, *, sign: bool = False, digits: int = 1) -> str:
    """A number without a negative zero, or a dash where it does not exist."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}z.{digits}f}" if math.isfinite(value) else NOT_FINITE


def significant(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, or a dash where it does not exist."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if math.isfinite(value) else NOT_FINITE


def interval(value: Interval | None, *, sign: bool = False, digits: int = 1) -> str:
    """Estimate and bounds, or a dash."""
    if value is None or not math.isfinite(value.estimate):
        return number(value.estimate if value else None)
    estimate, low, high = (number(part, sign=sign, digits=digits) for part in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]"
