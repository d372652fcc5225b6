"""What both examples need: the packages of this working copy, pictures with questions, and a tiny model to adapt."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # so that `python examples/….py` works from any folder, installed or not
    sys.path.insert(0, str(ROOT))

from evaluation.tasks import Item, render  # noqa: E402
from trainers.embedded_vlm import EmbeddedVisionSettings  # noqa: E402

TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
PIPELINE_BASE = ROOT / "vlm" / "models" / "base"
"""Where `make repro-vlm` puts the model that it has trained."""

# An Idefics3 like the pipeline's (vlm/params.yaml), somewhat smaller: about a quarter of a million parameters.
SHAPE = EmbeddedVisionSettings(
    seed=0, vocab_size=400, hidden_size=64, intermediate_size=128, layers=2, heads=2, context=128,
    image_size=32, patch_size=4, scale_factor=2, vision_hidden_size=64, vision_layers=2, vision_heads=2,
    examples=1, batch_size=32, learning_rate=3e-3, precision="fp32",
)  # fmt: skip


def quiet() -> None:
    """No progress bars and no notes of other libraries between what an example says."""
    from transformers.utils import logging as their_logging

    warnings.filterwarnings("ignore")
    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def work_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes away in the end."""
    return tempfile.TemporaryDirectory(prefix="grit-vlm-")


def image_size(base: str) -> int:
    """Side of the pictures that suit a model, in pixels."""
    config = Path(base) / "config.json"
    if not config.is_file():
        return 384
    import json

    vision = json.loads(config.read_text(encoding="utf-8")).get("vision_config", {})
    return int(vision.get("image_size", 384))


def questions(folder: Path, sizes: dict[str, int], size: int) -> dict[str, list[Item]]:
    """Split → questions about the air quality that pictures in `folder`/images show; no picture is in two splits."""
    from evaluation.vision.items import generate

    return generate(sizes, seed=0, image_size=size, folder=folder)


def rendered(items: list[Item]) -> list[tuple[str, str]]:
    """(prompt, answer) of each."""
    return [(render(TEMPLATE, item.prompt), item.completion) for item in items]


def random_base(folder: Path) -> str:
    """A model folder with random weights, and a tokenizer for these questions."""
    from evaluation import epa
    from evaluation.vision.items import WORDINGS
    from trainers.embedded_vlm import build_model, train_vision_tokenizer

    base = folder / "base"
    base.mkdir()
    texts = [*(render(TEMPLATE, f"\n{question}") for question in WORDINGS), *epa.CATEGORIES]
    build_model(SHAPE, train_vision_tokenizer(texts * 20, SHAPE.vocab_size, base)).save_pretrained(base)
    return str(base)


def trained_base(folder: Path, examples: int) -> str:
    """A model folder, trained for a short time on general questions about pictures: colours, shapes, bars, needles."""
    from evaluation.vision.general import training_examples
    from trainers.embedded_vlm import train_embedded_vlm

    base = folder / "base"
    base.mkdir()
    settings = SHAPE.model_copy(update={"examples": examples})
    pairs = training_examples(examples, settings.seed, settings.image_size, folder)
    told = [(render(TEMPLATE, prompt), answer) for prompt, answer in pairs]
    train_embedded_vlm(settings, told, folder, base, folder / "checkpoints")
    return str(base)
