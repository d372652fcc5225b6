"""From runs/ to the tables: the database is derived, rebuilt each time, and put in place as a whole."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Table, insert
from sqlalchemy.orm import Session

from db import tables
from db.archive import RUNS, Bundle, archive, digest_of, read_archive, read_results, require_archive
from db.errors import Problem, refuse
from db.files import exclusive
from db.records import (
    FINAL_STEP,
    GRIT,
    PROBED,
    TRAINED,
    Costs,
    HistoryRecord,
    MetricDefRecord,
    Record,
    Run,
    RunRecord,
    logged,
    plain,
)
from db.runs import BASE, link
from db.store import replaced
from db.tables import Row, number, row_of

_BASE_FILE = "models/base/base.json"
"""Names the base model, its revision and fingerprint. Stage export reads it for every arm and for the base; where
nothing is exported, stage evaluate does."""

_WRAPPERS = re.compile(r"^base_model\.model\.(model\.)?")


@dataclass(frozen=True)
class IngestSummary:
    """Counts of runs: new or changed and all of the working copy, all of the database."""

    changed: int
    current: int
    runs: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        counts = (
            f"{self.current} runs in the working copy, {self.changed} of them new or changed; {self.runs} runs in all"
        )
        return "\n".join([counts, *(f"note: {note}" for note in self.notes)])


def ingest(
    root: Path, url: str | Path | URL, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> IngestSummary:
    """Archive the runs of the working copy, which become the current ones, and rebuild the database.

    Raises:
        FileError: files are missing or malformed; nothing was written.
        DatabaseError: the database cannot be written; its old content is intact.
    """
    if not root.is_dir():
        raise refuse([Problem(str(root), "", "expected the project's folder, got nothing")])
    with exclusive(root / RUNS / ".lock"):
        bundles, notes = read_results(root, arms, seeds)  # inside the lock, so that the last writer has the newest data
        changed = archive(root, bundles)
        return _rebuild(root, url, changed, notes)


def rebuild(root: Path, url: str | Path | URL) -> IngestSummary:
    """Rebuild the database from `root`/runs/ alone; errors as for `ingest`."""
    require_archive(root)
    with exclusive(root / RUNS / ".lock"):
        return _rebuild(root, url, 0, [])


def _rebuild(root: Path, url: str | Path | URL, changed: int, notes: Iterable[str]) -> IngestSummary:
    runs, current = read_archive(root)
    with replaced(url) as session:
        lonely = fill(session, runs, current)
    return IngestSummary(changed, len(current), len(runs), (*notes, *lonely))


def fill(session: Session, archived: Mapping[str, Bundle], current: set[str]) -> list[str]:
    """Write runs into empty tables, the oldest first; returns a note for each current run without a base."""
    environments: dict[str, Row] = {}
    meanings: dict[str, Row] = {}
    runs: list[Run] = []
    rows: dict[Table, list[Row]] = {table: [] for table in _ROWS}
    for run_id, (key, bundle) in enumerate(sorted(archived.items(), key=_order), start=1):
        for environment in map(environment_row, bundle.stages.values()):
            environments.setdefault(environment["key"], {"id": len(environments) + 1, **environment})
        environment = environments[environment_row(bundle.stages["evaluate"])["key"]]
        identity = {"id": run_id, "run_key": key, "is_current": key in current, "environment_id": environment["id"]}
        runs.append(run_of(bundle, identity))
        for table, make in _ROWS.items():
            own_rows = (row_of(row) if isinstance(row, Record) else row for row in make(bundle))
            rows[table] += [{"run_id": run_id, **row} for row in own_rows]
        for benchmark, _ in bundle.benchmarks.values():  # if lm-eval uses one of our names, our definition is kept
            meanings = _defined(benchmark.metric_defs) | meanings
        meanings |= _meanings(bundle)
    runs = link(runs)
    numbered = {table: [{"id": at, **row} for at, row in enumerate(each, start=1)] for table, each in rows.items()}
    content: dict[Table, list[Row]] = {
        tables.environment: list(environments.values()),
        tables.run: [run.model_dump() for run in runs],
        tables.metric_def: list(meanings.values()),
        **numbered,
    }
    for table, table_rows in content.items():
        if table_rows:
            session.execute(insert(table), table_rows)
    return [
        f"{run.arm}/{run.seed}: no base with the same items and backend and of the same model, so no differences"
        for run in runs
        if run.is_current and run.arm != BASE and run.reference_run_id is None
    ]


def _order(entry: tuple[str, Bundle]) -> tuple[Any, ...]:
    key, bundle = entry
    return bundle.stages["evaluate"].ended, bundle.arm != BASE, bundle.arm, bundle.seed, key


def environment_row(record: RunRecord) -> Row:
    device = record.device.model_dump(include=set(type(record.device).model_fields))
    row: Row = plain({**device, "packages": record.packages})
    return {"key": digest_of(row), **row}


def run_of(bundle: Bundle, identity: Row) -> Run:
    """A row of `run`, as far as it follows from the run's own files."""
    evaluate, scores = bundle.stages["evaluate"], bundle.scores
    stages = list(bundle.stages.values())
    dirty = [record.git.dirty for record in stages]
    templates = [record.prompt_template for record in stages if record.prompt_template is not None]
    trained = bundle.stages.get("train")
    # Results that do not name the mode: transformers had the adapter beside the model, others had it merged.
    mode = "adapter" if scores.backend.name == "hf" and bundle.arm != BASE else "merged"
    return Run.of(
        {
            **identity,
            **(_costs(trained.extra) if trained else {}),
            "arm": bundle.arm,
            "seed": bundle.seed,
            "model_name": scores.model_name,
            "status": evaluate.status,
            "started": evaluate.started,
            "ended": evaluate.ended,
            "stages": {stage: _stage(record) for stage, record in bundle.stages.items()},
            "params": {stage: record.params for stage, record in bundle.stages.items()},
            "inputs": {stage: record.inputs for stage, record in bundle.stages.items()},
            "git_commit": evaluate.git.commit,
            "git_dirty": True if True in dirty else (None if None in dirty else False),
            "prompt_template": templates[-1] if templates else None,
            "backend_name": scores.backend.name,
            "backend_version": scores.backend.version,
            "serving_mode": scores.backend.mode or mode,
            "device_class": scores.backend.device_class,
            "test_items_sha256": scores.test_items_sha256,
            "task": scores.task.name,
            "task_title": scores.task.title,
            "primary_metric": scores.task.primary,
            "base_key": bundle.stages.get("export", evaluate).inputs.get(_BASE_FILE) or "",
            # Runs of an arm with equal keys differ by the seed, which is not among the settings.
            "train_key": "" if trained is None else digest_of([trained.params, trained.inputs]),
            "rest": _rest(bundle),
        }
    )


def _costs(extra: Row) -> Row:
    costs = Costs.of({"saved_parameters": extra.get("trainable_parameters"), **extra}).model_dump()
    if "trained" in extra:  # by another process, whose memory was not measured
        costs["peak_memory_bytes"] = None
    if extra.get("resumed_from_step") is not None:
        costs["train_seconds"] = None
    return costs


def _rest(bundle: Bundle) -> Row:
    """Fields of the records that no table has."""
    stored = {"metrics", "metric_defs", "speed", "layers", "readings"}
    files = {"scores": bundle.scores, "verdict": bundle.verdict, "measured": bundle.measured}
    rest: Row = {name: record.model_dump(exclude=stored) for name, record in files.items() if record is not None}
    benchmarks = {task: record.model_dump(exclude=stored) for task, (record, _) in bundle.benchmarks.items()}
    return rest | ({"benchmarks": benchmarks} if benchmarks else {})


def _stage(record: RunRecord) -> Row:
    facts = record.model_dump(include={"started", "ended", "git", "extra"})
    return {**facts, "environment": environment_row(record)["key"]}


def _metrics(bundle: Bundle) -> Iterator[Row]:
    files = [bundle.scores, bundle.measured, *(record for record, _ in bundle.benchmarks.values())]
    numbers = [(m.name, m.split, m.value, m.n) for record in files if record is not None for m in record.metrics]
    if "train" in bundle.stages:
        extra = bundle.stages["train"].extra
        for meaning, number_of in logged({**(extra.get("grit") or {}), **extra}, TRAINED):
            split = "eval" if meaning.name in ("evaluation_loss", "kl_to_base") else "train"
            numbers.append((meaning.name, split, number_of, None))
    final = {(name, split): (value, n) for name, split, value, n in numbers}
    for (name, split), (value, n) in final.items():
        yield {"name": name, "split": split, "step": FINAL_STEP, **number(value), "n": n}
    if bundle.history:
        yield from _curves(bundle.history)


def _curves(history: HistoryRecord) -> Iterator[Row]:
    """The training curves, one after the other.

    An entry with an `eval_…` number belongs to split `eval`, and the prefix is dropped. When a trainer logs the same
    name twice at one step (its closing summary repeats `epoch`), the later one is kept.
    """
    curves: dict[tuple[str, str], dict[int, float | None]] = {}
    for entry in history.root:
        split = "eval" if any(name.startswith("eval_") for name in entry) else "train"
        for name, value in entry.items():
            if name != "step":
                curve = curves.setdefault((name.removeprefix("eval_"), split), {})
                curve[int(entry["step"] or 0)] = value
    for (name, split), curve in curves.items():
        for step, value in curve.items():
            yield {"name": name, "split": split, "step": step, **number(value), "n": None}


def _meanings(bundle: Bundle) -> dict[str, Row]:
    """Metric name → what it means; scores replace the words of logs, and measurements those of scores."""
    logs = [(TRAINED, bundle.history), (PROBED, bundle.ledger), (GRIT, bundle.grit)]
    rows = {meaning.name: meaning._asdict() for table, log in logs if log for meaning in table.values()}
    return rows | _defined(bundle.scores.metric_defs) | _defined(bundle.measured.metric_defs if bundle.measured else {})


def _defined(meanings: Mapping[str, MetricDefRecord]) -> dict[str, Row]:
    fields = set(MetricDefRecord.model_fields)
    return {name: plain({"name": name, **m.model_dump(include=fields)}) for name, m in meanings.items()}


def _artifacts(bundle: Bundle) -> Iterator[Row]:
    """All files that the stages made; for the base also those that it was made from."""
    prepared = {"prepare_base": bundle.base_model} if bundle.base_model else {}
    for stage, record in {**bundle.stages, **prepared}.items():
        yield from (row_of(artifact, stage=stage) for artifact in record.artifacts)


def layer_name(name: str) -> str:
    """A layer's name without the prefixes that PEFT and transformers add: layers.0.self_attn.q_proj.

    Logs have the wrapped model's names, measurements the model's own, and readers want to join both.
    """
    return _WRAPPERS.sub("", name, count=1).removeprefix("model.")


def _layer_metrics(bundle: Bundle) -> Iterator[Row]:
    """Measurements after training, and what the probe and GRIT logged; of two records of one step the later is kept."""
    rows: dict[tuple[str, str, str, int], Row] = {}

    def add(name: str, split: str, layer: str, step: int, value: float | None) -> None:
        key = (name, split, layer_name(layer), step)
        rows[key] = {"name": key[0], "split": key[1], "layer": key[2], "step": step, **number(value)}

    for row in bundle.measured.layers if bundle.measured else []:
        add(row.name, row.split, row.layer, FINAL_STEP, row.value)
    for sampled in bundle.ledger:
        for layer, unit in sampled.units.items():
            for meaning, value in logged(unit, PROBED):
                add(meaning.name, "probe", layer, sampled.step or 0, value)
    for step, layer, entry in _grit_layers(bundle):
        for meaning, value in logged(entry, GRIT):
            add(meaning.name, "grit", layer, step, value)
    yield from rows.values()


def _spectra(bundle: Bundle) -> Iterator[Row]:
    """Eigenvalues of the Fisher factors, largest first; of two records of one step the later is kept."""
    rows: dict[tuple[str, str, int], Row] = {}
    for step, layer, entry in _grit_layers(bundle):
        for factor in "ag":
            if values := entry.get(f"eigenvalues_{factor}"):
                name = layer_name(layer)
                ordered = sorted(map(float, values), key=lambda value: (math.isnan(value), -value))
                row = {"layer": name, "factor": factor, "step": step}
                rows[name, factor, step] = {**row, "eigenvalues": plain(ordered)}
    yield from rows.values()


def _grit_layers(bundle: Bundle) -> Iterator[tuple[int, str, Row]]:
    """(step, layer, numbers); numbers under `ranks` belong to the finished run, the others to the record's step."""
    for record in bundle.grit:
        for step, layers in ((record.step, record.layers), (record.step, record.spectra), (FINAL_STEP, record.ranks)):
            for layer, entry in (layers or {}).items():
                yield step, layer, entry


_ROWS: dict[Table, Callable[[Bundle], Iterable[Row | Record]]] = {
    tables.metric: _metrics,
    tables.sample: lambda b: [*b.samples, *(item for _, items in b.benchmarks.values() for item in items)],
    tables.speed: lambda b: b.scores.speed,
    tables.artifact: _artifacts,
    tables.probe: lambda b: b.verdict.readings if b.verdict else [],
    tables.quantization: lambda b: b.quantized.rows if b.quantized else [],
    tables.quantized_sample: lambda b: b.quantized_samples,
    tables.verification: lambda b: b.verified.rows if b.verified else [],
    tables.layer_metric: _layer_metrics,
    tables.spectrum: _spectra,
}
"""Table → its rows of one run."""
