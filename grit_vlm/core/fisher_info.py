"""Three estimates of the Fisher information of a LoRA pair, with one interface.

A sample is one token. With x [tokens, d_in] the input of A, h = A x, e = ∂ℓ/∂(B h) and δ = ∂ℓ/∂h = Bᵀe, where ℓ is the
loss of one token, the gradients of one token are δ xᵀ (of A) and e hᵀ (of B), and the empirical Fisher information is
F = E[g gᵀ] of g, one of them as a vector (Kunstner et al. 2019 say what it is, and what it is not).

- diagonal: E[g²], exactly the diagonal of F: E[δ²x²] and E[e²h²], of one product each.
- block_diagonal: the blocks of F on its diagonal, exactly: the coordinates of one rank component, in runs of
  `block_size`. Between components and runs it is zero.
- kfac: F_A ≈ Σ_g ⊗ s_x I and F_B ≈ s_e I ⊗ Σ_a with Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both r×r, and the means
  s_x = E|x|²/d_in and s_e = E|e|²/d_out in place of the two large factors: K-FAC (Martens & Grosse 2015) in rank
  space, the arithmetic of `grit.factors`, as in `grit` (where each side has a damping of its own, and needs no s).

Gradients are {"A": ∇A [r, d_in], "B": ∇B [d_out, r]}. Eigen-coordinates are the gradient along the eigenvectors of the
estimate: [r, d] of estimate diagonal (the gradient itself) and kfac (turned from the left), [r, runs, n] of
block_diagonal; component first, for A and B alike.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grit import factors
from grit.config import BelowOne, Count, NotNegative, complaints
from grit_vlm.config.model_configs import Estimate
from grit_vlm.errors import GritVlmError

Gradients = dict[str, Tensor]
Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


def compute_natural_gradient(gradient: Tensor, fisher_matrix: Tensor, damping: float = 1e-4) -> Tensor:
    """(F + λI)⁻¹ ∇ of a dense F [n, n] and a gradient of n entries; GritVlmError if F does not fit or is singular."""
    n = gradient.numel()
    if tuple(fisher_matrix.shape) != (n, n):
        raise GritVlmError(f"fisher_matrix: expected shape {(n, n)}, got {tuple(fisher_matrix.shape)}")
    eye = torch.eye(n, dtype=fisher_matrix.dtype, device=fisher_matrix.device)
    solution, info = torch.linalg.solve_ex(fisher_matrix + damping * eye, gradient.reshape(-1).to(fisher_matrix.dtype))
    if int(info):
        raise GritVlmError("fisher_matrix: expected F + damping·I to be invertible, got a singular one; raise damping")
    return solution.reshape(gradient.shape).to(gradient.dtype)


@dataclass
class Eigen:
    values: Tensor  # ≥ 0; of estimate kfac [r, 1], diagonal [r, d], block_diagonal [r, runs, n]
    vectors: Tensor | None  # as columns, of kfac [r, r], block_diagonal [r, runs, n, n]; None: the coordinates
    real: Tensor  # of the shape of `values`: False where a run is filled up
    mean: float  # of the side's Fisher diagonal; 0 where nothing is known


def rotate(matrix: Tensor, coordinates: Tensor) -> Tensor:
    """[r, r] times [r, d], or [r, runs, n, n] times [r, runs, n]."""
    return matrix @ coordinates if matrix.dim() == 2 else (matrix @ coordinates[..., None]).squeeze(-1)


def _largest(values: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks (1 or 0) of the `budget` largest of all values together; of equal ones, the first."""
    flat = torch.cat([v.reshape(-1) for v in values])
    mask = torch.zeros_like(flat)
    mask[flat.sort(descending=True, stable=True).indices[:budget]] = 1.0
    parts = mask.split([v.numel() for v in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


class FisherInformationMatrix:
    """An estimate of the Fisher information of one LoRA pair; GritVlmError before the first observation.

    `damping` is relative: times `scale`.
    """

    def __init__(
        self,
        approximation_type: Estimate = "diagonal",
        damping: NotNegative = 1e-4,  # λ, relative to the mean of F's diagonal
        ema_decay: BelowOne = 0.95,
        update_freq: Count = 10,
        block_size: Count = 64,
    ):
        self.approximation_type = approximation_type
        self.damping, self.ema_decay, self.update_freq, self.block_size = damping, ema_decay, update_freq, block_size
        if problems := complaints(FisherInformationMatrix.__init__, vars(self)):
            raise GritVlmError("\n".join(problems.values()))
        self.weight = 0.0  # Σ of the EMA's weights, which averages are divided by: zeros of the start do not count
        self.samples = 0
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._eigen: dict[str, Eigen] = {}

    def observe(self, x: Tensor, h: Tensor, delta: Tensor, e: Tensor) -> None:
        """Take the tokens of a step into the moving averages; a step with NaN or infinities is left out.

        x [tokens, d_in], h [tokens, r]; δ [tokens, r] and e [tokens, d_out] are of one token's loss, that is times the
        number that a mean loss was divided by.
        """
        tokens, rank = h.shape
        x, h, delta, e = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (x, h, delta, e))
        self._sizes = {"A": (rank, x.shape[1]), "B": (rank, e.shape[1])}  # component first, for both
        if self.approximation_type == "kfac":
            now = {"A": h.mT @ h / tokens, "G": delta.mT @ delta / tokens}
            now |= {"X": x.square().mean(), "E": e.square().mean()}
        elif self.approximation_type == "diagonal":
            now = {"A": delta.square().mT @ x.square() / tokens, "B": h.square().mT @ e.square() / tokens}
        else:
            now = {"A": self._blocks(delta, x), "B": self._blocks(h, e)}
        if not all(bool(torch.isfinite(value).all()) for value in now.values()):
            return
        share = 1.0 - self.ema_decay
        for name, value in now.items():
            past = self._sums.get(name)
            self._sums[name] = share * value if past is None else past + share * (value - past)
        self.weight += share * (1.0 - self.weight)
        self.samples += tokens
        self._eigen.clear()

    def _runs(self, size: int) -> tuple[int, int]:
        n = min(self.block_size, size)
        return -(-size // n), n

    def _blocks(self, by: Tensor, along: Tensor) -> Tensor:
        """E[by_i² · along alongᵀ] for each component i, in runs: [r, runs, n, n]."""
        tokens, size = along.shape
        runs, n = self._runs(size)
        filled = torch.nn.functional.pad(along, (0, runs * n - size)).reshape(tokens, runs, n)
        by_run = filled.transpose(0, 1)  # one component at a time: all at once would be tokens·r·d numbers
        blocks = [(by_run * weight[:, None]).mT @ by_run for weight in by.square().mT]
        return torch.stack(blocks) / tokens

    def _now(self, name: str) -> Tensor:
        if not self.weight:
            raise GritVlmError("expected an observation first (a backward pass, then an update), got none")
        return self._sums[name] / self.weight

    def _factor(self, name: Side) -> Tensor:
        """Of estimate kfac: Σ_g·E|x|²/d_in of A, Σ_a·E|e|²/d_out of B; what stands beside the identity."""
        factor, scale = ("G", "X") if name == "A" else ("A", "E")
        return self._now(factor) * self._now(scale)

    @property
    def fisher_diagonal(self) -> Tensor | None:
        """E[g²] of all coordinates, A's row by row, then B's: [r·d_in + d_out·r]; of other estimates None."""
        if self.approximation_type != "diagonal" or not self.weight:
            return None
        return torch.cat([self._now("A").reshape(-1), self._now("B").mT.reshape(-1)])

    @property
    def fisher_blocks(self) -> dict[str, Tensor]:
        """A and B → [r, runs, n, n] of estimate block_diagonal; the last run is filled up with zeros."""
        known = self.approximation_type == "block_diagonal" and self.weight
        return {name: self._now(name) for name in SIDES} if known else {}

    @property
    def kfac_factors(self) -> dict[str, Tensor]:
        known = self.approximation_type == "kfac" and self.weight
        return {name: self._now(name) for name in ("A", "G")} if known else {}

    def dense(self, name: Side) -> Tensor:
        """The whole matrix that the estimate of A or B stands for, of small ones: [n, n], coordinates row by row."""
        rank, size = self._sizes.get(name, (0, 0))
        if self.approximation_type == "kfac":
            factor = self._factor(name)
            eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
            return torch.kron(factor, eye) if name == "A" else torch.kron(eye, factor)
        now = self._now(name)
        if self.approximation_type == "diagonal":
            return torch.diag((now if name == "A" else now.mT).reshape(-1))
        whole = torch.block_diag(*(torch.block_diag(*runs)[:size, :size] for runs in now))
        if name == "A":
            return whole
        order = torch.arange(rank * size).reshape(rank, size).mT.reshape(-1)  # component by component → row by row
        return whole[order][:, order]

    def eigen(self, name: Side) -> Eigen:
        if name not in self._eigen:
            self._eigen[name] = self._decompose(name)
        return self._eigen[name]

    def _decompose(self, name: Side) -> Eigen:
        if self.approximation_type == "kfac":
            values, vectors, good = factors.eigh(self._factor(name)[None])
            values, mean = values[0][:, None], float(values.mean()) if bool(good) else 0.0
            return Eigen(values, vectors[0], torch.ones_like(values, dtype=torch.bool), mean)
        estimate = self._now(name)
        if self.approximation_type == "diagonal":
            return Eigen(estimate, None, torch.ones_like(estimate, dtype=torch.bool), float(estimate.mean()))
        rank, size = self._sizes[name]
        runs, n = estimate.shape[1:3]
        # Coordinates that fill up a run get a value above all eigenvalues, so that no eigenvector mixes them with real
        # ones; they come first then, and are put last, with 0.
        empty = runs * n - size
        trace = estimate.diagonal(dim1=-2, dim2=-1).sum(-1)
        estimate = estimate.clone()
        estimate[:, -1].diagonal(dim1=-2, dim2=-1)[:, n - empty :] = 2.0 * trace[:, -1:]
        values, vectors, _ = factors.eigh(estimate.flatten(0, 1))
        values, vectors = values.reshape(rank, runs, n), vectors.reshape(rank, runs, n, n)
        values[:, -1], vectors[:, -1] = values[:, -1].roll(-empty, -1), vectors[:, -1].roll(-empty, -1)
        real = torch.ones_like(values, dtype=torch.bool)
        real[:, -1, n - empty :] = False
        values = values * real
        return Eigen(values, vectors, real, float(values.sum()) / (rank * size))

    def lay_out(self, gradient: Tensor) -> Tensor:
        """[r, d] laid out as eigen-coordinates: for block_diagonal in runs, padded with zeros."""
        if self.approximation_type != "block_diagonal":
            return gradient
        rank, size = gradient.shape
        runs, n = self._runs(size)
        return torch.nn.functional.pad(gradient, (0, runs * n - size)).reshape(rank, runs, n)

    def take_out(self, name: Side, coordinates: Tensor) -> Tensor:
        return coordinates.flatten(1)[:, : self._sizes[name][1]] if coordinates.dim() == 3 else coordinates

    def turn(self, name: Side, gradient: Tensor) -> Tensor:
        """∇A [r, d_in] or ∇B [d_out, r] in eigen-coordinates."""
        eigen = self.eigen(name)
        return self.turn_along(eigen.vectors, name, gradient.to(eigen.values.dtype))

    def turn_back(self, name: Side, coordinates: Tensor) -> Tensor:
        return self.turn_back_along(self.eigen(name).vectors, name, coordinates)

    def turn_along(self, vectors: Tensor | None, name: Side, gradient: Tensor) -> Tensor:
        g = gradient if name == "A" else gradient.mT
        return g if vectors is None else rotate(vectors.mT, self.lay_out(g))

    def turn_back_along(self, vectors: Tensor | None, name: Side, coordinates: Tensor) -> Tensor:
        g = coordinates if vectors is None else self.take_out(name, rotate(vectors, coordinates))
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
        """(F + λI)⁻¹ ∇ with λ = `damping` times `scale`; the gradient itself if F is zero, or singular and undamped."""
        natural: Gradients = {}
        for name in SIDES:
            raw, inverse = gradients[name], self.inverse(name)
            if inverse is None:
                natural[name] = raw
            else:
                natural[name] = self.turn_back(name, self.turn(name, raw) * inverse).to(raw.dtype)
        return natural

    def inverse(self, name: Side) -> Tensor | None:
        """1/(λ_i + λ) along every direction, as `Eigen.values`, 0 in the padding of a run; None: see above."""
        eigen = self.eigen(name)
        damped = torch.where(eigen.real, eigen.values + self.damping * self.scale(), torch.ones_like(eigen.values))
        # An eigenvalue below the noise of `grit.factors` is rounding, and so would be its undamped inverse.
        noise = 0.0 if eigen.vectors is None else 64.0 * torch.finfo(damped.dtype).eps * eigen.mean
        return eigen.real / damped if eigen.mean > 0 and bool((damped > noise).all()) else None

    def squared_length(self, change: Gradients) -> float:
        """Δᵀ(F + λI)Δ of A and B together; of a natural gradient that is ⟨∇, Δ⟩."""
        length = 0.0
        for name in SIDES:
            damped = self.eigen(name).values + self.damping * self.scale()
            length += float((damped * self.turn(name, change[name]).square()).sum())
        return length

    def step_weights(self, name: Side, power: float) -> Tensor:
        """Factors on Adam's step along each eigen-direction (`grit.factors.step_weights`), as `Eigen.values`."""
        eigen = self.eigen(name)
        weights = torch.ones_like(eigen.values)
        if eigen.mean > 0:  # values that only fill up a run must not count in the mean
            weights[eigen.real] = factors.step_weights(eigen.values[eigen.real][None], self.damping, power)[0]
        return weights

    def direction_values(self) -> Tensor:
        """Fisher information along every direction that a budget counts (see `project`): [directions].

        Of kfac, where a budget counts pairs of directions, the i-th of A and of B: the products of their values [r].
        """
        a, b = (self.eigen(name) for name in SIDES)
        if self.approximation_type == "kfac":
            return (a.values * b.values).reshape(-1)
        return torch.cat([e.values[e.real] for e in (a, b)])

    def keeps(self, budget: int) -> dict[Side, Tensor]:
        """Which directions a budget keeps: A and B → 1 or 0, as `Eigen.values`; see `project`."""
        eigens = [self.eigen(name) for name in SIDES]
        if self.approximation_type == "kfac":
            keep = torch.arange(eigens[0].values.shape[0], device=eigens[0].values.device)[:, None] < budget
            return {name: keep.to(e.values.dtype) for name, e in zip(SIDES, eigens, strict=True)}
        values = [torch.where(e.real, e.values, -1.0) for e in eigens]  # what fills up a run comes after all others
        return dict(zip(SIDES, _largest(values, budget), strict=True))

    def project(self, gradients: Gradients, budget: int) -> Gradients:
        """The gradients' part along the `budget` directions of largest Fisher information: P ∇ with P² = P = Pᵀ.

        A budget counts, of estimate diagonal, coordinates of A and B together, the other ones become zero; of
        block_diagonal, eigen-directions of all blocks of A and B together; of kfac, eigen-directions of Σ_g for A and
        of Σ_a for B, each at most r. A budget beyond what there is keeps everything.
        """
        keep = self.keeps(budget)
        return {
            name: self.turn_back(name, self.turn(name, gradients[name]) * keep[name]).to(gradients[name].dtype)
            for name in SIDES
        }

    def directions(self, budget: int) -> dict[str, Tensor]:
        """The directions that a budget keeps, as orthonormal columns: A and B → [n, k]. For small layers.

        Of kfac the columns are those of the factor, [r, k], else over the n coordinates of A or B row by row.
        """
        keep = self.keeps(budget)
        if self.approximation_type == "kfac":
            vectors = {name: self.eigen(name).vectors for name in SIDES}
            return {name: v[:, :budget] for name, v in vectors.items() if v is not None}
        matrices: dict[str, Tensor] = {}
        for name, mask in keep.items():
            among = (mask * self.eigen(name).real).reshape(-1) > 0  # a large budget keeps what fills up a run, too
            units = torch.eye(mask.numel(), dtype=mask.dtype, device=mask.device)[among]
            rows = [self.turn_back(name, unit.reshape(mask.shape)).reshape(-1) for unit in units]
            matrices[name] = torch.stack(rows, 1) if rows else mask.new_zeros(math.prod(self._sizes[name]), 0)
        return matrices

    def state_dict(self) -> dict[str, Any]:
        return {
            "estimate": self.approximation_type,
            "block_size": self.block_size,
            "sums": dict(self._sums),
            "weight": self.weight,
            "samples": self.samples,
            "sizes": dict(self._sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved, size = state["estimate"], state["block_size"]
        if saved != self.approximation_type:
            raise GritVlmError(f"expected the state of estimate {self.approximation_type}, got one of {saved}")
        if saved == "block_diagonal" and size != self.block_size:
            raise GritVlmError(f"expected the state of blocks of {self.block_size}, got one of {size}")
        self._sums = dict(state["sums"])
        self._sizes = {name: (int(size[0]), int(size[1])) for name, size in state["sizes"].items()}
        self.weight, self.samples = float(state["weight"]), int(state["samples"])
        self._eigen.clear()
