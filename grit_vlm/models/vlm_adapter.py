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
from grit_vlm.core.curvature import FisherManager
from grit_vlm.core.grit_lora import GRITLoRALinear
from grit_vlm.errors import GritVlmError
from grit_vlm.models.lora import add_lora, dropout
from grit_vlm.utils.projection import MultiModalProjector, ProjectionSchedule, create_scheduler, effective_rank

logger = logging.getLogger("grit")

KEPT_ACTIVATIONS = 8  # batches of each modality
_PREFIX = "base_model.model."  # what PEFT puts before a module's name


class VLMGRITAdapter:
    """Trainable LoRA on a vision-language model, with GRIT.

    ``adapter = VLMGRITAdapter(model, GRITLoRAConfig(), model_config_name="smolvlm_fast")`` freezes the model and puts
    PEFT's LoRA into it; ``adapter.model`` is PEFT's model, to be trained by a `GRITTrainer`, or by a loop of your own
    with `create_grit_optimizer`. What is trained is an ordinary PEFT adapter.

    A model that is PEFT's already, with trainable LoRA on exactly the chosen layers, is kept. The layers are those of a
    ModelGRITConfig, of a ready configuration (`model_config_name`, see `grit_vlm.config.get_model_config`), or all
    attention projections of the model's family; patterns given as `vision_layers=` and the like take their place in
    that modality. `defaults` has what a ModelGRITConfig does not say (fisher_block_size, fisher_min_samples,
    buffer_tokens), and switches that hold for all modalities; default: everything on.

    Raises GritVlmError for contradictions, GritVlmError and GritVlmError.
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
                own = getattr(self.model_config, modality) or ModalityConfig()
                own = dataclasses.replace(own, layer_patterns=list(patterns), strategy=ModalityConfig().strategy)
                setattr(self.model_config, modality, own if patterns else None)
        self.adapter_name = adapter_name
        kept: list[deque[Tensor]] = [deque(maxlen=KEPT_ACTIVATIONS) for _ in range(3)]
        self.vision_activations, self.text_activations, self.cross_activations = kept
        self.layers, notes = adapted_modules(base, self.model_config)
        for note in notes:
            logger.warning("GRIT-VLM: %s", note)
        own_of = self.model_config.modalities
        by_modality = isinstance(config, ModelGRITConfig)
        self.settings = {m: self._settings_of(own_of[m]) if by_modality else self.config for m in self.layers}
        of = {name: self.settings[modality] for modality, names in self.layers.items() for name in names}
        self.model: Any = model if isinstance(model, PeftModel) else add_lora(model, of, adapter_name)
        self.grit_layers = _views(self.model, of, adapter_name)
        for modality, names in self.layers.items():
            for name in names:
                self.grit_layers[name].modality = modality
        self.manager = FisherManager(self.model, self.grit_layers)
        logger.info("GRIT-VLM: %s", self.describe())

    def _settings_of(self, own: ModalityConfig) -> GRITLoRAConfig:
        """A modality's own settings, else the model's, else the defaults, whose switches hold for all modalities."""
        shared, switches = self.model_config, self.config
        settings = dataclasses.replace(
            switches,
            r=own.rank or shared.global_rank,
            lora_alpha=own.alpha or shared.global_alpha,
            lora_dropout=shared.global_dropout if own.dropout is None else own.dropout,
            fisher_approximation=own.fisher_approximation,
            fisher_damping=shared.fisher_damping,
            fisher_ema_decay=shared.fisher_ema_decay,
            fisher_update_freq=shared.fisher_update_freq,
            enable_natural_gradient=switches.enable_natural_gradient and own.enable_natural_gradient,
            enable_projection=switches.enable_projection and own.enable_projection,
            projection_budget_start=own.projection_budget or shared.projection_budget_start,
            projection_budget_end=own.projection_budget or shared.projection_budget_end,
            projection_schedule=shared.projection_schedule,
        )
        settings.validate()
        return settings

    def describe(self) -> str:
        counts = ", ".join(f"{len(names)} {modality}" for modality, names in self.layers.items())
        weights = sum(p.numel() for p in self.get_trainable_parameters())
        said = f"applied to {len(self.grit_layers)} layers ({counts}), {weights:,} parameters"
        for modality, settings in self.settings.items():
            if settings.enable_projection and settings.fisher_approximation != "kfac":
                layers = [self.grit_layers[name] for name in self.layers[modality]]
                size = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers) / len(layers)
                if (kept := settings.projection_budget_end / size) < 0.1:
                    said += f"; {modality}: projection keeps at most {kept:.1%} of a layer's directions"
        return said

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
        """Take what was captured since the last time into the estimates; modality → layers that have changed.

        The optimizer does so at its step; loops that want it done before may call it after the backward pass. No
        estimate needs the activations [..., d]; those of vision are for `estimate_vision_rank`, and default to the
        inputs of the first vision layer.
        """
        if vision_activations is None and self.vision_layers:
            buffer = self.grit_layers[self.vision_layers[0]].activation_buffer
            vision_activations = buffer[-1].x if buffer else None
        given = (vision_activations, text_activations, cross_activations)
        kept = (self.vision_activations, self.text_activations, self.cross_activations)
        for activations, queue in zip(given, kept, strict=True):
            if activations is not None:
                queue.append(activations.detach())
        return {
            modality: sum(self.grit_layers[name].update_fisher_and_projection() for name in names)
            for modality, names in self.layers.items()
        }

    def get_mixed_modal_projections(self) -> dict[str, dict[str, int]]:
        """Modality → module → directions that it keeps at this step; empty where none is projected."""
        return self.manager.curvature.projections(self.manager.step)

    multimodal_projector = MultiModalProjector()
    vision_scheduler = property(lambda self: self._scheduler("vision"))
    text_scheduler = property(lambda self: self._scheduler("text"))

    def _scheduler(self, modality: str) -> ProjectionSchedule:
        """The one in use; where projection is off, what it would be."""
        curvature, s = self.manager.curvature, self.settings.get(modality, self.config)
        ends = (s.projection_budget_start, s.projection_budget_end, curvature.total_steps)
        return curvature.schedules.get(modality) or create_scheduler(s.projection_schedule, *ends)

    def estimate_vision_rank(self) -> float:
        """Effective rank of the last vision activations, for the rule k ≈ 1.2·rank (see `recommended_budget`)."""
        if not self.vision_activations:
            raise GritVlmError("expected activations first, by update_mixed_modal_fisher after a backward pass")
        return effective_rank(self.vision_activations[-1])

    def save_pretrained(self, folder: str | Path) -> None:
        self.model.save_pretrained(str(folder), safe_serialization=True)


def _views(model: Any, of: Mapping[str, GRITLoRAConfig], adapter_name: str) -> dict[str, GRITLoRALinear]:
    """Module name → its GRIT-LoRA layer; each modality's dropout is set here, since PEFT takes one for all."""
    from peft.tuners.lora.layer import LoraLayer

    there = {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    if odd := sorted(set(there) ^ set(of)):
        raise GritVlmError(f"expected LoRA on the {len(of)} chosen layers, and found it to differ in: {odd[:6]}")
    found = {}
    for name, own in of.items():
        module = there[name]
        if int(module.r[adapter_name]) != own.r:
            raise GritVlmError(f"{name}: expected rank {own.r}, got {module.r[adapter_name]}")
        module.lora_dropout[adapter_name] = dropout(own)
        found[name] = GRITLoRALinear(module, own, adapter_name)
    return found


def create_vlm_grit_adapter(
    model_or_id: nn.Module | str,
    config: GRITLoRAConfig | ModelGRITConfig | None = None,
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, VLMGRITAdapter]:
    """The model with LoRA on it, and its adapter, a `VLMGRITAdapter` of `config` and `kwargs`.

    A folder or hub id is loaded in float32; `trust_remote_code` is for models whose code lies beside their weights,
    such as Phi-3.5-vision.
    """
    if isinstance(model_or_id, nn.Module):
        adapter = VLMGRITAdapter(model_or_id, config, **kwargs)
        return adapter.model, adapter
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # Phi-3.5-vision's own code registers itself as a causal language model.
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
