"""`GRITTrainer`: Hugging Face's Trainer with GRIT-VLM inside the optimizer's step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments

from grit.optim import GritOptimizer
from grit.trainer import GritMixin
from grit_vlm.models.vlm_adapter import VLMGRITAdapter
from grit_vlm.optimizers.natural_gradient import check_type, set_mode


@dataclass
class GRITTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="grit_output")
    grit_optimizer_type: str = "grit_adam"  # see grit_vlm.optimizers.natural_gradient
    fisher_update_freq: int | None = None  # steps between two updates of the estimates; None: as the layers were told
    enable_projection: bool = True  # False switches it off; what is projected, the adapter's configuration says
    kl_clip: float = 1e-3  # κ of the adaptive types, above 0
    eigen_power: float = 1.0  # p in [0, 1] of GRIT-Adam
    grafting: bool | None = None  # a step is as long as Adam's, tensor by tensor (types of Adam); None: it is
    ng_warmup_steps: int = 0  # steps without natural gradients
    grit_log_freq: int = 50  # steps between two records in grit_log.jsonl

    def __post_init__(self) -> None:
        check_type(self.grit_optimizer_type)
        if self.fisher_update_freq is not None and self.fisher_update_freq < 1:
            raise ValueError(f"fisher_update_freq: expected at least 1, or None; got {self.fisher_update_freq}")
        super().__post_init__()
        self.remove_unused_columns = False  # images and prompts are columns of their own until they are collated


class GRITTrainer(GritMixin, Trainer):
    """``GRITTrainer(model=model, grit_adapter=adapter, args=GRITTrainingArguments(…), train_dataset=…).train()``.

    The documents' spellings `training_args=` and `tokenizer=` are taken for `args=` and `processing_class=`.
    `grit_settings`: fields that `GRITTrainingArguments` adds to TrainingArguments, where `args` is of another class.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        grit_adapter: VLMGRITAdapter,
        grit_settings: Mapping[str, Any] | None = None,
        training_args: TrainingArguments | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ):
        if args is not None and training_args is not None:
            raise ValueError("expected training_args or args, which are the same; got both")
        if tokenizer is not None and kwargs.setdefault("processing_class", tokenizer) is not tokenizer:
            raise ValueError("expected tokenizer or processing_class, which are the same; got both")
        # The adapter has put its layers into this very model; PEFT's round it is the one that can be saved.
        if model not in (None, grit_adapter.model.get_base_model(), grit_adapter.model):
            raise ValueError("model: expected the one that grit_adapter was made of, got another")
        self.grit_adapter, self._told = grit_adapter, dict(grit_settings or {})
        args = args or training_args or GRITTrainingArguments()
        super().__init__(grit_adapter.model, args, grit_manager=grit_adapter.manager, **kwargs)

    grit_args = property(lambda self: self.args)  # the documents' name

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer (SGD with momentum for the SGD types), wrapped; a GritOptimizer stays as it is."""
        manager = self.grit_adapter.manager
        ready = (self.optimizer, getattr(self.optimizer, "optimizer", None))
        if not any(isinstance(optimizer, GritOptimizer) for optimizer in ready):  # whose maker has said how it steps
            names = ("kl_clip", "eigen_power", "grafting", "ng_warmup_steps")
            settings = {name: self._setting(name) for name in names}
            kind, log_freq = self._setting("grit_optimizer_type"), self._setting("grit_log_freq")
            set_mode(manager, kind, log_freq=log_freq, **settings)
        if (every := self._setting("fisher_update_freq")) is not None:
            manager.curvature.reconfigure(fisher_update_freq=every)
        if not self._setting("enable_projection"):
            manager.curvature.reconfigure(enable_projection=False)
        steps = next((n for n in (int(self.state.max_steps), int(self.args.max_steps)) if n > 0), None)
        manager.curvature.plan(steps or manager.curvature.total_steps)  # of the whole run, as planned by now
        return super().create_optimizer(model)

    def _setting(self, name: str) -> Any:
        default = GRITTrainingArguments.__dataclass_fields__[name].default
        return self._told.get(name, getattr(self.args, name, default))
