"""What transformers' Trainer is told."""

import sys
from typing import TYPE_CHECKING, Any

from trainers.reporting import report_arguments

if TYPE_CHECKING:
    from trainers.common import TrainingJob


def training_arguments(job: "TrainingJob", **changes: Any) -> Any:
    """TRL's SFTConfig for a job.

    Args:
        job: Whose settings are used.
        changes: Arguments that differ from the job's.
    """
    import torch
    from trl import SFTConfig

    s = job.settings
    values: dict[str, Any] = dict(
        output_dir=str(job.checkpoints),
        **({"num_train_epochs": s.epochs} if s.max_steps is None else {"max_steps": s.max_steps}),
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.gradient_accumulation,
        learning_rate=s.learning_rate,
        lr_scheduler_type=s.lr_scheduler,
        warmup_steps=s.warmup_steps,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        optim=s.optimizer,
        bf16=s.precision == "bf16",
        gradient_checkpointing=s.gradient_checkpointing,
        max_length=None,  # what is too long was refused or left out
        completion_only_loss=True,
        logging_steps=s.logging_steps,
        eval_strategy="steps",
        eval_steps=s.eval_steps,
        save_strategy="steps",
        save_steps=s.save_steps,
        save_total_limit=2,
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # `ProgressLines` there
    )
    return SFTConfig(**{**values, **changes})


def lasting_arguments(job: "TrainingJob", name: str) -> dict[str, Any]:
    """What a real run is told beyond that, and a twin has no use for: who reports, and which checkpoint comes back.

    Args:
        job: Whose settings are used.
        name: Of the run, for those who report.
    """
    s = job.settings
    values = report_arguments(s, name, job.logs)
    if s.keeps_best:
        values |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            # A best one that was not saved cannot come back, so every evaluation is followed by a checkpoint. Three
            # stay: the best, the last, and the one before, since nothing goes on from the last step (`to_resume`).
            "save_steps": s.eval_steps,
            "save_total_limit": 3,
            # The count of evaluations without improvement.
            "restore_callback_states_from_checkpoint": s.early_stopping_patience is not None,
        }
    return values
