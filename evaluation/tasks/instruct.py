"""Anybody's instructions with free answers: asked and scored as alpaca and dolly are.

Fields: instruction, input (optional, what it is to be done with), output. Answers are compared by ROUGE-L.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from evaluation.parsing import score_text, summarize_texts, text_metrics
from evaluation.tasks import Field, Item, by_prompt, optional_text, text

NAME = "instruct"
TITLE = "ROUGE-L"
PRIMARY = "instruct_rouge_l"
METRICS = text_metrics(NAME)
FIELDS = {
    "instruction": Field("instruction", True, "what is to be done"),
    "input": Field("input", False, "what it is to be done with, may be empty"),
    "output": Field("output", True, "the answer"),
}


def prompt_of(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given else instruction


def make_item(item_id: str, row: Mapping[str, Any], name: str = NAME) -> Item:
    instruction, given, output = text(row, "instruction"), optional_text(row, "input"), text(row, "output")
    return Item(item_id, name, prompt_of(instruction, given), output, {"answer": output})


group = by_prompt  # one instruction with other inputs is another question
score = score_text
summarize = partial(summarize_texts, name=NAME)
