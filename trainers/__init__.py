"""One shared training path (`trainers.common`); each arm's module shows only what differs.

To add an arm: write a module with an `ARM` and name it here.
"""

BASELINE = "baseline_lora"
"""The arm that all others are compared with."""

ARMS: dict[str, str] = {
    "baseline_lora": "trainers.baseline_lora",  # TRL's SFTTrainer and AdamW: what all others are compared with
    "hybrid_grit": "trainers.hybrid_grit",
    "pure_grit": "trainers.pure_grit",
}
"""Name → module."""

VISION_ARMS: dict[str, str] = {
    "baseline_lora": "trainers.vision.baseline_lora",  # vanilla LoRA and AdamW
    "grit_vlm": "trainers.vision.grit_vlm",
}
"""The same for the vision pipeline."""

BUILDS_ON: dict[str, tuple[str, ...]] = {
    "hybrid_grit": ("grit", "trainers/pure_grit.py"),
    "pure_grit": ("grit",),
}
"""Name → packages or files of this project, besides its own module, whose code decides what the arm does."""

VISION_BUILDS_ON: dict[str, tuple[str, ...]] = {
    "baseline_lora": (
        "grit",
        "grit_vlm/config",
        "grit_vlm/core",
        "grit_vlm/data.py",
        "grit_vlm/hub_processor.py",
        "grit_vlm/models",
        "grit_vlm/pictures.py",
        "grit_vlm/utils/projection.py",
        "trainers/vision/common.py",
        "trainers/vision/settings.py",
    ),
    "grit_vlm": (
        "grit",
        "grit_vlm",
        "trainers/pure_grit.py",
        "trainers/vision/common.py",
        "trainers/vision/settings.py",
    ),
}
"""The same for the vision pipeline."""
