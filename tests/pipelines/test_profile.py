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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gsm8k+qnli", "expected one task, got gsm8k, qnli"),
        ("smoke+llama3_8b", "expected one size, got smoke, llama3_8b"),
        ("qlora+qlora", "expected each once, got qlora more than once"),
        ("gsm8k+", "no profile '' in profiles/"),
        ("gsm9k+smoke", r"no profile 'gsm9k' in profiles/\. Did you mean 'gsm8k'\?"),
        ("gsm9k+smok", r"'gsm9k'.*\n.*no profile 'smok'"),
        ("_recipe+smoke", r"no profile '_recipe' in profiles/\..* Available: ablation, alpaca"),
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
        ({"a": "kind: task\nbased_on: b\n", "b": "kind: task\nbased_on: a\n"}, r"a -> b -> a goes round"),
        ({"a": "kind: task\nbased_on: tiny\n"}, "expected 'tiny' to be a task, got a size"),
        ({"a": "kind: task\nbased_on: _none\n"}, "no profile '_none'"),
        ({"a": "kind: variant\nschedule: 3\n"}, "schedule: expected sections, got 3"),
        ({"a": "kind: variant\nschedule: {train: 4}\n"}, r"schedule\.train: expected keys of that section, got 4"),
        ({"a": "kind: variant\nfull_size: {}\n"}, "full_size: unknown key"),
    ],
)
def test_broken_keys_of_a_profile(tmp_path, files, reason):
    lay(tmp_path, **files)
    with pytest.raises(ConfigError, match=reason):
        profile.compose("a", tmp_path)


def lay(folder, **files):
    """Profiles of a test beside the basis."""
    (folder / "tiny.yaml").write_text((profile.PROFILES / "tiny.yaml").read_text())
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_task_is_based_on_others_and_takes_their_size_and_schedule(tmp_path):
    lay(
        tmp_path,
        large="prepare_base: {source: org/name}\n",
        _common="kind: task\nsize: large\nexport: {num_ctx: 300}\nfull_size: {train: {rank: 7, alpha: 5}}\n",
        mine="kind: task\nbased_on: _common\nevaluate: {max_tokens: 7}\nfull_size: {train: {alpha: 9}}\n",
        own="kind: task\nbased_on: mine\nsize: tiny\n",
    )
    assert "_common" not in profile.available(tmp_path)
    found = composed("mine", tmp_path)
    assert (found["prepare_base"]["source"], found["export"]["num_ctx"], found["evaluate"]["max_tokens"]) == (
        "org/name", 300, 7
    )  # fmt: skip
    assert (found["train"]["rank"], found["train"]["alpha"]) == (7, 9)
    small = composed("own", tmp_path)
    assert small["prepare_base"]["source"] == "embedded" and small["evaluate"]["max_tokens"] == 7
    assert small["train"] == composed("tiny")["train"]


def test_the_later_of_two_variants_wins_and_a_schedule_yields_to_the_tasks(tmp_path):
    lay(
        tmp_path,
        large="prepare_base: {source: org/name}\n",
        asks="kind: task\nfull_size: {train: {eval_steps: 70}}\n",
        plain="kind: task\n",
        one="kind: variant\ntrain: {rank: 5}\nschedule: {train: {eval_steps: 20}}\n",
        two="kind: variant\ntrain: {rank: 6}\n",
    )
    for name, rank, steps in (
        ("one+two", 6, 20),
        ("two+one", 5, 20),
        ("one+asks", 5, 20),
        ("asks+large+one", 5, 70),
        ("plain+large+one", 5, 20),
        ("large+one", 5, 20),
    ):
        train = composed(name, tmp_path)["train"]
        assert (name, train["rank"], train["eval_steps"]) == (name, rank, steps)


def test_entries_that_share_their_text_are_changed_one_by_one(tmp_path):
    shared = "arms:\n  mine: &a {variant_of: pure_grit, weight_decay: 0.1}\n  yours: *a\n"
    lay(tmp_path, one=f"kind: variant\n{shared}", two="kind: variant\narms: {mine: {weight_decay: 0.2}}\n")
    arms = composed("one+two", tmp_path)["arms"]
    assert (arms["mine"]["weight_decay"], arms["yours"]["weight_decay"]) == (0.2, 0.1)


def test_the_header_names_all_files_in_the_order_in_which_they_are_merged():
    header = " ".join(
        line.removeprefix("# ") for line in profile.compose("paper+qnli").split("\nprofile:")[0].split("\n")
    )
    names = ("tiny", "llama3_8b", "llama3_2_3b", "_recipe", "_recipe_long", "qnli", "paper")
    assert f"`python -m pipelines.profile paper+qnli` from {', '.join(f'profiles/{n}.yaml' for n in names)}. " in header


def test_an_arm_that_is_a_variant_of_none_is_itself(tmp_path):
    lay(tmp_path, a="arms: {pure_grit: {variant_of: null}, mine: {variant_of: pure_grit}}\n")
    p = parse_params(composed("a", tmp_path))
    arms = ("pure_grit", "mine", "baseline_lora")
    assert [p.code_of(arm) for arm in arms] == ["pure_grit", "pure_grit", "baseline_lora"]
    assert p.train_for("mine") == p.train_for("pure_grit") == parse_params(composed("tiny")).train_for("pure_grit")


def test_edits_on_top_of_several_profiles_are_named(params):
    profile.choose("gsm8k+smoke", params_file=params)
    assert profile.hand_edits(params) == []
    params.write_text(params.read_text().replace("source: hub ", "source: inputs/gsm8k "))
    assert profile.hand_edits(params) == ["prepare_data.source: 'hub' → 'inputs/gsm8k'"]
