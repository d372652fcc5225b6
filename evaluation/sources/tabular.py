"""Tables from CSV, JSON, Parquet and text files, exactly as written: readers judge bytes and shape, never values.

A row number counts data rows from 1, a line number counts the lines of the file from 1. Blank lines are not rows.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any

from evaluation import EvaluationError
from trainers.words import look

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}  # fmt: skip
_BATCH = 10_000  # rows converted to Python values at once: QNLI's 105,000 take less than a second
_UNREADABLE = (ValueError, OverflowError, KeyError)  # no UTF-8, a time beyond Python's, a map with a key twice
_CANDIDATES = ["cp1252", "cp1250", "cp1251", "cp1253", "mac_roman"]  # Western, Central European, Cyrillic, Greek, Mac
_MIXED = re.compile("[A-Za-z][\u0370-\u04ff]|[\u0370-\u04ff][A-Za-z]")  # two alphabets in a word: a wrong reading
_SEPARATORS = ",;\t|"
_SEP = re.compile('"?sep=(.)"?', re.IGNORECASE)  # a first line that only Excel understands
_TOP = 50  # lines in which the header is looked for
_INDENTED = re.compile(rb'[ \t]+["{\[\]}]')  # a line of a JSON document, and of no JSON lines
AUTO = "auto"
FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
TEXT = "text"  # the only column of a .txt file


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it; `problem` is set if it could not be read as a row at all."""

    row: int
    line: int | None
    values: dict[str, object]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[RawRow]
    hint: str = ""  # appended to the message about a missing column
    repeated: frozenset[str] = frozenset()  # columns that the header has more than once
    revision: str | None = None  # commit of a hub data set
    labels: dict[str, list[str]] = field(default_factory=dict)  # column of numbered classes → their names
    units: dict[str, str] = field(default_factory=dict)  # column → unit, where the file has them outside the header
    used: frozenset[str] = frozenset()  # columns that say which rows and columns are read
    above: tuple[str, ...] = ()  # lines above the header
    note: str = ""  # what was recognized about a file that is not plain UTF-8, commas and a header on top


def read_file(source: str, delimiter: str = AUTO, encoding: str = AUTO, names: Iterable[str] = ()) -> Table:
    """The table of a file; EvaluationError if it is missing, empty, of an unknown kind or unreadable.

    `names` are columns that will be read: they identify a CSV file's header and delimiter.
    """
    path = Path(source)
    kind = path.suffix.lower()
    problems = []
    if kind not in FILES:
        problems.append(f"expected a name ending in {', '.join(FILES)}, a folder, or hub:org/name, got {path.name!r}.")
    if not path.is_file():
        problems.append(f"expected a file or a folder, got none at {path.resolve()}. Set the path of your data.")
    if problems:
        raise EvaluationError(problems)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"cannot be read: {error.strerror}.") from error
    if kind == ".parquet":
        return _read_parquet(data)
    plain, start, recognized = _as_utf8(data, encoding)
    if not plain.strip():
        raise EvaluationError(f"is empty ({len(data)} bytes); expected a header and rows, JSON lines, or texts.")
    notes = [f"as {recognized}"] if recognized else []
    if kind in (".csv", ".tsv"):
        table, layout = _read_csv(plain, start, delimiter, {look(name).casefold() for name in names})
        notes += layout
    elif kind == ".txt":
        table = _read_text(plain, start)
    else:
        table, layout = _read_json(plain, start, set(names))
        notes += layout
    return replace(table, note=f"{path.name} is read {', '.join(notes)}." if notes else "")


# --- encodings ---


def _as_utf8(data: bytes, encoding: str) -> tuple[bytes, int, str]:
    """(the data in UTF-8, length of its byte order mark, the encoding if it was recognized and is another)."""
    name = _recognized_encoding(data) if encoding == AUTO else codecs.lookup(encoding).name
    if name in ("utf-8", "utf-8-sig"):  # invalid bytes are reported with their row
        start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        return data[start:], start, ""
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"got byte 0x{data[error.start]:02x} at offset {error.start} of the file"
        raise EvaluationError(
            f"expected {name}, {got}. Save the file as UTF-8, or set prepare_data.encoding to what it is."
        ) from error
    return text.encode(errors="backslashreplace"), 0, name if encoding == AUTO else ""


def _recognized_encoding(data: bytes) -> str:
    """The encoding of a text file: UTF-8 if at all possible, else the best reading; EvaluationError if several are."""
    for bom, name in _BOMS.items():
        if data.startswith(bom):
            return name
    invalid = _not_utf8(data, 0)
    if invalid is None:
        return "utf-8"
    valid = sum(not character.isascii() for character in data.decode(errors="ignore"))
    if valid > data.decode(errors="replace").count("\ufffd"):  # a few broken bytes among valid ones
        return "utf-8"
    from charset_normalizer import from_bytes

    # Without the ³ of µg/m³, which alone would leave the encoding open.
    lines = [line for line in data.replace(b"/m\xb3", b"/m3").splitlines() if not line.isascii()][:200]
    if not lines:
        return "cp1252"
    matches = [m for m in from_bytes(b"\n".join(lines), cp_isolation=_CANDIDATES) if not _MIXED.search(str(m))]
    least = min(((m.chaos, -m.coherence) for m in matches), default=None)
    best = [m for m in matches if (m.chaos, -m.coherence) == least]
    texts = {"cp1252" if "cp1252" in m.could_be_from_charset else m.encoding: str(m).split("\n") for m in best}
    if len(best) == 1:
        return next(iter(texts))
    place = next((n for n, same in enumerate(zip(*texts.values(), strict=False)) if len(set(same)) > 1), 0)
    readings = " or ".join(f"{name} ({text[place].strip()[:40]!r})" for name, text in sorted(texts.items()))
    value = "the one that reads right" if readings else "its name, e.g. shift_jis"
    raise EvaluationError(
        f"{invalid}; it could be {readings or 'in any encoding'}. Save the file as UTF-8, or set prepare_data.encoding "
        f"to {value}."
    )


def _not_utf8(line: bytes, offset: int) -> str | None:
    """A message about the first byte of `line` that is not UTF-8; `offset` is where the line starts in the file."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got byte 0x{line[error.start]:02x} at offset {offset + error.start} of the file"
    return None


# --- CSV ---


def _read_csv(data: bytes, start: int, delimiter: str, names: Collection[str]) -> tuple[Table, list[str]]:
    """The table, and what was recognized about its layout."""
    lines = data.splitlines(keepends=True)
    offsets = list(accumulate((len(line) for line in lines), initial=start))
    # Invalid bytes pass through the parser as visible \xNN and are reported with their row.
    text = [line.decode(errors="backslashreplace") for line in lines]
    separator, top = _layout(text, delimiter, names)
    notes = [f"with cells separated by {separator!r}"] if delimiter == AUTO and separator != "," else []
    if above := [line.strip() for line in text[:top] if line.strip() and not _SEP.fullmatch(line.strip())]:
        notes.append(f"from the header on line {top + 1}, without what stands above it ({above[0][:40]!r})")
    header: list[str] | None = None
    repeated = frozenset[str]()
    rows: list[RawRow] = []
    for first, last, cells, error in _csv_rows(text, separator, top):
        problem = next((p for i in range(first, last) if (p := _not_utf8(lines[i], offsets[i]))), None) or error
        if header is None:
            if problem:
                raise EvaluationError(f"line {first + 1}, the header: {problem}.")
            header = [name.strip() for name in cells]
            repeated = frozenset(name for name in header if header.count(name) > 1)
            # A name that comes again gets a number, as in pandas, so that no cell is lost.
            header = [f"{name}.{n}" if (n := header[:at].count(name)) else name for at, name in enumerate(header)]
            continue
        if error and "never closed" in error:  # the rows below would all be lost
            raise EvaluationError(f"{error}. Close it")
        if problem is None and len(cells) != len(header):
            problem = f"expected {len(header)} cells, as in the header, got {len(cells)}"
        values: dict[str, object] = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            values["(beyond the header)"] = cells[len(header) :]
        rows.append(RawRow(len(rows) + 1, first + 1, values, problem))
    columns = header or []
    other = next((d for d in _SEPARATORS if len(columns) == 1 and d in columns[0]), None)
    hint = f" The header contains {other!r}: set delimiter to it, or to auto." if other else ""
    return Table(columns, rows, hint, repeated, above=tuple(above)), notes


def _layout(text: list[str], delimiter: str, names: Collection[str]) -> tuple[str, int]:
    """(delimiter, line of the header from 0) with which most of the columns that will be read are there."""
    excel = _SEP.fullmatch(text[0].strip())
    top = next((n for n, line in enumerate(text) if line.strip() and not (excel and n == 0)), 0)
    if delimiter == AUTO and excel:
        delimiter = excel[1]
    tries = []
    for separator in _SEPARATORS if delimiter == AUTO else delimiter:
        width = 0  # of the first line: text above a header is narrower, and a row that contains one name is no header
        for first, _, cells, _ in _csv_rows(text[:_TOP], separator, top):
            known = len({look(cell).casefold() for cell in cells}.intersection(names))
            tries.append((known if known > 1 or len(cells) > width else 0, separator, first))
            width = width or len(cells)
    most, separator, first = max(tries, key=lambda attempt: attempt[0], default=(0, ",", top))
    if most:
        return separator, first
    if delimiter == AUTO:
        try:
            delimiter = csv.Sniffer().sniff(text[top], _SEPARATORS).delimiter
        except csv.Error:
            delimiter = ","
    return delimiter, top


def _csv_rows(text: list[str], delimiter: str, top: int) -> Iterator[tuple[int, int, list[str], str | None]]:
    """Yields (first line, line after the last, cells, problem), lines from 0, of each row from line `top` on."""
    csv.field_size_limit(2**31 - 1)  # a conversation in one cell may be longer than Python's default of 128 KiB
    reader = csv.reader(text[top:], delimiter=delimiter, strict=True)
    while True:
        first = top + reader.line_num
        try:
            cells, error = next(reader), None
        except StopIteration:
            return
        except csv.Error as exc:
            cells, error = [], f"expected a CSV row, got broken quoting ({exc})"
            if "end of data" in str(exc):
                error += f": a quote opened on line {first + 1} or later is never closed"
        if cells or error:
            yield first, top + reader.line_num, cells, error


# --- text, JSON and Parquet ---


def _read_text(data: bytes, start: int) -> Table:
    """Texts separated by lines of white space; the indentation of their own lines stays."""
    if invalid := _not_utf8(data, start):
        raise EvaluationError(f"{invalid}.")
    lines = [line if line.strip() else "" for line in re.split("\r\n?|\n", data.decode())]
    texts = filter(None, (text.strip("\n") for text in "\n".join(lines).split("\n\n")))
    return Table([TEXT], [RawRow(n, None, {TEXT: text}) for n, text in enumerate(texts, start=1)])


def _read_json(data: bytes, start: int, names: Collection[str]) -> tuple[Table, list[str]]:
    """The table of one object a line, or of a document over several lines, and what was recognized about its layout.

    A document is an array of objects, objects one after the other, or an object that holds the rows (`_held`), unless
    it has one of the columns `names`, as a row has.
    """
    lines = data.split(b"\n")
    first, *more = [line for line in lines if line.strip()]
    if _parsed(first)[1] or not more:
        # Invalid bytes pass through as half characters and are reported with their row.
        text = data.decode(errors="surrogateescape")
        try:
            values = _documents(text)
        except (ValueError, RecursionError) as error:
            array = data.lstrip().startswith(b"[")
            if array or any(_INDENTED.match(line) for line in more):
                expected = "a JSON array of objects" if array else "a JSON object a line, or one that holds all rows"
                raise EvaluationError(f"expected {expected}, got broken JSON ({error}).") from error
        else:
            if len(values) == 1 and isinstance(values[0][1], list):
                return _json_table([(None, *_checked(value)) for value in values[0][1]]), []
            if len(values) == 1 and (held := _held(values[0][1], names)):
                return held
            if more:
                return _json_table([(line, *_checked(value)) for line, value in values]), []
    rows: list[tuple[int | None, dict[str, object], str | None]] = []
    offset = start
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append((number, *_json_object(line, offset)))
        offset += len(line) + 1
    return _json_table(rows), []


def _documents(text: str) -> list[tuple[int, Any]]:
    """(line, value) of each JSON value in a text that holds nothing else."""
    decoder, blank, values = json.JSONDecoder(parse_float=_decimal), re.compile(r"\s*"), list[tuple[int, Any]]()
    line, end = 1, 0
    while (place := blank.match(text, end).end()) < len(text):  # type: ignore[union-attr]  # matches anywhere
        line += text.count("\n", end, place)
        value, end = decoder.raw_decode(text, place)
        values.append((line, value))
        line += text.count("\n", place, end)
    return values


def _held(document: object, names: Collection[str]) -> tuple[Table, list[str]] | None:
    """The table inside an object: a list of objects, or lists that are columns; None if the object is itself a row."""
    if not isinstance(document, dict):
        return None
    if rows := _rows_of(document):
        return _json_table([(None, *_checked(row)) for row in rows]), ["with a list for each column"]
    if not document.keys().isdisjoint(names):
        return None
    tables = {key: rows for key, value in document.items() if (rows := _rows_of(value))}
    header, cells = document.get("columns"), document.get("data")
    if isinstance(header, list) and isinstance(cells, list):  # as pandas writes orient="split"
        tables = {"data": [dict(zip(header, row, strict=False)) for row in cells]}
    if len(tables) > 1:
        raise EvaluationError(f"expected one list of rows, got {', '.join(map(repr, tables))}. Save each in a file.")
    for key, rows in tables.items():
        beside = ", ".join(name for name in document if name != key)
        note = f"from the list in {key!r}" + (f", without what stands beside it ({beside[:80]})" if beside else "")
        table = _json_table([(None, *_checked(row)) for row in rows])
        units = document.get(f"{key}_units")  # Open-Meteo
        return replace(table, units=units if isinstance(units, dict) else {}), [note]
    return None


def _rows_of(value: object) -> list[dict[str, object]]:
    """The rows of a list of objects, or of lists of equal length that are columns; empty for anything else."""
    if isinstance(value, list):
        return value if all(isinstance(row, dict) for row in value) else []
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return []
    plain = not any(isinstance(cell, list | dict) for column in value.values() for cell in column)
    equal = len({len(column) for column in value.values()}) == 1
    rows = zip(*value.values(), strict=True) if plain and equal else ()
    return [dict(zip(value, row, strict=True)) for row in rows]


def _json_table(rows: list[tuple[int | None, dict[str, object], str | None]]) -> Table:
    """A table of (line, values, problem); its columns are those of all valid rows."""
    columns = dict.fromkeys(name for _, values, problem in rows if problem is None for name in values)
    return Table(list(columns), [RawRow(n, *rest) for n, rest in enumerate(rows, start=1)])


def _parsed(line: bytes) -> tuple[Any, str]:
    """(the value, what is wrong with the JSON)."""
    try:
        return json.loads(line, parse_float=_decimal), ""
    except (ValueError, RecursionError) as error:
        return None, f"expected a JSON object, got broken JSON ({error})"


def _decimal(text: str) -> float | Decimal:
    """A float, unless one means another decimal: 0.0549999999999999999 would be 0.055."""
    value = float(text)
    return value if Decimal(repr(value)) == Decimal(text) else Decimal(text)


def _json_object(line: bytes, offset: int) -> tuple[dict[str, object], str | None]:
    raw: dict[str, object] = {"(line)": line.decode(errors="backslashreplace").rstrip("\r")}
    if invalid := _not_utf8(line, offset):
        return raw, invalid
    value, problem = _parsed(line)
    if problem:
        return raw, problem
    values, fault = _checked(value)
    return (raw if fault else values), fault


def _checked(value: object) -> tuple[dict[str, object], str | None]:
    """The object and what is wrong with it."""
    if not isinstance(value, dict):
        return {"(value)": value}, f"expected a JSON object, got {type(value).__name__}"
    for name, cell in value.items():
        try:
            json.dumps([name, cell], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character (\\u{code:04x})"
            return value, f"{name}: expected UTF-8, got {what}"
    return value, None


def _read_parquet(data: bytes) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"expected a Parquet file: {error}") from error
    names = list(table.column_names)
    widths = {pa.float16(): "float16", pa.float32(): "float32"}
    short = {field.name: widths[field.type] for field in table.schema if field.type in widths}
    rows = raw_rows(
        lambda start, end: table.slice(start, end - start).to_pydict(maps_as_pydicts="strict"), table.num_rows, short
    )
    units = {
        field.name: text.decode(errors="replace")
        for field in table.schema
        for key, text in (field.metadata or {}).items()
        if key.lower() in (b"unit", b"units")
    }
    repeated = frozenset(n for n in names if names.count(n) > 1)
    return Table(names, rows, "", repeated, labels=_labels(table.schema), units=units)


def _labels(schema: Any) -> dict[str, list[str]]:
    """Class names, which `datasets` stores in a file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {
        column: list(kind["names"])
        for column, kind in features.items()
        if isinstance(kind, dict) and kind.get("_type") == "ClassLabel" and kind.get("names")
    }


Cells = Callable[[int, int], Mapping[str, Sequence[object]]]


def raw_rows(read: Cells, rows: int, short: Mapping[str, str]) -> list[RawRow]:
    """All rows of `read`, which maps (first row, the one after the last, from 0) to column → its cells.

    `short`: columns of float16 and float32, with that name. Their cells are read as the shortest decimal of their own
    type: 0.055 in 32 bits is 0.054999999701976776 in 64. A row with a cell that cannot be read has a problem instead of
    values.
    """
    import numpy as np

    def decimals(start: int, end: int) -> list[dict[str, object]]:
        columns = dict(read(start, end))
        for name, width in short.items():
            own_type = getattr(np, width)
            columns[name] = [None if cell is None else float(str(own_type(cell))) for cell in columns[name]]
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

    result: list[RawRow] = []
    for start in range(0, rows, _BATCH):
        end = min(start + _BATCH, rows)
        try:
            result += [RawRow(n, None, values) for n, values in enumerate(decimals(start, end), start=start + 1)]
        except _UNREADABLE:
            for place in range(start, end):
                try:
                    result.append(RawRow(place + 1, None, decimals(place, place + 1)[0]))
                except _UNREADABLE as error:
                    result.append(RawRow(place + 1, None, {}, f"a cell cannot be read: {error}"))
    return result
