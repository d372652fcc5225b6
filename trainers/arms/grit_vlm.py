"""GRIT-VLM: the baseline on pictures with Fisher estimates, natural gradients and projections inside the step."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers.arms.pure_grit import grit_report, only_adamw
from trainers.run import Arm
from trainers.settings import Estimate, Section, TrainSettings


class NaturalGradient(Section):
    """What GRIT-VLM does with gradients; see `grit_vlm.GRITLoRAConfig` and `grit_vlm.GRITTrainingArguments`."""

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


class VlmSettings(TrainSettings):
    """Section train, and `natural_gradient:`."""

    natural_gradient: NaturalGradient | None = None

    @model_validator(mode="after")
    def _pictures_only(self) -> Self:
        if self.layers is None:
            raise ValueError("layers: expected those of a vision-language model, which this arm trains; got null")
        only_adamw(self, sgd=self.method.optimizer.endswith("sgd"))
        return self

    @property
    def method(self) -> NaturalGradient:
        return self.natural_gradient or NaturalGradient()

    @property
    def method_warmup_steps(self) -> int:
        return self.method.warmup_steps

    def layer_config(self) -> Any:
        config, method = super().layer_config(), self.method
        for name, modality in config.modalities.items():
            own = self.layers.own.get(name) if self.layers else None
            modality.fisher_approximation = (own.estimate if own else None) or method.estimate
        config.fisher_damping, config.fisher_ema_decay = method.damping, method.ema_decay
        config.fisher_update_freq = method.update_freq
        config.projection_budget_start, config.projection_budget_end = method.projection_start, method.projection_end
        config.projection_schedule = method.projection_schedule
        return config


def _adapter(model: Any, settings: Any) -> Any:
    from grit_vlm import GRITLoRAConfig, VLMGRITAdapter

    method = settings.method
    switches = GRITLoRAConfig(
        fisher_block_size=method.block_size,
        enable_natural_gradient=method.preconditioning,
        enable_projection=method.projection,
    )
    return VLMGRITAdapter(model, settings.layer_config(), defaults=switches)


def _trainer(settings: Any, *, model: Any, **kwargs: Any) -> Any:
    from grit_vlm import GRITTrainer

    method = settings.method
    return GRITTrainer(
        model=model,
        grit_adapter=_adapter(model, settings),
        grit_settings={
            "grit_optimizer_type": method.optimizer,
            "eigen_power": method.eigen_power,
            "grafting": method.grafting,
            "kl_clip": method.kl_clip,
            "ng_warmup_steps": method.warmup_steps,
            "grit_log_freq": method.log_freq,
        },
        data_collator=kwargs["train_dataset"].processor.collate,
        **kwargs,
    )


ARM = Arm(
    name="grit_vlm",
    title="GRIT-VLM",
    settings=VlmSettings,
    preconditions=True,
    add_adapter=lambda model, settings: _adapter(model, settings).model,
    make_trainer=_trainer,
    report=grit_report,
)
