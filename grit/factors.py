"""The arithmetic of r×r factors: damping, inverses, eigenbases; then reprojection and the choice of ranks.

A factor is a stack `cov` [n, r, r], float32 or float64, one symmetric positive semi-definite matrix for each of n LoRA
layers of one shape; functions of reprojection take one layer, [r, r]. All are pure; state lives in `grit.state`.

A reprojection is a pair (L, R) with L [k, r] and R [r, k]: A ← L A and B ← B R. Then h ← L h and δ ← Rᵀ δ, so
Σ_a ← L Σ_a Lᵀ, Σ_g ← Rᵀ Σ_g R, and gradients go as ∇A ← Rᵀ ∇A, ∇B ← ∇B Lᵀ.
"""

import torch
from torch import Tensor

_TINY = 1e-30  # below this trace a factor holds no information (float32 denormals start at 1e-38)
_NOISE = 64.0  # an eigenvalue below 64 ε of the mean one is rounding (measured on singular sums: up to 44 ε)


def informative(cov: Tensor) -> Tensor:
    """Which factors are finite and not zero: [n, r, r] → [n] bool; B starts at 0, so Σ_g does too."""
    trace = cov.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.isfinite(cov).flatten(1).all(-1) & (trace > _TINY)


def damping(cov: Tensor, strength: float, relative: bool) -> Tensor:
    """λ of each factor, [n]: strength·tr(Σ)/r, which is zero for a zero factor, or the strength itself."""
    mean = cov.diagonal(dim1=-2, dim2=-1).sum(-1) / cov.shape[-1]
    return strength * mean if relative else torch.full_like(mean, strength)


def _noise(cov: Tensor) -> Tensor:
    """What an eigenvalue of Σ + λI must exceed to be more than the rounding of Σ: [n, r, r] → [n]."""
    return _NOISE * torch.finfo(cov.dtype).eps * cov.diagonal(dim1=-2, dim2=-1).mean(-1)


def damped_inverse(cov: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ + λI)⁻¹ by Cholesky.

    A singular Σ without damping is refused even where rounding lets Cholesky through: its inverse would be noise.
    `lam` is [n]. Returns inverses [n, r, r] (identity where there is none) and which are right: [n] bool.
    """
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    inverse, good = _cholesky_inverse(cov + lam[:, None, None] * eye)
    good &= _cholesky_inverse(cov.double() + (lam - _noise(cov)).double()[:, None, None] * eye.double())[1]
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

    Small factors are diagonalized on the scale of their trace, in float64 (the cost is the same at r = 16).
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
    """(Σ + λI)^(−1/2), for statistics made of gradients (one-sided Shampoo, Gupta et al. 2018); as `damped_inverse`."""
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


def orthogonal(steps: list[Tensor]) -> list[Tensor]:
    """All singular values made equal, at the same Frobenius norm: stacks [n, p, q] (Muon, Jordan et al. 2024).

    (X Xᵀ)^(−1/2) X on the shorter side, of LoRA the rank. Singular values below 0.001 of the largest stay as much
    smaller than the others: they are rounding as likely as not, and zeros stay zeros.
    """
    tall = [x.shape[-2] > x.shape[-1] for x in steps]
    grams = [x.mT @ x if up else x @ x.mT for x, up in zip(steps, tall, strict=True)]
    alike: dict[tuple[int, torch.device], list[int]] = {}
    for i, gram in enumerate(grams):
        alike.setdefault((gram.shape[-1], gram.device), []).append(i)
    results = list(steps)
    for places in alike.values():
        gram = torch.cat([grams[i] for i in places])
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(_TINY)  # ‖X‖²
        values, vectors = torch.linalg.eigh(gram / trace[:, None, None])
        root = torch.maximum(values, 1e-6 * values[:, -1:]).clamp_min(_TINY).rsqrt()
        root *= (root.square() * values).sum(-1, keepdim=True).clamp_min(_TINY).rsqrt()
        turns = ((vectors * root[:, None, :]) @ vectors.mT).split([len(grams[i]) for i in places])
        for i, turn in zip(places, turns, strict=True):
            results[i] = steps[i] @ turn if tall[i] else turn @ steps[i]
    return results


def effective_rank(values: Tensor) -> Tensor:
    """Exp of the entropy of the normalized eigenvalues (Roy & Vetterli 2007): [..., r] → [...], between 1 and r."""
    share = values.clamp_min(0) / values.clamp_min(0).sum(-1, keepdim=True).clamp_min(_TINY)
    return torch.exp(-(share * share.clamp_min(_TINY).log()).sum(-1))


def choose_rank(values: Tensor, threshold: float, least: int) -> int:
    """The smallest k ≥ `least` whose first k eigenvalues hold at least `threshold` of the sum.

    `values` [r] are non-negative, largest first; where they carry no information, k is r.
    """
    rank = values.shape[0]
    values = values.double().clamp_min(0)
    total = float(values.sum())
    if not (total > 0 and total < float("inf")):
        return rank
    share = torch.cumsum(values, 0) / total
    # A share that rounding keeps just below τ = 1 counts as reached.
    reached = int((share < threshold - 1e-12).sum()) + 1
    return min(rank, max(least, reached))


def balance(cov_a: Tensor, cov_g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The basis in which both covariances are the same diagonal matrix, its directions in order of weight.

    With Σ_a = X Xᵀ and Σ_g = Y Yᵀ and the SVD Yᵀ X = U diag(σ) Vᵀ: L = diag(σ)^(−1/2) Uᵀ Yᵀ and
    R = X V diag(σ)^(−1/2) give L Σ_a Lᵀ = Rᵀ Σ_g R = diag(σ) and L R = I (balanced truncation, Moore 1981, of two
    covariances instead of two Gramians). σ² are the eigenvalues of Σ_a Σ_g, which no change A → SA, B → BS⁻¹ alters.

    Takes [r, r] twice; returns L [q, r], R [r, q], σ² [r] in float64, with q the numerical rank of the product. Keep
    the first k rows of L and columns of R to truncate.
    """
    x, y = _factor(cov_a), _factor(cov_g)
    u, sigma, vt = torch.linalg.svd(y.mT @ x)
    # Nothing of either: 1e-9 of the largest, or the rounding of the product, by which all would be divided.
    floor = torch.maximum(sigma[0] * 1e-9, x.norm() * y.norm() * 1e-13).clamp_min(1e-300)
    q = int((sigma > floor).sum())
    scale = sigma[:q].rsqrt()
    left = scale[:, None] * (u[:, :q].mT @ y.mT)
    right = (x @ vt[:q].mT) * scale
    return left, right, sigma.square()


def _factor(cov: Tensor) -> Tensor:
    """X with Σ = X Xᵀ, also where Σ is singular: [r, r] → [r, r], float64."""
    cov = cov.double()
    values, vectors = torch.linalg.eigh(0.5 * (cov + cov.mT))
    # What rounding leaves of a zero (1e-16) would be a direction of weight 1e-8 after the root.
    values = torch.where(values > values[-1] * 1e-14, values, 0.0)
    factor: Tensor = vectors * values.clamp_min(0).sqrt()
    return factor


def top_projector(cov: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """V Vᵀ of the k leading eigenvectors, and all eigenvalues largest first: [r, r] → [r, r], [r]; float64."""
    cov = cov.double()
    values, vectors = torch.linalg.eigh(0.5 * (cov + cov.mT))
    top = vectors.flip(-1)[:, :k]
    return top @ top.mT, values.flip(-1).clamp_min(0)


def relative_change(a: Tensor, b: Tensor, new_a: Tensor, new_b: Tensor) -> float:
    """‖B'A' − BA‖_F / ‖BA‖_F without forming a d_out×d_in matrix; 0 where B A = 0 before and after."""
    a, b, new_a, new_b = a.double(), b.double(), new_a.double(), new_b.double()
    rows, columns = torch.cat([new_a, a]), torch.cat([new_b, -b], 1)
    # Square roots of Gram differences would lose half the digits; QR of the tall factors keeps them.
    difference = torch.linalg.matrix_norm(torch.linalg.qr(columns).R @ torch.linalg.qr(rows.mT).R.mT)
    before = torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
    if float(before) == 0.0:
        return 0.0 if float(difference) == 0.0 else float("inf")
    return float(difference / before)
