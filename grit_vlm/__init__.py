"""GRIT-VLM: curvature-aware LoRA fine-tuning of vision-language models, on top of `grit` and PEFT.

Documents 000, 001 and 003 describe it; where they are wrong, the docstring in question says what was mended.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_vlm.config import (
        LayerSelectionStrategy,
        ModalityConfig,
        ModelGRITConfig,
        get_device_config,
        get_model_config,
    )
    from grit_vlm.core.eigen import compute_natural_gradient
    from grit_vlm.core.fisher_info import FisherInformationMatrix
    from grit_vlm.core.grit_lora import GRITLoRAConfig, GRITLoRALayer, GRITLoRALinear
    from grit_vlm.models.vlm_adapter import VLMGRITAdapter, create_vlm_grit_adapter
    from grit_vlm.optimizers.natural_gradient import create_grit_optimizer
    from grit_vlm.training.trainer import GRITTrainer, GRITTrainingArguments
    from grit_vlm.utils.projection import MultiModalProjector, create_linear_scheduler

# torch, PEFT and transformers load when they are needed.
_HOMES = {
    "FisherInformationMatrix": "grit_vlm.core.fisher_info",
    "GRITLoRAConfig": "grit_vlm.core.grit_lora",
    "GRITLoRALayer": "grit_vlm.core.grit_lora",
    "GRITLoRALinear": "grit_vlm.core.grit_lora",
    "GRITTrainer": "grit_vlm.training.trainer",
    "GRITTrainingArguments": "grit_vlm.training.trainer",
    "LayerSelectionStrategy": "grit_vlm.config",
    "ModalityConfig": "grit_vlm.config",
    "ModelGRITConfig": "grit_vlm.config",
    "MultiModalProjector": "grit_vlm.utils.projection",
    "VLMGRITAdapter": "grit_vlm.models.vlm_adapter",
    "compute_natural_gradient": "grit_vlm.core.eigen",
    "create_grit_optimizer": "grit_vlm.optimizers.natural_gradient",
    "create_linear_scheduler": "grit_vlm.utils.projection",
    "create_vlm_grit_adapter": "grit_vlm.models.vlm_adapter",
    "get_device_config": "grit_vlm.config",
    "get_model_config": "grit_vlm.config",
}

__all__ = [
    "FisherInformationMatrix",
    "GRITLoRAConfig",
    "GRITLoRALayer",
    "GRITLoRALinear",
    "GRITTrainer",
    "GRITTrainingArguments",
    "LayerSelectionStrategy",
    "ModalityConfig",
    "ModelGRITConfig",
    "MultiModalProjector",
    "VLMGRITAdapter",
    "compute_natural_gradient",
    "create_grit_optimizer",
    "create_linear_scheduler",
    "create_vlm_grit_adapter",
    "get_device_config",
    "get_model_config",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grit_vlm' has no attribute {name!r}")
