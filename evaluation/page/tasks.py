"""Section about the other tasks that the database has results of."""

from __future__ import annotations

from evaluation.all_tasks import TaskRow
from evaluation.differences import BASE, Difference
from evaluation.markdown import interval, number
from evaluation.page.blocks import Cell, Section, Table, Text
from evaluation.page.context import TONES, Context, arm_cell
from evaluation.report_tasks import TITLE, WORDS, several


def tasks(context: Context) -> Section | None:
    """Every task and arm in the database; none where there is one task only."""
    found = context.comparison.tasks
    if not several(found):
        return None
    against = dict.fromkeys((BASE, context.comparison.baseline))
    headers = ("Task", "Arm", "Seeds", "Score, %", *(f"Δ to {arm}, points" for arm in against), "Evaluated")
    rows = tuple(_line(row, tuple(against)) for row in found)
    caption = "Every task and arm: means over seeds of the task's primary metric, in brackets 95% intervals"
    table = Table(caption, headers, rows, frozenset({1, len(headers) - 1}))
    return Section(TITLE, (Text(WORDS), table, *map(Text, context.comparison.task_notes)))


def _line(row: TaskRow, against: tuple[str, ...]) -> tuple[Cell, ...]:
    return (
        Cell(row.task, hint=row.title + (", on disk" if row.current else "")),
        arm_cell(row.arm),
        Cell(str(len(row.seeds))),
        Cell(number(row.score) if row.interval is None else interval(row.interval)),
        *(_against(row, arm) for arm in against),
        Cell(f"{row.ended:%Y-%m-%d}", hint=f"{row.ended:%H:%M} UTC"),
    )


def _against(row: TaskRow, arm: str) -> Cell:
    found: Difference | None = row.to_base if arm == BASE else row.to_baseline
    if row.arm in (BASE, arm):
        return Cell("–")
    if found is None:
        return Cell("–", hint="not comparable")
    tone = TONES[found.verdict] if found.verdict != "undecided" else ""
    return Cell(interval(found.points, sign=True), tone=tone, hint=f"{found.verdict}, p = {found.p_holm:.2g}")
