"""vlm/params.yaml: a schema of its own, and everything wrong with it said at once."""

import copy
from pathlib import Path

import pytest
import yaml

from pipelines import profile
from pipelines.config import ConfigError, for_text, load_params, main, parse_params
from pipelines.schema import Params
from pipelines.schema_vision import VisionParams
from pipelines.twin import settings_for
from trainers.vision.settings import NaturalGradient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def raw():
    return yaml.safe_load((ROOT / "vlm/params.yaml").read_text(encoding="utf-8"))


def test_a_key_tells_the_pipelines_apart(raw):
    params = parse_params(raw)
    assert isinstance(params, VisionParams) and params.registry.arms["grit_vlm"].startswith("trainers.vision")
    text = parse_params(yaml.safe_load(profile.compose("tiny")))
    assert isinstance(text, Params) and "grit_vlm" not in text.registry.arms
    assert for_text(text, "the plan") is text
    with pytest.raises(ConfigError, match=r"stage export: only in the pipeline for text; .*`pipeline: vision`"):
        for_text(params, "stage export")


@pytest.mark.parametrize("word", ["vison", "text", None, ["vision"]])
def test_a_pipeline_that_there_is_not(raw, word):
    with pytest.raises(ConfigError, match=r"pipeline: unknown pipeline .*Available: vision; without the key"):
        parse_params({**raw, "pipeline": word})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.learnig_rate", 1e-3, r"train\.learnig_rate: unknown key; did you mean 'learning_rate'\?"),
        ("export", {}, r"export: unknown key"),
        ("prepare_data.task", "aqi", r"prepare_data\.task: unknown task 'aqi'\. Available: aqi_vision"),
        ("prepare_data.image_sizes", 32, r"prepare_data\.image_sizes: unknown key; did you mean 'image_size'\?"),
        ("prepare_data.image_size", 30, r"prepare_base\.image_size: expected prepare_data\.image_size = 30"),
        ("prepare_base.patch_size", 5, r"prepare_base: image_size: expected a multiple of patch_size 5"),
        ("prepare_base.merge_source", "x", r"prepare_base\.merge_source: unknown key"),
        (
            "prompt.template",
            "chat",
            r"prompt\.template: chat is only in the pipeline for text; .*for SmolVLM '<\|im_start",
        ),
        (
            "train.unsloth_fused_lora",
            True,
            r"train: unsloth_fused_lora: expected false, .*an arm of the pipeline for text",
        ),
        (
            "train.layers",
            {"vision": {"strategy": "first_n"}},
            r"train: layers\.vision\.n_layers: FIRST_N wants a whole number",
        ),
        (
            "train.layers",
            {"vision": {"strateg": "all"}},
            r"layers\.vision\.strateg: unknown key; did you mean 'strategy'",
        ),
        ("train.layers.max_layers_per_modalty", 2, r"unknown key; did you mean 'max_layers_per_modality'\?"),
        (
            "arms.grit_vlm.natural_gradient.dampng",
            0.1,
            r"natural_gradient\.dampng: unknown key; did you mean 'damping'",
        ),
        ("evaluate.backend", "ollama", r"evaluate\.backend: .*'hf', got 'ollama'"),
        ("matrix.arms", ["baseline_lora", "grit_vml"], r"unknown arm 'grit_vml'; did you mean 'grit_vlm'\?"),
        ("matrix.arms", ["pure_grit"], r"matrix\.arms: unknown arm 'pure_grit'"),
        ("arms.mine", {"variant_of": "grit_vml"}, r"arms\.mine\.variant_of: unknown arm 'grit_vml'; did you mean"),
        ("arms.baseline_lora", {"rank": 0}, r"arms\.baseline_lora\.rank: .*got 0"),
        ("train", ..., r"train: missing; vlm/params\.yaml as it is in the repository shows every key"),
    ],
)
def test_each_error(raw, path, value, message):
    *parents, last = path.split(".")
    at = raw
    for part in parents:
        at = at[part]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    with pytest.raises(ConfigError, match=message):
        parse_params(raw)


def test_all_errors_at_once(raw, tmp_path, monkeypatch, capsys):
    wrong = copy.deepcopy(raw)
    wrong["train"]["rank"] = -4
    wrong["prepare_base"]["vision_haeds"] = 2
    wrong["evaluate"]["threads"] = 1
    wrong["arms"]["baseline_lora"] = {"natural_gradient": {}, "rnk": 2}
    wrong["measure"] = {}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(wrong))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "params.yaml: 6 errors" in said
    for line in (
        "train.rank: ",
        "prepare_base.vision_haeds: unknown key; did you mean 'vision_heads'?",
        "evaluate.threads: unknown key",
        "arms.baseline_lora.natural_gradient: baseline_lora does not use the natural gradient",
        "arms.baseline_lora.rnk: unknown key; did you mean 'rank'?",
        "measure: unknown key",
    ):
        assert f"\n  {line}" in said


def test_the_optimizers_settings_belong_to_an_arm(raw):
    raw["train"]["natural_gradient"] = raw["arms"]["grit_vlm"].get("natural_gradient") or {}
    with pytest.raises(ConfigError, match=r"natural_gradient: settings of the natural gradient belong to an arm"):
        parse_params(raw)


def test_the_text_pipeline_has_no_task_with_pictures():
    raw = yaml.safe_load(profile.compose("tiny"))
    raw["prepare_data"]["task"] = "aqi_vision"
    with pytest.raises(ConfigError, match=r"prepare_data\.task: aqi_vision is a task of the vision pipeline"):
        parse_params(raw)


def test_a_twin_gets_the_same_settings_by_file(raw, tmp_path):
    """Rates below 1e-4 among them: as JSON, YAML takes 2e-05 for a text."""
    raw["train"]["learning_rate"] = 2e-5
    params = parse_params(raw)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump()))
    assert load_params(tmp_path / "params.yaml") == params


def test_every_mistake_in_the_layers_is_said_at_once(raw):
    raw["train"]["layers"] = {"vision": {"strategy": "last_n"}, "text": {"strategy": "every_nth"}}
    raw["train"]["unsloth_fused_lora"] = True
    with pytest.raises(ConfigError) as caught:
        parse_params(raw)
    lines = str(caught.value).splitlines()[1:]
    assert len([line for line in lines if line.startswith("  train: ")]) == 3, lines


def test_an_arm_that_sets_nothing_has_the_methods_defaults(raw):
    defaults = NaturalGradient()
    raw["arms"] |= {"grit_vlm": {}, "said": {"variant_of": "grit_vlm", "natural_gradient": defaults.model_dump()}}
    params = parse_params(raw)
    silent, said = (params.train_for(arm).model_config_of_layers() for arm in ("grit_vlm", "said"))
    assert silent == said and silent.fisher_damping == defaults.damping
    assert all(own.enable_natural_gradient and not own.enable_projection for own in silent.modalities.values())
    beside = settings_for(params, "baseline_lora", "grit_vlm")
    assert beside.natural_gradient is None and beside.layers == params.train_for("grit_vlm").layers


def test_the_baseline_beside_an_arm_has_the_arms_settings_and_its_own_optimizer(raw):
    raw["arms"]["grit_vlm"]["rank"] = 3
    params = parse_params(raw)
    own, beside = params.train_for("grit_vlm"), settings_for(params, "baseline_lora", "grit_vlm")
    assert settings_for(params, "grit_vlm", "grit_vlm") == own
    assert beside.rank == 3 and beside.grit is None
    assert getattr(beside, "natural_gradient", None) is None
    assert beside == own.model_copy(update=dict.fromkeys({"grit", "natural_gradient"} & own.model_fields_set))
