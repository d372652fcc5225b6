"""Pictures in prompts, and rows padded to a batch: what every processor of `grit_vlm.data` does alike."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.data import EncodingError

IGNORED = -100
"""Label of a token without loss, torch's default for cross-entropy."""

_REFERENCE = re.compile(r"!\[[^\]\n]*\]\(([^()\n]+)\)")

Row = dict[str, Any]


class VisionDataError(EncodingError):
    """Prompts or pictures that cannot be turned into a model's input."""


def references(prompt: str) -> list[str]:
    """The paths of the pictures that a prompt shows, in order."""
    return _REFERENCE.findall(prompt)


def without_references(prompt: str) -> str:
    """The prompt's own words, as a tokenizer is trained on them."""
    return _REFERENCE.sub("", prompt)


def with_placeholders(prompt: str, token: str, replacement: str) -> str:
    """The prompt with `replacement` for each picture.

    Raises:
        VisionDataError: it shows none, or holds the placeholder itself.
    """
    shown = prompt if len(prompt) <= 120 else f"{prompt[:120]}…"
    if token in prompt:
        raise VisionDataError(
            f"expected pictures as ![](path), got the placeholder {token} itself in the prompt {shown!r}; take it out"
        )
    if not references(prompt):
        raise VisionDataError(f"expected a picture as ![](path), got none in the prompt {shown!r}")
    return _REFERENCE.sub(lambda _: replacement, prompt)


def read_images(prompt: str, root: Path) -> list[Any]:
    """The pictures that a prompt shows, as PIL images in RGB.

    Args:
        prompt: With `![](path)`.
        root: Folder that the paths start from.

    Raises:
        VisionDataError: names every file that is missing, is no image or lies outside `root`, and the prompt.
    """
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
        raise VisionDataError(f"pictures of the prompt {prompt[:120]!r}: {'; '.join(problems)}")
    return images


def is_asked(rows: Sequence[Row]) -> bool:
    """Whether the rows have no completion.

    Raises:
        VisionDataError: no rows, or some have one.
    """
    if not rows:
        raise VisionDataError("expected at least one row to make a batch of, got none")
    asked = [len(row["input_ids"]) == row["prompt_length"] for row in rows]
    if len(set(asked)) > 1:
        raise VisionDataError(
            f"expected rows that all have a completion or all have none, got {sum(asked)} of {len(rows)} without"
        )
    return bool(asked[0])


def text_tensors(rows: Sequence[Row], pad_id: int, per_token: Sequence[str] = ()) -> dict[str, Any]:
    """input_ids, attention_mask, in training labels, and what else there is for each token; all [batch, tokens]."""
    import torch

    asked = is_asked(rows)
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[int], fill: int) -> list[int]:
        rest = [fill] * (width - len(values))
        return [*rest, *values] if asked else [*values, *rest]

    batch = {
        "input_ids": [padded(row["input_ids"], pad_id) for row in rows],
        "attention_mask": [padded([1] * len(row["input_ids"]), 0) for row in rows],
        **{name: [padded(row["images"][name], 0) for row in rows] for name in per_token},
    }
    if not asked:
        batch["labels"] = [
            padded([IGNORED] * row["prompt_length"] + row["input_ids"][row["prompt_length"] :], IGNORED) for row in rows
        ]
    return {name: torch.tensor(values) for name, values in batch.items()}


def padding_id(tokenizer: Any) -> int:
    """Id that batches are padded with; it is masked, so any will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
