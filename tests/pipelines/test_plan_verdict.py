"""Verdicts with the plan's known error, savings, variants of an arm, and bases that the hub does not give."""

import dataclasses
import json

import httpx
import huggingface_hub
import pytest

from pipelines import plan
from pipelines.planning import bases, lengths, overhead
from pipelines.planning.bases import PlanError, base_of
from pipelines.planning.blank import blank_model
from pipelines.planning.lengths import Lengths
from pipelines.planning.machine import Machine
from pipelines.planning.needs import DISK, HUB_DISK, RAM, Case, Row, measure_rows
from pipelines.planning.plan import make
from pipelines.planning.sizes import gguf_bytes
from pipelines.planning.verdicts import Verdict, verdict_on
from tests.pipelines.plan_cases import GB, ROOT, params_of


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
    savings = {s.change: s.bytes for s in found.savings if s.stage == "measure"}
    assert savings["measure.batch_size: 16"] == before - after > 0


def advised(stage, **sections):
    found = made(params_of("smoke", matrix={"arms": ["baseline_lora"]}, **sections), Machine(0, 500 * GB))
    return {s.change: s.bytes for s in found.savings if s.stage == stage}


NOTHING = {"no setting makes this smaller: it holds whole models; take a smaller base": 0}


@pytest.mark.parametrize(
    ("stage", "sections", "changes"),
    [
        ("measure", {"measure": {"batch_size": 1}}, ["measure.max_tokens: 128 (longer texts are cut off)"]),
        ("measure", {"measure": {"batch_size": 2, "max_tokens": 15}}, ["measure.batch_size: 1"]),
        ("measure", {"measure": {"batch_size": 1, "max_tokens": 15}}, None),
        (
            "evaluate",
            {"evaluate": {"parallel": 1}},
            ["export.num_ctx: 128 (shorter conversations)", "export.quantization: q8_0 (served and scored so)"],
        ),
        (
            "evaluate",
            {"evaluate": {"parallel": 1}, "export": {"quantization": "q8_0", "num_ctx": 100}},
            None,  # half of 100 tokens holds no item of 64; rows of 64 numbers have no format below 8.5 bits
        ),
        ("quantize", {"evaluate": {"parallel": 1}, "export": {"num_ctx": 100}}, None),
        ("prepare_base", {"prepare_base": {"batch_size": 1}}, None),
    ],
    ids=str,
)
def test_that_no_setting_helps_is_said_only_where_none_does(stage, sections, changes):
    found = advised(stage, **sections)
    if changes is None:
        assert found == NOTHING
    else:
        assert set(found) == set(changes) and all(size > 0 for size in found.values())
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_smaller_precision_saves_what_its_file_is_smaller_by():
    on_256 = {"prepare_base": {"hidden_size": 256}, "evaluate": {"parallel": 1}}  # timing holds two models
    for now, less in (("f16", "q8_0"), ("q8_0", "q4_K_M")):
        found = advised("evaluate", export={"quantization": now}, **on_256)
        parameters = made(params_of("smoke", **on_256)).memories["baseline_lora"].weights.parameters
        saved = 2 * (gguf_bytes(now, parameters, 256) - gguf_bytes(less, parameters, 256))
        assert found[f"export.quantization: {less} (served and scored so)"] == saved > 0


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


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def in_cache(folder, repository, **files):
    """A hub model in a cache, as huggingface_hub lays it out."""
    snapshot = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True, exist_ok=True)
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for name, text in files.items():
        (snapshot / name).write_text(text)


def test_weights_in_the_hubs_cache_are_not_downloaded_again(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})
    assert not bases.downloaded("org/name") and not bases.downloaded("no hub id at all")
    in_cache(tmp_path, "org/name", **{"config.json": "{}", "model.safetensors.index.json": index, SHARDS[0]: ""})
    assert not bases.downloaded("org/name")  # broken off
    in_cache(tmp_path, "org/name", **{SHARDS[1]: ""})
    assert bases.downloaded("org/name") and not bases.downloaded("org/name", "v2")
    in_cache(tmp_path, "org/other", **{"model.safetensors.index.json": "[]"})
    assert not bases.downloaded("org/other")

    section = params_of("llama3_8b").prepare_base
    found = base_of(section)
    assert found.to_download and found.merged_to_download
    in_cache(tmp_path, section.source, **{"model.safetensors": ""})
    found = base_of(section)
    assert not found.to_download and found.merged_to_download
    in_cache(tmp_path, section.merge_source, **{"pytorch_model.bin": ""})
    assert not base_of(section).merged_to_download


def test_downloads_are_charged_to_the_disk_that_they_go_to():
    params = params_of("smoke", matrix={"arms": ["baseline_lora"]})
    base = dataclasses.replace(base_of(params.prepare_base), to_download=True, merged_to_download=True)
    case = Case(params, base, Lengths(64, 64, "a test", 50), False, lambda arm: None)
    alone = next(v.needed for v in made(params).verdicts if v.resource == DISK)
    size = 2 * 2 * made(params).memories["baseline_lora"].weights.parameters  # twice, in 16 bit
    for room, fits in ((None, True), (size, True), (size - 1, False)):
        found = make(case, Machine(64 * GB, 500 * GB, hub_disk=room), doubled=False)
        needed = {v.resource: v.needed for v in found.verdicts if v.resource in (DISK, HUB_DISK)}
        assert needed == ({DISK: alone + size} if room is None else {DISK: alone, HUB_DISK: size})
        assert found.fits == fits
        assert sum("a whole run from nothing" in note for note in found.notes) == 1
    apart = next(v for v in found.verdicts if v.resource == HUB_DISK)
    said = (
        f"needs about {plan.human(size)} of HF_HOME's disk; this machine has {plan.human(size - 1)} free: does not fit"
    )
    assert plan.sentence(apart) == said
