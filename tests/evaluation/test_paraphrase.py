"""Questions as other people type them: the same question still, and no other than was asked for."""

import random
import re
from dataclasses import replace

import pytest

from evaluation import paraphrase
from evaluation.measure import answers
from evaluation.tasks import Item, Score, aqi, boolq, general
from tests.evaluation.page_report import part, report, table


@pytest.fixture(scope="module")
def items():
    return aqi.generate({"test": 300}, seed=0, pollutants=["pm25", "no2", "o3_8h"], max_pollutants=2)["test"]


def numbers(text):
    return sorted(re.findall(r"\d+\.?\d*", text.replace("PM2.5", "").replace("NO2", "").replace("O3 8h", "")))


def test_varied_items_ask_the_same(items):
    assert paraphrase.varied(items, aqi, 0.0, seed=0) == items
    made = paraphrase.varied(items, aqi, 1.0, seed=0)
    assert made == paraphrase.varied(items, aqi, 1.0, seed=0) != paraphrase.varied(items, aqi, 1.0, seed=1)
    changed = [(old, new) for old, new in zip(items, made, strict=True) if old != new]
    assert len(changed) > 200
    for old, new in changed:
        assert replace(new, prompt=old.prompt) == old and numbers(new.prompt.rstrip(".?! \n")) == numbers(old.prompt)
    prompts = [new.prompt for _, new in changed]
    for some in ("\n", " ", "?", "."):
        assert any(prompt.endswith(some) for prompt in prompts)
    assert any(prompt.strip().startswith("What is the AQI for") for prompt in prompts)
    assert not any(prompt.strip().startswith("How high is") for prompt in prompts)  # kept for split paraphrased
    half = paraphrase.varied(items, aqi, 0.5, seed=0)
    assert 60 < sum(map(Item.__ne__, half, items)) < 150


def test_prompts_of_the_user_get_only_white_space_and_punctuation(items):
    own = [replace(item, prompt=f"¿Qué índice da {n}?") for n, item in enumerate(items)]
    assert all(re.fullmatch(r"\s*¿Qué índice da \d+[?.!]?\s*", i.prompt) for i in paraphrase.varied(own, aqi, 1.0, 0))
    given = "Predict AQI given: PM2.5 35.9 µg/m³, humidity 40 %. Answer briefly."
    told = replace(items[0], prompt=given, truth={**items[0].truth, "readings": {"pm25": "35.9"}})
    assert aqi.reword(told, random.Random(0)) == given
    passages = [replace(item, task="boolq") for item in items]  # a real data set: white space
    for old, new in zip(passages, paraphrase.varied(passages, boolq, 1.0, 0), strict=True):
        assert new.prompt.strip() == old.prompt


def test_items_are_asked_again_each_in_one_form(items):
    made = paraphrase.asked_again(items, aqi, 50, seed=0)
    forms = ["newline", "blank", "wording", "mark", "new wording"]
    assert [paraphrase.plain(item.id)[1] for item in made[:5]] == forms and len(made) >= 48
    old = {item.id: item for item in items}
    for item in made:
        name, form = paraphrase.plain(item.id)
        assert replace(item, id=name, prompt=old[name].prompt) == old[name] != replace(item, id=name)
        assert (form == "newline") == item.prompt.endswith("\n") and (form == "blank") == item.prompt.endswith(" ")
        assert (form == "new wording") == item.prompt.startswith(("How high", "AQI of", "Tell me"))
    assert len(paraphrase.asked_again(items, aqi, 1000, seed=0)) <= 300


def test_a_question_is_held_out_in_every_form():
    suite = general.retention_items(3, seed=0)
    assert all(general.is_held_out(item.prompt) for item in paraphrase.varied(suite, general, 1.0, 0))
    rng = random.Random(0)
    drawn = general.questions(0, held_out=False)
    assert not any(general.is_held_out(f" {next(drawn)[1]}{rng.choice(('', '?', ' ', chr(10)))}") for _ in range(200))


def test_metrics_by_form(items):
    suite = general.retention_items(1, seed=0)
    again = paraphrase.asked_again(items, aqi, 10, 0) + paraphrase.asked_again(suite, general, 6, 0)
    scored = [(item, Score("newline" not in item.id, None, False)) for item in again]
    rows = answers.metrics(aqi, [], [], scored)
    results = {row["name"]: (row["value"], row["n"]) for row in rows if row["split"] == "paraphrased"}
    assert results["paraphrased"] == (0.8, 10) and results["paraphrased/newline"] == (0.0, 2)
    assert results["paraphrased_retention"] == (4 / 6, 6) and results["paraphrased_retention/mark"] == (1.0, 2)
    told = answers.metric_defs(aqi, [row for row in rows if row["name"] in results])
    assert told["paraphrased/blank"]["description"] == "Mean credit on test items, typed as other people would (blank)"


def test_the_report_says_what_is_lost_pair_by_pair():
    """The tree's arm has every other item wrong once it is typed otherwise, and all retention items right."""
    section = part(report("full"), "robustness")
    (head, *rows), (_, *kept) = (table(section, name) for name in ("aqi-accuracy-on-test-items", "retention-items"))
    assert head[0:4] == ["Arm", "As asked, %", "Retyped, %", "Δ, points"]
    for row, right in zip(rows, kept, strict=True):
        plain, again, change = (float(cell.split(" ")[0].replace("−", "-")) for cell in row[1:4])
        assert again < plain and change == pytest.approx(again - plain, abs=0.11)
        assert float(row[head.index("Δ newline")].replace("−", "-")) < 0 == float(row[head.index("Δ blank")])
        assert right[3].startswith(("0", "+"))
