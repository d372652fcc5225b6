"""How speed is measured, with contenders whose times are known."""

import math

import pytest

from evaluation import speed


class Contender:
    def __init__(self, log, name, ns):
        self.log, self.name, self.ns = log, name, ns

    def __call__(self, prompt, tokens):
        self.log.append((self.name, prompt))
        return {"prefill": (len(prompt), 1000), "decode": (tokens, self.ns * tokens)}


@pytest.fixture
def measured():
    log = []
    contenders = {"base": Contender(log, "base", 1_000_000), "arm": Contender(log, "arm", 2_000_000)}
    rows = speed.alternate(contenders, ["p", "q", "r"], repetitions=4, tokens=10)
    return log, rows


def test_rates_by_hand(measured):
    _, rows = measured
    assert speed.tokens_per_second(rows, "base", "decode") == pytest.approx(1000)
    assert speed.tokens_per_second(rows, "arm", "decode") == pytest.approx(500)
    assert math.isnan(speed.tokens_per_second(rows, "nobody", "decode"))


def test_the_warm_up_is_thrown_away(measured):
    log, rows = measured
    assert len(log) == (4 + 1) * 3 * 2
    assert sorted({r["repetition"] for r in rows}) == [0, 1, 2, 3]
    assert all(r["tokens"] == 30 for r in rows if r["phase"] == "decode")


def test_contenders_alternate_and_take_turns_in_going_first(measured):
    log, _ = measured
    pairs = [(log[i][0], log[i + 1][0]) for i in range(0, len(log), 2)]
    assert set(pairs) == {("base", "arm"), ("arm", "base")}


def test_no_prompt_comes_twice(measured):
    log, _ = measured
    assert len({prompt for _, prompt in log}) == len(log)
