"""Stage measure on a real, small adapter: its results and its errors."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from db.errors import FileError
from evaluation import EvaluationError
from pipelines import measure
from pipelines.check import parse_params
from pipelines.params import ConfigError

INDEX = [f"alignment_{n}" for n in "index index_low index_high null_mean null_low null_high p_value".split()]
CLUSTERS = ["calinski_harabasz", "xie_beni"]
DELTA = [f"delta_alignment_{n}" for n in "index index_low index_high null_low null_high p_value".split()]
GENERAL = ["loss", "perplexity", "perplexity_high", "perplexity_low"]
ANSWERS = [f"answer_{name}" for name in GENERAL]
WEIGHTS = ["update_norm", "update_norm_relative", "effective_rank", "stable_rank", "rank"]
DRIFT = ["drift_relative", "drift_cosine"]


@pytest.fixture(scope="module")
def raw(smoke_raw):
    return smoke_raw


@pytest.fixture(scope="module")
def project(measured_project):
    return measured_project


def changed(raw, **keys):
    return parse_params({**raw, "measure": {**raw["measure"], **keys}})


def content(arm="baseline_lora"):
    return json.loads(Path(f"measured/{arm}/0/measured.json").read_text())


def names(rows, split):
    return sorted({row["name"] for row in rows if row["split"] == split})


def value(arm, name):
    return next(row["value"] for row in content(arm)["metrics"] if row["name"] == name)


def test_measurements_of_the_base(here):
    result = content("base")
    assert (result["schema"], result["arm"], result["seed"]) == (1, "base", 0)
    assert {row["split"] for row in result["metrics"]} == {"general", "test_answers", "alignment"}
    assert names(result["metrics"], "general") == GENERAL
    assert value("base", "perplexity_low") < value("base", "perplexity") < value("base", "perplexity_high")
    assert result["notes"] == []
    described = [result["metric_defs"][name]["description"] for name in GENERAL]
    assert all("answers of the retention questions" in words for words in described)
    assert names(result["metrics"], "test_answers") == ANSWERS
    assert all("right answers of test items" in result["metric_defs"][name]["description"] for name in ANSWERS)
    assert names(result["metrics"], "alignment") == sorted(INDEX + CLUSTERS)
    assert {row["layer"] for row in result["layers"]} == {"layer 1", "layer 2"}
    assert math.log(value("base", "perplexity")) == pytest.approx(value("base", "loss"))
    assert {row["n"] for row in result["metrics"] if row["split"] == "alignment"} == {120}
    assert sorted(f.name for f in Path("measured/base/0").iterdir()) == ["alignment.npz", "measured.json", "run.json"]


def test_measurements_of_an_arm(here):
    result = content()
    by_split = {"general": GENERAL, "test_answers": ANSWERS, "weights": WEIGHTS, "hidden": DRIFT,
                "alignment": INDEX + CLUSTERS + DELTA}  # fmt: skip
    for split, expected in by_split.items():
        assert names(result["metrics"], split) == sorted(expected)
        if split not in ("general", "test_answers"):
            assert names(result["layers"], split) == sorted(expected), "the same names for each layer"
    assert len(result["metrics"]) == sum(map(len, by_split.values())), "each once"
    modules = {row["layer"] for row in result["layers"] if row["split"] == "weights"}
    assert modules == {f"layers.{i}.{m}" for i in (0, 1) for m in
                       ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}  # fmt: skip
    assert set(result["metric_defs"]) == {row["name"] for row in result["metrics"]}
    assert all(set(d) == {"unit", "direction", "description"} for d in result["metric_defs"].values())
    rank = json.loads(Path("adapters/baseline_lora/0/adapter_config.json").read_text())["r"]
    assert value("baseline_lora", "rank") == rank and 1 <= value("baseline_lora", "effective_rank") <= rank
    arm, base = (value(arm, "alignment_index") - value(arm, "alignment_null_mean") for arm in ("baseline_lora", "base"))
    assert value("baseline_lora", "delta_alignment_index") == pytest.approx(arm - base)
    assert 0 < value("baseline_lora", "delta_alignment_p_value") <= 1
    assert value("baseline_lora", "drift_relative") > 0.01 and value("baseline_lora", "update_norm") > 0
    record = json.loads(Path("measured/baseline_lora/0/run.json").read_text())
    assert (record["stage"], record["status"], record["arm"], record["seed"]) == (
        "measure", "finished", "baseline_lora", 0)  # fmt: skip
    assert {"measured/base/0/measured.json", "adapters/baseline_lora/0/adapter_model.safetensors",
            "data/retention.jsonl", "data/test.jsonl", "models/base/base.json"} <= set(record["inputs"])  # fmt: skip
    assert record["extra"]["prompts_in_pairs"] is True and record["extra"]["texts"] == 33


def test_a_second_run_writes_the_same_bytes(here, raw):
    files = [f for f in Path("measured").rglob("*") if f.is_file() and f.name != "run.json"]
    before = {f: f.read_bytes() for f in files}
    for arm in ("base", "baseline_lora"):
        measure.run(parse_params(raw), arm, 0)
    assert {f: f.read_bytes() for f in files} == before and len(before) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_adapter_is_measured_as_far_as_it_can_be(here, raw, capsys, bad):
    from safetensors.torch import load_file, save_file

    file = "adapters/baseline_lora/0/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    tensors[name][0, 0] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    measure.run(parse_params(raw), "baseline_lora", 0)
    result = content()
    known = {row["name"] for row in result["metrics"] if row["value"] is not None}
    assert known == {"rank"}
    assert len(result["metrics"]) == len(GENERAL + ANSWERS + WEIGHTS + DRIFT + INDEX + CLUSTERS + DELTA)
    kept = {row["layer"] for row in result["layers"] if row["name"] == "update_norm" and row["value"] is not None}
    assert len(kept) == 5 and "layers.1.mlp.down_proj" not in kept
    assert "training diverged; modules layers.1.mlp.down_proj" in result["notes"][0]
    assert sum("not finite" in note for note in result["notes"]) == 2 and len(result["notes"]) == 4
    assert result["notes"][0] in capsys.readouterr().out
    record = json.loads(Path("measured/baseline_lora/0/run.json").read_text())
    assert record["status"] == "finished" and record["extra"]["notes"] == result["notes"]


def test_a_base_in_4_bit(here, raw):
    before = {name: value("baseline_lora", name) for name in ("update_norm", "update_norm_relative", "loss")}
    params = parse_params({**raw, "train": {**raw["train"], "quantize_base": "nf4", "gradient_checkpointing": True}})
    for arm in ("base", "baseline_lora"):
        measure.run(params, arm, 0)
    after = {name: value("baseline_lora", name) for name in before}
    assert after["update_norm"] == pytest.approx(before["update_norm"], rel=1e-6)
    assert after["update_norm_relative"] == pytest.approx(before["update_norm_relative"], rel=0.01)
    assert after["loss"] != before["loss"] and after["loss"] == pytest.approx(before["loss"], rel=0.1)


def test_an_exchanged_base_is_detected(here, raw):
    result = content("base")
    for row in result["metrics"]:
        if row["name"] == "loss":
            row["value"] *= 1.001
    before = Path("measured/baseline_lora/0/measured.json").read_bytes()
    Path("measured/base/0/measured.json").write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="not the base that was measured; run `dvc repro measure_base`"):
        measure.run(parse_params(raw), "baseline_lora", 0)
    assert Path("measured/baseline_lora/0/measured.json").read_bytes() == before, "earlier results stay"


def test_an_arm_needs_a_base_measured_with_the_same_settings(here, raw):
    for keys in ({"layers": [1.0]}, {"pooling": "last"}, {"max_prompts": 30}):
        with pytest.raises(EvaluationError, match="other prompts, layers or settings; run `dvc repro measure_base`"):
            measure.run(changed(raw, **keys), "baseline_lora", 0)
    shutil.rmtree("measured/base")
    with pytest.raises(FileError, match="measured/base/0: no such file; run `dvc repro`"):
        measure.run(parse_params(raw), "baseline_lora", 0)


def test_user_prompts_and_texts(here, raw, capsys):
    rows = [{"q": f"Say {n} {kind} words.", "safety": kind.title()} for n in range(12) for kind in ("safe", "unsafe")]
    Path("inputs").mkdir()
    Path("inputs/p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("t.txt").write_text("The sum of two and two is four.\n\nRivers run into the sea. " + "And so on. " * 40)
    params = changed(
        raw, prompts="inputs/p.jsonl", columns={"prompt": "q", "label": "safety"}, text="t.txt",
        max_tokens=40, pooling="last", layers=[0.5],
    )  # fmt: skip
    for arm in ("base", "baseline_lora"):
        measure.run(params, arm, 0)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "lies outside" in line] == ["t.txt"] * 2
    assert {r["n"] for r in content()["metrics"] if r["split"] == "alignment"} == {24}
    assert {r["layer"] for r in content()["layers"] if r["split"] == "alignment"} == {"layer 1"}
    record = json.loads(Path("measured/baseline_lora/0/run.json").read_text())
    assert {"inputs/p.jsonl", "t.txt"} <= set(record["inputs"])
    assert (record["extra"]["texts"], record["extra"]["texts_cut_or_left_out"]) == (2, 1)
    assert record["extra"]["prompts_in_pairs"] is False and record["extra"]["layers"] == [1]
    assert "held-out general text" in content()["metric_defs"]["perplexity"]["description"]
    general = next(r for r in content()["metrics"] if r["name"] == "loss")
    hidden = next(r for r in content()["metrics"] if r["name"] == "drift_relative")
    assert 39 < general["n"] == hidden["n"] - 2, "all tokens count, save the first of each text"


def test_prompts_of_one_class_are_refused_before_a_model_is_loaded(here, raw, monkeypatch):
    rows = [{"prompt": f"Say {n}.", "label": "safe"} for n in range(12)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.delattr("pipelines.measure.load_model")
    with pytest.raises(EvaluationError, match="at least 10 prompts labeled 'unsafe', got 0"):
        measure.run(changed(raw, prompts="p.jsonl"), "base", 0)


# --- perplexity of the right answers ---


def source():
    return json.loads(Path("models/base/base.json").read_text())["location"]


def items():
    return [json.loads(line) for line in Path("data/test.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arm", ["base", "baseline_lora"])
def test_perplexity_of_right_answers(here, raw, arm):
    tokenizer = AutoTokenizer.from_pretrained(source())
    model = AutoModelForCausalLM.from_pretrained(source(), dtype=torch.float32)
    if arm != "base":
        model = PeftModel.from_pretrained(model, f"adapters/{arm}/0")
    model.eval()
    metric, tokens = Perplexity(ignore_index=-100), 0
    assert len(items()) <= raw["measure"]["max_answers"]
    for item in items():
        question = raw["prompt"]["template"].replace("{prompt}", item["prompt"])
        ids = tokenizer(question + item["completion"])["input_ids"] + [tokenizer.eos_token_id]
        start = len(tokenizer(question)["input_ids"])
        targets = torch.tensor([[-100] * start + ids[start:]])
        with torch.no_grad():
            metric.update(model(input_ids=torch.tensor([ids])).logits[:, :-1], targets[:, 1:])
        tokens += len(ids) - start
    assert value(arm, "answer_perplexity") == pytest.approx(float(metric.compute()), rel=1e-4)
    assert value(arm, "answer_perplexity_low") < value(arm, "answer_perplexity") < value(arm, "answer_perplexity_high")
    assert math.log(value(arm, "answer_perplexity")) == pytest.approx(value(arm, "answer_loss"))
    assert {row["n"] for row in content(arm)["metrics"] if row["split"] == "test_answers"} == {tokens}
    if arm != "base":
        assert value(arm, "answer_perplexity") < value("base", "answer_perplexity"), "it was trained to give them"


def test_number_of_right_answers(here, raw):
    whole = next(row["n"] for row in content("base")["metrics"] if row["split"] == "test_answers")
    measure.run(changed(raw, max_answers=3), "base", 0)
    record = json.loads(Path("measured/base/0/run.json").read_text())
    assert (record["extra"]["answers"], record["extra"]["answers_cut_or_left_out"]) == (3, 0)
    assert 0 < next(row["n"] for row in content("base")["metrics"] if row["split"] == "test_answers") < whole
    Path("data/test.jsonl").unlink()
    measure.run(changed(raw, max_answers=0), "base", 0)
    assert {row["split"] for row in content("base")["metrics"]} == {"general", "alignment"}
    assert not any("answer_" in name for name in content("base")["metric_defs"])


def test_answers_beyond_the_token_limit(here, raw):
    """Cut if they begin within the limit, left out otherwise; both are counted, and nothing to score is an error."""
    tokenizer = AutoTokenizer.from_pretrained(source())
    template = raw["prompt"]["template"]
    questions = [template.replace("{prompt}", item["prompt"]) for item in items()]
    starts = [len(tokenizer(question)["input_ids"]) for question in questions]
    answered = [question + item["completion"] for question, item in zip(questions, items(), strict=True)]
    whole = [len(tokenizer(text)["input_ids"]) + 1 for text in answered]
    most = sorted(starts)[len(starts) // 2]
    params = changed(raw)
    result, cut = measure.answer_texts(params.measure, tokenizer, template, most)
    assert len(result) == sum(start < most for start in starts) and 0 < len(result) < len(items())
    expected = [min(most, length) for start, length in zip(starts, whole, strict=True) if start < most]
    assert [len(text.ids) for text in result] == expected
    assert cut == sum(length > most for length in whole)
    with pytest.raises(EvaluationError, match="answers that begin within 8 tokens, got none in .*max_answers to 0"):
        measure.answer_texts(params.measure, tokenizer, template, 8)
