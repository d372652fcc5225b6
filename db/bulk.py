"""Many rows at once: SQLAlchemy writes the statement and the converters, the driver gets plain tuples.

SQLAlchemy's own way takes each row through two dictionaries, which costs more than what SQLite does to store it
(`benchmarks/store.py` has the figures). What a column's type does to a value still happens here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import chain, islice, repeat
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Dialect, Table, insert
from sqlalchemy.orm import Session

CHUNK_ROWS = 10_000
"""Rows handed to the driver in one call: so many that the call costs nothing, so few that they need little memory."""

Row = Mapping[str, Any]
Write = Callable[[list[Row]], Any]
Convert = Callable[[Any], Any]


def insert_rows(session: Session, table: Table, rows: Iterable[Row], **common: Any) -> int:
    """Insert rows in the caller's transaction, in the order given.

    Args:
        session: Open for writing; what it still holds back is written first.
        table: Where the rows belong.
        rows: Column name to value, all with the columns of the first. A generator is read in pieces.
        common: Values that all rows share, such as `run_id`.

    Returns:
        The number of rows.

    Raises:
        sqlalchemy.exc.DBAPIError: The database refused a row.
        ValueError: A row has other columns than the first.
    """
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        return 0
    session.flush()
    connection = session.connection()
    # Servers get their rows from SQLAlchemy, which sends many in one message.
    make_writer = _tuple_writer if connection.dialect.name == "sqlite" else _row_writer
    write, count = make_writer(connection, table, tuple(first), common), 0
    for piece in _pieces(chain([first], iterator)):
        try:
            if set(map(len, piece)) != {len(first)}:
                raise KeyError
            write(piece)
        except KeyError as error:
            raise ValueError(
                f"{table.name}: expected rows with the columns {', '.join(first)}, came other columns"
            ) from error
        count += len(piece)
    return count


def _pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while piece := list(islice(rows, CHUNK_ROWS)):
        yield piece


def _row_writer(connection: Connection, table: Table, names: tuple[str, ...], common: Row) -> Write:
    def write(piece: list[Row]) -> None:
        # As many columns as the first row has, so other columns show by a missing one.
        rows = [{**common, **{name: row[name] for name in names}} for row in piece]
        connection.execute(insert(table), rows)

    return write


def _tuple_writer(connection: Connection, table: Table, names: tuple[str, ...], common: Row) -> Write:
    """Columns are picked, converted and put side by side by functions written in C, a piece at a time."""
    statement, converters = _plan(connection.dialect, table, (*common, *names))

    def values(name: str, convert: Convert | None, piece: list[Row]) -> Iterator[Any]:
        column = repeat(common[name]) if name in common else map(itemgetter(name), piece)
        return column if convert is None else map(convert, column)

    def write(piece: list[Row]) -> None:
        # The rows' own columns end each piece; a column that all share has no end.
        columns = [values(name, convert, piece) for name, convert in converters]
        connection.exec_driver_sql(statement, list(zip(*columns, strict=False)))

    return write


@lru_cache(maxsize=64)
def _plan(dialect: Dialect, table: Table, names: tuple[str, ...]) -> tuple[str, list[tuple[str, Convert | None]]]:
    """The statement, and for each of its places the column and its converter; kept, since many runs want the same."""
    statement = str(insert(table).compile(dialect=dialect, column_keys=names))
    # SQLAlchemy lists the columns in the table's order.
    order = [column for column in table.columns if column.name in names]
    return statement, [(c.name, c.type.dialect_impl(dialect).bind_processor(dialect)) for c in order]
