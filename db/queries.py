"""Reading questions about some runs, answered in plain values; which runs there are says `db.queries_compare`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, column, func, select, table
from sqlalchemy.orm import Session

from db.columns import FINAL_STEP
from db.models import (
    Attempt,
    Environment,
    LayerMetric,
    Metric,
    MetricDef,
    Probe,
    Quantization,
    QuantizedSample,
    Run,
    Sample,
    Spectrum,
    Speed,
    Verification,
)
from db.values import join_value

VIEWS = (
    "evaluation_results",
    "v_leaderboard",
    "v_probe_summary",
    "v_parity",
    "v_quantization",
    "v_verification",
    "v_attempts",
    "task_results",
    "task_quantization",
)


@dataclass(frozen=True)
class FinalMetric:
    """A number of a finished run.

    Attributes:
        value: In the unit of its definition; NaN and infinities possible.
        n: Items behind it, when known.
    """

    value: float
    n: int | None


def final_metrics(session: Session, run_ids: Iterable[int]) -> dict[int, dict[tuple[str, str], FinalMetric]]:
    """Return run id -> (split, name) -> number, parity shares included (split `parity`)."""
    ids = list(run_ids)
    found: dict[int, dict[tuple[str, str], FinalMetric]] = {run_id: {} for run_id in ids}
    query = select(Metric).where(Metric.step == FINAL_STEP, Metric.run_id.in_(ids))
    for metric in session.scalars(query.order_by(Metric.id)):
        number = FinalMetric(join_value(metric.value, metric.value_kind), metric.n)
        found[metric.run_id][metric.split, metric.name] = number
    return found


def curve(session: Session, run_id: int, name: str, split: str = "train") -> list[tuple[int, float]]:
    """Return a training curve as (optimizer step, value), NaN and infinities included."""
    query = select(Metric).where(
        Metric.run_id == run_id, Metric.name == name, Metric.split == split, Metric.step != FINAL_STEP
    )
    return [(m.step, join_value(m.value, m.value_kind)) for m in session.scalars(query.order_by(Metric.step))]


@dataclass(frozen=True)
class Reading:
    """A number of a verdict over a whole run.

    Attributes:
        value: In the reading's unit; NaN and infinities possible.
        verdict: pass, fail, inconclusive, or skipped where it is not judged.
        diagnosis: In words.
    """

    value: float
    verdict: str
    diagnosis: str


def probe_readings(session: Session, run_ids: Iterable[int]) -> dict[int, dict[str, Reading]]:
    """Return run id -> name -> what the probe says of the whole run (not of layers and steps)."""
    ids = list(run_ids)
    found: dict[int, dict[str, Reading]] = {run_id: {} for run_id in ids}
    query = select(Probe).where(Probe.run_id.in_(ids), Probe.layer == "", Probe.step == FINAL_STEP)
    for row in session.scalars(query.order_by(Probe.id)):
        found[row.run_id][row.name] = Reading(join_value(row.value, row.value_kind), row.verdict, row.diagnosis)
    return found


def metric_meanings(session: Session) -> dict[str, MetricDef]:
    """Return what each metric means, by name."""
    return {meaning.name: meaning for meaning in session.scalars(select(MetricDef))}


def decode_speeds(session: Session, run_id: int) -> dict[str, float]:
    """Return tokens per second of decoding, by arm, from this run's own measurements.

    Sum of tokens over sum of time. An arm's run holds the base too, timed alternately in one process.
    """
    query = (
        select(Speed.arm, func.sum(Speed.tokens), func.sum(Speed.nanoseconds))
        .where(
            Speed.run_id == run_id,
            Speed.phase == "decode",
            Speed.tokens.is_not(None),
            Speed.nanoseconds.is_not(None),
        )
        .group_by(Speed.arm)
    )
    return {arm: float(tokens or 0) * 1e9 / float(ns) for arm, tokens, ns in session.execute(query) if ns}


def outcomes(session: Session, run_id: int, split: str = "test") -> dict[str, bool]:
    """Return item id -> answered correctly."""
    query = select(Sample.item_id, Sample.correct).where(Sample.run_id == run_id, Sample.split == split)
    return {item_id: correct for item_id, correct in session.execute(query.order_by(Sample.item_id))}


def samples(session: Session, run_ids: Iterable[int]) -> list[Sample]:
    """Return all answered items of some runs, by run, split and item."""
    query = select(Sample).where(Sample.run_id.in_(list(run_ids)))
    return list(session.scalars(query.order_by(Sample.run_id, Sample.split, Sample.item_id)))


@dataclass(frozen=True)
class LayerNumber:
    """A number of one layer.

    Attributes:
        split: weights, hidden, alignment (measured after training); probe, grit (logged while it ran).
        layer: A module, or a hidden layer ("layer 2").
        step: Optimizer step; -1: of the finished run.
        value: NaN and infinities possible.
    """

    name: str
    split: str
    layer: str
    step: int
    value: float


def layer_metrics(
    session: Session, run_id: int, split: str | None = None, names: Iterable[str] | None = None
) -> list[LayerNumber]:
    """Return a run's numbers of layers, by split, name, layer and step; of all splits and names by default."""
    query = select(LayerMetric).where(LayerMetric.run_id == run_id)
    if split is not None:
        query = query.where(LayerMetric.split == split)
    if names is not None:
        query = query.where(LayerMetric.name.in_(list(names)))
    query = query.order_by(LayerMetric.split, LayerMetric.name, LayerMetric.layer, LayerMetric.step)
    return [
        LayerNumber(row.name, row.split, row.layer, row.step, join_value(row.value, row.value_kind))
        for row in session.scalars(query)
    ]


@dataclass(frozen=True)
class FactorSpectrum:
    """Eigenvalues of one Fisher factor of one layer.

    Attributes:
        factor: a (of A's outputs) or g (of the gradients there).
        step: Optimizer step.
        eigenvalues: Largest first; NaN and infinities possible.
    """

    layer: str
    factor: str
    step: int
    eigenvalues: tuple[float, ...]


def spectra(session: Session, run_id: int) -> list[FactorSpectrum]:
    """Return a run's spectra, by layer, factor and step; none where the arm has no Fisher factors."""
    query = select(Spectrum).where(Spectrum.run_id == run_id)
    return [
        FactorSpectrum(row.layer, row.factor, row.step, tuple(map(float, row.eigenvalues)))
        for row in session.scalars(query.order_by(Spectrum.layer, Spectrum.factor, Spectrum.step))
    ]


def attempts(session: Session) -> list[Attempt]:
    """Return every known start of a stage, in the order of time."""
    return list(session.scalars(select(Attempt).order_by(Attempt.started, Attempt.id)))


def speed_rows(session: Session, run_id: int) -> list[Speed]:
    """Return this run's measured phases of its own arm and of the base beside it."""
    query = select(Speed).where(Speed.run_id == run_id, Speed.nanoseconds.is_not(None))
    return list(session.scalars(query.order_by(Speed.arm, Speed.phase, Speed.repetition)))


def quantizations(session: Session, run_id: int) -> list[Quantization]:
    """Return a run's precisions, f16 first, in the order in which they were measured."""
    return list(session.scalars(select(Quantization).where(Quantization.run_id == run_id).order_by(Quantization.id)))


def quantized_outcomes(session: Session, run_id: int) -> dict[str, dict[str, bool]]:
    """Return precision -> item id -> answered correctly."""
    found: dict[str, dict[str, bool]] = {}
    query = select(QuantizedSample.type, QuantizedSample.item_id, QuantizedSample.correct)
    for kind, item_id, correct in session.execute(query.where(QuantizedSample.run_id == run_id)):
        found.setdefault(kind, {})[item_id] = correct
    return found


def verifications(session: Session, run_id: int) -> list[Verification]:
    """Return what was verified of a run, merged before adapter for each backend."""
    query = select(Verification).where(Verification.run_id == run_id)
    return list(session.scalars(query.order_by(Verification.backend, Verification.mode.desc())))


def environment(session: Session, run: Run) -> Environment:
    """Return the machine and packages with which a run was evaluated."""
    return session.get_one(Environment, run.environment_id)


def view(session: Session, name: str) -> list[dict[str, Any]]:
    """Return the rows of one of `VIEWS`."""
    if name not in VIEWS:
        raise ValueError(f"expected one of {', '.join(VIEWS)}, came {name!r}")
    query: Select[Any] = select(column("*", is_literal=True)).select_from(table(name))
    return [dict(row) for row in session.execute(query).mappings()]
