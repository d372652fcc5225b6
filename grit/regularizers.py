"""Curvature and reprojection penalties, added as gradients, so that they work under any trainer and any loss."""

import torch

from grit import factors
from grit.config import GRITConfig
from grit.schedule import ramp
from grit.state import GroupState


def add_gradients(states: list[GroupState], config: GRITConfig, step: int) -> float:
    """Add ∂/∂A and ∂/∂B of λ_kfac·[tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)] + λ_reproj·[‖(I−P_a)A‖² + ‖B(I−P_g)‖²] to `.grad`.

    P_a and P_g project onto the leading `reprojection_k` eigenvectors of Σ_a and Σ_g, the directions that the paper's
    reprojection keeps. Both weights are raised linearly from 0 over `regularizer_warmup_steps`.

    Args:
        states: Of all groups; layers without statistics or gradients are left out.
        config: λ_kfac, λ_reproj, k, warm-up.
        step: Optimizer step.

    Returns:
        The penalty's value.
    """
    weight = ramp(step, config.regularizer_warmup_steps)
    total = 0.0
    for state in states:
        group = state.group
        cov_a, cov_g = state.covariances()
        eye = torch.eye(group.rank, dtype=group.dtype, device=group.device)
        curvature, reprojection = weight * config.lambda_kfac, weight * config.lambda_reproj
        k = min(config.reprojection_k, group.rank)
        rest = {}
        for side, cov in (("a", cov_a), ("g", cov_g)):
            _, vectors, good = factors.eigh(cov)
            top = vectors[:, :, :k]
            rest[side] = torch.where(good[:, None, None], eye - top @ top.mT, torch.zeros_like(eye))
        a = torch.stack([p.detach().to(group.dtype) for p in group.params_a])
        b = torch.stack([p.detach().to(group.dtype) for p in group.params_b])
        push_a = curvature * (cov_g @ a) + reprojection * (rest["a"] @ a)
        push_b = curvature * (b @ cov_a) + reprojection * (b @ rest["g"])
        has = group.has_gradients().to(group.device)[:, None, None]
        # Both penalties are quadratic forms: ⟨W, ½·gradient⟩ is their value.
        total += float(((a * push_a) * has).sum() + ((b * push_b) * has).sum())
        group.put_gradients("a", group.gradients("a") + 2 * push_a * has)
        group.put_gradients("b", group.gradients("b") + 2 * push_b * has)
    return total
