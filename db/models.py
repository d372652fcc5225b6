"""The tables, typed. Column comments say why a column is there and in which unit.

Two habits hold everywhere. A float that may be NaN is a pair `value`, `value_kind` (see `db.values`). A key
that may be absent is a value that cannot occur otherwise (`step` -1, `layer` ''), never NULL, because a
unique constraint treats NULLs as different from each other on SQLite and PostgreSQL alike.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Index, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from db.columns import (
    FINAL_STEP,
    LARGEST_INT,
    SHA256,
    Base,
    OfRun,
    count_rule,
    flag,
    primary_key,
    share_rule,
    typed_value_rules,
)
from db.models_attempts import Attempt
from db.models_layers import LayerMetric, Spectrum
from db.models_serving import Quantization, QuantizedSample, Speed, Verification

__all__ = [
    "Artifact",
    "Attempt",
    "Environment",
    "LayerMetric",
    "Metric",
    "MetricDef",
    "Probe",
    "Quantization",
    "QuantizedSample",
    "Run",
    "Sample",
    "Spectrum",
    "Speed",
    "Verification",
]


_KEYS = ("base_key", "train_key")


class Environment(Base):
    """A machine with its installed packages; speeds compare only within one."""

    __tablename__ = "environment"
    __table_args__ = (CheckConstraint("length(key) = 64", name="key_sha256"),)

    id: Mapped[int] = primary_key()
    key: Mapped[str] = mapped_column(SHA256, unique=True, comment="sha256 of the canonical JSON of all other columns")
    device_class: Mapped[str] = mapped_column(comment="cpu, cuda or mps")
    device_name: Mapped[str | None]
    cores: Mapped[int | None] = mapped_column(comment="cores of the machine")
    threads: Mapped[int | None] = mapped_column(comment="threads that were used")
    memory_bytes: Mapped[int | None] = mapped_column(comment="bytes")
    platform: Mapped[str | None]
    python: Mapped[str | None]
    packages: Mapped[dict[str, Any]] = mapped_column(comment="package name to version")


class Run(Base):
    """One arm with one seed, trained, exported and scored; a changed parameter makes a new row."""

    __tablename__ = "run"
    __table_args__ = (
        CheckConstraint("length(run_key) = 64", name="run_key_sha256"),
        CheckConstraint("length(source_sha256) = 64", name="source_sha256"),
        CheckConstraint("length(test_items_sha256) = 64", name="test_items_sha256"),
        CheckConstraint("arm <> '' AND model_name <> ''", name="named"),
        CheckConstraint("status IN ('running', 'finished', 'failed', 'crashed')", name="status"),
        CheckConstraint("status <> 'finished' OR ended IS NOT NULL", name="finished_has_end"),
        CheckConstraint("ended >= started", name="ended_after_start"),
        CheckConstraint("arm <> 'base' OR reference_run_id IS NULL", name="base_has_no_reference"),
        CheckConstraint("reference_run_id <> id", name="not_its_own_reference"),
        CheckConstraint("serving_mode IN ('merged', 'adapter')", name="serving_mode"),
        CheckConstraint("task <> '' AND task_title <> '' AND primary_metric <> ''", name="task_named"),
        count_rule("seed"),
        # All that a choice of runs looks at, apart from rows that carry kilobytes of parameters.
        Index("ix_run_choice", "is_current", "status", "task", "ended", "arm", "seed", "backend_name", *_KEYS),
        Index(
            "uq_run_current",
            "arm",
            "seed",
            unique=True,
            sqlite_where=text("is_current"),
            postgresql_where=text("is_current"),
        ),
    )

    id: Mapped[int] = primary_key()
    run_key: Mapped[str] = mapped_column(
        SHA256,
        unique=True,
        comment="identity: sha256 of arm, seed, params and inputs per stage, backend, device class",
    )
    source_sha256: Mapped[str] = mapped_column(
        SHA256, comment="sha256 of the files this row was read from; equal means nothing to do"
    )
    arm: Mapped[str] = mapped_column(comment="the way of training; base is the untouched model")
    seed: Mapped[int]
    model_name: Mapped[str] = mapped_column(comment="name of the model in Ollama")
    status: Mapped[str]
    is_current: Mapped[bool] = mapped_column(
        flag("is_current"), comment="false once other files stand in this arm's and seed's folders"
    )
    error: Mapped[str | None] = mapped_column(comment="why the run failed")
    started: Mapped[datetime] = mapped_column(comment="start of the evaluation, UTC")
    ended: Mapped[datetime | None] = mapped_column(comment="end of the evaluation, UTC")
    stages: Mapped[dict[str, Any]] = mapped_column(
        comment="per stage: start, end, git, environment key; stages run on different days"
    )
    params: Mapped[dict[str, Any]] = mapped_column(comment="resolved parameters per stage")
    inputs: Mapped[dict[str, Any]] = mapped_column(comment="sha256 of the inputs per stage")
    git_commit: Mapped[str | None] = mapped_column(comment="commit at evaluation")
    git_dirty: Mapped[bool | None] = mapped_column(
        flag("git_dirty"), comment="true when any stage ran on changed files: not reproducible"
    )
    prompt_template: Mapped[str | None]
    backend_name: Mapped[str] = mapped_column(comment="llama_cpp, ollama or hf")
    backend_version: Mapped[str]
    serving_mode: Mapped[str] = mapped_column(
        server_default=text("'merged'"),
        comment="how the evaluation ran an adapter: merged into the model, or beside it",
    )
    device_class: Mapped[str] = mapped_column(comment="device of the evaluation: cpu, cuda or mps")
    environment_id: Mapped[int] = mapped_column(
        ForeignKey("environment.id", ondelete="RESTRICT"), index=True, comment="where it was evaluated"
    )
    test_items_sha256: Mapped[str] = mapped_column(
        SHA256, comment="sha256 of the scored items; only equal ones compare"
    )
    reference_run_id: Mapped[int | None] = mapped_column(
        ForeignKey("run.id", ondelete="SET NULL"),
        index=True,
        comment="base run with the same task, items, backend and base_key, where both have one; NULL: no fair one",
    )
    parity_first_difference: Mapped[dict[str, Any] | None] = mapped_column(
        comment="first prompt on which the exported model disagreed with the trained one"
    )
    row_counts: Mapped[dict[str, Any] | None] = mapped_column(
        comment="table to number of this run's rows there, as written; NULL: unknown, an older version wrote them"
    )
    task: Mapped[str] = mapped_column(server_default=text("'aqi'"), comment="what is asked: aqi, gsm8k, …")
    task_title: Mapped[str] = mapped_column(
        server_default=text("'AQI accuracy'"), comment="of the primary metric, as tables show it"
    )
    primary_metric: Mapped[str] = mapped_column(
        server_default=text("'aqi_category_accuracy'"),
        comment="name in metric, split test: the mean credit of the test items, by which arms are compared",
    )
    base_key: Mapped[str] = mapped_column(
        server_default=text("''"),
        comment="sha256 of base.json: the base model, its place and prompt template; '': not known",
    )
    train_key: Mapped[str] = mapped_column(
        server_default=text("''"),
        comment="sha256 of the canonical JSON of params and inputs of stage train; '': nothing was trained",
    )


class Metric(OfRun, Base):
    """One number of a run: a final score, or a point of a training curve."""

    __tablename__ = "metric"
    __table_args__ = (
        UniqueConstraint("run_id", "name", "split", "step"),
        CheckConstraint("name <> '' AND split <> ''", name="named"),
        CheckConstraint(f"step BETWEEN {FINAL_STEP} AND {LARGEST_INT}", name="step"),
        count_rule("n"),
        *typed_value_rules(),
    )

    name: Mapped[str] = mapped_column(comment="see metric_def")
    split: Mapped[str] = mapped_column(
        comment="test, retention, parity, general, weights, hidden, alignment; train and eval for training curves"
    )
    step: Mapped[int] = mapped_column(comment="optimizer step; -1: final value of the run")
    value: Mapped[float | None] = mapped_column(comment="NULL unless value_kind is finite")
    value_kind: Mapped[str] = mapped_column(comment="finite, nan, inf, -inf: SQLite would turn NaN into NULL")
    n: Mapped[int | None] = mapped_column(comment="items behind the number")


class MetricDef(Base):
    """What a metric's number means."""

    __tablename__ = "metric_def"
    __table_args__ = (
        CheckConstraint("name <> ''", name="named"),
        CheckConstraint("direction IN ('higher', 'lower', 'none')", name="direction"),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(comment="share is a number from 0 to 1")
    direction: Mapped[str] = mapped_column(comment="which way is better")
    description: Mapped[str]


class Sample(OfRun, Base):
    """One answered test item; paired tests need the items, not the means."""

    __tablename__ = "sample"
    __table_args__ = (
        UniqueConstraint("run_id", "split", "item_id"),
        CheckConstraint("item_id <> '' AND split <> '' AND task <> ''", name="named"),
        CheckConstraint(
            "predicted BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308", name="predicted_finite"
        ),
        CheckConstraint("abs_error BETWEEN 0 AND 1.7976931348623157e308", name="abs_error_finite"),
        count_rule("prompt_tokens"),
        count_rule("answer_tokens"),
        share_rule("credit"),
    )

    item_id: Mapped[str]
    task: Mapped[str]
    split: Mapped[str]
    prompt: Mapped[str]
    truth: Mapped[str]
    answer: Mapped[str] = mapped_column(comment="the model's text, unshortened")
    predicted: Mapped[float | None] = mapped_column(comment="number read from the answer; NULL: none found")
    correct: Mapped[bool] = mapped_column(flag("correct"))
    abs_error: Mapped[float | None] = mapped_column(comment="|predicted - truth|; NULL: not a number task")
    prompt_tokens: Mapped[int | None]
    answer_tokens: Mapped[int | None]
    credit: Mapped[float] = mapped_column(
        comment="0 to 1: what the answer is worth; between them where a task gives credit for parts"
    )


class Probe(OfRun, Base):
    """One reading of a gradient-divergence probe: did the optimizer really move differently."""

    __tablename__ = "probe"
    __table_args__ = (
        UniqueConstraint("run_id", "name", "layer", "step"),
        CheckConstraint("name <> ''", name="named"),
        CheckConstraint(f"step BETWEEN {FINAL_STEP} AND {LARGEST_INT}", name="step"),
        CheckConstraint("verdict IN ('pass', 'fail', 'inconclusive', 'skipped')", name="verdict"),
        *typed_value_rules(),
    )

    name: Mapped[str]
    layer: Mapped[str] = mapped_column(comment="'': the whole model")
    step: Mapped[int] = mapped_column(comment="optimizer step; -1: over the whole run")
    value: Mapped[float | None] = mapped_column(comment="NULL unless value_kind is finite")
    value_kind: Mapped[str]
    threshold: Mapped[float | None] = mapped_column(comment="the value it was judged against")
    unit: Mapped[str]
    verdict: Mapped[str]
    diagnosis: Mapped[str] = mapped_column(comment="in words: what this reading means")


class Artifact(OfRun, Base):
    """A file that a run made, with the file it was made from: adapter, merged model, GGUF, Modelfile."""

    __tablename__ = "artifact"
    __table_args__ = (
        UniqueConstraint("run_id", "stage", "path"),
        CheckConstraint("length(sha256) = 64", name="sha256"),
        CheckConstraint("length(parent_sha256) = 64", name="parent_sha256"),
        CheckConstraint(
            "kind IN ('adapter', 'merged_gguf', 'adapter_gguf', 'base_gguf', 'modelfile', 'base_model', 'dataset')",
            name="kind",
        ),
        count_rule("bytes"),
    )

    stage: Mapped[str]
    kind: Mapped[str]
    path: Mapped[str] = mapped_column(comment="relative to the project's root")
    sha256: Mapped[str] = mapped_column(SHA256, index=True)
    bytes: Mapped[int] = mapped_column(comment="bytes")
    parent_sha256: Mapped[str | None] = mapped_column(
        SHA256, comment="content, not row: the parent may belong to the base run or stand outside"
    )
