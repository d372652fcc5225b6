"""What a training run is told: section `train` of params.yaml and where the base model is."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from grit.config import GRITConfig

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Settings that refuse keys which they do not know, and cannot be changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TrainSettings(Section):
    """Settings of one LoRA training run (all arms)."""

    rank: Annotated[int, Field(ge=1, le=1024, description="r")]
    alpha: Annotated[float, Field(gt=0, description="α; the update is scaled by α/r")]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: list[str] = Field(min_length=1)
    quantize_base: Literal["none", "nf4"]
    max_steps: Annotated[int, Field(ge=1, description="optimizer steps")] | None
    epochs: Annotated[float, Field(gt=0, description="passes over the training items")] | None
    batch_size: Annotated[int, Field(ge=1, description="items a device and forward pass")]
    gradient_accumulation: Annotated[int, Field(ge=1, description="forward passes an optimizer step")]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(ge=0, description="0 = no clipping")]
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "sgd"]
    precision: Literal["fp32", "bf16"]
    max_length: Annotated[int, Field(ge=8, description="tokens of prompt and completion")]
    overlong: Literal["refuse", "leave_out"]
    gradient_checkpointing: bool
    unsloth_fused_lora: bool
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
    keep_best: bool
    early_stopping_patience: Positive | None
    early_stopping_min_delta: Annotated[float, Field(ge=0, description="of the evaluation loss")]
    report_to: list[Literal["tensorboard", "wandb"]]
    probe_every: Annotated[int, Field(ge=1, description="steps between two entries of the probe's ledger")]
    grit: dict[str, Any] | None = None

    @field_validator("grit")
    @classmethod
    def _grit(cls, values: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if values is not None:
            doubled = sorted(key for key in values if str(key).startswith("lora_"))
            if doubled:
                raise ValueError(f"{', '.join(doubled)}: LoRA's shape is set by rank, alpha, dropout, target_modules")
            # Raises with every mistake; the smallest rank is held against this run's.
            GRITConfig.from_dict({"lora_rank": info.data.get("rank", 1024), **values})
        return values

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainSettings":
        problems = []
        if (self.max_steps is None) == (self.epochs is None):
            got = "neither" if self.epochs is None else f"both (max_steps {self.max_steps}, epochs {self.epochs})"
            problems.append(f"expected either max_steps or epochs, got {got}; set one of them, and the other to null")
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
        if len(set(self.report_to)) != len(self.report_to):
            problems.append(f"report_to: expected each once, got {self.report_to}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def keeps_best(self) -> bool:
        """Whether the saved adapter is the one with the lowest evaluation loss; early stopping implies it."""
        return self.keep_best or self.early_stopping_patience is not None

    def with_method_of(self, other: "TrainSettings") -> Self:
        """The same schedule and learning rate with another arm's method: nothing but what it sets of GRIT."""
        return self.model_copy(update={"grit": other.grit})

    @property
    def method_warmup_steps(self) -> int:
        """Steps at the start in which the method does nothing."""
        return int((self.grit or {}).get("ng_warmup_steps", 0))

    def steps_for(self, items: int, devices: int = 1) -> int:
        """Optimizer steps of a whole run, as transformers' Trainer counts them (`set_initial_training_values`).

        Args:
            items: Training items, those left out not counted.
            devices: That share every step.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is None:
            raise ValueError("expected max_steps or epochs, got neither")
        batches = math.ceil(items / (self.batch_size * devices))
        return math.ceil(self.epochs * max(1, math.ceil(batches / self.gradient_accumulation)))


@dataclass(frozen=True)
class BaseReference:
    """A base model, wherever it is.

    Attributes:
        location: Folder or hub id that is trained on.
        revision: Of a hub model.
        merge_location: Folder or hub id of the same weights in 16 bit, which adapters are merged into.
        merge_revision: Of a hub model.
        trust_remote_code: Run code that comes with the model.
    """

    location: str
    revision: str | None = None
    merge_location: str | None = None
    merge_revision: str | None = None
    trust_remote_code: bool = False

    @property
    def load_kwargs(self) -> dict[str, object]:
        """Arguments that every `from_pretrained` call takes."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @property
    def merge_from(self) -> str:
        """Folder or hub id of the 16-bit weights."""
        return self.merge_location or self.location

    @property
    def merge_kwargs(self) -> dict[str, object]:
        """The same arguments for `merge_from`."""
        revision = self.revision if self.merge_location is None else self.merge_revision
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}
