"""Eigenvalues and eigenvectors of Fisher estimates, and plain algebra with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class FisherError(ValueError):
    """An unknown estimate, or nothing was observed yet."""


def compute_natural_gradient(gradient: Tensor, fisher_matrix: Tensor, damping: float = 1e-4) -> Tensor:
    """(F + λI)⁻¹ ∇ of a dense matrix, for small ones. Document 000 has it with torch.solve, which is gone.

    Args:
        gradient: Any shape of n entries.
        fisher_matrix: F [n, n].
        damping: λ ≥ 0, as it is.

    Raises:
        FisherError: F does not fit the gradient, or F + λI is singular.
    """
    n = gradient.numel()
    if tuple(fisher_matrix.shape) != (n, n):
        raise FisherError(f"fisher_matrix: expected shape {(n, n)}, got {tuple(fisher_matrix.shape)}")
    eye = torch.eye(n, dtype=fisher_matrix.dtype, device=fisher_matrix.device)
    solution, info = torch.linalg.solve_ex(fisher_matrix + damping * eye, gradient.reshape(-1).to(fisher_matrix.dtype))
    if int(info):
        raise FisherError("fisher_matrix: expected F + damping·I to be invertible, got a singular one; raise damping")
    return solution.reshape(gradient.shape).to(gradient.dtype)


@dataclass
class Eigen:
    """Eigenvalues and eigenvectors of one side, A or B.

    Attributes:
        values: ≥ 0, of estimate kfac [r, 1], diagonal [r, d], block_diagonal [r, runs, n].
        vectors: As columns, of kfac [r, r], block_diagonal [r, runs, n, n]; None: the coordinates themselves.
        real: [r, runs, n] of block_diagonal: 0 where a run is filled up; None: all are real.
        mean: Of the side's Fisher diagonal; 0 where nothing is known.
    """

    values: Tensor
    vectors: Tensor | None
    real: Tensor | None
    mean: float


def rotate(matrix: Tensor, coordinates: Tensor) -> Tensor:
    """[r, r] times [r, d], or [r, runs, n, n] times [r, runs, n]."""
    return matrix @ coordinates if matrix.dim() == 2 else (matrix @ coordinates[..., None]).squeeze(-1)


def largest(values: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks (1 or 0) of the `budget` largest of all values together; of equal ones the first."""
    flat = torch.cat([v.reshape(-1) for v in values])
    mask = torch.zeros_like(flat)
    mask[flat.sort(descending=True, stable=True).indices[:budget]] = 1.0
    found, start = [], 0
    for v in values:
        found.append(mask[start : start + v.numel()].reshape(v.shape))
        start += v.numel()
    return found
