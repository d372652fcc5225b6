"""Checks of settings: each returns a list of complaints, empty where the value is right."""

import difflib
import math
from collections.abc import Iterable


def meant(value: object, known: Iterable[str]) -> str:
    """``; did you mean 'kfac'?`` where one of the known names is close, else nothing."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_of(name: str, value: object, known: Iterable[str]) -> list[str]:
    known = list(known)
    return [] if value in known else [f"{name}: expected one of {', '.join(known)}, got {value!r}{meant(value, known)}"]


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def whole(name: str, value: object, optional: bool = False) -> list[str]:
    if (optional and value is None) or is_whole(value):
        return []
    return [f"{name}: expected a whole number from 1 on{', or None' if optional else ''}; got {value!r}"]


def number(
    name: str,
    value: object,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> list[str]:
    if optional and value is None:
        return []
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and above < value and least <= value < below:  # type: ignore[operator]
        return []
    bounds = [f"above {above}"] if above > -math.inf else [f"from {least}"]
    bounds += [f"below {below}"] if below < math.inf else []
    return [f"{name}: expected a number {' and '.join(bounds)}{', or None' if optional else ''}; got {value!r}"]
