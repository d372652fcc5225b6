"""What a training run is told: section `train` of params.yaml and where the base model is."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

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
    max_steps: Annotated[int, Field(ge=1, description="optimizer steps")]
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
    gradient_checkpointing: bool
    unsloth_fused_lora: bool
    logging_steps: Positive
    eval_steps: Positive
    save_steps: Positive
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
