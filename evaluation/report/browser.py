"""The answers of all models to all items, as the browser of the page reads them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from db.queries import BASE
from evaluation.report.blocks import Block, Browser, Section, Text
from evaluation.report.comparison import Report

MOST_CHARACTERS = 3_000_000
"""Of prompts, truths and answers together."""
LONGEST = 4_000
"""Characters of one text; what is cut off is said in its place."""
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
    remarks: list[str]  # of each answer, see `evaluation.tasks.Score`

    @property
    def packed(self) -> dict[str, Any]:
        right = "".join("-" if c is None else {0.0: "0", 1.0: "1"}.get(c, "p") for c in self.credit)
        found = {**vars(self), "right": right, "credit": [None if c is None else round(c, 3) for c in self.credit]}
        absent = {*(() if "p" in right else ("credit",)), *(() if any(self.remarks) else ("remarks",))}
        return {key: value for key, value in found.items() if key not in absent}

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.truth) + sum(len(a) for a in (*self.answers, *self.remarks) if a)

    @property
    def disputed(self) -> bool:
        known = [credit for credit in self.credit if credit is not None]
        return bool(known) and max(known) - min(known) >= DISPUTED


def samples(report: Report) -> Section | None:
    """The browser of answers; where they are too many, those on which models disagree stay."""
    runs = report.results.runs
    places = {run.id: at for at, run in enumerate(runs)}
    found = sorted(
        (row for run in runs for row in report.results.samples.get(run.id, ())),
        key=lambda row: (row.split != "test", row.split, row.item_id),
    )
    if not found:
        return None
    items: dict[tuple[str, str, str, str], _Item] = {}
    for s in found:
        key = (s.split, s.item_id, s.prompt, s.truth)
        if key not in items:
            texts = (s.split, s.task, s.item_id, _cut(s.prompt), _cut(s.truth))
            items[key] = _Item(*texts, [None] * len(runs), [None] * len(runs), [""] * len(runs))
        items[key].answers[places[s.run_id]] = _cut(s.answer)
        items[key].credit[places[s.run_id]] = s.credit
        items[key].remarks[places[s.run_id]] = s.rest.get("remark", "")
    kept = _fitting(list(items.values()))
    trained = [run for run in runs if run.arm != BASE]
    seeds = tuple(dict.fromkeys(str(run.seed) for run in trained or runs))
    rows = [item.packed for item in kept]
    browser = Browser(
        splits=tuple(dict.fromkeys(item.split for item in kept)),
        tasks=tuple(sorted({item.task for item in kept})),
        seeds=seeds,
        one_seed={run.arm for run in trained} == {run.arm for run in trained if str(run.seed) == seeds[0]},
        packed={
            "models": [{"arm": run.arm, "seed": str(run.seed)} for run in runs],
            "items": rows,
            "disputed": DISPUTED,
        },
    )
    words: list[Block] = [
        Text("Prompt, truth, and what each model answered. Models disagree where some are right and some wrong.")
    ]
    if any("credit" in row for row in rows):
        told = (
            "An answer that is right in part shows its credit, from 0 to 1. Models disagree on it too where the best "
            f"and the worst answer are {DISPUTED} or more apart."
        )
        words.append(Text(told, "note"))
    if len(kept) < len(items):
        told = f"{len(kept)} of {len(items)} items are in this file, those with disagreements first"
        words.append(Text(f"{told}; the database has all.", "note"))
    return Section("Sample browser", (*words, browser))


def _fitting(items: Sequence[_Item]) -> Sequence[_Item]:
    """The items that fit, disputed ones first, then evenly from every split and task; in their old order."""
    if sum(item.characters for item in items) <= MOST_CHARACTERS:
        return items
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for at, item in enumerate(items):
        groups[item.split, item.task].append(at)
    ranks = sorted(
        (not items[at].disputed, place / len(members), at)
        for members in groups.values()
        for place, at in enumerate(members)
    )
    kept, room = [], MOST_CHARACTERS
    for _, _, at in ranks:
        room -= items[at].characters
        if room < 0:
            break
        kept.append(at)
    return [items[at] for at in sorted(kept)]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} characters more)"
