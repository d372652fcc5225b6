"""Adam's moments of one LoRA pair in the eigen-coordinates of its Fisher estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grit.layers import LoraPair
from grit_vlm.core.eigen import rotate
from grit_vlm.core.fisher_info import SIDES, FisherInformationMatrix, Side


class EigenMoments:
    """m and v of A and of B: in the coordinates of the weights until an estimate is there, then in its own.

    As in `grit.state`: when eigenvectors change, the first moment is turned along exactly, the second one as that of
    coordinates taken as uncorrelated, v'_i = Σ_j R_ij² v_j.

    Attributes:
        steps: Adam's step count.
        m: A and B → first moments; component first, as `FisherInformationMatrix.turn` gives coordinates.
        v: The same of second moments.
    """

    def __init__(self, a: nn.Parameter, b: nn.Parameter):
        """At zero.

        Args:
            a: A [r, d_in].
            b: B [d_out, r].
        """
        dtype = torch.promote_types(a.dtype, torch.float32)
        self.m = {"A": torch.zeros_like(a.data, dtype=dtype), "B": torch.zeros_like(b.data.mT, dtype=dtype)}
        self.m["B"] = self.m["B"].contiguous()
        self.v = {side: torch.zeros_like(m) for side, m in self.m.items()}
        self.steps = 0
        self.vectors: dict[Side, Tensor] = {}
        self.follows = False

    def follow(self, fisher: FisherInformationMatrix) -> None:
        """Turn the moments to the estimate's eigenvectors as they are now."""
        for side in SIDES:
            vectors = fisher.eigen(side).vectors
            if vectors is None:
                continue
            if side not in self.vectors:
                turn = vectors.mT
                self.m[side], self.v[side] = fisher.lay_out(self.m[side]), fisher.lay_out(self.v[side])
            else:
                turn = vectors.mT @ self.vectors[side]
            self.m[side] = rotate(turn, self.m[side])
            self.v[side] = rotate(turn.square(), self.v[side])
            self.vectors[side] = vectors
        self.follows = True

    def has_followed(self, fisher: FisherInformationMatrix) -> bool:
        """Whether they are in the coordinates of the estimate as it is now."""
        return self.follows and all(self.vectors.get(side) is fisher.eigen(side).vectors for side in SIDES)

    def adopt(self, fisher: FisherInformationMatrix) -> None:
        """After a checkpoint: take the estimate's own eigenvectors for those that were saved, where they agree."""
        for side, vectors in self.vectors.items():
            own = fisher.eigen(side).vectors
            if own is not None and torch.equal(own, vectors):
                self.vectors[side] = own

    def coordinates(self, side: Side, gradient: Tensor, fisher: FisherInformationMatrix) -> Tensor:
        """A gradient in the coordinates that the moments are in."""
        g = (gradient if side == "A" else gradient.mT).to(self.m[side].dtype)
        vectors = self.vectors.get(side)
        return g.contiguous() if vectors is None else rotate(vectors.mT, fisher.lay_out(g))

    def back(self, side: Side, coordinates: Tensor, fisher: FisherInformationMatrix) -> Tensor:
        """The inverse of `coordinates`: [r, d_in] or [d_out, r]."""
        vectors = self.vectors.get(side)
        g = coordinates if vectors is None else fisher.take_out(side, rotate(vectors, coordinates))
        return g if side == "A" else g.mT

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only."""
        return {
            "m": dict(self.m), "v": dict(self.v), "vectors": dict(self.vectors), "steps": self.steps,
            "follows": self.follows,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.m, self.v, self.vectors = dict(state["m"]), dict(state["v"]), dict(state["vectors"])
        self.steps, self.follows = int(state["steps"]), bool(state["follows"])


class Moments(dict[str, EigenMoments]):
    """Name of a pair → its moments, made when they are first asked for: only mode eigen_adamw has any."""

    def __init__(self, pairs: Mapping[str, LoraPair]):
        """None yet."""
        super().__init__()
        self._pairs = pairs

    def __missing__(self, name: str) -> EigenMoments:
        self[name] = EigenMoments(self._pairs[name].a, self._pairs[name].b)
        return self[name]
