"""BoolQ: questions that people asked a search engine, answered yes or no from a passage of Wikipedia.

Clark et al. 2019, "BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions",
https://huggingface.co/datasets/google/boolq, CC BY-SA 3.0. Fields: question (small letters, no question mark),
passage, answer (bool). The test items are its validation split; the authors keep the answers of their own test split.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.parsing import label_metrics, read_yes_no, score_label, summarize_labels
from evaluation.tasks import Field, Item, Score, Source, choice, digest, text

NAME = "boolq"
TITLE = "BoolQ accuracy"
PRIMARY = "boolq_accuracy"
METRICS = label_metrics(NAME)
SOURCE = Source("google/boolq", test="validation")
FIELDS = {
    "question": Field("question", True, "a question that yes or no answers"),
    "passage": Field("passage", True, "the text that holds the answer"),
    "answer": Field("answer", True, "true or false (also yes or no, 1 or 0)"),
}
LABELS = ("No", "Yes")
_ANSWERS = {"true": "Yes", "false": "No", "yes": "Yes", "no": "No", "1": "Yes", "0": "No"}


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    passage, question = text(row, "passage"), text(row, "question")
    label = choice(row, "answer", _ANSWERS)
    asked = f"{question[0].upper()}{question[1:].rstrip('?. ')}?"
    prompt = f"{passage}\n\nQuestion: {asked}\nAnswer Yes or No."
    return Item(item_id, NAME, prompt, label, {"label": label, "passage": digest(passage)})


def group(item: Item) -> Hashable:
    return item.truth["passage"]


def score(item: Item, answer: str) -> Score:
    said = read_yes_no(answer)
    return score_label(item, None if said is None else LABELS[said])


summarize = partial(summarize_labels, name=NAME)
