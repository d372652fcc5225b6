"""GGUF adapter files: what scale they hold, whether they change anything, and copies with another scale."""

import shutil
from pathlib import Path
from typing import Any

from export.errors import ExportError

ALPHA = "adapter.lora.alpha"


def _open(adapter: Path, mode: str = "r") -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(adapter, mode)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ExportError(f"{adapter}: expected a GGUF adapter, could not read it ({error}); export again") from error


def _alpha(reader: Any, adapter: Path) -> Any:
    """The one float32 of the field, as a view into the file."""
    field = reader.get_field(ALPHA)
    if field is None:
        raise ExportError(f"{adapter}: expected {ALPHA}, found none; is this a GGUF adapter? Export again")
    return field.parts[field.data[0]]


def scale_of(adapter: Path) -> tuple[float, int]:
    """α and the largest rank r; llama.cpp scales B·A by α/r of each tensor.

    Raises:
        ExportError: no GGUF adapter.
    """
    reader = _open(adapter)
    ranks = [int(min(t.shape)) for t in reader.tensors if t.name.endswith(".lora_a")]
    if not ranks:
        raise ExportError(f"{adapter}: expected tensors *.lora_a, found none; export again")
    return float(_alpha(reader, adapter)[0]), max(ranks)


def changes_nothing(adapter: Path) -> bool:
    """Whether every B (or every A) is zero, so that B·A is.

    Raises:
        ExportError: no GGUF adapter.
    """
    tensors = _open(adapter).tensors
    return any(all(not t.data.any() for t in tensors if t.name.endswith(end)) for end in (".lora_a", ".lora_b"))


def scaled_copy(adapter: Path, out: Path, factor: float) -> None:
    """A copy whose B·A counts `factor` times as much: α is multiplied, the tensors stay.

    Args:
        adapter: GGUF adapter.
        out: Written to.
        factor: Not 0 (of α = 0 llama.cpp makes the scale 1).

    Raises:
        ExportError: no GGUF adapter, or a factor of 0.
    """
    if factor == 0:
        raise ExportError("expected a factor other than 0, got 0: llama.cpp reads alpha 0 as scale 1")
    shutil.copyfile(adapter, out)
    alpha = _alpha(_open(out, "r+"), out)
    alpha[0] *= factor
    alpha.flush()
