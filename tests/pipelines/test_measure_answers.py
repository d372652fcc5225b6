"""Perplexity of the right answers, as stage measure writes it, on a real, small adapter."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.texts import TextError
from pipelines import measure, measure_texts
from pipelines.config import parse_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(measured_project):
    return measured_project


def changed(raw, **keys):
    return parse_params({**raw, "measure": {**raw["measure"], **keys}})


def content(arm):
    return json.loads(Path(f"measured/{arm}/0/measured.json").read_text())


def value(arm, name):
    return next(row["value"] for row in content(arm)["metrics"] if row["name"] == name)


def source():
    return json.loads(Path("models/base/base.json").read_text())["location"]


def items():
    return [json.loads(line) for line in Path("data/test.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ["base", "baseline_lora"])
def test_the_right_answers_perplexity(here, smoke_raw, arm):
    """Worked out again by torchmetrics, item by item, on a model that is loaded here."""
    tokenizer = AutoTokenizer.from_pretrained(source())
    model = AutoModelForCausalLM.from_pretrained(source(), dtype=torch.float32)
    if arm != "base":
        model = PeftModel.from_pretrained(model, f"adapters/{arm}/0")
    model.eval()
    metric, tokens = Perplexity(ignore_index=-100), 0
    assert len(items()) <= smoke_raw["measure"]["max_answers"]
    for item in items():
        question = smoke_raw["prompt"]["template"].replace("{prompt}", item["prompt"])
        ids = tokenizer(question + item["completion"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(question)["input_ids"])
        wanted = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            metric.update(model(input_ids=torch.tensor([ids])).logits[:, :-1], wanted[:, 1:])
        tokens += len(ids) - start
    assert value(arm, "answer_perplexity") == pytest.approx(float(metric.compute()), rel=1e-4)
    assert value(arm, "answer_perplexity_low") < value(arm, "answer_perplexity") < value(arm, "answer_perplexity_high")
    assert math.log(value(arm, "answer_perplexity")) == pytest.approx(value(arm, "answer_loss"))
    assert {row["n"] for row in content(arm)["metrics"] if row["split"] == "test_answers"} == {tokens}
    if arm != "base":
        assert value(arm, "answer_perplexity") < value("base", "answer_perplexity"), "it was trained to give them"


def test_how_many_right_answers(here, smoke_raw):
    whole = next(row["n"] for row in content("base")["metrics"] if row["split"] == "test_answers")
    measure.run(changed(smoke_raw, max_answers=3), "base", 0)
    record = json.loads(Path("measured/base/0/run.json").read_text())
    assert (record["extra"]["answers"], record["extra"]["answers_cut_or_left_out"]) == (3, 0)
    assert 0 < next(row["n"] for row in content("base")["metrics"] if row["split"] == "test_answers") < whole
    Path("data/test.jsonl").unlink()
    measure.run(changed(smoke_raw, max_answers=0), "base", 0)
    assert {row["split"] for row in content("base")["metrics"]} == {"general", "alignment"}
    assert not any("answer_" in name for name in content("base")["metric_defs"])


def test_answers_beyond_the_tokens_that_are_read(here, smoke_raw):
    """Cut where they begin within them, left out otherwise; both are counted, and nothing to score is refused."""
    tokenizer = AutoTokenizer.from_pretrained(source())
    template = smoke_raw["prompt"]["template"]
    questions = [template.replace("{prompt}", item["prompt"]) for item in items()]
    starts = [len(tokenizer(question)["input_ids"]) for question in questions]
    whole = [
        len(tokenizer(question + item["completion"])["input_ids"]) + 1
        for question, item in zip(questions, items(), strict=True)
    ]
    most = sorted(starts)[len(starts) // 2]
    params = changed(smoke_raw)
    found, cut = measure_texts.answer_texts(params.measure, tokenizer, template, most)
    assert len(found) == sum(start < most for start in starts) and 0 < len(found) < len(items())
    assert [len(text.ids) for text in found] == [
        min(most, length) for start, length in zip(starts, whole, strict=True) if start < most
    ]
    assert cut == sum(length > most for length in whole)
    with pytest.raises(TextError, match="expected answers that begin within 8 tokens, got none in .*max_answers to 0"):
        measure_texts.answer_texts(params.measure, tokenizer, template, 8)


def test_answers_that_were_cut_are_told(here, smoke_raw):
    tokenizer = AutoTokenizer.from_pretrained(source())
    template = smoke_raw["prompt"]["template"]
    asked = [(template.replace("{prompt}", item["prompt"]), item["completion"]) for item in items()]
    most = max(len(tokenizer(question)["input_ids"]) for question, _ in asked)
    over = sum(len(tokenizer(question + answer)["input_ids"]) + 1 > most for question, answer in asked)
    measure.run(changed(smoke_raw, max_tokens=most), "base", 0)
    assert over and any(
        note.startswith(f"{over} right answers are cut or left out") for note in content("base")["notes"]
    )
