"""Every table and view as files that spreadsheets, R and pandas read: CSV or Parquet.

A number that may be NaN or infinite stays the pair `value`, `value_kind`: an empty `value` has its reason beside it.
JSON columns are JSON text. Times have a zone: ISO 8601 text in CSV, UTC timestamps in Parquet. An empty field of a
CSV file is NULL or empty text; Parquet tells the two apart. (pandas takes the word nan of a CSV file for a gap, unless
`read_csv` is told `keep_default_na=False, na_values=[""]`.)

Text stands in CSV files as it is, also a model's answer that begins with = + - or @: a spreadsheet takes it for a
formula and runs it, unless the file is imported with its columns as text. Parquet has no such trap.
"""

from __future__ import annotations

import difflib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    Double,
    Integer,
    Select,
    Text,
    column,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from db.columns import Base, UtcDateTime
from db.errors import DatabaseError
from db.queries import VIEWS
from db.session import open_session

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["csv", "parquet"]
Columns = list[tuple[str, TypeEngine[Any]]]

_CHUNK_ROWS = 50_000

# SQLite does not know which types its views' columns have; equal names have equal types in all views.
_VIEW_TYPES: dict[str, TypeEngine[Any]] = {
    name: kind
    for kind, names in (
        (
            BigInteger(),
            "run_id seed readings layers passed failed not_finite prompts n fallbacks starts finished crashed running",
        ),
        (
            Double(),
            "aqi_accuracy delta_aqi retention_accuracy delta_retention inference_speed delta_speed token_ids_equal "
            "greedy_equal lowest highest megabytes bits_per_weight delta_f16 answers_equal_to_f16 rendered counted "
            "answered equal_to_merged value delta_base",
        ),
        (Boolean(), "git_dirty perturbed_noticed is_current is_latest"),
        (UtcDateTime(), "started ended last_started"),
        (
            Text(),
            "arm model_name backend_name device_class git_commit timestamp probe verdict pair type backend "
            "backend_version mode first_difference stage last_status last_error task task_title metric direction "
            "test_items_sha256",
        ),
    )
    for name in names.split()
}


def export(
    url: str | Path | URL, folder: str | Path, form: Format = "csv", tables: Iterable[str] | None = None
) -> dict[str, int]:
    """Write tables and views to `<folder>/<name>.<form>`, all as of one moment.

    Files are written beside their place and put there when all are whole; other files in the folder stay.

    Args:
        url: The database.
        folder: Made when absent.
        form: csv or parquet.
        tables: Names of tables and views; None: all.

    Returns:
        Name to number of rows.

    Raises:
        DatabaseError: No such table, no such database, or the folder cannot be written; old files stand.
    """
    folder = Path(folder)
    names = _known(tables)
    writer = _Parquet if form == "parquet" else _Csv
    writer.load()
    with open_session(url) as session, ExitStack() as stack:
        # Caught here, or the session would take a full disk for a fault of the database.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # A new name each time: a killed export leaves its folder behind, which must not stop the next.
            partial = Path(tempfile.mkdtemp(suffix=".partial", prefix=".", dir=folder))
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            rows = {name: _write(session, name, partial / f"{name}.{form}", writer) for name in names}
            for name in names:
                (partial / f"{name}.{form}").replace(folder / f"{name}.{form}")
        except OSError as error:
            raise DatabaseError(
                f"a folder that can be written at {folder}",
                f"{error.strerror or error}",
                "name another folder with --out, or make room and grant permission",
            ) from error
    return rows


def names_of_all() -> list[str]:
    """Return the names of all tables, then of all views."""
    return [*sorted(Base.metadata.tables), *VIEWS]


def _known(tables: Iterable[str] | None) -> list[str]:
    available = names_of_all()
    if tables is None:
        return available
    wanted = list(dict.fromkeys(tables))
    strange = [name for name in wanted if name not in available]
    if strange:
        near = difflib.get_close_matches(strange[0], available, n=1)
        hint = f"did you mean {near[0]}? Available: " if near else "name one of: "
        raise DatabaseError(
            "names of tables and views", f"{', '.join(map(repr, strange))}", hint + ", ".join(available)
        )
    return wanted


def _write(session: Session, name: str, file: Path, writer: type[_Writer]) -> int:
    query, columns = _query(session, name)
    count = 0
    with writer(file, columns) as out:
        for rows in session.execute(query, execution_options={"yield_per": _CHUNK_ROWS}).partitions():
            out.write(rows)
            count += len(rows)
    return count


def _query(session: Session, name: str) -> tuple[Select[Any], Columns]:
    """Rows in an order that is the same each time: of the key, or of all columns of a view."""
    if name in Base.metadata.tables:
        source = Base.metadata.tables[name]
        query: Select[Any] = select(source).order_by(*source.primary_key.columns)
        return query, [(c.name, c.type) for c in source.columns]
    found = inspect(session.connection()).get_columns(name)
    columns: Columns = [(c["name"], _VIEW_TYPES[c["name"]]) for c in found]
    typed = [column(own, kind) for own, kind in columns]
    order = ", ".join(str(place) for place in range(1, len(columns) + 1))
    return select(*typed).select_from(table(name)).order_by(text(order)), columns


class _Writer(ABC):
    """Writes rows of one table to one file, piece by piece."""

    def __init__(self, file: Path, columns: Columns) -> None:
        self.file, self.columns = file, columns

    @staticmethod
    @abstractmethod
    def load() -> None:
        """Load what is needed, before the database is opened."""

    @abstractmethod
    def __enter__(self) -> _Writer:
        """Begin the file."""

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """End the file."""

    @abstractmethod
    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add rows."""

    def plain(self, rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, TypeEngine[Any], list[Any]]]:
        """Columns one after the other, JSON as text."""
        for place, (name, kind) in enumerate(self.columns):
            values = [row[place] for row in rows]
            if isinstance(kind, JSON):
                values = [None if v is None else json.dumps(v, ensure_ascii=False, sort_keys=True) for v in values]
            yield name, kind, values


class _Csv(_Writer):
    """RFC 4180: lines end with CR LF, so that the writer quotes either of them inside a text."""

    @staticmethod
    def load() -> None:
        import pandas as pd  # noqa: F401

    def __enter__(self) -> _Writer:
        self.frame([]).to_csv(self.file, index=False, lineterminator="\r\n")
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to do: the file is closed after every piece."""

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self.frame(rows).to_csv(self.file, mode="a", header=False, index=False, lineterminator="\r\n")

    def frame(self, rows: Sequence[Sequence[Any]]) -> pd.DataFrame:
        import pandas as pd

        columns = {}
        for name, kind, values in self.plain(rows):
            if isinstance(kind, UtcDateTime):
                values = [v.isoformat() if isinstance(v, datetime) else None for v in values]
            # Of objects: whole numbers beside gaps stay whole, and floats are written in full.
            columns[name] = pd.Series(values, dtype="object")
        return pd.DataFrame(columns)


class _Parquet(_Writer):
    """Types are those of the tables, so that every export of a table has the same ones."""

    @staticmethod
    def load() -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise DatabaseError(
                "the package pyarrow, which writes Parquet", "it is not installed", "install it, or use --format csv"
            ) from error

    def __enter__(self) -> _Writer:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {
            Boolean: pa.bool_(), Integer: pa.int64(), Double: pa.float64(), UtcDateTime: pa.timestamp("us", tz="UTC"),
        }  # fmt: skip
        self.schema = pa.schema(
            [
                (name, next((a for k, a in kinds.items() if isinstance(kind, k)), pa.string()))
                for name, kind in self.columns
            ]
        )
        self.out = pq.ParquetWriter(self.file, self.schema)
        return self

    def __exit__(self, *error: object) -> None:
        self.out.close()

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        import pyarrow as pa

        arrays = [pa.array(values, type=self.schema.field(name).type) for name, _, values in self.plain(rows)]
        self.out.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
