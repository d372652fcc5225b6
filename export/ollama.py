"""`python -m export.ollama create|list|remove|verify`: exported models on an Ollama server; verify needs none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Column, Table

from export import ExportError
from export.engines.llama_cpp import open_in_process
from export.engines.ollama_engine import (
    full_name,
    list_models,
    remove,
    require_server,
    resolve_host,
    server_version,
    stored_model,
)
from export.proof import problems, show
from export.proof import verify as verify_model
from export.register import open_on_server, register, remove_temporary
from export.served import BASE, MODES, Mode, Served, find_served

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="models, e.g. pure_grit_model; none = all")]
Root = Annotated[Path, typer.Option("--gguf", help="folder of the export stage")]
ModeOption = Annotated[Mode, typer.Option(help="merged: one file a model; adapter: the base once, and small adapters")]
Host = Annotated[str, typer.Option(help="server; empty reads OLLAMA_HOST, then http://127.0.0.1:11434")]
Backend = Literal["auto", "ollama", "llama_cpp"]
GGUF = Path("gguf")
LEAST = 0.95  # share of equal answers of a model in 16 bits


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


@app.command()
def create(names: Names = None, gguf: Root = GGUF, mode: ModeOption = "merged", host: Host = "") -> None:
    """Upload and create models; those that the server already has are left alone."""
    with _explained():
        for served in find_served(gguf, mode, names):
            registered = register(host or None, served)
            outcome = "created" if registered.created else "unchanged"
            print(f"{served.name}: {outcome}, {served.mode}, digest {registered.digest[:19]}")


@app.command(name="list")
def list_command(gguf: Root = GGUF, host: Host = "") -> None:
    """What is exported, and which of it the server has."""
    with _explained():
        url = resolve_host(host or None)
        version = require_server(url)
        digests = list_models(url)
        whole = [Column(name, overflow="fold") for name in ("model", "arm", "seed", "on the server")]  # no name is cut
        table = Table(*whole, title=f"Ollama {version} at {url}", title_justify="left")
        for served in find_served(gguf):
            digest = digests.get(full_name(served.name))
            table.add_row(served.name, served.arm, str(served.seed), digest[:19] if digest else "no")
        Console().print(table)


@app.command(name="remove")
def remove_command(names: Names = None, gguf: Root = GGUF, host: Host = "") -> None:
    """Delete models of this project from the server, and what killed checks left there; others stay."""
    with _explained():
        for left in remove_temporary(host or None):
            print(f"{left}: removed, left by a check that was killed")
        for served in find_served(gguf, names=names):
            gone = remove(host or None, served.name)
            print(f"{served.name}: {'removed' if gone else 'was not there'}")


@app.command()
def verify(
    names: Names = None,
    gguf: Root = GGUF,
    mode: Annotated[Literal[Mode, "both", "auto"], typer.Option(help="auto: as the server has it")] = "auto",
    backend: Annotated[Backend, typer.Option(help="llama_cpp: no server; auto: Ollama if it runs")] = "auto",
    host: Host = "",
    prompts: Annotated[int, typer.Option(min=1, help="prompts a model")] = 20,
) -> None:
    """Compare every model with Hugging Face's answers; exit code 1 where one differs."""
    with _explained():
        modes = None if mode == "auto" else MODES if mode == "both" else (mode,)
        url = _server(backend, host)
        models = find_served(gguf, names=names)
        if mode == "adapter":
            find_served(gguf, "adapter", names)  # says which of them can be served merged only
        digests = list_models(url) if url is not None else {}
        absent = [served.name for served in models if full_name(served.name) not in digests]
        if url is not None and absent:
            raise ExportError(
                f"expected {', '.join(absent)} on the server at {url}, it does not have them; run "
                "`python -m export.ollama create`"
            )
        opener = open_in_process if url is None else partial(open_on_server, url)
        rows = [r for served in models for r in verify_model(opener, served, modes or _own(url, served), prompts)]
    show(rows)
    # A release that takes no adapters is no fault of the model, unless nothing at all could be checked.
    if problems(rows, LEAST) or all(row.unsupported for row in rows):
        raise SystemExit(1)


def _own(url: str | None, served: Served) -> tuple[Mode]:
    """The mode in which the server has a model; merged without a server.

    Raises ExportError: the server has it with an adapter, and the folder has none.
    """
    stored = stored_model(url, served.name) if url else None
    if stored is None or stored.mode == "merged":
        return ("merged",)
    if served.arm == BASE or served.adapter_form() is None:
        raise ExportError(
            f"{served.name}: the server has it as base and adapter, {served.folder} can be served merged only; run "
            "`python -m export.ollama create`"
        )
    return ("adapter",)


def _server(backend: Backend, host: str) -> str | None:
    """URL of the server that is to be checked; None: llama.cpp in this process."""
    if backend == "llama_cpp" or (backend == "auto" and not host and server_version() is None):
        return None
    require_server(host or None)  # a host that is named is meant
    return resolve_host(host or None)


if __name__ == "__main__":
    app()
