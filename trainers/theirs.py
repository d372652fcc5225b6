"""Third-party adapters: checked against the base, measured like ours, and copied unchanged."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from db.files import sha256
from trainers import TrainingError
from trainers.adapters import MERGED, NO_FIELD, read_config, takes_part_of_w
from trainers.keeper import KL
from trainers.run import Arm, TrainingJob, build, peak_memory_bytes
from trainers.settings import BaseReference, Preserve

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def problems(folder: Path) -> list[str]:
    """Reasons to reject a third-party adapter, without reading its tensors."""
    try:
        config = read_config(folder / CONFIG)
    except TrainingError as error:
        return [str(error).removeprefix("peft: ")]
    reasons = []
    if not (folder / WEIGHTS).is_file():
        reasons.append(f"{folder}: expected {WEIGHTS}, found none; PEFT's save_pretrained writes it")
    if config.get("peft_type") not in MERGED:
        reasons.append(f"{folder}: expected an adapter that PEFT can merge, got peft_type {config.get('peft_type')!r}")
    reasons += [f"{folder}: {key}: cannot be used: {why}" for key, why in NO_FIELD.items() if config.get(key)]
    if config.get("lora_alpha") == 0:
        reasons.append(f"{folder}: expected lora_alpha above 0, got 0: the update is multiplied by it")
    if takes_part_of_w(start := config.get("init_lora_weights")):
        reasons.append(
            f"{folder}: {start} changed the base's weights; save the adapter for the untouched base, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return reasons


def load(model: Any, folder: Path) -> Any:
    """The base with an adapter from a folder. Raises TrainingError if a tensor does not fit."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS)
    if infinite := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
        raise TrainingError(f"{folder}: expected finite numbers, got NaN or infinity in {infinite[0]}"
                            f"{f' and {len(infinite) - 1} more tensors' * (len(infinite) > 1)}")  # fmt: skip
    biases = read_config(folder / CONFIG).get("bias", "none")
    if biases != "none" and any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise TrainingError(
            f"{folder}: expected bias none on a base that has biases, got {biases!r}; PEFT leaves trained biases in "
            "place while the adapter is off, so that it could not be compared with the base"
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
    except (KeyError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{folder}: does not fit the base: {error}") from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if strange := sorted(expected.keys() ^ saved.keys()):
        sides = ("the base has no place for", "misses")
        examples = "; ".join(f"{sides[name in expected]} {name}" for name in strange[:4])
        raise TrainingError(f"{folder}: does not fit the base: {len(strange)} tensors of {len(expected)}: {examples}")
    return adapted


def its_base(folder: Path, base: BaseReference) -> str:
    """How we checked which base an adapter is for: by `weights` or `name`; `unknown` if neither is possible.

    Raises TrainingError if it is for another base.
    """
    name = read_config(folder / CONFIG).get("base_model_name_or_path")
    ours = [place for place in (base.location, base.merge_location) if place]
    if not name or name in ours:  # the weights in a folder may have changed
        return "unknown" if not name or Path(name).is_dir() else "name"
    foreign, base_file = (Path(place) / "model.safetensors" for place in (name, base.location))
    if foreign.is_file() and base_file.is_file():
        if sha256(foreign) == sha256(base_file):
            return "weights"
    elif Path(name).is_absolute() or any(Path(place).is_dir() for place in ours):
        return "unknown"
    raise TrainingError(
        f"{folder}: expected an adapter of {' or '.join(ours)}, got one of {name}; if the weights are the same, set "
        f"base_model_name_or_path to {ours[0]!r} in its {CONFIG}"
    )


def adopt(arm: Arm, job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Copy an adapter to `job.output`, with an empty history; return its numbers for run.json."""
    base = its_base(folder, job.base)
    if base == "unknown":
        print(f"{folder}: its base cannot be identified; its tensors fit ours", flush=True)
    plain = job.settings.model_copy(update={"peft": {}, "optim_args": {}, "preserve": Preserve()})
    loaded = replace(arm, add_adapter=lambda model, settings: load(model, folder))
    trainer, _, valid = build(loaded, replace(job, settings=plain))
    metrics = trainer.evaluate()
    for name in (CONFIG, WEIGHTS):
        shutil.copy2(folder / name, job.output / name)
    trainer.processing_class.save_pretrained(job.output)
    (job.output / "loss_history.json").write_text("[]\n", encoding="utf-8")
    return {
        "trained": "elsewhere",
        "base_compared_by": base,
        "valid_left_out": valid.left_out,
        "final_eval_loss": metrics["eval_loss"],
        "final_kl": metrics.get(KL),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def moved(folder: Path) -> float:
    """Share of the layers that an adapter changes: with LoRA those with nonzero A and B, otherwise by tensor."""
    from safetensors.torch import load_file

    layers: dict[str, list[bool]] = {}
    lora = read_config(folder / CONFIG)["peft_type"] == "LORA"
    for name, tensor in load_file(folder / WEIGHTS).items():
        if not lora or ".lora_A" in name or ".lora_B" in name or ".lora_embedding_" in name:
            layers.setdefault(name.split(".lora_")[0], []).append(bool(tensor.any()))
    return sum(all(nonzero) for nonzero in layers.values()) / max(len(layers), 1)
