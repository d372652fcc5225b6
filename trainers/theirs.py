"""Adapters that other trainers made: held against the base, measured as ours are, and copied as they are."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from db.files import sha256
from trainers.adapters import MERGED, NO_FIELD, PeftError, read_config, takes_part_of_w
from trainers.preserve import KL
from trainers.run import Arm, TrainingJob, build, peak_memory_bytes
from trainers.settings import BaseReference, Preserve

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class AdapterError(ValueError):
    """An adapter that does not fit the base."""


def problems(folder: Path) -> list[str]:
    """What speaks against an adapter that another trainer made, before its tensors are looked at."""
    try:
        config = read_config(folder / CONFIG)
    except PeftError as error:
        return [str(error).removeprefix("peft: ")]
    found = []
    if not (folder / WEIGHTS).is_file():
        found.append(f"{folder}: expected {WEIGHTS}, found none; save_pretrained of PEFT writes it")
    if config.get("peft_type") not in MERGED:
        found.append(f"{folder}: expected an adapter that PEFT can merge, got peft_type {config.get('peft_type')!r}")
    found += [f"{folder}: {key}: cannot be used: {why}" for key, why in NO_FIELD.items() if config.get(key)]
    if takes_part_of_w(start := config.get("init_lora_weights")):
        found.append(
            f"{folder}: {start} took a part of the base's weights; save it for the untouched base, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return found


def load(model: Any, folder: Path) -> Any:
    """The base with an adapter from a folder. Raises AdapterError: it does not fit, tensor by tensor."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (KeyError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{folder}: does not fit the base: {error}") from error
    known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if strange := sorted(known.keys() ^ saved.keys()):
        sides = ("the base has no place for", "misses")
        words = [f"{sides[name in known]} {name}" for name in strange[:4]]
        raise AdapterError(
            f"{folder}: does not fit the base: {len(strange)} tensors of {len(known)}: {'; '.join(words)}"
        )
    return adapted


def its_base(folder: Path, base: BaseReference) -> str:
    """How an adapter's word for its base was held against ours: by `weights` or `name`; `unknown`: it cannot be.

    Raises AdapterError: it is of another base.
    """
    name = read_config(folder / CONFIG).get("base_model_name_or_path")
    ours = [place for place in (base.location, base.merge_location) if place]
    if not name or name in ours:  # one folder may have held other weights
        return "unknown" if not name or Path(name).is_dir() else "name"
    theirs, own = (Path(place) / "model.safetensors" for place in (name, base.location))
    if theirs.is_file() and own.is_file():
        if sha256(theirs) == sha256(own):
            return "weights"
    elif Path(name).is_absolute() or any(Path(place).is_dir() for place in ours):
        return "unknown"
    raise AdapterError(
        f"{folder}: expected an adapter of {' or '.join(ours)}, it says that it is one of {name}; where these are "
        f"the same weights, write {ours[0]!r} as base_model_name_or_path into its {CONFIG}"
    )


def adopt(arm: Arm, job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Copy an adapter to `job.output`, with an empty history; return for run.json what can be said of it."""
    base = its_base(folder, job.base)
    if base == "unknown":
        print(f"{folder}: says nothing of its base that can be looked up here; its tensors fit", flush=True)
    plain = job.settings.model_copy(update={"peft": {}, "optim_args": {}, "preserve": Preserve()})
    loaded = replace(arm, add_adapter=lambda model, settings: load(model, folder))
    trainer, _, valid = build(loaded, replace(job, settings=plain))
    said = trainer.evaluate()
    for name in (CONFIG, WEIGHTS):
        shutil.copy2(folder / name, job.output / name)
    trainer.processing_class.save_pretrained(job.output)
    (job.output / "loss_history.json").write_text("[]\n", encoding="utf-8")
    return {
        "trained": "elsewhere",
        "base_compared_by": base,
        "valid_left_out": valid.left_out,
        "final_eval_loss": said["eval_loss"],
        "final_kl": said.get(KL),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def moved(folder: Path) -> float:
    """Share of the layers that an adapter changes: of LoRA those whose A and B are not zero, of others by tensor."""
    from safetensors.torch import load_file

    layers: dict[str, list[bool]] = {}
    lora = read_config(folder / CONFIG)["peft_type"] == "LORA"
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not lora or ".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name:
            layers.setdefault(name.split(".lora_")[0], []).append(bool(tensor.any()))
    return sum(all(own) for own in layers.values()) / max(len(layers), 1)
