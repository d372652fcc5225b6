"""Stage measure on a real, small adapter: what it writes, and what stops it."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.alignment import AlignmentError
from evaluation.prompts import PromptError
from pipelines import measure
from pipelines.config import ConfigError, parse_params
from pipelines.runinfo import FileError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
INDEX = ["alignment_index", "alignment_index_low", "alignment_index_high", "alignment_null_mean", "alignment_null_low",
         "alignment_null_high", "alignment_p_value"]  # fmt: skip
CLUSTERS = ["calinski_harabasz", "xie_beni", "silhouette", "davies_bouldin", "dunn"]
DELTA = ["delta_alignment_index", "delta_alignment_index_low", "delta_alignment_index_high",
         "delta_alignment_null_low", "delta_alignment_null_high", "delta_alignment_p_value"]  # fmt: skip
GENERAL = ["loss", "perplexity", "perplexity_high", "perplexity_low"]
ANSWERS = ["answer_loss", "answer_perplexity", "answer_perplexity_high", "answer_perplexity_low"]
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


def test_the_base_s_figures(here):
    found = content("base")
    assert (found["schema"], found["arm"], found["seed"]) == (1, "base", 0)
    assert {row["split"] for row in found["metrics"]} == {"general", "test_answers", "alignment"}
    assert names(found["metrics"], "general") == GENERAL
    assert value("base", "perplexity_low") < value("base", "perplexity") < value("base", "perplexity_high")
    assert found["notes"] == []
    described = [found["metric_defs"][name]["description"] for name in GENERAL]
    assert all("answers of the retention questions" in words for words in described)
    assert names(found["metrics"], "test_answers") == ANSWERS
    assert all("right answers of test items" in found["metric_defs"][name]["description"] for name in ANSWERS)
    assert names(found["metrics"], "alignment") == sorted(INDEX + CLUSTERS)
    assert {row["layer"] for row in found["layers"]} == {"layer 1", "layer 2"}
    assert math.log(value("base", "perplexity")) == pytest.approx(value("base", "loss"))
    assert {row["n"] for row in found["metrics"] if row["split"] == "alignment"} == {120}
    assert sorted(f.name for f in Path("measured/base/0").iterdir()) == ["alignment.npz", "measured.json", "run.json"]


def test_an_arm_s_figures(here):
    found = content()
    by_split = {"general": GENERAL, "test_answers": ANSWERS, "weights": WEIGHTS, "hidden": DRIFT,
                "alignment": INDEX + CLUSTERS + DELTA}  # fmt: skip
    for split, expected in by_split.items():
        assert names(found["metrics"], split) == sorted(expected)
        if split not in ("general", "test_answers"):
            assert names(found["layers"], split) == sorted(expected), "the same names for each layer"
    assert len(found["metrics"]) == sum(map(len, by_split.values())), "each once"
    modules = {row["layer"] for row in found["layers"] if row["split"] == "weights"}
    assert modules == {f"layers.{i}.{m}" for i in (0, 1) for m in
                       ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}  # fmt: skip
    assert set(found["metric_defs"]) == {row["name"] for row in found["metrics"]}
    assert all(set(d) == {"unit", "direction", "description"} for d in found["metric_defs"].values())
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


def test_the_same_again_gives_the_same_bytes(here, raw):
    files = [f for f in Path("measured").rglob("*") if f.is_file() and f.name != "run.json"]
    before = {f: f.read_bytes() for f in files}
    for arm in ("base", "baseline_lora"):
        measure.run(parse_params(raw), arm, 0)
    assert {f: f.read_bytes() for f in files} == before and len(before) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_adapter_is_measured_as_far_as_it_can_be(here, raw, capsys, bad):
    """The report must show the arm, not miss it: nulls, a note, and what is known of the base and the settings."""
    from safetensors.torch import load_file, save_file

    file = "adapters/baseline_lora/0/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    tensors[name][0, 0] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    measure.run(parse_params(raw), "baseline_lora", 0)
    found = content()
    known = {row["name"] for row in found["metrics"] if row["value"] is not None}
    assert known == {"rank"}
    assert len(found["metrics"]) == len(GENERAL + ANSWERS + WEIGHTS + DRIFT + INDEX + CLUSTERS + DELTA)
    kept = {row["layer"] for row in found["layers"] if row["name"] == "update_norm" and row["value"] is not None}
    assert len(kept) == 5 and "layers.1.mlp.down_proj" not in kept
    assert "training diverged; modules layers.1.mlp.down_proj" in found["notes"][0]
    assert sum("not finite" in note for note in found["notes"]) == 2 and len(found["notes"]) == 4
    assert found["notes"][0] in capsys.readouterr().out
    record = json.loads(Path("measured/baseline_lora/0/run.json").read_text())
    assert record["status"] == "finished" and record["extra"]["notes"] == found["notes"]


def test_it_runs_as_a_command(here, smoke):
    Path("params.yaml").write_text(smoke)
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.measure", "--arm", "baseline_lora"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["update_norm"] == round(value("baseline_lora", "update_norm"), 4)
    start = json.loads(next(Path("attempts").glob("*.json")).read_text())
    assert (start["stage"], start["arm"], start["seed"], start["status"]) == ("measure", "baseline_lora", 0, "finished")


def test_a_base_in_4_bit(here, raw):
    """As it is trained on: loss and drift move a little, the update not at all, the weights' norm hardly."""
    before = {name: value("baseline_lora", name) for name in ("update_norm", "update_norm_relative", "loss")}
    params = parse_params({**raw, "train": {**raw["train"], "quantize_base": "nf4", "gradient_checkpointing": True}})
    for arm in ("base", "baseline_lora"):
        measure.run(params, arm, 0)
    after = {name: value("baseline_lora", name) for name in before}
    assert after["update_norm"] == pytest.approx(before["update_norm"], rel=1e-6)
    assert after["update_norm_relative"] == pytest.approx(before["update_norm_relative"], rel=0.01)
    assert after["loss"] != before["loss"] and after["loss"] == pytest.approx(before["loss"], rel=0.1)


def test_a_base_that_was_exchanged_is_noticed(here, raw):
    """The adapter's model with the adapter off must be what the base's own run measured."""
    found = content("base")
    for row in found["metrics"]:
        if row["name"] == "loss":
            row["value"] *= 1.001
    before = Path("measured/baseline_lora/0/measured.json").read_bytes()
    Path("measured/base/0/measured.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="not the base that was measured; run `dvc repro measure_base`"):
        measure.run(parse_params(raw), "baseline_lora", 0)
    assert Path("measured/baseline_lora/0/measured.json").read_bytes() == before, "earlier results stay"


@pytest.mark.parametrize("keys", [{"layers": [1.0]}, {"pooling": "last"}, {"max_prompts": 30}])
def test_an_arm_is_not_held_against_a_base_measured_otherwise(here, raw, keys):
    with pytest.raises(AlignmentError, match="other prompts, layers or settings; run `dvc repro measure_base`"):
        measure.run(changed(raw, **keys), "baseline_lora", 0)


def test_an_arm_before_its_base(here, raw):
    shutil.rmtree("measured/base")
    with pytest.raises(FileError, match="measured/base/0: no such file; run `dvc repro`"):
        measure.run(parse_params(raw), "baseline_lora", 0)


def test_own_prompts_and_texts(here, raw, capsys):
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


def test_prompts_of_one_class_stop_it_before_a_model_is_loaded(here, raw, monkeypatch):
    rows = [{"prompt": f"Say {n}.", "label": "safe"} for n in range(12)]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.delattr("pipelines.measure.load_model")
    with pytest.raises(PromptError, match="at least 10 prompts labelled 'unsafe', got 0"):
        measure.run(changed(raw, prompts="p.jsonl"), "base", 0)


def test_a_damaged_adapter_is_named(here, raw):
    Path("adapters/baseline_lora/0/adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match="adapters/baseline_lora/0: PEFT cannot load this adapter.*`dvc repro train`"):
        measure.run(parse_params(raw), "baseline_lora", 0)


def test_what_cannot_be_computed_is_null(tmp_path):
    found = measure.Found()
    found.add("weights", {"effective_rank": math.nan, "rank": 4, "perplexity": math.inf}, 2)
    assert [row["value"] for row in found.metrics] == [None, 4.0, None]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"safe_label": "x", "unsafe_label": "X "}, "expected two labels"),
        ({"layers": [0.0]}, "layers.0: input should be greater than 0"),
        ({"columns": {"promt": "q"}}, "measure.columns.promt"),
        ({"bootstrap": 10}, "greater than or equal to 100"),
        ({"poling": "mean"}, "did you mean 'pooling'"),
    ],
)
def test_settings_that_cannot_be_used(raw, keys, message):
    with pytest.raises(ConfigError, match=message):
        changed(raw, **keys)
