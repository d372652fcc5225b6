"""Pure GRIT: PEFT and TRL's SFTTrainer as in the baseline, with GRIT inside the optimizer's step; no Unsloth."""

import shutil
from typing import Any, Self

from pydantic import ValidationInfo, field_validator, model_validator

from grit.config import RUN_FIELDS, GRITConfig
from trainers.optimizers import ADAMW
from trainers.run import Arm, TrainingJob, sft_trainer_class
from trainers.settings import TrainSettings

_WARMUPS = ("ng_warmup_steps", "reprojection_warmup_steps", "rank_adaptation_start_step", "regularizer_warmup_steps")


def only_adamw(settings: TrainSettings, sgd: bool) -> None:
    """Refuse optimizers and arguments that GRIT cannot honor: it takes AdamW's step, or SGD's, in its own axes."""
    problems = []
    if settings.optimizer not in ADAMW and not (sgd and settings.optimizer == "sgd"):
        problems.append(
            f"optimizer: expected one of {', '.join(ADAMW)}, since GRIT takes AdamW's step in its own axes, got "
            f"{settings.optimizer}"
        )
    if strange := sorted(settings.optim_args.keys() - (() if sgd else {"betas", "eps"})):
        problems.append(
            f"optim_args: expected {'none with SGD' if sgd else 'betas and eps only'}, since GRIT takes the step "
            f"itself, got {', '.join(strange)}"
        )
    if problems:
        raise ValueError("\n".join(problems))


class GritSettings(TrainSettings):
    """Section train, and `grit:` with fields of `grit.GRITConfig`."""

    plain_lora, text_only = "GRIT's factors are those of s·B·A", True

    grit: dict[str, Any] | None = None

    @field_validator("grit")
    @classmethod
    def _grit(cls, values: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if values is not None:
            elsewhere = sorted(key for key in values if str(key).startswith("lora_") or key in RUN_FIELDS)
            if elsewhere:
                raise ValueError(
                    f"{', '.join(elsewhere)}: has no effect here; set rank, alpha, learning_rate, … of train"
                )
            # Raises with every mistake; min_lora_rank is checked against this run's rank.
            GRITConfig.from_dict({"lora_rank": info.data.get("rank", 1024), **values})
        return values

    @model_validator(mode="after")
    def _adamw(self) -> Self:
        only_adamw(self, sgd=(self.grit or {}).get("mode") == "sgd")
        return self

    @property
    def warmups(self) -> dict[str, int]:
        return {"warmup_steps": self.warmup_steps} | {f"grit.{key}": (self.grit or {}).get(key, 0) for key in _WARMUPS}


def grit_trainer(base: type, settings: Any, **kwargs: Any) -> Any:
    from grit import grit_trainer_class

    # The adapters exist already; their shape goes into the configuration for the record.
    shape = {"lora_rank": settings.rank, "lora_alpha": float(settings.alpha), "lora_dropout": settings.dropout}
    return grit_trainer_class(base)(grit_config=GRITConfig.from_dict({**shape, **(settings.grit or {})}), **kwargs)


def _trainer(settings: Any, **kwargs: Any) -> Any:
    return grit_trainer(sft_trainer_class(), settings, **kwargs)


def grit_report(trainer: Any, job: TrainingJob) -> dict[str, Any]:
    manager = trainer.grit_manager
    shutil.copy2(manager.log_file, job.output / manager.log_file.name)
    final = manager.history[-1]
    ranks = [entry["r"] for entry in final["ranks"].values()]
    names = ("capture", "effect", "skipped_steps", "inversions", "failed_inversions")
    facts = {name: final[name] for name in names}
    return {"grit": {**facts, "effective": final["effect"]["effective"], "mean_rank": sum(ranks) / len(ranks)}}


ARM = Arm(
    name="pure_grit",
    title="Pure GRIT",
    settings=GritSettings,
    preconditions=True,
    make_trainer=_trainer,
    report=grit_report,
)
