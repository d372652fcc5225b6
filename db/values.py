"""Floats that survive a database: NaN and the infinities become typed states, text becomes storable.

SQLite turns NaN into NULL, and JSON columns of PostgreSQL refuse the word NaN. A loss that diverged is a
finding, not a gap, so each stored float is a pair (value, kind) and only a finite one has a value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

ValueKind = Literal["finite", "nan", "inf", "-inf"]

SAME_MEAN = 1e-9
"""How far two means of the same numbers from 0 to 1 may lie apart, added up in different orders."""


def split_value(number: float | None) -> tuple[float | None, ValueKind]:
    """Turn a float into the stored pair; a missing number (JSON null) is stored as NaN."""
    if number is None or math.isnan(number):
        return None, "nan"
    if math.isinf(number):
        return None, "inf" if number > 0 else "-inf"
    return float(number), "finite"


def join_value(value: float | None, kind: str) -> float:
    """Turn a stored pair back into the float it was."""
    return value if kind == "finite" and value is not None else float(kind)


def clean_text(text: str) -> str:
    """Replace what no database stores: NUL (PostgreSQL) and lone surrogates (any UTF-8 column)."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def plain(value: Any) -> Any:
    """Copy a JSON value so that every JSON column takes it: clean text, words for NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return split_value(value)[1]
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
