"""Success criteria: passed or failed only by a whole interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from db.queries_compare import Timing
from evaluation.criteria import by_difference, by_retention, by_speed
from evaluation.differences import compare_pairs, in_words
from evaluation.pairs import Pairs
from evaluation.ratios import kept_share, speed_changes, speed_interval
from evaluation.statistics import Interval


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(71.0, 90.0, "pass"), (70.0, 90.0, "undecided"), (60.0, 75.0, "undecided"), (40.0, 69.9, "fail")],
)
def test_retention_is_judged_by_the_whole_interval(low: float, high: float, outcome: str) -> None:
    found = by_retention("pure_grit", Interval((low + high) / 2, low, high), 55.5)
    assert found.outcome == outcome and "Plain accuracy 55.5%" in found.why
    missing = by_retention("pure_grit", None, 55.5)
    assert missing.outcome == "undecided" and missing.estimate is None and "Not measured" in missing.why


@pytest.mark.parametrize(
    ("low", "high", "outcome"), [(-9.0, 4.0, "pass"), (-10.0, 4.0, "undecided"), (-30.0, -11.0, "fail")]
)
def test_speed_is_judged_by_the_whole_interval(low: float, high: float, outcome: str) -> None:
    assert by_speed("pure_grit", Interval(-5.0, low, high), 0.96, 10).outcome == outcome
    few = by_speed("pure_grit", Interval(-5.0, low, high), 0.9375, 5)
    assert few.outcome == "undecided" and "5 paired repetitions" in few.why and few.confidence == 93.75
    assert by_speed("pure_grit", None, 0.0, 0).outcome == "undecided"


def pairs(own: list[float], other: list[float], against: str = "base") -> Pairs:
    """One seed."""
    return Pairs(against, (0,), np.array([own]), np.array([other]))


def test_accuracy_is_judged_by_interval_and_corrected_p() -> None:
    zeros = [0.0] * 100
    better, worse = [1.0] * 30 + [0.0] * 70, [0.0] * 50 + [1.0] * 50
    found = compare_pairs(
        {
            ("a", "base"): pairs(better, zeros),
            ("b", "base"): pairs(zeros, worse),
            ("c", "base"): pairs([1.0] * 6 + [0.0] * 94, zeros),
            ("a", "lora"): pairs(better, better, "lora"),
        }
    )
    first, lead = found["a"]
    assert by_difference("a", "base", first).outcome == "pass"
    assert by_difference("b", "base", found["b"][0]).outcome == "fail"
    # 6 of 6: p = 0.031; it stays so as the largest of three.
    six = by_difference("c", "base", found["c"][0])
    assert (found["c"][0].p_value, six.outcome) == (pytest.approx(2 / 64), "pass")
    against = by_difference("a", "lora", lead)
    assert against.outcome == "undecided" and "contains zero" in against.why and "One seed" in against.why
    assert by_difference("a", "lora", None).estimate is None


def test_the_correction_for_several_arms_can_take_a_pass_away() -> None:
    zeros = [0.0] * 100
    found = compare_pairs({(arm, "base"): pairs([1.0] * 6 + [0.0] * 94, zeros) for arm in ("a", "b")})
    judged = by_difference("a", "base", found["a"][0])
    assert not found["a"][0].points.crosses_zero and judged.outcome == "undecided"
    assert "Not shown" in judged.why and "p = 0.062 after correction" in judged.why
    assert in_words(found["a"][0]).startswith("not shown to be better than base (+6.0 points")
    assert "p = 0.062" in in_words(found["a"][0])


def test_the_share_kept_is_a_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.7).astype(float)
    own = np.where(rng.random(400) < 0.85, base, 1 - base)
    share = kept_share(Pairs("base", (0,), own[None], base[None]))
    theirs = bootstrap(
        (own, base), lambda a, b, axis=-1: a.mean(axis) / b.mean(axis), paired=True, method="percentile", rng=1
    ).confidence_interval
    assert share is not None and share.estimate == pytest.approx(own.mean() / base.mean())
    assert (share.low, share.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    seeds = kept_share(Pairs("base", (0, 1, 2), np.stack([own] * 3), np.stack([base] * 3)))
    assert seeds is not None and (seeds.low, seeds.high) == pytest.approx((share.low, share.high), abs=0.015)
    noisy = [np.where(rng.random(400) < keep, base, 0.0) for keep in (0.95, 0.75, 0.55)]
    wide = kept_share(Pairs("base", (0, 1, 2), np.stack(noisy), np.stack([base] * 3)))
    assert wide is not None and wide.high - wide.low > 0.3, "seeds that differ by 20 points"


def test_the_share_kept_is_never_certain() -> None:
    base = np.array([[1.0] * 3 + [0.0] * 30])
    nothing, everything = kept_share(Pairs("base", (0,), 0 * base, base)), kept_share(Pairs("base", (0,), base, base))
    assert nothing is not None and (nothing.estimate, nothing.low) == (0.0, 0.0) and nothing.high > 0.5
    assert everything is not None and (everything.estimate, everything.high) == (1.0, 1.0) and everything.low < 0.5
    assert kept_share(Pairs("base", (0,), base, 0 * base)) is None, "nothing to keep"


def test_speed_is_paired_by_repetition() -> None:
    def rows(arm: str, seconds: list[int]) -> list[Timing]:
        return [Timing(arm, "decode", r, 600, s * 10**9) for r, s in enumerate(seconds)]

    drifting = [4, 5, 6, 7, 8, 9]
    timings = [*rows("pure_grit", [2 * s for s in drifting]), *rows("base", drifting)]
    timings += [Timing("base", "prefill", 0, 600, 1), Timing("pure_grit", "decode", 9, None, 5)]
    changes = speed_changes("pure_grit", timings)
    assert changes == pytest.approx([-0.5] * 6), "a machine that slows down does not blur the ratio"
    found = speed_interval([0.01, -0.02, 0.3, 0.0, 0.02, -0.01])
    assert found is not None and found[0] == Interval(pytest.approx(0.005), -0.02, 0.3)
    assert found[1] == pytest.approx(1 - 2 / 2**6)
    assert speed_interval([]) is None
