"""What the stages write and the database stores: one record per file, checked in the same way on writing and reading.

The columns of the tables are made from these fields (`db.tables`), so a new field is a new column.

Types are strict: "3" is not a number, 1 is not true. NaN and infinity are written as words, since JSON has no such
numbers. Keys that a record does not name are kept, so that a stage may add some.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

FINAL_STEP = -1
"""The `step` of a number that describes the finished run rather than a moment of training."""

SAME_MEAN = 1e-9
"""Tolerance for two means of the same numbers from 0 to 1, summed in different orders."""

REFERENCE = "f16"
"""The precision that the others are compared with."""

_STEPS = 2**53  # above this, floats skip whole numbers
ValueKind = Literal["finite", "nan", "inf", "-inf"]
Stage = Literal[
    "prepare_data", "prepare_base", "base_texts", "train", "probe", "export", "quantize", "verify", "measure",
    "harness", "evaluate",
]  # fmt: skip


def split_value(number: float | None) -> tuple[float | None, ValueKind]:
    """Split a float into the pair that the database stores; a missing number (JSON null) counts as NaN.

    SQLite turns NaN into NULL, and a loss that diverged is a result, not a gap.
    """
    if number is None or math.isnan(number):
        return None, "nan"
    if math.isinf(number):
        return None, "inf" if number > 0 else "-inf"
    return float(number), "finite"


def join_value(value: float | None, kind: str) -> float:
    return value if kind == "finite" and value is not None else float(kind)


def clean_text(text: str) -> str:
    """Replace characters that databases refuse: NUL (PostgreSQL) and lone surrogates (any UTF-8 column)."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def plain(value: Any) -> Any:
    """Copy a value into what JSON can hold: clean text, words for NaN and infinity, ISO 8601 times."""
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
    """A count may be missing (null or NaN), and 640.0 is the count 640."""
    value = _finite_or_none(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _object_or_none(value: Any) -> Any:
    """Other kinds of records have a count or a list of names under the same key."""
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

    device_class: Name = Field(alias="class")  # cpu, cuda or mps
    device_name: str | None = Field(None, alias="name")
    cores: Count | None = None  # of the machine
    threads: Count | None = None  # used
    memory_bytes: Count | None = None
    platform: str | None = None
    python: str | None = None


class ArtifactRecord(Record):
    """One file that a stage made."""

    kind: Literal["adapter", "merged_gguf", "adapter_gguf", "base_gguf", "modelfile", "base_model", "dataset"]
    path: Name  # relative to the project's folder
    sha256: Sha256
    bytes: Count
    parent_sha256: Sha256 | None = Field(None, alias="parent")  # what it was made from, perhaps by another run


class RunRecord(Record):
    """`run.json`: how one stage ran. The stage fills `artifacts` and `extra` (its own numbers) as it goes."""

    model_config = ConfigDict(frozen=False)

    form: Literal[1] = Field(alias="schema")
    stage: Stage
    arm: Name | None
    seed: Count | None
    status: Literal["finished", "running"]  # on disk: finished
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


class ArmRecord(Record):
    form: Literal[1] = Field(alias="schema")
    arm: Name
    seed: Count


class MetricRecord(Record):
    """One final number; a null value means that it could not be computed.

    Splits: test, retention, general, weights, hidden, alignment, eval, train; harness/TASK of lm-eval.
    """

    name: Name  # explained by its MetricDefRecord
    split: Name
    value: Number | None
    n: Count | None = None  # items behind the number


class MetricDefRecord(Record):
    unit: str  # share: a number from 0 to 1
    direction: Literal["higher", "lower", "none"]  # which is better
    description: str


class SpeedRecord(Record):
    """One timed phase. An arm's run also times the base, in turn in the same process, because machines drift.

    load: until the model is ready; ttft: from the request to its first token; prefill: evaluating the prompt; decode:
    generating the answer token by token.
    """

    arm: Name  # the run's arm, or base
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
    name: Name
    title: Name  # of the primary metric, as tables show it
    primary: Name  # metric of split test by which arms are compared


AQI = TaskRecord(name="aqi", title="AQI accuracy", primary="aqi_category_accuracy")
"""The task of results that name none, since they are older than the other tasks."""


def refuse_impossible_shares(
    numbers: Iterable[MetricRecord | LayerRecord], meanings: Mapping[str, MetricDefRecord]
) -> None:
    """Raise a ValueError that names the first number whose unit is share and which is not from 0 to 1."""
    for number in numbers:
        meaning = meanings.get(number.name)
        if meaning is not None and meaning.unit == "share" and not 0 <= (number.value or 0) <= 1:
            raise ValueError(f"{number.name}: expected a share from 0 to 1, got {number.value}")


class Measurements(ArmRecord):
    metrics: list[MetricRecord]
    metric_defs: dict[Name, MetricDefRecord]

    @model_validator(mode="after")
    def _numbers(self) -> Self:
        refuse_repeats("metrics", ((metric.name, metric.split) for metric in self.metrics))
        refuse_impossible_shares(self.metrics, self.metric_defs)
        return self


class ScoresRecord(Measurements):
    """`scores.json`: the numbers of one arm with one seed."""

    model_name: Name
    backend: Backend
    exported: bool = True  # False: base and adapter were scored as training left them, without an exported file
    test_items_sha256: Sha256
    task: TaskRecord = AQI
    speed: list[SpeedRecord]

    @model_validator(mode="after")
    def _consistent(self) -> ScoresRecord:
        metrics = sorted(metric.name for metric in self.metrics if metric.split == "test")
        if "task" in self.model_fields_set and self.task.primary not in metrics:
            names = ", ".join(metrics) or "none"
            raise ValueError(f"expected the primary metric {self.task.primary} in split test, got {names}")
        refuse_repeats("speed rows", ((row.arm, row.phase, row.repetition) for row in self.speed))
        others = sorted({row.arm for row in self.speed} - {self.arm, "base"})
        if others:
            raise ValueError(f"expected speed rows of {self.arm} and base, got {others}")
        return self


_CREDIT: Any = Field(None, validate_default=True)


class _Credited(Record):
    """Credit is from 0 to 1. Older results have none, only right and wrong answers."""

    @field_validator("credit", mode="before", check_fields=False)
    @classmethod
    def _of_older_results(cls, credit: Any, info: ValidationInfo) -> Any:
        if credit is not None:
            return credit
        return float(info.data.get("category_accuracy", info.data.get("correct", 0)))


class SampleRecord(_Credited):
    """One line of `samples.jsonl`: one answered item."""

    item_id: Name
    task: Name
    split: Name
    prompt: str
    truth: str
    answer: str  # unshortened
    correct: bool
    credit: Share = _CREDIT
    predicted: FiniteOrNone = None  # number in the answer; None: there is none
    abs_error: ErrorOrNone = None  # |predicted - truth|; None: the task asks for no number
    prompt_tokens: Measured = None
    answer_tokens: Measured = None  # including the end token
    finish_reason: Literal["stop", "length"] | None = None  # "length": cut at evaluate.max_tokens; None: unknown


class LayerRecord(Record):
    """One number of one layer. Splits: weights, hidden, alignment (measured); probe, grit (logged in training)."""

    name: Name
    split: Name
    layer: Name  # module (layers.0.self_attn.q_proj) or hidden layer (layer 2)
    value: Number | None


class MeasuredRecord(Measurements):
    layers: list[LayerRecord]
    notes: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _consistent(self) -> MeasuredRecord:
        refuse_repeats("layers", ((row.name, row.split, row.layer) for row in self.layers))
        refuse_impossible_shares(self.layers, self.metric_defs)
        return self


class BenchmarkTask(Record):
    """A task of lm-evaluation-harness; its groups have several."""

    version: str
    shots: Count  # examples before each question
    items: Count
    metric: str | None  # which is an item's credit; None: no metric is a share of an item


class HarnessRecord(Measurements):
    """`harness.json`: a benchmark's numbers; samples.jsonl beside it has its items."""

    benchmark: Name
    lm_eval: Name  # version
    tasks: dict[Name, BenchmarkTask]


class PrecisionRecord(_Credited):
    """A run's merged model in one precision; all but the sizes are of the test items."""

    type: Name  # llama.cpp's name: f16, bf16, q8_0, q4_K_M, …
    bytes: Count  # of the whole file
    bits_per_weight: Annotated[float, Field(gt=0, le=64)]  # of the tensors alone
    tensor_types: dict[Name, Count]  # type of a tensor to number of tensors, read back
    category_accuracy: Share
    correct: Count
    n: Annotated[Count, Field(ge=1)]
    answers_equal_to_f16: Share  # share of items answered with the same text
    fallbacks: Count  # tensors in another format, because their rows are no multiple of its block
    credit: Share = _CREDIT


class QuantizedRecord(ArmRecord):
    rows: list[PrecisionRecord]  # f16 first, which the others are compared with

    @model_validator(mode="after")
    def _consistent(self) -> QuantizedRecord:
        refuse_repeats("rows of the type", (row.type for row in self.rows))
        return self


class QuantizedSampleRecord(_Credited):
    """One test item answered by the model in one precision."""

    type: Name
    item_id: Name
    correct: bool
    answer: str
    credit: Share = _CREDIT


class VerificationRecord(Record):
    """One backend in one mode, asked in one form; shares are of the prompts.

    Without prompts the backend does not support the mode, and there are no shares. An older server answers but does
    not tell what text or how many tokens it read: then `rendered` or `counted` is null.
    """

    backend: Name  # llama_cpp or ollama
    backend_version: Name
    mode: Literal["merged", "adapter"]  # merged GGUF, or base with GGUF adapter
    # rendered: the text that the model reads, to the file itself; newline: after the prompt; second: question of a chat
    form: Literal["rendered", "plain", "newline", "second"] = "plain"
    prompts: Count
    rendered: Share | None  # as in training
    counted: Share | None  # with the same token ids
    answered: Share | None  # greedily as by Hugging Face
    tied: Share | None = None  # different, at a token that nearly ties with the other; None: not checked
    equal_to_merged: Share | None  # answered as in mode merged; None: not compared
    perturbed_noticed: bool | None  # another adapter scale changed an answer; None: not tried
    first_difference: str | None  # where and why the first prompt differs
    gguf_sha256: Sha256  # of the exported model or base
    adapter_sha256: Sha256 | None
    server_digest: str | None  # the server's digest of the model
    stored_sha256: str | None  # of the weights as the server keeps them

    @model_validator(mode="after")
    def _consistent(self) -> VerificationRecord:
        if (self.answered is None) != (self.prompts == 0):
            raise ValueError(f"answered: expected a share if and only if prompts were asked, got "
                             f"{self.answered} of {self.prompts} prompts")  # fmt: skip
        for name in ("rendered", "counted"):
            if (share := getattr(self, name)) is not None and self.prompts == 0:
                raise ValueError(f"{name}: expected no share where no prompt was asked, got {share}")
        return self


class VerifyRecord(ArmRecord):
    model_name: Name
    rows: list[VerificationRecord]

    @model_validator(mode="after")
    def _consistent(self) -> VerifyRecord:
        refuse_repeats("rows of", ((row.backend, row.mode, row.form) for row in self.rows))
        return self


class ReadingRecord(Record):
    """One reading behind the verdict on whether the optimizer really moved differently."""

    name: Name
    layer: str  # '': the whole model
    step: Annotated[int, Field(ge=FINAL_STEP, lt=2**63)]  # -1: over the whole run
    value: Number
    unit: str
    threshold: float | None  # what it was judged against
    verdict: Literal["pass", "fail", "inconclusive", "skipped"]
    diagnosis: str


class VerdictRecord(ArmRecord):
    as_claimed: bool | None  # None: training was not watched
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
                raise ValueError(f"entry {position}: expected a `step`, a whole number from 0 up, got {step}")
        return self


class LedgerRecord(Record):
    """One line of `probe_ledger.jsonl`: a sampled step; the closing line has counts of events and no step."""

    step: Count | None = None
    units: dict[Name, dict[str, Any]] = Field(default_factory=dict)  # trained module → numbers, see `PROBED`
    events: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> LedgerRecord:
        if (self.step is None) == (self.events is None):
            raise ValueError("expected either a `step` with its `units`, or the closing line with its `events`")
        return self


_GritLayers = Annotated[dict[Name, dict[str, Any]] | None, BeforeValidator(_object_or_none)]


class GritRecord(Record):
    """One line of `grit_log.jsonl`: kinds spectra, reprojection, final, and others that no table has."""

    kind: Name
    step: Count
    layers: _GritLayers = None  # module → numbers, see `GRIT`, and eigenvalues_a and eigenvalues_g, largest first
    ranks: _GritLayers = None
    spectra: _GritLayers = None


class Meaning(NamedTuple):
    """How a logged number appears in the database: its name there, and its MetricDefRecord."""

    name: str
    unit: str
    description: str
    direction: Literal["higher", "lower", "none"] = "none"


TRAINED = {
    "final_eval_loss": Meaning("evaluation_loss", "nats per token", "Loss on the held-out items", "lower"),
    "final_kl": Meaning(
        "kl_to_base", "nats per token", "KL(base ‖ tuned) on texts of the base that no loss sees", "lower"
    ),
    "final_loss": Meaning("training_loss", "nats per token", "Last training loss that was logged", "lower"),
    "inversions": Meaning("inversions", "count", "Times that GRIT has refreshed its curvature"),
    "peak_gpu_memory_bytes": Meaning(
        "gpu_memory_bytes", "bytes", "Peak of what torch had allocated on the GPU", "lower"
    ),
}
"""What stage train reports about the adapter that it saved, under `extra` and `extra.grit` of its run.json."""

PROBED = {
    "angle": Meaning("angle", "degrees", "between the step made and the step of plain AdamW, 0: the same direction"),
    "cos_raw_step": Meaning("cos_raw_step", "cosine", "of the raw gradient and the step made, sign flipped"),
    "cos_raw_inner": Meaning("cos_raw_inner", "cosine", "of the raw gradient and the one that the optimizer got"),
    "lr_ratio": Meaning("lr_ratio", "ratio", "length of the step made, relative to plain AdamW's"),
}
"""Of a trained module in a sampled step. None: one of two vectors was zero, so there is no angle."""

_ENTROPY = "exp of the entropy of the normalized eigenvalues of the covariance of"
GRIT = {
    "r": Meaning("rank", "directions", "rank of the adapter's tensors"),
    "k": Meaning("kept_rank", "directions", "directions that the last reprojection kept"),
    "effective_rank_a": Meaning("effective_rank_a", "directions", f"{_ENTROPY} A's outputs"),
    "effective_rank_g": Meaning("effective_rank_g", "directions", f"{_ENTROPY} the gradients there"),
}
"""Of a layer; which ones there are depends on the kind of the log's record."""


def logged(entry: Mapping[str, Any], meanings: Mapping[str, Meaning]) -> Iterable[tuple[Meaning, float]]:
    """The numbers of an entry that have a meaning; null is none."""
    for key, meaning in meanings.items():
        if (value := entry.get(key)) is not None:
            yield meaning, float(value)


class Costs(Record):
    """What training cost, as stage train recorded it; None: unknown, as for the base and adapters trained elsewhere."""

    model_config = ConfigDict(extra="ignore")

    steps: Measured = None  # optimizer steps
    train_seconds: FiniteOrNone = None  # None also where a killed run was resumed: it knows only its own share
    peak_memory_bytes: Measured = None  # of the process, without GPU memory
    trained_parameters: Measured = None
    saved_parameters: Measured = None  # fewer if ranks have shrunk


class Run(Costs):
    """One arm with one seed, trained, exported and scored; a changed setting makes a new run."""

    id: int
    run_key: str  # hash of what it is; its folder in runs/
    arm: str  # the way of training; base is the untouched model
    seed: int
    model_name: str  # in Ollama
    is_current: bool  # whether the last compare found it on disk
    is_latest: bool = False  # the task's newest of this arm and seed, with the newest base, settings and data
    reference_run_id: int | None = None  # its base; None: there is no fair one
    started: datetime  # of the evaluation, UTC
    ended: datetime
    status: str  # finished: others are not archived
    task: str  # what was asked: aqi, gsm8k, …
    task_title: str  # of the primary metric, as tables show it
    primary_metric: str  # name in metric, split test, by which arms are compared
    test_items_sha256: str  # only runs with the same items can be compared
    backend_name: str  # llama_cpp, ollama or hf
    backend_version: str
    serving_mode: str  # at evaluation: adapter merged into the model, or beside it
    device_class: str  # of the evaluation
    environment_id: int  # where it was evaluated
    git_commit: str | None  # at evaluation
    git_dirty: bool | None  # true when any stage ran on changed files
    prompt_template: str | None
    base_key: str  # sha256 of base.json: model, place and prompt template; '': unknown
    train_key: str  # sha256 of params and inputs of stage train; '': nothing was trained
    params: dict[str, Any]  # per stage
    inputs: dict[str, Any]  # per stage: file to sha256
    stages: dict[str, Any]  # per stage: start, end, git, environment key, extra
    rest: dict[str, Any]  # per file: fields of its record that no table has

    @property
    def settings(self) -> dict[str, Any]:
        """Section train of the arm's parameters; empty for the base."""
        settings: dict[str, Any] = self.params.get("train", {}).get("train", {})
        return settings

    @property
    def tuned(self) -> dict[str, Any]:
        """What stage tune found for the arm; empty where it was off."""
        tuned: dict[str, Any] = self.params.get("train", {}).get("tuned", {})
        return tuned if tuned.get("runs") else {}

    @property
    def costs(self) -> dict[str, float]:
        """The known ones of `Costs`."""
        return {name: float(value) for name in Costs.model_fields if (value := getattr(self, name)) is not None}
