"""The AQI items, the general tasks and how answers are scored."""

import itertools
import re

import pytest

from evaluation import epa
from evaluation.tasks import Item, ItemError, aqi, general, render

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


def test_splits_share_no_readings(splits):
    keys = {split: {aqi.item_key(item.truth["readings"]) for item in items} for split, items in splits.items()}
    for a, b in itertools.combinations(keys, 2):
        assert not keys[a] & keys[b]
    assert len(keys["test"]) == 300 and len(keys["valid"]) == 60  # none twice there
    assert len({item.prompt for item in splits["train"]}) == 900
    assert len(keys["train"]) > 700


def test_seeded(splits):
    again = aqi.generate({"train": 900, "valid": 60, "test": 300}, seed=0, pollutants=ALL, max_pollutants=3)
    other = aqi.generate({"train": 900, "valid": 60, "test": 300}, seed=1, pollutants=ALL, max_pollutants=3)
    assert again == splits
    assert other["test"] != splits["test"]


def test_variety(splits):
    items = splits["train"]
    counts = aqi.category_counts(items)
    assert max(counts.values()) < 1.4 * min(counts.values())
    assert {len(i.truth["readings"]) for i in items} == {1, 2, 3}
    assert {k for i in items for k in i.truth["readings"]} == set(ALL)
    assert len({re.sub(r"[\d.]+", "#", i.prompt) for i in items}) > 100


def test_too_few_different_readings():
    with pytest.raises(ItemError, match="expected 5000 different test items, found"):
        aqi.generate({"train": 10, "test": 5000}, seed=0, pollutants=["pm10"], max_pollutants=1)


def item(index):
    return Item("x", "aqi", "", "", {"aqi": index, "category": epa.category(index)})


@pytest.mark.parametrize(
    ("answer", "predicted"),
    [
        ("126 (Unhealthy for Sensitive Groups)", 126),
        ("The AQI is 126.", 126),
        ("AQI: 126, category Unhealthy", 126),
        ("With PM2.5 at 35.9 and PM10 of 60, the AQI is 102", 102),
        ("  7\n", 7),
        ("500", 500),
        ("0", 0),
        ("35.9", None),
        ("35,9", None),
        ("501", None),
        ("7812", None),
        ("-12", None),
        ("PM10", None),
        ("8h", None),
        ("", None),
        ("Moderate", None),
        ("９９", None),
    ],
)
def test_parse(answer, predicted):
    assert aqi.parse(answer) == predicted


def test_score_goes_by_the_numbers_category():
    right = aqi.score(item(126), "150 (Unhealthy for Sensitive Groups)")
    assert right.correct and not right.exact and right.abs_error == 24 and right.label_agrees
    wrong = aqi.score(item(126), "151 (Unhealthy for Sensitive Groups)")
    assert not wrong.correct and not wrong.label_agrees
    nothing = aqi.score(item(126), "Unhealthy for Sensitive Groups")
    assert not nothing.correct and nothing.predicted is None and nothing.abs_error is None


def test_named_category_takes_the_longest():
    assert aqi.named_category("very unhealthy") == "Very Unhealthy"
    assert aqi.named_category("it is unhealthy for sensitive groups") == "Unhealthy for Sensitive Groups"
    assert aqi.named_category("bad") is None


def test_summary_by_hand():
    scores = [aqi.score(item(126), a) for a in ("126 (Unhealthy for Sensitive Groups)", "130", "200", "none")]
    summary = aqi.summarize(scores)
    assert summary == {
        "aqi_category_accuracy": 0.5,
        "aqi_exact": 0.25,
        "aqi_within_10": 0.5,
        "aqi_mae": pytest.approx((0 + 4 + 74) / 3),
        "aqi_unparseable": 0.25,
        "aqi_label_agrees": 0.25,
    }
    assert set(summary) == set(aqi.METRICS)
    assert all(v != v for v in aqi.summarize([]).values())


def _solve(name, prompt):
    """The right answer worked out from the prompt's text alone, independently of the generator."""
    n = [float(x) if "." in x else int(x) for x in re.findall(r"\d+\.\d+|\d+", prompt)]
    words = prompt.rsplit(": ", 1)[-1].split()
    match name:
        case "addition":
            return str(n[0] + n[1])
        case "larger":
            return str(max(n))
        case "sorting":
            return " ".join(map(str, sorted(n)))
        case "copying" | "copying_numbers":
            return " ".join(words)
        case "reading_values":
            listed, asked = re.fullmatch(r"Given: (.*)\. What is (.*)\?", prompt).groups()
            pairs = dict(re.fullmatch(r"(\S+?)(?: =|:)? (\S+) \S+", part).groups() for part in listed.split(", "))
            return pairs.get(asked, "not given")
        case "rounding":
            return str(int(n[0] + 0.5))
        case "truncating":
            return str(int(n[0]))
        case "even_or_odd":
            return "odd" if n[0] % 2 else "even"
        case "within_range":
            return "yes" if n[1] <= n[0] <= n[2] else "no"
        case "last_word":
            return words[0] if "first" in prompt else words[-1]
    raise AssertionError(name)


def test_general_answers_are_right():
    items = general.retention_items(25, seed=3)
    assert {i.task for i in items} == set(general.GENERAL_TASKS)
    for it in items:
        assert _solve(it.task, it.prompt) == it.completion, it.prompt


def test_the_suite_is_kept_from_training_and_from_aqi(splits):
    suite = {i.prompt for i in general.retention_items(30, seed=0)}
    assert len(suite) == 30 * len(general.GENERAL_TASKS)
    trained = {p for _, p, _ in itertools.islice(general.questions(0, held_out=False), 20_000)}
    assert not suite & trained
    assert not suite & {it.prompt for it in splits["train"]}
    text = " ".join(p + a for _, p, a in itertools.islice(general.questions(0, held_out=False), 20_000))
    assert not re.search(r"AQI|PM2|PM10|O3|SO2|NO2|\bCO\b|ozone|pollut|Predict", text)


@pytest.mark.parametrize(
    ("answer", "right"), [("42", True), (" 42. ", True), ("42\n", True), ("4 2", False), ("43", False), ("", False)]
)
def test_general_scoring(answer, right):
    it = Item("r", "addition", "What is 40 + 2?", "42", {"answer": "42"})
    assert general.score(it, answer).correct is right


def test_more_retention_questions_than_there_are():
    with pytest.raises(ItemError, match="lower prepare_data.retention_items_per_task"):
        general.retention_items(3000, seed=0)


def test_item_json_round_trip(splits):
    it = splits["test"][0]
    assert Item.from_json(it.to_json()) == it


def test_render_puts_the_prompt_in_once():
    assert render("A{prompt}B", "x{prompt}y") == "Ax{prompt}yB"
