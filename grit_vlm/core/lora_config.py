"""What a GRIT-LoRA layer is told."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any, Literal

from grit_vlm.config.model_configs import ESTIMATES, SCHEDULES
from grit_vlm.core.fisher_info import FisherInformationMatrix


class GRITLoRAConfigError(ValueError):
    """Settings that contradict themselves; the message lists all of them."""


@dataclass
class GRITLoRAConfig:
    """What a GRIT-LoRA layer is told. Defaults are the documents' where they name one.

    Attributes:
        r, lora_alpha, lora_dropout: LoRA's; the update is scaled by lora_alpha / r.
        fisher_approximation: diagonal, kfac or block_diagonal; see `grit_vlm.core.fisher_info`.
        fisher_damping: λ ≥ 0, relative to the mean of the Fisher diagonal.
        fisher_ema_decay: In [0, 1): weight that an update leaves to the past.
        fisher_update_freq: Steps ≥ 1 between two updates. In the first so many steps there is one at each: B starts at
            0, and with it all Fisher information of A.
        fisher_block_size: Coordinates n of a block at most, of estimate block_diagonal, which keeps twice
            r·(d_in + d_out)·n numbers: at r = 16, d = 4096 and n = 64, 67 MB a layer.
        fisher_min_samples: Tokens before an estimate is used.
        buffer_tokens: Tokens of a layer kept for one update at most, d_in + d_out + 2r numbers each; of a backward pass
            with more, as many as there is room for at even distances.
        enable_natural_gradient: Whether gradients are preconditioned.
        enable_projection: Whether updates are projected onto the directions of largest Fisher information. Off, unlike
            in the documents: LOG.md has what it costs.
        projection_budget_start, projection_budget_end: Directions a layer at the first step and after the last one,
            counted as `FisherInformationMatrix.project` says.
        projection_schedule: linear, cosine or adaptive.
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    fisher_approximation: Literal["diagonal", "kfac", "block_diagonal"] = "diagonal"
    fisher_damping: float = 1e-4
    fisher_ema_decay: float = 0.95
    fisher_update_freq: int = 10
    fisher_block_size: int = 64
    fisher_min_samples: int = 64
    buffer_tokens: int = 8192
    enable_natural_gradient: bool = True
    enable_projection: bool = False
    projection_budget_start: int = 32
    projection_budget_end: int = 96
    projection_schedule: Literal["linear", "cosine", "adaptive"] = "linear"

    def validate(self) -> None:
        """Raise GRITLoRAConfigError with every mistake, if there is one."""
        problems = []
        for name in (
            "r", "fisher_update_freq", "fisher_block_size", "fisher_min_samples", "buffer_tokens",
            "projection_budget_start", "projection_budget_end",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name}: expected a whole number from 1 on, got {value!r}")
        if not self.lora_alpha > 0:
            problems.append(f"lora_alpha: expected a number above 0, got {self.lora_alpha!r}")
        if not self.fisher_damping >= 0:
            problems.append(f"fisher_damping: expected a number of at least 0, got {self.fisher_damping!r}")
        for name in ("lora_dropout", "fisher_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}: expected a number in [0, 1), got {getattr(self, name)!r}")
        for name, known in (("fisher_approximation", ESTIMATES), ("projection_schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                near = difflib.get_close_matches(str(value), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}")
        if problems:
            raise GRITLoRAConfigError("\n".join(problems))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GRITLoRAConfig:
        """A validated configuration of plain values.

        Raises:
            GRITLoRAConfigError: unknown names or wrong values, all of them.
        """
        known = {field.name for field in fields(cls)}
        unknown = [
            f"unknown setting {name!r}; expected {', '.join(difflib.get_close_matches(name, known) or sorted(known))}"
            for name in values
            if name not in known
        ]
        config = cls(**{name: value for name, value in values.items() if name in known})
        try:
            config.validate()
        except GRITLoRAConfigError as error:
            unknown.append(str(error))
        if unknown:
            raise GRITLoRAConfigError("\n".join(unknown))
        return config

    def estimate(self) -> FisherInformationMatrix:
        """An estimate as set, that knows nothing yet."""
        return FisherInformationMatrix(
            self.fisher_approximation,
            self.fisher_damping,
            self.fisher_ema_decay,
            self.fisher_update_freq,
            self.fisher_block_size,
        )
