"""A comparison for other programs: JSON, CSV, and the files that DVC displays."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from db.runs import BASE
from evaluation.report.arms import KL, LOSS, OF_TRAINING, ArmRow
from evaluation.report.comparison import Comparison, Primary, Report, TaskRow
from evaluation.report.criteria import NAMES, for_arm
from evaluation.statistics.differences import Difference
from evaluation.statistics.intervals import LEVEL, Interval

_SMALL = 6
_WORDS = {(Difference, "outcome"): "verdict", (Comparison, "outcomes"): "verdicts"}
"""Attributes that keep an older name as their key in JSON."""


def as_json(content: Comparison | Sequence[TaskRow]) -> str:
    """Everything as JSON; NaN and infinity are words, since JSON has no such numbers."""
    return json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, TaskRow):
        return _plain(task_record(value))
    if is_dataclass(value):
        names = ((each.name, _WORDS.get((type(value), each.name), each.name)) for each in fields(value))
        return {key: _plain(getattr(value, name)) for name, key in names}
    if isinstance(value, Mapping):
        return {"/".join(key) if isinstance(key, tuple) else key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def as_csv(comparison: Comparison) -> str:
    """One line per arm, with separate columns for bounds, p-values and the outcome of every criterion.

    Columns with `lead` are differences from the arm in `baseline`, the others from the base. `Primary` names the
    columns of the primary metric.
    """
    return _records([_record(comparison, row) for row in comparison.rows])


def tasks_as_csv(tasks: Sequence[TaskRow]) -> str:
    return _records([task_record(row) for row in tasks])


def _records(records: Sequence[Mapping[str, object]]) -> str:
    return _csv(list(records[0]), [list(record.values()) for record in records])


def _csv(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *lines])
    return out.getvalue()


def _record(comparison: Comparison, row: ArmRow) -> dict[str, object]:
    primary = comparison.primary
    record: dict[str, object] = {
        "model_name": row.model_name,
        "arm": row.arm,
        "seeds": len(row.seeds),
        f"{primary.key}_percent": row.accuracy,
        **_difference(row.against(BASE), primary.difference_key(), 0.0 if row.arm == BASE else None),
        "retention_percent": row.retention,
        "decode_tokens_per_second": row.decode_speed,
        "delta_speed_percent": row.delta_speed,
        "parity_percent": row.parity,
        "retention_share_percent": row.retention_share,
        **_bounds(primary.key, row.accuracy_interval),
        **_bounds("retention", row.retention_interval),
        **_bounds("retention_share", row.retention_share_interval),
        **_bounds("delta_speed", row.delta_speed_interval),
        "baseline": comparison.baseline,
    }
    lead = _difference(row.against(comparison.baseline), "lead", None)
    record |= {key if key.startswith("lead") else f"lead_{key}": value for key, value in lead.items()}
    for name in NAMES:
        criterion = for_arm(comparison.criteria, row.arm, name)
        record[f"criterion_{name.replace(' ', '_')}"] = criterion.outcome if criterion else None
    above = comparison.pareto.get(row.arm)
    record |= {
        "task": primary.task,
        "primary_metric": primary.metric,
        "updates": row.updates,
        "preserve": row.preserve,
        "evaluation_loss": row.metrics.get(LOSS),
        "kl_to_base": row.metrics.get(KL),
        **{name: row.metrics.get(("train", name)) for name in OF_TRAINING},
        "pareto_front": None if above is None else not above,
        "dominated_by": " ".join(above or ()),
    }
    return record | _benchmarks(comparison, row.arm)


def _benchmarks(comparison: Comparison, arm: str) -> dict[str, object]:
    """Score, differences and outcomes of each benchmark, in columns that begin with its name."""
    columns: dict[str, object] = {}
    for row in comparison.benchmarks:  # of all arms, so that every line has the same columns
        for key, value in task_record(row).items():
            if key.startswith(("score", "delta_score", "lead")):
                name = f"{row.task}_{key}"
                columns[name] = value if row.arm == arm else columns.get(name)
    return columns


def _difference(difference: Difference | None, stem: str, missing: float | None) -> dict[str, object]:
    d = difference
    return {
        f"{stem}_points": d.points.estimate if d else missing,
        **_bounds(stem, d.points if d else None),
        "items": d and d.items,
        "p_value": d and d.p_value,
        "p_holm": d and d.p_holm,
        "verdict": d and d.outcome,
        "level": d and d.level,
        **_bounds("items_only", d.items_only if d else None),
        **_bounds("seeds_only", d.seeds_only if d else None),
        "gained": d and d.gained,
        "lost": d and d.lost,
    }


def task_record(row: TaskRow) -> dict[str, object]:
    """One line of the table of all tasks, in percent and percentage points; None where there is no number."""

    def brief(stem: str, d: Difference | None) -> dict[str, object]:
        return {
            f"{stem}_points": d and d.points.estimate,
            **_bounds(stem, d.points if d else None),
            f"{stem}_p_holm": d and d.p_holm,
            f"{stem}_verdict": d and d.outcome,
        }

    return {
        "task": row.task,
        "on_disk": row.current,
        "primary_metric": row.metric,
        "title": row.title,
        "arm": row.arm,
        "seeds": len(row.seeds),
        "score_percent": row.score,
        **_bounds("score", row.interval),
        **brief("delta_score", row.to_base),
        "baseline": row.baseline,
        **brief("lead", row.to_baseline),
        "verdict": row.outcome,
        "evaluated": row.ended.isoformat(),
    }


def _bounds(stem: str, interval: Interval | None) -> dict[str, object]:
    return {f"{stem}_low": interval and interval.low, f"{stem}_high": interval and interval.high}


# What `dvc metrics show`, `dvc metrics diff` and `dvc plots show` read


def metrics(comparison: Comparison) -> dict[str, dict[str, float | str]]:
    """Arm → name → number or word; missing ones are left out, since DVC has no empty value.

    Accuracies and shares in percent, differences in percentage points, speeds in tokens per second.
    """
    return {row.arm: _numbers(row, comparison.primary) for row in comparison.rows}


def _numbers(row: ArmRow, primary: Primary) -> dict[str, float | str]:
    numbers: dict[str, float | str | None] = {
        primary.key: row.accuracy,
        "retention_accuracy": row.retention,
        "retention_kept": row.retention_share,
        "decode_speed": row.decode_speed,
        "delta_speed_percent": row.delta_speed,
        "parity": row.parity,
        "perplexity": row.metrics.get(("general", "perplexity")),
        "update_norm": row.metrics.get(("weights", "update_norm")),
        "alignment_index": row.metrics.get(("alignment", "alignment_index")),
        "updates": row.updates or None,
        "evaluation_loss": row.metrics.get(LOSS),
        "kl_to_base": row.metrics.get(KL),
        **{name: row.metrics.get(("train", name)) for name in OF_TRAINING},
        "preserve": row.preserve or None,
    }
    for d in row.differences:
        name = primary.difference_key(d.against)
        numbers |= {name: d.points.estimate, f"{name}_low": d.points.low, f"{name}_high": d.points.high}
        numbers[f"{name}_verdict"] = d.outcome
    return {
        name: value
        for name, value in numbers.items()
        if isinstance(value, str) or (value is not None and math.isfinite(value))
    }


def accuracy_table(comparison: Comparison) -> str:
    """CSV: one line per arm with the task's primary metric and the bounds of its interval, in percent.

    Column `score` is there for every task, since dvc.yaml can name only one column; `title` is the chart's.
    """
    primary, title = comparison.primary, _title(comparison.primary)
    lines = [(row.arm, i.estimate, i.low, i.high, title) for row in comparison.rows if (i := row.accuracy_interval)]
    if primary.key == "score":
        return _csv(["arm", "score", "low", "high", "title"], lines)
    return _csv(["arm", primary.key, "low", "high", "title", "score"], [[*line, line[1]] for line in lines])


def _title(primary: Primary) -> str:
    return f"{primary.long} with {100 * LEVEL:.0f}% intervals"


def difference_table(comparison: Comparison) -> str:
    named = [(f"{row.arm} − {d.against}", d.points) for row in comparison.rows for d in row.differences]
    title = f"Difference of {_title(comparison.primary)}"
    head = ["difference", "points", "low", "high", "title"]
    return _csv(head, [[name, i.estimate, i.low, i.high, title] for name, i in named])


def loss_table(report: Report, split: str) -> str:
    """CSV: step, arm, seed and loss (nats per token) of each compared run; infinite ones are left out."""
    return _csv(
        ["step", "arm", "seed", "loss"],
        [
            [step, run.arm, run.seed, round(loss, _SMALL)]
            for run in report.results.runs
            for step, loss in report.results.curves.get((run.id, split), ())
            if math.isfinite(loss)
        ],
    )


def write_tracked(metrics_file: Path, plots: Path, report: Report) -> None:
    """Write the numbers, and the tables that dvc.yaml draws into an existing folder."""
    from db.files import write_json  # pydantic takes time, and the command above needs none

    comparison = report.comparison
    tables = {"accuracy": accuracy_table(comparison), "differences": difference_table(comparison)}
    tables |= {f"{split}_loss": loss_table(report, split) for split in ("train", "eval")}
    for name, table in tables.items():
        (plots / f"{name}.csv").write_text(table, encoding="utf-8")
    write_json(metrics_file, metrics(comparison))
