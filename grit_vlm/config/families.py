"""Module names of supported families of vision-language models, as in current transformers, and preset configurations.

Without `layer_patterns`, a modality uses the family's patterns.
"""

import math
from collections.abc import Sequence
from typing import Any

from grit.config import did_you_mean
from grit_vlm.config.model_configs import ModalityConfig, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy, limit, match_all
from grit_vlm.errors import GritVlmError


def _each(stem: str, names: Sequence[str]) -> list[str]:
    return [f"{stem}.{name}" for name in names]


_SIGLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
_LANGUAGE = _each("model.language_model.layers.*.self_attn", _LLAMA)
_IDEFICS3 = {
    "vision": _each("model.vision_model.encoder.layers.*.self_attn", _SIGLIP),
    "text": _each("model.text_model.layers.*.self_attn", _LLAMA),
    "cross_modal": ["model.connector.modality_projection.proj"],
}
_LLAVA = {
    "vision": _each("model.vision_tower.encoder.layers.*.self_attn", _SIGLIP),
    "text": _LANGUAGE,
    "cross_modal": _each("model.multi_modal_projector", ("linear_1", "linear_2")),
}
_QWEN = {
    "vision": _each("model.visual.blocks.*.attn", ("qkv", "proj")),
    "text": _LANGUAGE,
    "cross_modal": ["model.visual.merger.mlp.*"],
}
FAMILIES: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(("idefics3", "smolvlm"), _IDEFICS3),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "vipllava"), _LLAVA),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN),
    "paligemma": {**_LLAVA, "cross_modal": ["model.multi_modal_projector.linear"]},
}
"""model_type → modality → patterns of its attention projections and of the connector between the modalities."""


def type_of(model: Any) -> str | None:
    kind: str | None = getattr(getattr(model, "config", None), "model_type", None)
    return kind


def patterns_of(model: Any, modality: str, model_type: str = "custom") -> list[str]:
    """The patterns of a modality in the family `model_type`, or in the model's family if that is custom."""
    kind = model_type if model_type != "custom" else type_of(model)
    family = FAMILIES.get(kind or "")
    if family is None:
        raise GritVlmError(
            f"{modality}: expected layer_patterns for a model of type {kind or type(model).__name__!r}, got none; "
            f"there are defaults for {', '.join(FAMILIES)}"
        )
    if modality not in family:
        raise GritVlmError(f"{modality}: expected layer_patterns; models of type {kind!r} have no default")
    return list(family[modality])


def family_config(kind: str | None, name: str = "custom") -> ModelGRITConfig:
    if kind not in FAMILIES:
        raise GritVlmError(
            f"expected model_config_name, a ModelGRITConfig, or layers for a model of type {kind!r}; supported types: "
            f"{', '.join(FAMILIES)}"
        )
    return ModelGRITConfig(name, kind, ModalityConfig(), ModalityConfig(), ModalityConfig())


def _configs() -> dict[str, ModelGRITConfig]:
    strategy = LayerSelectionStrategy
    vision_q, _, vision_v, _ = _IDEFICS3["vision"]
    text_q, _, text_v, _ = _IDEFICS3["text"]

    def smolvlm(vision: ModalityConfig, text: ModalityConfig, most: int | None = None) -> ModelGRITConfig:
        cross = ModalityConfig(list(_IDEFICS3["cross_modal"]))
        name = "HuggingFaceTB/SmolVLM-256M-Instruct"
        return ModelGRITConfig(name, "idefics3", vision, text, cross, max_layers_per_modality=most)

    whole_families = {
        "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
        "smolvlm": "HuggingFaceTB/SmolVLM-Instruct",
        "llava": "llava-hf/llava-1.5-7b-hf",
        "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct",
        "paligemma": "google/paligemma-3b-pt-224",
    }
    return {
        "smolvlm_256m": smolvlm(
            ModalityConfig([vision_q, vision_v], strategy.EVERY_NTH, step_size=2),
            ModalityConfig([text_q, text_v], strategy.LAST_N, n_layers=4),
            20,
        ),
        "smolvlm_fast": smolvlm(
            ModalityConfig([vision_q], strategy.FIRST_N, n_layers=3),
            ModalityConfig([text_v], strategy.LAST_N, n_layers=4),
        ),
        **{kind: family_config(kind, name) for kind, name in whole_families.items()},
    }


def get_model_config(name: str) -> ModelGRITConfig:
    """A copy of a preset configuration, by its name or a hub id.

    smolvlm_fast adapts 3 vision modules, 4 text modules and the projector of SmolVLM-256M; smolvlm_256m (also by its
    hub id) 12, 8 and the projector. The others adapt all attention projections and projectors of a family.
    """
    configs = _configs()
    by_id: dict[str, str] = {}
    for key, config in configs.items():
        by_id.setdefault(config.model_name, key)
    preset = configs.get(by_id.get(name, name))
    if preset is None:
        spelled = name.lower().replace("-", "_")
        raise GritVlmError(
            f"expected one of {', '.join(configs)}, or a hub id ({', '.join(by_id)}); got {name!r}"
            f"{did_you_mean(spelled, configs) or did_you_mean(name, by_id)}"
        )
    return preset


def _first_unused_block(model: Any) -> float:
    """Index of the vision tower's first block whose output the language model never reads; infinity if there is none.

    LLaVA reads the second-to-last hidden state, so no gradient reaches the last block.
    """
    config = getattr(model, "config", None)
    at = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
    blocks = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    if at is None or not blocks:
        return math.inf
    states = [at] if isinstance(at, int) else list(at)
    return max(state if state >= 0 else blocks + 1 + state for state in states)


_TOWER = "model.vision_tower.encoder.layers."


def adaptable(model: Any) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers that an adapter can train, in model order, and the other modules: name → reason.

    A LoRA layer counts as the layer it wraps.
    """
    from peft.tuners.lora.layer import LoraLayer
    from torch import nn

    names: list[str] = []
    others: dict[str, str] = {}
    inside = {f"{name}.out_proj" for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    unused = _first_unused_block(model)
    adapted = "\0"
    for name, module in model.named_modules():
        if name.startswith(adapted):
            continue
        if isinstance(module, LoraLayer):
            adapted, module = f"{name}.", module.get_base_layer()
        if not isinstance(module, nn.Linear):
            others[name] = type(module).__name__
        elif name in inside:
            others[name] = "a weight of MultiheadAttention, which never calls it"
        elif name.startswith("model.vision_tower.head.") or (
            name.startswith(_TOWER) and int(name.removeprefix(_TOWER).split(".")[0]) >= unused
        ):
            others[name] = "after the hidden state that the language model reads, so no gradient reaches it"
        else:
            names.append(name)
    return names, others


def adapted_modules(model: Any, config: ModelGRITConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Modality → names of the modules that a configuration adapts; and notes on modules dropped by a limit.

    Raises GritVlmError with the problems of all modalities.
    """
    config.validate()
    names, others = adaptable(model)
    modules_of: dict[str, list[str]] = {}
    notes, problems = [], []
    for modality, settings in config.modalities.items():
        try:
            patterns = settings.layer_patterns or patterns_of(model, modality, config.model_type)
            layers = match_all(patterns, names, modality, others)
            selected = {layer: layers[layer] for layer in settings.select(list(layers), modality)}
            selected, note = limit(selected, config.max_layers_per_modality, modality)
        except GritVlmError as error:
            problems.append(str(error))
            continue
        modules_of[modality] = [name for modules in selected.values() for name in modules]
        if note:
            notes.append(f"{modality}: {note}")
    owners = {name: [m for m in modules_of if name in modules_of[m]] for names in modules_of.values() for name in names}
    problems += [f"{name}: expected in one modality, got {' and '.join(m)}" for name, m in owners.items() if len(m) > 1]
    if problems:
        raise GritVlmError("\n".join(problems))
    return modules_of, notes
