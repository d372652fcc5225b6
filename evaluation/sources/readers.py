"""Reading CSV, JSON and Parquet files into raw rows. A reader judges bytes and shape, never values."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from evaluation.sources.arrow import read_parquet
from evaluation.sources.hub import HUB, read_split
from evaluation.sources.types import RawRow, SourceError, SourceSpec, Table

__all__ = ["FILES", "HUB", "read_table"]

_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PARQUET = ".parquet"
_ESCAPE = b"\\ud"  # how an escape of half a character begins


def read_table(spec: SourceSpec) -> Table:
    """The source's columns and raw rows.

    Raises:
        SourceError: it is missing, empty, of an unknown kind, unreadable or out of reach.
    """
    path = Path(spec.source)
    if spec.source.startswith(HUB) or path.is_dir():
        return read_split(spec.source, spec.split, spec.subset)
    kind = path.suffix.lower()
    problems = []
    if kind not in FILES:
        problems.append(f"expected a name ending in {', '.join(FILES)}, a folder, or {HUB}org/name, got {path.name!r}.")
    if not path.is_file():
        problems.append(
            f"expected a file, found no file at {path.resolve()}; set the path of your data, a file or a folder."
        )
    if problems:
        raise SourceError(spec.source, problems)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(spec.source, [f"cannot be read: {error.strerror}."]) from error
    if kind == _PARQUET:
        return read_parquet(spec.source, data)
    encoding = next((name for bom, name in _OTHER_BOMS.items() if data.startswith(bom)), None)
    if encoding is not None:
        raise SourceError(spec.source, [f"expected UTF-8, got {encoding}; save the file as UTF-8."])
    start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    if not data[start:].strip():
        raise SourceError(spec.source, [f"is empty ({len(data)} bytes); expected a header and rows, or JSON lines."])
    return _TEXTS[kind](spec, data[start:], start)


def _not_utf8(line: bytes, offset: int) -> str | None:
    """The sentence about the first byte of `line` that is not UTF-8; `offset` is where the line starts."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got byte 0x{line[error.start]:02x} at offset {offset + error.start} of the file"
    return None


def _read_csv(spec: SourceSpec, data: bytes, start: int) -> Table:
    lines = data.splitlines(keepends=True)
    offsets = list(accumulate((len(line) for line in lines), initial=start))
    # Bad bytes pass through the parser as visible \xNN and are reported with the row that holds them.
    text = (line.decode(errors="backslashreplace") for line in lines)
    header: list[str] | None = None
    rows: list[RawRow] = []
    for first, last, cells, error in _csv_rows(text, spec.delimiter):
        bad = next((p for i in range(first, last) if (p := _not_utf8(lines[i], offsets[i]))), None)
        problem = bad or error
        if header is None:
            if problem:
                raise SourceError(spec.source, [f"line {first + 1}, the header: {problem}."])
            header = [name.strip() for name in cells]
            continue
        if problem is None and len(cells) != len(header):
            problem = f"expected {len(header)} cells, as in the header, got {len(cells)}"
        values: dict[str, object] = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            values["(beyond the header)"] = cells[len(header) :]
        rows.append(RawRow(len(rows) + 1, first + 1, values, problem))
    columns = header or []
    hint = ""
    if len(columns) == 1 and spec.delimiter == ",":
        other = next((d for d in (";", "\t", "|") if d in columns[0]), None)
        hint = f" The header holds {other!r}: set delimiter to it." if other else ""
    return Table(columns, rows, hint, frozenset(c for c in columns if columns.count(c) > 1))


def _csv_rows(text: Iterator[str], delimiter: str) -> Iterator[tuple[int, int, list[str], str | None]]:
    """Yields (first line, line after the last, cells, problem) per row that is not blank; lines from 0."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num
        try:
            cells, error = next(reader), None
        except StopIteration:
            return
        except csv.Error as exc:
            cells, error = [], f"expected a CSV row, got broken quoting ({exc})"
            if "end of data" in str(exc):
                error += f": a quote opened on line {first + 1} or later is never closed, so all lines up to "
                error += f"{reader.line_num} are in this row"
        if cells or error:
            yield first, reader.line_num, cells, error


def _read_json(spec: SourceSpec, data: bytes, start: int) -> Table:
    """One object a line, or one array of objects as a whole."""
    if data.lstrip().startswith(b"["):
        try:
            # Bytes that are not UTF-8 pass through as half characters and are reported with the row that holds them.
            text = data.decode(errors="surrogateescape")
            array = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not _is_json(data.lstrip().splitlines()[0]):
                raise SourceError(
                    spec.source, [f"expected a JSON array of objects, got broken JSON ({error})."]
                ) from error
        else:
            if isinstance(array, list):
                doubtful = not text.isascii() or _ESCAPE in data.lower()
                return _table([(None, *_checked(value, doubtful)) for value in array])
    found: list[tuple[int | None, dict[str, object], str | None]] = []
    offset = start
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            found.append((number, *_json_object(line, offset)))
        offset += len(line) + 1
    return _table(found)


def _table(found: list[tuple[int | None, dict[str, object], str | None]]) -> Table:
    """A table of (line, values, problem); its columns are those of all sound rows."""
    columns: dict[str, None] = {}
    for _, values, problem in found:
        columns.update(dict.fromkeys(values if problem is None else ()))
    return Table(list(columns), [RawRow(n, *rest) for n, rest in enumerate(found, start=1)])


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_object(line: bytes, offset: int) -> tuple[dict[str, object], str | None]:
    raw: dict[str, object] = {"(line)": line.decode(errors="backslashreplace").rstrip("\r")}
    if bad := _not_utf8(line, offset):
        return raw, bad
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return raw, f"expected a JSON object, got broken JSON ({error})"
    values, problem = _checked(value, _ESCAPE in line.lower())
    return (raw if problem else values), problem


def _checked(value: object, doubtful: bool) -> tuple[dict[str, object], str | None]:
    """The object and what is wrong with it.

    Args:
        value: As parsed.
        doubtful: Whether its texts may be such as no UTF-8 file can hold.
    """
    if not isinstance(value, dict):
        return {"(value)": value}, f"expected a JSON object, got {type(value).__name__}"
    for name, cell in value.items() if doubtful else ():
        try:
            json.dumps([name, cell], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character (\\u{code:04x})"
            return value, f"{name}: expected UTF-8, got {what}"
    return value, None


_TEXTS: dict[str, Callable[[SourceSpec, bytes, int], Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
}
FILES = (*_TEXTS, _PARQUET)
