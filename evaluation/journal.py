"""Answers of a half-done evaluation, on disk: one JSON line each, so that a killed run goes on where it was."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

_TEXTS, _COUNTS = ("split", "item_id", "answer"), ("prompt_tokens", "answer_tokens")


class Journal:
    """Appends answers to a file; to be used in a `with` block, by one process at a time.

    A line that a kill cut short, or that is no answer, is dropped when the file is opened again; of an item that is
    there twice, the first answer counts.

    Args:
        path: The file; its folder is made. Its name must change with everything that decides the answers.

    Attributes:
        resumed: Answers that were there when the file was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        for row in _read(path):
            self._rows.setdefault((row["split"], row["item_id"]), row)
        self.resumed = len(self._rows)
        fresh = path.with_suffix(f".{os.getpid()}.partial")
        fresh.write_text("".join(_line(row) for row in self._rows.values()), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, split: str, item_id: str) -> dict[str, Any] | None:
        """The answer {split, item_id, answer, prompt_tokens, answer_tokens}; None where there is none yet."""
        return self._rows.get((split, item_id))

    def add(self, row: dict[str, Any]) -> None:
        """Keep an answer; it outlives a kill of this process from here on.

        Args:
            row: As `get` returns.

        Raises:
            ValueError: the item has an answer already.
        """
        key = (row["split"], row["item_id"])
        if key in self._rows:
            raise ValueError(f"expected one answer for each item, got a second one for {key}")
        self._file.write(_line(row))
        self._file.flush()
        self._rows[key] = row

    def __enter__(self) -> "Journal":
        """The journal itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file; it stays."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines that are answers."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last line break comes nothing, or a line cut short
    return [row for line in lines if (row := _answer(line)) is not None]


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.keys() != {*_TEXTS, *_COUNTS}:
        return None
    texts = all(isinstance(row[name], str) for name in _TEXTS)
    counts = all(row[name] is None or type(row[name]) is int for name in _COUNTS)
    return row if texts and counts else None
