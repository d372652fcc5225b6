"""The schema of params.yaml: one section per stage; unknown keys are refused."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from export.quantization import unusable
from pipelines.schema_data import Positive, PrepareData, Seed
from trainers.embedded_base import EmbeddedSettings
from trainers.settings import Section
from trainers.settings import TrainSettings as Train

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Matrix(Section):
    """What is trained: every arm with every seed."""

    arms: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)

    @field_validator("arms", "seeds")
    @classmethod
    def _unique(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected each once, got {values}")
        return values


# As prompt.template: the chat template of the base's own tokenizer.
CHAT = "chat"


class Prompt(Section):
    """The text round every question."""

    template: str
    system: str | None

    @field_validator("template")
    @classmethod
    def _one_slot(cls, template: str) -> str:
        if template == CHAT:
            return template
        if template.count("{prompt}") != 1:
            raise ValueError(f"expected exactly one {{prompt}}, got {template.count('{prompt}')}")
        if "{{" in template or "}}" in template:
            raise ValueError("'{{' and '}}' cannot be told from Ollama's template commands; use other signs")
        return template

    @model_validator(mode="after")
    def _system(self) -> "Prompt":
        if self.system is not None and self.template != CHAT:
            raise ValueError(f"system: only with template: {CHAT}; a text of your own holds its system message itself")
        if self.system is not None and (self.system != self.system.strip() or not self.system):
            raise ValueError(f"system: expected a text without blanks at its ends, got {self.system!r}")
        return self


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


class Probe(Section):
    """Section probe: how a verdict on an arm's updates is reached."""

    twin_steps: Annotated[int, Field(ge=5, description="optimizer steps of each twin")]
    min_angle: Annotated[float, Field(gt=0, le=90, description="degrees")]
    min_coverage: Share


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


class Compare(Section):
    """Section compare."""

    database: str

    @field_validator("database")
    @classmethod
    def _file(cls, database: str) -> str:
        if "://" in database or Path(database).is_absolute():
            raise ValueError(
                f"expected a file below the project's folder, got {database!r}; for other databases there is "
                "`python -m db.cli ingest --db URL`"
            )
        return database


# In an entry of arms: the arm whose code it runs, with settings of its own.
VARIANT_OF = "variant_of"


class Params(Section):
    """The whole of params.yaml."""

    profile: str
    matrix: Matrix
    arms: dict[str, dict[str, Any]]
    prompt: Prompt
    prepare_data: PrepareData
    prepare_base: PrepareBase
    train: Train
    probe: Probe
    export: Export
    quantize: Quantize
    verify: Verify
    evaluate: Evaluate
    measure: Measure
    compare: Compare

    @field_validator("train")
    @classmethod
    def _grit_belongs_to_arms(cls, train: Train) -> Train:
        if train.grit is not None:
            raise ValueError("grit: settings of GRIT belong to an arm, e.g. arms.pure_grit.grit")
        return train

    def train_for(self, arm: str) -> Train:
        """Section train with the overrides of one arm."""
        own = {name: value for name, value in self.arms.get(arm, {}).items() if name != VARIANT_OF}
        return Train(**{**self.train.model_dump(), **own})

    def code_of(self, arm: str) -> str:
        """The arm whose code runs: that which `arm` is a variant of, or itself."""
        of = self.arms.get(arm, {}).get(VARIANT_OF)
        return arm if of is None else str(of)
