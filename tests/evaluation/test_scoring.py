"""Items × backend → samples and metrics."""

from evaluation import scoring
from evaluation.backends import Generation
from evaluation.tasks import aqi, general


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
