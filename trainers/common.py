"""The training path that all arms share."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.arguments import lasting_arguments, training_arguments
from trainers.checkpoints import to_resume
from trainers.data import Encoded, encode_examples
from trainers.models import add_lora, load_base_model, load_tokenizer
from trainers.reporting import check_reporters, remove_reporters, tensorboard
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


def _encode_text(job: "TrainingJob", tokenizer: Any, examples: Sequence[tuple[str, str]], kind: str) -> Encoded:
    settings = job.settings
    encoded = encode_examples(tokenizer, examples, settings.max_length, leave_out=settings.overlong == "leave_out")
    say_left_out(encoded, len(examples), kind, settings.max_length)
    return encoded


def say_left_out(encoded: Encoded, count: int, kind: str, max_length: int) -> None:
    """Print how many of `count` items were too long and are left out, if any were."""
    if encoded.left_out:
        print(
            f"{encoded.left_out} of {count} {kind} items are longer than {max_length} tokens and are left out "
            f"(longest {encoded.longest})",
            flush=True,
        )


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
        encode: (job, tokenizer, (prompt, completion) pairs, what they are) → data set.
        arguments: Of TRL's SFTConfig, where they differ from what all arms have.
        report: (trainer, job) after training → further numbers for run.json; may write files to `job.output`.
    """

    name: str
    title: str
    preconditions: bool = False
    prepare: "Callable[[TrainingJob], None] | None" = None
    load_model: Callable[[BaseReference, TrainSettings], Any] = load_base_model
    add_adapter: Callable[[Any, TrainSettings], Any] = add_lora
    make_trainer: Callable[..., Any] = _sft_trainer
    encode: "Callable[[TrainingJob, Any, Sequence[tuple[str, str]], str], Encoded]" = _encode_text
    arguments: Mapping[str, Any] = field(default_factory=dict)
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
        logs: Folder for what `report_to` writes, which outlives the training.
        images: Folder that references to images in prompts start from.
    """

    base: BaseReference
    settings: TrainSettings
    seed: int
    train: Sequence[tuple[str, str]]
    valid: Sequence[tuple[str, str]]
    output: Path
    checkpoints: Path
    logs: Path | None = None
    images: Path = Path()


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


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _build(arm: Arm, job: TrainingJob, changes: dict[str, Any]) -> tuple[Any, Encoded, Encoded]:
    if arm.prepare:
        arm.prepare(job)
    from transformers import PrinterCallback, set_seed

    tokenizer = load_tokenizer(job.base)
    train = arm.encode(job, tokenizer, job.train, "training")
    valid = arm.encode(job, tokenizer, job.valid, "validation")
    model = arm.load_model(job.base, job.settings)
    set_seed(job.seed)
    model = arm.add_adapter(model, job.settings)
    trainer = arm.make_trainer(
        job.settings,
        model=model,
        args=training_arguments(job, **{**arm.arguments, **changes}),
        train_dataset=train.dataset,
        eval_dataset=valid.dataset,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # the Trainer's own choice where there is no bar
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL puts adapters on a 4-bit base into bf16; the optimizer wants float32
            parameter.data = parameter.data.float()
    return trainer, train, valid


def build(arm: Arm, job: TrainingJob, **changes: Any) -> Any:
    """The arm's trainer, ready to train.

    Args:
        arm: Whose hooks are used.
        job: Model, data, settings and seed.
        changes: Arguments of TRL's SFTConfig that differ from the job's.

    Raises:
        ModelError, EncodingError: see `trainers.models` and `trainers.data`.
    """
    return _build(arm, job, changes)[0]


def _add_callbacks(trainer: Any, arm: Arm, job: TrainingJob, resumed_from: int | None) -> None:
    """Progress, curves, early stopping and, as the last, the probe."""
    from transformers import EarlyStoppingCallback

    from probes import ProbeCallback
    from trainers.progress import ProgressLines

    s = job.settings
    if trainer.args.disable_tqdm:
        trainer.add_callback(ProgressLines(f"train {arm.name}-{job.seed}"))
    if "tensorboard" in s.report_to and job.logs is not None:
        trainer.add_callback(tensorboard(job.logs, resumed_from))
    if s.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(s.early_stopping_patience, s.early_stopping_min_delta))
    probe = ProbeCallback(
        every=s.probe_every,
        ledger=job.output / LEDGER,
        grit=getattr(trainer, "grit_manager", None),
        claims=arm.preconditions,
    )
    trainer.add_callback(probe)  # the last one, so that it sees what the others do to gradients


def run(arm: Arm, job: TrainingJob) -> TrainingResult:
    """Train one arm; write adapter, tokenizer, loss history and the probe's ledger to `job.output`.

    Same job on the same machine and thread count → same adapter bytes on a CPU, resumed or not.

    Raises:
        ModelError, EncodingError, ReporterError: see `trainers.models`, `trainers.data` and `trainers.reporting`.
    """
    check_reporters(job.settings, job.logs)
    trainer, train, valid = _build(arm, job, lasting_arguments(job, f"{arm.name}-{job.seed}"))
    checkpoint = to_resume(job.checkpoints)
    resumed_from = int(checkpoint.name.rsplit("-", 1)[-1]) if checkpoint else None
    _add_callbacks(trainer, arm, job, resumed_from)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started

    trainer.model.save_pretrained(job.output, safe_serialization=True)
    trainer.processing_class.save_pretrained(job.output)
    history = [dict(entry) for entry in trainer.state.log_history]
    remove_reporters(trainer)  # closed by now: the evaluation below would open them anew, or stand at the wrong step
    said = arm.report(trainer, job) if arm.report else {}
    (job.output / "loss_history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry for entry in history if math.isfinite(entry.get("eval_loss", math.nan))]
    best = min(evaluated, key=lambda entry: entry["eval_loss"], default={})  # the first of equal ones, as the Trainer
    state = trainer.state
    if job.settings.keeps_best and state.best_model_checkpoint is None:
        print("no evaluation loss was finite: the adapter is that of the last step", file=sys.stderr, flush=True)
    return TrainingResult(
        history=history,
        resumed_from=resumed_from,
        seconds=seconds,
        summary={
            "steps": state.global_step,
            "epochs": state.epoch,
            "stopped_early": state.global_step < state.max_steps,
            "train_items": len(train.dataset),
            "train_left_out": train.left_out,
            "valid_left_out": valid.left_out,
            "longest": max(train.longest, valid.longest),
            "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "final_loss": losses[-1] if losses else None,
            # Of the adapter that is saved: the best one, and after ranks have shrunk.
            "final_eval_loss": trainer.evaluate()["eval_loss"],
            "best_step": best.get("step"),
            "best_eval_loss": best.get("eval_loss"),
            "train_seconds": seconds,
            "resumed_from_step": resumed_from,
            "peak_memory_bytes": peak_memory_bytes(),
            **said,
        },
    )
