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

BUILDS_ON: dict[str, tuple[str, ...]] = {
    "hybrid_grit": ("grit", "trainers/pure_grit.py"),
    "pure_grit": ("grit",),
}
"""Name → packages or files of this project, besides its own module, whose code decides what the arm does."""
