"""From the database to arms side by side: differences, criteria, power, what is served, provenance."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db import queries
from db import queries_compare as compare_queries
from db.errors import DatabaseMissingError
from db.models import Environment, Run
from db.queries_compare import Choice, RunFacts
from db.session import open_session
from evaluation import criteria
from evaluation.all_tasks import TaskRow, task_rows
from evaluation.arms import RETENTION, AlignmentRow, ArmRow, ProbeRow
from evaluation.criteria import Criterion
from evaluation.differences import BASE, BASELINE
from evaluation.facts import SpeedChange, read_facts
from evaluation.notes import notes, notes_of_others, verdict_line
from evaluation.power import PowerRow, power_rows
from evaluation.primary import FIRST, Primary, primary_of
from evaluation.serving import PhaseRow, PrecisionRow, ServedRow, phase_rows, precision_rows, served_rows
from evaluation.side_by_side import SideBySide, side_by_side

__all__ = [
    "RETENTION",
    "AlignmentRow",
    "ArmRow",
    "Choice",
    "ChoiceError",
    "Comparison",
    "Primary",
    "ProbeRow",
    "TaskRow",
    "compare",
    "compared_runs",
    "load_comparison",
    "verdict_line",
]


class ChoiceError(ValueError):
    """A name that no run in the database has."""


@dataclass(frozen=True)
class Comparison:
    """All arms side by side.

    Attributes:
        rows: Base first, the baseline next.
        verdicts: One line for each arm but the base.
        notes: What limits the reading.
        units: Metric name -> (unit, better direction, description).
        runs: Where each number comes from, one mapping for each run.
        precisions: Each arm's model in other precisions, in the order of `rows`.
        served: Each run on each backend in each mode, against training.
        phases: Each arm's load, time to first token, prefill and decode.
        criteria: The success criteria, judged for each arm but the base.
        power: What it would take to see 1, 2 and 3 points, for each arm and what it is compared with.
        baseline: The arm that the others are compared with besides the base.
        filters: What was asked for alone, in words, so that other runs are left out; empty where all are here.
        primary: The task, and the metric by which its arms are compared.
        tasks: All tasks in the database, arm by arm; the newest task first.
        task_notes: Which runs of them are left out, and why.
    """

    rows: tuple[ArmRow, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]
    units: dict[str, tuple[str, str, str]]
    runs: tuple[dict[str, Any], ...]
    precisions: tuple[PrecisionRow, ...] = ()
    served: tuple[ServedRow, ...] = ()
    phases: tuple[PhaseRow, ...] = ()
    criteria: tuple[Criterion, ...] = ()
    power: tuple[PowerRow, ...] = ()
    baseline: str = BASELINE
    filters: str = ""
    primary: Primary = FIRST
    tasks: tuple[TaskRow, ...] = ()
    task_notes: tuple[str, ...] = ()


def load_comparison(url_or_path: str | Path, choice: Choice | None = None, baseline: str | None = None) -> Comparison:
    """Compare the arms in a database.

    Args:
        url_or_path: File or SQLAlchemy URL.
        choice: Which runs; all of the task on the disk by default.
        baseline: The arm to compare with besides the base; baseline_lora by default.

    Raises:
        DatabaseMissingError: No database, or no finished run in it that was chosen.
        DatabaseError: The database cannot be read.
        ChoiceError: No run has a name that was chosen.
    """
    with open_session(url_or_path) as session:
        comparison = compare(session, choice, baseline)
    if not comparison.rows:
        came = "a database without any" if choice is None or choice == Choice() else "none that fits all filters"
        raise DatabaseMissingError(f"finished runs in {url_or_path}", came, "run `dvc repro`, which makes them")
    return comparison


def compared_runs(session: Session, comparison: Comparison) -> list[Run]:
    """Rows of table run behind a comparison, base first, then by arm and seed.

    Args:
        session: Of the database from which the comparison was made.
        comparison: Perhaps of some arms or seeds only.
    """
    runs = session.scalars(select(Run).where(Run.run_key.in_([run["run_key"] for run in comparison.runs])))
    return sorted(runs, key=lambda run: (run.arm != BASE, run.arm, run.seed))


def compare(session: Session, choice: Choice | None = None, baseline: str | None = None) -> Comparison:
    """Compare the runs of one task in an open database; see `load_comparison`."""
    choice = choice or Choice()
    tasks = compare_queries.tasks_of_runs(session)
    if choice != Choice() or baseline is not None:
        _check(session, choice, baseline, [task.name for task in tasks])
    against = baseline or BASELINE
    filters = _filters(choice, against)
    if choice.arms:  # what is compared with stays
        choice = replace(choice, arms={*choice.arms, against})
    facts = read_facts(session, choice)
    own = side_by_side(facts, against)
    rows, runs, arms = own.rows, own.runs, own.arms
    primary = primary_of(runs)

    def of_task(name: str) -> SideBySide:
        return side_by_side(read_facts(session, replace(choice, task=name)), against)

    others = {
        task.name: notes_of_others(task.name, compare_queries.left_out(session, replace(choice, task=task.name)))
        for task in tasks
    }
    quantized = compare_queries.quantizations(session, choice)
    quantized_answers = compare_queries.quantized_answers(session, choice)
    verified = compare_queries.verifications(session, choice)
    places = compare_queries.environments(session)
    meanings = queries.metric_meanings(session)
    return Comparison(
        rows=rows,
        verdicts=tuple(verdict_line(row, against) for row in rows if row.arm != BASE),
        notes=(
            *notes(rows, runs, primary, _tasks_on_disk(session)),
            *others.get(primary.task, ()),
        ),
        units={name: (m.unit, m.direction, m.description) for name, m in meanings.items()},
        runs=tuple(_provenance(places, runs)),
        precisions=tuple(r for a in arms for r in precision_rows(facts.by_arm[a], quantized, quantized_answers)),
        served=tuple(row for run in runs for row in served_rows(run, verified.get(run.id, ()))),
        phases=tuple(row for arm in arms for row in phase_rows(facts.by_arm[arm], facts.timings)),
        criteria=tuple(
            c for row in rows if row.arm != BASE for c in _criteria(row, against, own.changes[row.arm], primary)
        ),
        power=tuple(row for (arm, _), pairs in own.pairs.items() for row in power_rows(arm, pairs)),
        baseline=against,
        filters=filters,
        primary=primary,
        tasks=task_rows(tasks, primary, own, of_task, against),
        task_notes=tuple(note for found in others.values() for note in found),
    )


def _tasks_on_disk(session: Session) -> list[str]:
    """Names of all tasks of current runs: several where one task's results have begun to replace another's."""
    return sorted(session.scalars(select(Run.task).where(Run.is_current, Run.status == "finished").distinct()))


def _filters(choice: Choice, baseline: str) -> str:
    """Words for what was asked for alone."""
    parts = []
    if choice.arms:
        others = sorted({*choice.arms} - {BASE, baseline})
        parts.append("arms " + ", ".join(dict.fromkeys((BASE, baseline, *others))))
    if choice.seeds:
        parts.append(f"seeds {', '.join(map(str, sorted(choice.seeds)))} of the trained arms")
    if choice.backends:
        parts.append(f"backends {', '.join(sorted(choice.backends))}")
    return f"Only {'; '.join(parts)}: other runs are left out" if parts else ""


def _check(session: Session, choice: Choice, baseline: str | None, tasks: Sequence[str]) -> None:
    if tasks and (unknown := list(_unknown("task", [choice.task] if choice.task is not None else [], tasks))):
        raise ChoiceError("\n".join(unknown))  # of a task that nobody has, no arm is known either
    arms, seeds, backends = compare_queries.names_of_runs(session, choice.task)
    if not arms:
        return
    named = [*choice.arms, *([] if baseline is None else [baseline])]
    problems = [
        *_unknown("arm", named, arms),
        *_unknown("seed", map(str, choice.seeds), list(map(str, seeds))),
        *_unknown("backend", choice.backends, backends),
    ]
    if problems:
        raise ChoiceError("\n".join(problems))


def _unknown(kind: str, names: Iterable[str], known: Sequence[str]) -> Iterable[str]:
    for name in dict.fromkeys(names):
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            yield f"expected the {kind} of a finished run; came: {name!r}. {meant}Available: {', '.join(known)}"


def _criteria(row: ArmRow, baseline: str, change: SpeedChange, primary: Primary) -> Iterable[Criterion]:
    yield criteria.by_difference(row.arm, BASE, row.against(BASE), primary)
    if row.arm != baseline and baseline != BASE:
        yield criteria.by_difference(row.arm, baseline, row.against(baseline), primary)
    yield criteria.by_speed(row.arm, *change)
    yield criteria.by_retention(row.arm, row.retention_share_interval, row.retention)


def _provenance(places: dict[int, Environment], runs: Sequence[RunFacts]) -> Iterable[dict[str, Any]]:
    machines = {  # once for each machine: there may be thousands of runs
        key: (
            place.device_name or "unnamed",
            place.platform,
            place.python,
            dict(sorted(place.packages.items())),
        )
        for key, place in places.items()
    }
    for run in runs:
        device, platform, python, packages = machines[run.environment_id]
        yield {
            "arm": run.arm,
            "seed": run.seed,
            "run_key": run.run_key,
            "git_commit": run.git_commit,
            "git_dirty": run.git_dirty,
            "backend": f"{run.backend_name} {run.backend_version}",
            "serving_mode": run.serving_mode,
            "device": f"{run.device_class}: {device}",
            "platform": platform,
            "python": python,
            "packages": packages,
            "test_items_sha256": run.test_items_sha256,
            "started": run.started.isoformat(),
            "ended": run.ended.isoformat() if run.ended else None,
        }
