"""Errors of the database package: each says what was expected, what came, and what to do."""

from dataclasses import dataclass

_SHOWN_PROBLEMS = 40


class DatabaseError(Exception):
    """The database could not be opened, read or written."""

    def __init__(self, expected: str, came: str, do: str) -> None:
        self.expected, self.came, self.do = expected, came, do
        super().__init__(f"expected {expected}; came: {came}. Do: {do}")


class DatabaseMissingError(DatabaseError):
    """There is no database, or it holds nothing yet."""


class SchemaVersionError(DatabaseError):
    """The database was written by another version of this project."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one result file; `key` is dotted, or `line N`, or `` for the file as a whole."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.message}"


class IngestError(Exception):
    """Result files cannot be read. Nothing was written; all problems are collected."""

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
