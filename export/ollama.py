"""Registering an exported model with an Ollama server.

Creating is skipped when the server still has what was made from the same files and settings. What was made is
kept in a small local record per host and name: a fingerprint of the inputs beside the digest under which the
server listed the result. That digest covers every layer (weights, adapter, template, parameters, license), so
a model that was replaced, edited or removed no longer matches and is made anew; a lost record costs one
needless creation. A fingerprint in the model itself, say in its license, would be worse: a model made FROM
ours inherits the license with other weights or another template below it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.files import sha256
from export.modelfile import ModelfileSpec
from export.ollama_client import (
    LOAD_S,
    OllamaError,
    OllamaUnavailable,
    connect,
    full_name,
    http_options,
    list_models,
    remove,
    render_prompt,
    resolve_host,
    server_version,
)
from export.ollama_stored import Stored, parse_parameters, stored_model

if TYPE_CHECKING:
    from ollama import Client

__all__ = [
    "AdaptersUnsupportedError",
    "OllamaError",
    "OllamaUnavailable",
    "Registered",
    "Stored",
    "connect",
    "list_models",
    "parse_parameters",
    "register",
    "remove",
    "render_prompt",
    "resolve_host",
    "server_version",
    "stored_model",
]


class AdaptersUnsupportedError(OllamaError):
    """This release of Ollama takes no LoRA adapters; merged models can be served."""


@dataclass(frozen=True)
class Registered:
    """A model on a server.

    Attributes:
        host: URL of the server.
        name: Name as given, without a tag.
        digest: The server's digest of the whole model (its manifest).
        gguf_sha256: Hash of the exported file.
        adapter_sha256: Hash of the exported adapter, if there is one.
        stored_sha256: Hash of the weights as the server stores them; differs from `gguf_sha256`, for creating
            rewrites the file. None where the server does not say.
        server_version: Version of the server that made it.
        created: False when the server had it already.
    """

    host: str
    name: str
    digest: str
    gguf_sha256: str
    adapter_sha256: str | None
    stored_sha256: str | None
    server_version: str
    created: bool


def _record_path(url: str, name: str, records: Path | None) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = records or Path(cache).expanduser() / "grit-pipeline" / "ollama"
    return folder / f"{hashlib.sha256(f'{url} {full_name(name)}'.encode()).hexdigest()[:24]}.json"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def register(
    host: str | None,
    name: str,
    gguf: Path,
    spec: ModelfileSpec,
    adapter: Path | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    records: Path | None = None,
) -> Registered:
    """Makes the model on the server, unless it already has just this one.

    Args:
        host: As in `resolve_host`.
        name: The model's name, e.g. "pure_grit_model".
        gguf: The merged model, or the base when `adapter` is given.
        spec: Template and parameters; its paths are those of the Modelfile and are not used here.
        adapter: GGUF adapter.
        progress: Called with one line per step.
        records: Folder of the local records; None means ~/.cache/grit-pipeline/ollama
            (below XDG_CACHE_HOME where that is set).

    Raises:
        OllamaUnavailable: no server, or the connection broke.
        AdaptersUnsupportedError: the server takes no adapters.
        OllamaError: the server refused, did not end in "success", or stored other settings than it was given.
        ExportError: a file is missing.
    """
    from ollama import ResponseError

    say = progress or (lambda line: None)
    url = resolve_host(host)
    files = {"model.gguf": gguf} | ({"adapter.gguf": adapter} if adapter else {})
    for path in files.values():
        if not path.is_file():
            raise ExportError(f"expected a GGUF file at {path}, found none; run the export stage first")
    version = server_version(url)
    if version is None:
        raise OllamaUnavailable(f"no Ollama answers at {url}; start it with `ollama serve`, or set OLLAMA_HOST")

    hashes = {label: sha256(path) for label, path in files.items()}
    inputs = [hashes, spec.template, spec.parameters, spec.license, spec.system]
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    record_path = _record_path(url, name, records)
    record = _read_record(record_path)
    digest = list_models(url).get(full_name(name))
    if digest is not None and record.get("fingerprint") == fingerprint and record.get("digest") == digest:
        say(f"{name}: the server has it already")
        return Registered(**{**record["registered"], "server_version": version, "created": False})

    with connect(url, LOAD_S) as client:
        for label, path in files.items():
            _upload(client, url, path, hashes[label], say)
        try:
            _create(client, name, spec, hashes, say)
        except ResponseError as error:
            if "adapters are no longer supported" not in error.error:
                raise
            raise AdaptersUnsupportedError(
                f"Ollama {version} at {url} answered {error.status_code}: {error.error}; releases from 0.34.1 on take "
                "no LoRA adapters: register the merged GGUF without one"
            ) from error
    stored = stored_model(url, name)
    if stored is None:
        raise OllamaError(f"Ollama at {url} reported success, but does not list {name!r}; see its log")
    if problems := stored.differences(spec):  # /api/create checks none of them
        raise OllamaError(f"Ollama at {url} stored other settings for {name!r}: " + "; ".join(problems))
    own, adapters = hashes["model.gguf"], hashes.get("adapter.gguf")
    made = Registered(url, name, stored.digest, own, adapters, stored.stored_sha256, version, True)
    record_path.parent.mkdir(parents=True, exist_ok=True)
    fresh = record_path.with_suffix(f".{os.getpid()}")
    fresh.write_text(
        json.dumps({"fingerprint": fingerprint, "digest": made.digest, "registered": asdict(made)}, indent=1)
    )
    fresh.replace(record_path)
    return made


def _upload(client: "Client", url: str, path: Path, sha256: str, say: Callable[[str], None]) -> None:
    import httpx

    if httpx.head(f"{url}/api/blobs/sha256:{sha256}", timeout=60, **http_options(url)).status_code == 200:
        say(f"{path.name}: uploaded before")
        return
    say(f"{path.name}: uploading {path.stat().st_size / 1e6:.1f} MB")
    sent = client.create_blob(path)
    if sent != f"sha256:{sha256}":
        raise OllamaError(f"{path} changed while it was uploaded (sha256 {sha256}, then {sent}); export it again")


def _create(
    client: "Client", name: str, spec: ModelfileSpec, hashes: dict[str, str], say: Callable[[str], None]
) -> None:
    digests = {label: f"sha256:{sha}" for label, sha in hashes.items()}
    status = None
    for step in client.create(
        name,
        files={"model.gguf": digests["model.gguf"]},
        adapters={k: v for k, v in digests.items() if k == "adapter.gguf"} or None,
        template=spec.template,
        parameters=spec.parameters,
        license=spec.license,
        system=spec.system,
        stream=True,
    ):
        status = step.status or status
        say(f"{name}: {step.status}")
    if status != "success":
        raise OllamaError(f"expected the creation of {name!r} to end in 'success', it ended in {status!r}")


if __name__ == "__main__":
    from export.ollama_cli import app

    app()
