"""The training path that all arms share."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.checkpoints import latest_complete
from trainers.data import build_dataset
from trainers.models import add_lora, load_base_model, load_tokenizer
from trainers.settings import BaseReference, TrainSettings

LEDGER = "probe_ledger.jsonl"
"""File beside the adapter."""


def sft_trainer_class() -> Any:
    """TRL's SFTTrainer, able to run on this machine.

    TRL 1.15 computes the loss with Triton kernels, which need a GPU (without one: "'NoneType' object has no attribute
    'apply'"). On a CPU the model's own cross-entropy takes their place; the value is the same.
    """
    import torch
    from transformers import Trainer
    from trl import SFTTrainer

    if torch.cuda.is_available():
        return SFTTrainer

    class CpuSFTTrainer(SFTTrainer):
        compute_loss = Trainer.compute_loss

    return CpuSFTTrainer


def _sft_trainer(settings: TrainSettings, **kwargs: Any) -> Any:
    return sft_trainer_class()(**kwargs)


@dataclass(frozen=True)
class Arm:
    """What one way of training does differently from plain LoRA.

    Attributes:
        name: As in params.yaml.
        title: For tables.
        preconditions: Whether it claims to change the gradient before the optimizer's step.
        prepare: Runs first, before transformers and TRL are loaded where nothing else has done so.
        load_model: (base, settings) → frozen base model.
        add_adapter: (model, settings) → model with trainable LoRA.
        make_trainer: (settings, keyword arguments of TRL's SFTTrainer) → the trainer.
        report: (trainer, job) after training → further numbers for run.json; may write files to `job.output`.
    """

    name: str
    title: str
    preconditions: bool = False
    prepare: "Callable[[TrainingJob], None] | None" = None
    load_model: Callable[[BaseReference, TrainSettings], Any] = load_base_model
    add_adapter: Callable[[Any, TrainSettings], Any] = add_lora
    make_trainer: Callable[..., Any] = _sft_trainer
    report: "Callable[[Any, TrainingJob], dict[str, Any]] | None" = None


@dataclass(frozen=True)
class TrainingJob:
    """One run of one arm.

    Attributes:
        base: What is fine-tuned.
        settings: Section train with the arm's overrides.
        seed: Of LoRA's start and of the order of the items.
        train: (rendered prompt, completion) to learn from.
        valid: The same, for the evaluation loss.
        output: Folder for the adapter; exists and is empty.
        checkpoints: Folder that outlives a kill; a complete checkpoint found there is resumed from.
    """

    base: BaseReference
    settings: TrainSettings
    seed: int
    train: Sequence[tuple[str, str]]
    valid: Sequence[tuple[str, str]]
    output: Path
    checkpoints: Path


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        history: One entry a logged step: loss, eval_loss, learning rate, gradient norm.
        resumed_from: Step of the checkpoint it went on from, or None.
        seconds: Wall time of this process's share of the training.
        summary: Numbers for run.json.
    """

    history: list[dict[str, Any]]
    resumed_from: int | None
    seconds: float
    summary: dict[str, Any] = field(default_factory=dict)


def _arguments(job: TrainingJob, **changes: Any) -> Any:
    import torch
    from trl import SFTConfig

    s = job.settings
    values: dict[str, Any] = dict(
        output_dir=str(job.checkpoints),
        max_steps=s.max_steps,
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
        max_length=None,  # build_dataset has refused what is too long
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
        disable_tqdm=False,
    )
    return SFTConfig(**{**values, **changes})


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def build(arm: Arm, job: TrainingJob, **changes: Any) -> Any:
    """The arm's trainer, ready to train.

    Args:
        arm: Whose hooks are used.
        job: Model, data, settings and seed.
        changes: Arguments of TRL's SFTConfig that differ from the job's.

    Raises:
        ModelError, EncodingError: see `trainers.models` and `trainers.data`.
    """
    if arm.prepare:
        arm.prepare(job)
    from transformers import set_seed

    tokenizer = load_tokenizer(job.base)
    train = build_dataset(tokenizer, job.train, job.settings.max_length)
    valid = build_dataset(tokenizer, job.valid, job.settings.max_length)
    model = arm.load_model(job.base, job.settings)
    set_seed(job.seed)
    model = arm.add_adapter(model, job.settings)
    trainer = arm.make_trainer(
        job.settings,
        model=model,
        args=_arguments(job, **changes),
        train_dataset=train,
        eval_dataset=valid,
        processing_class=tokenizer,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL puts adapters on a 4-bit base into bf16; the optimizer wants float32
            parameter.data = parameter.data.float()
    return trainer


def run(arm: Arm, job: TrainingJob) -> TrainingResult:
    """Train one arm; write adapter, tokenizer, loss history and the probe's ledger to `job.output`.

    Same job on the same machine and thread count → same adapter bytes on a CPU, resumed or not.

    Raises:
        ModelError, EncodingError: see `trainers.models` and `trainers.data`.
    """
    trainer = build(arm, job)
    from probes import ProbeCallback

    probe = ProbeCallback(
        every=job.settings.probe_every,
        ledger=job.output / LEDGER,
        grit=getattr(trainer, "grit_manager", None),
        claims=arm.preconditions,
    )
    trainer.add_callback(probe)  # the last one, so that it sees what the others do to gradients
    checkpoint = latest_complete(job.checkpoints)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started

    trainer.model.save_pretrained(job.output, safe_serialization=True)
    trainer.processing_class.save_pretrained(job.output)
    history = [dict(entry) for entry in trainer.state.log_history]
    said = arm.report(trainer, job) if arm.report else {}
    (job.output / "loss_history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return TrainingResult(
        history=history,
        resumed_from=int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None,
        seconds=seconds,
        summary={
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch,
            "train_items": len(job.train),
            "trainable_parameters": trainable,
            "final_loss": losses[-1] if losses else None,
            "final_eval_loss": eval_losses[-1] if eval_losses else None,
            "train_seconds": seconds,
            "resumed_from_step": int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None,
            "peak_memory_bytes": peak_memory_bytes(),
            **said,
        },
    )
