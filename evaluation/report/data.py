"""A comparison for other programs: JSON, CSV, and the files that DVC displays."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from db.files import write_json
from db.runs import BASE
from evaluation.report.alignment import in_words
from evaluation.report.arms import KL, LOSS, OF_TRAINING, ArmRow, Scored
from evaluation.report.comparison import Comparison, Primary
from evaluation.report.criteria import NAMES, for_arm
from evaluation.report.results import ScoredRun
from evaluation.report.serving import phase_rows, precision_rows, verified
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import LEVEL, Interval

_SMALL = 6
_HIDDEN = ("runs", "pairs")
"""Fields of a row that are too much for JSON."""


def as_json(comparison: Comparison) -> str:
    """Everything as JSON; NaN and infinity are words, since JSON has no such numbers."""
    rows = comparison.rows
    computed = {
        "verdicts": comparison.outcomes,
        "criteria": comparison.criteria,
        "power": comparison.power,
        "methods": comparison.methods,
        "precisions": [precision for row in rows for precision in precision_rows(row.runs)],
        "served": [
            {"arm": run.arm, "seed": run.seed, **row._mapping} for run in comparison.runs for row in verified(run)
        ],
        "phases": [{"arm": row.arm, **phase} for row in rows for phase in phase_rows(row)],
        "alignment": [sentence for row in rows if (sentence := in_words(row))],
        "runs": list(map(_provenance, comparison.runs)),
        "tasks": [task_record(row, comparison.baseline) for row in comparison.tasks],
        "benchmarks": [task_record(row, comparison.baseline) for row in comparison.benchmarks],
    }
    content = {each.name: getattr(comparison, each.name) for each in fields(comparison)} | computed
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        values = {each.name: getattr(value, each.name) for each in fields(value) if each.name not in _HIDDEN}
        return _plain(values | ({"verdict": values.pop("outcome")} if isinstance(value, Difference) else {}))
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {"/".join(key) if isinstance(key, tuple) else key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _provenance(run: ScoredRun) -> dict[str, object]:
    names = {"arm", "seed", "run_key", "git_commit", "git_dirty", "backend_name", "backend_version", "serving_mode",
             "device_class", "test_items_sha256", "started", "ended"}  # fmt: skip
    return run.model_dump(mode="json", include=names) | {"environment": dict(run.place._mapping)}


def as_csv(comparison: Comparison) -> str:
    """One line per arm: what `metrics` has, the outcome of every criterion, and each benchmark.

    `Primary` names the columns of the primary metric.
    """
    benchmarks = [task_record(row, comparison.baseline) for row in comparison.benchmarks]
    records = []
    for row in comparison.rows:
        above = comparison.pareto.get(row.arm)
        judged = {name: for_arm(comparison.criteria, row.arm, name) for name in NAMES}
        records.append({
            "arm": row.arm,
            "model_name": row.model_name,
            "seeds": len(row.seeds),
            "task": row.task,
            "primary_metric": row.metric,
            "baseline": comparison.baseline,
            **_numbers(row, comparison.primary),
            **{f"criterion_{name.replace(' ', '_')}": c.outcome if c else None for name, c in judged.items()},
            "pareto_front": None if above is None else not above,
            "dominated_by": " ".join(above or ()),
            **{f"{own['task']}_{name}": value for own in benchmarks if own["arm"] == row.arm
               for name, value in own.items() if name.startswith(("score", "delta_score"))},
        })  # fmt: skip
    return _csv(records)


def _csv(records: Sequence[Mapping[str, object]]) -> str:
    """Records with all columns that any of them has."""
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(name for record in records for name in record), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def task_record(row: Scored, baseline: str) -> dict[str, object]:
    """An arm on a task or a benchmark, in percent and percentage points; None where there is no number."""
    record: dict[str, object] = {
        "task": row.task, "on_disk": row.current, "primary_metric": row.metric, "title": row.title, "arm": row.arm,
        "seeds": len(row.seeds), "score": row.accuracy, **_bounds("score", row.accuracy_interval),
        "baseline": baseline, "verdict": row.outcome(baseline),
        "evaluated": max(run.ended for run in row.runs).isoformat(),
    }  # fmt: skip
    keys = {BASE: "delta_score", baseline: f"score_against_{baseline}"}
    for against in dict.fromkeys((BASE, baseline)):
        record |= _difference(row.against(against), keys[against])
    return record


def _difference(d: Difference | None, stem: str) -> dict[str, object]:
    named = {"": d and d.points.estimate, "_p_value": d and d.p_value, "_p_holm": d and d.p_holm,
             "_verdict": d and d.outcome}  # fmt: skip
    return {f"{stem}{end}": value for end, value in named.items()} | _bounds(stem, d.points if d else None)


def _bounds(stem: str, interval: Interval | None) -> dict[str, object]:
    return {f"{stem}_low": interval and interval.low, f"{stem}_high": interval and interval.high}


# What `dvc metrics show`, `dvc metrics diff` and `dvc plots show` read


def metrics(comparison: Comparison) -> dict[str, dict[str, object]]:
    """Arm → name → number or word; missing ones are left out, since DVC has no empty value.

    Accuracies and shares in percent, differences in percentage points, speeds in tokens per second.
    """
    return {
        row.arm: {
            name: value
            for name, value in _numbers(row, comparison.primary).items()
            if value not in ("", None) and not (isinstance(value, float) and not math.isfinite(value))
        }
        for row in comparison.rows
    }


def _numbers(row: ArmRow, primary: Primary) -> dict[str, object]:
    numbers: dict[str, object] = {
        primary.key: row.accuracy,
        **_bounds(primary.key, row.accuracy_interval),
        "retention_accuracy": row.retention,
        **_bounds("retention_accuracy", row.retention_interval),
        "retention_kept": row.retention_kept and row.retention_kept.estimate,
        **_bounds("retention_kept", row.retention_kept),
        "decode_speed": row.decode_speed,
        "delta_speed_percent": row.delta_speed,
        **_bounds("delta_speed_percent", row.delta_speed_interval),
        "perplexity": row.metrics.get(("general", "perplexity")),
        "update_norm": row.metrics.get(("weights", "update_norm")),
        "alignment_index": row.metrics.get(("alignment", "alignment_index")),
        "updates": row.updates,
        "evaluation_loss": row.metrics.get(LOSS),
        "kl_to_base": row.metrics.get(KL),
        **{name: row.metrics.get(("train", name)) for name in OF_TRAINING},
        "preserve": row.preserve,
    }
    for d in row.differences:
        numbers |= _difference(d, primary.difference_key(d.against))
    return numbers


def accuracy_table(comparison: Comparison) -> str:
    """CSV: one line per arm with the task's primary metric and the bounds of its interval, in percent.

    `title` is the chart's.
    """
    title = _title(comparison.primary)
    named = [(row.arm, row.accuracy_interval) for row in comparison.rows if row.accuracy_interval]
    return _lines("arm score low high title", [(arm, i.estimate, i.low, i.high, title) for arm, i in named])


def _title(primary: Primary) -> str:
    return f"{primary.long} with {100 * LEVEL:.0f}% intervals"


def difference_table(comparison: Comparison) -> str:
    named = [(f"{row.arm} − {d.against}", d.points) for row in comparison.rows for d in row.differences]
    title = f"Difference of {_title(comparison.primary)}"
    return _lines("difference points low high title", [(name, i.estimate, i.low, i.high, title) for name, i in named])


def loss_table(comparison: Comparison, split: str) -> str:
    """CSV: step, arm, seed and loss (nats per token) of each compared run; infinite ones are left out."""
    lines = [
        (step, run.arm, run.seed, round(loss, _SMALL))
        for run in comparison.runs
        for step, loss in run.curves.get(split, ())
        if math.isfinite(loss)
    ]
    return _lines("step arm seed loss", lines)


def _lines(head: str, lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head.split(), *lines])
    return out.getvalue()


def write_tracked(metrics_file: Path, plots: Path, comparison: Comparison) -> None:
    """Write the numbers, and the tables that dvc.yaml draws into an existing folder."""
    tables = {"accuracy": accuracy_table(comparison), "differences": difference_table(comparison)}
    tables |= {f"{split}_loss": loss_table(comparison, split) for split in ("train", "eval")}
    for name, table in tables.items():
        (plots / f"{name}.csv").write_text(table, encoding="utf-8")
    write_json(metrics_file, metrics(comparison))
