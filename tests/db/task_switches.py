"""Results of one task take the place of another's."""

from __future__ import annotations

from pathlib import Path

from tests.evaluation.task_tree import ALPACA, GSM8K, add_precisions, add_task, credits_of

F16, Q8 = credits_of("pure_grit", 0, 0.2), credits_of("pure_grit", 1, 0.1)


def to_gsm8k(tree: Path) -> None:
    """Right or wrong; base, baseline_lora and pure_grit with one seed."""
    for folder in ("quantized", "verified", "measured"):
        for file in (tree / folder).rglob("run.json"):
            file.unlink()
            for result in file.parent.glob("*.json*"):
                result.unlink()
    add_task(tree, GSM8K, binary=True, day=22)


def to_alpaca(tree: Path) -> None:
    """Credit for parts, and precisions of one arm."""
    add_task(tree, ALPACA, day=23)
    add_precisions(tree, ALPACA, "pure_grit", {"f16": F16, "q8_0": Q8})
