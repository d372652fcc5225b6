"""The forms of the JSON files beside the artefacts. Types are strict: "3" is not a number, 1 is not true."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StringConstraints,
    model_validator,
)

_STEPS = 2**53  # from here on a float skips whole numbers
Stage = Literal["train", "probe", "export", "quantize", "verify", "measure", "evaluate", "prepare_base", "prepare_data"]


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_or_none(value: Any) -> Any:
    """Measured counts may be missing, written as null or NaN; 640.0 is the count 640."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else value
    return value


Name = Annotated[str, StringConstraints(min_length=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]
Share = Annotated[float, Field(ge=0, le=1)]
ErrorOrNone = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_finite_or_none)]
Measured = Annotated[Count | None, BeforeValidator(_whole_or_none)]


class Record(BaseModel):
    """Strict reading; keys that this version does not know are ignored, so that stages may add some."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Git(Record):
    """The code's state. None: not in a repository."""

    commit: str | None
    dirty: bool | None


class Device(Record):
    """Where a stage ran; memory in bytes."""

    device_class: Name = Field(alias="class")
    name: str | None = None
    cores: Count | None = None
    threads: Count | None = None
    memory_bytes: Count | None = None
    platform: str | None = None
    python: str | None = None


class ArtifactRecord(Record):
    """One file that a stage made."""

    kind: Literal["adapter", "merged_gguf", "adapter_gguf", "base_gguf", "modelfile", "base_model", "dataset"]
    path: Name
    sha256: Sha256
    bytes: Count
    parent: Sha256 | None = None


class RunRecord(Record):
    """`run.json`: how one stage ran."""

    form: Literal[1] = Field(alias="schema")
    stage: Stage
    arm: Name | None
    seed: Count | None
    status: Literal["finished", "failed", "running"]
    error: str | None = None
    started: AwareDatetime
    ended: AwareDatetime | None
    params: dict[str, Any]
    git: Git
    packages: dict[str, str | None]
    device: Device
    inputs: dict[str, str | None]
    artifacts: list[ArtifactRecord]
    prompt_template: str | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> RunRecord:
        if self.status == "finished" and self.ended is None:
            raise ValueError("a finished stage needs the time `ended`")
        if self.ended is not None and self.ended < self.started:
            raise ValueError(f"`ended` {self.ended} lies before `started` {self.started}")
        refuse_repeats("artifacts with the path", (artifact.path for artifact in self.artifacts))
        return self


class MetricRecord(Record):
    """One final number; a null value means that it could not be computed."""

    name: Name
    split: Name
    value: float | None
    n: Count | None = None


class MetricDefRecord(Record):
    """What a metric's number means."""

    unit: str
    direction: Literal["higher", "lower", "none"]
    description: str


class SpeedRecord(Record):
    """One timed phase, in tokens and nanoseconds."""

    arm: Name
    phase: Literal["load", "ttft", "prefill", "decode"]
    repetition: Count
    tokens: Measured
    nanoseconds: Measured


class Backend(Record):
    """What ran the model."""

    name: Name
    version: Name
    device_class: Name
    mode: Literal["merged", "adapter"] | None = None


class TaskRecord(Record):
    """What was asked; `primary` names the metric of split test by which arms are compared, `title` is its title."""

    name: Name
    title: Name
    primary: Name


AQI = TaskRecord(name="aqi", title="AQI accuracy", primary="aqi_category_accuracy")
"""The task of results from before there were others."""


class ScoresRecord(Record):
    """`scores.json`: the numbers of one arm with one seed."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    model_name: Name
    backend: Backend
    test_items_sha256: Sha256
    metrics: list[MetricRecord]
    metric_defs: dict[Name, MetricDefRecord]
    speed: list[SpeedRecord]
    task: TaskRecord = AQI
    exported: bool = True  # False: what was scored is base and adapter as training left them, and no file was made

    @model_validator(mode="after")
    def _consistent(self) -> ScoresRecord:
        if "task" in self.model_fields_set:
            self._has_primary()
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_repeats("speed rows", ((row.arm, row.phase, row.repetition) for row in self.speed))
        strange = sorted({row.arm for row in self.speed} - {self.arm, "base"})
        if strange:
            raise ValueError(f"speed rows of the arms {self.arm} and base expected, came {strange}")
        refuse_strange_shares(self.metrics, self.metric_defs)
        return self

    def _has_primary(self) -> None:
        known = sorted(metric.name for metric in self.metrics if metric.split == "test")
        if self.task.primary not in known:
            came = ", ".join(known) or "none"
            raise ValueError(f"expected the primary metric {self.task.primary} among those of split test, came {came}")


class SampleRecord(Record):
    """One line of `samples.jsonl`: one answered item."""

    item_id: Name
    task: Name
    split: Name
    prompt: str
    truth: str
    answer: str
    predicted: FiniteOrNone = None
    correct: bool
    abs_error: ErrorOrNone = None
    prompt_tokens: Measured = None
    answer_tokens: Measured = None
    credit: Share | None = None

    @property
    def worth(self) -> float:
        """Credit from 0 to 1; results from before there was any have right and wrong answers only."""
        return float(self.correct) if self.credit is None else self.credit


class ParityRecord(Record):
    """`parity.json`: how far the exported model answers as the trained one does; shares from 0 to 1."""

    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count
    prompts: Count
    token_ids_equal: Share
    greedy_equal: Share
    pairs: dict[Name, Share]
    first_difference: dict[str, Any] | None = None


def spelled(value: Any) -> Any:
    """Numbers that JSON does not have are written as words."""
    return float(value) if value in ("nan", "inf", "-inf") else value


class HistoryRecord(RootModel[list[dict[str, float | None]]]):
    """`loss_history.json`: numbers logged during training, each entry with its optimizer `step`."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="after")
    def _has_steps(self) -> HistoryRecord:
        for position, entry in enumerate(self.root):
            step = entry.get("step")
            if step is None or not 0 <= step < _STEPS or step != int(step):
                raise ValueError(f"entry {position} needs a `step`, a whole number from 0 up, came {step}")
        for names in {tuple(entry) for entry in self.root}:
            if "" in names or "eval_" in names:
                raise ValueError(f"expected a name for each number, came one without: {', '.join(map(repr, names))}")
        return self


def refuse_repeats(what: str, keys: Iterable[Hashable]) -> None:
    """Raise a ValueError that names the first key which occurs more than once."""
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]} given more than once")


class _Valued(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float | None: ...


def refuse_strange_shares(numbers: Iterable[_Valued], meanings: Mapping[str, MetricDefRecord]) -> None:
    """Raise a ValueError that names the first number whose unit is share and which is not from 0 to 1."""
    for number in numbers:
        meaning = meanings.get(number.name)
        if meaning is None or meaning.unit != "share" or number.value is None:
            continue
        if not 0 <= number.value <= 1:
            raise ValueError(f"{number.name} is a share from 0 to 1, came {number.value}")
