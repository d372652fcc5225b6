"""Rows of data from CSV, JSON or Parquet files, folders or the Hugging Face hub, with nothing dropped silently.

`read_source` makes AQI records of them, `read_recipe` items of any recipe (`evaluation.tasks.Recipe`).

A row number counts data rows from 1, a line number counts the lines of the file from 1. Blank lines are no
rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.sources.hub import HUB
from evaluation.sources.readers import FILES, read_table
from evaluation.sources.recipes import OWN, RecipeRows, RecipeSpec, read_recipe
from evaluation.sources.rows import RowChecker
from evaluation.sources.types import (
    FIELDS,
    AqiRecord,
    ColumnSpec,
    Rejection,
    SourceError,
    SourceResult,
    SourceSpec,
    check_columns,
    check_mapping,
    no_row_left,
)

__all__ = [
    "FIELDS",
    "FILES",
    "HUB",
    "OWN",
    "AqiRecord",
    "ColumnSpec",
    "RecipeRows",
    "RecipeSpec",
    "Rejection",
    "SourceError",
    "SourceResult",
    "SourceSpec",
    "read_recipe",
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
    problems += check_columns(table, {name: target.column for name, target in targets.items()})
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
        raise no_row_left(spec.source, rejected)
    return SourceResult(records, rejected, table.revision)


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
