"""How many directions projection keeps: schedules over training, and shares of modalities and layers.

k_t = k_start + (k_end − k_start)·s(t), with s from 0 to 1. A budget counts as in
`grit_vlm.core.fisher_info.FisherInformationMatrix.project`: coordinates for estimate diagonal, otherwise
eigen-directions. (The documents only say "k", and let it exceed the rank.)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit import factors
from grit.config import Count, complaints
from grit_vlm.errors import GritVlmError


class ProjectionSchedule:
    """A budget that goes linearly, s(t) = t/T, from `start` at the first step to `end` at step T = `total_steps`."""

    def __init__(self, start: Count, end: Count, total_steps: Count):
        self.start, self.end, self.total_steps = start, end, total_steps
        if problems := complaints(ProjectionSchedule.__init__, vars(self)):
            raise GritVlmError("\n".join(problems.values()))

    def share(self, step: int) -> float:
        """The share s(t) of the way, in [0, 1]."""
        return min(1.0, step / self.total_steps)

    def budget(self, step: int) -> int:
        return round(self.start + (self.end - self.start) * self.share(step))

    def observe(self, loss: float) -> None:
        """Record the loss of a step; only the adaptive schedule uses it."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class CosineSchedule(ProjectionSchedule):
    """s(t) = (1 − cos(π t/T))/2: slow at both ends."""

    def share(self, step: int) -> float:
        return (1.0 - math.cos(math.pi * super().share(step))) / 2.0


class AdaptiveSchedule(ProjectionSchedule):
    """More directions when the loss stalls: a tenth of the way after each window of steps with too little progress.

    A window is a twentieth of all steps, at least one. Progress is too little if the mean loss is not lower than that
    of the previous window by the share `MIN_GAIN`. (The first description only says "based on training progress"; the
    numbers are ours.)
    """

    MIN_GAIN, STRIDE = 0.02, 0.1

    def __init__(self, start: int, end: int, total_steps: int):
        super().__init__(start, end, total_steps)
        self.reached, self.previous, self.total, self.count = 0.0, math.nan, 0.0, 0

    def share(self, step: int) -> float:
        return min(1.0, self.reached)

    def observe(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        self.total += loss
        self.count += 1
        if self.count < max(1, self.total_steps // 20):
            return
        mean = self.total / self.count
        if mean > self.previous * (1 - self.MIN_GAIN):  # false for the first window, since NaN precedes it
            self.reached = min(1.0, self.reached + self.STRIDE)
        self.previous, self.total, self.count = mean, 0.0, 0


_KINDS = {"linear": ProjectionSchedule, "cosine": CosineSchedule, "adaptive": AdaptiveSchedule}


def create_scheduler(kind: str, start: int, end: int, total_steps: int) -> ProjectionSchedule:
    if kind not in _KINDS:
        raise GritVlmError(f"projection_schedule: expected one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind](start, end, total_steps)


# The documents' names.
create_linear_scheduler = ProjectionSchedule
create_cosine_scheduler = CosineSchedule
create_adaptive_scheduler = AdaptiveSchedule


def effective_rank(activations: Tensor) -> float:
    """The exponential of the entropy of E[x xᵀ]'s eigenvalues, of activations [..., d] (Roy & Vetterli 2007)."""
    x = activations.reshape(-1, activations.shape[-1]).double()
    if not len(x):
        raise GritVlmError("expected at least one sample of activations, got none")
    return float(factors.effective_rank(torch.linalg.svdvals(x).square()))


def recommended_budget(activations: Tensor, factor: float = 1.2) -> int:
    """The documents' rule of thumb, k ≈ 1.2·rank(A_vision), with the effective rank; at least 1."""
    return max(1, round(factor * effective_rank(activations)))


class MultiModalProjector:
    """Shares the budgets of the modalities among their layers.

    Within a modality, the budget goes to the directions of largest Fisher information across all its layers, with at
    least one a layer: their gradients come from one loss. Each modality has a separate budget; what exceeds its number
    of directions goes to the others, in proportion to their budgets.
    """

    def compute_mixed_modal_projection(
        self,
        vision_fisher: Sequence[Tensor] | Tensor | None,
        text_fisher: Sequence[Tensor] | Tensor | None,
        cross_fisher: Sequence[Tensor] | Tensor | None = None,
        k_vision: int = 0,
        k_text: int = 0,
        k_cross: int = 0,
    ) -> dict[str, list[int]]:
        """`share_out` for the three modalities of the documents; a single tensor is one layer, None no layers."""
        inputs = {"vision": vision_fisher, "text": text_fisher, "cross_modal": cross_fisher}
        budgets = dict(zip(inputs, (k_vision, k_text, k_cross), strict=True))
        values = {
            name: [fisher] if isinstance(fisher, Tensor) else list(fisher)
            for name, fisher in inputs.items()
            if fisher is not None and len(fisher)
        }
        return self.share_out(values, budgets)

    def share_out(self, values: Mapping[str, Sequence[Tensor]], budgets: Mapping[str, int]) -> dict[str, list[int]]:
        """Modality → directions that each of its layers keeps.

        `values`: Fisher information along the directions of each layer; `budgets`: directions of a whole modality.
        """
        if problems := [f"budget of {m}: expected at least 1, got {budgets[m]}" for m in values if budgets[m] < 1]:
            raise GritVlmError("\n".join(problems))
        filled = _fill(budgets, {name: sum(t.numel() for t in layers) for name, layers in values.items()})
        return {name: _largest_counts(layers, filled[name]) for name, layers in values.items()}


def _fill(budgets: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Budgets capped at the available directions; the excess goes to the others, in proportion."""
    filled = {name: min(budgets[name], n) for name, n in sizes.items()}
    over = sum(budgets[name] for name in sizes) - sum(filled.values())
    while over > 0 and (room := [name for name, n in sizes.items() if filled[name] < n]):
        total, before = sum(budgets[name] for name in room), over
        for name in room:
            more = min(sizes[name] - filled[name], max(1, before * budgets[name] // total), over)
            filled[name] += more
            over -= more
    return filled


def _largest_counts(layers: Sequence[Tensor], budget: int) -> list[int]:
    """How many of the `budget` largest values are in each tensor, at least one each."""
    counts = [1] * len(layers)
    rest = [t.reshape(-1).sort(descending=True).values[1:].cpu() for t in layers]
    left = min(budget - len(layers), sum(map(len, rest)))
    if left > 0:
        owner = torch.repeat_interleave(torch.arange(len(rest)), torch.tensor([len(t) for t in rest]))
        chosen = owner[torch.cat(rest).sort(descending=True, stable=True).indices[:left]]
        for i, n in enumerate(torch.bincount(chosen, minlength=len(rest)).tolist()):
            counts[i] += n
    return counts
