"""How well two given clusters are separated: Calinski-Harabasz, Xie-Beni, Silhouette, Davies-Bouldin, Dunn.

Notation: N points x_i in two clusters of n₁ and n₂ points with means μ₁ and μ₂.

    D = ‖μ₁ − μ₂‖²           between the means
    W = Σ_c Σ_{i∈c} ‖x_i − μ_c‖²   within the clusters
    CHI = (n₁n₂/N)·D / (W/(N−2))   Calinski & Harabasz 1974; for two clusters Σ n_c‖μ_c − μ‖² = (n₁n₂/N)·D
    XBI = W / (N·D)                Xie & Beni 1991, with memberships 0 and 1

So CHI·XBI = (n₁n₂/N)·D·(N−2)/W · W/(N·D) = (N−2)·n₁n₂/N²: D and W cancel. For given n₁ and n₂ each is the other's
reciprocal times a constant. The two carry one piece of information, D/W.

D and W need inner products only. They are computed from the Gram matrix K = X·Xᵀ, for thousands of resamplings or
labellings of the same points at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ClusterError(ValueError):
    """Points or labels that indices of two clusters cannot be computed for."""


def gram(points: Array) -> Array:
    """Inner products of points, taken about their mean, which no index depends on but rounding does.

    Args:
        points: Shape (..., N, d).

    Returns:
        Shape (..., N, N).
    """
    centred = points - points.mean(axis=-2, keepdims=True)
    return np.asarray(centred @ np.swapaxes(centred, -1, -2), dtype=np.float64)


@dataclass(frozen=True)
class Separation:
    """D, W and the indices made of them, of R labellings in L spaces.

    Attributes:
        between: D, shape (L, R).
        within: W, shape (L, R).
        n: Points in the two clusters, repeats counted.
    """

    between: Array
    within: Array
    n: tuple[int, int]

    @property
    def calinski_harabasz(self) -> Array:
        """CHI, shape (L, R); inf where the points of each cluster coincide, nan where all points do."""
        first, second = self.n
        total = first + second
        return _ratio(self.between * first * second / total * (total - 2), self.within)

    @property
    def xie_beni(self) -> Array:
        """XBI, shape (L, R); inf where the means coincide."""
        return _ratio(self.within, sum(self.n) * self.between)

    @property
    def inverse_xie_beni(self) -> Array:
        """1/XBI, shape (L, R); 0 where the means coincide."""
        return _ratio(sum(self.n) * self.between, self.within)


def _ratio(numerator: Array, denominator: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(numerator / denominator, dtype=np.float64)


def separation(grams: Array, first: Array, second: Array) -> Separation:
    """D and W for many labellings or resamplings.

    Args:
        grams: Gram matrices of the same points in L spaces, shape (L, N, N).
        first: How often each point counts in the first cluster, shape (R, N).
        second: The same for the second cluster.

    Raises:
        ClusterError: rows that differ in size, or an empty cluster.
    """
    sizes = [np.unique(counts.sum(axis=1)) for counts in (first, second)]
    if any(len(size) != 1 or size[0] < 1 for size in sizes):
        raise ClusterError("expected two clusters that are not empty, of the same sizes in every row")
    n_first, n_second = (int(size[0]) for size in sizes)
    a, b = first / n_first, second / n_second
    # Per space: aᵀKa = ‖μ₁‖², bᵀKb = ‖μ₂‖², aᵀKb = μ₁ᵀμ₂; the diagonal of K holds ‖x_i‖².
    between, within = [], []
    for k in grams:
        ak, bk = a @ k, b @ k
        aa, bb, ab = (ak * a).sum(axis=1), (bk * b).sum(axis=1), (ak * b).sum(axis=1)
        between.append(np.maximum(aa + bb - 2 * ab, 0.0))
        within.append(np.maximum((first + second) @ np.diagonal(k) - n_first * aa - n_second * bb, 0.0))
    return Separation(np.asarray(between), np.asarray(within), (n_first, n_second))


def silhouette_davies_bouldin_dunn(points: Array, labels: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Three further indices of one labelling, Euclidean: scikit-learn's two, and Dunn's (1974).

    Dunn = smallest distance between points of different clusters / largest distance within a cluster.

    Args:
        points: Shape (N, d).
        labels: Which points are in the second cluster, shape (N,).

    Returns:
        Silhouette (−1 to 1, higher is better), Davies-Bouldin (≥ 0, lower is better), Dunn (≥ 0, higher is better);
        nan where all points of each cluster coincide.
    """
    from sklearn.metrics import davies_bouldin_score, pairwise_distances, silhouette_score

    distances = pairwise_distances(points)
    same = labels[:, None] == labels[None, :]
    widest = float(distances[same].max())
    if widest == 0.0:
        return float("nan"), float("nan"), float("nan")
    np.fill_diagonal(distances, 0.0)
    return (
        float(silhouette_score(distances, labels, metric="precomputed")),
        float(davies_bouldin_score(points, labels)),
        float(distances[~same].min()) / widest,
    )
