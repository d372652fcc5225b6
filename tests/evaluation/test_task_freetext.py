"""Alpaca and Dolly: rows to items, and free text scored by ROUGE against values worked out independently."""

import math
import subprocess
import sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text.rouge import _normalize_and_tokenize_text

from evaluation.tasks import Item, RowError, _freetext, alpaca, dolly, load_recipe, mean_credit

ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue.\nOr red."}
DOLLY = {"instruction": "Who?", "context": "Ada wrote it. ", "response": "Ada", "category": "closed_qa"}


def item(reference="the cat sat"):
    return alpaca.make_item("x", {"instruction": "Do it.", "output": reference})


def longest_common(a, b):
    """Length of the longest common subsequence, by trying every subsequence of `a`, longest first."""
    for size in range(len(a), 0, -1):
        for places in combinations(range(len(a)), size):
            rest = iter(b)
            if all(a[i] in rest for i in places):
                return size
    return 0


def f1(common, a, b):
    return 2 * common / (len(a) + len(b)) if a and b else 0.0


def test_items_of_rows_as_on_the_hub():
    assert alpaca.make_item("alpaca-train-1", ALPACA) == Item(
        "alpaca-train-1", "alpaca", "Name a colour.", "Blue.\nOr red.", {"answer": "Blue.\nOr red."}
    )
    made = alpaca.make_item("a", {**ALPACA, "input": " sky \n"})
    assert made.prompt == "Name a colour.\n\nsky"
    made = dolly.make_item("dolly-test-1", DOLLY)
    assert (made.id, made.task, made.prompt, made.completion) == (
        "dolly-test-1",
        "dolly",
        "Who?\n\nAda wrote it.",
        "Ada",
    )
    assert made.truth["answer"] == "Ada" and made.truth["category"] == "closed_qa"
    for name in ("alpaca", "dolly"):
        assert load_recipe(name).SOURCE.test is None


@pytest.mark.parametrize("task", [alpaca, dolly])
@pytest.mark.parametrize("value", [None, "", " \n", "\u200b", "missing"])
def test_what_is_optional_may_be_missing(task, value):
    row, name = (ALPACA, "input") if task is alpaca else (DOLLY, "context")
    given_row = {k: v for k, v in row.items() if k != name} if value == "missing" else {**row, name: value}
    assert task.make_item("x", given_row).prompt == row["instruction"]


@pytest.mark.parametrize(
    ("task", "row", "name"),
    [
        (alpaca, ALPACA, "instruction"),
        (alpaca, ALPACA, "output"),
        (dolly, DOLLY, "instruction"),
        (dolly, DOLLY, "response"),
    ],
)
@pytest.mark.parametrize("value", [None, "", " \n\t", "\u200b", 5, 0.5, float("nan"), True, ["a"], {}, b"a", "\ud800"])
def test_rows_without_text_are_refused(task, row, name, value):
    with pytest.raises(RowError, match=rf"^{name}: expected text"):
        task.make_item("x", {**row, name: value})
    with pytest.raises(RowError, match=rf"^{name}: expected text, got nothing"):
        task.make_item("x", {k: v for k, v in row.items() if k != name})


@pytest.mark.parametrize(
    ("task", "row", "name"), [(alpaca, ALPACA, "input"), (dolly, DOLLY, "context"), (dolly, DOLLY, "category")]
)
@pytest.mark.parametrize("value", [5, float("nan"), False, ["a"]])
def test_what_is_optional_must_be_text(task, row, name, value):
    with pytest.raises(RowError, match=rf"^{name}: expected text, got {str(value)[:2]}".replace("[", r"\[")):
        task.make_item("x", {**row, name: value})


def test_groups():
    both = [alpaca.make_item(i, {**ALPACA, "input": g}) for i, g in (("a", "sky"), ("b", "SKY "), ("c", "sea"))]
    assert alpaca.group(both[0]) == alpaca.group(both[1]) != alpaca.group(both[2])
    asked = [dolly.make_item("d", {**DOLLY, "instruction": text}) for text in ("Who?", "What?")]
    assert dolly.group(asked[0]) == dolly.group(asked[1])
    alone = [dolly.make_item("d", {**DOLLY, "instruction": text, "context": ""}) for text in ("Who?", "What?")]
    assert dolly.group(alone[0]) != dolly.group(alone[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat sat.", ["the", "cat", "sat"]),
        ("don't", ["don", "t"]),
        ("snake_case", ["snake", "case"]),
        ("a-b  c\n\td", ["a", "b", "c", "d"]),
        ("3.14", ["3", "14"]),
        ("x2", ["x2"]),
        ("**Bold**", ["bold"]),
        ("Größe", ["grösse"]),
        ("GRÖSSE", ["grösse"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("Αθήνα", ["αθήνα"]),
        ("Москва — город", ["москва", "город"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("مرحبا، عالم", ["مرحبا", "عالم"]),
        ("东京 is", ["东", "京", "is"]),
        ("すし!", ["す", "し"]),
        ("한국어 말", ["한국어", "말"]),
        ("½ cup", ["½", "cup"]),
        (":-)", [":-)"]),
        ("<- ->", ["<-", "->"]),
        ("😀", ["😀"]),
        ("😀 ok", ["ok"]),
        ("", []),
        (" \n", []),
    ],
)
def test_words(text, words):
    assert _freetext.words(text) == words


@given(st.text(st.characters(max_codepoint=127)))
@settings(deadline=None)
def test_words_of_ascii_are_those_of_rouge(text):
    usual = _normalize_and_tokenize_text(text)
    assert _freetext.words(text) == (usual or text.lower().split())


# (answer, reference, common subsequence, shared words, words of the answer, words of the reference), by hand.
BY_HAND = [
    ("the cat sat", "the cat sat", 3, 3, 3, 3),
    ("The cat sat.", "the cat sat", 3, 3, 3, 3),
    ("the cat", "the cat sat", 2, 2, 2, 3),
    ("the cat sat down", "the cat sat", 3, 3, 4, 3),
    ("sat cat the", "the cat sat", 1, 3, 3, 3),
    ("the sat cat", "the cat sat", 2, 3, 3, 3),
    ("a dog ran", "the cat sat", 0, 0, 3, 3),
    ("", "the cat sat", 0, 0, 0, 3),
    (" \n", "the cat sat", 0, 0, 0, 3),
    ("!!!", "the cat sat", 0, 0, 1, 3),
    ("the the the", "the cat sat", 1, 1, 3, 3),
    ("the", "the cat the", 1, 1, 1, 3),
    ("the the", "the cat the", 2, 2, 2, 3),
    ("cat cat the the", "the cat the cat", 2, 4, 4, 4),
    ("my name is john", "is your name john", 2, 3, 4, 4),
    ("police kill the gunman", "police killed the gunman", 3, 3, 4, 4),
    ("the gunman kill police", "police killed the gunman", 2, 3, 4, 4),
    ("a b c d e", "a c e", 3, 3, 5, 3),
    ("a b c d e", "e d c b a", 1, 5, 5, 5),
    ("a b c d e f", "d e f a b c", 3, 6, 6, 6),
    ("x a y b z c", "a b c", 3, 3, 6, 3),
    ("don't go", "do not go", 1, 1, 3, 3),
    ("dont go", "don't go", 1, 1, 2, 3),
    ("GO", "go", 1, 1, 1, 1),
    ("yes", "no", 0, 0, 1, 1),
    ("42", "42.", 1, 1, 1, 1),
    ("4.2", "42", 0, 0, 2, 1),
    ("1,000", "1000", 0, 0, 2, 1),
    ("cats", "cat", 0, 0, 1, 1),
    ("well-known", "well known", 2, 2, 2, 2),
    ("snake_case", "snake case", 2, 2, 2, 2),
    ("a\nb\nc", "a b c", 3, 3, 3, 3),
    ("1. one\n2. two", "one two", 2, 2, 4, 2),
    ("Größe", "grösse", 1, 1, 1, 1),
    ("cafe\u0301 noir", "caf\u00e9 noir", 2, 2, 2, 2),
    ("cafe", "caf\u00e9", 0, 0, 1, 1),
    ("Αθήνα είναι", "η Αθήνα είναι", 2, 2, 2, 3),
    ("Москва", "москва", 1, 1, 1, 1),
    ("东京", "東京", 1, 1, 2, 2),
    ("京东", "东京", 1, 2, 2, 2),
    ("すし", "すし屋", 2, 2, 2, 3),
    ("हिन्दी", "हिन्दू", 0, 0, 1, 1),
    (":-)", ":-)", 1, 1, 1, 1),
    (":-(", ":-)", 0, 0, 1, 1),
    ("-> <-", "<- ->", 1, 2, 2, 2),
    ("😀 yes", "yes", 1, 1, 1, 1),
    ("a " * 10, "a", 1, 1, 10, 1),
    ("a", "a " * 10, 1, 1, 1, 10),
    ("the quick brown fox jumps", "the fast brown fox leaps", 3, 3, 5, 5),
    ("one two three four", "two one four three", 2, 4, 4, 4),
    ("{prompt} ### Response:", "prompt response", 2, 2, 2, 2),
    ("<b>bold</b>", "bold", 1, 1, 3, 1),
]


@pytest.mark.parametrize(("answer", "reference", "common", "shared", "m", "n"), BY_HAND)
@pytest.mark.parametrize("task", [alpaca, dolly])
def test_rouge_by_hand(task, answer, reference, common, shared, m, n):
    it = Item("x", task.NAME, "", reference, {"answer": reference})
    score = task.score(it, answer)
    assert score.credit == score.partial == pytest.approx(2 * common / (m + n), abs=1e-6)
    assert score.extra == {"rouge_1": pytest.approx(2 * shared / (m + n), abs=1e-6)}
    assert score.correct == (4 * common >= m + n)
    assert (score.predicted is None) == (not answer.strip())


TEXTS = st.lists(st.sampled_from(["a", "B", "c.", "é", "東京", "-", "the", "\n"]), max_size=9).map(" ".join)


@given(TEXTS, TEXTS.filter(str.strip))
@settings(max_examples=200, deadline=None)
def test_rouge_is_that_of_a_search_through_all_subsequences(answer, reference):
    given_words, right = _freetext.words(answer), _freetext.words(reference)
    shared = sum((Counter(given_words) & Counter(right)).values())
    rouge_l, rouge_1 = _freetext.rouge(answer, reference)
    assert rouge_l == pytest.approx(f1(longest_common(given_words, right), given_words, right), abs=1e-6)
    assert rouge_1 == pytest.approx(f1(shared, given_words, right), abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("Blue", "blue", True),
        (" blue\n", "Blue.", True),
        ("blue.", "blue", True),
        ("a  b", "a\nb", True),
        ("cafe\u0301", "caf\u00e9", True),
        ("STRASSE", "straße", True),
        ("blue!", "blue", False),
        ("blue..", "blue", False),
        ("x+1", "x-1", False),
        ("C", "C++", False),
        ("-5", "5", False),
        ("x²", "x2", False),
        ("a, b", "a b", False),
        ("", "blue", False),
        (".", "blue", False),
        (".", ".", True),
        ("", ".", False),
    ],
)
def test_exact_keeps_signs_that_words_drop(answer, reference, equal):
    assert alpaca.score(item(reference), answer).exact is equal


@given(st.text(max_size=60), st.text(max_size=60))
@settings(deadline=None)
def test_any_text_gets_a_score(answer, other):
    score = alpaca.score(item(f"a {other}"), answer)
    assert 0 <= score.credit <= 1
    assert not (score.predicted is None and (score.correct or score.exact))


@given(st.text(max_size=80))
@settings(deadline=None)
@pytest.mark.parametrize("task", [alpaca, dolly])
def test_the_items_own_completion_is_right(task, text):
    row = {"instruction": "Do it.", "output": text, "response": text}
    try:
        made = task.make_item("x", row)
    except RowError:
        assert not any(c.isprintable() and not c.isspace() for c in text)
        return
    assert made.completion == text.strip()
    score = task.score(made, made.completion)
    assert score.credit == 1 and score.correct and score.exact


@pytest.mark.parametrize("task", [alpaca, dolly])
def test_summary_by_hand(task):
    it = Item("x", task.NAME, "", "the cat sat", {"answer": "the cat sat"})
    scores = [task.score(it, a) for a in ("The cat sat.", "sat cat the", "the cat", "", " ")]
    summary = task.summarize(scores)
    assert summary == pytest.approx(
        {
            f"{task.NAME}_rouge_l": (1 + 1 / 3 + 4 / 5 + 0 + 0) / 5,
            f"{task.NAME}_rouge_1": (1 + 1 + 4 / 5 + 0 + 0) / 5,
            f"{task.NAME}_exact": 0.2,
            f"{task.NAME}_empty": 0.4,
        },
        abs=1e-6,
    )
    assert list(summary) == list(task.METRICS) and next(iter(summary)) == task.PRIMARY
    assert summary[task.PRIMARY] == mean_credit(scores)
    empty = task.summarize([])
    assert list(empty) == list(task.METRICS) and all(math.isnan(v) for v in empty.values())


def test_loading_the_tasks_loads_no_heavy_package():
    code = (
        "import sys; from evaluation.tasks import load, names; [load(n) for n in names()]; "
        "print([m for m in ('torch', 'torchmetrics', 'sklearn', 'datasets', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
