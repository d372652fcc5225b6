"""Three estimates of the Fisher information of a LoRA pair, with one interface.

A sample is one token. With x [tokens, d_in] the input of A, h = A x, e = ∂ℓ/∂(B h) and δ = ∂ℓ/∂h = Bᵀe, where ℓ is the
loss of one token, the gradients of one token are δ xᵀ (of A) and e hᵀ (of B), and the empirical Fisher information is
F = E[g gᵀ] of g, one of them as a vector (Kunstner et al. 2019 say what it is, and what it is not).

- diagonal: E[g²], exactly the diagonal of F: E[δ²x²] and E[e²h²], of one product each.
- block_diagonal: the blocks of F on its diagonal, exactly: the coordinates of one rank component, in runs of
  `block_size`. Between components and runs it is zero.
- kfac: F_A ≈ Σ_g ⊗ s_x I and F_B ≈ s_e I ⊗ Σ_a with Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both r×r, and the means
  s_x = E|x|²/d_in and s_e = E|e|²/d_out in the place of the two large factors: K-FAC (Martens & Grosse 2015) in rank
  space, the arithmetic of `grit.factors`, as in `grit` (where each side has a damping of its own, and needs no s).

Mended from the documents: the diagonal there is the square of a batch's mean gradient, which vanishes as the batch
grows, and not the mean of squares; `torch.solve` and `torch.symeig` do not exist any more; eigh of a vector has no
meaning: the eigenvectors of a diagonal matrix are the coordinates; a budget says of what it is
(`FisherInformationMatrix.project`).

Eigen-coordinates are the gradient along the eigenvectors of the estimate: [r, d] of estimate diagonal (the gradient
itself) and kfac (turned from the left), [r, runs, n] of block_diagonal; component first, for A and B alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grit import factors
from grit_vlm.core.eigen import Eigen, FisherError, largest, rotate
from grit_vlm.core.fisher_statistics import SIDES, FisherStatistics, Gradients, Side

__all__ = ["SIDES", "FisherError", "FisherInformationMatrix", "Gradients", "Side"]


class FisherInformationMatrix(FisherStatistics):
    """What is known of the Fisher information of one LoRA pair; settings and attributes: see `FisherStatistics`."""

    def eigen(self, name: Side) -> Eigen:
        """Eigenvalues and eigenvectors of A's or B's estimate; computed once after each observation.

        Raises:
            FisherError: nothing was observed.
        """
        if name not in self._eigen:
            self._eigen[name] = self._decompose(name)
        return self._eigen[name]

    def _decompose(self, name: Side) -> Eigen:
        if self.approximation_type == "kfac":
            factor = self._factor(name)
            values, vectors, good = factors.eigh(factor[None])
            return Eigen(values[0][:, None], vectors[0], None, float(values.mean()) if bool(good) else 0.0)
        found = self._now(name)
        if self.approximation_type == "diagonal":
            return Eigen(found, None, None, float(found.mean()))
        rank, size = self._sizes[name]
        runs, n = found.shape[1:3]
        # Coordinates that fill up a run get a value above all eigenvalues, so that no eigenvector mixes them with real
        # ones; they come first then, and are put last, with 0.
        empty = runs * n - size
        trace = found.diagonal(dim1=-2, dim2=-1).sum(-1)
        found = found.clone()
        found[:, -1].diagonal(dim1=-2, dim2=-1)[:, n - empty :] = 2.0 * trace[:, -1:]
        values, vectors, _ = factors.eigh(found.flatten(0, 1))
        values, vectors = values.reshape(rank, runs, n), vectors.reshape(rank, runs, n, n)
        values[:, -1], vectors[:, -1] = values[:, -1].roll(-empty, -1), vectors[:, -1].roll(-empty, -1)
        real = torch.ones(runs, n, dtype=values.dtype, device=values.device)
        real[-1, n - empty :] = 0.0
        values = values * real
        mean = float(values.sum()) / (rank * size)
        return Eigen(values, vectors, real.expand_as(values), mean)

    def lay_out(self, gradient: Tensor) -> Tensor:
        """Component first, [r, d], as eigen-coordinates are: of block_diagonal in runs, filled up with zeros."""
        if self.approximation_type != "block_diagonal":
            return gradient
        rank, size = gradient.shape
        n = min(self.block_size, size)
        runs = -(-size // n)
        return torch.nn.functional.pad(gradient, (0, runs * n - size)).reshape(rank, runs, n)

    def take_out(self, name: Side, coordinates: Tensor) -> Tensor:
        """The inverse of `lay_out`, for A or B."""
        return coordinates.flatten(1)[:, : self._sizes[name][1]] if coordinates.dim() == 3 else coordinates

    def turn(self, name: Side, gradient: Tensor) -> Tensor:
        """A gradient in eigen-coordinates.

        Args:
            name: Of the side.
            gradient: ∇A [r, d_in] or ∇B [d_out, r].
        """
        eigen = self.eigen(name)
        g = self.lay_out((gradient if name == "A" else gradient.mT).to(eigen.values.dtype))
        return g if eigen.vectors is None else rotate(eigen.vectors.mT, g)

    def turn_back(self, name: Side, coordinates: Tensor) -> Tensor:
        """The inverse of `turn`: [r, d_in] or [d_out, r]."""
        vectors = self.eigen(name).vectors
        g = self.take_out(name, coordinates if vectors is None else rotate(vectors, coordinates))
        return g if name == "A" else g.mT

    def scale(self) -> float:
        """What damping is relative to: the mean of F's diagonal over A and B together.

        Together, because B starts at 0 and with it the Fisher information of A: alone, A's damping would vanish with
        it, and A's natural gradient grow without bound.
        """
        sizes = [rank * size for rank, size in (self._sizes[side] for side in SIDES)]
        whole = [self.eigen(side).mean * n for side, n in zip(SIDES, sizes, strict=True)]
        return math.fsum(whole) / sum(sizes)

    def natural_gradient(self, gradients: Gradients) -> Gradients:
        """(F + λI)⁻¹ ∇, with λ relative: `damping` times `scale`.

        Args:
            gradients: ∇A [r, d_in] and ∇B [d_out, r].

        Returns:
            The same shapes. Where F is zero, or singular without damping, the gradient itself.

        Raises:
            FisherError: nothing was observed.
        """
        found: Gradients = {}
        for name in SIDES:
            raw, inverse = gradients[name], self.inverse(name)
            if inverse is None:
                found[name] = raw
            else:
                found[name] = self.turn_back(name, self.turn(name, raw) * inverse).to(raw.dtype)
        return found

    def inverse(self, name: Side) -> Tensor | None:
        """1/(λ_i + λ) along every direction, as `Eigen.values`, 0 where a run is filled up.

        Returns:
            None where F is zero, or singular without damping: gradients stay as they are then.
        """
        eigen = self.eigen(name)
        real = torch.ones_like(eigen.values) if eigen.real is None else eigen.real
        damped = torch.where(real > 0, eigen.values + self.damping * self.scale(), torch.ones_like(eigen.values))
        # An eigenvalue below `grit.factors`' noise is rounding; without damping its inverse would be, too.
        noise = 0.0 if eigen.vectors is None else 64.0 * torch.finfo(damped.dtype).eps * eigen.mean
        return real / damped if eigen.mean > 0 and bool((damped > noise).all()) else None

    def squared_length(self, change: Gradients) -> float:
        """Δᵀ(F + λI)Δ of A and B together, with λ as in `natural_gradient`; of a natural gradient that is ⟨∇, Δ⟩.

        Args:
            change: Δ of A [r, d_in] and of B [d_out, r].

        Raises:
            FisherError: nothing was observed.
        """
        length = 0.0
        for name in SIDES:
            damped = self.eigen(name).values + self.damping * self.scale()
            length += float((damped * self.turn(name, change[name]).square()).sum())
        return length

    def step_weights(self, name: Side, power: float) -> Tensor:
        """What Adam's step along each eigen-direction is multiplied by: `grit.factors.step_weights`, as `Eigen.values`.

        Args:
            name: Of the side.
            power: p of (λ_i/mean λ + damping)^(−p/2).
        """
        eigen = self.eigen(name)
        if eigen.mean <= 0:
            return torch.ones_like(eigen.values)
        # The function takes its mean over the last dimension; values that only fill up a run must not count.
        real = torch.ones_like(eigen.values) if eigen.real is None else eigen.real
        weights = torch.ones_like(eigen.values)
        weights[real > 0] = factors.step_weights(eigen.values[real > 0][None], self.damping, power)[0]
        return weights

    def direction_values(self) -> Tensor:
        """Fisher information along every direction that a budget counts: [directions].

        Of kfac, where a budget counts pairs of directions, the i-th of A and of B: the products of their values [r].

        Raises:
            FisherError: nothing was observed.
        """
        a, b = (self.eigen(name) for name in SIDES)
        if self.approximation_type == "kfac":
            return (a.values * b.values).reshape(-1)
        return torch.cat([e.values.reshape(-1) if e.real is None else e.values[e.real > 0] for e in (a, b)])

    def keeps(self, budget: int) -> dict[str, Tensor]:
        """Which directions a budget keeps: A and B → 1 or 0, as `Eigen.values`; see `project`.

        Raises:
            FisherError: nothing was observed, or a budget below 1.
        """
        if budget < 1:
            raise FisherError(f"budget: expected a whole number from 1 on, got {budget!r}")
        eigens = [self.eigen(name) for name in SIDES]
        if self.approximation_type == "kfac":
            keep = torch.arange(eigens[0].values.shape[0], device=eigens[0].values.device)[:, None] < budget
            return {name: keep.to(e.values.dtype) for name, e in zip(SIDES, eigens, strict=True)}
        # Directions that only fill up a run come after all others.
        values = [e.values if e.real is None else torch.where(e.real > 0, e.values, -1.0) for e in eigens]
        return dict(zip(SIDES, largest(values, budget), strict=True))

    def project(self, gradients: Gradients, budget: int) -> Gradients:
        """The gradients' part along the `budget` directions of largest Fisher information: P ∇ with P² = P = Pᵀ.

        Args:
            gradients: ∇A [r, d_in] and ∇B [d_out, r].
            budget: Of estimate diagonal: coordinates of A and B together, the other ones become zero. Of
                block_diagonal: eigen-directions of all blocks of A and B together. Of kfac: eigen-directions of Σ_g for
                A and of Σ_a for B, each at most r. A budget beyond what there is keeps everything.

        Raises:
            FisherError: nothing was observed, or a budget below 1.
        """
        keep = self.keeps(budget)
        return {
            name: self.turn_back(name, self.turn(name, gradients[name]) * keep[name]).to(gradients[name].dtype)
            for name in SIDES
        }

    def directions(self, budget: int) -> dict[str, Tensor]:
        """The directions that a budget keeps, as orthonormal columns: A and B → [n, k]. For small layers.

        Of kfac the columns are those of the factor, [r, k], else over the n coordinates of A or B row by row.

        Raises:
            FisherError: nothing was observed, or a budget below 1.
        """
        keep = self.keeps(budget)
        if self.approximation_type == "kfac":
            vectors = {name: self.eigen(name).vectors for name in SIDES}
            return {name: v[:, :budget] for name, v in vectors.items() if v is not None}
        found: dict[str, Tensor] = {}
        for name in SIDES:
            kept = keep[name].reshape(-1).nonzero().flatten()
            units = torch.zeros(len(kept), *keep[name].shape, dtype=keep[name].dtype, device=keep[name].device)
            units.flatten(1)[torch.arange(len(kept)), kept] = 1.0
            rank, size = self._sizes[name]
            shape = (rank, size) if name == "A" else (size, rank)
            rows = [self.turn_back(name, unit).reshape(-1) for unit in units]
            found[name] = torch.stack(rows, 1) if rows else keep[name].new_zeros(shape[0] * shape[1], 0)
        return found
