"""Errors of the database package: what was expected, what was found instead, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN_PROBLEMS = 40


class DatabaseError(Exception):
    """The database cannot be opened, read or written; `missing`: there is none, or it holds nothing yet."""

    def __init__(self, expected: str, got: str, advice: str, *, missing: bool = False) -> None:
        self.missing = missing
        super().__init__(f"expected {expected}, got {got}. {advice[0].upper()}{advice[1:]}")


class OutputError(RuntimeError):
    """A file or folder that cannot be written; what was there before is untouched."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in one result file; `key` is dotted, or `line N`, or `` for the file as a whole."""

    file: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.message}"


class FileError(RuntimeError):
    """Result files that are missing or damaged, with all that is wrong in `problems` where several were read."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = problems
        super().__init__(message)


def refuse(problems: Sequence[Problem]) -> FileError:
    """The error for what is wrong in the files that the database is made from, before anything was written."""
    lines = [f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  … and {len(problems) - _SHOWN_PROBLEMS} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    head = f"{count} in the result files; the database was left as it was."
    advice = "Remove the files or folders named here and run `dvc repro`, which makes the results again."
    return FileError("\n".join([head, *lines, advice]), problems)
