"""What a module must provide to be a task."""

import importlib
import sys
import types

import pytest

from evaluation import tasks
from evaluation.tasks import Field, ItemError, Source, is_recipe, load

SOUND = {
    "NAME": "mine",
    "TITLE": "Mine",
    "PRIMARY": "mine_right",
    "METRICS": {"mine_right": {"unit": "share", "direction": "higher", "description": "Right ones"}},
    "score": lambda item, answer: None,
    "summarize": lambda scores: {},
}
RECIPE = {
    "SOURCE": Source("o/n"),
    "FIELDS": {"a": Field("a", True, "a")},
    "make_item": lambda item_id, row: None,
    "group": lambda item: item.prompt,
}


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


def said(name="mine"):
    with pytest.raises(ItemError) as caught:
        load(name)
    start = f"evaluation/tasks/{name}.py is no task: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_every_task_that_comes_with_the_project_is_sound():
    for name in (*tasks.names(), "general"):
        assert load(name) is importlib.import_module(f"evaluation.tasks.{name}")


def test_a_sound_module_is_taken(module):
    made = module(**SOUND)
    assert load("mine") is made and not is_recipe(made)
    assert is_recipe(load(module(**SOUND, **RECIPE).NAME))


@pytest.mark.parametrize("name", ["NAME", "TITLE", "METRICS", "PRIMARY", "SOURCE", "FIELDS"])
def test_missing_values_are_named(module, name):
    module(**{**SOUND, **RECIPE, name: ...})
    assert said() == f"{name} is missing"


@pytest.mark.parametrize("name", ["score", "summarize", "make_item", "group"])
def test_missing_functions_are_named(module, name):
    for value in (..., 3):
        module(**{**SOUND, **RECIPE, name: value})
        assert said() == f"the function {name} is missing"


def test_all_that_is_missing_is_named_at_once(module):
    module(NAME="other", group=len, TITLE="t")
    assert said() == (
        "expected NAME = 'mine', as the file is called, got 'other'; METRICS is missing; PRIMARY is missing; "
        "SOURCE is missing; FIELDS is missing; the function score is missing; the function summarize is missing; "
        "the function make_item is missing"
    )


def test_values_that_do_not_go_together(module):
    module(**{**SOUND, "PRIMARY": "mine_wrong"})
    assert said() == "PRIMARY: expected one of METRICS (mine_right), got 'mine_wrong'"
    module(**{**SOUND, "METRICS": {"mine_right": {"unit": "share", "direktion": "higher"}}})
    assert said() == "METRICS: expected description, direction, unit of mine_right, got direktion, unit"
    module(**{**SOUND, "METRICS": {"mine_right": {**SOUND["METRICS"]["mine_right"], "direction": "lower"}}})
    assert said() == "PRIMARY: expected a metric of which more is better, as of credit, got mine_right"


def test_a_general_tasks_name_is_refused(module):
    module("sorting", **{**SOUND, "NAME": "sorting"})
    assert said("sorting") == "sorting is a task of the retention suite; rename the file"
