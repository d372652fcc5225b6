"""Natural gradients and projections of `.grad`, for modes adamw and sgd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from grit import GRITConfig

if TYPE_CHECKING:
    from grit_vlm.core.grit_lora import GRITLoRALinear


def precondition(layers: Iterable[GRITLoRALinear], config: GRITConfig) -> tuple[float, list[Tensor]]:
    """Replace every `.grad` by what its layer's settings make of it, in place.

    Natural gradient first, then grafting (the raw norm of each tensor restored, where set), then projection.

    Args:
        layers: Those without gradients, and those that change nothing, are left alone.
        config: Mode and grafting.

    Returns:
        Σ Δᵀ(F + λI)Δ of what they are replaced by (0 in mode adamw), and cosines of raw and new, one a tensor.
    """
    length = 0.0
    cosines: list[Tensor] = []
    for layer in layers:
        raw = layer.gradients()
        if raw is None or not layer.acts:
            continue
        natural = layer.config.enable_natural_gradient
        new = layer.fisher_matrix.natural_gradient(raw) if natural else raw
        if natural and config.grafts:
            new = {side: _as_long(new[side], raw[side]) for side in raw}
        new = layer.project_gradients(new)
        if config.mode == "sgd":
            length += layer.fisher_matrix.squared_length(new)
        for side, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            cosines.append(_cosine(raw[side], new[side]))
            parameter.grad.copy_(new[side])  # type: ignore[union-attr]
    return length, cosines


def _as_long(new: Tensor, raw: Tensor) -> Tensor:
    result: Tensor = new * (raw.norm() / new.norm().clamp_min(1e-30))
    return result


def _cosine(raw: Tensor, new: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(raw.double().reshape(1, -1), new.double().reshape(1, -1))[0]
