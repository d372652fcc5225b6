"""Commands for the database: `python -m db.cli ingest|rebuild|check|export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from sqlalchemy import func, select

from db.check import faults
from db.columns import Base
from db.errors import DatabaseError, IngestError
from db.export import export as write_files
from db.ingest import ingest as ingest_results
from db.ingest import rebuild as rebuild_database
from db.session import open_session

app = typer.Typer(add_completion=False, help="Fill, rebuild, check and export the database of results.")

Db = Annotated[str, typer.Option("--db", help="File or SQLAlchemy URL.")]
Root = Annotated[Path, typer.Option("--root", help="Folder with scores/, gguf/ and adapters/.")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; may be repeated.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; may be repeated.")]
DEFAULT_DB = "outputs/centralized.db"


class Form(StrEnum):
    """Kinds of files that an export writes."""

    csv = "csv"
    parquet = "parquet"


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(2 if isinstance(error, IngestError) else 1) from error


@app.command()
def ingest(db: Db = DEFAULT_DB, root: Root = Path(), arm: Arms = None, seed: Seeds = None) -> None:
    """Read the results into the database; the same files again change nothing.

    Exit codes: 0 done, 1 the database cannot be written, 2 the result files cannot be read.
    """
    try:
        typer.echo(ingest_results(root, db, arm or None, seed or None))
    except (IngestError, DatabaseError) as error:
        _fail(error)


@app.command()
def rebuild(
    db: Db = DEFAULT_DB,
    root: Root = Path(),
    arm: Arms = None,
    seed: Seeds = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Also where all runs of a task would go, since its files are gone.")
    ] = False,
) -> None:
    """Make the database anew from the files on disk and swap it in; superseded runs go.

    The files of one task replace those of another, so runs of former tasks stand in the database alone. Where a rebuild
    would lose them it stops and names them; --yes lets them go. Exit codes as `ingest`.
    """
    try:
        typer.echo(rebuild_database(root, db, arm or None, seed or None, lose_tasks=yes))
    except (IngestError, DatabaseError) as error:
        _fail(error)


@app.command()
def check(db: Db = DEFAULT_DB) -> None:
    """Check version, integrity, links and that nothing is lost; count the rows. Exit codes: 0 sound, 1 not."""
    try:
        with open_session(db) as session:
            found = faults(session)
            for table in Base.metadata.sorted_tables:
                typer.echo(f"{table.name:16} {session.scalar(select(func.count()).select_from(table)):>8} rows")
    except DatabaseError as error:
        _fail(error)
    for fault in found:
        typer.echo(f"fault: {fault}", err=True)
    if found:
        typer.echo(
            "Do: run `python -m db.cli rebuild`; the JSON files are the truth. A fault that comes back stands in them: "
            "remove the named run's folder under scores/ and run `dvc repro`.",
            err=True,
        )
        raise typer.Exit(1)
    typer.echo("sound")


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="Folder for the files; made when absent.")],
    db: Db = DEFAULT_DB,
    form: Annotated[Form, typer.Option("--format", help="Of the files.")] = Form.csv,
    table: Annotated[
        list[str] | None, typer.Option("--table", help="Only this table or view; may be repeated.")
    ] = None,
) -> None:
    """Write every table and view to a file of its own. Exit codes: 0 done, 1 not; then old files stand."""
    try:
        for name, rows in write_files(db, out, form.value, table or None).items():
            typer.echo(f"{out / name}.{form.value}: {rows} rows")
    except DatabaseError as error:
        _fail(error)


if __name__ == "__main__":
    app()
