"""GRIT-VLM: curvature-aware LoRA fine-tuning of vision-language models, on top of `grit` and PEFT.

Documents 000, 001 and 003 describe it; where they are wrong, docs/grit_vlm.md shows what to write instead.
"""

from importlib import import_module
from typing import Any

from grit_vlm.errors import GritVlmError as GritVlmError

# torch, PEFT and transformers are imported on first use.
_HOMES = {
    "grit_vlm.config": "LayerSelectionStrategy ModalityConfig ModelGRITConfig get_device_config get_model_config",
    "grit_vlm.core.fisher_info": "FisherInformationMatrix compute_natural_gradient",
    "grit_vlm.core.grit_lora": "GRITLoRAConfig GRITLoRALayer GRITLoRALinear",
    "grit_vlm.models.vlm_adapter": "VLMGRITAdapter create_vlm_grit_adapter",
    "grit_vlm.optimizers.natural_gradient": "create_grit_optimizer",
    "grit_vlm.training.trainer": "GRITTrainer GRITTrainingArguments",
    "grit_vlm.utils.projection": "MultiModalProjector create_linear_scheduler",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'grit_vlm' has no attribute {name!r}")
