"""General texts that perplexity and drift are measured on: a user's file or a hub data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from evaluation.sources.readers import HUB, read_table
from evaluation.sources.types import SourceSpec, suggest

T = TypeVar("T")
_TEXT_FILE, _TABLES = ".txt", (".csv", ".jsonl", ".ndjson", ".json")


class TextError(ValueError):
    """Texts that cannot be used."""


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many values, evenly from the whole, in order: suites are sorted by task, books by chapter."""
    n = len(values)
    return list(values) if n <= most else [values[i * n // most] for i in range(most)]


def read_texts(source: str, *, column: str = "text", split: str = "train", subset: str | None = None) -> list[str]:
    """All texts of a source, in its order.

    Args:
        source: Path of a .txt file (a text ends at an empty line), of a .csv or .jsonl file, or `hub:org/name`.
        column: That holds the text, of all but .txt.
        split: Of a hub data set.
        subset: Configuration of a hub data set that has several.

    Raises:
        SourceError: it cannot be read at all.
        TextError: no such file or column, no text in it, cells that are no text, or rows that cannot be read.
    """
    kind = Path(source).suffix.lower()
    if not source.startswith(HUB) and kind not in (_TEXT_FILE, *_TABLES):
        raise TextError(
            f"measure.text: expected `retention`, a file ending in {', '.join((_TEXT_FILE, *_TABLES))}, or "
            f"{HUB}org/name, got {source!r}"
        )
    if kind == _TEXT_FILE and not source.startswith(HUB):
        try:
            whole = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"measure.text: expected a text file in UTF-8 at {source}: {error}") from error
        lines = [line if line.strip() else "" for line in whole.splitlines()]
        found = [text.strip() for text in "\n".join(lines).split("\n\n")]
    else:
        table = read_table(SourceSpec(source=source, columns={}, split=split, subset=subset))
        if column not in table.columns:
            raise TextError(
                f"measure.text: {source} has no column {column!r}.{suggest(column, table.columns)} Available: "
                f"{', '.join(table.columns)}; set measure.text_column"
            )
        broken = [f"row {row.row}: {row.problem}" for row in table.rows if row.problem]
        if broken:
            raise TextError(f"measure.text: {source}: {len(broken)} rows cannot be read: {'; '.join(broken[:3])}")
        found = []
        for row in table.rows:
            value = row.values.get(column)
            if value is None:
                continue
            if not isinstance(value, str):  # its repr would be scored
                raise TextError(
                    f"measure.text: {source}: row {row.row}: {column}: expected a text, got "
                    f"{type(value).__name__}; name a column of texts in measure.text_column"
                )
            found.append(value.strip())
    texts = [text for text in found if text]
    if not texts:
        raise TextError(f"measure.text: expected texts in {source}, found none")
    return texts
