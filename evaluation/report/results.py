"""Everything a report is made from, read from the database in one go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Row, and_, or_, select
from sqlalchemy.orm import Session

from db import queries
from db.queries import Choice, RunFacts, TaskFacts, of_runs
from db.records import FINAL_STEP, join_value
from db.tables import (
    Artifact,
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
from evaluation import paraphrase
from evaluation.measure.lm_harness import SPLIT

Key = tuple[str, str]
"""Split and name of a metric."""
Rows = Mapping[int, Sequence[Row[Any]]]
"""Run id → rows of a table; the columns are explained in `db.tables`."""
COSTS = ("steps", "train_seconds", "peak_memory_bytes", "saved_parameters")
"""Columns of `db.tables.Run`."""
_LAYER_NUMBERS = {
    "probe": ("angle", "cos_raw_step", "cos_raw_inner", "lr_ratio"),
    "grit": ("effective_rank_a", "effective_rank_g", "kept_rank", "rank"),
    "weights": ("rank",),
}
"""Split → names of the numbers of layers that are drawn."""


@dataclass(frozen=True)
class Benchmark:
    metric: str  # lm-eval's name of what an item's credit is; of a group that has several all of them
    answers: Mapping[int, Mapping[str, float]]  # run id → item id → credit; empty: no metric is a share of an item


@dataclass(frozen=True)
class Results:
    """The chosen runs and what is known of them, by run id; numbers may be NaN or infinite."""

    task: str | None  # the one that is compared; None where there is no run at all
    tasks: tuple[TaskFacts, ...]  # all that have finished runs, newest first
    on_disk: tuple[str, ...]  # names of the tasks of all current runs
    chosen: Mapping[str, Sequence[RunFacts]]  # task → its chosen runs, base first, then by arm and seed
    # task → arm → number of runs of another base model, or other settings or data of training
    left_out: Mapping[str, Mapping[str, int]]
    metrics: Mapping[int, Mapping[Key, float]]  # numbers of the finished run, parity shares included (split `parity`)
    settings: Mapping[int, Mapping[str, Any]]  # section train of the arm's parameters; empty for the base
    costs: Mapping[int, Mapping[str, float]]  # those of `COSTS` that are known
    tuned: Mapping[int, Mapping[str, Any]]  # what stage tune found for the arm; empty where it was off
    answers: Mapping[int, Mapping[str, float]]  # item id → credit of the test items, from 0 to 1
    retained: Mapping[int, Mapping[str, float]]  # the same of the retention items
    asked_again: Mapping[int, Mapping[str, float]]  # and of both, typed as other people would
    benchmarks: Mapping[str, Benchmark]  # of lm-evaluation-harness, by name
    timings: Rows  # phases of the run's own arm and of the base beside it that were timed
    readings: Mapping[int, Mapping[str, Row[Any]]]  # name → what the probe read over the whole run
    quantizations: Rows
    quantized_answers: Mapping[int, Mapping[str, Mapping[str, float]]]  # precision → item id → credit
    verifications: Rows
    environments: Mapping[int, Environment]
    units: Mapping[str, tuple[str, str, str]]  # metric name → (unit, better direction, description)
    # (run id, part) → (optimizer step, nats per token): the loss of parts train and eval, and kl, which is that to the
    # base. This and what follows are there for the long reports alone, and of the task that is compared
    curves: Mapping[tuple[int, str], Sequence[tuple[int, float]]]
    layers: Rows
    spectra: Rows
    artifacts: Rows
    samples: Rows
    first_differences: Mapping[int, Mapping[str, Any]]  # the first prompt on which a run's export answered differently

    @property
    def runs(self) -> Sequence[RunFacts]:
        return self.chosen.get(self.task or "", ())


def read(session: Session, runs: Sequence[RunFacts], choice: Choice, *, detail: bool = False) -> Results:
    """Read everything about the chosen ones of all finished `runs`, of every task."""
    tasks = queries.tasks_of(runs)
    task = choice.task or queries.task_on_disk(runs)
    picked = {one.name: queries.choose(runs, replace(choice, task=one.name)) for one in tasks}
    ids = [run.id for found, _ in picked.values() for run in found]
    own = [run.id for run in picked[task][0]] if task in picked else []
    long = own if detail else []
    metrics = of_runs(session, Metric, ids, Metric.step == FINAL_STEP)
    credit = of_runs(session, Sample, ids, names=("split", "item_id", "credit"))
    readings = of_runs(session, Probe, ids, Probe.layer == "", Probe.step == FINAL_STEP)
    quantized: dict[int, dict[str, dict[str, float]]] = {}
    for run_id, rows in of_runs(session, QuantizedSample, own, names=("type", "item_id", "credit")).items():
        for row in rows:
            quantized.setdefault(run_id, {}).setdefault(row.type, {})[row.item_id] = row.credit
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    logged = Metric.name.in_(("loss", "kl"))
    for run_id, rows in of_runs(session, Metric, long, Metric.step != FINAL_STEP, logged).items():
        for row in sorted(rows, key=lambda row: int(row.step)):
            part = row.split if row.name == "loss" else row.name
            curves.setdefault((run_id, part), []).append((row.step, join_value(row.value, row.value_kind)))
    drawn = (and_(LayerMetric.split == split, LayerMetric.name.in_(names)) for split, names in _LAYER_NUMBERS.items())
    first = select(Run.id, Run.parity_first_difference).where(Run.id.in_(long))
    meanings = session.scalars(select(MetricDef))
    params = session.execute(select(Run.id, Run.params).where(Run.id.in_(ids))).all()
    costs = session.execute(select(Run.id, *(getattr(Run, name) for name in COSTS)).where(Run.id.in_(ids))).all()
    return Results(
        task=task,
        tasks=tuple(tasks),
        on_disk=tuple(sorted({run.task for run in runs if run.is_current})),
        chosen={name: tuple(found) for name, (found, _) in picked.items()},
        left_out={name: left for name, (_, left) in picked.items()},
        metrics={
            run_id: {(row.split, row.name): join_value(row.value, row.value_kind) for row in rows}
            for run_id, rows in metrics.items()
        },
        settings={run_id: stages.get("train", {}).get("train", {}) for run_id, stages in params},
        costs={
            run_id: {name: float(value) for name, value in zip(COSTS, found, strict=True) if value is not None}
            for run_id, *found in costs
        },
        tuned={
            run_id: found
            for run_id, stages in params
            if (found := stages.get("train", {}).get("tuned", {})).get("runs")
        },
        answers=_credit(credit, "test"),
        retained=_credit(credit, "retention"),
        asked_again=_credit(credit, paraphrase.SPLIT),
        benchmarks=_benchmarks(session, own, credit),
        timings=of_runs(session, Speed, ids, Speed.nanoseconds.is_not(None)),
        readings={run_id: {row.name: row for row in rows} for run_id, rows in readings.items()},
        quantizations=of_runs(session, Quantization, own),
        quantized_answers=quantized,
        verifications=of_runs(session, Verification, own),
        environments={place.id: place for place in session.scalars(select(Environment))},
        units={one.name: (one.unit, one.direction, one.description) for one in meanings},
        curves=curves,
        layers=of_runs(session, LayerMetric, long, or_(*drawn)),
        spectra=of_runs(session, Spectrum, long),
        artifacts=of_runs(session, Artifact, long),
        samples=of_runs(session, Sample, long),
        first_differences={run_id: found for run_id, found in session.execute(first) if found},
    )


def _benchmarks(session: Session, ids: Sequence[int], credit: Rows) -> dict[str, Benchmark]:
    metrics: dict[str, dict[str, set[str]]] = {}  # benchmark → task → what its items were credited by
    for rest in session.scalars(select(Run.rest).where(Run.id.in_(ids))):
        for name, record in rest.get("benchmarks", {}).items():
            asked = metrics.setdefault(name, {})
            for task, said in record["tasks"].items():
                asked.setdefault(task, set()).update(filter(None, [said["metric"]]))
    own = {run_id: credit[run_id] for run_id in ids if run_id in credit}
    found = {}
    for name, tasks in sorted(metrics.items()):
        alike = all(len(credited) < 2 for credited in tasks.values())  # else a metric is a share for some runs only
        named = ", ".join(sorted(set().union(*tasks.values())))
        found[name] = Benchmark(named, _credit(own, f"{SPLIT}{name}") if alike else {})
    return found


def _credit(rows: Rows, split: str) -> dict[int, dict[str, float]]:
    found = {run_id: {row.item_id: row.credit for row in own if row.split == split} for run_id, own in rows.items()}
    return {run_id: credit for run_id, credit in found.items() if credit}
