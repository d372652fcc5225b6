"""Two ways of training the tiny model under the probe: a plain loop and transformers' Trainer."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks._tiny_llama import BATCH, batches, example, tiny_llama, weights_of
from probes import Probe, ProbeCallback, Verdict, judge

STEPS, SAMPLES = 24, 6


@dataclass(frozen=True)
class Setting:
    """What every run of the catalogue is repeated with.

    Attributes:
        seed: Of the weights and the batches.
        lr: Learning rate of the Adam family; others scale it.
    """

    seed: int = 0
    lr: float = 1e-2


@dataclass
class Setup:
    """What is put round a model.

    Attributes:
        optimizer: Steps.
        probe: What the probe is told (keyword arguments of `Probe`, `ProbeCallback`).
        watched: The optimizer that the probe is given, if it is another one (plain loop).
        after_backward: Called after every micro-batch.
        before_step: Called before `optimizer.step()`.
        after_step: Called between `optimizer.step()` and `zero_grad()`.
        callbacks: Of the Trainer.
        trainer: Its class, and its further arguments.
        close: Called at the end.
    """

    optimizer: Any
    probe: dict[str, Any] = field(default_factory=dict)
    watched: Any = None
    after_backward: Callable[[], Any] = lambda: None
    before_step: Callable[[], Any] = lambda: None
    after_step: Callable[[], Any] = lambda: None
    callbacks: list[Any] = field(default_factory=list)
    trainer: Callable[..., Any] | None = None
    close: Callable[[], Any] = lambda: None


Arrange = Callable[[Any, Setting], Setup]
"""From a model and a setting to what is put round the model."""


def plain_loop(
    arrange: Arrange,
    setting: Setting,
    *,
    steps: int = STEPS,
    accumulation: int = 1,
    clip: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    checkpointing: bool = False,
    loss_factor: Callable[[int], float] = lambda step: 1.0,
    **model_options: Any,
) -> Verdict:
    """Train in a loop of one's own and judge.

    Args:
        arrange: What is put round the model.
        setting: Seed and learning rate.
        steps: Optimizer steps.
        accumulation: Micro-batches of a step; with more than one, half of the steps are enough.
        clip: Total norm to which raw gradients are clipped, before preconditioning; 0 = not.
        schedule: Step → factor of the learning rate.
        checkpointing: Whether activations are computed again in the backward pass.
        loss_factor: Step → what the loss is multiplied by.
        model_options: Of `tiny_llama`.
    """
    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed, **model_options)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    setup, stream = arrange(model, setting), batches(setting.seed)
    scheduler = LambdaLR(setup.optimizer, schedule) if schedule is not None else None
    watched = setup.optimizer if setup.watched is None else setup.watched
    try:
        with Probe(model, watched, every=steps // SAMPLES, max_grad_norm=clip, **setup.probe) as probe:
            for step in range(steps):
                for _ in range(accumulation):
                    (model(**next(stream)).loss * loss_factor(step) / accumulation).backward()
                    setup.after_backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(weights_of(model), clip)
                setup.before_step()
                setup.optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                setup.after_step()
                setup.optimizer.zero_grad()
    finally:
        setup.close()
    return judge(probe)


def hf_trainer(
    arrange: Arrange, setting: Setting, *, steps: int = STEPS, accumulation: int = 1, clip: float = 1.0, **training: Any
) -> Verdict:
    """Train with transformers' Trainer and judge.

    Args:
        arrange: What is put round the model.
        setting: Seed and learning rate.
        steps: Optimizer steps.
        accumulation: Micro-batches of a step.
        clip: max_grad_norm of the Trainer.
        training: Further TrainingArguments.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed)
    setup = arrange(model, setting)
    generator = torch.Generator().manual_seed(1000 + setting.seed)
    items = [example(generator, padded=i % 2 == 0) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": setting.lr,
            "lr_scheduler_type": "constant",
            "max_grad_norm": clip,
            "seed": setting.seed,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **training,
        }
        # An optimizer given by the user: with optimizers=(None, None) the Trainer makes AdamW itself.
        trainer = (setup.trainer or Trainer)(
            model=model,
            args=TrainingArguments(**values),
            train_dataset=items,
            callbacks=list(setup.callbacks),
            optimizers=(setup.optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        callback = ProbeCallback(every=steps // SAMPLES, **setup.probe)
        trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            setup.close()
    if callback.probe is None:
        raise RuntimeError("the Trainer did not start")
    return judge(callback.probe)


def at(event: str, do: Callable[[], Any]) -> Any:
    """A Trainer's callback that does one thing at one event."""
    from transformers import TrainerCallback

    def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        do()

    return type("At", (TrainerCallback,), {event: call})()
