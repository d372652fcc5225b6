"""The simulated schedule, where it can be reckoned by hand."""

import pytest

from benchmarks.scale import matrix, parse, simulate

KINDS = {"base": set(), "train": {"base"}, "score": {"base", "train"}}
SECONDS = {"base": 10.0, "train": 5.0, "score": 1.0}
SIZES = {"base": 100.0, "train": 10.0, "score": 0.0}


def test_one_worker_takes_all_the_work_many_the_longest_way_and_a_slow_link_its_bytes():
    which = {parse(name) for name in ("base", "train@a_b-0", "train@c-0", "score@a_b-0", "score@c-0")}
    stages = matrix(KINDS, which, seeds=3)
    assert len(stages) == 1 + 2 * 2 * 3
    assert stages["score", "c", "2"] == {("base", "", ""), ("train", "c", "2")}
    fast, slow = 1e12, 100.0
    assert simulate(stages, SECONDS, SIZES, 1, fast, 0.5)[0] == pytest.approx(10.5 + 6 * (5.5 + 1.5))
    assert simulate(stages, SECONDS, SIZES, 1000, fast, 0.5)[0] == pytest.approx(10.5 + 5.5 + 1.5)
    # one worker pushes the base, 1 s, and six adapters, 0.1 s each, and pulls nothing that it made
    took, busy = simulate(stages, SECONDS, SIZES, 1, slow, 0.0)
    assert took == pytest.approx(10 + 6 * 6 + 1.6) and busy == pytest.approx(1.6 / took)
