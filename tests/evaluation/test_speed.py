"""How speed is measured, with contenders whose times are known."""

import math
import random
import time
from functools import partial

import pytest

from evaluation.measure import speed
from export.engines.engine import LocalEngine


def test_contenders_take_turns_after_a_discarded_warm_up():
    log = []

    def request(name, ns, prefix, prompt, tokens):
        log.append((name, prefix, prompt))
        return {"prefill": (len(prompt), 1000), "decode": (tokens, ns * tokens)}

    contenders = {name: partial(request, name, ns) for name, ns in (("base", 1_000_000), ("arm", 2_000_000))}
    rows = speed.alternate(contenders, ["p", "q", "r"], repetitions=4, tokens=10)
    medians = {row["arm"]: row["median"] for row in speed.summary(rows) if row["phase"] == "decode"}
    assert medians == pytest.approx({"base": 1000, "arm": 500})
    assert len(log) == (4 + 1) * 3 * 2
    assert sorted({r["repetition"] for r in rows}) == [0, 1, 2, 3]
    assert all(r["tokens"] == 30 for r in rows if r["phase"] == "decode")
    pairs = [(log[i][0], log[i + 1][0]) for i in range(0, len(log), 2)]
    assert set(pairs) == {("base", "arm"), ("arm", "base")}
    assert len({prefix for _, prefix, _ in log}) == len(log), "no prompt comes twice"


def test_a_missing_figure_is_none_not_zero():
    answers = iter([(10, 5), (None, 5)] * 4)
    rows = speed.alternate({"a": lambda *_: {"decode": next(answers)}}, ["p", "q"], repetitions=3, tokens=9)
    assert [(r["tokens"], r["nanoseconds"]) for r in rows] == [(None, 10)] * 3
    assert speed.summary(rows) == []


def test_loads_alternate_and_drop_the_warm_up():
    log = []

    def load(arm, ns):
        log.append(arm)
        return ns

    rows = speed.loads({"a": lambda: load("a", 3_000_000), "b": lambda: load("b", None)}, repetitions=4)
    assert len(log) == 2 * (4 + 1) and log[:2] != log[2:4]
    assert [r["repetition"] for r in rows if r["arm"] == "a"] == [0, 1, 2, 3]
    assert {(r["arm"], r["phase"], r["tokens"], r["nanoseconds"]) for r in rows} == {
        ("a", "load", None, 3_000_000), ("b", "load", None, None)}  # fmt: skip
    (only,) = speed.summary(rows)
    assert (only["arm"], only["unit"], only["median"], only["repetitions"]) == ("a", "ms", 3.0, 4)


def test_summary_by_hand():
    def row(phase, repetition, tokens, ns):
        return {"arm": "a", "phase": phase, "repetition": repetition, "tokens": tokens, "nanoseconds": ns}

    rows = [row("decode", n, 100, ns) for n, ns in enumerate((10**9, 2 * 10**9, 4 * 10**9))]
    rows += [row("ttft", n, 4, ns) for n, ns in enumerate((8_000_000, 12_000_000, 4_000_000))]
    decode, ttft = speed.summary(rows)
    assert (decode["unit"], decode["low"], decode["median"], decode["high"]) == ("tokens/s", 25, 50, 100)
    assert (ttft["unit"], ttft["low"], ttft["median"], ttft["high"]) == ("ms", 1, 2, 3)
    assert decode["confidence"] == pytest.approx(0.75)  # 1 - 2/8


@pytest.mark.parametrize("n", [1, 5, 6, 9, 20])
def test_the_interval_of_a_median_has_its_stated_coverage(n):
    draw = random.Random(0)
    results = [speed.median_interval([draw.expovariate(1) for _ in range(n)]) for _ in range(4000)]
    share = sum(f["low"] <= math.log(2) <= f["high"] for f in results) / len(results)  # the true median is ln 2
    assert share == pytest.approx(results[0]["confidence"], abs=0.02)
    assert n < 6 or results[0]["confidence"] >= 0.95
    assert all(f["low"] <= f["median"] <= f["high"] for f in results)


def test_phases_of_a_request_in_this_process_are_timed_apart():
    class Slow(LocalEngine):
        device_class = "cpu"
        detokenize = close = lambda *_: "x"
        next_token = lambda _: 7  # noqa: E731
        is_end = lambda *_: True  # noqa: E731  (timing goes on)

        def tokenize(self, text):
            assert text == "9 <p>"
            return [1, 2, 3]

        def prefill(self, ids):
            time.sleep(0.02)

        def feed(self, token):
            time.sleep(0.01)

    phases = Slow("<{prompt}>").phases("9", "p", 5)
    assert (phases["ttft"][0], phases["prefill"][0], phases["decode"][0]) == (1, 3, 5)
    assert 20e6 <= phases["prefill"][1] <= phases["ttft"][1]
    assert phases["decode"][1] >= 50e6 > phases["ttft"][1] - phases["prefill"][1]
