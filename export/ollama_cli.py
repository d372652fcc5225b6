"""`python -m export.ollama create|list|remove|verify`: exported models on an Ollama server; verify needs none."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from export.errors import ExportError
from export.llama_engine import LlamaCpp
from export.modelfile import ModelfileError
from export.ollama import list_models, register, remove, resolve_host, server_version
from export.ollama_client import OllamaUnavailable, full_name
from export.ollama_engine import OllamaServer
from export.serving import MODES, Mode, Served, find_served
from export.verify import verify as verify_model
from export.verify_table import show

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(help="models, e.g. pure_grit_model; none = all")]
Root = Annotated[Path, typer.Option("--gguf", help="folder of the export stage")]
ModeOption = Annotated[str, typer.Option(help="merged: one file a model; adapter: the base once, and small adapters")]
Host = Annotated[str, typer.Option(help="server; empty reads OLLAMA_HOST, then http://127.0.0.1:11434")]
GGUF = Path("gguf")


FACTS = Path("outputs/ollama")
"""What was registered: server, its version, hash of the exported file and digest on the server."""


def write_facts(served: Served, facts: dict[str, Any]) -> None:
    """One JSON file a model and mode; not beside the GGUF, which DVC watches."""
    FACTS.mkdir(parents=True, exist_ok=True)
    name = f"{served.name.replace(':', '-')}-{served.mode}.json"
    (FACTS / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (ExportError, ModelfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _mode(text: str, *more: str) -> Mode:
    for mode in MODES:
        if text == mode:
            return mode
    raise ExportError(f"--mode: expected one of {', '.join([*MODES, *more])}, got {text!r}")


@app.command()
def create(names: Names = None, gguf: Root = GGUF, mode: ModeOption = "merged", host: Host = "") -> None:
    """Upload and create models; what the server has already is left alone."""
    with _explained():
        for served in find_served(gguf, _mode(mode), names):
            made = register(host or None, served.name, served.gguf, served.spec, served.adapter, progress=print)
            facts = {**asdict(made), "mode": served.mode}
            write_facts(served, facts)
            print(
                f"{served.name}: {'created' if made.created else 'unchanged'}, {served.mode}, digest {made.digest[:19]}"
            )


@app.command(name="list")
def list_command(gguf: Root = GGUF, host: Host = "") -> None:
    """What is exported, and which of it the server has."""
    with _explained():
        url = resolve_host(host or None)
        version = server_version(url)
        if version is None:
            raise OllamaUnavailable(f"no Ollama answers at {url}; start it with `ollama serve`, or set OLLAMA_HOST")
        known = list_models(url)
        shown = Table("model", "arm", "seed", "on the server", title=f"Ollama {version} at {url}", title_justify="left")
        for served in find_served(gguf):
            digest = known.get(full_name(served.name))
            shown.add_row(served.name, served.arm, str(served.seed), digest[:19] if digest else "no")
        Console().print(shown)


@app.command(name="remove")
def remove_command(names: Names = None, gguf: Root = GGUF, host: Host = "") -> None:
    """Delete models of this project from the server; others stay."""
    with _explained():
        for served in find_served(gguf, names=names):
            gone = remove(host or None, served.name)
            print(f"{served.name}: {'removed' if gone else 'was not there'}")


@app.command()
def verify(
    names: Names = None,
    gguf: Root = GGUF,
    mode: Annotated[str, typer.Option(help="merged, adapter or both")] = "merged",
    backend: Annotated[str, typer.Option(help="ollama, llama_cpp (no server), or auto: Ollama if it runs")] = "auto",
    host: Host = "",
    prompts: Annotated[int, typer.Option(min=1, help="prompts a model")] = 20,
    least: Annotated[float, typer.Option(min=0, max=1, help="share of equal answers, where f16")] = 0.95,
) -> None:
    """Hold every model against Hugging Face's answers; exit code 1 where one differs."""
    with _explained():
        modes = MODES if mode == "both" else (_mode(mode, "both"),)
        engine = _backend(backend, host)
        models = find_served(gguf, names=names)
        if mode == "adapter":
            find_served(gguf, "adapter", names)  # says which of them can be served merged only
        if isinstance(engine, OllamaServer):
            _require_on_server(engine, models)
        rows = [row for served in models for row in verify_model(engine, served, modes, prompts)]
    show(rows)
    for row in rows:
        if row.first:
            print(f"{row.name} ({row.mode}): {row.first}")
    # A release that takes no adapters is no fault of the model, unless nothing at all could be checked.
    if any(row.problem(least) for row in rows) or all(row.unsupported for row in rows):
        raise SystemExit(1)


def _backend(text: str, host: str) -> OllamaServer | LlamaCpp:
    if text not in ("auto", "ollama", "llama_cpp"):
        raise ExportError(f"--backend: expected auto, ollama or llama_cpp, got {text!r}")
    if text == "llama_cpp" or (text == "auto" and not host and server_version() is None):
        return LlamaCpp()
    return OllamaServer(host or None)  # a host that is named is meant


def _require_on_server(server: OllamaServer, models: list[Served]) -> None:
    known = list_models(server.url)
    absent = [served.name for served in models if full_name(served.name) not in known]
    if absent:
        raise ExportError(
            f"expected {', '.join(absent)} on the server at {server.url}, it does not have them; run "
            "`python -m export.ollama create`"
        )
