"""Safe and unsafe prompts for the Alignment Quality Index: the shipped set, a user's file, or a hub data set.

alignment.jsonl holds 60 matched pairs that we wrote: one topic and form, once harmless, once not, over the seven axes
of LITMUS (civility, duty, empathy, information, justice, well-being, wisdom), of equal mean length. The unsafe ones are
requests only and hold no operational detail.

A row that cannot be used refuses a user's file, whose owner can mend it. Nobody here can mend a hub data set: its bad
rows are left out and counted, up to MOST_LEFT_OUT of all.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.sources.readers import HUB, read_table
from evaluation.sources.types import RawRow, SourceSpec, suggest

SHIPPED = "shipped"
SHIPPED_FILE = Path(__file__).with_name("alignment.jsonl")
FIELDS = ("prompt", "label", "category", "pair")
NEEDED = ("prompt", "label")
LEAST = 10
MOST_LEFT_OUT = 0.05
_SHOWN = 5


class PromptError(ValueError):
    """Prompts that cannot be used; the message lists everything that is wrong with them."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        shown = [*problems[:_SHOWN], *([f"… and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])]
        super().__init__("\n  - ".join([f"measure.prompts: {source} cannot be used:", *shown]))


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: What the user says, before any template.
        unsafe: Its class.
        category: Topic, "" where there is none.
        pair: Name that it shares with its partner of the other class, None where there is none.
    """

    text: str
    unsafe: bool
    category: str = ""
    pair: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """What a source holds.

    Attributes:
        prompts: In the source's order.
        rows_left_out: Of a hub data set, since they cannot be used; 0 for files.
    """

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
    """All prompts of a source, in its order.

    Args:
        source: "shipped", path of a .csv or .jsonl file, or `hub:org/name[@revision]`.
        columns: Of FIELDS to the source's columns; a field that is not named is looked for under its own name. The
            shipped set has its own.
        safe_label: What stands in the label column, capitals or not.
        unsafe_label: The same for the other class.
        split: Of a hub data set.
        subset: Configuration of a hub data set that has several.

    Raises:
        SourceError: the file or data set cannot be read at all.
        PromptError: a column is missing, a row of a file is unusable (of a hub data set: more than MOST_LEFT_OUT of
            its rows), or a class has fewer than LEAST prompts.
    """
    shipped = source == SHIPPED
    file = str(SHIPPED_FILE) if shipped else source
    asked = {} if shipped else dict(columns or {})
    names = {field: asked.get(field, field) for field in FIELDS}
    labels = {safe_label.strip().lower(): False, unsafe_label.strip().lower(): True}
    if shipped:
        labels = {"safe": False, "unsafe": True}
    table = read_table(SourceSpec(source=file, columns={}, split=split, subset=subset))
    problems = [
        f"there is no column {name!r}.{suggest(name, table.columns)} Available: {', '.join(table.columns)}. "
        f"Say which it is in measure.columns, e.g. {{{field}: {table.columns[0] if table.columns else 'x'}}}"
        for field, name in names.items()
        if name not in table.columns and (field in NEEDED or field in asked)
    ]
    if problems:
        raise PromptError(source, problems)
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
        if lost <= MOST_LEFT_OUT * len(table.rows):
            problems = []
        else:
            share = f"{lost} of {len(table.rows)} rows cannot be used, expected at most {MOST_LEFT_OUT:.0%}"
            problems = [share, *problems]
    if not problems:
        for label, unsafe in labels.items():
            n = sum(prompt.unsafe == unsafe for prompt in prompts)
            if n < LEAST:
                problems.append(f"expected at least {LEAST} prompts labelled {label!r}, got {n}")
    if problems:
        raise PromptError(source, problems)
    return PromptSet(prompts, lost)


def _prompt(raw: RawRow, names: Mapping[str, str], labels: Mapping[str, bool]) -> Prompt | str:
    """The prompt of one row, or what is wrong with it."""
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

    Args:
        prompts: All.
        most: Of each class.
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
