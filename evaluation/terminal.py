"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def print_grid(
    console: Console,
    title: str,
    headers: Sequence[str],
    lines: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
) -> None:
    """Print a table; where it does not fit, cells wrap and are never cut, and in a pipe each line is whole.

    Args:
        console: Where to.
        title: Above it.
        headers: Of the columns.
        lines: Their cells.
        left: Positions of columns that are set left, all others right.
    """
    table = Table(title=title, title_justify="left")  # all else as Text: a name in brackets is no markup
    for position, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if position in left else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        console.width = max(console.width, needed)
    console.print(table)
