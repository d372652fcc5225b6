"""Small sizes for vlm/params.yaml, at which every stage takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
ARMS = ("baseline_lora", "grit_vlm")
TEST_ITEMS, RETENTION_ITEMS = 36, 7 * 3
SMALL = {
    "prepare_data": {
        "image_size": 32, "train_items": 72, "valid_items": 18, "test_items": TEST_ITEMS, "retention_items_per_task": 3,
    },
    "prepare_base": {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 2,
        "vision_hidden_size": 32, "vision_layers": 1, "vision_heads": 2, "examples": 320, "batch_size": 16,
        "min_tasks_above_80": 0,
    },
    "train": {
        "rank": 2, "alpha": 4, "max_steps": 8, "batch_size": 4, "warmup_steps": 1, "logging_steps": 2, "eval_steps": 4,
        "save_steps": 4, "probe_every": 2,
    },
    "probe": {"twin_steps": 5},
    "evaluate": {"max_tokens": 6, "parallel": 8, "speed_repetitions": 1, "speed_prompts": 1, "speed_tokens": 3},
    "matrix": {"arms": list(ARMS), "seeds": [0]},
    "arms": {
        "baseline_lora": {},
        "grit_vlm": {"natural_gradient": {"optimizer": "grit_adam", "estimate": "kfac", "update_freq": 1}},
    },
}  # fmt: skip


def small(**more: dict[str, Any]) -> dict[str, Any]:
    """The content of vlm/params.yaml at small sizes; `more` goes on top, section by section."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "vlm/params.yaml").read_text(encoding="utf-8"))
    for section, values in [*SMALL.items(), *more.items()]:
        raw[section] = values if section == "arms" else {**raw[section], **values}
    return raw
