"""Choosing a profile rewrites params.yaml and loses nothing."""

import pytest
import yaml

from pipelines import profile
from pipelines.config import ConfigError, parse_params


@pytest.fixture
def params(tmp_path):
    file = tmp_path / "params.yaml"
    profile.choose("tiny", params_file=file)
    return file


def test_a_profile_is_the_basis_with_its_differences(params):
    assert profile.choose("smoke", params_file=params)
    chosen, basis = yaml.safe_load(params.read_text()), yaml.safe_load(profile.compose("tiny"))
    over = yaml.safe_load((profile.PROFILES / "smoke.yaml").read_text())
    assert chosen["profile"] == "smoke"
    assert chosen["train"]["max_steps"] == over["train"]["max_steps"] != basis["train"]["max_steps"]
    assert chosen["train"]["target_modules"] == basis["train"]["target_modules"]


def test_choosing_again_changes_nothing(params):
    before = params.read_bytes()
    assert not profile.choose("tiny", params_file=params)
    assert params.read_bytes() == before


def test_comments_with_units_survive(params):
    assert "# optimizer steps" in params.read_text()


def test_hand_edits_stop_a_switch_and_are_named(params):
    steps = yaml.safe_load(params.read_text())["train"]["max_steps"]
    edited = params.read_text().replace(f"max_steps: {steps} ", "max_steps: 601 ")
    assert yaml.safe_load(edited)["train"]["max_steps"] == 601 != steps
    params.write_text(edited)
    with pytest.raises(ConfigError, match=rf"train\.max_steps: {steps} → 601"):
        profile.choose("smoke", params_file=params)
    assert params.read_text() == edited
    assert not profile.choose("tiny", params_file=params)  # staying keeps the edits
    assert params.read_text() == edited
    assert profile.choose("smoke", params_file=params, force=True)


def test_unknown_profile(params):
    with pytest.raises(ConfigError, match=r"Did you mean 'smoke'\?.*Available: .*tiny"):
        profile.choose("smok", params_file=params)


def test_broken_profile_is_refused_before_anything_is_written(params, tmp_path):
    folder = tmp_path / "profiles"
    folder.mkdir()
    (folder / "tiny.yaml").write_text((profile.PROFILES / "tiny.yaml").read_text())
    (folder / "mine.yaml").write_text("train: {rank: -1}\n")
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=r"mine\.yaml.*\n.*train\.rank"):
        profile.choose("mine", params_file=params, folder=folder)
    assert params.read_bytes() == before


TASKS = ("alpaca", "boolq", "dolly", "gsm8k", "qnli")


def composed(name, folder=profile.PROFILES):
    return yaml.safe_load(profile.compose(name, folder))


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_runs_on_its_size_with_the_settings_of_document_002(task):
    p = parse_params(composed(task))
    assert p.prepare_base.source == "meta-llama/Llama-3.2-3B" and p.prepare_data.task == task
    assert p.prepare_data.source == "hub" and p.prepare_data.train_items is None
    t = p.train_for("pure_grit")
    assert (t.learning_rate, t.max_grad_norm, t.batch_size * t.gradient_accumulation) == (2e-5, 1.5, 32)
    assert t.max_steps is None and t.epochs in (1, 3) and t.quantize_base == "none" and t.precision == "bf16"
    assert t.grit["kfac_update_freq"] in (50, 150) and t.grit["min_lora_rank"] == 8
    assert t.grit["reprojection_warmup_steps"] == t.grit["rank_adaptation_start_step"] in (150, 500)
    assert t.grit == p.train_for("hybrid_grit").grit
    assert p.evaluate.max_tokens + 300 < p.export.num_ctx == p.measure.max_tokens


def test_tasks_of_one_length_have_one_schedule():
    def schedule(task):
        p = parse_params(composed(task))
        return p.arms["pure_grit"], p.train.eval_steps

    assert schedule("boolq") == schedule("dolly") == schedule("gsm8k") != schedule("alpaca") == schedule("qnli")


@pytest.mark.parametrize("size", ["llama3_8b", "llama3_1_8b", "llama3_2_3b"])
@pytest.mark.parametrize("task", TASKS)
def test_every_size_takes_32_items_a_step(task, size):
    train = composed(f"{task}+{size}")["train"]
    assert train["batch_size"] * train["gradient_accumulation"] == 32


@pytest.mark.parametrize("task", TASKS)
def test_a_task_on_a_small_size_keeps_how_that_is_trained(task):
    small, found = composed("smoke"), composed(f"{task}+smoke")
    assert found["prepare_data"]["task"] == task
    assert found["prepare_base"] == {**small["prepare_base"], "context": 512}
    assert found["arms"] == small["arms"] and found["matrix"] == small["matrix"]
    assert found["train"] == {**small["train"], "max_length": 512, "overlong": "leave_out"}
    assert composed(f"smoke+{task}") == {**found, "profile": f"smoke+{task}"}


def test_sizes_build_on_each_other_and_qlora_is_one_switch():
    small, large, quantized = (composed(name) for name in ("gsm8k", "gsm8k+llama3_1_8b", "gsm8k+llama3_1_8b+qlora"))
    assert large["prepare_base"]["source"] == "meta-llama/Llama-3.1-8B"
    assert large["train"]["epochs"] == small["train"]["epochs"] == 3
    assert large["prompt"] == small["prompt"] == composed("llama3_8b")["prompt"]
    assert quantized["train"] == {**large["train"], "quantize_base": "nf4"}
    assert composed("gsm8k+llama3_8b")["prepare_base"]["source"] == "unsloth/llama-3-8b-bnb-4bit"


def test_ablations_are_arms_that_differ_in_one_thing_each():
    raw = composed("gsm8k+ablation")
    p = parse_params(raw)
    assert {p.code_of(arm) for arm in ("grit_2s", "grit_1s", "grit_2s_fixed_k")} == {"pure_grit"}
    two, one, fixed = (p.train_for(arm).grit for arm in ("grit_2s", "grit_1s", "grit_2s_fixed_k"))
    assert two == {**p.train_for("pure_grit").grit, "reprojection": "paper", "use_two_sided_reprojection": True}
    assert one == {**two, "use_two_sided_reprojection": False}
    assert fixed == {**two, "enable_rank_adaptation": False, "reprojection_k": 8}
    assert p.train_for("grit_1s").learning_rate == p.train_for("pure_grit").learning_rate


def test_the_authors_arithmetic_is_a_variant():
    from dataclasses import asdict

    from grit import GRITConfig

    asked = GRITConfig.from_dict(parse_params(composed("paper")).train_for("pure_grit").grit)
    for name in ("mode", "pairing", "damping_mode", "normalize_delta", "reprojection", "cov_decay", "rank_shrink"):
        assert asdict(asked)[name] == asdict(GRITConfig.paper())[name]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gsm8k+qnli", "expected one task, got gsm8k, qnli"),
        ("smoke+llama3_8b", "expected one size, got smoke, llama3_8b"),
        ("qlora+qlora", "expected each once, got qlora more than once"),
        ("gsm8k+", "no profile '' in profiles/"),
        ("gsm9k+smoke", r"no profile 'gsm9k' in profiles/\. Did you mean 'gsm8k'\?"),
        ("gsm9k+smok", r"'gsm9k'.*\n.*no profile 'smok'"),
    ],
)
def test_names_that_cannot_be_put_together(name, reason):
    with pytest.raises(ConfigError, match=reason):
        profile.compose(name)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a": "kind: sice\n"}, "kind: expected one of size, task, variant, got 'sice'"),
        ({"a": "based_on: b\n", "b": "based_on: a\n"}, r"a -> b -> a goes round"),
        ({"a": "based_on: b\n", "b": "kind: variant\n"}, "expected 'b' to be a size, got a variant"),
        ({"a": "based_on: nothing\n"}, "no profile 'nothing'"),
        ({"a": "size: tiny\n"}, "size: unknown key"),
        ({"a": "arms: {mine: {variant_of: yours}}\n"}, "arms.mine.variant_of: expected an arm"),
        ({"a": "- 1\n"}, "expected sections, got list"),
        ({"a": "kind: [task]\n"}, r"kind: expected one of .*got \['task'\]"),
        ({"a": "kind: task\nsize: 3\n"}, "size: expected the name of a profile, got 3"),
        ({"a": "based_on: 3\n"}, "based_on: expected the name of a profile, got 3"),
        ({"a": "kind: task\nfull_size: 3\n"}, "full_size: expected sections, got 3"),
        (
            {"a": "kind: task\nprepare_base: 3\nfull_size: {train: 4}\n"},
            r"prepare_base: .*got 3\n.*full_size.train: .*4",
        ),
        ({"a": "arms: 3\n"}, "arms: expected keys of that section, got 3"),
        ({"a": "train:\n"}, "train: expected keys of that section, got None"),
        ({"a": "arms: {mine: {variant_of: [1]}}\n"}, r"variant_of: expected an arm .*got \[1\]"),
    ],
)
def test_broken_keys_of_a_profile(tmp_path, files, reason):
    (tmp_path / "tiny.yaml").write_text((profile.PROFILES / "tiny.yaml").read_text())
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        profile.compose("a", tmp_path)


def test_edits_on_top_of_several_profiles_are_named(params):
    profile.choose("gsm8k+smoke", params_file=params)
    assert profile.hand_edits(params) == []
    params.write_text(params.read_text().replace("source: hub ", "source: inputs/gsm8k "))
    assert profile.hand_edits(params) == ["prepare_data.source: 'hub' → 'inputs/gsm8k'"]
