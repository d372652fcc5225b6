"""Dolly: 15,000 instructions with answers, written by people.

Conover et al. 2023, https://huggingface.co/datasets/databricks/databricks-dolly-15k, CC BY-SA 3.0. Fields:
instruction, context (a passage, often empty), response, category (such as closed_qa). It has no test split; test
items are drawn from its only split.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.tasks import Field, Item, Source, digest, instruct, optional_text, text

NAME = "dolly"
TITLE = "Dolly ROUGE-L"
PRIMARY = "dolly_rouge_l"
METRICS = instruct.text_metrics(NAME)
SOURCE = Source("databricks/databricks-dolly-15k")
FIELDS = {
    "instruction": Field("instruction", True, "the instruction"),
    "context": Field("context", False, "a passage that it is about, may be empty"),
    "response": Field("response", True, "the answer"),
    "category": Field("category", False, "the kind of task, stored with the truth"),
}


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    instruction, context, response = text(row, "instruction"), optional_text(row, "context"), text(row, "response")
    truth = {"answer": response, "category": optional_text(row, "category"), "group": digest(context or instruction)}
    return Item(item_id, NAME, instruct.join_input(instruction, context), response, truth)


def group(item: Item) -> Hashable:
    """The context, since one may have several questions; without one, the instruction."""
    return item.truth["group"]


score = instruct.score_text
summarize = partial(instruct.summarize_texts, name=NAME)
