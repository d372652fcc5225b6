"""What of a vision-language model is adapted, and how, for each modality.

Settings of a modality that are None are the configuration's global ones. Nothing is checked before `validate`, so
settings may be changed one by one; whoever uses a configuration validates it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from grit_vlm.config.checks import is_whole, number, one_of, whole
from grit_vlm.config.selection import LayerSelectionStrategy, SelectionError

MODALITIES = ("vision", "text", "cross_modal", "fusion")
_S = LayerSelectionStrategy
ESTIMATES = ("diagonal", "kfac", "block_diagonal")
SCHEDULES = ("linear", "cosine", "adaptive")


class ModelConfigError(ValueError):
    """Settings that contradict each other; the message lists all of them."""


def _shared_problems(config: Any, rank: str, alpha: str, dropout: str) -> list[str]:
    """Mistakes in what both a layer and a whole model have, where three of the names differ."""
    found = []
    for name in (rank, "fisher_update_freq", "projection_budget_start", "projection_budget_end"):
        found += whole(name, getattr(config, name))
    found += number(alpha, getattr(config, alpha), above=0)
    found += number("fisher_damping", config.fisher_damping, least=0)
    for name in (dropout, "fisher_ema_decay"):
        found += number(name, getattr(config, name), least=0, below=1)
    return found + one_of("projection_schedule", config.projection_schedule, SCHEDULES)


@dataclass
class GRITLoRAConfig:
    """Settings of a GRIT-LoRA layer. Defaults are the documents' where they name one.

    Estimates are updated at each of the first `fisher_update_freq` steps: B starts at 0, and with it all Fisher
    information of A. Block-diagonal ones keep twice r·(d_in + d_out)·n numbers: at r = 16, d = 4096 and n = 64, 67 MB a
    layer. Of a backward pass with more tokens than there is room for, as many are kept at even distances.
    """

    r: int = 16
    lora_alpha: float = 32  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.1
    fisher_approximation: Literal["diagonal", "kfac", "block_diagonal"] = "diagonal"
    fisher_damping: float = 1e-4  # λ ≥ 0, relative to the mean of the Fisher diagonal
    fisher_ema_decay: float = 0.95  # weight that an update leaves to the past, in [0, 1)
    fisher_update_freq: int = 10  # steps between two updates
    fisher_block_size: int = 64  # most coordinates n of a block
    fisher_min_samples: int = 64  # tokens before an estimate is used
    buffer_tokens: int = 8192  # most tokens kept for one update, d_in + d_out + 2r numbers each
    enable_natural_gradient: bool = True
    enable_projection: bool = False  # unlike in the documents: LOG.md has what it costs
    projection_budget_start: int = 32  # directions a layer, counted as FisherInformationMatrix.project says
    projection_budget_end: int = 96  # after the last step
    projection_schedule: Literal["linear", "cosine", "adaptive"] = "linear"

    def validate(self) -> None:
        problems = _shared_problems(self, "r", "lora_alpha", "lora_dropout")
        for name in ("fisher_block_size", "fisher_min_samples", "buffer_tokens"):
            problems += whole(name, getattr(self, name))
        problems += one_of("fisher_approximation", self.fisher_approximation, ESTIMATES)
        if problems:
            raise ModelConfigError("\n".join(problems))


@dataclass
class ModalityConfig:
    layer_patterns: list[str] = field(default_factory=list)  # globs, `*` stops at dots; empty: the family's
    strategy: LayerSelectionStrategy = LayerSelectionStrategy.ALL
    n_layers: int | None = None  # blocks, of FIRST_N and LAST_N
    step_size: int | None = None  # in blocks, of EVERY_NTH
    specific_indices: list[int] | None = None  # places among the matched layers, from 0, of SPECIFIC
    rank: int | None = None  # LoRA's, like alpha and dropout; None: the global ones
    alpha: float | None = None
    dropout: float | None = None
    enable_natural_gradient: bool = True
    enable_projection: bool = True
    fisher_approximation: str = "diagonal"
    projection_budget: int | None = None  # fixed directions a layer, on average; None: the schedule's

    def problems(self) -> list[str]:
        found = []
        patterns: object = self.layer_patterns
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
            found.append(f"layer_patterns: expected a list of globs, got {patterns!r}")
        strategy: object = self.strategy
        if not isinstance(strategy, LayerSelectionStrategy):
            known = ", ".join(each.name for each in LayerSelectionStrategy)
            found.append(f"strategy: expected a LayerSelectionStrategy ({known}), got {strategy!r}")
        elif problem := self._strategy_problem():
            found.append(problem)
        found += one_of("fisher_approximation", self.fisher_approximation, ESTIMATES)
        found += whole("rank", self.rank, optional=True)
        found += whole("projection_budget", self.projection_budget, optional=True)
        found += number("alpha", self.alpha, above=0, optional=True)
        found += number("dropout", self.dropout, least=0, below=1, optional=True)
        for name in ("enable_natural_gradient", "enable_projection"):
            if not isinstance(getattr(self, name), bool):
                found.append(f"{name}: expected True or False, got {getattr(self, name)!r}")
        return found

    def _strategy_problem(self) -> str | None:
        """What is wrong, whatever the model, with the parameter that the strategy needs."""
        name = "step_size" if self.strategy is _S.EVERY_NTH else "n_layers"
        if self.strategy in (_S.FIRST_N, _S.LAST_N, _S.EVERY_NTH) and not is_whole(getattr(self, name)):
            return f"{name}: {self.strategy.name} wants a whole number from 1 on, got {getattr(self, name)!r}"
        indices: object = self.specific_indices
        listed = isinstance(indices, (list, tuple)) and indices and all(type(i) is int for i in indices)
        if self.strategy is _S.SPECIFIC and not listed:
            return f"specific_indices: SPECIFIC wants a list of whole numbers, got {indices!r}"
        return None

    def select(self, layers: Sequence[str], where: str) -> list[str]:
        """The layers that the strategy takes, in their order; negative `specific_indices` count from the end."""
        strategy, count, n, indices = self.strategy, len(layers), self.n_layers or 0, self.specific_indices or ()
        problem = self._strategy_problem()
        if strategy is _S.SPECIFIC and not problem and (wrong := [i for i in indices if not -count <= i < count]):
            problem = f"specific_indices: expected {-count} to {count - 1}, for there are {count} layers; got {wrong}"
        elif strategy in (_S.FIRST_N, _S.LAST_N) and not problem and n > count:
            problem = f"n_layers: expected at most {count}, the number of layers; got {n}"
        elif strategy is _S.SKIP_FIRST_LAST and count < 3:
            problem = f"strategy: SKIP_FIRST_LAST wants at least 3 layers, got {count} ({', '.join(layers)})"
        if problem:
            raise SelectionError(f"{where}.{problem}")
        places = {
            _S.FIRST_N: range(n),
            _S.LAST_N: range(count - n, count),
            _S.EVERY_NTH: range(0, count, self.step_size or 1),
            _S.SPECIFIC: sorted({i % count for i in indices}),
            _S.SKIP_FIRST_LAST: range(1, count - 1),
        }.get(strategy, range(count))
        return [layers[i] for i in places]


@dataclass
class ModelGRITConfig:
    """A whole model: its modalities, and what holds for all of them; see `GRITLoRAConfig`.

    Documents 001 and 003 write the modalities in two ways (`vision=` and `vision_config=`): both can be read and set.
    """

    model_name: str = "custom"
    model_type: str = "custom"  # family of modalities without patterns; "custom": the model's config.model_type
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
    max_layers_per_modality: int | None = None  # most modules, whole blocks from the front; None: no limit
    vision_config: InitVar[ModalityConfig | None] = None
    text_config: InitVar[ModalityConfig | None] = None
    cross_modal_config: InitVar[ModalityConfig | None] = None
    fusion_config: InitVar[ModalityConfig | None] = None

    def __post_init__(self, *others: ModalityConfig | None) -> None:
        given = {name: other for name, other in zip(MODALITIES, others, strict=True) if other is not None}
        for name, other in given.items():
            if getattr(self, name) not in (None, other):
                raise ModelConfigError(f"expected {name} or {name}_config, which are the same; got both")
            setattr(self, name, other)

    @property
    def modalities(self) -> dict[str, ModalityConfig]:
        return {name: own for name in MODALITIES if (own := getattr(self, name)) is not None}

    def validate(self) -> None:
        found = []
        given: dict[str, object] = dict(self.modalities)
        for name, own in given.items():
            if isinstance(own, ModalityConfig):
                found += [f"{name}.{problem}" for problem in own.problems()]
            else:
                found.append(f"{name}: expected a ModalityConfig, got {own!r}")
        if not given:
            found.append(f"expected at least one of {', '.join(MODALITIES)}, got none")
        found += _shared_problems(self, "global_rank", "global_alpha", "global_dropout")
        found += whole("max_layers_per_modality", self.max_layers_per_modality, optional=True)
        if found:
            raise ModelConfigError("\n".join(found))

    def copy(self) -> ModelGRITConfig:
        return copy.deepcopy(self)


def _alias(name: str) -> property:
    return property(lambda config: getattr(config, name), lambda config, value: setattr(config, name, value))


for _name in MODALITIES:  # after the dataclass, which would take a property for a default
    setattr(ModelGRITConfig, f"{_name}_config", _alias(_name))
