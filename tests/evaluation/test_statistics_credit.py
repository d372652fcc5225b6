"""Answers with credit between 0 and 1: equal to scipy, and right as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from simulated_credit import credit_differences

from evaluation import statistics
from evaluation.pairs import Pairs
from evaluation.power import mcnemar_items, power_rows
from evaluation.seeds import crossed_interval
from evaluation.statistics import (
    MOST_EXACT,
    bootstrap_mean,
    is_binary,
    judge,
    mean_test,
    share_interval,
    sign_flip_test,
    sign_test,
    wilson,
)

SIMULATIONS = 1000
Array = NDArray[np.float64]


def scipys(values: Array, resamples: float) -> float:
    """The paired permutation test of the mean, which flips signs."""
    found = stats.permutation_test(
        (values,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=resamples, vectorized=True
    )
    return float(found.pvalue)


@pytest.mark.parametrize("items", [2, 5, 9, MOST_EXACT])
@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_few_differences_are_flipped_in_every_way_as_scipy_does(items: int, shift: float) -> None:
    values = np.random.default_rng(items).normal(shift, 0.2, items)
    assert sign_flip_test(values) == pytest.approx(scipys(values, np.inf), rel=1e-9)
    assert sign_flip_test(np.concatenate([values, np.zeros(50)])) == sign_flip_test(values), "equal credits say nothing"
    assert sign_flip_test(-values) == sign_flip_test(values)


@pytest.mark.parametrize(("items", "shift"), [(13, 0.1), (80, 0.0), (80, 0.04), (400, 0.02)])
def test_many_differences_are_flipped_at_random_as_scipy_does(items: int, shift: float) -> None:
    values = np.random.default_rng([items, int(100 * shift)]).normal(shift, 0.2, items)
    ours = sign_flip_test(values)
    # Both are estimates from about 10,000 flips.
    assert ours == pytest.approx(scipys(values, 9999), abs=4 * (2 * max(ours, 1e-3) / 10_000) ** 0.5)
    assert sign_flip_test(values) == ours, "the same data give the same value"


def test_of_right_and_wrong_answers_it_is_mcnemars_test() -> None:
    rng = np.random.default_rng(7)
    for gained, lost in ((0, 0), (1, 0), (7, 2), (6, 6), (0, 12)):
        values = rng.permutation([1.0] * gained + [-1.0] * lost + [0.0] * 40)
        assert sign_flip_test(values) == pytest.approx(sign_test(values), rel=1e-9)
        assert mean_test(values, binary=True) == sign_test(values)
    values = rng.permutation([1.0] * 60 + [-1.0] * 40)
    assert sign_flip_test(values, flips=100_000) == pytest.approx(sign_test(values), abs=0.005)


def test_chance_is_never_ruled_out_for_good() -> None:
    assert sign_flip_test(np.zeros(30)) == sign_flip_test(np.zeros(0)) == 1.0
    assert sign_flip_test(np.array([0.3])) == 1.0
    assert sign_flip_test(np.full(5, 0.3)) == 2 / 32 and sign_flip_test(np.full(200, 0.3)) == 1 / 10_001
    tenths = np.array([0.1, 0.2, -0.3, 0.1, 0.2, -0.3])  # zero, and 5.6e-17 in floating point
    assert sign_flip_test(tenths) == 1.0


def test_many_items_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).beta(2, 3, 30_000)
    d = values - values.mean() + 0.001
    parts = statistics._parts(300, d.size)
    assert len(parts) > 1 and sum(parts) == 300 and max(parts) * d.size <= statistics._AT_ONCE
    p_value = sign_flip_test(d, flips=300)
    # A sum of flipped signs is nearly normal, and a share of 300 flips has this standard error.
    normal = 2 * stats.norm.sf(abs(d.sum()) / np.square(d).sum() ** 0.5)
    assert 0.3 < normal < 0.7 and p_value == pytest.approx(normal, abs=4 * (normal * (1 - normal) / 300) ** 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "_AT_ONCE", 300 * d.size)
        assert sign_flip_test(d, flips=300) == p_value, "the same flips, drawn at once"
    low = bootstrap_mean(values, resamples=400)
    half = 1.96 * values.std() / values.size**0.5
    assert (low.low, low.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 4)


def test_the_bootstrap_of_credits_is_scipys() -> None:
    values = np.random.default_rng(4).beta(1, 2, 400)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    ours = bootstrap_mean(values)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    few = np.round(values, 1)  # drawn as counts, not item by item
    theirs = stats.bootstrap((few,), np.mean, method="percentile", n_resamples=9999, rng=1).confidence_interval
    ours = bootstrap_mean(few)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)


def test_a_share_of_right_answers_is_wilsons_and_a_mean_credit_is_not() -> None:
    right = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    assert share_interval(right, binary=True) == wilson(0.75, 4)
    credit = np.random.default_rng(5).beta(1, 2, (3, 200))
    assert share_interval(credit, binary=False) == bootstrap_mean(credit.mean(axis=0))
    one = share_interval(np.array([[0.3]]), binary=False)
    assert (one.estimate, one.low, one.high) == (0.3, 0.0, 1.0)
    assert is_binary(right, np.zeros(0)) and not is_binary(right, credit) and not is_binary(np.array([0.999]))


def pairs(own: Array, other: Array) -> Pairs:
    return Pairs("base", tuple(range(len(own))), own, other)


def test_items_that_one_seed_needs_have_the_power_asked_for() -> None:
    rng = np.random.default_rng(11)
    sample = credit_differences(rng, simulations=1, seeds=1, items=4000, points=0, seed_sd=0, against_base=True)[0]
    base = np.full(sample.shape, 0.5)
    rows = power_rows("arm", Pairs("base", (0,), base + sample, base))
    assert [row.items_now for row in rows] == [4000] * 3 and "from item to item" in rows[0].why
    needed = rows[2].items
    assert needed is not None
    d = rng.choice(sample[0] - sample.mean(), size=(2000, needed)) + 0.03
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / needed**0.5)
    assert 0.77 <= (np.abs(t) > stats.t.ppf(0.975, needed - 1)).mean() <= 0.83
    seen = [sign_flip_test(one, flips=1000) < 0.05 for one in d[:300]]
    assert 0.72 <= np.mean(seen) <= 0.88, "the test that is used has the power of the t-test"


def test_a_tiny_deviation_needs_as_many_items_as_a_test_of_signs_does() -> None:
    own = np.random.default_rng(1).normal(0.5, 1e-4, (1, 50))
    assert [row.items for row in power_rows("arm", pairs(own, np.full((1, 50), 0.5)))] == [6, 6, 6]
    still = power_rows("arm", pairs(own, own))
    assert still[2].items == mcnemar_items(0.03, 0.03), "no item differs, so nothing is known of how they vary"


@pytest.mark.parametrize("against_base", [True, False])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("points", "seed_sd", "items"), [(0, 0, 100), (0, 1, 300), (5, 1, 100)])
def test_the_interval_over_seeds_holds_for_credits_too(
    against_base: bool, seeds: int, points: float, seed_sd: float, items: int
) -> None:
    """Required: 93 to 97.5% over 1,000 simulations; a verdict on no difference in at most 7%."""
    rng = np.random.default_rng([seeds, items, int(points), int(seed_sd), against_base])
    d = credit_differences(
        rng, simulations=SIMULATIONS, seeds=seeds, items=items, points=points, seed_sd=seed_sd,
        against_base=against_base,
    )  # fmt: skip
    hits = verdicts = 0
    for one in d:
        interval, p_value = crossed_interval(one)
        hits += interval.low <= points / 100 <= interval.high
        verdicts += judge(interval, p_value) != "undecided"
    assert 0.93 <= hits / SIMULATIONS <= 0.975
    if points == 0:
        assert verdicts / SIMULATIONS <= 0.07


@pytest.mark.parametrize(("points", "items"), [(0, 200), (5, 300)])
def test_the_interval_of_one_seed_holds_for_credits_too(points: float, items: int) -> None:
    rng = np.random.default_rng([1, int(points), items])
    d = credit_differences(
        rng, simulations=2 * SIMULATIONS, seeds=1, items=items, points=points, seed_sd=0, against_base=True
    )  # fmt: skip
    hits = verdicts = 0
    for one in d[:, 0]:
        interval = bootstrap_mean(one, resamples=2000)
        hits += interval.low <= points / 100 <= interval.high
        verdicts += judge(interval, sign_flip_test(one, flips=1000)) != "undecided"
    assert 0.93 <= hits / len(d) <= 0.97
    if points == 0:
        assert verdicts / len(d) <= 0.07
