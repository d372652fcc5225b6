"""GRIT-SGD, GRIT-Adam and their adaptive variants.

All are `grit.optim.GritOptimizer`, whose step they share: statistics, natural gradient, clipping, the wrapped
optimizer's step. What differs is where the Fisher information comes in:

- grit_sgd: θ ← θ − η (F + λI)⁻¹ ∇, with momentum.
- grit_adam: Adam's moments are kept along the eigen-directions of F, and the step along direction i is multiplied by
  (λ_i/mean λ + damping)^(−p/2), as in `grit`'s mode eigen_adamw: the natural gradient of a step whose size along each
  direction Adam has already normalised.
- grit_adam_preconditioned: (F + λI)⁻¹ ∇ instead of ∇ goes into AdamW, which is what the documents' text says. With
  estimate diagonal AdamW undoes most of it: its step does not change when a coordinate's gradient is multiplied by a
  constant. The probe shows how much is left (LOG.md).
- adaptive_sgd, adaptive_adam: the learning rate follows the curvature. Steps are shortened to the trust region
  Δθᵀ(F + λI)Δθ ≤ κ (Martens & Grosse 2015, section 6; the documents only say "dynamic learning rate adaptation"),
  with SGD before momentum adds them up.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grit import GRITConfig
from grit.eigen import adamw_directions
from grit.optim import GritOptimizer
from grit_vlm.core.fisher_info import Gradients, Side
from grit_vlm.core.grit_lora import GRITLoRALinear
from grit_vlm.core.manager import FisherManager
from grit_vlm.core.moments import EigenMoments

MODES: dict[str, tuple[Literal["sgd", "eigen_adamw", "adamw"], bool]] = {
    "grit_sgd": ("sgd", False),
    "adaptive_sgd": ("sgd", True),
    "grit_adam": ("eigen_adamw", False),
    "adaptive_adam": ("eigen_adamw", True),
    "grit_adam_preconditioned": ("adamw", False),
}
"""Type → mode of `grit.GRITConfig`, and whether steps are shortened to the trust region."""


class OptimizerTypeError(ValueError):
    """No such optimizer, or layers that it cannot work on."""


@dataclass
class _Change:
    """The step of one tensor: in the moments' coordinates, then in the weights' own."""

    layer: GRITLoRALinear
    moments: EigenMoments
    side: Side
    parameter: nn.Parameter
    group: dict[str, Any]
    value: Tensor


class FisherOptimizer(GritOptimizer):
    """A `GritOptimizer` over layers with Fisher estimates of their own.

    Steps of grit_adam are as long as Adam's, tensor by tensor, unless `grafting` is False: with a damping of 1e-4 they
    would be up to a hundred times as long along directions without information.
    """

    manager: FisherManager

    def _eigen_step(self) -> None:
        changes = self._gradients()
        by_moments: dict[tuple[float, float, float], list[_Change]] = {}
        for change in changes:
            group = change.group
            key = (float(group["betas"][0]), float(group["betas"][1]), float(group["eps"]))
            by_moments.setdefault(key, []).append(change)
        for (beta1, beta2, eps), members in by_moments.items():
            directions = adamw_directions(
                [(c.moments.m[c.side][None], c.moments.v[c.side][None]) for c in members],
                [c.value[None] for c in members],
                [torch.tensor([c.moments.steps]) for c in members],
                (beta1, beta2),
                eps,
            )
            for change, direction in zip(members, directions, strict=True):
                change.value = direction[0]
        for change in changes:
            self._weight(change)
        length = self._project(changes)
        self._move(changes, length)
        self._step_others(changes)

    def _gradients(self) -> list[_Change]:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        changes = []
        for name, layer in self.manager.by_pair.items():
            gradients, moments = layer.gradients(), self.manager.moments[name]
            if gradients is None:
                continue
            moments.steps += 1
            weights: dict[Side, nn.Parameter] = {"A": layer.lora_A, "B": layer.lora_B}
            for side, parameter in weights.items():
                coordinates = moments.coordinates(side, gradients[side], layer.fisher_matrix)
                changes.append(_Change(layer, moments, side, parameter, groups[id(parameter)], coordinates))
        return changes

    def _weight(self, change: _Change) -> None:
        """Multiply Adam's step along each direction, and turn it back."""
        fisher, direction = change.layer.fisher_matrix, change.value
        if change.moments.follows and self.manager.preconditions():
            weighted = direction * fisher.step_weights(change.side, self.manager.config.eigen_power)
            if self.manager.config.grafting is not False:
                weighted = weighted * (direction.norm() / weighted.norm().clamp_min(1e-30))
            direction = weighted
        change.value = change.moments.back(change.side, direction, fisher)

    def _project(self, changes: list[_Change]) -> float:
        """Project the changes of each layer; returns their squared length in the Fisher metric (adaptive types)."""
        length = 0.0
        for a, b in zip(changes[::2], changes[1::2], strict=True):
            layer = a.layer
            if not (layer.acts and self.manager.preconditions()):
                continue
            projected = layer.project_gradients({"A": a.value, "B": b.value})
            for change in (a, b):
                change.value = projected[change.side]
            if self.manager.adaptive:
                step: Gradients = {change.side: float(change.group["lr"]) * change.value for change in (a, b)}
                length += layer.fisher_matrix.squared_length(step)
        return length

    def _move(self, changes: list[_Change], length: float) -> None:
        kappa, nu = self.manager.config.kl_clip, 1.0
        if self.manager.adaptive:
            nu = (kappa / length) ** 0.5 if 0 < kappa < length else 1.0
            self.manager.last_metrics["grit/trust_region_factor"] = nu
        for change in changes:
            rate, parameter = float(change.group["lr"]), change.parameter
            parameter.data.mul_(1.0 - rate * float(change.group.get("weight_decay", 0.0)))  # decoupled
            parameter.data.add_(change.value.to(parameter.dtype), alpha=-rate * nu)

    def _step_others(self, changes: list[_Change]) -> None:
        """Let the wrapped optimizer step what is no LoRA weight."""
        own = {id(change.parameter) for change in changes}
        if all(id(p) in own for p in self._parameters()):
            return
        gradients = [(change.parameter, change.parameter.grad) for change in changes]
        for parameter, _ in gradients:
            parameter.grad = None
        self.optimizer.step()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _inner(kind: str, weights: Iterable[Any], lr: float, weight_decay: float, betas: tuple[float, float]) -> Any:
    if MODES[kind][0] == "sgd":
        return torch.optim.SGD(weights, lr=lr, momentum=GRITConfig().sgd_momentum, weight_decay=weight_decay)
    return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=weight_decay)


def check_type(optimizer_type: str) -> str:
    """The name if it is one of `MODES`.

    Raises:
        OptimizerTypeError: it is none.
    """
    if optimizer_type in MODES:
        return optimizer_type
    near = difflib.get_close_matches(str(optimizer_type), MODES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise OptimizerTypeError(f"optimizer_type: expected one of {', '.join(MODES)}, got {optimizer_type!r}{hint}")


def set_mode(manager: FisherManager, optimizer_type: str, **settings: Any) -> None:
    """Tell a manager how steps are to be made.

    Args:
        manager: Of the layers.
        optimizer_type: One of `MODES`.
        settings: Fields of `grit.GRITConfig`: kl_clip, eigen_power, grafting, ng_warmup_steps, …

    Raises:
        OptimizerTypeError, GRITConfigError: wrong names or values.
    """
    mode, adaptive = MODES[check_type(optimizer_type)]
    if mode == "sgd" and not adaptive:
        settings["kl_clip"] = 0.0
    elif adaptive:
        settings.setdefault("kl_clip", manager.config.kl_clip or GRITConfig().kl_clip)  # 0: of grit_sgd before
        if not settings["kl_clip"] > 0:
            raise OptimizerTypeError(f"kl_clip: {optimizer_type} expects κ above 0, got {settings['kl_clip']!r}")
    config = dataclasses.replace(manager.config, mode=mode, **settings)
    config.validate()
    manager.config, manager.adaptive = config, adaptive


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
) -> FisherOptimizer:
    """An optimizer by its type; see the module.

    Args:
        parameters: All that is trained, LoRA's weights among them; also groups with options, as torch takes them.
        optimizer_type: grit_sgd, grit_adam, grit_adam_preconditioned, adaptive_sgd or adaptive_adam.
        grit_layers: Of an adapter (`VLMGRITAdapter.get_grit_layers`), or layers of one's own by name.
        lr: η.
        weight_decay: Decoupled with Adam, in the gradient with SGD, as torch's.
        betas: Adam's.
        max_grad_norm: Clip gradients to it; None: no clipping.
        total_steps: Over which projection budgets go from start to end; None: as planned before.
        optimizer: To be wrapped, instead of torch's AdamW or SGD made here.
        settings: Fields of `grit.GRITConfig`: kl_clip (κ), eigen_power (p), grafting, ng_warmup_steps, log_freq, …

    Raises:
        OptimizerTypeError: no such type, or no layers. GRITConfigError: wrong settings. ValueError: layers whose
            weights are not among the parameters.
    """
    check_type(optimizer_type)
    if not grit_layers:
        raise OptimizerTypeError("grit_layers: expected at least one GRIT-LoRA layer, got none")
    manager = manager_of(grit_layers)
    set_mode(manager, optimizer_type, **settings)
    if total_steps is not None:
        manager.plan(total_steps)
    inner = optimizer or _inner(optimizer_type, parameters, lr, weight_decay, betas)
    return FisherOptimizer(inner, manager, max_grad_norm=max_grad_norm)


def manager_of(grit_layers: Mapping[str, GRITLoRALinear]) -> FisherManager:
    """The manager of all these layers; one of their own where each has been alone.

    Raises:
        OptimizerTypeError: they are some of an adapter's layers only.
    """
    managers = {id(layer.manager): layer.manager for layer in grit_layers.values()}
    manager = next(iter(managers.values()))
    if len(managers) == 1 and manager is not None:
        given = {id(layer) for layer in grit_layers.values()}
        if missing := [name for name, layer in manager.grit_layers.items() if id(layer) not in given]:
            raise OptimizerTypeError(f"grit_layers: expected all layers of the adapter, got them without {missing[:6]}")
        return manager
    return FisherManager(nn.ModuleList(grit_layers.values()), grit_layers)
