"""GRIT inside Hugging Face's Trainer and TRL's SFTTrainer; needs transformers."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from grit import plots
from grit.config import GRITConfig, GRITError
from grit.manager import GRITManager, Manager
from grit.optim import GritOptimizer

LOG_FILE = "grit_log.jsonl"


class GritCallback(TrainerCallback):  # type: ignore[misc]
    """Opens and closes the manager, hands its numbers to the Trainer's log, and puts GRIT into a plain Trainer's step.

    A GritTrainer brings its own. Added to a plain Trainer, ``SFTTrainer(…, callbacks=[GritCallback(manager)])``, it
    wraps the optimizer before the first step, so that gradients are preconditioned inside of it; the Trainer then
    clips before GRIT, not after, its reporters do not get GRIT's numbers (`grit_log.jsonl` has them if the manager
    was given that file), and a checkpoint cannot be resumed. It refuses with the reason where it would have no effect.
    Beside `create_grit_optimizer`, leave the manager out: it is the optimizer's.
    """

    def __init__(self, manager: Manager | None = None, config: GRITConfig | None = None):
        if config is not None and (manager is None or config != manager.config):
            raise ValueError("config: expected the manager's own configuration, got another one. Leave it out")
        self.manager: Any = manager
        self.trackers: list[TrainerCallback] = []  # who gets pictures at the end of training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer: Any = kwargs.get("optimizer")
        wrapped: Any = getattr(optimizer, "optimizer", optimizer)
        if isinstance(wrapped, GritOptimizer):
            self.manager = self.manager or wrapped.manager
            if self.manager is not wrapped.manager:
                raise GRITError("GritCallback expected the optimizer's own manager, got another one. Leave it out")
        elif self.manager is None:
            raise GRITError("GritCallback expected a manager of the model, got none. Write GritCallback(manager)")
        elif optimizer is not None:
            if state.global_step:
                raise GRITError("GritCallback cannot resume from a checkpoint of a plain Trainer: use a GritTrainer")
            if wrapped is optimizer or args.deepspeed or args.fsdp:
                raise GRITError(
                    f"GritCallback expected an optimizer prepared by accelerate, without DeepSpeed and FSDP, got "
                    f"{type(optimizer).__name__}: nothing would be preconditioned. Use a GritTrainer"
                )
            optimizer.optimizer = GritOptimizer(wrapped, self.manager)
        self.manager.open()
        if self.manager.capture is not None:
            self.manager.capture.accumulation = args.gradient_accumulation_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            for name, value in self.manager.metrics().items():
                logs.setdefault(name, value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.manager.finish(kwargs.get("optimizer"))
        trackers = [t for t in self.trackers if getattr(t, "tb_writer", None) or getattr(t, "_wandb", None)]
        if trackers:
            ranks = self.manager.history[-1]["ranks"]
            numbers = {f"Fisher/{name}/{key}": k for name, entry in ranks.items() for key, k in entry.items()}
            figures = plots.tracked(self.manager.history, self.manager.config)
            for tracker in trackers:
                _send(tracker, numbers, figures, state.global_step)
        self.manager.close()


def _send(tracker: Any, numbers: dict[str, int], figures: dict[str, Any], step: int) -> None:
    """Final numbers and matplotlib figures to transformers' TensorBoard or W&B callback; other trackers take none."""
    if getattr(tracker, "tb_writer", None):
        for name, value in numbers.items():
            tracker.tb_writer.add_scalar(name, value, step)
        for name, figure in figures.items():
            tracker.tb_writer.add_figure(name, figure, step)
    else:
        pictures = {name: tracker._wandb.Image(figure) for name, figure in figures.items()}
        tracker._wandb.log({**numbers, **pictures})


class GritMixin:
    """What makes a Trainer class a GritTrainer; see `grit_trainer_class`."""

    args: Any
    model: Any
    optimizer: Any
    accelerator: Any
    state: Any

    def __init__(
        self, *args: Any, grit_config: GRITConfig | None = None, grit_manager: Manager | None = None, **kwargs: Any
    ):
        """The Trainer's arguments, and a configuration, or a manager of the model that is trained."""
        if grit_config is not None and grit_manager is not None and grit_config != grit_manager.config:
            raise ValueError("grit_config: expected that of grit_manager, got another one. Leave one of the two out")
        super().__init__(*args, **kwargs)
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise ValueError("save_only_model: expected false with load_best_model_at_end, as GRIT's state is needed")
        if isinstance(self.optimizer, GritOptimizer) and self.optimizer.manager is not grit_manager:
            raise ValueError("grit_manager: expected the manager of the GritOptimizer in optimizers")
        log_file = Path(self.args.output_dir) / LOG_FILE if self.args.process_index == 0 else None
        if grit_manager is None:
            grit_manager = GRITManager(self.model, grit_config, log_file=log_file)
        elif not any(pair.a is p for pair in grit_manager.pairs()[:1] for p in self.model.parameters()):
            raise ValueError("grit_manager: expected a manager of the model that is trained, got one of another model")
        elif grit_manager.log_file is None:
            grit_manager.log_file = log_file
        self.grit_manager = grit_manager
        # First in line, so that TensorBoard, W&B and other reporters get the numbers that it adds. One is enough.
        handler = self.callback_handler  # type: ignore[attr-defined]
        others = [other for other in handler.callbacks if not isinstance(other, GritCallback)]
        callback = GritCallback(grit_manager)
        callback.trackers = others
        handler.callbacks = [callback, *others]

    def create_optimizer(self, model: Any = None) -> Any:
        config = self.grit_manager.config
        for ready in (self.optimizer, getattr(self.optimizer, "optimizer", None)):  # the second: train() called again
            if isinstance(ready, GritOptimizer):
                ready.max_grad_norm = ready.max_grad_norm or ready.limit(self.args.max_grad_norm)
                return self.optimizer
        if self.optimizer is None and config.mode == "sgd":
            weights = [p for p in self.model.parameters() if p.requires_grad]
            options = {"lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            self.optimizer = torch.optim.SGD(weights, momentum=config.sgd_momentum, **options)
        super().create_optimizer(model)  # type: ignore[misc]
        self.optimizer = GritOptimizer(self.optimizer, self.grit_manager, max_grad_norm=self.args.max_grad_norm)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        manager, accumulation = self.grit_manager, self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        if manager.capture is not None and manager.capture.active:
            manager.capture.accumulation = accumulation
            manager.capture.loss_divisor = None
            accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None  # type: ignore[attr-defined]
            if num_items_in_batch is not None and accepts:
                # Tokens of all ranks; DDP then averages a loss that was multiplied by the number of ranks.
                ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                manager.capture.loss_divisor = num_items_in_batch / ranks
            scaler = getattr(self.accelerator, "scaler", None)
            manager.capture.loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def _clip_grad_norm(self, model: Any) -> Any:
        """The norm before clipping; GritOptimizer clips, after preconditioning."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        wrapped = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(wrapped, GritOptimizer) and norm is not None:
            wrapped.gradient_norm = float(norm)
        return norm

    def _load_best_model(self) -> None:
        """The adapter and GRIT's state as they were then: later statistics would shrink away what it needs.

        The log keeps what came after; a record of kind "best" says where GRIT goes back, and from where.
        """
        super()._load_best_model()  # type: ignore[misc]
        manager, reached = self.grit_manager, self.state.global_step
        if self.state.best_global_step == reached:
            return
        file = Path(self.state.best_model_checkpoint) / "optimizer.pt"
        manager.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["grit"], keep_history=True)
        manager.add_record({"kind": "best", "trained_to": reached})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.grit_manager.close(check=False)


@functools.cache
def grit_trainer_class(base: type = Trainer) -> Any:
    """A GritTrainer on top of any Trainer class, e.g. TRL's SFTTrainer."""
    return type(f"Grit{base.__name__}", (GritMixin, base), {"__doc__": f"{base.__name__} with GRIT."})


class GritTrainer(GritMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with GRIT: ``GritTrainer(model=…, args=…, train_dataset=…, grit_config=GRITConfig())``."""


GRITTrainer, GRITCallback = GritTrainer, GritCallback  # as the source documents spell them
