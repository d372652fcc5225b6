"""The shape of a base model: from its settings, its folder, the hub, or profiles/models/ for those that profiles name.

A file there holds `models` (hub ids), `parameters` (their number, as published) and `config` (what config.json says of
the shape), so that a run can be planned without network and without access to a gated model.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.base_model import local_folder
from pipelines.schema import PrepareBase
from trainers.embedded_base import configuration
from trainers.models import hub_reason

SHIPPED = Path(__file__).resolve().parents[2] / "profiles" / "models"
_SECONDS = 5.0


class PlanError(ValueError):
    """A run that cannot be planned."""


@dataclass(frozen=True)
class Base:
    """A base model's shape.

    Attributes:
        config: transformers' configuration, without what it says of quantization.
        origin: Where it is from, in words.
        in_4_bit: Whether the weights lie there in 4 bit.
        to_download: Whether the weights come from the hub and are not in its cache yet.
        merged_to_download: The same of other weights, to merge into.
    """

    config: Any
    origin: str
    in_4_bit: bool = False
    to_download: bool = False
    merged_to_download: bool = False


def shipped(source: str) -> dict[str, Any] | None:
    """Entry of profiles/models/ that names a hub id, or None."""
    for file in sorted(SHIPPED.glob("*.json")):
        entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if source in entry["models"]:
            return entry
    return None


def from_dict(content: dict[str, Any]) -> Any:
    """Make transformers' configuration from the content of a config.json.

    Raises:
        PlanError: no such model type.
    """
    from transformers import AutoConfig

    values = copy.deepcopy(content)
    kind = values.pop("model_type", None)
    values.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(
            f"config.json: expected a model type that transformers knows, got {kind!r} ({error})"
        ) from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        PlanError: no JSON, or another value than an object.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise PlanError(f"{where}: expected a model's configuration: {error}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{where}: expected a model's configuration, an object with a model_type, got {text[:40]!r}")
    return content


def _from_hub(source: str, revision: str | None) -> dict[str, Any]:
    """config.json of a hub model: downloaded earlier, or asked for once, without the client's retries."""
    from huggingface_hub import get_session, get_token, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        if isinstance(cached, str):
            text = Path(cached).read_text(encoding="utf-8")
        else:
            url = hf_hub_url(source, "config.json", revision=revision)
            token = get_token()
            headers = {"authorization": f"Bearer {token}"} if token else {}
            answer = get_session().get(url, headers=headers, timeout=_SECONDS, follow_redirects=True)
            hf_raise_for_status(answer)
            text = answer.text
    except Exception as error:
        reason = hub_reason(error, source) or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403) and "log in" not in reason:
            reason = (
                f"it answers {error.response.status_code}; log in with `hf auth login`, or set HF_TOKEN to a token "
                "that may read this model"
            )
        raise PlanError(
            f"prepare_base.source: the shape of {source!r} is not known here and the model hub did not give its "
            f"config.json: {reason}. To plan, that file in a folder is enough, with prepare_base.source set to the "
            "folder"
        ) from error
    return _parsed(text, f"config.json of {source} on the hub")


def downloaded(source: str, revision: str | None = None) -> bool:
    """Whether all files of a hub model's weights lie in its cache: one file, or those that an index names."""
    from huggingface_hub import try_to_load_from_cache

    def cached(name: str) -> str | None:
        found = try_to_load_from_cache(source, name, revision=revision)
        return found if isinstance(found, str) else None

    def shards(index: str | None) -> set[str]:
        content = {"weight_map": {}} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))
        return set(content["weight_map"].values())

    try:
        return any(
            cached(name) or ((found := shards(cached(f"{name}.index.json"))) and all(map(cached, found)))
            for name in ("model.safetensors", "pytorch_model.bin")
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # an index that is none, no hub id
        return False


def base_of(section: PrepareBase) -> Base:
    """The base that section prepare_base names.

    Raises:
        PlanError: its shape cannot be found.
        ConfigError: a folder without config.json, or neither folder nor hub id.
    """
    if section.source == "embedded":
        return Base(configuration(section, section.vocab_size), "prepare_base (embedded)")
    other = section.merge_source
    merged = other is not None and local_folder(other, "merge_source") is None and not downloaded(other)
    folder = local_folder(section.source)
    if folder is not None:
        file = folder / "config.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise PlanError(f"{file}: expected a model's configuration: {error}") from error
        content = _parsed(text, str(file))
        quantized = "quantization_config" in content
        return Base(from_dict(content), f"{folder}/config.json", quantized, merged_to_download=merged)
    missing = not downloaded(section.source, section.revision)
    entry = shipped(section.source)
    if entry is not None:
        quantized = section.source.endswith("-bnb-4bit")
        return Base(from_dict(entry["config"]), "profiles/models", quantized, missing, merged)
    content = _from_hub(section.source, section.revision)
    return Base(from_dict(content), "config.json on the hub", "quantization_config" in content, missing, merged)
