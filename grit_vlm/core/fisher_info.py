"""Two estimates of the Fisher information of a LoRA pair, with one interface.

A sample is one token. With x [tokens, d_in] the input of A, h = A x, e = ∂ℓ/∂(B h) and δ = ∂ℓ/∂h = Bᵀe, where ℓ is the
loss of one token, the gradients of one token are δ xᵀ (of A) and e hᵀ (of B), and the empirical Fisher information is
F = E[g gᵀ] of g, one of them as a vector (Kunstner et al. 2019 say what it is, and what it is not).

- diagonal: E[g²], exactly the diagonal of F: E[δ²x²] and E[e²h²], of one product each.
- kfac: F_A ≈ Σ_g ⊗ s_x I and F_B ≈ s_e I ⊗ Σ_a with Σ_a = E[h hᵀ] and Σ_g = E[δ δᵀ], both r×r, and the means
  s_x = E|x|²/d_in and s_e = E|e|²/d_out in place of the two large factors: K-FAC (Martens & Grosse 2015) in rank
  space, the arithmetic of `grit.factors`, as in `grit` (where each side has a damping of its own, and needs no s).

Gradients are {"A": ∇A [r, d_in], "B": ∇B [d_out, r]}. Eigen-coordinates are the gradient along the eigenvectors of the
estimate, [r, d], component first, for A and B alike: the gradient itself of estimate diagonal, turned from the left of
kfac.
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
    values: Tensor  # ≥ 0; of estimate kfac [r, 1], diagonal [r, d]
    vectors: Tensor | None  # as columns, [r, r]; of estimate diagonal None: the coordinates
    mean: float  # of the side's Fisher diagonal; 0 where nothing is known


def turn(vectors: Tensor | None, side: Side, gradient: Tensor) -> Tensor:
    """∇A [r, d_in] or ∇B [d_out, r] in the coordinates of these eigenvectors: [r, d]."""
    g = gradient if side == "A" else gradient.mT
    return g if vectors is None else vectors.mT @ g


def turn_back(vectors: Tensor | None, side: Side, coordinates: Tensor) -> Tensor:
    g = coordinates if vectors is None else vectors @ coordinates
    return g if side == "A" else g.mT


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
    ):
        self.approximation_type = approximation_type
        self.damping, self.ema_decay, self.update_freq = damping, ema_decay, update_freq
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
        else:
            now = {"A": delta.square().mT @ x.square() / tokens, "B": h.square().mT @ e.square() / tokens}
        if not all(bool(torch.isfinite(value).all()) for value in now.values()):
            return
        share = 1.0 - self.ema_decay
        for name, value in now.items():
            past = self._sums.get(name)
            self._sums[name] = share * value if past is None else past + share * (value - past)
        self.weight += share * (1.0 - self.weight)
        self.samples += tokens
        self._eigen.clear()

    def _now(self, name: str) -> Tensor:
        if not self.weight:
            raise GritVlmError("expected an observation first (a backward pass, then an update), got none")
        return self._sums[name] / self.weight

    @property
    def fisher_diagonal(self) -> Tensor | None:
        """E[g²] of all coordinates, A's row by row, then B's: [r·d_in + d_out·r]; of estimate kfac None."""
        if self.approximation_type != "diagonal" or not self.weight:
            return None
        return torch.cat([self._now("A").reshape(-1), self._now("B").mT.reshape(-1)])

    @property
    def kfac_factors(self) -> dict[str, Tensor]:
        if self.approximation_type != "kfac" or not self.weight:
            return {}
        return {name: self._now(name) for name in ("A", "G")}

    def eigen(self, name: Side) -> Eigen:
        if name not in self._eigen:
            self._eigen[name] = self._decompose(name)
        return self._eigen[name]

    def _decompose(self, name: Side) -> Eigen:
        if self.approximation_type == "diagonal":
            estimate = self._now(name)
            return Eigen(estimate, None, float(estimate.mean()))
        factor, scale = ("G", "X") if name == "A" else ("A", "E")  # Σ_g·E|x|²/d_in of A, Σ_a·E|e|²/d_out of B
        values, vectors, good = factors.eigh((self._now(factor) * self._now(scale))[None])
        values, mean = values[0][:, None], float(values.mean()) if bool(good) else 0.0
        return Eigen(values, vectors[0], mean)

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
        inverses = {name: self.inverse(name) for name in SIDES}
        return {name: self.scaled(name, gradients[name], inverses[name]) for name in SIDES}

    def scaled(self, name: Side, gradient: Tensor, by: Tensor | None) -> Tensor:
        """The gradient with its eigen-coordinates multiplied by these numbers; None: as it is."""
        if by is None:
            return gradient
        vectors = self.eigen(name).vectors
        return turn_back(vectors, name, turn(vectors, name, gradient.to(by.dtype)) * by).to(gradient.dtype)

    def inverse(self, name: Side) -> Tensor | None:
        """1/(λ_i + λ) along every direction, as `Eigen.values`; None: see `natural_gradient`."""
        eigen = self.eigen(name)
        damped = eigen.values + self.damping * self.scale()
        # An eigenvalue below the noise of `grit.factors` is rounding, and so would be its undamped inverse.
        noise = 0.0 if eigen.vectors is None else 64.0 * torch.finfo(damped.dtype).eps * eigen.mean
        return 1.0 / damped if eigen.mean > 0 and bool((damped > noise).all()) else None

    def step_weights(self, name: Side, power: float) -> Tensor:
        """Factors on Adam's step along each eigen-direction (`grit.factors.step_weights`), as `Eigen.values`."""
        eigen = self.eigen(name)
        if eigen.mean <= 0:
            return torch.ones_like(eigen.values)
        weights = factors.step_weights(eigen.values.reshape(1, -1), self.damping, power)
        return weights.reshape(eigen.values.shape)

    def direction_values(self) -> Tensor:
        """Fisher information along every direction that a budget counts (see `project`): [directions].

        Of kfac, where a budget counts pairs of directions, the i-th of A and of B: the products of their values [r].
        """
        a, b = (self.eigen(name).values for name in SIDES)
        return (a * b).reshape(-1) if self.approximation_type == "kfac" else torch.cat([a.reshape(-1), b.reshape(-1)])

    def keeps(self, budget: int) -> dict[Side, Tensor]:
        """Which directions a budget keeps: A and B → 1 or 0, as `Eigen.values`; see `project`."""
        values = [self.eigen(name).values for name in SIDES]
        if self.approximation_type == "kfac":
            first = torch.arange(values[0].shape[0], device=values[0].device)[:, None] < budget
            return {name: first.to(v.dtype) for name, v in zip(SIDES, values, strict=True)}
        return dict(zip(SIDES, _largest(values, budget), strict=True))

    def project(self, gradients: Gradients, budget: int) -> Gradients:
        """The gradients' part along the `budget` directions of largest Fisher information: P ∇ with P² = P = Pᵀ.

        A budget counts, of estimate diagonal, coordinates of A and B together, the other ones become zero; of kfac,
        eigen-directions of Σ_g for A and of Σ_a for B, each at most r. A budget beyond what there is keeps everything.
        """
        keep = self.keeps(budget)
        return {name: self.scaled(name, gradients[name], keep[name]) for name in SIDES}

    def state_dict(self) -> dict[str, Any]:
        return {
            "estimate": self.approximation_type,
            "sums": dict(self._sums),
            "weight": self.weight,
            "samples": self.samples,
            "sizes": dict(self._sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["estimate"] != self.approximation_type:
            raise GritVlmError(
                f"expected the state of estimate {self.approximation_type}, got one of {state['estimate']}"
            )
        self._sums = dict(state["sums"])
        self._sizes = {name: (int(size[0]), int(size[1])) for name, size in state["sizes"].items()}
        self.weight, self.samples = float(state["weight"]), int(state["samples"])
        self._eigen.clear()
