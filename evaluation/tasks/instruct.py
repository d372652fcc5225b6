"""Your own instructions with free answers; and how all tasks with free answers (alpaca, dolly, chat) are scored.

Fields: instruction, input (optional, what the instruction is about), output. Answers are compared by ROUGE-L.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from evaluation.parsing import rouge, same_text
from evaluation.tasks import Field, Item, Score, by_prompt, mean, mean_credit, metric, optional_text, share, text

_CORRECT = 0.5
"""F1 of ROUGE-L from which an answer counts as correct."""


def text_metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of the task of that name; the first is the primary one."""
    return {
        f"{name}_rouge_l": metric(
            "F1", "higher", "Mean F1 of the longest common subsequence of words with the reference (primary)"
        ),
        f"{name}_rouge_1": metric("F1", "higher", "Mean F1 of the words shared with the reference, in any order"),
        f"{name}_exact": share("Share of answers equal to the reference up to case, white space and a final period"),
        f"{name}_empty": share("Share of items answered with nothing but white space", "lower"),
    }


def score_text(item: Item, answer: str) -> Score:
    """Credit is the F1 of ROUGE-L with the reference in truth["answer"]."""
    reference = str(item.truth["answer"])
    rouge_l, rouge_1 = rouge(answer, reference)
    predicted = answer.strip() or None
    exact = predicted is not None and same_text(predicted, reference)
    return Score(rouge_l >= _CORRECT, predicted, exact, partial=rouge_l, extra={"rouge_1": rouge_1})


def summarize_texts(scores: list[Score], name: str) -> dict[str, float]:
    return {
        f"{name}_rouge_l": mean_credit(scores),
        f"{name}_rouge_1": mean(s.extra["rouge_1"] for s in scores),
        f"{name}_exact": mean(s.exact for s in scores),
        f"{name}_empty": mean(s.predicted is None for s in scores),
    }


NAME = "instruct"
TITLE = "ROUGE-L"
PRIMARY = "instruct_rouge_l"
METRICS = text_metrics(NAME)
FIELDS = {
    "instruction": Field("instruction", True, "the instruction"),
    "input": Field("input", False, "what the instruction is about, may be empty"),
    "output": Field("output", True, "the answer"),
}


def join_input(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given else instruction


def make_item(item_id: str, row: Mapping[str, Any], name: str = NAME) -> Item:
    instruction, given, output = text(row, "instruction"), optional_text(row, "input"), text(row, "output")
    return Item(item_id, name, join_input(instruction, given), output, {"answer": output})


group = by_prompt  # the same instruction with another input is another question
score = score_text
summarize = partial(summarize_texts, name=NAME)
