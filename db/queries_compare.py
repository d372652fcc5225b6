"""What a comparison reads: few columns of all chosen runs, one query for each table whatever the number of runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeVar, TypeVarTuple

from sqlalchemy import Integer, Row, Select, select, type_coerce
from sqlalchemy.orm import Session

from db.columns import FINAL_STEP
from db.models import Environment, Metric, Probe, Quantization, QuantizedSample, Run, Sample, Speed, Verification
from db.queries import Reading
from db.values import join_value

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
BASE = "base"
Key = tuple[str, str]


class RunFacts(NamedTuple):
    """A finished, current run; see `db.models.Run`."""

    id: int
    arm: str
    seed: int
    model_name: str
    run_key: str
    git_commit: str | None
    git_dirty: bool | None
    backend_name: str
    backend_version: str
    serving_mode: str
    device_class: str
    environment_id: int
    test_items_sha256: str
    reference_run_id: int | None
    started: datetime
    ended: datetime | None


@dataclass(frozen=True)
class Choice:
    """Which runs to read; an empty part means all.

    Attributes:
        arms: Ways of training; the base is always read.
        seeds: Of the trained arms; the base has one run, which is always read.
        backends: What ran the model, of the base too.
    """

    arms: Collection[str] = ()
    seeds: Collection[int] = ()
    backends: Collection[str] = ()


def chosen_runs(session: Session, choice: Choice) -> list[RunFacts]:
    """Return the chosen runs, base first, then by arm and seed."""
    columns = [getattr(Run, name) for name in RunFacts._fields]
    rows = _rows(session, _narrow(select(*columns), choice))
    return sorted((RunFacts(*row) for row in rows), key=lambda run: (run.arm != BASE, run.arm, run.seed))


def names_of_runs(session: Session) -> tuple[list[str], list[int], list[str]]:
    """Return arms, seeds and backends of all finished, current runs, each sorted."""
    query = select(Run.arm, Run.seed, Run.backend_name)
    rows = _rows(session, _narrow(query, Choice()))
    return (
        sorted({row.arm for row in rows}),
        sorted({row.seed for row in rows}),
        sorted({row.backend_name for row in rows}),
    )


def _narrow(query: Select[*Ts], choice: Choice) -> Select[*Ts]:
    query = query.where(Run.is_current, Run.status == "finished")
    if choice.arms:
        query = query.where(Run.arm.in_({BASE, *choice.arms}))
    if choice.seeds:
        query = query.where((Run.arm == BASE) | Run.seed.in_(choice.seeds))
    if choice.backends:
        query = query.where(Run.backend_name.in_(choice.backends))
    return query


def _ids(choice: Choice) -> Select[int]:
    return _narrow(select(Run.id), choice)


def _rows(session: Session, query: Select[*Ts]) -> Sequence[Row[*Ts]]:
    """All rows as tuples; the session would look for entities in each of a million rows."""
    return session.connection().execute(query).all()


def environments(session: Session) -> dict[int, Environment]:
    """Return all machines by id."""
    return {place.id: place for place in session.scalars(select(Environment))}


def final_values(session: Session, choice: Choice) -> dict[int, dict[Key, float]]:
    """Return run id -> (split, name) -> number of the finished run; NaN and infinities possible."""
    columns = (Metric.run_id, Metric.split, Metric.name, Metric.value, Metric.value_kind)
    query = select(*columns).where(Metric.step == FINAL_STEP, Metric.run_id.in_(_ids(choice)))
    found: dict[int, dict[Key, float]] = {}
    for run_id, split, name, value, kind in _rows(session, query.order_by(Metric.id)):
        found.setdefault(run_id, {})[split, name] = join_value(value, kind)
    return found


def answers(session: Session, choice: Choice, split: str) -> dict[int, dict[str, bool]]:
    """Return run id -> item id -> answered correctly."""
    correct = type_coerce(Sample.correct, Integer)  # as stored: hundreds of thousands of rows are not converted
    query = select(Sample.run_id, Sample.item_id, correct).where(Sample.split == split, Sample.run_id.in_(_ids(choice)))
    found: dict[int, dict[str, bool]] = {}
    for run_id, rows in groupby(_rows(session, query.order_by(Sample.run_id)), key=itemgetter(0)):
        found[run_id] = {item_id: right == 1 for _, item_id, right in rows}
    return found


class Timing(NamedTuple):
    """One timed phase of a run's own arm or of the base beside it; both numbers were measured, except load's tokens."""

    arm: str
    phase: str
    repetition: int
    tokens: int | None
    nanoseconds: int


def timings(session: Session, choice: Choice) -> dict[int, list[Timing]]:
    """Return run id -> its timed phases, in no order."""
    columns = (Speed.run_id, Speed.arm, Speed.phase, Speed.repetition, Speed.tokens, Speed.nanoseconds)
    query = select(*columns).where(Speed.nanoseconds.is_not(None), Speed.run_id.in_(_ids(choice)))
    found: dict[int, list[Timing]] = {}
    for row in _rows(session, query):
        found.setdefault(row.run_id, []).append(Timing._make(row[1:]))
    return found


def readings(session: Session, choice: Choice) -> dict[int, dict[str, Reading]]:
    """Return run id -> name -> what the probe says of the whole run."""
    columns = (Probe.run_id, Probe.name, Probe.value, Probe.value_kind, Probe.verdict, Probe.diagnosis)
    query = select(*columns).where(Probe.layer == "", Probe.step == FINAL_STEP, Probe.run_id.in_(_ids(choice)))
    found: dict[int, dict[str, Reading]] = {}
    for run_id, name, value, kind, verdict, diagnosis in _rows(session, query.order_by(Probe.id)):
        found.setdefault(run_id, {})[name] = Reading(join_value(value, kind), verdict, diagnosis)
    return found


def quantizations(session: Session, choice: Choice) -> dict[int, list[Quantization]]:
    """Return run id -> its precisions, f16 first, in the order in which they were measured."""
    query = select(Quantization).where(Quantization.run_id.in_(_ids(choice)))
    return _by_run((row.run_id, row) for row in session.scalars(query.order_by(Quantization.id)))


def quantized_answers(session: Session, choice: Choice) -> dict[int, dict[str, dict[str, bool]]]:
    """Return run id -> precision -> item id -> answered correctly."""
    columns = (QuantizedSample.run_id, QuantizedSample.type, QuantizedSample.item_id, QuantizedSample.correct)
    found: dict[int, dict[str, dict[str, bool]]] = {}
    for run_id, kind, item_id, correct in _rows(
        session, select(*columns).where(QuantizedSample.run_id.in_(_ids(choice)))
    ):
        found.setdefault(run_id, {}).setdefault(kind, {})[item_id] = correct
    return found


def verifications(session: Session, choice: Choice) -> dict[int, list[Verification]]:
    """Return run id -> what was verified of it, merged before adapter for each backend."""
    query = select(Verification).where(Verification.run_id.in_(_ids(choice)))
    rows = session.scalars(query.order_by(Verification.backend, Verification.mode.desc()))
    return _by_run((row.run_id, row) for row in rows)


def _by_run(rows: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    found: dict[int, list[T]] = {}
    for run_id, row in rows:
        found.setdefault(run_id, []).append(row)
    return found
