"""The doors to the database: opened for reading as it is, written only as a whole."""

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

from db.errors import DatabaseError, DatabaseMissingError, SchemaVersionError
from db.files import OutputError, staged_file
from db.tables import SCHEMA, VIEWS, Base, view_statements

BUSY_TIMEOUT_S = 30.0
"""Seconds to wait for another writer; a rebuild takes a few."""

_MAGIC = b"SQLite format 3\0"
_OURS = frozenset({"environment", "run", "metric", "metric_def", "sample", "probe", "artifact", "speed"})
_ENOUGH = len(_OURS) // 2  # a damaged database of ours may have lost some
# Any fixed number: it names the lock that makes writers of one PostgreSQL database take turns.
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
    """Open the database for reading; all that the block reads is of one moment, whatever is written meanwhile.

    Raises:
        DatabaseMissingError: there is nothing to read.
        SchemaVersionError: another version of this project made it.
        DatabaseError: anything else that keeps it from being read, in words.
    """
    url = resolve_url(url_or_path)
    place = _shown(url)
    try:
        path = _sqlite_file(url)
        if path is not None and not path.is_file():
            came = "a folder" if path.is_dir() else "no such file"
            raise DatabaseMissingError(
                f"a database at {place}", came, "run `dvc repro`, or `python -m db.cli ingest` if results exist"
            )
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
        # A server's default is one moment for each question.
        return engine.execution_options(postgresql_readonly=True, isolation_level="REPEATABLE READ")
    return engine


def _server(url: URL) -> Engine:
    try:
        return create_engine(url, poolclass=NullPool)
    except ImportError as error:
        do = "install the driver, for PostgreSQL: psycopg"
        raise DatabaseError(f"the driver for {_shown(url)}", str(error), do) from error


def _check_schema(connection: Connection, place: str) -> None:
    tables = inspect(connection).get_table_names()
    if connection.dialect.name == "sqlite":  # on a server other tables may stand beside ours
        _refuse_others(tables, place)
    if "run" not in tables:
        raise DatabaseMissingError(
            f"a database with results at {place}", "a database without tables", "run `dvc repro`"
        )
    if (found := _schema_of(connection)) != SCHEMA:
        raise SchemaVersionError(
            f"schema {SCHEMA} in {place}",
            f"schema {found}, which another version of this project wrote" if found else "one of an older version",
            "run `python -m db.cli rebuild`, or `python -m db.cli ingest` if there is no folder runs/ yet",
        )


def _schema_of(connection: Connection) -> int:
    if connection.dialect.name == "sqlite":
        return int(connection.execute(text("PRAGMA user_version")).scalar_one())
    comment = inspect(connection).get_table_comment("run")["text"] or ""
    number = comment.removeprefix("schema ")
    return int(number) if number.isdigit() else 0


def _refuse_others(tables: Collection[str], place: str) -> None:
    if tables and len(_OURS & set(tables)) < _ENOUGH:
        raise DatabaseError(
            f"a database of this project, or none, at {place}",
            f"a database with other tables ({', '.join(sorted(tables)[:5])})",
            "name another path with --db",
        )


@contextmanager
def replaced(url_or_path: str | Path | URL) -> Iterator[Session]:
    """An empty database that takes the place of the old one, whole, when the block ends well.

    A file is made beside the old one and renamed; on a server everything happens in one transaction. After an
    exception or a kill the old content stands, and readers see the old or the new.

    Raises:
        DatabaseError: it cannot be written, another process writes to it, or what is there is not of this project.
    """
    url = resolve_url(url_or_path)
    place, path = _shown(url), _sqlite_file(url)
    try:
        if path is None:
            with _server(url).begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRES_LOCK})")
                _empty(connection, place)
                yield from _filled(connection)
        else:
            path = path.resolve()
            with _old_file(path), staged_file(path) as partial:
                engine = create_engine(URL.create("sqlite", database=str(partial)), poolclass=NullPool)
                yield from _made(engine)
    except OutputError as error:
        raise DatabaseError(f"a file that can be written at {place}", str(error), "name another with --db") from error
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise _explain(error, place) from error


@contextmanager
def in_memory() -> Iterator[Session]:
    """An empty database that nobody else sees, gone when the block ends."""
    yield from _made(create_engine("sqlite://", poolclass=StaticPool))


def _made(engine: Engine) -> Iterator[Session]:
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver would leave table changes outside of the transaction
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA:d}")
            _create(connection)
            yield from _filled(connection)
    finally:
        engine.dispose()


def _filled(connection: Connection) -> Iterator[Session]:
    with Session(connection, expire_on_commit=False) as session:
        yield session
        session.flush()


def _create(connection: Connection) -> None:
    Base.metadata.create_all(connection)
    for statement in view_statements(connection.dialect.name):
        connection.exec_driver_sql(statement)


def _empty(connection: Connection, place: str) -> None:
    """Rows go; tables of another schema number go too, so that others' rights and views survive where they can.

    Tables with our names and without our mark are somebody else's, or, of versions 1 to 4, the only copy of their runs.
    """
    there = set(inspect(connection).get_table_names())
    found = _schema_of(connection) if "run" in there else 0
    if found == SCHEMA:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
        return
    if found:
        for view in ("v_leaderboard", *VIEWS):  # the first one until schema 6
            connection.exec_driver_sql(f"DROP VIEW IF EXISTS {view} CASCADE")
        Base.metadata.drop_all(connection)
    elif taken := there & Base.metadata.tables.keys():
        raise DatabaseError(
            f"a database without tables of our names, or with those of this version, at {place}",
            f"tables of somebody else, or of versions 1 to 4 ({', '.join(sorted(taken))})",
            "name another database with --db, or move those tables away (ALTER TABLE … SET SCHEMA …)",
        )
    _create(connection)


@contextmanager
def _old_file(path: Path) -> Iterator[None]:
    """Refuse what is not ours, keep other writers out until the new file is in place, fold in an old version's log.

    SQLite finds logs by name: one that stayed would be replayed into the new file.
    """
    if not path.exists() or not path.stat().st_size:
        yield
        return
    with path.open("rb") as file:
        header = file.read(len(_MAGIC))
    if header != _MAGIC:
        raise DatabaseError(
            f"an SQLite database of this project, or no file, at {path}",
            f"another kind of file, which begins with {header!r}",
            "name another path with --db, or move the file away",
        )
    with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as old:
        try:
            tables = [row[0] for row in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            _refuse_others(tables, str(path))
            old.execute("PRAGMA journal_mode=DELETE")
            old.execute("BEGIN IMMEDIATE")
            kept = path.with_name(path.name + ".old")
            if "alembic_version" in tables and not kept.exists():
                kept.hardlink_to(path)  # versions 1 to 4 had no runs/: this file alone has the runs of earlier tasks
        except sqlite3.DatabaseError as error:
            # The lowest byte is the kind of error. A damaged file helps nobody, nor do its logs.
            if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise
            for suffix in ("-wal", "-shm", "-journal"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        yield


# What a driver says (lower case) -> what was expected and what to do; what it says is shown beside.
_PHRASES = {
    "is locked": ("a free database within the waiting time", "wait until the other process ends, then run it again"),
    "not a database": ("an SQLite database file", "move it away and run `python -m db.cli rebuild`"),
    "malformed": ("an intact SQLite database file", "run `python -m db.cli rebuild`"),
    "no such": ("the tables and columns of this version", "run `python -m db.cli rebuild`"),
    "full": ("free disk space for the database", "free some space, then run it again; the old content is intact"),
    "connection refused": ("a database server that answers", "start the server, or check host and port"),
}


def _explain(error: Exception, place: str) -> DatabaseError:
    came = " ".join(str(getattr(error, "orig", None) or error).split())
    if isinstance(error, ArgumentError | NoSuchModuleError):
        do = f"correct the database's address (it was: {place})"
        return DatabaseError("a path or an SQLAlchemy URL such as postgresql+psycopg://user@host/name", came, do)
    for phrase, (expected, do) in _PHRASES.items():
        if phrase in came.lower():
            return DatabaseError(f"{expected} ({place})", came, do)
    return DatabaseError(f"a database that this user may use at {place}", came, "check its address, rights and disk")
