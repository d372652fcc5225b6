"""BoolQ: questions typed into a search engine, answered yes or no from a Wikipedia passage.

Clark et al. 2019, "BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions",
https://huggingface.co/datasets/google/boolq, CC BY-SA 3.0. Fields: question (lower case, no question mark), passage,
answer (bool). Test items come from its validation split; the authors do not publish the answers of their test split.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.parsing import read_yes_no
from evaluation.tasks import Field, Item, Score, Source, choice, classify, digest, text

NAME = "boolq"
TITLE = "BoolQ accuracy"
PRIMARY = "boolq_accuracy"
METRICS = classify.label_metrics(NAME)
SOURCE = Source("google/boolq", test="validation")
FIELDS = {
    "question": Field("question", True, "a yes-or-no question"),
    "passage": Field("passage", True, "the text that contains the answer"),
    "answer": Field("answer", True, "true or false (also yes or no, 1 or 0)"),
}
LABELS = ("No", "Yes")
_ANSWERS = {"true": "Yes", "false": "No", "yes": "Yes", "no": "No", "1": "Yes", "0": "No"}


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    passage, question = text(row, "passage").strip(), text(row, "question").strip()
    label = choice(row, "answer", _ANSWERS)
    sentence = f"{question[0].upper()}{question[1:].rstrip('?. ')}?"
    prompt = f"{passage}\n\nQuestion: {sentence}\nAnswer Yes or No."
    return Item(item_id, NAME, prompt, label, {"label": label, "passage": digest(passage)})


def group(item: Item) -> Hashable:
    return item.truth["passage"]


def score(item: Item, answer: str) -> Score:
    verdict = read_yes_no(answer)
    return classify.score_label(item, None if verdict is None else LABELS[verdict])


summarize = partial(classify.summarize_labels, name=NAME)
