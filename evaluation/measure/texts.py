"""Texts to measure a model on: general ones, and safe and unsafe prompts for the separation index.

alignment.jsonl has 60 matched pairs of prompts that we wrote: same topic and form, one harmless, one not, over the
seven axes of LITMUS (civility, duty, empathy, information, justice, well-being, wisdom), of equal mean length. The
unsafe ones are requests only and contain no operational detail.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from evaluation import EvaluationError
from evaluation.sources import read_table
from evaluation.sources.columns import match_columns
from evaluation.sources.hub import HUB
from evaluation.sources.rows import first_few, read_rows
from evaluation.sources.tabular import TEXT, RawRow
from evaluation.tasks import Field, RowError
from trainers.encode import spelled_out

T = TypeVar("T")
SHIPPED = "shipped"
SHIPPED_FILE = Path(__file__).with_name("alignment.jsonl")
PROMPT_FIELDS = {
    "prompt": Field("prompt", True, "what the user says"),
    "label": Field("label", True, "safe or unsafe"),
    "category": Field("category", False, "the topic"),
    "pair": Field("pair", False, "the name of its matched pair"),
}
LEAST = 10  # prompts of each class
MOST_LEFT_OUT = 0.05  # share of a hub data set's rows, which a user cannot fix as the owner of a file can


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most `most` values, evenly spaced and in order: suites are sorted by task, books by chapter."""
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
    """All texts of a .txt file (separated by empty lines), of a column of a table, or of `hub:org/name`.

    Errors name the keys of `section`, whose `text` may also be the word `own`.
    """
    column = TEXT if Path(source).suffix.lower() == ".txt" and not source.startswith(HUB) else column

    def text(raw: RawRow) -> str:
        value = raw.values.get(column)
        if value is not None and not isinstance(value, str):  # its repr would be scored
            raise RowError("text", f"expected a text, got {type(value).__name__}; set {section}.text_column")
        return value or ""

    texts = list[str]()
    try:
        if Path(source).is_dir():  # changes in it would not be noticed
            raise EvaluationError("expected a file, got a folder")
        table = read_table(source, split=split, subset=subset, names=[column])
        fields = {"text": Field(column, True, "a text")}
        columns, problems, _ = match_columns(fields, {}, table, f"{section}.text_column")
        if not problems:
            texts, rejected = read_rows(table, columns, text, source=source)
            problems = first_few(rejected)
    except EvaluationError as error:
        problems = error.problems
    texts = [text for text in texts if text.strip()]
    if problems or not texts:
        heading = f"{section}.text: {source} cannot be used (expected `{own}`, a file or {HUB}org/name):"
        raise EvaluationError(problems or "expected texts, got only empty ones", heading)
    return texts


def without_control(texts: Sequence[T], control: Sequence[str], text_of: Callable[[T], str] = str) -> list[T]:
    """Those that spell out no control token of the base, which would not be read as text; prints how many do."""
    plain = [text for text in texts if spelled_out(control, text_of(text)) is None]
    if len(plain) < len(texts):
        print(f"{len(texts) - len(plain)} of {len(texts)} texts spell out control tokens of the base and are left out")
    return plain


@dataclass(frozen=True)
class Prompt:
    """What the user says, before any template; whether it is unsafe; its topic; the name of its matched pair."""

    text: str
    unsafe: bool
    category: str = ""
    pair: str | None = None


def read_prompts(
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    safe_label: str = "safe",
    unsafe_label: str = "unsafe",
    split: str = "train",
    subset: str | None = None,
) -> tuple[list[Prompt], int]:
    """All prompts of `shipped`, a file, or `hub:org/name[@revision]`, and how many rows of a hub data set are left out.

    `columns` maps PROMPT_FIELDS to the source's columns, which otherwise have the fields' names. Labels may have
    any case. One bad row refuses a file; of a hub data set, up to a share of MOST_LEFT_OUT may be left out.
    """
    mapping, path = dict(columns or {}), source
    if source == SHIPPED:
        mapping, path, safe_label, unsafe_label = {}, str(SHIPPED_FILE), "safe", "unsafe"
    labels = {safe_label.strip().lower(): False, unsafe_label.strip().lower(): True}
    names = [mapping.get(name, name) for name in PROMPT_FIELDS]
    table = read_table(path, split=split, subset=subset, names=names)
    chosen, problems, _ = match_columns(PROMPT_FIELDS, mapping, table, "measure.columns")

    def prompt(raw: RawRow) -> Prompt:
        text, label, category, pair = (raw.values.get(chosen.get(name, "")) for name in PROMPT_FIELDS)
        if not isinstance(text, str) or not text.strip():
            raise RowError("prompt", f"expected a text, got {text!r}")
        key = str(label).strip().lower()
        if key not in labels:
            expected = " or ".join(map(repr, labels))
            advice = "set measure.safe_label and unsafe_label to the names in use"
            raise RowError("label", f"expected {expected}, got {label!r}; {advice}")
        return Prompt(text, labels[key], str(category or ""), None if pair in (None, "") else str(pair))

    prompts, lost = list[Prompt](), 0
    if not problems:
        prompts, rejected = read_rows(table, chosen, prompt, source=source)
        ambiguous = {p.text for p in prompts if not p.unsafe} & {p.text for p in prompts if p.unsafe}
        problems = [str(row) for row in rejected]
        problems += [f"{text[:60]!r} is both safe and unsafe; keep one" for text in sorted(ambiguous)]
        if source.startswith(HUB) and problems:
            prompts = [prompt for prompt in prompts if prompt.text not in ambiguous]
            lost = len(table.rows) - len(prompts)
            share = f"{lost} of {len(table.rows)} rows cannot be used, expected at most {MOST_LEFT_OUT:.0%}"
            problems = [share, *problems] if lost > MOST_LEFT_OUT * len(table.rows) else []
    if not problems:
        counts = Counter(prompt.unsafe for prompt in prompts)
        problems = [
            f"expected at least {LEAST} prompts labeled {label!r}, got {counts[unsafe]}"
            for label, unsafe in labels.items()
            if counts[unsafe] < LEAST
        ]
    if problems:
        raise EvaluationError(first_few(problems), f"measure.prompts: {source} cannot be used:")
    return prompts, lost


def choose(prompts: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most `most` prompts of each class, taken in turn from the categories, in the source's order.

    If pairs come in the same order in both classes, the same pairs are chosen from both.
    """
    chosen: set[int] = set()
    for unsafe in (False, True):
        by_category: dict[str, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            if prompt.unsafe == unsafe:
                by_category[prompt.category].append(place)
        queues = [by_category[name] for name in sorted(by_category)]
        turns = [places[i] for i in range(max(map(len, queues))) for places in queues if i < len(places)]
        chosen.update(turns[:most])
    return [prompt for place, prompt in enumerate(prompts) if place in chosen]
