"""Twin runs: same seed, same batches, one with the arm and one without; how far do the loss curves part?

The yardstick is what two runs of the baseline differ by (A/A). On a deterministic machine that would be zero, so the
second one starts from weights that differ by one rounding, and what training makes of that is the floor. In short
runs that may be less than a loss in float32 can show; no difference below half of its rounding step is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

DIVERGES = 10.0  # floors by which curves must differ; A/A pairs of the tiny profile differ by 0.5 to 2


@dataclass(frozen=True)
class Twin:
    """Three loss curves, one loss per step; ValueError if their lengths differ or they are empty."""

    baseline: list[float]  # A
    again: list[float]  # A', the same from a perturbed start
    arm: list[float]

    def __post_init__(self) -> None:
        lengths = {len(self.baseline), len(self.again), len(self.arm)}
        if len(lengths) != 1 or not self.baseline:
            raise ValueError(f"expected three loss curves of one length, got {sorted(lengths)} steps")

    @property
    def floor(self) -> float:
        """Root mean square of A − A', but at least half a rounding step of a float32 loss."""
        return max(distance(self.baseline, self.again), self.resolution)

    @property
    def resolution(self) -> float:
        """Half a rounding step of float32 at the largest loss of A."""
        largest = max((abs(loss) for loss in self.baseline if math.isfinite(loss)), default=0.0)
        return torch.finfo(torch.float32).eps * largest / 2

    @property
    def divergence(self) -> float:
        return distance(self.baseline, self.arm)

    @property
    def ratio(self) -> float:
        """Divergence in floors; infinite over a floor of zero (losses that are all zero)."""
        if self.floor > 0:
            return self.divergence / self.floor
        return math.inf if self.divergence > 0 else 0.0

    @property
    def diverges(self) -> bool:
        return not self.ratio <= DIVERGES


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one))


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Move every trainable weight by at most one rounding step of its dtype, at random; zeros stay.

    torch's own random numbers are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                signs = torch.randint(-1, 2, parameter.shape, generator=generator).to(parameter.device)
                step = torch.finfo(parameter.dtype).eps * parameter.abs()
                parameter.add_((signs * step).to(parameter.dtype))
