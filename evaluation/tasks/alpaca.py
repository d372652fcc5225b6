"""Alpaca: 52,000 instructions with answers, written by a language model.

Taori et al. 2023, https://huggingface.co/datasets/tatsu-lab/alpaca, CC BY-NC 4.0. Fields: instruction, input (often
empty), output. It has no test split; test items are drawn from the one there is.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.parsing import score_text, summarize_texts, text_metrics
from evaluation.tasks import Field, Item, Source, digest, optional_text, text

NAME = "alpaca"
TITLE = "Alpaca ROUGE-L"
PRIMARY = "alpaca_rouge_l"
METRICS = text_metrics(NAME)
SOURCE = Source("tatsu-lab/alpaca")
FIELDS = {
    "instruction": Field("instruction", True, "what is to be done"),
    "input": Field("input", False, "what it is to be done with, may be empty"),
    "output": Field("output", True, "the answer"),
}


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    instruction, given, output = text(row, "instruction"), optional_text(row, "input"), text(row, "output")
    prompt = f"{instruction}\n\n{given}" if given else instruction
    return Item(item_id, NAME, prompt, output, {"answer": output})


def group(item: Item) -> Hashable:
    """The prompt: one instruction with other inputs is another question."""
    return digest(item.prompt)


score = score_text
summarize = partial(summarize_texts, name=NAME)
