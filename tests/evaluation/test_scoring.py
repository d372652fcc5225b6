"""Items × backend → samples and metrics."""

import types

import pytest

from evaluation import scoring
from evaluation.backends import Generation
from evaluation.tasks import Item, ItemError, aqi, general, gsm8k


class Parrot:
    """Answers from a table."""

    name, version, device_class = "parrot", "1", "cpu"

    def __init__(self, answers):
        self.answers = answers

    def generate(self, item_prompt, max_tokens, stop):
        return Generation(self.answers[item_prompt], 5, 2, 0, 10, 20, "stop")

    def generate_many(self, item_prompts, max_tokens, stop):
        for place, prompt in enumerate(item_prompts):
            yield place, self.generate(prompt, max_tokens, stop)

    def close(self):
        pass


def test_every_item_is_kept_and_counted():
    test = aqi.generate({"test": 12}, seed=0, pollutants=["pm25", "no2"], max_pollutants=1)["test"]
    suite = general.retention_items(2, seed=0)
    assert len(suite) == 22
    answers = {i.prompt: i.completion for i in [*test, *suite]}
    answers[test[0].prompt] = "no idea"
    answers[test[1].prompt] = "500" if test[1].truth["aqi"] < 300 else "0"
    wrong = [i for i in suite if i.task == "addition"][0]
    answers[wrong.prompt] = "nothing"
    scored = {s: scoring.ask(Parrot(answers), items, s, max_tokens=9, stop=[]) for s, items in
              (("test", test), ("retention", suite))}  # fmt: skip
    assert [row["item_id"] for row, _ in scored["test"]] == [i.id for i in test]
    assert [row["credit"] for row, _ in scored["test"]][:3] == [0.0, 0.0, 1.0]
    assert scored["test"][0][0]["predicted"] is None and scored["test"][0][0]["answer"] == "no idea"
    rows = scoring.metrics(
        aqi,
        [s for _, s in scored["test"]],
        [(i.task, s) for i, (_, s) in zip(suite, scored["retention"], strict=True)],
    )
    values = {r["name"]: (r["value"], r["n"]) for r in rows}
    assert values["aqi_category_accuracy"] == (10 / 12, 12)
    assert values["aqi_unparseable"] == (1 / 12, 12)
    assert values["retention/addition"] == (0.5, 2) and values["retention/sorting"] == (1.0, 2)
    assert values["retention_accuracy"] == (21 / 22, 22)
    assert set(scoring.metric_defs(aqi, rows)) == set(values)


def test_the_retention_suite_is_scored_by_its_own_module_whatever_its_tasks_are_called():
    item = Item("r", "gsm8k", "Repeat: #### 18", "#### 18", {"answer": "18"})
    (as_task,) = scoring.ask(Parrot({item.prompt: "It is 18"}), [item], "test", max_tokens=9, stop=[])
    (as_general,) = scoring.ask(Parrot({item.prompt: "It is 18"}), [item], "retention", max_tokens=9, stop=[])
    assert as_task[1].correct and not as_general[1].correct
    assert scoring.task_of(item, "test") is gsm8k and scoring.task_of(item, "retention") is general


def test_an_item_of_an_unknown_task_is_refused():
    with pytest.raises(ItemError, match="expected a task .*got 'gone'"):
        scoring.task_of(Item("x", "gone", "", ""), "test")


def test_answers_that_reached_the_limit_are_counted():
    def rows(tokens, limit):
        return [
            m
            for m in scoring.metrics(aqi, [], [], answer_tokens=tokens, max_tokens=limit)
            if m["name"] == "answers_cut"
        ]

    assert rows([8, 9, 10, None], 9) == [{"name": "answers_cut", "split": "test", "value": 2 / 3, "n": 3}]
    assert rows([8, 8], 9)[0]["value"] == 0
    assert rows([None, None], 9) == rows([], 9) == rows([9], None) == []
    meaning = scoring.metric_defs(aqi, rows([9], 9))["answers_cut"]
    assert (meaning["unit"], meaning["direction"]) == ("share", "lower") and "max_tokens" in meaning["description"]


def test_a_metric_that_its_task_does_not_describe_is_refused():
    task = types.SimpleNamespace(NAME="mine", METRICS={"mine_accuracy": aqi.METRICS[aqi.PRIMARY]})
    general_row = {"name": "retention/sorting"}
    found = scoring.metric_defs(task, [{"name": "mine_accuracy"}, general_row])
    assert found["retention/sorting"]["description"] == "Share of right answers in the general task sorting"
    for name in ("mine_f1", "mine/f1", "retention/"):
        with pytest.raises(ItemError, match=f"mine: expected every metric of summarize in METRICS, got '{name}'"):
            scoring.metric_defs(task, [general_row, {"name": name}])
