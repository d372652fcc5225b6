"""GSM8K: grade school word problems with worked solutions that end in a number.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://huggingface.co/datasets/openai/gsm8k, MIT
license. Fields: question; answer, a solution with calculator annotations `<<48/2=24>>` and the result after `####`.
The annotations are removed before training. Answers are compared exactly: 18, 18.00 and $18 are equal, 3/4 is 0.75.
"""

import re
from collections.abc import Mapping
from typing import Any

from evaluation.parsing import exact_number
from evaluation.tasks import (
    Field,
    Item,
    RowError,
    Score,
    Source,
    brief,
    by_prompt,
    exact,
    mean,
    mean_credit,
    share,
    text,
)
from evaluation.tasks.exact import MARKER

NAME = "gsm8k"
TITLE = "GSM8K exact match"
PRIMARY = "gsm8k_exact_match"
METRICS = {
    "gsm8k_exact_match": share("Share of items whose final number equals the right one exactly (primary)"),
    "gsm8k_unparseable": share("Share of items whose answer has no number", "lower"),
    "gsm8k_has_marker": share("Share of items whose number comes after the marker ####, as in the solutions"),
}
SOURCE = Source("openai/gsm8k", subset="main", test="test")
FIELDS = {
    "question": Field("question", True, "the word problem"),
    "answer": Field("answer", True, "the worked solution, with the final number after ####"),
}
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    question = text(row, "question")
    solution = _ANNOTATION.sub("", text(row, "answer")).strip()
    _, marker, last = solution.rpartition(MARKER)
    result = exact_number(last) if marker else None
    if result is None:
        got = f"{MARKER} and {brief(last.strip())}" if marker else f"{brief(solution)} without {MARKER}"
        raise RowError("answer", f"expected a solution that ends in {MARKER} and a number, got {got}")
    return Item(item_id, NAME, question, solution, {"answer": str(result)})


group, score = by_prompt, exact.score


def summarize(scores: list[Score]) -> dict[str, float]:
    return {
        "gsm8k_exact_match": mean_credit(scores),
        "gsm8k_unparseable": mean(s.predicted is None for s in scores),
        "gsm8k_has_marker": mean(s.extra["marker"] for s in scores),
    }
