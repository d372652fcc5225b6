"""The command that answers the question: which way of training was better, and by how much.

`python -m evaluation.compare_all` reads the database and prints one table. It loads no model and no
training library, so it answers at once.
"""

from __future__ import annotations

import gc
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from db.errors import DatabaseError, DatabaseMissingError
from evaluation.comparison import Choice, ChoiceError, Comparison, compare, load_comparison
from evaluation.differences import BASELINE
from evaluation.report import as_csv, as_json, as_markdown, print_table, svg, write_atomically, write_report
from evaluation.report_serving import print_serving
from evaluation.report_tasks import print_tasks, tasks_as_csv, tasks_as_json, tasks_as_markdown

__all__ = ["Choice", "ChoiceError", "Comparison", "compare", "load_comparison", "main", "write_report"]

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """How the comparison is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


_TEXTS = {Format.JSON: as_json, Format.CSV: as_csv, Format.MD: as_markdown}
_TEXTS_OF_TASKS = {Format.JSON: tasks_as_json, Format.CSV: tasks_as_csv, Format.MD: tasks_as_markdown}


@app.command()
def main(
    db: Annotated[str, typer.Option(help="File or SQLAlchemy URL.")] = "outputs/centralized.db",
    format: Annotated[
        Format,
        typer.Option(
            help="What to print. csv has one line for each arm; the success criteria are its columns criterion_…"
        ),
    ] = Format.TABLE,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Only this arm, the base and the baseline; may be repeated. Corrections count these alone."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed of the trained arms; may be repeated.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only runs scored by this backend; may be repeated.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="Arm to compare with besides the base.", show_default=BASELINE),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task to compare; of one that is not on the disk, the latest run of each arm and seed.",
            show_default="the task on the disk",
        ),
    ] = None,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Print one table of all tasks instead, with one line for each arm.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Also write the Markdown report here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the HTML report, one file, here.")] = None,
    svg_path: Annotated[Path | None, typer.Option("--svg", help="Also save the table as SVG here.")] = None,
) -> None:
    """Compare all arms that were scored on a task.

    Exit codes: 0 done, 1 reading or writing failed, 2 there is nothing to compare yet, or no run has the name asked
    for.
    """
    try:
        if all_tasks and task is not None:
            raise ChoiceError(f"expected one of --task and --all-tasks; came: both. Do: leave out --task {task}")
        comparison = load_comparison(db, Choice(arm or (), seed or (), backend or (), task), baseline)
        _show(comparison, format, all_tasks=all_tasks)
        _write(comparison, db, report=report, html=html, picture=svg_path)
    except (DatabaseError, ChoiceError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, DatabaseMissingError | ChoiceError) else 1) from error


def _show(comparison: Comparison, format: Format, *, all_tasks: bool) -> None:
    console = Console()
    if all_tasks:  # beside the table: it is the same in every format
        if comparison.filters:
            typer.echo(f"{comparison.filters}; corrections for several arms count these alone.", err=True)
        for note in comparison.task_notes:
            typer.echo(f"Note: {note}", err=True)
    if format is not Format.TABLE:
        text = _TEXTS_OF_TASKS[format](comparison.tasks) if all_tasks else _TEXTS[format](comparison)
        typer.echo(text.rstrip("\n"))
    elif all_tasks:
        print_tasks(comparison.tasks, console)
    else:
        print_table(comparison, console)
        print_serving(comparison, console)


def _write(comparison: Comparison, db: str, *, report: Path | None, html: Path | None, picture: Path | None) -> None:
    try:
        if report is not None:
            write_report(report, comparison)
        if picture is not None:
            write_atomically(picture, svg(comparison))
        if html is not None:
            from evaluation.page import write_page  # charts and templates: a second, for those who want it

            write_page(html, db, comparison)
    except OSError as error:
        typer.echo(f"error: expected a place that can be written; came: {error}. Do: name another", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    gc.disable()  # thousands of runs are a million small objects without cycles, searched for cycles again and again
    app()
