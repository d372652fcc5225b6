"""Stage prepare_data of the vision pipeline: questions about pictures that it draws."""

from pathlib import Path
from typing import Any

from evaluation.tasks import Item
from evaluation.vision import general, items
from export.files import sha256
from pipelines.schema_vision import PrepareVisionData
from pipelines.stage import MANIFEST

IMAGES = "images"


def write_manifest(folder: Path) -> Path:
    """Write down the hash of every picture in `folder`/images, so that one file tells whether any has changed."""
    pictures = sorted(path for path in (folder / IMAGES).iterdir() if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in pictures]
    manifest = folder / MANIFEST.name
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


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
    manifest = write_manifest(folder)
    pictures = len(manifest.read_text(encoding="utf-8").splitlines())
    return splits, {"source": "generated", "pictures": pictures, "test_counts": items.counts(splits["test"])}
