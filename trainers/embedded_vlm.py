"""The embedded vision base: an Idefics3 of about half a million parameters, trained from nothing on general questions.

A vision tower in SigLIP's form, a linear connector and a Llama, as in Idefics3 and SmolVLM; only the sizes differ.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grit_vlm.data import IMAGE_TOKEN, EmbeddedProcessor
from grit_vlm.pictures import without_references
from trainers.base_training import base_arguments, save_base, train_base
from trainers.data import EncodingError
from trainers.embedded_base import INITIALIZER_RANGE, batched_order, tokenizer_texts, train_tokenizer
from trainers.settings import Section


class EmbeddedVisionSettings(Section):
    """Shape and training of the embedded vision base."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    vocab_size: Annotated[int, Field(ge=300, le=32000, description="pieces with byte fallback, without <image>")]
    hidden_size: Annotated[int, Field(ge=16, description="of the text model")]
    intermediate_size: Annotated[int, Field(ge=16, description="of the text model")]
    layers: Annotated[int, Field(ge=1, description="of the text model")]
    heads: Annotated[int, Field(ge=1, description="of the text model")]
    context: Annotated[int, Field(ge=32, description="tokens, those of pictures included")]
    image_size: Annotated[int, Field(ge=16, le=512, description="pixels a side")]
    patch_size: Annotated[int, Field(ge=2, description="pixels a side")]
    scale_factor: Annotated[int, Field(ge=1, description="patches a side that the connector puts into one token")]
    vision_hidden_size: Annotated[int, Field(ge=16)]
    vision_layers: Annotated[int, Field(ge=1)]
    vision_heads: Annotated[int, Field(ge=1)]
    examples: Annotated[int, Field(ge=1, description="general questions seen, each once")]
    batch_size: Annotated[int, Field(ge=1, description="questions")]
    learning_rate: Annotated[float, Field(gt=0, description="AdamW's peak")]
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _goes_together(self) -> "EmbeddedVisionSettings":
        problems = []
        if self.image_size % self.patch_size:
            problems.append(f"image_size: expected a multiple of patch_size {self.patch_size}, got {self.image_size}")
        elif (self.image_size // self.patch_size) % self.scale_factor:
            problems.append(
                f"scale_factor: expected a divisor of image_size / patch_size = {self.image_size // self.patch_size}, "
                f"got {self.scale_factor}"
            )
        for size, heads in (("hidden_size", "heads"), ("vision_hidden_size", "vision_heads")):
            width, count = getattr(self, size), getattr(self, heads)
            if width % count:
                problems.append(f"{size}: expected a multiple of {heads} {count}, got {width}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def image_seq_len(self) -> int:
        """Tokens that a picture stands for."""
        return (self.image_size // self.patch_size) ** 2 // self.scale_factor**2


def configuration(settings: EmbeddedVisionSettings, tokenizer: Any) -> Any:
    """The base's shape, an Idefics3Config.

    Args:
        settings: Of the base.
        tokenizer: With `<image>`; may have fewer pieces than the settings ask for.
    """
    from transformers import Idefics3Config

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Idefics3Config(
        vision_config={
            "hidden_size": settings.vision_hidden_size,
            "intermediate_size": 4 * settings.vision_hidden_size,
            "num_hidden_layers": settings.vision_layers,
            "num_attention_heads": settings.vision_heads,
            "image_size": settings.image_size,
            "patch_size": settings.patch_size,
            "initializer_range": INITIALIZER_RANGE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": settings.hidden_size,
            "intermediate_size": settings.intermediate_size,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.heads,
            "max_position_embeddings": settings.context,
            "initializer_range": INITIALIZER_RANGE,
            "tie_word_embeddings": True,
            **special,
        },
        scale_factor=settings.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        **special,
    )


def build_model(settings: EmbeddedVisionSettings, tokenizer: Any) -> Any:
    """An Idefics3 with random weights from settings.seed."""
    from transformers import Idefics3ForConditionalGeneration, set_seed

    set_seed(settings.seed)
    return Idefics3ForConditionalGeneration(configuration(settings, tokenizer))


def train_vision_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> Any:
    """The tokenizer of `trainers.embedded_base`, with `<image>` as a token of its own behind its pieces.

    Args:
        texts: Prompts and answers.
        vocab_size: Pieces, `<image>` not counted.
        folder: Gets the tokenizer's files.
    """
    tokenizer = train_tokenizer([without_references(text) for text in texts], vocab_size, folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def train_embedded_vlm(
    settings: EmbeddedVisionSettings,
    examples: Sequence[tuple[str, str]],
    root: Path,
    output: Path,
    checkpoints: Path,
) -> dict[str, Any]:
    """Train tokenizer and model on (rendered prompt, answer) pairs; write a Hugging Face model folder in fp16.

    Args:
        settings: Shape and training.
        examples: Each is seen once; prompts show pictures as ![](path).
        root: Folder that those paths start from.
        output: Folder for the model; exists and is empty.
        checkpoints: Outlives a kill; training goes on from a complete checkpoint found there.

    Returns:
        Numbers for run.json.

    Raises:
        grit_vlm.data.VisionDataError: a picture is missing or cannot be read.
        EncodingError: prepare_base.context is too short for a question.
    """
    from transformers import Trainer

    tokenizer = train_vision_tokenizer(tokenizer_texts(examples), settings.vocab_size, output)
    model = build_model(settings, tokenizer)
    processor = EmbeddedProcessor(tokenizer, model.config.to_dict(), root)
    rows = [processor.encode(prompt, answer) for prompt, answer in examples]
    lengths = [len(row["input_ids"]) for row in rows]
    if max(lengths) > settings.context:
        raise EncodingError(f"prepare_base.context: expected at least {max(lengths)} tokens, got {settings.context}")
    order = batched_order(lengths, settings.batch_size, settings.seed)
    arguments = base_arguments(settings, len(examples), checkpoints, save_steps=100, logging_steps=50)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[rows[i] for i in order], data_collator=processor.collate
    )
    facts = train_base(trainer, checkpoints)
    model.config.use_cache = True  # the Trainer turned it off
    save_base(model, output, checkpoints)
    return {
        **facts,
        "vocabulary": len(tokenizer),
        "tokens": sum(lengths),
        "image_tokens": settings.image_seq_len,
    }
