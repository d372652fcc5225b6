"""What a comparison reads: few columns of all chosen runs, one query for each table whatever the number of runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeVar, TypeVarTuple

from sqlalchemy import Row, Select, func, or_, select
from sqlalchemy.orm import Session

from db.columns import FINAL_STEP
from db.models import Environment, Metric, Probe, Quantization, QuantizedSample, Run, Sample, Speed, Verification
from db.queries import Reading
from db.tasks import TaskFacts, latest_runs, newest_base, other_runs, task_on_disk, tasks_of_runs
from db.values import join_value

__all__ = ["BASE", "Choice", "RunFacts", "TaskFacts", "Timing", "tasks_of_runs"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
BASE = "base"
Key = tuple[str, str]


class RunFacts(NamedTuple):
    """A finished run; see `db.models.Run`."""

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
    task: str
    task_title: str
    primary_metric: str


@dataclass(frozen=True)
class Choice:
    """Which runs to read; an empty part means all.

    Attributes:
        arms: Ways of training; the base is always read.
        seeds: Of the trained arms; the base has one run, which is always read.
        backends: What ran the model, of the base too.
        task: What was asked. None: the task whose results are on disk, its current runs; so too where it is named.
            Of another task, each arm's and seed's latest finished run stands for it; see `db.tasks.latest_runs`.
            Either way all are of one base model, the newest run's.
    """

    arms: Collection[str] = ()
    seeds: Collection[int] = ()
    backends: Collection[str] = ()
    task: str | None = None


def chosen_runs(session: Session, choice: Choice) -> list[RunFacts]:
    """Return the chosen runs, base first, then by arm and seed.

    Of a task that is not on disk, a run refers to the chosen base with the same items and backend: the one that it was
    held against at its time may have a successor.
    """
    columns = [getattr(Run, name) for name in RunFacts._fields]
    rows = _rows(session, _narrow(session, select(*columns), choice))
    runs = sorted((RunFacts(*row) for row in rows), key=lambda run: (run.arm != BASE, run.arm, run.seed))
    if choice.task in (None, task_on_disk(session)):
        return runs
    bases = {(run.test_items_sha256, run.backend_name): run.id for run in reversed(runs) if run.arm == BASE}
    return [
        run if run.arm == BASE else run._replace(reference_run_id=bases.get((run.test_items_sha256, run.backend_name)))
        for run in runs
    ]


def left_out(session: Session, choice: Choice) -> dict[str, int]:
    """Return arm -> number of finished runs that a choice leaves out, base first; arms without any are not there.

    On the disk: current runs of another base model. Of another task: runs, at whatever time, of another base model
    than its newest run, or trained with other settings or data than their arm's newest run.
    """
    on_disk = task_on_disk(session)
    query = select(Run.arm, func.count()).group_by(Run.arm).order_by(Run.arm != BASE, Run.arm)
    if choice.task is None or choice.task == on_disk:
        base = newest_base(on_disk, current=True)
        others = (Run.base_key != base, Run.base_key != "")
        query = query.where(Run.is_current, Run.status == "finished", Run.task == on_disk, *others)
    else:
        query = query.where(Run.id.in_(other_runs(choice.task)))
    return {arm: count for arm, count in _rows(session, _filtered(query, choice))}


def names_of_runs(session: Session, task: str | None = None) -> tuple[list[str], list[int], list[str]]:
    """Return arms, seeds and backends of all runs that a choice of this task can have, each sorted."""
    query = select(Run.arm, Run.seed, Run.backend_name)
    rows = _rows(session, _narrow(session, query, Choice(task=task)))
    return (
        sorted({row.arm for row in rows}),
        sorted({row.seed for row in rows}),
        sorted({row.backend_name for row in rows}),
    )


def _narrow(session: Session, query: Select[*Ts], choice: Choice) -> Select[*Ts]:
    on_disk = task_on_disk(session)
    if choice.task is None or choice.task == on_disk:
        base = newest_base(on_disk, current=True)
        of_base = or_(Run.base_key == base, Run.base_key == "")
        query = query.where(Run.is_current, Run.status == "finished", Run.task == on_disk, of_base)
    else:
        query = query.where(Run.id.in_(latest_runs(choice.task)))
    return _filtered(query, choice)


def _filtered(query: Select[*Ts], choice: Choice) -> Select[*Ts]:
    if choice.arms:
        query = query.where(Run.arm.in_({BASE, *choice.arms}))
    if choice.seeds:
        query = query.where((Run.arm == BASE) | Run.seed.in_(choice.seeds))
    if choice.backends:
        query = query.where(Run.backend_name.in_(choice.backends))
    return query


def _ids(session: Session, choice: Choice) -> Select[int]:
    return _narrow(session, select(Run.id), choice)


def _rows(session: Session, query: Select[*Ts]) -> Sequence[Row[*Ts]]:
    """All rows as tuples; the session would look for entities in each of a million rows."""
    return session.connection().execute(query).all()


def environments(session: Session) -> dict[int, Environment]:
    """Return all machines by id."""
    return {place.id: place for place in session.scalars(select(Environment))}


def final_values(session: Session, choice: Choice) -> dict[int, dict[Key, float]]:
    """Return run id -> (split, name) -> number of the finished run; NaN and infinities possible."""
    columns = (Metric.run_id, Metric.split, Metric.name, Metric.value, Metric.value_kind)
    query = select(*columns).where(Metric.step == FINAL_STEP, Metric.run_id.in_(_ids(session, choice)))
    found: dict[int, dict[Key, float]] = {}
    for run_id, split, name, value, kind in _rows(session, query.order_by(Metric.id)):
        found.setdefault(run_id, {})[split, name] = join_value(value, kind)
    return found


def answers(session: Session, choice: Choice, split: str) -> dict[int, dict[str, float]]:
    """Return run id -> item id -> credit from 0 to 1."""
    columns = (Sample.run_id, Sample.item_id, Sample.credit)
    query = select(*columns).where(Sample.split == split, Sample.run_id.in_(_ids(session, choice)))
    found: dict[int, dict[str, float]] = {}
    for run_id, rows in groupby(_rows(session, query.order_by(Sample.run_id)), key=itemgetter(0)):
        found[run_id] = {item_id: credit for _, item_id, credit in rows}
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
    query = select(*columns).where(Speed.nanoseconds.is_not(None), Speed.run_id.in_(_ids(session, choice)))
    found: dict[int, list[Timing]] = {}
    for row in _rows(session, query):
        found.setdefault(row.run_id, []).append(Timing._make(row[1:]))
    return found


def readings(session: Session, choice: Choice) -> dict[int, dict[str, Reading]]:
    """Return run id -> name -> what the probe says of the whole run."""
    columns = (Probe.run_id, Probe.name, Probe.value, Probe.value_kind, Probe.verdict, Probe.diagnosis)
    query = select(*columns).where(Probe.layer == "", Probe.step == FINAL_STEP, Probe.run_id.in_(_ids(session, choice)))
    found: dict[int, dict[str, Reading]] = {}
    for run_id, name, value, kind, verdict, diagnosis in _rows(session, query.order_by(Probe.id)):
        found.setdefault(run_id, {})[name] = Reading(join_value(value, kind), verdict, diagnosis)
    return found


def quantizations(session: Session, choice: Choice) -> dict[int, list[Quantization]]:
    """Return run id -> its precisions, f16 first, in the order in which they were measured."""
    query = select(Quantization).where(Quantization.run_id.in_(_ids(session, choice)))
    return _by_run((row.run_id, row) for row in session.scalars(query.order_by(Quantization.id)))


def quantized_answers(session: Session, choice: Choice) -> dict[int, dict[str, dict[str, float]]]:
    """Return run id -> precision -> item id -> credit from 0 to 1."""
    columns = (QuantizedSample.run_id, QuantizedSample.type, QuantizedSample.item_id, QuantizedSample.credit)
    query = select(*columns).where(QuantizedSample.run_id.in_(_ids(session, choice)))
    found: dict[int, dict[str, dict[str, float]]] = {}
    for run_id, kind, item_id, credit in _rows(session, query):
        found.setdefault(run_id, {}).setdefault(kind, {})[item_id] = credit
    return found


def verifications(session: Session, choice: Choice) -> dict[int, list[Verification]]:
    """Return run id -> what was verified of it, merged before adapter for each backend."""
    query = select(Verification).where(Verification.run_id.in_(_ids(session, choice)))
    rows = session.scalars(query.order_by(Verification.backend, Verification.mode.desc()))
    return _by_run((row.run_id, row) for row in rows)


def _by_run(rows: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    found: dict[int, list[T]] = {}
    for run_id, row in rows:
        found.setdefault(run_id, []).append(row)
    return found
