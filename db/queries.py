"""Which runs there are, which of them a comparison is about, and the rows that belong to some runs."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, inspect, select
from sqlalchemy.orm import Session

from db.tables import OfRun, Run

BASE = "base"


class RunFacts(NamedTuple):
    """A finished run; the columns are explained in `db.tables.Run`."""

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
    ended: datetime
    task: str
    task_title: str
    primary_metric: str
    is_current: bool
    is_latest: bool
    base_key: str
    train_key: str


@dataclass(frozen=True)
class Choice:
    """Which runs to compare; an empty part means all."""

    arms: Collection[str] = ()  # ways of training; the base is always there
    seeds: Collection[int] = ()  # of the trained arms; the base has one run, which is always there
    backends: Collection[str] = ()
    # None: the task whose results are on disk, with its current runs, and so does its name. Of any other task, the
    # latest finished run of each arm and seed
    task: str | None = None


class TaskFacts(NamedTuple):
    name: str
    title: str  # of the primary metric, in the words of the newest run
    primary_metric: str
    current: bool
    last: datetime  # end of the newest run's evaluation, UTC
    runs: int  # number of finished runs, superseded ones included


def finished_runs(session: Session) -> list[RunFacts]:
    """Return every finished run, base first, then by arm and seed."""
    columns = [getattr(Run, name) for name in RunFacts._fields]
    rows = session.execute(select(*columns).where(Run.status == "finished", Run.ended.is_not(None)))
    return sorted((RunFacts(*row) for row in rows), key=lambda run: (run.arm != BASE, run.arm, run.seed, run.id))


def task_on_disk(runs: Iterable[RunFacts]) -> str | None:
    """Task of the newest current run: while one task's results replace another's, both have some."""
    current = [run for run in runs if run.is_current]
    return _newest(current).task if current else None


def tasks_of(runs: Sequence[RunFacts]) -> list[TaskFacts]:
    """Tasks of these runs, the one with the newest run first."""
    on_disk = task_on_disk(runs)
    by_task = {name: [run for run in runs if run.task == name] for name in {run.task for run in runs}}
    newest = sorted((_newest(own) for own in by_task.values()), key=_age, reverse=True)
    return [
        TaskFacts(r.task, r.task_title, r.primary_metric, r.task == on_disk, r.ended, len(by_task[r.task]))
        for r in newest
    ]


def choose(runs: Sequence[RunFacts], choice: Choice) -> tuple[list[RunFacts], dict[str, int]]:
    """Pick the runs of one task that may be compared with each other.

    All are of the base model of the task's newest run, or of one that is not known. On disk these are the current runs.
    Of a task that has left the disk they are the latest (see `db.tables.Run.is_latest`), and refer to the chosen base
    with the same items and backend, since the base they were compared with at the time may have a successor.

    Returns:
        Runs in the order given, and arm → number of runs left out for another base, settings or data.
    """
    on_disk = task_on_disk(runs)
    former = choice.task not in (None, on_disk)
    task = choice.task if former else on_disk
    pool = [run for run in runs if run.task == task and (former or run.is_current)]
    known = [run for run in pool if run.base_key]
    bases = ("", _newest(known).base_key) if known else ("",)
    settings = {run.arm: run.train_key for run in pool if run.is_latest}
    found: list[RunFacts] = []
    left_out: dict[str, int] = {}
    for run in pool:
        base = run.arm == BASE
        if not (
            (base or not choice.arms or run.arm in choice.arms)
            and (base or not choice.seeds or run.seed in choice.seeds)
            and (not choice.backends or run.backend_name in choice.backends)
        ):
            continue
        if run.base_key not in bases or (former and run.train_key != settings.get(run.arm)):
            left_out[run.arm] = left_out.get(run.arm, 0) + 1
        elif run.is_latest or not former:
            found.append(run)
    if former:
        base_of = {(run.test_items_sha256, run.backend_name): run.id for run in reversed(found) if run.arm == BASE}
        found = [
            run if run.arm == BASE
            else run._replace(reference_run_id=base_of.get((run.test_items_sha256, run.backend_name)))
            for run in found
        ]  # fmt: skip
    return found, left_out


def _age(run: RunFacts) -> tuple[datetime, int]:
    return run.ended, run.id


def _newest(runs: Iterable[RunFacts]) -> RunFacts:
    return max(runs, key=_age)


def of_runs(
    session: Session, table: type[OfRun], ids: Collection[int], *where: ColumnElement[bool], names: Sequence[str] = ()
) -> dict[int, list[Row[Any]]]:
    """Return run id → its rows of a table, as they were written; of all columns, or the named ones."""
    columns = [getattr(table, name) for name in names or inspect(table).columns.keys()]
    found: dict[int, list[Row[Any]]] = {}
    for row in session.execute(select(table.run_id, *columns).where(table.run_id.in_(ids), *where).order_by(table.id)):
        found.setdefault(row[0], []).append(row)
    return found
