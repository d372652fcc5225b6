"""Answers of two arms whose true difference is known: items of unequal difficulty, seeds that vary, chance."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
DIFFICULTY, TASTE = 1.5, 0.7
"""Standard deviations, in logits, of an item's difficulty for both arms, and of what suits one arm alone."""


def logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def mean_share(middle: float, spread: float) -> float:
    return float(WEIGHTS @ logistic(middle + spread * NODES))


def middle_of(share: float, spread: float) -> float:
    """The logit at which items of this spread are answered right with this mean probability."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_share(middle, spread) < share else (low, middle)
    return (low + high) / 2


def _right(
    rng: np.random.Generator, share: float, seed_sd: float, items: Array, shape: tuple[int, int, int]
) -> NDArray[np.bool_]:
    """Answers, shape (simulations, seeds, items), right with mean probability `share` over seeds and items."""
    spread = float(np.hypot(DIFFICULTY, TASTE))
    middle = middle_of(share, spread)
    slope = WEIGHTS @ (logistic(middle + spread * NODES) * (1 - logistic(middle + spread * NODES)))
    of_seed = seed_sd / slope
    middle = middle_of(share, float(np.hypot(spread, of_seed)))
    simulations, seeds, _ = shape
    logits = middle + items + rng.normal(0, TASTE, (simulations, 1, shape[2]))
    return rng.random(shape) < logistic(logits + rng.normal(0, of_seed, (simulations, seeds, 1)))


def differences(
    rng: np.random.Generator,
    *,
    simulations: int,
    seeds: int,
    items: int,
    points: float,
    seed_sd: float,
    against_base: bool,
    share: float = 0.6,
) -> Array:
    """Right minus wrong of the arm and its reference, shape (simulations, seeds, items).

    Args:
        rng: Source of chance.
        simulations: Number of experiments.
        seeds: Of each experiment.
        items: Of each experiment, new ones each time.
        points: True difference over all seeds and items, percentage points.
        seed_sd: From one run's accuracy to that of another seed, percentage points.
        against_base: The reference is one run for all seeds; else it has seeds of its own that vary as much.
        share: True accuracy of the reference.
    """
    difficulty = rng.normal(0, DIFFICULTY, (simulations, 1, items))
    own = _right(rng, share + points / 100, seed_sd / 100, difficulty, (simulations, seeds, items))
    others = 1 if against_base else seeds
    other_sd = 0.0 if against_base else seed_sd / 100
    other = _right(rng, share, other_sd, difficulty, (simulations, others, items))
    return own.astype(np.float64) - other
