"""Warm-ups, and intervals that follow the loss; the same on all ranks of a distributed run."""

import torch
import torch.distributed as dist
from torch import Tensor

from grit.config import GRITConfig


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Add every tensor up over the ranks, in place; one message for each dtype and device."""
    if world_size() == 1 or not tensors:
        return
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in members])
        dist.all_reduce(flat)
        for target, part in zip(members, torch.split(flat, [t.numel() for t in members]), strict=True):
            target.copy_(part.view_as(target))


def ramp(step: int, warmup: int) -> float:
    return 1.0 if warmup <= 0 else min(1.0, step / warmup)


class LossTrend:
    """A factor on the intervals of inversion and reprojection that follows how fast the loss moves.

    While the mean loss of a window differs from the one before by more than 5%, curvature goes stale quickly: the
    factor halves. Below 1% it doubles. It stays within [1/4, 4]. (The authors only say "adapted heuristically to
    recent loss trends"; the thresholds are ours.)
    """

    FAST, SLOW, BOUND = 0.05, 0.01, 4.0

    def __init__(self, config: GRITConfig):
        self.config = config
        self.factor = 1.0
        self._sum, self._count, self._previous = 0.0, 0, float("nan")

    def see(self, loss: float) -> None:
        self._sum += loss
        self._count += 1
        if self._count < self.config.adaptive_window:
            return
        total = torch.tensor([self._sum, float(self._count)], dtype=torch.float64)
        if world_size() > 1 and dist.get_backend() == "nccl":
            total = total.cuda()
        all_reduce_sum([total])
        mean = float(total[0] / total[1])
        if self._previous == self._previous and self._previous != 0:
            change = abs(mean - self._previous) / abs(self._previous)
            if change > self.FAST:
                self.factor = max(1 / self.BOUND, self.factor / 2)
            elif change < self.SLOW:
                self.factor = min(self.BOUND, self.factor * 2)
        self._sum, self._count, self._previous = 0.0, 0, mean

    def interval(self, base: int) -> int:
        return max(1, round(base * self.factor)) if self.config.adaptive_schedule else base
