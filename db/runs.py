"""Which runs there are, which of them belong together, and which of them a comparison is about."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import tables
from db.records import Run

BASE = "base"
"""The arm that is the untouched model: it has no adapter, and it is read whenever any other is."""


@dataclass(frozen=True)
class Choice:
    """Which runs to compare; an empty part means all."""

    arms: Collection[str] = ()  # ways of training; the base is always included
    seeds: Collection[int] = ()  # of the trained arms; the base has one run, which is always included
    backends: Collection[str] = ()
    # None: the task whose results are on disk, with its current runs; its name means the same. For any other task, the
    # latest finished run of each arm and seed
    task: str | None = None


class TaskFacts(NamedTuple):
    name: str
    title: str  # of the primary metric, in the words of the newest run
    primary_metric: str
    current: bool


def finished_runs(session: Session) -> list[Run]:
    """Every run, base first, then by arm and seed."""
    runs = [Run.model_construct(**row) for row in session.execute(select(tables.run)).mappings()]
    return sorted(runs, key=lambda run: (run.arm != BASE, run.arm, run.seed, run.id))


def task_on_disk(runs: Iterable[Run]) -> str | None:
    """Task of the newest current run: while one task's results replace another's, both have some."""
    current = [run for run in runs if run.is_current]
    return max(current, key=_age).task if current else None


def tasks_of(runs: Sequence[Run]) -> list[TaskFacts]:
    """Tasks of these runs, the one with the newest run first."""
    on_disk = task_on_disk(runs)
    newest = {run.task: run for run in sorted(runs, key=_age)}
    latest_first = sorted(newest.values(), key=_age, reverse=True)
    return [TaskFacts(run.task, run.task_title, run.primary_metric, run.task == on_disk) for run in latest_first]


def link(runs: Sequence[Run]) -> list[Run]:
    """Set for each run of an archive the base that it is compared with, and whether it is the latest of its kind."""
    bases = [run for run in runs if run.arm == BASE]
    latest: set[int] = set()
    for task in {run.task for run in runs}:
        of_task = [run for run in runs if run.task == task]
        comparable = _comparable(of_task)
        newest = {(run.arm, run.seed): run.id for run in sorted(of_task, key=_age) if run.id in comparable}
        latest.update(newest.values())
    return [
        run.model_copy(update={"is_latest": run.id in latest, "reference_run_id": _reference(run, bases)})
        for run in runs
    ]


def choose(runs: Sequence[Run], choice: Choice) -> tuple[list[Run], dict[str, int]]:
    """Pick the runs of one task that may be compared with each other.

    All share the base model of the task's newest run, or theirs is unknown. For the task on disk they are the current
    runs. For a former task they are the latest, compared with the chosen base of the same items and backend, since the
    base they were compared with at the time may have a successor.

    Returns:
        Runs in the given order, and arm → number of runs left out because of another base, other settings or data.
    """
    on_disk = task_on_disk(runs)
    former = choice.task not in (None, on_disk)
    task = choice.task if former else on_disk
    of_task = [run for run in runs if run.task == task and (former or run.is_current)]
    comparable = _comparable(of_task, one_setting=former)
    asked = [
        run
        for run in of_task
        if (run.arm == BASE or not choice.arms or run.arm in choice.arms)
        and (run.arm == BASE or not choice.seeds or run.seed in choice.seeds)
        and (not choice.backends or run.backend_name in choice.backends)
    ]
    left_out = Counter(run.arm for run in asked if run.id not in comparable)
    chosen = [run for run in asked if run.id in comparable and (run.is_latest or not former)]
    if former:
        bases = {(run.test_items_sha256, run.backend_name): run.id for run in reversed(chosen) if run.arm == BASE}
        chosen = [
            run.model_copy(update={"reference_run_id": bases.get((run.test_items_sha256, run.backend_name))})
            if run.arm != BASE else run
            for run in chosen
        ]  # fmt: skip
    return chosen, dict(left_out)


def _comparable(runs: Iterable[Run], *, one_setting: bool = True) -> set[int]:
    """Ids of a task's runs with the newest base model (or an unknown one) and their arm's newest settings and data."""
    newest = sorted(runs, key=_age, reverse=True)
    base = next((run.base_key for run in newest if run.base_key), "")
    settings: dict[str, str] = {}
    return {
        run.id
        for run in newest
        if run.base_key in (base, "")
        and (run.train_key == settings.setdefault(run.arm, run.train_key) or not one_setting)
    }


def _reference(run: Run, bases: Iterable[Run]) -> int | None:
    """The base of the same items, backend and model (where both are known); a former run keeps the base of its time."""

    def same(base: Run) -> bool:
        return (base.task, base.test_items_sha256, base.backend_name) == (
            run.task, run.test_items_sha256, run.backend_name,
        )  # fmt: skip

    fair = [
        base
        for base in bases
        if run.arm != BASE
        and same(base)
        and (base.base_key == run.base_key or "" in (base.base_key, run.base_key))
        and (base.is_current or not run.is_current)
    ]
    best = max(fair, key=lambda base: (base.base_key == run.base_key, base.ended <= run.ended, base.id), default=None)
    return best.id if best else None


def _age(run: Run) -> tuple[datetime, int]:
    return run.ended, run.id
