"""The one door to the database: opens, upgrades or checks, commits, rolls back, translates errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from db.engine import BUSY_TIMEOUT_S, checkpoint, make_engine, resolve_url, sqlite_file, take_turn
from db.errors import DatabaseMissingError, explain
from db.schema import check_schema, upgrade


@contextmanager
def open_session(
    url_or_path: str | Path | URL,
    write: bool = False,
    *,
    timeout_s: float = BUSY_TIMEOUT_S,
    page_size: int | None = None,
) -> Iterator[Session]:
    """Open the database for one piece of work in one transaction.

    Leaving the block commits when `write` is true; an exception inside it rolls everything back. A writer
    creates the file and its folder, upgrades older tables, and leaves a file that is complete without its
    log. A reader changes nothing. A database in memory lives as long as the block.

    Args:
        url_or_path: A file, or any SQLAlchemy URL.
        write: Open for writing; other writers wait meanwhile.
        timeout_s: Seconds to wait for another writer.
        page_size: Bytes of a page of a new SQLite database; None: SQLite's own choice.

    Yields:
        A session inside a transaction.

    Raises:
        DatabaseMissingError: Nothing to read.
        SchemaVersionError: The tables belong to another version of this project.
        DatabaseError: Anything else that keeps the database from working, in words.
    """
    place = str(url_or_path) if not isinstance(url_or_path, URL) else url_or_path.render_as_string()
    try:
        url = resolve_url(url_or_path)
        path = sqlite_file(url)
        place = str(path) if path else url.render_as_string(hide_password=True)
        if path is not None:
            _prepare_file(path, write=write)
        engine = make_engine(url, write=write, timeout_s=timeout_s, page_size=page_size)
        try:
            # The writer's upgrade and work share one transaction: nobody sees tables without their rows.
            with engine.connect() as connection, Session(connection, expire_on_commit=False) as session:
                if write:
                    take_turn(connection)
                    upgrade(connection, place)
                else:
                    check_schema(connection, place)
                yield session
                if write:
                    session.commit()
                    connection.commit()
        finally:
            engine.dispose()
        if write and path is not None:
            checkpoint(path)
    except (SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        raise explain(error, place) from error


def _prepare_file(path: Path, *, write: bool) -> None:
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        came = "a folder" if path.is_dir() else "no such file"
        raise DatabaseMissingError(
            f"a database at {path}", came, "run `dvc repro`, or `python -m db.cli ingest` if results exist"
        )
