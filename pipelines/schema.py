"""The schema of params.yaml: one section per stage; unknown keys are refused."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from export.quantization import unusable
from pipelines.schema_common import CommonParams, Registry, Share
from pipelines.schema_data import Positive, PrepareData
from trainers import ARMS, BUILDS_ON
from trainers.embedded_base import EmbeddedSettings
from trainers.settings import Section


class PrepareBase(EmbeddedSettings):
    """Section prepare_base: where the base comes from, and the shape of the embedded one."""

    source: str
    revision: str | None
    merge_source: str | None
    trust_remote_code: bool
    min_tasks_above_80: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _shape(self) -> "PrepareBase":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size: expected a multiple of 2·heads = {2 * self.heads}, got {self.hidden_size}")
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 32:
                raise ValueError(
                    f"{name}: expected a multiple of 32 (GGUF's quantization block), got {getattr(self, name)}"
                )
        return self


def _precision(name: str) -> str:
    if reason := unusable(name):
        raise ValueError(reason)
    return name


# Of the weights in a GGUF, by llama.cpp's name.
Precision = Annotated[str, AfterValidator(_precision)]


class Export(Section):
    """Section export."""

    quantization: Precision
    num_ctx: Annotated[int, Field(ge=32, description="tokens")]
    license: str | None
    parity_prompts: Positive
    parity_tokens: Positive
    parity_arithmetic: Literal["f32", "f16"]
    min_greedy_equal: Share


class Quantize(Section):
    """Section quantize: what else the exported models are measured in; f16 always is."""

    types: list[Precision]

    @field_validator("types")
    @classmethod
    def _unique(cls, types: list[str]) -> list[str]:
        if len(set(types)) != len(types):
            raise ValueError(f"expected each once, got {types}")
        return types


class Verify(Section):
    """Section verify: what is served, held against Hugging Face's answers."""

    prompts: Positive
    min_answers_equal: Share
    min_answers_equal_quantized: Share
    control_scale: Annotated[float, Field(gt=0, description="factor on the adapter's scale in the control")]

    @field_validator("control_scale")
    @classmethod
    def _perturbs(cls, scale: float) -> float:
        if scale == 1.0:
            raise ValueError("expected another factor than 1, which perturbs nothing; 0.5 is a scale that is half lost")
        return scale


class Evaluate(Section):
    """Section evaluate."""

    backend: Literal["auto", "ollama", "llama_cpp", "hf"]
    max_tokens: Positive
    threads: Annotated[int, Field(ge=0)]
    parallel: Annotated[int, Field(ge=1, le=256, description="sequences at once")]
    speed_repetitions: Positive
    speed_prompts: Positive
    speed_tokens: Positive


PromptField = Literal["prompt", "label", "category", "pair"]
Depth = Annotated[float, Field(gt=0, le=1, description="share of the model's layers")]


class Measure(Section):
    """Section measure: perplexity, size and effect of the update, Alignment Quality Index."""

    prompts: str
    prompts_split: str
    prompts_subset: str | None
    columns: dict[PromptField, str]
    safe_label: str
    unsafe_label: str
    max_prompts: Annotated[int, Field(ge=10, description="of each class")]
    layers: list[Depth] = Field(min_length=1)
    pooling: Literal["mean", "last"]
    index_weight: Annotated[float, Field(ge=0, le=1, description="λ")]
    bootstrap: Annotated[int, Field(ge=100, le=100_000, description="resamples")]
    permutations: Annotated[int, Field(ge=100, le=100_000)]
    text: str
    text_split: str
    text_subset: str | None
    text_column: str
    max_texts: Positive
    max_answers: Annotated[int, Field(ge=0, description="test items")]
    max_tokens: Annotated[int, Field(ge=8, description="tokens of one text or prompt; what is beyond is cut off")]
    batch_size: Annotated[int, Field(ge=1, description="texts a forward pass")]

    @model_validator(mode="after")
    def _labels(self) -> "Measure":
        if self.safe_label.strip().lower() == self.unsafe_label.strip().lower():
            raise ValueError(f"safe_label and unsafe_label: expected two labels, got {self.safe_label!r} twice")
        return self


class Params(CommonParams):
    """The whole of params.yaml."""

    registry: ClassVar[Registry] = Registry(ARMS, BUILDS_ON)
    defaults: ClassVar[str] = "profiles/tiny.yaml"
    example_arm: ClassVar[str] = "pure_grit"

    prepare_data: PrepareData
    prepare_base: PrepareBase
    export: Export
    quantize: Quantize
    verify: Verify
    evaluate: Evaluate
    measure: Measure
