"""The training path that all arms share: the definition of an arm, the Trainer's arguments, checkpoints, a run.

Heavy packages load inside functions: params.yaml is checked without them, and Unsloth has to be imported first.
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import TrainingError, adapters, optimizers
from trainers.callbacks import progress_lines, remove_trackers, tracker_arguments, tracker_callbacks
from trainers.encode import Encoded, check_packing, collate_packed, encode_examples, encode_texts, pack
from trainers.keeper import KL, STEP_KL, attach, hold_out, to_read
from trainers.models import add_lora, load_base_model, load_tokenizer, scale_update
from trainers.pictures import encode_items
from trainers.settings import BaseReference, TrainSettings

LEDGER = "probe_ledger.jsonl"
RANKS = "GRIT_RANKS"
"""Environment variable with the number of devices that we launched on; clusters set WORLD_SIZE for other reasons."""


@dataclass(frozen=True)
class TrainingJob:
    base: BaseReference
    settings: TrainSettings
    seed: int  # of LoRA's initialization and the order of the items
    train: Sequence[tuple[str, ...]]  # rendered prompts and target answers, alternating
    valid: Sequence[tuple[str, ...]]  # the same, for the evaluation loss
    output: Path  # for the adapter; an existing empty folder
    checkpoints: Path  # survives a kill; training resumes from a complete checkpoint here
    report_to: Sequence[str] = ()  # names of `trainers.callbacks.TRACKERS`
    logs: Path = Path("logs/arm/seed")  # for what they write; survives the training
    texts: Sequence[tuple[str, bool]] = ()  # written by the base, and whether they are complete
    images: Path = Path()  # folder that references to pictures in prompts are relative to


def sft_trainer_class() -> Any:
    """TRL's SFTTrainer, able to run on this machine.

    TRL 1.15 computes the loss with Triton kernels, which need a GPU (without one: "'NoneType' object has no attribute
    'apply'"). On a CPU we use the model's own cross-entropy, which has the same value.
    """
    import torch
    from transformers import Trainer
    from trl import SFTTrainer

    if torch.cuda.is_available():
        return SFTTrainer

    class CpuSFTTrainer(SFTTrainer):
        compute_loss = Trainer.compute_loss

    return CpuSFTTrainer


def _trainer(settings: TrainSettings, **kwargs: Any) -> Any:
    if settings.layers is None:
        return sft_trainer_class()(**kwargs)
    from transformers import Trainer

    return Trainer(data_collator=kwargs["train_dataset"].processor.collate, **kwargs)


@dataclass(frozen=True)
class Arm:
    """What an arm does differently from plain LoRA; the defaults of its hooks are those of the baseline."""

    name: str  # as in params.yaml
    title: str  # for tables and plots
    settings: type[TrainSettings] = TrainSettings  # section train, and the arm's own sections
    preconditions: bool = False  # whether it claims to precondition gradients
    # Runs first, if possible before transformers and TRL are imported.
    prepare: Callable[[TrainingJob], None] | None = None
    load_model: Callable[[BaseReference, TrainSettings], Any] = load_base_model  # → the frozen base
    add_adapter: Callable[[Any, TrainSettings], Any] = add_lora  # → the model with trainable LoRA
    make_trainer: Callable[..., Any] = _trainer  # takes the settings and SFTTrainer's keyword arguments
    # Before training; takes the trainer, the settings and batches of texts that the base has written.
    start: Callable[[Any, Any, Iterable[Mapping[str, Any]]], None] | None = None
    # While open, every LoRA module of a model is called, even where a fused kernel otherwise reads its weights.
    unfused: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    # After training; returns further numbers for run.json and may write files to `job.output`.
    report: Callable[[Any, TrainingJob], dict[str, Any]] | None = None


# The Trainer's arguments


def training_arguments(job: TrainingJob, **changes: Any) -> Any:
    import torch
    from trl import SFTConfig

    s, ranks = job.settings, int(os.environ.get(RANKS, 1))
    values: dict[str, Any] = dict(
        output_dir=str(job.checkpoints),
        **({"num_train_epochs": s.epochs} if s.max_steps is None else {"max_steps": s.max_steps}),
        per_device_train_batch_size=s.batch_size // ranks,
        per_device_eval_batch_size=s.batch_size // ranks,
        gradient_accumulation_steps=s.gradient_accumulation,
        learning_rate=s.learning_rate,
        lr_scheduler_type=s.lr_scheduler,
        warmup_steps=s.warmup_steps,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        optim=optimizers.PLAIN if optimizers.is_path(s.optimizer) else s.optimizer,
        bf16=s.precision == "bf16",
        gradient_checkpointing=s.gradient_checkpointing,
        max_length=None,  # items that are too long were refused or left out
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
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # identical on all ranks
        accelerator_config={"even_batches": False},  # see `_share_batches`
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=s.layers is None,  # pictures are in a separate column until they are collated
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),  # `progress_lines` there
    )
    args = SFTConfig(**{**values, **changes})
    if args.device.type == "cpu":
        args._setup_devices = torch.device(
            "cpu"
        )  # several processes get cpu:0, onto which torch cannot load a checkpoint
    if args.n_gpu > 1:  # the Trainer would wrap the model in DataParallel and multiply the batch size
        print(f"{args.n_gpu} GPUs are visible; using {args.device}. Set train.devices to use more.", flush=True)
        args._n_gpu = 1
    return args


def _lasting_arguments(job: TrainingJob, name: str) -> dict[str, Any]:
    """Trackers, and which checkpoint is loaded at the end."""
    s = job.settings
    values = tracker_arguments(job.report_to, job.logs, name)
    if s.keeps_best:
        values |= {
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            # The best adapter has to be saved to be loaded, so every evaluation is followed by a checkpoint. Three are
            # kept: the best, the last, and the one before, since `to_resume` never uses that of the last step.
            "save_steps": s.eval_steps,
            "save_total_limit": 3,
            # Restores the count of evaluations without improvement.
            "restore_callback_states_from_checkpoint": s.early_stopping_patience is not None,
        }
    return values


# Checkpoints that survive a kill at any moment

_LAST_FILE = "trainer_state.json"  # written last


def _step(folder: Path) -> int:
    tail = folder.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() else -1


def latest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint-<step>; incomplete ones are removed. The folder need not exist."""
    best: Path | None = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step):
        try:
            state = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
            complete = state["global_step"] == _step(checkpoint)
        except (OSError, ValueError, KeyError):
            complete = False
        if complete:
            best = checkpoint
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return best


def to_resume(folder: Path) -> Path | None:
    """The newest complete checkpoint to resume from; incomplete ones, and that of the last step, are removed.

    From the checkpoint of the last step, or of an early stop, the Trainer would train one step too many (transformers
    5.17, unless an epoch ends there). So we repeat the steps after the checkpoint before it.
    """
    while (checkpoint := latest_complete(folder)) is not None:
        state = json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
        control = (state.get("stateful_callbacks") or {}).get("TrainerControl") or {}
        stopped = control.get("args", {}).get("should_training_stop")
        if state["global_step"] < state["max_steps"] and not stopped:
            break
        shutil.rmtree(checkpoint)
    return checkpoint


# A run


def _encode(job: TrainingJob, tokenizer: Any, examples: Sequence[tuple[str, ...]], kind: str) -> Encoded:
    settings, leave_out = job.settings, job.settings.overlong == "leave_out"
    if settings.layers is None:
        encoded = encode_examples(tokenizer, examples, settings.max_length, leave_out=leave_out)
    else:
        encoded = encode_items(job.base, job.images, examples, settings.max_length, leave_out=leave_out, kind=kind)
    if encoded.left_out:
        print(
            f"{encoded.left_out} of {len(examples)} {kind} items are longer than {settings.max_length} tokens and are "
            f"left out (longest: {encoded.longest})",
            flush=True,
        )
    return encoded


def _share_batches(trainer: Any) -> None:
    """Split the batches of a single-process run among the ranks, the short last ones included.

    The loss of an evaluation becomes the mean over the tokens of all ranks, as the Trainer's training loss is already.
    """
    import torch

    rank, ranks = trainer.args.process_index, trainer.args.world_size
    collate, load, predict = trainer.data_collator, trainer._get_dataloader, trainer.prediction_step

    def share(rows: list[Any]) -> Any:
        share_of_rank = rows[rank::ranks]
        count = len(share_of_rank)
        fill = rows[: len(rows[::ranks]) - count]  # as many rows as rank 0 has, since losses are gathered row by row
        batch = collate(share_of_rank + fill)
        positions = "attention_mask" if "attention_mask" in batch else "position_ids"
        batch["labels"][count:], batch[positions][count:] = -100, 0  # the filled rows carry no loss
        return batch

    def loader(*args: Any, batch_size: int, **kwargs: Any) -> Any:
        batches = load(*args, batch_size=batch_size * ranks, **kwargs)
        # Makes accelerate pass every batch to every rank, as transformers does for samplers that know their rank.
        batches.batch_sampler.num_processes, batches.batch_sampler.process_index = 1, 0
        return batches

    def predicted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, *rest = predict(model, inputs, *args, **kwargs)  # the mean over this rank's tokens
        tokens = inputs["labels"][:, 1:].ne(-100).sum()
        total, count = trainer.accelerator.reduce(torch.stack([torch.where(tokens > 0, loss * tokens, 0), tokens]))
        return total / count, *rest

    trainer.data_collator, trainer._get_dataloader, trainer.prediction_step = share, loader, predicted


def build(arm: Arm, job: TrainingJob, **changes: Any) -> tuple[Any, Encoded, Encoded]:
    """The arm's trainer, ready to train, and its encoded items; `changes` are arguments of SFTConfig."""
    if arm.prepare:
        arm.prepare(job)
    from transformers import PrinterCallback, set_seed

    tokenizer = load_tokenizer(job.base)
    train = _encode(job, tokenizer, job.train, "training")
    valid = _encode(job, tokenizer, job.valid, "validation")
    if problems := job.settings.warmup_problems(job.settings.steps_for(len(train.dataset))):
        raise TrainingError("\n".join(f"train.{problem}" for problem in problems))
    model = arm.load_model(job.base, job.settings)
    peft = bool(job.settings.peft)
    start_batches = adapters.learn_start(model, job.settings, train.dataset, tokenizer.pad_token_id) if peft else []
    set_seed(job.seed)
    model = arm.add_adapter(model, job.settings)
    rows, more = train.dataset, {}
    if job.settings.packing:
        rows = pack(train.dataset, job.settings.max_length)
        more = {"data_collator": collate_packed(tokenizer.pad_token_id)}
        check_packing(model, rows)
    trainer = arm.make_trainer(
        job.settings,
        model=model,
        args=training_arguments(job, **changes),
        train_dataset=rows,
        eval_dataset=valid.dataset,
        processing_class=tokenizer,
        **more,
    )
    if trainer.args.world_size > 1:
        _share_batches(trainer)
    if peft:
        adapters.finish_start(trainer, start_batches)
    if job.settings.optim_args or optimizers.is_path(job.settings.optimizer):
        if trainer.optimizer_cls_and_kwargs is not None:
            raise TrainingError(f"train.optim_args: expected {{}}, since {arm.name} brings its own optimizer")
        trainer.optimizer_cls_and_kwargs = optimizers.for_trainer(trainer, job.settings)
    trainer.remove_callback(PrinterCallback)  # the Trainer adds it where there is no progress bar
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts adapters on a 4-bit base to bf16; the optimizer needs float32
            parameter.data = parameter.data.float()
    if not job.texts and (arm.start or job.settings.preserve.method != "none"):
        raise TrainingError(f"{arm.name}: expected texts of the base, got none; run stage base_texts")
    if job.texts:
        held, texts = hold_out(encode_texts(tokenizer, job.texts, job.settings.max_length))
        if arm.start:
            arm.start(trainer, job.settings, to_read(trainer, texts))
        attach(trainer, job.settings, held, texts, job.seed, arm.unfused)
    return trainer, train, valid


def _add_callbacks(trainer: Any, arm: Arm, job: TrainingJob, resumed_from: int | None) -> None:
    """Progress, curves, early stopping, and last the probe, so that it sees what the others do to gradients."""
    from transformers import EarlyStoppingCallback

    from probes import ProbeCallback

    s = job.settings
    if trainer.args.disable_tqdm:
        trainer.add_callback(progress_lines(f"train {arm.name}-{job.seed}"))
    for tracker in tracker_callbacks(job.report_to, job.logs, resumed_from):
        trainer.add_callback(tracker)
    if s.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(s.early_stopping_patience, s.early_stopping_min_delta))
    manager = getattr(trainer, "grit_manager", None)
    readings = None if manager is None else manager.readings
    ledger = job.output / LEDGER
    trainer.add_callback(ProbeCallback(every=s.probe_every, ledger=ledger, readings=readings, claims=arm.preconditions))


def peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run(arm: Arm, job: TrainingJob) -> dict[str, Any]:
    """Train one arm; write adapter, tokenizer, losses and ledger to `job.output`; return numbers for run.json.

    Under `accelerate launch` every rank does so, to its own output, with shared checkpoints. The same job on the same
    machine with the same thread count gives the same adapter bytes on a CPU, resumed or not.
    """
    import torch
    from safetensors.torch import load_file

    trainer, train, valid = build(arm, job, **_lasting_arguments(job, f"{arm.name}-{job.seed}"))
    from torch.random import fork_rng

    with trainer.args.main_process_first():  # it removes incomplete checkpoints
        checkpoint = to_resume(job.checkpoints)
    resumed_from = _step(checkpoint) if checkpoint else None
    _add_callbacks(trainer, arm, job, resumed_from)
    trained = _trainable(trainer.model)
    # Evaluations draw random numbers: without the fork, how often a run evaluates would change its dropout.
    trainer.evaluate = fork_rng(devices=[])(trainer.evaluate)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started  # in this process; a resumed run has trained before

    scale_update(trainer.model, job.settings.scale_update)
    trainer.model.save_pretrained(job.output, safe_serialization=True)
    trainer.processing_class.save_pretrained(job.output)
    saved = job.output / "adapter_model.safetensors"
    history = [dict(entry) for entry in trainer.state.log_history if STEP_KL not in entry]
    remove_trackers(trainer)  # the evaluation below would reopen them, or appear at the wrong step
    facts = arm.report(trainer, job) if arm.report and trainer.is_world_process_zero() else {}
    (job.output / "loss_history.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry for entry in history if math.isfinite(entry.get("eval_loss", math.nan))]
    best = min(evaluated, key=lambda entry: entry["eval_loss"], default={})  # the first of equals, like the Trainer
    state, final = trainer.state, trainer.evaluate()
    if job.settings.keeps_best and state.best_model_checkpoint is None:
        print("no evaluation loss was finite: saving the adapter of the last step", file=sys.stderr, flush=True)
    return {
        "devices": trainer.args.world_size,
        "steps": state.global_step,
        "epochs": state.epoch,
        "stopped_early": state.global_step < state.max_steps,
        "train_items": len(train.dataset),
        "train_left_out": train.left_out,
        "valid_left_out": valid.left_out,
        "longest": max(train.longest, valid.longest),
        # Fewer if ranks have shrunk, more if the start has become part of the adapter.
        "trained_parameters": trained,
        "saved_parameters": sum(tensor.numel() for tensor in load_file(saved).values()),
        "trainable_parameters": min(trained, _trainable(trainer.model)),
        "final_loss": losses[-1] if losses else None,
        # Of the saved adapter: the best one, after ranks have shrunk.
        "final_eval_loss": final["eval_loss"],
        "final_kl": final.get(KL),
        "best_step": best.get("step"),
        "best_eval_loss": best.get("eval_loss"),
        "train_seconds": seconds,
        "resumed_from_step": resumed_from,
        "peak_memory_bytes": peak_memory_bytes(),
        **({"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}),
        **facts,
    }


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
