"""The report on a terminal, on one screen or its brief sections; tables fit 100 columns."""

import re
from collections.abc import Iterable, Sequence
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text as Words

from evaluation.report.all_tasks import all_tasks
from evaluation.report.blocks import Block, Cell, Table, Text
from evaluation.report.comparison import Comparison
from evaluation.report.findings import certainty, headline, next_step, scoreboard
from evaluation.report.provenance import byline
from evaluation.report.sections import sections

WIDTH = 100
"""Columns of a pipe."""
_NAME = 22
"""Columns of the first cell of a line that are never broken."""
_COLOURS = {"good": "green", "bad": "red", "open": "yellow", "": ""}


def print_report(comparison: Comparison, console: Console) -> None:
    brief = sorted((section for section in sections(comparison) if section.brief), key=lambda section: section.brief)
    _print(console, [Text(byline(comparison)), *(block for section in brief for block in _short(section.blocks))])
    titles = {row.task: row.title for row in comparison.tasks if row.task != comparison.primary.task}
    if titles:
        others = ", ".join(f"{name} ({title})" for name, title in titles.items())
        _print(console, [Text(f"Other data sets in this database: {others}; --all-tasks shows all.")])


def print_screen(comparison: Comparison, console: Console) -> None:
    """The result on one screen: what was found, a line per arm, how sure it is, and where to read on."""
    if not comparison.trained:
        print_report(comparison, console)
        return
    closing = [certainty(comparison), next_step(comparison), "With --full the same command prints every table."]
    width = WIDTH if not console.is_terminal else min(console.width, WIDTH)
    opening = [f"{comparison.filters}."] * bool(comparison.filters) + headline(comparison)
    lines = [Text(line) for text in opening for line in wrap(text, width)]
    rest = [Text(line, "note") for text in closing if text for line in wrap(text, width)]
    _print(console, [*lines, scoreboard(comparison), *rest])


def print_tasks(comparison: Comparison, console: Console) -> None:
    filters = [f"{comparison.filters}; corrections for several arms count only these."] * bool(comparison.filters)
    notes = [Text(note, "note") for note in (*filters, *comparison.task_notes)]
    _print(console, [*_short(all_tasks(comparison)), *notes])


def _short(blocks: Sequence[Block]) -> list[Block]:
    """Tables, the story, and notes; another paragraph only where there is no table."""
    table = any(isinstance(block, Table) for block in blocks)
    return [block for block in blocks if not (isinstance(block, Text) and table and not block.style)]


def _print(console: Console, blocks: Iterable[Block]) -> None:
    piped = not console.is_terminal
    if piped:
        console.width = max(console.width, WIDTH)
    for block in blocks:
        if isinstance(block, Table):
            console.print(_grid(block, console))
        elif isinstance(block, Text):
            console.print(Words(block.text, style="dim" if block.style == "note" else ""), soft_wrap=piped)


def _grid(block: Table, console: Console) -> Grid:
    """A table that fits: cells are broken into ever shorter lines, between words and before bounds; none is cut."""
    columns = [at for at, header in enumerate(block.headers) if header not in block.page_only]
    for width in (1000, 40, 28, 20, 14, 10):
        title = Words(block.caption)
        grid = Grid(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for at in columns:
            header = Words(_broken(block.headers[at], width))
            grid.add_column(header, justify="left" if block.styles[at] else "right", overflow="fold")
        for row in block.rows:
            grid.add_row(*(_words(row[at], width if at else max(width, _NAME)) for at in columns))
        if Measurement.get(console, console.options.update(max_width=1000), grid).maximum <= console.width:
            break
    return grid


def _words(cell: Cell, width: int) -> Words:
    hint = f"\n{_broken(cell.hint, width)}" if cell.hint else ""
    return Words.assemble((_broken(cell.text, width), _COLOURS[cell.tone]), (hint, "dim"))


def _broken(text: str, width: int) -> str:
    joined = re.sub(r"\[\S+, \S+\]", lambda bounds: bounds[0].replace(" ", "\xa0"), text)
    lines = (wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in joined.split("\n"))
    return "\n".join(part for line in lines for part in line).replace("\xa0", " ")
