"""Items × engine → samples and metrics, and half-done scoring on disk."""

import types

import pytest

from evaluation import EvaluationError
from evaluation.measure import answers
from evaluation.measure.answers import Journal
from evaluation.tasks import Item, aqi, general
from export.engines.engine import EngineError, Generation

ITEMS = [Item(f"i{n}", "addition", f"{n} + 1", f"{n + 1}", {"answer": f"{n + 1}"}) for n in range(10)]


class Told:
    """Answers from a table or adds; finishes the last item first, and gives up after some."""

    name = "told"

    def __init__(self, table=None, gives_up_after=100):
        self.table, self.left, self.asked = table, gives_up_after, []

    def generate_many(self, prompts, max_tokens, stop):
        for place in reversed(range(len(prompts))):
            if self.left == 0:
                raise EngineError("gone")
            self.left -= 1
            self.asked.append(prompts[place])
            text = self.table[prompts[place]] if self.table else str(int(prompts[place].split()[0]) + 1)
            yield place, Generation(text, 5, 1, 0, None, None, "stop")


def ask(engine, journal=None, split="test", items=ITEMS):
    return answers.ask(engine, items, split, max_tokens=4, stop=[], journal=journal)


def test_every_item_is_kept_and_counted():
    test = aqi.generate({"test": 12}, seed=0, pollutants=["pm25", "no2"], max_pollutants=1)["test"]
    suite = general.retention_items(2, seed=0)
    assert len(suite) == 22
    table = {i.prompt: i.completion for i in [*test, *suite]}
    table[test[0].prompt] = "no idea"
    table[test[1].prompt] = "500" if test[1].truth["aqi"] < 300 else "0"
    wrong = [i for i in suite if i.task == "addition"][0]
    table[wrong.prompt] = "nothing"
    scored = {s: ask(Told(table), None, s, items) for s, items in (("test", test), ("retention", suite))}
    assert [row["item_id"] for row, _ in scored["test"]] == [i.id for i in test]
    assert [row["credit"] for row, _ in scored["test"]][:3] == [0.0, 0.0, 1.0]
    assert scored["test"][0][0]["predicted"] is None and scored["test"][0][0]["answer"] == "no idea"
    told = [(i.task, s) for i, (_, s) in zip(suite, scored["retention"], strict=True)]
    rows = answers.metrics(aqi, [s for _, s in scored["test"]], told)
    values = {r["name"]: (r["value"], r["n"]) for r in rows}
    assert values["aqi_category_accuracy"] == (10 / 12, 12)
    assert values["aqi_unparseable"] == (1 / 12, 12)
    assert values["retention/addition"] == (0.5, 2) and values["retention/sorting"] == (1.0, 2)
    assert values["retention_accuracy"] == (21 / 22, 22)
    assert set(answers.metric_defs(aqi, rows)) == set(values)


def test_the_retention_suite_is_scored_by_its_own_module_whatever_its_tasks_are_called():
    item = Item("r", "gsm8k", "Repeat: #### 18", "#### 18", {"answer": "18"})
    told = {item.prompt: "It is 18"}
    (as_task,), (as_general,) = (ask(Told(told), None, split, [item]) for split in ("test", "retention"))
    assert as_task[1].correct and not as_general[1].correct
    with pytest.raises(EvaluationError, match="expected a task .*got 'gone'"):
        answers.task_of(Item("x", "gone", "", ""), "test")


def test_answers_that_were_cut_are_counted():
    def rows(*reasons):
        made = answers.metrics(aqi, [], [], finish_reasons=reasons)
        return [m for m in made if m["name"] == "answers_cut"]

    assert rows("stop", "length", "length", None) == [{"name": "answers_cut", "split": "test", "value": 2 / 3, "n": 3}]
    assert rows("stop", "stop")[0]["value"] == 0
    assert rows(None, None) == rows() == []
    meaning = answers.metric_defs(aqi, rows("length"))["answers_cut"]
    assert (meaning["unit"], meaning["direction"]) == ("share", "lower") and "max_tokens" in meaning["description"]


def test_a_metric_that_its_task_does_not_describe_is_refused():
    task = types.SimpleNamespace(NAME="mine", METRICS={"mine_accuracy": aqi.METRICS[aqi.PRIMARY]})
    general_row = {"name": "retention/sorting"}
    results = answers.metric_defs(task, [{"name": "mine_accuracy"}, general_row])
    assert results["retention/sorting"]["description"] == "Share of right answers in the general task sorting"
    for name in ("mine_f1", "mine/f1", "retention/"):
        with pytest.raises(EvaluationError, match=f"mine: expected every metric of summarize in METRICS, got '{name}'"):
            answers.metric_defs(task, [general_row, {"name": name}])


# --- the journal ---------------------------------------------------------------------------------------------


def test_answered_items_are_not_asked_again_and_rows_keep_their_order(tmp_path):
    path = tmp_path / "a/j.jsonl"
    with Journal(path) as journal, pytest.raises(EngineError, match="gone. 4 of 10 items of test are done and"):
        ask(Told(gives_up_after=4), journal)
    rest = Told()
    with Journal(path) as journal:
        assert journal.resumed == 4
        resumed = ask(rest, journal)
        other = Told()
        ask(other, journal, "retention")
        assert len(other.asked) == 10 and len(path.read_text().splitlines()) == 20, "two splits may share ids"
    assert rest.asked == [i.prompt for i in reversed(ITEMS[:6])]
    assert [row["item_id"] for row, _ in resumed] == [i.id for i in ITEMS]
    assert all(score.correct and row["answer"] == row["truth"] for row, score in resumed)
    assert resumed == ask(Told())
    with pytest.raises(EngineError, match="3 of 10 items of test are done$"):
        ask(Told(gives_up_after=3))


@pytest.mark.parametrize("broken", [b'{"split": "test", "item_id": "i', b"\x00\x00\x00\n", b'{"item_id": "i2"}\n',
                                    b"\xff\xfe\n", b"[1]\n"])  # fmt: skip
def test_a_broken_line_costs_its_own_item_only(tmp_path, broken):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        whole = ask(Told(), journal)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + broken)
    rest = Told()
    with Journal(path) as journal:
        assert journal.resumed == 5
        assert ask(rest, journal) == whole
    assert len(rest.asked) == 5
    with Journal(path) as journal:
        assert journal.resumed == 10  # the file is whole again


def test_an_engine_that_skips_items_is_noticed():
    class Lazy(Told):
        def generate_many(self, *args):
            yield from list(super().generate_many(*args))[:-2]

    with pytest.raises(EngineError, match="told left 2 of 10 items of test out"):
        ask(Lazy())
