"""Cells of a data set's rows, checked before an item is made of them."""

import hashlib
import reprlib
from collections.abc import Mapping
from typing import Any

from evaluation.tasks import RowError


def shown(value: object) -> str:
    """A value as errors show it: cut where it is long."""
    return reprlib.repr(value)


def _blank(text: str) -> bool:
    """Whether a reader would see nothing: white space, or marks without width such as U+200B."""
    return not any(c.isprintable() and not c.isspace() for c in text)


def text(row: Mapping[str, Any], name: str) -> str:
    """The text of a field that must have one, without white space at its ends; inside it is left as it is.

    Raises:
        RowError: it is missing, no text, blank, or cannot be written as UTF-8.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(name, f"expected text, got {'nothing' if value is None else shown(value)}")
    if _blank(value):
        raise RowError(name, "expected text, got blanks only" if value else "expected text, got an empty one")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(name, f"expected text that UTF-8 can hold, got half a character: {error}") from error
    return value.strip()


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """As `text`, but "" where the field is missing, None or blank.

    Raises:
        RowError: it holds something else than text.
    """
    value = row.get(name)
    return "" if value is None or (isinstance(value, str) and _blank(value)) else text(row, name)


def choice(row: Mapping[str, Any], name: str, names: Mapping[str, str]) -> str:
    """The label of a field that holds one of a few names.

    Args:
        row: Field → value.
        name: The field. Its value may be text, a bool or a whole number; case and outer white space do not matter.
        names: What it may hold, in small letters → label.

    Raises:
        RowError: it holds none of them.
    """
    value = row.get(name)
    label = names.get(str(value).strip().casefold())
    if label is None:
        raise RowError(name, f"expected one of {', '.join(names)}, got {'nothing' if value is None else shown(value)}")
    return label


def digest(value: str) -> str:
    """A short name of a text, the same for texts that differ in case or white space alone."""
    return hashlib.sha256(" ".join(value.casefold().split()).encode()).hexdigest()[:16]
