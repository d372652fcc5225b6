"""BoolQ: rows to items, yes and no read from answers, and the metrics of tasks with two labels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from evaluation.tasks import Item, RowError, boolq, load_recipe, mean_credit
from evaluation.tasks._labels import read_yes_no
from evaluation.tasks._rows import digest

ROW = {"question": "is the sky blue", "passage": "The sky is blue.  By day.\n", "answer": True}


def item(answer=True):
    return boolq.make_item("x", {**ROW, "answer": answer})


def test_the_item_of_a_row_as_on_the_hub():
    assert boolq.make_item("boolq-train-3", ROW) == Item(
        "boolq-train-3",
        "boolq",
        "The sky is blue.  By day.\n\nQuestion: Is the sky blue?\nAnswer Yes or No.",
        "Yes",
        {"label": "Yes", "passage": digest("The sky is blue. By day.")},
    )
    assert load_recipe("boolq").SOURCE.test == "validation"


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("is it", "Is it?"),
        ("Is it?", "Is it?"),
        ("is it ? ", "Is it?"),
        ("is it.", "Is it?"),
        ("is IBM big", "Is IBM big?"),
        ("étoile is star", "Étoile is star?"),
        ("1 is one", "1 is one?"),
    ],
)
def test_questions_get_a_capital_and_a_mark(question, asked):
    assert f"\nQuestion: {asked}\n" in boolq.make_item("x", {**ROW, "question": question}).prompt


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "Yes"),
        ("No", "No"),
        ("yes", "Yes"),
        ("NO", "No"),
        (" yes\n", "Yes"),
        ("no.", "No"),
        ("Yes!", "Yes"),
        ("no?", "No"),
        ("No...", "No"),
        ("**Yes**", "Yes"),
        ("_No_", "No"),
        ("`no`", "No"),
        ('"Yes"', "Yes"),
        ("“No”", "No"),
        ("(no)", "No"),
        ("[Yes]", "Yes"),
        ("<b>No</b>", "No"),
        ("# Yes", "Yes"),
        ("- No", "No"),
        ("-Yes", "Yes"),
        ("Yes, because the passage says so.", "Yes"),
        ("No, because it is not blue.", "No"),
        ("No - it is red", "No"),
        ("No— it is red", "No"),
        ("No; it is red", "No"),
        ("No because it is red", "No"),
        ("No it isn't", "No"),
        ("No they're red", "No"),
        ("Yes it is", "Yes"),
        ("The answer is no", "No"),
        ("The answer is no because it is red", "No"),
        ("The answer is: Yes.", "Yes"),
        ("Answer: No", "No"),
        ("A: yes", "Yes"),
        ("Well, I would say yes", "Yes"),
        ("So, no.", "No"),
        ("No one can, so yes.", "Yes"),
        ("Yes, no doubt.", "Yes"),
        ("Yes, there is no other way.", "Yes"),
        ("No, no, no!", "No"),
        ("yeah", "Yes"),
        ("Yep.", "Yes"),
        ("Nope", "No"),
        ("nah, it is red", "No"),
        ("Y", "Yes"),
        ("n.", "No"),
        ("True", "Yes"),
        ("false", "No"),
        ("That is correct.", "Yes"),
        ("That is incorrect.", "No"),
        ("It is not true.", "No"),
        ("It isn't true", "No"),
        ("It isn’t necessarily true", "No"),
        ("That is no longer true", "No"),
        ("no longer, yes", "Yes"),
        ("This cannot be correct", "No"),
        ("not false", "Yes"),
        ("not yes", "No"),
        ("It is not **yes**", "No"),
        ("Yes, the statement is not false.", "Yes"),
        ("No, it is a true story.", "No"),
        ("\n\nYes\n\nQuestion: Is it?\nNo", "Yes"),
        ("Thinking about it.\nNo.", "No"),
        ("Yes or no? Yes.", "Yes"),
        ("Answer Yes or No. No", "No"),
        ("True or false: true", "Yes"),
        ("No (it is true only in Canada)", "No"),
        ("No (yes would need a permit)", None),  # both words are said
        ("No (see line 2)", "No"),
        ("No [correct only in Canada]", "No"),
        ("No {true}", "No"),
        ("No…", "No"),
        ("No… it is true of Canada", "No"),
        ("No = false", "No"),
        ("Yes (no permit is needed)", "Yes"),
        ("It is not at all true.", "No"),
        ("It is hardly true", "No"),
        ("It is scarcely correct", "No"),
        ("It is not blue, so it is false.", "No"),
        ("It does not matter; it is true.", "Yes"),
        ("It is not red but it is true", "Yes"),
        ("No doubt it is true", "Yes"),
        ("No longer true", "No"),
        # Neither or both.
        ("No | yes", None),
        ("No per the passage; that is true of France", None),
        ("No source says that it is true", None),
        ("No one thinks that is correct", None),
        ("I do not know if it is true", None),
        ("It is not the case that this is true", None),
        ("Nothing says it isn't known to be false", None),
        ("", None),
        (" \n\t ", None),
        ("...", None),
        ("yes and no", None),
        ("No and yes", None),
        ("No & yes.", None),
        ("no yes", None),
        ("Yes. No.", None),
        ("No, wait, yes", None),
        ("yes or no", None),
        ("Yes/No", None),
        ("True or False", None),
        ("true and false", None),
        ("It is true, or is it false", None),
        ("I don't know", None),
        ("I do not know.", None),
        ("Not sure", None),
        ("maybe", None),
        ("Yesterday", None),
        ("yes-man", None),
        ("Bayes", None),
        ("No one", None),
        ("no-one knows", None),
        ("Nobody", None),
        ("None", None),
        ("Norway", None),
        ("No idea", None),
        ("No. 5 is alive", None),
        ("There is no evidence of it", None),
        ("Not", None),
        ("now", None),
        ("untrue", None),
        ("N/A", None),
        ("NaN", None),
        ("y n", None),
        ("The sky is blue", None),
        ("1", None),
        ("0", None),
        ("да", None),
        ("{prompt}", None),
        ("Answer Yes or No.", None),
    ],
)
def test_read(answer, said):
    for truth in (True, False):
        score = boolq.score(item(truth), answer)
        right = said == ("Yes" if truth else "No")
        assert score.predicted == said
        assert (score.correct, score.exact, score.credit) == (right, right, float(right))


@pytest.mark.parametrize("value", [True, "true", " True ", "TRUE", 1, "1", "yes", "Yes", np.bool_(True), np.int64(1)])
def test_answers_that_mean_yes(value):
    assert item(value).completion == item(value).truth["label"] == "Yes"


@pytest.mark.parametrize("value", [False, "false", "False\n", 0, "0", "no", "NO", np.bool_(False), np.int64(0)])
def test_answers_that_mean_no(value):
    assert item(value).completion == item(value).truth["label"] == "No"


@pytest.mark.parametrize("value", [None, "", "maybe", "y", 2, -1, 1.5, float("nan"), [True], {}, "true false"])
def test_other_answers_are_refused(value):
    with pytest.raises(RowError, match=r"^answer: expected one of true, false, yes, no, 1, 0, got"):
        item(value)


@pytest.mark.parametrize("name", ["question", "passage"])
@pytest.mark.parametrize("value", [None, "", " \t", "\ufeff", 5, True, float("nan"), ["is it"], b"is it", "\udc00"])
def test_rows_without_text_are_refused(name, value):
    with pytest.raises(RowError, match=rf"^{name}: expected text"):
        boolq.make_item("x", {**ROW, name: value})
    with pytest.raises(RowError, match=rf"^{name}: expected text"):
        boolq.make_item("x", {k: v for k, v in ROW.items() if k != name})


def test_errors_show_long_values_cut():
    with pytest.raises(RowError) as caught:
        item("maybe " * 1000)
    assert len(str(caught.value)) < 200


def test_groups_go_by_the_passage():
    other_question = boolq.make_item("a", {**ROW, "question": "is it red", "passage": "the sky  is blue. By day."})
    assert boolq.group(other_question) == boolq.group(item())
    assert boolq.group(boolq.make_item("b", {**ROW, "passage": "The sea."})) != boolq.group(item())


def scored(pairs):
    return [boolq.score(item(truth), answer) for truth, answer in pairs]


def test_summary_by_hand():
    scores = scored([(True, "Yes"), (True, "Yes"), (True, "no"), (False, "No"), (False, "perhaps")])
    summary = boolq.summarize(scores)
    # Yes: 2 of 2 said, 2 of 3 found: F1 = 4/5. No: 1 of 2 said, 1 of 2 found: F1 = 1/2.
    assert summary == pytest.approx({"boolq_accuracy": 0.6, "boolq_f1": (4 / 5 + 1 / 2) / 2, "boolq_unparseable": 0.2})
    assert list(summary) == list(boolq.METRICS) and next(iter(summary)) == boolq.PRIMARY
    assert summary[boolq.PRIMARY] == mean_credit(scores)


def test_always_yes_has_a_low_f1():
    summary = boolq.summarize(scored([(True, "Yes")] * 3 + [(False, "Yes")]))
    # Yes: precision 3/4, recall 1: F1 = 6/7. No: never said: 0.
    assert summary["boolq_accuracy"] == 0.75 and summary["boolq_f1"] == pytest.approx(3 / 7)


def test_one_label_alone():
    assert boolq.summarize(scored([(True, "Yes")] * 2))["boolq_f1"] == 1
    assert boolq.summarize(scored([(True, "")] * 2)) == {"boolq_accuracy": 0, "boolq_f1": 0, "boolq_unparseable": 1}


def test_summary_of_nothing():
    empty = boolq.summarize([])
    assert list(empty) == list(boolq.METRICS) and all(math.isnan(v) for v in empty.values())


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["Yes", "No", "?"])), min_size=1, max_size=30))
@settings(deadline=None)
def test_f1_is_scikit_learns(pairs):
    truth = ["Yes" if t else "No" for t, _ in pairs]
    said = [a for _, a in pairs]
    classes = sorted(set(truth))
    expected = np.mean([f1_score([t == c for t in truth], [s == c for s in said], zero_division=0) for c in classes])
    summary = boolq.summarize(scored(pairs))
    assert summary["boolq_f1"] == pytest.approx(expected)
    assert summary["boolq_accuracy"] == pytest.approx(np.mean([t == s for t, s in zip(truth, said, strict=True)]))


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            ["yes", "No", "not", "true", "false", "n't ", "entailment", "one", ",", ".", "\n", " or ", "-"]
        ),
        st.text(max_size=4),
    ),
    max_size=15,
).map(" ".join)


@given(WORDS, st.booleans())
@settings(deadline=None)
def test_any_text_gets_a_score(answer, truth):
    score = boolq.score(item(truth), answer)
    assert score.predicted in ("Yes", "No", None)
    assert score.correct == (score.predicted == ("Yes" if truth else "No")) == (score.credit == 1)


@given(st.text(), st.text(), st.booleans())
@settings(deadline=None)
def test_the_items_own_completion_is_right(question, passage, answer):
    try:
        made = boolq.make_item("x", {"question": question, "passage": passage, "answer": answer})
    except RowError as error:
        refused = {"question": question, "passage": passage}[error.name]
        assert not any(c.isprintable() and not c.isspace() for c in refused)
        return
    assert made.prompt.startswith(passage.strip()) and made.prompt.endswith("?\nAnswer Yes or No.")
    assert boolq.score(made, made.completion).credit == 1


@pytest.mark.timeout(60)  # linear, it takes a second; quadratic, minutes
def test_long_answers_are_read_in_time():
    for piece in ("no one ", "not ", "not ly ", "n't-", "yes ", "y", "no ", "yes or ", "not very", "_", "a\n", "true "):
        assert read_yes_no(piece * 40_000) in (True, False, None)
