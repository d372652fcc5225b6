"""GSM8K: rows to items, and the number that an answer arrives at."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.tasks import Item, RowError, gsm8k, load_recipe, mean_credit

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"


def item(result="18"):
    return gsm8k.make_item("x", {"question": "How many?", "answer": f"So it is {result}.\n#### {result}"})


def test_the_item_of_a_row_as_on_the_hub():
    made = gsm8k.make_item("gsm8k-test-7", {"question": " How many clips?\n", "answer": SOLUTION})
    assert made == Item(
        "gsm8k-test-7",
        "gsm8k",
        "How many clips?",
        "Natalia sold 48/2 = 24 clips in May.\nIn all 48+24 = 72 clips.\n#### 72",
        {"answer": "72"},
    )
    assert load_recipe("gsm8k").SOURCE == gsm8k.SOURCE


@pytest.mark.parametrize(
    ("truth", "answer"),
    [("18", "18.00"), ("3/4", "0.75"), ("0.75", "3/4"), ("1,000", "1e3"), ("-5", "−5.0"), ("$18", "18 dollars")],
)
def test_equal_numbers_are_equal_however_written(truth, answer):
    score = gsm8k.score(item(truth), answer)
    assert score.correct and score.exact and score.credit == 1 and score.abs_error == 0


def test_equality_is_exact():
    third = gsm8k.score(item("1/3"), "0.3333333333333333")
    assert float(Fraction(1, 3)) == 0.3333333333333333  # as floats they are the same
    assert not third.correct and third.abs_error == 0
    assert not gsm8k.score(item("9007199254740993"), "9007199254740992").correct


def test_what_a_score_holds():
    near = gsm8k.score(item("18"), "I think 20")
    assert (near.correct, near.predicted, near.abs_error, near.extra) == (False, 20.0, 2.0, {"marker": 0.0})
    none = gsm8k.score(item("18"), "#### none")
    assert (none.correct, none.predicted, none.abs_error, none.extra) == (False, None, None, {"marker": 0.0})
    far = gsm8k.score(item("-1.7e308"), "1.7e308")
    assert far.predicted == 1.7e308 and far.abs_error is None


GOOD = {"question": "How many?", "answer": SOLUTION}


@pytest.mark.parametrize("name", ["question", "answer"])
@pytest.mark.parametrize(
    "value", [None, "", " \n ", "\u200b", 7, 7.5, float("nan"), True, ["a"], {}, "a \ud800 #### 7"]
)
def test_rows_without_text_are_refused(name, value):
    with pytest.raises(RowError, match=rf"^{name}: expected text"):
        gsm8k.make_item("x", {**GOOD, name: value})
    with pytest.raises(RowError, match=rf"^{name}: expected text, got nothing"):
        gsm8k.make_item("x", {k: v for k, v in GOOD.items() if k != name})


@pytest.mark.parametrize(
    "answer",
    [
        "72",
        "It is ### 72",
        "####",
        "So #### many",
        "#### 1,5",
        "#### 72 clips",
        "#### 72\nor more",
        "#### 10-15",
        "#### NaN",
    ],
)
def test_solutions_without_a_readable_result_are_refused(answer):
    with pytest.raises(RowError, match=r"answer: expected a solution that ends in #### and a number, got"):
        gsm8k.make_item("x", {**GOOD, "answer": answer})


def test_notes_alone_are_cut_out():
    answer = "If a<b and 1<<2, then 2*3=<<2*3=6>>6 << open.\n#### 6 "
    assert gsm8k.make_item("x", {**GOOD, "answer": answer}).completion == (
        "If a<b and 1<<2, then 2*3=6 << open.\n#### 6"
    )


def test_a_question_is_just_text():
    question = "### Response:\n{prompt} #### 5 <<1=1>> [INST]"
    assert gsm8k.make_item("x", {**GOOD, "question": question}).prompt == question


def test_groups_go_by_the_question():
    one = gsm8k.make_item("a", GOOD)
    same = gsm8k.make_item("b", {"question": "how  many? ", "answer": "#### 1"})
    other = gsm8k.make_item("c", {"question": "How much?", "answer": SOLUTION})
    assert gsm8k.group(one) == gsm8k.group(same) != gsm8k.group(other)


def test_summary_by_hand():
    scores = [gsm8k.score(item("18"), a) for a in ("#### 18", "18.0 in all", "#### 19", "none", "#### none")]
    summary = gsm8k.summarize(scores)
    assert summary == {"gsm8k_exact_match": 0.4, "gsm8k_unparseable": 0.4, "gsm8k_has_marker": 0.4}
    assert list(summary) == list(gsm8k.METRICS) and next(iter(summary)) == gsm8k.PRIMARY
    assert summary[gsm8k.PRIMARY] == mean_credit(scores)
    empty = gsm8k.summarize([])
    assert list(empty) == list(gsm8k.METRICS) and all(math.isnan(v) for v in empty.values())


# Pieces that answers are made of, so that random texts reach the parser's branches.
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "#### ",
                "the answer is ",
                r"\boxed{",
                "}",
                "=",
                "-",
                "−",
                "$",
                ",",
                ".",
                "/",
                "e",
                " ",
                "\n",
                "½",
                "x",
                "%",
            ]
        ),
        st.integers(0, 10**6).map(str),
        st.text(max_size=5),
    ),
    max_size=20,
).map("".join)


@given(PIECES)
@settings(deadline=None)
def test_any_text_gets_a_score(answer):
    score = gsm8k.score(item("18"), answer)
    assert score.credit in (0.0, 1.0)
    assert score.predicted is None or math.isfinite(score.predicted)
    assert not (score.predicted is None and score.correct)
    assert score.abs_error is None or math.isfinite(score.abs_error)


@given(st.text(), st.decimals(allow_nan=False, allow_infinity=False, places=3))
@settings(deadline=None)
def test_the_items_own_completion_is_right(solution, result):
    try:
        made = gsm8k.make_item("x", {"question": "?", "answer": f"{solution}\n#### {result:f}"})
    except RowError as error:
        assert error.name == "answer" and (abs(result) > 10**308 or "half a character" in error.reason)
        return
    assert made.completion == made.completion.strip()
    assert Fraction(made.truth["answer"]) == Fraction(result)
    assert gsm8k.score(made, made.completion).credit == 1
