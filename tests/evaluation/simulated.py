"""Answers of two arms whose true difference is known: items of unequal difficulty, seeds that vary, chance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
WHOLE = 0.25
"""Share of credits that are all or none; the rest follows a beta distribution, like ROUGE."""


def logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def middle_of(share: float, spread: float) -> float:
    """The logit at which items of this spread are answered right with this mean probability."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if WEIGHTS @ logistic(middle + spread * NODES) < share else (low, middle)
    return (low + high) / 2


def _right(rng: np.random.Generator, probability: Array, shape: tuple[int, ...]) -> Array:
    return (rng.random(shape) < probability).astype(np.float64)


def _credit(rng: np.random.Generator, mean: Array, shape: tuple[int, ...]) -> Array:
    between, kind = rng.beta(6 * mean, 6 * (1 - mean), size=shape), rng.random(shape)
    return np.where(kind < WHOLE * mean, 1.0, np.where(kind < WHOLE, 0.0, between))


def differences(
    rng: np.random.Generator, *, simulations: int, seeds: int, items: int, points: float, seed_sd: float,
    against_base: bool, credit: bool = False,
) -> Array:  # fmt: skip
    """Credit of the arm minus that of its reference, shape (simulations, seeds, items), new items in each simulation.

    `points` is the true difference over all seeds and items, `seed_sd` the standard deviation of single runs, both in
    percentage points. The reference is one run for all seeds (`against_base`), or has seeds of its own that vary as
    much. Answers are right or wrong, or get credit between 0 and 1.
    """
    # Standard deviations, in logits, of an item's difficulty for both arms, and of what suits one arm alone.
    difficulty, taste, share = (1.0, 0.6, 0.4) if credit else (1.5, 0.7, 0.6)
    draw: Callable[..., Array] = _credit if credit else _right
    common = rng.normal(0, difficulty, (simulations, 1, items))
    spread = float(np.hypot(difficulty, taste))

    def answers(share: float, runs: int, sd: float) -> Array:
        at = logistic(middle_of(share, spread) + spread * NODES)
        of_seed = sd / float(WEIGHTS @ (at * (1 - at)))
        own = middle_of(share, float(np.hypot(spread, of_seed))) + common + rng.normal(0, taste, common.shape)
        return draw(rng, logistic(own + rng.normal(0, of_seed, (simulations, runs, 1))), (simulations, runs, items))

    own = answers(share + points / 100, seeds, seed_sd / 100)
    return own - answers(share, 1 if against_base else seeds, 0.0 if against_base else seed_sd / 100)
