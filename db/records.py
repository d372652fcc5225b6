"""What the stages write and ingest reads: one record a file, with the same strict rules on both ways.

Types are strict: "3" is not a number, 1 is not true. A number that may be NaN or infinite is written as a word, since
JSON has no such numbers. Keys that a record does not name are kept, so that a stage may add some.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, Self

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

FINAL_STEP = -1
"""The `step` of a number that belongs to the finished run and not to a moment of training."""

SAME_MEAN = 1e-9
"""How far two means of the same numbers from 0 to 1 may lie apart, added up in different orders."""

REFERENCE = "f16"
"""The precision that the others are held against."""

_STEPS = 2**53  # from here on a float skips whole numbers
ValueKind = Literal["finite", "nan", "inf", "-inf"]
Stage = Literal[
    "prepare_data", "prepare_base", "base_texts", "train", "probe", "export", "quantize", "verify", "measure",
    "harness", "evaluate",
]  # fmt: skip


def split_value(number: float | None) -> tuple[float | None, ValueKind]:
    """A float as the pair that the database stores; a missing number (JSON null) counts as NaN.

    SQLite turns NaN into NULL, and a loss that diverged is a finding, not a gap.
    """
    if number is None or math.isnan(number):
        return None, "nan"
    if math.isinf(number):
        return None, "inf" if number > 0 else "-inf"
    return float(number), "finite"


def join_value(value: float | None, kind: str) -> float:
    return value if kind == "finite" and value is not None else float(kind)


def clean_text(text: str) -> str:
    """Replace what no database stores: NUL (PostgreSQL) and lone surrogates (any UTF-8 column)."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def plain(value: Any) -> Any:
    """A copy that any JSON file or column takes: clean text, words for NaN and the infinities, ISO 8601 times."""
    if isinstance(value, float):
        return value if math.isfinite(value) else split_value(value)[1]
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, Mapping):
        return {clean_text(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _finite_or_none(value: Any) -> Any:
    value = _number(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_or_none(value: Any) -> Any:
    """Measured counts may be missing, written as null or NaN; 640.0 is the count 640."""
    value = _finite_or_none(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _object_or_none(value: Any) -> Any:
    """Records of other kinds have a count or a list of names under the same key."""
    return value if isinstance(value, dict) else None


Name = Annotated[str, StringConstraints(min_length=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, BeforeValidator(_number)]
FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]
ErrorOrNone = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_finite_or_none)]
Measured = Annotated[Count | None, BeforeValidator(_whole_or_none)]


class Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Self:
        """A record of plain values, checked (pydantic.ValidationError) as if they had been read from a file."""
        return cls.model_validate_json(json.dumps(plain(content)))

    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = plain(self.model_dump(by_alias=True))
        return content


def refuse_repeats(what: str, keys: Iterable[Hashable]) -> None:
    """Raise a ValueError that names the first key which occurs more than once."""
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]} given more than once")


class Git(Record):
    commit: str | None  # None: not in a repository
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
    """One file that a stage made; `parent` is the sha256 of what it was made from."""

    kind: Literal["adapter", "merged_gguf", "adapter_gguf", "base_gguf", "modelfile", "base_model", "dataset"]
    path: Name
    sha256: Sha256
    bytes: Count
    parent: Sha256 | None = None


class RunRecord(Record):
    """`run.json`: how one stage ran. While it runs, `artifacts` and `extra` (numbers of its own) are filled."""

    model_config = ConfigDict(frozen=False)

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
    prompt_template: str | None = None
    artifacts: list[ArtifactRecord]
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> RunRecord:
        if self.status == "finished" and self.ended is None:
            raise ValueError("a finished stage needs the time `ended`")
        if self.ended is not None and self.ended < self.started:
            raise ValueError(f"`ended` {self.ended} lies before `started` {self.started}")
        refuse_repeats("artifacts with the path", (artifact.path for artifact in self.artifacts))
        return self


class OfArm(Record):
    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count


class MetricRecord(Record):
    """One final number; a null value means that it could not be computed."""

    name: Name
    split: Name
    value: Number | None
    n: Count | None = None


class MetricDefRecord(Record):
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


class ScoresRecord(OfArm):
    """`scores.json`: the numbers of one arm with one seed."""

    model_name: Name
    backend: Backend
    exported: bool = True  # False: what was scored is base and adapter as training left them, and no file was made
    test_items_sha256: Sha256
    metrics: list[MetricRecord]
    task: TaskRecord = AQI
    metric_defs: dict[Name, MetricDefRecord]
    speed: list[SpeedRecord]

    @model_validator(mode="after")
    def _consistent(self) -> ScoresRecord:
        known = sorted(metric.name for metric in self.metrics if metric.split == "test")
        if "task" in self.model_fields_set and self.task.primary not in known:
            words = f"expected the primary metric {self.task.primary} among those of split test, came"
            raise ValueError(f"{words} {', '.join(known) or 'none'}")
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_repeats("speed rows", ((row.arm, row.phase, row.repetition) for row in self.speed))
        strange = sorted({row.arm for row in self.speed} - {self.arm, "base"})
        if strange:
            raise ValueError(f"speed rows of the arms {self.arm} and base expected, came {strange}")
        refuse_strange_shares(self.metrics, self.metric_defs)
        return self


class _Answered(Record):
    """Credit is from 0 to 1; results from before there was any have right and wrong answers only."""

    item_id: Name
    correct: bool
    answer: str
    credit: Share | None = None

    @property
    def worth(self) -> float:
        return float(self.correct) if self.credit is None else self.credit


class SampleRecord(_Answered):
    """One line of `samples.jsonl`: one answered item; `abs_error` is of tasks that ask for a number."""

    task: Name
    split: Name
    prompt: str
    truth: str
    predicted: FiniteOrNone = None
    abs_error: ErrorOrNone = None
    prompt_tokens: Measured = None
    answer_tokens: Measured = None  # the end token included
    finish_reason: Literal["stop", "length"] | None = None  # "length": cut at evaluate.max_tokens; None: not told


class LayerRecord(Record):
    name: Name
    split: Name
    layer: Name
    value: Number | None


def refuse_strange_shares(
    numbers: Iterable[MetricRecord | LayerRecord], meanings: Mapping[str, MetricDefRecord]
) -> None:
    """Raise a ValueError that names the first number whose unit is share and which is not from 0 to 1."""
    for number in numbers:
        meaning = meanings.get(number.name)
        if meaning is not None and meaning.unit == "share" and not 0 <= (number.value or 0) <= 1:
            raise ValueError(f"{number.name} is a share from 0 to 1, came {number.value}")


class MeasuredRecord(OfArm):
    metrics: list[MetricRecord]
    metric_defs: dict[Name, MetricDefRecord]
    layers: list[LayerRecord]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> MeasuredRecord:
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_repeats("layers", ((row.name, row.split, row.layer) for row in self.layers))
        refuse_strange_shares([*self.metrics, *self.layers], self.metric_defs)
        return self


class BenchmarkTask(Record):
    """A task of lm-evaluation-harness; a group of its has several."""

    version: str
    shots: Count  # examples before each question
    items: Count
    metric: str | None  # whose value is an item's credit; None: no metric is a share of an item


class HarnessRecord(OfArm):
    """`harness.json`: a benchmark's figures; samples.jsonl beside it has its items."""

    benchmark: Name
    lm_eval: Name  # version
    tasks: dict[Name, BenchmarkTask]
    metrics: list[MetricRecord]
    metric_defs: dict[Name, MetricDefRecord]

    @model_validator(mode="after")
    def _consistent(self) -> HarnessRecord:
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_strange_shares(self.metrics, self.metric_defs)
        return self


class ParityRecord(OfArm):
    prompts: Count
    token_ids_equal: Share
    greedy_equal: Share
    pairs: dict[Name, Share]
    first_difference: dict[str, Any] | None = None


class PrecisionRecord(Record):
    """A model in one precision; size in bytes, shares from 0 to 1, credit the mean of the test items."""

    type: Name
    bytes: Count
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]
    tensor_types: dict[Name, Count]
    category_accuracy: Share
    correct: Count
    n: Annotated[Count, Field(ge=1)]
    answers_equal_to_f16: Share
    fallbacks: Count
    credit: Share | None = None

    @property
    def worth(self) -> float:
        """Results from before there was credit have right and wrong answers only."""
        return self.category_accuracy if self.credit is None else self.credit

    @model_validator(mode="after")
    def _consistent(self) -> PrecisionRecord:
        if abs(self.correct / self.n - self.category_accuracy) > SAME_MEAN:
            raise ValueError(f"category_accuracy {self.category_accuracy} is not {self.correct} of {self.n}")
        if self.fallbacks > sum(self.tensor_types.values()):
            raise ValueError(f"{self.fallbacks} fallbacks among {sum(self.tensor_types.values())} tensors")
        return self


class QuantizedRecord(OfArm):
    rows: list[PrecisionRecord]

    @model_validator(mode="after")
    def _consistent(self) -> QuantizedRecord:
        refuse_repeats("rows of the type", (row.type for row in self.rows))
        first = self.rows[0].type if self.rows else "nothing"
        if first != REFERENCE:
            raise ValueError(f"rows: expected {REFERENCE} first, which the others are held against, came {first}")
        if self.rows[0].answers_equal_to_f16 != 1:
            raise ValueError(f"rows: {REFERENCE} must equal itself, came {self.rows[0].answers_equal_to_f16}")
        return self


class QuantizedSampleRecord(_Answered):
    type: Name


class VerificationRecord(Record):
    """One backend in one mode, asked in one form; shares are of the prompts.

    Without prompts the backend does not support the mode, and there are no shares. An older server answers but does
    not tell what text or how many tokens it read: then `rendered` or `counted` is null.
    """

    backend: Name
    backend_version: Name
    mode: Literal["merged", "adapter"]
    form: Literal["plain", "newline", "second"] = "plain"
    prompts: Count
    rendered: Share | None
    counted: Share | None
    answered: Share | None
    tied: Share | None = None
    equal_to_merged: Share | None
    perturbed_noticed: bool | None
    first_difference: str | None
    gguf_sha256: Sha256
    adapter_sha256: Sha256 | None
    server_digest: str | None
    stored_sha256: str | None

    @model_validator(mode="after")
    def _consistent(self) -> VerificationRecord:
        if (self.answered is None) != (self.prompts == 0):
            raise ValueError(f"answered: expected a share exactly where prompts were asked, came "
                             f"{self.answered} of {self.prompts} prompts")  # fmt: skip
        for name in ("rendered", "counted"):
            if (share := getattr(self, name)) is not None and self.prompts == 0:
                raise ValueError(f"{name}: expected no share where no prompt was asked, came {share}")
        return self


class VerifyRecord(OfArm):
    model_name: Name
    rows: list[VerificationRecord]

    @model_validator(mode="after")
    def _consistent(self) -> VerifyRecord:
        refuse_repeats("rows of", ((row.backend, row.mode, row.form) for row in self.rows))
        return self


class ReadingRecord(Record):
    """One number of a verdict; layer '': the whole model, step -1: the whole run."""

    name: Name
    layer: str
    step: Annotated[int, Field(ge=FINAL_STEP, lt=2**63)]
    value: Number
    unit: str
    threshold: float | None
    verdict: Literal["pass", "fail", "inconclusive", "skipped"]
    diagnosis: str


class VerdictRecord(OfArm):
    as_claimed: bool | None  # None: nobody watched
    verdict: Literal["effective", "no_effect", "unstable", "not_watched"]
    diagnosis: Name
    reason: str
    readings: list[ReadingRecord]

    @model_validator(mode="after")
    def _consistent(self) -> VerdictRecord:
        refuse_repeats("readings", ((r.name, r.layer, r.step) for r in self.readings))
        return self


class HistoryRecord(RootModel[list[dict[str, Number | None]]]):
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


class _Logged(Record):
    """Of the logs of training only the fields that reach a table are read; their writers need nothing of this file."""

    model_config = ConfigDict(extra="ignore")


def _number_of(unit: str, description: str, name: str = "") -> Any:
    """A number that reaches the database, under the field's name or another; None: there is none."""
    return Field(None, title=name, description=description, json_schema_extra={"unit": unit})


class UnitRecord(_Logged):
    """One trained module in one sampled step. None: one of two vectors was zero, so there is no angle."""

    angle: Number | None = _number_of(
        "degrees", "between the step made and the step of plain AdamW, 0: the same direction"
    )
    cos_raw_step: Number | None = _number_of("cosine", "of the raw gradient and the step made, sign turned")
    cos_raw_inner: Number | None = _number_of("cosine", "of the raw gradient and the one that the optimizer got")
    lr_ratio: Number | None = _number_of("ratio", "length of the step made over that of plain AdamW's step")


class LedgerRecord(_Logged):
    """One line of `probe_ledger.jsonl`: a sampled step; the closing line has counts of events and no step."""

    step: Count | None = None
    units: dict[Name, UnitRecord] = Field(default_factory=dict)
    events: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> LedgerRecord:
        if (self.step is None) == (self.events is None):
            raise ValueError("expected either a `step` with its `units`, or the closing line with its `events`")
        return self


_RANK, _ENTROPY = "directions", "exp of the entropy of the normalised eigenvalues"
_CONDITION, _SHARE = "largest over smallest eigenvalue", "damping over the mean eigenvalue"
_A, _G = "of the covariance of A's outputs", "of the covariance of the gradients there"
_KEPT_A, _KEPT_B = (
    _number_of(_RANK, f"directions kept on {side}'s side", f"kept_rank_{side.lower()}") for side in "AB"
)


class GritLayer(_Logged):
    """One layer in a record of `grit_log.jsonl`; which fields there are depends on the record's kind."""

    r: Count | None = _number_of(_RANK, "rank of the adapter's tensors", "rank")
    base_r: Count | None = _number_of(_RANK, "rank that the adapter started with", "base_rank")
    k: Count | None = _number_of(_RANK, "directions that the last reprojection kept", "kept_rank")
    k_a: Count | None = _KEPT_A
    k_b: Count | None = _KEPT_B
    final_k_a: Count | None = _KEPT_A
    final_k_b: Count | None = _KEPT_B
    samples: Number | None = _number_of("tokens", "tokens that a layer's statistics have seen")
    relative_change: Number | None = _number_of("ratio", "by a reprojection: ‖ΔW' − ΔW‖ over ‖ΔW‖")
    effective_rank_a: Number | None = _number_of(_RANK, f"{_ENTROPY} {_A}")
    effective_rank_g: Number | None = _number_of(_RANK, f"{_ENTROPY} {_G}")
    condition_a: Number | None = _number_of("ratio", f"{_CONDITION} {_A}")
    condition_g: Number | None = _number_of("ratio", f"{_CONDITION} {_G}")
    damping_share_a: Number | None = _number_of("ratio", f"{_SHARE} {_A}")
    damping_share_g: Number | None = _number_of("ratio", f"{_SHARE} {_G}")
    eigenvalues_a: list[Number] | None = None  # largest first
    eigenvalues_g: list[Number] | None = None


_GritLayers = Annotated[dict[Name, GritLayer] | None, BeforeValidator(_object_or_none)]


class GritRecord(_Logged):
    """One line of `grit_log.jsonl`: kinds spectra, reprojection, final, and others that no table has."""

    kind: Name
    step: Count
    layers: _GritLayers = None
    ranks: _GritLayers = None
    spectra: _GritLayers = None
