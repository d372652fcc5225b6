"""Credits of two arms whose true difference is known: like ROUGE, some 0, some 1, the rest between."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.evaluation.simulated import NODES, WEIGHTS, logistic, middle_of

Array = NDArray[np.float64]
DIFFICULTY, TASTE = 1.0, 0.6
"""Standard deviations, in logits, of an item's difficulty for both arms, and of what suits one arm alone."""
WHOLE = 0.25
"""Share of answers with all credit or none, the rest follows a beta distribution."""
SHARE = 0.4


def _credits(
    rng: np.random.Generator, share: float, seed_sd: float, items: Array, shape: tuple[int, int, int]
) -> Array:
    """Credits, shape (simulations, seeds, items), with mean `share` over seeds and items."""
    spread = float(np.hypot(DIFFICULTY, TASTE))
    at = logistic(middle_of(share, spread) + spread * NODES)
    of_seed = seed_sd / float(WEIGHTS @ (at * (1 - at)))
    middle = middle_of(share, float(np.hypot(spread, of_seed)))
    simulations, seeds, number = shape
    own = middle + items + rng.normal(0, TASTE, (simulations, 1, number))
    mean = logistic(own + rng.normal(0, of_seed, (simulations, seeds, 1)))
    between, kind = rng.beta(6 * mean, 6 * (1 - mean), size=shape), rng.random(shape)
    return np.where(kind < WHOLE * mean, 1.0, np.where(kind < WHOLE, 0.0, between))


def credit_differences(
    rng: np.random.Generator, *, simulations: int, seeds: int, items: int, points: float, seed_sd: float,
    against_base: bool,
) -> Array:  # fmt: skip
    """Credit of the arm minus that of its reference, shape (simulations, seeds, items).

    Args:
        rng: Source of chance.
        simulations: Number of experiments.
        seeds: Of each experiment.
        items: Of each experiment, new ones each time.
        points: True difference over all seeds and items, percentage points.
        seed_sd: From one run's mean to that of another seed, percentage points.
        against_base: The reference is one run for all seeds; else it has seeds of its own that vary as much.
    """
    difficulty = rng.normal(0, DIFFICULTY, (simulations, 1, items))
    own = _credits(rng, SHARE + points / 100, seed_sd / 100, difficulty, (simulations, seeds, items))
    shape, other_sd = (simulations, 1 if against_base else seeds, items), 0.0 if against_base else seed_sd / 100
    return own - _credits(rng, SHARE, other_sd, difficulty, shape)
