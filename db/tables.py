"""The tables and views. A table's columns are the fields of its record in `db.records`: a new field is a new column.

A float `value` that may be NaN is a pair `value`, `value_kind` (`records.split_value`). A key that may be absent is a
value that cannot occur otherwise (`step` -1, `layer` ''), never NULL, because unique constraints take NULLs for
different. Keys that a record does not name are in the JSON column `rest`.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

from db import records
from db.records import Record, plain, split_value

SCHEMA = 8
"""Of tables and views. A database with another number is rebuilt from runs/. (1 to 4 were Alembic's.)"""

Row = dict[str, Any]


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


_JSON = JSON(none_as_null=True)
_TYPES: dict[Any, Any] = {
    str: Text(), int: BigInteger(), float: Double(), bool: Boolean(), datetime: UtcDateTime(), dict: _JSON, list: _JSON,
}  # fmt: skip


def _python_type(annotation: Any) -> tuple[Any, bool]:
    """The plain type behind an annotation, and whether it may be None."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _python_type(inside[0])
    if origin in (Union, UnionType):
        return _python_type(next(part for part in inside if part is not NoneType))[0], NoneType in inside
    return (type(inside[0]) if origin is Literal else origin or annotation), False


def _columns(record: type[Record], **others: Column[Any]) -> Iterator[Column[Any]]:
    """A column for each field, or the one that is given under the field's name."""
    for name, field in record.model_fields.items():
        kind, optional = _python_type(field.annotation)
        yield others.pop(name, Column(name, _TYPES[kind], nullable=optional or name == "value"))
        if name == "value":
            yield Column("value_kind", Text, nullable=False)
    yield from others.values()


def row_of(record: Record, **more: Any) -> Row:
    """A record as a row of its table."""
    row: Row = plain(record.model_dump())
    row["rest"] = {name: row.pop(name) for name in record.model_extra or ()}
    if "value" in row:
        row |= number(getattr(record, "value"))  # noqa: B009
    return row | more


def number(value: float | None) -> Row:
    return dict(zip(("value", "value_kind"), split_value(value), strict=True))


METADATA = MetaData(naming_convention={"uq": "uq_%(table_name)s_%(column_0_N_name)s"})


def _key() -> Column[int]:
    # SQLite makes a column the row's own id only if its type is called INTEGER.
    return Column("id", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True)


def _of_runs(name: str, unique: str, record: type[Record] | None, *more: Column[Any], rest: bool = True) -> Table:
    """A table with rows of runs, each of them unique in these columns within its run."""
    run_id: Column[int] = Column("run_id", ForeignKey("run.id", ondelete="CASCADE"), nullable=False)
    columns = [*(_columns(record) if record else ()), *more]
    columns += [Column("rest", _JSON, nullable=False)] if rest else []
    return Table(name, METADATA, _key(), run_id, *columns, UniqueConstraint("run_id", *unique.split()))


def _step() -> Column[int]:
    return Column("step", BigInteger, nullable=False)  # optimizer step; -1: of the finished run


environment = Table(
    "environment", METADATA, _key(),
    Column("key", Text, unique=True, nullable=False),  # sha256 of all other columns as JSON
    *_columns(records.Device), Column("packages", _JSON, nullable=False),  # name to version
)  # fmt: skip
run = Table(
    "run", METADATA,
    *_columns(
        records.Run,
        id=_key(),
        run_key=Column("run_key", Text, unique=True, nullable=False),
        environment_id=Column("environment_id", ForeignKey("environment.id"), nullable=False),
        reference_run_id=Column("reference_run_id", ForeignKey("run.id", deferrable=True, initially="DEFERRED")),
    ),
    comment=f"schema {SCHEMA}",  # for servers, which have no PRAGMA user_version
)  # fmt: skip
metric_def = Table("metric_def", METADATA, Column("name", Text, primary_key=True), *_columns(records.MetricDefRecord))
metric = _of_runs("metric", "name split step", records.MetricRecord, _step(), rest=False)
layer_metric = _of_runs("layer_metric", "name split layer step", records.LayerRecord, _step(), rest=False)
sample = _of_runs("sample", "split item_id", records.SampleRecord)
probe = _of_runs("probe", "name layer step", records.ReadingRecord)
speed = _of_runs("speed", "arm phase repetition", records.SpeedRecord)
quantization = _of_runs("quantization", "type", records.PrecisionRecord)
quantized_sample = _of_runs("quantized_sample", "type item_id", records.QuantizedSampleRecord)
verification = _of_runs("verification", "backend mode form", records.VerificationRecord)
artifact = _of_runs("artifact", "stage path", records.ArtifactRecord, Column("stage", Text, nullable=False), rest=False)
# Eigenvalues of one Fisher factor of one layer, largest first, perhaps only the largest ones: per token, squares of
# activations (factor a: of A's outputs, preconditions B) or of gradients there (g, for A).
spectrum = _of_runs(
    "spectrum", "layer factor step", None, Column("layer", Text, nullable=False),
    Column("factor", Text, nullable=False), _step(), Column("eigenvalues", _JSON, nullable=False), rest=False,
)  # fmt: skip


# Views, in SQL that SQLite and PostgreSQL both read; docs/database.md explains their columns. A column without a unit
# in its name is in percent, and `delta_` is a difference from the base in percentage points. Two exceptions:
# `inference_speed` is decode tokens per second, the sum of tokens over the sum of time, because a mean of rates would
# give short repetitions the weight of long ones; `delta_speed` is the percentage change from the base's speed, the
# median over repetitions, each compared with the base that was timed beside it, as in evaluation.report.arms.

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
final AS (SELECT run_id, name, split, value, n FROM metric WHERE step = -1),
files AS (
    SELECT run_id, MIN(counted) AS counted, MIN(answered) AS answered FROM verification WHERE form = 'rendered'
    GROUP BY run_id
)
SELECT run.id AS run_id, run.task, run.task_title, run.primary_metric AS metric, metric_def.direction,
    run.model_name, run.arm, run.seed,
    100.0 * own.value AS score,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (own.value - base.value) END AS delta_score,
    own.n,
    100.0 * retention.value AS retention_accuracy,
    CASE WHEN run.arm = 'base' THEN 0.0 ELSE 100.0 * (retention.value - base_retention.value) END AS delta_retention,
    own_speed.rate AS inference_speed,
    middle.change AS delta_speed,
    100.0 * files.counted AS token_ids_equal,
    100.0 * files.answered AS greedy_equal,
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
LEFT JOIN files ON files.run_id = run.id
LEFT JOIN own_speed ON own_speed.run_id = run.id AND own_speed.arm = run.arm
LEFT JOIN middle ON middle.run_id = run.id AND middle.arm = run.arm
WHERE run.status = 'finished'
"""

# One row per current run; only the air quality task has aqi_accuracy and delta_aqi.
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
"""Name → query, in the order in which they can be created."""

_TIMESTAMPS = {
    "sqlite": "replace(ended, ' ', 'T') || '+00:00'",
    "postgresql": """to_char(ended AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')""",
}


def view_statements(dialect: str) -> list[str]:
    """CREATE VIEW for each of `VIEWS`, with PostgreSQL's timestamps for other dialects."""
    time = _TIMESTAMPS.get(dialect, _TIMESTAMPS["postgresql"])
    return [f"CREATE VIEW {name} AS{query.replace('{timestamp}', time)}" for name, query in VIEWS.items()]
