"""From prompts that show pictures to tensors that a vision-language model takes.

A prompt shows a picture as Markdown does, `![](images/test-00012.png)`, by a path relative to a root folder. A
processor puts the model's own placeholder tokens in its place and reads the picture. There are two, with one interface
(`VisionProcessor`): `EmbeddedProcessor` for the tiny Idefics3 that stage prepare_base trains, and `HubProcessor` around
the processor that comes with a model of the Hugging Face hub.

A row is what `encode` makes of one item: a dictionary with `input_ids` (list of tokens), `prompt_length` (how many of
them are the prompt) and `images` (what the processor itself made of the pictures). `collate` makes a batch of rows.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from grit_vlm.hub_processor import HubProcessor, hub_processor
from grit_vlm.pictures import (
    IGNORED,
    Row,
    VisionDataError,
    padding_id,
    read_images,
    references,
    text_tensors,
    with_placeholders,
)
from trainers.data import encode_example, encode_prompt
from trainers.models import load_tokenizer
from trainers.settings import BaseReference

__all__ = [
    "IGNORED",
    "IMAGE_TOKEN",
    "EmbeddedProcessor",
    "HubProcessor",
    "Row",
    "VisionDataError",
    "VisionProcessor",
    "load_processor",
    "references",
]

IMAGE_TOKEN = "<image>"  # noqa: S105


class VisionProcessor(Protocol):
    """What makes a vision-language model's input.

    Attributes:
        tokenizer: Of the model.
        image_token: Placeholder that is repeated for each picture in the token ids.
    """

    tokenizer: Any
    image_token: str

    def encode(self, prompt: str, completion: str | None = None) -> Row:
        """One item as a row.

        Args:
            prompt: Rendered text with one or more `![](path)`.
            completion: Right answer, which an end-of-sequence token is put behind; None to ask the model.

        Raises:
            VisionDataError: no picture is shown, or one cannot be read; names prompt and file.
        """
        ...

    def collate(self, rows: Sequence[Row], device: Any = None) -> dict[str, Any]:
        """A batch of rows, all with a completion or all without.

        Args:
            rows: From `encode`.
            device: Where the tensors go.

        Returns:
            input_ids and attention_mask [batch, tokens], and the pictures as the model takes them, for the embedded
            base pixel_values [batch, images, 3, height, width]. Rows with a completion are padded on the right and have
            labels [batch, tokens], -100 on prompt and padding; rows without are padded on the left, to generate from.

        Raises:
            VisionDataError: no rows, or some with and some without completion.
        """
        ...


class EmbeddedProcessor:
    """The processor of an Idefics3 whose folder has no image processor: pictures become squares of one size.

    Every picture is resized to the vision tower's image_size and stands for
    (image_size // patch_size)² / scale_factor² placeholder tokens; values run from -1 to 1. Pillow and numpy do it.

    Args:
        tokenizer: With `<image>` as a token of its own.
        config: The model's config.json.
        root: Folder that paths in prompts start from.

    Raises:
        VisionDataError: tokenizer and configuration do not go together.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, config: Mapping[str, Any], root: Path) -> None:
        self.tokenizer = tokenizer
        self.root = root
        try:
            vision = config["vision_config"]
            self.image_size, patch = int(vision["image_size"]), int(vision["patch_size"])
            scale, token_id = int(config["scale_factor"]), int(config["image_token_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise VisionDataError(
                "expected vision_config.image_size, vision_config.patch_size, scale_factor and image_token_id in "
                f"config.json, got none or no number ({type(error).__name__}: {error})"
            ) from error
        self.image_seq_len = (self.image_size // patch) ** 2 // scale**2
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != token_id or token_id == tokenizer.unk_token_id:
            raise VisionDataError(
                f"expected the token {IMAGE_TOKEN} with the id {token_id} of config.json in the tokenizer, got "
                f"{tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}; train the base again"
            )

    def encode(self, prompt: str, completion: str | None = None) -> Row:
        """See `VisionProcessor`; `images` is uint8 [images, 3, height, width]."""
        import numpy

        text = with_placeholders(prompt, IMAGE_TOKEN, IMAGE_TOKEN * self.image_seq_len)
        pictures = [self._pixels(image) for image in read_images(prompt, self.root)]
        if completion is None:
            ids = encode_prompt(self.tokenizer, text)
            length = len(ids)
        else:
            ids, length = encode_example(self.tokenizer, text, completion)
        return {"input_ids": ids, "prompt_length": length, "images": numpy.stack(pictures)}

    def _pixels(self, image: Any) -> Any:
        """uint8 [3, height, width]."""
        import numpy
        from PIL import Image

        size = (self.image_size, self.image_size)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        return numpy.asarray(image, dtype=numpy.uint8).transpose(2, 0, 1)

    def collate(self, rows: Sequence[Row], device: Any = None) -> dict[str, Any]:
        """See `VisionProcessor`; a row with fewer pictures than another gets empty ones, all zero."""
        import torch

        batch = text_tensors(rows, padding_id(self.tokenizer))
        most = max(len(row["images"]) for row in rows)
        # Idefics3 takes a picture of zeros for padding; none of a picture's own values is zero, since 127.5 is no byte.
        values = torch.zeros(len(rows), most, 3, self.image_size, self.image_size)
        for number, row in enumerate(rows):
            values[number, : len(row["images"])] = torch.from_numpy(row["images"]).float() / 127.5 - 1.0
        return {name: tensor.to(device) for name, tensor in {**batch, "pixel_values": values}.items()}


def load_processor(base: BaseReference, root: Path) -> VisionProcessor:
    """The processor of a base model.

    Args:
        base: A folder or a hub id. A folder with an Idefics3 and no processor of its own, as stage prepare_base makes
            it, gets an `EmbeddedProcessor`.
        root: Folder that paths in prompts start from.

    Raises:
        VisionDataError: no processor can be loaded; says what is missing.
    """
    folder = Path(base.location)
    own = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    if (folder / "config.json").is_file() and not any(file.is_file() for file in own):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") == "idefics3":
            return EmbeddedProcessor(load_tokenizer(base), config, root)
    return HubProcessor(hub_processor(base), root)
