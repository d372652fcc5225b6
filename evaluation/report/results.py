"""The runs that a report is about, each with everything that was stored about it, read in one go."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, Table, and_, or_, select
from sqlalchemy.orm import Session

from db import tables
from db.records import FINAL_STEP, Run, join_value

Key = tuple[str, str]
"""Split and name of a metric."""
_LAYER_NUMBERS = {
    "probe": ("angle", "cos_raw_step", "cos_raw_inner", "lr_ratio"),
    "grit": ("effective_rank_a", "effective_rank_g", "kept_rank", "rank"),
}
"""Split → names of the layers' numbers that are drawn."""


class Probe(NamedTuple):
    seed: int
    verdict: str  # effective, no_effect, unstable or not_watched
    as_claimed: bool | None  # whether the arm's updates are what it claims; None: not watched
    reason: str
    numbers: dict[str, float]  # reading → value: angle_to_shadow in degrees, coverage, …


class ScoredRun(Run):
    """A run and its rows of all tables, whose columns `db.records` explains; numbers may be NaN or infinite."""

    place: Any  # its row of table environment
    metrics: dict[Key, float]  # of the finished run
    credit: dict[str, dict[str, float]]  # split → item id → credit, from 0 to 1
    timings: list[Any]  # timed phases of the run's own arm and of the base beside it
    probe: Probe | None
    quantizations: list[Any]
    quantized: dict[str, dict[str, float]]  # precision → item id → credit
    verifications: list[Any]
    # The rest is only read for the long reports, and only for the task that is compared.
    curves: dict[str, list[tuple[int, float]]]  # train and eval: (step, loss); kl: (step, KL to the base); in nats
    layers: list[Any]
    spectra: list[Any]
    artifacts: list[Any]
    samples: list[Any]

    def answers(self, split: str) -> dict[str, float]:
        """Item id → credit; empty where the split was not asked."""
        return self.credit.get(split, {})


def read(session: Session, runs: Sequence[Run], detailed: Collection[int] = ()) -> list[ScoredRun]:
    """Read everything about the runs; `detailed` are the ids of those that also need what long reports show."""
    every = [run.id for run in runs]

    def rows(
        table: Table, *where: ColumnElement[bool], of: Collection[int] = every, names: Sequence[str] = ()
    ) -> dict[int, list[Row[Any]]]:
        """Run id → its rows of a table, in the order in which they were written; all columns, or the named ones."""
        columns = [table.c[name] for name in names or table.c.keys() if name != "run_id"]
        query = select(table.c.run_id, *columns).where(table.c.run_id.in_(of), *where).order_by(table.c.id)
        by_run: dict[int, list[Row[Any]]] = {}
        for row in session.execute(query):
            by_run.setdefault(row[0], []).append(row)
        return by_run

    metric, layer, probe = tables.metric.c, tables.layer_metric.c, tables.probe.c
    places = {place.id: place for place in session.execute(select(tables.environment))}
    final = rows(tables.metric, metric.step == FINAL_STEP)
    credit = rows(tables.sample, names=("split", "item_id", "credit"))
    readings = rows(tables.probe, probe.layer == "", probe.step == FINAL_STEP)
    quantized = rows(tables.quantized_sample, names=("type", "item_id", "credit"))
    logged = rows(tables.metric, metric.step != FINAL_STEP, metric.name.in_(("loss", "kl")), of=detailed)
    drawn = (and_(layer.split == split, layer.name.in_(names)) for split, names in _LAYER_NUMBERS.items())
    whole = {
        "timings": rows(tables.speed, tables.speed.c.nanoseconds.is_not(None)),
        "quantizations": rows(tables.quantization),
        "verifications": rows(tables.verification),
        "layers": rows(tables.layer_metric, or_(*drawn), of=detailed),
        "spectra": rows(tables.spectrum, of=detailed),
        "artifacts": rows(tables.artifact, of=detailed),
        "samples": rows(tables.sample, of=detailed),
    }
    return [
        ScoredRun.model_construct(**{
            **vars(run),
            "place": places[run.environment_id],
            "metrics": {(row.split, row.name): join_value(row.value, row.value_kind) for row in final.get(run.id, ())},
            "credit": _nested(credit.get(run.id, ())),
            "probe": _probe(run.seed, readings.get(run.id, ())),
            "quantized": _nested(quantized.get(run.id, ())),
            "curves": _curves(logged.get(run.id, ())),
            **{name: by_run.get(run.id, []) for name, by_run in whole.items()},
        })
        for run in runs
    ]  # fmt: skip


def _nested(rows: Sequence[Row[Any]]) -> dict[str, dict[str, float]]:
    """Split or precision → item id → credit; rows are (run id, split or precision, item id, credit)."""
    nested: dict[str, dict[str, float]] = {}
    for row in rows:
        nested.setdefault(tuple(row)[1], {})[row.item_id] = row.credit
    return nested


def _probe(seed: int, rows: Sequence[Row[Any]]) -> Probe | None:
    readings = {row.name: row for row in rows}
    if (verdict := readings.pop("verdict", None)) is None:
        return None
    word, _, reason = verdict.diagnosis.partition(": ")
    numbers = {name: join_value(row.value, row.value_kind) for name, row in readings.items()}
    as_claimed = {"pass": True, "fail": False}.get(verdict.verdict)
    return Probe(seed, word, as_claimed, reason.removeprefix("none: "), numbers)


def _curves(rows: Sequence[Row[Any]]) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: int(row.step)):
        part = row.split if row.name == "loss" else row.name
        curves.setdefault(part, []).append((row.step, join_value(row.value, row.value_kind)))
    return curves
