"""GSM8K: word problems of primary school with worked solutions that end in a number.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://huggingface.co/datasets/openai/gsm8k, MIT
licence. Fields: question; answer, a solution with the calculator's notes `<<48/2=24>>` and the result after `####`.
The notes are cut out of what is trained on. Answers are compared exactly: 18, 18.00 and $18 are equal, 3/4 is 0.75.
"""

import math
import re
from collections.abc import Hashable, Mapping
from fractions import Fraction
from typing import Any

from evaluation.parsing import exact_number, final_number
from evaluation.tasks import Field, Item, RowError, Score, Source, digest, mean, mean_credit, share, shown, text

NAME = "gsm8k"
TITLE = "GSM8K exact match"
PRIMARY = "gsm8k_exact_match"
METRICS = {
    "gsm8k_exact_match": share("Share of items whose final number equals the right one exactly (primary)"),
    "gsm8k_unparseable": share("Share of items whose answer holds no number", "lower"),
    "gsm8k_has_marker": share("Share of items whose number stood after the marker ####, as in the solutions"),
}
SOURCE = Source("openai/gsm8k", subset="main", test="test")
FIELDS = {
    "question": Field("question", True, "the word problem"),
    "answer": Field("answer", True, "the worked solution, with the final number after ####"),
}
MARKER = "####"
_NOTE = re.compile(r"<<[^<>\n]*>>")


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    question = text(row, "question")
    solution = _NOTE.sub("", text(row, "answer")).strip()
    _, marker, last = solution.rpartition(MARKER)
    result = exact_number(last) if marker else None
    if result is None:
        got = f"{MARKER} and {shown(last.strip())}" if marker else f"{shown(solution)} without {MARKER}"
        raise RowError("answer", f"expected a solution that ends in {MARKER} and a number, got {got}")
    return Item(item_id, NAME, question, solution, {"answer": str(result)})


def group(item: Item) -> Hashable:
    return digest(item.prompt)


def score(item: Item, answer: str) -> Score:
    truth = Fraction(item.truth["answer"])
    predicted, marked = final_number(answer, MARKER)
    extra = {"marker": float(marked)}
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False, extra=extra)
    right = predicted == truth
    error = abs(float(predicted) - float(truth))
    return Score(right, float(predicted), right, abs_error=error if math.isfinite(error) else None, extra=extra)


def summarize(scores: list[Score]) -> dict[str, float]:
    return {
        "gsm8k_exact_match": mean_credit(scores),
        "gsm8k_unparseable": mean(s.predicted is None for s in scores),
        "gsm8k_has_marker": mean(s.extra["marker"] for s in scores),
    }
