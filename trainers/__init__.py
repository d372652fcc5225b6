"""One training path, `trainers.run`; each file in `trainers/arms/` shows only what its arm does differently."""

BASELINE = "baseline_lora"
"""The arm that all others are compared with."""


class TrainingError(ValueError):
    """Settings, data, a model or an adapter that cannot be used for training; the message says what to change."""
