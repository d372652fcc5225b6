"""`VLMGRITAdapter`: LoRA by PEFT on chosen layers of a vision-language model, each with its Fisher information."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grit_vlm.config import ModalityConfig, ModelGRITConfig, adapted_modules, get_model_config
from grit_vlm.config.model_configs import MODALITIES
from grit_vlm.core.grit_lora import GRITLoRAConfig, GRITLoRALinear
from grit_vlm.core.manager import FisherManager
from grit_vlm.models.layer_settings import family_config, layer_config, with_basis, without_lora
from grit_vlm.models.lora import AdapterError, add_lora, views
from grit_vlm.utils.projection import MultiModalProjector, ProjectionSchedule, create_scheduler, effective_rank

logger = logging.getLogger("grit")

KEPT_ACTIVATIONS = 8
"""Batches of activations of each modality that are kept."""


class VLMGRITAdapter:
    """Trainable LoRA on a vision-language model, with GRIT.

    ``adapter = VLMGRITAdapter(model, GRITLoRAConfig(), model_config_name="smolvlm_fast")`` freezes the model and puts
    PEFT's LoRA into it; ``adapter.model`` is PEFT's model, to be trained by a `GRITTrainer`, or by a loop of one's own
    with `create_grit_optimizer`. What is trained is an ordinary PEFT adapter.

    Attributes:
        model: PEFT's.
        config: Settings that hold for all layers.
        model_config: Selection and settings of each modality.
        grit_layers: Module name in the model → its layer.
        layers: Modality → names of its modules.
        manager: Estimates and steps; see `grit_vlm.core.manager`.
        vision_activations, text_activations, cross_activations: The last ones given to `update_mixed_modal_fisher`.
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
        """Choose the layers and put LoRA on them.

        Args:
            model: Of transformers; or PEFT's model with trainable LoRA on exactly these layers, which is kept.
            config: A GRITLoRAConfig (default: the documents') or a ModelGRITConfig, which has everything.
            model_config_name: A ready configuration, see `grit_vlm.config.get_model_config`; with neither it nor a
                ModelGRITConfig all attention projections of the model's family.
            vision_layers: Patterns instead of the configuration's, all layers that they match.
            text_layers: The same.
            cross_modal_layers: The same.
            fusion_layers: The same.
            adapter_name: PEFT's.
            defaults: What a ModelGRITConfig does not say (fisher_block_size, fisher_min_samples, buffer_tokens), and
                switches that hold for all modalities; default: everything on.

        Raises:
            AdapterError: contradictions. SelectionError: patterns that match nothing (with near misses), strategies
                that leave nothing. ModelConfigError, GRITLoRAConfigError: mistakes in settings.
        """
        from peft import PeftModel

        if isinstance(config, ModelGRITConfig):
            if model_config_name is not None:
                raise AdapterError("expected a ModelGRITConfig or model_config_name, got both")
            self.config, self.model_config = defaults or GRITLoRAConfig(enable_projection=True), config.copy()
        else:
            self.config = config or GRITLoRAConfig()
            self.config.validate()
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            found = get_model_config(model_config_name) if model_config_name else family_config(base)
            self.model_config = with_basis(found, self.config)
        overrides = dict(zip(MODALITIES, (vision_layers, text_layers, cross_modal_layers, fusion_layers), strict=True))
        for modality, patterns in overrides.items():
            if patterns is not None:
                basis = getattr(self.model_config, modality) or ModalityConfig()
                chosen = dataclasses.replace(basis, layer_patterns=list(patterns), strategy=ModalityConfig().strategy)
                setattr(self.model_config, modality, chosen if patterns else None)
        self.adapter_name = adapter_name
        self.vision_activations: deque[Tensor] = deque(maxlen=KEPT_ACTIVATIONS)
        self.text_activations: deque[Tensor] = deque(maxlen=KEPT_ACTIVATIONS)
        self.cross_activations: deque[Tensor] = deque(maxlen=KEPT_ACTIVATIONS)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self.layers, notes = adapted_modules(without_lora(base), self.model_config)
        for note in notes:
            logger.warning("GRIT-VLM: %s", note)
        self.settings = {m: layer_config(self.config, self.model_config, m) for m in self.layers}
        for settings in self.settings.values():
            settings.validate()
        self.model: Any = (
            model if isinstance(model, PeftModel) else add_lora(model, self.layers, self.settings, adapter_name)
        )
        self.grit_layers = views(self.model, self.layers, self.settings, adapter_name)
        self.manager = FisherManager(self.model, self.grit_layers, modality=self.modality_of())
        logger.info("GRIT-VLM: %s", self.describe())

    def describe(self) -> str:
        """One line: layers, parameters, and what a projection keeps."""
        counts = ", ".join(f"{len(names)} {modality}" for modality, names in self.layers.items())
        weights = sum(p.numel() for p in self.get_trainable_parameters())
        said = f"applied to {len(self.grit_layers)} layers ({counts}), {weights:,} parameters"
        for modality, settings in self.settings.items():
            if settings.enable_projection and settings.fisher_approximation != "kfac":
                sizes = [layer.lora_A.numel() + layer.lora_B.numel() for layer in self._of(modality)]
                kept = settings.projection_budget_end / (sum(sizes) / len(sizes))
                if kept < 0.1:
                    said += f"; {modality}: projection keeps at most {kept:.1%} of a layer's directions"
        return said

    # What there is

    def modality_of(self) -> dict[str, str]:
        """Module name → modality."""
        return {name: modality for modality, names in self.layers.items() for name in names}

    def _of(self, modality: str) -> list[GRITLoRALinear]:
        return [self.grit_layers[name] for name in self.layers.get(modality, [])]

    @property
    def vision_layers(self) -> list[str]:
        """Names of the adapted modules of the vision encoder."""
        return list(self.layers.get("vision", []))

    @property
    def text_layers(self) -> list[str]:
        """Names of the adapted modules of the language model."""
        return list(self.layers.get("text", []))

    @property
    def cross_modal_layers(self) -> list[str]:
        """Names of the adapted modules between the two."""
        return list(self.layers.get("cross_modal", []))

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """All weights that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def get_grit_layers(self) -> dict[str, GRITLoRALinear]:
        """Module name → layer, for `create_grit_optimizer`."""
        return dict(self.grit_layers)

    # Fisher information and projection

    def update_mixed_modal_fisher(
        self,
        vision_activations: Tensor | None = None,
        text_activations: Tensor | None = None,
        cross_activations: Tensor | None = None,
    ) -> dict[str, int]:
        """Take what was captured since the last time into the estimates of all layers.

        The optimizer does so at its step; loops that want it done before may call it after the backward pass.

        Args:
            vision_activations: [..., d]; kept for `estimate_vision_rank`, no estimate needs them.
            text_activations: The same, of the language model.
            cross_activations: The same, of what is between.

        Returns:
            Modality → layers whose estimate has changed.
        """
        given = (vision_activations, text_activations, cross_activations)
        kept = (self.vision_activations, self.text_activations, self.cross_activations)
        for activations, queue in zip(given, kept, strict=True):
            if activations is not None:
                queue.append(activations.detach())
        self.manager.keep_vision_inputs()
        return {m: sum(layer.update_fisher_and_projection() for layer in self._of(m)) for m in self.layers}

    def get_mixed_modal_projections(self) -> dict[str, dict[str, int]]:
        """Modality → module → directions that it keeps at this step; see `MultiModalProjector`.

        Empty where projection is off, or no estimate is ready.
        """
        return self.manager.projections()

    @property
    def multimodal_projector(self) -> MultiModalProjector:
        """What shares the budgets out; it has no state."""
        return MultiModalProjector()

    @property
    def vision_scheduler(self) -> ProjectionSchedule:
        """The projection budget of the vision layers over the steps."""
        return self._scheduler("vision")

    @property
    def text_scheduler(self) -> ProjectionSchedule:
        """The projection budget of the language model's layers over the steps."""
        return self._scheduler("text")

    def _scheduler(self, modality: str) -> ProjectionSchedule:
        """The one in use; where projection is off, what it would be."""
        if modality in self.manager.schedules:
            return self.manager.schedules[modality]
        s = self.settings.get(modality, self.config)
        total = self.manager.total_steps
        return create_scheduler(s.projection_schedule, s.projection_budget_start, s.projection_budget_end, total)

    def estimate_vision_rank(self) -> float:
        """Effective rank of vision activations, for the rule k ≈ 1.2·rank (see `recommended_budget`).

        Of those given last to `update_mixed_modal_fisher`, else of the first vision layer's inputs at the last update.

        Raises:
            AdapterError: there are none yet.
        """
        given = self.vision_activations[-1] if self.vision_activations else self.manager.vision_inputs
        if given is None:
            raise AdapterError(
                "expected activations first: of a training step, or of update_mixed_modal_fisher; got none"
            )
        return effective_rank(given)

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """An ordinary PEFT adapter: adapter_config.json and adapter_model.safetensors."""
        self.model.save_pretrained(str(folder), safe_serialization=True)

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path, *args: Any, **kwargs: Any) -> VLMGRITAdapter:
        """A saved adapter on its base, to be trained on; arguments as those of the class.

        Raises:
            AdapterError: it is on other layers than the configuration chooses.
        """
        from peft import PeftModel

        return cls(PeftModel.from_pretrained(model, str(folder), is_trainable=True), *args, **kwargs)

    def merge_and_unload(self) -> Any:
        """The base model with s·B·A added to its weights; the hooks come off."""
        self.manager.close(check=False)
        return self.model.merge_and_unload()


def create_vlm_grit_adapter(
    model_or_id: nn.Module | str,
    config: GRITLoRAConfig | ModelGRITConfig | None = None,
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, VLMGRITAdapter]:
    """The model with LoRA on it, and its adapter.

    Args:
        model_or_id: A model, a folder, or a hub id.
        config: See `VLMGRITAdapter`.
        device: A strategy of `grit_vlm.config.get_device_config`, for models that are loaded here; None: transformers'
            own choice, in float32.
        trust_remote_code: For models whose code lies beside their weights, e.g. Phi-3.5-vision.
        kwargs: See `VLMGRITAdapter`.

    Raises:
        AdapterError: the model cannot be loaded. And what `VLMGRITAdapter` raises.
    """
    if isinstance(model_or_id, str):
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        from grit_vlm.config import get_device_config

        arguments = get_device_config(device) if device else {"dtype": torch.float32}
        # Phi-3.5-vision's own code registers itself as a causal language model.
        loaders = [AutoModelForImageTextToText, *([AutoModelForCausalLM] if trust_remote_code else [])]
        problems = []
        for loader in loaders:
            try:
                model_or_id = loader.from_pretrained(
                    model_or_id, use_safetensors=True, trust_remote_code=trust_remote_code, **arguments
                )
                break
            except (OSError, ValueError, KeyError) as error:
                problems.append(str(error))
        else:
            raise AdapterError(f"no vision-language model could be loaded from {model_or_id!r}: {'; '.join(problems)}")
    adapter = VLMGRITAdapter(model_or_id, config, **kwargs)  # type: ignore[arg-type]
    return adapter.model, adapter
