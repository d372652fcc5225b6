"""How many directions are kept: schedules over training, and the share of each modality and layer.

k_t = k_start + (k_end − k_start)·s(t), with s from 0 to 1. A budget counts what
`grit_vlm.core.fisher_info.FisherInformationMatrix.project` says: coordinates of estimate diagonal, else
eigen-directions. (The documents say "k" only, and use it beyond the rank.)
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
        """The loss of a step; only the adaptive schedule looks at it."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class CosineSchedule(ProjectionSchedule):
    """s(t) = (1 − cos(π t/T))/2: slow at both ends."""

    def share(self, step: int) -> float:
        return (1.0 - math.cos(math.pi * super().share(step))) / 2.0


class AdaptiveSchedule(ProjectionSchedule):
    """More directions where the loss stands still: a tenth of the way whenever a window of steps brings too little.

    A window is a twentieth of all steps, at least one. It brings too little where its mean loss is not below the mean
    of the window before by `MIN_GAIN`. (The first description says no more than "based on training progress"; the
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
        if mean > self.previous * (1 - self.MIN_GAIN):  # false of the first window, whose predecessor is NaN
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
    """Directions that activations [..., d] use: exp of the entropy of E[x xᵀ]'s eigenvalues (Roy & Vetterli 2007)."""
    x = activations.reshape(-1, activations.shape[-1]).double()
    if not len(x):
        raise GritVlmError("expected at least one sample of activations, got none")
    return float(factors.effective_rank(torch.linalg.svdvals(x).square()))


def recommended_budget(activations: Tensor, factor: float = 1.2) -> int:
    """The documents' rule of thumb, k ≈ 1.2·rank(A_vision), with the effective rank; at least 1."""
    return max(1, round(factor * effective_rank(activations)))


class MultiModalProjector:
    """Shares the budgets of the modalities among their layers.

    Within a modality, its budget goes to the directions of largest Fisher information of all its layers together, one
    a layer at least: their gradients are of one loss. Between modalities each keeps a budget of its own; what a
    modality has no directions for goes to the others, in proportion to their budgets.
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
        """`share_out` for the three modalities of the documents; a single tensor is one layer, None: no such layers."""
        given = {
            "vision": (vision_fisher, k_vision),
            "text": (text_fisher, k_text),
            "cross_modal": (cross_fisher, k_cross),
        }
        there = {name: found for name, (found, _) in given.items() if found is not None and len(found)}
        values = {name: [found] if isinstance(found, Tensor) else list(found) for name, found in there.items()}
        return self.share_out(values, {name: given[name][1] for name in there})

    def share_out(self, values: Mapping[str, Sequence[Tensor]], budgets: Mapping[str, int]) -> dict[str, list[int]]:
        """Modality → directions that each of its layers keeps.

        `values` are Fisher information along the directions of each layer, `budgets` directions of a whole modality.
        """
        problems = [f"budget of {m}: expected at least 1, got {budgets[m]}" for m in values if budgets[m] < 1]
        empty = [m for m, layers in values.items() if not all(t.numel() for t in layers)]
        if problems := problems + [f"{m}: expected directions in every layer, got a layer without" for m in empty]:
            raise GritVlmError("\n".join(problems))
        there = {name: sum(t.numel() for t in layers) for name, layers in values.items()}
        given = _fill(budgets, there)
        return {name: _largest_counts(layers, given[name]) for name, layers in values.items()}


def _fill(budgets: Mapping[str, int], there: Mapping[str, int]) -> dict[str, int]:
    """Budgets that do not exceed what is there; what is left over goes to the others, in proportion."""
    given = {name: min(budgets[name], n) for name, n in there.items()}
    over = sum(budgets[name] for name in there) - sum(given.values())
    while over > 0 and (room := [name for name, n in there.items() if given[name] < n]):
        total, before = sum(budgets[name] for name in room), over
        for name in room:
            more = min(there[name] - given[name], max(1, before * budgets[name] // total), over)
            given[name] += more
            over -= more
    return given


def _largest_counts(layers: Sequence[Tensor], budget: int) -> list[int]:
    """How many of the `budget` largest values lie in each tensor; one in each at least."""
    counts = [1] * len(layers)
    rest = [t.reshape(-1).sort(descending=True).values[1:].cpu() for t in layers]
    left = min(budget - len(layers), sum(map(len, rest)))
    if left > 0:
        owner = torch.repeat_interleave(torch.arange(len(rest)), torch.tensor([len(t) for t in rest]))
        chosen = owner[torch.cat(rest).sort(descending=True, stable=True).indices[:left]]
        for i, n in enumerate(torch.bincount(chosen, minlength=len(rest)).tolist()):
            counts[i] += n
    return counts
