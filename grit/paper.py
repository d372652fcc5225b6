"""What only the authors' form of GRIT needs: `GRITConfig.paper()`, modes adamw and sgd, and the options of both.

Natural gradients by inverted factors, the trust region of mode sgd, regularizers, and reprojection by projectors. The
default, `grit.eigen_adamw`, runs none of it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grit import factors
from grit.config import GRITConfig
from grit.state import GRADIENTS, GroupState

# Natural gradients


def refresh_inverses(state: GroupState, config: GRITConfig) -> Tensor:
    """(Σ + λI)⁻¹ of both factors of n layers, (Σ + λI)^(−1/2) for statistics of gradients; which failed: [n] bool."""
    failed = []
    for side, cov, trusted in state.trusted(config):
        lam = factors.damping(cov, config.kfac_damping, config.damping_mode == "relative")
        from_gradients = (state["kind"] == GRADIENTS).to(cov.device)
        inverse, good = factors.damped_inverse(cov, lam)
        if bool(from_gradients.any()):
            root, root_good = factors.damped_inverse_root(cov, lam)
            inverse = torch.where(from_gradients[:, None, None], root, inverse)
            good = torch.where(from_gradients, root_good, good)
        ready = trusted & good
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        state.t[f"inv_{side}"] = torch.where(ready[:, None, None], inverse, eye).to(state.device)
        state.t[f"lam_{side}"], state.t[f"ready_{side}"] = lam.to(state.device), ready.to(state.device)
        failed.append((trusted & ~ready).to(state.device))
    state.t = {name: tensor.contiguous() for name, tensor in state.t.items()}
    return failed[0] | failed[1]


def natural_gradients(states: Sequence[GroupState], config: GRITConfig) -> float:
    """Replace every `.grad` by its natural gradient.

    kfac pairing: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹; paper pairing: ∇A ← Σ_a⁻¹ ∇A, ∇B ← ∇B Σ_g⁻¹. Grafting restores the
    raw norm of each tensor. Returns Σ ⟨∇, natural ∇⟩ (mode sgd; else 0).
    """
    length = 0.0
    left, right = ("inv_g", "inv_a") if config.pairing == "kfac" else ("inv_a", "inv_g")
    for state in states:
        for side in ("a", "b"):
            raw = state.group.gradients(side)
            new = state[left] @ raw if side == "a" else raw @ state[right]
            if config.grafts:
                norm, natural_norm = torch.linalg.matrix_norm(raw), torch.linalg.matrix_norm(new)
                new = new * (norm / natural_norm.clamp_min(1e-30))[:, None, None]
            if config.mode == "sgd":
                length += float((raw * new).sum())
            state.group.put_gradients(side, new)
    return length


def trust_region_factor(length: float, rate: float, kappa: float) -> float | None:
    """ν ≤ 1 that brings the step's squared length in the Fisher metric, lr²·⟨∇, F⁻¹∇⟩, down to κ; None: no limit."""
    if kappa > 0 and length > 0 and rate > 0:
        return float(min(1.0, (kappa / (rate * rate * length)) ** 0.5))
    return None


# Regularizers


def add_regularizers(states: Sequence[GroupState], config: GRITConfig, step: int) -> float | None:
    """Add ∂/∂A and ∂/∂B of λ_kfac·[tr(AᵀΣ_gA) + tr(BΣ_aBᵀ)] + λ_reproj·[‖(I−P_a)A‖² + ‖B(I−P_g)‖²] to `.grad`.

    P_a and P_g project onto the leading `reprojection_k` eigenvectors of Σ_a and Σ_g, the directions that the
    paper's reprojection keeps. Gradients instead of a term of the loss work under any trainer and any loss. Layers
    without statistics or gradients are skipped. Returns the penalty, None where both λ are 0.
    """
    if not (config.lambda_kfac or config.lambda_reproj):
        return None
    warmup = config.regularizer_warmup_steps
    weight = 1.0 if warmup <= 0 else min(1.0, step / warmup)
    curvature, reprojection = weight * config.lambda_kfac, weight * config.lambda_reproj
    total = 0.0
    for state in states:
        group = state.group
        cov_a, cov_g = state.covariances()
        eye = torch.eye(group.rank, dtype=group.dtype, device=group.device)
        rest = {}  # I − P of either side
        for side, cov in (("a", cov_a), ("g", cov_g)):
            _, vectors, good = factors.eigh(cov)
            top = vectors[:, :, : config.reprojection_k]
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


# Reprojection


def projections(
    cov_a: Tensor, cov_g: Tensor | None, rank_of: Callable[[Tensor], int], shrink: bool
) -> tuple[Tensor, Tensor, int, int]:
    """(L, R), k_a, k_b of one layer from the eigenvectors of Σ_a and Σ_g [r, r], as the paper projects A and B.

    Without Σ_g, one-sided or because it has seen too few samples (the authors' gate), A's basis serves both. With
    `shrink` L is [k, r] and R [r, k], else both are r×r projections of rank k.
    """
    r = cov_a.shape[-1]
    k_a = rank_of(factors.top_projector(cov_a, r)[1])
    projector_a, _ = factors.top_projector(cov_a, k_a)
    k_b, projector_b = k_a, projector_a
    if cov_g is not None:
        k_b = rank_of(factors.top_projector(cov_g, r)[1])
        projector_b, _ = factors.top_projector(cov_g, k_b)
    if not shrink:
        return projector_a, projector_b, k_a, k_b
    # B P_b P_a A has rank min(k_a, k_b): split it where it is narrowest.
    basis = torch.linalg.eigh(projector_a if k_a <= k_b else projector_b)[1][:, r - min(k_a, k_b) :]
    if k_a <= k_b:
        return basis.mT, projector_b @ basis, k_a, k_b
    return basis.mT @ projector_a, basis, k_a, k_b
