"""What the export stage left to be served: one entry a model, in either of two modes."""

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from export.errors import ExportError
from export.modelfile import ModelfileError, ModelfileSpec, parse_modelfile, render_modelfile, spec_of

BASE = "base"
FACTS = "serving.json"
REFERENCE = "reference.jsonl"
"""Hugging Face's own tokens and greedy answers, beside each GGUF."""
MODELFILE = "Modelfile"
ADAPTER_MODELFILE = "Modelfile.adapter"
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

    @property
    def mode_on_server(self) -> Mode:
        """What the server has: the base is one file in both modes."""
        return "adapter" if self.adapter else "merged"

    @property
    def modelfile(self) -> Path:
        """Its Modelfile; where there is none for mode "adapter", the merged one, which has the same texts."""
        own = self.folder / ADAPTER_MODELFILE
        return own if self.adapter and own.is_file() else self.folder / MODELFILE

    def written_spec(self) -> ModelfileSpec:
        """Template and parameters as the Modelfile has them, which is what `ollama create -f` reads.

        Raises:
            ExportError: no Modelfile, a damaged one, or one that is about other files.
        """
        try:
            spec, gguf, adapter = read_modelfile(self.modelfile)
            if adapter or not self.adapter:
                meant = [f and os.path.normpath(f) for f in (gguf, adapter)]
                wanted = [f and os.path.normpath(f) for f in (self.gguf, self.adapter)]
                if meant != wanted:
                    raise ModelfileError(f"expected it to name {wanted}, it names {meant}")
            return spec
        except FileNotFoundError:
            raise ExportError(f"{self.modelfile}: no such file; run `dvc repro export`, which writes it") from None
        except ModelfileError as error:
            raise ExportError(f"{self.modelfile}: {error}; export again") from error

    def adapter_form(self) -> "Served | None":
        """The same model as base and adapter; None for the base, and for what can only be served merged.

        Raises:
            ExportError: the base is not exported.
        """
        adapter = self.folder / "adapter.gguf"
        if self.arm == BASE or not adapter.is_file():
            return None
        return replace(self, mode="adapter", gguf=base_file(self.folder.parents[1]), adapter=adapter)


def served_in(folder: Path, name: str | None = None, mode: Mode = "merged") -> Served:
    """One model, by the folder in which the export stage put it.

    Args:
        folder: <root>/<arm>/<seed>.
        name: Under which it is served; None: the one in serving.json.
        mode: How it is served; the base has one file in both.

    Raises:
        ExportError: nothing is exported there, serving.json is damaged, or a file is missing.
    """
    served = _served(folder, read_facts(folder / FACTS), name or f"{folder.parent.name}_model", mode)
    served = served if name is None else replace(served, name=name)
    _check_files([served])
    return served


def find_served(root: Path, mode: Mode = "merged", names: list[str] | None = None) -> list[Served]:
    """Everything below the export stage's folder, base first.

    Args:
        root: Holds <arm>/<seed>/serving.json.
        mode: How arms are served; the base has one file in both.
        names: Only these models; empty or None: all.

    Raises:
        ExportError: nothing is exported there, a name is not among it or in two places, a serving.json is damaged, or
            a file is missing. What is wrong with models that are not asked for does not count.
    """
    # A seed is a plain number; "0.123.partial" is what a killed export left.
    folders = [place.parent for place in root.glob(f"*/*/{FACTS}") if re.fullmatch("[0-9]+", place.parent.name)]
    folders.sort(key=lambda f: (f.parent.name != BASE, f.parent.name, int(f.name)))
    if not folders:
        raise ExportError(f"expected exported models in {root}/<arm>/<seed>/, found none; run `dvc repro export`")
    first: dict[str, str] = {}
    found: list[Served] = []
    damaged: list[str] = []
    for folder in folders:
        arm, seed = folder.parent.name, folder.name
        name = f"{arm}_model" if seed == first.setdefault(arm, seed) else f"{arm}_model:seed{seed}"
        try:
            found.append(_served(folder, read_facts(folder / FACTS), name, mode))
        except ExportError as error:
            damaged.append(str(error))
    found = _named(found, names, damaged) if names else found
    if damaged and not names:
        raise ExportError("; ".join(damaged))
    places: dict[str, Path] = {}
    for served in found:
        if (other := places.setdefault(served.name, served.folder)) != served.folder:
            raise ExportError(
                f"expected one folder for each model, {other} and {served.folder} both hold {served.name!r}; remove "
                "the one that is not in `matrix` of params.yaml any more, or export again"
            )
    _check_files(found)
    return found


def read_facts(file: Path) -> dict[str, Any]:
    """serving.json: template, stop words, context and more.

    Raises:
        ExportError: missing or damaged; names the file and the key.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{file}: no such file; run `dvc repro export`, which writes it") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: expected JSON ({error}); export again") from error
    if not isinstance(facts, dict):
        raise ExportError(f"{file}: expected a JSON object, got {type(facts).__name__}; export again")
    for key, kind in _TYPES.items():
        if key not in facts and key == "model_name":
            continue
        if key not in facts:
            raise ExportError(f"{file}: expected the key {key!r}, found {', '.join(facts) or 'none'}; export again")
        if not isinstance(facts[key], kind):
            raise ExportError(f"{file}: {key}: expected {kind.__name__}, got {facts[key]!r}; export again")
    return facts


def _served(folder: Path, facts: dict[str, Any], name: str, mode: Mode) -> Served:
    """The model of a folder; `name`: where its facts have none."""
    arm = folder.parent.name
    adapted = mode == "adapter" and arm != BASE
    gguf = base_file(folder.parents[1]) if adapted else folder / "model.gguf"
    adapter = folder / "adapter.gguf" if adapted else None
    return Served(facts.get("model_name", name), arm, int(folder.name), mode, folder, gguf, adapter, facts)


def _named(found: list[Served], names: list[str], damaged: list[str]) -> list[Served]:
    """Those of the given names, in that order; all that share one."""
    known = [served.name for served in found]
    unknown = [name for name in names if name not in known]
    if unknown:
        also = f" ({'; '.join(damaged)})" if damaged else ""
        raise ExportError(f"expected names among {', '.join(known) or 'none'}, got {', '.join(unknown)}{also}")
    return [served for name in names for served in found if served.name == name]


def _check_files(models: list[Served]) -> None:
    for served in models:
        if served.adapter is not None and not served.adapter.is_file() and served.gguf.is_file():
            raise ExportError(
                f"{served.folder}: this adapter can be served merged only (run.json says why, only_merged)"
            )
    missing = [str(f) for s in models for f in (s.gguf, s.adapter) if f is not None and not f.is_file()]
    if missing:
        raise ExportError(f"expected GGUF files, found none at {', '.join(missing)}; run `dvc repro export`")


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


def adapter_modelfile(facts: dict[str, Any], folder: Path, base: Path) -> str:
    """Modelfile of base and adapter, for `ollama create NAME -f <folder>/Modelfile.adapter` from any working directory.

    Args:
        facts: serving.json, with adds_bos and bos_token.
        folder: Where the Modelfile and adapter.gguf will lie.
        base: GGUF of the base; named relative to `folder`, as Ollama reads it.

    Raises:
        ModelfileError: see `render_modelfile`.
    """
    text = render_modelfile(
        spec_of(facts, "./adapter.gguf"), gguf_adds_bos=facts["adds_bos"], bos_token=facts["bos_token"]
    )
    return _FROM.sub(lambda _: f"FROM {os.path.relpath(base, folder)}", text, count=1)


def read_modelfile(file: Path) -> tuple[ModelfileSpec, Path, Path | None]:
    """What a Modelfile says, and the GGUF and adapter that it means: relative to itself, as for `ollama create -f`.

    Raises:
        FileNotFoundError: no such file.
        ModelfileError: damaged, without FROM, or with one that is not relative.
    """
    text = file.read_text(encoding="utf-8")
    found = _FROM.search(text)
    if found is None or not found[1].startswith(("./", "../")):
        raise ModelfileError(f"expected FROM with a relative path, got {found[1] if found else 'none'!r}")
    # parse_modelfile takes paths below the Modelfile's folder only; an adapter's base lies beside it.
    spec = parse_modelfile(_FROM.sub("FROM ./model.gguf", text, count=1))
    adapter = file.parent / spec.adapter_path if spec.adapter_path else None
    return spec, file.parent / found[1], adapter


_FROM = re.compile(r"^FROM (.*)$", re.MULTILINE)
_TYPES: dict[str, type] = {"template": str, "stop": list, "num_ctx": int, "model_name": str}
