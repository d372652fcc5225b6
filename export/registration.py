"""Registering what the export stage left, with a file that says what became of it on the server."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from export.errors import ExportError
from export.ollama import AdaptersUnsupportedError, Registered, register
from export.ollama_stored import stored_model
from export.serving import MODES, Served


def register_served(host: str | None, served: Served, progress: Callable[[str], None] | None = None) -> Registered:
    """`register` a model in its mode, and write down what the server made of it.

    Raises:
        OllamaUnavailable, AdaptersUnsupportedError, OllamaError, ExportError: see `export.ollama.register`; or what was
            made cannot be written down.
    """
    made = register(host, served.name, served.gguf, served.spec, served.adapter, progress)
    _write_facts(served, made)
    return made


def keep_registered(host: str | None, served: Served, progress: Callable[[str], None] | None = None) -> Served:
    """`register_served` in the mode in which the server has the model, merged where it has none.

    A release that takes adapters no more gets it merged.

    Returns:
        The form in which the server has it now.

    Args:
        host: As in `export.ollama.resolve_host`.
        served: In mode merged.
        progress: Called with one line per step.

    Raises:
        OllamaUnavailable, OllamaError, ExportError: see `register_served`.
    """
    stored = stored_model(host, served.name)
    form = served.adapter_form() if stored is not None and stored.mode == "adapter" else None
    if form is not None:
        try:
            register_served(host, form, progress)
            return form
        except AdaptersUnsupportedError:
            pass
    register_served(host, served, progress)
    return served


def facts_file(served: Served) -> Path:
    """Where it is written down: outputs/ollama beside the export stage's folder, which DVC watches."""
    root = served.folder.parents[1].resolve()
    return root.parent / "outputs" / "ollama" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', served.name)}-{served.mode}.json"


def _write_facts(served: Served, made: Registered) -> None:
    file = facts_file(served)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}.partial")
        fresh.write_text(json.dumps({**asdict(made), "mode": served.mode}, indent=2) + "\n", encoding="utf-8")
        fresh.replace(file)
        for mode in MODES:
            if mode != served.mode:  # the server has it in one mode
                facts_file(replace(served, mode=mode)).unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(
            f"{file}: the model {served.name!r} is registered, which could not be written down "
            f"({error.strerror}); make room or give the rights, then run the same command again"
        ) from error
