"""`python -m export.ollama create|list|remove|verify`: exported models on an Ollama server."""

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
from export.modelfile import ModelfileError
from export.ollama import list_models, register, remove, resolve_host, server_version
from export.ollama_client import OllamaUnavailable, full_name
from export.serving import MODES, Mode, Served, find_served
from export.verify import verify as verify_model

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


def _mode(text: str) -> Mode:
    for mode in MODES:
        if text == mode:
            return mode
    raise ExportError(f"--mode: expected one of {', '.join(MODES)}, got {text!r}")


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
        table = Table("model", "arm", "seed", "on the server", title=f"Ollama {version} at {url}", title_justify="left")
        for served in find_served(gguf):
            digest = known.get(full_name(served.name))
            table.add_row(served.name, served.arm, str(served.seed), digest[:19] if digest else "no")
        Console().print(table)


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
    mode: ModeOption = "merged",
    host: Host = "",
    prompts: Annotated[int, typer.Option(min=1, help="prompts a model")] = 20,
    least: Annotated[float, typer.Option(min=0, max=1, help="share of equal answers, where f16")] = 0.95,
) -> None:
    """Hold every model against Hugging Face's answers; exit code 1 where one differs."""
    with _explained():
        models = find_served(gguf, _mode(mode), names)
        rows = [verify_model(host or None, served, prompts) for served in models]
    table = Table("model", "mode", "prompts", "rendered", "tokens", "answers", title="Equal to training")
    for row in rows:
        shares = [f"{100 * share:.0f}%" for share in (row.rendered, row.counted, row.answered)]
        table.add_row(row.name, row.mode, str(row.prompts), *shares)
    Console().print(table)
    for row in rows:
        if row.first:
            print(f"{row.name} ({row.mode}): {row.first}")
    for row, served in zip(rows, models, strict=True):
        # A quantized model answers otherwise by design: how often is shown, and in parity.json held against f16.
        wanted = least if served.facts.get("quantization", "f16") == "f16" else 0.0
        if row.rendered < 1 or row.counted < 1 or row.answered < wanted:
            raise SystemExit(1)
