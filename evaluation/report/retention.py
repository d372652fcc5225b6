"""Chapter: what the arms kept of the base, and how far they moved from it."""

import math
from collections.abc import Mapping

from db.runs import BASE
from evaluation.report.arms import KL, LOSS, RETENTION
from evaluation.report.blocks import Block, Cell, Chart, Dataset, Details, Panel, Section, Table, Text, missing_note
from evaluation.report.comparison import Comparison, Report
from evaluation.report.findings import preserved
from evaluation.report.results import Key
from evaluation.report.text import interval, listed, number, percent, score, significant

_DISTANCES: Mapping[Key, str] = {
    KL: "KL(base ‖ tuned), nats per token",
    ("hidden", "drift_relative"): "drift of hidden states, ‖h − h₀‖ / ‖h₀‖",
    ("weights", "update_norm"): "‖ΔW‖, Frobenius",
}
"""Measures of the distance from the base → title with unit; the first one that was measured is drawn."""
_ROUNDS_TO_ZERO = 0.05
"""Points below which a change would be written as 0.0."""


def retention(report: Report) -> Section | None:
    comparison = report.comparison
    more = tuple(block for block in (_distance(report), _by_task(comparison)) if block)
    front = _front(comparison)
    if not front and not more:
        return None
    words = "Retention is accuracy on general tasks that no arm was trained on."
    blocks: list[Block] = [*([Text(words)] if comparison.has(*RETENTION) else []), *([front] if front else [])]
    blocks += [Details("Task by task, and the distance from the base", more)] if front and more else more
    return Section("Retention", tuple(blocks))


def _front(comparison: Comparison) -> Table | None:
    above = comparison.pareto
    if not above:
        return None
    rows = sorted(comparison.rows, key=lambda row: (row.arm != BASE, bool(above.get(row.arm)), -(row.accuracy or 0)))
    lines = [
        (
            Cell(row.arm, arm=row.arm, hint=preserved(row)),
            score(row.accuracy, row.accuracy_interval),
            score(row.retention, row.retention_interval),
            "100.0" if row.arm == BASE else interval(row.retention_share_interval),
            *(significant(row.metrics.get(key)) for key in (LOSS, KL)),
            "–" if row.arm not in above else f"below {listed(above[row.arm])}" if above[row.arm] else "on the front",
        )
        for row in rows
    ]
    headers = ("Arm", f"{comparison.primary.title}, %", "Retention, %", "Kept of the base's, %",
               "Evaluation loss", "KL to the base", "Pareto front")  # fmt: skip
    caption = (
        "What was learned and kept: means over seeds with 95% intervals in brackets; loss and KL in nats per token"
    )
    return Table(caption, headers, lines)


def _distance(report: Report) -> Panel | None:
    """How far each run has moved from the base, and its retention."""
    comparison, results = report.comparison, report.results
    across = next((key for key in _DISTANCES if comparison.has(*key)), KL)
    data = Dataset(("kind", "arm", "seed", "x", "y"))
    for run in results.runs:
        metrics = results.metrics.get(run.id, {})
        x, y = metrics.get(across, math.nan), 100 * metrics.get(RETENTION, math.nan)
        if run.arm != BASE and math.isfinite(x) and math.isfinite(y) and (across != KL or x > 0):
            data.add("seed", run.arm, str(run.seed), x, y)
    if not data.rows:
        return None
    title, up = "Distance from the base, and what was kept", "retention accuracy, %"
    options = {"x_title": _DISTANCES[across], "y_title": up, "log_x": across == KL}
    missing = missing_note([row.arm for row in comparison.trained], data)
    note = f"One point per arm and seed; shape and color both mark the arm. {missing}".strip()
    return Panel("forgetting", data, (Chart("forgetting", title, "scatter", options),), note=note)


def _by_task(comparison: Comparison) -> Table | None:
    rows = comparison.rows
    if not comparison.has(*RETENTION):
        return None
    base = next((row.metrics for row in rows if row.arm == BASE), {})
    others = (key for row in rows for key in row.metrics if key[0] == "retention" and key != RETENTION)
    lines = []
    for key in dict.fromkeys((RETENTION, *others)):
        cells = ["all tasks" if key == RETENTION else key[1].removeprefix("retention/")]
        for row in rows:
            value = row.metrics.get(key)
            change = 0.0 if value is None or key not in base or row.arm == BASE else 100 * (value - base[key])
            cells.append(percent(value) + f" ({number(change, sign=True)})" * (not abs(change) < _ROUNDS_TO_ZERO))
        lines.append(cells)
    shares = ("100.0" if row.arm == BASE else interval(row.retention_share_interval) for row in rows)
    lines.append(["kept of the base's, same items [95%]", *shares])
    caption = "Accuracy on the retention tasks, percent, mean over seeds (change from the base in points)"
    return Table(caption, ("Task", *comparison.arms), lines)
