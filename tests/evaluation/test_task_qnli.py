"""QNLI: rows to items and labels read from answers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.tasks import Item, RowError, load_recipe, mean_credit, qnli
from evaluation.tasks._rows import digest

ROW = {"question": "When did it start?", "sentence": "It started in 1912.", "label": 0, "idx": 4}


def item(label=0):
    return qnli.make_item("x", {**ROW, "label": label})


def test_the_item_of_a_row_as_on_the_hub():
    assert qnli.make_item("qnli-train-1", ROW) == Item(
        "qnli-train-1",
        "qnli",
        "Question: When did it start?\nSentence: It started in 1912.\n"
        "Does the sentence answer the question? Answer Yes or No.",
        "Yes",
        {"label": "entailment", "question": digest("When did it start?")},
    )
    assert item(1).completion == "No" and item(1).truth["label"] == "not_entailment"
    assert (load_recipe("qnli").SOURCE.subset, qnli.SOURCE.test) == ("qnli", "validation")


YES, NO = "entailment", "not_entailment"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", YES),
        ("No", NO),
        ("yes.", YES),
        (" NO \n", NO),
        ("**No**", NO),
        ("y", YES),
        ("N", NO),
        ("Yeah, it does", YES),
        ("nope", NO),
        ("entailment", YES),
        ("Entailment.", YES),
        ("ENTAILMENT", YES),
        ("`entailment`", YES),
        ("not_entailment", NO),
        ("not entailment", NO),
        ("Not Entailment", NO),
        ("not-entailment", NO),
        ("Not_Entailment.", NO),
        ("**not_entailment**", NO),
        ("`not_entailment`", NO),
        ("not  entailment", NO),
        ("not an entailment", NO),
        ("not really an entailment", NO),
        ("It is not the entailment", NO),
        ("no entailment", NO),
        ("There is no entailment here", NO),
        ("non-entailment", NO),
        ("label: entailment", YES),
        ("label: not_entailment", NO),
        ("The label is entailment because it says so", YES),
        ("This is not entailment", NO),
        ("This isn't entailment", NO),
        ("This isn’t entailment", NO),
        ("The question is entailed", YES),
        ("It is not entailed", NO),
        ("It is not clearly entailed", NO),
        ("It entails the answer", YES),
        ("It does not entail the answer", NO),
        ("It doesn't entail it", NO),
        ("It cannot entail it", NO),
        ("It never entails it", NO),
        ("True", YES),
        ("False", NO),
        ("not true", NO),
        ("Yes, entailment", YES),
        ("No, not_entailment", NO),
        ("No, this is not entailment.", NO),
        ("Does the sentence answer the question? Yes", YES),
        ("Does the sentence answer the question? Answer Yes or No. No", NO),
        ("The sentence answers it. Yes.", YES),
        ("entailment\nnot_entailment", YES),
        ("Sentence: It started.\nNo", NO),
        ("There is no date in it, so no.", NO),
        ("There is no doubt: yes", YES),
        ("", None),
        ("   ", None),
        ("entailment or not_entailment", None),
        ("entailment/not_entailment", None),
        ("not_entailment, entailment", None),
        ("yes and no", None),
        ("Yes or No", None),
        ("maybe", None),
        ("unknown", None),
        ("neutral", None),
        ("contradiction", None),
        ("entailments", None),
        ("entail-ment", None),
        ("nonentailment", None),
        ("not", None),
        ("not sure", None),
        ("I know", None),
        ("It started in 1912.", None),
        ("No one started it", None),
        ("0", None),
        ("1", None),
        ("-1", None),
        ("蕴含", None),
    ],
)
def test_read(answer, said):
    for label, name in enumerate((YES, NO)):
        score = qnli.score(item(label), answer)
        assert score.predicted == said
        assert (score.correct, score.credit) == (said == name, float(said == name))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0, YES),
        (1, NO),
        ("0", YES),
        (" 1 ", NO),
        ("entailment", YES),
        ("Not_Entailment", NO),
        (np.int64(0), YES),
        (np.int32(1), NO),
    ],
)
def test_labels(value, name):
    assert item(value).truth["label"] == name


@pytest.mark.parametrize("value", [-1, "-1", np.int64(-1)])
def test_secret_labels_are_refused(value):
    with pytest.raises(RowError, match=r"^label: expected 0 or 1, got -1, which marks a split whose labels"):
        item(value)


@pytest.mark.parametrize("value", [None, "", 2, 0.5, float("nan"), "yes", "neutral", True, [0], {}])
def test_unknown_labels_are_refused(value):
    with pytest.raises(RowError, match=r"^label: expected one of entailment, not_entailment, 0, 1, got"):
        item(value)
    with pytest.raises(RowError, match=r"^label: .* got nothing"):
        qnli.make_item("x", {"question": "a", "sentence": "b"})


@pytest.mark.parametrize("name", ["question", "sentence"])
@pytest.mark.parametrize("value", [None, "", "\r\n", "\u200b ", 3, float("nan"), False, ("a",)])
def test_rows_without_text_are_refused(name, value):
    with pytest.raises(RowError, match=rf"^{name}: expected text"):
        qnli.make_item("x", {**ROW, name: value})


def test_groups_go_by_the_question():
    same = qnli.make_item("a", {"question": "when did it  start? ", "sentence": "Later.", "label": 1})
    other = qnli.make_item("b", {**ROW, "question": "Why did it start?"})
    assert qnli.group(same) == qnli.group(item()) != qnli.group(other)


def test_summary_by_hand():
    pairs = [(0, "Yes"), (0, "No"), (1, "No"), (1, "not_entailment"), (1, "")]
    scores = [qnli.score(item(label), answer) for label, answer in pairs]
    summary = qnli.summarize(scores)
    # entailment: 1 of 1 said, 1 of 2 found: F1 = 2/3. not_entailment: 2 of 3 said, 2 of 3 found: F1 = 2/3.
    assert summary == pytest.approx({"qnli_accuracy": 0.6, "qnli_f1": 2 / 3, "qnli_unparseable": 0.2})
    assert list(summary) == list(qnli.METRICS) and next(iter(summary)) == qnli.PRIMARY
    assert summary[qnli.PRIMARY] == mean_credit(scores)
    empty = qnli.summarize([])
    assert list(empty) == list(qnli.METRICS) and all(math.isnan(v) for v in empty.values())


WORDS = st.lists(
    st.one_of(
        st.sampled_from(["entailment", "not", "_", "entails", "no", "Yes", "-", "non", "an", "\n", "really", "n't"]),
        st.text(max_size=4),
    ),
    max_size=15,
)


@given(WORDS, st.sampled_from(["", " "]), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_any_text_gets_a_score(words, between, label):
    score = qnli.score(item(label), between.join(words))
    assert score.predicted in (YES, NO, None)
    assert score.correct == (score.predicted == (YES, NO)[label])


@given(st.text(), st.text(), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_the_items_own_completion_is_right(question, sentence, label):
    try:
        made = qnli.make_item("x", {"question": question, "sentence": sentence, "label": label})
    except RowError as error:
        refused = {"question": question, "sentence": sentence}[error.name]
        assert not any(c.isprintable() and not c.isspace() for c in refused)
        return
    assert question.strip() in made.prompt and sentence.strip() in made.prompt
    assert qnli.score(made, made.completion).credit == 1
