"""Commands for the database: `python -m db.cli ingest|rebuild|check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from db.columns import Base
from db.errors import DatabaseError, IngestError
from db.ingest import ingest as ingest_results
from db.ingest import rebuild as rebuild_database
from db.session import open_session

app = typer.Typer(add_completion=False, help="Fill, rebuild and check the database of results.")

Db = Annotated[str, typer.Option("--db", help="File or SQLAlchemy URL.")]
Root = Annotated[Path, typer.Option("--root", help="Folder with scores/, gguf/ and adapters/.")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; may be repeated.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; may be repeated.")]
DEFAULT_DB = "outputs/centralized.db"


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
def rebuild(db: Db = DEFAULT_DB, root: Root = Path(), arm: Arms = None, seed: Seeds = None) -> None:
    """Make the database anew from the files and swap it in; superseded runs go. Exit codes as `ingest`."""
    try:
        typer.echo(rebuild_database(root, db, arm or None, seed or None))
    except (IngestError, DatabaseError) as error:
        _fail(error)


@app.command()
def check(db: Db = DEFAULT_DB) -> None:
    """Check version, integrity and links, and count the rows. Exit codes: 0 sound, 1 not."""
    try:
        with open_session(db) as session:
            faults = _faults(session)
            for table in Base.metadata.sorted_tables:
                typer.echo(f"{table.name:16} {session.scalar(select(func.count()).select_from(table)):>8} rows")
    except DatabaseError as error:
        _fail(error)
    for fault in faults:
        typer.echo(f"fault: {fault}", err=True)
    if faults:
        typer.echo("Do: run `python -m db.cli rebuild`; the JSON files are the truth.", err=True)
        raise typer.Exit(1)
    typer.echo("sound")


def _faults(session: Session) -> list[str]:
    """Other databases than SQLite keep their own integrity."""
    if session.get_bind().dialect.name != "sqlite":
        return []
    lines = [str(row[0]) for row in session.execute(text("PRAGMA integrity_check"))]
    found = [line for line in lines if line != "ok"]
    links = session.execute(text("PRAGMA foreign_key_check"))
    return found + [f"row {row[1]} of {row[0]} points to a missing {row[2]}" for row in links]


if __name__ == "__main__":
    app()
