"""Chapter: what the arms kept of the base, and how far they moved from it; "Every number" has it task by task."""

import math

from db.runs import BASE
from evaluation.report.arms import KL, LOSS, RETENTION
from evaluation.report.blocks import Block, Cell, Chart, Dataset, Panel, Section, Table, Text, missing_note
from evaluation.report.comparison import Comparison
from evaluation.report.findings import preserved
from evaluation.report.text import interval, listed, score, significant


def retention(comparison: Comparison) -> Section | None:
    blocks: list[Block] = [*_front(comparison), *_distance(comparison)]
    words = "Retention is accuracy on general tasks that no arm was trained on."
    return Section("Retention", (Text(words), *blocks)) if blocks else None


def _front(comparison: Comparison) -> list[Table]:
    above = comparison.pareto
    rows = sorted(comparison.rows, key=lambda row: (row.arm != BASE, bool(above.get(row.arm)), -(row.accuracy or 0)))
    lines = [
        (
            Cell(row.arm, arm=row.arm, hint=preserved(row)),
            score(row.accuracy, row.accuracy_interval),
            score(row.retention, row.retention_interval),
            "100.0" if row.arm == BASE else interval(row.retention_kept),
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
    return [Table(caption, headers, lines)] if comparison.has(*RETENTION) else []


def _distance(comparison: Comparison) -> list[Panel]:
    """How far each run has moved from the base, and its retention."""
    data = Dataset(("kind", "arm", "seed", "x", "y"))
    for run in comparison.runs:
        x, y = run.metrics.get(KL, math.nan), 100 * run.metrics.get(RETENTION, math.nan)
        if run.arm != BASE and 0 < x < math.inf and math.isfinite(y):
            data.add("seed", run.arm, str(run.seed), x, y)
    if not data.rows:
        return []
    options = {"x_title": "KL(base ‖ tuned), nats per token", "y_title": "retention accuracy, %", "log_x": True}
    missing = missing_note([row.arm for row in comparison.trained], data)
    note = f"One point per arm and seed; shape and color both mark the arm. {missing}".strip()
    chart = Chart("forgetting", "Distance from the base, and what was kept", "scatter", options)
    return [Panel("forgetting", data, (chart,), note=note)]
