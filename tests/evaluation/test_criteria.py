"""Judgements and success criteria: better, worse, pass or fail only by a whole interval."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from evaluation.report.arms import SpeedChange, speed_change, speed_changes
from evaluation.report.criteria import by_loss, by_retention, by_speed
from evaluation.report.judgement import by_difference
from evaluation.statistics.differences import Pairs, compare_pairs
from evaluation.statistics.intervals import Interval


def test_retention_and_speed_are_judged_by_the_whole_interval() -> None:
    for low, high, outcome in ((71, 90, "pass"), (70, 90, "undecided"), (60, 75, "undecided"), (40, 69.9, "fail")):
        found = by_retention("pure_grit", Interval((low + high) / 2, low, high), 55.5)
        assert found.outcome == outcome and "55.5%" in found.why
    missing = by_retention("pure_grit", None, 55.5)
    assert missing.outcome == "undecided" and missing.estimate is None
    for low, high, outcome in ((-9, 4, "pass"), (-10, 4, "undecided"), (-30, -11, "fail")):
        assert by_speed("pure_grit", SpeedChange(Interval(-5, low, high), 0.96, 10)).outcome == outcome
        few = by_speed("pure_grit", SpeedChange(Interval(-5, low, high), 0.9375, 5))
        assert few.outcome == "undecided" and "5 paired" in few.why and few.confidence == 93.75
    assert by_speed("pure_grit", SpeedChange(None, 0.0, 0)).outcome == "undecided"


@pytest.mark.parametrize(
    ("losses", "outcome", "why"),
    [
        ((-0.02, -0.015, -0.018), "pass", "3 seeds"),
        ((0.02, 0.015, 0.018), "fail", "above"),
        ((-0.02, 0.015, -0.018), "undecided", "contains"),
        ((-0.02,), "undecided", "One seed"),
        ((-0.02, math.inf, -0.018), "undecided", "Not finite"),
        ((), "undecided", "lora"),
    ],
)
def test_the_evaluation_loss_is_judged_over_seeds(losses: tuple[float, ...], outcome: str, why: str) -> None:
    found = by_loss("pure_grit", "lora", losses)
    assert found.outcome == outcome and why in found.why and found.unit == "nats per token"
    if len(losses) == 3 and found.estimate and math.isfinite(sum(losses)):
        theirs = ttest_1samp(losses, 0).confidence_interval(0.95)
        assert (found.estimate.low, found.estimate.high) == pytest.approx(tuple(theirs))
    assert found.confidence == (0 if len(losses) == 1 else 95)


def pairs(own: list[float], other: list[float], against: str = "base") -> Pairs:
    return Pairs(against, (0,), np.array([own]), np.array([other]))


def test_accuracy_is_judged_by_interval_and_corrected_p() -> None:
    zeros = [0.0] * 100
    better, worse, six = [1.0] * 30 + [0.0] * 70, [0.0] * 50 + [1.0] * 50, [1.0] * 6 + [0.0] * 94
    of_base = {
        ("a", "base"): pairs(better, zeros),
        ("b", "base"): pairs(zeros, worse),
        ("c", "base"): pairs(six, zeros),
    }
    found = compare_pairs({**of_base, ("a", "lora"): pairs(better, better, "lora")})
    first, lead = found["a"]
    assert by_difference(first).outcome == "better" and by_difference(found["b"][0]).outcome == "worse"
    # 6 of 6: p = 0.031; it stays so as the largest of three. But one seed, and 6 points are no more than seeds do.
    (third,) = found["c"]
    assert (third.p_value, by_difference(third).outcome) == (pytest.approx(2 / 64), "undecided")
    assert "one seed" in by_difference(third).reason
    assert by_difference(lead) == ("undecided", "the interval contains zero")

    # Of two alike, the correction takes the decision away.
    (alike,) = compare_pairs({(arm, "base"): pairs(six, zeros) for arm in ("a", "b")})["a"]
    assert not alike.points.crosses_zero and by_difference(alike).outcome == "undecided"
    assert "p = 0.062" in by_difference(alike).reason


def test_speed_is_paired_by_repetition() -> None:
    def timing(arm: str, phase: str, repetition: int, tokens: int | None, nanoseconds: int) -> Any:
        return SimpleNamespace(**locals())

    def rows(arm: str, seconds: list[int]) -> list[Any]:
        return [timing(arm, "decode", r, 600, s * 10**9) for r, s in enumerate(seconds)]

    drifting = [4, 5, 6, 7, 8, 9]
    timings = [*rows("pure_grit", [2 * s for s in drifting]), *rows("base", drifting)]
    timings += [timing("base", "prefill", 0, 600, 1), timing("pure_grit", "decode", 9, None, 5)]
    changes = speed_changes("pure_grit", timings)
    assert changes == pytest.approx([-0.5] * 6), "a machine that slows down does not blur the ratio"
    found = speed_change([0.01, -0.02, 0.3, 0.0, 0.02, -0.01])
    assert found.interval == Interval(pytest.approx(0.5), -2.0, 30.0) and found.repetitions == 6
    assert found.confidence == pytest.approx(1 - 2 / 2**6)
    assert speed_change([]) == (None, 0.0, 0)
