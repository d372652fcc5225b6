"""Tables in Markdown; cells may hold anything, a model's own words too."""

from __future__ import annotations

from evaluation.statistics import Interval


def cell(text: object) -> str:
    """One line that cannot end its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def grid(headers: list[str], lines: list[list[str]]) -> str:
    """Table, or a sentence where there is nothing to show."""
    if not lines:
        return "None recorded."
    rows = [headers, ["---"] * len(headers), *lines]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def number(value: float | None, *, sign: bool = False, digits: int = 1) -> str:
    """A number, or a dash where it does not exist."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(value: Interval | None, *, sign: bool = False, digits: int = 1) -> str:
    """Estimate and bounds, or a dash."""
    if value is None:
        return "–"
    estimate, low, high = (number(part, sign=sign, digits=digits) for part in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]"
