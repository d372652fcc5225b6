"""PEFT's LoRA with a rank, α and dropout for each module: all that a baseline needs of GRIT-VLM."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from grit_vlm.config.model_configs import GRITLoRAConfig


def add_lora(model: nn.Module, of: Mapping[str, GRITLoRAConfig]) -> Any:
    """A PEFT model: `model`, frozen and modified in place, with LoRA on these modules."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    first = next(iter(of.values()))
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=first.r,
        lora_alpha=first.lora_alpha,
        lora_dropout=first.lora_dropout,
        target_modules=list(of),
        rank_pattern={name: s.r for name, s in of.items() if s.r != first.r},
        alpha_pattern={name: s.lora_alpha for name, s in of.items() if s.lora_alpha != first.lora_alpha},
        bias="none",
    )
    adapted = get_peft_model(model, lora)
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = dropout(of[name])
    return adapted


def dropout(config: GRITLoRAConfig) -> nn.Module:
    """The dropout of one module, since PEFT has one setting for all."""
    return nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
