"""Models on an Ollama server: created, kept up to date, borrowed for a check, removed.

Creation is skipped when the server still has the model made from the same files and settings. A small local record per
host and name keeps a fingerprint of the inputs and the digest under which the server then listed the model. That digest
covers every layer (weights, adapter, template, parameters, license), so a model that was replaced, edited or removed no
longer matches and is created again; a lost record costs one needless creation. A fingerprint in the model itself, say
in its license, would be worse: a model made FROM ours inherits the license with other weights or another template.
"""

import hashlib
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from db.files import sha256, write_text
from export import ExportError, MergedOnlyError
from export.engines.engine import EngineError
from export.engines.llama_cpp import Vocabulary
from export.engines.ollama_engine import (
    LOAD_S,
    OllamaEngine,
    Retry,
    connect,
    full_name,
    http_options,
    list_models,
    remove,
    require_server,
    resolve_host,
    stored_model,
)
from export.gguf import scaled_copy
from export.modelfile import Serving
from export.served import ADAPTER_GGUF, SERVED_GGUF, Served

if TYPE_CHECKING:
    from ollama import Client

TEMPORARY = "grit-verify-"
"""Prefix of the names of copies that a check makes and removes."""


@dataclass(frozen=True)
class Registered:
    digest: str  # the server's, of the whole model (its manifest)
    created: bool  # False when the server had it already


def register(host: str | None, served: Served, records: Path | None = None) -> Registered:
    """Make the model on the server in its mode, unless the server already has just this one.

    `records` is the folder of the local records, None: ~/.cache/grit-pipeline/ollama (below XDG_CACHE_HOME if set).

    Raises EngineError: no server, a broken connection, a refusal, a creation that did not end in "success", or other
    settings stored than were given. MergedOnlyError: the server takes no adapters.
    ExportError: a file is missing, or settings that no Modelfile can say.
    """
    url, name, serving = resolve_host(host), served.name, served.serving
    serving.check()
    files = {SERVED_GGUF: served.gguf} | ({ADAPTER_GGUF: served.adapter} if served.adapter else {})
    for path in files.values():
        if not path.is_file():
            raise ExportError(f"expected a GGUF file at {path}, found none; run the export stage first")
    require_server(url)
    hashes = {label: sha256(path) for label, path in files.items()}
    inputs = [hashes, serving.go_template, serving.parameters, serving.license, serving.system]
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    record = _record(url, name, records)
    digest = list_models(url).get(full_name(name))
    if digest is not None and record.is_file() and record.read_bytes() == f"{fingerprint} {digest}".encode():
        return Registered(digest, created=False)

    with connect(url, LOAD_S) as client:
        for label, path in files.items():
            _upload(client, url, path, hashes[label])
        _create(client, name, serving, hashes)
    stored = stored_model(url, name)
    if stored is None:
        raise EngineError(f"Ollama at {url} reported success, but does not list {name!r}; see its log")
    if problems := stored.differences(serving):  # /api/create checks none of them
        raise EngineError(f"Ollama at {url} stored other settings for {name!r}: " + "; ".join(problems))
    write_text(record, f"{fingerprint} {stored.digest}")
    return Registered(stored.digest, created=True)


def _record(url: str, name: str, records: Path | None) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = records or Path(cache).expanduser() / "grit-pipeline" / "ollama"
    return folder / hashlib.sha256(f"{url} {full_name(name)}".encode()).hexdigest()[:24]


def _upload(client: "Client", url: str, path: Path, sha256: str) -> None:
    import httpx

    if httpx.head(f"{url}/api/blobs/sha256:{sha256}", timeout=60, **http_options(url)).status_code == 200:
        return
    print(f"{path}: uploading {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    sent = client.create_blob(path)
    if sent != f"sha256:{sha256}":
        raise EngineError(f"{path} changed while it was uploaded (sha256 {sha256}, then {sent}); export it again")


def _create(client: "Client", name: str, serving: Serving, hashes: dict[str, str]) -> None:
    digests = {label: f"sha256:{sha}" for label, sha in hashes.items()}
    status = None
    for step in client.create(
        name,
        files={SERVED_GGUF: digests[SERVED_GGUF]},
        adapters={k: v for k, v in digests.items() if k == ADAPTER_GGUF} or None,
        template=serving.go_template,
        parameters=serving.parameters,
        license=serving.license,
        system=serving.system,
        stream=True,
    ):
        status = step.status or status
    if status != "success":
        raise EngineError(f"expected the creation of {name!r} to end in 'success', it ended in {status!r}")


def keep_registered(host: str | None, served: Served) -> Served:
    """`register` in the mode in which the server has the model, merged where it has none; the form it has now.

    A release that no longer takes adapters gets it merged. `served` is in mode merged.
    """
    stored = stored_model(host, served.name)
    form = served.adapter_form() if stored is not None and stored.mode == "adapter" else None
    if form is not None:
        with suppress(MergedOnlyError):
            register(host, form)
            return form
    register(host, served)
    return served


# --- models that a check borrows ----------------------------------------------------------------------------------


@contextmanager
def open_on_server(host: str | None, served: Served, scale: float = 1.0) -> Iterator[OllamaEngine]:
    """An exported model as the server has it, whoever made it; else a temporary copy under its own name.

    The copy is for a model that the server has in the other mode or not at all, and for controls with another adapter
    scale. Raises MergedOnlyError: the server takes no adapters. EngineError: it cannot be asked.
    """
    url = resolve_host(host)
    stored = stored_model(url, served.name)
    if scale == 1.0 and stored is not None and stored.mode == served.mode:
        with _engine(url, served) as engine:
            yield engine
        return
    has = "does not have this model" if stored is None else f"has this model in mode {stored.mode}"
    copy = replace(served, name=f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if served.adapter is not None and scale != 1.0:
                copy = replace(copy, adapter=Path(temporary) / ADAPTER_GGUF)
                scaled_copy(served.adapter, Path(temporary) / ADAPTER_GGUF, scale)
            register(url, copy, Path(temporary))
        with _engine(url, copy) as engine:
            engine.note = f"asked of a temporary copy in mode {served.mode}, for the server {has}"
            yield engine
    except BaseException:
        with suppress(EngineError):  # which would hide what really went wrong
            remove(url, copy.name)
        raise
    remove(url, copy.name)


def _engine(url: str, served: Served) -> OllamaEngine:
    stored = stored_model(url, served.name)
    if stored is None:
        raise EngineError(f"Ollama at {url} had {served.name!r} and does not have it now; was it removed meanwhile?")
    context = served.serving.num_ctx
    engine = OllamaEngine(url, served.name, context, retry=Retry(patience_s=0), mode=stored.mode, stored=stored)
    with Vocabulary(served.gguf) as vocabulary:
        engine.precision = vocabulary.precision  # creating keeps it
    return engine


def remove_temporary(host: str | None) -> list[str]:
    """Delete the copies that checks made and did not remove, for they were killed; returns their names.

    Raises EngineError: the server cannot be asked.
    """
    return [name for name in list_models(host) if name.startswith(TEMPORARY) and remove(host, name)]
