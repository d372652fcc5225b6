"""The tables and views. Columns stand here only where SQL asks for them; what else a record has is in `rest`.

A float that may be NaN is a pair `value`, `value_kind` (`records.split_value`). A key that may be absent is a value
that cannot occur otherwise (`step` -1, `layer` ''), never NULL: unique constraints take NULLs for different.
"""

import re
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, declared_attr, mapped_column

SCHEMA = 7
"""Of tables and views. A database with another number is made anew from runs/. (1 to 4 were Alembic's.)"""


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with a time zone, stored in UTC; SQLite forgets zones, so UTC is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"})
    type_annotation_map = {  # noqa: RUF012  SQLAlchemy reads this as a plain class attribute
        str: Text,
        int: BigInteger,
        float: Double,
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
        list[float]: JSON(none_as_null=True),
    }

    @declared_attr.directive
    def __tablename__(cls) -> str:  # noqa: N805  MetricDef is metric_def
        return re.sub(r"\B(?=[A-Z])", "_", cls.__name__).lower()


def _key() -> MappedColumn[int]:
    # On SQLite it must be called INTEGER to be the row's own id.
    return mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, sort_order=-10)


class OfRun:
    id: Mapped[int] = _key()
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), sort_order=-9)


class WithRest(OfRun):
    rest: Mapped[dict[str, Any]] = mapped_column(sort_order=10)  # fields of the record without a column


class Environment(Base):
    """A machine with its installed packages; speeds compare only within one."""

    id: Mapped[int] = _key()
    key: Mapped[str] = mapped_column(unique=True)  # sha256 of all other columns as JSON
    device_class: Mapped[str]  # cpu, cuda or mps
    device_name: Mapped[str | None]
    cores: Mapped[int | None]  # of the machine
    threads: Mapped[int | None]  # used
    memory_bytes: Mapped[int | None]
    platform: Mapped[str | None]
    python: Mapped[str | None]
    packages: Mapped[dict[str, Any]]  # name to version


class Run(Base):
    """One arm with one seed, trained, exported and scored; a changed parameter makes a new row."""

    # Where SQLite has PRAGMA user_version, servers have this comment.
    __table_args__ = ({"comment": f"schema {SCHEMA}"},)

    id: Mapped[int] = _key()
    run_key: Mapped[str] = mapped_column(unique=True)  # of what it is; its folder in runs/
    arm: Mapped[str]  # the way of training; base is the untouched model
    seed: Mapped[int]
    model_name: Mapped[str]  # in Ollama
    status: Mapped[str]  # finished: others are not archived
    is_current: Mapped[bool]  # whether the last compare found it on disk
    is_latest: Mapped[bool]  # the task's newest of this arm and seed, with the newest base, settings and data
    started: Mapped[datetime]  # of the evaluation, UTC
    ended: Mapped[datetime]
    stages: Mapped[dict[str, Any]]  # per stage: start, end, git, environment key, extra
    params: Mapped[dict[str, Any]]  # per stage
    inputs: Mapped[dict[str, Any]]  # per stage: file to sha256
    git_commit: Mapped[str | None]  # at evaluation
    git_dirty: Mapped[bool | None]  # true when any stage ran on changed files
    prompt_template: Mapped[str | None]
    backend_name: Mapped[str]  # llama_cpp, ollama or hf
    backend_version: Mapped[str]
    serving_mode: Mapped[str]  # at evaluation: adapter merged into the model, or beside it
    device_class: Mapped[str]  # of the evaluation
    environment_id: Mapped[int] = mapped_column(ForeignKey("environment.id"))  # where it was evaluated
    test_items_sha256: Mapped[str]  # only equal ones compare
    reference_run_id: Mapped[int | None] = mapped_column(ForeignKey("run.id"))  # its base; NULL: there is no fair one
    parity_first_difference: Mapped[dict[str, Any] | None]  # first prompt on which export and training disagree
    task: Mapped[str]  # what is asked: aqi, gsm8k, …
    task_title: Mapped[str]  # of the primary metric, as tables show it
    primary_metric: Mapped[str]  # name in metric, split test, by which arms are compared
    base_key: Mapped[str]  # sha256 of base.json: model, place and prompt template; '': not known
    train_key: Mapped[str]  # sha256 of params and inputs of stage train; '': nothing was trained
    # What training took, as it said itself; NULL: not told, as of the base and of adapters trained elsewhere
    steps: Mapped[int | None]  # optimizer steps
    train_seconds: Mapped[float | None]  # NULL also where a killed run went on: it knows its own share alone
    peak_memory_bytes: Mapped[int | None]  # of the process; what a GPU holds is not in it
    trained_parameters: Mapped[int | None]
    saved_parameters: Mapped[int | None]  # fewer where ranks have shrunk
    rest: Mapped[dict[str, Any]]  # per file: fields of its record that no table has


class Metric(OfRun, Base):
    __table_args__ = (UniqueConstraint("run_id", "name", "split", "step"),)

    name: Mapped[str]  # see metric_def
    # test, retention, parity, general, weights, hidden, alignment, eval; of curves train and eval; of a task of lm-eval
    # harness/ and its name
    split: Mapped[str]
    step: Mapped[int]  # optimizer step; -1: of the finished run
    value: Mapped[float | None]
    value_kind: Mapped[str]
    n: Mapped[int | None]  # items behind the number


class MetricDef(Base):
    name: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str]  # share: a number from 0 to 1
    direction: Mapped[str]  # which way is better: higher, lower or none
    description: Mapped[str]


class Sample(WithRest, Base):
    """One answered test item; paired tests need the items, not the means."""

    __table_args__ = (UniqueConstraint("run_id", "split", "item_id"),)

    item_id: Mapped[str]
    task: Mapped[str]
    split: Mapped[str]
    prompt: Mapped[str]
    truth: Mapped[str]
    answer: Mapped[str]  # the model's text, unshortened
    predicted: Mapped[float | None]  # number read from the answer; NULL: none found
    correct: Mapped[bool]
    abs_error: Mapped[float | None]  # |predicted - truth|; NULL: not a number task
    prompt_tokens: Mapped[int | None]
    answer_tokens: Mapped[int | None]  # generated, the end token included
    credit: Mapped[float]  # 0 to 1; between them where a task gives credit for parts


class Probe(WithRest, Base):
    """One reading of a verdict: did the optimizer really move differently."""

    __table_args__ = (UniqueConstraint("run_id", "name", "layer", "step"),)

    name: Mapped[str]
    layer: Mapped[str]  # '': the whole model
    step: Mapped[int]  # optimizer step; -1: over the whole run
    value: Mapped[float | None]
    value_kind: Mapped[str]
    threshold: Mapped[float | None]  # what it was judged against
    unit: Mapped[str]
    verdict: Mapped[str]  # pass, fail, inconclusive or skipped
    diagnosis: Mapped[str]  # in words


class LayerMetric(OfRun, Base):
    """One number of one layer: measured after training, or sampled while it ran."""

    __table_args__ = (UniqueConstraint("run_id", "name", "split", "layer", "step"),)

    name: Mapped[str]  # see metric_def
    split: Mapped[str]  # measured: weights, hidden, alignment; logged while training: probe, grit
    layer: Mapped[str]  # module (layers.0.self_attn.q_proj) or hidden layer (layer 2)
    step: Mapped[int]  # optimizer step; -1: of the finished run
    value: Mapped[float | None]
    value_kind: Mapped[str]


class Spectrum(OfRun, Base):
    """Eigenvalues of one Fisher factor of one layer at one step, largest first, perhaps only the largest ones.

    Squares of activations (factor a: of A's outputs, preconditions B) or of gradients there (g, for A) a token.
    """

    __table_args__ = (UniqueConstraint("run_id", "layer", "factor", "step"),)

    layer: Mapped[str]
    factor: Mapped[str]
    step: Mapped[int]
    eigenvalues: Mapped[list[float]]


class Artifact(OfRun, Base):
    __table_args__ = (UniqueConstraint("run_id", "stage", "path"),)

    stage: Mapped[str]
    kind: Mapped[str]
    path: Mapped[str]  # relative to the project's root
    sha256: Mapped[str]
    bytes: Mapped[int]
    parent_sha256: Mapped[str | None]  # content, not row: it may belong to the base run or stand outside


class Speed(WithRest, Base):
    """One timed phase. An arm's run also times the base, alternately in the same process: machines drift.

    load: until the model is ready; ttft: from a request to its first token; prefill: evaluating prompts; decode:
    answers, token by token.
    """

    __table_args__ = (UniqueConstraint("run_id", "arm", "phase", "repetition"),)

    arm: Mapped[str]  # the run's own, or base
    phase: Mapped[str]
    repetition: Mapped[int]
    tokens: Mapped[int | None]  # NULL: not measured
    nanoseconds: Mapped[int | None]


class Quantization(WithRest, Base):
    """A run's merged model in one precision; f16 is what the others are held against."""

    __table_args__ = (UniqueConstraint("run_id", "type"),)

    type: Mapped[str]  # llama.cpp's name: f16, bf16, q8_0, q4_K_M, …
    bytes: Mapped[int]  # of the whole file
    bits_per_weight: Mapped[float]  # of the tensors alone
    tensor_types: Mapped[dict[str, Any]]  # type of a tensor to number of tensors, read back
    category_accuracy: Mapped[float]  # share of the test items answered correctly
    correct: Mapped[int]  # of n test items
    n: Mapped[int]
    answers_equal_to_f16: Mapped[float]  # share of the test items answered with the same text
    fallbacks: Mapped[int]  # tensors in another format, their rows being no multiple of its block
    credit: Mapped[float]  # mean of the test items


class QuantizedSample(WithRest, Base):
    """One test item answered by the model in one precision; paired intervals need the items."""

    __table_args__ = (UniqueConstraint("run_id", "type", "item_id"),)

    type: Mapped[str]  # as in quantization
    item_id: Mapped[str]
    correct: Mapped[bool]
    answer: Mapped[str]
    credit: Mapped[float]


class Verification(WithRest, Base):
    """Whether one backend in one mode answers as the trained model does; shares are of the prompts of a form."""

    __table_args__ = (UniqueConstraint("run_id", "backend", "mode", "form"),)

    backend: Mapped[str]  # llama_cpp or ollama
    backend_version: Mapped[str]
    mode: Mapped[str]  # merged GGUF, or base with GGUF adapter
    form: Mapped[str]  # plain, newline behind the prompt, or second question of a conversation
    prompts: Mapped[int]  # 0: this backend does not support the mode
    rendered: Mapped[float | None]  # as in training; NULL: the server does not tell
    counted: Mapped[float | None]  # read as the same tokens; NULL: the server does not tell
    answered: Mapped[float | None]  # greedily as by Hugging Face
    tied: Mapped[float | None]  # otherwise, at a token that all but ties with the other; NULL: not looked at
    equal_to_merged: Mapped[float | None]  # answered as in mode merged; NULL: not compared
    perturbed_noticed: Mapped[bool | None]  # another adapter scale changed an answer; NULL: not tried
    first_difference: Mapped[str | None]  # where and why the first prompt differs
    gguf_sha256: Mapped[str]  # of the exported model or base
    adapter_sha256: Mapped[str | None]
    server_digest: Mapped[str | None]  # the server's digest of the model
    stored_sha256: Mapped[str | None]  # of the weights as the server keeps them


# Views, in SQL that SQLite and PostgreSQL both read; docs/database.md explains their columns. What has no unit in its
# name is percent, with `delta_` a difference from the base in percentage points. Two are not: `inference_speed` is
# decode tokens per second, the sum of tokens over the sum of time, since means of rates would let short repetitions
# count as much as long ones; `delta_speed` is percent of the base's, the median over the repetitions, each against the
# base that was timed beside it, as in evaluation.report.arms.

_TASK_RESULTS = """
WITH decode AS (
    SELECT run_id, arm, repetition, CAST(tokens AS DOUBLE PRECISION) AS tokens, nanoseconds
    FROM speed WHERE phase = 'decode' AND tokens > 0 AND nanoseconds > 0
),
own_speed AS (SELECT run_id, arm, 1e9 * SUM(tokens) / SUM(nanoseconds) AS rate FROM decode GROUP BY run_id, arm),
change AS (
    SELECT own.run_id, own.arm, 100.0 * (own.tokens / own.nanoseconds / (base.tokens / base.nanoseconds) - 1) AS change
    FROM decode AS own JOIN decode AS base
        ON base.run_id = own.run_id AND base.repetition = own.repetition AND base.arm = 'base'
),
ranked AS (
    SELECT run_id, arm, change, ROW_NUMBER() OVER (PARTITION BY run_id, arm ORDER BY change) AS place,
        COUNT(*) OVER (PARTITION BY run_id, arm) AS n
    FROM change
),
middle AS (
    SELECT run_id, arm, AVG(change) AS change FROM ranked WHERE place IN ((n + 1) / 2, (n + 2) / 2)
    GROUP BY run_id, arm
),
final AS (SELECT run_id, name, split, value, n FROM metric WHERE step = -1)
SELECT run.id AS run_id, run.task, run.task_title, run.primary_metric AS metric, metric_def.direction,
    run.model_name, run.arm, run.seed,
    100.0 * own.value AS score,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (own.value - base.value) END AS delta_score,
    own.n,
    100.0 * retention.value AS retention_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (retention.value - base_retention.value) END AS delta_retention,
    own_speed.rate AS inference_speed,
    middle.change AS delta_speed,
    100.0 * token_ids.value AS token_ids_equal,
    100.0 * greedy.value AS greedy_equal,
    run.backend_name, run.device_class, run.git_commit, run.git_dirty,
    run.is_current, run.is_latest, run.test_items_sha256, {timestamp} AS timestamp
FROM run
LEFT JOIN metric_def ON metric_def.name = run.primary_metric
LEFT JOIN final AS own ON own.run_id = run.id AND own.name = run.primary_metric AND own.split = 'test'
LEFT JOIN final AS base
    ON base.run_id = run.reference_run_id AND base.name = run.primary_metric AND base.split = 'test'
LEFT JOIN final AS retention
    ON retention.run_id = run.id AND retention.name = 'retention_accuracy' AND retention.split = 'retention'
LEFT JOIN final AS base_retention ON base_retention.run_id = run.reference_run_id
    AND base_retention.name = 'retention_accuracy' AND base_retention.split = 'retention'
LEFT JOIN final AS token_ids
    ON token_ids.run_id = run.id AND token_ids.name = 'token_ids_equal' AND token_ids.split = 'parity'
LEFT JOIN final AS greedy
    ON greedy.run_id = run.id AND greedy.name = 'greedy_equal' AND greedy.split = 'parity'
LEFT JOIN own_speed ON own_speed.run_id = run.id AND own_speed.arm = run.arm
LEFT JOIN middle ON middle.run_id = run.id AND middle.arm = run.arm
WHERE run.status = 'finished'
"""

# One row for each current run; those of other tasks than air quality have no aqi_accuracy and delta_aqi.
_EVALUATION_RESULTS = """
SELECT model_name, task, arm, seed, score, delta_score,
    CASE WHEN task = 'aqi' THEN score END AS aqi_accuracy, CASE WHEN task = 'aqi' THEN delta_score END AS delta_aqi,
    inference_speed, delta_speed, timestamp
FROM task_results WHERE is_current
"""

_COSTS = """
WITH made AS (
    SELECT run_id, MAX(CASE WHEN kind = 'adapter' THEN bytes END) AS adapter_bytes,
        MAX(CASE WHEN kind = 'adapter_gguf' THEN bytes END) AS adapter_gguf_bytes,
        MAX(CASE WHEN kind IN ('merged_gguf', 'base_gguf') THEN bytes END) AS model_gguf_bytes
    FROM artifact GROUP BY run_id
)
SELECT run.id AS run_id, run.task, run.arm, run.seed, run.steps, run.train_seconds,
    run.train_seconds / NULLIF(run.steps, 0) AS seconds_a_step, run.peak_memory_bytes,
    run.trained_parameters, run.saved_parameters,
    made.adapter_bytes, made.adapter_gguf_bytes, made.model_gguf_bytes, run.is_current, run.is_latest
FROM run LEFT JOIN made ON made.run_id = run.id
WHERE run.status = 'finished'
"""

VIEWS: dict[str, str] = {
    "task_results": _TASK_RESULTS,
    "evaluation_results": _EVALUATION_RESULTS,
    "costs": _COSTS,
}
"""Name to query, in the order in which they can be made."""

_TIMESTAMPS = {
    "sqlite": "replace(ended, ' ', 'T') || '+00:00'",
    "postgresql": """to_char(ended AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')""",
}


def view_statements(dialect: str) -> list[str]:
    """CREATE VIEW for each of `VIEWS`; other dialects get PostgreSQL's."""
    time = _TIMESTAMPS.get(dialect, _TIMESTAMPS["postgresql"])
    return [f"CREATE VIEW {name} AS{query.replace('{timestamp}', time)}" for name, query in VIEWS.items()]
