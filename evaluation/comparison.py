"""From the database to arms side by side: differences, criteria, power, what is served, provenance."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import queries
from db import queries_compare as compare_queries
from db.errors import DatabaseMissingError
from db.models import Environment
from db.queries_compare import Choice, RunFacts
from db.session import open_session
from evaluation import criteria
from evaluation.arms import ACCURACY, RETENTION, AlignmentRow, ArmRow, ProbeRow, arm_row
from evaluation.criteria import Criterion
from evaluation.differences import BASE, BASELINE, compare_pairs, find_pairs, in_words
from evaluation.facts import SpeedChange, read_facts, speed_change
from evaluation.power import PowerRow, power_rows
from evaluation.serving import PhaseRow, PrecisionRow, ServedRow, phase_rows, precision_rows, served_rows

__all__ = [
    "ACCURACY",
    "RETENTION",
    "AlignmentRow",
    "ArmRow",
    "Choice",
    "ChoiceError",
    "Comparison",
    "ProbeRow",
    "compare",
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


def load_comparison(url_or_path: str | Path, choice: Choice | None = None, baseline: str | None = None) -> Comparison:
    """Compare the arms in a database.

    Args:
        url_or_path: File or SQLAlchemy URL.
        choice: Which runs; all by default.
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


def compare(session: Session, choice: Choice | None = None, baseline: str | None = None) -> Comparison:
    """Compare the current runs of an open database; see `load_comparison`."""
    choice = choice or Choice()
    if choice != Choice() or baseline is not None:
        _check(session, choice, baseline)
    against = baseline or BASELINE
    filters = _filters(choice, against)
    if choice.arms:  # what is compared with stays
        choice = replace(choice, arms={*choice.arms, against})
    facts = read_facts(session, choice)
    arms = sorted(facts.by_arm, key=lambda arm: (arm != BASE, arm != against, arm))
    runs = [run for arm in arms for run in facts.by_arm[arm]]
    pairs = find_pairs(arms, facts.by_arm, facts.answers, against)
    found = compare_pairs(pairs)
    changes = {arm: speed_change(arm, facts) for arm in arms}
    rows = tuple(arm_row(arm, facts, found.get(arm, ()), changes[arm]) for arm in arms)
    quantized = compare_queries.quantizations(session, choice)
    quantized_answers = compare_queries.quantized_answers(session, choice)
    verified = compare_queries.verifications(session, choice)
    places = compare_queries.environments(session)
    meanings = queries.metric_meanings(session)
    return Comparison(
        rows=rows,
        verdicts=tuple(verdict_line(row, against) for row in rows if row.arm != BASE),
        notes=tuple(_notes(rows, runs)),
        units={name: (m.unit, m.direction, m.description) for name, m in meanings.items()},
        runs=tuple(_provenance(places, runs)),
        precisions=tuple(r for a in arms for r in precision_rows(facts.by_arm[a], quantized, quantized_answers)),
        served=tuple(row for run in runs for row in served_rows(run, verified.get(run.id, ()))),
        phases=tuple(row for arm in arms for row in phase_rows(facts.by_arm[arm], facts.timings)),
        criteria=tuple(c for row in rows if row.arm != BASE for c in _criteria(row, against, changes[row.arm])),
        power=tuple(row for (arm, _), found_pairs in pairs.items() for row in power_rows(arm, found_pairs)),
        baseline=against,
        filters=filters,
    )


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


def _check(session: Session, choice: Choice, baseline: str | None) -> None:
    arms, seeds, backends = compare_queries.names_of_runs(session)
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


def _criteria(row: ArmRow, baseline: str, change: SpeedChange) -> Iterable[Criterion]:
    yield criteria.by_difference(row.arm, BASE, row.against(BASE))
    if row.arm != baseline and baseline != BASE:
        yield criteria.by_difference(row.arm, baseline, row.against(baseline))
    yield criteria.by_speed(row.arm, *change)
    yield criteria.by_retention(row.arm, row.retention_share_interval, row.retention)


def verdict_line(row: ArmRow, baseline: str = BASELINE) -> str:
    """Say in a sentence what the data allow to say about an arm."""
    parts = [in_words(difference) for difference in row.differences]
    if row.against(BASE) is None:
        parts.insert(0, "not comparable with base: no base run with the same items and backend")
    if row.against(baseline) is None and row.arm != baseline and baseline != BASE:
        parts.append(f"not comparable with {baseline}: no run of it with the same seed, items and backend")
    return f"{row.arm}: {'; '.join(parts)}."


def _notes(rows: Sequence[ArmRow], runs: Sequence[RunFacts]) -> list[str]:
    notes = []
    if sum(row.arm != BASE for row in rows):
        notes.append(
            "Δ speed: median over the paired repetitions of all seeds, against the base timed in the same process, not "
            "against the base's own row. Merged LoRA models of one shape decode equally fast, so differences between "
            "them are noise of the machine."
        )
    if any(row.delta_speed is not None and row.delta_speed_interval is None and row.arm != BASE for row in rows):
        notes.append("Δ speed without an interval: fewer than six paired repetitions give none of 95%.")
    levels = {difference.level for row in rows for difference in row.differences}
    if "seeds and items" in levels:
        notes.append(
            "Differences over several seeds: the interval and the p-value are about other seeds and other items "
            "(crossed random effects, Student's t); the interval over items alone treats these seeds as the only ones."
        )
    if "items" in levels:
        notes.append(
            "Differences of one seed: bootstrap over items and McNemar's exact test; nothing is known of other seeds."
        )
    if any(difference.seeds == 2 for row in rows for difference in row.differences):
        notes.append("Two seeds are too few to know how much seeds vary; three or more give intervals that hold.")
    for row in rows:
        notes += [f"{row.arm} seed {p.seed}: {p.verdict}: {p.reason}" for p in row.probes if not p.as_claimed]
    if any(run.git_dirty for run in runs):
        notes.append("Some stages ran on changed files (dirty): those numbers have no commit of their own.")
    bad = [row.arm for row in rows if any(not math.isfinite(value) for value in row.metrics.values())]
    if bad:
        notes.append(f"Some metrics of {', '.join(bad)} could not be computed (not finite).")
    return notes


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
