"""What the schemas of all pipelines share: matrix, arms, prompt, probe, database."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from pipelines.schema_data import Seed
from trainers.settings import Section, TrainSettings

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


class Probe(Section):
    """Section probe: how a verdict on an arm's updates is reached."""

    twin_steps: Annotated[int, Field(ge=5, description="optimizer steps of each twin")]
    min_angle: Annotated[float, Field(gt=0, le=90, description="degrees")]
    min_coverage: Share


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


@dataclass(frozen=True)
class Registry:
    """The arms of one pipeline.

    Attributes:
        arms: Name → module.
        builds_on: Name → packages or files of this project, besides its own module, that decide what the arm does.
    """

    arms: dict[str, str]
    builds_on: dict[str, tuple[str, ...]]


# In an arm's entry alone: settings of what its optimizer does → their name, and the package that the arm builds on.
OF_ARMS = {"grit": ("GRIT", "grit"), "natural_gradient": ("the natural gradient", "grit_vlm")}


class CommonParams(Section):
    """What params.yaml holds in every pipeline.

    Attributes:
        registry: The pipeline's arms.
        defaults: File that shows every key with its default.
        example_arm: One that has settings of its own.
    """

    registry: ClassVar[Registry]
    defaults: ClassVar[str]
    example_arm: ClassVar[str]

    profile: str
    matrix: Matrix
    arms: dict[str, dict[str, Any]]
    prompt: Prompt
    train: TrainSettings
    probe: Probe
    compare: Compare

    @field_validator("train")
    @classmethod
    def _belong_to_arms(cls, train: TrainSettings) -> TrainSettings:
        wrong = [
            f"{name}: settings of {title} belong to an arm, e.g. arms.{cls.example_arm}.{name}"
            for name, (title, _) in OF_ARMS.items()
            if getattr(train, name, None) is not None
        ]
        if wrong:
            raise ValueError("\n".join(wrong))
        return train

    @classmethod
    def settings_class(cls) -> type[TrainSettings]:
        """Of section train and of the arms' own settings."""
        found = cls.model_fields["train"].annotation
        if not (isinstance(found, type) and issubclass(found, TrainSettings)):
            raise TypeError(f"{cls.__name__}.train: expected settings of training, got {found}")
        return found

    def train_for(self, arm: str) -> TrainSettings:
        """Section train with the overrides of one arm."""
        own = {name: value for name, value in self.arms.get(arm, {}).items() if name != VARIANT_OF}
        return type(self.train)(**{**self.train.model_dump(), **own})

    def code_of(self, arm: str) -> str:
        """The arm whose code runs: that which `arm` is a variant of, or itself."""
        of = self.arms.get(arm, {}).get(VARIANT_OF)
        return arm if of is None else str(of)
