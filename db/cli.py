"""Commands for the database: `python -m db.cli ingest|rebuild|export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from db.dump import export as write_files
from db.errors import DatabaseError, FileError, OutputError
from db.ingest import ingest as ingest_results
from db.ingest import rebuild as rebuild_database

app = typer.Typer(add_completion=False, help="Fill, rebuild and export the database of results.")

Db = Annotated[str, typer.Option("--db", help="File or SQLAlchemy URL.")]
Root = Annotated[Path, typer.Option("--root", help="The project's folder, with scores/, gguf/, adapters/ and runs/.")]
DEFAULT_DB = "outputs/centralized.db"


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (DatabaseError, OutputError, FileError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, FileError | OSError) else 1) from error


@app.command()
def ingest(db: Db = DEFAULT_DB, root: Root = Path()) -> None:
    """Archive the results of the working copy in runs/ and rebuild the database.

    Exit codes: 0 done, 1 the database cannot be written, 2 the result files cannot be read.
    """
    with _exit_codes():
        typer.echo(ingest_results(root, db))


@app.command()
def rebuild(db: Db = DEFAULT_DB, root: Root = Path()) -> None:
    """Rebuild the database from runs/, including earlier tasks and settings. Exit codes as for `ingest`."""
    with _exit_codes():
        typer.echo(rebuild_database(root, db))


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="Folder for the files; created if missing.")],
    db: Db = DEFAULT_DB,
    form: Annotated[Literal["csv", "parquet"], typer.Option("--format", help="Of the files.")] = "csv",
) -> None:
    """Write each table and view to a separate file. Exit codes: 0 done, 1 failed, and the old files are unchanged."""
    with _exit_codes():
        for name, rows in write_files(db, out, form).items():
            typer.echo(f"{out / name}.{form}: {rows} rows")


if __name__ == "__main__":
    app()
