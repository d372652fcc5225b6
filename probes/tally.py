"""Every step, tensor by tensor: was the gradient changed, is the update plain AdamW's, did the weight move?

A record (geometry.py) examines a few steps closely. This counts in all of them, at eleven inner products per tensor, so
that a preconditioner that works on every tenth step is not mistaken for one that always works.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Degrees above which a gradient was turned on its way to the optimizer, and above which an update is off plain AdamW's
# (which is within 0.01 of its shadow).
TURNED, OFF = 0.1, 1.0
# On 16-bit weights rounding alone turns a gradient that was scaled and clipped by 0.15, an update by degrees.
ROUNDING = 5.0
# Share of an update's length below which a weight is back where it was when the next step begins.
BACK = 0.05

COUNTS = (
    "steps",  # with a raw gradient: finite, not zero
    "lost",  # where the optimizer read none, or zeros
    "overflow",  # where what it read is not finite, or its square is not
    "still",  # that did not move the tensor, and nothing else did
    "rounded",  # of those: as of SGD that has converged, or of weights that are huge, it was less than float32 can add
    "put_back",  # that moved it, and it was back before the next step
    "rate_zero",  # with a learning rate of 0
    "not_held",  # in which no group of the optimizer had it
    "against",  # where the gradient that the optimizer read points away from the raw one
    "uphill",  # whose update does, decay of the weights left out
)
SUMS = ("cos_gradient", "cos_against", "cos_step", "cos_shadow", "log_ratio", "log_ratio_sq")
EFFECTS = ("turned", "off")  # each with the first and the last such step, and the counted steps since the first
COLUMNS = (*COUNTS, *SUMS, *(f"{e}{part}" for e in EFFECTS for part in ("", "_first", "_last", "_since")))


def common_factor(rr: Tensor, ri: Tensor, ii: Tensor) -> float | None:
    """The number that all raw gradients were multiplied by (clipping, a loss scale); None if it was not one number."""
    there = rr > 0
    cosine, ratio = ri[there] / (rr[there] * ii[there]).sqrt(), (ii[there] / rr[there]).sqrt()
    if not len(ratio) or not bool((cosine > 1 - 1e-5).all()):
        return None
    middle = float(ratio.mean())
    return middle if float((ratio - middle).abs().max()) <= 1e-3 * middle else None


class Tally:
    """A table of `COLUMNS` by tensors."""

    def __init__(self, names: Sequence[str], roundings: Sequence[float]):
        """`roundings`: factors on `TURNED` and `OFF`."""
        self.names, self._roundings = list(names), torch.tensor(roundings, dtype=torch.float64)
        self.values = {c: torch.zeros(len(self.names), dtype=torch.float64) for c in COLUMNS}
        for effect in EFFECTS:
            self.values[f"{effect}_first"] -= 1
            self.values[f"{effect}_last"] -= 1
        self._waiting: list[tuple[Any, ...]] = []

    def add(
        self,
        step: int,
        gradient: Tensor,
        update: Tensor,
        moved: Tensor,
        rates: Sequence[float | None],
        elsewhere: bool,
    ) -> None:
        """One step's inner products.

        Args:
            gradient: [3, tensors], ⟨raw, raw⟩, ⟨raw, read⟩ and ⟨read, read⟩ of what the optimizer read.
            update: [8, tensors], ⟨raw, Δθ⟩, ⟨Δθ, Δθ⟩, ⟨raw, shadow⟩, ⟨Δθ, shadow⟩, ⟨shadow, shadow⟩, ⟨θ, θ⟩,
                ⟨raw, θ⟩, ⟨Δθ, θ⟩.
            moved: [tensors], squared way from before this step to before the next.
            rates: the learning rates; None where no group has the tensor.
            elsewhere: whether what was read is another gradient: found in `.grad` after the step, where it may be the
                update itself, or computed at other weights (SAM, a line search).
        """
        self._waiting.append((step, gradient, update, moved, rates, elsewhere))
        if len(self._waiting) >= 32:  # counting costs as much for many steps as for one
            self.columns()

    def columns(self) -> dict[str, Tensor]:
        """Column → [tensors], all steps counted."""
        if not self._waiting:
            return self.values
        steps, *products, rates, elsewhere = zip(*self._waiting, strict=True)
        self._waiting = []
        gradient, update, moved = (torch.stack(p).double().cpu() for p in products)
        (rr, ri, ii), (rd, dd, rs, ds, ss, ww, rw, dw) = gradient.unbind(1), update.unbind(1)
        v = self.values
        counts = torch.isfinite(rr) & (rr > 0)
        read = counts & torch.isfinite(ii) & (ii > 0)
        went = counts & (dd > 0)
        cos_gradient = torch.where(read, ri / (rr * ii).sqrt(), 0.0)
        # Weight decay pulls along the weights, in a LoRA pair as often uphill as downhill, so that part is left out.
        along = torch.where(ww > 0, dw / ww, 0.0)
        down, length = along * rw - rd, (dd - along * dw).clamp_min(0)
        cos_step = torch.where(went & (length > 1e-6 * dd), down / (rr * length).sqrt(), 0.0)
        log_ratio = torch.where(read, 0.5 * (ii / rr).log(), 0.0)
        against = read & (cos_gradient < 0) & ~torch.tensor(elsewhere).unsqueeze(1)
        rate = torch.tensor([[r or 0.0 for r in row] for row in rates], dtype=torch.float64)
        in_a_group = torch.tensor([[r is not None for r in row] for row in rates])
        still = counts & (dd == 0) & ~(moved > 0)
        new = {
            "steps": counts,
            "lost": counts & (ii == 0),
            "overflow": counts & ~torch.isfinite(ii),
            "still": still,
            "rounded": still & (ii > 0) & (rate * ii.sqrt() < 1e-7 * ww.sqrt()) & (rate > 0) & ((ss > 0) | (ww > 1e6)),
            "put_back": went & (moved < BACK**2 * dd),
            "rate_zero": counts & in_a_group & (rate == 0),
            "not_held": counts & ~in_a_group,
            "against": against,
            "uphill": went & (cos_step < 0),
            "cos_gradient": cos_gradient,
            "cos_against": torch.where(against, cos_gradient, 0.0),
            "cos_step": cos_step,
            "cos_shadow": torch.where(counts & (ss > 0), -rs / (rr * ss).sqrt(), 0.0),
            "log_ratio": log_ratio,
            "log_ratio_sq": log_ratio.square(),
            "turned": read & (cos_gradient < (TURNED * self._roundings).deg2rad().cos()),
            "off": went & (ss > 0) & (ds < (OFF * self._roundings).deg2rad().cos() * (dd * ss).sqrt()),
        }
        number = torch.tensor(steps, dtype=torch.float64).unsqueeze(1)
        for effect in EFFECTS:
            hit, first = new[effect], v[f"{effect}_first"]
            v[f"{effect}_since"] += (counts & ((first >= 0) | hit.cumsum(0).bool())).sum(0)
            v[f"{effect}_last"] = torch.maximum(v[f"{effect}_last"], torch.where(hit, number, -1.0).amax(0))
            earliest = torch.where(hit, number, math.inf).amin(0)
            v[f"{effect}_first"] = torch.where((first < 0) & earliest.isfinite(), earliest, first)
        for column, values in new.items():
            v[column] += values.sum(0)
        return v

    def table(self) -> dict[str, dict[str, float]]:
        columns = {column: values.tolist() for column, values in self.columns().items()}
        return {name: {column: columns[column][i] for column in COLUMNS} for i, name in enumerate(self.names)}

    def load(self, table: dict[str, dict[str, float]]) -> None:
        """KeyError if the table is of other tensors or of another version."""
        values = {c: torch.tensor([table[name][c] for name in self.names], dtype=torch.float64) for c in COLUMNS}
        self.values, self._waiting = values, []
