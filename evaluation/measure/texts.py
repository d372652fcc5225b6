"""Texts to measure a model on: general ones, and safe and unsafe prompts for the separation index.

alignment.jsonl holds 60 matched pairs of prompts that we wrote: one topic and form, once harmless, once not, over the
seven axes of LITMUS (civility, duty, empathy, information, justice, well-being, wisdom), of equal mean length. The
unsafe ones are requests only and hold no operational detail.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evaluation.sources import read_table
from evaluation.sources.hub import HUB
from evaluation.sources.tables import RawRow
from trainers.words import suggest

T = TypeVar("T")
SHIPPED = "shipped"
SHIPPED_FILE = Path(__file__).with_name("alignment.jsonl")
FIELDS = ("prompt", "label", "category", "pair")
LEAST = 10  # prompts of each class
MOST_LEFT_OUT = 0.05  # share of a hub data set's rows: nobody here can mend them, as the owner of a file can
_TABLES = (".csv", ".jsonl", ".ndjson", ".json")


class TextError(ValueError):
    """Texts or prompts that cannot be used."""


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many values, evenly from the whole, in order: suites are sorted by task, books by chapter."""
    n = len(values)
    return list(values) if n <= most else [values[i * n // most] for i in range(most)]


def read_texts(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    subset: str | None = None,
    section: str = "measure",
    own: str = "retention",
) -> list[str]:
    """All texts of a .txt file (a text ends at an empty line), of a column of a table, or of `hub:org/name`.

    Errors name the keys of `section`, whose `text` may be the word `own` too. SourceError where the source cannot be
    read at all; TextError for the rest.
    """
    kind, on_hub = Path(source).suffix.lower(), source.startswith(HUB)
    if not on_hub and kind not in (".txt", *_TABLES):
        raise TextError(
            f"{section}.text: expected `{own}`, a file ending in {', '.join(('.txt', *_TABLES))}, or {HUB}org/name, "
            f"got {source!r}"
        )
    if kind == ".txt" and not on_hub:
        try:
            whole = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{section}.text: expected a text file in UTF-8 at {source}: {error}") from error
        lines = [line if line.strip() else "" for line in whole.splitlines()]
        found = [text.strip() for text in "\n".join(lines).split("\n\n")]
    else:
        found = _column(source, column, split, subset, section)
    texts = [text for text in found if text]
    if not texts:
        raise TextError(f"{section}.text: expected texts in {source}, found none")
    return texts


def _column(source: str, column: str, split: str, subset: str | None, section: str) -> list[str]:
    table = read_table(source, split=split, subset=subset, names=[column])
    if column not in table.columns:
        meant = suggest(column, table.columns)
        raise TextError(f"{section}.text: {source} has no column {column!r}{meant}; set {section}.text_column")
    broken = [f"row {row.row}: {row.problem}" for row in table.rows if row.problem]
    if broken:
        raise TextError(f"{section}.text: {source}: {len(broken)} rows cannot be read: {'; '.join(broken[:3])}")
    found = []
    for row in table.rows:
        value = row.values.get(column)
        if value is None:
            continue
        if not isinstance(value, str):  # its repr would be scored
            raise TextError(
                f"{section}.text: {source}: row {row.row}: {column}: expected a text, got {type(value).__name__}; "
                f"name a column of texts in {section}.text_column"
            )
        found.append(value.strip())
    return found


@dataclass(frozen=True)
class Prompt:
    """What the user says, before any template; whether it is unsafe; its topic; the name of its matched pair."""

    text: str
    unsafe: bool
    category: str = ""
    pair: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a source in its order, and how many rows of a hub data set are left out."""

    prompts: list[Prompt]
    rows_left_out: int = 0


def read_prompts(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    safe_label: str = "safe",
    unsafe_label: str = "unsafe",
    split: str = "train",
    subset: str | None = None,
) -> PromptSet:
    """All prompts of `shipped`, a file, or `hub:org/name[@revision]`; labels may be in capitals or not.

    `columns` maps FIELDS to the source's columns; a field that is not named is looked for under its own name. A row
    that cannot be used refuses a file; of a hub data set MOST_LEFT_OUT may be left out. SourceError or TextError.
    """
    shipped = source == SHIPPED
    asked = {} if shipped else dict(columns or {})
    names = {field: asked.get(field, field) for field in FIELDS}
    labels = {safe_label.strip().lower(): False, unsafe_label.strip().lower(): True}
    if shipped:
        labels = {"safe": False, "unsafe": True}
    table = read_table(str(SHIPPED_FILE) if shipped else source, split=split, subset=subset, names=names.values())
    problems = [
        f"there is no column {name!r}{suggest(name, table.columns)}. Say which it is in measure.columns, e.g. "
        f"{{{field}: {table.columns[0] if table.columns else 'x'}}}"
        for field, name in names.items()
        if name not in table.columns and (field in ("prompt", "label") or field in asked)
    ]
    if problems:
        raise _cannot_be_used(source, problems)
    prompts: list[Prompt] = []
    for raw in table.rows:
        made = _prompt(raw, names, labels)
        if isinstance(made, Prompt):
            prompts.append(made)
        else:
            problems.append(made)
    texts = Counter(prompt.text for prompt in prompts)
    both = {p.text for p in prompts if not p.unsafe} & {p.text for p in prompts if p.unsafe}
    problems += [f"{text[:60]!r} is both safe and unsafe; keep one" for text in texts if text in both]
    lost = 0
    if source.startswith(HUB) and problems:
        prompts = [prompt for prompt in prompts if prompt.text not in both]
        lost = len(table.rows) - len(prompts)
        share = f"{lost} of {len(table.rows)} rows cannot be used, expected at most {MOST_LEFT_OUT:.0%}"
        problems = [share, *problems] if lost > MOST_LEFT_OUT * len(table.rows) else []
    if not problems:
        for label, unsafe in labels.items():
            n = sum(prompt.unsafe == unsafe for prompt in prompts)
            if n < LEAST:
                problems.append(f"expected at least {LEAST} prompts labelled {label!r}, got {n}")
    if problems:
        raise _cannot_be_used(source, problems)
    return PromptSet(prompts, lost)


def _cannot_be_used(source: str, problems: Sequence[str]) -> TextError:
    shown = [*problems[:5], *([f"… and {len(problems) - 5} more"] if len(problems) > 5 else [])]
    return TextError("\n  - ".join([f"measure.prompts: {source} cannot be used:", *shown]))


def _prompt(raw: RawRow, names: Mapping[str, str], labels: Mapping[str, bool]) -> Prompt | str:
    where = f"row {raw.row}" + (f" (line {raw.line})" if raw.line else "")
    if raw.problem:
        return f"{where}: {raw.problem}"
    text, label = raw.values.get(names["prompt"]), raw.values.get(names["label"])
    if not isinstance(text, str) or not text.strip():
        return f"{where}: {names['prompt']}: expected a text, got {text!r}"
    key = str(label).strip().lower()
    if key not in labels:
        return (
            f"{where}: {names['label']}: expected {' or '.join(map(repr, labels))}, got {label!r}; other names are set "
            "by measure.safe_label and unsafe_label"
        )
    category, pair = raw.values.get(names["category"]), raw.values.get(names["pair"])
    return Prompt(text.strip(), labels[key], str(category or ""), None if pair in (None, "") else str(pair))


def choose(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most so many prompts of each class, taken in turn from the categories, in the source's order.

    Of prompts in pairs the same pairs are kept in both classes where pairs come in the same order.
    """
    keep: set[int] = set()
    for unsafe in (False, True):
        by_category: dict[str, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            if prompt.unsafe == unsafe:
                by_category[prompt.category].append(place)
        queues = [by_category[name] for name in sorted(by_category)]
        turns = [places[i] for i in range(max(map(len, queues))) for places in queues if i < len(places)]
        keep.update(turns[:most])
    return [prompt for place, prompt in enumerate(prompts) if place in keep]
