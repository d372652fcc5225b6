"""The general questions about pictures that train the vision base and make its retention suite."""

import itertools
import random
import re

import pytest

from evaluation import scoring
from evaluation.tasks import general as text_general
from evaluation.tasks import names
from evaluation.vision import general
from grit_vlm.data import references
from tests.evaluation.vision_calls import needle, recorded


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    return folder, general.retention_items(6, seed=0, size=32, folder=folder)


def test_items_have_pictures_and_are_scored_as_retention(suite):
    folder, items = suite
    assert len(items) == 6 * len(general.VISUAL_TASKS) == len({item.id for item in items})
    for item in items:
        assert (folder / references(item.prompt)[0]).is_file()
        task = scoring.task_of(item, "retention")
        assert task is text_general
        assert task.score(item, f" {item.completion}.").correct and not task.score(item, "zebra").correct


def test_names_are_no_other_tasks(suite):
    assert not set(general.VISUAL_TASKS) & {*names(), *text_general.GENERAL_TASKS}


def test_the_suite_is_kept_from_training_and_from_the_air(suite):
    held = [q for q in itertools.islice(general.questions(0, 32, held_out=True), 35)]
    trained = [q for q in itertools.islice(general.questions(0, 32, held_out=False), 700)]
    assert all(general.is_held_out(picture) for _, picture, _, _ in held)
    assert not any(general.is_held_out(picture) for _, picture, _, _ in trained)
    text = " ".join(f"{question} {answer}" for _, _, question, answer in trained)
    assert not re.search(r"(?i)AQI|PM2|PM10|\bair\b|category|pollut|ozone|index", text)


def test_all_answers_come_up():
    answers = {name: set() for name in general.VISUAL_TASKS}
    for name, _, _, answer in itertools.islice(general.questions(1, 32, held_out=False), 2100):
        answers[name].add(answer)
    assert answers["visual_colour"] == set(general.COLOURS) and answers["visual_shape"] == set(general.SHAPES)
    assert answers["visual_bar_count"] == set("12345") and answers["visual_tallest_bar"] == set("1234")
    assert answers["visual_bar_height"] == set("012345")
    assert answers["visual_needle"] == {str(n) for n in range(1, 11)}


def drawn(monkeypatch, task, seed):
    """A question, with the calls that drew its picture."""
    return recorded(monkeypatch, lambda: general.VISUAL_TASKS[task](random.Random(seed), 32))


@pytest.mark.parametrize("seed", range(8))
def test_answers_about_bars_follow_from_what_is_drawn(monkeypatch, seed):
    for task in ("visual_bar_count", "visual_tallest_bar", "visual_bar_height"):
        (_, _, answer), calls = drawn(monkeypatch, task, seed)
        bars = sorted((x0, y0) for name, x0, y0, *_ in calls if name == "rectangle")
        top = min(y for _, y in bars)
        lines = [start[1] for name, start, end, *_ in calls if name == "line" and start[1] == end[1] < 0.94]
        expected = {
            "visual_bar_count": len(bars),
            "visual_tallest_bar": [y for _, y in bars].index(top) + 1,
            "visual_bar_height": sum(y >= top for y in lines),
        }
        assert answer == str(expected[task]), task


@pytest.mark.parametrize("seed", range(8))
def test_the_needles_answer_follows_from_what_is_drawn(monkeypatch, seed):
    (_, _, answer), calls = drawn(monkeypatch, "visual_needle", seed)
    assert answer == str(int(needle(calls) * 10) + 1)


def test_training_examples_are_written(tmp_path):
    examples = general.training_examples(14, 0, 32, tmp_path)
    assert len(examples) == 14 == len(list((tmp_path / "images").iterdir()))
    assert all((tmp_path / references(prompt)[0]).is_file() and answer for prompt, answer in examples)
    assert examples[0][0].startswith("![](images/base-000000.png)\nWhich colour is the ")
