"""What the export stage left to be served: one entry a model, in either of two modes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.errors import ExportError
from export.modelfile import ModelfileSpec, spec_of

BASE = "base"
Mode = Literal["merged", "adapter"]
MODES: tuple[Mode, ...] = ("merged", "adapter")


@dataclass(frozen=True)
class Served:
    """One model.

    Attributes:
        name: In Ollama; seeds after the first are tags of the same name.
        arm: Of the training run, or "base".
        seed: Of the training run.
        mode: "merged": one file; "adapter": the base's file and a small adapter.
        folder: Where the export stage wrote.
        gguf: The merged model, or the base.
        adapter: In mode "adapter", except for the base itself.
        facts: serving.json: template, stop, num_ctx, …
    """

    name: str
    arm: str
    seed: int
    mode: Mode
    folder: Path
    gguf: Path
    adapter: Path | None
    facts: dict[str, Any]

    @property
    def spec(self) -> ModelfileSpec:
        """Template and parameters."""
        return spec_of(self.facts, "./adapter.gguf" if self.adapter else None)


def find_served(root: Path, mode: Mode = "merged", names: list[str] | None = None) -> list[Served]:
    """Everything below the export stage's folder, base first.

    Args:
        root: Holds <arm>/<seed>/serving.json.
        mode: How arms are served; the base has one file in both.
        names: Only these models; empty or None: all.

    Raises:
        ExportError: nothing is exported there, a name is not among it, or a file is missing.
    """
    places = sorted(root.glob("*/*/serving.json"), key=lambda p: (p.parts[-3] != BASE, p.parts[-3], _seed(p)))
    if not places:
        raise ExportError(f"expected exported models in {root}/<arm>/<seed>/, found none; run `dvc repro export`")
    first: dict[str, int] = {}
    found = []
    for place in places:
        folder, arm, seed = place.parent, place.parts[-3], _seed(place)
        name = f"{arm}_model" if seed == first.setdefault(arm, seed) else f"{arm}_model:seed{seed}"
        facts = json.loads(place.read_text(encoding="utf-8"))
        adapted = mode == "adapter" and arm != BASE
        gguf = base_file(root) if adapted else folder / "model.gguf"
        adapter = folder / "adapter.gguf" if adapted else None
        found.append(Served(facts.get("model_name", name), arm, seed, mode, folder, gguf, adapter, facts))
    if names:
        known = {served.name: served for served in found}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ExportError(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
        found = [known[name] for name in names]
    for served in found:
        if served.adapter is not None and not served.adapter.is_file() and served.gguf.is_file():
            raise ExportError(
                f"{served.folder}: this adapter can be served merged only (run.json says why, only_merged)"
            )
    missing = [str(f) for s in found for f in (s.gguf, s.adapter) if f is not None and not f.is_file()]
    if missing:
        raise ExportError(f"expected GGUF files, found none at {', '.join(missing)}; run `dvc repro export`")
    return found


def base_file(root: Path) -> Path:
    """The base's f16 file, which adapters are made for.

    Raises:
        ExportError: not exported.
    """
    folder = root / BASE / "0"
    file = next((folder / n for n in ("model-f16.gguf", "model.gguf") if (folder / n).is_file()), None)
    if file is None:
        raise ExportError(f"{folder}: expected the base's GGUF, which adapters need; run `dvc repro export_base`")
    return file


def _seed(place: Path) -> int:
    name = place.parts[-2]
    return int(name) if name.isdigit() else 0
