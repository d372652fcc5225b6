"""The comparison as files that DVC shows: `dvc metrics show`, `dvc metrics diff`, `dvc plots show`.

The numbers are those of `Comparison`; nothing is worked out here.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db import queries
from db.session import open_session
from evaluation.comparison import ArmRow, Comparison, compared_runs
from evaluation.pairs import BASE
from evaluation.primary import Primary
from evaluation.report import write_atomically
from evaluation.statistics import LEVEL, Interval

_SMALL = 6
CURVES = ("train", "eval")
"""Splits of the loss curves."""


def metrics(comparison: Comparison) -> dict[str, dict[str, float | str]]:
    """Arm -> name -> number or verdict; what was not measured is left out, since DVC knows no empty value.

    What the primary metric is called is told in `evaluation.primary`.

    Accuracies and shares in percent, differences in percentage points, speeds in tokens per second.
    """
    return {row.arm: _numbers(row, comparison.primary) for row in comparison.rows}


def _numbers(row: ArmRow, primary: Primary) -> dict[str, float | str]:
    found: dict[str, float | str | None] = {
        primary.key: row.accuracy,
        "retention_accuracy": row.retention,
        "retention_kept": row.retention_share_interval.estimate if row.retention_share_interval else None,
        "decode_speed": row.decode_speed,
        "delta_speed_percent": row.delta_speed,
        "parity": row.parity,
        "perplexity": row.metrics.get(("general", "perplexity")),
        "update_norm": row.metrics.get(("weights", "update_norm")),
        "alignment_index": row.metrics.get(("alignment", "alignment_index")),
        "updates": row.updates or None,
    }
    for difference in row.differences:
        name = primary.delta_key if difference.against == BASE else primary.against_key(difference.against)
        points = difference.points
        found |= {name: points.estimate, f"{name}_low": points.low, f"{name}_high": points.high}
        found[f"{name}_verdict"] = difference.verdict
    return {name: value for name, value in found.items() if _told(value)}  # type: ignore[misc]


def _told(value: float | str | None) -> bool:
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def accuracy_table(comparison: Comparison) -> str:
    """CSV: a line for each arm with the task's primary metric and the bounds of its interval, percent.

    Column `score` has it for every task, since dvc.yaml can name but one; the air quality task has it by its old name
    too. Column `title` is what the chart calls it.
    """
    primary = comparison.primary
    lines = [[*line, _title(primary)] for line in _intervals((r.arm, r.accuracy_interval) for r in comparison.rows)]
    if primary.key == "score":
        return _csv(["arm", "score", "low", "high", "title"], lines)
    return _csv(["arm", primary.key, "low", "high", "title", "score"], [[*line, line[1]] for line in lines])


def _title(primary: Primary) -> str:
    return f"{primary.long} with {100 * LEVEL:.0f}% intervals"


def difference_table(comparison: Comparison) -> str:
    """CSV: a line for each difference between two arms, percentage points."""
    named = ((f"{row.arm} − {d.against}", d.points) for row in comparison.rows for d in row.differences)
    title = f"Difference of {_title(comparison.primary)}"
    return _csv(["difference", "points", "low", "high", "title"], [[*line, title] for line in _intervals(named)])


def _intervals(named: Any) -> list[list[Any]]:
    return [[name, i.estimate, i.low, i.high] for name, i in named if isinstance(i, Interval)]


def loss_table(session: Session, split: str, comparison: Comparison) -> str:
    """CSV: step, arm, seed and loss (nats per token) of each compared run; what is not finite is left out."""
    lines = [
        [step, run.arm, run.seed, round(loss, _SMALL)]
        for run in compared_runs(session, comparison)
        for step, loss in queries.curve(session, run.id, "loss", split)
        if math.isfinite(loss)
    ]
    return _csv(["step", "arm", "seed", "loss"], lines)


def _csv(head: list[str], lines: list[list[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([head, *lines])
    return out.getvalue()


def write_tracked(metrics_file: Path, plots: Path, url: str | Path, comparison: Comparison) -> None:
    """Write the numbers, and the tables that dvc.yaml draws.

    Args:
        metrics_file: JSON file, replaced in one step.
        plots: A folder that exists.
        url: The database, for the loss curves.
        comparison: What it says.

    Raises:
        DatabaseError: The database cannot be read.
        OSError: A file cannot be written.
    """
    tables = {"accuracy": accuracy_table(comparison), "differences": difference_table(comparison)}
    with open_session(url) as session:
        tables |= {f"{split}_loss": loss_table(session, split, comparison) for split in CURVES}
    for name, table in tables.items():
        (plots / f"{name}.csv").write_text(table, encoding="utf-8")
    text = json.dumps(metrics(comparison), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(metrics_file, text + "\n")
