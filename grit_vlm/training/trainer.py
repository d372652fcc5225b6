"""`GRITTrainer`: Hugging Face's Trainer with GRIT-VLM inside the optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from grit.trainer import GritMixin
from grit_vlm.models.vlm_adapter import VLMGRITAdapter
from grit_vlm.optimizers.natural_gradient import MODES, FisherOptimizer, check_type, set_mode


@dataclass
class GRITTrainingArguments(TrainingArguments):
    """TrainingArguments, and how GRIT makes its steps.

    Attributes:
        grit_optimizer_type: See `grit_vlm.optimizers.natural_gradient`.
        fisher_update_freq: Steps between two updates of the estimates; None: as the layers were told.
        enable_projection: Switches projection off where it is False; which modalities are projected, and how far, the
            adapter's configuration says.
        kl_clip: κ of the adaptive types, above 0.
        eigen_power: p in [0, 1] of GRIT-Adam.
        grafting: Whether a step has the length that Adam's would have, tensor by tensor (types of Adam); None: it has.
        ng_warmup_steps: Steps without natural gradients.
        grit_log_freq: Steps between two records in grit_log.jsonl.
    """

    output_dir: str | None = field(default="grit_output")
    grit_optimizer_type: str = "grit_adam"
    fisher_update_freq: int | None = None
    enable_projection: bool = True
    kl_clip: float = 1e-3
    eigen_power: float = 1.0
    grafting: bool | None = None
    ng_warmup_steps: int = 0
    grit_log_freq: int = 50

    def __post_init__(self) -> None:
        """As transformers'.

        Raises:
            OptimizerTypeError: no such type. ValueError: a frequency below 1.
        """
        check_type(self.grit_optimizer_type)
        if self.fisher_update_freq is not None and self.fisher_update_freq < 1:
            raise ValueError(f"fisher_update_freq: expected at least 1, or None; got {self.fisher_update_freq}")
        super().__post_init__()
        self.remove_unused_columns = False  # images and prompts are columns of their own until they are collated


class GRITTrainerMixin(GritMixin):
    """What makes a Trainer class train with a `VLMGRITAdapter`; see `GRITTrainer`."""

    grit_adapter: VLMGRITAdapter

    def __init__(
        self,
        *args: Any,
        grit_adapter: VLMGRITAdapter,
        grit_settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        """As the Trainer's, with an adapter.

        Args:
            args: The Trainer's.
            grit_adapter: Of the model.
            grit_settings: Fields of `GRITTrainingArguments` that it adds to TrainingArguments, for those whose `args`
                are of another class.
            kwargs: The Trainer's.

        Raises:
            ValueError: the model is not the adapter's.
        """
        self.grit_adapter, self._told = grit_adapter, dict(grit_settings or {})
        model = args[0] if args else kwargs.get("model")
        if model is None or model is grit_adapter.model.get_base_model():
            # The adapter has put its layers into this very model; PEFT's round it is the one that can be saved.
            if args:
                args = (grit_adapter.model, *args[1:])
            else:
                kwargs = {**kwargs, "model": grit_adapter.model}
        elif model is not grit_adapter.model:
            raise ValueError("model: expected the one that grit_adapter was made of, got another")
        super().__init__(*args, grit_manager=grit_adapter.manager, **kwargs)

    @property
    def grit_args(self) -> Any:
        """The same as `args`."""
        return self.args

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer (SGD with momentum for the SGD types), wrapped."""
        for ready in (self.optimizer, getattr(self.optimizer, "optimizer", None)):
            if isinstance(ready, FisherOptimizer):  # whose maker has said how it steps
                ready.max_grad_norm = ready.max_grad_norm or ready.limit(self.args.max_grad_norm)
                self._tell_layers()
                return self.optimizer
        a, manager = self.args, self.grit_adapter.manager
        kind = self._setting("grit_optimizer_type")
        names = ("kl_clip", "eigen_power", "grafting", "ng_warmup_steps")
        settings = {name: self._setting(name) for name in names}
        set_mode(manager, kind, log_freq=self._setting("grit_log_freq"), **settings)
        self._tell_layers()
        if self.optimizer is None and MODES[kind][0] == "sgd":
            weights = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.SGD(
                weights, lr=a.learning_rate, momentum=manager.config.sgd_momentum, weight_decay=a.weight_decay
            )
        super(GritMixin, self).create_optimizer(model)  # type: ignore[misc]
        self.optimizer = FisherOptimizer(self.optimizer, manager, max_grad_norm=a.max_grad_norm)
        return self.optimizer

    def _tell_layers(self) -> None:
        manager = self.grit_adapter.manager
        manager.set_update_freq(self._setting("fisher_update_freq"))
        if not self._setting("enable_projection"):
            manager.stop_projecting()
        manager.plan(max(1, self._steps()))

    def _setting(self, name: str) -> Any:
        """As told, else as in `args`, else the default."""
        default = GRITTrainingArguments.__dataclass_fields__[name].default
        return self._told.get(name, getattr(self.args, name, default))

    def _steps(self) -> int:
        """Optimizer steps of the whole run, as the Trainer has planned them by now."""
        planned = int(self.state.max_steps)
        if planned > 0:
            return planned
        return int(self.args.max_steps) if self.args.max_steps > 0 else self.grit_adapter.manager.total_steps


class GRITTrainer(GRITTrainerMixin, Trainer):
    """``GRITTrainer(model=model, grit_adapter=adapter, args=GRITTrainingArguments(…), train_dataset=…).train()``.

    The documents' spellings `training_args=` and `tokenizer=` are taken for `args=` and `processing_class=`. (There
    the Fisher information is updated after the backward pass by the trainer, and gradients projected then; here all of
    it happens inside the optimizer's step, where gradient accumulation, clipping and loss scaling are over.)
    """

    def __init__(
        self, *args: Any, training_args: TrainingArguments | None = None, tokenizer: Any = None, **kwargs: Any
    ):
        """See the class.

        Raises:
            ValueError: the model is not the adapter's, or both spellings of an argument are used.
        """
        for name, value, today in (
            ("training_args", training_args, "args"),
            ("tokenizer", tokenizer, "processing_class"),
        ):
            if value is not None:
                if kwargs.get(today) is not None:
                    raise ValueError(f"expected {name} or {today}, which are the same; got both")
                kwargs[today] = value
        if kwargs.get("args") is None and len(args) < 2:
            kwargs["args"] = GRITTrainingArguments()
        super().__init__(*args, **kwargs)
