"""GRIT-SGD and GRIT-Adam.

All are `grit.optim.GritOptimizer` over a `FisherCurvature`: statistics, natural gradient, clipping, the wrapped
optimizer's step. What differs is where the Fisher information comes in:

- grit_sgd: θ ← θ − η (F + λI)⁻¹ ∇, with momentum.
- grit_adam: Adam's moments are kept along the eigen-directions of F, and the step along direction i is multiplied by
  (λ_i/mean λ + damping)^(−p/2), as in `grit`'s mode eigen_adamw: the natural gradient of a step whose size along each
  direction Adam has already normalized.
- grit_adam_preconditioned: (F + λI)⁻¹ ∇ instead of ∇ goes into AdamW, which is what the documents describe. With
  estimate diagonal AdamW undoes most of it: scaling a coordinate's gradient by a constant does not change its step.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from grit import GRITConfig
from grit.optim import GritOptimizer
from grit_vlm.config.model_configs import MODES, check_type
from grit_vlm.core.fisher_curvature import FisherManager
from grit_vlm.core.grit_lora import GRITLoRALinear
from grit_vlm.errors import GritVlmError


def set_mode(manager: FisherManager, optimizer_type: str, **settings: Any) -> None:
    """Set the step rule: a type of `MODES`, and fields of `grit.GRITConfig`; there is no trust region."""
    check_type(optimizer_type)
    config = dataclasses.replace(manager.config, mode=MODES[optimizer_type], kl_clip=0.0, **settings)
    config.validate()
    manager.curvature.config = config


def create_grit_optimizer(
    parameters: Iterable[Any],
    optimizer_type: str = "grit_adam",
    grit_layers: Mapping[str, GRITLoRALinear] | None = None,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    max_grad_norm: float | None = None,
    total_steps: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **settings: Any,
) -> GritOptimizer:
    """An optimizer by its type; see the module.

    `parameters` are all that is trained, LoRA's weights among them, also groups with options, as torch takes them;
    `grit_layers` those of an adapter (`VLMGRITAdapter.get_grit_layers`), or standalone layers, by name. Projection
    budgets go from start to end over `total_steps` (None: as planned before). `optimizer` is wrapped instead of torch's
    AdamW or SGD made here; `settings` are fields of `grit.GRITConfig`: eigen_power (p), grafting, …
    """
    check_type(optimizer_type)
    if not grit_layers:
        raise GritVlmError("grit_layers: expected at least one GRIT-LoRA layer, got none")
    manager = _manager_of(grit_layers)
    set_mode(manager, optimizer_type, **settings)
    if total_steps is not None:
        manager.curvature.plan(total_steps)
    if optimizer is None and manager.config.mode == "sgd":
        momentum = GRITConfig().sgd_momentum
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    elif optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return GritOptimizer(optimizer, manager, max_grad_norm=max_grad_norm)


def _manager_of(grit_layers: Mapping[str, GRITLoRALinear]) -> FisherManager:
    """The manager of all these layers; a new one if they have none in common."""
    managers = {id(layer.manager): layer.manager for layer in grit_layers.values()}
    manager = next(iter(managers.values()))
    if len(managers) > 1 or not isinstance(manager, FisherManager):
        return FisherManager(nn.ModuleList(grit_layers.values()), grit_layers)
    included = {id(layer) for layer in grit_layers.values()}
    if missing := [name for name, layer in manager.curvature.grit_layers.items() if id(layer) not in included]:
        raise GritVlmError(f"grit_layers: expected all layers of the adapter; missing: {missing[:6]}")
    return manager
