"""Every table and view as a file that spreadsheets, R and pandas can read: CSV or Parquet.

A number that may be NaN or infinite stays the pair `value`, `value_kind`, so an empty `value` has its reason beside it.
JSON columns are JSON text, and times have a zone. An empty field of a CSV file is NULL or empty text; Parquet
distinguishes the two. CSV files have text as it is, even an answer that begins with =, a formula to spreadsheets.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, select, text
from sqlalchemy.orm import Session

from db.errors import DatabaseError, OutputError
from db.files import staged_file
from db.store import open_session
from db.tables import METADATA, VIEWS

if TYPE_CHECKING:
    import pandas as pd


def export(url: str | Path | URL, folder: Path, form: str = "csv") -> dict[str, int]:
    """Write all tables and views as of one moment, or leave the old files. Returns name → number of rows."""
    counts = {}
    try:
        with open_session(url) as session, ExitStack() as whole:
            for name in (*sorted(METADATA.tables), *VIEWS):
                frame = _frame(session, name)
                counts[name] = len(frame)
                file = whole.enter_context(staged_file(folder / f"{name}.{form}"))
                if form == "parquet":
                    frame.to_parquet(file, index=False)
                else:
                    frame.to_csv(file, index=False)
    except OutputError as error:
        raise DatabaseError(f"a writable folder at {folder}", str(error), "name another with --out") from error
    return counts


def _frame(session: Session, name: str) -> pd.DataFrame:
    """Rows in a fixed order: by key, or by all columns of a view."""
    import pandas as pd

    table = METADATA.tables.get(name)
    view = text(f"SELECT * FROM {name}")  # noqa: S608  of a known name
    result = session.execute(view if table is None else select(table).order_by(*table.primary_key.columns))
    columns = list(result.keys())
    rows = [[_json(value) if isinstance(value, dict | list) else value for value in row] for row in result]
    frame = pd.DataFrame(rows, columns=columns).convert_dtypes(dtype_backend="pyarrow")
    return frame.sort_values(columns) if table is None else frame


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
