"""All tasks of a database in one table: for the terminal, Markdown, CSV and JSON; the page has it too."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from rich.console import Console

from db.values import plain
from evaluation.all_tasks import TaskRow
from evaluation.differences import BASE, Difference
from evaluation.markdown import grid, interval, number
from evaluation.statistics import Interval
from evaluation.terminal import print_grid

TITLE = "All data sets in this database"
WORDS = (
    "Every task that has finished runs, also those whose results are no longer on the disk: of each arm and seed the "
    "latest run, with the base model and settings of the newest. Intervals and verdicts are as in the table of one "
    "task; scores of different tasks are not to be held against each other. With one seed a verdict is about that "
    "training alone: another seed may differ."
)


def task_headers(rows: Sequence[TaskRow]) -> list[str]:
    """Columns; the baseline is named in one of them."""
    return [
        "Task",
        "Arm",
        "Seeds",
        "Primary metric",
        "Score, % [95%]",
        "Δ to base, points [95%]",
        *(f"Δ to {baseline}, points [95%]" for baseline in _baseline(rows)),
        "Verdict",
        "Evaluated",
    ]


def task_cells(row: TaskRow) -> list[str]:
    """One line of the table."""
    deltas = [row.to_base] if row.baseline == BASE else [row.to_base, row.to_baseline]
    return [
        row.task + (" (on disk)" if row.current else ""),
        row.arm,
        str(len(row.seeds)),
        row.title,
        number(row.score) if row.interval is None else interval(row.interval),
        *(interval(found.points if found else None, sign=True) for found in deltas),
        row.verdict or "–",
        f"{row.ended:%Y-%m-%d %H:%M} UTC",
    ]


def _baseline(rows: Sequence[TaskRow]) -> list[str]:
    return [name for name in dict.fromkeys(row.baseline for row in rows) if name != BASE]


def several(rows: Sequence[TaskRow]) -> bool:
    """Whether there is more than one task."""
    return len({row.task for row in rows}) > 1


def task_blocks(rows: Sequence[TaskRow], notes: Sequence[str]) -> list[str]:
    """Section of the Markdown report, with notes under its table; none where there is one task only."""
    return [f"## {TITLE}", WORDS, _grid(rows), *notes] if several(rows) else []


def tasks_as_markdown(rows: Sequence[TaskRow]) -> str:
    """Table of all tasks as a text of its own."""
    return "\n\n".join([f"# {TITLE}", WORDS, _grid(rows)]) + "\n"


def _grid(rows: Sequence[TaskRow]) -> str:
    return grid(task_headers(rows), [task_cells(row) for row in rows])


def print_tasks(rows: Sequence[TaskRow], console: Console) -> None:
    """Print the table of all tasks; in a pipe, each line whole."""
    print_grid(console, TITLE, task_headers(rows), [task_cells(row) for row in rows], left=(0, 1, 3))


def task_record(row: TaskRow) -> dict[str, object]:
    """One line for other programs; percent and percentage points, and nothing where there is no number."""
    return {
        "task": row.task,
        "on_disk": row.current,
        "primary_metric": row.metric,
        "title": row.title,
        "arm": row.arm,
        "seeds": len(row.seeds),
        "score_percent": row.score,
        **_bounds("score", row.interval),
        **_difference("delta_score", row.to_base),
        "baseline": row.baseline,
        **_difference("lead", row.to_baseline),
        "verdict": row.verdict,
        "evaluated": row.ended.isoformat(),
    }


def _bounds(stem: str, found: Interval | None) -> dict[str, object]:
    return {f"{stem}_low": found.low if found else None, f"{stem}_high": found.high if found else None}


def _difference(stem: str, found: Difference | None) -> dict[str, object]:
    return {
        f"{stem}_points": found.points.estimate if found else None,
        **_bounds(stem, found.points if found else None),
        f"{stem}_p_holm": found.p_holm if found else None,
        f"{stem}_verdict": found.verdict if found else None,
    }


def tasks_as_csv(rows: Sequence[TaskRow]) -> str:
    """One line for each task and arm."""
    records = [task_record(row) for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(records[0]) if records else ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def tasks_as_json(rows: Sequence[TaskRow]) -> str:
    """A list of the lines of the CSV; NaN and infinities are words."""
    return json.dumps([plain(task_record(row)) for row in rows], indent=2, ensure_ascii=False, allow_nan=False)
