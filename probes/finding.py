"""One fault, found."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        name: Of the diagnosis.
        reason: A sentence: what is wrong, and what to do.
        numbers: The evidence.
    """

    name: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)


def fraction(part: float, whole: float) -> float:
    """Part / whole, 0 of nothing."""
    return part / whole if whole else 0.0
