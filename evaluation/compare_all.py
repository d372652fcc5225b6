"""The command that answers the question: which way of training was better, and by how much.

`python -m evaluation.compare_all` reads the database and prints it. It loads no model and no training library, so it
answers at once.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from db.errors import DatabaseError, DatabaseMissingError
from db.queries import Choice
from evaluation.report.arms import BASELINE
from evaluation.report.comparison import ChoiceError, Report, load_report
from evaluation.report.data import as_csv, as_json, tasks_as_csv

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


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
    backend: Annotated[list[str] | None, typer.Option(help="Only runs scored by it; may be repeated.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Arm to compare with besides the base.", show_default=BASELINE)
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
) -> None:
    """Compare all arms that were scored on a task.

    Exit codes: 0 done, 1 reading or writing failed, 2 nothing to compare yet, or no run of the name asked for.
    """
    try:
        if all_tasks and task is not None:
            raise ChoiceError(f"expected one of --task and --all-tasks; came: both. Do: leave out --task {task}")
        detail = format is Format.MD or report is not None or html is not None
        found = load_report(db, Choice(arm or (), seed or (), backend or (), task), baseline, detail=detail)
        _show(found, format, all_tasks=all_tasks)
        if report or html:
            _write(found, markdown=report, html=html)
    except (DatabaseError, ChoiceError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, DatabaseMissingError | ChoiceError) else 1) from error


def _show(report: Report, format: Format, *, all_tasks: bool) -> None:
    comparison = report.comparison
    if all_tasks:  # beside the table: it is the same in every format
        if comparison.filters:
            typer.echo(f"{comparison.filters}; corrections for several arms count these alone.", err=True)
        for note in comparison.task_notes:
            typer.echo(f"Note: {note}", err=True)
    if format is Format.JSON:
        typer.echo(as_json(comparison.tasks if all_tasks else comparison))
    elif format is Format.CSV:
        typer.echo((tasks_as_csv(comparison.tasks) if all_tasks else as_csv(comparison)).rstrip("\n"))
    elif format is Format.MD:
        from evaluation.report.markdown import as_markdown, tasks_as_markdown

        typer.echo((tasks_as_markdown if all_tasks else as_markdown)(report).rstrip("\n"))
    else:
        from evaluation.report.terminal import print_report, print_tasks

        if all_tasks:
            print_tasks(comparison, Console())
        else:
            print_report(report, Console())


def _write(report: Report, *, markdown: Path | None, html: Path | None) -> None:
    from db.files import OutputError  # these take a second, which only those wait for who want a file
    from evaluation.report.html import write_page
    from evaluation.report.markdown import write_markdown

    try:
        if markdown is not None:
            write_markdown(markdown, report)
        if html is not None:
            write_page(html, report)
    except (OSError, OutputError) as error:
        typer.echo(f"error: expected a place that can be written; came: {error}. Do: name another", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
