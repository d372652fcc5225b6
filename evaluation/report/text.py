"""Numbers and names as sentences and tables show them."""

import math
from collections.abc import Iterable, Mapping

from evaluation.statistics.intervals import Interval

NOT_FINITE = "not finite"
"""NaN or infinite: measured, but not computable."""
_MOST_SEEDS = 6
"""Seeds that are listed one by one."""


def number(value: float | None, *, sign: bool = False, digits: int = 1) -> str:
    """Format a number without a negative zero; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}z.{digits}f}" if math.isfinite(value) else NOT_FINITE


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)


def significant(value: float | None, digits: int = 4) -> str:
    """Format a number with that many significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if math.isfinite(value) else NOT_FINITE


def interval(value: Interval | None, *, sign: bool = False, digits: int = 1, unit: str = "") -> str:
    if value is None or not math.isfinite(value.estimate):
        return number(value.estimate if value else None)
    estimate, low, high = (number(part, sign=sign, digits=digits) for part in (value.estimate, value.low, value.high))
    return f"{estimate}{unit} [{low}, {high}]"


def score(value: float | None, bounds: Interval | None) -> str:
    return number(value) if bounds is None else interval(bounds)


def arms_in_words(values: Mapping[str, Interval], *, sign: bool = False, unit: str = "") -> str:
    """Arms with their estimates, the largest first; up to two have their intervals, and one needs no name."""

    def written(value: Interval) -> str:
        return interval(value, sign=sign, unit=unit) if len(values) < 3 else number(value.estimate, sign=sign) + unit

    ordered = sorted(values.items(), key=lambda item: -item[1].estimate)
    return listed(f"{arm} " * (len(values) > 1) + written(value) for arm, value in ordered)


def duration(seconds: float) -> str:
    """Format seconds as a person would say them: 42 s, 3.5 min, 2.1 h."""
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def seeds_text(seeds: Iterable[int]) -> str:
    """Seeds by number; many as a range or a count."""
    ordered = sorted(set(seeds))
    if len(ordered) <= _MOST_SEEDS:
        return f"seed{'s' if len(ordered) > 1 else ''} {', '.join(map(str, ordered))}"
    unbroken = ordered[-1] - ordered[0] == len(ordered) - 1
    return (
        f"seeds {ordered[0]} to {ordered[-1]}" if unbroken else f"{len(ordered)} seeds, {ordered[0]} to {ordered[-1]}"
    )
