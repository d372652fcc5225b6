"""Stage prepare_data of the vision pipeline: questions about pictures that it draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.tasks import Item
from evaluation.vision import general, items
from export.files import sha256
from grit_vlm.pictures import references
from pipelines.schema_vision import PrepareVisionData
from pipelines.stage import manifest


def write_manifest(folder: Path, split: str, items: Sequence[Item]) -> int:
    """Write down the hash of every picture that a split's items show, so that one file tells whether any has changed.

    Args:
        folder: That the pictures' paths start from; gets the file.
        split: Its name.
        items: Of the split.

    Returns:
        How many pictures there are.
    """
    pictures = sorted({path for item in items for path in references(item.prompt)})
    lines = [f"{sha256(folder / path)}  {path}\n" for path in pictures]
    (folder / manifest(split).name).write_text("".join(lines), encoding="utf-8")
    return len(pictures)


def vision_splits(section: PrepareVisionData, folder: Path) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    """All items, and numbers for run.json; their pictures go to `folder`/images.

    Args:
        section: Section prepare_data.
        folder: Exists.

    Raises:
        ItemError: items cannot be made as asked.
    """
    sizes = {split: getattr(section, f"{split}_items") for split in ("train", "valid", "test")}
    splits = items.generate(sizes, seed=section.seed, image_size=section.image_size, folder=folder)
    splits["retention"] = general.retention_items(
        section.retention_items_per_task, seed=0, size=section.image_size, folder=folder
    )
    pictures = sum(write_manifest(folder, split, made) for split, made in splits.items())
    return splits, {"source": "generated", "pictures": pictures, "test_counts": items.counts(splits["test"])}
