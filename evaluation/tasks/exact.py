"""Anybody's questions with short answers that are right or wrong: scored as gsm8k is.

Fields: question, answer. Where the right answer is a number, the number that an answer arrives at must equal it (18,
18.00 and $18 are equal, 3/4 is 0.75); any other is compared as a text, small letters, white space and a final stop
aside.
"""

import math
from collections.abc import Mapping
from typing import Any

from evaluation.parsing import exact_number, final_number, same
from evaluation.tasks import Field, Item, Score, by_prompt, mean, mean_credit, share, text, written

NAME = "exact"
TITLE = "Exact match"
PRIMARY = "exact_match"
METRICS = {
    "exact_match": share("Share of items answered exactly right (primary)"),
    "exact_unparseable": share("Share of items whose answer is empty, or holds no number where one is right", "lower"),
}
FIELDS = {
    "question": Field("question", True, "what is asked"),
    "answer": Field("answer", True, "the right answer, a number or a few words"),
}
MARKER = "####"


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    answer = written(row, "answer")
    return Item(item_id, NAME, text(row, "question"), answer, {"answer": answer})


group = by_prompt


def score(item: Item, answer: str) -> Score:
    truth = exact_number(item.truth["answer"])
    if truth is None:
        right = same(answer, item.truth["answer"])
        return Score(right, answer.strip() or None, right)
    predicted, marked = final_number(answer, MARKER)
    extra = {"marker": float(marked)}
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False, extra=extra)
    right = predicted == truth
    error = abs(float(predicted) - float(truth))
    return Score(right, float(predicted), right, abs_error=error if math.isfinite(error) else None, extra=extra)


def summarize(scores: list[Score]) -> dict[str, float]:
    return {
        "exact_match": mean_credit(scores),
        "exact_unparseable": mean(s.predicted is None for s in scores),
    }
