"""The answers of all models to all items, as the sample browser reads them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.models import Run, Sample

MOST_CHARACTERS = 3_000_000
"""Of prompts, truths and answers together."""
LONGEST = 4_000
"""Characters of one text; what is cut off is said in its place."""
DISPUTED = 0.5
"""Credit between the best and the worst answer from which on models disagree."""


@dataclass(frozen=True)
class Samples:
    """What the browser shows.

    Attributes:
        models: arm, seed and split of each column of answers.
        one_seed: Whether every arm has answers with the first of `seeds`.
        items: Number of items shown.
        found: Number of items in the database.
        packed: For JSON: disputed (`DISPUTED`), models [{arm, seed}], items [{id, split, task, prompt, truth, answers,
            right}], where answers is one text or null for each model, and right one of 1, 0, p (in part), - for each
            model. Items with answers that are right in part have credit too: a number or null for each model.
        in_part: Whether any answer shown is right in part.
    """

    splits: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[str, ...]
    one_seed: bool
    items: int
    found: int
    packed: dict[str, Any]
    in_part: bool = False


@dataclass
class _Item:
    split: str
    task: str
    id: str
    prompt: str
    truth: str
    answers: list[str | None]
    credit: list[float | None]

    @property
    def right(self) -> str:
        return "".join(map(_mark, self.credit))

    @property
    def packed(self) -> dict[str, Any]:
        names = ("id", "split", "task", "prompt", "truth", "answers", "right")
        found = {name: getattr(self, name) for name in names}
        if "p" in found["right"]:
            found["credit"] = [None if credit is None else round(credit, _DIGITS) for credit in self.credit]
        return found

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.truth) + sum(len(a) for a in self.answers if a)

    @property
    def disputed(self) -> bool:
        known = [credit for credit in self.credit if credit is not None]
        return bool(known) and max(known) - min(known) >= DISPUTED


_DIGITS = 3


def _mark(credit: float | None) -> str:
    return "-" if credit is None else {0.0: "0", 1.0: "1"}.get(credit, "p")


def collect(session: Session, runs: tuple[Run, ...]) -> Samples:
    """Gather the answers of some runs, item by item; where they are too many, disputed items stay.

    Items are the same where split, id, prompt and truth are: two data sets may use the same ids.
    """
    places = {run.id: at for at, run in enumerate(runs)}
    items: dict[tuple[str, str, str, str], _Item] = {}
    query = select(
        Sample.run_id, Sample.split, Sample.task, Sample.item_id, Sample.prompt, Sample.truth, Sample.answer,
        Sample.credit,
    ).where(Sample.run_id.in_(places)).order_by(Sample.split.desc(), Sample.item_id, Sample.run_id)  # fmt: skip
    for run_id, split, task, item_id, prompt, truth, answer, credit in session.execute(query):
        key = (split, item_id, prompt, truth)
        if key not in items:
            items[key] = _Item(split, task, item_id, _cut(prompt), _cut(truth), [None] * len(runs), [None] * len(runs))
        at = places[run_id]
        items[key].answers[at] = _cut(answer)
        items[key].credit[at] = credit
    kept = _fitting(list(items.values()))
    trained = [run for run in runs if run.arm != "base"]
    seeds = dict.fromkeys(str(run.seed) for run in trained or runs)
    return Samples(
        splits=tuple(dict.fromkeys(item.split for item in kept)),
        tasks=tuple(sorted({item.task for item in kept})),
        seeds=tuple(seeds),
        one_seed={run.arm for run in trained} <= {run.arm for run in trained if str(run.seed) == next(iter(seeds))},
        items=len(kept),
        found=len(items),
        packed={
            "models": [{"arm": run.arm, "seed": str(run.seed)} for run in runs],
            "items": [item.packed for item in kept],
            "disputed": DISPUTED,
        },
        in_part=any("p" in item.right for item in kept),
    )


def _fitting(items: list[_Item]) -> list[_Item]:
    """The items that fit, disputed ones first, then evenly from every split and task; in their old order."""
    if sum(item.characters for item in items) <= MOST_CHARACTERS:
        return items
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    ranks: list[tuple[bool, float, int]] = []
    for at, item in enumerate(items):
        groups[item.split, item.task].append(at)
    for members in groups.values():
        ranks += [(not items[at].disputed, place / len(members), at) for place, at in enumerate(members)]
    kept, room = [], MOST_CHARACTERS
    for _, _, at in sorted(ranks):
        room -= items[at].characters
        if room < 0:
            break
        kept.append(at)
    return [items[at] for at in sorted(kept)]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} characters more)"
