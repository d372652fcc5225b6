"""models/base/base.json: what the base model is, and whether it is still the same."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.config import ConfigError, PrepareBase
from pipelines.runinfo import key_of, read_json, sha256
from pipelines.stage import BASE
from trainers.settings import BaseReference

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_BIG = 64 * 2**20


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, or None where it is a hub id.

    Raises:
        ConfigError: neither a folder nor a hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"prepare_base.source: {source} is a folder without config.json, no model")
        return path
    if path.exists():
        raise ConfigError(f"prepare_base.source: expected a model folder, {source} is a file")
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise ConfigError(
            f"prepare_base.source: {source} does not exist. Expected `embedded`, a model folder, or a hub id (org/name)"
        )
    return None


def fingerprint(folder: Path) -> str:
    """Hash of a model folder: small files by content, large ones by name, size and modification time."""
    rows = []
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors", ".model")):
        stat = file.stat()
        rows.append([file.name, stat.st_size, stat.st_mtime_ns if stat.st_size > _BIG else sha256(file)])
    return key_of(rows)


def hub_model(source: str, revision: str | None) -> dict[str, Any]:
    """What a hub says of a model: its commit.

    Raises:
        ConfigError: neither a local folder nor reachable.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        info = HfApi().model_info(source, revision=revision, timeout=20)
        return {"revision": info.sha}
    except Exception as error:
        # Offline, but downloaded earlier: good enough, and said so.
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if isinstance(cached, str):
            return {"revision": Path(cached).parent.name}
        raise ConfigError(
            f"prepare_base.source: {source!r} is no folder here, and the model hub did not give it "
            f"({type(error).__name__}). Check the name and the network, or set a local model folder"
        ) from error


def reference_for(section: PrepareBase) -> dict[str, Any]:
    """Content of base.json for a base that is referenced, not copied.

    Raises:
        ConfigError: it does not exist, or 16-bit weights to merge into are missing.
    """
    folder = local_folder(section.source)
    if folder is not None:
        quantized = "quantization_config" in read_json(folder / "config.json")
        content: dict[str, Any] = {
            "kind": "local",
            "location": str(folder),
            "revision": None,
            "fingerprint": fingerprint(folder),
        }
    else:
        content = {"kind": "hub", "location": section.source, **hub_model(section.source, section.revision)}
        content["fingerprint"] = key_of(content)
        quantized = bool(re.search(r"bnb-4bit|gptq|awq|int4", section.source, re.IGNORECASE))
    if section.merge_source is not None and local_folder(section.merge_source) is None:
        hub_model(section.merge_source, None)
    if quantized and section.merge_source is None:
        raise ConfigError(
            f"prepare_base.merge_source: missing; {section.source} is quantized, and adapters are merged into 16-bit "
            "weights of the same model. Name them (folder or hub id)"
        )
    return {**content, "merge_location": section.merge_source, "trust_remote_code": section.trust_remote_code}


def load_reference(folder: Path = BASE) -> tuple[BaseReference, str]:
    """The base that stage prepare_base left, and its fingerprint.

    Raises:
        ConfigError: the stage has not run, or a local base changed since.
    """
    file = folder / "base.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; run `dvc repro prepare_base`")
    content = read_json(file)
    location = str(folder) if content["kind"] == "embedded" else content["location"]
    if content["kind"] == "local":
        path = Path(location)
        now = fingerprint(path) if path.is_dir() else "nothing"
        if now != content["fingerprint"]:
            raise ConfigError(
                f"the base model in {location} is not what it was when prepare_base ran; run "
                "`dvc repro --force prepare_base` to take it as it is now"
            )
    reference = BaseReference(
        location=location,
        revision=content["revision"],
        merge_location=content["merge_location"],
        trust_remote_code=content["trust_remote_code"],
    )
    return reference, content["fingerprint"]


def describe(reference: BaseReference) -> dict[str, Any]:
    """For run.json."""
    return asdict(reference)
