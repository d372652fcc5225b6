"""Your own questions with short answers that are right or wrong; scored like gsm8k.

Fields: question, answer. If the right answer is a number, the number that an answer arrives at must equal it (18, 18.00
and $18 are equal, 3/4 is 0.75); anything else is compared as text, up to case, white space and a final period.
"""

import math
from collections.abc import Mapping
from typing import Any

from evaluation.parsing import exact_number, final_number, same_text
from evaluation.tasks import Field, Item, Score, by_prompt, mean, mean_credit, share, text, text_or_number

NAME = "exact"
TITLE = "Exact match"
PRIMARY = "exact_match"
METRICS = {
    "exact_match": share("Share of items answered exactly right (primary)"),
    "exact_unparseable": share(
        "Share of items whose answer is empty, or has no number although the right one is a number", "lower"
    ),
}
FIELDS = {
    "question": Field("question", True, "the question"),
    "answer": Field("answer", True, "the right answer, a number or a few words"),
}
MARKER = "####"


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    answer = text_or_number(row, "answer")
    return Item(item_id, NAME, text(row, "question"), answer, {"answer": answer})


group = by_prompt


def score(item: Item, answer: str) -> Score:
    truth = exact_number(item.truth["answer"])
    if truth is None:
        right = same_text(answer, item.truth["answer"])
        return Score(right, answer.strip() or None, right)
    predicted, after_marker = final_number(answer, MARKER)
    extra = {"marker": float(after_marker)}
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
