"""What the documents' calls need: a model folder, pictures with questions, and batches of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

VISION_BLOCKS, TEXT_BLOCKS = 12, 30  # those of SmolVLM-256M, which the documents have in mind


@dataclass
class World:
    """A tiny Idefics3 with the depths of SmolVLM-256M and random weights, in a folder of its own.

    Attributes:
        folder: Model and tokenizer, in the place of a hub id.
        processor: Of the model.
        dataset: Questions about pictures: a list of the tensors of one item each.
    """

    folder: str
    processor: Any
    dataset: list

    def model(self):
        import torch
        from transformers import Idefics3ForConditionalGeneration

        torch.manual_seed(0)
        return Idefics3ForConditionalGeneration.from_pretrained(self.folder)

    def batch(self, start=0, size=4):
        """Items of the dataset as one batch, whose tensors are attributes too, as the documents write them."""
        import torch
        from transformers import BatchFeature

        rows = self.dataset[start : start + size]
        return BatchFeature({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def build(folder: Path) -> World:
    from evaluation.vision.items import generate
    from grit_vlm.data import EmbeddedProcessor
    from trainers.embedded_vlm import EmbeddedVisionSettings, build_model, train_vision_tokenizer

    settings = EmbeddedVisionSettings(
        seed=0, vocab_size=300, hidden_size=32, intermediate_size=64, layers=TEXT_BLOCKS, heads=2, context=128,
        image_size=16, patch_size=8, scale_factor=1, vision_hidden_size=32, vision_layers=VISION_BLOCKS,
        vision_heads=2, examples=1, batch_size=1, learning_rate=1e-3, precision="fp32",
    )  # fmt: skip
    items = generate({"train": 18}, seed=0, image_size=16, folder=folder)["train"]
    base = folder / "base"
    base.mkdir()
    tokenizer = train_vision_tokenizer([text for i in items for text in (i.prompt, i.completion)], 300, base)
    model = build_model(settings, tokenizer)
    model.save_pretrained(base)
    processor = EmbeddedProcessor(tokenizer, model.config.to_dict(), folder)
    whole = processor.collate([processor.encode(item.prompt, item.completion) for item in items])
    return World(str(base), processor, [{name: whole[name][i] for name in whole} for i in range(len(items))])
