"""Natural gradients: every `.grad` times the inverse of its factor."""

import torch
from torch import Tensor, nn

from grit.config import GRITConfig
from grit.state import GroupState


def precondition(states: list[GroupState], config: GRITConfig, measure: bool) -> tuple[float, list[Tensor]]:
    """Kfac pairing: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹; paper pairing: ∇A ← Σ_a⁻¹ ∇A, ∇B ← ∇B Σ_g⁻¹; in place.

    Args:
        states: Whose inverses are used.
        config: Pairing, grafting, mode.
        measure: Whether to compare raw with preconditioned gradients.

    Returns:
        Σ ⟨∇, natural ∇⟩ over all layers (mode sgd; else 0), and if measured the cosines of raw and preconditioned
        gradients, [n] a side and group.
    """
    length = 0.0
    cosines: list[Tensor] = []
    for state in states:
        left, right = ("inv_g", "inv_a") if config.pairing == "kfac" else ("inv_a", "inv_g")
        for side in ("a", "b"):
            raw = state.group.gradients(side)
            new = state[left] @ raw if side == "a" else raw @ state[right]
            if config.grafts:
                norm, now = torch.linalg.matrix_norm(raw), torch.linalg.matrix_norm(new)
                new = new * (norm / now.clamp_min(1e-30))[:, None, None]
            if measure:
                cosines.append(nn.functional.cosine_similarity(raw.double().flatten(1), new.double().flatten(1)))
            if config.mode == "sgd":
                length += float((raw * new).sum())
            state.group.put_gradients(side, new)
    return length, cosines
