"""Every step, tensor by tensor: was the gradient changed, is the update plain AdamW's, did the weight move?

A record (measure.py) looks closely at a few steps. This counts in all of them, for eleven inner products a tensor, so
that a preconditioner which works on every tenth step is not taken for one that always does.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Degrees above which a gradient was turned on its way to the optimizer (in bfloat16, rounding alone turns one that was
# scaled and clipped by 0.15), and above which an update is off plain AdamW's (in float32, AdamW is within 0.01).
TURNED, OFF = 0.5, 1.0
OFF_16_BIT = 5.0  # on 16-bit weights, where another order of roundings alone turns an update by degrees
# Share of an update's length below which a weight is back where it was when the next step begins.
BACK = 0.05

COUNTS = (
    "steps",  # with a raw gradient: finite, not zero
    "lost",  # where the optimizer read none, or zeros
    "overflow",  # where what it read is not finite, or its square is not
    "still",  # that did not move the tensor
    "rounded",  # of those: the learning rate times what was read is below the rounding of float32
    "put_back",  # that moved it, and it was back before the next step
    "rate_zero",  # with a learning rate of 0
    "not_held",  # in which no group of the optimizer had it
    "against",  # where what the optimizer read points away from the raw gradient
    "uphill",  # whose update does, decay of the weights left out
)
SUMS = ("cos_against", "cos_step", "cos_shadow", "log_ratio", "log_ratio_sq")
EFFECTS = ("turned", "off")  # each with the first and the last such step, and the counted steps since the first
COLUMNS = (*COUNTS, *SUMS, *(f"{e}{part}" for e in EFFECTS for part in ("", "_first", "_last", "_since")))


def dots(pairs: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """Inner products, in float32 at least and on the first tensor's device; zero where one is missing."""
    device = next((t.device for pair in pairs for t in pair if t is not None), torch.device("cpu"))
    zero = torch.zeros((), device=device)
    return torch.stack(
        [zero if x is None or y is None else torch.dot(_flat(x), _flat(y)).to(device).float() for x, y in pairs]
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().float()


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

    def __init__(self, names: Sequence[str], lines: Sequence[float], other: "Tally | None" = None):
        """`lines`: degrees above which an update is off. `other`: the table of before parameters were replaced."""
        self.names, self.lines = list(names), torch.tensor(lines, dtype=torch.float64)
        self.values = {c: torch.zeros(len(self.names), dtype=torch.float64) for c in COLUMNS}
        for effect in EFFECTS:
            self.values[f"{effect}_first"] -= 1
            self.values[f"{effect}_last"] -= 1
        places = {name: place for place, name in enumerate(other.names)} if other is not None else {}
        for i, name in enumerate(self.names):
            if other is not None and name in places:
                for column, values in self.values.items():
                    values[i] = other.values[column][places[name]]

    def add(
        self,
        step: int,
        gradient: Tensor,
        update: Tensor,
        moved: Tensor,
        rates: Sequence[float | None],
        elsewhere: bool,
    ) -> None:
        """One step's inner products, float64 on the CPU.

        Args:
            gradient: [3, tensors], ⟨raw, raw⟩, ⟨raw, read⟩ and ⟨read, read⟩ of what the optimizer read.
            update: [8, tensors], ⟨raw, Δθ⟩, ⟨Δθ, Δθ⟩, ⟨raw, shadow⟩, ⟨Δθ, shadow⟩, ⟨shadow, shadow⟩, ⟨θ, θ⟩,
                ⟨raw, θ⟩, ⟨Δθ, θ⟩.
            moved: [tensors], length of the way from before this step to before the next; not finite = not known.
            rates: the learning rates; None where no group has the tensor.
            elsewhere: whether what was read is another gradient: found in `.grad` after the step, where it may be the
                update itself, or computed at other weights (SAM, a line search).
        """
        rr, ri, ii = gradient
        rd, dd, rs, ds, ss, ww, rw, dw = update
        v = self.values
        seen = torch.isfinite(rr) & (rr > 0)
        read = seen & torch.isfinite(ii) & (ii > 0)
        went = seen & (dd > 0)
        cos_gradient = torch.where(read, ri / (rr * ii).sqrt(), 0.0)
        # Decay pulls along the weights, which in a LoRA pair is uphill as often as not: that part is left out.
        along = torch.where(ww > 0, dw / ww, 0.0)
        down, length = along * rw - rd, (dd - along * dw).clamp_min(0)
        cos_step = torch.where(went & (length > 1e-6 * dd), down / (rr * length).sqrt(), 0.0)
        ratio = torch.where(read, 0.5 * (ii / rr).log(), 0.0)
        v["steps"] += seen
        v["lost"] += seen & (ii == 0)
        v["overflow"] += seen & ~torch.isfinite(ii)
        v["still"] += seen & (dd == 0)
        v["put_back"] += went & (moved < BACK * dd.sqrt())
        rate = torch.tensor([rate or 0.0 for rate in rates], dtype=torch.float64)
        v["rounded"] += seen & (dd == 0) & (rate > 0) & (rate * ii.sqrt() < 1e-7 * ww.sqrt())
        v["rate_zero"] += seen & torch.tensor([rate == 0 for rate in rates])
        v["not_held"] += seen & torch.tensor([rate is None for rate in rates])
        against = read & (cos_gradient < 0) & (not elsewhere)
        v["against"] += against
        v["cos_against"] += torch.where(against, cos_gradient, 0.0)
        v["uphill"] += went & (cos_step < 0)
        v["cos_step"] += cos_step
        v["cos_shadow"] += torch.where(seen & (ss > 0), -rs / (rr * ss).sqrt(), 0.0)
        v["log_ratio"] += ratio
        v["log_ratio_sq"] += ratio.square()
        turned = read & (cos_gradient < math.cos(math.radians(TURNED)))
        off = went & (ss > 0) & (ds < self.lines.deg2rad().cos() * (dd * ss).sqrt())
        for name, hit in (("turned", turned), ("off", off)):
            v[name] += hit
            v[f"{name}_first"][hit & (v[f"{name}_first"] < 0)] = step
            v[f"{name}_last"][hit] = step
            v[f"{name}_since"] += seen & (v[f"{name}_first"] >= 0)

    def table(self) -> dict[str, dict[str, float]]:
        columns = {column: values.tolist() for column, values in self.values.items()}
        return {name: {column: columns[column][i] for column in COLUMNS} for i, name in enumerate(self.names)}

    def load(self, table: dict[str, dict[str, float]]) -> None:
        """KeyError: a table of other tensors, or of another version."""
        values = {c: torch.tensor([table[name][c] for name in self.names], dtype=torch.float64) for c in COLUMNS}
        self.values = values
