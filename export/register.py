"""Models on an Ollama server, merged, for it takes no LoRA adapters from release 0.34.1 on.

Creation is skipped when the server still has the model made from the same files and settings. A small local record per
host and name keeps a fingerprint of the inputs and the digest under which the server then listed the model. That digest
covers every layer (weights, template, parameters, license), so a model that was replaced, edited or removed no
longer matches and is created again; a lost record costs one needless creation. A fingerprint in the model itself, say
in its license, would be worse: a model made FROM ours inherits the license with other weights or another template.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from db.files import sha256, write_text
from export import ExportError
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
    require_server,
    resolve_host,
    stored_model,
)
from export.modelfile import Serving
from export.served import SERVED_GGUF, Served

if TYPE_CHECKING:
    from ollama import Client


@dataclass(frozen=True)
class Registered:
    digest: str  # the server's, of the whole model (its manifest)
    created: bool  # False when the server had it already


def register(host: str | None, served: Served, records: Path | None = None) -> Registered:
    """Make the merged model on the server, unless the server already has just this one.

    `records` is the folder of the local records, None: ~/.cache/grit-pipeline/ollama (below XDG_CACHE_HOME if set).

    Raises EngineError: no server, a broken connection, a refusal, a creation that did not end in "success", or other
    settings stored than were given. ExportError: the file is missing, or settings that no Modelfile can say.
    """
    url, name, serving = resolve_host(host), served.name, served.serving
    serving.check()
    if not served.gguf.is_file():
        raise ExportError(f"expected a GGUF file at {served.gguf}, found none; run the export stage first")
    require_server(url)
    weights = sha256(served.gguf)
    inputs = [weights, serving.go_template, serving.parameters, serving.license, serving.system]
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    record = _record(url, name, records)
    digest = list_models(url).get(full_name(name))
    if digest is not None and record.is_file() and record.read_bytes() == f"{fingerprint} {digest}".encode():
        return Registered(digest, created=False)

    with connect(url, LOAD_S) as client:
        _upload(client, url, served.gguf, weights)
        _create(client, name, serving, weights)
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


def _create(client: "Client", name: str, serving: Serving, sha256: str) -> None:
    status = None
    for step in client.create(
        name,
        files={SERVED_GGUF: f"sha256:{sha256}"},
        template=serving.go_template,
        parameters=serving.parameters,
        license=serving.license,
        system=serving.system,
        stream=True,
    ):
        status = step.status or status
    if status != "success":
        raise EngineError(f"expected the creation of {name!r} to end in 'success', it ended in {status!r}")


@contextmanager
def open_on_server(host: str | None, served: Served) -> Iterator[OllamaEngine]:
    """An exported model as the server has it, whoever created it. Raises EngineError: it cannot be asked."""
    url = resolve_host(host)
    stored = stored_model(url, served.name)
    if stored is None:
        raise EngineError(
            f"expected {served.name!r} on the server at {url}, found none; run `python -m export.ollama create`"
        )
    engine = OllamaEngine(url, served.name, served.serving.num_ctx, retry=Retry(patience_s=0), stored=stored)
    with engine, Vocabulary(served.gguf) as vocabulary:
        engine.precision = vocabulary.precision  # creating keeps it
        yield engine
