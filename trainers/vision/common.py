"""What the vision arms share: items with images, the model, LoRA on chosen layers, Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grit_vlm.data import VisionProcessor, load_processor
from grit_vlm.models.vlm_adapter import VLMGRITAdapter
from trainers.common import Arm, TrainingJob, say_left_out
from trainers.data import Encoded, EncodingError
from trainers.models import load_base_model
from trainers.settings import BaseReference, TrainSettings
from trainers.vision.settings import VisionTrainSettings


class VisionItems:
    """Items that are read and encoded when they are asked for, as a Trainer's data set.

    Attributes:
        processor: Of the model.
        examples: (rendered prompt with image references, answer).
    """

    def __init__(self, processor: VisionProcessor, examples: Sequence[tuple[str, str]]):
        self.processor, self.examples = processor, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.processor.encode(*self.examples[place])


def encode(job: TrainingJob, tokenizer: Any, examples: Sequence[tuple[str, str]], kind: str) -> Encoded:
    """Items within the length that is allowed; every image is read once here, so that none fails later.

    Raises:
        VisionDataError: an item without image, or an image that cannot be read. EncodingError: items too long, or none.
    """
    processor, settings = load_processor(job.base, job.images), job.settings
    lengths = [len(processor.encode(prompt, answer)["input_ids"]) for prompt, answer in examples]
    kept = [example for example, n in zip(examples, lengths, strict=True) if n <= settings.max_length]
    left_out = len(examples) - len(kept)
    longest = max(lengths, default=0)
    if left_out and settings.overlong == "refuse":
        raise EncodingError(
            f"expected at most max_length = {settings.max_length} tokens, images included, got more in {left_out} "
            f"{kind} items; set train.max_length to {longest}, or train.overlong: leave_out"
        )
    if not kept:
        raise EncodingError(f"expected at least one {kind} item of at most {settings.max_length} tokens, got none")
    encoded = Encoded(VisionItems(processor, kept), left_out, longest)
    say_left_out(encoded, len(examples), kind, settings.max_length)
    return encoded


def load_model(base: BaseReference, settings: TrainSettings) -> Any:
    """The frozen vision-language model.

    Raises:
        ModelError: nothing loadable there.
    """
    model = load_base_model(base, settings, loader="AutoModelForImageTextToText")
    model.config.get_text_config().use_cache = False
    return model


def vision_settings(settings: TrainSettings) -> VisionTrainSettings:
    """The settings, if they are those of a vision arm.

    Raises:
        TypeError: they are others.
    """
    if not isinstance(settings, VisionTrainSettings):
        raise TypeError(f"expected the settings of a vision arm, got {type(settings).__name__}")
    return settings


def adapter_of(model: Any, settings: TrainSettings) -> VLMGRITAdapter:
    """LoRA on the chosen layers of a model, or the adapter of a model that has it."""
    own = vision_settings(settings)
    return VLMGRITAdapter(model, own.model_config_of_layers(), defaults=own.layer_defaults())


def add_lora(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA; A starts random from the global seed, B at zero."""
    return adapter_of(model, settings).model


def _trainer(settings: TrainSettings, **kwargs: Any) -> Any:
    from transformers import Trainer

    return Trainer(data_collator=kwargs["train_dataset"].processor.collate, **kwargs)


def vision_arm(**changes: Any) -> Arm:
    """An arm of the vision pipeline; `changes` are fields of `trainers.common.Arm`."""
    shared: dict[str, Any] = {
        "load_model": load_model,
        "add_adapter": add_lora,
        "make_trainer": _trainer,
        "encode": encode,
        "arguments": {"remove_unused_columns": False},
    }
    return Arm(**{**shared, **changes})
