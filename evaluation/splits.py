"""Section prepare_data, and the items it asks for: drawn by the task, or made of rows and divided into splits.

No group of items, such as the questions about one passage, is in two splits.
"""

import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from evaluation import paraphrase
from evaluation.epa import POLLUTANTS
from evaluation.sources.hub import HUB
from evaluation.sources.rows import OWN, RecipeRows, RowSource, commonest, read_recipe, write_rejected
from evaluation.sources.tables import FILES
from evaluation.tasks import Item, ItemError, general, load, names
from trainers.settings import Positive, Seed
from trainers.words import suggest

GENERATED = "generated"
REJECTED = "rejected.jsonl"
_ON_HUB = re.compile(rf"{HUB}[^/@\s]+/[^/@\s]+(@\S+)?")


class PrepareData(RowSource):
    task: str
    trust_given_aqi: bool
    seed: Seed
    train_items: Positive | None
    valid_items: Positive
    test_items: Positive
    pollutants: list[str] = Field(min_length=1)
    max_pollutants: Positive
    image_size: Annotated[int, Field(ge=16, le=512, description="width and height, pixels")] | None
    vary: Annotated[float, Field(ge=0, le=1)]
    paraphrased_items: Annotated[int, Field(ge=0)]
    retention_items_per_task: Positive

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        if task not in names():
            raise ValueError(f"unknown task {task!r}{suggest(task, names())}")
        return task

    @field_validator("source")
    @classmethod
    def _source(cls, source: str) -> str:
        if not source.strip():
            raise ValueError("expected generated, hub, hub:org/name, a file or a folder, got nothing")
        if source.startswith(HUB) and not _ON_HUB.fullmatch(source):
            raise ValueError("expected hub:org/name or hub:org/name@revision, as on the data set's page")
        return source

    @field_validator("pollutants")
    @classmethod
    def _pollutants(cls, keys: list[str]) -> list[str]:
        if unknown := [f"unknown pollutant {key!r}{suggest(key, POLLUTANTS)}" for key in keys if key not in POLLUTANTS]:
            raise ValueError("; ".join(unknown))
        return keys

    @model_validator(mode="after")
    def _fits_the_task(self) -> "PrepareData":
        task = load(self.task)
        drawn, fields = self.source == GENERATED, getattr(task, "FIELDS", {})
        pictures = "image_size" in getattr(task, "SETTINGS", ())
        possible = [
            *([GENERATED] if hasattr(task, "generate") else []),
            *([OWN] if hasattr(task, "SOURCE") else []),
            *(["hub:org/name, a file or a folder"] if fields else []),
        ]
        problems = []
        if (drawn and not hasattr(task, "generate")) or (self.source == OWN and not hasattr(task, "SOURCE")):
            problems.append(f"source: expected {', '.join(possible)}, got {self.source!r} of the task {self.task}")
        elif not (drawn or fields):
            problems.append(f"source: expected {GENERATED}, got {self.source!r}; {self.task} reads no rows")
        problems += [
            f"columns.{name}: expected a column, got null; leave {name} out"
            for name, column in self.columns.items()
            if column is None and name in fields and fields[name].column is None
        ]
        if (
            fields
            and not (drawn or self.source == OWN or self.columns)
            and all(own.column is None for own in fields.values())
        ):
            problems.append("columns: a source of your own needs a mapping, e.g. {pm25: PM2.5_ugm3}")
        if drawn and self.train_items is None:
            problems.append("train_items: expected a number, got null; generated items have no end")
        if pictures and self.image_size is None:
            problems.append(f"image_size: expected a number of pixels, got null; {self.task} draws pictures")
        refused: dict[str, str] = {} if pictures else {"image_size": f"{self.task} draws no pictures"}
        if drawn:
            refused["max_chars"] = f"{self.source} items are as long as they are made"
        if drawn or Path(self.source).suffix.lower() in FILES:
            whole = f"{self.source} has no splits or subsets"
            refused |= dict.fromkeys(("hub_split", "hub_subset", "hub_test_split"), whole)
        problems += [
            f"{name}: expected null, got {value!r}; {why}"
            for name, why in refused.items()
            if (value := getattr(self, name)) is not None
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def make_splits(section: PrepareData, folder: Path) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    """Items of train, valid, test, retention and paraphrased, and what run.json says of them.

    Pictures go to `folder`/images, refused rows to `folder`/rejected.jsonl. SourceError or ItemError.
    """
    task = load(section.task)
    drawing = {name: getattr(section, name) for name in getattr(task, "SETTINGS", ())}
    if section.source == GENERATED:
        sizes = {split: getattr(section, f"{split}_items") for split in ("train", "valid", "test")}
        splits = task.generate(sizes, seed=section.seed, folder=folder, **drawing)
        write_rejected(folder / REJECTED, [])
        facts: dict[str, Any] = {"source": GENERATED}
    else:
        splits, facts = _from_rows(section, folder)
    if hasattr(task, "facts"):
        facts |= task.facts(splits["test"])
    if hasattr(task, "retention_items"):
        splits["retention"] = task.retention_items(section.retention_items_per_task, seed=0, folder=folder, **drawing)
    else:
        splits["retention"] = general.retention_items(section.retention_items_per_task, seed=0)
    splits["train"] = paraphrase.varied(splits["train"], task, section.vary, section.seed)
    # A suite of the task's own shows pictures, and so do its test items: they stand for both.
    suites = [("test", task), *([] if hasattr(task, "retention_items") else [("retention", general)])]
    splits[paraphrase.SPLIT] = [
        again
        for split, own in suites
        for again in paraphrase.asked_again(splits[split], own, section.paraphrased_items, section.seed)
    ]
    return splits, facts


def _from_rows(section: PrepareData, folder: Path) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    task = load(section.task)
    rows = read_recipe(task, section)
    write_rejected(folder / REJECTED, rows.rejected)
    told = task.complete([*rows.train, *(rows.test or ())]) if hasattr(task, "complete") else []
    sizes = {"train": section.train_items, "valid": section.valid_items, "test": section.test_items}
    division = divide(rows.train, rows.test, task.group, sizes, section.seed)
    drawn = {item.id for item in division.splits["test"]}
    untested = sum(item.id not in drawn for item in rows.test or ())
    return division.splits, {
        **rows.facts,
        "accepted_rows": len(rows.train) + len(rows.test or ()),
        "rejected_rows": len(rows.rejected),
        "duplicate_rows": rows.duplicates,
        "too_long_rows": rows.too_long,
        "apart_rows": len(division.apart),
        "first_apart": [item.id for item in division.apart[:5]],
        "untested_rows": untested,
        "unused_rows": len(division.left),
        "first_unused": [item.id for item in division.left[:5]],
        "first_rejections": [f"{r.split} row {r.row}, column {r.column}: {r.reason}" for r in rows.rejected[:5]],
        "notes": [*rows.notes, *told, *_notes(rows, division, section, untested)],
    }


@dataclass(frozen=True)
class Division:
    splits: dict[str, list[Item]]  # train, valid and test
    apart: list[Item]  # for training, but sharing a group or a prompt with a test item: in use nowhere
    left: list[Item]  # for which no split has room


def divide(
    pool: Sequence[Item],
    test: Sequence[Item] | None,
    group: Callable[[Item], Hashable],
    sizes: Mapping[str, int | None],
    seed: int,
) -> Division:
    """Draws the splits: of `pool` training and validation, and tests where there are no items of their own.

    Items of one group stay together. `sizes` are upper bounds (None for train: all); of too small a pool validation and
    tests get their share, at most half together where train is None. ItemError where there are too few groups.
    """
    rng = random.Random(f"split-{seed}")
    splits: dict[str, list[Item]] = {"train": [], "valid": [], "test": []}
    apart: list[Item] = []
    held = ["valid", "test"]
    if test is not None:
        splits["test"] = rng.sample(list(test), min(len(test), sizes["test"] or 0))
        held = ["valid"]
        # Two rows of one prompt are never apart, whatever a task's groups are.
        tested = {(kind, key) for item in splits["test"] for kind, key in _keys(item, group)}
        known = [not tested.isdisjoint(_keys(item, group)) for item in pool]
        apart = [item for item, both in zip(pool, known, strict=True) if both]
        pool = [item for item, both in zip(pool, known, strict=True) if not both]
    groups: dict[Hashable, list[Item]] = {}
    for item in pool:
        groups.setdefault(group(item), []).append(item)
    order = list(groups.values())
    rng.shuffle(order)
    if len(order) <= len(held):
        aside = f" beside {len(apart)} that share a group with a test item" if apart else ""
        raise ItemError(
            f"prepare_data.source: expected at least {len(held) + 1} different rows (of different groups) for train, "
            f"{' and '.join(held)}, got {len(order)}{aside}"
        )
    wanted = _wanted(len(pool), {split: sizes[split] or 0 for split in held}, sizes["train"])
    # The largest group is trained on; else one that holds most of a data set might leave nothing to train on.
    rest = [order.pop(max(range(len(order)), key=lambda place: len(order[place])))]
    smallest_first = sorted(wanted, key=lambda split: wanted[split])
    for split in smallest_first:
        fits = (place for place, members in enumerate(order) if len(members) <= wanted[split])
        splits[split] = order.pop(next(fits, min(range(len(order)), key=lambda place: len(order[place]))))
    for members in order:
        room = (split for split in smallest_first if len(splits[split]) + len(members) <= wanted[split])
        split = next(room, "")
        splits[split].extend(members) if split else rest.append(members)
    rng.shuffle(rest)
    items = [item for members in rest for item in members]
    splits["train"] = items[: sizes["train"]]
    return Division(splits, apart, items[len(splits["train"]) :])


def _keys(item: Item, group: Callable[[Item], Hashable]) -> set[tuple[str, Hashable]]:
    return {("group", group(item)), ("prompt", item.asked)}


def _wanted(rows: int, held: dict[str, int], train: int | None) -> dict[str, int]:
    """Items of the splits that are held out: as asked for, or their share of too few rows."""
    asked = sum(held.values())
    total = asked + (train if train is not None else max(rows - asked, asked))
    share = min(1.0, rows / total)
    return {split: max(1, int(n * share)) for split, n in held.items()}


def _notes(rows: RecipeRows, division: Division, section: PrepareData, untested: int) -> list[str]:
    notes = []
    for split, share in rows.most_refused.items():
        most = commonest([rejection for rejection in rows.rejected if rejection.split == split])[0]
        notes.append(
            f"WARNING: {share:.0%} of the rows of split {split!r} were refused, more than half; check columns and "
            f"max_chars. Most often ({len(most)}): {most[0].reason}"
        )
    for split in ("valid", "test"):
        asked, got = getattr(section, f"{split}_items"), len(division.splits[split])
        if got != asked:
            notes.append(f"prepare_data.{split}_items: {got} instead of {asked}, as the rows and their groups allow.")
    if untested:
        notes.append(
            f"{untested} rows of the split for tests are not drawn; prepare_data.test_items says how many are."
        )
    if division.apart:
        notes.append(f"{len(division.apart)} rows share a group or a prompt with a test item and are not trained on.")
    return notes
