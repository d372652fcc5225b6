"""`VLMGRITAdapter`: LoRA by PEFT on chosen layers of a vision-language model, each with its Fisher information."""

import dataclasses
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grit_vlm.config.families import adapted_modules, family_config, get_model_config, type_of
from grit_vlm.config.model_configs import MODALITIES, GRITLoRAConfig, ModalityConfig, ModelGRITConfig
from grit_vlm.core.fisher_curvature import FisherManager
from grit_vlm.core.grit_lora import GRITLoRALinear
from grit_vlm.errors import GritVlmError
from grit_vlm.models.lora import add_lora, dropout
from grit_vlm.utils.projection import MultiModalProjector, ProjectionSchedule, create_scheduler, effective_rank

logger = logging.getLogger("grit")

RECENT_ACTIVATIONS = 8  # batches of each modality
_PREFIX = "base_model.model."  # which PEFT adds to a module's name


class VLMGRITAdapter:
    """Trainable LoRA on a vision-language model, with GRIT.

    ``adapter = VLMGRITAdapter(model, GRITLoRAConfig(), model_config_name="smolvlm_fast")`` freezes the model and adds
    LoRA with PEFT; ``adapter.model`` is PEFT's model, to be trained by a `GRITTrainer` or your own loop with
    `create_grit_optimizer`. The result is an ordinary PEFT adapter.

    A PEFT model with trainable LoRA on exactly the chosen layers is used as it is. The layers come from a
    ModelGRITConfig, a preset (`model_config_name`, see `grit_vlm.config.get_model_config`), or default to all attention
    projections of the model's family; `vision_layers=` and the like override the patterns of that modality. `defaults`
    supplies what a ModelGRITConfig lacks (fisher_block_size, fisher_min_samples, buffer_tokens) and switches for all
    modalities, which default to on.

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
        adapter_name: str = "default",
        defaults: GRITLoRAConfig | None = None,
    ):
        from peft import PeftModel

        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if isinstance(config, ModelGRITConfig):
            if model_config_name is not None:
                raise GritVlmError("expected a ModelGRITConfig or model_config_name, got both")
            self.config, self.model_config = defaults or GRITLoRAConfig(enable_projection=True), config.copy()
        else:
            self.config = config or GRITLoRAConfig()
            self.config.validate()
            self.model_config = (
                get_model_config(model_config_name) if model_config_name else family_config(type_of(base))
            )
        overrides = dict(zip(MODALITIES, (vision_layers, text_layers, cross_modal_layers, fusion_layers), strict=True))
        for modality, patterns in overrides.items():
            if patterns is not None:
                part = getattr(self.model_config, modality) or ModalityConfig()
                part = dataclasses.replace(part, layer_patterns=list(patterns), strategy=ModalityConfig().strategy)
                setattr(self.model_config, modality, part if patterns else None)
        self.adapter_name = adapter_name
        queues: list[deque[Tensor]] = [deque(maxlen=RECENT_ACTIVATIONS) for _ in range(3)]
        self.vision_activations, self.text_activations, self.cross_activations = queues
        self.layers, notes = adapted_modules(base, self.model_config)
        for note in notes:
            logger.warning("GRIT-VLM: %s", note)
        modalities = self.model_config.modalities
        by_modality = isinstance(config, ModelGRITConfig)
        self.settings = {m: self._settings_of(modalities[m]) if by_modality else self.config for m in self.layers}
        config_of = {name: self.settings[modality] for modality, names in self.layers.items() for name in names}
        self.model: Any = model if isinstance(model, PeftModel) else add_lora(model, config_of, adapter_name)
        self.grit_layers = _views(self.model, config_of, adapter_name)
        for modality, names in self.layers.items():
            for name in names:
                self.grit_layers[name].modality = modality
        self.manager = FisherManager(self.model, self.grit_layers)
        logger.info("GRIT-VLM: %s", self.describe())

    def _settings_of(self, modality: ModalityConfig) -> GRITLoRAConfig:
        """A modality's settings, else the model's, else the defaults, whose switches apply to all modalities."""
        shared, switches = self.model_config, self.config
        settings = dataclasses.replace(
            switches,
            r=modality.rank or shared.global_rank,
            lora_alpha=modality.alpha or shared.global_alpha,
            lora_dropout=shared.global_dropout if modality.dropout is None else modality.dropout,
            fisher_approximation=modality.fisher_approximation,
            fisher_damping=shared.fisher_damping,
            fisher_ema_decay=shared.fisher_ema_decay,
            fisher_update_freq=shared.fisher_update_freq,
            enable_natural_gradient=switches.enable_natural_gradient and modality.enable_natural_gradient,
            enable_projection=switches.enable_projection and modality.enable_projection,
            projection_budget_start=modality.projection_budget or shared.projection_budget_start,
            projection_budget_end=modality.projection_budget or shared.projection_budget_end,
            projection_schedule=shared.projection_schedule,
        )
        settings.validate()
        return settings

    def describe(self) -> str:
        counts = ", ".join(f"{len(names)} {modality}" for modality, names in self.layers.items())
        weights = sum(p.numel() for p in self.get_trainable_parameters())
        text = f"applied to {len(self.grit_layers)} layers ({counts}), {weights:,} parameters"
        for modality, settings in self.settings.items():
            if settings.enable_projection and settings.fisher_approximation != "kfac":
                layers = [self.grit_layers[name] for name in self.layers[modality]]
                size = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers) / len(layers)
                if (share := settings.projection_budget_end / size) < 0.1:
                    text += f"; {modality}: projection keeps at most {share:.1%} of a layer's directions"
        return text

    vision_layers = property(lambda self: self.layers.get("vision", []))
    text_layers = property(lambda self: self.layers.get("text", []))
    cross_modal_layers = property(lambda self: self.layers.get("cross_modal", []))

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def get_grit_layers(self) -> dict[str, GRITLoRALinear]:
        return dict(self.grit_layers)

    def update_mixed_modal_fisher(
        self,
        vision_activations: Tensor | None = None,
        text_activations: Tensor | None = None,
        cross_activations: Tensor | None = None,
    ) -> dict[str, int]:
        """Update the estimates with the tokens captured since the last update; modality → number of changed layers.

        The optimizer does this at its step; a loop may call it earlier, after the backward pass. Estimates do not need
        the activations [..., d]; those of vision are for `estimate_vision_rank` and default to the inputs of the first
        vision layer.
        """
        if vision_activations is None and self.vision_layers:
            buffer = self.grit_layers[self.vision_layers[0]].activation_buffer
            vision_activations = buffer[-1].x if buffer else None
        latest = (vision_activations, text_activations, cross_activations)
        queues = (self.vision_activations, self.text_activations, self.cross_activations)
        for activations, queue in zip(latest, queues, strict=True):
            if activations is not None:
                queue.append(activations.detach())
        return {
            modality: sum(self.grit_layers[name].update_fisher_and_projection() for name in names)
            for modality, names in self.layers.items()
        }

    def get_mixed_modal_projections(self) -> dict[str, dict[str, int]]:
        """Modality → module → directions it keeps at this step; empty if none is projected."""
        return self.manager.curvature.projections(self.manager.step)

    multimodal_projector = MultiModalProjector()
    vision_scheduler = property(lambda self: self._scheduler("vision"))
    text_scheduler = property(lambda self: self._scheduler("text"))

    def _scheduler(self, modality: str) -> ProjectionSchedule:
        """The schedule in use, or the one that projection would use if it is off."""
        curvature, s = self.manager.curvature, self.settings.get(modality, self.config)
        ends = (s.projection_budget_start, s.projection_budget_end, curvature.total_steps)
        return curvature.schedules.get(modality) or create_scheduler(s.projection_schedule, *ends)

    def estimate_vision_rank(self) -> float:
        """Effective rank of the last vision activations, for the rule k ≈ 1.2·rank (see `recommended_budget`)."""
        if not self.vision_activations:
            raise GritVlmError("expected vision activations, got none; call update_mixed_modal_fisher first")
        return effective_rank(self.vision_activations[-1])

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(str(folder), safe_serialization=True)


def _views(model: Any, config_of: Mapping[str, GRITLoRAConfig], adapter_name: str) -> dict[str, GRITLoRALinear]:
    """Module name → its GRIT-LoRA layer; each modality's dropout is set here, since PEFT has one for all."""
    from peft.tuners.lora.layer import LoraLayer

    lora_layers = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    if odd := sorted(set(lora_layers) ^ set(config_of)):
        raise GritVlmError(f"expected LoRA on the {len(config_of)} chosen layers, got a difference in: {odd[:6]}")
    views = {}
    for name, config in config_of.items():
        module = lora_layers[name]
        if int(module.r[adapter_name]) != config.r:
            raise GritVlmError(f"{name}: expected rank {config.r}, got {module.r[adapter_name]}")
        module.lora_dropout[adapter_name] = dropout(config)
        views[name] = GRITLoRALinear(module, config, adapter_name)
    return views


def create_vlm_grit_adapter(
    model_or_id: nn.Module | str,
    config: GRITLoRAConfig | ModelGRITConfig | None = None,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, VLMGRITAdapter]:
    """The model with LoRA on it, and its adapter, a `VLMGRITAdapter` of `config` and `kwargs`.

    A folder or hub id is loaded in float32; `trust_remote_code` is for models that ship code with their weights,
    such as Phi-3.5-vision.
    """
    if isinstance(model_or_id, nn.Module):
        adapter = VLMGRITAdapter(model_or_id, config, **kwargs)
        return adapter.model, adapter
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Phi-3.5-vision's remote code registers itself as a causal language model.
    problems = []
    for loader in (AutoModelForImageTextToText, *([AutoModelForCausalLM] if trust_remote_code else [])):
        try:
            model = loader.from_pretrained(
                model_or_id, use_safetensors=True, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            problems.append(str(error))
        else:
            return create_vlm_grit_adapter(model, config, **kwargs)
    raise GritVlmError(f"no vision-language model could be loaded from {model_or_id!r}: {'; '.join(problems)}")
