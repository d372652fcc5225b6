"""The command that answers the question: which way of training was better, and by how much.

`python -m evaluation.compare_all` reads the database and prints one table. It loads no model and no
training library, so it answers at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from db.errors import DatabaseError, DatabaseMissingError
from evaluation.comparison import Comparison, compare, load_comparison
from evaluation.report import as_csv, as_json, as_markdown, print_table, svg, write_atomically, write_report
from evaluation.report_serving import print_serving

__all__ = ["Comparison", "compare", "load_comparison", "main", "write_report"]

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
    format: Annotated[Format, typer.Option(help="What to print.")] = Format.TABLE,
    report: Annotated[Path | None, typer.Option(help="Also write the Markdown report here.")] = None,
    svg_path: Annotated[Path | None, typer.Option("--svg", help="Also save the table as SVG here.")] = None,
) -> None:
    """Compare all arms that were scored.

    Exit codes: 0 done, 1 reading or writing failed, 2 there is nothing to compare yet.
    """
    try:
        comparison = load_comparison(db)
    except DatabaseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, DatabaseMissingError) else 1) from error
    if format is Format.TABLE:
        console = Console()
        print_table(comparison, console)
        print_serving(comparison, console)
    else:
        typer.echo(_TEXTS[format](comparison).rstrip("\n"))
    try:
        if report is not None:
            write_report(report, comparison)
        if svg_path is not None:
            write_atomically(svg_path, svg(comparison))
    except OSError as error:
        typer.echo(f"error: expected a place that can be written; came: {error}. Do: name another", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
