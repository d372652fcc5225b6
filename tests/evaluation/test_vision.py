"""Pictures drawn by code: the task aqi_vision, and the general questions that train the vision base."""

import itertools
import math
import random
import re
from collections import Counter
from decimal import Decimal

import pytest
from PIL import Image

from evaluation import EvaluationError, epa, vision
from evaluation.measure import answers as scoring
from evaluation.tasks import Item, aqi_vision, general, names
from evaluation.vision import Canvas, on_dial
from trainers.pictures import references

SIZES = {"train": 216, "valid": 36, "test": 72}


def recorded(monkeypatch, draw, *arguments):
    """What `draw` returns, and the names and arguments of all it drew."""
    calls = []
    for name in ("rectangle", "line", "disc", "polygon"):
        original = getattr(Canvas, name)
        monkeypatch.setattr(
            Canvas, name, lambda self, *a, _name=name, _draw=original: (calls.append((_name, *a)), _draw(self, *a))[1]
        )
    made = draw(*arguments)
    monkeypatch.undo()
    return made, calls


def needle(calls):
    """Where the needle of a dial points, as a share of the way from left to right: it is the last line."""
    (x, y), (tip_x, tip_y) = next(call[1:3] for call in reversed(calls) if call[0] == "line")
    return 1.0 - math.atan2(y - tip_y, tip_x - x) / math.pi


# --- the task ---


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, aqi_vision.generate(SIZES, seed=0, image_size=32, folder=folder)


def test_every_item_has_a_picture_and_epas_truth(made):
    folder, splits = made
    assert {split: len(made) for split, made in splits.items()} == SIZES
    for item in itertools.chain(*splits.values()):
        with Image.open(folder / references(item.prompt)[0]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (32, 32))
        assert item.task == "aqi_vision" and item.prompt.split("\n")[1] in aqi_vision.WORDINGS
        shown = item.truth["readings"]
        index = int(shown["aqi"]) if item.truth["kind"] == "gauge" else epa.aqi(shown)
        assert index == item.truth["aqi"] and epa.category(index) == item.truth["category"] == item.completion
        assert aqi_vision.score(item, item.completion).correct
        near_a_border = not 0.1 < aqi_vision.level(index) % 1.0 < 0.9
        assert item.truth["kind"] == "colour" or not near_a_border, item.truth
    assert len(list((folder / "images").iterdir())) == sum(SIZES.values())
    asked = Counter(item.prompt.split("\n")[1] for item in splits["train"])
    assert asked["What is the air quality category?"] > 0.7 * 216 and len(asked) == 3


def test_categories_and_kinds_are_equally_frequent_and_no_two_splits_show_the_same(made):
    def shown(item):
        if item.truth["kind"] == "gauge":
            return ("needle", item.truth["aqi"])
        heights = sorted(epa.sub_index(key, Decimal(value)) for key, value in item.truth["readings"].items())
        return ("bars", *heights)

    keys = {}
    for split, items in made[1].items():
        counts = aqi_vision.facts(items)["test_counts"]
        assert set(counts["categories"].values()) == {SIZES[split] // 6}
        assert set(counts["kinds"].values()) == {SIZES[split] // 3}
        pairs = Counter((item.truth["category"], item.truth["kind"]) for item in items)
        assert set(pairs.values()) == {SIZES[split] // 18}
        keys[split] = {shown(item) for item in items}
        assert sum(key[0] == "bars" for key in keys[split]) > 12
    for first, second in itertools.combinations(keys, 2):
        assert not keys[first] & keys[second]


def test_a_colour_picture_shows_epas_colour_of_the_category(monkeypatch):
    for number, index in enumerate((10, 60, 120, 180, 250, 400) * 4):
        _, calls = recorded(monkeypatch, aqi_vision.colour, random.Random(number), 32, index)
        (fill,) = {call[-1] for call in calls} - {vision.BLACK}
        colour = aqi_vision.COLOURS[epa.category_number(index)]
        brightness = max(fill) / max(colour)  # red and maroon have almost one hue and differ in it
        assert 0.79 < brightness <= 1 and fill == pytest.approx([part * brightness for part in colour], abs=1)


def test_bars_and_needles_show_the_index(monkeypatch):
    """Every category is one step of a bar, whichever breakpoints its pollutant has."""
    assert [aqi_vision.level(index) for index in (0, 50, 51, 100, 101, 150, 151, 200, 201, 300, 301, 500)] == [
        0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6
    ]  # fmt: skip
    assert aqi_vision.level(251) == pytest.approx(4 + 50 / 99)
    readings = {"pm25": Decimal("20.0"), "so2": Decimal(200), "co": Decimal("1.0")}
    _, calls = recorded(monkeypatch, aqi_vision.bars, random.Random(4), 32, readings)
    bars = [call for call in calls if call[0] == "rectangle"]
    for (_, _, y0, _, y1, _), (key, value) in zip(bars, readings.items(), strict=True):
        assert (y1 - y0) / 0.9 * 6 == pytest.approx(aqi_vision.level(epa.sub_index(key, value)))
    borders = sorted(start[1] for name, start, end, *_ in calls if name == "line" and start[1] == end[1] < 0.94)
    assert borders == pytest.approx([0.95 - 0.15 * number for number in range(6, 0, -1)])
    assert on_dial(0.5, 0.7, 0.4, 0.0) == pytest.approx((0.1, 0.7))
    assert on_dial(0.5, 0.7, 0.4, 0.5) == pytest.approx((0.5, 0.3))
    for index in (1, 20, 126, 250, 480):
        _, calls = recorded(monkeypatch, aqi_vision.gauge, random.Random(index), 32, index)
        assert needle(calls) == pytest.approx(index / 500)


def test_every_split_gets_gauges_of_every_category_and_tests_show_many_indices(tmp_path):
    dealt = aqi_vision.deal_indices({"train": 1000, "valid": 1, "test": 1}, seed=3)
    for split, categories in dealt.items():
        assert set(categories) == set(range(6)) and all(categories.values()), split
        for number, indices in categories.items():
            assert all(epa.category_number(index) == number for index in indices)
    assert not set(dealt["train"][0]) & set(dealt["test"][0])
    dealt = aqi_vision.deal_indices({"train": 3600, "valid": 360, "test": 540}, seed=0)
    assert {split: sum(map(len, shown.values())) for split, shown in dealt.items()} == {
        "train": 174, "valid": 70, "test": 103}  # fmt: skip
    assert min(len(indices) for indices in dealt["train"].values()) >= 17
    made = aqi_vision.generate({"train": 18, "valid": 360, "test": 540}, seed=0, image_size=16, folder=tmp_path)
    shown = [item.truth["aqi"] for item in made["test"] if item.truth["kind"] == "gauge"]
    assert len(shown) == 180 and len(set(shown)) > 85
    with pytest.raises(EvaluationError, match=r"expected bars of the category Good for the split test, found none"):
        aqi_vision.generate({"test": 1, "valid": 10**6}, seed=0, image_size=16, folder=tmp_path)


def test_the_one_category_that_is_named_is_read():
    for answer, named in (
        *((name, name) for name in epa.CATEGORIES),
        ("unhealthy for  sensitive\ngroups.", "Unhealthy for Sensitive Groups"),
        ("It is VERY UNHEALTHY", "Very Unhealthy"), ("The category is Good, good indeed", "Good"),
        ("Good or Moderate", None), ("Very Unhealthy, not Unhealthy", None), ("unhealthy for sensitive", "Unhealthy"),
        ("Goods", None), ("immoderate", None), ("126", None), ("red", None), ("", None),
    ):  # fmt: skip
        assert aqi_vision.parse(answer) == named, answer


def test_scores_count_the_categories_between():
    def score(truth, answer, kind="bars"):
        return aqi_vision.score(Item("x", "aqi_vision", "", truth, {"category": truth, "kind": kind}), answer)

    right = score("Hazardous", "hazardous")
    assert right.correct and right.exact and right.abs_error == 0 and right.credit == 1.0
    wrong = score("Hazardous", "Moderate")
    assert not wrong.correct and wrong.abs_error == 4 and wrong.predicted == "Moderate"
    nothing = score("Hazardous", "500")
    assert not nothing.correct and nothing.predicted is None and nothing.abs_error is None
    answers = ("Good", "Good", "colour"), ("Good", "Unhealthy"), ("Good", "Good"), ("Good", "")
    expected = dict(zip(aqi_vision.METRICS, (0.5, 1.0, 1 / 3, math.nan, 1.0, 0.25), strict=True))
    assert aqi_vision.summarize([score(*said) for said in answers]) == pytest.approx(expected, nan_ok=True)
    empty = aqi_vision.summarize([])
    assert list(empty) == list(aqi_vision.METRICS) and all(math.isnan(value) for value in empty.values())


# --- general questions ---


def test_items_have_pictures_and_are_scored_as_retention(tmp_path):
    items = vision.retention_items(6, seed=0, image_size=32, folder=tmp_path)
    assert len(items) == 6 * len(vision.VISUAL_TASKS) == len({item.id for item in items})
    assert not set(vision.VISUAL_TASKS) & {*names(), *general.GENERAL_TASKS}, "no other task is called so"
    for item in items:
        assert (tmp_path / references(item.prompt)[0]).is_file()
        task = scoring.task_of(item, "retention")
        assert task is general
        assert task.score(item, f" {item.completion}.").correct and not task.score(item, "zebra").correct


def test_the_suite_is_kept_from_training_and_from_the_air():
    held = itertools.islice(vision.questions(0, 32, held_out=True), 35)
    trained = list(itertools.islice(vision.questions(0, 32, held_out=False), 700))
    assert all(vision.is_held_out(picture) for _, picture, _, _ in held)
    assert not any(vision.is_held_out(picture) for _, picture, _, _ in trained)
    text = " ".join(f"{question} {answer}" for _, _, question, answer in trained)
    assert not re.search(r"(?i)AQI|PM2|PM10|\bair\b|category|pollut|ozone|index", text)


@pytest.mark.parametrize("seed", range(8))
def test_answers_follow_from_what_is_drawn(monkeypatch, seed):
    def drawn(task):
        (_, _, answer), calls = recorded(monkeypatch, vision.VISUAL_TASKS[task], random.Random(seed), 32)
        return answer, calls

    for task in ("visual_bar_count", "visual_tallest_bar", "visual_bar_height"):
        answer, calls = drawn(task)
        bars = sorted((x0, y0) for name, x0, y0, *_ in calls if name == "rectangle")
        top = min(y for _, y in bars)
        lines = [start[1] for name, start, end, *_ in calls if name == "line" and start[1] == end[1] < 0.94]
        expected = {
            "visual_bar_count": len(bars),
            "visual_tallest_bar": [y for _, y in bars].index(top) + 1,
            "visual_bar_height": sum(y >= top for y in lines),
        }
        assert answer == str(expected[task]), task
    answer, calls = drawn("visual_needle")
    assert answer == str(int(needle(calls) * 10) + 1)
