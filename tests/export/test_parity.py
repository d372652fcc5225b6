"""Parity's own arithmetic, with engines whose answers are known."""

from export.engines.engine import Generation, LocalEngine
from export.proof import export_problem, prove


class Told(LocalEngine):
    """Token ids are character codes; answers are looked up."""

    device_class = "cpu"
    prefill = next_token = feed = is_end = None

    def __init__(self, answers, bos=True, lead=5.0):
        super().__init__("{prompt}")
        self.answers, self.bos, self.closed, self.lead = answers, bos, False, lead

    def tokenize(self, text):
        return ([1] if self.bos else []) + [ord(c) for c in text]

    def answer(self, ids, max_tokens, stop=(), guess=()):
        answer = self.answers["".join(map(chr, ids)).lstrip("\x01")][:max_tokens]
        leads = [self.lead] * (len(answer) + 1)
        return Generation("", len(ids), len(answer), 0, 0, 0, "stop", ids=answer, leads=leads)

    def detokenize(self, ids):
        return "".join(map(chr, ids))

    def close(self):
        self.closed = True


RIGHT = {"a": [65, 66], "b": [67], "c": [68, 69], "d": [70]}


def compare(other, lead=5.0, **kwargs):
    reference, engines = Told(RIGHT, lead=lead), {"x": other, **kwargs}
    opened = {name: lambda engine=engine: engine for name, engine in engines.items()}
    result = prove(lambda: reference, opened, list("abcd"), 8)
    assert reference.closed and all(engine.closed for engine in engines.values())
    return result


def test_all_equal():
    result = compare(Told(RIGHT))
    assert (result["token_ids_equal"], result["greedy_equal"], result["first_difference"]) == (1.0, 1.0, None)
    assert list(result["answers"].values())[0] == {"ids": [1, 97], "answer": "AB"}
    assert export_problem(result, 1.0) is None


def test_shares_and_first_difference():
    result = compare(Told({**RIGHT, "c": [68, 70]}))
    assert result["greedy_equal"] == 0.75 and result["token_ids_equal"] == 1.0
    d = result["first_difference"]
    assert (d["prompt_number"], d["position"], d["expected_token"], d["got_token"]) == (2, 1, 69, 70)
    assert export_problem(result, 0.75) is None
    message = export_problem(result, 0.76)
    assert "76.0% of prompts, got 75.0%" in message
    assert "adapter scale, merge or quantization" in message


def test_ties_are_named_and_count_as_differences():
    parted = Told({**RIGHT, "c": [68, 70]})
    result = compare(parted, lead=0.01)
    assert (result["greedy_equal"], result["greedy_tied"]) == (0.75, 0.25)
    assert result["first_difference"]["likely_cause"].startswith("rounding")
    assert result["first_difference"]["gap"] == 0.01
    assert "25.0% diverge at a tie" in export_problem(result, 0.76)
    clear = compare(parted, lead=0.03)
    assert clear["greedy_tied"] == 0.0
    assert export_problem(clear, 0.76) is not None


def test_one_side_stops_early():
    d = compare(Told({**RIGHT, "a": [65]}))["first_difference"]
    assert (d["position"], d["expected_token"], d["got_token"]) == (1, 66, None)
    assert "end of sequence" in d["likely_cause"]


def test_a_missing_bos_is_counted_once():
    result = compare(Told(RIGHT, bos=False))
    assert result["token_ids_equal"] == 0.0 and result["greedy_equal"] == 1.0
    assert "BOS; it is missing" in result["first_difference"]["likely_cause"]
    assert export_problem(result, 0.0) is not None


def test_the_worst_engine_counts():
    result = compare(Told(RIGHT), y=Told({**RIGHT, "a": [1], "b": [1]}))
    assert result["pairs"] == {"hf/x": 1.0, "hf/y": 0.5}
    assert result["greedy_equal"] == 0.5
