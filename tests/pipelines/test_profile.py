"""Choosing a profile rewrites params.yaml without losing changes; what each profile promises."""

import shutil
import subprocess
from dataclasses import asdict

import pytest
import yaml
from ruamel.yaml import YAML

from grit import GRITConfig
from pipelines import profile
from pipelines.check import load_params, parse_params
from pipelines.params import ConfigError, load_yaml

TASKS = ("alpaca", "boolq", "dolly", "gsm8k", "qnli")
ABLATIONS = ("grit_2s", "grit_1s", "grit_2s_fixed_k")


def settings(name):
    return profile.merged(name)[0]


def planned(name):
    return parse_params(settings(name))


@pytest.fixture
def params(tmp_path):
    file = tmp_path / "params.yaml"
    profile.choose("tiny", params_file=file)
    return file


def test_every_profile_is_valid_and_equals_its_text(tmp_path):
    names, file = profile.available(), tmp_path / "params.yaml"
    assert {"tiny", "smoke", "paper", "ablation", "qlora", "vision", "llama3_8b", *TASKS} <= names.keys()
    for name in [*names, "vision+smoke", "gsm8k+llama3_1_8b+qlora"]:
        file.write_text(profile.compose(name))
        assert load_yaml(file) == settings(name)
        assert planned(name).profile == name


def test_without_a_name_the_profiles_are_listed(capsys):
    profile.main("")
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts.keys() == profile.available().keys()
    assert all(line.endswith(".") for line in facts.values()), "a first line is a sentence"


def test_params_yaml_as_committed_is_the_tiny_profile(tmp_path):
    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], capture_output=True, check=False)
    if committed.returncode:
        pytest.skip("no git checkout")
    (tmp_path / "params.yaml").write_bytes(committed.stdout)
    assert load_params(tmp_path / "params.yaml") == planned("tiny")


def test_a_switch_keeps_comments_and_happens_once(params):
    before = params.read_bytes()
    assert b"# optimizer steps" in before
    assert not profile.choose("tiny", params_file=params) and params.read_bytes() == before
    assert profile.choose("smoke", params_file=params)
    chosen, basis = yaml.safe_load(params.read_text()), settings("tiny")
    assert (chosen["profile"], chosen["train"]["max_steps"]) == ("smoke", 80)
    assert chosen["train"]["target_modules"] == basis["train"]["target_modules"]
    assert "# optimizer steps" in params.read_text()


@pytest.mark.parametrize("name", ["tiny", "gsm8k+smoke"])
def test_manual_changes_stop_a_switch_and_are_named(params, name):
    profile.choose(name, params_file=params)
    steps = settings(name)["train"]["max_steps"]
    edited = params.read_text().replace(f"max_steps: {steps} ", "max_steps: 601 ")
    assert yaml.safe_load(edited)["train"]["max_steps"] == 601 != steps
    params.write_text(edited)
    with pytest.raises(ConfigError, match=rf"lose:\n  train\.max_steps: {steps} → 601\nKeep them"):
        profile.choose("qlora", params_file=params)
    assert not profile.choose(name, params_file=params), "staying keeps them"
    assert params.read_text() == edited
    assert profile.choose("qlora", params_file=params, force=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smok", r"no profile 'smok' in profiles/; did you mean 'smoke'\? Available: .*tiny"),
        ("gsm8k+qnli", "expected one task, got gsm8k, qnli"),
        ("smoke+llama3_8b", "expected one size, got smoke, llama3_8b"),
        ("tiny+smoke", "expected one size, got tiny, smoke"),
        ("qlora+qlora", "qlora more than once"),
        ("gsm8k+", "no profile '' in profiles/"),
        ("gsm9k+smok", r"'gsm9k'.*\n.*no profile 'smok'"),
        ("recipe+smoke", "no profile 'recipe'"),
    ],
)
def test_names_that_cannot_be_combined(name, reason):
    with pytest.raises(ConfigError, match=reason):
        profile.compose(name)


def lay(folder, **files):
    """Write profiles beside tiny.yaml; a__b is a/b."""
    for name, text in {"tiny": (profile.PROFILES / "tiny.yaml").read_text(), **files}.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("train: {rank: -1}\n", r"a\.yaml.*\n.*train\.rank"),
        ("kind: task\n", r"a\.yaml: 1 error\n  kind: unknown key"),
        ("- 1\n", r"a\.yaml: expected sections, got list"),
        ("arms: 3\n", r"a\.yaml: arms: expected keys of that section, got 3"),
        ("train:\n", r"a\.yaml: train: expected keys of that section, got None"),
        ("arms: {mine: {variant_of: yours}}\n", r"arms\.mine\.variant_of: expected an arm .*got 'yours'"),
        ("arms: {mine: {variant_of: [1]}}\n", r"arms\.mine\.variant_of: expected an arm .*got \[1\]"),
    ],
)
def test_a_broken_profile_is_refused_before_anything_is_written(tmp_path, params, text, reason):
    lay(tmp_path / "profiles", a=text)
    before = params.read_bytes()
    with pytest.raises(ConfigError, match=reason):
        profile.choose("a", params_file=params, folder=tmp_path / "profiles")
    assert params.read_bytes() == before


def test_files_are_merged_in_the_documented_order(tmp_path):
    lay(
        tmp_path,
        sizes__large="prepare_base: {source: org/name}\ntrain: {rank: 3}\n",
        sizes__small="train: {rank: 4}\n",
        tasks__recipe="train: {alpha: 5}\n",
        tasks__full__recipe="train: {rank: 6, eval_steps: 70}\n",
        tasks__full__asks="train: {eval_steps: 71}\n",
        tasks__asks="evaluate: {max_tokens: 7}\n",
        one="train: {save_steps: 1}\n",
        two="train: {save_steps: 2}\n",
    )

    def result(name):
        train = profile.merged(name, tmp_path)[0]["train"]
        return tuple(train[key] for key in ("rank", "alpha", "eval_steps", "save_steps"))

    basis = result("tiny")
    assert result("large") == (3, *basis[1:]) and result("one+two") == (*basis[:3], 2) and result("two+one")[3] == 1
    assert result("asks+small") == result("small+asks") == (4, 5, *basis[2:])
    assert result("asks+tiny") == (basis[0], 5, *basis[2:])
    assert result("two+asks+one+large") == (3, 5, 71, 1), "what is not shipped wins"
    assert profile.merged("asks+small", tmp_path)[0]["evaluate"]["max_tokens"] == 7


def test_a_variant_inherits_the_settings_of_its_arm(tmp_path):
    lay(
        tmp_path,
        a="arms: {mine: &a {variant_of: pure_grit, weight_decay: 0.1}, yours: *a, pure_grit: {variant_of: null}}\n",
        b="arms: {mine: {weight_decay: 0.2}}\n",
    )
    p = parse_params(profile.merged("a+b", tmp_path)[0])
    mine, yours, of = (p.train_for(arm) for arm in ("mine", "yours", "pure_grit"))
    assert (mine.weight_decay, yours.weight_decay) == (0.2, 0.1) and p.code_of("pure_grit") == "pure_grit"
    assert mine.model_copy(update={"weight_decay": of.weight_decay}) == of == planned("tiny").train_for("pure_grit")


def test_the_header_names_all_files_in_merge_order():
    output = profile.compose("paper+qnli").split("\nprofile:")[0].replace("\n# ", " ")
    names = ("tiny", "sizes/llama3_2_3b", "tasks/recipe", "tasks/qnli", "tasks/full/recipe", "tasks/full/qnli", "paper")
    files = ", ".join(f"profiles/{name}.yaml" for name in names)
    assert f"`python -m pipelines.profile paper+qnli` from {files}. " in output


# What the profiles promise


def test_llama3_8b_has_the_settings_of_the_experiment():
    p = planned("llama3_8b")
    t = p.train_for("baseline_lora")
    assert p.prepare_base.source == "unsloth/llama-3-8b-bnb-4bit"
    assert (t.rank, t.alpha, t.batch_size, t.gradient_accumulation) == (16, 32, 2, 4)
    assert (t.learning_rate, t.warmup_steps, t.max_length, t.quantize_base) == (2e-4, 5, 2048, "nf4")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_runs_on_its_size_at_a_rate_that_trains(task):
    p = planned(task)
    long = task in ("alpaca", "qnli")
    assert p.prepare_base.source == "meta-llama/Llama-3.2-3B" and p.prepare_data.task == task
    assert p.prepare_data.source == "hub" and p.prepare_data.train_items is None
    t = p.train_for("pure_grit")
    assert (t.learning_rate, t.batch_size * t.gradient_accumulation, t.warmup_steps) == (1e-4, 32, 5)
    assert p.train_for("baseline_lora").learning_rate == 2e-4
    assert (t.max_steps, t.epochs, t.precision) == (None, 1 if long or task == "dolly" else 3, "bf16")
    assert not t.grit and t.eval_steps == (250 if long else 100)
    assert p.evaluate.max_tokens + 300 < p.export.num_ctx == p.measure.max_tokens


@pytest.mark.parametrize("task", TASKS)
def test_a_task_on_a_small_size_keeps_its_training_settings(task):
    small, result = settings("smoke"), settings(f"{task}+smoke")
    assert result["prepare_data"]["task"] == task
    assert result["prepare_base"] == {**small["prepare_base"], "context": 512}
    assert result["arms"] == small["arms"] and result["matrix"] == small["matrix"]
    assert result["train"] == {**small["train"], "max_length": 512, "overlong": "leave_out"}


@pytest.mark.parametrize("arm", ["pure_grit", "hybrid_grit"])
@pytest.mark.parametrize(
    ("name", "custom"),
    [
        ("tiny+paper", {}),
        ("gsm8k+tiny+paper", {}),
        ("llama3_8b+paper", {}),
        ("smoke+paper", {"lora_rank": 4, "min_lora_rank": 2, "log_freq": 20}),
        ("gsm8k+paper", {}),
    ],
)
def test_paper_has_the_authors_settings(name, custom, arm):
    of = planned(name).train_for(arm)
    result, expected = asdict(GRITConfig.from_dict({"lora_rank": of.rank, **of.grit})), asdict(GRITConfig.paper())
    assert {key: value for key, value in result.items() if value != expected[key]} == custom


@pytest.mark.parametrize("name", ["gsm8k+ablation", "tiny+ablation", "gsm8k+smoke+ablation"])
def test_ablations_differ_in_one_setting_each(name):
    p = planned(name)
    assert {p.code_of(arm) for arm in ABLATIONS} == {"pure_grit"}
    two, one, fixed = (p.train_for(arm).grit for arm in ABLATIONS)
    whole = {**(p.train_for("pure_grit").grit or {}), "reprojection_freq": 50}
    assert two == {**whole, "reprojection": "paper", "use_two_sided_reprojection": True}
    assert one == {**two, "use_two_sided_reprojection": False}
    assert fixed == {**two, "enable_rank_adaptation": False, "reprojection_k": 8}
    assert p.train_for("grit_1s").learning_rate == p.train_for("pure_grit").learning_rate


PLACES = ("", "sizes/", "tasks/")
SHIPPED = [name for name in profile.available() if name != "tiny"]


def leaves(tree, *path):
    """(path, value) of every setting that is not itself a mapping of settings."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, *path, key)
        else:
            yield (*path, key), value


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def has(tree, path):
    try:
        at(tree, path)
    except (KeyError, TypeError):
        return False
    return True


def another(value):
    """A value that no shipped profile has."""
    return {"mine": 1} if isinstance(value, dict) else ["mine"] if isinstance(value, list) else "mine"


@pytest.mark.parametrize("place", PLACES)
def test_what_somebody_writes_in_a_profile_stands_whatever_it_is_combined_with(tmp_path, place):
    folder = tmp_path / "profiles"
    shutil.copytree(profile.PROFILES, folder)
    written = {
        path: another(value) for path, value in leaves(settings("tiny")) if path[-1] not in ("profile", "variant_of")
    }
    mine: dict = {}
    for path, value in written.items():
        section = mine
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
    (folder / f"{place}mine.yaml").write_text(yaml.safe_dump(mine))
    for other in SHIPPED:
        if place == "tasks/" and (folder / f"tasks/{other}.yaml").is_file():
            continue  # one task at a time
        for name in (f"mine+{other}",):
            result = profile.merged(name, folder)[0]
            stands = {path: at(result, path) for path in written}
            mappings = {path: {**stands[path], **value} for path, value in written.items() if isinstance(value, dict)}
            assert stands == written | mappings, name


def test_a_length_or_rate_of_ones_own_replaces_those_of_task_and_arms(tmp_path):
    folder = tmp_path / "profiles"
    shutil.copytree(profile.PROFILES, folder)
    (folder / "sizes/mine.yaml").write_text(
        "prepare_base: {source: org/name}\ntrain: {max_steps: 24, learning_rate: 1.0e-3, batch_size: 8}\n"
    )
    p = parse_params(profile.merged("classify+mine", folder)[0])
    for arm in ("baseline_lora", "pure_grit"):
        t = p.train_for(arm)
        assert (t.max_steps, t.epochs, t.learning_rate, t.batch_size) == (24, None, 1e-3, 8)


def comments(text):
    """Setting → the comment behind it, of a YAML text."""
    return {path: comment for path, comment in _comments(YAML().load(text)) if comment}


def _comments(tree, *path):
    for key, value in tree.items():
        token = (tree.ca.items.get(key) or [None] * 3)[2]
        if not isinstance(value, dict) or value.fa.flow_style():
            yield (*path, key), token.value.partition("\n")[0].lstrip("# ") if token else ""
        else:
            yield from _comments(value, *path, key)


@pytest.mark.parametrize("name", [*SHIPPED, "alpaca+llama3_8b", "gsm8k+smoke+ablation", "vision+smoke"])
def test_a_comment_is_that_of_the_last_file_that_set_the_value_or_describes_the_key(name):
    files = profile.merged(name)[1]
    basis = comments(files[0].read_text())
    written = [(load_yaml(file), comments(file.read_text())) for file in files[1:]]
    for path, comment in comments(profile.compose(name)).items():
        last = next((of[1] for of in reversed(written) if has(of[0], path)), {})
        assert comment in (basis.get(path), last.get(path)), path


def test_the_comment_behind_an_inline_mapping_goes_with_its_value(tmp_path):
    tiny = (profile.PROFILES / "tiny.yaml").read_text()
    tuned = tiny.replace("optim_args: {betas: [0.7, 0.999]}", "optim_args: {betas: [0.7, 0.999]}  # β₁, β₂", 1)
    lay(tmp_path, tiny=tuned, mine="arms:\n  baseline_lora:\n    optim_args: {betas: [0.8, 0.9]}  # mine\n")
    line = next(line for line in profile.compose("mine", tmp_path).splitlines() if "0.8, 0.9" in line)
    assert line.split() == ["optim_args:", "{betas:", "[0.8,", "0.9]}", "#", "mine"]
