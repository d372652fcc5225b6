"""Intervals, tests and power: equal to scipy and statsmodels, and in simulation right as often as they say."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from evaluation.statistics.differences import Pairs, kept_share
from evaluation.statistics.intervals import (
    MOST_EXACT,
    Interval,
    aligned,
    bootstrap_mean,
    holm,
    is_binary,
    judge,
    mean_test,
    share_interval,
    sign_flip_test,
    sign_test,
    wilson,
)
from evaluation.statistics.power import mcnemar_items, power, power_rows, shift_of
from evaluation.statistics.seeds import (
    Components,
    components,
    crossed_interval,
    mean_squares,
    quantile,
    variance_of_mean,
)

Array = NDArray[np.float64]


def pairs(own: Array, other: Array) -> Pairs:
    return Pairs("base", tuple(range(len(own))), own, other)


# Against textbook packages


def test_answers_are_aligned_by_the_items_that_all_have():
    rows = [{"a": 1.0, "b": 0.0, "c": 1.0}, {"c": 0.0, "a": 1.0, "b": 0.5}, {"b": 1.0, "d": 1.0, "c": 0.25}]
    assert aligned(rows[:2]).tolist() == [[1, 0, 1], [1, 0.5, 0]]
    assert aligned(rows).tolist() == [[0, 1], [0.5, 0], [1, 0.25]]
    assert aligned([rows[0], {"z": 1.0}]).shape == (2, 0) and aligned([]).size == 0


@pytest.mark.parametrize(
    ("values", "within"),
    [
        (np.array([1.0] * 60 + [0.0] * 100 + [-1.0] * 40), 0.008),
        (np.random.default_rng(4).beta(1, 2, 400), 0.002),
        (np.round(np.random.default_rng(4).beta(1, 2, 400), 1), 0.002),  # few values, drawn as counts
    ],
)
def test_the_bootstrap_equals_scipy(values: Array, within: float):
    ours = bootstrap_mean(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    assert ours.estimate == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=within)
    assert bootstrap_mean(values) == ours, "the same data give the same interval"
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_mean(values[:0])


def test_mcnemar_holm_and_wilson_equal_statsmodels():
    rng = np.random.default_rng(5)
    for gained, lost in ((0, 0), (9, 2), (3, 14), (40, 61), (3000, 2900)):
        values = rng.permutation([1.0] * gained + [-1.0] * lost + [0.0] * 100)
        theirs = mcnemar([[50, gained], [lost, 50]], exact=True).pvalue
        assert sign_test(values) == pytest.approx(theirs, rel=1e-9)
    for size in (1, 3, 8):
        p = list(rng.random(size) ** 3)
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    for right, items in ((0, 40), (7, 40), (200, 500), (40, 40)):
        ours = wilson(right / items, items)
        assert (ours.low, ours.high) == pytest.approx(proportion_confint(right, items, method="wilson"), abs=1e-6)
    assert all(wilson(0.0, n).low == 0.0 and wilson(1.0, n).high == 1.0 for n in range(1, 300)), "rounding too"


def test_sign_flips_equal_scipy():
    def scipys(values: Array, resamples: float) -> float:
        return float(
            stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=resamples).pvalue
        )

    for items, shift in ((2, 0.15), (9, 0.0), (MOST_EXACT, 0.15)):
        values = np.random.default_rng(items).normal(shift, 0.2, items)
        assert sign_flip_test(values) == pytest.approx(scipys(values, np.inf), rel=1e-9)
        assert sign_flip_test(np.concatenate([values, np.zeros(50)])) == sign_flip_test(-values)
    for items, shift in ((13, 0.1), (80, 0.04), (400, 0.02)):
        values = np.random.default_rng([items, int(100 * shift)]).normal(shift, 0.2, items)
        ours = sign_flip_test(values)
        # Both are estimates from about 10,000 flips.
        assert ours == pytest.approx(scipys(values, 9999), abs=4 * (2 * max(ours, 1e-3) / 10_000) ** 0.5)
        assert sign_flip_test(values) == ours, "the same data give the same value"
    rng = np.random.default_rng(7)
    for gained, lost in ((0, 0), (1, 0), (7, 2), (6, 6), (0, 12)):  # right and wrong answers: McNemar's test
        values = rng.permutation([1.0] * gained + [-1.0] * lost + [0.0] * 40)
        assert sign_flip_test(values) == pytest.approx(sign_test(values), rel=1e-9)
        assert mean_test(values, binary=True) == sign_test(values)


def test_chance_is_never_ruled_out():
    assert sign_flip_test(np.zeros(30)) == sign_flip_test(np.zeros(0)) == sign_flip_test(np.array([0.3])) == 1.0
    assert sign_flip_test(np.full(5, 0.3)) == 2 / 32 and sign_flip_test(np.full(200, 0.3)) == 1 / 10_001
    assert bootstrap_mean(np.array([1 / 3, 1 / 3, 1 / 3, -1.0] * 50)).crosses_zero
    assert bootstrap_mean(np.zeros(50)).crosses_zero
    tenths = np.array([0.1, 0.2, -0.3, 0.1, 0.2, -0.3])  # zero, and 5.6e-17 in floating point
    assert sign_flip_test(tenths) == 1.0


def test_a_share_of_right_answers_is_wilsons_and_a_mean_credit_is_not():
    right = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]])
    assert share_interval(right, binary=True) == wilson(0.75, 4)
    credit = np.random.default_rng(5).beta(1, 2, (3, 200))
    assert share_interval(credit, binary=False) == bootstrap_mean(credit.mean(axis=0))
    assert share_interval(np.array([[0.3]]), binary=False) == Interval(0.3, 0.0, 1.0)
    assert is_binary(right, np.zeros(0)) and not is_binary(right, credit) and not is_binary(np.array([0.999]))


def test_mean_squares_are_those_of_a_two_way_anova():
    d = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=(4, 30))
    d[2] += 0.4
    squares = mean_squares(d)
    frame = pd.DataFrame({"y": d.ravel(), "seed": np.repeat(range(4), 30), "item": np.tile(range(30), 4)})
    theirs = anova_lm(ols("y ~ C(seed) + C(item)", frame).fit())["mean_sq"]
    ours = [float(squares.seeds), float(squares.items), float(squares.residual)]
    assert ours == pytest.approx(list(theirs), rel=1e-9)
    assert mean_squares(np.stack([d, d + 1])).seeds == pytest.approx([ours[0]] * 2), "many layouts at once"
    with pytest.raises(ValueError, match="at least two seeds and two items, got 1 and 5"):
        mean_squares(np.zeros((1, 5)))


# Limits of the interval over seeds and items


def test_the_limits_are_t_tests_over_items_and_over_seeds():
    rng = np.random.default_rng(2)
    one = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.6, 0.3], size=80)
    interval, p_value = crossed_interval(np.stack([one, one, one]))  # seeds that agree to the item
    theirs = stats.ttest_1samp(one, 0)
    bounds = theirs.confidence_interval(0.95)
    assert (interval.low, interval.high, p_value) == pytest.approx((bounds.low, bounds.high, theirs.pvalue))

    d = rng.choice([-1.0, 0.0, 1.0], p=[0.01, 0.98, 0.01], size=(3, 2000)) + np.array([[0.4], [0.1], [0.5]])
    interval, p_value = crossed_interval(d)  # seeds that differ widely
    theirs = stats.ttest_1samp(d.mean(axis=1), 0)
    bounds = theirs.confidence_interval(0.95)
    expected = (bounds.low, min(1.0, bounds.high), theirs.pvalue)
    assert (interval.low, interval.high, p_value) == pytest.approx(expected, rel=0.01)


def test_seeds_that_agree_by_chance_do_not_narrow_the_interval():
    loose = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=60)
    equal = np.stack([loose, np.roll(loose, 1), np.roll(loose, 2)])
    squares = mean_squares(equal)
    assert float(squares.seeds) == pytest.approx(0.0, abs=1e-12) and float(squares.residual) > 0.1
    variance, df = variance_of_mean(squares)
    assert float(variance) >= 0.5 * float(squares.residual) / 180 and 2 <= float(df) <= 6
    assert components(equal).seed == 0.0


def test_nothing_varies():
    interval, p_value = crossed_interval(np.zeros((3, 50)))
    assert (interval.low, interval.high, p_value) == (0.0, 0.0, 1.0) and judge(interval, p_value) == "undecided"
    interval, p_value = crossed_interval(np.ones((3, 3)))
    assert interval.low == 1.0 and p_value == 0.25, "three items of three prove nothing"
    assert judge(*crossed_interval(np.ones((3, 50)))) == "better"
    assert crossed_interval(np.ones((3, 1))) == (Interval(1.0, -1.0, 1.0), 1.0), "a single item tells nothing"


def test_no_winner_while_zero_is_possible():
    assert judge(Interval(1.0, -0.1, 2.0), 0.001) == judge(Interval(1.0, 0.0, 2.0), 0.001) == "undecided"
    assert judge(Interval(1.0, 0.1, 2.0), 0.2) == "undecided", "four of four differing items are no proof"
    assert judge(Interval(1.0, 0.1, 2.0), 0.001) == "better" and judge(Interval(-1.0, -2.0, -0.1), 0.001) == "worse"


# What is kept


def test_the_share_kept_is_a_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.7).astype(float)
    own = np.where(rng.random(400) < 0.85, base, 1 - base)
    share = kept_share(pairs(own[None], base[None]))
    theirs = stats.bootstrap(
        (own, base), lambda a, b, axis=-1: a.mean(axis) / b.mean(axis), paired=True, method="percentile", rng=1
    ).confidence_interval
    assert share is not None and share.estimate == pytest.approx(own.mean() / base.mean())
    assert (share.low, share.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    seeds = kept_share(pairs(np.stack([own] * 3), np.stack([base] * 3)))
    assert seeds is not None and (seeds.low, seeds.high) == pytest.approx((share.low, share.high), abs=0.015)
    noisy = [np.where(rng.random(400) < keep, base, 0.0) for keep in (0.95, 0.75, 0.55)]
    wide = kept_share(pairs(np.stack(noisy), np.stack([base] * 3)))
    assert wide is not None and wide.high - wide.low > 0.3, "seeds that differ by 20 points"


def test_the_share_kept_is_never_certain():
    base = np.array([[1.0] * 3 + [0.0] * 30])
    nothing, everything = kept_share(pairs(0 * base, base)), kept_share(pairs(base, base))
    assert nothing is not None and (nothing.estimate, nothing.low) == (0.0, 0.0) and nothing.high > 0.5
    assert everything is not None and (everything.estimate, everything.high) == (1.0, 1.0) and everything.low < 0.5
    assert kept_share(pairs(base, 0 * base)) is None, "nothing to keep"


# Coverage in simulation: answers of two arms whose true difference is known

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
WHOLE = 0.25
"""Share of credits that are all or none; the rest follows a beta distribution, like ROUGE."""


def middle_of(share, spread):
    """The logit at which items of this spread are answered right with this mean probability."""
    return brentq(lambda middle: WEIGHTS @ expit(middle + spread * NODES) - share, -20, 20)


def right_or_wrong(rng, probability, shape):
    return (rng.random(shape) < probability).astype(np.float64)


def in_part(rng, mean, shape):
    between, kind = rng.beta(6 * mean, 6 * (1 - mean), size=shape), rng.random(shape)
    return np.where(kind < WHOLE * mean, 1.0, np.where(kind < WHOLE, 0.0, between))


def differences(rng, *, simulations, seeds, items, points, seed_sd, against_base, credit=False):
    """Credit of the arm minus that of its reference, shape (simulations, seeds, items), new items in each simulation.

    `points` is the true difference over all seeds and items, `seed_sd` the standard deviation of single runs, both in
    percentage points. The reference is one run for all seeds (`against_base`), or has seeds of its own that vary as
    much. Answers are right or wrong, or get credit between 0 and 1.
    """
    # Standard deviations, in logits, of an item's difficulty for both arms, and of what suits one arm alone.
    difficulty, taste, share = (1.0, 0.6, 0.4) if credit else (1.5, 0.7, 0.6)
    draw = in_part if credit else right_or_wrong
    common = rng.normal(0, difficulty, (simulations, 1, items))
    spread = np.hypot(difficulty, taste)

    def answers(share, runs, sd):
        at = expit(middle_of(share, spread) + spread * NODES)
        of_seed = sd / (WEIGHTS @ (at * (1 - at)))
        own = middle_of(share, np.hypot(spread, of_seed)) + common + rng.normal(0, taste, common.shape)
        return draw(rng, expit(own + rng.normal(0, of_seed, (simulations, runs, 1))), (simulations, runs, items))

    own = answers(share + points / 100, seeds, seed_sd / 100)
    return own - answers(share, 1 if against_base else seeds, 0.0 if against_base else seed_sd / 100)


SEVERAL = [(False, 3, 0, 0, 200), (False, 5, 0, 1, 500), (False, 3, 2, 2, 350), (False, 5, 10, 1, 200),
           (True, 3, 0, 1, 300), (True, 5, 5, 1, 100), (False, 2, 0, 1, 200), (False, 2, 0, 3, 500),
           (False, 2, 2, 2, 350), (False, 2, 10, 3, 200)]  # fmt: skip
FEW = [(False, 1, 0, 0, 300), (False, 1, 5, 0, 500)]


@pytest.mark.parametrize(
    ("credit", "seeds", "points", "seed_sd", "items", "against_base"),
    [*((*case, base) for case in SEVERAL for base in (True, False)), *((*case, False) for case in FEW),
     pytest.param(True, 1, 0, 0, 200, False, marks=pytest.mark.full)],
)  # fmt: skip
def test_the_interval_has_its_nominal_coverage(credit, seeds, points, seed_sd, items, against_base):
    rng = np.random.default_rng([seeds, items, int(points), int(seed_sd), against_base])
    d = differences(rng, simulations=1000, seeds=seeds, items=items, points=points, seed_sd=seed_sd,
                    against_base=against_base, credit=credit)  # fmt: skip
    if seeds > 1:
        results = [crossed_interval(one) for one in d]
    else:
        test = partial(sign_flip_test, flips=1000) if credit else sign_test
        results = [(bootstrap_mean(one, resamples=2000), test(one)) for one in d[:, 0]]
    share = np.mean([interval.low <= points / 100 <= interval.high for interval, _ in results])
    assert 0.93 <= share <= (1.0 if seeds == 2 else 0.975), "two seeds are told less, not more"
    if seeds == 2:  # nor far less: Student's t of the two means alone would be 4.4 times as wide as the right interval
        width = np.median([interval.high - interval.low for interval, _ in results])
        assert width / (2 * 1.96 * d.mean(axis=(1, 2)).std()) < (1.45 if against_base else 2.6)
    if points == 0:
        assert np.mean([judge(interval, p_value) != "undecided" for interval, p_value in results]) <= 0.07


@pytest.mark.parametrize(("against_base", "least"), [(True, 0.92), (False, 0.7)])
def test_two_seeds_tell_a_large_difference(against_base, least):
    rng = np.random.default_rng([2, 200, 20, against_base])
    d = differences(rng, simulations=1000, seeds=2, items=200, points=20, seed_sd=1, against_base=against_base)
    assert np.mean([judge(*crossed_interval(one)) != "undecided" for one in d]) >= least


# Power


@pytest.mark.parametrize(("points", "differing"), [(1, 0.05), (2, 0.3), (3, 0.1)])
def test_mcnemars_test_has_the_power_at_the_number_of_items(points: int, differing: float):
    delta = points / 100
    items = mcnemar_items(delta, differing)
    gain, loss = (differing + delta) / 2, (differing - delta) / 2
    draws = np.random.default_rng(points).multinomial(items, [gain, loss, 1 - gain - loss], size=4000)
    p = 2 * stats.binom.cdf(draws[:, :2].min(axis=1), draws[:, :2].sum(axis=1), 0.5)
    assert 0.75 <= (p < 0.05).mean() <= 0.85


@pytest.mark.parametrize(
    ("seeds", "parts"),
    [(3, Components(0.003, 0.3, 0.3)), (5, Components(0.0, 0.0, 0.4)), (10, Components(0.01, 0.2, 0.3))],
)
def test_the_test_over_seeds_has_the_power_at_the_number_of_items(seeds: int, parts: Components):
    delta = 0.03
    items = next(n for n in range(50, 5000, 5) if power(*shift_of(delta, parts, seeds, n)) >= 0.8)
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


def test_one_seed_counts_the_items_that_differ():
    zeros = np.zeros((1, 200))
    rows = power_rows(
        "arm", pairs(np.array([[1.0] * 12 + [0.0] * 188]), np.array([[0.0] * 12 + [1.0] * 8 + [0.0] * 180]))
    )
    assert [row.points for row in rows] == [1, 2, 3] and {row.items_now for row in rows} == {200}
    assert [row.items for row in rows] == [mcnemar_items(points / 100, 0.1) for points in (1, 2, 3)]
    assert "10.0% of the items" in rows[0].why and "other seeds may differ" in rows[0].why
    still = power_rows("arm", pairs(zeros, zeros))
    assert still[2].items == mcnemar_items(0.03, 0.03) and "needs 3%" in still[2].why


def test_credits_of_one_seed_count_how_items_vary():
    rng = np.random.default_rng(11)
    sample = differences(
        rng, simulations=1, seeds=1, items=4000, points=0, seed_sd=0, against_base=True, credit=True
    )[0]  # fmt: skip
    base = np.full(sample.shape, 0.5)
    rows = power_rows("arm", pairs(base + sample, base))
    needed = rows[2].items
    assert needed is not None and "from item to item" in rows[0].why
    d = rng.choice(sample[0] - sample.mean(), size=(2000, needed)) + 0.03
    t = d.mean(axis=1) / (d.std(axis=1, ddof=1) / needed**0.5)
    assert 0.77 <= (np.abs(t) > stats.t.ppf(0.975, needed - 1)).mean() <= 0.83
    own = rng.normal(0.5, 1e-4, (1, 50))
    assert [row.items for row in power_rows("arm", pairs(own, np.full((1, 50), 0.5)))] == [6, 6, 6], "as many signs"


def test_seeds_that_differ_too_much_ask_for_seeds_not_items():
    d = (np.random.default_rng(0).random((3, 400)) < np.array([[0.30], [0.10], [0.20]])).astype(float)
    rows = power_rows("arm", pairs(d, 0 * d))
    assert [row.items for row in rows] == [None] * 3 and "no number of items" in rows[2].why
    assert (rows[2].seeds or 0) > 30, "10 points from seed to seed: 3 points are 0.3 standard deviations"


def test_seeds_that_agree_ask_for_items():
    one_seed = (np.random.default_rng(1).random(400) < 0.1).astype(float)
    d = np.stack([np.roll(one_seed, shift) for shift in range(5)])
    one, two, three = power_rows("arm", pairs(d, 0 * d))
    assert one.items and two.items and three.items and one.items > 3 * two.items > 3 * three.items
    assert three.seeds_now == 5 and "0.0 points" in one.why and "5 seeds as now" in one.why
