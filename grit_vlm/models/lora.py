"""LoRA by PEFT on chosen modules, with rank, α and dropout of each modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from grit_vlm.core.grit_lora import GRITLoRAConfig, GRITLoRALinear

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""

Layers = Mapping[str, Sequence[str]]
"""Modality → names of its modules."""


class AdapterError(ValueError):
    """A model that the adapter cannot be put on, or settings that contradict each other."""


def add_lora(model: nn.Module, layers: Layers, settings: Mapping[str, GRITLoRAConfig], adapter_name: str) -> Any:
    """PEFT's model: the given one, frozen, with LoRA on these modules.

    Args:
        model: Changed in place.
        layers: Modality → modules.
        settings: Modality → rank, α, dropout.
        adapter_name: PEFT's.
    """
    from peft import LoraConfig, get_peft_model

    of = {name: settings[m] for m, names in layers.items() for name in names}
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
    return get_peft_model(model, lora, adapter_name=adapter_name)


def views(
    model: Any, layers: Layers, settings: Mapping[str, GRITLoRAConfig], adapter_name: str
) -> dict[str, GRITLoRALinear]:
    """Module name → its GRIT-LoRA layer; each modality's dropout is set here, since PEFT takes one for all.

    Raises:
        AdapterError: the model has LoRA on other modules, or of another rank.
    """
    from peft.tuners.lora.layer import LoraLayer

    there = {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }
    wanted = [name for names in layers.values() for name in names]
    if odd := sorted(set(there) ^ set(wanted)):
        raise AdapterError(f"expected LoRA on the {len(wanted)} chosen layers, and found it to differ in: {odd[:6]}")
    found = {}
    for modality, names in layers.items():
        own = settings[modality]
        for name in names:
            module = there[name]
            if int(module.r[adapter_name]) != own.r:
                raise AdapterError(f"{name}: expected rank {own.r}, got {module.r[adapter_name]}")
            module.lora_dropout[adapter_name] = nn.Dropout(own.lora_dropout) if own.lora_dropout else nn.Identity()
            found[name] = GRITLoRALinear(module, own, adapter_name)
    return found
