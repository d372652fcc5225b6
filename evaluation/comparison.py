"""From the database to one row for each arm: means over seeds, paired differences, parity, provenance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sqlalchemy.orm import Session

from db import queries
from db.errors import DatabaseMissingError
from db.models import Run
from db.session import open_session
from evaluation.differences import BASE, BASELINE, Difference, find_differences, in_words
from evaluation.serving import PhaseRow, PrecisionRow, ServedRow, phase_rows, precision_rows, served_rows

ACCURACY = ("test", "aqi_category_accuracy")
RETENTION = ("retention", "retention_accuracy")
Key = tuple[str, str]


@dataclass(frozen=True)
class ProbeRow:
    """What the probe says of one run.

    Attributes:
        seed: Of the run.
        verdict: effective, no_effect or unstable.
        as_claimed: Whether the arm's updates are what it claims.
        reason: Diagnosis and reason in words.
        numbers: Reading -> value: angle_to_shadow in degrees, twin_divergence in A/A floors, …
    """

    seed: int
    verdict: str
    as_claimed: bool
    reason: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class ArmRow:
    """One arm, its numbers averaged over seeds.

    Attributes:
        accuracy: AQI category accuracy, percent.
        accuracy_by_seed: The same for each of `seeds`.
        retention: Accuracy on the retention items, percent.
        decode_speed: Tokens per second.
        delta_speed: Percent faster than the base that was timed beside it.
        parity: Share of prompts on which all ways to run the model answer alike, percent, worst seed.
        differences: Against the base, then against baseline_lora.
        probes: One for each seed that has a verdict.
        metrics: (split, name) -> mean over seeds, in the metric's own unit.
    """

    arm: str
    model_name: str
    seeds: tuple[int, ...]
    accuracy: float | None
    accuracy_by_seed: tuple[float, ...]
    retention: float | None
    decode_speed: float | None
    delta_speed: float | None
    parity: float | None
    differences: tuple[Difference, ...]
    metrics: dict[Key, float]
    probes: tuple[ProbeRow, ...] = ()

    @property
    def updates(self) -> str:
        """The probe's verdicts in a word, a wrong one before all others; empty where there is none."""
        wrong = next((p.verdict for p in self.probes if not p.as_claimed), "")
        if wrong or not self.probes:
            return f"{wrong}!" if wrong else ""
        words = {"no_effect": "plain AdamW"}
        return ", ".join(dict.fromkeys(words.get(p.verdict, p.verdict) for p in self.probes))

    def against(self, arm: str) -> Difference | None:
        """Return the difference from another arm, if both answered the same items."""
        return next((d for d in self.differences if d.against == arm), None)


@dataclass(frozen=True)
class Comparison:
    """All arms side by side.

    Attributes:
        rows: Base first, baseline_lora next.
        verdicts: One line for each arm but the base.
        notes: What limits the reading.
        units: Metric name -> (unit, better direction, description).
        runs: Where each number comes from, one mapping for each run.
        precisions: Each arm's model in other precisions, in the order of `rows`.
        served: Each run on each backend in each mode, against training.
        phases: Each arm's load, time to first token, prefill and decode.
    """

    rows: tuple[ArmRow, ...]
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]
    units: dict[str, tuple[str, str, str]]
    runs: tuple[dict[str, Any], ...]
    precisions: tuple[PrecisionRow, ...] = ()
    served: tuple[ServedRow, ...] = ()
    phases: tuple[PhaseRow, ...] = ()


def load_comparison(url_or_path: str | Path) -> Comparison:
    """Compare all arms in a database.

    Raises:
        DatabaseMissingError: No database, or no finished run in it.
        DatabaseError: The database cannot be read.
    """
    with open_session(url_or_path) as session:
        comparison = compare(session)
    if not comparison.rows:
        raise DatabaseMissingError(
            f"finished runs in {url_or_path}", "a database without any", "run `dvc repro`, which makes them"
        )
    return comparison


def compare(session: Session) -> Comparison:
    """Compare the current runs of an open database."""
    runs = queries.current_runs(session)
    metrics = queries.final_metrics(session, [run.id for run in runs])
    readings = queries.probe_readings(session, [run.id for run in runs])
    answers = {run.id: queries.outcomes(session, run.id) for run in runs}
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    arms = sorted(by_arm, key=lambda arm: (arm != BASE, arm != BASELINE, arm))
    found = find_differences(arms, by_arm, answers)
    rows = tuple(
        _row(session, by_arm[arm], metrics, readings, tuple(d for d in found.get(arm, []) if d)) for arm in arms
    )
    meanings = queries.metric_meanings(session)
    return Comparison(
        rows=rows,
        verdicts=tuple(verdict_line(row) for row in rows if row.arm != BASE),
        notes=tuple(_notes(rows, runs)),
        units={name: (m.unit, m.direction, m.description) for name, m in meanings.items()},
        runs=tuple(_provenance(session, run) for run in runs),
        precisions=tuple(row for arm in arms for row in precision_rows(session, by_arm[arm])),
        served=tuple(row for arm in arms for run in by_arm[arm] for row in served_rows(session, run)),
        phases=tuple(row for arm in arms for row in phase_rows(session, by_arm[arm])),
    )


def verdict_line(row: ArmRow) -> str:
    """Say in a sentence what the data allow to say about an arm."""
    parts = [in_words(difference) for difference in row.differences]
    if row.against(BASE) is None:
        parts.insert(0, "not comparable with base: no base run with the same items and backend")
    return f"{row.arm}: {'; '.join(parts)}."


def _row(
    session: Session,
    runs: list[Run],
    metrics: dict[int, dict[Key, queries.FinalMetric]],
    readings: dict[int, dict[str, queries.Reading]],
    differences: tuple[Difference, ...],
) -> ArmRow:
    own = [metrics[run.id] for run in runs]
    speeds = [(run.arm, queries.decode_speeds(session, run.id)) for run in runs]
    gains = [100 * (s[arm] / s[BASE] - 1) for arm, s in speeds if arm in s and s.get(BASE)]
    accuracies = [100 * m[ACCURACY].value for m in own if ACCURACY in m]
    parities = [100 * m["parity", "greedy_equal"].value for m in own if ("parity", "greedy_equal") in m]
    keys = dict.fromkeys(key for m in own for key in m)
    return ArmRow(
        arm=runs[0].arm,
        model_name=runs[0].model_name,
        seeds=tuple(run.seed for run in runs),
        accuracy=_mean(accuracies),
        accuracy_by_seed=tuple(accuracies),
        retention=_mean(100 * m[RETENTION].value for m in own if RETENTION in m),
        decode_speed=_mean(s[arm] for arm, s in speeds if arm in s),
        delta_speed=0.0 if runs[0].arm == BASE else _mean(gains),
        parity=min(parities) if parities else None,
        differences=differences,
        metrics={key: fmean(m[key].value for m in own if key in m) for key in keys},
        probes=tuple(_probe(run.seed, readings[run.id]) for run in runs if "verdict" in readings[run.id]),
    )


def _probe(seed: int, readings: dict[str, queries.Reading]) -> ProbeRow:
    verdict = readings["verdict"]
    word, _, reason = verdict.diagnosis.partition(": ")
    numbers = {name: reading.value for name, reading in readings.items() if name != "verdict"}
    return ProbeRow(seed, word, verdict.verdict == "pass", reason, numbers)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None


def _notes(rows: tuple[ArmRow, ...], runs: list[Run]) -> list[str]:
    notes = []
    if sum(row.arm != BASE for row in rows):
        notes.append(
            "Δ speed: merged LoRA models of one shape decode equally fast, so differences there are noise "
            "of the machine. It is measured against the base timed in the same process, not against the "
            "base's own row."
        )
    if any(len(row.seeds) > 1 for row in rows):
        notes.append("Intervals resample items; seeds are averaged per item before.")
    for row in rows:
        notes += [f"{row.arm} seed {p.seed}: {p.verdict}: {p.reason}" for p in row.probes if not p.as_claimed]
    if any(run.git_dirty for run in runs):
        notes.append("Some stages ran on changed files (dirty): those numbers have no commit of their own.")
    bad = [row.arm for row in rows if any(not math.isfinite(value) for value in row.metrics.values())]
    if bad:
        notes.append(f"Some metrics of {', '.join(bad)} could not be computed (nan or inf).")
    return notes


def _provenance(session: Session, run: Run) -> dict[str, Any]:
    place = queries.environment(session, run)
    return {
        "arm": run.arm,
        "seed": run.seed,
        "run_key": run.run_key,
        "git_commit": run.git_commit,
        "git_dirty": run.git_dirty,
        "backend": f"{run.backend_name} {run.backend_version}",
        "serving_mode": run.serving_mode,
        "device": f"{run.device_class}: {place.device_name or 'unnamed'}",
        "platform": place.platform,
        "python": place.python,
        "packages": dict(sorted(place.packages.items())),
        "test_items_sha256": run.test_items_sha256,
        "started": run.started.isoformat(),
        "ended": run.ended.isoformat() if run.ended else None,
    }
