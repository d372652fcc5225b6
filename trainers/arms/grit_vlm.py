"""GRIT-VLM: the baseline on pictures with Fisher estimates, natural gradients and projections inside the step."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers.arms.pure_grit import grit_report, only_adamw
from trainers.run import Arm
from trainers.settings import Estimate, Section, TrainSettings


class NaturalGradient(Section):
    """What GRIT-VLM does with gradients; see `grit_vlm.GRITLoRAConfig`."""

    optimizer: Literal["grit_adam", "grit_adam_preconditioned", "grit_sgd"] = "grit_adam"
    estimate: Estimate = "diagonal"
    damping: Annotated[float, Field(ge=0, description="λ")] = 1e-4
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    update_freq: Annotated[int, Field(ge=1, description="steps")] = 10
    preconditioning: bool = True
    projection: bool = False
    projection_start: Annotated[int, Field(ge=1, description="directions a layer")] = 32
    projection_end: Annotated[int, Field(ge=1, description="directions a layer")] = 96
    projection_schedule: Literal["linear", "cosine"] = "linear"


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
    switches = GRITLoRAConfig(enable_natural_gradient=method.preconditioning, enable_projection=method.projection)
    return VLMGRITAdapter(model, settings.layer_config(), defaults=switches)


def _trainer(settings: Any, *, model: Any, **kwargs: Any) -> Any:
    from grit_vlm import GRITTrainer
    from grit_vlm.optimizers.natural_gradient import set_mode

    adapter = _adapter(model, settings)
    set_mode(adapter.manager, settings.method.optimizer)
    collate = kwargs["train_dataset"].processor.collate
    return GRITTrainer(model=model, grit_adapter=adapter, data_collator=collate, **kwargs)


ARM = Arm(
    name="grit_vlm",
    title="GRIT-VLM",
    settings=VlmSettings,
    preconditions=True,
    add_adapter=lambda model, settings: _adapter(model, settings).model,
    make_trainer=_trainer,
    report=grit_report,
)
