"""Reading CSV, JSON lines and hub data sets into raw rows. A reader judges bytes and shape, never values."""

import csv
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

from evaluation.sources.types import RawRow, SourceError, SourceSpec, Table

_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
HUB = "hub:"


def read_table(spec: SourceSpec) -> Table:
    """The source's columns and raw rows.

    Raises:
        SourceError: it is missing, empty, of an unknown kind, unreadable or out of reach.
    """
    if spec.source.startswith(HUB):
        return _read_hub(spec)
    path = Path(spec.source)
    readers: dict[str, Callable[[SourceSpec, bytes, int], Table]] = {
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_jsonl,
    }
    reader = readers.get(path.suffix.lower())
    problems = []
    if reader is None:
        problems.append(f"expected a name ending in {', '.join(readers)}, or {HUB}org/name, got {path.name!r}.")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no file"
        problems.append(f"expected a file, found {kind} at {path.resolve()}; set the path of your data.")
    if problems or reader is None:
        raise SourceError(spec.source, problems)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(spec.source, [f"cannot be read: {error.strerror}."]) from error
    encoding = next((name for bom, name in _OTHER_BOMS.items() if data.startswith(bom)), None)
    if encoding is not None:
        raise SourceError(spec.source, [f"expected UTF-8, got {encoding}; save the file as UTF-8."])
    start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
    if not data[start:].strip():
        raise SourceError(spec.source, [f"is empty ({len(data)} bytes); expected a header and rows, or JSON lines."])
    return reader(spec, data[start:], start)


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


def _read_jsonl(spec: SourceSpec, data: bytes, start: int) -> Table:
    if data.lstrip().startswith(b"[") and _is_array(data):
        raise SourceError(spec.source, ["expected one JSON object per line, got a JSON array; write one per line."])
    columns: dict[str, None] = {}
    rows: list[RawRow] = []
    offset = start
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            values, problem = _json_object(line, offset)
            columns.update(dict.fromkeys(values if problem is None else ()))
            rows.append(RawRow(len(rows) + 1, number, values, problem))
        offset += len(line) + 1
    return Table(list(columns), rows)


def _is_array(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), list)
    except (ValueError, RecursionError):
        return False


def _json_object(line: bytes, offset: int) -> tuple[dict[str, object], str | None]:
    raw: dict[str, object] = {"(line)": line.decode(errors="backslashreplace").rstrip("\r")}
    if bad := _not_utf8(line, offset):
        return raw, bad
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return raw, f"expected a JSON object, got broken JSON ({error})"
    if not isinstance(value, dict):
        return raw, f"expected a JSON object, got {type(value).__name__}"
    return value, None


def _read_hub(spec: SourceSpec) -> Table:
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    name, revision = spec.source.removeprefix(HUB), None
    if "@" in name and not Path(name).exists():
        name, revision = name.rsplit("@", 1)
    try:
        data = load_dataset(name, spec.subset, split=spec.split, revision=revision)
    except (DatasetNotFoundError, DatasetsError, ValueError) as error:
        raise SourceError(
            spec.source, [f"the hub data set (split {spec.split!r}) could not be opened: {error}"]
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise SourceError(
            spec.source,
            [
                f"the Hugging Face hub cannot be reached ({type(error).__name__}: {error}); save the data "
                "set as CSV or JSONL and set source to that path."
            ],
        ) from error
    rows = [RawRow(number, None, dict(row)) for number, row in enumerate(data, start=1)]
    return Table(list(data.column_names), rows)
