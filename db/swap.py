"""Puts a finished database in the place of an older one, in one transaction of SQLite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from db.engine import checkpoint, enter_wal, refuse_other_tables
from db.errors import DatabaseError, explain

_WAIT_S = 1.0
_MAGIC = b"SQLite format 3\0"


def page_size_of(path: Path) -> int | None:
    """Return the bytes of a page of a database that may be replaced; None when there is no file or an empty one.

    Source: "The Database Header", https://www.sqlite.org/fileformat.html.

    Raises:
        DatabaseError: The file is no SQLite database, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(18)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, str(path)) from error
    if not header:
        return None
    if not header.startswith(_MAGIC):
        raise DatabaseError(
            f"an SQLite database of this project, or no file, at {path}",
            f"another kind of file, which begins with {header[:16]!r}",
            "name another path with --db, or move the file away",
        )
    size = int.from_bytes(header[16:18], "big")
    return 65536 if size == 1 else size


def replace_content(session: Session, path: Path) -> None:
    """Commit a database in memory and copy it over the one in a file, which is made when absent.

    To rename a fresh file over the old one would lose what another process is about to commit: that process keeps
    the old file open, and its log, which SQLite finds by name, would be replayed into the new file. SQLite's backup
    takes the writer's lock instead: readers see the old content or the new one, writers come before or after, and
    after a kill the old content stands.

    Args:
        session: Of `open_session("sqlite://", write=True)`; what it holds is committed.
        path: The database to replace. Damaged databases are removed first, since nobody can read or write them;
            whatever is not of this project stays.

    Raises:
        SchemaVersionError: A newer version of this project made the old database.
        DatabaseError: Another process writes, the file is no database of this project, or cannot be written.
    """
    session.commit()
    connection = session.get_bind()
    if not isinstance(connection, Connection):
        raise TypeError(f"expected a session of open_session, came one that is bound to {connection!r}")
    connection.commit()
    source = connection.connection.driver_connection
    if not isinstance(source, sqlite3.Connection):
        raise TypeError(f"expected a session on SQLite, came {connection.dialect.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page_size_of(path)
        try:
            _copy(source, path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            for suffix in ("", "-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            _copy(source, path)
        checkpoint(path)
    except (sqlite3.Error, OSError) as error:
        raise explain(error, str(path)) from error


def _copy(source: sqlite3.Connection, path: Path) -> None:
    def refuse_to_wait(status: int, _remaining: int, _pages: int) -> None:
        # Python would try for ever.
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise DatabaseError(
                f"nobody else at work in {path}", "another process uses it", "end it, then rebuild again"
            )

    with closing(sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)) as target:
        refuse_other_tables(target, path)
        enter_wal(target, _WAIT_S)
        source.backup(target, progress=refuse_to_wait)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    # The lowest byte is the kind; the others say which page or file.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
