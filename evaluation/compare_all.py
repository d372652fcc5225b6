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

__all__ = ["Choice", "ChoiceError", "Comparison", "compare", "load_comparison", "main", "write_report"]

app = typer.Typer(add_completion=False)


class Format(StrEnum):
    """How the comparison is printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    MD = "md"


_TEXTS = {Format.JSON: as_json, Format.CSV: as_csv, Format.MD: as_markdown}


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
    report: Annotated[Path | None, typer.Option(help="Also write the Markdown report here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the HTML report, one file, here.")] = None,
    svg_path: Annotated[Path | None, typer.Option("--svg", help="Also save the table as SVG here.")] = None,
) -> None:
    """Compare all arms that were scored.

    Exit codes: 0 done, 1 reading or writing failed, 2 there is nothing to compare yet, or no run has the name asked
    for.
    """
    try:
        comparison = load_comparison(db, Choice(arm or (), seed or (), backend or ()), baseline)
        if format is Format.TABLE:
            console = Console()
            print_table(comparison, console)
            print_serving(comparison, console)
        else:
            typer.echo(_TEXTS[format](comparison).rstrip("\n"))
        _write(comparison, db, report=report, html=html, picture=svg_path)
    except (DatabaseError, ChoiceError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, DatabaseMissingError | ChoiceError) else 1) from error


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
