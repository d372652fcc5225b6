"""GRIT-VLM: the baseline with Fisher estimates, natural gradients and projections inside the optimizer's step."""

from typing import Any

from trainers.pure_grit import grit_report
from trainers.settings import TrainSettings
from trainers.vision.common import adapter_of, vision_arm, vision_settings


def _trainer(settings: TrainSettings, *, model: Any, **kwargs: Any) -> Any:
    from grit_vlm.training.trainer import GRITTrainer

    return GRITTrainer(
        model=model,
        grit_adapter=adapter_of(model, settings),
        grit_settings=vision_settings(settings).step_settings(),
        data_collator=kwargs["train_dataset"].processor.collate,
        **kwargs,
    )


ARM = vision_arm(
    name="grit_vlm", title="GRIT-VLM", preconditions=True, make_trainer=_trainer, report=grit_report
)  # fmt: skip
