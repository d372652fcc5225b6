"""GRIT inside Hugging Face's Trainer and TRL's SFTTrainer; needs transformers."""

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from grit.config import GRITConfig
from grit.manager import GRITManager, Manager
from grit.optim import GritOptimizer

logger = logging.getLogger("grit")

LOG_FILE = "grit_log.jsonl"


class GritCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the manager when a Trainer starts, logs and ends; decides nothing.

    GritTrainer brings its own. With a plain Trainer: ``Trainer(…, optimizers=(GritOptimizer(adamw, manager), None),
    callbacks=[GritCallback(manager)])``; there the Trainer's reporters run first and do not get GRIT's numbers, which
    `grit_log.jsonl` has all the same if the manager was given that file.
    """

    def __init__(self, manager: Manager):
        self.manager = manager

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.manager.open()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            for name, value in self.manager.metrics().items():
                logs.setdefault(name, value)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.manager.finish(kwargs.get("optimizer"))
        self.manager.close()


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
        """As the Trainer's, and either a configuration or a manager for the very model that is trained."""
        if grit_config is not None and grit_manager is not None:
            raise ValueError("expected grit_config or grit_manager, got both")
        super().__init__(*args, **kwargs)
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
        self._loss_of_step = 0.0
        # First in line: what it adds to the logs reaches TensorBoard, W&B and whoever else reports. One is enough.
        handler = self.callback_handler  # type: ignore[attr-defined]
        others = [callback for callback in handler.callbacks if not isinstance(callback, GritCallback)]
        handler.callbacks = [GritCallback(grit_manager), *others]

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
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if manager.curvature.wants_losses:
            self._loss_of_step += float(loss)  # what comes back is this batch's share of the step's mean
            if self.accelerator.sync_gradients:
                manager.observe_loss(self._loss_of_step)
                self._loss_of_step = 0.0
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """The norm before clipping; GritOptimizer clips, after preconditioning."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
        wrapped = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(wrapped, GritOptimizer) and norm is not None:
            wrapped.gradient_norm = float(norm)
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.grit_manager.curvature.fit_to_checkpoint(Path(resume_from_checkpoint), self.optimizer)
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """The adapter and GRIT's state as they were then: later statistics would shrink away what it needs.

        The log keeps what came after; a record of kind "best" says where GRIT goes back, and from where.
        """
        super()._load_best_model()  # type: ignore[misc]
        manager, reached = self.grit_manager, self.state.global_step
        if self.state.best_global_step == reached:
            return
        file = Path(self.state.best_model_checkpoint) / "optimizer.pt"
        if file.is_file():
            state = torch.load(file, map_location="cpu", weights_only=True)["grit"]
            manager.load_state_dict(state, keep_history=True)
        else:
            logger.warning("GRIT: no %s beside the best adapter; its ranks do not shrink", file)
            manager.curvature.restart()
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
