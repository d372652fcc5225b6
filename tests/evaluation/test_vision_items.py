"""Pictures of the air quality, and the items that ask about them."""

import itertools
import random
from collections import Counter
from decimal import Decimal

import numpy
import pytest
from PIL import Image

from evaluation import epa
from evaluation.tasks import ItemError, aqi_vision
from evaluation.vision import air, items
from evaluation.vision.canvas import on_dial
from grit_vlm.data import references
from tests.evaluation.vision_calls import needle, recorded

SIZES = {"train": 216, "valid": 36, "test": 72}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, items.generate(SIZES, seed=0, image_size=32, folder=folder)


def pixels(folder, item):
    with Image.open(folder / references(item.prompt)[0]) as picture:
        assert picture.mode == "RGB"
        return numpy.asarray(picture).astype(int)


def test_every_item_has_a_picture_and_epas_truth(made):
    folder, splits = made
    assert {split: len(made) for split, made in splits.items()} == SIZES
    for item in itertools.chain(*splits.values()):
        assert pixels(folder, item).shape == (32, 32, 3)
        assert item.task == "aqi_vision" and item.prompt.split("\n")[1] in items.WORDINGS
        shown = item.truth["readings"]
        index = int(shown["aqi"]) if item.truth["kind"] == "gauge" else epa.aqi(shown)
        assert index == item.truth["aqi"] and epa.category(index) == item.truth["category"] == item.completion
        assert aqi_vision.score(item, item.completion).correct
    assert len(list((folder / "images").iterdir())) == sum(SIZES.values())
    asked = Counter(item.prompt.split("\n")[1] for item in splits["train"])
    assert asked["What is the air quality category?"] > 0.7 * 216 and len(asked) == 3


def test_categories_and_kinds_are_equally_frequent(made):
    for split, made_items in made[1].items():
        counts = items.counts(made_items)
        assert set(counts["categories"].values()) == {SIZES[split] // 6}
        assert set(counts["kinds"].values()) == {SIZES[split] // 3}
        pairs = Counter((item.truth["category"], item.truth["kind"]) for item in made_items)
        assert set(pairs.values()) == {SIZES[split] // 18}


def test_no_two_splits_show_the_same(made):
    def shown(item):
        if item.truth["kind"] == "gauge":
            return ("needle", item.truth["aqi"])
        heights = sorted(epa.sub_index(key, Decimal(value)) for key, value in item.truth["readings"].items())
        return ("bars", *heights)

    keys = {split: {shown(item) for item in split_items} for split, split_items in made[1].items()}
    for first, second in itertools.combinations(keys, 2):
        assert not keys[first] & keys[second]
    assert min(len({key for key in shown if key[0] == "bars"}) for shown in keys.values()) > 12


def test_the_same_seed_makes_the_same_bytes(made, tmp_path):
    folder, splits = made
    (tmp_path / "a").mkdir()
    again = items.generate(SIZES, seed=0, image_size=32, folder=tmp_path / "a")
    assert again == splits
    for item in splits["test"]:
        file = references(item.prompt)[0]
        assert (tmp_path / "a" / file).read_bytes() == (folder / file).read_bytes()
    (tmp_path / "b").mkdir()
    assert items.generate(SIZES, seed=1, image_size=32, folder=tmp_path / "b")["test"] != splits["test"]


def nearest_colour(values):
    """The category whose colour most of the picture's saturated pixels are nearest to, brightness aside."""
    flat = values.reshape(-1, 3)
    flat = flat[flat.max(1) - flat.min(1) > 70]
    ideal = numpy.array(air.COLOURS, dtype=float)
    ideal /= numpy.linalg.norm(ideal, axis=1, keepdims=True)
    directions = flat / numpy.linalg.norm(flat, axis=1, keepdims=True)
    best = Counter((directions @ ideal.T).argmax(1).tolist())
    # Red and maroon have almost one direction; they differ in brightness.
    number = best.most_common(1)[0][0]
    if number in (3, 5):
        number = 3 if numpy.median(flat.max(1)) > 165 else 5
    return epa.CATEGORIES[number]


def test_a_colour_picture_shows_epas_colour_of_the_category(made):
    folder, splits = made
    for item in splits["train"]:
        if item.truth["kind"] == "colour":
            assert nearest_colour(pixels(folder, item)) == item.truth["category"], item.id


def test_levels_are_one_step_for_each_category():
    assert [air.level(index) for index in (0, 50, 51, 100, 101, 150, 151, 200, 201, 300, 301, 500)] == [
        0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6
    ]  # fmt: skip
    assert air.level(251) == pytest.approx(4 + 50 / 99)


def test_bars_are_as_high_as_their_own_breakpoints_say(monkeypatch):
    readings = {"pm25": Decimal("20.0"), "so2": Decimal(200), "co": Decimal("1.0")}
    _, calls = recorded(monkeypatch, lambda: air.bars(random.Random(4), 32, readings))
    bars = [call for call in calls if call[0] == "rectangle"]
    assert len(bars) == 3
    for (_, _, y0, _, y1, _), (key, value) in zip(bars, readings.items(), strict=True):
        assert (y1 - y0) / 0.9 * 6 == pytest.approx(air.level(epa.sub_index(key, value)))
    borders = sorted(start[1] for name, start, end, *_ in calls if name == "line" and start[1] == end[1] < 0.94)
    assert borders == pytest.approx([0.95 - 0.15 * number for number in range(6, 0, -1)])


def test_a_gauges_needle_points_at_the_index(monkeypatch):
    assert on_dial(0.5, 0.7, 0.4, 0.0) == pytest.approx((0.1, 0.7))
    assert on_dial(0.5, 0.7, 0.4, 0.5) == pytest.approx((0.5, 0.3))
    for index in (1, 20, 126, 250, 480):
        _, calls = recorded(monkeypatch, lambda index=index: air.gauge(random.Random(index), 32, index))
        assert needle(calls) == pytest.approx(index / 500)


def test_indices_near_a_border_are_not_shown(made):
    for item in itertools.chain(*made[1].values()):
        if item.truth["kind"] != "colour":
            assert 0.1 < air.level(item.truth["aqi"]) % 1.0 < 0.9, item.truth


def test_every_split_gets_gauges_of_every_category():
    dealt = items.deal_indices({"train": 1000, "valid": 1, "test": 1}, seed=3)
    for split, categories in dealt.items():
        assert set(categories) == set(range(6)) and all(categories.values()), split
        for number, indices in categories.items():
            assert all(epa.category_number(index) == number for index in indices)
    assert not set(dealt["train"][0]) & set(dealt["test"][0])


def test_gauges_of_the_test_split_show_many_indices(tmp_path):
    sizes = {"train": 3600, "valid": 360, "test": 540}
    dealt = items.deal_indices(sizes, seed=0)
    assert {split: sum(map(len, shown.values())) for split, shown in dealt.items()} == {
        "train": 174, "valid": 70, "test": 103
    }  # fmt: skip
    made = items.generate({**sizes, "train": 18, "valid": 360}, seed=0, image_size=16, folder=tmp_path)
    shown = [item.truth["aqi"] for item in made["test"] if item.truth["kind"] == "gauge"]
    assert len(shown) == 180 and len(set(shown)) > 85
    assert min(len([index for index in categories if index]) for categories in dealt["train"].values()) >= 17


def test_a_split_without_bars_of_a_category_is_refused(tmp_path):
    with pytest.raises(ItemError, match=r"expected bars of the category Good for the split test, found none with pm25"):
        items.generate({"test": 1, "valid": 10**6}, seed=0, image_size=16, folder=tmp_path, pollutants=["pm25"])


def test_pollutants_must_reach_every_category(tmp_path):
    with pytest.raises(ItemError, match=r"none that reaches Hazardous"):
        items.generate({"test": 6}, seed=0, image_size=32, folder=tmp_path, pollutants=["o3_8h"])
