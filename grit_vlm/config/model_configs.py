"""What is adapted of a vision-language model, and how, for each modality; ready configurations for known families.

Documents 001 and 003 write the same fields in two ways (`vision=` and `vision_config=`): both are taken. Settings of a
modality that are None are the configuration's global ones.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import InitVar, dataclass, field
from typing import Literal

from grit_vlm.config.selection import LayerSelectionStrategy

MODALITIES = ("vision", "text", "cross_modal", "fusion")
ESTIMATES = ("diagonal", "kfac", "block_diagonal")
SCHEDULES = ("linear", "cosine", "adaptive")


class ModelConfigError(ValueError):
    """Settings that contradict themselves; the message lists all of them."""


@dataclass
class ModalityConfig:
    """One modality: which of its layers, and how they are trained.

    Attributes:
        layer_patterns: Globs of module names, `*` stops at dots; empty: those of the model's family.
        strategy: Which of the matched layers; see `grit_vlm.config.selection`.
        n_layers: Of FIRST_N and LAST_N. step_size: Of EVERY_NTH. specific_indices: Of SPECIFIC, from 0.
        rank, alpha, dropout: LoRA's; None: the global ones.
        enable_natural_gradient: Whether gradients are preconditioned. enable_projection: Whether they are projected.
        fisher_approximation: diagonal, kfac or block_diagonal.
        projection_budget: Directions kept, fixed; None: the schedule's.
    """

    layer_patterns: list[str] = field(default_factory=list)
    strategy: LayerSelectionStrategy = LayerSelectionStrategy.ALL
    n_layers: int | None = None
    step_size: int | None = None
    specific_indices: list[int] | None = None
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    enable_natural_gradient: bool = True
    enable_projection: bool = True
    fisher_approximation: str = "diagonal"
    projection_budget: int | None = None

    def problems(self) -> list[str]:
        """Every mistake, as a sentence."""
        found = []
        if not isinstance(self.strategy, LayerSelectionStrategy):
            found.append(f"strategy: expected a LayerSelectionStrategy, got {self.strategy!r}")
        if self.fisher_approximation not in ESTIMATES:
            near = difflib.get_close_matches(str(self.fisher_approximation), ESTIMATES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found.append(
                f"fisher_approximation: expected one of {', '.join(ESTIMATES)}, got {self.fisher_approximation!r}{hint}"
            )
        for name in ("rank", "projection_budget"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                found.append(f"{name}: expected a whole number from 1 on, or None; got {value!r}")
        if self.alpha is not None and not self.alpha > 0:
            found.append(f"alpha: expected a number above 0, or None; got {self.alpha!r}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            found.append(f"dropout: expected a number in [0, 1), or None; got {self.dropout!r}")
        return found


@dataclass
class ModelGRITConfig:
    """A whole model: its modalities, and what holds for all of them.

    Attributes:
        model_name: For people. model_type: Of transformers, e.g. idefics3; "custom": taken from the model itself.
        global_rank, global_alpha, global_dropout: LoRA's where a modality says nothing.
        fisher_damping: λ. fisher_ema_decay: weight of the past. fisher_update_freq: steps between two updates.
        projection_budget_start, projection_budget_end: Directions at the first and the last step.
        projection_schedule: linear, cosine or adaptive.
        max_layers_per_modality: Adapted modules of one modality at most; None: no limit.
    """

    model_name: str = "custom"
    model_type: str = "custom"
    vision: ModalityConfig | None = None
    text: ModalityConfig | None = None
    cross_modal: ModalityConfig | None = None
    fusion: ModalityConfig | None = None
    global_rank: int = 16
    global_alpha: float = 32
    global_dropout: float = 0.1
    fisher_damping: float = 1e-4
    fisher_ema_decay: float = 0.95
    fisher_update_freq: int = 10
    projection_budget_start: int = 32
    projection_budget_end: int = 96
    projection_schedule: Literal["linear", "cosine", "adaptive"] = "linear"
    max_layers_per_modality: int | None = None
    vision_config: InitVar[ModalityConfig | None] = None
    text_config: InitVar[ModalityConfig | None] = None
    cross_modal_config: InitVar[ModalityConfig | None] = None
    fusion_config: InitVar[ModalityConfig | None] = None

    def __post_init__(
        self,
        vision_config: ModalityConfig | None,
        text_config: ModalityConfig | None,
        cross_modal_config: ModalityConfig | None,
        fusion_config: ModalityConfig | None,
    ) -> None:
        given = (vision_config, text_config, cross_modal_config, fusion_config)
        doubled = [m for m, other in zip(MODALITIES, given, strict=True) if other is not None and getattr(self, m)]
        if doubled:
            raise ModelConfigError(
                "\n".join(f"expected {name} or {name}_config, which are the same; got both" for name in doubled)
            )
        for name, other in zip(MODALITIES, given, strict=True):
            if other is not None:
                setattr(self, name, other)

    @property
    def modalities(self) -> dict[str, ModalityConfig]:
        """Those that are adapted."""
        return {name: own for name in MODALITIES if (own := getattr(self, name)) is not None}

    def validate(self) -> None:
        """Raise ModelConfigError with every mistake, if there is one."""
        found = [f"{name}.{problem}" for name, own in self.modalities.items() for problem in own.problems()]
        if not self.modalities:
            found.append(f"expected at least one of {', '.join(MODALITIES)}, got none")
        for name in ("global_rank", "fisher_update_freq", "projection_budget_start", "projection_budget_end"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                found.append(f"{name}: expected a whole number from 1 on, got {value!r}")
        if self.max_layers_per_modality is not None and self.max_layers_per_modality < 1:
            found.append(f"max_layers_per_modality: expected at least 1, or None; got {self.max_layers_per_modality}")
        if not self.global_alpha > 0:
            found.append(f"global_alpha: expected a number above 0, got {self.global_alpha}")
        if not self.fisher_damping >= 0:
            found.append(f"fisher_damping: expected a number of at least 0, got {self.fisher_damping}")
        for name in ("global_dropout", "fisher_ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if self.projection_schedule not in SCHEDULES:
            found.append(
                f"projection_schedule: expected one of {', '.join(SCHEDULES)}, got {self.projection_schedule!r}"
            )
        if found:
            raise ModelConfigError("\n".join(found))

    def copy(self) -> ModelGRITConfig:
        """One of its own, to be changed."""
        return copy.deepcopy(self)
