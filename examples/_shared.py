"""Shared by both examples: imports from this working copy, pictures with questions, and a tiny model to adapt."""

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # so that `python examples/….py` works from any folder, installed or not
    sys.path.insert(0, str(ROOT))

from evaluation.tasks import Item, aqi_vision, render  # noqa: E402
from evaluation.vision import training_examples  # noqa: E402
from trainers.embedded_base import EmbeddedSettings, VisionTower, train_base  # noqa: E402
from trainers.pictures import VisionProcessor, load_processor  # noqa: E402
from trainers.settings import BaseReference  # noqa: E402

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"


def encode(processor: VisionProcessor, items: list[Item], taught: bool = True) -> list[Any]:
    return [processor.encode(render(TEMPLATE, i.prompt), i.completion if taught else None) for i in items]


def prepare(
    base: str | None, folder: Path, examples: int, sizes: dict[str, int]
) -> tuple[str, VisionProcessor, dict[str, list[Item]]]:
    """A base model (a tiny one by default), its processor, and questions about pictures for each split."""
    from transformers.utils import logging as their_logging

    warnings.filterwarnings("ignore")
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    base = base or _tiny_base(folder, examples)
    config = Path(base) / "config.json"
    vision = json.loads(config.read_text(encoding="utf-8")).get("vision_config", {}) if config.is_file() else {}
    items = aqi_vision.generate(sizes, seed=0, image_size=int(vision.get("image_size", 384)), folder=folder)
    return base, load_processor(BaseReference(base), folder), items


def _tiny_base(folder: Path, examples: int) -> str:
    """An Idefics3 of 0.25M parameters, trained on general questions about pictures."""
    settings = EmbeddedSettings(
        seed=0, vocab_size=400, hidden_size=64, intermediate_size=128, layers=2, heads=2, context=128,
        vision=VisionTower(image_size=32, patch_size=4, scale_factor=2, hidden_size=64, layers=2, heads=2),
        examples=examples, batch_size=32, learning_rate=3e-3, precision="fp32",
    )  # fmt: skip
    base = folder / "base"
    base.mkdir()
    pairs = training_examples(examples, settings.seed, 32, folder)
    rendered = [(render(TEMPLATE, prompt), answer) for prompt, answer in pairs]
    print(f"Training a tiny Idefics3 on {examples} general questions about pictures.")
    with contextlib.redirect_stdout(io.StringIO()):  # the Trainer's own numbers
        train_base(settings, rendered, base, folder / "checkpoints", folder)
    return str(base)
