"""A user's own AQI data from CSV, JSON lines or the Hugging Face hub, with nothing dropped silently.

A row number counts data rows from 1, a line number counts the lines of the file from 1. Blank lines are no
rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.sources.readers import read_table
from evaluation.sources.rows import RowChecker
from evaluation.sources.types import (
    FIELDS,
    AqiRecord,
    ColumnSpec,
    Rejection,
    SourceError,
    SourceResult,
    SourceSpec,
    Table,
    Target,
    check_mapping,
    suggest,
)

__all__ = [
    "FIELDS",
    "AqiRecord",
    "ColumnSpec",
    "Rejection",
    "SourceError",
    "SourceResult",
    "SourceSpec",
    "read_source",
    "write_rejected",
]


def read_source(spec: SourceSpec) -> SourceResult:
    """Reads a source; every row ends in exactly one of `records` and `rejected`.

    Raises:
        SourceError: the file or the mapping as a whole cannot be used, or no row is left. It lists every
            problem.
    """
    targets, problems = check_mapping(spec)
    try:
        table = read_table(spec)
    except SourceError as error:
        raise SourceError(spec.source, [*problems, *error.problems]) from error.__cause__
    problems += _check_columns(table, targets)
    if problems:
        raise SourceError(spec.source, problems)

    checker = RowChecker(spec.source, targets, spec.trust_given_aqi)
    records: list[AqiRecord] = []
    rejected: list[Rejection] = []
    for raw in table.rows:
        verdict = checker.check(raw)
        if isinstance(verdict, AqiRecord):
            records.append(verdict)
        else:
            rejected.append(verdict)
    if not records:
        shown = [f"row {r.row}{f' (line {r.line})' if r.line else ''}: {r.reason}" for r in rejected[:5]]
        more = [f"… and {len(rejected) - 5} more"] if len(rejected) > 5 else []
        raise SourceError(spec.source, [f"no row is left, all {len(rejected)} were rejected.", *shown, *more], rejected)
    return SourceResult(records, rejected)


def _check_columns(table: Table, targets: dict[str, Target]) -> list[str]:
    problems = []
    for name, target in targets.items():
        if target.column in table.repeated:
            problems.append(f"{name}: the header holds {target.column!r} more than once; rename one.")
        elif table.columns and target.column not in table.columns:
            problems.append(
                f"{name}: there is no column {target.column!r}.{suggest(target.column, table.columns)} "
                f"Available: {', '.join(table.columns)}.{table.hint}"
            )
    if not table.rows:
        problems.append("has a header, but no data row.")
    return problems


def write_rejected(path: Path, rejections: Sequence[Rejection]) -> None:
    """Writes one JSON object per refused row, in file order; an empty file says that none was refused."""
    lines = [json.dumps(_plain(asdict(r)), ensure_ascii=False, default=str) + "\n" for r in rejections]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _plain(value: object) -> object:
    """`value` with NaN and infinities as text: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
