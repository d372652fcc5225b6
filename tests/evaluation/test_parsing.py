"""What answers say: yes or no, the number that a solution arrives at, and free text by its overlap with a reference."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text.rouge import _normalize_and_tokenize_text

from evaluation import parsing
from evaluation.tasks import Item, alpaca, boolq, dolly, gsm8k, mean_credit, qnli

# --- yes and no ---

# fmt: off
BOOLQ = {
    "Yes": [
        "Yes", " yes\n", "**Yes**", "-Yes", "A: yes", "Y", "Yep.", "The answer is: Yes.", "No one can, so yes.",
        "Yes, no doubt.", "That is correct.", "no longer, yes", "not false", "Yes, the statement is not false.",
        "\n\nYes\n\nQuestion: Is it?\nNo", "Yes or no? Yes.", "It does not matter; it is true.",
        "It is not red but it is true", "No doubt it is true",
    ],
    "No": [
        "No", "NO", "no?", "No...", "_No_", "“No”", "(no)", "<b>No</b>", "No - it is red", "No— it is red", "Nope",
        "No because it is red", "No it isn't", "So, no.", "No, no, no!", "n.", "That is incorrect.", "not yes",
        "It isn’t necessarily true", "That is no longer true", "This cannot be correct", "It is not **yes**",
        "No, it is a true story.", "Thinking about it.\nNo.", "No [correct] {true}", "Answer Yes or No. No",
        "No (it is true only in Canada)", "No… it is true of Canada", "No = false", "It is not at all true.",
        "It is hardly true", "It is not blue, so it is false.",
    ],
    None: [
        "No (yes would need a permit)", "No | yes", "No per the passage; that is true of France", "", " \n\t ", "...",
        "No source says that it is true", "I do not know if it is true", "Nothing says it isn't known to be false",
        "no yes", "Yes. No.", "No, wait, yes", "Yes/No", "true and false", "It is true, or is it false", "Yesterday",
        "yes-man", "Bayes", "No one", "no-one knows", "No. 5 is alive", "There is no evidence of it", "untrue", "N/A",
        "y n", "1", "да", "Answer Yes or No.",
    ],
}
QNLI = {
    "entailment": [
        "Yes", "y", "Yeah, it does", "ENTAILMENT", "`entailment`", "label: entailment", "The question is entailed",
        "It entails the answer", "True", "Yes, entailment", "Does the sentence answer the question? Yes",
        "entailment\nnot_entailment", "There is no doubt: yes",
    ],
    "not_entailment": [
        " NO \n", "N", "not_entailment", "not entailment", "Not-Entailment", "**not_entailment**", "not  entailment",
        "not really an entailment", "There is no entailment here", "non-entailment", "This isn’t entailment",
        "It is not clearly entailed", "It doesn't entail it", "It cannot entail it", "False", "No, not_entailment",
        "Does the sentence answer the question? Answer Yes or No. No", "There is no date in it, so no.",
    ],
    None: [
        "", "entailment or not_entailment", "not_entailment, entailment", "yes and no", "neutral", "entailments",
        "entail-ment", "nonentailment", "not", "I know", "No one started it", "0", "-1", "蕴含",
    ],
}
# fmt: on


def labelled(task, label):
    return Item("x", task.NAME, "", "", {"label": label})


@pytest.mark.parametrize(("task", "cases"), [(boolq, BOOLQ), (qnli, QNLI)])
def test_yes_and_no_are_read(task, cases):
    for said, given_answers in cases.items():
        for answer in given_answers:
            for truth in task.LABELS:
                score = task.score(labelled(task, truth), answer)
                right = said == truth
                assert score.predicted == said, answer
                assert (score.correct, score.exact, score.credit) == (right, right, float(right)), answer


def test_label_metrics_by_hand():
    for pairs, accuracy, f1, unparseable in (
        # Yes: 2 of 2 said, 2 of 3 results: F1 = 4/5. No: 1 of 2 said, 1 of 2 results: F1 = 1/2.
        ([(1, "Yes"), (1, "Yes"), (1, "no"), (0, "No"), (0, "perhaps")], 0.6, (4 / 5 + 1 / 2) / 2, 0.2),
        ([(1, "Yes")] * 3 + [(0, "Yes")], 0.75, 3 / 7, 0),  # Yes: precision 3/4, recall 1. No: never said
        ([(1, "Yes")] * 2, 1, 1, 0),
        ([(1, "")] * 2, 0, 0, 1),
    ):
        scores = [boolq.score(labelled(boolq, boolq.LABELS[truth]), answer) for truth, answer in pairs]
        expected = {"boolq_accuracy": accuracy, "boolq_f1": f1, "boolq_unparseable": unparseable}
        assert boolq.summarize(scores) == pytest.approx(expected)


# --- numbers ---

# fmt: off
NUMBERS = {
    "18": [
        "#### 18", "####18", "She has 9 * 2 = 18.\n#### 18", "#### 18\n\nQuestion: there are 5 cats", "18th", "_18_",
        "#### 18 apples in 3 boxes", "#### Step 1\n#### Step 2\nSo 18 in all.", "####\n#### 18", "#### 18\n\n#### 24",
        "So:\n#### Janet makes 18 dollars for 3 eggs", "#### about 18\nThat is 3 more than 15.", "18€", "Rs.18", "18%",
        "2*9=18\n#### 18\n\n### Instruction:\nWhat is 3+2?\n\n### Response:\n3+2=5\n#### 5", "18.00", "18,", r"18\%",
        "Thus \\boxed{18}.\n\nProblem: 4 + 5?\n\\boxed{9}", "They have 3 * 6 = 18 eggs.\nQ: What is 4 + 5?\nA: 9",
        "Question: There are 3 boxes of 6.\nAnswer: 18\n\nQuestion: 4 + 5?\nAnswer: 9", r"\$18", "It costs $18!",
        "Let me see.\nQuestion: how many eggs?\n#### 18", r"\boxed{18 \text{ dollars}} for 2", "so...18",
        "the answer is: $18, for 3 people", "**Answer:** 18 (of 20)", "Answer:\n18\nThere were 20.",
        "The final answer is about 18 of 20 eggs", "The answer is 17. Wait, the answer is 18. There were 20.",
        "The answer to the problem is therefore 3 * 6 = 18 and not 20", "The answer is " + "x" * 400 + " = 18 for 3",
        "3 * 6 = 18 apples for 3 days", "20 = x - 2 = 18 for 3", "There are 3 cats and 18 dogs.",
    ],
    "5": [
        "The answer is 5.\n\n**Question 2:** 4 + 5?\nThe answer is 9.\n#### 9",
        "The answer is not 2 + 2 = 4. They have 5.", "- 5 apples", "total--5", "x − 5", "(5)", "$ 5", "pre-5", "+5",
    ],
    "9": ["\n\n### Instruction:\nAdd 4 and 5.\n### Response:\nThe answer is 9."],
    "20": ["The answer is not 18 but 20", "The answer isn't 18, it's 20"],
    "4": [r"\boxed{} is 4", "The answer is unknown; 4"],
    "2": ["3 * 6 = 18. So 20 in total with 2 more", "8/4", "2 million"],
    "6": [r"\boxed{5} then \boxed{6}"],
    "8": ["Answer: there are 5 cats and 3 dogs, so 8 in all"],
    "16": ["5 + 13 = 18. He gives 2 away, so 16 are left."],
    "-5": [
        "x = -5", "-$5", "$-5", "−5", "–5", "It is − 5 °C", "−\u00a05", "−\u200b5", "10 − 15 = − 5", "#### − 5",
    ],
    "3/4": [r"$\boxed{\frac{3}{4}}$ of 8", "3/4", "3 / 4", r"\frac{3}{4}"],
    "3/2": ["1 1/2", "1½ cups"],
    "1/2": ["½", ".5", r"\dfrac{1}{2} of it"],
    "-1/2": ["-.5"],
    "1/50": ["2E-2"],
    "1500": ["1.5e3"],
    "1234567.25": ["1,234,567.25"],
    "10000": ["10{,}000", r"10\,000", "10\u202f000"],
    "3": ["a 3-hour trip"],
    "7": ["007"],
    "99999999999999999999": ["99999999999999999999"],
    None: [
        "", " \n\t", "I do not know.", "####", "#### unknown", "twelve", "NaN", "-", "$", "1,5", "1.234,5", "1,2345",
        "12,34,567", "0,500", "1_000", "1'234", "10-15", "10–15", "$10-$15", "#### 10-15", "The answer is 10-15.",
        "10:30", "2023-05-01", "1/2/2023", "1.2.3", "v1.2", "PM10", "3*6", "3x6", "5^2", "3/0", "5 10/2", "1e999",
        "1e999999999999", "9" * 399, "9" * 100_000, "１８", "١٨", "²",
    ],
}
# fmt: on


def read(answer):
    return parsing.final_number(answer, gsm8k.MARKER)[0]


def test_numbers_are_read():
    for number, given_answers in NUMBERS.items():
        for answer in given_answers:
            assert read(answer) == (None if number is None else Fraction(number)), answer[:100]


FORMS = ["It is {:,} in all.", "#### {:d}", "So {:d}.00 eggs.", "The answer is {:,}.0.", "{:d}e0", "**{:d}**", "{:d}%"]


@given(st.integers(-(10**12), 10**12), st.sampled_from(FORMS), st.fractions(min_value=0, max_value=10**6))
@settings(deadline=None)
def test_numbers_are_read_back_in_every_form(value, form, fraction):
    assert read(form.format(value)) == value
    assert read(f"#### {fraction}") == read(f"So {fraction} eggs.") == fraction


def test_long_answers_are_read_in_linear_time():
    """Four times the answer takes four times as long, sixteen where a pattern backtracks; one of three tries counts."""
    labels = ("no one ", "not ", "not ly ", "n't-", "yes ", "y", "no ", "yes or ", "not very", "_", "a\n", "true ")
    marks = ("1 ", "1,", "1-", "#### ", "the answer is ", r"\boxed{", "=", "9", "1/", ". ", "½", "-", "Q:\n", "####\n")

    def seconds(reader, answer):
        start = time.process_time()
        reader(answer)
        return time.process_time() - start

    for reader, pieces in ((parsing.read_yes_no, labels), (read, marks)):
        for piece in pieces:
            short, long = piece * 2_500, piece * 10_000
            assert any(seconds(reader, long) < 8 * seconds(reader, short) + 0.01 for _ in range(3)), piece


def solved(result="18"):
    return gsm8k.make_item("x", {"question": "How many?", "answer": f"So it is {result}.\n#### {result}"})


def test_equality_is_exact_however_a_number_is_written():
    for truth, answer in (
        ("18", "18.00"), ("3/4", "0.75"), ("0.75", "3/4"), ("1,000", "1e3"), ("-5", "−5.0"), ("$18", "18 dollars"),
    ):  # fmt: skip
        score = gsm8k.score(solved(truth), answer)
        assert score.correct and score.exact and score.credit == 1 and score.abs_error == 0
    third = gsm8k.score(solved("1/3"), "0.3333333333333333")  # as floats they are the same
    assert not third.correct and third.abs_error == 0
    assert not gsm8k.score(solved("9007199254740993"), "9007199254740992").correct


def test_what_the_score_of_a_number_holds():
    for answer, predicted, error in (("I think 20", 20.0, 2.0), ("#### none", None, None)):
        score = gsm8k.score(solved(), answer)
        assert (score.correct, score.predicted, score.abs_error, score.extra) == (
            False,
            predicted,
            error,
            {"marker": 0},
        )
    far = gsm8k.score(solved("-1.7e308"), "1.7e308")
    assert far.predicted == 1.7e308 and far.abs_error is None
    scores = [gsm8k.score(solved(), a) for a in ("#### 18", "18.0 in all", "#### 19", "none", "#### none")]
    expected = {"gsm8k_exact_match": 0.4, "gsm8k_unparseable": 0.4, "gsm8k_has_marker": 0.4}
    assert gsm8k.summarize(scores) == expected


# --- free text ---

# fmt: off
WORDS = [
    ("The cat sat.", ["the", "cat", "sat"]), ("don't", ["don", "t"]), ("snake_case", ["snake", "case"]),
    ("a-b  c\n\td", ["a", "b", "c", "d"]), ("3.14", ["3", "14"]), ("x2", ["x2"]), ("**Bold**", ["bold"]),
    ("Größe", ["grösse"]), ("GRÖSSE", ["grösse"]), ("cafe\u0301", ["caf\u00e9"]), ("Αθήνα", ["αθήνα"]),
    ("Москва — город", ["москва", "город"]), ("हिन्दी भाषा", ["हिन्दी", "भाषा"]), ("مرحبا، عالم", ["مرحبا", "عالم"]),
    ("东京 is", ["东", "京", "is"]), ("すし!", ["す", "し"]), ("한국어 말", ["한국어", "말"]), ("½ cup", ["½", "cup"]),
    (":-)", [":-)"]), ("<- ->", ["<-", "->"]), ("😀", ["😀"]), ("😀 ok", ["ok"]), ("", []), (" \n", []),
]
# (answer, reference, common subsequence, shared words, words of the answer, words of the reference), by hand.
BY_HAND = [
    ("the cat sat", "The cat sat.", 3, 3, 3, 3), ("the cat sat down", "the cat sat", 3, 3, 4, 3),
    ("sat cat the", "the cat sat", 1, 3, 3, 3), ("a dog ran", "the cat sat", 0, 0, 3, 3),
    (" \n", "the cat sat", 0, 0, 0, 3), ("!!!", "the cat sat", 0, 0, 1, 3), ("the the the", "the cat sat", 1, 1, 3, 3),
    ("police kill the gunman", "police killed the gunman", 3, 3, 4, 4), ("x a y b z c", "a b c", 3, 3, 6, 3),
    ("the gunman kill police", "police killed the gunman", 2, 3, 4, 4), ("4.2", "42", 0, 0, 2, 1),
    ("cats", "cat", 0, 0, 1, 1), ("cafe\u0301 noir", "caf\u00e9 noir", 2, 2, 2, 2), ("京东", "东京", 1, 2, 2, 2),
    (":-)", ":-)", 1, 1, 1, 1), ("a", "a " * 10, 1, 1, 1, 10),
]
EXACT = [  # signs count that words drop
    ("Blue", "blue", True), (" blue\n", "Blue.", True), ("blue.", "blue", True), ("a  b", "a\nb", True),
    ("cafe\u0301", "caf\u00e9", True), ("STRASSE", "straße", True), ("blue!", "blue", False),
    ("blue..", "blue", False), ("x+1", "x-1", False), ("C", "C++", False), ("-5", "5", False), ("x²", "x2", False),
    ("a, b", "a b", False), ("", "blue", False), (".", "blue", False), (".", ".", True), ("", ".", False),
]
# fmt: on


@given(st.text(st.characters(max_codepoint=127)))
@settings(deadline=None)
def test_words_of_ascii_are_those_of_rouge(text):
    usual = _normalize_and_tokenize_text(text)
    assert parsing.words(text) == (usual or text.lower().split())


def test_words_are_runs_of_letters_and_digits_but_signs_count_in_exact_answers():
    for text, words in WORDS:
        assert parsing.words(text) == words
    for answer, reference, equal in EXACT:
        assert alpaca.score(referred(reference), answer).exact is equal, (answer, reference)


def referred(reference, task=alpaca):
    return Item("x", task.NAME, "", reference, {"answer": reference})


@pytest.mark.parametrize("task", [alpaca, dolly])
def test_rouge_by_hand(task):
    for answer, reference, common, shared, m, n in BY_HAND:
        score = task.score(referred(reference, task), answer)
        assert score.credit == score.partial == pytest.approx(2 * common / (m + n), abs=1e-6), answer
        assert score.extra == {"rouge_1": pytest.approx(2 * shared / (m + n), abs=1e-6)}
        assert score.correct == (4 * common >= m + n)
        assert (score.predicted is None) == (not answer.strip())
    it = referred("the cat sat", task)
    summary = task.summarize([task.score(it, a) for a in ("The cat sat.", "sat cat the", "the cat", "", " ")])
    rouge_l, rouge_1 = (1 + 1 / 3 + 4 / 5 + 0 + 0) / 5, (1 + 1 + 4 / 5 + 0 + 0) / 5
    expected = {"rouge_l": rouge_l, "rouge_1": rouge_1, "exact": 0.2, "empty": 0.4}
    assert summary == pytest.approx({f"{task.NAME}_{name}": value for name, value in expected.items()}, abs=1e-6)


# --- any text ---

# Pieces that answers are made of, so that random texts reach the parsers' branches.
PIECES = (
    "yes No not true false n't entailment entails non an really one or - _ , . #### = − $ / e ½ x % } cat "
    r"\boxed{ answer is"
).split()
ANY = st.lists(st.one_of(st.sampled_from([*PIECES, "\n", "the answer is "]), st.integers(0, 10**6).map(str),
                         st.text(max_size=5)), max_size=20)  # fmt: skip


@given(
    st.sampled_from([labelled(boolq, "Yes"), labelled(qnli, "not_entailment"), solved(), referred("a cat")]),
    ANY,
    st.sampled_from(["", " "]),
)
@settings(max_examples=250, deadline=None)
def test_any_text_gets_a_score(item, pieces, between):
    task = {t.NAME: t for t in (boolq, qnli, gsm8k, alpaca)}[item.task]
    score = task.score(item, between.join(pieces))
    assert 0 <= score.credit <= 1 and not (score.predicted is None and (score.correct or score.exact))
    assert score.abs_error is None or math.isfinite(score.abs_error)
    if task in (boolq, qnli):
        assert score.predicted in (*task.LABELS, None) and score.correct == (score.predicted == item.truth["label"])
    elif task is gsm8k:
        assert score.predicted is None or math.isfinite(score.predicted)
    assert task.summarize([score])[task.PRIMARY] == pytest.approx(mean_credit([score]))
