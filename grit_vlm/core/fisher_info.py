"""Three estimates of the Fisher information of a LoRA pair, with one interface.

A sample is one token. With x [tokens, d_in] the input of A, h = A x, e = ∂ℓ/∂(B h) and δ = ∂ℓ/∂h = Bᵀe, where ℓ is the
loss of one token, the gradients of one token are δ xᵀ (of A) and e hᵀ (of B), and the empirical Fisher information is
F = E[g gᵀ] of g, one of them as a vector (Kunstner et al. 2019 say what it is, and what it is not).

- diagonal: E[g²], exactly the diagonal of F: E[δ²x²] and E[e²h²], of one product each.
- block_diagonal: the blocks of F on its diagonal, exactly: the coordinates of one rank component, in runs of
  `block_size`. Between components and runs it is zero.
- kfac: F_A ≈ Σ_g ⊗ I and F_B ≈ I ⊗ Σ_a with Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both r×r: K-FAC (Martens & Grosse 2015)
  in rank space, the arithmetic of `grit.factors`, as in `grit`.

Mended from the documents: the diagonal there is the square of a batch's mean gradient, which vanishes as the batch
grows, and not the mean of squares; `torch.solve` and `torch.symeig` do not exist any more; eigh of a vector has no
meaning: the eigenvectors of a diagonal matrix are the coordinates; a budget says of what it is (`FisherInformationMatrix.project`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grit import factors

Gradients = dict[str, Tensor]
"""A → ∇A [r, d_in], B → ∇B [d_out, r]."""


class FisherError(ValueError):
    """An unknown estimate, or nothing was observed yet."""


class FisherInformationMatrix:
    """What is known of the Fisher information of one LoRA pair.

    Attributes:
        fisher_diagonal: E[g²] of all coordinates, A's row by row, then B's: [r·d_in + d_out·r]; None before the first
            observation, and of other estimates.
        fisher_blocks: A → [r, runs, n, n], B → [r, runs, n, n] of estimate block_diagonal; the last run is filled up
            with zeros where the coordinates do not divide.
        kfac_factors: A → Σ_a [r, r], G → Σ_g [r, r] of estimate kfac.
        weight: Σ of the EMA's weights; the attributes are corrected by it, so that zeros of the start do not count.
    """

    def __init__(
        self,
        approximation_type: Literal["diagonal", "kfac", "block_diagonal"] = "diagonal",
        damping: float = 1e-4,
        ema_decay: float = 0.95,
        update_freq: int = 10,
        block_size: int = 128,
    ):
        """Nothing is known yet.

        Args:
            approximation_type: The estimate.
            damping: λ ≥ 0, relative: times the mean of the diagonal (of each factor, of estimate kfac).
            ema_decay: In [0, 1): weight that an update leaves to the past.
            update_freq: Steps ≥ 1 between two updates.
            block_size: Coordinates of one block at most, ≥ 1.

        Raises:
            FisherError: every mistake at once.
        """
        problems = []
        if approximation_type not in ("diagonal", "kfac", "block_diagonal"):
            problems.append(
                f"approximation_type: expected diagonal, kfac or block_diagonal, got {approximation_type!r}"
            )
        if not damping >= 0:
            problems.append(f"damping: expected a number of at least 0, got {damping!r}")
        if not 0 <= ema_decay < 1:
            problems.append(f"ema_decay: expected a number in [0, 1), got {ema_decay!r}")
        for name, value in (("update_freq", update_freq), ("block_size", block_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name}: expected a whole number from 1 on, got {value!r}")
        if problems:
            raise FisherError("\n".join(problems))
        self.approximation_type = approximation_type
        self.damping, self.ema_decay, self.update_freq, self.block_size = damping, ema_decay, update_freq, block_size
        self.weight = 0.0
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def due(self, step: int) -> bool:
        """Whether an update is due at this step, from 0."""
        return step % self.update_freq == 0

    # What is observed

    def observe(self, x: Tensor, h: Tensor, delta: Tensor, e: Tensor) -> None:
        """Take the tokens of a step into the moving averages.

        Args:
            x: [tokens, d_in]. h: [tokens, r]. delta: [tokens, r]. e: [tokens, d_out]. δ and e are gradients of one
                token's loss: times the number that a mean loss was divided by.

        Raises:
            FisherError: shapes do not fit, or no token came.
        """
        tokens, rank = h.shape
        if not tokens or {t.shape[0] for t in (x, delta, e)} != {tokens} or delta.shape[1] != rank:
            shapes = ", ".join(str(tuple(t.shape)) for t in (x, h, delta, e))
            raise FisherError(
                f"expected x, h, delta, e of the same tokens, one at least, h and delta alike; got {shapes}"
            )
        x, h, delta, e = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (x, h, delta, e))
        self._sizes = {"A": (rank, x.shape[1]), "B": (rank, e.shape[1])}  # component first, for both
        if self.approximation_type == "kfac":
            now = {"A": h.mT @ h / tokens, "G": delta.mT @ delta / tokens}
        elif self.approximation_type == "diagonal":
            now = {"A": delta.square().mT @ x.square() / tokens, "B": h.square().mT @ e.square() / tokens}
        else:
            now = {"A": self._blocks(delta, x), "B": self._blocks(h, e)}
        if not all(bool(torch.isfinite(value).all()) for value in now.values()):
            return  # a step with NaN says nothing of curvature
        share = 1.0 - self.ema_decay
        for name, value in now.items():
            past = self._sums.get(name)
            self._sums[name] = share * value if past is None else past + share * (value - past)
        self.weight += share * (1.0 - self.weight)

    def _blocks(self, by: Tensor, along: Tensor) -> Tensor:
        """E[by_i² · along alongᵀ] for each component i, in runs: [r, runs, n, n]."""
        tokens, size = along.shape
        n = min(self.block_size, size)
        runs = -(-size // n)
        filled = torch.nn.functional.pad(along, (0, runs * n - size)).reshape(tokens, runs, n)
        result: Tensor = torch.einsum("ti,tus,tuz->iusz", by.square(), filled, filled) / tokens
        return result

    def _now(self, name: str) -> Tensor:
        if not self.weight:
            raise FisherError("expected an observation first (a backward pass, then an update), got none")
        return self._sums[name] / self.weight

    @property
    def fisher_diagonal(self) -> Tensor | None:
        """See the class; of B in the order of its entries, row by row."""
        if self.approximation_type != "diagonal" or not self.weight:
            return None
        return torch.cat([self._now("A").reshape(-1), self._now("B").mT.reshape(-1)])

    @property
    def fisher_blocks(self) -> dict[str, Tensor]:
        """See the class."""
        known = self.approximation_type == "block_diagonal" and self.weight
        return {name: self._now(name) for name in ("A", "B")} if known else {}

    @property
    def kfac_factors(self) -> dict[str, Tensor]:
        """See the class."""
        return (
            {name: self._now(name) for name in ("A", "G")} if self.approximation_type == "kfac" and self.weight else {}
        )

    # What follows from it

    def dense(self, name: Literal["A", "B"]) -> Tensor:
        """The whole matrix of A or of B that the estimate stands for: [n, n], n coordinates row by row. For small ones.

        Raises:
            FisherError: nothing was observed.
        """
        rank, size = self._sizes.get(name, (0, 0))
        if self.approximation_type == "kfac":
            factor = self._now("G" if name == "A" else "A")
            eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
            return torch.kron(factor, eye) if name == "A" else torch.kron(eye, factor)
        if self.approximation_type == "diagonal":
            values = self._now(name)
            return torch.diag((values if name == "A" else values.mT).reshape(-1))
        blocks = self._now(name)
        whole = torch.block_diag(*(torch.block_diag(*runs)[:size, :size] for runs in blocks))
        if name == "A":
            return whole
        order = torch.arange(rank * size).reshape(rank, size).mT.reshape(-1)  # component by component → row by row
        return whole[order][:, order]

    def natural_gradient(self, gradients: Gradients) -> Gradients:
        """(F + λI)⁻¹ ∇, with λ relative: `damping` times the mean of F's diagonal.

        Args:
            gradients: ∇A [r, d_in] and ∇B [d_out, r].

        Returns:
            The same shapes. Where F is zero or cannot be inverted, the gradient itself.

        Raises:
            FisherError: nothing was observed.
        """
        a, b = gradients["A"], gradients["B"].mT  # component first
        if self.approximation_type == "kfac":
            new_a, new_b = self._solve(self._now("G"), a), self._solve(self._now("A"), b)
        elif self.approximation_type == "diagonal":
            new_a, new_b = self._divide(self._now("A"), a), self._divide(self._now("B"), b)
        else:
            new_a, new_b = self._solve_blocks("A", a), self._solve_blocks("B", b)
        return {"A": new_a.to(gradients["A"].dtype), "B": new_b.mT.to(gradients["B"].dtype)}

    def _solve(self, factor: Tensor, gradient: Tensor) -> Tensor:
        stack = factor[None]
        if not bool(factors.informative(stack)):
            return gradient
        lam, _ = factors.damping(stack, stack, self.damping, "relative", False)
        inverse, _ = factors.damped_inverse(stack, lam)
        return inverse[0] @ gradient.to(inverse.dtype)

    def _divide(self, values: Tensor, gradient: Tensor) -> Tensor:
        mean = values.mean()
        return gradient / (values + self.damping * mean) if self._divides(values) else gradient

    def _divides(self, values: Tensor) -> bool:
        mean = float(values.mean())
        return mean > 0 and bool((values + self.damping * mean > 0).all())

    def _solve_blocks(self, name: str, gradient: Tensor) -> Tensor:
        blocks, (rank, size) = self._now(name), self._sizes[name]
        runs, n = blocks.shape[1], blocks.shape[2]
        stack = blocks.reshape(rank * runs, n, n)
        mean = stack.diagonal(dim1=-2, dim2=-1).sum() / (rank * size)
        if not float(mean) > 0:
            return gradient
        inverse, _ = factors.damped_inverse(stack, (self.damping * mean).expand(rank * runs))
        filled = torch.nn.functional.pad(gradient.to(inverse.dtype), (0, runs * n - size)).reshape(rank * runs, n, 1)
        return (inverse @ filled).reshape(rank, runs * n)[:, :size]

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
        if budget < 1:
            raise FisherError(f"budget: expected a whole number from 1 on, got {budget!r}")
        a, b = gradients["A"], gradients["B"].mT
        if self.approximation_type == "kfac":
            new_a, new_b = self._onto(self._now("G"), a, budget), self._onto(self._now("A"), b, budget)
        elif self.approximation_type == "diagonal":
            keep_a, keep_b = _largest([self._now("A"), self._now("B")], budget)
            new_a, new_b = a * keep_a, b * keep_b
        else:
            found = {name: factors.eigh(self._now(name).flatten(0, 1))[:2] for name in ("A", "B")}
            keeps = _largest([self._real(name, found[name][0]) for name in ("A", "B")], budget)
            new_a, new_b = (
                self._onto_blocks(name, gradient, found[name][1], keep)
                for name, gradient, keep in zip(("A", "B"), (a, b), keeps, strict=True)
            )
        return {"A": new_a.to(gradients["A"].dtype), "B": new_b.mT.to(gradients["B"].dtype)}

    def _onto(self, factor: Tensor, gradient: Tensor, budget: int) -> Tensor:
        vectors = factors.eigh(factor[None])[1][0][:, :budget]
        return vectors @ (vectors.mT @ gradient.to(vectors.dtype))

    def _real(self, name: str, values: Tensor) -> Tensor:
        """Eigenvalues, those of coordinates that only fill up a run behind all others."""
        rank, size = self._sizes[name]
        n = values.shape[-1]
        runs = values.shape[0] // rank
        real = torch.full((rank, runs), n, device=values.device)
        real[:, -1] = size - (runs - 1) * n
        place = torch.arange(n, device=values.device)
        return torch.where(place < real.reshape(-1, 1), values, torch.full_like(values, -1.0))

    def _onto_blocks(self, name: str, gradient: Tensor, vectors: Tensor, keep: Tensor) -> Tensor:
        rank, size = self._sizes[name]
        n = vectors.shape[-1]
        runs = vectors.shape[0] // rank
        filled = torch.nn.functional.pad(gradient.to(vectors.dtype), (0, runs * n - size)).reshape(rank * runs, n, 1)
        along = (vectors.mT @ filled) * keep[:, :, None]
        return (vectors @ along).reshape(rank, runs * n)[:, :size]


def _largest(values: list[Tensor], budget: int) -> list[Tensor]:
    """Masks of the `budget` largest of all values together; of equal ones the first."""
    flat = torch.cat([v.reshape(-1) for v in values])
    mask = torch.zeros_like(flat)
    mask[flat.sort(descending=True, stable=True).indices[:budget]] = 1.0
    return [part.reshape(v.shape) for part, v in zip(mask.split([v.numel() for v in values]), values, strict=True)]
