"""GRIT-VLM: the baseline on pictures with Fisher estimates, natural gradients and projections inside the step."""

from typing import Any, Self

from pydantic import model_validator

from trainers.arms.pure_grit import grit_report, only_adamw
from trainers.run import Arm
from trainers.settings import TrainSettings

_OF_TRAIN = ("r", "lora_alpha", "lora_dropout")


class VlmSettings(TrainSettings):
    """Section train, and `natural_gradient:` with fields of `grit_vlm.GRITLoRAConfig` and `optimizer`."""

    natural_gradient: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _pictures_only(self) -> Self:
        from grit_vlm.config.model_configs import check_type

        if self.layers is None:
            raise ValueError("layers: expected those of a vision-language model, which this arm trains; got null")
        self.method.validate()
        check_type(self.optimizer_type)
        only_adamw(self, sgd=self.optimizer_type == "grit_sgd")
        return self

    @property
    def optimizer_type(self) -> str:
        return str((self.natural_gradient or {}).get("optimizer", "grit_adam"))

    @property
    def method(self) -> Any:
        """What GRIT-VLM does with gradients, as a `grit_vlm.GRITLoRAConfig`; GritVlmError for unknown keys."""
        from grit_vlm.config.model_configs import GRITLoRAConfig, known_settings

        values = {key: value for key, value in (self.natural_gradient or {}).items() if key != "optimizer"}
        return GRITLoRAConfig(**known_settings(GRITLoRAConfig, values, "natural_gradient", besides=_OF_TRAIN))

    def layer_config(self) -> Any:
        config, method = super().layer_config(), self.method
        for name, modality in config.modalities.items():
            if "fisher_approximation" not in (self.layers or {}).get(name, {}):
                modality.fisher_approximation = method.fisher_approximation
        for name in vars(method).keys() & vars(config).keys():
            setattr(config, name, getattr(method, name))
        return config


def _adapter(model: Any, settings: Any) -> Any:
    from grit_vlm import VLMGRITAdapter

    return VLMGRITAdapter(model, settings.layer_config(), defaults=settings.method)


def _trainer(settings: Any, *, model: Any, **kwargs: Any) -> Any:
    from grit_vlm import GRITTrainer
    from grit_vlm.optimizers.natural_gradient import set_mode

    adapter = _adapter(model, settings)
    set_mode(adapter.manager, settings.optimizer_type)
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
