"""Which version of the tables a database has, and bringing it to the newest one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from db.errors import DatabaseError, DatabaseMissingError, SchemaVersionError

REVISIONS: tuple[str, ...] = ("0001", "0002", "0003", "0004")
"""All revisions, oldest first. Written here so that readers need not load Alembic to know the newest."""

NEWEST = REVISIONS[-1]
MIGRATIONS = Path(__file__).parent / "migrations"

# Of every version. Other projects use Alembic too, and name their revisions 0001; a lost table can be healed.
_OURS = frozenset({"environment", "run", "metric", "metric_def", "sample", "probe", "artifact", "speed"})
_ENOUGH = len(_OURS) // 2


def current_revision(connection: Connection) -> str | None:
    """Return the revision of an open database; None when no migration ever ran on it."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def check_schema(connection: Connection, place: str) -> None:
    """Make sure that a reader finds the tables it expects.

    Raises:
        DatabaseMissingError: There are no tables at all.
        SchemaVersionError: The tables are older or newer than this code.
        DatabaseError: The tables are somebody else's.
    """
    found = current_revision(connection)
    if found == NEWEST:
        return
    _refuse_others(connection, found, place)
    if found is None:
        raise DatabaseMissingError(
            f"a database with results at {place}", "a database without tables", "run `dvc repro`"
        )
    raise SchemaVersionError(
        f"schema version {NEWEST} in {place}",
        f"the older version {found}",
        "run `python -m db.cli ingest`, which upgrades it, or `python -m db.cli rebuild`",
    )


def upgrade(connection: Connection, place: str, revision: str = "head") -> None:
    """Bring the tables to a revision, inside the caller's transaction: all of it happens or nothing.

    Args:
        connection: Open, in a transaction that holds the write lock.
        place: The database as shown in messages.
        revision: The target, by default the newest.

    Raises:
        SchemaVersionError: The database is newer than this code.
        DatabaseError: The tables are somebody else's.
    """
    found = current_revision(connection)
    if found == NEWEST:
        return
    _refuse_others(connection, found, place)

    from alembic import command  # a quarter of a second that readers need not spend
    from alembic.config import Config

    config = Config()
    # The value goes through ConfigParser, which reads % as the start of a reference.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def refuse_others(revision: str | None, tables: Collection[str], place: str) -> None:
    """Make sure that tables are of this project and not newer than this code.

    Args:
        revision: What table alembic_version says; None: nothing.
        tables: Names of all tables.
        place: The database as shown in messages.

    Raises:
        SchemaVersionError: A newer version of this project made them.
        DatabaseError: Somebody else did.
    """
    others = set(tables) - {"alembic_version"}
    if others and (revision is None or len(_OURS & others) < _ENOUGH):
        raise DatabaseError(
            f"a database of this project, or none, at {place}",
            f"a database with other tables ({', '.join(sorted(tables)[:5])})",
            "name another path with --db",
        )
    if revision is not None and revision not in REVISIONS:
        raise SchemaVersionError(
            f"schema version {NEWEST} in {place}",
            f"version {revision}, which this code does not know (a newer checkout wrote it)",
            "update this checkout with `git pull`, or name another path with --db",
        )


def _refuse_others(connection: Connection, revision: str | None, place: str) -> None:
    # A server's database may hold other tables beside ours, as long as they are not Alembic's.
    if revision is not None or connection.dialect.name == "sqlite":
        refuse_others(revision, inspect(connection).get_table_names(), place)
