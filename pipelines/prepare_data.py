"""Stage prepare_data: data/{train,valid,test,retention,paraphrased}.jsonl, their pictures, data/rejected.jsonl."""

import json
from pathlib import Path
from typing import Any

from db.files import artifact, finish_run, hash_inputs, sha256, staged, start_run, write_jsonl
from evaluation.sources.hub import HUB
from evaluation.sources.rows import TASK_SOURCE
from evaluation.splits import GENERATED, PrepareData, make_splits
from evaluation.tasks import Item
from pipelines.base_model import PrepareBase, control_tokens_of
from pipelines.params import StageParams, load_params, unwatched
from pipelines.stage import DATA, SPLITS, cli, main_for


class Params(StageParams):
    prepare_data: PrepareData
    prepare_base: PrepareBase  # whose control tokens no row may spell out


def user_files(source: str) -> list[Path]:
    """The user's files that a source names; hidden ones in folders are skipped, because downloads keep times there."""
    path = Path(source)
    if source in (GENERATED, TASK_SOURCE) or source.startswith(HUB):
        return []
    if path.is_dir():
        inside = (f for f in sorted(path.rglob("*")) if f.is_file())
        return [f for f in inside if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    return [path] if path.is_file() else []


def row_of(item: Item, folder: Path, drawn: bool) -> dict[str, Any]:
    """The item's line, with the hash of each of its pictures, so that a split's file changes when a picture does."""
    from trainers.pictures import references

    row = item.to_json()
    return {**row, "pictures": {path: sha256(folder / path) for path in references(item.prompt)}} if drawn else row


def run(params: Params) -> None:
    section = params.prepare_data
    files = user_files(section.source)
    inputs = hash_inputs(*files)
    with staged(DATA) as folder:
        control = [] if section.source == GENERATED else control_tokens_of(params.prepare_base)
        splits, facts = make_splits(section, folder, control)
        record = start_run("prepare_data", params={"prepare_data": section.model_dump()}, inputs=inputs)
        drawn = (folder / "images").is_dir()
        for split in SPLITS:
            file = folder / f"{split}.jsonl"
            write_jsonl(file, [row_of(item, folder, drawn) for item in splits[split]])
            record.artifacts.append(artifact("dataset", file, DATA / file.name))
        if drawn:
            facts["pictures"] = sum(1 for _ in (folder / "images").iterdir())
        record.extra = {"task": section.task, **facts, "items": {split: len(items) for split, items in splits.items()}}
        finish_run(record, folder)
    print(json.dumps(record.extra, ensure_ascii=False))
    for note in [*facts.get("notes", []), *unwatched([Path(section.source)] if files else [], "prepare_data")]:
        print(note)
    if facts.get("unused_rows"):
        print(f"{facts['unused_rows']} rows are unused: the splits are full; raise prepare_data.train_items")
    if facts.get("rejected_rows"):
        print(f"{facts['rejected_rows']} rows were rejected; data/rejected.jsonl lists them with the reasons")


if __name__ == "__main__":
    cli(lambda: main_for("prepare_data", lambda: run(load_params(Params))))
