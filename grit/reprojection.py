"""Fisher-guided reprojection and rank choice: pure functions on one LoRA pair.

Format: A [r, d_in], B [d_out, r], Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both [r, r]. A reprojection is a pair (L, R) with
L [k', r] and R [r, k']: A ← L A and B ← B R. Then h ← L h and δ ← Rᵀ δ, so Σ_a ← L Σ_a Lᵀ, Σ_g ← Rᵀ Σ_g R, and
gradients go as ∇A ← Rᵀ ∇A, ∇B ← ∇B Lᵀ.
"""

import torch
from torch import Tensor


def choose_rank(values: Tensor, threshold: float, least: int) -> int:
    """The smallest k whose first k eigenvalues hold at least `threshold` of the sum.

    Args:
        values: [r], non-negative, largest first.
        threshold: τ in (0, 1].
        least: Smallest k allowed.

    Returns:
        k in [least, r]; r where the values carry no information.
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

    Args:
        cov_a: Σ_a [r, r].
        cov_g: Σ_g [r, r].

    Returns:
        L [q, r], R [r, q], σ² [r], with q = numerical rank of the product; float64. Keep the first k rows of L and
        columns of R to truncate.
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
    """‖B'A' − BA‖_F / ‖BA‖_F without forming a d_out×d_in matrix; 0 where B A = 0 before and after.

    Args:
        a: A [r, d_in].
        b: B [d_out, r].
        new_a: A' [k, d_in].
        new_b: B' [d_out, k].
    """
    a, b, new_a, new_b = a.double(), b.double(), new_a.double(), new_b.double()
    rows, columns = torch.cat([new_a, a]), torch.cat([new_b, -b], 1)
    # Square roots of Gram differences would lose half the digits; QR of the tall factors keeps them.
    difference = torch.linalg.matrix_norm(torch.linalg.qr(columns).R @ torch.linalg.qr(rows.mT).R.mT)
    before = torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
    if float(before) == 0.0:
        return 0.0 if float(difference) == 0.0 else float("inf")
    return float(difference / before)
