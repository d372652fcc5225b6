"""What a source is, what comes out of it, and how a column is mapped onto a field."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from pydantic import BaseModel, ConfigDict, Field

from evaluation.epa import POLLUTANTS

TEXT_FIELDS = ("prompt", "completion")
FIELDS = (*POLLUTANTS, "aqi", "category", "id", *TEXT_FIELDS)

# Units of one family differ by powers of ten only. Between the families lie temperature and pressure.
_MASS = {"µg/m3": Decimal(1), "mg/m3": Decimal(1000)}
_VOLUME = {"ppb": Decimal(1), "ppm": Decimal(1000)}


class SourceError(Exception):
    """The source as a whole cannot be used.

    Attributes:
        problems: Every reason found, one sentence each.
        rejected: Rows refused before that was known (empty unless no row was left).
    """

    def __init__(self, source: str, problems: Sequence[str], rejected: Sequence["Rejection"] = ()):
        self.source = source
        self.problems = list(problems)
        self.rejected = list(rejected)
        super().__init__("\n  - ".join([f"{source} cannot be used:", *self.problems]))


class ColumnSpec(BaseModel):
    """A column whose unit is not EPA's.

    Attributes:
        column: Name in the file.
        unit: ppm or ppb for gases, µg/m³ or mg/m³ for particles; None means EPA's unit of that pollutant.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str
    unit: str | None = None


class SourceSpec(BaseModel):
    """Where a user's own AQI data lies and which column means what.

    Attributes:
        source: Path of a .csv, .jsonl, .ndjson, .json (lines or one array) or .parquet file, of a folder in the hub's
            format, or `hub:org/name[@revision]`.
        columns: Our field → the file's column. Fields: the pollutants of `evaluation.epa` (`pm25` …), `aqi`,
            `category`, `id`, and `prompt` with `completion` for ready-made texts.
        split: Split of a hub data set or folder.
        subset: Configuration of a hub data set or folder that has several.
        delimiter: Separator of a CSV file, one character.
        trust_given_aqi: Take the file's AQI where it disagrees with EPA's calculation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    columns: dict[str, str | ColumnSpec]
    split: str = "train"
    subset: str | None = None
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    trust_given_aqi: bool = False


@dataclass(frozen=True)
class AqiRecord:
    """One accepted row.

    Attributes:
        id: The file's id, or "row-N".
        row: Data row, from 1.
        line: Line of the file on which the row starts, from 1; None where it has no lines (Parquet, array, hub).
        readings: Pollutant key → concentration in EPA's unit of that pollutant.
        given_aqi: The file's own index (rounded to an integer, halves up), if it has one.
        category: The file's own category, in EPA's spelling, if it has one.
        prompt: The user's own prompt, if mapped.
        completion: The user's own answer, if mapped.
    """

    id: str
    row: int
    line: int | None
    readings: dict[str, float]
    given_aqi: int | None = None
    category: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class Rejection:
    """One refused row.

    Attributes:
        file: The source.
        row: Data row, from 1.
        line: Line of the file on which the row starts; None where it has no lines (Parquet, array, hub).
        column: The file's column of the first problem; None when the row as a whole is at fault.
        value: What stood there.
        reason: Every problem of the row: what was expected and what came.
        raw: The row as read.
        split: The data set's split that it stands in; None where one alone is read.
    """

    file: str
    row: int
    line: int | None
    column: str | None
    value: object
    reason: str
    raw: dict[str, object]
    split: str | None = None


@dataclass(frozen=True)
class SourceResult:
    """All rows of a source: each stands in exactly one of the two lists, in file order.

    Attributes:
        records: The accepted ones.
        rejected: The refused ones.
        revision: Commit of a hub data set; None for files.
    """

    records: list[AqiRecord]
    rejected: list[Rejection]
    revision: str | None = None


@dataclass(frozen=True)
class RawRow:
    """A row as the reader found it; `problem` is set when it could not be read as a row at all."""

    row: int
    line: int | None
    values: dict[str, object]
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """A source read, but not yet judged.

    Attributes:
        columns: Its names, in order.
        rows: All, in order.
        hint: The end of a sentence about a column that is not there.
        repeated: Columns that stand in the header more than once.
        revision: Commit of a hub data set; None for files.
        labels: Column of numbered classes → their names, where the data set gives them.
    """

    columns: list[str]
    rows: list[RawRow]
    hint: str = ""
    repeated: frozenset[str] = frozenset()
    revision: str | None = None
    labels: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The column behind a field and the factor to EPA's unit."""

    column: str
    factor: Decimal = field(default=Decimal(1))


def suggest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no known word is near."""
    by_lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def check_columns(table: Table, columns: Mapping[str, str], how: Mapping[str, str] | None = None) -> list[str]:
    """What is wrong with a table as a whole.

    Args:
        table: The source as read.
        columns: Field → the column that it is read from.
        how: Field → what to do where its column is not there.
    """
    problems = []
    for name, column in columns.items():
        if column in table.repeated:
            problems.append(f"{name}: the header holds {column!r} more than once; rename one.")
        elif table.columns and column not in table.columns:
            problems.append(
                f"{name}: there is no column {column!r}.{suggest(column, table.columns)} "
                f"Available: {', '.join(table.columns)}.{table.hint}{(how or {}).get(name, '')}"
            )
    if not table.rows:
        problems.append("has a header, but no data row.")
    return problems


def no_row_left(source: str, rejected: Sequence[Rejection], where: str = "") -> SourceError:
    """The error of a source all of whose rows were refused.

    Args:
        source: Its name.
        rejected: All rows.
        where: Said before "no row is left", e.g. the split.
    """
    shown = [f"row {r.row}{f' (line {r.line})' if r.line else ''}: {r.reason}" for r in rejected[:5]]
    more = [f"… and {len(rejected) - 5} more"] if len(rejected) > 5 else []
    return SourceError(
        source, [f"{where}no row is left, all {len(rejected)} were rejected.", *shown, *more], list(rejected)
    )


def unit_factor(key: str, unit: str | None) -> Decimal:
    """What a value in `unit` is multiplied with to be in EPA's unit of pollutant `key`.

    Raises:
        ValueError: unknown unit, or one of the other family.
    """
    if unit is None:
        return Decimal(1)
    target = POLLUTANTS[key].unit
    family, other = (_VOLUME, _MASS) if target in _VOLUME else (_MASS, _VOLUME)
    plain = unit.strip().lower().replace(" ", "").replace("μ", "µ").replace("^3", "3").replace("³", "3")
    plain = {"ug/m3": "µg/m3", "mcg/m3": "µg/m3", "ppmv": "ppm", "ppbv": "ppb"}.get(plain, plain)
    if plain in family:
        return family[plain] / family[target.replace("³", "3")]
    if plain in other:
        raise ValueError(
            f"{key}: cannot turn {unit} into {target}: between mass and volume stand temperature and "
            f"pressure, which the file does not give. Convert the column to {' or '.join(family)} first."
        )
    raise ValueError(f"{key}: expected the unit {' or '.join(family)}, got {unit!r}.")


def check_mapping(spec: SourceSpec) -> tuple[dict[str, Target], list[str]]:
    """Resolves the column mapping, without looking at the file.

    Returns:
        Field → target for every sound entry, and all problems of the others.
    """
    targets: dict[str, Target] = {}
    problems: list[str] = []
    for name, entry in spec.columns.items():
        column = ColumnSpec(column=entry) if isinstance(entry, str) else entry
        if name not in FIELDS:
            problems.append(f"unknown field {name!r} in columns.{suggest(name, FIELDS)} Known: {', '.join(FIELDS)}.")
            continue
        if column.unit is not None and name not in POLLUTANTS:
            problems.append(f"{name}: expected no unit, got {column.unit!r}; only pollutants have one.")
            continue
        try:
            factor = unit_factor(name, column.unit) if name in POLLUTANTS else Decimal(1)
        except ValueError as error:
            problems.append(str(error))
            continue
        twin = next((f for f, t in targets.items() if t.column == column.column), None)
        if twin is not None:
            problems.append(f"column {column.column!r} is mapped to both {twin!r} and {name!r}; map it once.")
            continue
        targets[name] = Target(column.column, factor)
    named = set(spec.columns)
    texts = named.intersection(TEXT_FIELDS)
    if len(texts) == 1:
        problems.append(f"{texts.pop()!r} is mapped alone; prompt and completion come together.")
    elif texts and "aqi" not in named:
        problems.append("prompt and completion are mapped without 'aqi'; map the column that holds the true index.")
    elif not texts and not named.intersection(POLLUTANTS):
        problems.append(
            f"columns maps no pollutant; map at least one of {', '.join(POLLUTANTS)}, or prompt, completion and aqi."
        )
    return targets, problems
