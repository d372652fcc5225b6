"""The schema of a params.yaml with `pipeline: vision`: images, a vision-language base, no exports."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.schema_common import CHAT, CommonParams, Registry
from pipelines.schema_data import VISION_TASKS, Positive, Seed, known
from trainers import VISION_ARMS, VISION_BUILDS_ON
from trainers.embedded_vlm import EmbeddedVisionSettings
from trainers.settings import Section
from trainers.vision.settings import VisionTrainSettings

EMBEDDED = "embedded"
SMOLVLM_FORM = "<|im_start|>User:{prompt}<end_of_utterance>\nAssistant: "
"""Turn of the user and start of the answer, as the chat template of SmolVLM writes them."""


class PrepareVisionData(Section):
    """Section prepare_data: what is drawn and asked, and how much of it."""

    task: str
    seed: Seed
    image_size: Annotated[int, Field(ge=16, le=512, description="width and height, pixels")]
    train_items: Positive
    valid_items: Positive
    test_items: Positive
    retention_items_per_task: Positive

    @field_validator("task")
    @classmethod
    def _task(cls, task: str) -> str:
        return known("task", [task], VISION_TASKS)[0]


class PrepareVisionBase(EmbeddedVisionSettings):
    """Section prepare_base: where the base comes from, and the shape of the embedded one."""

    source: str
    revision: str | None
    trust_remote_code: bool
    merge_source: ClassVar[None] = None  # adapters stay beside the base
    min_tasks_above_80: Annotated[int, Field(ge=0)]


class VisionEvaluate(Section):
    """Section evaluate; transformers answers, with the adapter beside the base."""

    backend: Literal["hf"]
    max_tokens: Positive
    parallel: Annotated[int, Field(ge=1, le=256, description="sequences at once")]
    speed_repetitions: Positive
    speed_prompts: Positive
    speed_tokens: Positive


class VisionParams(CommonParams):
    """The whole of params.yaml."""

    registry: ClassVar[Registry] = Registry(VISION_ARMS, VISION_BUILDS_ON)
    defaults: ClassVar[str] = "vlm/params.yaml as it is in the repository"
    example_arm: ClassVar[str] = "grit_vlm"

    pipeline: Literal["vision"]
    prepare_data: PrepareVisionData
    prepare_base: PrepareVisionBase
    train: VisionTrainSettings
    evaluate: VisionEvaluate

    @model_validator(mode="after")
    def _fit_together(self) -> "VisionParams":
        problems = []
        embedded, drawn = self.prepare_base.source == EMBEDDED, self.prepare_data.image_size
        if embedded and self.prepare_base.image_size != drawn:
            problems.append(
                f"prepare_base.image_size: expected prepare_data.image_size = {drawn}, as pictures are drawn, got "
                f"{self.prepare_base.image_size}"
            )
        if self.prompt.template == CHAT:
            problems.append(
                "prompt.template: chat is only in the pipeline for text; chat templates put pictures and the answer in "
                "places of their own, which no text with {prompt} stands for. Expected the base's form written out, "
                f"e.g. for SmolVLM {SMOLVLM_FORM!r}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self
