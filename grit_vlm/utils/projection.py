"""How many directions projection keeps: schedules over training, and shares of modalities and layers.

k_t = k_start + (k_end − k_start)·s(t), with s from 0 to 1. A budget counts as in
`grit_vlm.core.fisher_info.FisherInformationMatrix.project`: coordinates for estimate diagonal, otherwise
eigen-directions. (The documents only say "k", and let it exceed the rank.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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


class CosineSchedule(ProjectionSchedule):
    """s(t) = (1 − cos(π t/T))/2: slow at both ends."""

    def share(self, step: int) -> float:
        return (1.0 - math.cos(math.pi * super().share(step))) / 2.0


_KINDS = {"linear": ProjectionSchedule, "cosine": CosineSchedule}


def create_scheduler(kind: str, start: int, end: int, total_steps: int) -> ProjectionSchedule:
    if kind not in _KINDS:
        raise GritVlmError(f"projection_schedule: expected one of {', '.join(_KINDS)}, got {kind!r}")
    return _KINDS[kind](start, end, total_steps)


# The documents' names.
create_linear_scheduler = ProjectionSchedule
create_cosine_scheduler = CosineSchedule


def share_out(values: Sequence[Tensor], budget: int) -> list[int]:
    """How many of the `budget` largest values are in each layer's: at least one a layer.

    `values`: Fisher information along the directions of each layer of a modality; their gradients come from one loss.
    """
    if budget < 1:
        raise GritVlmError(f"budget: expected at least 1, got {budget}")
    counts = [1] * len(values)
    rest = [t.reshape(-1).sort(descending=True).values[1:].cpu() for t in values]
    more = min(budget - len(values), sum(map(len, rest)))
    if more > 0:
        owner = torch.repeat_interleave(torch.arange(len(rest)), torch.tensor([len(t) for t in rest]))
        chosen = owner[torch.cat(rest).sort(descending=True, stable=True).indices[:more]]
        for i, n in enumerate(torch.bincount(chosen, minlength=len(rest)).tolist()):
            counts[i] += n
    return counts


class MultiModalProjector:
    """Shares the budget of each modality among its layers, see `share_out`."""

    def compute_mixed_modal_projection(
        self,
        vision_fisher: Sequence[Tensor] | Tensor | None,
        text_fisher: Sequence[Tensor] | Tensor | None,
        cross_fisher: Sequence[Tensor] | Tensor | None = None,
        k_vision: int = 0,
        k_text: int = 0,
        k_cross: int = 0,
    ) -> dict[str, list[int]]:
        """Modality → directions that each of its layers keeps; a single tensor is one layer, None no layers."""
        inputs = {"vision": vision_fisher, "text": text_fisher, "cross_modal": cross_fisher}
        return {
            name: share_out([fisher] if isinstance(fisher, Tensor) else fisher, budget)
            for (name, fisher), budget in zip(inputs.items(), (k_vision, k_text, k_cross), strict=True)
            if fisher is not None and len(fisher)
        }
