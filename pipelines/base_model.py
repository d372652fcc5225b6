"""models/base/base.json: what the base model is, and whether it is still the same."""

import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from db.files import key_of, read_json, sha256
from pipelines.params import ConfigError, Share
from pipelines.stage import BASE, BASE_ARM, adapter_dir
from trainers import TrainingError, gguf_file
from trainers.embedded_base import SPECIAL, EmbeddedSettings
from trainers.encode import control_tokens
from trainers.models import hub_reason, load_base_model, load_tokenizer
from trainers.settings import BaseReference, TrainSettings

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_LARGE = 64 * 2**20  # bytes
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")


class PrepareBase(EmbeddedSettings):
    """Section prepare_base: where the base comes from, and the shape of the embedded one."""

    source: str
    revision: str | None
    merge_source: str | None
    trust_remote_code: bool
    vary: Share
    min_tasks_above_80: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _fits_the_source(self) -> Self:
        if gguf_file.is_gguf(self.source):
            extra = {"vision": self.vision, "merge_source": self.merge_source, "revision": self.revision}
            lines = [f"{key}: expected null with a GGUF file, which is read as text, got {value!r}"
                     for key, value in extra.items() if value is not None]  # fmt: skip
            if lines:
                raise ValueError("\n".join(lines))
        if self.vision is not None and self.merge_source is not None:
            raise ValueError(f"merge_source: expected null beside vision, got {self.merge_source!r}; adapters of a "
                             "vision-language model are not merged")  # fmt: skip
        return self


def local_folder(source: str, key: str = "source") -> Path | None:
    """The folder that `source` names, or None for a hub id or a GGUF file."""
    if gguf_file.is_gguf(source):
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"prepare_base.{key}: {source} is not a model folder: it has no config.json")
        return path
    if path.exists():
        raise ConfigError(f"prepare_base.{key}: expected a model folder, {source} is a file")
    if source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise ConfigError(
            f"prepare_base.{key}: {source} does not exist. Expected `embedded`, a model folder, a hub id (org/name), a "
            "GGUF file, package:NAME/FILE.gguf or ollama:NAME"
        )
    return None


def fingerprint(folder: Path) -> str:
    """Hash of a model folder: small files by content, large ones by name, size and modification time."""
    rows = []
    for file in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES):
        stat = file.stat()
        rows.append([file.name, stat.st_size, stat.st_mtime_ns if stat.st_size > _LARGE else sha256(file)])
    return key_of(rows)


def hub_model(source: str, revision: str | None, key: str = "source") -> tuple[str, dict[str, Any]]:
    """Commit and config.json of a model on the hub; offline, of the copy in HF_HOME."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    try:
        if not constants.HF_HUB_OFFLINE:
            revision = HfApi().model_info(source, revision=revision, timeout=20).sha
        config = Path(hf_hub_download(source, "config.json", revision=revision))
    except Exception as error:
        reason = hub_reason(error, source, key) or (
            f"{type(error).__name__}: {error}. Check the name and the network, or set a local model folder"
        )
        raise ConfigError(
            f"prepare_base.{key}: {source!r} is not a folder, and could not be read from the model hub: {reason}"
        ) from error
    return config.parent.name, read_json(config)


def reference_for(section: PrepareBase) -> dict[str, Any]:
    """Content of base.json for a base that is referenced, not copied."""

    def look_up(source: str, revision: str | None, key: str) -> tuple[str, str | None, str, dict[str, Any]]:
        folder = local_folder(source, key)
        if folder is not None:
            return "local", None, fingerprint(folder), read_json(folder / "config.json")
        commit, config = hub_model(source, revision, key)
        return "hub", commit, key_of([source, commit]), config

    kind, revision, mark, config = look_up(section.source, section.revision, "source")
    if "quantization_config" in config and section.vision is not None:
        raise ConfigError(
            f"prepare_base.source: {section.source} is quantized; training with pictures needs a model with 16-bit "
            "weights (folder or hub id)"
        )
    if "quantization_config" in config and section.merge_source is None:
        raise ConfigError(
            f"prepare_base.merge_source: missing; {section.source} is quantized, and adapters are merged into 16-bit "
            "weights of the same model. Name them (folder or hub id)"
        )
    merge_revision, marks = None, {"fingerprint": mark}
    if section.merge_source is not None:
        _, merge_revision, merge_mark, _ = look_up(section.merge_source, None, "merge_source")
        marks = {"fingerprint": key_of([mark, merge_mark]), "own_fingerprint": mark}
    location = str(local_folder(section.source) or section.source)
    reference = BaseReference(location, revision, section.merge_source, merge_revision, section.trust_remote_code)
    return {"kind": kind, "pictures": section.vision is not None, **marks, **asdict(reference)}


def control_tokens_of(section: PrepareBase) -> list[str]:
    """The texts that this base reads as control tokens, before stage prepare_base has run."""
    if section.source == "embedded":
        return list(SPECIAL.values())
    if gguf_file.is_gguf(section.source):
        return gguf_file.control_tokens(gguf_file.locate(section.source))
    location = str(local_folder(section.source) or section.source)
    return control_tokens(
        load_tokenizer(BaseReference(location, section.revision, None, None, section.trust_remote_code))
    )


def base_has_changed() -> bool:
    """Whether the folder or GGUF file of a base is no longer what stage prepare_base read."""
    file = BASE / "base.json"
    content = read_json(file) if file.is_file() else {}
    try:
        if content.get("kind") == "gguf":
            return gguf_file.mark(gguf_file.locate(content["source"])) != content["source_mark"]
    except TrainingError:
        return False  # the copy is all that is needed
    try:
        load_reference()
    except ConfigError:
        return (BASE / "base.json").is_file()
    return False


def load_reference(folder: Path = BASE) -> tuple[BaseReference, str]:
    """The base of stage prepare_base and its fingerprint; ConfigError if a local base has changed since."""
    file = folder / "base.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; run `dvc repro prepare_base`")
    content = read_json(file)
    location = str(folder) if content["kind"] in ("embedded", "gguf") else content["location"]
    if content["kind"] == "local":
        path = Path(location).expanduser()
        now = fingerprint(path) if path.is_dir() else "nothing"
        if now != content.get("own_fingerprint", content["fingerprint"]):
            raise ConfigError(
                f"the base model in {location} has changed since prepare_base ran; to use it as it is now, run "
                "`dvc repro --force prepare_base`"
            )
    settings = {field.name: content[field.name] for field in fields(BaseReference)}
    return BaseReference(**{**settings, "location": location}), content["fingerprint"]


def resolved(train: TrainSettings) -> TrainSettings:
    """The settings with `precision: auto` replaced by what stage prepare_base found to be faster."""
    if train.precision != "auto":
        return train
    return train.model_copy(update={"precision": read_json(BASE / "base.json").get("precision", "fp32")})


def load_model(train: TrainSettings, arm: str, seed: int) -> tuple[Any, Any, str]:
    """Model in eval mode with the arm's adapter, its tokenizer, and the base's fingerprint."""
    reference, base_fingerprint = load_reference()
    # Checkpointing would only warn, because nothing is trained here.
    model = load_base_model(reference, resolved(train).model_copy(update={"gradient_checkpointing": False}))
    if arm != BASE_ARM:
        from peft import PeftModel

        folder = adapter_dir(arm, seed)
        try:
            model = PeftModel.from_pretrained(model, str(folder))
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{folder}: PEFT cannot load this adapter: {error}; run `dvc repro train`") from error
    return model.eval(), load_tokenizer(reference), base_fingerprint
