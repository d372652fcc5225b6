"""Which layers of a vision-language model are adapted, and how, for each modality.

A modality's setting of None means the global one. Nothing is checked before `validate`, so settings can be changed one
by one; code that uses a configuration validates it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, Literal

from grit.config import BelowOne, Count, NotNegative, Positive, complaints, did_you_mean
from grit_vlm.config.selection import LayerSelectionStrategy
from grit_vlm.errors import GritVlmError

MODALITIES = ("vision", "text", "cross_modal", "fusion")
_S = LayerSelectionStrategy
Estimate = Literal["diagonal", "kfac"]
Schedule = Literal["linear", "cosine"]


MODES: dict[str, Literal["sgd", "eigen_adamw", "adamw"]] = {
    "grit_sgd": "sgd",
    "grit_adam": "eigen_adamw",
    "grit_adam_preconditioned": "adamw",
}
"""Type → mode of `grit.GRITConfig`."""


def check_type(optimizer_type: str) -> None:
    if optimizer_type not in MODES:
        expected = f"expected one of {', '.join(MODES)}, got {optimizer_type!r}"
        raise GritVlmError(f"optimizer_type: {expected}{did_you_mean(optimizer_type, MODES)}")


def known_settings(kind: type, values: object, where: str, besides: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping with fields of a dataclass, apart from some; GritVlmError names every other key."""
    if not isinstance(values, Mapping):
        raise GritVlmError(f"{where}: expected keys and values, got {values!r}")
    names = [f.name for f in fields(kind) if f.name not in besides]
    if strange := [f"{where}.{key}: unknown key{did_you_mean(key, names)}" for key in values if key not in names]:
        raise GritVlmError("\n".join(strange))
    return dict(values)


@dataclass
class GRITLoRAConfig:
    """Settings of a GRIT-LoRA layer. Defaults follow the documents where they state one.

    Estimates are updated at each of the first `fisher_update_freq` steps: B starts at 0, and so does the Fisher
    information of A. Of a backward pass with more tokens than the buffer has room for, an evenly spaced subset is kept.
    """

    r: Count = 16
    lora_alpha: Positive = 32  # the update is scaled by lora_alpha / r
    lora_dropout: BelowOne = 0.1
    fisher_approximation: Estimate = "diagonal"
    fisher_damping: NotNegative = 1e-4  # λ, relative to the mean of the Fisher diagonal
    fisher_ema_decay: BelowOne = 0.95  # weight of the past in an update
    fisher_update_freq: Count = 10  # steps between two updates
    fisher_min_samples: Count = 64  # tokens before an estimate is used
    buffer_tokens: Count = 8192  # most tokens stored for one update, d_in + d_out + 2r numbers each
    enable_natural_gradient: bool = True
    enable_projection: bool = False  # unlike in the documents: docs/log has what it costs
    projection_budget_start: Count = 32  # directions a layer, as FisherInformationMatrix.project counts them
    projection_budget_end: Count = 96  # after the last step
    projection_schedule: Schedule = "linear"

    def validate(self) -> None:
        if problems := complaints(type(self), vars(self)):
            raise GritVlmError("\n".join(problems.values()))


@dataclass
class ModalityConfig:
    layer_patterns: list[str] = field(default_factory=list)  # globs, `*` stops at dots; empty: the family's
    strategy: LayerSelectionStrategy = LayerSelectionStrategy.ALL
    n_layers: Count | None = None  # blocks, for FIRST_N and LAST_N
    step_size: Count | None = None  # blocks, for EVERY_NTH
    specific_indices: Sequence | None = None  # for SPECIFIC: integer positions among the matched layers, from 0
    rank: Count | None = None  # of LoRA, like alpha and dropout; None: the global ones
    alpha: Positive | None = None
    dropout: BelowOne | None = None
    enable_natural_gradient: bool = True
    enable_projection: bool = True
    fisher_approximation: Estimate = "diagonal"
    projection_budget: Count | None = None  # fixed mean number of directions a layer; None: follow the schedule

    @classmethod
    def from_dict(cls, values: object, where: str) -> "ModalityConfig":
        """From a mapping as YAML has it, with a strategy's value; GritVlmError names every key that is unknown."""
        settings = known_settings(cls, values, where)
        strategies = {strategy.value: strategy for strategy in _S}
        if settings.get("strategy", "all") not in strategies:
            raise GritVlmError(
                f"{where}.strategy: expected one of {', '.join(strategies)}, got {settings['strategy']!r}"
            )
        return cls(**settings | {"strategy": strategies[settings.get("strategy", "all")]})

    def problems(self) -> list[str]:
        problems = complaints(type(self), vars(self))
        if "layer_patterns" not in problems and "" in self.layer_patterns:  # never matches anything
            problems["layer_patterns"] = f"layer_patterns: expected a list of names, got {self.layer_patterns!r}"
        if not problems and (problem := self._strategy_problem()):
            return [problem]
        return list(problems.values())

    def _strategy_problem(self) -> str | None:
        """Why the strategy lacks a parameter that it needs with any model; None if it has all."""
        name = {_S.FIRST_N: "n_layers", _S.LAST_N: "n_layers", _S.EVERY_NTH: "step_size"}.get(self.strategy)
        if name is not None and getattr(self, name) is None:
            return f"{name}: {self.strategy.name} needs an integer of at least 1, got None"
        indices = self.specific_indices
        if self.strategy is _S.SPECIFIC and not (indices and all(type(i) is int for i in indices)):
            return f"specific_indices: SPECIFIC needs a list of integers, got {indices!r}"
        return None

    def select(self, layers: Sequence[str], where: str) -> list[str]:
        """The layers that the strategy selects, in order; negative `specific_indices` count from the end."""
        strategy, count, n, indices = self.strategy, len(layers), self.n_layers or 0, self.specific_indices or ()
        problem = next(iter(self.problems()), None)
        if strategy is _S.SPECIFIC and not problem and (wrong := [i for i in indices if not -count <= i < count]):
            problem = f"specific_indices: expected {-count} to {count - 1}, since there are {count} layers; got {wrong}"
        elif strategy in (_S.FIRST_N, _S.LAST_N) and not problem and n > count:
            problem = f"n_layers: expected at most {count}, the number of layers; got {n}"
        elif strategy is _S.SKIP_FIRST_LAST and count < 3:
            problem = f"strategy: SKIP_FIRST_LAST needs at least 3 layers, got {count} ({', '.join(layers)})"
        if problem:
            raise GritVlmError(f"{where}.{problem}")
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
    """The modalities of a model and their shared settings; see `GRITLoRAConfig`.

    Documents 001 and 003 spell the arguments of the modalities in two ways (`vision=` and `vision_config=`); both work.
    """

    model_name: str = "custom"
    model_type: str = "custom"  # family whose patterns are the default; "custom": the model's config.model_type
    vision: ModalityConfig | None = None
    text: ModalityConfig | None = None
    cross_modal: ModalityConfig | None = None
    fusion: ModalityConfig | None = None
    global_rank: Count = 16
    global_alpha: Positive = 32
    global_dropout: BelowOne = 0.1
    fisher_damping: NotNegative = 1e-4
    fisher_ema_decay: BelowOne = 0.95
    fisher_update_freq: Count = 10
    projection_budget_start: Count = 32
    projection_budget_end: Count = 96
    projection_schedule: Schedule = "linear"
    max_layers_per_modality: Count | None = None  # most modules, whole blocks from the front; None: no limit
    vision_config: InitVar[ModalityConfig | None] = None
    text_config: InitVar[ModalityConfig | None] = None
    cross_modal_config: InitVar[ModalityConfig | None] = None
    fusion_config: InitVar[ModalityConfig | None] = None

    def __post_init__(self, *others: ModalityConfig | None) -> None:
        aliases = {name: other for name, other in zip(MODALITIES, others, strict=True) if other is not None}
        for name, other in aliases.items():
            if getattr(self, name) not in (None, other):
                raise GritVlmError(f"expected {name} or {name}_config, which are the same; got both")
            setattr(self, name, other)

    @property
    def modalities(self) -> dict[str, ModalityConfig]:
        return {name: modality for name in MODALITIES if (modality := getattr(self, name)) is not None}

    def validate(self) -> None:
        problems = list(complaints(type(self), vars(self)).values())
        for name, modality in self.modalities.items():
            if isinstance(modality, ModalityConfig):
                problems += [f"{name}.{problem}" for problem in modality.problems()]
        if not self.modalities:
            problems.append(f"expected at least one of {', '.join(MODALITIES)}, got none")
        if problems:
            raise GritVlmError("\n".join(problems))

    def layer_settings(self, defaults: GRITLoRAConfig | None = None) -> dict[str, GRITLoRAConfig]:
        """Modality → settings of its layers: its own, else the model's, else the defaults.

        What the defaults switch off is off in all modalities.
        """
        defaults = defaults or GRITLoRAConfig(enable_projection=True)
        names = {f.name for f in fields(defaults)} & vars(self).keys()
        shared = {name: getattr(self, name) for name in names}
        by_modality = {}
        for name, part in self.modalities.items():
            settings = {
                "r": part.rank or self.global_rank,
                "lora_alpha": part.alpha or self.global_alpha,
                "lora_dropout": self.global_dropout if part.dropout is None else part.dropout,
                "fisher_approximation": part.fisher_approximation,
                "enable_natural_gradient": defaults.enable_natural_gradient and part.enable_natural_gradient,
                "enable_projection": defaults.enable_projection and part.enable_projection,
            }
            if part.projection_budget:
                settings |= dict.fromkeys(("projection_budget_start", "projection_budget_end"), part.projection_budget)
            by_modality[name] = replace(defaults, **{**shared, **settings})
            by_modality[name].validate()
        return by_modality
