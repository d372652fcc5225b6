"""A comparison on the terminal: a table of arms, the criteria, a verdict for each arm, notes; and its picture."""

from __future__ import annotations

import io
import re

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from evaluation.arms import ArmRow
from evaluation.comparison import Comparison
from evaluation.differences import BASE
from evaluation.markdown import interval, number
from evaluation.power import POINTS, PowerRow
from evaluation.primary import Primary
from evaluation.report_findings import CRITERIA, CRITERIA_HEADERS, POWER, criterion_cells

NARROWEST = 100
"""Columns of a pipe, at least: a truncated number is a wrong number."""


def headers(primary: Primary) -> tuple[str, ...]:
    """Of the columns; a line break where a narrow one may have it."""
    return (
        "Model",
        "Seeds",
        f"{primary.two_lines} %",
        f"Δ {primary.short}\npoints [95%]",
        "Retention\n%",
        "Decode\ntokens/s",
        "Δ speed\n% [95%]",
        "Parity\n%",
        "Updates\n(probe)",
    )


TITLE = "Arms compared with the untouched base"
_COLOURS = {"better": "green", "worse": "red", "pass": "green", "fail": "red"}


def cells(row: ArmRow) -> list[str]:
    """Return one arm's cells, in the order of `headers`; a dash stands for a number that does not exist."""
    difference = row.against(BASE)
    delta = "–"
    if row.arm == BASE:
        delta = "0.0"
    elif difference is not None:
        delta = interval(difference.points, sign=True)
    return [
        row.model_name,
        str(len(row.seeds)),
        number(row.accuracy),
        delta,
        number(row.retention),
        number(row.decode_speed),
        "0.0" if row.arm == BASE else _speed(row),
        number(row.parity),
        row.updates or "–",
    ]


def _speed(row: ArmRow) -> str:
    if row.delta_speed_interval is not None:
        return interval(row.delta_speed_interval, sign=True)
    return number(row.delta_speed, sign=True) + (" [too few]" if row.delta_speed is not None else "")


def rich_table(comparison: Comparison) -> Table:
    """Build the terminal's table; where it does not fit, cells wrap and are never cut."""
    table = Table(title=TITLE, title_justify="left")
    for position, header in enumerate(headers(comparison.primary)):
        table.add_column(Text(header), justify="left" if position == 0 else "right", overflow="fold")
    for row in comparison.rows:
        difference = row.against(BASE)
        colour = _COLOURS.get(difference.verdict, "") if difference else ""
        table.add_row(*(Text(cell, style=colour if at == 3 else "") for at, cell in enumerate(cells(row))))
    return table


def print_table(comparison: Comparison, console: Console) -> None:
    """Print the table, the criteria, a verdict for each arm, and the notes; in a pipe, each on one line."""
    piped = not console.is_terminal
    for table in _tables(comparison):
        if piped:
            console.width = max(console.width, _width(console, table))
        console.print(table)
    if comparison.filters:
        console.print(Text(f"{comparison.filters}; corrections for several arms count these alone."), soft_wrap=piped)
    if others := other_tasks(comparison):
        console.print(Text(f"Other data sets in this database: {others}; --all-tasks shows all."), soft_wrap=piped)
    for line in comparison.verdicts:
        console.print(Text(line), soft_wrap=piped)
    for note in comparison.notes:
        console.print(Text(f"Note: {note}", style="dim"), soft_wrap=piped)


def other_tasks(comparison: Comparison) -> str:
    """Names of the tasks that the database has besides the one shown, with their titles; empty: none."""
    titles = {row.task: row.title for row in comparison.tasks if row.task != comparison.primary.task}
    return ", ".join(f"{name} ({title})" for name, title in titles.items())


def _tables(comparison: Comparison) -> list[Table]:
    found = [rich_table(comparison)]
    if comparison.criteria:
        found.append(_criteria_table(comparison))
    if comparison.power:
        found.append(_power_table(comparison))
    return found


def _criteria_table(comparison: Comparison) -> Table:
    table = Table(title=CRITERIA, title_justify="left")
    for position, header in enumerate(CRITERIA_HEADERS):
        table.add_column(header, justify="right" if position == 2 else "left", overflow="fold")
    for criterion in comparison.criteria:
        colour = _COLOURS.get(criterion.outcome, "")
        shown = criterion_cells(criterion)
        table.add_row(*(Text(cell, style=colour if at == 4 else "") for at, cell in enumerate(shown)))
    return table


def _power_table(comparison: Comparison) -> Table:
    """One line for each comparison: items needed for each size of difference."""
    table = Table(title=f"{POWER} (80% power)", title_justify="left")
    headers = ("Arm", "Against", "Items now", "Seeds now", *(f"{points} point{'s'[: points - 1]}" for points in POINTS))
    for position, header in enumerate(headers):
        table.add_column(header, justify="left" if position < 2 else "right", overflow="fold")
    lines: dict[tuple[str, str], list[str]] = {}
    for row in comparison.power:
        line = lines.setdefault((row.arm, row.against), [str(row.items_now), str(row.seeds_now)])
        line.append(_needed(row))
    for key, line in lines.items():
        table.add_row(*map(Text, (*key, *line)))
    return table


def _needed(row: PowerRow) -> str:
    if row.items is not None:
        return f"{row.items} items"
    return "more seeds and items" if row.seeds is None else f"{row.seeds} seeds"


def _width(console: Console, table: Table) -> int:
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    return max(NARROWEST, needed)


def svg(comparison: Comparison) -> str:
    """Return what the terminal shows as an SVG picture, for the README."""
    console = Console(record=True, width=NARROWEST, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.width = max(_width(console, table) for table in _tables(comparison))
    print_table(comparison, console)
    picture = console.export_svg(title="python -m evaluation.compare_all")
    # Rich asks a font server for its font; a local monospace one does, and the picture needs no network.
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
