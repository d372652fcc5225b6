"""Stage prepare_data: data/{train,valid,test,retention}.jsonl, and data/rejected.jsonl or pictures."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from evaluation.sources import HUB, OWN, AqiRecord, ColumnSpec, SourceSpec, read_source, write_rejected
from evaluation.tasks import Item, aqi, general, load_recipe
from pipelines.config import ConfigError, load_params
from pipelines.outputs import staged
from pipelines.recipe_data import recipe_splits
from pipelines.runinfo import RunRecord, artifact, hash_inputs, write_jsonl
from pipelines.schema import Params
from pipelines.schema_data import Column, PrepareData
from pipelines.stage import DATA, SPLITS, main_for, manifest

if TYPE_CHECKING:
    from pipelines.schema_vision import PrepareVisionData, VisionParams

WATCHED = Path("inputs")


def watched(file: Path) -> bool:
    """Whether DVC sees changes of a user's file (dvc.yaml has `inputs/` as a dependency)."""
    return file.resolve().is_relative_to(WATCHED.resolve())


def _item(record: AqiRecord, rng: random.Random) -> Item:
    """An item from a row of the user's file; the user's own texts are kept where there are any."""
    item = aqi.make_item(record.id, record.readings, rng) if record.readings else None
    index = record.given_aqi if record.given_aqi is not None else (item.truth["aqi"] if item else None)
    if index is None:
        raise ConfigError(f"{record.id}: neither readings nor an AQI to score against")
    from evaluation import epa

    truth: dict[str, Any] = {"aqi": index, "category": epa.category(index)}
    if record.readings:
        truth["readings"] = {k: str(v) for k, v in record.readings.items()}
    prompt = record.prompt if record.prompt is not None else (item.prompt if item else "")
    completion = record.completion if record.completion is not None else aqi.completion(index)
    return Item(record.id, aqi.NAME, prompt, completion, truth)


def split_records(
    records: list[AqiRecord], sizes: dict[str, int], seed: int
) -> tuple[dict[str, list[Item]], list[Item]]:
    """Items of a user's records, split at random in the proportion of `sizes`, at most `sizes` of each.

    Rows with the same readings (or, without readings, the same prompt) go to the same split.

    Returns:
        Split name → items, and the items left over when every split is full.

    Raises:
        ConfigError: too few rows to give each split one.
    """
    rng = random.Random(f"split-{seed}")
    groups: dict[Any, list[Item]] = {}
    for record in records:
        key = aqi.item_key(record.readings) if record.readings else record.prompt
        groups.setdefault(key, []).append(_item(record, rng))
    order = list(groups.values())
    rng.shuffle(order)
    if len(order) < len(sizes):
        raise ConfigError(f"prepare_data.source: expected at least {len(sizes)} different rows, got {len(order)}")
    total = sum(sizes.values())
    share = min(1.0, len(records) / total)
    wanted = {split: max(1, int(n * share)) for split, n in sizes.items()}
    splits: dict[str, list[Item]] = {split: [] for split in sizes}
    left: list[Item] = []
    for group in order:
        # Smallest splits first, so that a small file still fills test and valid.
        split = next((s for s in sorted(wanted, key=lambda s: wanted[s]) if len(splits[s]) < wanted[s]), None)
        if split is None and share < 1.0:
            split = "train"  # what rounding down the shares left over
        (left if split is None else splits[split]).extend(group)
    return splits, left


def make_splits(section: PrepareData, folder: Path) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    """All items, and numbers for run.json; refused rows go to `folder`/rejected.jsonl.

    Raises:
        SourceError: the user's file or data set cannot be read.
        ConfigError: too few rows.
    """
    if section.task != aqi.NAME:
        return recipe_splits(load_recipe(section.task), section, folder)
    rejected_file = folder / "rejected.jsonl"
    held = {s: getattr(section, f"{s}_items") for s in ("valid", "test")}
    if section.source == "generated":
        splits = aqi.generate(
            {"train": cast(int, section.train_items), **held},  # null is refused when params.yaml is read
            seed=section.seed,
            pollutants=section.pollutants,
            max_pollutants=section.max_pollutants,
        )
        write_rejected(rejected_file, [])
        return splits, {"source": "generated", "test_categories": aqi.category_counts(splits["test"])}
    columns = {
        k: ColumnSpec(**v.model_dump()) if isinstance(v, Column) else v
        for k, v in section.columns.items()
        if v is not None  # refused when params.yaml is read
    }
    result = read_source(
        SourceSpec(
            source=section.source,
            split=section.hub_split or "train",
            subset=section.hub_subset,
            delimiter=section.delimiter,
            columns=columns,
            trust_given_aqi=section.trust_given_aqi,
        )
    )
    write_rejected(rejected_file, result.rejected)
    # All rows: what validation and tests leave, which are at most half of them together.
    most = max(len(result.records) - sum(held.values()), sum(held.values()))
    sizes = {"train": section.train_items if section.train_items is not None else most, **held}
    splits, left = split_records(result.records, sizes, section.seed)
    return splits, {
        "source": section.source,
        "revision": result.revision,
        "accepted_rows": len(result.records),
        "rejected_rows": len(result.rejected),
        "unused_rows": len(left),
        "first_unused": [item.id for item in left[:5]],
        "first_rejections": [f"row {r.row}, column {r.column}: {r.reason}" for r in result.rejected[:5]],
        "test_categories": aqi.category_counts(splits["test"]),
    }


def _own_files(source: str) -> list[Path]:
    """The user's files that a source names; those of a folder without hidden ones, where downloads keep times."""
    path = Path(source)
    if source in ("generated", OWN) or source.startswith(HUB):
        return []
    if path.is_dir():
        inside = (f for f in sorted(path.rglob("*")) if f.is_file())
        return [f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    return [path] if path.is_file() else []


def run(params: "Params | VisionParams") -> None:
    """Write the data folder."""
    section = params.prepare_data
    own = _own_files(section.source) if isinstance(section, PrepareData) else []
    inputs = hash_inputs(*own)
    with staged(DATA) as folder:
        if isinstance(section, PrepareData):
            splits, facts = make_splits(section, folder)
            splits["retention"] = general.retention_items(section.retention_items_per_task, seed=0)
        else:
            from pipelines.vision_data import vision_splits

            splits, facts = vision_splits(section, folder)
        record = RunRecord("prepare_data", params={"prepare_data": section.model_dump()}, inputs=inputs)
        for split in SPLITS:
            file = folder / f"{split}.jsonl"
            write_jsonl(file, [item.to_json() for item in splits[split]])
            record.artifacts.append(artifact("dataset", file, DATA / file.name))
        for place in map(manifest, SPLITS):
            if (pictures := folder / place.name).is_file():
                record.artifacts.append(artifact("dataset", pictures, place))
        record.extra = {
            "task": section.task,
            **facts,
            "items": {split: len(items) for split, items in splits.items()},
        }
        record.write(folder)
    print(json.dumps(record.extra, ensure_ascii=False))
    _say(section, facts, watched_by_dvc=all(map(watched, own)))


def _say(section: "PrepareData | PrepareVisionData", facts: dict[str, Any], watched_by_dvc: bool) -> None:
    """What a user should know of the rows."""
    for note in facts.get("notes", []):
        print(note)
    if facts.get("unused_rows"):
        print(
            f"{facts['unused_rows']} rows are not used: the splits are full; raise prepare_data.train_items to use them"
        )
    if isinstance(section, PrepareData) and not watched_by_dvc:
        print(
            f"{section.source} lies outside {WATCHED}/, where DVC would notice a change; after one, "
            "`dvc repro -f prepare_data`"
        )
    if facts.get("rejected_rows"):
        print(f"{facts['rejected_rows']} rows were refused; data/rejected.jsonl says which and why")


if __name__ == "__main__":
    main_for("prepare_data", lambda: run(load_params()))
