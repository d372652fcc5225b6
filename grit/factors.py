"""The arithmetic of r×r factors.

Format: a factor is a stack `cov` of shape [n, r, r], float32 or float64, one symmetric positive semi-definite matrix
for each of n LoRA layers of one shape. Functions are pure; state lives in `grit.state`.
"""

from typing import Literal

import torch
from torch import Tensor

_TINY = 1e-30  # below this trace a factor holds no information (float32 denormals start at 1e-38)
_NOISE = 64.0  # an eigenvalue below 64 ε of the mean one is rounding (measured on singular sums: up to 44 ε)


def informative(cov: Tensor) -> Tensor:
    """Which factors are finite and not zero: [n, r, r] → [n] bool; B starts at 0, so Σ_g does too."""
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.isfinite(cov).flatten(1).all(-1) & (trace > _TINY)


def damping(
    cov_a: Tensor, cov_g: Tensor, strength: float, mode: Literal["relative", "absolute"], pi_correction: bool
) -> tuple[Tensor, Tensor]:
    """λ_a and λ_g for each layer.

    Relative: λ·tr(Σ)/r. Absolute: λ. With the π-correction (Martens & Grosse 2015, section 6.3) λ is the damping of
    the product Σ_a ⊗ Σ_g, relative to its mean eigenvalue or absolute, and is split as √λ·π and √λ/π with
    π² = tr(Σ_a)/tr(Σ_g).

    Args:
        cov_a: [n, r, r].
        cov_g: [n, r, r].
        strength: λ ≥ 0.
        mode: See above.
        pi_correction: See above.

    Returns:
        [n] and [n]; relative damping of a zero factor is zero.
    """
    rank = cov_a.shape[-1]
    mean_a = cov_a.diagonal(dim1=-2, dim2=-1).sum(-1) / rank
    mean_g = cov_g.diagonal(dim1=-2, dim2=-1).sum(-1) / rank
    if mode == "relative":
        share = strength**0.5 if pi_correction else strength
        return share * mean_a, share * mean_g
    if not pi_correction:
        return torch.full_like(mean_a, strength), torch.full_like(mean_g, strength)
    pi = (mean_a.clamp_min(_TINY) / mean_g.clamp_min(_TINY)).sqrt()
    return strength**0.5 * pi, strength**0.5 / pi


def _noise(cov: Tensor) -> Tensor:
    """What an eigenvalue of Σ + λI must exceed to be more than the rounding of Σ: [n, r, r] → [n]."""
    return _NOISE * torch.finfo(cov.dtype).eps * cov.diagonal(dim1=-2, dim2=-1).mean(-1)


def damped_inverse(cov: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ + λI)⁻¹ by Cholesky; matrices that fail are tried again in float64.

    A singular Σ without damping is refused even where rounding lets Cholesky through: its inverse would be noise.

    Args:
        cov: [n, r, r].
        lam: [n].

    Returns:
        Inverses [n, r, r] (identity where there is none) and which are right: [n] bool, all their entries finite.
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    inverse, good = _cholesky_inverse(cov + lam[:, None, None] * eye)
    if not bool(good.all()):
        bad = ~good
        eye64 = eye.double()
        again, fine = _cholesky_inverse(cov[bad].double() + lam[bad].double()[:, None, None] * eye64)
        again = again.to(cov.dtype)
        fine &= torch.isfinite(again).flatten(1).all(-1)
        inverse[bad] = torch.where(fine[:, None, None], again, eye)
        good[bad] = fine
    sure = _cholesky_inverse(cov.double() + (lam - _noise(cov)).double()[:, None, None] * eye.double())[1]
    good &= sure
    return torch.where(good[:, None, None], inverse, eye), good


def _cholesky_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(matrix).flatten(1).all(-1)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    safe = torch.where(finite[:, None, None], matrix, eye)
    factor, info = torch.linalg.cholesky_ex(safe)
    good = finite & (info == 0)
    inverse = torch.cholesky_inverse(torch.where(good[:, None, None], factor, eye))
    good &= torch.isfinite(inverse).flatten(1).all(-1)
    return torch.where(good[:, None, None], inverse, eye), good


def eigh(cov: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (largest first, [n, r]), eigenvectors as columns ([n, r, r]), and which are right ([n] bool).

    Small factors are diagonalised on the scale of their trace, in float64 (the cost is the same at r = 16).
    """
    rank = cov.shape[-1]
    good = informative(cov)
    eye = torch.eye(rank, dtype=torch.float64, device=cov.device)
    work = cov.double()
    trace = work.diagonal(dim1=-2, dim2=-1).sum(-1)
    safe = torch.where(good[:, None, None], work / trace.clamp_min(_TINY)[:, None, None], eye / rank)
    values, vectors = torch.linalg.eigh(0.5 * (safe + safe.mT))
    values = values.flip(-1).clamp_min(0.0) * torch.where(good, trace, torch.zeros_like(trace))[:, None]
    return values.to(cov.dtype), vectors.flip(-1).to(cov.dtype), good


def damped_inverse_root(cov: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ + λI)^(−1/2), for statistics made of gradients (one-sided Shampoo, Gupta et al. 2018).

    Args and returns as in `damped_inverse`.
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    values, vectors, good = eigh(cov)
    root = (values + lam[:, None]).rsqrt()
    good = good & torch.isfinite(root).all(-1) & (values[:, -1] + lam > _noise(cov))
    root = torch.where(good[:, None], root, torch.ones_like(root))
    result: Tensor = (vectors * root[:, None, :]) @ vectors.mT
    return torch.where(good[:, None, None], result, eye), good


def step_weights(values: Tensor, strength: float, power: float) -> Tensor:
    """Relative step along each eigen-direction, (λ_i/mean λ + damping)^(−p/2): [n, r] → [n, r].

    Adam's step has the same size along every direction (p = 0), so one with little activity changes the layer's
    output least. In whitened coordinates, where every direction has unit variance, the same step is p = 1.
    """
    mean = values.mean(-1, keepdim=True).clamp_min(_TINY)
    return (values / mean + max(strength, 1e-12)) ** (-0.5 * power)


def effective_rank(values: Tensor) -> Tensor:
    """Exp of the entropy of the normalised eigenvalues (Roy & Vetterli 2007): [..., r] → [...], between 1 and r."""
    share = values.clamp_min(0) / values.clamp_min(0).sum(-1, keepdim=True).clamp_min(_TINY)
    return torch.exp(-(share * share.clamp_min(_TINY).log()).sum(-1))


def anisotropy(matrix: Tensor) -> Tensor:
    """Distance from the nearest multiple of the identity, ‖M − (tr M/r)·I‖/‖M‖: [n, r, r] → [n], 0 = a mere scalar."""
    rank = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / rank
    eye = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    norm: Tensor = torch.linalg.matrix_norm(matrix).clamp_min(_TINY)
    share: Tensor = torch.linalg.matrix_norm(matrix - mean[:, None, None] * eye) / norm
    return share
