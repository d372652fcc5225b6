"""From a path or URL to an engine: write-ahead log, foreign keys, waiting times, reading without traces."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.pool import NullPool, StaticPool

from db.schema import refuse_others

BUSY_TIMEOUT_S = 30.0
"""Seconds a second writer waits for the first; one ingest takes about a second."""

_CHECKPOINT_WAIT_MS = 1000
# Any fixed number: it names the lock that makes writers of one PostgreSQL database take turns.
_POSTGRES_LOCK = 0x67726974


def resolve_url(url_or_path: str | Path | URL) -> URL:
    """Read a file path or any SQLAlchemy URL; text without `://` is a path.

    Raises:
        sqlalchemy.exc.ArgumentError: The URL cannot be read.
    """
    if isinstance(url_or_path, URL):
        return url_or_path
    text = str(url_or_path)
    if "://" in text and not isinstance(url_or_path, Path):
        return make_url(text)
    return URL.create("sqlite", database=text if text == ":memory:" else str(Path(text).expanduser()))


def sqlite_file(url: URL) -> Path | None:
    """Return the file behind an SQLite URL; None for memory and for other databases."""
    name = url.database
    if url.get_backend_name() != "sqlite" or not name or name == ":memory:" or name.startswith("file:"):
        return None
    return Path(name)


def make_engine(url: URL, *, write: bool, timeout_s: float = BUSY_TIMEOUT_S, page_size: int | None = None) -> Engine:
    """Build an engine whose connections hold the rules of this package.

    Args:
        url: Where the database is.
        write: Writers use the write-ahead log and take the lock when they begin; readers cannot write.
        timeout_s: Seconds to wait for another writer.
        page_size: Bytes of a page of a new SQLite database; None: SQLite's own choice.
    """
    if url.get_backend_name() != "sqlite":
        engine = create_engine(url, poolclass=NullPool)
        if not write and url.get_backend_name() == "postgresql":
            # One moment for the whole block, as on SQLite; a server's default is one for each question.
            return engine.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ")
        return engine
    path = sqlite_file(url)
    if path is None:
        engine = create_engine(url, poolclass=StaticPool, connect_args={"timeout": timeout_s})
    else:
        engine = create_engine(
            url, poolclass=NullPool, creator=lambda: _connect(path, write=write, timeout_s=timeout_s)
        )

    def on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver would otherwise begin transactions late and leave table changes outside of them.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")
        if page_size is not None:
            connection.execute(f"PRAGMA page_size={page_size:d}")
        if write and path is not None:
            # First of all, since the log is noted in the file: other people's files stay as they are.
            refuse_other_tables(connection, path)
            enter_wal(connection, timeout_s)

    def on_begin(connection: Connection) -> None:
        # Taking the write lock at once means that two writers wait for each other instead of failing
        # when both have read and both want to write.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def take_turn(connection: Connection) -> None:
    """Make writers of one PostgreSQL database wait for each other; SQLite does so by itself."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")


def checkpoint(path: Path) -> bool:
    """Move the write-ahead log into the main file, so that the file alone is complete.

    Returns:
        False when a reader still holds the log; its closing, or the next writer, does the work then.
    """
    connection = sqlite3.connect(path, isolation_level=None, timeout=_CHECKPOINT_WAIT_MS / 1000)
    try:
        busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
    finally:
        connection.close()
    return not busy


def _connect(path: Path, *, write: bool, timeout_s: float) -> sqlite3.Connection:
    def connect(query: str) -> sqlite3.Connection:
        # Absolute, because a URI cannot hold a relative path; as_uri escapes `?`, `#` and `%` in names.
        return sqlite3.connect(path.absolute().as_uri() + query, uri=True, timeout=timeout_s, check_same_thread=False)

    if write:
        return connect("")
    # Not mode=ro: such a connection leaves the log's files behind when it closes.
    connection = connect("?mode=rw")
    try:
        connection.execute("PRAGMA query_only=ON")
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
    except sqlite3.OperationalError as error:
        connection.close()
        log = path.with_name(path.name + "-wal")
        if "readonly" not in str(error) or (log.exists() and log.stat().st_size):
            raise
        # A folder that cannot be written holds no log, and without a log the file is complete and still.
        return connect("?immutable=1")
    return connection


def refuse_other_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure, without writing, that an SQLite database is empty or of this project; see `db.schema.refuse_others`.

    Raises:
        sqlite3.Error: The file cannot be read.
        SchemaVersionError: A newer version of this project made it.
        DatabaseError: Somebody else did.
    """
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    versioned = "alembic_version" in tables
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if versioned else None
    refuse_others(row[0] if row else None, tables, str(path))


def enter_wal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Switch to the write-ahead log; file systems that cannot do it keep the rollback journal.

    SQLite does not wait for this one change, hence the loop.
    """
    if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
