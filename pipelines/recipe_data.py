"""Training, validation and test items of a recipe's rows, none of whose groups is in two splits."""

import random
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.sources import ColumnSpec, RecipeRows, RecipeSpec, read_recipe, write_rejected
from evaluation.tasks import Item, Recipe
from pipelines.config import ConfigError
from pipelines.schema_data import Column, PrepareData


@dataclass(frozen=True)
class Division:
    """Where the items went.

    Attributes:
        splits: train, valid and test → items.
        apart: Items for training that share a group or a prompt with a test item, in use nowhere.
        left: Items for which no split has room.
    """

    splits: dict[str, list[Item]]
    apart: list[Item]
    left: list[Item]


def divide(
    pool: Sequence[Item],
    test: Sequence[Item] | None,
    group: Callable[[Item], Hashable],
    sizes: Mapping[str, int | None],
    seed: int,
) -> Division:
    """Draws the splits.

    Args:
        pool: Items for training and validation, and for tests where `test` is None.
        test: Items for tests alone.
        group: Items of one group stay together.
        sizes: train, valid, test → how many at most; None for train: all. Of too small a pool validation and tests
            get their share, at most half of it together where train is None.
        seed: Same seed, same splits.

    Raises:
        ConfigError: too few groups to give each split one.
    """
    rng = random.Random(f"split-{seed}")
    splits: dict[str, list[Item]] = {"train": [], "valid": [], "test": []}
    apart: list[Item] = []
    held = ["valid", "test"]
    if test is not None:
        splits["test"] = rng.sample(list(test), min(len(test), sizes["test"] or 0))
        held = ["valid"]
        # Two rows of one prompt are never apart, whatever a recipe's groups are.
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
        raise ConfigError(
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
    return {("group", group(item)), ("prompt", item.prompt)}


def _wanted(rows: int, held: dict[str, int], train: int | None) -> dict[str, int]:
    """Items of the splits that are held out: as asked for, or their share of too few rows."""
    asked = sum(held.values())
    total = asked + (train if train is not None else max(rows - asked, asked))
    share = min(1.0, rows / total)
    return {split: max(1, int(n * share)) for split, n in held.items()}


def recipe_splits(recipe: Recipe, section: PrepareData, folder: Path) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    """All items of a recipe, and what run.json says of them; refused rows go to `folder`/rejected.jsonl.

    Raises:
        SourceError: the data set cannot be read, or no row is left.
        ConfigError: too few rows.
    """
    columns = {k: ColumnSpec(**v.model_dump()) if isinstance(v, Column) else v for k, v in section.columns.items()}
    spec = RecipeSpec(
        source=section.source,
        columns=columns,
        split=section.hub_split,
        test_split=section.hub_test_split,
        subset=section.hub_subset,
        delimiter=section.delimiter,
        max_chars=section.max_chars,
    )
    rows = read_recipe(recipe, spec)
    write_rejected(folder / "rejected.jsonl", rows.rejected)
    sizes = {"train": section.train_items, "valid": section.valid_items, "test": section.test_items}
    division = divide(rows.train, rows.test, recipe.group, sizes, section.seed)
    untested = _untested(rows, division)
    facts = {
        **rows.facts,
        "accepted_rows": len(rows.train) + len(rows.test or ()),
        "rejected_rows": len(rows.rejected),
        "duplicate_rows": rows.duplicates,
        "too_long_rows": rows.too_long,
        "apart_rows": len(division.apart),
        "first_apart": [item.id for item in division.apart[:5]],
        "untested_rows": len(untested),
        "unused_rows": len(division.left),
        "first_unused": [item.id for item in division.left[:5]],
        "first_rejections": [f"{r.split} row {r.row}, column {r.column}: {r.reason}" for r in rows.rejected[:5]],
        "notes": [*rows.notes, *_notes(rows, division, section, len(untested))],
    }
    return division.splits, facts


def _untested(rows: RecipeRows, division: Division) -> list[Item]:
    """Items of the split for tests that were not drawn."""
    drawn = {item.id for item in division.splits["test"]}
    return [item for item in rows.test or () if item.id not in drawn]


def _notes(rows: RecipeRows, division: Division, section: PrepareData, untested: int) -> list[str]:
    notes = []
    for split, share in rows.most_refused.items():
        kinds: dict[str, list[str]] = {}
        for rejection in rows.rejected:
            if rejection.split == split:  # "expected at most 400 characters, got 512" is the same as "…, got 640"
                kind = re.sub("[0-9]+", "#", rejection.reason.partition(", got ")[0])
                kinds.setdefault(kind, []).append(rejection.reason)
        most = max(kinds.values(), key=len)
        notes.append(
            f"WARNING: {share:.0%} of the rows of split {split!r} were refused, more than half; check columns and "
            f"max_chars. Most often ({len(most)}): {most[0]}"
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
