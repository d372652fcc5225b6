"""Tasks in one database: one has its results on disk, runs of others stay as they were when they left it."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import URL, ScalarSelect, Select, Subquery, func, inspect, or_, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from db.engine import BUSY_TIMEOUT_S, make_engine, resolve_url, sqlite_file
from db.errors import TasksLostError, explain
from db.models import Run

_DESTROYED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""What SQLite answers for a file in which it can find nothing."""


class TaskFacts(NamedTuple):
    """A task with finished runs.

    Attributes:
        name: As in `prepare_data.task`.
        title: Of the primary metric; the newest run's words.
        primary_metric: Name in table metric.
        current: Whether this is the task on disk.
        last: End of the newest run's evaluation, UTC.
        runs: Finished ones, superseded ones included.
    """

    name: str
    title: str
    primary_metric: str
    current: bool
    last: datetime
    runs: int


def task_on_disk(session: Session) -> str | None:
    """Return the task of the current, finished runs; None where there are none.

    While results of one task replace those of another, current runs are of both: then the newest run's task.
    """
    query = select(Run.task).where(Run.is_current, Run.status == "finished")
    return session.scalar(query.order_by(Run.ended.desc(), Run.id.desc()).limit(1))


def tasks_of_runs(session: Session) -> list[TaskFacts]:
    """Return the tasks that have finished runs, the one with the newest run first."""
    on_disk = task_on_disk(session)
    place = func.row_number().over(partition_by=Run.task, order_by=(Run.ended.desc(), Run.id.desc()))
    count = func.count().over(partition_by=Run.task)
    ordered = (
        select(Run.id, place.label("place"), count.label("runs")).where(Run.status == "finished").subquery("ordered")
    )
    query = (
        select(Run.task, Run.task_title, Run.primary_metric, Run.ended, ordered.c.runs)
        .join(ordered, ordered.c.id == Run.id)
        .where(ordered.c.place == 1, Run.ended.is_not(None))
        .order_by(Run.ended.desc(), Run.id.desc())
    )
    return [
        TaskFacts(name, title, metric, name == on_disk, ended, runs)
        for name, title, metric, ended, runs in session.execute(query)
        if ended is not None
    ]


def latest_runs(task: str) -> Select[int]:
    """Select the id of the latest finished run of each arm and seed of a task, current or not.

    Only of runs that are seeds of one arm: all with the base model of the task's newest run (or one that is not
    known), each arm's with the settings and data of training of its own newest run with that base. View task_results
    says the same in is_latest.
    """
    ordered = _of_one_kind(task)
    return select(ordered.c.id).where(ordered.c.place == 1)


def newest_base(task: str | None, *, current: bool) -> ScalarSelect[str]:
    """Select `base_key` of a task's newest finished run that knows it; NULL where none does.

    Args:
        task: The task.
        current: Of the current runs alone.
    """
    query = select(Run.base_key).where(Run.task == task, Run.status == "finished", Run.base_key != "")
    if current:
        query = query.where(Run.is_current)
    return query.order_by(Run.ended.desc(), Run.id.desc()).limit(1).scalar_subquery()


def other_runs(task: str) -> Select[int]:
    """Select the ids of a task's finished runs with another base, settings or data than `latest_runs` are of."""
    kind = select(_of_one_kind(task).c.id)
    return select(Run.id).where(Run.task == task, Run.status == "finished", Run.id.not_in(kind))


def _of_one_kind(task: str) -> Subquery:
    """Ids of runs that may stand for their arm and seed, each with its place: 1 is the latest."""
    newest = (Run.ended.desc(), Run.id.desc())
    key = func.first_value(Run.train_key).over(partition_by=Run.arm, order_by=newest)
    base = or_(Run.base_key == newest_base(task, current=False), Run.base_key == "")
    finished = (Run.task == task, Run.status == "finished", base)
    known = select(Run.id, Run.arm, Run.seed, Run.ended, Run.train_key, key.label("newest_key")).where(*finished)
    own = known.subquery("known").c
    place = func.row_number().over(partition_by=(own.arm, own.seed), order_by=(own.ended.desc(), own.id.desc()))
    return select(own.id, place.label("place")).where(own.train_key == own.newest_key).subquery("ordered")


def runs_by_task(url: str | Path | URL, *, timeout_s: float = BUSY_TIMEOUT_S) -> dict[str, int]:
    """Return task -> number of finished runs of a database of any version.

    Args:
        url: The database. One that is not there, has no table of runs, or cannot be read as SQLite has none.
        timeout_s: Seconds to wait for another writer.

    Raises:
        DatabaseError: Whether there are runs cannot be told: the database is locked, may not be read, ….
    """
    address = resolve_url(url)
    path = sqlite_file(address)
    engine = make_engine(address, write=False, timeout_s=timeout_s)
    try:
        if path is not None and not path.exists():
            return {}
        with engine.connect() as connection:
            inspector = inspect(connection)
            there = inspector.has_table("run")
            columns = {column["name"] for column in inspector.get_columns("run")} if there else set()
            if "status" not in columns:
                return {}  # nothing there, or somebody else's, which is refused where it would be written
            task = "task" if "task" in columns else "'aqi'"  # versions before 0004 knew this one alone
            query = f"SELECT {task}, count(*) FROM run WHERE status = 'finished' GROUP BY 1"  # noqa: S608  fixed names
            return {name: count for name, count in connection.execute(text(query))}
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        cause = getattr(error, "orig", None) or error
        # The second byte tells which kind of damage it is.
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", 0) & 0xFF in _DESTROYED:
            return {}
        place = str(path) if path is not None else address.render_as_string(hide_password=True)
        raise explain(error, place) from error
    finally:
        engine.dispose()


def refuse_loss(there: Mapping[str, int], kept: Collection[str], place: str) -> None:
    """Make sure that a new database has all tasks of the old one.

    Args:
        there: Task -> number of its finished runs, in the old one.
        kept: Tasks with results on disk.
        place: The database as shown in messages.

    Raises:
        TasksLostError: Runs of a task would be lost.
    """
    lost = {name: count for name, count in there.items() if name not in kept}
    if lost:
        raise TasksLostError(
            f"results on disk of every task in {place}",
            f"{_counted(lost)} whose files are gone, so that a rebuilt database would lose them",
            "keep them with `python -m db.cli ingest`, or lose them with `python -m db.cli rebuild --yes`",
        )


def notes_of_loss(there: Mapping[str, int], kept: Collection[str]) -> list[str]:
    """Say which tasks a rebuilt database has lost."""
    lost = {name: count for name, count in there.items() if name not in kept}
    return [f"{_counted(lost)} are lost, since no file describes them any more"] if lost else []


def notes_of_change(on_disk: Collection[str], retired: Iterable[str]) -> list[str]:
    """Say which tasks have left the disk, and where several lie there.

    Args:
        on_disk: Tasks of the results.
        retired: The task of each run that has just left.
    """
    counts: dict[str, int] = {}
    for name in retired:
        if name not in on_disk:
            counts[name] = counts.get(name, 0) + 1
    notes = [
        f"{_counted({name: count})} no longer on disk; `python -m evaluation.compare_all --task {name}` compares them"
        for name, count in counts.items()
    ]
    if len(on_disk) > 1:
        names = ", ".join(sorted(on_disk))
        notes.append(f"results of several tasks are on disk ({names}), of which one is compared; run `dvc repro`")
    return notes


def _counted(runs: Mapping[str, int]) -> str:
    words = (f"{count} run{'' if count == 1 else 's'} of task {name}" for name, count in sorted(runs.items()))
    return ", ".join(words)
