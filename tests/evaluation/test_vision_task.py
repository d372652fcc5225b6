"""The task aqi_vision: how answers about pictures are scored."""

import math

import pytest

from evaluation import epa
from evaluation.tasks import Item, aqi_vision, is_recipe, load


def item(category, kind="bars"):
    return Item("x", "aqi_vision", "", category, {"category": category, "kind": kind})


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        *((name, name) for name in epa.CATEGORIES),
        ("unhealthy for  sensitive\ngroups.", "Unhealthy for Sensitive Groups"),
        ("It is VERY UNHEALTHY", "Very Unhealthy"),
        ("The category is Good, good indeed", "Good"),
        ("Good or Moderate", None),
        ("Very Unhealthy, not Unhealthy", None),
        ("unhealthy for sensitive", "Unhealthy"),
        ("Goods", None),
        ("immoderate", None),
        ("126", None),
        ("red", None),
        ("", None),
    ],
)
def test_parse(answer, named):
    assert aqi_vision.parse(answer) == named


def test_scores_count_the_categories_between():
    right = aqi_vision.score(item("Hazardous"), "hazardous")
    assert right.correct and right.exact and right.abs_error == 0 and right.credit == 1.0
    wrong = aqi_vision.score(item("Hazardous"), "Moderate")
    assert not wrong.correct and wrong.abs_error == 4 and wrong.predicted == "Moderate"
    nothing = aqi_vision.score(item("Hazardous"), "500")
    assert not nothing.correct and nothing.predicted is None and nothing.abs_error is None


def test_summary_by_hand():
    answers = [
        ("Good", "colour", "Good"),
        ("Good", "bars", "Unhealthy"),
        ("Good", "bars", "Good"),
        ("Good", "bars", ""),
    ]
    summary = aqi_vision.summarize([aqi_vision.score(item(truth, kind), given) for truth, kind, given in answers])
    assert math.isnan(summary.pop("aqi_vision_gauge_accuracy"))
    assert summary == {
        "aqi_vision_accuracy": 0.5,
        "aqi_vision_colour_accuracy": 1.0,
        "aqi_vision_bars_accuracy": pytest.approx(1 / 3),
        "aqi_vision_distance": 1.0,
        "aqi_vision_unparseable": 0.25,
    }
    empty = aqi_vision.summarize([])
    assert list(empty) == list(aqi_vision.METRICS) and all(math.isnan(value) for value in empty.values())


def test_it_is_a_task_that_makes_its_items_itself():
    assert load("aqi_vision") is aqi_vision and not is_recipe(aqi_vision)
