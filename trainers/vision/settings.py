"""What a training run of a vision-language model is told: section `train` of vlm/params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from grit_vlm.config import LayerSelectionStrategy, ModalityConfig, ModelGRITConfig, get_model_config
from grit_vlm.config.model_configs import MODALITIES, ModelConfigError
from grit_vlm.core.grit_lora import GRITLoRAConfig
from trainers.settings import Positive, Section, TrainSettings

Estimate = Literal["diagonal", "kfac", "block_diagonal"]


class Modality(Section):
    """Layers of one modality; see `grit_vlm.config.ModalityConfig`. None: as for all modalities."""

    patterns: list[str] = Field(default=[])
    strategy: Literal["all", "first_n", "last_n", "every_nth", "specific", "skip_first_last"] = "all"
    n_layers: Positive | None = None
    step_size: Positive | None = None
    specific_indices: list[Annotated[int, Field(ge=0)]] | None = None
    rank: Positive | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    estimate: Estimate | None = None
    preconditioning: bool = True
    projection: bool = True
    projection_budget: Positive | None = None


class Layers(Section):
    """Which layers LoRA is put on: those of a ready configuration, or of modalities of one's own."""

    configuration: str | None = None
    vision: Modality | None = None
    text: Modality | None = None
    cross_modal: Modality | None = None
    fusion: Modality | None = None
    max_layers_per_modality: Positive | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        own = [name for name in MODALITIES if getattr(self, name) is not None]
        if self.configuration is not None and own:
            raise ValueError(f"expected configuration or modalities of your own, got both ({', '.join(own)})")
        if self.configuration is None and not own:
            raise ValueError(f"expected a configuration, or one of {', '.join(MODALITIES)}; got neither")
        if self.configuration is not None:
            get_model_config(self.configuration)  # names those there are
        return self


class NaturalGradient(Section):
    """What GRIT-VLM does with the gradients; see `grit_vlm.GRITLoRAConfig` and `grit_vlm.GRITTrainingArguments`."""

    optimizer: Literal["grit_adam", "grit_adam_preconditioned", "grit_sgd", "adaptive_adam", "adaptive_sgd"] = (
        "grit_adam"
    )
    estimate: Estimate = "diagonal"
    damping: Annotated[float, Field(ge=0, description="λ")] = 1e-4
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    update_freq: Annotated[int, Field(ge=1, description="steps")] = 10
    block_size: Annotated[int, Field(ge=1, description="coordinates")] = 64
    preconditioning: bool = True
    projection: bool = False
    projection_start: Annotated[int, Field(ge=1, description="directions a layer")] = 32
    projection_end: Annotated[int, Field(ge=1, description="directions a layer")] = 96
    projection_schedule: Literal["linear", "cosine", "adaptive"] = "linear"
    eigen_power: Annotated[float, Field(ge=0, le=1)] = 1.0
    grafting: bool | None = None
    kl_clip: Annotated[float, Field(gt=0, description="κ")] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    log_freq: Annotated[int, Field(ge=1, description="steps")] = 50

    @model_validator(mode="after")
    def _fits_the_optimizer(self) -> Self:
        if self.grafting and self.optimizer.endswith("sgd"):
            raise ValueError(f"grafting: expected false or null with {self.optimizer}, got true")
        return self


class VisionTrainSettings(TrainSettings):
    """Settings of one LoRA training run of a vision-language model.

    `layers` stands in the place of target_modules, `natural_gradient` in that of grit; rank, alpha and dropout hold for
    modalities that say nothing of their own.
    """

    target_modules: list[str] = Field(default=[], max_length=0)
    layers: Layers
    natural_gradient: NaturalGradient | None = None

    @model_validator(mode="after")
    def _nothing_of_text_arms(self) -> Self:
        problems = []
        if self.grit is not None:
            problems.append("grit: expected natural_gradient, which vision arms have instead; got grit")
        if self.unsloth_fused_lora:
            problems.append(
                "unsloth_fused_lora: expected false, since Unsloth's kernels belong to an arm of the pipeline for "
                "text, hybrid_grit; got true"
            )
        try:
            self.model_config_of_layers().validate()
        except ModelConfigError as error:
            own = tuple(f"{modality}." for modality in MODALITIES)
            problems += [f"layers.{line}" if line.startswith(own) else line for line in str(error).splitlines()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def with_method_of(self, other: TrainSettings) -> Self:
        """See `TrainSettings`."""
        return self.model_copy(update={"natural_gradient": getattr(other, "natural_gradient", None)})

    @property
    def method_warmup_steps(self) -> int:
        """See `TrainSettings`."""
        return self.natural_gradient.warmup_steps if self.natural_gradient else 0

    def model_config_of_layers(self) -> ModelGRITConfig:
        """Layers, ranks and estimates as `grit_vlm` takes them; without natural_gradient its defaults.

        The baseline gets these too, and makes no use of them: it never opens the adapter's manager.
        """
        method = self.natural_gradient or NaturalGradient()
        name = self.layers.configuration
        config = get_model_config(name) if name else ModelGRITConfig()
        for modality in MODALITIES:
            own = getattr(self.layers, modality)
            if own is not None:
                setattr(config, modality, _modality(own, method))
        if name:
            for own in config.modalities.values():
                own.fisher_approximation = method.estimate
        if self.layers.max_layers_per_modality is not None:
            config.max_layers_per_modality = self.layers.max_layers_per_modality
        for own in config.modalities.values():
            own.enable_natural_gradient &= method.preconditioning
            own.enable_projection &= method.projection
        config.global_rank, config.global_alpha, config.global_dropout = self.rank, self.alpha, self.dropout
        config.fisher_damping, config.fisher_ema_decay = method.damping, method.ema_decay
        config.fisher_update_freq = method.update_freq
        config.projection_budget_start, config.projection_budget_end = method.projection_start, method.projection_end
        config.projection_schedule = method.projection_schedule
        return config

    def layer_defaults(self) -> GRITLoRAConfig:
        """What `model_config_of_layers` cannot say."""
        method = self.natural_gradient or NaturalGradient()
        return GRITLoRAConfig(fisher_block_size=method.block_size, enable_projection=True)

    def step_settings(self) -> dict[str, Any]:
        """How steps are made, as `grit_vlm.training.trainer.GRITTrainer` takes it (`grit_settings`)."""
        method = self.natural_gradient or NaturalGradient()
        return {
            "grit_optimizer_type": method.optimizer,
            "eigen_power": method.eigen_power,
            "grafting": method.grafting,
            "kl_clip": method.kl_clip,
            "ng_warmup_steps": method.warmup_steps,
            "grit_log_freq": method.log_freq,
        }


def _modality(own: Modality, method: NaturalGradient) -> ModalityConfig:
    return ModalityConfig(
        layer_patterns=list(own.patterns),
        strategy=LayerSelectionStrategy(own.strategy),
        n_layers=own.n_layers,
        step_size=own.step_size,
        specific_indices=own.specific_indices,
        rank=own.rank,
        alpha=own.alpha,
        dropout=own.dropout,
        enable_natural_gradient=own.preconditioning,
        enable_projection=own.projection,
        fisher_approximation=own.estimate or method.estimate,
        projection_budget=own.projection_budget,
    )
