"""How many directions are kept: schedules over training, and the share of each modality and layer.

k_t = k_start + (k_end − k_start)·s(t), with s from 0 to 1. A budget counts what
`grit_vlm.core.fisher_info.FisherInformationMatrix.project` says: coordinates of estimate diagonal, else
eigen-directions. (The documents say "k" only, and use it beyond the rank.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grit import factors


class ProjectionError(ValueError):
    """Budgets or a schedule that cannot be."""


class ProjectionSchedule:
    """A budget that goes from `start` to `end`.

    Attributes:
        start: Directions at the first step.
        end: Directions from step `total_steps` on.
        total_steps: T ≥ 1.
        current_step: Counted by `step`.
    """

    def __init__(self, start: int, end: int, total_steps: int):
        """See the class.

        Raises:
            ProjectionError: a number below 1; all of them.
        """
        given = {"start": start, "end": end, "total_steps": total_steps}
        problems = [
            f"{n}: expected a whole number from 1 on, got {v!r}" for n, v in given.items() if v < 1 or v != int(v)
        ]
        if problems:
            raise ProjectionError("\n".join(problems))
        self.start, self.end, self.total_steps = int(start), int(end), int(total_steps)
        self.current_step = 0

    def share(self, step: int) -> float:
        """The share s(t) of the way, in [0, 1]."""
        return min(1.0, step / self.total_steps)

    def budget(self, step: int | None = None) -> int:
        """Directions at a step; default: the current one."""
        share = self.share(self.current_step if step is None else step)
        return round(self.start + (self.end - self.start) * share)

    def observe(self, loss: float) -> None:
        """The loss of a step; only the adaptive schedule looks at it."""

    def step(self) -> int:
        """One optimizer step has been; returns the budget of the next one."""
        self.current_step += 1
        return self.budget()

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int | float)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        vars(self).update(state)


class LinearSchedule(ProjectionSchedule):
    """s(t) = t/T."""


class CosineSchedule(ProjectionSchedule):
    """s(t) = (1 − cos(π t/T))/2: slow at both ends."""

    def share(self, step: int) -> float:
        """See the class."""
        return (1.0 - math.cos(math.pi * super().share(step))) / 2.0


class AdaptiveSchedule(ProjectionSchedule):
    """More directions where the loss stands still: a tenth of the way whenever a window of steps brings too little.

    A window is a twentieth of all steps, at least one. It brings too little where its mean loss is not below the mean
    of the window before by `MIN_GAIN`. ("Based on training progress" is all that document 001 says; the numbers are
    ours.)
    """

    MIN_GAIN, STRIDE = 0.02, 0.1

    def __init__(self, start: int, end: int, total_steps: int):
        """As the class says."""
        super().__init__(start, end, total_steps)
        self.reached, self.previous = 0.0, math.nan
        self.total, self.count = 0.0, 0

    @property
    def window(self) -> int:
        """Steps whose losses are averaged."""
        return max(1, self.total_steps // 20)

    def share(self, step: int) -> float:
        """What was reached by now, whatever the step."""
        return min(1.0, self.reached)

    def observe(self, loss: float) -> None:
        """Count the loss of one step."""
        if not math.isfinite(loss):
            return
        self.total += loss
        self.count += 1
        if self.count < self.window:
            return
        mean = self.total / self.count
        if mean > self.previous * (1 - self.MIN_GAIN):  # false of the first window, whose predecessor is NaN
            self.reached = min(1.0, self.reached + self.STRIDE)
        self.previous, self.total, self.count = mean, 0.0, 0


_KINDS: dict[str, type[ProjectionSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "adaptive": AdaptiveSchedule,
}


def create_scheduler(kind: str, start: int, end: int, total_steps: int) -> ProjectionSchedule:
    """A schedule by its name: linear, cosine or adaptive.

    Raises:
        ProjectionError: no such schedule, or numbers below 1.
    """
    if kind not in _KINDS:
        raise ProjectionError(f"projection_schedule: expected one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind](start, end, total_steps)


def create_linear_scheduler(start: int, end: int, total_steps: int) -> ProjectionSchedule:
    """See `LinearSchedule`."""
    return LinearSchedule(start, end, total_steps)


def create_cosine_scheduler(start: int, end: int, total_steps: int) -> ProjectionSchedule:
    """See `CosineSchedule`."""
    return CosineSchedule(start, end, total_steps)


def create_adaptive_scheduler(start: int, end: int, total_steps: int) -> ProjectionSchedule:
    """See `AdaptiveSchedule`."""
    return AdaptiveSchedule(start, end, total_steps)


def effective_rank(activations: Tensor) -> float:
    """How many directions activations use: exp of the entropy of the eigenvalues of E[x xᵀ] (Roy & Vetterli 2007).

    Args:
        activations: [..., d]; all but the last dimension are samples.

    Raises:
        ProjectionError: there is no sample.
    """
    x = activations.reshape(-1, activations.shape[-1]).double()
    if not len(x):
        raise ProjectionError("expected at least one sample of activations, got none")
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
        """Directions of each layer, for the three modalities of the documents; see `share_out`.

        Args:
            vision_fisher: Fisher information along the directions of each layer, a tensor a layer; a single tensor is
                one layer; None: no such layers.
            text_fisher: The same.
            cross_fisher: The same.
            k_vision: Directions of the whole modality.
            k_text: The same.
            k_cross: The same.
        """
        given = {"vision": vision_fisher, "text": text_fisher, "cross_modal": cross_fisher}
        values = {
            name: [found] if isinstance(found, Tensor) else list(found)
            for name, found in given.items()
            if found is not None and len(found)
        }
        budgets = {"vision": k_vision, "text": k_text, "cross_modal": k_cross}
        return self.share_out(values, {name: budgets[name] for name in values})

    def share_out(self, values: Mapping[str, Sequence[Tensor]], budgets: Mapping[str, int]) -> dict[str, list[int]]:
        """Modality → directions that each of its layers keeps.

        Args:
            values: Modality → Fisher information along the directions of each of its layers.
            budgets: Modality → directions in all.

        Raises:
            ProjectionError: a budget below 1, or a layer without directions; all of them.
        """
        problems = [
            f"budget of {name}: expected at least 1, got {budgets[name]}" for name in values if budgets[name] < 1
        ]
        problems += [
            f"{name}: expected directions in every layer, got a layer without"
            for name, layers in values.items()
            if any(not t.numel() for t in layers)
        ]
        if problems:
            raise ProjectionError("\n".join(problems))
        there = {name: sum(t.numel() for t in layers) for name, layers in values.items()}
        given = _fill(budgets, there)
        return {name: _largest_counts(layers, given[name]) for name, layers in values.items()}


def _fill(budgets: Mapping[str, int], there: Mapping[str, int]) -> dict[str, int]:
    """Budgets that do not exceed what is there; what is over goes to the others, in proportion to their budgets."""
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
