"""Processors that come with models of the Hugging Face hub, behind the interface of `grit_vlm.data`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_vlm.pictures import Row, VisionDataError, padding_id, read_images, text_tensors, with_placeholders
from trainers.data import encode_example, encode_prompt
from trainers.models import hub_reason
from trainers.settings import BaseReference

# Families whose processors make a row of prompt and answer in a way that no text of both stands for.
_OWN_FORM = ("PaliGemma",)


class HubProcessor:
    """Around the processor that comes with a model: it resizes, splits and expands pictures in the model's own way.

    Args:
        processor: transformers' processor, which has a tokenizer and makes input_ids of texts and pictures.
        root: Folder that paths in prompts start from.

    Raises:
        VisionDataError: it takes no pictures, names no placeholder, or belongs to a family with a form of its own.
    """

    def __init__(self, processor: Any, root: Path) -> None:
        name = type(processor).__name__
        if getattr(processor, "tokenizer", None) is None:
            raise VisionDataError(
                f"expected a processor of texts and pictures, got {name}: the base is no vision-language model, or its "
                "folder lacks processor_config.json and preprocessor_config.json. Take a base that pictures can be "
                "shown to, or the pipeline for text (a params.yaml without `pipeline: vision`)"
            )
        if name.startswith(_OWN_FORM):
            raise VisionDataError(
                f"expected a processor that reads prompt and answer as one text, got {name}: it ends every prompt with "
                "a line break and takes the answer apart from it. Train with grit_vlm.GRITTrainer and a collator of "
                "your own that calls this processor with text= and suffix=, or take a base of another family"
            )
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.root = root
        token = getattr(processor, "image_token", None)
        if token is None:
            raise VisionDataError(
                f"expected a processor with an image_token, got {name} without; its model shows pictures in a way of "
                "its own"
            )
        self.image_token = str(getattr(token, "content", token))

    def encode(self, prompt: str, completion: str | None = None) -> Row:
        """See `VisionProcessor`; `images` holds what the processor returns beside input_ids and attention_mask."""
        text = with_placeholders(prompt, self.image_token, self._placeholder())
        reader = _Reader(self._processor, read_images(prompt, self.root))
        if completion is None:
            ids = encode_prompt(reader, text)
            length = len(ids)
        else:
            ids, length = encode_example(reader, text, completion)
        # Of the text read last, which is the whole one; the end-of-sequence token is not in it.
        rest = len(ids) - reader.width
        extra = {
            name: [*value[0].tolist(), *[0] * rest] if tuple(value.shape) == (1, reader.width) else value
            for name, value in reader.features.items()
        }
        return {"input_ids": ids, "prompt_length": length, "images": extra}

    def _placeholder(self) -> str:
        """What the processor expands: its image token, between the marks that Qwen's models want round it."""
        vocabulary = self.tokenizer.get_vocab()
        start, end = "<|vision_start|>", "<|vision_end|>"
        marked = start in vocabulary and end in vocabulary
        return f"{start}{self.image_token}{end}" if marked else self.image_token

    def collate(self, rows: Sequence[Row], device: Any = None) -> dict[str, Any]:
        """See `VisionProcessor`; pixels come in the shape that the model's own processor gives them."""
        names = list(rows[0]["images"]) if rows else []
        per_token = [name for name in names if isinstance(rows[0]["images"][name], list)]
        batch = text_tensors(rows, padding_id(self.tokenizer), per_token)
        for name in names:
            if name not in per_token:
                batch[name] = _joined([row["images"][name] for row in rows])
        return {name: tensor.to(device) for name, tensor in batch.items()}


class _Reader:
    """A processor with its pictures at hand, called as a tokenizer is: a text in, ids out."""

    def __init__(self, processor: Any, images: Sequence[Any]) -> None:
        self._processor, self._images = processor, list(images)
        self.eos_token_id = processor.tokenizer.eos_token_id
        self.features: dict[str, Any] = {}
        self.width = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        try:
            made = dict(self._processor(text=[text], images=self._images, return_tensors="pt"))
        except (ValueError, TypeError) as error:
            name = type(self._processor).__name__
            raise VisionDataError(f"{name} refused the prompt {text[:120]!r}: {error}") from error
        ids = made.pop("input_ids")
        for name in ("attention_mask", "labels"):  # both are made of whole rows, see `text_tensors`
            made.pop(name, None)
        self.features, self.width = made, ids.shape[1]
        return {"input_ids": ids[0].tolist()}


def _joined(values: Sequence[Any]) -> Any:
    """Features of several rows as one tensor.

    Tensors [1, images, …] of one rank above the pictures of a batch, as Idefics3's pixels [1, images, 3, height, width]
    and their mask [1, images, height, width], are padded with zeros to the largest extent and stacked; others, whose
    first extent counts pictures or patches, are put one after another.
    """
    import torch

    if all(value.shape[1:] == values[0].shape[1:] for value in values):
        return torch.cat(list(values))
    largest = [max(extents) for extents in zip(*(value.shape[1:] for value in values), strict=True)]
    joined = values[0].new_zeros((sum(value.shape[0] for value in values), *largest))
    start = 0
    for value in values:
        place = (slice(start, start + value.shape[0]), *(slice(0, extent) for extent in value.shape[1:]))
        joined[place] = value
        start += value.shape[0]
    return joined


def hub_processor(base: BaseReference) -> Any:
    """The processor that comes with a model.

    Raises:
        VisionDataError: it needs torchvision, or cannot be loaded.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(base.location, **base.load_kwargs)
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" in str(error).casefold():
            raise VisionDataError(
                f"{base.location}: its image processor needs torchvision, which is not installed; install the build "
                "that belongs to this torch, with `pip install torchvision`"
            ) from error
        reason = None if Path(base.location).is_dir() else hub_reason(error, base.location)
        raise VisionDataError(f"no processor could be loaded from {base.location!r}: {reason or error}") from error
