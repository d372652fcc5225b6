"""Chapter: the answers of all models to all items, as the browser on the page reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db.runs import BASE
from evaluation.report.blocks import Block, Browser, Section, Text
from evaluation.report.comparison import Comparison

MOST_CHARACTERS = 3_000_000
"""Of prompts, truths and answers together."""
LONGEST = 4_000
"""Characters of one text; the rest is replaced by its length."""
DISPUTED = 0.5
"""Credit between the best and the worst answer from which on models disagree."""


@dataclass
class _Item:
    """Items are the same where split, id, prompt and truth are: two data sets may use the same ids."""

    split: str
    task: str
    id: str
    prompt: str
    truth: str
    answers: list[str | None]
    credit: list[float | None]
    remarks: list[str]  # on each answer, see `evaluation.tasks.Score`

    @property
    def packed(self) -> dict[str, Any]:
        right = "".join("-" if c is None else {0.0: "0", 1.0: "1"}.get(c, "p") for c in self.credit)
        packed = {**vars(self), "right": right, "credit": [None if c is None else round(c, 3) for c in self.credit]}
        absent = {*(() if "p" in right else ("credit",)), *(() if any(self.remarks) else ("remarks",))}
        return {key: value for key, value in packed.items() if key not in absent}

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.truth) + sum(len(a) for a in (*self.answers, *self.remarks) if a)

    @property
    def disputed(self) -> bool:
        credits = [credit for credit in self.credit if credit is not None]
        return bool(credits) and max(credits) - min(credits) >= DISPUTED


def samples(comparison: Comparison) -> Section | None:
    """The browser of answers; where they are too many, those on which models disagree stay."""
    runs = comparison.runs
    places = {run.id: at for at, run in enumerate(runs)}
    rows = [row for run in runs for row in run.samples]
    items: dict[tuple[str, str, str, str], _Item] = {}
    for row in sorted(rows, key=lambda row: (row.split != "test", row.split, row.item_id)):
        texts = (row.split, row.task, row.item_id, _cut(row.prompt), _cut(row.truth))
        item = items.setdefault(
            (row.split, row.item_id, row.prompt, row.truth),
            _Item(*texts, [None] * len(runs), [None] * len(runs), [""] * len(runs)),
        )
        at = places[row.run_id]
        item.answers[at], item.credit[at], item.remarks[at] = _cut(row.answer), row.credit, row.rest.get("remark", "")
    if not items:
        return None
    fitting = _fitting(list(items.values()))
    packed = [item.packed for item in fitting]
    trained = [run for run in runs if run.arm != BASE]
    seeds = tuple(dict.fromkeys(str(run.seed) for run in trained or runs))
    browser = Browser(
        splits=tuple(dict.fromkeys(item.split for item in fitting)),
        tasks=tuple(sorted({item.task for item in fitting})),
        seeds=seeds,
        one_seed={run.arm for run in trained} == {run.arm for run in trained if str(run.seed) == seeds[0]},
        packed={
            "models": [{"arm": run.arm, "seed": str(run.seed)} for run in runs],
            "items": packed,
            "disputed": DISPUTED,
        },
    )
    words: list[Block] = [
        Text("Prompt, truth, and each model's answer. Models disagree where some are right and some are wrong.")
    ]
    if any("credit" in item for item in packed):
        words.append(Text(
            "A partly right answer shows its credit, from 0 to 1. Models also disagree where the best and the worst "
            f"answer are {DISPUTED} or more apart.", "note"
        ))  # fmt: skip
    if len(fitting) < len(items):
        count = f"{len(fitting)} of {len(items)} items are in this file, disagreements first; the database has all."
        words.append(Text(count, "note"))
    return Section("Sample browser", (*words, browser))


def _fitting(items: Sequence[_Item]) -> Sequence[_Item]:
    """The items that fit, disputed ones first; in their old order."""
    room = MOST_CHARACTERS
    kept: list[int] = []
    for at in sorted(range(len(items)), key=lambda at: (not items[at].disputed, at)):
        room -= items[at].characters
        if room >= 0:
            kept.append(at)
    return [items[at] for at in sorted(kept)]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"
