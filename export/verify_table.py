"""Verification's rows as a table."""

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from export.verdict import Checked


def table(rows: Sequence[Checked]) -> Table:
    """One row a model, mode and engine; shares of prompts."""
    engines = ", ".join(dict.fromkeys(f"{row.backend} {row.backend_version}" for row in rows))
    columns = ("model", "mode", "engine", "prompts", "rendered", "tokens", "answers", "= merged", "control noticed")
    made = Table(*columns, title=f"Equal to training: {engines}", title_justify="left")
    for row in rows:
        if row.unsupported:
            made.add_row(row.name, row.mode, row.backend, "not supported")
            continue
        shares = (row.rendered, row.counted, row.answered, row.equal_to_merged)
        noticed = {True: "yes", False: "NO", None: ""}[row.perturbed_noticed]
        made.add_row(row.name, row.mode, row.backend, str(row.prompts), *map(_percent, shares), noticed)
    return made


def show(rows: Sequence[Checked]) -> None:
    """Print the table, and below it what is to be said of single rows.

    It is wide enough where the output is a file, in whose 80 columns the engines' names would be cut.
    """
    console = Console()
    Console(width=None if console.is_terminal or "COLUMNS" in os.environ else 120).print(table(rows))
    for row in rows:
        stored = row.differences and f"the server stored other settings than were exported: {row.differences}"
        for remark in filter(None, (row.first, stored, row.note)):
            print(f"{row.name} ({row.mode}): {remark}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
