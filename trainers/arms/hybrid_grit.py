"""Hybrid GRIT: the arm unsloth_lora with GRIT inside the optimizer's step."""

from dataclasses import replace
from typing import Any

from trainers.arms import unsloth_lora
from trainers.arms.pure_grit import GritSettings, grit_report, grit_trainer
from trainers.arms.unsloth_lora import UnslothSettings
from trainers.run import TrainingJob


class HybridSettings(GritSettings, UnslothSettings):
    pass


def _trainer(settings: HybridSettings, **kwargs: Any) -> Any:
    return unsloth_lora.make_trainer(settings, grit_trainer, **kwargs)


def _report(trainer: Any, job: TrainingJob) -> dict[str, Any]:
    return {**grit_report(trainer, job), **unsloth_lora.report(trainer, job)}


ARM = replace(
    unsloth_lora.ARM,
    name="hybrid_grit",
    title="Hybrid GRIT",
    settings=HybridSettings,
    preconditions=True,
    make_trainer=_trainer,
    report=_report,
)
