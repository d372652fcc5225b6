"""`GRITTrainer`: Hugging Face's Trainer with GRIT-VLM inside the optimizer's step."""

from dataclasses import dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments

from grit.optim import GritOptimizer
from grit.trainer import GritMixin
from grit_vlm.config.model_configs import check_type
from grit_vlm.models.vlm_adapter import VLMGRITAdapter
from grit_vlm.optimizers.natural_gradient import set_mode


@dataclass
class GRITTrainingArguments(TrainingArguments):
    output_dir: str | None = field(default="grit_output")
    grit_optimizer_type: str = "grit_adam"  # see grit_vlm.optimizers.natural_gradient
    fisher_update_freq: int | None = None  # steps between updates of the estimates; None: the layers' setting
    enable_projection: bool = True  # False switches it off; the adapter's configuration says what is projected

    def __post_init__(self) -> None:
        check_type(self.grit_optimizer_type)
        if self.fisher_update_freq is not None and self.fisher_update_freq < 1:
            raise ValueError(f"fisher_update_freq: expected at least 1, or None; got {self.fisher_update_freq}")
        super().__post_init__()
        self.remove_unused_columns = False  # images and prompts are separate columns until collation


class GRITTrainer(GritMixin, Trainer):
    """``GRITTrainer(model=model, grit_adapter=adapter, args=GRITTrainingArguments(…), train_dataset=…).train()``.

    The documents' spellings `training_args=` and `tokenizer=` are accepted for `args=` and `processing_class=`. With
    `args` of another class, the adapter's manager is taken as it is (see `set_mode`).
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        grit_adapter: VLMGRITAdapter,
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
        self.grit_adapter = grit_adapter
        args = args or training_args or GRITTrainingArguments()
        super().__init__(grit_adapter.model, args, grit_manager=grit_adapter.manager, **kwargs)

    grit_args = property(lambda self: self.args)  # the documents' name

    def create_optimizer(self, model: Any = None) -> Any:
        """The Trainer's optimizer (SGD with momentum for the SGD types), wrapped; a GritOptimizer is left as it is."""
        args, manager = self.args, self.grit_adapter.manager
        if isinstance(args, GRITTrainingArguments):
            ready = (self.optimizer, getattr(self.optimizer, "optimizer", None))
            if not any(isinstance(optimizer, GritOptimizer) for optimizer in ready):  # already configured
                set_mode(manager, args.grit_optimizer_type)
            if args.fisher_update_freq is not None:
                manager.curvature.reconfigure(fisher_update_freq=args.fisher_update_freq)
            if not args.enable_projection:
                manager.curvature.reconfigure(enable_projection=False)
        steps = next((n for n in (int(self.state.max_steps), int(args.max_steps)) if n > 0), None)
        manager.curvature.plan(steps or manager.curvature.total_steps)  # length of the whole run, if known
        return super().create_optimizer(model)
