"""How embedded bases are trained and saved, whatever they are."""

import shutil
from pathlib import Path
from typing import Any, Protocol

from trainers.checkpoints import latest_complete


class BaseSettings(Protocol):
    """What the training of any embedded base is told."""

    @property
    def seed(self) -> int:
        """Of the start and the order."""

    @property
    def batch_size(self) -> int:
        """Examples."""

    @property
    def learning_rate(self) -> float:
        """AdamW's peak."""

    @property
    def precision(self) -> str:
        """Either fp32 or bf16."""


def base_arguments(settings: BaseSettings, examples: int, checkpoints: Path, **steps: int) -> Any:
    """TrainingArguments of an embedded base, which sees every example once, in their order.

    Args:
        settings: Of the base.
        examples: How many there are.
        checkpoints: Folder that outlives a kill.
        steps: save_steps and logging_steps.
    """
    import torch
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(100, examples // settings.batch_size // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=settings.precision == "bf16",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_total_limit=1,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
        **steps,
    )


def train_base(trainer: Any, checkpoints: Path) -> dict[str, Any]:
    """Train, from the last complete checkpoint if there is one.

    Returns:
        Parameters, steps and the last loss, for run.json.
    """
    checkpoint = latest_complete(checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "final_loss": losses[-1] if losses else None,
    }


def save_base(model: Any, output: Path, checkpoints: Path) -> None:
    """Write the model in fp16, to answer greedily, and remove the checkpoints."""
    import torch

    model.generation_config.do_sample = False
    model.to(torch.float16).save_pretrained(output)
    shutil.rmtree(checkpoints, ignore_errors=True)
