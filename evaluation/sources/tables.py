"""Tables of CSV, JSON and Parquet files, as found: readers judge bytes and shape, never values.

A row number counts data rows from 1, a line number counts the lines of the file from 1. Blank lines are no rows.
"""

import codecs
import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe\x00\x00": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_ESCAPE = b"\\ud"  # how an escape of half a character begins
_BATCH = 10_000  # rows turned into Python values at once: QNLI's 105,000 take less than a second
_UNREADABLE = (ValueError, OverflowError)  # text that is not UTF-8, or a point in time that Python cannot hold
_CANDIDATES = ["cp1252", "cp1250", "cp1251", "cp1253", "mac_roman"]  # western, central, Cyrillic, Greek, of a Mac
_MIXED = re.compile("[A-Za-z][\u0370-\u04ff]|[\u0370-\u04ff][A-Za-z]")  # two alphabets in one word: a wrong reading
_SEPARATORS = ",;\t|"
_SEP = re.compile('"?sep=(.)"?', re.IGNORECASE)  # Excel's own first line
_TOP = 50  # lines in which a header is looked for
AUTO = "auto"
FILES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Rejection:
    file: str
    row: int
    line: int | None  # on which the row starts; None where there are no lines (Parquet, array, hub)
    column: str | None  # of the first problem; None when the row as a whole is at fault
    value: object  # what stood there
    reason: str  # every problem of the row: what was expected and what came
    raw: dict[str, object]
    split: str | None = None


class SourceError(Exception):
    """The source as a whole cannot be used."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([f"{source} cannot be used:", *self.problems]))


@dataclass(frozen=True)
class RawRow:
    """A row as the reader found it; `problem` is set when it could not be read as a row at all."""

    row: int
    line: int | None
    values: dict[str, object]
    problem: str | None = None
    lost: int = 0  # further rows that an open quote took in


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[RawRow]
    hint: str = ""  # the end of a sentence about a column that is not there
    repeated: frozenset[str] = frozenset()  # columns that stand in the header more than once
    revision: str | None = None  # commit of a hub data set
    labels: dict[str, list[str]] = field(default_factory=dict)  # column of numbered classes → their names
    note: str = ""  # what was recognised of a file that is not plain UTF-8, commas and a header on top


def read_file(source: str, delimiter: str = AUTO, encoding: str = AUTO, names: Iterable[str] = ()) -> Table:
    """The table of a file; SourceError where it is missing, empty, of an unknown kind or unreadable.

    `names` are columns that are looked for: they tell a CSV file's header and delimiter.
    """
    path = Path(source)
    kind = path.suffix.lower()
    problems = []
    if kind not in FILES:
        problems.append(f"expected a name ending in {', '.join(FILES)}, a folder, or hub:org/name, got {path.name!r}.")
    if not path.is_file():
        problems.append(
            f"expected a file, found no file at {path.resolve()}; set the path of your data, a file or a folder."
        )
    if problems:
        raise SourceError(source, problems)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(source, [f"cannot be read: {error.strerror}."]) from error
    if kind == ".parquet":
        return _read_parquet(source, data)
    plain, start, recognised = _utf8(source, data, encoding)
    if not plain.strip():
        raise SourceError(source, [f"is empty ({len(data)} bytes); expected a header and rows, or JSON lines."])
    said = [f"as {recognised}"] if recognised else []
    if kind in (".csv", ".tsv"):
        table = _read_csv(source, plain, start, delimiter, {name.casefold() for name in names}, said)
    else:
        table = _read_json(source, plain, start)
    return replace(table, note=f"{path.name} is read {', '.join(said)}." if said else "")


def _utf8(source: str, data: bytes, encoding: str) -> tuple[bytes, int, str]:
    """(the data in UTF-8, the bytes left out before it, the encoding where it was recognised and is another)."""
    name = _recognised(source, data) if encoding == AUTO else codecs.lookup(encoding).name
    if name in ("utf-8", "utf-8-sig"):  # bytes that are not are reported with the row that holds them
        start = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
        return data[start:], start, ""
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        got = f"got byte 0x{data[error.start]:02x} at offset {error.start} of the file"
        problem = f"expected {name}, {got}; save the file as UTF-8, or set prepare_data.encoding to what it is."
        raise SourceError(source, [problem]) from error
    return text.encode(errors="backslashreplace"), 0, name if encoding == AUTO else ""


def _recognised(source: str, data: bytes) -> str:
    """The encoding of a text file; SourceError where it cannot be told."""
    if data.startswith(_UTF8_BOM):
        return "utf-8"
    if bom := next((name for bom, name in _OTHER_BOMS.items() if data.startswith(bom)), None):
        return bom
    even, odd = (data[parity:4000:2].count(0) / 2000 * max(1.0, 4000 / len(data or b"0")) for parity in (0, 1))
    if max(even, odd) > 0.7 and min(even, odd) < 0.1:  # every other byte of plain letters in UTF-16 is zero
        return "utf-16-le" if odd > even else "utf-16-be"
    bad = _not_utf8(data, 0)
    if bad is None:
        return "utf-8"
    sound = sum(not character.isascii() for character in data.decode(errors="ignore"))
    if sound > data.decode(errors="replace").count("\ufffd"):  # a few broken bytes among sound ones
        return "utf-8"
    from charset_normalizer import from_bytes

    # In µg/m³ the last sign alone would leave it open.
    lines = [line for line in data.replace(b"/m\xb3", b"/m3").splitlines() if not line.isascii()][:200]
    if not lines:
        return "cp1252"
    found = [m for m in from_bytes(b"\n".join(lines), cp_isolation=_CANDIDATES) if not _MIXED.search(str(m))]
    least = min(((m.chaos, -m.coherence) for m in found), default=None)
    best = [m for m in found if (m.chaos, -m.coherence) == least]

    def named(match: Any) -> str:
        return "cp1252" if "cp1252" in match.could_be_from_charset else str(match.encoding)

    if len(best) == 1:
        return named(best[0])
    texts = {named(m): str(m).split("\n") for m in best}
    place = next((n for n, same in enumerate(zip(*texts.values(), strict=False)) if len(set(same)) > 1), 0)
    readings = " or ".join(f"{name} ({text[place].strip()[:40]!r})" for name, text in sorted(texts.items()))
    which = f"whether it is {readings}" if readings else "which encoding it is"
    ask = f"set prepare_data.encoding to {'the one that reads right' if readings else 'its name, e.g. shift_jis'}"
    raise SourceError(source, [f"{bad}; {which} cannot be told: save the file as UTF-8, or {ask}."])


def _not_utf8(line: bytes, offset: int) -> str | None:
    """The sentence about the first byte of `line` that is not UTF-8; `offset` is where the line starts."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return f"expected UTF-8, got byte 0x{line[error.start]:02x} at offset {offset + error.start} of the file"
    return None


def _read_csv(source: str, data: bytes, start: int, delimiter: str, names: Collection[str], said: list[str]) -> Table:
    """`said` gets what was recognised."""
    lines = data.splitlines(keepends=True)
    offsets = list(accumulate((len(line) for line in lines), initial=start))
    # Bad bytes pass through the parser as visible \xNN and are reported with the row that holds them.
    text = [line.decode(errors="backslashreplace") for line in lines]
    separator, top = _layout(text, delimiter, names)
    if delimiter == AUTO and separator != ",":
        said.append(f"with cells separated by {separator!r}")
    if above := [line.strip() for line in text[:top] if line.strip() and not _SEP.fullmatch(line.strip())]:
        said.append(f"from the header on line {top + 1}, without what stands above it ({above[0][:40]!r})")
    header: list[str] | None = None
    rows: list[RawRow] = []
    for first, last, cells, error in _csv_rows(text, separator, top):
        bad = next((p for i in range(first, last) if (p := _not_utf8(lines[i], offsets[i]))), None)
        problem = bad or error
        if header is None:
            if problem:
                raise SourceError(source, [f"line {first + 1}, the header: {problem}."])
            header = [name.strip() for name in cells]
            continue
        lost = sum(bool(line.strip()) for line in lines[first + 1 : last]) if error else 0
        if lost:
            problem = f"{problem}: {lost + 1} rows are lost"
        if problem is None and len(cells) != len(header):
            problem = f"expected {len(header)} cells, as in the header, got {len(cells)}"
        values: dict[str, object] = dict(zip(header, cells, strict=False))
        if len(cells) > len(header):
            values["(beyond the header)"] = cells[len(header) :]
        rows.append(RawRow(len(rows) + 1, first + 1, values, problem, lost))
    columns = header or []
    other = next((d for d in _SEPARATORS if len(columns) == 1 and d in columns[0]), None)
    hint = f" The header holds {other!r}: set delimiter to it, or to auto." if other else ""
    return Table(columns, rows, hint, frozenset(c for c in columns if columns.count(c) > 1))


def _layout(text: list[str], delimiter: str, names: Collection[str]) -> tuple[str, int]:
    """(delimiter, line of the header from 0): such that most columns that are looked for are found."""
    own = _SEP.fullmatch(text[0].strip())
    top = next((n for n, line in enumerate(text) if line.strip() and not (own and n == 0)), 0)
    if delimiter == AUTO and own:
        delimiter = own[1]
    tries = []
    for separator in _SEPARATORS if delimiter == AUTO else delimiter:
        width = 0  # of the first line: what stands above a header is narrower, and a row that says one name is not
        for first, _, cells, _ in _csv_rows(text[:_TOP], separator, top):
            known = len({cell.strip().casefold() for cell in cells}.intersection(names))
            tries.append((known if known > 1 or len(cells) > width else 0, separator, first))
            width = width or len(cells)
    most, separator, first = max(tries, key=lambda found: found[0], default=(0, ",", top))
    if most:
        return separator, first
    if delimiter == AUTO:
        try:
            delimiter = csv.Sniffer().sniff(text[top], _SEPARATORS).delimiter
        except csv.Error:
            delimiter = ","
    return delimiter, top


def _csv_rows(text: list[str], delimiter: str, top: int) -> Iterator[tuple[int, int, list[str], str | None]]:
    """Yields (first line, line after the last, cells, problem) per row from line `top` that is not blank; from 0."""
    csv.field_size_limit(2**31 - 1)  # a conversation in one cell may be longer than the 128 KiB of Python's own
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
                error += f": a quote opened on line {first + 1} or later is never closed, so all lines up to "
                error += f"{top + reader.line_num} are in this row"
        if cells or error:
            yield first, top + reader.line_num, cells, error


def _read_json(source: str, data: bytes, start: int) -> Table:
    """One object a line, or one array of objects as a whole."""
    if data.lstrip().startswith(b"["):
        try:
            # Bytes that are not UTF-8 pass through as half characters and are reported with the row that holds them.
            text = data.decode(errors="surrogateescape")
            array = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not _is_json(data.lstrip().splitlines()[0]):
                raise SourceError(source, [f"expected a JSON array of objects, got broken JSON ({error})."]) from error
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
    """The object and what is wrong with it; `doubtful`: its texts may be such as no UTF-8 file can hold."""
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


def _read_parquet(source: str, data: bytes) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise SourceError(source, [f"expected a Parquet file: {error}"]) from error
    names = list(table.column_names)
    rows = raw_rows(lambda start, end: table.slice(start, end - start).to_pydict(), table.num_rows)
    return Table(names, rows, "", frozenset(n for n in names if names.count(n) > 1), labels=_labels(table.schema))


def _labels(schema: Any) -> dict[str, list[str]]:
    """Names of the classes that `datasets` leaves in a file's metadata."""
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


def raw_rows(read: Cells, rows: int) -> list[RawRow]:
    """All rows of `read`: (first row, the one after the last, from 0) → column → its cells.

    A row with a cell that cannot be read has a problem instead of values.
    """
    found: list[RawRow] = []
    for start in range(0, rows, _BATCH):
        end = min(start + _BATCH, rows)
        try:
            columns = read(start, end)
        except _UNREADABLE:
            found += [_one(read, place) for place in range(start, end)]
            continue
        names = list(columns)
        cells = zip(*columns.values(), strict=True)
        found += [RawRow(start + n, None, dict(zip(names, row, strict=True))) for n, row in enumerate(cells, start=1)]
    return found


def _one(read: Cells, place: int) -> RawRow:
    try:
        return RawRow(place + 1, None, {name: cells[0] for name, cells in read(place, place + 1).items()})
    except _UNREADABLE as error:
        return RawRow(place + 1, None, {}, f"a cell cannot be read: {error}")
