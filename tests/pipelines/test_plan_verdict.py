"""Verdicts with the plan's known error, savings, variants of an arm, and bases that the hub does not give."""

import dataclasses
import json
from pathlib import Path

import httpx
import huggingface_hub
import pytest

from pipelines import plan
from pipelines.config import parse_params
from pipelines.planning import bases, lengths, overhead
from pipelines.planning.bases import PlanError, base_of
from pipelines.planning.blank import blank_model
from pipelines.planning.lengths import Lengths
from pipelines.planning.machine import Machine
from pipelines.planning.needs import DISK, RAM, Case, Row, measure_rows
from pipelines.planning.plan import make
from pipelines.planning.verdicts import Verdict, verdict_on
from pipelines.profile import compose, load_text

ROOT = Path(__file__).resolve().parents[2]
GB = 10**9


def params_of(name, **sections):
    raw = load_text(compose(name, ROOT / "profiles"))
    for section, values in sections.items():
        raw[section] |= values
    return parse_params(raw)


def made(params, machine=None, on_gpu=False, tokens=64):
    case = Case(params, base_of(params.prepare_base), Lengths(tokens, tokens, "a test", 50), on_gpu, lambda arm: None)
    return make(case, machine or Machine(64 * GB, 500 * GB), doubled=False)


@pytest.mark.parametrize(
    ("free", "fits", "barely", "said"),
    [(99, False, False, "does not fit"), (100, True, True, "fits barely"), (119, True, True, "fits barely"),
     (120, True, False, "fits")],
)  # fmt: skip
def test_what_fits_only_if_the_plan_is_right_fits_barely(free, fits, barely, said):
    verdict = verdict_on(RAM, [Row("train a", "x", 60, RAM), Row("train a", "y", 40, RAM)], free)
    assert (verdict.fits, verdict.barely) == (fits, barely)
    assert plan.sentence(verdict) == f"needs about 100 B of RAM (train a); this machine has {free} B free: {said}"


def test_what_fits_barely_is_exit_code_0_with_advice(monkeypatch, capsys):
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]})
    needed = next(v.needed for v in made(params).verdicts if v.resource == RAM)
    for room, code, said in ((needed, 0, "fits barely"), (needed - 1, 1, "does not fit")):
        found = made(params, Machine(room, 500 * GB))
        monkeypatch.setattr(plan, "plan_of", lambda *_, found=found, **__: found)
        with pytest.raises(plan.typer.Exit) as stopped:
            plan.main(profile="smoke", arm=None, json_=False, measure=False, device="cpu")
        out = capsys.readouterr().out
        assert stopped.value.exit_code == code and f"free: {said}" in out and "saves" in out
    assert made(params, Machine(2 * needed, 500 * GB)).savings == []
    assert next(v for v in made(params, Machine(needed, 500 * GB)).to_json()["verdicts"])["barely"] is True


def test_the_verdict_on_a_gpu_names_it():
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]})
    found = made(params, Machine(64 * GB, 500 * GB, 24 * GB, "Some GPU 24"), on_gpu=True)
    said = {v.resource: plan.sentence(v) for v in found.verdicts}
    assert said["GPU memory"].endswith("; this machine (Some GPU 24) has 24.0 GB free: fits")
    assert "GPU" not in said["RAM"]
    assert plan.sentence(Verdict("GPU memory", 5, "", None)).endswith("; this machine has none: does not fit")


@pytest.mark.parametrize("overlong", ["refuse", "leave_out"])
def test_shorter_items_are_advised_with_the_setting_that_allows_them(overlong):
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]}, train={"overlong": overlong})
    changes = [s.change for s in made(params, Machine(0, 500 * GB)).savings]
    too = " with train.overlong: leave_out" if overlong == "refuse" else ""
    assert f"train.max_length: 32{too} (longer items left out)" in changes


def test_a_smaller_batch_of_measure_saves_what_a_plan_with_it_says():
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]})
    found = made(params, Machine(0, 500 * GB))
    smaller = params.model_copy(update={"measure": params.measure.model_copy(update={"batch_size": 16})})
    memory = found.memories["baseline_lora"]
    before, after = (
        sum(row.bytes for row in measure_rows(dataclasses.replace(found.case, params=p), memory, "baseline_lora"))
        for p in (params, smaller)
    )
    saving = next(s for s in found.savings if s.stage == "measure")
    assert (saving.change, saving.bytes) == ("measure.batch_size: 16", before - after)
    smallest = params_of("smoke", matrix={"arms": ["baseline_lora"]}, measure={"batch_size": 1})
    said = next(s.change for s in made(smallest, Machine(0, 500 * GB)).savings if s.stage == "measure")
    assert "no setting makes this smaller" in said


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 3), ({"keep_best": True, "save_steps": 40}, 4), ({"early_stopping_patience": 2, "save_steps": 40}, 4)],
    ids=str,
)
def test_checkpoints_on_the_disk_are_those_of_the_arm(changes, count):
    raw = {"arms": ["baseline_lora", "pure_grit"]}
    params = params_of("smoke", matrix=raw, arms={"baseline_lora": changes})
    rows = {r.stage: r for r in made(params).rows if r.resource == DISK and "checkpoints" in r.what}
    plain = {r.stage: r for r in made(params_of("smoke", matrix=raw)).rows if "checkpoints" in r.what}
    assert rows["train baseline_lora"].what.startswith(f"{count} checkpoints")
    assert rows["train baseline_lora"].bytes * 3 == plain["train baseline_lora"].bytes * count
    assert rows["train pure_grit"] == plain["train pure_grit"]  # of three, whatever the other does


def test_items_are_as_long_as_the_arm_that_takes_the_longest_allows():
    tokens = {"train": {"max_length": 64}, "arms": {"pure_grit": {"max_length": 200}}}
    hub = {"source": "hub", "task": "gsm8k"}
    both = params_of("smoke", matrix={"arms": ["baseline_lora", "pure_grit"]}, prepare_data=hub, **tokens)
    assert lengths.lengths_of(both).train == lengths.lengths_of(both).valid == 200
    one = params_of("smoke", matrix={"arms": ["baseline_lora"]}, prepare_data=hub, **tokens)
    assert lengths.lengths_of(one).train == 64
    found = made(both, tokens=lengths.lengths_of(both).train)
    short = made(both, tokens=64)
    assert found.memories["pure_grit"].passes > short.memories["pure_grit"].passes
    assert found.memories["baseline_lora"].passes == short.memories["baseline_lora"].passes


def test_a_variant_is_planned_with_its_own_settings_and_the_code_of_its_arm(monkeypatch):
    monkeypatch.chdir(ROOT)
    measured = []
    monkeypatch.setattr(overhead, "measured", lambda code, settings: measured.append((code, settings.grit)) or GB)
    monkeypatch.setattr(plan, "look", lambda project, gpu: Machine(64 * GB, 500 * GB))
    params = plan.chosen("gsm8k+smoke+ablation", "grit_2s")
    found = plan.plan_of(params, on_gpu=False)
    assert set(found.memories) == {"grit_2s"} and found.fits
    assert {code for code, _ in measured} == {"pure_grit"}
    assert all(grit["use_two_sided_reprojection"] and grit["min_lora_rank"] == 2 for _, grit in measured)
    stages = {row.stage for row in found.rows}
    assert "train grit_2s" in stages and "export grit_2s" in stages and "train pure_grit" not in stages
    whole = plan.plan_of(plan.chosen("gsm8k+smoke+ablation", "pure_grit"), on_gpu=False)
    assert found.memories["grit_2s"].kept["GRIT"] == whole.memories["pure_grit"].kept["GRIT"] > 0
    assert found.case.lengths.train == params.train_for("grit_2s").max_length


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"llama"', "3"])
def test_a_configuration_that_is_no_object_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError) as caught:
        base_of(params_of("tiny", prepare_base={"source": str(tmp_path)}).prepare_base)
    assert str(caught.value).endswith(f"an object with a model_type, got {text!r}") and "\n" not in str(caught.value)


def hub_says(monkeypatch, status, headers=None, content=None):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    transport = httpx.MockTransport(lambda request: httpx.Response(status, headers=headers or {}, json=content))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: httpx.Client(transport=transport))
    return params_of("tiny", prepare_base={"source": "org/name"}).prepare_base


@pytest.mark.parametrize(
    ("status", "headers"),
    [(401, {"X-Error-Code": "GatedRepo"}), (403, {"X-Error-Code": "GatedRepo"}), (401, {}), (403, {}),
     (401, {"X-Error-Message": "Invalid credentials in Authorization header"})],
    ids=str,
)  # fmt: skip
def test_a_base_that_the_hub_refuses_advises_to_log_in(monkeypatch, status, headers):
    section = hub_says(monkeypatch, status, headers)
    with pytest.raises(PlanError) as caught:
        base_of(section)
    said = str(caught.value)
    assert "log in with `hf auth login`" in said and "HF_TOKEN" in said and "config.json" in said and "\n" not in said
    assert ("is gated: ask for access on its page" in said) == ("GatedRepo" in headers.values())


def test_what_the_hub_gives_is_the_shape_or_one_sentence(monkeypatch):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}
    assert base_of(hub_says(monkeypatch, 200, content=config)).config.num_hidden_layers == 3
    with pytest.raises(PlanError, match=r"config\.json of org/name on the hub: expected .* got '\[1\]'"):
        base_of(hub_says(monkeypatch, 200, content=[1]))
    with pytest.raises(PlanError, match="HfHubHTTPError.*the folder"):
        base_of(hub_says(monkeypatch, 500))


def test_a_shape_keeps_the_dtype_of_its_weights_when_models_are_built_of_it():
    config = bases.from_dict(json.loads((bases.SHIPPED / "llama-3.2-3b.json").read_text())["config"])
    before = str(config.dtype)
    built = blank_model(config)
    assert "bfloat16" in before and str(config.dtype) == before != str(built.config.dtype)
