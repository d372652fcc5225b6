"""Errors of the database package: each says what was expected, what came, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError

_SHOWN_PROBLEMS = 40


class DatabaseError(Exception):
    """The database could not be opened, read or written.

    Attributes:
        expected: What the code needed.
        came: What it found instead.
        do: The next step for the reader, usually a command.
    """

    def __init__(self, expected: str, came: str, do: str) -> None:
        self.expected, self.came, self.do = expected, came, do
        super().__init__(f"expected {expected}; came: {came}. Do: {do}")

    def __reduce__(self) -> tuple[type[DatabaseError], tuple[str, str, str]]:
        """Survive the trip between processes, which would otherwise call `__init__` with one argument."""
        return type(self), (self.expected, self.came, self.do)


class DatabaseMissingError(DatabaseError):
    """There is no database, or it holds nothing yet."""


class SchemaVersionError(DatabaseError):
    """The database was written by another version of this project."""


class TasksLostError(DatabaseError):
    """A rebuilt database would lose the runs of tasks whose results are not on disk any more."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one result file.

    Attributes:
        file: Path relative to the folder that was read.
        key: Dotted key inside the file, or `line N`, or `` for the file as a whole.
        message: What was expected and what came.
    """

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        """File, key and message on one line."""
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.message}"


class IngestError(Exception):
    """Result files cannot be read. Nothing was written; all problems are collected.

    Attributes:
        problems: Every problem found, in the order of reading.
    """

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
        if len(problems) > _SHOWN_PROBLEMS:
            lines.append(f"  … and {len(problems) - _SHOWN_PROBLEMS} more")
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} in the result files; the database was left as it was.\n"
            + "\n".join(lines)
            + "\nDo: remove the named files or folders and run `dvc repro`, which makes results again."
        )


# What a driver says (lower case) -> what was expected and what to do. The first match wins, so the
# specific phrases stand before the general ones.
_PHRASES: tuple[tuple[str, str, str], ...] = (
    ("is locked", "a free database within the waiting time",
     "wait until the other writer ends (a `dvc repro` or `python -m db.cli`), then run the command again"),
    ("readonly", "a database file and folder that this user may write",
     "give write permission to the file and its folder, or name another place with --db"),
    ("read-only", "a database that this user may write",
     "grant write permission, or name another database with --db"),
    (
        "permission denied",
        "a file and folder that this user may use",
        "grant permission to the file and its folder, or name another place with --db",
    ),
    ("no space left", "free disk space for the database", "free some space, then run the command again"),
    ("unable to open database file", "a file that can be opened or created",
     "check that the folder exists and that this user may read and write it"),
    ("disk is full", "free disk space for the database", "free some space, then run the command again; "
     "the old content is intact"),
    ("disk i/o error", "a working disk",
     "check the disk and its free space; then run `python -m db.cli rebuild`"),
    ("not a database", "an SQLite database file",
     "move the file away and run `python -m db.cli rebuild`; the JSON files are the truth"),
    ("malformed", "an intact SQLite database file",
     "run `python -m db.cli rebuild`; the JSON files are the truth"),
    ("no such table", "the tables of this project", "run `python -m db.cli rebuild`"),
    ("no such column", "the columns of this version's tables", "run `python -m db.cli rebuild`"),
    ("connection refused", "a database server that answers", "start the server, or check host and port"),
)  # fmt: skip


def explain(error: Exception, place: str) -> DatabaseError:
    """Translate a driver's error into ours.

    Args:
        error: What SQLAlchemy, the driver or the operating system raised.
        place: The database, as shown to the reader (no password).

    Returns:
        The error to raise from `error`.
    """
    came = " ".join(str(getattr(error, "orig", None) or error).split())
    if isinstance(error, IntegrityError):
        return DatabaseError(
            f"rows that keep the rules of {place}", came, "correct the values; nothing of this was written"
        )
    if isinstance(error, ArgumentError | NoSuchModuleError):
        return DatabaseError(
            "a path or an SQLAlchemy URL such as postgresql+psycopg://user@host/name",
            came,
            f"correct the database's address (it was: {place})",
        )
    if isinstance(error, ImportError):
        return DatabaseError(f"the driver for {place}", came, "install the driver, for PostgreSQL: psycopg")
    low = came.lower()
    for phrase, expected, do in _PHRASES:
        if phrase in low:
            return DatabaseError(f"{expected} ({place})", came, do)
    return DatabaseError(f"a working database ({place})", came, "run `python -m db.cli check`")
