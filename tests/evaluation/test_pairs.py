"""Answers as arrays: the same numbers, whatever the order and the items of each run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from evaluation.pairs import Answered, pair

ANSWERS = {
    1: {"a": True, "b": False, "c": True},
    2: {"c": False, "a": True, "b": True},
    3: {"b": True, "d": True, "c": False},
    4: {},
    5: {"z": True},
}


def test_rows_are_in_the_order_asked_for_and_items_by_name() -> None:
    answered = Answered(ANSWERS)
    assert answered.rows([2, 1, 2]).tolist() == [[1, 1, 0], [1, 0, 1], [1, 1, 0]]
    assert answered.rows([3, 1]).tolist() == [[1, 0], [0, 1]], "only b and c, which both have"
    assert answered.rows([1, 5]).shape == (2, 0) and answered.rows([]).size == 0
    assert [run for run in range(7) if run in answered] == [1, 2, 3, 5], "no answers, no run"


def run(id: int, arm: str, seed: int, items: str = "x") -> Any:
    return SimpleNamespace(id=id, arm=arm, seed=seed, backend_name="hf", test_items_sha256=items, reference_run_id=1)


def test_pairs_are_of_one_seed_and_share_their_items() -> None:
    answered = Answered(ANSWERS)
    own, others = [run(2, "new", 0), run(3, "new", 7)], [run(3, "old", 7), run(2, "old", 1), run(5, "old", 0, "y")]
    found = pair(own, "old", others, answered)
    assert found is not None and found.seeds == (7,) and found.differences.tolist() == [[0, 0, 0]]
    base = pair(own, "base", [run(1, "base", 0)], answered)
    assert base is not None and base.seeds == (0, 7)
    assert base.own.tolist() == [[1, 0], [1, 0]] and base.other.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("partner", [4, 5])
def test_nothing_in_common_is_no_pair(partner: int) -> None:
    assert pair([run(2, "new", 0)], "old", [run(partner, "old", 0)], Answered(ANSWERS)) is None
