"""Stage prepare_base of the vision pipeline: trains the embedded base, and asks it."""

import shutil
from pathlib import Path
from typing import Any

from evaluation.backends.vision import VisionBackend
from evaluation.tasks import render
from evaluation.vision import general
from grit_vlm.data import load_processor
from pipelines.runinfo import hash_inputs, key_of, package_versions
from pipelines.schema_vision import PrepareVisionBase
from pipelines.stage import DATA, TRAINERS_CODE
from trainers.embedded_vlm import EmbeddedVisionSettings, train_embedded_vlm
from trainers.settings import BaseReference

PICTURES = Path("checkpoints/base-pictures")
"""Drawn anew by every start, so that they need not outlive a kill."""
PICTURES_CODE = [TRAINERS_CODE.parent / "grit_vlm" / name for name in ("data.py", "pictures.py")]
"""What turns pictures into the model's input."""


def train_base(section: PrepareVisionBase, template: str, folder: Path) -> dict[str, Any]:
    """Train the embedded base on general questions about pictures; numbers for run.json.

    Args:
        section: Section prepare_base.
        template: Text round every question.
        folder: Gets the model.
    """
    settings = EmbeddedVisionSettings(**{name: getattr(section, name) for name in EmbeddedVisionSettings.model_fields})
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir(parents=True)
    asked = general.training_examples(section.examples, section.seed, section.image_size, PICTURES)
    examples = [(render(template, prompt), answer) for prompt, answer in asked]
    code = hash_inputs(TRAINERS_CODE, *PICTURES_CODE)
    key = key_of([settings.model_dump(), examples, hash_inputs(PICTURES), package_versions(), code])
    facts = train_embedded_vlm(settings, examples, PICTURES, folder, Path("checkpoints/base") / key[:16])
    shutil.rmtree(PICTURES)
    return facts


def check_processor(reference: BaseReference) -> None:
    """Refuse a base that no picture can be shown to, before anything is trained.

    Raises:
        VisionDataError: says what is missing.
    """
    load_processor(reference, DATA)


def opened(model: Path, template: str) -> VisionBackend:
    """The trained base, to be asked about the pictures in data/."""
    return VisionBackend(BaseReference(location=str(model)), template, DATA)
