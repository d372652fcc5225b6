"""Section `train` of params.yaml, and the reference to the base model."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainers import TrainingError, optimizers
from trainers.adapters import is_plain, peft_config
from trainers.words import suggest

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Settings that are immutable and refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


MODALITIES = ("vision", "text", "cross_modal", "fusion")


class Preserve(Section):
    """How a tuned model is kept close to its base, on texts that the base has written."""

    method: Literal["none", "activations", "kfac", "distill"] = "none"
    strength: Annotated[float, Field(ge=0, description="λ: nats of loss for a nat of KL")] = 1.0
    kl: Annotated[float, Field(gt=0, description="nats per token; the strength adapts to keep KL there")] | None = None
    rows: Annotated[int, Field(ge=1, description="texts per step, of distill")] = 4
    rank: Annotated[int, Field(ge=1, description="directions resolved, of activations and kfac")] = 64

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.kl is not None and (self.method == "none" or self.strength == 0):
            raise ValueError(
                f"kl: {self.kl} has no effect with method {self.method} and strength {self.strength}; set a method and "
                "a strength above 0 to adapt from, or kl to null"
            )
        return self


_KEY = re.compile(r"[\w.]+: ")


class TrainSettings(Section):
    """Section train, which all arms share; an arm adds its own sections in a subclass."""

    plain_lora: ClassVar[str] = ""  # why the arm requires an update s·B·A that starts at zero; empty: it does not
    text_only: ClassVar[bool] = False  # whether the arm refuses vision-language models

    rank: Annotated[int, Field(ge=1, le=1024, description="r")]
    alpha: Annotated[float, Field(gt=0, description="α; the update is scaled by α/r")]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str]
    # Of a vision-language model, in the place of target_modules: a configuration by name, or fields of
    # grit_vlm.ModalityConfig for each modality.
    layers: dict[str, Any] | None = None
    quantize_base: Literal["none", "nf4"]
    max_steps: Annotated[int, Field(ge=1, description="optimizer steps")] | None
    epochs: Annotated[float, Field(gt=0, description="passes over the training items")] | None
    batch_size: Annotated[int, Field(ge=1, description="items per forward pass, over all devices")]
    gradient_accumulation: Annotated[int, Field(ge=1, description="forward passes per optimizer step")]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0, description="0 = no clipping")]
    optimizer: str  # any name of transformers', or the dotted path of a class or of a function of a model
    optim_args: dict[str, Any] = {}  # of that class or function
    devices: Literal["all"] | Positive = 1  # share every batch; all = the visible GPUs
    peft: dict[str, Any] | str = {}  # a PEFT configuration's fields, or the path of an adapter_config.json
    precision: Literal["fp32", "bf16", "auto"]  # auto: the faster one, as stage prepare_base measured it
    max_length: Annotated[int, Field(ge=8, description="tokens of prompt and completion")]
    overlong: Literal["refuse", "leave_out"]
    packing: bool = False  # several items in a row of max_length; none attends to another
    gradient_checkpointing: bool
    unsloth_fused_lora: bool
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    keep_best: bool
    early_stopping_patience: Positive | None
    early_stopping_min_delta: Annotated[float, Field(ge=0, description="of the evaluation loss")]
    preserve: Preserve = Preserve()
    replay: Annotated[float, Field(ge=0, lt=1, description="share of general questions in the training data")] = 0.0
    scale_update: Annotated[float, Field(gt=0, le=10, description="factor on s·B·A after training")] = 1.0
    probe_every: Annotated[int, Field(ge=1, description="steps between two entries of the probe's ledger")]

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.text_only and self.layers is not None:  # nothing else about pictures matters then
            raise ValueError("layers: expected null, since this arm trains on text; grit_vlm is the arm for pictures")
        problems = []
        if (self.max_steps is None) == (self.epochs is None):
            got = "neither" if self.epochs is None else f"both (max_steps {self.max_steps}, epochs {self.epochs})"
            problems.append(f"expected either max_steps or epochs, got {got}; set the other to null")
        problems += self.warmup_problems(self.max_steps) if self.max_steps and self.epochs is None else []
        if self.keeps_best and self.save_steps % self.eval_steps:
            why = "keep_best" if self.keep_best else "early_stopping_patience"
            problems.append(
                f"{why}: expected save_steps to be a multiple of eval_steps = {self.eval_steps}, got save_steps = "
                f"{self.save_steps}"
            )
        if self.early_stopping_min_delta and self.early_stopping_patience is None:
            problems.append(
                f"early_stopping_min_delta: {self.early_stopping_min_delta} has no effect without "
                "early_stopping_patience; set that too, or 0.0 here"
            )
        if self.devices != "all" and self.batch_size % self.devices:
            problems.append(f"batch_size: expected a multiple of devices = {self.devices}, got {self.batch_size}")
        if self.layers is not None and self.preserve.method != "none":
            problems.append(
                f"preserve.method: expected none with layers, got {self.preserve.method}; texts say nothing about how "
                "the base reads pictures"
            )
        if self.layers is None and not self.target_modules:
            problems.append("target_modules: expected at least one name, got none")
        if any(name.rpartition(".")[2] == "lm_head" for name in self.target_modules):
            problems.append(
                "target_modules: expected modules inside the layers, got lm_head: TRL reads its weight past adapters; "
                "train it whole with peft: {modules_to_save: [lm_head]}"
            )
        if self.layers is not None:
            problems += self._picture_problems()
        problems += optimizers.problems(self.optimizer, self.optim_args)
        problems += self._peft_problems() if self.peft else []
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _peft_problems(self) -> list[str]:
        if self.layers is not None:
            return ["peft: expected {} with layers, since a vision-language model gets LoRA"]
        problems = []
        if not is_plain(self.peft):
            if self.plain_lora:
                problems.append(
                    f"peft: expected use_rslora, and init_lora_weights true or gaussian, since {self.plain_lora}; got "
                    f"{self.peft}"
                )
            if self.preserve.method not in ("none", "distill"):
                problems.append(
                    f"preserve.method: expected none or distill with this peft, got {self.preserve.method}, which "
                    "pulls B·A to zero"
                )
            if self.scale_update != 1:
                problems.append(
                    f"scale_update: expected 1.0 with this peft, since it is a factor on B·A, got {self.scale_update}"
                )
        try:
            peft_config(self)
        except TrainingError as error:
            problems += str(error).splitlines()
        return problems

    def _picture_problems(self) -> list[str]:
        from grit_vlm import GritVlmError

        problems = []
        if self.devices != 1:
            problems.append(
                f"devices: expected 1 with layers, got {self.devices}; Fisher estimates of pictures are not summed "
                "over devices"
            )
        if self.packing:
            problems.append("packing: expected false with layers, since rows of pictures are not packed")
        if self.target_modules:
            problems.append(f"target_modules: expected [] with layers, got {self.target_modules}")
        if self.replay:
            problems.append(f"replay: expected 0 with layers, got {self.replay}; general questions show no pictures")
        if self.unsloth_fused_lora:
            problems.append("unsloth_fused_lora: expected false with layers, since Unsloth's kernels are for text")
        try:
            TrainSettings.layer_config(self).validate()  # an arm's natural gradients are the arm's to check
        except GritVlmError as error:
            problems += ["layers" + (".", ": ")[not _KEY.match(line)] + line for line in str(error).splitlines()]
        return problems

    @property
    def keeps_best(self) -> bool:
        """Whether the saved adapter is the one with the lowest evaluation loss; early stopping implies it."""
        return self.keep_best or self.early_stopping_patience is not None

    @property
    def warmups(self) -> dict[str, int]:
        """Setting → the first step at which its warm-up is over."""
        return {"warmup_steps": self.warmup_steps}

    def warmup_problems(self, steps: int) -> list[str]:
        """Warm-ups that a run of this many steps would not outlast."""
        return [
            f"{name}: expected less than the run's {steps} steps, got {warmup}"
            for name, warmup in self.warmups.items()
            if warmup >= max(steps, 1)
        ]

    def layer_config(self) -> Any:
        """`layers` as a `grit_vlm.ModelGRITConfig`, without natural gradients, which arms add; raises GritVlmError."""
        from grit_vlm import GritVlmError, ModalityConfig, ModelGRITConfig, get_model_config

        values = {key: value for key, value in (self.layers or {}).items() if value is not None}
        keys = (*MODALITIES, "configuration", "max_layers_per_modality")
        if strange := [f"{key}: unknown key{suggest(key, keys)}" for key in values if key not in keys]:
            raise GritVlmError("\n".join(strange))
        name, most = values.pop("configuration", None), values.pop("max_layers_per_modality", None)
        if (name is None) == (not values):
            got = f"{name!r} and {', '.join(values) or 'none'}"
            expected = f"a name, or null beside some of {', '.join(MODALITIES)}"
            raise GritVlmError(f"configuration: expected {expected}; got {got}")
        config = get_model_config(name) if name else ModelGRITConfig()
        for modality, entry in values.items():
            setattr(config, modality, ModalityConfig.from_dict(entry, modality))
        config.max_layers_per_modality = config.max_layers_per_modality if most is None else most
        config.global_rank, config.global_alpha, config.global_dropout = self.rank, self.alpha, self.dropout
        return config

    def steps_for(self, items: int) -> int:
        """Optimizer steps of a run over this many items, as the Trainer counts them (`set_initial_training_values`)."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(items / self.batch_size)
        return math.ceil((self.epochs or 0) * max(1, math.ceil(batches / self.gradient_accumulation)))


@dataclass(frozen=True)
class BaseReference:
    """A base model: the folder or hub id to train on, and that of the 16-bit weights to merge adapters into."""

    location: str
    revision: str | None = None
    merge_location: str | None = None
    merge_revision: str | None = None
    trust_remote_code: bool = False

    @property
    def load_kwargs(self) -> dict[str, object]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def merge_from(self) -> str:
        return self.merge_location or self.location

    @property
    def merge_kwargs(self) -> dict[str, object]:
        revision = self.revision if self.merge_location is None else self.merge_revision
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}
