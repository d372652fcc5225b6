"""QNLI: whether a Wikipedia sentence contains the answer to a question; part of GLUE, derived from SQuAD.

Wang et al. 2019, "GLUE: A Multi-Task Benchmark", https://huggingface.co/datasets/nyu-mll/glue, CC BY-SA 4.0 (SQuAD's).
Fields: question, sentence, label (0 entailment, 1 not_entailment). Test items come from its validation split: the hub's
test split has the label -1 everywhere.

The model is asked in plain words and learns to say Yes or No, because "entailment" means little to a model that was not
trained on such data, and "not_entailment" contains it. In answers, the names of the labels are understood too.
"""

from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

from evaluation.parsing import read_yes_no
from evaluation.tasks import Field, Item, RowError, Score, Source, choice, classify, digest, text

NAME = "qnli"
TITLE = "QNLI accuracy"
PRIMARY = "qnli_accuracy"
METRICS = classify.label_metrics(NAME)
SOURCE = Source("nyu-mll/glue", subset="qnli", test="validation")
FIELDS = {
    "question": Field("question", True, "a question"),
    "sentence": Field("sentence", True, "the sentence that may contain its answer"),
    "label": Field("label", True, "0 or entailment, 1 or not_entailment"),
}
LABELS = ("not_entailment", "entailment")
_ANSWERS = {"entailment": "entailment", "not_entailment": "not_entailment", "0": "entailment", "1": "not_entailment"}


def make_item(item_id: str, row: Mapping[str, Any]) -> Item:
    question, sentence = text(row, "question").strip(), text(row, "sentence").strip()
    if str(row.get("label")).strip() == "-1":
        raise RowError("label", "expected 0 or 1, got -1, which marks a split whose labels are not published")
    label = choice(row, "label", _ANSWERS)
    prompt = f"Question: {question}\nSentence: {sentence}\nDoes the sentence answer the question? Answer Yes or No."
    completion = "Yes" if label == "entailment" else "No"
    return Item(item_id, NAME, prompt, completion, {"label": label, "question": digest(question)})


def group(item: Item) -> Hashable:
    return item.truth["question"]


def score(item: Item, answer: str) -> Score:
    verdict = read_yes_no(answer, positive="true|correct|entailment|entailed|entails?")
    return classify.score_label(item, None if verdict is None else LABELS[verdict])


summarize = partial(classify.summarize_labels, name=NAME)
