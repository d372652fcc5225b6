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
    fisher_update_freq: int | None = None  # steps between updates of the estimates; None: the layers' setting
    enable_projection: bool = True  # False switches it off; the adapter's configuration says what is projected
    kl_clip: float = 1e-3  # κ of the adaptive types, above 0
    eigen_power: float = 1.0  # p in [0, 1] of GRIT-Adam
    grafting: bool | None = None  # rescale each tensor's step to the length of Adam's (Adam types); None: yes
    ng_warmup_steps: int = 0  # steps without natural gradients
    grit_log_freq: int = 50  # steps between two records in grit_log.jsonl

    def __post_init__(self) -> None:
        check_type(self.grit_optimizer_type)
        if self.fisher_update_freq is not None and self.fisher_update_freq < 1:
            raise ValueError(f"fisher_update_freq: expected at least 1, or None; got {self.fisher_update_freq}")
        super().__post_init__()
        self.remove_unused_columns = False  # images and prompts are separate columns until collation


class GRITTrainer(GritMixin, Trainer):
    """``GRITTrainer(model=model, grit_adapter=adapter, args=GRITTrainingArguments(…), train_dataset=…).train()``.

    The documents' spellings `training_args=` and `tokenizer=` are accepted for `args=` and `processing_class=`.
    `grit_settings`: the fields that `GRITTrainingArguments` adds, for an `args` of another class.
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
        # The adapter has modified this very model; the PEFT model around it is the one that can be saved.
        if model not in (None, grit_adapter.model.get_base_model(), grit_adapter.model):
            raise ValueError("model: expected the model of grit_adapter, got another")
        self.grit_adapter, self._grit_settings = grit_adapter, dict(grit_settings or {})
        args = args or training_args or GRITTrainingArguments()
        super().__init__(grit_adapter.model, args, grit_manager=grit_adapter.manager, **kwargs)

    grit_args = property(lambda self: self.args)  # the documents' name

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer (SGD with momentum for the SGD types), wrapped; a GritOptimizer is left as it is."""
        manager = self.grit_adapter.manager
        ready = (self.optimizer, getattr(self.optimizer, "optimizer", None))
        if not any(isinstance(optimizer, GritOptimizer) for optimizer in ready):  # already configured
            names = ("kl_clip", "eigen_power", "grafting", "ng_warmup_steps")
            settings = {name: self._setting(name) for name in names}
            kind, log_freq = self._setting("grit_optimizer_type"), self._setting("grit_log_freq")
            set_mode(manager, kind, log_freq=log_freq, **settings)
        if (every := self._setting("fisher_update_freq")) is not None:
            manager.curvature.reconfigure(fisher_update_freq=every)
        if not self._setting("enable_projection"):
            manager.curvature.reconfigure(enable_projection=False)
        steps = next((n for n in (int(self.state.max_steps), int(self.args.max_steps)) if n > 0), None)
        manager.curvature.plan(steps or manager.curvature.total_steps)  # length of the whole run, if known
        return super().create_optimizer(model)

    def _setting(self, name: str) -> Any:
        default = GRITTrainingArguments.__dataclass_fields__[name].default
        return self._grit_settings.get(name, getattr(self.args, name, default))
