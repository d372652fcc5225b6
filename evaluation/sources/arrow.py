"""Rows of Arrow tables: Parquet files, and data sets of the `datasets` library."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evaluation.sources.types import RawRow, SourceError, Table

_BATCH = 10_000  # rows turned into Python values at once: QNLI's 105,000 take less than a second

Columns = Mapping[str, Sequence[object]]


def read_parquet(source: str, data: bytes) -> Table:
    """The table in a Parquet file.

    Args:
        source: Its name, for errors.
        data: Its bytes.

    Raises:
        SourceError: no Parquet file, or a damaged one.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(source, [f"expected a Parquet file: {error}"]) from error
    names = list(table.column_names)
    rows = raw_rows(lambda start, end: table.slice(start, end - start).to_pydict(), table.num_rows)
    return Table(names, rows, "", frozenset(n for n in names if names.count(n) > 1), labels=_labels(table.schema))


def _labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes that `datasets` leaves in a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {
        column: list(kind["names"])
        for column, kind in features.items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names")
    }


def raw_rows(read: Callable[[int, int], Columns], rows: int) -> list[RawRow]:
    """All rows; one with a cell that cannot be read has a problem instead of values.

    Args:
        read: First row and the one after the last, from 0 → column → its cells.
        rows: How many there are.
    """
    found: list[RawRow] = []
    for start in range(0, rows, _BATCH):
        end = min(start + _BATCH, rows)
        try:
            columns = read(start, end)
        except _UNREADABLE:
            found += [_one(read, place) for place in range(start, end)]
            continue
        names = list(columns)
        cells = zip(*columns.values(), strict=True)
        found += [RawRow(start + n, None, dict(zip(names, row, strict=True))) for n, row in enumerate(cells, start=1)]
    return found


# Text that is not UTF-8, or a point in time that Python cannot hold.
_UNREADABLE = (ValueError, OverflowError)


def _one(read: Callable[[int, int], Columns], place: int) -> RawRow:
    try:
        return RawRow(place + 1, None, {name: cells[0] for name, cells in read(place, place + 1).items()})
    except _UNREADABLE as error:
        return RawRow(place + 1, None, {}, f"a cell cannot be read: {error}")
