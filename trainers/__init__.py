"""One shared training path (`trainers.common`); each arm's module shows only what differs.

To add an arm: write a module with an `ARM` and name it here.
"""

ARMS: dict[str, str] = {
    "baseline_lora": "trainers.baseline_lora",  # TRL's SFTTrainer and AdamW: what all others are compared with
    "pure_grit": "trainers.pure_grit",
}
"""Name → module."""

BUILDS_ON: dict[str, tuple[str, ...]] = {"pure_grit": ("grit",)}
"""Name → packages of this project, besides trainers, whose code decides what the arm does."""
