"""Which runs there are, which of them belong together, and which of them a comparison is about."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

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
    task: str | None = None  # None: the task whose results are on disk


def finished_runs(session: Session) -> list[Run]:
    """Every run, base first, then by arm and seed."""
    runs = [Run.model_construct(**row) for row in session.execute(select(tables.run)).mappings()]
    return sorted(runs, key=lambda run: (run.arm != BASE, run.arm, run.seed, run.id))


def task_on_disk(runs: Iterable[Run]) -> str | None:
    """Task of the newest current run: while one task's results replace another's, both have some."""
    current = [run for run in runs if run.is_current]
    return max(current, key=_age).task if current else None


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Tasks of these runs, the one with the newest run first."""
    return list(dict.fromkeys(run.task for run in sorted(runs, key=lambda run: (run.ended, run.id), reverse=True)))


def link(runs: Sequence[Run]) -> list[Run]:
    """Set for each run of an archive whether it is the latest of its kind, and the base that it is compared with.

    The latest runs of a task are the newest of each arm and seed among those with the newest base model (or an unknown
    one) and their arm's newest settings and data. What is on disk counts as newer than the rest.
    """
    latest: dict[tuple[str, str, int], int] = {}
    for task in {run.task for run in runs}:
        newest = sorted((run for run in runs if run.task == task), key=_age, reverse=True)
        base_key = next((run.base_key for run in newest if run.base_key), "")
        settings: dict[str, str] = {}
        for run in newest:
            if run.base_key in (base_key, "") and run.train_key == settings.setdefault(run.arm, run.train_key):
                latest.setdefault((task, run.arm, run.seed), run.id)
    ids = set(latest.values())
    marked = [run.model_copy(update={"is_latest": run.id in ids}) for run in runs]
    bases = [run for run in marked if run.arm == BASE]
    return [run.model_copy(update={"reference_run_id": _reference(run, bases)}) for run in marked]


def _reference(run: Run, bases: Iterable[Run]) -> int | None:
    """The base of the same items, backend and model (where both are known): the latest one, or that of its time."""

    def fair(base: Run) -> bool:
        alike = ("task", "test_items_sha256", "backend_name")
        return (
            all(getattr(base, name) == getattr(run, name) for name in alike)
            and (base.base_key == run.base_key or "" in (base.base_key, run.base_key))
            and (base.is_current or not run.is_current)
        )

    def preference(base: Run) -> tuple[bool, bool, bool, int]:
        return base.base_key == run.base_key, run.is_latest and base.is_latest, base.ended <= run.ended, base.id

    best = None if run.arm == BASE else max(filter(fair, bases), key=preference, default=None)
    return best.id if best else None


def choose(runs: Iterable[Run], choice: Choice) -> tuple[list[Run], Counter[str]]:
    """Pick the runs of one task that may be compared with each other: the latest, on disk where the task is.

    Returns:
        Runs in the given order, and arm → number of runs left out because they are not the latest.
    """
    on_disk = task_on_disk(runs := list(runs))
    task = choice.task or on_disk
    candidates = [
        run
        for run in runs
        if run.task == task
        and (run.is_current or task != on_disk)
        and (run.arm == BASE or not choice.arms or run.arm in choice.arms)
        and (run.arm == BASE or not choice.seeds or run.seed in choice.seeds)
    ]
    return [run for run in candidates if run.is_latest], Counter(run.arm for run in candidates if not run.is_latest)


def _age(run: Run) -> tuple[bool, datetime, int]:
    return run.is_current, run.ended, run.id
