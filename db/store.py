"""Opening the database: read as it is, written only as a whole."""

import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from db.errors import DatabaseError, OutputError
from db.files import staged_file
from db.tables import METADATA, SCHEMA, VIEWS, view_statements

BUSY_TIMEOUT_S = 30.0
"""Seconds to wait for another writer; a rebuild takes a few."""

_MAGIC = b"SQLite format 3\0"
# Any fixed number: the name of the lock by which writers of one PostgreSQL database take turns.
_POSTGRES_LOCK = 0x67726974


def resolve_url(url_or_path: str | Path | URL) -> URL:
    """A file path or any SQLAlchemy URL; text without `://` is a path. DatabaseError: it is neither."""
    if isinstance(url_or_path, URL):
        return url_or_path
    name = str(url_or_path)
    if "://" not in name or isinstance(url_or_path, Path):
        return URL.create("sqlite", database=str(Path(name).expanduser()))
    try:
        return make_url(name)
    except ArgumentError as error:
        raise _explain(error, name) from error


def _sqlite_file(url: URL) -> Path | None:
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _shown(url: URL) -> str:
    return str(_sqlite_file(url) or url.render_as_string(hide_password=True))


@contextmanager
def open_session(url_or_path: str | Path | URL) -> Iterator[Session]:
    """Open the database for reading; the block sees a snapshot, whatever is written meanwhile.

    Raises:
        DatabaseError: it is missing, another version of this project wrote it, or it cannot be read.
    """
    url = resolve_url(url_or_path)
    place = _shown(url)
    try:
        path = _sqlite_file(url)
        if path is not None and not path.is_file():
            got = "a folder" if path.is_dir() else "no such file"
            advice = "run `dvc repro`, or `python -m db.cli ingest` if results exist"
            raise DatabaseError(f"a database at {place}", got, advice, missing=True)
        engine = _reader(url, path)
        try:
            with engine.connect() as connection, Session(connection, expire_on_commit=False) as session:
                _check_schema(connection, place)
                yield session
        finally:
            engine.dispose()
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise _explain(error, place) from error


def _reader(url: URL, path: Path | None) -> Engine:
    if path is not None:
        # as_uri escapes `?`, `#` and `%` in names. A file that is only ever replaced needs no transaction.
        uri = path.absolute().as_uri() + "?mode=ro"
        return create_engine(url, poolclass=NullPool, creator=lambda: sqlite3.connect(uri, BUSY_TIMEOUT_S, uri=True))
    engine = _server(url)
    if url.get_backend_name() == "postgresql":
        # By default, a server takes a new snapshot for each query.
        return engine.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ")
    return engine


def _server(url: URL) -> Engine:
    try:
        return create_engine(url, poolclass=NullPool)
    except ImportError as error:
        advice = "install the driver, for PostgreSQL: psycopg"
        raise DatabaseError(f"the driver for {_shown(url)}", str(error), advice) from error


def _check_schema(connection: Connection, place: str) -> None:
    tables = inspect(connection).get_table_names()
    if "run" not in tables:
        others = f"other tables ({', '.join(sorted(tables)[:5])})" if tables else "no tables"
        advice = "name another path with --db" if tables else "run `dvc repro`"
        raise DatabaseError(f"a database with results at {place}", f"one with {others}", advice, missing=not tables)
    if (schema := _schema_of(connection)) != SCHEMA:
        raise DatabaseError(
            f"schema {SCHEMA} in {place}",
            f"schema {schema}, which another version of this project wrote" if schema else "none, or an older one",
            "run `python -m db.cli rebuild`, or `python -m db.cli ingest` if there is no folder runs/ yet",
        )


def _schema_of(connection: Connection) -> int:
    if connection.dialect.name == "sqlite":
        return int(connection.execute(text("PRAGMA user_version")).scalar_one())
    comment = inspect(connection).get_table_comment("run")["text"] or ""
    number = comment.removeprefix("schema ")
    return int(number) if number.isdigit() else 0


@contextmanager
def replaced(url_or_path: str | Path | URL) -> Iterator[Session]:
    """An empty database that replaces the old one as a whole when the block ends without an exception.

    A file is made beside the old one and renamed; on a server everything happens in one transaction. After an
    exception or a kill the old content is intact, and readers see either the old or the new.

    Raises:
        DatabaseError: it cannot be written, another process writes to it, or what is there belongs to something else.
    """
    url = resolve_url(url_or_path)
    place, path = _shown(url), _sqlite_file(url)
    try:
        if path is None:
            with _server(url).begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")
                _empty(connection, place)
                yield from _session(connection)
        else:
            path = path.resolve()
            with _old_file(path), staged_file(path) as partial:
                engine = create_engine(URL.create("sqlite", database=str(partial)), poolclass=NullPool)
                yield from _new_database(engine)
    except OutputError as error:
        raise DatabaseError(f"a file that can be written at {place}", str(error), "name another with --db") from error
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise _explain(error, place) from error


def _new_database(engine: Engine) -> Iterator[Session]:
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # else the driver leaves table changes outside the transaction
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA:d}")
            _create(connection)
            yield from _session(connection)
    finally:
        engine.dispose()


def _session(connection: Connection) -> Iterator[Session]:
    with Session(connection, expire_on_commit=False) as session:
        yield session
        session.flush()


def _create(connection: Connection) -> None:
    METADATA.create_all(connection)
    for statement in view_statements(connection.dialect.name):
        connection.exec_driver_sql(statement)


def _empty(connection: Connection, place: str) -> None:
    """Remove rows, and tables only if their schema number differs, so that other people's rights and views survive."""
    existing = set(inspect(connection).get_table_names())
    schema = _schema_of(connection) if "run" in existing else 0
    if schema == SCHEMA:
        for table in reversed(METADATA.sorted_tables):
            connection.execute(table.delete())
        return
    if schema:
        for view in VIEWS:
            connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view} CASCADE")
        METADATA.drop_all(connection)
    elif foreign := existing & METADATA.tables.keys():
        raise DatabaseError(
            f"a database of this version, or one without tables of our names, at {place}",
            f"tables of something else, or of versions 1 to 4 ({', '.join(sorted(foreign))})",
            "name another database with --db, or move those tables away (ALTER TABLE … SET SCHEMA …)",
        )
    _create(connection)


@contextmanager
def _old_file(path: Path) -> Iterator[None]:
    """Refuse a file that is not ours, and keep other writers out until the new file is in place.

    Ours have a schema number in their header, and our tables, unless they are damaged. The old file's log is folded in:
    SQLite finds logs by name, and one that stayed would be replayed into the new file.
    """
    if not path.exists() or not path.stat().st_size:
        yield
        return
    with path.open("rb") as file:
        header = file.read(64).ljust(64, b"\0")
    (schema,) = struct.unpack(">I", header[60:])  # PRAGMA user_version, whatever else is damaged
    expected = f"an SQLite database of this project, or no file, at {path}"
    if not header.startswith(_MAGIC) or not schema:
        got = "an SQLite database of something else, or of versions 1 to 4" if header.startswith(_MAGIC) else (
            f"another kind of file, which begins with {header[:16]!r}"
        )  # fmt: skip
        raise DatabaseError(expected, got, "name another path with --db, or move the file away")
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as old:
        try:
            tables = {row[0] for row in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if not {"run", "metric_def"} <= tables:
                got = f"a database with other tables ({', '.join(sorted(tables)[:5])})"
                raise DatabaseError(expected, got, "name another path with --db")
            old.execute("PRAGMA journal_mode=DELETE")
            old.execute("BEGIN IMMEDIATE")
        except sqlite3.DatabaseError as error:
            # The lowest byte is the kind of error. A damaged file is of no use, nor are its logs.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            for suffix in ("-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        yield


# Part of a driver's message (lower case) → what was expected, and what to do.
_PHRASES = {
    "is locked": ("a free database within the waiting time", "wait until the other process ends, then run it again"),
    "not a database": ("an SQLite database file", "move it away and run `python -m db.cli rebuild`"),
    "malformed": ("an intact SQLite database file", "run `python -m db.cli rebuild`"),
    "no such": ("the tables and columns of this version", "run `python -m db.cli rebuild`"),
    "full": ("free disk space for the database", "free some space, then run it again; the old content is intact"),
    "connection refused": ("a database server that answers", "start the server, or check host and port"),
}


def _explain(error: Exception, place: str) -> DatabaseError:
    got = " ".join(str(getattr(error, "orig", None) or error).split())
    if isinstance(error, ArgumentError | NoSuchModuleError):
        advice = f"correct the database's address, {place}"
        return DatabaseError("a path or an SQLAlchemy URL such as postgresql+psycopg://user@host/name", got, advice)
    for phrase, (expected, advice) in _PHRASES.items():
        if phrase in got.lower():
            return DatabaseError(f"{expected} ({place})", got, advice)
    return DatabaseError(f"a database that this user may use at {place}", got, "check its address, rights and disk")
