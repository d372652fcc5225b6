"""Tasks: what a module must provide, the items of rows, the AQI items and the general ones, and how they are scored."""

import importlib
import itertools
import math
import re
import subprocess
import sys
import types
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from evaluation import EvaluationError, epa, tasks
from evaluation.tasks import (
    Item,
    RowError,
    alpaca,
    aqi,
    boolq,
    classify,
    digest,
    dolly,
    exact,
    general,
    gsm8k,
    instruct,
    load,
    qnli,
)

# --- modules ---

RIGHT = {"unit": "share", "direction": "higher", "description": "Right ones"}
SOUND = {
    "NAME": "mine", "TITLE": "Mine", "PRIMARY": "mine_right", "METRICS": {"mine_right": RIGHT},
    "score": lambda item, answer: None, "summarize": lambda scores: {},
}  # fmt: skip
RECIPE = {
    "SOURCE": tasks.Source("o/n"), "FIELDS": {"a": tasks.Field("a", True, "a")},
    "make_item": lambda item_id, row: None, "group": lambda item: item.prompt,
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """Puts a module where `load` finds it."""

    def put(name="mine", **content):
        made = types.ModuleType(f"evaluation.tasks.{name}")
        vars(made).update({key: value for key, value in content.items() if value is not ...})
        monkeypatch.setitem(sys.modules, made.__name__, made)
        monkeypatch.setattr(tasks, "names", lambda: (name,))
        return made

    return put


def problems(name="mine"):
    with pytest.raises(EvaluationError, match=rf"^evaluation/tasks/{name}\.py is not a task: ") as caught:
        load(name)
    return str(caught.value).partition(": ")[2]


def test_a_valid_module_is_accepted(module):
    for name in (*tasks.names(), "general"):
        assert load(name) is importlib.import_module(f"evaluation.tasks.{name}")
    drawing = {**RECIPE, "SOURCE": ..., "generate": lambda sizes, **_: {}}
    for content in (SOUND, {**SOUND, **RECIPE}, {**SOUND, **drawing}):
        assert module(**content) is load("mine")


def test_loading_the_tasks_loads_no_heavy_package():
    code = (
        "import sys; from evaluation.tasks import load, names; [load(n) for n in names()]; "
        "print([m for m in ('torch', 'torchmetrics', 'sklearn', 'datasets', 'nltk') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_that_is_wrong_with_a_module_is_named(module):
    for name in ("NAME", "TITLE", "METRICS", "PRIMARY", "FIELDS"):
        module(**{**SOUND, **RECIPE, name: ...})
        assert problems() == f"{name} is missing"
    for name, value in itertools.product(("score", "summarize", "make_item", "group"), (..., 3)):
        module(**{**SOUND, **RECIPE, name: value})
        assert problems() == f"the function {name} is missing"
    module(NAME="other", group=len, TITLE="t")
    assert problems().startswith("expected NAME = 'mine'") and problems().count(" is missing") == 6
    for changes, expected in (
        (
            {"PRIMARY": "mine_wrong"},
            "PRIMARY: expected a metric for which higher is better (mine_right), got 'mine_wrong'",
        ),
        ({"METRICS": {"mine_right": {"unit": "share", "direktion": "higher"}}}, "METRICS: expected description, dir"),
        ({"METRICS": {"mine_right": {**RIGHT, "direction": "lower"}}}, "PRIMARY: expected a metric for which higher"),
    ):
        module(**{**SOUND, **changes})
        assert problems().startswith(expected)
    module("sorting", **{**SOUND, "NAME": "sorting"})
    assert problems("sorting").startswith("sorting is a task of the retention suite")


# --- rows as on the hub ---

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72"
ROWS = {
    boolq: {"question": "is the sky blue", "passage": "The sky is blue.  By day.\n", "answer": True},
    qnli: {"question": "When did it start?", "sentence": "It started in 1912.", "label": 0, "idx": 4},
    gsm8k: {"question": " How many clips?\n", "answer": SOLUTION},
    alpaca: {"instruction": "Name a colour.", "input": " sky \n", "output": "Blue.\nOr red."},
    dolly: {"instruction": "Who?", "context": "Ada wrote it. ", "response": "Ada", "category": "closed_qa"},
}
MADE = {
    boolq: ("The sky is blue.  By day.\n\nQuestion: Is the sky blue?\nAnswer Yes or No.", "Yes",
            {"label": "Yes", "passage": digest("The sky is blue. By day.")}),
    qnli: ("Question: When did it start?\nSentence: It started in 1912.\n"
           "Does the sentence answer the question? Answer Yes or No.", "Yes",
           {"label": "entailment", "question": digest("When did it start?")}),
    gsm8k: (" How many clips?\n", "Natalia sold 48/2 = 24 clips in May.\nIn all 48+24 = 72 clips.\n#### 72",
            {"answer": "72"}),
    alpaca: ("Name a colour.\n\n sky \n", "Blue.\nOr red.", {"answer": "Blue.\nOr red."}),
    dolly: ("Who?\n\nAda wrote it. ", "Ada",
            {"answer": "Ada", "category": "closed_qa", "group": digest("Ada wrote it.")}),
}  # fmt: skip
TEXTS = [
    (task, name) for task in ROWS for name, own in task.FIELDS.items() if own.required
    and (task, name) not in ((boolq, "answer"), (qnli, "label"))
]  # fmt: skip


def made(task, **changes):
    return task.make_item("x", {**ROWS[task], **changes})


@pytest.mark.parametrize("task", ROWS, ids=lambda t: t.NAME)
def test_the_item_of_a_row_as_on_the_hub(task):
    prompt, completion, truth = MADE[task]
    item = task.make_item("id-1", ROWS[task])
    assert item == Item("id-1", task.NAME, prompt, completion, truth)
    assert task.score(item, item.completion).credit == 1 and Item.from_json(item.to_json()) == item
    splits = {boolq: "validation", qnli: "validation", gsm8k: "test"}
    assert load(task.NAME) is task and task.SOURCE.test == splits.get(task)
    empty = task.summarize([])
    assert list(empty) == list(task.METRICS) and next(iter(empty)) == task.PRIMARY
    assert all(math.isnan(value) for value in empty.values())


@pytest.mark.parametrize(("task", "name"), TEXTS)
def test_rows_without_text_are_refused(task, name):
    for value in (None, "", " \r\n\t", "\u200b", "\ufeff", 5, 0.5, float("nan"), True, ["a"], {}, b"a", "a \udc00"):
        with pytest.raises(RowError, match=rf"^{name}: expected text"):
            made(task, **{name: value})


@pytest.mark.parametrize(("task", "name"), [(alpaca, "input"), (dolly, "context"), (dolly, "category")])
def test_what_is_optional_may_be_missing_but_must_be_text(task, name):
    without = task.make_item("x", {k: v for k, v in ROWS[task].items() if k != name})
    assert name == "category" or without.prompt == ROWS[task]["instruction"]
    for value in (None, "", " \n", "\u200b"):
        assert made(task, **{name: value}) == without
    for value in (5, float("nan"), False, ["a"]):
        with pytest.raises(RowError, match=rf"^{name}: expected text, got"):
            made(task, **{name: value})


YES_NO = [
    (boolq, "answer", [True, "true", " True ", "TRUE", 1, "1", "yes", np.bool_(True), np.int64(1)],
     [False, "false", "False\n", 0, "0", "no", "NO", np.bool_(False), np.int64(0)],
     [None, "", "maybe", "y", 2, -1, 1.5, float("nan"), [True], {}, "true false"], "true, false, yes, no, 1, 0"),
    (qnli, "label", [0, "0", "entailment", np.int64(0)], [1, " 1 ", "Not_Entailment", np.int32(1)],
     [None, "", 2, 0.5, float("nan"), "yes", "neutral", True, [0], {}], "entailment, not_entailment, 0, 1"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "name", "yes", "no", "bad", "expected"), YES_NO)
def test_labels_of_rows(task, name, yes, no, bad, expected):
    assert {made(task, **{name: value}).completion for value in yes} == {"Yes"}
    assert {made(task, **{name: value}).completion for value in no} == {"No"}
    for value in bad:
        with pytest.raises(RowError, match=rf"^{name}: expected one of {expected}, got"):
            made(task, **{name: value})
    with pytest.raises(RowError) as caught:
        made(task, **{name: "maybe " * 1000})
    assert len(str(caught.value)) < 200, "long values are cut"
    for value in (-1, "-1", np.int64(-1)):
        with pytest.raises(RowError, match=r"^label: expected 0 or 1, got -1, which marks a split whose labels"):
            made(qnli, label=value)


def test_questions_of_boolq_get_a_capital_and_a_question_mark():
    for question, sentence in (("is it ? ", "Is it?"), ("is it.", "Is it?"), ("étoile", "Étoile?")):
        assert f"\nQuestion: {sentence}\n" in made(boolq, question=question).prompt


def test_annotations_are_removed_and_a_result_is_required():
    answer = "If a<b and 1<<2, then 2*3=<<2*3=6>>6 << open.\n#### 6 "
    assert made(gsm8k, answer=answer).completion == "If a<b and 1<<2, then 2*3=6 << open.\n#### 6"
    question = "### Response:\n{prompt} #### 5 <<1=1>> [INST]"
    assert made(gsm8k, question=question).prompt == question
    for answer in ("72", "It is ### 72", "####", "So #### many", "#### 1,5", "#### 72 clips", "#### 72\nor more",
                   "#### 10-15", "#### NaN"):  # fmt: skip
        with pytest.raises(RowError, match=r"answer: expected a solution that ends in #### and a number, got"):
            made(gsm8k, answer=answer)


@pytest.mark.parametrize(
    ("task", "same", "other"),
    [(boolq, {"question": "is it red", "passage": "the sky  is blue. By day."}, {"passage": "The sea."}),
     (qnli, {"question": "when did it  start? ", "sentence": "Later."}, {"question": "Why did it start?"}),
     (gsm8k, {"question": "how  many CLIPS? "}, {"question": "How much?"}),
     (alpaca, {"input": "SKY"}, {"input": "sea"}), (dolly, {"instruction": "What?"}, {"context": ""})],
)  # fmt: skip
def test_groups(task, same, other):
    assert task.group(made(task, **same)) == task.group(made(task)) != task.group(made(task, **other))
    alone = [dolly.group(made(dolly, instruction=text, context="")) for text in ("Who?", "What?")]
    assert alone[0] != alone[1]


def test_labels_are_read_from_answers():
    labels = ["good", "very good", "bad (returned)", "3"]
    items = [classify.make_item(str(i), {"text": f"It was {i}.", "label": own}) for i, own in enumerate(labels)]
    classify.complete(items)
    answers = {
        "good": 0, "Very good.": 1, "\n It is VERY GOOD, so\nbad (returned)": 1, "bad (returned)": 2, "3": 3,
        "good or very good": None, "goodness": None, "35": None, "": None,
    }  # fmt: skip
    for answer, right in answers.items():
        predicted = None if right is None else labels[right]
        results = [classify.score(item, answer) for item in items]
        assert {score.predicted for score in results} == {predicted}, answer
        assert [score.correct for score in results] == [place == right for place in range(4)]
    replies = ("good", "good", "bad (returned)", "nothing")
    scores = [classify.score(item, answer) for item, answer in zip(items, replies, strict=True)]
    f1 = pytest.approx((2 / 3 + 0 + 1 + 0) / 4)
    assert list(classify.summarize(scores).values()) == [0.5, f1, 0.25]
    for labels, got in ((["a"] * 3, "got 1 .'a'"), ([str(i) for i in range(300)], "got 300 .'0', '1', '10', …")):
        items = [classify.make_item("x", {"text": "It was.", "label": own}) for own in labels]
        with pytest.raises(EvaluationError, match=f"expected a column of 2 to 200 different labels, {got}"):
            classify.complete(items)
    items = [classify.make_item("x", {"text": "It was.", "label": own}) for own in (1, 1.0, "1", -1, 4.5, True)]
    assert [item.completion for item in items] == ["1", "1", "1", "-1", "4.5", "True"]
    items += [classify.make_item("x", {"text": "It was.", "label": "true"})]
    with pytest.raises(EvaluationError, match="got 'True' and 'true'"):
        classify.complete(items)
    for label, reason in ((float("nan"), "expected text"), (None, "expected text"), ("a\nb", "one line")):
        with pytest.raises(RowError, match=reason):
            classify.make_item("x", {"text": "It was.", "label": label})


@pytest.mark.parametrize(
    ("labels", "answers"),
    [
        (["0", "0.5"], {"0.25": None, "0.50": "0.5", "It is 0.": "0", "0,5": None}),
        (["-1", "0", "1"], {"\u22121": "-1", "\u2212 1": "-1", "-1.0": "-1", "1st": "1", "0 or 1": None, "10": None}),
        (["1", "2", "level 1"], {"Level 1": "level 1", "-2": None, "3/2": None, "2 of 5": "2"}),
        (["café", "té verde"], {"cafe\u0301!": "café", "té\u00a0verde": "té verde", "ca\u200bfé": "café"}),
        (["µg", "mg"], {"μg": "µg", "MG": "mg"}),
        (["18-25", "26-35"], {"18-25": "18-25", "118-25": None}),
    ],
)
def test_a_label_is_what_it_means_and_how_it_looks(labels, answers):
    assert {answer: classify.read_label(answer, labels) for answer in answers} == answers


def test_labels_that_look_alike_are_one_or_refused():
    def complete(*labels):
        items = [classify.make_item("x", {"text": "It was.", "label": label}) for label in labels]
        classify.complete(items)
        return items[0].truth["labels"]

    for twin in ("cafe\u0301", "caf\u00e9", "caf\u200b\u00e9", "\ufeffcaf\u00e9\u00a0"):
        assert complete("caf\u00e9", twin, "tea") == ["caf\u00e9", "tea"]
    assert complete("ice\u00a0tea", "ice tea", "tea") == ["ice tea", "tea"]
    for one, other in (("\u00b5g", "\u03bcg"), ("1", "1.0"), ("-1", "\u22121"), ("\uff21", "A")):
        with pytest.raises(EvaluationError) as caught:
            complete(one, other)
        assert ascii(one) in str(caught.value) and ascii(other) in str(caught.value)


def test_short_answers_are_numbers_or_words():
    def right(truth, answer):
        return exact.score(exact.make_item("x", {"question": "What?", "answer": truth}), answer).correct

    for truth, answer in ((18, "It makes $18.00."), ("1,234", "1234"), (0.75, "#### 3/4"), ("-5", "so -5")):
        assert right(truth, answer)
    for value, written in (
        (0.1, "0.1"), (1234567890123456.0, "1234567890123456"), (1e16, "10000000000000000"), (18.0, "18"),
        (Decimal("12.500000"), "12.5"), (Decimal("1200"), "1200"), (Decimal("1e30"), "1e+30"), (-0.00001, "-0.00001"),
        (date(2024, 1, 5), "2024-01-05"), (time(8, 30), "08:30:00"), (timedelta(hours=1), "1:00:00"), (True, "True"),
    ):  # fmt: skip
        assert exact.make_item("x", {"question": "What?", "answer": value}).completion == written
    assert right("Port Louis", " port  louis.") and right(12345678901234567, "12345678901234567")
    assert not right(12345678901234567, "12345678901234568") and right(10**400, str(10**400))
    assert not any(right(truth, answer) for truth, answer in ((18, "18 or 19"), ("Paris", "Paris, France"), (2, "two")))
    scores = [exact.score(exact.make_item("x", {"question": "What?", "answer": 2}), text) for text in ("2", "3", "?")]
    assert exact.summarize(scores) == {"exact_match": pytest.approx(1 / 3), "exact_unparseable": pytest.approx(1 / 3)}


def test_instructions_are_scored_like_alpaca():
    row = {"instruction": "Name it.", "input": "sky", "output": "Blue."}
    ours, theirs = instruct.make_item("x", row), alpaca.make_item("x", row)
    assert (ours.task, replace(ours, task="alpaca")) == ("instruct", theirs)
    assert instruct.summarize([instruct.score(ours, "Blue")])["instruct_rouge_l"] == 1


# --- air quality ---

ALL = list(epa.POLLUTANTS)


@pytest.fixture(scope="module")
def splits():
    return aqi.generate({"train": 900, "valid": 60, "test": 300}, seed=0, pollutants=ALL, max_pollutants=3)


def test_truth_is_epas(splits):
    for item in splits["test"]:
        readings = item.truth["readings"]
        assert item.truth["aqi"] == epa.aqi(readings)
        assert item.completion == f"{epa.category(epa.aqi(readings))}: {epa.aqi(readings)}"
        right = aqi.score(item, item.completion)
        assert right.exact and right.correct and right.label_agrees
        for key, value in readings.items():
            assert f"{value} {epa.POLLUTANTS[key].unit}" in item.prompt
        assert item.prompt.startswith("Predict AQI given:")


def test_items_are_of_many_kinds_the_same_for_the_same_seed_and_in_one_split_each(splits):
    keys = {split: {aqi.item_key(item.truth["readings"]) for item in items} for split, items in splits.items()}
    for a, b in itertools.combinations(keys, 2):
        assert not keys[a] & keys[b]
    assert len(keys["test"]) == 300 and len(keys["valid"]) == 60 and len(keys["train"]) > 700  # none twice in tests
    items = splits["train"]
    assert len({item.prompt for item in items}) == 900
    sizes = {"train": 900, "valid": 60, "test": 300}
    same, other = (aqi.generate(sizes, seed=seed, pollutants=ALL, max_pollutants=3) for seed in (0, 1))
    assert same == splits and other["test"] != splits["test"]
    counts = aqi.facts(items)["test_categories"]
    assert max(counts.values()) < 1.4 * min(counts.values())
    assert {len(i.truth["readings"]) for i in items} == {1, 2, 3}
    assert {k for i in items for k in i.truth["readings"]} == set(ALL)
    assert len({re.sub(r"[\d.]+", "#", i.prompt) for i in items}) > 100
    with pytest.raises(EvaluationError, match="expected 300 different test items, got"):
        aqi.generate({"train": 10, "test": 300}, seed=0, pollutants=["pm10"], max_pollutants=1)


def item(index):
    return Item("x", "aqi", "", "", {"aqi": index, "category": epa.category(index)})


def test_an_index_is_read():
    for answer, predicted in (
        ("126 (Unhealthy for Sensitive Groups)", 126), ("The AQI is 126.", 126), ("AQI: 126, category Unhealthy", 126),
        ("With PM2.5 at 35.9 and PM10 of 60, the AQI is 102", 102), ("  7\n", 7), ("500", 500), ("0", 0),
        ("35.9", None), ("35,9", None), ("501", None), ("7812", None), ("-12", None), ("PM10", None), ("8h", None),
        ("", None), ("Moderate", None), ("９９", None),
    ):  # fmt: skip
        assert aqi.parse(answer) == predicted, answer


def test_the_number_decides_the_category():
    right = aqi.score(item(126), "150 (Unhealthy for Sensitive Groups)")
    assert right.correct and not right.exact and right.abs_error == 24 and right.label_agrees
    wrong = aqi.score(item(126), "151 (Unhealthy for Sensitive Groups)")
    assert not wrong.correct and not wrong.label_agrees
    nothing = aqi.score(item(126), "Unhealthy for Sensitive Groups")
    assert not nothing.correct and nothing.predicted is None and nothing.abs_error is None
    named = {"very unhealthy": "Very Unhealthy", "unhealthy for sensitive groups": epa.CATEGORIES[2], "bad": None}
    assert {text: aqi.named_category(f"it is {text}") for text in named} == named
    scores = [aqi.score(item(126), a) for a in ("126 (Unhealthy for Sensitive Groups)", "130", "200", "none")]
    expected = dict(zip(aqi.METRICS, (0.5, 0.25, 0.5, (0 + 4 + 74) / 3, 0.25, 0.25), strict=True))
    assert aqi.summarize(scores) == pytest.approx(expected)
    assert all(math.isnan(v) for v in aqi.summarize([]).values())


# --- general questions ---


def _solve(name, prompt):
    """The right answer worked out from the prompt's text alone, independently of the generator."""
    n = [float(x) if "." in x else int(x) for x in re.findall(r"\d+\.\d+|\d+", prompt)]
    words = prompt.rsplit(": ", 1)[-1].split()
    if name == "reading_values":
        listed, asked = re.fullmatch(r"Given: (.*)\. What is (.*)\?", prompt).groups()
        pairs = dict(re.fullmatch(r"(\S+?)(?: =|:)? (\S+) \S+", part).groups() for part in listed.split(", "))
        return pairs.get(asked, "not given")
    return {
        "addition": lambda: str(n[0] + n[1]),
        "larger": lambda: str(max(n)),
        "sorting": lambda: " ".join(map(str, sorted(n))),
        "copying": lambda: " ".join(words),
        "copying_numbers": lambda: " ".join(words),
        "rounding": lambda: str(int(n[0] + 0.5)),
        "truncating": lambda: str(int(n[0])),
        "even_or_odd": lambda: "odd" if n[0] % 2 else "even",
        "within_range": lambda: "yes" if n[1] <= n[0] <= n[2] else "no",
        "last_word": lambda: words[0] if "first" in prompt else words[-1],
    }[name]()


def test_general_answers_are_right_and_scored_by_their_text():
    with pytest.raises(EvaluationError, match="Lower prepare_data.retention_items_per_task"):
        general.retention_items(300, seed=0)
    items = general.retention_items(25, seed=3)
    assert {i.task for i in items} == set(general.GENERAL_TASKS)
    for it in items:
        assert _solve(it.task, it.prompt) == it.completion, it.prompt
    it = Item("r", "addition", "What is 40 + 2?", "42", {"answer": "42"})
    answers = {"42": True, " 42. ": True, "42\n": True, "4 2": False, "43": False, "": False}
    assert {answer: general.score(it, answer).correct for answer in answers} == answers
    assert tasks.render("A{prompt}B", "x{prompt}y") == "Ax{prompt}yB", "the prompt is put in once"


def test_the_suite_overlaps_neither_training_nor_aqi(splits):
    suite = {i.prompt for i in general.retention_items(30, seed=0)}
    assert len(suite) == 30 * len(general.GENERAL_TASKS)
    trained = [(p, a) for _, p, a in itertools.islice(general.questions(0, held_out=False), 20_000)]
    assert not suite & {p for p, _ in trained} and not suite & {it.prompt for it in splits["train"]}
    text = " ".join(p + a for p, a in trained)
    assert not re.search(r"AQI|PM2|PM10|O3|SO2|NO2|\bCO\b|ozone|pollut|Predict", text)


def test_the_example_in_the_readme_is_right():
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    truth = epa.aqi({"pm25": "40.0"})
    assert text.count("Predict AQI given: PM2.5 40.0 µg/m³") == 2
    assert f'the right answer is "{aqi.completion(truth)}"' in text
