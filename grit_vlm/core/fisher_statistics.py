"""What Fisher estimates observe of the tokens, and keep; what follows from it is in `grit_vlm.core.fisher_info`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from grit_vlm.core.eigen import Eigen, FisherError

Gradients = dict[str, Tensor]
"""A → ∇A [r, d_in], B → ∇B [d_out, r]."""
Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


class FisherStatistics:
    """What is known of the Fisher information of one LoRA pair.

    Attributes:
        fisher_diagonal: E[g²] of all coordinates, A's row by row, then B's: [r·d_in + d_out·r]; None before the first
            observation, and of other estimates.
        fisher_blocks: A → [r, runs, n, n], B → [r, runs, n, n] of estimate block_diagonal; the last run is filled up
            with zeros where the coordinates do not divide.
        kfac_factors: A → Σ_a [r, r], G → Σ_g [r, r] of estimate kfac.
        weight: Σ of the EMA's weights; the attributes are corrected by it, so that zeros of the start do not count.
        samples: Tokens observed.
    """

    def __init__(
        self,
        approximation_type: Literal["diagonal", "kfac", "block_diagonal"] = "diagonal",
        damping: float = 1e-4,
        ema_decay: float = 0.95,
        update_freq: int = 10,
        block_size: int = 64,
    ):
        """Nothing is known yet.

        Args:
            approximation_type: The estimate.
            damping: λ ≥ 0, relative: times `scale`.
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
        self.samples = 0
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._eigen: dict[str, Eigen] = {}

    def due(self, step: int) -> bool:
        """Whether an update is due at this step, from 0."""
        return step % self.update_freq == 0

    # What is observed

    def observe(self, x: Tensor, h: Tensor, delta: Tensor, e: Tensor) -> None:
        """Take the tokens of a step into the moving averages.

        A step with NaN or infinities is left out.

        Args:
            x: [tokens, d_in].
            h: [tokens, r].
            delta: [tokens, r]; like e the gradient of one token's loss: times the number that a mean loss was divided
                by.
            e: [tokens, d_out].

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
            now |= {"X": x.square().mean(), "E": e.square().mean()}
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
        self.samples += tokens
        self._eigen.clear()

    def _blocks(self, by: Tensor, along: Tensor) -> Tensor:
        """E[by_i² · along alongᵀ] for each component i, in runs: [r, runs, n, n]."""
        tokens, size = along.shape
        n = min(self.block_size, size)
        runs = -(-size // n)
        filled = torch.nn.functional.pad(along, (0, runs * n - size)).reshape(tokens, runs, n)
        by_run = filled.transpose(0, 1)  # one component at a time: all at once would be tokens·r·d numbers
        found = [(by_run * weight[:, None]).mT @ by_run for weight in by.square().mT]
        return torch.stack(found) / tokens

    def _now(self, name: str) -> Tensor:
        if not self.weight:
            raise FisherError("expected an observation first (a backward pass, then an update), got none")
        return self._sums[name] / self.weight

    def _factor(self, name: Side) -> Tensor:
        """Of estimate kfac: Σ_g·E|x|²/d_in of A, Σ_a·E|e|²/d_out of B; what stands beside the identity."""
        factor, scale = ("G", "X") if name == "A" else ("A", "E")
        return self._now(factor) * self._now(scale)

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

    def dense(self, name: Side) -> Tensor:
        """The whole matrix of A or of B that the estimate stands for: [n, n], n coordinates row by row. For small ones.

        Raises:
            FisherError: nothing was observed.
        """
        rank, size = self._sizes.get(name, (0, 0))
        if self.approximation_type == "kfac":
            factor = self._factor(name)
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

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {
            "estimate": self.approximation_type,
            "block_size": self.block_size,
            "sums": dict(self._sums),
            "weight": self.weight,
            "samples": self.samples,
            "sizes": dict(self._sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            FisherError: it is of another estimate.
        """
        saved, size = state["estimate"], state["block_size"]
        if saved != self.approximation_type:
            raise FisherError(f"expected the state of estimate {self.approximation_type}, got one of {saved}")
        if saved == "block_diagonal" and size != self.block_size:
            raise FisherError(f"expected the state of blocks of {self.block_size}, got one of {size}")
        self._sums = dict(state["sums"])
        self._sizes = {name: (int(size[0]), int(size[1])) for name, size in state["sizes"].items()}
        self.weight, self.samples = float(state["weight"]), int(state["samples"])
        self._eigen.clear()
