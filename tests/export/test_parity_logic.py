"""Parity's own arithmetic, with engines whose answers are known."""

import pytest

from export import parity


class Engine:
    """Token ids are character codes; answers are looked up."""

    def __init__(self, answers, bos=True, gap=5.0):
        self.answers, self.bos, self.closed, self.gap, self.gaps = answers, bos, False, gap, []

    def tokenize(self, text):
        return ([1] if self.bos else []) + [ord(c) for c in text]

    def greedy(self, ids, max_tokens):
        answer = self.answers["".join(map(chr, ids)).lstrip("\x01")][:max_tokens]
        self.gaps = [self.gap] * (len(answer) + 1)
        return answer

    def detokenize(self, ids):
        return "".join(map(chr, ids))

    def close(self):
        self.closed = True


RIGHT = {"a": [65, 66], "b": [67], "c": [68, 69], "d": [70]}


def compare(other, gap=5.0, **kwargs):
    engines = {"hf": Engine(RIGHT, gap=gap), "x": other, **kwargs}
    opened = {name: lambda engine=engine: engine for name, engine in engines.items()}
    result = parity.compare(opened, list("abcd"), 8, reference="hf")
    assert all(engine.closed for engine in engines.values())
    return result


def test_all_equal():
    result = compare(Engine(RIGHT))
    assert (result["token_ids_equal"], result["greedy_equal"], result["first_difference"]) == (1.0, 1.0, None)
    assert parity.verdict(result, 1.0) is None


def test_shares_and_first_difference():
    result = compare(Engine({**RIGHT, "c": [68, 70]}))
    assert result["greedy_equal"] == 0.75 and result["token_ids_equal"] == 1.0
    d = result["first_difference"]
    assert (d["prompt_number"], d["position"], d["expected_token"], d["got_token"]) == (2, 1, 69, 70)
    assert parity.verdict(result, 0.75) is None
    message = parity.verdict(result, 0.76)
    assert "greedy answers are equal for 75.0% of prompts, expected 76.0%" in message
    assert "adapter scale, merge or quantization" in message


def test_ties_are_named_and_count_as_differences():
    parted = Engine({**RIGHT, "c": [68, 70]})
    result = compare(parted, gap=0.01)
    assert (result["greedy_equal"], result["greedy_tied"]) == (0.75, 0.25)
    assert result["first_difference"]["likely_cause"].startswith("rounding")
    assert result["first_difference"]["gap"] == 0.01
    assert "25.0% part at a tie" in parity.verdict(result, 0.76)
    clear = compare(parted, gap=0.03)
    assert clear["greedy_tied"] == 0.0
    assert parity.verdict(clear, 0.76) is not None


def test_one_side_stops_early():
    d = compare(Engine({**RIGHT, "a": [65]}))["first_difference"]
    assert (d["position"], d["expected_token"], d["got_token"]) == (1, 66, None)
    assert "end of sequence" in d["likely_cause"]


@pytest.mark.parametrize(("bos", "words"), [(False, "leaves out the first token")])
def test_bos(bos, words):
    result = compare(Engine(RIGHT, bos=bos))
    assert result["token_ids_equal"] == 0.0 and result["greedy_equal"] == 1.0
    assert words in result["first_difference"]["likely_cause"]
    assert parity.verdict(result, 0.0) is not None


def test_the_worst_engine_counts():
    result = compare(Engine(RIGHT), y=Engine({**RIGHT, "a": [1], "b": [1]}))
    assert result["pairs"] == {"hf/x": 1.0, "hf/y": 0.5}
    assert result["greedy_equal"] == 0.5
