"""Module names of known families of vision-language models, as transformers builds them today.

Document 000's names are older: SmolVLM's projector is `connector.modality_projection.proj`, not
`multi_modal_projector` (which matched nothing there, so that its "7 layers" lack it), and Phi-3.5-vision's vision tower
stands below `model.`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grit_vlm.config.model_configs import ModalityConfig, ModelConfigError, ModelGRITConfig
from grit_vlm.config.selection import LayerSelectionStrategy, SelectionError, layers_of, limit, match_all, select


def _attention(stem: str, names: Sequence[str]) -> list[str]:
    return [f"{stem}.{name}" for name in names]


_SIGLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
_IDEFICS3 = {
    "vision": _attention("model.vision_model.encoder.layers.*.self_attn", _SIGLIP),
    "text": _attention("model.text_model.layers.*.self_attn", _LLAMA),
    "cross_modal": ["model.connector.modality_projection.proj"],
}
_TOWER = _attention("model.vision_tower.encoder.layers.*.self_attn", _SIGLIP)
_LANGUAGE = _attention("model.language_model.layers.*.self_attn", _LLAMA)
FAMILIES: dict[str, dict[str, list[str]]] = {
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "llava": {"vision": _TOWER, "text": _LANGUAGE, "cross_modal": ["model.multi_modal_projector.linear_*"]},
    "paligemma": {"vision": _TOWER, "text": _LANGUAGE, "cross_modal": ["model.multi_modal_projector.linear"]},
    "qwen2_vl": {
        "vision": _attention("model.visual.blocks.*.attn", ("qkv", "proj")),
        "text": _LANGUAGE,
        "cross_modal": ["model.visual.merger.mlp.*"],
    },
    "phi3_v": {
        "vision": _attention(
            "model.vision_embed_tokens.img_processor.vision_model.encoder.layers.*.self_attn", _SIGLIP
        ),
        "text": _attention("model.layers.*.self_attn", ("qkv_proj", "o_proj")),
        "cross_modal": ["model.vision_embed_tokens.img_projection.*"],
    },
}
"""model_type → modality → patterns of its attention's projections (and of what joins the modalities)."""


def patterns_of(model: Any, modality: str) -> list[str]:
    """The family's patterns of a modality.

    Raises:
        SelectionError: an unknown family, or one that has no such modality; says what to do.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    family = FAMILIES.get(kind)
    if family is None:
        raise SelectionError(
            f"{modality}: expected layer_patterns for a model of type {kind!r}, got none; those of "
            f"{', '.join(FAMILIES)} are known"
        )
    if modality not in family:
        raise SelectionError(
            f"{modality}: models of type {kind!r} have no such layers of their own; give layer_patterns"
        )
    return family[modality]


def _named(name: str, kind: str, **more: Any) -> ModelGRITConfig:
    """All attention projections of a family."""
    found = {modality: ModalityConfig(list(patterns)) for modality, patterns in FAMILIES[kind].items()}
    return ModelGRITConfig(model_name=name, model_type=kind, **{**found, **more})


def _smolvlm(name: str, vision: ModalityConfig, text: ModalityConfig, most: int | None) -> ModelGRITConfig:
    cross = ModalityConfig(list(_IDEFICS3["cross_modal"]))
    return ModelGRITConfig(name, "idefics3", vision, text, cross, max_layers_per_modality=most)


def _configs() -> dict[str, ModelGRITConfig]:
    first, last, every = (LayerSelectionStrategy[n] for n in ("FIRST_N", "LAST_N", "EVERY_NTH"))
    q_and_v = [_IDEFICS3["vision"][i] for i in (0, 2)], [_IDEFICS3["text"][i] for i in (0, 2)]
    return {
        "smolvlm_fast": _smolvlm(
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            ModalityConfig(q_and_v[0][:1], first, n_layers=3),
            ModalityConfig(q_and_v[1][1:], last, n_layers=4),
            None,
        ),
        "smolvlm_256m": _smolvlm(
            "HuggingFaceTB/SmolVLM-256M-Instruct",
            ModalityConfig(q_and_v[0], every, step_size=2),
            ModalityConfig(q_and_v[1], last, n_layers=4),
            20,
        ),
        "idefics3": _named("HuggingFaceM4/Idefics3-8B-Llama3", "idefics3"),
        "smolvlm": _named("HuggingFaceTB/SmolVLM-Instruct", "smolvlm"),
        "llava": _named("llava-hf/llava-1.5-7b-hf", "llava"),
        "qwen2_vl": _named("Qwen/Qwen2-VL-2B-Instruct", "qwen2_vl"),
        "paligemma": _named("google/paligemma-3b-pt-224", "paligemma"),
        "phi3_v": _named("microsoft/Phi-3.5-vision-instruct", "phi3_v"),
    }


def get_model_config(name: str) -> ModelGRITConfig:
    """A ready configuration, by its own name or by a hub id; one's own copy.

    Raises:
        ModelConfigError: no such configuration; names those there are.
    """
    configs = _configs()
    by_id = {config.model_name: config for key, config in reversed(configs.items()) if key != "smolvlm_fast"}
    found = configs.get(name) or by_id.get(name)
    if found is None:
        raise ModelConfigError(f"expected one of {', '.join(configs)}, or the hub id of one of them; got {name!r}")
    return found


def adapted_modules(model: Any, config: ModelGRITConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Modality → names of the modules that a configuration adapts, and what is to be said of it.

    Args:
        model: Whose linear layers are looked at.
        config: Validated here.

    Raises:
        ModelConfigError: mistakes in the configuration, all of them.
        SelectionError: patterns that match nothing (with near misses), a strategy that leaves nothing, or a module in
            two modalities; of all modalities at once.
    """
    from torch import nn

    config.validate()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: dict[str, list[str]] = {}
    notes, problems = [], []
    for modality, own in config.modalities.items():
        try:
            matches = match_all(own.layer_patterns or patterns_of(model, modality), names, modality)
            layers = layers_of(matches)
            taken = select(
                list(layers),
                own.strategy,
                n_layers=own.n_layers,
                step_size=own.step_size,
                specific_indices=own.specific_indices,
                where=modality,
            )
            kept, note = limit({layer: layers[layer] for layer in taken}, config.max_layers_per_modality)
        except SelectionError as error:
            problems.append(str(error))
            continue
        found[modality] = [name for modules in kept.values() for name in modules]
        if note:
            notes.append(f"{modality}: {note}")
    owners: dict[str, list[str]] = {}
    for modality, modules in found.items():
        for name in modules:
            owners.setdefault(name, []).append(modality)
    problems += [f"{name}: expected in one modality, got {' and '.join(m)}" for name, m in owners.items() if len(m) > 1]
    if problems:
        raise SelectionError("\n".join(problems))
    return found, notes
