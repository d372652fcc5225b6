"""Warm-ups, and intervals that follow the loss; the same on all ranks."""

from typing import Any

import torch

from grit.config import GRITConfig
from grit.distributed import all_reduce_sum, world_size


def ramp(step: int, warmup: int) -> float:
    """0 → 1 linearly over `warmup` steps, 1 from there on."""
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
        """Count the loss of one step."""
        self._sum += loss
        self._count += 1
        if self._count < self.config.adaptive_window:
            return
        total = torch.tensor([self._sum, float(self._count)], dtype=torch.float64)
        if world_size() > 1 and torch.distributed.get_backend() == "nccl":
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
        """The interval to use where the settings say `base` steps."""
        return max(1, round(base * self.factor)) if self.config.adaptive_schedule else base

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"factor": self.factor, "sum": self._sum, "count": self._count, "previous": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.factor, self._sum = state["factor"], state["sum"]
        self._count, self._previous = state["count"], state["previous"]


def captures_at(config: GRITConfig, step: int) -> bool:
    """Whether statistics are taken at this step."""
    return step % config.grit_cov_update_freq == 0 or starting(config, step)


def starting(config: GRITConfig, step: int) -> bool:
    """Whether factors are refreshed at every step: mode sgd, in the first steps.

    B starts at 0 and Σ_g grows with its square. A factor ten steps old is too small by orders of magnitude then, and a
    natural gradient without Adam's normalisation as much too long; the trust region, measured with the same factor,
    does not see it.
    """
    return config.mode == "sgd" and step < 4 * config.grit_cov_update_freq


def inversion_due(config: GRITConfig, step: int, since: int | None, trend: LossTrend) -> bool:
    """Whether factors are to be inverted `since` steps after the last time (None: never before)."""
    return since is None or starting(config, step) or since >= trend.interval(config.kfac_update_freq)


def reprojection_due(config: GRITConfig, step: int, trend: LossTrend) -> bool:
    """Whether layers are reprojected after `step` steps."""
    if config.reprojection == "none" or config.reprojection_freq <= 0:
        return False
    warm = step >= max(1, config.reprojection_warmup_steps)
    return warm and step % trend.interval(config.reprojection_freq) == 0


def final_shrink_due(config: GRITConfig, step: int) -> bool:
    """Whether ranks shrink at the end of a training of `step` steps."""
    if config.reprojection == "none" or not config.enable_rank_adaptation or config.rank_shrink == "never":
        return False
    return step >= max(config.rank_adaptation_start_step, config.reprojection_warmup_steps)
