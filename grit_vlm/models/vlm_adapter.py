"""`VLMGRITAdapter`: LoRA by PEFT on chosen layers of a vision-language model, each with its Fisher information."""

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grit_vlm.config.families import adapted_modules, family_config, get_model_config, type_of
from grit_vlm.config.model_configs import MODALITIES, GRITLoRAConfig, ModalityConfig, ModelGRITConfig
from grit_vlm.core.fisher_curvature import FisherManager
from grit_vlm.core.grit_lora import GRITLoRALinear
from grit_vlm.errors import GritVlmError
from grit_vlm.models.lora import add_lora, dropout
from grit_vlm.utils.projection import MultiModalProjector

logger = logging.getLogger("grit")

_PREFIX = "base_model.model."  # which PEFT adds to a module's name


class VLMGRITAdapter:
    """Trainable LoRA on a vision-language model, with GRIT.

    ``adapter = VLMGRITAdapter(model, GRITLoRAConfig(), model_config_name="smolvlm_fast")`` freezes the model and adds
    LoRA with PEFT; ``adapter.model`` is PEFT's model, to be trained by a `GRITTrainer` or your own loop with
    `create_grit_optimizer`. The result is an ordinary PEFT adapter.

    A PEFT model with trainable LoRA on exactly the chosen layers is used as it is. The layers come from a
    ModelGRITConfig, a preset (`model_config_name`, see `grit_vlm.config.get_model_config`), or default to all attention
    projections of the model's family; `vision_layers=` and the like override the patterns of that modality. `defaults`
    supplies what a ModelGRITConfig lacks, see `ModelGRITConfig.layer_settings`.

    Raises GritVlmError for contradictory settings, and for layers or models that it cannot adapt.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GRITLoRAConfig | ModelGRITConfig | None = None,
        model_config_name: str | None = None,
        *,
        vision_layers: Sequence[str] | None = None,
        text_layers: Sequence[str] | None = None,
        cross_modal_layers: Sequence[str] | None = None,
        fusion_layers: Sequence[str] | None = None,
        defaults: GRITLoRAConfig | None = None,
    ):
        from peft import PeftModel

        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if isinstance(config, ModelGRITConfig):
            if model_config_name is not None:
                raise GritVlmError("expected a ModelGRITConfig or model_config_name, got both")
            self.model_config = copy.deepcopy(config)
        else:
            self.model_config = (
                get_model_config(model_config_name) if model_config_name else family_config(type_of(base))
            )
        overrides = dict(zip(MODALITIES, (vision_layers, text_layers, cross_modal_layers, fusion_layers), strict=True))
        for modality, patterns in overrides.items():
            if patterns is not None:
                part = getattr(self.model_config, modality) or ModalityConfig()
                part = dataclasses.replace(part, layer_patterns=list(patterns), strategy=ModalityConfig().strategy)
                setattr(self.model_config, modality, part if patterns else None)
        self.layers, notes = adapted_modules(base, self.model_config)
        for note in notes:
            logger.warning("GRIT-VLM: %s", note)
        if isinstance(config, ModelGRITConfig):
            self.settings = self.model_config.layer_settings(defaults)
        else:
            shared = config or GRITLoRAConfig()
            shared.validate()
            self.settings = dict.fromkeys(self.layers, shared)
        config_of = {name: self.settings[modality] for modality, names in self.layers.items() for name in names}
        self.model: Any = model if isinstance(model, PeftModel) else add_lora(model, config_of)
        self.grit_layers = _views(self.model, config_of)
        for modality, names in self.layers.items():
            for name in names:
                self.grit_layers[name].modality = modality
        self.manager = FisherManager(self.model, self.grit_layers)
        logger.info("GRIT-VLM: %s", self.describe())

    def describe(self) -> str:
        counts = ", ".join(f"{len(names)} {modality}" for modality, names in self.layers.items())
        weights = sum(p.numel() for p in self.get_trainable_parameters())
        return f"applied to {len(self.grit_layers)} layers ({counts}), {weights:,} parameters"

    vision_layers = property(lambda self: self.layers.get("vision", []))
    text_layers = property(lambda self: self.layers.get("text", []))
    cross_modal_layers = property(lambda self: self.layers.get("cross_modal", []))

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def get_grit_layers(self) -> dict[str, GRITLoRALinear]:
        return dict(self.grit_layers)

    def update_mixed_modal_fisher(self) -> dict[str, int]:
        """Update the estimates with the tokens captured since the last update; modality → number of changed layers.

        The optimizer does this at its step; a loop may call it earlier, after the backward pass.
        """
        return {
            modality: sum(self.grit_layers[name].update_fisher_and_projection() for name in names)
            for modality, names in self.layers.items()
        }

    def get_mixed_modal_projections(self) -> dict[str, dict[str, int]]:
        """Modality → module → directions it keeps at this step; empty if none is projected."""
        return self.manager.curvature.projections(self.manager.step)

    multimodal_projector = MultiModalProjector()
    # None where nothing is projected.
    vision_scheduler = property(lambda self: self.manager.curvature.schedules.get("vision"))
    text_scheduler = property(lambda self: self.manager.curvature.schedules.get("text"))

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(str(folder), safe_serialization=True)


def _views(model: Any, config_of: Mapping[str, GRITLoRAConfig]) -> dict[str, GRITLoRALinear]:
    """Module name → its GRIT-LoRA layer; each modality's dropout is set here, since PEFT has one for all."""
    from peft.tuners.lora.layer import LoraLayer

    lora_layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }
    if odd := sorted(set(lora_layers) ^ set(config_of)):
        raise GritVlmError(f"expected LoRA on the {len(config_of)} chosen layers, got a difference in: {odd[:6]}")
    views = {}
    for name, config in config_of.items():
        module = lora_layers[name]
        if int(module.r["default"]) != config.r:
            raise GritVlmError(f"{name}: expected rank {config.r}, got {module.r['default']}")
        module.lora_dropout["default"] = dropout(config)
        views[name] = GRITLoRALinear(module, config)
    return views


def create_vlm_grit_adapter(
    model_or_id: nn.Module | str,
    config: GRITLoRAConfig | ModelGRITConfig | None = None,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, VLMGRITAdapter]:
    """The model with LoRA on it, and its adapter, a `VLMGRITAdapter` of `config` and `kwargs`.

    A folder or hub id is loaded in float32; `trust_remote_code` is for models that ship code with their weights.
    """
    if isinstance(model_or_id, nn.Module):
        adapter = VLMGRITAdapter(model_or_id, config, **kwargs)
        return adapter.model, adapter
    from transformers import AutoModelForImageTextToText

    try:
        model = AutoModelForImageTextToText.from_pretrained(
            model_or_id, use_safetensors=True, trust_remote_code=trust_remote_code, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise GritVlmError(f"no vision-language model could be loaded from {model_or_id!r}: {error}") from error
    return create_vlm_grit_adapter(model, config, **kwargs)
