"""The command that answers the question: which way of training was better, and by how much.

`python -m evaluation.compare_all` reads the database and prints it. It loads no model and no training library, so it
answers at once.
"""

import os
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from db.errors import DatabaseError
from db.runs import Choice
from evaluation.report.arms import BASELINE
from evaluation.report.comparison import ChoiceError, load_comparison
from evaluation.report.data import as_csv, as_json

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
        typer.Option(help="What to print. csv has one line per arm, with success criteria in columns criterion_…"),
    ] = Format.TABLE,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Only this arm, base and baseline; repeatable. Corrections count only the arms shown."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this seed of the trained arms; repeatable.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Arm to compare with besides the base.", show_default=BASELINE)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task to compare; if it is not on disk, the latest run of each arm and seed.",
            show_default="the task on disk",
        ),
    ] = None,
    all_tasks: Annotated[
        bool, typer.Option("--all-tasks", help="Print one table of all tasks instead, with one line per arm.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Print every table, not one screen.")] = False,
) -> None:
    """Compare all arms that were scored on a task.

    Exit codes: 0 done, 1 reading failed, 2 nothing to compare yet, or no run of that name.
    """
    try:
        if all_tasks and (task is not None or format is not Format.TABLE):
            raise ChoiceError(
                "expected --all-tasks alone, got --task or --format too. JSON has all tasks under `tasks`"
            )
        chosen = Choice(arm or (), seed or (), task)
        comparison = load_comparison(db, chosen, baseline, detail=format is Format.MD)
    except (DatabaseError, ChoiceError) as error:
        typer.echo(f"error: {error}", err=True)
        nothing = isinstance(error, ChoiceError) or error.missing
        raise typer.Exit(2 if nothing else 1) from error
    if format is Format.JSON:
        typer.echo(as_json(comparison))
    elif format is Format.CSV:
        typer.echo(as_csv(comparison).rstrip("\n"))
    elif format is Format.MD:
        from evaluation.report.markdown import as_markdown

        typer.echo(as_markdown(comparison).rstrip("\n"))
    else:
        from evaluation.report.terminal import print_report, print_screen, print_tasks

        console, width = Console(), 160 if full or all_tasks else 100
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=width)  # rich would cut at 80
        (print_tasks if all_tasks else print_report if full else print_screen)(comparison, console)


if __name__ == "__main__":
    app()
