"""Numbers and names as they stand in sentences and tables."""

import math
from collections.abc import Iterable

from evaluation.statistics.intervals import Interval

NOT_FINITE = "not finite"
"""NaN or infinite: it was measured, and could not be computed."""
_MOST_SEEDS = 6
"""Seeds that are listed one by one."""


def number(value: float | None, *, sign: bool = False, digits: int = 1) -> str:
    """A number without a negative zero, or a dash where it does not exist."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}z.{digits}f}" if math.isfinite(value) else NOT_FINITE


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def significant(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, or a dash where it does not exist."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if math.isfinite(value) else NOT_FINITE


def interval(value: Interval | None, *, sign: bool = False, digits: int = 1) -> str:
    if value is None or not math.isfinite(value.estimate):
        return number(value.estimate if value else None)
    estimate, low, high = (number(part, sign=sign, digits=digits) for part in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]"


def listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds by number; many as a range or a count."""
    found = sorted(set(seeds))
    if len(found) <= _MOST_SEEDS:
        return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"
    unbroken = found[-1] - found[0] == len(found) - 1
    return f"seeds {found[0]} to {found[-1]}" if unbroken else f"{len(found)} seeds from {found[0]} to {found[-1]}"
