"""Anybody's instructions with free answers: the generic task that alpaca and dolly are instances of.

Fields: instruction, input (optional, what it is to be done with), output. Answers are compared by ROUGE-L.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.parsing import score_text, summarize_texts, text_metrics
from evaluation.tasks import Field, Item, digest, optional_text, text

NAME = "instruct"
TITLE = "ROUGE-L"
PRIMARY = "instruct_rouge_l"
METRICS = text_metrics(NAME)
FIELDS = {
    "instruction": Field("instruction", True, "what is to be done"),
    "input": Field("input", False, "what it is to be done with, may be empty"),
    "output": Field("output", True, "the answer"),
}


def item_of(name: str, item_id: str, instruction: str, given: str, output: str, **truth: Any) -> Item:
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return Item(item_id, name, prompt, output, {"answer": output, **truth})


def make_item(item_id: str, row: Mapping[str, Any], name: str = NAME) -> Item:
    return item_of(name, item_id, text(row, "instruction"), optional_text(row, "input"), text(row, "output"))


def group(item: Item) -> Hashable:
    """The prompt: one instruction with other inputs is another question."""
    return digest(item.prompt)


score = score_text
summarize = partial(summarize_texts, name=NAME)
