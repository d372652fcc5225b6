"""Stage prepare_data: data/{train,valid,test,retention}.jsonl and data/rejected.jsonl."""

import json
import random
from pathlib import Path
from typing import Any

from evaluation.sources import AqiRecord, ColumnSpec, SourceSpec, read_source, write_rejected
from evaluation.tasks import Item, aqi, general
from pipelines.config import ConfigError, load_params
from pipelines.outputs import staged
from pipelines.runinfo import RunRecord, artifact, hash_inputs, write_jsonl
from pipelines.schema import Params, PrepareData
from pipelines.stage import DATA, SPLITS, main_for

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
        SourceError: the user's file cannot be read.
        ConfigError: too few rows.
    """
    sizes = {s: getattr(section, f"{s}_items") for s in ("train", "valid", "test")}
    rejected_file = folder / "rejected.jsonl"
    if section.source == "generated":
        splits = aqi.generate(
            sizes, seed=section.seed, pollutants=section.pollutants, max_pollutants=section.max_pollutants
        )
        write_rejected(rejected_file, [])
        return splits, {"source": "generated"}
    columns = {k: v if isinstance(v, str) else ColumnSpec(**v.model_dump()) for k, v in section.columns.items()}
    result = read_source(
        SourceSpec(
            source=section.source,
            split=section.hub_split,
            subset=section.hub_subset,
            delimiter=section.delimiter,
            columns=columns,
            trust_given_aqi=section.trust_given_aqi,
        )
    )
    write_rejected(rejected_file, result.rejected)
    splits, left = split_records(result.records, sizes, section.seed)
    return splits, {
        "source": section.source,
        "accepted_rows": len(result.records),
        "rejected_rows": len(result.rejected),
        "unused_rows": len(left),
        "first_unused": [item.id for item in left[:5]],
        "first_rejections": [f"row {r.row}, column {r.column}: {r.reason}" for r in result.rejected[:5]],
    }


def run(params: Params) -> None:
    """Write the data folder."""
    section = params.prepare_data
    own = Path(section.source)
    inputs = hash_inputs(own) if section.source != "generated" and own.is_file() else {}
    with staged(DATA) as folder:
        splits, facts = make_splits(section, folder)
        splits["retention"] = general.retention_items(section.retention_items_per_task, seed=0)
        record = RunRecord("prepare_data", params={"prepare_data": section.model_dump()}, inputs=inputs)
        for split in SPLITS:
            file = folder / f"{split}.jsonl"
            write_jsonl(file, [item.to_json() for item in splits[split]])
            record.artifacts.append(artifact("dataset", file, DATA / file.name))
        record.extra = {
            **facts,
            "items": {split: len(items) for split, items in splits.items()},
            "test_categories": aqi.category_counts(splits["test"]),
        }
        record.write(folder)
    print(json.dumps(record.extra, ensure_ascii=False))
    if facts.get("unused_rows"):
        print(
            f"{facts['unused_rows']} rows are not used: the splits are full; raise prepare_data.train_items to use them"
        )
    if section.source != "generated" and not section.source.startswith("hub:") and not watched(own):
        print(f"{own} lies outside {WATCHED}/, where DVC would notice a change; after one, `dvc repro -f prepare_data`")
    if facts.get("rejected_rows"):
        print(f"{facts['rejected_rows']} rows were refused; data/rejected.jsonl says which and why")


if __name__ == "__main__":
    main_for("prepare_data", lambda: run(load_params()))
