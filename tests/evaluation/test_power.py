"""How many items it would take: what is promised is seen in simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from evaluation.pairs import Pairs
from evaluation.power import crossed_power, mcnemar_items, power_rows
from evaluation.seeds import Components, mean_squares, variance_of_mean
from evaluation.student import quantile


def pairs(differences: np.ndarray) -> Pairs:
    """Pairs with these differences."""
    own, other = (differences > 0).astype(float), (differences < 0).astype(float)
    return Pairs("base", tuple(range(len(differences))), own, other)


@pytest.mark.parametrize("differing", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_mcnemars_test_has_the_power_at_the_number_of_items(points: int, differing: float) -> None:
    delta = points / 100
    items = mcnemar_items(delta, differing)
    gain, loss = (differing + delta) / 2, (differing - delta) / 2
    draws = np.random.default_rng(points).multinomial(items, [gain, loss, 1 - gain - loss], size=4000)
    p = 2 * binom.cdf(draws[:, :2].min(axis=1), draws[:, :2].sum(axis=1), 0.5)
    assert 0.75 <= (p < 0.05).mean() <= 0.85


@pytest.mark.parametrize(
    ("seeds", "parts", "points"),
    [
        (3, Components(0.0, 0.3, 0.3), 3),
        (3, Components(0.003, 0.3, 0.3), 3),
        (5, Components(0.0, 0.0, 0.4), 3),
        (5, Components(0.01, 0.3, 0.3), 3),
        (10, Components(0.01, 0.2, 0.3), 3),
    ],
)
def test_the_test_over_seeds_has_the_power_at_the_number_of_items(seeds: int, parts: Components, points: int) -> None:
    delta = points / 100
    items = next(n for n in range(50, 5000, 5) if crossed_power(delta, parts, seeds, n) >= 0.8)
    rng = np.random.default_rng(seeds)
    shape = (1200, seeds, items)
    d = (
        delta
        + rng.normal(0, parts.seed, (shape[0], seeds, 1))
        + rng.normal(0, parts.item, (shape[0], 1, items))
        + rng.normal(0, parts.residual, shape)
    )
    squares = mean_squares(d)
    variance, df = variance_of_mean(squares)
    critical = np.array([quantile(float(one)) for one in df])
    assert 0.75 <= (np.abs(squares.mean) / np.sqrt(variance) > critical).mean() <= 0.85


def test_one_seed_counts_the_items_that_differ() -> None:
    rows = power_rows("pure_grit", pairs(np.array([[1.0] * 12 + [-1.0] * 8 + [0.0] * 180])))
    assert [row.points for row in rows] == [1, 2, 3] and {row.items_now for row in rows} == {200}
    assert [row.items for row in rows] == [mcnemar_items(points / 100, 0.1) for points in (1, 2, 3)]
    assert "10.0% of the items" in rows[0].why and "other seeds may differ" in rows[0].why
    still = power_rows("pure_grit", pairs(np.zeros((1, 50))))
    assert still[2].items == mcnemar_items(0.03, 0.03) and "needs 3%" in still[2].why


def test_seeds_that_differ_too_much_ask_for_seeds_not_items() -> None:
    rng = np.random.default_rng(0)
    gains = np.array([[0.30], [0.10], [0.20]])
    d = (rng.random((3, 400)) < gains).astype(float)
    one, two, three = power_rows("pure_grit", pairs(d))
    assert (one.items, two.items, three.items) == (None, None, None)
    assert "no number of items does it with 3 seeds" in three.why
    needed = three.seeds if three.seeds is not None else 0
    assert needed > 30, "10 points from seed to seed: 3 points are 0.3 standard deviations"
    parts = Components(0.1, 0.0, 0.35)
    assert crossed_power(0.03, parts, 3, 10_000_000) < 0.2 < 0.8 < crossed_power(0.03, parts, 200, 400)


def test_seeds_that_agree_ask_for_items() -> None:
    one_seed = (np.random.default_rng(1).random(400) < 0.1).astype(float)
    d = np.stack([np.roll(one_seed, shift) for shift in range(5)])
    one, two, three = power_rows("hybrid_grit", pairs(d))
    assert one.items is not None and two.items is not None and three.items is not None
    assert one.items > 3 * two.items > 3 * three.items and three.seeds_now == 5
    assert "0.0 points" in one.why and "5 seeds as now" in one.why
