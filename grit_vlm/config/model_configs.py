"""What is adapted of a vision-language model, and how, for each modality.

Documents 001 and 003 write the same fields in two ways (`vision=` and `vision_config=`): both are taken, and both can
be read and set afterwards. Settings of a modality that are None are the configuration's global ones. Nothing is checked
before `validate`, so that settings may be changed one by one; whoever uses a configuration validates it.
"""

from __future__ import annotations

import copy
import difflib
import math
from dataclasses import InitVar, dataclass, field
from typing import Literal

from grit_vlm.config.selection import LayerSelectionStrategy, parameter_problem, whole

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
        n_layers: How many layers (blocks), of FIRST_N and LAST_N. step_size: In layers, of EVERY_NTH.
        specific_indices: Places among the matched layers, from 0, of SPECIFIC.
        rank, alpha, dropout: LoRA's; None: the global ones.
        enable_natural_gradient: Whether gradients are preconditioned. enable_projection: Whether they are projected.
        fisher_approximation: diagonal, kfac or block_diagonal.
        projection_budget: Directions a layer, fixed (on average over the modality's layers); None: the schedule's.
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
        """Every mistake that shows without a model, as a sentence."""
        found = []
        patterns: object = self.layer_patterns
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
            found.append(f"layer_patterns: expected a list of globs, got {patterns!r}")
        strategy: object = self.strategy
        if not isinstance(strategy, LayerSelectionStrategy):
            known = ", ".join(each.name for each in LayerSelectionStrategy)
            found.append(f"strategy: expected a LayerSelectionStrategy ({known}), got {strategy!r}")
        elif problem := parameter_problem(strategy, self.n_layers, self.step_size, self.specific_indices):
            found.append(problem)
        found += _one_of("fisher_approximation", self.fisher_approximation, ESTIMATES)
        for name in ("rank", "projection_budget"):
            found += _whole(name, getattr(self, name), optional=True)
        found += _number("alpha", self.alpha, above=0, optional=True)
        found += _number("dropout", self.dropout, least=0, below=1, optional=True)
        for name in ("enable_natural_gradient", "enable_projection"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name}: expected True or False, got {getattr(self, name)!r}")
        return found


def _one_of(name: str, value: object, known: tuple[str, ...]) -> list[str]:
    if value in known:
        return []
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return [f"{name}: expected one of {', '.join(known)}, got {value!r}{hint}"]


def _whole(name: str, value: object, optional: bool = False) -> list[str]:
    if (optional and value is None) or whole(value):
        return []
    return [f"{name}: expected a whole number from 1 on{', or None' if optional else ''}; got {value!r}"]


def _number(
    name: str,
    value: object,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    optional: bool = False,
) -> list[str]:
    if optional and value is None:
        return []
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and above < value and least <= value < below:  # type: ignore[operator]
        return []
    bounds = [f"above {above}"] if above > -math.inf else [f"from {least}"]
    bounds += [f"below {below}"] if below < math.inf else []
    return [f"{name}: expected a number {' and '.join(bounds)}{', or None' if optional else ''}; got {value!r}"]


@dataclass
class ModelGRITConfig:
    """A whole model: its modalities, and what holds for all of them.

    Attributes:
        model_name: For people. model_type: Family whose patterns a modality without its own takes, e.g. idefics3;
            "custom": the model's own `config.model_type`.
        global_rank, global_alpha, global_dropout: LoRA's where a modality says nothing.
        fisher_damping: λ. fisher_ema_decay: weight of the past. fisher_update_freq: steps between two updates.
        projection_budget_start, projection_budget_end: Directions at the first and the last step.
        projection_schedule: linear, cosine or adaptive.
        max_layers_per_modality: Adapted modules of one modality at most, whole blocks from the front; None: no limit.
        vision_config, text_config, cross_modal_config, fusion_config: Other names of vision, text, cross_modal, fusion.
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
        given = dict(zip(MODALITIES, (vision_config, text_config, cross_modal_config, fusion_config), strict=True))
        given = {name: other for name, other in given.items() if other is not None}
        doubled = [name for name, other in given.items() if getattr(self, name) not in (None, other)]
        if doubled:
            raise ModelConfigError(
                "\n".join(f"expected {name} or {name}_config, which are the same; got both" for name in doubled)
            )
        for name, other in given.items():
            setattr(self, name, other)

    @property
    def modalities(self) -> dict[str, ModalityConfig]:
        """Those that are adapted."""
        return {name: own for name in MODALITIES if (own := getattr(self, name)) is not None}

    def validate(self) -> None:
        """Raise ModelConfigError with every mistake, if there is one."""
        found = []
        given: dict[str, object] = dict(self.modalities)
        for name, own in given.items():
            if isinstance(own, ModalityConfig):
                found += [f"{name}.{problem}" for problem in own.problems()]
            else:
                found.append(f"{name}: expected a ModalityConfig, got {own!r}")
        if not self.modalities:
            found.append(f"expected at least one of {', '.join(MODALITIES)}, got none")
        for name in ("global_rank", "fisher_update_freq", "projection_budget_start", "projection_budget_end"):
            found += _whole(name, getattr(self, name))
        found += _whole("max_layers_per_modality", self.max_layers_per_modality, optional=True)
        found += _number("global_alpha", self.global_alpha, above=0)
        found += _number("fisher_damping", self.fisher_damping, least=0)
        for name in ("global_dropout", "fisher_ema_decay"):
            found += _number(name, getattr(self, name), least=0, below=1)
        found += _one_of("projection_schedule", self.projection_schedule, SCHEDULES)
        if found:
            raise ModelConfigError("\n".join(found))

    def copy(self) -> ModelGRITConfig:
        """One of its own, to be changed."""
        return copy.deepcopy(self)


def _alias(name: str) -> property:
    def get(config: ModelGRITConfig) -> ModalityConfig | None:
        found: ModalityConfig | None = getattr(config, name)
        return found

    def put(config: ModelGRITConfig, value: ModalityConfig | None) -> None:
        setattr(config, name, value)

    return property(get, put, doc=f"The same as {name}.")


for _name in MODALITIES:  # behind the dataclass, which would take a property for a default
    setattr(ModelGRITConfig, f"{_name}_config", _alias(_name))
