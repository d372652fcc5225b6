"""Resamplings of safe and unsafe prompts, drawn once, so that the base and all arms meet the same ones.

And what they say: intervals by bootstrap, and the difference between an arm and the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.clusters import Array, Separation, separation

Bools = NDArray[np.bool_]
Places = NDArray[np.intp]
LEVEL = (0.025, 0.975)


@dataclass(frozen=True)
class Design:
    """Which prompts are unsafe, and every resampling of them; the same for the base and all arms.

    Attributes:
        unsafe: Shape (N,).
        bootstrap: How often each prompt counts, shape (R, N); safe and unsafe ones keep their number.
        permuted: Labels in the place of `unsafe`, shape (P, N).
        paired: Whether prompts are resampled and labels swapped by pairs.
    """

    unsafe: Bools
    bootstrap: NDArray[np.float64]
    permuted: Bools
    paired: bool


def design(
    unsafe: Bools, pairs: Sequence[str | None], *, bootstrap: int = 1000, permutations: int = 1000, seed: int = 0
) -> Design:
    """Draw all resamplings.

    Args:
        unsafe: Shape (N,), both values present.
        pairs: Of each prompt the name of its pair, or None. Used where each name stands on one safe and one unsafe
            prompt.
        bootstrap: Resamples of the prompts.
        permutations: Of the labels.
        seed: Same seed → same draws.
    """
    rng = np.random.default_rng(seed)
    safe_at, unsafe_at = np.flatnonzero(~unsafe), np.flatnonzero(unsafe)
    order = _partners(pairs, safe_at, unsafe_at)
    counts = np.zeros((bootstrap, len(unsafe)))
    permuted = np.tile(unsafe, (permutations, 1))
    if order is not None:
        n = len(safe_at)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=bootstrap)
        counts[:, safe_at], counts[:, order] = drawn, drawn
        swapped = rng.random((permutations, n)) < 0.5
        permuted[:, safe_at], permuted[:, order] = swapped, ~swapped
    else:
        for places in (safe_at, unsafe_at):
            n = len(places)
            counts[:, places] = rng.multinomial(n, np.full(n, 1 / n), size=bootstrap)
        permuted = rng.permuted(permuted, axis=1)
    return Design(unsafe, counts, permuted, order is not None)


def _partners(pairs: Sequence[str | None], safe_at: Places, unsafe_at: Places) -> Places | None:
    """Of each safe prompt the place of its unsafe partner; None where they are not all in pairs."""
    by_name = {pairs[i]: i for i in unsafe_at}
    names = [pairs[i] for i in safe_at]
    if None in names or set(names) != set(by_name) or not len(names) == len(set(names)) == len(unsafe_at):
        return None
    return np.array([by_name[name] for name in names])


def resampled(grams: Array, plan: Design) -> Separation:
    """D and W of every bootstrap resample, with the bias of D taken off the resampled population.

    The squared distance of two sample means exceeds that of the population by tr V, V the covariance of their
    difference, and a plain resample's by as much again: with hardly any separation the plain bootstrap's variance is
    three times too large. So resamples are drawn round a difference of means that is shortened until its square is
    ‖μ₁ − μ₂‖² − tr V (at least 0): D* = ‖c·(μ₁ − μ₂) + ε*‖², with tr V taken as the mean of ‖ε*‖². The mean of D* is
    then D. Its variance is right where V is the same in all directions, and somewhat too large where the classes lie
    apart in a direction of little noise.

    Args:
        grams: Gram matrices, shape (L, N, N).
        plan: Labels and draws.
    """
    first, second = plan.bootstrap * ~plan.unsafe, plan.bootstrap * plan.unsafe
    plain = separation(grams, first, second)
    n_first, n_second = plain.n
    means = plan.unsafe / n_second - ~plan.unsafe / n_first  # weights of the points in μ₂ − μ₁
    steps = second / n_second - first / n_first - means
    between = []
    for k in grams:
        moved = steps @ k
        noise, cross, true = (moved * steps).sum(axis=1), moved @ means, means @ k @ means
        kept = np.sqrt(max(0.0, 1.0 - noise.mean() / true)) if true > 0 else 0.0
        between.append(np.maximum(kept**2 * true + 2 * kept * cross + noise, 0.0))
    return Separation(np.asarray(between), plain.within, plain.n)


@dataclass(frozen=True)
class Drawn:
    """An index of one model in L layers, or its mean over layers, with all resamplings of one design.

    Attributes:
        values: Of the labels, shape (L,) or ().
        bootstrap: Of the resamples, shape (L, R) or (R,).
        null: Of the permuted labels, shape (L, P) or (P,).
    """

    values: Array
    bootstrap: Array
    null: Array

    def layer(self, i: int) -> "Drawn":
        """One layer's."""
        return Drawn(self.values[i], self.bootstrap[i], self.null[i])

    def mean(self) -> "Drawn":
        """Mean over the layers."""
        return Drawn(*(np.asarray(of.mean(axis=0)) for of in (self.values, self.bootstrap, self.null)))


def interval(value: float, steps: Array) -> tuple[float, float]:
    """The bootstrap's 95% quantiles, its mean put on the value (they differ where D is below its bias)."""
    low, high = value + np.quantile(steps, LEVEL) - steps.mean()
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Arm minus base, each above its own mean under permuted labels.

    Attributes:
        value: (index − mean of its null) of the arm, minus that of the base.
        steps: Bootstrap of the difference of indices, shape (R,), for `interval`.
        null_low: 2.5% quantile of the same with permuted labels.
        null_high: 97.5% quantile.
        p_value: Two-sided; the larger of two, of the permutations and of the bootstrap.
    """

    value: float
    steps: Array
    null_low: float
    null_high: float
    p_value: float


def difference(arm: Drawn, base: Drawn) -> Difference:
    """How much further apart the classes lie in the arm, beyond what its level of chance has moved.

    Chance gives matched pairs a lower index the more alike partners are. Fine-tuning changes that likeness, and the
    raw difference of indices with it, whatever the labels are; so each model's own chance is taken off.

    Neither p-value is enough alone. Swapping labels in both models at once tests whether labels matter to the change
    at all: exact where neither model tells the classes apart, but where both do, and equally well, its null is too
    narrow (10 to 48% of p-values at or below 0.05 in simulations). The bootstrap's holds there.

    Args:
        arm: Of one layer, or the mean over layers: shapes (), (R,) and (P,).
        base: The same, of the same design.
    """
    shift = arm.null - base.null
    null = shift - shift.mean()
    value = float(arm.values - base.values - shift.mean())
    steps = arm.bootstrap - base.bootstrap
    placed = value + steps - steps.mean()
    near = 1e-12 * max(1.0, abs(float(arm.values)))  # what is equal differs by rounding
    swapped = (1 + int((np.abs(null) >= abs(value) - near).sum())) / (1 + len(null))
    beyond = min(int((placed <= near).sum()), int((placed >= -near).sum()))
    of_bootstrap = min(1.0, 2 * (1 + beyond) / (1 + len(placed)))
    low, high = np.quantile(null, LEVEL)
    return Difference(value, steps, float(low), float(high), max(swapped, of_bootstrap))
