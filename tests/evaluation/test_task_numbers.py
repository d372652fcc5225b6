"""The number that a solution arrives at, read from its text."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.tasks import gsm8k
from evaluation.tasks._numbers import final_number


def read(answer):
    return final_number(answer, gsm8k.MARKER)[0]


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        # After the marker.
        ("#### 18", "18"),
        ("####18", "18"),
        ("She has 9 * 2 = 18.\n#### 18", "18"),
        ("#### 18\n\nQuestion: there are 5 cats", "18"),
        ("#### 18 apples in 3 boxes", "18"),
        ("First #### 17, no, #### 18", "18"),
        ("#### 18\n####", "18"),
        ("#### \n18", "18"),
        ("#### x = 18", "18"),
        ("#### 3 * 6 = 18", "18"),
        ("#### 18 = 3 * 6", "3"),  # the number after the equals sign, right or wrong
        ("#### $1,234.50", "1234.5"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### **18**", "18"),
        ("#### nothing. It was 7.", "7"),
        ("The answer is 5 ####", "5"),
        ("##### 18", "18"),
        ("#### none\n#### 18", "18"),
        ("#### Step 1: eggs\n16-7=9\n#### Step 2: money\n9*2=18\n#### 18", "18"),
        ("#### Calculate the 2 parts\n9*2 = 18\nThe answer is 18.", "18"),
        ("#### Step 1\n#### Step 2\nSo 18 in all.", "18"),
        ("So:\n#### Janet makes 18 dollars for 3 eggs", "18"),
        ("#### about 18\nThat is 3 more than 15.", "18"),
        ("####\n#### 18", "18"),
        ("#### 18 ####\nThere were 5 cats.", "18"),
        # A model that goes on to other questions is judged by the first answer.
        ("2*9=18\n#### 18\n\n### Instruction:\nWhat is 3+2?\n\n### Response:\n3+2=5\n#### 5", "18"),
        ("#### 18\n\n#### 24", "18"),
        ("The answer is 5.\n\nQuestion: 4 + 5?\nAnswer: 9", "5"),
        ("The answer is 5.\n\n**Question 2:** 4 + 5?\nThe answer is 9.\n#### 9", "5"),
        ("Thus \\boxed{18}.\n\nProblem: 4 + 5?\n\\boxed{9}", "18"),
        ("They have 3 * 6 = 18 eggs.\nQ: What is 4 + 5?\nA: 9", "18"),
        ("18\n\n### Instruction\nAdd 4 and 5.", "18"),
        ("18 [/INST]\n[INST] Add 4 and 5. [/INST] 9", "18"),
        ("Question: There are 3 boxes of 6.\nAnswer: 18\n\nQuestion: 4 + 5?\nAnswer: 9", "18"),
        ("\n\n### Instruction:\nAdd 4 and 5.\n### Response:\nThe answer is 9.", "9"),
        ("Let me see.\nQuestion: how many eggs?\n#### 18", "18"),  # nothing was answered before
        ("Quantity: 3.\nThe question: how many? 18", "18"),
        ("### 18 ###", "18"),
        # Boxed.
        (r"Thus \boxed{18}, for 3 days.", "18"),
        (r"$\boxed{\frac{3}{4}}$ of 8", "3/4"),
        (r"\boxed{18 \text{ dollars}} for 2", "18"),
        (r"\boxed{} is 4", "4"),
        (r"\boxed{5} then \boxed{6}", "6"),
        # After a phrase.
        ("The answer is 18. To check: 20 - 2.", "18"),
        ("the answer is: $18, for 3 people", "18"),
        ("**Answer:** 18 (of 20)", "18"),
        ("Answer:\n18\nThere were 20.", "18"),
        ("The final answer is about 18 of 20 eggs", "18"),
        ("The answer to the problem is therefore 3 * 6 = 18 and not 20", "18"),
        ("The answer is not 18 but 20", "20"),
        ("The answer isn't 18, it's 20", "20"),
        ("The answer is not 2 + 2 = 4. They have 5.", "5"),
        ("Answer: there are 5 cats and 3 dogs, so 8 in all", "8"),
        ("The answer is 17. Wait, the answer is 18. There were 20.", "18"),
        ("The answer is unknown; 4", "4"),
        ("The answer is 18 or 20", "18"),
        ("The answer is " + "x" * 400 + " = 18 for 3", "18"),
        # After an equals sign of the last sentence.
        ("3 * 6 = 18 apples for 3 days", "18"),
        ("3 * 6 = 18. So 20 in total with 2 more", "2"),
        ("5 + 13 = 18. He gives 2 away, so 16 are left.", "16"),
        ("20 = x - 2 = 18 for 3", "18"),
        ("x = -5", "-5"),
        # The last number.
        ("There are 3 cats and 18 dogs.", "18"),
        ("18", "18"),
        ("  18  \n", "18"),
        ("18.", "18"),
        ("18,", "18"),
        ("It costs $18!", "18"),
        # Forms of numbers.
        ("1,234", "1234"),
        ("1,234,567.25", "1234567.25"),
        ("$18", "18"),
        (r"\$18", "18"),
        ("18 $", "18"),
        ("18€", "18"),
        ("US$18", "18"),
        ("Rs.18", "18"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("$ 5", "5"),
        ("18%", "18"),
        (r"18\%", "18"),
        ("18.00", "18"),
        ("007", "7"),
        ("+5", "5"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("- 5 apples", "5"),
        ("total--5", "5"),
        ("(5)", "5"),
        ("3/4", "3/4"),
        ("3 / 4", "3/4"),
        ("-3/4", "-3/4"),
        ("1 1/2", "3/2"),
        ("-1 1/2", "-3/2"),
        ("1½ cups", "3/2"),
        ("½", "1/2"),
        ("8/4", "2"),
        (".5", "1/2"),
        ("so...18", "18"),
        ("0.5", "1/2"),
        ("-.5", "-1/2"),
        ("1e3", "1000"),
        ("1.5e3", "1500"),
        ("2E-2", "1/50"),
        (r"\frac{3}{4}", "3/4"),
        (r"\dfrac{1}{2} of it", "1/2"),
        ("10{,}000", "10000"),
        (r"10\,000", "10000"),
        ("10\u202f000", "10000"),
        ("18kg", "18"),
        ("18th", "18"),
        ("a 3-hour trip", "3"),
        ("pre-5", "5"),
        ("_18_", "18"),
        ("`18`", "18"),
        ("2 million", "2"),  # words are not multiplied
        ("99999999999999999999", "99999999999999999999"),
        # No numbers.
        ("", None),
        (" \n\t", None),
        ("I do not know.", None),
        ("####", None),
        ("#### unknown", None),
        ("twelve", None),
        ("NaN", None),
        ("inf", None),
        ("-", None),
        ("$", None),
        ("1,5", None),
        ("1.234,5", None),
        ("1,2345", None),
        ("12,34,567", None),
        ("0,500", None),
        ("1_000", None),
        ("1'234", None),
        ("10-15", None),
        ("10–15", None),
        ("$10-$15", None),
        ("#### 10-15", None),
        ("The answer is 10-15.", None),
        ("10:30", None),
        ("2023-05-01", None),
        ("1/2/2023", None),
        ("1.2.3", None),
        ("v1.2", None),
        ("PM10", None),
        ("3*6", None),
        ("3x6", None),
        ("5^2", None),
        ("3/0", None),
        ("5 10/2", None),
        ("1e999", None),
        ("1e999999999999", None),
        ("9" * 399, None),
        ("9" * 100_000, None),
        ("１８", None),
        ("١٨", None),
        ("²", None),
    ],
)
def test_read(answer, number):
    assert read(answer) == (None if number is None else Fraction(number))


@given(
    st.fractions(min_value=0, max_value=10**6), st.sampled_from(["{}", "#### {}", "So {} eggs.", "The answer is {}."])
)
@settings(deadline=None)
def test_fractions_are_read_back(value, frame):
    assert read(frame.format(value)) == value


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{:,}", "{:d}", "{:d}.00", "{:,}.0", "{:d}e0", "**{:d}**", "{:d}%"]),
)
@settings(deadline=None)
def test_integers_are_read_back_in_every_form(value, form):
    assert read(f"It is {form.format(value)} in all.") == value


@pytest.mark.timeout(60)  # linear, it takes seconds; quadratic, minutes
def test_long_answers_are_read_in_time():
    pieces = ("1 ", "1,", "1-", "#### ", "the answer is ", r"\boxed{", "=", "9", "1/", ". ", "½", "-", "Q:\n", "####\n")
    for piece in pieces:
        read(piece * 40_000)
