"""A vision base of the smallest size, trained on a few pictures; as a process of its own, it can be killed."""

import sys
from pathlib import Path

from evaluation.vision import general
from trainers.embedded_vlm import EmbeddedVisionSettings, train_embedded_vlm

SETTINGS = EmbeddedVisionSettings(
    seed=0, vocab_size=320, hidden_size=16, intermediate_size=32, layers=1, heads=2, context=128, image_size=16,
    patch_size=4, scale_factor=2, vision_hidden_size=16, vision_layers=1, vision_heads=2, examples=320, batch_size=2,
    learning_rate=3e-3, precision="fp32",
)  # fmt: skip


def train(folder: Path, checkpoints: Path) -> dict:
    """Draw the pictures beside the model and train on them."""
    folder.mkdir(exist_ok=True)
    root, output = folder / "pictures", folder / "base"
    root.mkdir(exist_ok=True)
    output.mkdir(exist_ok=True)
    examples = general.training_examples(SETTINGS.examples, SETTINGS.seed, SETTINGS.image_size, root)
    examples = [(f"{prompt}\n", answer) for prompt, answer in examples]
    return train_embedded_vlm(SETTINGS, examples, root, output, checkpoints)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
