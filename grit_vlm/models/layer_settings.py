"""The settings of each modality's layers, from those of a model and those that hold for all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from grit_vlm.config import ModalityConfig, ModelGRITConfig, SelectionError
from grit_vlm.core.grit_lora import GRITLoRAConfig


def family_config(model: nn.Module) -> ModelGRITConfig:
    """Every modality of the model's family; those that it does not have are left out."""
    from grit_vlm.config.families import FAMILIES

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise SelectionError(
            f"expected model_config_name, a ModelGRITConfig, or layers for a model of type {kind!r}; known types are "
            f"{', '.join(FAMILIES)}"
        )
    config = ModelGRITConfig(model_type=str(kind))
    for modality in FAMILIES[str(kind)]:
        setattr(config, modality, ModalityConfig())
    return config


def layer_config(basis: GRITLoRAConfig, model_config: ModelGRITConfig, modality: str) -> GRITLoRAConfig:
    """The settings of a modality's layers: its own, else the model's, else those of `basis`.

    Args:
        basis: Whose switches hold for all modalities: what is off there is off everywhere.
        model_config: With that modality.
        modality: vision, text, cross_modal or fusion.
    """
    own, shared = getattr(model_config, modality), model_config
    start, end = shared.projection_budget_start, shared.projection_budget_end
    if own.projection_budget is not None:
        start = end = own.projection_budget
    return dataclasses.replace(
        basis,
        r=own.rank or shared.global_rank,
        lora_alpha=own.alpha or shared.global_alpha,
        lora_dropout=shared.global_dropout if own.dropout is None else own.dropout,
        fisher_approximation=own.fisher_approximation,
        fisher_damping=shared.fisher_damping,
        fisher_ema_decay=shared.fisher_ema_decay,
        fisher_update_freq=shared.fisher_update_freq,
        enable_natural_gradient=basis.enable_natural_gradient and own.enable_natural_gradient,
        enable_projection=basis.enable_projection and own.enable_projection,
        projection_budget_start=start,
        projection_budget_end=end,
        projection_schedule=shared.projection_schedule,
    )


def with_basis(model_config: ModelGRITConfig, basis: GRITLoRAConfig) -> ModelGRITConfig:
    """A ready configuration with the settings of a `GRITLoRAConfig` where both have them; the selection stays."""
    changed = model_config.copy()
    changed.global_rank, changed.global_alpha, changed.global_dropout = basis.r, basis.lora_alpha, basis.lora_dropout
    for name in ("fisher_damping", "fisher_ema_decay", "fisher_update_freq"):
        setattr(changed, name, getattr(basis, name))
    for name in ("projection_budget_start", "projection_budget_end", "projection_schedule"):
        setattr(changed, name, getattr(basis, name))
    for own in changed.modalities.values():
        own.fisher_approximation = basis.fisher_approximation
    return changed


class _WithoutLora:
    """A model whose LoRA layers count as the linear layers that they were put round, for the selection of names."""

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]):
        self.config = getattr(model, "config", None)
        self._modules = modules

    def named_modules(self) -> Any:
        return self._modules.items()


def without_lora(model: nn.Module) -> Any:
    """A model whose LoRA layers count as the linear layers that they were put round, for the selection of names."""
    from peft.tuners.lora.layer import LoraLayer

    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        return model
    found = {
        name: module.get_base_layer() if isinstance(module, LoraLayer) else module
        for name, module in model.named_modules()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    return _WithoutLora(model, found)
