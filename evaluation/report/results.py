"""Everything a report is made from, read from the database in one go."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, and_, or_, select
from sqlalchemy.orm import Session

from db import runs as db_runs
from db import tables
from db.records import FINAL_STEP, Run, join_value
from db.runs import Choice, TaskFacts
from evaluation import paraphrase
from evaluation.measure.lm_harness import SPLIT

Key = tuple[str, str]
"""Split and name of a metric."""
Rows = Mapping[int, Sequence[Row[Any]]]
"""Run id → rows of a table, whose columns are explained in `db.records`."""
_LAYER_NUMBERS = {
    "probe": ("angle", "cos_raw_step", "cos_raw_inner", "lr_ratio"),
    "grit": ("effective_rank_a", "effective_rank_g", "kept_rank", "rank"),
    "weights": ("rank",),
}
"""Split → names of the numbers of layers that are drawn."""


@dataclass(frozen=True)
class Benchmark:
    metric: str  # lm-eval's name of what an item's credit is; for a group of tasks all names
    answers: Mapping[int, Mapping[str, float]]  # run id → item id → credit; empty: no metric is a share of an item


@dataclass(frozen=True)
class Results:
    """The chosen runs and their rows, by run id; numbers may be NaN or infinite."""

    task: str | None  # the task that is compared; None if there is no run at all
    tasks: tuple[TaskFacts, ...]  # all that have finished runs, newest first
    on_disk: tuple[str, ...]  # names of the tasks of all current runs
    chosen: Mapping[str, Sequence[Run]]  # task → its chosen runs, base first, then by arm and seed
    left_out: Mapping[str, Mapping[str, int]]  # task → arm → number of runs of another base model, settings or data
    metrics: Mapping[int, Mapping[Key, float]]  # numbers of the finished run, parity shares included (split `parity`)
    answers: Mapping[int, Mapping[str, float]]  # item id → credit of the test items, from 0 to 1
    retained: Mapping[int, Mapping[str, float]]  # the same for the retention items
    asked_again: Mapping[int, Mapping[str, float]]  # for both, the retyped questions
    benchmarks: Mapping[str, Benchmark]  # of lm-evaluation-harness, by name
    timings: Rows  # phases of the run's own arm and of the base beside it that were timed
    readings: Mapping[int, Mapping[str, Row[Any]]]  # name → what the probe read over the whole run
    quantizations: Rows
    quantized_answers: Mapping[int, Mapping[str, Mapping[str, float]]]  # precision → item id → credit
    verifications: Rows
    environments: Mapping[int, Row[Any]]
    units: Mapping[str, tuple[str, str, str]]  # metric name → (unit, better direction, description)
    # The rest is only read for the long reports, and only of the task that is compared.
    # (run id, part) → (optimizer step, nats per token): the loss of parts train and eval, and kl, the KL to the base
    curves: Mapping[tuple[int, str], Sequence[tuple[int, float]]]
    layers: Rows
    spectra: Rows
    artifacts: Rows
    samples: Rows

    @property
    def runs(self) -> Sequence[Run]:
        return self.chosen.get(self.task or "", ())


def read(session: Session, runs: Sequence[Run], choice: Choice, *, detail: bool = False) -> Results:
    """Read everything about the chosen runs among all finished `runs`, of every task."""
    tasks = db_runs.tasks_of(runs)
    task = choice.task or db_runs.task_on_disk(runs)
    picked = {each.name: db_runs.choose(runs, replace(choice, task=each.name)) for each in tasks}
    every = [run.id for chosen, _ in picked.values() for run in chosen]
    compared = picked[task][0] if task in picked else []
    ids = [run.id for run in compared]
    detailed = ids if detail else []

    def rows(table: Table, of: Collection[int], *where: ColumnElement[bool], names: Sequence[str] = ()) -> Rows:
        """Run id → its rows of a table, in the order in which they were written; all columns, or the named ones."""
        columns = [table.c[name] for name in names] or [*table.c]
        query = select(table.c.run_id, *columns).where(table.c.run_id.in_(of), *where).order_by(table.c.id)
        by_run: dict[int, list[Row[Any]]] = {}
        for row in session.execute(query):
            by_run.setdefault(row[0], []).append(row)
        return by_run

    metric, layer_metric = tables.metric.c, tables.layer_metric.c
    credit = rows(tables.sample, every, names=("split", "item_id", "credit"))
    readings = rows(tables.probe, every, tables.probe.c.layer == "", tables.probe.c.step == FINAL_STEP)
    quantized: dict[int, dict[str, dict[str, float]]] = {}
    for run_id, answers in rows(tables.quantized_sample, ids, names=("type", "item_id", "credit")).items():
        for row in answers:
            quantized.setdefault(run_id, {}).setdefault(row.type, {})[row.item_id] = row.credit
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    logged = rows(tables.metric, detailed, metric.step != FINAL_STEP, metric.name.in_(("loss", "kl")))
    for run_id, points in logged.items():
        for row in sorted(points, key=lambda row: int(row.step)):
            part = row.split if row.name == "loss" else row.name
            curves.setdefault((run_id, part), []).append((row.step, join_value(row.value, row.value_kind)))
    drawn = (and_(layer_metric.split == split, layer_metric.name.in_(names)) for split, names in _LAYER_NUMBERS.items())
    return Results(
        task=task,
        tasks=tuple(tasks),
        on_disk=tuple(sorted({run.task for run in runs if run.is_current})),
        chosen={name: tuple(chosen) for name, (chosen, _) in picked.items()},
        left_out={name: left for name, (_, left) in picked.items()},
        metrics={
            run_id: {(row.split, row.name): join_value(row.value, row.value_kind) for row in final}
            for run_id, final in rows(tables.metric, every, metric.step == FINAL_STEP).items()
        },
        answers=_credit(credit, "test"),
        retained=_credit(credit, "retention"),
        asked_again=_credit(credit, paraphrase.SPLIT),
        benchmarks=_benchmarks(compared, credit),
        timings=rows(tables.speed, every, tables.speed.c.nanoseconds.is_not(None)),
        readings={run_id: {row.name: row for row in read} for run_id, read in readings.items()},
        quantizations=rows(tables.quantization, ids),
        quantized_answers=quantized,
        verifications=rows(tables.verification, ids),
        environments={place.id: place for place in session.execute(select(tables.environment))},
        units={each.name: (each.unit, each.direction, each.description)
               for each in session.execute(select(tables.metric_def))},
        curves=curves,
        layers=rows(tables.layer_metric, detailed, or_(*drawn)),
        spectra=rows(tables.spectrum, detailed),
        artifacts=rows(tables.artifact, detailed),
        samples=rows(tables.sample, detailed),
    )  # fmt: skip


def _benchmarks(runs: Sequence[Run], credit: Rows) -> dict[str, Benchmark]:
    credited: dict[str, dict[str, set[str]]] = {}  # benchmark → task → metrics that its items were credited by
    for run in runs:
        for name, record in run.rest.get("benchmarks", {}).items():
            for task, facts in record["tasks"].items():
                credited.setdefault(name, {}).setdefault(task, set()).update(filter(None, [facts["metric"]]))
    of_runs = {run.id: credit[run.id] for run in runs if run.id in credit}
    benchmarks = {}
    for name, tasks in sorted(credited.items()):
        alike = all(len(metrics) < 2 for metrics in tasks.values())  # else a metric is a share for some runs only
        metrics = ", ".join(sorted(set().union(*tasks.values())))
        benchmarks[name] = Benchmark(metrics, _credit(of_runs, f"{SPLIT}{name}") if alike else {})
    return benchmarks


def _credit(rows: Rows, split: str) -> dict[int, dict[str, float]]:
    by_run = {
        run_id: {row.item_id: row.credit for row in of_run if row.split == split} for run_id, of_run in rows.items()
    }
    return {run_id: credit for run_id, credit in by_run.items() if credit}
