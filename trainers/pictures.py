"""From prompts that show pictures to the tensors that a vision-language model takes.

A prompt shows a picture as Markdown does, `![](images/test-00012.png)`, by a path relative to a root folder. A
`VisionProcessor` puts the model's own placeholder tokens in its place and has the picture read by a processor in the
form of transformers: the one that comes with a model of the Hugging Face hub, or `EmbeddedProcessor` for the tiny
Idefics3 that stage prepare_base trains.

A row is what `encode` makes of one item: `input_ids`, `prompt_length` (how many of them are the prompt) and `images`
(what the processor made of the pictures). `collate` makes a batch of rows.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers import TrainingError
from trainers.encode import Encoded, encode_example, encode_prompt, short_enough
from trainers.models import load_tokenizer, reason_of
from trainers.settings import BaseReference

IMAGE_TOKEN = "<image>"  # noqa: S105
IGNORED = -100  # label of a token without loss, torch's default for cross-entropy
_REFERENCE = re.compile(r"!\[[^\]\n]*\]\(([^()\n]+)\)")
# Families whose processors build a row of prompt and answer that no single text of both reproduces.
_OWN_FORM = ("PaliGemma",)

Row = dict[str, Any]


def references(prompt: str) -> list[str]:
    return _REFERENCE.findall(prompt)


def without_references(prompt: str) -> str:
    """The prompt's own words, which a tokenizer is trained on."""
    return _REFERENCE.sub("", prompt)


def _read_images(prompt: str, root: Path) -> list[Any]:
    from PIL import Image

    images, problems = [], []
    for path in references(prompt):
        file = root / path
        if not file.resolve().is_relative_to(root.resolve()):
            problems.append(f"{path}: expected a path within {root}")
            continue
        try:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        except FileNotFoundError:
            problems.append(f"{file}: no such file")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{file}: no picture that Pillow can read ({error})")
    if problems:
        raise TrainingError(f"pictures of the prompt {prompt[:120]!r}: {'; '.join(problems)}")
    return images


def text_tensors(rows: Sequence[Row], tokenizer: Any, more: Mapping[str, Sequence[Any]] | None = None) -> Row:
    """input_ids, attention_mask, labels for training, and `more` of each row's tokens; all [batch, tokens]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    without = sum(len(row["input_ids"]) == row["prompt_length"] for row in rows)
    if not rows or 0 < without < len(rows):
        raise TrainingError(
            f"expected at least one row, and rows that all have a completion or all have none, got {without} of "
            f"{len(rows)} without"
        )

    def padded(values: Iterable[Sequence[float]], fill: int) -> Any:
        side = "left" if without else "right"
        return pad_sequence([torch.tensor(v) for v in values], batch_first=True, padding_value=fill, padding_side=side)

    # Padding is masked, so any id works.
    pad = next((int(t) for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    batch = {
        "input_ids": padded((row["input_ids"] for row in rows), pad),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
        **{name: padded(values, 0) for name, values in (more or {}).items()},
    }
    if not without:
        heads = [row["prompt_length"] for row in rows]
        labels = ([IGNORED] * n + row["input_ids"][n:] for n, row in zip(heads, rows, strict=True))
        batch["labels"] = padded(labels, IGNORED)
    return batch


class EmbeddedProcessor:
    """The processor of an Idefics3 whose folder has none, in the form of transformers' own.

    Every picture is resized to the vision tower's image_size and stands for (image_size // patch_size)² /
    scale_factor² placeholder tokens.
    """

    image_token = IMAGE_TOKEN

    def __init__(self, tokenizer: Any, config: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        try:
            vision = config["vision_config"]
            self.image_size, patch = int(vision["image_size"]), int(vision["patch_size"])
            scale, token_id = int(config["scale_factor"]), int(config["image_token_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                "expected vision_config.image_size, vision_config.patch_size, scale_factor and image_token_id in "
                f"config.json, got none or no number ({type(error).__name__}: {error})"
            ) from error
        self.image_seq_len = (self.image_size // patch) ** 2 // scale**2
        actual = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if actual != token_id or token_id == tokenizer.unk_token_id:
            raise TrainingError(
                f"expected the token {IMAGE_TOKEN} with the id {token_id} of config.json in the tokenizer, got "
                f"{actual}; train the base again"
            )

    def __call__(self, text: list[str], images: list[Any], return_tensors: str) -> dict[str, Any]:
        """input_ids [1, tokens], pixel_values uint8 [1, images, 3, height, width] (see `VisionProcessor.collate`)."""
        import numpy
        import torch
        from PIL import Image

        size = (self.image_size, self.image_size)
        sized = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]
        pixels = numpy.stack([numpy.asarray(image, dtype=numpy.uint8).transpose(2, 0, 1) for image in sized])
        ids = self.tokenizer(text[0].replace(IMAGE_TOKEN, IMAGE_TOKEN * self.image_seq_len))["input_ids"]
        return {"input_ids": torch.tensor([ids]), "pixel_values": torch.from_numpy(pixels)[None]}


class VisionProcessor:
    """Around a processor, which resizes, splits and expands pictures in its own way."""

    def __init__(self, processor: Any, root: Path) -> None:
        name = type(processor).__name__
        if getattr(processor, "tokenizer", None) is None:
            raise TrainingError(
                f"expected a processor of texts and pictures, got {name}: the base is no vision-language model, or its "
                "folder lacks processor_config.json and preprocessor_config.json. Take a base that pictures can be "
                "shown to, or a task without pictures"
            )
        if name.startswith(_OWN_FORM):
            raise TrainingError(
                f"expected a processor that reads prompt and answer as one text, got {name}: it ends every prompt with "
                "a line break and takes the answer apart from it. Train with grit_vlm.GRITTrainer and a collator of "
                "your own that calls this processor with text= and suffix=, or take a base of another family"
            )
        token = getattr(processor, "image_token", None)
        if token is None:
            raise TrainingError(
                f"expected a processor with an image_token, got {name} without; its model shows pictures in a way of "
                "its own"
            )
        self.processor, self.tokenizer, self.root = processor, processor.tokenizer, root
        self.image_token = str(getattr(token, "content", token))

    def encode(self, prompt: str, completion: str | None = None) -> Row:
        """One item as a row; an end-of-sequence token follows the completion. None: a prompt to be answered.

        `images` holds what the processor returns beside input_ids and attention_mask.
        """
        excerpt = prompt if len(prompt) <= 120 else f"{prompt[:120]}…"
        if self.image_token in prompt:
            raise TrainingError(
                f"expected pictures as ![](path), got the placeholder {self.image_token} itself in the prompt "
                f"{excerpt!r}; take it out"
            )
        if not references(prompt):
            raise TrainingError(f"expected a picture as ![](path), got none in the prompt {excerpt!r}")
        marks = ("<|vision_start|>", "<|vision_end|>")  # that Qwen's models need around the image token
        has_marks = set(marks) <= self.tokenizer.get_vocab().keys()
        placeholder = self.image_token.join(marks) if has_marks else self.image_token
        text = _REFERENCE.sub(lambda _: placeholder, prompt)
        reader = _Reader(self.processor, _read_images(prompt, self.root))
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

    def collate(self, rows: Sequence[Row], device: Any = None) -> dict[str, Any]:
        """A batch of rows, all with a completion or all without.

        Gives input_ids, attention_mask [batch, tokens], and the pictures in the shape that the processor gives them,
        for the embedded one pixel_values [batch, images, 3, height, width] from -1 to 1. Rows with a completion are
        padded on the right and have labels [batch, tokens], -100 on prompt and padding; rows without are padded on the
        left, to generate from.
        """
        names = list(rows[0]["images"]) if rows else []
        features = {name: [row["images"][name] for row in rows] for name in names}
        per_token = {name: values for name, values in features.items() if isinstance(values[0], list)}
        batch = text_tensors(rows, self.tokenizer, per_token)
        batch |= {name: _joined(values) for name, values in features.items() if name not in per_token}
        return {name: tensor.to(device) for name, tensor in batch.items()}


class _Reader:
    """A processor with its pictures at hand, called like a tokenizer: a text in, ids out."""

    def __init__(self, processor: Any, images: list[Any]) -> None:
        self._processor, self._images = processor, images
        self.eos_token_id = processor.tokenizer.eos_token_id
        self.eos_token = None  # a text is read as one, with all its pictures
        self.features: dict[str, Any] = {}
        self.width = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        try:
            features = dict(self._processor(text=[text], images=self._images, return_tensors="pt"))
        except (ValueError, TypeError) as error:
            name = type(self._processor).__name__
            raise TrainingError(f"{name} refused the prompt {text[:120]!r}: {error}") from error
        ids = features.pop("input_ids")
        for name in ("attention_mask", "labels"):  # both are made of whole rows, see `text_tensors`
            features.pop(name, None)
        self.features, self.width = features, ids.shape[1]
        return {"input_ids": ids[0].tolist()}


def _joined(values: Sequence[Any]) -> Any:
    """Features of several rows as one tensor, put one after another and padded with zeros to the largest extent.

    The first extent is 1, as of Idefics3's pixels [1, images, 3, height, width] and their mask [1, images, height,
    width], or counts pictures or patches. Pixels as bytes run from -1 to 1 afterwards; none of them is zero, which
    Idefics3 takes for padding, since 127.5 is no byte.
    """
    import torch

    values = [v.float() / 127.5 - 1.0 if v.dtype == torch.uint8 else v for v in values]
    largest = [max(extents) for extents in zip(*(v.shape[1:] for v in values), strict=True)]
    gaps = [[most - n for most, n in zip(largest, v.shape[1:], strict=True)] for v in values]
    pads = [[n for gap in reversed(of_row) for n in (0, gap)] for of_row in gaps]
    return torch.cat([torch.nn.functional.pad(v, pad) for v, pad in zip(values, pads, strict=True)])


def load_processor(base: BaseReference, root: Path) -> VisionProcessor:
    """The processor of a base model; paths in prompts start from `root`.

    A folder with an Idefics3 and no processor of its own, as stage prepare_base makes it, gets an `EmbeddedProcessor`.
    """
    folder = Path(base.location)
    files = [folder / name for name in ("processor_config.json", "preprocessor_config.json")]
    if (folder / "config.json").is_file() and not any(file.is_file() for file in files):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") == "idefics3":
            return VisionProcessor(EmbeddedProcessor(load_tokenizer(base), config), root)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(base.location, **base.load_kwargs)
    except (ImportError, OSError, ValueError) as error:
        if "torchvision" in str(error).casefold():
            raise TrainingError(
                f"{base.location}: its image processor needs torchvision, which is not installed; install the build "
                "that belongs to this torch, with `pip install torchvision`"
            ) from error
        why = reason_of(error, base)
        raise TrainingError(f"no processor could be loaded from {base.location!r}: {why}") from error
    return VisionProcessor(processor, root)


class PictureItems:
    """(rendered prompt, answer) pairs as a Trainer's data set; pictures are read when an item is asked for."""

    def __init__(self, processor: VisionProcessor, examples: Sequence[tuple[str, ...]]):
        self.processor, self.examples = processor, examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: int) -> Row:
        return self.processor.encode(*self.examples[place])


def encode_items(
    base: BaseReference, root: Path, examples: Sequence[tuple[str, ...]], max_length: int, *, leave_out: bool, kind: str
) -> Encoded:
    """`encode_examples` of items with pictures; every picture is read once here, so that none fails later."""
    processor = load_processor(base, root)
    lengths = [len(processor.encode(prompt, answer)["input_ids"]) for prompt, answer in examples]
    kept, left_out, longest = short_enough(lengths, max_length, leave_out=leave_out, kind=f"{kind} items")
    return Encoded(PictureItems(processor, [examples[place] for place in kept]), left_out, longest)
