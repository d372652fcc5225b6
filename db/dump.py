"""Every table and view as a file that spreadsheets, R and pandas can read: CSV or Parquet.

A number that may be NaN or infinite stays the pair `value`, `value_kind`, so an empty `value` has its reason beside it.
JSON columns are JSON text, and times have a zone. An empty field of a CSV file is NULL or empty text; Parquet
distinguishes the two. CSV files have text as it is, even an answer that begins with =, a formula to spreadsheets.
"""

import csv
import json
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, BigInteger, Boolean, Double, Integer, Text, column, select, table, text
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from db.errors import DatabaseError, OutputError
from db.files import staged_file
from db.store import open_session
from db.tables import METADATA, VIEWS, UtcDateTime

Columns = dict[str, TypeEngine[Any]]
# SQLite does not know the types of a view's columns. Equal names have equal types everywhere; all others are floats.
_TYPES: Columns = {
    **{c.name: c.type for each in METADATA.sorted_tables for c in each.columns},
    **dict.fromkeys(("timestamp", "metric"), Text()),
    **dict.fromkeys(("adapter_bytes", "adapter_gguf_bytes", "model_gguf_bytes"), BigInteger()),
}


def export(
    url: str | Path | URL, folder: Path, form: str = "csv", tables: Iterable[str] | None = None
) -> dict[str, int]:
    """Write tables and views (None: all) as of one moment, or leave the old files. Returns name → number of rows."""
    known = [*sorted(METADATA.tables), *VIEWS]
    names = known if tables is None else list(dict.fromkeys(tables))
    if unknown := [name for name in names if name not in known]:
        got = ", ".join(map(repr, unknown))
        raise DatabaseError("names of tables and views", got, f"name one of: {', '.join(known)}")
    write = _write_parquet if form == "parquet" else _write_csv
    counts = {}
    try:
        with open_session(url) as session, ExitStack() as whole:
            for name in names:
                columns, rows = _read(session, name)
                write(whole.enter_context(staged_file(folder / f"{name}.{form}")), columns, rows)
                counts[name] = len(rows)
    except OutputError as error:
        raise DatabaseError(f"a writable folder at {folder}", str(error), "name another with --out") from error
    return counts


def _read(session: Session, name: str) -> tuple[Columns, list[list[Any]]]:
    """Columns, and rows in a fixed order: by key, or by all columns of a view."""
    names = list(session.execute(text(f"SELECT * FROM {name} WHERE 1 = 0")).keys())  # noqa: S608  of a known name
    known = METADATA.tables.get(name)
    columns = {n: _TYPES.get(n, Double()) if known is None else known.columns[n].type for n in names}
    order = names if known is None else [c.name for c in known.primary_key.columns]
    query = (
        select(*(column(n, kind) for n, kind in columns.items())).select_from(table(name)).order_by(*map(column, order))
    )
    return columns, [[_json(v) if isinstance(v, dict | list) else v for v in row] for row in session.execute(query)]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _write_csv(file: Path, columns: Columns, rows: list[list[Any]]) -> None:
    """RFC 4180: lines end with CR LF, so that the writer quotes either of them inside a text."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\r\n")
        writer.writerow(columns)
        writer.writerows([v.isoformat() if isinstance(v, datetime) else v for v in row] for row in rows)


def _write_parquet(file: Path, columns: Columns, rows: list[list[Any]]) -> None:
    """Types are those of the tables, so that every export of a table has the same ones."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        Boolean: pa.bool_(), Integer: pa.int64(), Double: pa.float64(), UtcDateTime: pa.timestamp("us", tz="UTC"),
    }  # fmt: skip
    types = [next((a for k, a in kinds.items() if isinstance(kind, k)), pa.string()) for kind in columns.values()]
    arrays = [pa.array([row[place] for row in rows], type=kind) for place, kind in enumerate(types)]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), file)
